"""Checks of a command's options, single and combined, that need no model."""

from pathlib import Path

from shardq.calib.options import TextOptions
from shardq.calib.sets import parts_of
from shardq.config import EvaluateConfig, QuantizeConfig, TuneConfig
from shardq.errors import ConfigError
from shardq.parallel.engines import candidates
from shardq.parallel.ranks import Ranks
from shardq.quant.options import ActivationOptions


def check_quantize(config: QuantizeConfig, ranks: Ranks) -> None:
    """Check the values and combinations of a run whose options are resolved.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
    """
    _ = config.quant.grid  # an impossible one says itself which option is wrong
    _check_activations(config.activations)
    bits, exported = config.activations.bits, config.export.activation_bits
    _require(
        exported == 16 or bits in (None, 8), "export.activation_bits", exported, f"16 beside activations.bits {bits}"
    )
    if not config.uses_data:
        for name in ("bits", "kv_bits"):
            asked = getattr(config.activations, name)
            _require(asked is None, f"activations.{name}", asked, "none without calibration data; give --calib.dataset")
    _check_text("calib", config.calib)
    split = config.tensor_parallel
    _require(split == 1 or (split > 1 and config.target == "vllm"), "tensor_parallel", split,
             "at least 1, and 1 but for --target vllm")  # fmt: skip
    optimize, world_size = config.optimize, ranks.world_size
    _check_engine(config, ranks)
    for name in ("iterations", "batch_size"):
        _require(getattr(optimize, name) >= 1, f"optimize.{name}", getattr(optimize, name), "at least 1")
    for name in ("retries", "min_expert_tokens"):
        _require(getattr(optimize, name) >= 0, f"optimize.{name}", getattr(optimize, name), "at least 0")
    every = config.checkpoint.every_iterations
    _require(every >= 0, "checkpoint.every_iterations", every, "at least 0")
    for name in ("grid_lr", "weight_lr"):
        _require(getattr(optimize, name) > 0, f"optimize.{name}", getattr(optimize, name), "above 0")
    memory = optimize.memory_gib
    _require(memory is None or memory > 0, "optimize.memory_gib", memory, "above 0")
    for name in ("fp_mix", "label_weight"):
        share = getattr(optimize, name)
        _require(0 <= share <= 1, f"optimize.{name}", share, "between 0 and 1")
    samples, held_out = config.calib.samples, optimize.held_out
    _require(samples is not None, "calib.samples", samples, "a number")
    _require(0 <= held_out < samples, "optimize.held_out", held_out, f"below calib.samples ({samples})")
    _require(samples - held_out >= world_size, "calib.samples", samples,
             f"at least {world_size + held_out}, one for each of the {world_size} ranks to train on beside "
             f"optimize.held_out ({held_out}); take more samples or fewer ranks")  # fmt: skip
    micro_batch = optimize.micro_batch
    _require(micro_batch is None or 1 <= micro_batch <= optimize.batch_size, "optimize.micro_batch", micro_batch,
             f"between 1 and optimize.batch_size ({optimize.batch_size})")  # fmt: skip
    _require(optimize.batch_size <= samples - held_out, "optimize.batch_size", optimize.batch_size,
             f"at most the samples that are trained on ({samples - held_out})")  # fmt: skip


def _check_engine(config: QuantizeConfig, ranks: Ranks) -> None:
    for engine in candidates(config.parallel, ranks):
        for demand in engine.demands():
            _require(*demand)


def check_tune(config: TuneConfig) -> None:
    """Check the values of a tuning.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
    """
    tune = config.tune
    _require(config.folder != Path(config.run), "output", config.output, "another folder than the run's")
    _require(tune.steps >= 1, "tune.steps", tune.steps, "at least 1")
    _require(tune.batch_size is None or tune.batch_size >= 1, "tune.batch_size", tune.batch_size, "at least 1")
    _require(tune.learning_rate > 0, "tune.learning_rate", tune.learning_rate, "above 0")
    _require(0 <= tune.label_weight <= 1, "tune.label_weight", tune.label_weight, "between 0 and 1")


def check_evaluate(config: EvaluateConfig) -> None:
    """Check the values and combinations of an evaluation.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
    """
    _ = config.quant.grid  # an impossible one says itself which option is wrong
    _require(config.eval.dataset is not None, "eval.dataset", None, "a file or a hub name")
    _check_text("eval", config.eval)
    if config.cache.placement == "disk" and config.cache.folder is None:
        raise ConfigError("cache.placement: disk needs a folder to write to; give one with --cache.folder")


def _check_activations(activations: ActivationOptions) -> None:
    for name in ("bits", "kv_bits"):
        bits = getattr(activations, name)
        _require(bits is None or 4 <= bits <= 16, f"activations.{name}", bits, "between 4 and 16")
    _require(activations.tensors == "inputs" or activations.bits is not None, "activations.tensors",
             activations.tensors, "inputs without activations.bits")  # fmt: skip
    trains_linears = activations.bits is not None and activations.tensors == "inputs" and activations.kv_bits is None
    _require(not activations.in_training or trains_linears, "activations.in_training", activations.in_training,
             "false but for activations.bits of the linears' inputs alone")  # fmt: skip
    percentile = activations.percentile
    _require(50 < percentile <= 100, "activations.percentile", percentile, "above 50 and at most 100")


def _check_text(section: str, text: TextOptions) -> None:
    _require(text.dataset != "", f"{section}.dataset", "an empty name", "a file or a hub name")
    _require(text.samples is None or text.samples >= 1, f"{section}.samples", text.samples, "at least 1")
    _require(text.sequence_length >= 2, f"{section}.sequence_length", text.sequence_length, "at least 2")
    if text.dataset is not None:
        parts_of(text)


def _require(holds: bool, option: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{option}: {value} is not allowed, it must be {allowed}")
