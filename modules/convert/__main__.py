"""`python -m modules.convert`: one conversion, in a process of its own. What it says on stdout are the lines of `output.Report`.

    python -m modules.convert to-hf MODEL.gguf FOLDER [--dtype float32|float16|bfloat16]
    python -m modules.convert to-gguf FOLDER MODEL.gguf [--type F32|F16|Q8_0]
    python -m modules.convert lora ADAPTER_FOLDER ADAPTER.gguf [--base FOLDER_OR_GGUF]

Each takes --force, to write over what is there. The last line says that the result is there, or with exit code 1 why it is not. SIGTERM ends it
without such a line; nothing is left of what it wrote.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from modules.convert.gguf_to_hf import DTYPES, gguf_to_hf
from modules.convert.hf_to_gguf import KINDS, hf_to_gguf
from modules.convert.lora_to_gguf import lora_to_gguf
from modules.convert.output import Report
from modules.errors import ModelError, UserError
from modules.system import exit_when_terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; the exit code."""
    arguments = _parser().parse_args(argv)
    report = Report(sys.stdout)
    try:
        _convert(arguments, report)
    except UserError as error:
        report.error(str(error))
        return 1
    except MemoryError:
        report.error("There is not enough memory for this conversion. Close other programs, or unload the model.")
        return 1
    except Exception as error:  # noqa: BLE001  # the border: what a library raises about a damaged file is told as well as may be
        traceback.print_exc()
        report.error(
            f"{arguments.source.name} is damaged, or of a kind not known here ({type(error).__name__}). Download it again, or use another one."
        )
        return 1
    return 0


def _convert(arguments: argparse.Namespace, report: Report) -> None:
    source, target, force = arguments.source.absolute(), arguments.target.absolute(), arguments.force
    if source == target or source.is_relative_to(target) or target.is_relative_to(source):
        raise ModelError("The result would lie in what is converted, or in its place. Choose another name.")
    if not source.exists():
        raise ModelError(f"There is nothing at {source}. Choose another file or folder.")
    try:
        if arguments.what == "to-hf":
            gguf_to_hf(source, target, arguments.dtype, report, force)
        elif arguments.what == "to-gguf":
            hf_to_gguf(source, target, arguments.type, report, force)
        else:
            lora_to_gguf(source, target, arguments.base, report, force)
    except ImportError as error:
        raise ModelError(f"{error.name or error} is not installed. `python start.py setup --all` installs what conversions need.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modules.convert", description="Convert between GGUF files and Hugging Face folders.")
    kinds = parser.add_subparsers(dest="what", required=True)
    to_hf = kinds.add_parser("to-hf", help="a GGUF file to a Hugging Face folder, dequantised")
    to_hf.add_argument("--dtype", choices=DTYPES, default="float16", help="numbers in the folder")
    to_gguf = kinds.add_parser("to-gguf", help="a Hugging Face folder to a GGUF file")
    to_gguf.add_argument("--type", choices=KINDS, default="F16", help="numbers in the file")
    lora = kinds.add_parser("lora", help="a LoRA adapter of PEFT to a GGUF adapter")
    lora.add_argument("--base", type=Path, help="the model that the adapter was trained on: a folder or a GGUF file")
    for kind in (to_hf, to_gguf, lora):
        kind.add_argument("source", type=Path)
        kind.add_argument("target", type=Path)
        kind.add_argument("--force", action="store_true", help="write over what is there")
    return parser


if __name__ == "__main__":
    exit_when_terminated()
    # No hub is asked for anything, whatever a configuration names.
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    sys.exit(main())
