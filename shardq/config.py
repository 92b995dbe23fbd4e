"""All options of a command in one tree."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shardq.cache.options import CacheOptions
from shardq.calib.options import MovedText, TextOptions
from shardq.errors import ConfigError
from shardq.formats.options import AimetOptions, ExportOptions, FormatName
from shardq.optimize.options import OptimizeOptions, TuneOptions
from shardq.parallel.options import ParallelOptions
from shardq.quant.options import DEFAULT_IGNORE, ActivationOptions

DEFAULT_GROUP_SIZES = (128, 64, 32)  # the first one that divides every width of a model

if TYPE_CHECKING:  # options are read before torch is imported, which takes seconds
    from shardq.quant.integer_grid import IntegerGrid


@dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """Weight quantization."""

    bits: int = 4
    """Bits a weight, 2 to 8."""
    symmetric: bool = True
    """Symmetric grid (no zero point), or an asymmetric one."""
    full_range: bool | None = None
    """Allow negative scales in a symmetric grid, so that the extra code below 0 serves the side where a row reaches
    further. AIMET's scales are positive, so encodings then describe an asymmetric grid: false for runtimes that need
    symmetric weights (default: true up to 4 bits, where one code is a good part of the grid)."""
    group_size: int | None = None
    """Input channels that share a scale: 32, 64, 128, ...; -1: all of an output channel's (per-channel) (default: 128,
    or 64 or 32 where 128 does not divide every width of the model, or else -1)."""
    decompressed_bits: int | None = None
    """Two-level scales (LPBQ; AIMET's decompressed_bw) of a symmetric grid in groups: each a whole multiple, at most
    2^(decompressed_bits - bits), of one float scale of the output channel, as Qualcomm runtimes compute with it;
    usually 8 for 4 bits (default: each group has its own float scale)."""
    method: Literal["adascale", "flexround", "lwc", "rtn"] = "adascale"
    """What is trained: `adascale` all, `flexround` the weight's division and one step, `lwc` the grid's ends, `rtn`
    nothing (round to nearest on the start grid)."""
    ignore: tuple[str, ...] | str | None = DEFAULT_IGNORE
    """Linears to leave as they are: names or patterns (`*.down_proj`, `re:...`), separated by commas. A comma within
    brackets, as in `re:.*[.]1{1,2}[.].*`, belongs to the pattern. Embeddings and head are never quantized."""

    @property
    def grid(self) -> "IntegerGrid":
        """The grid that these options describe, in groups of 128 where no size is given.

        Raises:
            ConfigError: there is none; names the option, its value and what is allowed.
        """
        from shardq.quant.integer_grid import IntegerGrid

        # A multiplier is positive, so two-level scales are.
        size = DEFAULT_GROUP_SIZES[0] if self.group_size is None else self.group_size
        by_default = self.bits <= 4 and self.symmetric and self.decompressed_bits is None
        try:
            return IntegerGrid(
                bits=self.bits,
                symmetric=self.symmetric,
                group_size=None if size == -1 else size,
                full_range=by_default if self.full_range is None else self.full_range,
                decompressed_bits=self.decompressed_bits,
            )
        except ValueError as error:
            raise ConfigError(f"quant.{error}") from error

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns to ignore, always with the defaults."""
        given = listed(self.ignore) if isinstance(self.ignore, str) else self.ignore or ()
        return tuple(dict.fromkeys((*DEFAULT_IGNORE, *given)))


@dataclass(frozen=True, kw_only=True)
class RoundingOptions(QuantOptions):
    """Weight quantization before an evaluation."""

    method: Literal["none", "rtn"] = "none"
    """`none` leaves the model as it is, `rtn` rounds its linears to nearest on the start grid."""


def listed(text: str) -> tuple[str, ...]:
    """Items that commas separate; a comma within brackets, as in `re:x{1,2}`, or behind a backslash does not."""
    items, depth, is_escaped = [""], 0, False
    for character in text:
        if character == "," and not depth and not is_escaped:
            items.append("")
            continue
        if not is_escaped:
            depth = max(0, depth + (character in "([{") - (character in ")]}"))
        is_escaped = character == "\\" and not is_escaped
        items[-1] += character
    return tuple(item.strip() for item in items if item.strip())


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Saving the training of a block while it runs."""

    every_iterations: int = 0
    """Iterations from one checkpoint to the next, from which a killed run goes on within the block; each replaces the
    one before. 0: none; an interrupted block is trained again."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """A quantization run."""

    model: str
    """Hugging Face folder, or hub name (owner/model)."""
    revision: str | None = None
    """Branch, tag or commit of a hub name (default: the hub's main one)."""
    output: str | None = None
    """Folder for everything the run writes (default: runs/MODEL-wBITS, and -gGROUP where a group size is given)."""
    seed: int = 0
    """Seed of all random choices."""
    resume: Literal["auto", "never", "require"] = "auto"
    """What to do with an unfinished run in the output folder: go on (`auto`), refuse (`never`); `require` refuses to
    start a new run."""
    redo: str | None = None
    """Blocks of the run in the output folder to do again, counted from 0, such as `3,12-14`: damaged ones, or chosen
    ones with another seed, optimize, calib or quant.method. Those after one that comes out with other bytes are done
    again too. `end`: only the files that complete the run."""
    self_check: bool = True
    """Compare every block's output with transformers' own forward, on two samples, and stop where they differ."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where blocks are computed."""
    target: Literal["vllm", "gguf"] | None = None
    """Program that will serve the result. `vllm`: scales are rounded to the model's dtype before codes are made, as
    vLLM keeps them, so that what is measured is what is served; its rules on shapes are checked before work starts,
    and linears too narrow for its kernels stay in float. `gguf` (llama.cpp): the same with float16 and its rules."""
    tensor_parallel: int = 1
    """GPUs over which vLLM will split each linear: its rules on shapes are checked for each GPU's part."""
    quant: QuantOptions = field(default_factory=QuantOptions)
    calib: TextOptions = field(default_factory=TextOptions)
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    optimize: OptimizeOptions = field(default_factory=OptimizeOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    export: ExportOptions = field(default_factory=ExportOptions)

    @property
    def uses_data(self) -> bool:
        """Whether the run computes blocks on calibration samples; else it looks at nothing but the weights."""
        return self.quant.method != "rtn" or self.calib.dataset is not None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation."""

    model: str
    """Hugging Face folder, hub name (owner/model), or the output folder of a finished run."""
    revision: str | None = None
    """Branch, tag or commit of a hub name (default: the hub's main one)."""
    self_check: bool = True
    """Compare every block's output with transformers' own forward, on two samples, and stop where they differ."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where blocks are computed."""
    activations: Literal["float", "simulated"] = "float"
    """`simulated`: round activations to the grids that a finished run has for them, as the model runs."""
    quant: RoundingOptions = field(default_factory=RoundingOptions)
    eval: TextOptions = field(default_factory=lambda: EVALUATION_TEXT)
    cache: CacheOptions = field(default_factory=lambda: CacheOptions(placement="cpu"))


@dataclass(frozen=True)
class TuneConfig:
    """Tuning of a finished run's scales."""

    run: str
    """Output folder of a finished run. It stays as it is."""
    model: str = field(kw_only=True)
    """The float model that the run has quantized: Hugging Face folder, or hub name (owner/model)."""
    revision: str | None = field(default=None, kw_only=True)
    """Branch, tag or commit of a hub name (default: the hub's main one)."""
    output: str | None = field(default=None, kw_only=True)
    """Folder for the tuned run, which can do what a run can (default: RUN-tuned)."""
    self_check: bool = field(default=True, kw_only=True)
    """Compare every block's output with transformers' own forward, on two samples, and stop where they differ."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", kw_only=True)
    """Where blocks are computed."""
    calib: MovedText = field(default_factory=MovedText, kw_only=True)
    tune: TuneOptions = field(default_factory=TuneOptions, kw_only=True)
    cache: CacheOptions = field(default_factory=CacheOptions, kw_only=True)

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.output or f"{self.run.rstrip('/')}-tuned")


@dataclass(frozen=True)
class ExportConfig:
    """A conversion of a finished run."""

    run: str
    """Output folder of a finished run."""
    format: FormatName = "compressed-tensors"
    """`compressed-tensors`: codes and scales, for vLLM and transformers; `gptq`: the same as GPTQ packs them; `hf`:
    plain weights, for anything that loads Hugging Face checkpoints; `onnx`: a graph with packed codes, for
    onnxruntime; `gguf`: one file for llama.cpp; `aimet`: only AIMET encodings; their weights are those of
    `hf`."""
    output: str | None = None
    """New folder for the result (default: RUN/FORMAT)."""
    dtype: Literal["float32", "source"] = "float32"
    """Dtype of the weights in `hf`, as --export.dtype of quantize."""
    activation_bits: Literal[8, 16] = 16
    """Bits of activations in `compressed-tensors`, as --export.activation_bits of quantize."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub (owner/name) that the finished export is uploaded to, with the token that
    HF_TOKEN or `hf auth login` gives; it is made where there is none."""
    private: bool = False
    """Make a new repository of `push_to_hub` private."""
    aimet: AimetOptions = field(default_factory=AimetOptions)

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.output) if self.output else Path(self.run) / self.format


@dataclass(frozen=True)
class VerifyConfig:
    """A check of what a run, or an export, has written."""

    run: str
    """Output folder of a finished run, or of an export."""


EVALUATION_TEXT = TextOptions(
    dataset="wikitext",
    split="test",
    samples=None,
    sequence_length=2048,
)
