"""The tokens that a block's router gives each expert in the fp stream, and the experts that get too few."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardq.matrix import Matrix
from shardq.model.block import LoadedBlock, multiplying_in
from shardq.model.experts import routed_in, run_expert
from shardq.optimize.channel_power import channel_power

SAMPLED_TOKENS = 1024  # of all samples together, whose statistics stand for those of all tokens


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a block's modules of routed experts were given, by their names within the block.

    Attributes:
        tokens: number of tokens of each expert, [E].
        sampled: hidden states [S, D] of some tokens, whatever their experts.
    """

    tokens: dict[str, Tensor]
    sampled: dict[str, list[Tensor]]

    @property
    def facts(self) -> dict[str, dict[str, list[int]]]:
        """Tokens of each expert, for the log; nothing where a block has no routed experts."""
        tokens = {name: [int(count) for count in counts.tolist()] for name, counts in self.tokens.items()}
        return {"expert_tokens": tokens} if tokens else {}

    def starved(self, least: int) -> dict[str, int]:
        """Names of the experts that got fewer tokens, with the number of their tokens."""
        return {
            f"{name}.{number}": int(count)
            for name, counts in self.tokens.items()
            for number, count in enumerate(counts.tolist())
            if count < least
        }


def sampling(num_samples: int, length: int) -> int:
    """Places from one sampled token to the next; it divides a sample, so each gives as many on whatever rank it is."""
    wanted = min(length, max(1, num_samples * length // SAMPLED_TOKENS))
    return max(stride for stride in range(1, wanted + 1) if length % stride == 0)


@contextmanager
def watched(block: nn.Module, stride: int) -> Iterator[Routing]:
    """While the body runs, count the tokens of each expert of a block, and keep every token at a multiple of `stride`.

    The counts are added up in place: over the calls in the body, and by the caller over ranks.
    """
    modules = routed_in(block)
    device = next(block.parameters()).device
    routing = Routing(
        tokens={name: torch.zeros(module.num_experts, device=device) for name, module in modules.items()},
        sampled={name: [] for name in modules},
    )

    def note(name: str, module: nn.Module, hidden_TD: Tensor, index_TK: Tensor) -> None:
        routing.tokens[name] += index_TK.flatten().bincount(minlength=module.num_experts)[: module.num_experts]
        routing.sampled[name].append(hidden_TD[::stride].clone())

    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda module, given, name=name: note(name, module, *given[:2]))
            stack.callback(hook.remove)
        yield routing


@torch.no_grad()
def power_of_all_tokens(
    loaded: LoadedBlock, routing: Routing, experts: Collection[str], searched: Collection[Matrix]
) -> dict[str, Tensor]:
    """Sums of squares of the input channels of some experts' matrices, if each sampled token went to each of them."""
    power: dict[str, Tensor] = {}
    for expert in experts:
        name, _, number = expert.rpartition(".")
        module = loaded.module.get_submodule(name)
        own = [matrix for matrix in searched if expert_of(matrix) == expert]
        with channel_power(loaded.module, own) as sums, multiplying_in(loaded.dtype, routing.tokens[name].device):
            for hidden_SD in routing.sampled[name] if own else ():
                run_expert(module, module.get_submodule(number), hidden_SD)
        power |= sums
    return power


def expert_of(matrix: Matrix) -> str:
    """Name of the module that holds a matrix' own; an expert's, where the matrix is one of an expert."""
    return matrix.name.rpartition(".")[0]
