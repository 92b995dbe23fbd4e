"""Files that come with the package and are given by name: recipes, and settings for DeepSpeed."""

from pathlib import Path

from shardq.errors import ConfigError
from shardq.spelling import nearest

FOLDER = Path(__file__).parent / "configs"
RECIPES, DEEPSPEED = "*.yaml", "deepspeed/*.json"  # one kind each


def shipped(kind: str) -> dict[str, Path]:
    """The files of a kind by their names."""
    return {file.stem: file for file in sorted(FOLDER.glob(kind))}


def read_named(name: str, kind: str, option: str) -> bytes:
    """Content of a file of the package by its name, or of any other by its path.

    Args:
        option: the option that gives the name, for messages.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    own = shipped(kind)
    try:
        return own.get(name, Path(name)).read_bytes()
    except (OSError, ValueError) as error:
        if "/" in name or "." in name:
            reason = getattr(error, "strerror", error)
            raise ConfigError(f"{name}: cannot be read ({reason}); check {option}") from error
        meant = f"; did you mean {near[0]}?" if (near := nearest(name, own)) else "."
        raise ConfigError(f"{option}: there is no {name}{meant} It takes one of {', '.join(own)}, or a path") from error
