"""Download a model from the Hub, on a terminal: `python download-model.py user/model`. The page's Model tab does the same.

Interrupt it at any time; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from modules import log, system
from modules.downloads import Downloads, Plan, Status
from modules.errors import SettingsError, UserError
from modules.log import logger
from modules.paths import UserData

ROOT = Path(__file__).resolve().parent
REFRESH_SECONDS = 0.5


def main(argv: Sequence[str]) -> int:
    """Download, or check; the result is the process's exit code."""
    log.setup()
    system.exit_when_terminated()
    given = _parser().parse_args(argv)
    downloads: Downloads | None = None
    try:
        root = (ROOT / Path(given.user_data_dir).expanduser()).absolute()
        data = UserData(root, Path(given.model_dir).expanduser().absolute() if given.model_dir else None)
        downloads = Downloads(data, threads=given.threads, retries=given.max_retries)
        if given.specific_file and given.text_only:
            raise SettingsError("--specific-file and --text-only exclude each other. Leave one out.")
        plan = downloads.plan(given.model, given.branch, given.specific_file, given.exclude_pattern, given.text_only)
        output = Path(given.output).expanduser().absolute() if given.output else None
        return _checked(downloads, plan, output) if given.check else _download(downloads, plan, output, given.clean)
    except UserError as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.warning("Interrupted. The same command goes on where it was.")
        return 130
    finally:
        if downloads:
            downloads.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="download-model.py", description="Download a model, or an adapter, from the Hub.", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="user/model, user/model:branch, or a link to a repository or one of its files")
    parser.add_argument("--branch", default="", help="branch, tag or commit (default: main)")
    parser.add_argument("--threads", type=_number(1, 16), default=4, help="files fetched at the same time (default: 4)")
    parser.add_argument("--text-only", action="store_true", help="only texts: configuration, tokenizer, cards")
    parser.add_argument("--specific-file", default="", metavar="NAME", help="only this file, or those of a pattern with * and ?")
    parser.add_argument("--exclude-pattern", default="", metavar="REGEX", help="leave out files whose names this finds")
    parser.add_argument("--output", default="", metavar="PATH", help="folder for the files themselves, instead of one in the model folder")
    parser.add_argument("--model-dir", default="", metavar="PATH", help="model folder (default: models in the user data)")
    parser.add_argument("--user-data-dir", default="user_data", metavar="PATH", help="folder of models and settings (default: user_data)")
    parser.add_argument("--clean", action="store_true", help="begin anew, and replace files that are there already")
    parser.add_argument("--check", action="store_true", help="download nothing: say which files are missing or damaged")
    parser.add_argument("--max-retries", type=_number(0, 100), default=7, metavar="N", help="attempts more for each file (default: 7)")
    return parser


def _number(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"give a number from {low} to {high}")
        return int(text)

    return number


def _checked(downloads: Downloads, plan: Plan, output: Path | None) -> int:
    wrong = downloads.check(plan, output=output)
    for name in wrong:
        print(f"missing or damaged: {name}")
    print(f"{len(plan.chosen) - len(wrong)} of {len(plan.chosen)} files are as {plan.repo} lists them.")
    return 1 if wrong else 0


def _download(downloads: Downloads, plan: Plan, output: Path | None, clean: bool) -> int:
    if plan.kind == "gguf" and len(plan.chosen) < len(plan.files):
        _offer(plan)
    if plan.note:
        logger.info("%s", plan.note)
    id = downloads.start(plan, replace=clean, anew=clean, output=output)
    while (now := downloads.wait(id, REFRESH_SECONDS)).state in ("queued", "running"):
        _show(now)
    _show(now, end="\n")
    return 0 if now.state == "done" else 1


def _offer(plan: Plan) -> None:
    print(f"{plan.repo} has, smallest first (choose another one with --specific-file):")
    for file in sorted(plan.files, key=lambda file: file.size):
        if file.suffix == ".gguf":
            print(f"  {'*' if file.name in plan.chosen else ' '} {file.size / 2**20:10,.1f} MiB  {file.name}")


def _show(now: Status, end: str = "") -> None:
    """One line: rewritten on a terminal; elsewhere only the last one."""
    if not (end or sys.stdout.isatty()):
        return
    share = 100 * now.done / now.total if now.total else 100
    left = f", {now.left / 60:.0f} min left" if now.left is not None and not end else ""
    line = f"{', '.join(now.targets)[:60]}: {share:.0f} % of {now.total / 2**20:,.1f} MiB, {now.speed / 2**20:.1f} MiB/s{left} [{now.state}]"
    print(f"\r{line:<110}" if sys.stdout.isatty() else line, end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
