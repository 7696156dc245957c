"""Jinja in a sandbox with limits, for texts that nobody trusts.

A chat template comes out of a model file and is hostile until shown otherwise. Jinja's immutable sandbox keeps it from Python; it does not
keep it from eating time and memory. So here:

- node kinds, filters, globals and methods are allow-lists; nothing can be included, imported or changed in place;
- every operation that makes a value reports the value's weight (`_weigh`, the bytes of its text form, shared parts counted each time),
  and those that can blow a small input up (`*`, `**`, `%`, join, replace, padding ...) are computed only after a check;
- steps, weight and processor time of one rendering are counted in a `_Budget`; output is counted while it is generated.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import meta, nodes, pass_context, pass_environment
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from modules.errors import TemplateError

MAX_SOURCE = 100_000
"""Characters of template text; the largest in use are about 30,000."""
MAX_SECONDS = 1.0
"""Processor time of the rendering thread, so that a busy machine does not fail a good template."""
MAX_OUTPUT = 10_000_000
"""Characters of prompt."""
_MAX_STEPS = 5_000_000
_MAX_VALUE = 40_000_000  # weight of one value: 10 million characters of the widest kind
_MAX_WORK = 250_000_000  # weight of all values made, hence of all alive
_MAX_ITEMS = 500_000
_MAX_DEPTH = 50
_MAX_BITS = 4096
_MAX_PAD = 1000


class Refused(Exception):
    """The template called raise_exception."""


def limit(what: str) -> TemplateError:
    """The error for a template that goes too far."""
    return TemplateError(f"The chat template was stopped: {what.rstrip('.')}. Choose another template for this model; this one may be harmful.")


def _failed(error: BaseException) -> TemplateError:
    text = " ".join((str(error) or type(error).__name__).split())[:300].rstrip(".")
    return TemplateError(f"The chat template failed: {text}. Choose or write another template for this model.")


# What a template can make Python raise; anything else is a fault of ours and is not caught.
_FAULTS = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


# --- the budget -----------------------------------------------------------------------------------------------------------------------


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps = _MAX_STEPS
        self.work = _MAX_WORK
        self.deadline = time.thread_time() + MAX_SECONDS

    def spend(self, weight: int = 0) -> None:
        self.steps -= 1
        self.work -= weight
        if self.steps < 0:
            raise limit("it takes too many steps")
        if self.work < 0:
            raise limit("it makes too much text")
        # Reading the clock costs more than a step.
        if (self.steps % 64 == 0 or weight > 100_000) and time.thread_time() > self.deadline:
            raise limit(f"it takes more than {MAX_SECONDS:g} s")


_budget: ContextVar[_Budget] = ContextVar("template_budget")
_CONTAINERS: tuple[type, ...] = (list, tuple, Mapping, type({}.keys()), type({}.values()), type({}.items()))


def _weigh(value: object, depth: int = 0) -> int:
    """Bytes that `value` would take if no part of it were shared. Raises above the limits."""
    if isinstance(value, str):
        weight = sys.getsizeof(value)
    elif isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise limit("it makes a huge number")
        weight = 32
    elif isinstance(value, range):
        weight = 40 * len(value)
    elif isinstance(value, _CONTAINERS):
        if depth == _MAX_DEPTH:
            raise limit("it nests values too deep")
        weight = 64
        for item in cast(Iterable[Any], value):
            weight += 8 + _weigh(item, depth + 1)
            if isinstance(value, Mapping):
                weight += _weigh(value[item], depth + 1)
            if weight > _MAX_VALUE:
                break
    else:
        weight = 64
    if weight > _MAX_VALUE:
        raise limit("it makes a huge value")
    return weight


def _checked(value: Any) -> Any:
    """`value`, weighed and paid for; an iterator becomes a list, so that nothing is computed later without being counted."""
    if isinstance(value, Iterator):
        value = _listed(value)
    _budget.get().spend(_weigh(value))
    return value


def _listed(items: Iterable[Any]) -> list[Any]:
    result = []
    for item in items:
        _budget.get().spend(64)
        result.append(item)
    return result


def _text(value: Any) -> str:
    """str(value), after weighing it."""
    _checked(value)
    return str(value)


def _room_for(characters: int) -> None:
    if characters > MAX_OUTPUT:
        raise limit("it makes a huge text")


# --- operations that can blow up ------------------------------------------------------------------------------------------------------


def _multiply(left: Any, right: Any) -> Any:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str) and isinstance(times, int):
            _room_for(len(sequence) * times)
        if isinstance(sequence, (list, tuple)) and isinstance(times, int) and _weigh(sequence) * times > _MAX_VALUE:
            raise limit("it makes a huge value")
    return left * right


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        _room_for(len(left) + len(right))
    return left + right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _MAX_BITS:
        raise limit("it makes a huge number")
    return base**exponent


_CONVERSION = re.compile(r"%(?:\(\w+\))?[-#0 +]*\d{0,3}(?:\.\d{1,3})?[sdifrxXeEgGc%]")


def _percent(left: Any, right: Any) -> Any:
    if not isinstance(left, str):
        return left % right
    rest, count = _CONVERSION.subn("", left)
    if "%" in rest:
        raise ValueError("only plain % conversions up to 999 wide are allowed")
    values = right.values() if isinstance(right, Mapping) else right if isinstance(right, tuple) else (right,)
    longest = max((len(_text(value)) for value in values), default=0)
    _room_for(len(left) + count * (2 * longest + _MAX_PAD))
    return left % right


def _format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    return str(_percent(_text(value), kwargs or args))


def _concat(parts: Sequence[Any]) -> str:
    texts = [_text(part) for part in parts]
    _room_for(sum(map(len, texts)))
    return "".join(texts)


def _join_method(separator: str, items: Iterable[Any]) -> str:
    texts = _listed(items)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("join() takes strings")
    _room_for(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


@pass_environment
def _join_filter(environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda item: item
    return _join_method(_text(d), [_text(get(item)) for item in value])


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = _text(text), _text(old), _text(new)
    count = -1 if count is None else count
    places = text.count(old)
    _room_for(len(text) + (places if count < 0 else min(places, count)) * len(new))
    return str(text.replace(old, new, count))


def _pad(method: str, text: Any, width: int = 80, *fill: str) -> str:
    if width > _MAX_PAD:
        raise limit("it makes a huge text")
    return str(getattr(_text(text), method)(width, *fill))


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    prefix = width if isinstance(width, str) else _pad("ljust", "", width)
    lines = _split_lines(_text(text), True)
    _room_for(len(text) + len(lines) * len(prefix))
    return "".join(prefix + line if (first or place) and (blank or line.strip()) else line for place, line in enumerate(lines))


def _split(method: str, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    parts: list[str] = getattr(text, method)(sep, maxsplit if 0 <= maxsplit < _MAX_ITEMS else _MAX_ITEMS)
    if len(parts) > _MAX_ITEMS and maxsplit != _MAX_ITEMS:
        raise limit("it makes a huge list")
    return parts


def _split_lines(text: str, keepends: bool = False) -> list[str]:
    if sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")) > _MAX_ITEMS:
        raise limit("it makes a huge list")
    return text.splitlines(keepends)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """JSON as Hugging Face's templates expect it: no HTML escapes, non-ASCII text as it is."""
    if not (indent is None or (isinstance(indent, int) and indent <= 16)) or any(len(text) > 16 for text in separators or ()):
        raise ValueError("tojson takes an indent up to 16 and short separators")
    _checked(value)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _concat(_listed(encoder.iterencode(value)))


@pass_environment
def _sum(environment: jinja2.Environment, items: Iterable[Any], attribute: str | int | None = None, start: float = 0) -> Any:
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda item: item
    numbers = [get(item) for item in items]
    if not all(isinstance(number, (int, float)) for number in (start, *numbers)):
        raise TypeError("sum takes numbers")  # summing lists costs the square of their length
    return sum(numbers, start)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 15:
        raise ValueError("round takes a precision up to 15")
    return float(jinja2.filters.do_round(value, precision, method))  # type: ignore[arg-type]


def _dict(*mappings: Mapping[Any, Any], **items: Any) -> dict[Any, Any]:
    # Not from pairs: crafted integer keys that collide cost the square of their number.
    if not all(isinstance(mapping, Mapping) for mapping in mappings):
        raise TypeError("dict() takes mappings and names")
    return {key: value for mapping in (*mappings, items) for key, value in mapping.items()}


class _Namespace(Namespace):
    """Jinja's namespace, printed without its contents: they change after they were weighed."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Formatter(SandboxedFormatter):
    """`str.format` with padding and size checked."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, name = super().get_field(field_name, args, kwargs)
        return _checked(value), name

    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec):
            raise limit("it makes a huge text")
        text = str(super().format_field(value, format_spec))
        _budget.get().spend(len(text))
        self.written = getattr(self, "written", 0) + len(text)
        _room_for(self.written)
        return text


# --- the sandbox ----------------------------------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PLAIN_FILTERS = _words(
    "abs attr capitalize count d default dictsort first float groupby int items last length list lower map max min reject rejectattr "
    "reverse select selectattr sort string title trim upper wordcount"
)
_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "center": partial(_pad, "center"), "e": lambda value: str(jinja2.filters.escape(_text(value))),
    "escape": lambda value: str(jinja2.filters.escape(_text(value))), "format": _format_filter, "indent": _indent, "join": _join_filter,
    "replace": _replace, "round": _round, "safe": lambda value: value, "sum": _sum, "tojson": _tojson,
    "_checked": lambda value: value, "_concat": _concat, "_out": lambda value: value if isinstance(value, str) else _text(value),
}  # fmt: skip
_TEXT_METHODS: dict[str, Callable[..., Any]] = {
    "center": partial(_pad, "center"), "join": _join_method, "ljust": partial(_pad, "ljust"), "replace": _replace,
    "rjust": partial(_pad, "rjust"), "rsplit": partial(_split, "rsplit"), "split": partial(_split, "split"),
    "splitlines": _split_lines, "zfill": partial(_pad, "zfill"),
}  # fmt: skip
_ATTRIBUTES: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(_TEXT_METHODS) | _words(
        "capitalize casefold count endswith find format index isalnum isalpha isdigit islower isnumeric isspace istitle isupper lower "
        "lstrip partition removeprefix removesuffix rfind rindex rpartition rstrip startswith strip swapcase title upper")),
    (dict, frozenset({"get", "items", "keys", "values"})),
    (list, frozenset({"count", "index"})),
    (tuple, frozenset({"count", "index"})),
    (LoopContext, _words("changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0")),
)  # fmt: skip
_NODES = _words(
    "Template Output TemplateData For If Macro CallBlock FilterBlock With Assign AssignBlock ExprStmt Break Continue Scope "
    "Const List Tuple Dict Pair Keyword Name NSRef Getattr Getitem Slice Call Filter Test Compare Operand CondExpr And Or Not "
    "Add Sub Mul Div FloorDiv Mod Pow Neg Pos Concat"
)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is checked. Taking the context also keeps Jinja from computing it while compiling."""
    passed = _PassArg.from_obj(function)

    @pass_context
    def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        own = {_PassArg.context: (context,), _PassArg.eval_context: (context.eval_ctx,), _PassArg.environment: (context.environment,)}
        return _checked(function(*(own[passed] if passed else ()), value, *args, **kwargs))

    return guarded


def _raise_exception(message: Any = "") -> None:
    raise Refused(_text(message)[:300])


class _Generation(Extension):
    """Hugging Face's `{% generation %}`, which marks what training learns from; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Guard(NodeTransformer):
    """Refuses node kinds that are not listed; makes loops and operations that Jinja compiles to plain Python pass through `_checked`."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        kind = type(node).__name__
        if kind not in _NODES:
            raise TemplateError(f"The chat template uses “{kind.lower()}”, which is not allowed. Choose another template for this model.")
        self.generic_visit(node)
        return getattr(self, f"_{kind.lower()}", lambda same: same)(node)

    def _through(self, name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)

    def _checked(self, node: nodes.Expr) -> nodes.Expr:
        return node if getattr(node, "ctx", "load") == "store" else self._through("_checked", node)

    _list = _dict = _tuple = _compare = _test = _checked

    def _getitem(self, node: nodes.Getitem) -> nodes.Expr:
        return self._checked(node) if isinstance(node.arg, nodes.Slice) else node

    def _concat(self, node: nodes.Concat) -> nodes.Expr:
        return self._through("_concat", nodes.List(node.nodes, lineno=node.lineno, environment=node.environment))

    def _output(self, node: nodes.Output) -> nodes.Output:
        # Fixed text too: in a macro or a set block it does not pass by the count of the output.
        texts = [nodes.Const(n.data, lineno=n.lineno, environment=n.environment) if isinstance(n, nodes.TemplateData) else n for n in node.nodes]
        node.nodes = [self._through("_out", text) for text in texts]
        return node

    def _for(self, node: nodes.For) -> nodes.For:
        step = self._through("_checked", nodes.Const(0, lineno=node.lineno, environment=node.environment))
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno, environment=node.environment))
        return node


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0)
        plain = {name: self.filters[name] for name in _PLAIN_FILTERS}
        self.filters = {name: _guarded(function) for name, function in {**plain, **_OWN_FILTERS}.items()}
        self.globals = {"range": self.globals["range"], "namespace": _Namespace, "dict": _dict, "raise_exception": _raise_exception}
        self.binop_table.update({"+": _add, "*": _multiply, "**": _power, "%": _percent})

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Guard().visit(source), *args, **kwargs)

    def handle_exception(self, source: str | None = None) -> NoReturn:
        raise  # noqa: PLE0704 - called while one is handled; Jinja's own rewrites every frame of it, which takes seconds in a deep recursion

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _ATTRIBUTES)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]  # a field that happens to be called "copy" or "pop"
        raise SecurityError(f"access to {attribute!r} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or value.__name__ != "format":
            return None
        return lambda *args, **kwargs: _Formatter(self).vformat(owner, args, kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _budget.get().spend()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ in _TEXT_METHODS:
            given = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # without what Jinja adds for itself
            return _checked(_TEXT_METHODS[__obj.__name__](owner, *args, **given))
        return _checked(super().call(__context, __obj, *args, **kwargs))


@lru_cache(maxsize=1)
def _sandbox() -> _Sandbox:
    return _Sandbox()


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    """Compiling takes up to 100 ms for a large template, rendering far less than that."""
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"The chat template has {len(source):,} characters; {MAX_SOURCE:,} are allowed. Choose another template.")
    try:
        return _sandbox().from_string(source)
    except _FAULTS as error:
        raise _failed(error) from None


@lru_cache(maxsize=32)
def variables(source: str) -> frozenset[str]:
    """Names that the template may look up from outside. Raises TemplateError."""
    _compiled(source)  # its checks come first
    try:
        return frozenset(meta.find_undeclared_variables(_sandbox().parse(source)))
    except _FAULTS as error:
        raise _failed(error) from None


def run(source: str, variables: Mapping[str, Any]) -> str:
    """The template's output. Raises `Refused` for raise_exception, TemplateError for all else."""
    template = _compiled(source)
    token = _budget.set(_Budget())
    pieces, size = [], 0
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            size += len(piece)
            _room_for(size)
        return "".join(pieces)
    except _FAULTS as error:
        raise _failed(error) from None
    finally:
        _budget.reset(token)
