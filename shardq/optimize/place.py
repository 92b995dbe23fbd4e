"""A linear's weight while it is trained: holds values or a gradient, and each only while it is needed."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Place:
    """The weight [O, I] of a linear in the block while it is trained."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype):
        self.parameter = parameter
        self.make_room(dtype)

    @property
    def storage(self) -> int:
        """Key of the memory that holds its values."""
        return self.parameter.untyped_storage().data_ptr()

    def make_room(self, dtype: torch.dtype | None = None) -> None:
        """Free the values; the shape stays, and the dtype unless another is given."""
        self.parameter.data = self.parameter.data.new_zeros((), dtype=dtype).expand(self.parameter.shape)

    def load(self, values: Tensor, adding_up: bool) -> None:
        """Take fake-quantized values, and collect gradients from then on.

        Args:
            adding_up: gradients add up in float32.
        """
        parameter = self.parameter
        parameter.data = values
        parameter.requires_grad_(True)
        parameter.grad = None
        parameter.grad_dtype = None  # any dtype: the terms of a float32 sum need not be float32
        if adding_up:
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)

    def take_gradient(self) -> Tensor:
        """The gradient [O, I]; can be taken once, which frees the values and the gradient."""
        # A weight that no sample reached, such as an idle expert's, has none; all ranks still step it.
        gradient = torch.zeros_like(self.parameter) if self.parameter.grad is None else self.parameter.grad
        self.parameter.grad = None
        self.make_room()
        return gradient

    def be_served(self) -> None:
        """Collect no more gradients, and have memory for values."""
        self.parameter.requires_grad_(False)
        self.parameter.grad = None
        if not self.parameter.is_contiguous():  # its values have been freed
            self.parameter.data = self.parameter.new_empty(self.parameter.shape)


class Collect(torch.autograd.Function):
    """Zero; its gradient in a fake-quantized weight is the gradient that the weight's place has collected."""

    @staticmethod
    def forward(ctx, weight_OI, place, is_fixed):
        """The zero."""
        ctx.place, ctx.dtype, ctx.is_fixed = place, weight_OI.dtype, is_fixed
        return weight_OI.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        """The gradient [O, I], rounded to the weight's dtype; taken from its place. Zeros if it is fixed."""
        gradient = ctx.place.take_gradient().to(ctx.dtype)
        return torch.zeros_like(gradient) if ctx.is_fixed else gradient, None, None


class _Use(NamedTuple):
    """A view of a weight that the backward pass needs: size, stride and offset."""

    place: Place
    view: tuple[torch.Size, tuple[int, ...], int]


@contextmanager
def leaving(places: Iterable[Place]) -> Iterator[None]:
    """In the body, have each weight freed as soon as the backward pass no longer needs its values."""
    by_storage = {place.storage: place for place in places}
    uses: Counter[Place] = Counter()

    def keep(tensor: Tensor) -> Tensor | _Use:
        place = by_storage.get(tensor.untyped_storage().data_ptr()) if tensor.untyped_storage().nbytes() else None
        if place is None:
            return tensor
        uses[place] += 1
        return _Use(place, (tensor.size(), tensor.stride(), tensor.storage_offset()))

    def give(kept: Tensor | _Use) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        values = kept.place.parameter.data
        uses[kept.place] -= 1
        if not uses[kept.place]:
            kept.place.make_room()
        return values.as_strided(*kept.view)

    with saved_tensors_hooks(keep, give):
        yield
