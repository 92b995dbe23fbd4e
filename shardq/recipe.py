"""Recipes: YAML files of options."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import yaml

from shardq.errors import ConfigError
from shardq.shipped import RECIPES, read_named

Value = str | list[str] | None

STANDARD_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Setting:
    """An option's value, and the place where it is given: `recipe.yaml, line 3: `, or empty on the command line."""

    name: str
    value: Value
    where: str = ""


def read_recipe(path: str, options: Iterable[str]) -> list[Setting]:
    """Settings of a recipe of the package, or of a YAML file.

    Args:
        options: names of the command's options, whose first parts are sections.

    Raises:
        ConfigError: there is no such recipe, or it holds something other than options.
    """
    try:
        node = yaml.compose(read_named(path, RECIPES, "--config"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
        raise ConfigError(f"{path}{line}: no valid YAML ({reason}); mend it there") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: no recipe, its lists are nested too deep; mend it there") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}, line {node.start_mark.line + 1}: a recipe holds options by name")
    sections = {name.rpartition(".")[0] for name in options}
    sections |= {name.rpartition(".")[0] for name in sections}
    return list(_settings_in(node, path, "", sections))


def _settings_in(node: yaml.MappingNode, path: str, prefix: str, sections: set[str]) -> Iterator[Setting]:
    """Settings of a recipe's mapping; an entry that is no section is a value, and an empty section gives none."""
    for key, value in node.value:
        where = f"{path}, line {key.start_mark.line + 1}: "
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}an option's name must be text")
        name = prefix + key.value
        if name in sections and isinstance(value, yaml.MappingNode):
            yield from _settings_in(value, path, f"{name}.", sections)
        elif name not in sections or not _is_null(value):
            yield Setting(name, value_of(value, where + name), where)


def value_of(node: yaml.Node, where: str) -> Value:
    """The text of a scalar, or a list of texts; null as None."""
    if _is_null(node):
        return None
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        if not isinstance(item, yaml.ScalarNode) or not item.tag.removeprefix(STANDARD_TAG).isalpha():
            raise ConfigError(f"{where}: must be a plain value, or a list of such")
    return [item.value for item in items] if isinstance(node, yaml.SequenceNode) else node.value


def _is_null(node: yaml.Node) -> bool:
    return node.tag == f"{STANDARD_TAG}null"


def as_recipe(config: object) -> str:
    """A recipe with all options of a config."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)  # with tuples as lists
