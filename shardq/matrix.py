"""A weight to quantize: its place in a block, and access to its values and its input there."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardq.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight [O, I] of a block that can be quantized; it knows nothing of grids.

    Attributes:
        name: name within the block, used for codes, encodings and in files, such as `mlp.down_proj`.
        module: name within the block of the module that has the parameter.
        parameter: the parameter's name in that module.
        expert: index in the first dimension of a fused parameter [E, O, I]; None: the matrix is the whole parameter.
        shape: number of outputs and inputs.
    """

    name: str
    module: str
    parameter: str = "weight"
    expert: int | None = None
    shape: tuple[int, int]

    @property
    def tensor(self) -> str:
        """Name within the block of the parameter that contains the matrix."""
        return f"{self.module}.{self.parameter}".removeprefix(".")

    @property
    def input(self) -> str:
        """Name within the block of the activation that the matrix multiplies."""
        return f"{self.name}.input"

    @property
    def num_weights(self) -> int:
        """Number of values."""
        return self.shape[0] * self.shape[1]

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The values [O, I] in a block's tensors by name; a view."""
        return self.part_of(tensors[self.tensor])

    def part_of(self, parameter: Tensor) -> Tensor:
        """The matrix' part [O, I] of its parameter, or of a tensor of that shape; a view."""
        return parameter if self.expert is None else parameter[self.expert]

    def parameter_in(self, block: nn.Module) -> nn.Parameter:
        """The parameter of a block that contains the matrix."""
        return block.get_submodule(self.module).get_parameter(self.parameter)

    def put(self, block: nn.Module, weight_OI: Tensor) -> None:
        """Have a block compute with a weight: the tensor itself is put in place; an expert's is copied."""
        parameter = self.parameter_in(block)
        if self.expert is None:
            parameter.data = weight_OI
        else:
            parameter.data[self.expert] = weight_OI


def assembled(weights: Iterable[tuple[Matrix, Tensor]]) -> dict[str, Tensor]:
    """A block's parameters by name, made of matrices' weights [O, I]: the very one, or all experts' of it, stacked."""
    parts: dict[str, dict[int | None, Tensor]] = defaultdict(dict)
    for matrix, weight_OI in weights:
        parts[matrix.tensor][matrix.expert] = weight_OI
    return {
        name: experts[None] if None in experts else torch.stack([experts[number] for number in sorted(experts)])
        for name, experts in parts.items()
    }


@contextmanager
def hooked(block: nn.Module, hooks: Mapping[Matrix, Callable]) -> Iterator[None]:
    """While the body runs, have torch call `hook(module, (input,))` before the block multiplies an input with a matrix.

    The return value of a hook, unless it is None, takes the place of the input [..., I].

    Raises:
        UnsupportedModelError: one of several fused experts, for which their module picks positions of its own input.
    """
    with ExitStack() as stack:
        for matrix, hook in hooks.items():
            if matrix.expert is not None:
                raise UnsupportedModelError(f"{matrix.name}: what enters one of several fused experts cannot be seen")
            stack.callback(block.get_submodule(matrix.module).register_forward_pre_hook(hook).remove)
        yield


def matrices_in(block: nn.Module) -> list[Matrix]:
    """The matrices of a block that can be quantized, in the order of its modules: the weights of its linears."""
    return [
        Matrix(name=name, module=name, shape=tuple(module.weight.shape))
        for name, module in block.named_modules()
        if is_linear(module)
    ]


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by its `weight` [O, I], adds at most a bias, and does nothing else."""
    return isinstance(module, nn.Linear)
