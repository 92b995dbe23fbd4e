"""Which text becomes token sequences, and how."""

from dataclasses import asdict, dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Where token sequences come from."""

    dataset: str | None = None
    """A file (.txt, .jsonl, .json, .parquet, or .safetensors with token ids [N, T]), a hub name (owner/name), or the
    short name of a well-known one: `c4`, `code`, `pile-10k`, `ultrachat`, `wikitext`. Several with their shares are a
    mix: `ultrachat:0.75,code:0.25` (default: `c4`; with `--quant.method rtn` none: only the weights are looked at)."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset (default: the one that a well-known dataset is used with)."""
    split: str | None = None
    """Split of a hub dataset (default: `train`, or the one that a well-known dataset is used with)."""
    column: str | None = None
    """Column with text, or with conversations, which become text by the model's chat template (default: `text`, or else
    `messages` or `conversations`); the tensor's name in a .safetensors file."""
    packing: Literal["packed", "row"] = "packed"
    """`packed`: texts are joined and cut into sequences; `row`: one sequence a row, shorter rows are skipped.
    Either way a sequence begins with what the tokenizer puts in front of a text, such as `<bos>`."""
    samples: int | None = 128
    """Number of sequences; null: all there are (in a file)."""
    sequence_length: int = 2048
    """Tokens a sequence."""


@dataclass(frozen=True, kw_only=True)
class MovedText:
    """Where the text of a run is now; values that are not given are the run's own."""

    dataset: str | None = None
    """What gives the run's tokens now, as --calib.dataset of quantize (default: where the run had it)."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset."""
    column: str | None = None
    """Column with text or conversations, or the tensor's name in a .safetensors file."""
    packing: Literal["packed", "row"] | None = None
    """As --calib.packing of quantize."""

    def instead_of(self, former: TextOptions) -> TextOptions:
        """What a run had, with the values that are given now."""
        return replace(former, **{name: value for name, value in asdict(self).items() if value is not None})
