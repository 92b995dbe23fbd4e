"""The quantizers of a block's linears, and how their weights get into the block and out of it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from shardq.errors import QuantizationError
from shardq.optimize.linear_quantizer import LinearQuantizer, Method
from shardq.optimize.share import Everything, Share
from shardq.quant.adascale import Kernels
from shardq.quant.grid import row_chunks
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec

Gathered = Callable[..., AbstractContextManager]


def whole(module: nn.Module, changed: bool = False) -> AbstractContextManager:
    """A stepper's `gathered` where every rank holds all parameters."""
    return nullcontext()


class BlockQuantizer(nn.Module):
    """One LinearQuantizer for each named linear of a block; made once, started anew for each block's weights.

    The block stays what it is: its linears' weights are overwritten, first with fake-quantized ones that collect
    gradients, in the end with the ones that are served. Thereby a forward and a backward through the block are the
    model's own, the same compiled code for every block, and the weights are quantized once per optimizer step however
    many micro-batches go through.
    """

    def __init__(
        self,
        block: nn.Module,
        linear_names: list[str],
        spec: QuantSpec,
        method: Method,
        kernels: Kernels,
        dtype: torch.dtype,
        share: Share | None = None,
    ):
        """Allocate for the named linears of a block, whose weights leave it and will be in `dtype` from here on.

        Args:
            share: the outputs that are quantized here (default: all).
        """
        super().__init__()
        self.names = linear_names
        # In a tuple: not submodules, whose parameters would be counted as trainable.
        self._linears = tuple(block.get_submodule(name) for name in linear_names)
        self._num_outputs = [linear.weight.shape[0] for linear in self._linears]
        self._kernels, self._dtype, self._share = kernels, dtype, share or Everything()
        self._collecting: list[Tensor] = []
        for linear in self._linears:  # to make room; the weights that it will have here come by `load` and `serve`
            linear.weight.data = _placeholder(linear.weight, dtype)
        self.quantizers = nn.ModuleList()
        for linear, num in zip(self._linears, self._num_outputs, strict=True):
            self.quantizers.append(LinearQuantizer(linear.weight[self._share.outputs(num)], spec, method))
            self._share.made(self.quantizers[-1])

    def start(
        self,
        source: dict[str, Tensor],
        importance: dict[str, Tensor] | None = None,
        gathered: Gathered = whole,
    ) -> None:
        """Go to the start, round-to-nearest, for the weights `NAME.weight` in `source`, of any float dtype.

        Args:
            importance: by linear's name, of its input channels [I]; the start grid of those named is searched with it.
            gathered: the stepper's, where there is one.
        """
        for name, quantizer in zip(self.names, self.quantizers, strict=True):
            weight_OI = source[f"{name}.weight"]
            part_OI = weight_OI[self._share.outputs(len(weight_OI))]
            if len(part_OI) < len(weight_OI):
                part_OI = part_OI.clone()  # a view would keep the whole in memory
            with gathered(quantizer, True):
                quantizer.start(part_OI, (importance or {}).get(name))

    def restart(self, gathered: Gathered = whole) -> None:
        """Go back to the start for the weights at hand.

        Args:
            gathered: the stepper's, where there is one.
        """
        for quantizer in self.quantizers:
            with gathered(quantizer, True):
                quantizer.restart()

    def forward(self) -> list[Tensor]:
        """The fake-quantized weights [O, I], in the order of the names; differentiable."""
        parts = (quantizer(self._dtype, self._kernels) for quantizer in self.quantizers)
        return self._share.joined(parts, self._num_outputs)

    def load(self, quantized: list[Tensor], adding_up: bool = False) -> None:
        """Write fake-quantized weights into the block; gradients that reach them are collected there.

        Args:
            adding_up: several backward passes will come, whose gradients add up in float32.
        """
        self._collecting = [_Collect.apply(*pair) for pair in zip(quantized, self._linears, strict=True)]
        for linear, weight_OI in zip(self._linears, quantized, strict=True):
            linear.weight.data = weight_OI.detach()
            linear.weight.requires_grad_(True)
            linear.weight.grad = None
            linear.weight.grad_dtype = None  # any: what is added to a float32 sum need not be float32 itself
            if adding_up:
                linear.weight.grad = torch.zeros_like(linear.weight, dtype=torch.float32)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Have each weight leave the block as the backward pass of what is computed in the body comes past it.

        So its gradient takes its place, instead of one beside it. Nothing is computed with the block after that until
        the next `load`.
        """
        places = {linear.weight.untyped_storage().data_ptr(): linear for linear in self._linears}
        uses: Counter[nn.Linear] = Counter()

        def keep(tensor: Tensor) -> Tensor | _Use:
            linear = places.get(tensor.untyped_storage().data_ptr()) if tensor.untyped_storage().nbytes() else None
            if linear is None:
                return tensor
            uses[linear] += 1
            return _Use(linear, (tensor.size(), tensor.stride(), tensor.storage_offset()))

        def give(kept: Tensor | _Use) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            weight = kept.linear.weight.data
            uses[kept.linear] -= 1
            if not uses[kept.linear]:
                kept.linear.weight.data = _placeholder(weight)
            return weight.as_strided(*kept.view)

        with saved_tensors_hooks(keep, give):
            yield

    def collected(self) -> Tensor:
        """A zero whose backward pass takes what was collected since the last `load` on to what was loaded.

        It takes the weights and their gradients out of the block, so that they make room for those of s2.
        """
        collecting, self._collecting = self._collecting, []
        return torch.stack(collecting).sum()

    def folded(self, gathered: Gathered = whole) -> dict[str, QuantizedLinear]:
        """The quantized linears by name that the quantizers stand for now.

        Args:
            gathered: the stepper's, where there is one.

        Raises:
            QuantizationError: training drove a parameter or a scale to a value that is not finite, or a scale to one
                that its grid does not have.
        """

        def fold() -> list[QuantizedLinear]:
            parts = []
            for name, quantizer in zip(self.names, self.quantizers, strict=True):
                with gathered(quantizer):
                    parts.append(_checked(name, quantizer))
            return parts

        parts = zip(self._share.agreed(fold), self._num_outputs, strict=True)
        return dict(zip(self.names, (self._whole(part, num) for part, num in parts), strict=True))

    @torch.no_grad()
    def serve(self, linears: dict[str, QuantizedLinear], as_written: Callable[[Tensor], Tensor]) -> None:
        """Write quantized weights into the block, as they will be served.

        Args:
            as_written: rounds a dequantized weight to what the output checkpoint holds of it; with bf16 matrix
                multiplies the weights are then rounded to that.
        """
        self._collecting = []
        for name, linear in zip(self.names, self._linears, strict=True):
            linear.weight.requires_grad_(False)
            linear.weight.grad = None
            if not linear.weight.is_contiguous():  # a placeholder
                linear.weight.data = linear.weight.new_empty(linear.weight.shape)
            for outputs in row_chunks(linear.weight):
                linear.weight[outputs] = as_written(linears[name].of(outputs).dequantized())

    def release(self) -> None:
        """Let go of the source."""
        for quantizer in self.quantizers:
            quantizer.release()

    def _whole(self, part: QuantizedLinear, num_outputs: int) -> QuantizedLinear:
        tensors = self._share.joined((part.codes_OI, part.scale_OG, part.zero_point_OG), [num_outputs] * 3)
        return QuantizedLinear(*tensors, part.grid)


class _Use(NamedTuple):
    """A view of a linear's weight that a backward pass will ask for: size, stride and offset."""

    linear: nn.Linear
    view: tuple[torch.Size, tuple[int, ...], int]


def _placeholder(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape, of another dtype if one is given, that takes no memory."""
    return weight.new_zeros((), dtype=dtype).expand(weight.shape)


class _Collect(torch.autograd.Function):
    """Zero, whose gradient in a fake-quantized weight is the one that the block's linear has collected by then."""

    @staticmethod
    def forward(ctx, weight_OI, linear):
        """Return the zero."""
        ctx.linear = linear
        return weight_OI.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        """The linear's gradient [O, I], which the linear gives away, its weight too; rounded to the weight's dtype."""
        weight = ctx.linear.weight
        # A linear that no sample reached, such as an idle expert's, has none; all ranks step it all the same.
        gradient_OI = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad = None
        weight.data = _placeholder(weight)
        return gradient_OI.to(weight.dtype), None


def _checked(name: str, quantizer: LinearQuantizer) -> QuantizedLinear:
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
