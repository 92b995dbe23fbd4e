"""A weight to quantize: the weight of a linear in a block, its values and its input there."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight [O, I] of a block that can be quantized; it knows nothing of grids.

    Where a model's own code has the weight in another form, such as one parameter for all experts, the block is built
    with linears in its place, and the layout says where their values lie in the source.

    Attributes:
        name: the linear's name within the block, used for codes, encodings and in files, such as `mlp.down_proj`.
        shape: number of outputs and inputs.
    """

    name: str
    shape: tuple[int, int]

    @property
    def tensor(self) -> str:
        """Name within the block of the linear's weight."""
        return f"{self.name}.weight".removeprefix(".")

    @property
    def input(self) -> str:
        """Name within the block of the activation that the matrix multiplies."""
        return f"{self.name}.input"

    @property
    def num_weights(self) -> int:
        """Number of values."""
        return self.shape[0] * self.shape[1]

    def weight_in(self, block: nn.Module) -> nn.Parameter:
        """The weight of a block."""
        return block.get_submodule(self.name).get_parameter("weight")

    def put(self, block: nn.Module, weight_OI: Tensor) -> None:
        """Have a block compute with a weight, the very tensor."""
        self.weight_in(block).data = weight_OI


@contextmanager
def hooked(block: nn.Module, hooks: Mapping[Matrix, Callable]) -> Iterator[None]:
    """While the body runs, have torch call `hook(module, (input,))` before the block multiplies an input with a matrix.

    The return value of a hook, unless it is None, takes the place of the input [..., I].
    """
    with ExitStack() as stack:
        for matrix, hook in hooks.items():
            stack.callback(block.get_submodule(matrix.name).register_forward_pre_hook(hook).remove)
        yield


def matrices_in(block: nn.Module) -> list[Matrix]:
    """The matrices of a block that can be quantized, in the order of its modules: the weights of its linears."""
    return [
        Matrix(name=name, shape=tuple(module.weight.shape))
        for name, module in block.named_modules()
        if is_linear(module)
    ]


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by its `weight` [O, I], adds at most a bias, and does nothing else."""
    return isinstance(module, nn.Linear)
