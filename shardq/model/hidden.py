"""The forms that hidden states have in a model's own code: first of a tuple, and several lanes a token.

Everywhere else a token's lanes are channels of one hidden state, in [N, T, D].
"""

from typing import NamedTuple

from torch import Tensor

from shardq.errors import UnsupportedModelError


def hidden_in(returned: object) -> Tensor:
    """The hidden states in what a block returns."""
    return returned[0] if isinstance(returned, tuple | list) else returned


def in_place_of(hidden: Tensor, returned: object) -> object:
    """What a block returns, with other hidden states."""
    return (hidden, *returned[1:]) if isinstance(returned, tuple | list) else hidden


class Lanes(NamedTuple):
    """Where the lanes are in the model's own hidden states.

    Attributes:
        dim: dimension of the samples; that of the tokens follows it.
        sizes: sizes of all other dimensions, in order; the last is that of the channels.
    """

    dim: int
    sizes: tuple[int, ...]

    def flat(self, hidden: Tensor) -> Tensor:
        """The model's hidden states as [N, T, D]."""
        return hidden.movedim((self.dim, self.dim + 1), (0, 1)).flatten(2)

    def spread(self, hidden_NTD: Tensor) -> Tensor:
        """Hidden states [N, T, D] as the model has them."""
        apart = hidden_NTD.unflatten(2, self.sizes)
        return apart.movedim((0, 1), (self.dim, self.dim + 1)).contiguous()


def lanes_of(hidden: Tensor, num: int, length: int, where: str) -> Lanes | None:
    """The lanes in the model's hidden states of some samples; None for plain ones [N, T, D].

    Args:
        num, length: number of samples, and of tokens in each; not both the number of lanes.
        where: the model and its block, for an error.

    Raises:
        UnsupportedModelError: dimensions of samples and tokens do not follow each other, or could be several.
    """
    shape = tuple(hidden.shape)
    found = [dim for dim in range(len(shape) - 2) if shape[dim : dim + 2] == (num, length)]
    if found == [0] and len(shape) == 3:
        return None
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{where} takes hidden states {list(shape)} for {num} x {length} tokens, whose dimensions of samples and "
            "tokens cannot be told; such models are not supported"
        )
    (dim,) = found
    return Lanes(dim, shape[:dim] + shape[dim + 2 :])
