"""Options of what a run is written as."""

from dataclasses import dataclass, field
from typing import Literal

FormatName = Literal["compressed-tensors", "gptq", "hf", "onnx", "gguf", "aimet"]
EncodingsVersion = Literal["0.6.1", "1.0.0", "2.0.0", "2.1.0"]


@dataclass(frozen=True, kw_only=True)
class AimetOptions:
    """The encodings of `aimet`."""

    version: EncodingsVersion = "1.0.0"
    """Version of the encodings; 0.6.1 is what load_encodings of aimet_torch reads."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The checkpoints that a run writes."""

    checkpoint: Literal["packed", "plain"] | None = None
    """The output folder's own checkpoint. `packed`: codes and scales as compressed-tensors, which vLLM and transformers
    serve as it is, with scales rounded to the dtype that they are served in before codes are made; `plain`: weights on
    their grid, for anything that loads Hugging Face checkpoints, with AIMET's encodings beside them (default: packed
    where the grid has such a form)."""
    dtype: Literal["float32", "source"] = "float32"
    """Dtype of the quantized linears' weights where they are plain: `float32` holds every grid point exactly; `source`
    takes the source's dtype, half the size, each value rounded to it. Codes and scales in blocks/ are exact either
    way."""
    formats: tuple[FormatName, ...] | FormatName = ()
    """Further formats to write, separated by commas, each to a folder of its name in the output folder:
    `compressed-tensors`, `gptq`, `hf` a shard a block as the run goes on, the others when it is done; `shardq export`
    does it later."""
    activation_bits: Literal[8, 16] = 16
    """Activations that a compressed-tensors checkpoint asks for: 16 leaves them as they are, 8 has those that
    enter the linears rounded to int8 while the model runs (W8A8, W4A8): on the run's own grids (activations.bits 8), or
    with a scale a token."""
    aimet: AimetOptions = field(default_factory=AimetOptions)

    @property
    def asked(self) -> tuple[FormatName, ...]:
        """The further formats."""
        return (self.formats,) if isinstance(self.formats, str) else tuple(self.formats)
