"""Codes and scales as GPTQ packs them, for vLLM, and for transformers with GPTQModel."""

from collections.abc import Iterable

import torch
from torch import Tensor

from shardq.export.base import Grids
from shardq.export.checkpoint import LOAD_PLAIN, Checkpoint, in_transformers, with_vllm
from shardq.formats import gptq
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec


class Gptq(Checkpoint):
    """A GPTQ checkpoint."""

    name = "gptq"
    rounded_by = "vllm"

    def check(self, skeleton: Skeleton, grids: Grids) -> None:
        for name, spec in grids.items():
            gptq.check_grid(spec)
            gptq.check_shape(name, *skeleton.tensor(f"{name}.weight").shape)

    def linear_tensors(
        self, name: str, linear: QuantizedLinear, dtype: torch.dtype, entering: ActivationGrid | None
    ) -> dict[str, Tensor]:
        return gptq.linear_tensors(name, linear, dtype)

    def described(self, skeleton: Skeleton, spec: QuantSpec, ignored: Iterable[str]) -> dict:
        return gptq.quantization_config(spec, ignored)

    def how_to_serve(self, spec: QuantSpec) -> str:
        loaded = in_transformers("gptqmodel optimum", LOAD_PLAIN)
        return with_vllm(loaded) if gptq.is_served_by_vllm(spec) else f"W{loaded[1:]}"
