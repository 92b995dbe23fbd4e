"""The verbs as Python functions: the options and checks of the command line, its errors raised, its summary returned.

Options are keyword arguments, a section's a dict or a dataclass: `quantize("model", output="out", quant={"bits": 3})`.
A plain process is one rank; under torchrun every rank makes the same call. A call that ends early leaves what a killed
command leaves, and the same call goes on from there.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shardq.arguments import Given, make_config, required
from shardq.config import EvaluateConfig, ExportConfig, QuantizeConfig, TuneConfig, VerifyConfig
from shardq.errors import ConfigError
from shardq.recipe import Setting
from shardq.summaries import EvaluateSummary, ExportSummary, QuantizeSummary, TuneSummary, VerifySummary
from shardq.verbs import COMMANDS, Config, return_freed_tensors, running

if TYPE_CHECKING:
    from shardq.rundir.loaded import LoadedRun

Location = str | os.PathLike[str]
Recipes = Location | Iterable[Location]


def quantize(model: Location | QuantizeConfig, *, config: Recipes = (), **options: object) -> QuantizeSummary:
    """Quantize a model block by block, or go on where an interrupted call stopped.

    Args:
        model: Hugging Face folder, hub name, or all options in one object.
        config: recipes, as `--config` takes them; later ones override earlier ones, single options all.
        options: those of `shardq quantize --help`, among them `output`.

    Raises:
        ShardQError: any of its kinds; the same on every rank where the cause is common.
    """
    return cast(QuantizeSummary, _call("quantize", model, config, options))


def tune(run: Location | TuneConfig, *, config: Recipes = (), **options: object) -> TuneSummary:
    """Tune a finished run's scales end to end, or go on where an interrupted call stopped.

    Args:
        run: output folder of the run, or all options in one object.
        config: as in `quantize`.
        options: those of `shardq tune --help`, among them `model`, which is required.

    Raises:
        ShardQError: as `quantize`.
    """
    return cast(TuneSummary, _call("tune", run, config, options))


def evaluate(model: Location | EvaluateConfig, *, config: Recipes = (), **options: object) -> EvaluateSummary:
    """Measure a model's perplexity in the memory of one block.

    Args:
        model: Hugging Face folder, hub name, folder of a finished run, or all options in one object.
        config: as in `quantize`.
        options: those of `shardq evaluate --help`.

    Raises:
        ShardQError: as `quantize`.
    """
    return cast(EvaluateSummary, _call("evaluate", model, config, options))


def export(run: Location | ExportConfig, *, config: Recipes = (), **options: object) -> ExportSummary:
    """Convert a finished run for other programs.

    Args:
        run: output folder of the run, or all options in one object.
        config: as in `quantize`.
        options: those of `shardq export --help`, among them `format`.

    Raises:
        ShardQError: as `quantize`.
    """
    return cast(ExportSummary, _call("export", run, config, options))


def verify(run: Location | VerifyConfig) -> VerifySummary:
    """Check every file of a finished run, or of an export.

    Args:
        run: its folder.

    Raises:
        ResumeError: the folder holds neither a run nor an export, or a file in it is damaged; names the file.
    """
    return cast(VerifySummary, _call("verify", run, (), {}))


def load_run(run: Location) -> "LoadedRun":
    """Read the result of a run so far: its blocks with their grids, losses and times; codes when they are asked for.

    Args:
        run: output folder of a run, finished or not.

    Raises:
        ResumeError: the folder holds no run, or its record is damaged.
        CheckpointError: a block's file is missing or damaged.
    """
    from shardq.rundir import loaded

    return loaded.load_run(Path(run))


def _call(verb: str, first: Location | Config, recipes: Recipes, options: Mapping[str, object]) -> dict:
    command, config = COMMANDS[verb], config_of(verb, first, recipes, options)
    return_freed_tensors()
    from shardq.background import finish_interrupted
    from shardq.parallel.ranks import joined

    try:
        with running(command, config, joined) as ranks:
            return command.run(config, ranks)
    except KeyboardInterrupt as error:
        finish_interrupted(error)
        raise


def config_of(verb: str, first: Location | Config, recipes: Recipes, options: Mapping[str, object]) -> Config:
    """A verb's options from its function's arguments, checked as the command line checks them.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type, or a recipe cannot be read.
    """
    where, config_class = f"{verb}(): ", COMMANDS[verb].config
    main = _by_name(first) if isinstance(first, config_class) else {required(config_class)[0]: first}
    paths = [recipes] if isinstance(recipes, str | os.PathLike) else recipes
    try:
        given = Given(
            recipes=[os.fspath(path) for path in paths], settings=[*_settings(main, where), *_settings(options, where)]
        )
        return make_config(config_class, given, verb)
    except ConfigError as error:
        error.agreed = True
        raise


def _settings(options: Mapping[str, object], where: str, prefix: str = "") -> Iterator[Setting]:
    """Options as a recipe has them: one setting for each field of a section, values as text or lists of text."""
    for name, value in options.items():
        value = _by_name(value) if is_dataclass(value) else value
        if isinstance(value, Mapping):
            yield from _settings(value, where, f"{prefix}{name}.")
        elif isinstance(value, list | tuple | set | frozenset):
            yield Setting(prefix + name, [str(item) for item in value], where)
        elif value is None or isinstance(value, str | os.PathLike):
            yield Setting(prefix + name, value if value is None else os.fspath(value), where)
        elif isinstance(value, bool | int | float):
            yield Setting(prefix + name, str(value), where)
        else:
            kind = type(value).__name__
            raise ConfigError(
                f"{where}{prefix}{name}: an object of {kind} is not allowed, it must be text, a path, a number, true "
                "or false, or a list; a model is given by its folder or hub name"
            )


def _by_name(options: Any) -> dict[str, object]:
    """Values of a dataclass's fields."""
    return {field.name: getattr(options, field.name) for field in fields(options)}
