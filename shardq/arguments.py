"""From arguments and recipes to the options of a command.

A value is text until it is converted to its field's type, so recipes and the command line take the same values. Options
are the fields of the command's dataclass, sections its dataclass fields.
"""

import math
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from shardq.config import listed
from shardq.errors import ConfigError
from shardq.recipe import Setting, Value, read_recipe, value_of
from shardq.spelling import nearest

Config = TypeVar("Config")

FLAGS = ("help", "version", "print-config")
RECIPE = "config"
NULLS = ("null", "~")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WORDS = {NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
SHOWN = 60  # most characters of a value that a message repeats


@dataclass
class Given:
    """A parsed command line."""

    positional: list[str] = field(default_factory=list)
    recipes: list[str] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)


def take_apart(arguments: list[str], config_class: type) -> Given:
    """Parse a command line into options, recipes and other arguments; every option except a flag takes one value.

    Raises:
        ConfigError: an option has no value, or one dash.
    """
    hints, given, left = option_types(config_class), Given(), iter(arguments)
    for argument in left:
        name, has_value, value = argument.removeprefix("--").partition("=")
        if argument == "-h" or (argument.startswith("--") and name in FLAGS):
            given.flags.append("help" if argument == "-h" else name)
            continue
        if not argument.startswith("--"):
            if argument.startswith("-"):
                raise ConfigError(f"{argument}: no such option; all but -h begin with --")
            given.positional.append(argument)
            continue
        if not has_value:
            value = next(left, "--")
            if value.startswith("--") and (name in hints or name == RECIPE):
                allowed = _described(hints[name]) if name in hints else "a recipe"
                raise ConfigError(f"{name}: no value is given, it must be {allowed}")
        if name == RECIPE:
            given.recipes.append(value)
        else:
            given.settings.append(Setting(name, _typed_value(value)))
    return given


def make_config(config_class: type[Config], given: Given, verb: str) -> Config:
    """A config of defaults, overridden by recipes from left to right, then by single options, in any place.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type, or a recipe cannot be read.
    """
    hints, needed = option_types(config_class), required(config_class)
    if len(given.positional) > 1:
        said = ", ".join(given.positional)
        raise ConfigError(
            f"{verb}: takes one {needed[0].upper()}, {len(given.positional)} are given ({said}); "
            "put patterns with * between quotes"
        )
    main = [Setting(needed[0], text) for text in given.positional]
    if main and any(setting.name == needed[0] for setting in given.settings):
        raise ConfigError(f"{needed[0]}: is given twice, as {main[0].value} and with --{needed[0]}; leave one out")
    recipes = [setting for path in given.recipes for setting in read_recipe(path, hints)]
    values = {}
    for setting in (*recipes, *main, *given.settings):
        _check_known(setting, hints, verb)
        try:
            values[setting.name] = _converted(setting.value, hints[setting.name])
        except ValueError:
            raise ConfigError(
                f"{setting.where}{setting.name}: {_shown(setting.value)} is not allowed, it must be "
                f"{_described(hints[setting.name])}"
            ) from None
    for name in needed:
        if name not in values:
            raise ConfigError(f"{name}: missing; shardq {verb} {' '.join(usage(config_class))} [options]")
    return _filled(config_class, None, values, "")


def option_types(config_class: type, prefix: str = "") -> dict[str, object]:
    """Type of every option by its dotted name, in the order of the fields."""
    hints, found = get_type_hints(config_class), {}
    for each in fields(config_class):
        hint, name = hints[each.name], prefix + each.name
        found |= option_types(hint, f"{name}.") if is_dataclass(hint) else {name: hint}
    return found


def required(config_class: type) -> list[str]:
    """Options without a default; the first of them may be given by its value only, without its name."""
    return [each.name for each in fields(config_class) if each.default is each.default_factory is MISSING]


def usage(config_class: type) -> list[str]:
    """How the required options are written."""
    first, *others = required(config_class)
    return [first.upper(), *(f"--{name} {name.upper()}" for name in others)]


def _check_known(setting: Setting, hints: dict[str, object], verb: str) -> None:
    if setting.name in hints:
        return
    dashes = "" if setting.where else "--"
    inside = [name for name in hints if name.startswith(f"{setting.name}.")]
    if inside and not setting.where:
        raise ConfigError(f"--{setting.name}: is a group of options; give them one by one, such as --{inside[0]}")
    if inside:
        raise ConfigError(f"{setting.where}{setting.name}: must hold options by name, such as {inside[0]}")
    meant = " or ".join(dashes + name for name in nearest(setting.name, hints))
    advice = f"did you mean {meant}?" if meant else f"shardq {verb} --help lists the options"
    raise ConfigError(f"{setting.where}{dashes}{setting.name}: no such option; {advice}")


def _typed_value(text: str) -> Value:
    """The value of an option on the command line: null, a YAML list, or text."""
    if text in NULLS:
        return None
    if text.startswith("[") and text.endswith("]"):
        try:
            return value_of(yaml.compose(text, Loader=yaml.SafeLoader), text)
        except (yaml.YAMLError, RecursionError, ConfigError):  # a pattern such as [ab]*.x[1]
            return text
    return text


def _converted(value: Value, hint: object) -> object:
    """A value converted to the type of its field; raises ValueError where that is impossible."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        for part in parts:
            with suppress(ValueError):
                return _converted(value, part)
        raise ValueError(value)
    if get_origin(hint) is tuple:
        items = listed(value) if isinstance(value, str) else value or ()
        return tuple(_converted(item, parts[0]) for item in items)
    if hint is NoneType and value is None:
        return None
    if hint is NoneType or not isinstance(value, str):
        raise ValueError(value)
    if get_origin(hint) is Literal:
        return _chosen(value, {str(choice): choice for choice in parts})
    if hint is bool:
        return _chosen(value.lower(), SWITCH)
    if hint in (int, float):
        number = hint(value)
        if not math.isfinite(number):
            raise ValueError(value)
        return number
    return value


def _chosen(value: str, choices: dict[str, object]) -> object:
    if value not in choices:
        raise ValueError(value)
    return choices[value]


def _described(hint: object) -> str:
    """The values that a field takes, in words."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        lists = [part for part in parts if get_origin(part) is tuple]
        return " or ".join(_described(part) for part in lists or parts)
    if get_origin(hint) is tuple:
        among = f" of {', '.join(map(str, get_args(parts[0])))}" if get_origin(parts[0]) is Literal else ""
        return f"a list{among}, separated by commas"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    return WORDS[hint]


def _shown(value: Value) -> str:
    text = "null" if value is None else ", ".join(value) if isinstance(value, list) else value or "an empty text"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _filled(config_class: type[Config], start: Config | None, values: dict[str, object], prefix: str) -> Config:
    """An object of the class: values whose names begin with a prefix, all others from `start` or defaults."""
    hints, given = get_type_hints(config_class), {}
    for each in fields(config_class):
        name = prefix + each.name
        if is_dataclass(hints[each.name]):
            default = getattr(start, each.name) if start is not None else each.default_factory()
            given[each.name] = _filled(hints[each.name], default, values, f"{name}.")
        elif name in values:
            given[each.name] = values[name]
    return config_class(**given) if start is None else replace(start, **given)
