"""Training of one routed expert on the tokens that the router gives it, towards its own output in the float model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shardq.devices import pass_tokens
from shardq.errors import QuantizationError
from shardq.matrix import Matrix, matrices_in
from shardq.model.block import multiplying_in
from shardq.model.experts import run_expert
from shardq.optimize.block_quantizer import BlockQuantizer, whole
from shardq.optimize.distill import distill
from shardq.optimize.inputs import generator_for
from shardq.optimize.loss import POWER_FLOOR
from shardq.optimize.stepper import Stepper
from shardq.parallel.collectives import reduce_over_ranks, sum_over_ranks
from shardq.quant import adascale
from shardq.quant.grid import Grid
from shardq.rundir.block_output import rounding_to
from shardq.training.streamed import StreamedBlock
from shardq.training.trainer import Job, Linears

STEP_TOKENS = 256  # of an expert in an optimizer step, at least, where it has as many


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """An expert's tokens on this rank.

    Attributes:
        hidden_SD: what enters the expert in the quantized stream.
        float_SD: what enters the experts at these tokens in the fp stream; a target from that is better than from
            `hidden_SD` (measured).
        weight_S: weight of each token's squared error: the router's, squared, over the power of the block's output.
        place_S: place of each among the expert's tokens of all ranks, in the order of the samples.
        num, num_trained: tokens over all ranks; how many of them, the first ones, are trained on.
    """

    hidden_SD: Tensor
    float_SD: Tensor
    weight_S: Tensor
    place_S: Tensor
    num: int
    num_trained: int


@torch.no_grad()
def tokens_of(job: Job, block: StreamedBlock, some: range) -> dict[int, Tokens]:
    """The tokens of some experts, as they are kept."""
    hidden: dict[int, list[Tensor]] = {number: [] for number in some}
    floats: dict[int, list[Tensor]] = {number: [] for number in some}
    weight: dict[int, list[Tensor]] = {number: [] for number in some}
    counts_EN = torch.zeros(len(some), job.num_samples, dtype=torch.float64)
    for sample in job.activations.samples:
        hidden_TD, float_TD = (block.hidden(stream, [sample]) for stream in ("quant", "fp"))
        index_TK, weight_TK = block.choice([sample])
        power_T = torch.ones_like(hidden_TD[:, 0])
        if job.recipe.optimize.loss == "token":
            target_TD = block.activations.load("fp", block.index + 1, [sample])[0]
            power_T = target_TD.square().mean(-1).clamp(min=POWER_FLOOR)
        for number in some:
            chosen_TK = index_TK == number
            is_own_T = chosen_TK.any(-1)
            hidden[number].append(hidden_TD[is_own_T])
            floats[number].append(float_TD[is_own_T])
            weight[number].append(((weight_TK * chosen_TK).sum(-1).square() / power_T)[is_own_T])
            counts_EN[number - some.start, sample] = len(hidden[number][-1])
    own_EN = counts_EN.clone()
    reduce_over_ranks(job.ranks, [counts_EN])
    first_held_out = job.num_samples - job.recipe.optimize.held_out
    found = {}
    for number, counts_N, own_N in zip(some, counts_EN.long(), own_EN.long(), strict=True):
        firsts_N = counts_N.cumsum(0) - counts_N
        ranges = zip(firsts_N.tolist(), own_N.tolist(), strict=True)
        found[number] = Tokens(
            hidden_SD=torch.cat(hidden.pop(number)),
            float_SD=torch.cat(floats.pop(number)),
            weight_S=torch.cat(weight.pop(number)),
            place_S=torch.cat([torch.arange(first, first + count) for first, count in ranges]),
            num=int(counts_N.sum()),
            num_trained=int(counts_N[:first_held_out].sum()),
        )
    return found


@dataclass(frozen=True, kw_only=True)
class ExpertTrainer:
    """Trains a block's experts, one after another.

    Attributes:
        experts: the module of experts.
        slot: an expert's module with weights of its own, which are quantized.
        matrices: those of the slot.
        stepper: None where nothing is trained.
    """

    job: Job
    experts: nn.Module
    slot: nn.Module
    matrices: list[Matrix]
    quantizer: BlockQuantizer
    stepper: Stepper | None

    def served(self) -> Linears:
        """Fold the slot's linears and serve them; raises as `BlockQuantizer.folded`."""
        linears = self.quantizer.folded(self._gathered)
        self.quantizer.serve(linears, rounding_to(self.job.recipe.written_dtype))
        return linears

    def start(self, float_expert: nn.Module, power: dict[str, Tensor]) -> Linears:
        """Take an expert's weights, round them to nearest, and serve them.

        Args:
            power: of the input channels, by name of the matrix within the expert, where the start is searched.
        """
        source = {name: tensor.detach().clone() for name, tensor in float_expert.state_dict().items()}
        with torch.no_grad():
            for name, tensor in self.slot.state_dict().items():
                if name not in {matrix.tensor for matrix in self.matrices}:
                    tensor.copy_(source[name])
        self.quantizer.start(source, power, self._gathered)
        return self.served()

    def output(self, expert: nn.Module, hidden_SD: Tensor) -> Tensor:
        """Output [S, D], float32, of the slot or of another expert's module."""
        with multiplying_in(self.job.recipe.optimize.dtype, hidden_SD.device):
            return run_expert(self.experts, expert, hidden_SD).float()

    @torch.no_grad()
    def outputs(self, expert: nn.Module, hidden_SD: Tensor) -> Tensor:
        """The same without gradients, in pieces that fit the memory."""
        return torch.cat([self.output(expert, piece_SD) for piece_SD in hidden_SD.split(pass_tokens(hidden_SD.device))])

    @property
    def _gathered(self) -> Callable:
        return self.stepper.gathered if self.stepper else whole


def expert_trainer(job: Job, block: StreamedBlock, grids: dict[Matrix, Grid]) -> ExpertTrainer:
    """A trainer of a block's experts.

    Args:
        grids: of the block's matrices; those of the first expert are all experts'.
    """
    recipe, prefix = job.recipe, f"{block.name}.0."
    slot = copy.deepcopy(block.experts.get_submodule("0")).to_empty(device=job.activations.device)
    by_name = {matrix.name.removeprefix(prefix): grid for matrix, grid in grids.items() if prefix in matrix.name}
    own = {matrix: by_name[matrix.name] for matrix in matrices_in(slot) if matrix.name in by_name}
    kernels = adascale.Kernels(*(job.compiled(kernel, True) for kernel in adascale.Kernels()))
    share, dtype = job.engine.share(torch.float32), recipe.optimize.dtype
    quantizer = BlockQuantizer(slot, own, recipe.method, kernels, dtype, share)
    stepper = job.engine.stepper(quantizer, recipe.optimize) if recipe.method != "rtn" and own else None
    return ExpertTrainer(
        job=job, experts=block.experts, slot=slot, matrices=list(own), quantizer=quantizer, stepper=stepper
    )


def train_expert(
    own: ExpertTrainer, key: tuple, float_expert: nn.Module, tokens: Tokens, power: dict[str, Tensor], is_fixed: bool
) -> tuple[Linears, Linears]:
    """The linears of an expert at its start, and those of the end or of the start, whichever has the lower error.

    Args:
        key: names the expert for random draws.
        float_expert: has the float weights.
        power: as `ExpertTrainer.start` takes it.
        is_fixed: whether the start is all.
    """
    start, stepper = own.start(float_expert, power), own.stepper
    if stepper is None or is_fixed or not tokens.num_trained:
        return start, start
    target_SD = own.outputs(float_expert, tokens.float_SD)
    before = _error(own, tokens, target_SD)
    stepper.start(own.job.recipe.optimize.iterations)
    for _ in _steps(own, key, tokens, target_SD):
        own.job.activations.pace.end_step()
    if not stepper.is_finite():
        return start, start
    try:
        trained = own.served()
    except QuantizationError:
        return start, start
    return start, trained if _error(own, tokens, target_SD) < before else start


def _steps(own: ExpertTrainer, key: tuple, tokens: Tokens, target_SD: Tensor) -> Iterator[Tensor]:
    """Take the optimizer steps, on tokens in an order that does not depend on the ranks."""
    optimize, job = own.job.recipe.optimize, own.job
    share = optimize.batch_size / (job.num_samples - optimize.held_out)
    size = min(tokens.num_trained, max(STEP_TOKENS, int(tokens.num_trained * share)))
    generator, needed = generator_for(job.recipe.seed, *key), size * optimize.iterations
    epochs = [generator.permutation(tokens.num_trained) for _ in range(-(-needed // tokens.num_trained))]
    own_of = np.full(tokens.num, -1)  # from a place among the tokens of all ranks to one among this rank's
    own_of[tokens.place_S.numpy()] = np.arange(len(tokens.place_S))
    order = own_of[np.concatenate(epochs)[:needed]].reshape(optimize.iterations, size)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for step in order:
            some_S = torch.from_numpy(step[step >= 0]).to(target_SD.device)
            yield tokens.hidden_SD[some_S], target_SD[some_S], tokens.weight_S[some_S]

    def loss(hidden_SD: Tensor, target_SD: Tensor, weight_S: Tensor) -> Tensor:
        return ((own.output(own.slot, hidden_SD) - target_SD).square().sum(-1) * weight_S).mean()

    return distill(loss, own.quantizer, own.stepper, batches(), size, size / job.ranks.world_size)


@torch.no_grad()
def _error(own: ExpertTrainer, tokens: Tokens, target_SD: Tensor) -> float:
    """Weighted squared error of what the slot computes, over all ranks: of held-out tokens where there are any."""
    is_watched_S = tokens.place_S >= (tokens.num_trained if tokens.num_trained < tokens.num else 0)
    is_watched_S = is_watched_S.to(target_SD.device)
    error_SD = own.outputs(own.slot, tokens.hidden_SD[is_watched_S]) - target_SD[is_watched_S]
    error_S = error_SD.square().sum(-1).double() * tokens.weight_S[is_watched_S]
    return sum_over_ranks(own.job.ranks, [float(error_S.sum())])[0]
