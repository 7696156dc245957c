"""Time per byte of telling tool calls from prose, with replies of 4, 40 and 400 kB; it should not grow with the reply (ratio at most 1.3).

    python -m benchmarks.tool_calls [--repeats 5] [--piece 4] [--only NAME]

For each format a reply that is one long call, prose that holds no call, and texts made to be hard; each fed in pieces of some characters,
and whole. Processor time, the least of some repeats; the ratio is the largest size over the smallest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from modules.tool_calls import ToolStream

SIZES = (4_000, 40_000, 400_000)
NAMES = ("write_file", "get_weather")
PROSE = 'The fox <b>ran</b> [over] the {hill}: "why?", it said \\ and didn\'t stop. x < y && y > z\n'


def _json(size: int) -> str:
    """Arguments of about `size` characters."""
    lines = 'if a[0] < b[\\"k\\"]: return {}\\n'
    return '{"path": "a.py", "text": "' + lines * (size // len(lines)) + '", "n": [' + "1, {}, " * 8 + "0]}"


def _plain(size: int) -> str:
    line = "if a[0] < b['k']: return {}\n"
    return line * (size // len(line))


def _repeated(text: str) -> Callable[[int], str]:
    return lambda size: (text * (size // len(text) + 1))[:size]


def _calls(text: str) -> Callable[[int], str]:
    """Whole calls, one after the other."""
    return lambda size: text * (size // len(text) + 1)


TEXTS: dict[str, Callable[[int], str]] = {
    "deepseek": lambda n: f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write_file<｜tool▁sep｜>{_json(n)}<｜tool▁call▁end｜>",
    "kimi": lambda n: f"<|tool_call_begin|>functions.write_file:0<|tool_call_argument_begin|>{_json(n)}<|tool_call_end|>",
    "gpt_oss": lambda n: f"<|channel|>commentary to=functions.write_file <|constrain|>json<|message|>{_json(n)}<|call|>",
    "gemma": lambda n: f'<|tool_call>call:write_file{{text:<|"|>{_plain(n)}<|"|>,n:3}}<tool_call|>',
    "minimax": lambda n: f'<minimax:tool_call><invoke name="write_file"><parameter name="t">{_plain(n)}</parameter></invoke></minimax:tool_call>',
    "glm": lambda n: f"<tool_call>write_file\n<arg_key>t</arg_key><arg_value>{_plain(n)}</arg_value></tool_call>",
    "qwen_coder": lambda n: f"<tool_call><function=write_file><parameter=t>\n{_plain(n)}</parameter></function></tool_call>",
    "hermes": lambda n: f'<tool_call>{{"name": "write_file", "arguments": {_json(n)}}}</tool_call>',
    "mistral": lambda n: f"[TOOL_CALLS]write_file[ARGS]{_json(n)}",
    "llama bare": lambda n: f"write_file{_json(n)}",
    "llama answer": lambda n: f'{{"name": "write_file", "parameters": {_json(n)}}}',
    "pythonic": lambda n: f"[write_file(text={_plain(n)!r}, n=[1, 2])]",
    "generic": lambda n: f'```json\n{{"name": "write_file", "arguments": {_json(n)}}}\n```',
    "prose": _repeated(PROSE),
    "many calls": _calls('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>\n'),
    "many parameters": lambda n: "<function=write_file>" + _calls("<parameter=t>1</parameter>")(n) + "</function>",
    "<<<<": _repeated("<"),
    "<|<|": _repeated("<|"),
    "[[[[": _repeated("["),
    "{{{{": _repeated("{"),
    "lines of [": _repeated("[\n"),
    "lines of names": _repeated("write_file{\n"),
    "markers": _repeated("<tool_call>"),
    "markers, names": _repeated("<tool_call><function=write_file>"),
    "unclosed value": _repeated("<tool_call><function=write_file><parameter=t>"),
    "unclosed JSON": _repeated('<tool_call>{"name": "write_file", "arguments": {"t": '),
    "unclosed string": lambda n: '<tool_call>{"name": "write_file", "arguments": {"t": "' + _repeated("<tool_call>{")(n),
    "unclosed answer": lambda n: '{"type": "' + _repeated('\\"{[<')(n),
    "braces in JSON": lambda n: 'write_file{"a": [' + _repeated("[{}],")(n),
    "strings in JSON": lambda n: 'write_file{"a": [' + _repeated('"","\\\\",')(n),
    "brackets in Python": lambda n: "[write_file(a=[" + _repeated("[{}],'',")(n),
    "channels": _repeated("<|channel|>commentary to=functions.write_file"),
    "spaces": _repeated(" "),
}


def seconds(text: str, piece: int) -> float:
    """Processor time of one reply; `piece` 0: fed whole."""
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)] if piece else [text]
    stream = ToolStream(NAMES)
    started = time.process_time()
    for part in pieces:
        stream.feed(part)
    stream.finish()
    return time.process_time() - started


def per_byte(make: Callable[[int], str], size: int, piece: int, repeats: int) -> float:
    """Nanoseconds a byte. A measurement takes as many replies as make 400 kB, so that the sizes are as exposed to disturbance."""
    text = make(size)
    times = SIZES[-1] // size
    return min(sum(seconds(text, piece) for _ in range(times)) for _ in range(repeats)) / times / len(text.encode()) * 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--piece", type=int, default=4)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    print(f"{'ns a byte':20}" + "".join(f"{size // 1000:>7} kB" for size in SIZES) + "   ratio" + "     whole: 4, 400 kB, ratio")
    for name, make in TEXTS.items():
        if chosen.only in name:
            seconds(make(1000), chosen.piece)
            small, *_, large = times = [per_byte(make, size, chosen.piece, chosen.repeats) for size in SIZES]
            first, last = (per_byte(make, size, 0, chosen.repeats) for size in (SIZES[0], SIZES[-1]))
            row = f"{name:20}" + "".join(f"{value:10.0f}" for value in times)
            print(f"{row}{large / small:8.2f}{first:12.0f}{last:8.0f}{last / first:8.2f}", flush=True)


if __name__ == "__main__":
    main()
