"""What each verb gives at its end: the last line that a command prints, and what its Python function returns."""

from typing import NotRequired, TypedDict


class LeftSummary(TypedDict):
    """Of the tensors of one kind that are not quantized."""

    kind: str
    """Such as `embedding`, `norm`, `router`, or the name of a part outside the text decoder."""
    reason: str
    """Why they are left as they are."""
    tensors: int
    """Their number."""
    parameters: int
    """Their values."""
    bytes: int
    """Their size, decoded where they are stored encoded."""


class QuantizeSummary(TypedDict):
    """Of a run, the part before an interruption included."""

    output: str
    """Folder of the run."""
    blocks: int
    """Decoder blocks of the model."""
    seconds: float
    """Time that this call took."""
    peak_rss_bytes: int
    """Largest resident memory of a rank's process so far."""
    loss_before: float | None
    """Relative loss before training, mean over the blocks that were trained to their output; null if none was."""
    loss_after: float | None
    """The same after training."""
    divergence_before: float | None
    """KL divergence from the float model before training, in nats a token; null unless the last block was trained to
    the model's predictions."""
    divergence_after: float | None
    """The same after training."""
    parameters: int
    """Values of all tensors of the source."""
    quantized_parameters: int
    """Those that are quantized."""
    left: list[LeftSummary]
    """The others, by kind, the largest first."""


class TuneSummary(TypedDict):
    """Of a tuning."""

    output: str
    """Folder of the tuned run."""
    steps: int
    """Steps of the whole tuning."""
    seconds: float
    """Time that this call took."""
    peak_rss_bytes: int
    """Largest resident memory of a rank's process so far."""
    loss_first: float | None
    """Loss before the first step that this call took, in nats a token; null if none was left."""
    loss_last: float | None
    """Loss before the last step that this call took."""


class EvaluateSummary(TypedDict):
    """Of an evaluation."""

    perplexity: float
    """Of the predicted tokens."""
    tokens: int
    """Number of predicted tokens: all but the first of each sequence."""
    seconds: float
    """Time that this call took."""
    peak_rss_bytes: int
    """Largest resident memory of a rank's process so far."""


class ExportSummary(TypedDict):
    """Of an export."""

    output: str
    """Folder of the export."""
    format: str
    """Its format."""
    bytes: int
    """Size of its files."""
    scale_change: float
    """Largest relative change of a scale by its rounding to the dtype that the format keeps it in."""
    address: NotRequired[str]
    """Where it was uploaded to, if it was."""
    seconds: float
    """Time that this call took."""


class VerifySummary(TypedDict):
    """Of a check that found a run, or an export, whole."""

    output: str
    """Folder that was checked."""
    blocks: NotRequired[int]
    """Of a run: its decoder blocks."""
    linears: NotRequired[int]
    """Of a run: its quantized linears."""
    parameters: NotRequired[int]
    """Of a run: values of all tensors of its checkpoint."""
    quantized_parameters: NotRequired[int]
    """Of a run: those that are quantized."""
    left: NotRequired[list[LeftSummary]]
    """Of a run: the others, by kind, the largest first."""
    format: NotRequired[str]
    """Of an export: its format."""
    files: NotRequired[int]
    """Of an export: its files."""
