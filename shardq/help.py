"""The text of --help: every option of a command with its docstring, type and default."""

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

from shardq.arguments import required, usage
from shardq.shipped import RECIPES, shipped

MAX_WIDTH, INDENT = 100, 24
FLAGS = (
    ("-h, --help", "Show this help and exit."),
    ("--version", "Show the version and exit."),
    ("--print-config", "Show all options with the values that they would have, as a recipe, and exit."),
    (
        "--config RECIPE",
        "Recipe of options: the name of one that comes with shardq, or the path of a YAML file; may be given several "
        f"times. Single options win, wherever they stand. Names: {', '.join(shipped(RECIPES))}.",
    ),
)
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}


def help_text(verb: str, description: str, config_class: type) -> str:
    """The help of a command."""
    main = required(config_class)[0]
    lines = [f"usage: shardq {verb} {' '.join(usage(config_class))} [options]", "", *_wrapped(description, 0), "",
             "options:"]  # fmt: skip
    for head, text in FLAGS:
        lines += _entry(head, text)
    hints, texts = get_type_hints(config_class), docstrings(config_class)
    for each in fields(config_class):
        if not is_dataclass(hints[each.name]):
            head = f"--{each.name} {_metavar(hints[each.name])}"
            head = f"{main.upper()}, {head}" if each.name == main else head
            lines += _entry(head, texts[each.name] + _default(each, each.default))
    for each in fields(config_class):
        if is_dataclass(hints[each.name]):
            lines += _section(hints[each.name], each.default_factory(), f"{each.name}.")
    return "\n".join(lines)


def docstrings(config_class: type) -> dict[str, str]:
    """The docstring below each field of a class, or of one of its base classes, by the field's name."""
    inherited = [docstrings(base) for base in config_class.__bases__ if is_dataclass(base)]
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body
    own = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    return {name: text for texts in (*inherited, own) for name, text in texts.items()}


def _section(section: type, start: object, prefix: str) -> Iterator[str]:
    hints, texts = get_type_hints(section), docstrings(section)
    yield from ("", *_wrapped(section.__doc__.removesuffix(".") + ":", 0))
    for each in fields(section):
        if is_dataclass(hints[each.name]):
            yield from _section(hints[each.name], getattr(start, each.name), f"{prefix}{each.name}.")
        else:
            head = f"--{prefix}{each.name} {_metavar(hints[each.name])}"
            yield from _entry(head, texts[each.name] + _default(each, getattr(start, each.name)))


def _metavar(hint: object) -> str:
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if get_origin(hint) is tuple:
        return "A,B,..."
    return METAVARS.get(hint) or _metavar(next(part for part in parts if part is not NoneType))


def _default(field: Field, value: object) -> str:
    """The default of an option in words; empty if its docstring says it."""
    if value in (None, MISSING, ()):
        return " (required)" if value is MISSING else ""
    shown = ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value
    return f" (default: {shown})"


def _entry(head: str, text: str) -> list[str]:
    lines = _wrapped(text, INDENT)
    if len(head) + 4 <= INDENT:
        return [f"  {head:{INDENT - 2}}{lines[0].lstrip()}", *lines[1:]]
    return [*_wrapped_head(head), *lines]


def _wrapped_head(head: str) -> list[str]:
    return textwrap.wrap(head, _width(), initial_indent="  ", subsequent_indent="      ", break_long_words=False)


def _wrapped(text: str, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(text, _width(), initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def _width() -> int:
    return min(MAX_WIDTH, shutil.get_terminal_size().columns)
