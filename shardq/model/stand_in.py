"""What stands in a decoder block's place, so that the model's own forward runs without the block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardq.errors import UnsupportedModelError
from shardq.model.hidden import in_place_of, lanes_of
from shardq.model.own_code import own_code, reason_of
from shardq.torch_internals import tree_map_only


class StandIn(nn.Module):
    """Takes a block's place in the model: records what the model passes, returns the hidden states unchanged.

    They are returned in the block's form, single or first of a tuple; further outputs of the block are on the meta
    device, without values. Plain attributes of the block are copied, because some models read them (such as
    `attention_type`). If `injected` is set, it is returned instead, so that the model's own code turns given hidden
    states [N, T, D] into logits. If `answer` is set, it is called with the hidden states and the other arguments, and
    gives the return value.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        own = {"training"}
        self.__dict__.update({k: v for k, v in vars(block).items() if not k.startswith("_") and k not in own})
        self.injected: Tensor | None = None
        self.seen: tuple[Tensor, tuple, dict] | None = None
        self.answer: Callable[[Tensor, tuple, dict], object] | None = None
        self._block = (block,)  # in a tuple: not a submodule, whose weights the model would expect
        self._returns: object = None

    def __getattr__(self, name: str) -> Any:
        """A module or parameter of the block, which some models look at; on the meta device, without values."""
        return super().__getattr__(name) if name.startswith("_") else getattr(self._block[0], name)

    @contextmanager
    def showing(self, loaded: nn.Module) -> Iterator[None]:
        """While the body runs, the model finds a loaded block's modules here; some initialise buffers in them."""
        block, self._block = self._block, (loaded,)
        try:
            yield
        finally:
            self._block = block

    def forward(self, *args, **kwargs):
        """Record the call."""
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.seen = (hidden, args, kwargs)
        if self.answer is not None:
            return self.answer(hidden, args, kwargs)
        return self.returned(hidden if self.injected is None else self._as_called(self.injected))

    def returned(self, hidden: Tensor) -> object:
        """Hidden states in the form in which the block returns them; it must have been called."""
        if self._returns is None:
            self._returns = self.on_meta(to_meta(self.seen))
        return in_place_of(hidden, self._returns)

    def _as_called(self, hidden_NTD: Tensor) -> Tensor:
        """Hidden states in the form of those that the model has called this with, for as many samples and tokens."""
        lanes = lanes_of(self.seen[0], *hidden_NTD.shape[:2], type(self._block[0]).__name__)
        return lanes.spread(hidden_NTD) if lanes else hidden_NTD

    @torch.no_grad()
    def on_meta(self, call: tuple[Tensor, tuple, dict]) -> object:
        """The block's return value for a call on the meta device: structure and shapes, without computing.

        Raises:
            UnsupportedModelError: the block does not take that.
        """
        block = self._block[0]
        hidden, args, kwargs = call
        what = (
            "a decoder block must take any number of sequences with the arguments that the model passes it for one; it "
            f"does not take those for hidden states {list(hidden.shape)}"
        )
        with own_code(type(block).__name__, what):
            try:
                return block(hidden, *args, **kwargs)
            except NotImplementedError as error:  # by an operation whose result's shape depends on values
                raise UnsupportedModelError(
                    f"{type(block).__name__}: its own code computes shapes from values, which are not known before its "
                    f"weights are read; such blocks are not supported yet ({reason_of(error)})"
                ) from error


def to_meta(values: Any) -> Any:
    """The same tuples and dicts with every tensor in them on the meta device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), values)
