"""All options of a command in one tree, and the checks that need more than one of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from shardq.cache.options import CacheOptions
from shardq.calib.options import TextOptions
from shardq.errors import ConfigError
from shardq.formats.options import AimetOptions, ExportOptions, Format
from shardq.model.skeleton import DEFAULT_IGNORE
from shardq.optimize.options import OptimizeOptions
from shardq.parallel.deepspeed_stepper import deepspeed_settings
from shardq.parallel.options import ParallelOptions
from shardq.quant.activation import ActivationOptions
from shardq.quant.spec import MAX_DECOMPRESSED_BITS, QuantSpec


@dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """Weight quantization."""

    bits: int = 4
    """Bits a weight, 2 to 8."""
    symmetric: bool = True
    """Symmetric grid (no zero point), or an asymmetric one."""
    full_range: bool | None = None
    """Let scales of a symmetric grid be negative where a row reaches further above 0 than below, so that no code is
    idle; encodings then describe an asymmetric grid, as AIMET's scales are positive: false for runtimes that ask for
    symmetric weights (default: up to 4 bits, where a code is a good part of the grid)."""
    group_size: int | None = None
    """Input channels that share a scale: 32, 64, 128, ...; null or -1: all of an output channel's (per-channel)."""
    decompressed_bits: int | None = None
    """Two-level scales (LPBQ; AIMET's decompressed_bw) of a symmetric grid in groups: each a whole multiple, at most
    2^(decompressed_bits - bits), of one float scale of the output channel, as Qualcomm runtimes compute with it; 8
    beside 4 bits (default: each group has a float scale of its own)."""
    method: Literal["adascale", "flexround", "lwc", "rtn", "none"] = "adascale"
    """What is trained: `adascale` all, `flexround` the weight's division and one step, `lwc` the grid's ends, `rtn`
    nothing (round to nearest on the start grid); `none` leaves the model as it is (evaluate only)."""
    ignore: tuple[str, ...] | str = DEFAULT_IGNORE
    """Linears to leave as they are: names or patterns (`*.down_proj`, `re:...`), separated by commas. Embeddings and
    head are never quantized."""

    @property
    def spec(self) -> QuantSpec:
        """The grid that these options describe."""
        group_size = None if self.group_size in (None, -1) else self.group_size
        # A multiplier is positive, so two-level scales are.
        by_default = self.bits <= 4 and self.symmetric and self.decompressed_bits is None
        return QuantSpec(
            bits=self.bits,
            symmetric=self.symmetric,
            group_size=group_size,
            full_range=by_default if self.full_range is None else self.full_range,
            decompressed_bits=self.decompressed_bits,
        )

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns to ignore, always with the defaults."""
        given = tuple(self.ignore.split(",")) if isinstance(self.ignore, str) else tuple(self.ignore)
        return tuple(dict.fromkeys((*DEFAULT_IGNORE, *(pattern.strip() for pattern in given if pattern.strip()))))


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Saving the training of a block while it runs."""

    every_iterations: int = 0
    """Iterations from one checkpoint to the next, from which a killed run goes on within the block; each replaces the
    one before. 0: none; the block at hand is trained again."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """A quantization run."""

    model: str
    """Hugging Face folder, or hub name (owner/model)."""
    output: str | None = None
    """Folder for everything the run writes (default: runs/MODEL-wBITS[-gGROUP])."""
    seed: int = 0
    """Seed of all random choices."""
    resume: Literal["auto", "never", "require"] = "auto"
    """What to do with an unfinished run in the output folder: go on (`auto`), refuse (`never`); `require` refuses to
    start anew."""
    redo: str | None = None
    """Blocks of the run in the output folder to do again, counted from 0, such as `3,12-14`: damaged ones, or chosen
    ones with another seed, optimize, calib or quant.method. Those after one that comes out with other bytes are done
    again too. `end`: only the files that complete the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where blocks are computed."""
    target: Literal["vllm", "gguf"] | None = None
    """What is to serve the result. `vllm`: scales are rounded to the model's dtype before codes are made, as vLLM keeps
    them, so that what is measured is what is served; and its rules on shapes are checked before work starts. `gguf`
    (llama.cpp): the same with float16 and its rules."""
    tensor_parallel: int = 1
    """GPUs over which vLLM will split each linear: its rules on shapes are checked on what each of them holds."""
    quant: QuantOptions = field(default_factory=QuantOptions)
    calib: TextOptions = field(default_factory=TextOptions)
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    optimize: OptimizeOptions = field(default_factory=OptimizeOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    export: ExportOptions = field(default_factory=ExportOptions)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation."""

    model: str
    """Hugging Face folder, hub name (owner/model), or the output folder of a finished run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where blocks are computed."""
    activations: Literal["float", "simulated"] = "float"
    """`simulated`: round activations to the grids that a finished run has for them, as the model runs."""
    quant: QuantOptions = field(default_factory=lambda: QuantOptions(method="none"))
    eval: TextOptions = field(default_factory=lambda: EVALUATION_TEXT)
    cache: CacheOptions = field(default_factory=lambda: CacheOptions(placement="cpu"))


@dataclass(frozen=True)
class ExportConfig:
    """A conversion of a finished run."""

    run: str
    """Output folder of a finished run."""
    format: Format = "compressed-tensors"
    """`compressed-tensors`: codes and scales, for vLLM and transformers; `gptq`: the same as GPTQ packs them; `hf`:
    plain weights, for anything that loads Hugging Face checkpoints; `onnx`: a graph with packed codes, for
    onnxruntime; `gguf`: one file for llama.cpp; `aimet`: AIMET encodings alone, the weights that belong to them are
    those of `hf`."""
    output: str | None = None
    """New folder for the result (default: RUN/FORMAT)."""
    dtype: Literal["float32", "source"] = "float32"
    """Of the weights in `hf`: as --export.dtype of quantize."""
    activation_bits: Literal[8, 16] = 16
    """Of `compressed-tensors`: as --export.activation_bits of quantize."""
    aimet: AimetOptions = field(default_factory=AimetOptions)
    device: ClassVar[str] = "cpu"

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.output) if self.output else Path(self.run) / self.format


@dataclass(frozen=True)
class VerifyConfig:
    """A check of what a run has written."""

    run: str
    """Output folder of a finished run."""
    device: ClassVar[str] = "cpu"


EVALUATION_TEXT = TextOptions(
    dataset="Salesforce/wikitext",
    subset="wikitext-2-raw-v1",
    split="test",
    samples=None,
    sequence_length=2048,
)


def check_quantize(config: QuantizeConfig, world_size: int) -> None:
    """Check the values and combinations of a run whose options are resolved.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
    """
    _check_quant(config.quant, ("adascale", "flexround", "lwc", "rtn"))
    _check_activations(config.activations)
    bits, exported = config.activations.bits, config.export.activation_bits
    _require(
        exported == 16 or bits in (None, 8), "export.activation_bits", exported, f"16 beside activations.bits {bits}"
    )
    _check_text("calib", config.calib)
    split = config.tensor_parallel
    _require(split == 1 or (split > 1 and config.target == "vllm"), "tensor_parallel", split,
             "at least 1, and 1 but for --target vllm")  # fmt: skip
    optimize = config.optimize
    _check_parallel(config.parallel, world_size)
    for name in ("iterations", "batch_size"):
        _require(getattr(optimize, name) >= 1, f"optimize.{name}", getattr(optimize, name), "at least 1")
    _require(optimize.retries >= 0, "optimize.retries", optimize.retries, "at least 0")
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
    patience = optimize.patience
    _require(patience is None or (patience >= 1 and held_out), "optimize.patience", patience,
             "at least 1, beside an optimize.held_out above 0")  # fmt: skip
    _require(samples - held_out >= world_size, "calib.samples", samples,
             f"at least {world_size + held_out}, one for each of the {world_size} ranks to train on beside "
             f"optimize.held_out ({held_out}); take more samples or fewer ranks")  # fmt: skip
    micro_batch = optimize.micro_batch
    _require(micro_batch is None or 1 <= micro_batch <= optimize.batch_size, "optimize.micro_batch", micro_batch,
             f"between 1 and optimize.batch_size ({optimize.batch_size})")  # fmt: skip
    _require(optimize.batch_size <= samples - held_out, "optimize.batch_size", optimize.batch_size,
             f"at most the samples that are trained on ({samples - held_out})")  # fmt: skip


def _check_parallel(parallel: ParallelOptions, world_size: int) -> None:
    engine, zero = parallel.engine, "a ZeRO engine (zero1, zero2, zero3)"
    _require(engine != "local" or world_size == 1, "parallel.engine", engine, "allreduce or zero* on several ranks")
    _require(engine != "allreduce" or world_size > 1, "parallel.engine", engine, "local or zero* on one rank")
    _require(not parallel.offload or parallel.zero_stage, "parallel.offload", parallel.offload, f"false without {zero}")
    _require(parallel.deepspeed is None or parallel.zero_stage, "parallel.deepspeed", parallel.deepspeed,
             f"left out without {zero}")  # fmt: skip
    if parallel.zero_stage:
        deepspeed_settings(parallel)  # a file that cannot be used is refused before any work


def check_evaluate(config: EvaluateConfig) -> None:
    """Check the values and combinations of an evaluation.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
    """
    _check_quant(config.quant, ("none", "rtn"))
    _check_text("eval", config.eval)
    if config.cache.placement == "disk" and config.cache.folder is None:
        raise ConfigError("cache.placement: disk needs a folder to write to; give one with --cache.folder")


def check_export(config: ExportConfig) -> None:
    """Check that a format is asked for nothing that belongs to another.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
    """
    chosen, version = config.format, config.aimet.version
    _require(chosen == "hf" or config.dtype == "float32", "dtype", config.dtype, "left out but for --format hf")
    _require(chosen == "compressed-tensors" or config.activation_bits == 16, "activation_bits", config.activation_bits,
             f"16 for --format {chosen}, which describes no activations")  # fmt: skip
    _require(chosen == "aimet" or config.aimet == AimetOptions(), "aimet.version", version,
             "left out but for --format aimet")  # fmt: skip


def _check_quant(quant: QuantOptions, methods: tuple[str, ...]) -> None:
    _require(2 <= quant.bits <= 8, "quant.bits", quant.bits, "between 2 and 8")
    _require(quant.method in methods, "quant.method", quant.method, f"one of {', '.join(methods)} for this command")
    _require(quant.symmetric or not quant.full_range, "quant.full_range", quant.full_range,
             "false beside quant.symmetric false: a zero point already uses every code")  # fmt: skip
    size = quant.group_size
    _require(size in (None, -1) or size >= 2, "quant.group_size", size, "at least 2, or -1 for per-channel")
    wide, spec = quant.decompressed_bits, quant.spec
    _require(wide is None or (spec.symmetric and spec.group_size and not spec.full_range), "quant.decompressed_bits",
             wide, "left out but for symmetric grids in groups that are not full-range")  # fmt: skip
    _require(wide is None or quant.bits < wide <= MAX_DECOMPRESSED_BITS, "quant.decompressed_bits", wide,
             f"above quant.bits ({quant.bits}), at most {MAX_DECOMPRESSED_BITS}")  # fmt: skip


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


def _require(holds: bool, option: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{option}: {value} is not allowed, it must be {allowed}")
