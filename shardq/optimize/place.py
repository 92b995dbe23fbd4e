"""A block's parameter while the matrices in it are trained: weights come, gradients go, and neither stays too long."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Place:
    """A parameter of the block while it is trained: a matrix [O, I], or one for each expert [E, O, I]."""

    def __init__(self, parameter: nn.Parameter, num_matrices: int, dtype: torch.dtype):
        self.parameter, self._num_matrices = parameter, num_matrices
        self._num_collecting = 0  # of its matrices, from which the gradient has not been taken yet
        self.make_room(dtype)

    @property
    def storage(self) -> int:
        """Where its values are."""
        return self.parameter.untyped_storage().data_ptr()

    def make_room(self, dtype: torch.dtype | None = None) -> None:
        """Have it keep its shape, in another dtype if one is given, and take no memory."""
        self.parameter.data = self.parameter.data.new_zeros((), dtype=dtype).expand(self.parameter.shape)

    def load(self, values: Tensor, adding_up: bool) -> None:
        """Take over fake-quantized values; it collects gradients then.

        Args:
            adding_up: gradients add up in float32.
        """
        parameter, self._num_collecting = self.parameter, self._num_matrices
        parameter.data = values
        parameter.requires_grad_(True)
        parameter.grad = None
        parameter.grad_dtype = None  # any: what is added to a float32 sum need not be float32 itself
        if adding_up:
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)

    def take_gradient(self, expert: int | None) -> Tensor:
        """A matrix' gradient [O, I], once; with the last one's, parameter and gradient leave the block."""
        # A parameter that no sample reached, such as an idle expert's, has none; all ranks step it all the same.
        gradient = torch.zeros_like(self.parameter) if self.parameter.grad is None else self.parameter.grad
        self._num_collecting -= 1
        if not self._num_collecting:
            self.parameter.grad = None
            self.make_room()
        return gradient if expert is None else gradient[expert]

    def be_served(self) -> None:
        """Collect no more gradients, and have memory for values."""
        self.parameter.requires_grad_(False)
        self.parameter.grad = None
        if not self.parameter.is_contiguous():  # it has none
            self.parameter.data = self.parameter.new_empty(self.parameter.shape)


class Collect(torch.autograd.Function):
    """Zero, whose gradient in a fake-quantized weight is the one that its place in the block has collected by then."""

    @staticmethod
    def forward(ctx, weight_OI, place, expert):
        """Return the zero."""
        ctx.place, ctx.expert, ctx.dtype = place, expert, weight_OI.dtype
        return weight_OI.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        """The matrix' gradient [O, I], rounded to the weight's dtype; it leaves the block."""
        return ctx.place.take_gradient(ctx.expert).to(ctx.dtype), None, None


class _Use(NamedTuple):
    """A view of a block's parameter that a backward pass will ask for: size, stride and offset."""

    place: Place
    view: tuple[torch.Size, tuple[int, ...], int]


@contextmanager
def leaving(places: Iterable[Place]) -> Iterator[None]:
    """Have parameters leave their block as the backward pass of what is computed in the body comes past them."""
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
