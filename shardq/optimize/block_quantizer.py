"""The quantizers of a block's matrices, and how weights get into the block and out of it."""

from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from shardq.errors import QuantizationError
from shardq.matrix import Matrix
from shardq.optimize.linear_quantizer import LinearQuantizer, Method
from shardq.optimize.place import Collect, Place, leaving
from shardq.optimize.share import Everything, Share
from shardq.quant.adascale import Kernels
from shardq.quant.grid import Grid, row_chunks
from shardq.quant.quantized import QuantizedLinear

Gathered = Callable[..., AbstractContextManager]


def whole(module: nn.Module, changed: bool = False) -> AbstractContextManager:
    """The `gathered` of a stepper whose ranks hold all parameters: does nothing."""
    return nullcontext()


class BlockQuantizer(nn.Module):
    """One LinearQuantizer for each matrix of a block; made once, started again for each block's weights.

    The block's modules stay in place; only their weights are overwritten, first with fake-quantized weights that
    collect gradients, in the end with the weights that are served. So forward and backward are the model's own, all
    blocks share the compiled code, and the weights are quantized once per optimizer step, not once per micro-batch.
    """

    def __init__(
        self,
        block: nn.Module,
        grids: dict[Matrix, Grid],
        method: Method,
        kernels: Kernels,
        dtype: torch.dtype,
        share: Share | None = None,
    ):
        """Allocate for matrices of a block, whose values leave the block; from here on they are in `dtype`.

        Args:
            grids: the grid of each matrix.
            share: the outputs that are quantized on this rank (default: all).
        """
        super().__init__()
        self.matrices = list(grids)
        self._dtype, self._kernels, self._share = dtype, kernels, share or Everything()
        self._num_outputs = [matrix.shape[0] for matrix in grids]
        self._collecting: list[Tensor] = []
        self._fixed: Container[str] = ()
        # Frees their memory; `load` and `serve` bring the weights that the block computes with.
        self._places = [Place(matrix.weight_in(block), dtype) for matrix in grids]
        self.quantizers = nn.ModuleList()
        for (matrix, grid), place in zip(grids.items(), self._places, strict=True):
            like_OI = place.parameter[self._share.outputs(matrix.shape[0])]
            self.quantizers.append(LinearQuantizer(like_OI, grid, method))
            self._share.made(self.quantizers[-1])

    def start(
        self,
        source: dict[str, Tensor],
        importance: dict[str, Tensor] | None = None,
        gathered: Gathered = whole,
        fixed: Container[str] = (),
    ) -> None:
        """Go to the start, round-to-nearest, for the matrices in `source`, of any float dtype.

        Args:
            source: the block's tensors, by name within it.
            importance: of the input channels [I], by name of the matrix; named matrices have their start grid searched.
            gathered: the stepper's, where there is one.
            fixed: names of matrices that stay at the start; their gradients are zeros.
        """
        self._fixed = fixed
        for matrix, quantizer in zip(self.matrices, self.quantizers, strict=True):
            weight_OI = source[matrix.tensor]
            part_OI = weight_OI[self._share.outputs(len(weight_OI))]
            if len(part_OI) < len(weight_OI):
                part_OI = part_OI.clone()  # a view would keep the whole tensor in memory
            with gathered(quantizer, True):
                quantizer.start(part_OI, (importance or {}).get(matrix.name))

    def restart(self, gathered: Gathered = whole) -> None:
        """Go back to the start for the same weights.

        Args:
            gathered: the stepper's, where there is one.
        """
        for quantizer in self.quantizers:
            with gathered(quantizer, True):
                quantizer.restart()

    def forward(self) -> list[Tensor]:
        """The fake-quantized weights [O, I], in the order of the matrices; differentiable."""
        parts = (quantizer(self._dtype, self._kernels) for quantizer in self.quantizers)
        return self._share.joined(parts, self._num_outputs)

    def load(self, quantized: list[Tensor], adding_up: bool = False) -> None:
        """Write fake-quantized weights into the block; gradients that reach them are collected there.

        Args:
            adding_up: several backward passes will come, whose gradients add up in float32.
        """
        for place, weight_OI in zip(self._places, quantized, strict=True):
            place.load(weight_OI.detach(), adding_up)
        self._collecting = [
            Collect.apply(weight_OI, place, matrix.name in self._fixed)
            for matrix, place, weight_OI in zip(self.matrices, self._places, quantized, strict=True)
        ]

    def leaving(self) -> AbstractContextManager:
        """In the body, free each weight's values as soon as the backward pass no longer needs them.

        So the gradient takes the memory of the values instead of more memory. The block cannot compute after that until
        the next `load`.
        """
        return leaving(self._places)

    def collected(self) -> Tensor:
        """A zero whose backward pass hands the gradients collected since the last `load` to the loaded weights.

        It takes the weights and their gradients out of the block, which makes room for the gradients of s2.
        """
        collecting, self._collecting = self._collecting, []
        return torch.stack(collecting).sum()

    def folded(self, gathered: Gathered = whole) -> dict[str, QuantizedLinear]:
        """The quantized linears, by name, that the quantizers represent now.

        Args:
            gathered: the stepper's, where there is one.

        Raises:
            QuantizationError: training drove a parameter or a scale to a value that is not finite, or a scale to one
                that its grid does not have.
        """

        def fold() -> list[QuantizedLinear]:
            parts = []
            for matrix, quantizer in zip(self.matrices, self.quantizers, strict=True):
                with gathered(quantizer):
                    parts.append(checked(matrix.name, quantizer))
            return parts

        parts = zip(self.matrices, self._share.agreed(fold), strict=True)
        return {matrix.name: self._whole(part, matrix.shape[0]) for matrix, part in parts}

    @torch.no_grad()
    def serve(self, linears: dict[str, QuantizedLinear], as_written: Callable[[Tensor], Tensor]) -> None:
        """Write quantized weights into the block, as they are served later.

        Args:
            as_written: rounds a dequantized weight to its value in the output checkpoint; the result is then rounded to
                the dtype of the matrix multiplies.
        """
        self._collecting = []
        for matrix, place in zip(self.matrices, self._places, strict=True):
            place.be_served()
            weight_OI = place.parameter
            for outputs in row_chunks(weight_OI):
                weight_OI[outputs] = as_written(linears[matrix.name].of(outputs).dequantized())

    def release(self) -> None:
        """Free the source weights."""
        for quantizer in self.quantizers:
            quantizer.release()

    def _whole(self, part: QuantizedLinear, num_outputs: int) -> QuantizedLinear:
        tensors = self._share.joined((part.codes_OI, part.scale_OG, part.zero_point_OG), [num_outputs] * 3)
        return QuantizedLinear(*tensors, part.grid)


def checked(name: str, quantizer: LinearQuantizer) -> QuantizedLinear:
    """The quantized linear that a quantizer represents; raises as `BlockQuantizer.folded`."""
    folded = quantizer.folded()
    values = {name: value for name, value in quantizer.named_parameters() if value.requires_grad} | {
        "scale": folded.scale_OG
    }
    wrong = [kind for kind, value in values.items() if not torch.isfinite(value).all()]
    if folded.grid.kept_dtype is torch.float16 and wrong in (["scale"], []) and not folded.has_valid_scales:
        raise QuantizationError(
            f"{name}: its weights need a scale beyond what float16 holds, in which the target keeps scales; leave this "
            "linear as it is with --quant.ignore, or leave out --target"
        )
    if wrong or not folded.has_valid_scales:
        sign = "nonzero" if folded.grid.has_signed_scales else "positive"
        raise QuantizationError(
            f"{name}: {', '.join(wrong) or 'scale'} is not finite and {sign} after training; "
            "lower optimize.grid_lr and optimize.weight_lr"
        )
    return folded
