"""A check of every block of a stream against transformers' own forward, on two samples.

Each block's output is compared with the output of the model's own code for the same input, and each block's input with
the input that the model passes. So a difference is found at the block where it arises, whatever its cause.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from shardq.errors import UnsupportedModelError
from shardq.logs import Display
from shardq.model.arguments import Call, Entering, hidden_of
from shardq.model.block import BlockPlan, LoadedBlock
from shardq.model.compared import differing
from shardq.model.experts import routed_in
from shardq.model.hidden import hidden_in, in_place_of
from shardq.model.own_forward import OwnForward, computed, own_forward, tensors_of
from shardq.model.skeleton import Skeleton
from shardq.parallel.ranks import Ranks
from shardq.training.passes import Activations, Forward

SHARE = 0.01  # checked tokens, as a share of those that a run takes through a block
LEAST_TOKENS = 16
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.1}
"""Largest allowed error of a token, as a share of the block's addition to it, by dtype of the stream's multiplies."""
RESIDUAL_TOLERANCE = 4e-6  # further allowed error, as a share of the token itself: the sum is rounded too
OFF_TOKENS = 1 / 64  # share of tokens that may differ: a difference in the last bit may change a router's choice
OFF_ROUTED = 1 / 4  # the same in bfloat16, where routers' scores are close more often; then float32 decides

Check = Callable[..., None]
"""Takes the block and, if the stream's activations were rounded in it, the function that computes it without that."""


@contextmanager
def self_check(
    skeleton: Skeleton, tokens_NT: Tensor, activations: Activations, ranks: Ranks, dtype: torch.dtype,
    num_tokens: int, first: int = 0,
) -> Iterator[Check]:  # fmt: skip
    """Yield a function that checks a block after the fp stream has moved through it; only rank 0 checks, its samples.

    Args:
        tokens_NT: tokens of all samples.
        dtype: dtype of the stream's matrix multiplies.
        num_tokens: tokens that a rank takes through each block, which decides how many are checked; 0: none.
        first: the first block that is checked.
    """
    if num_tokens == 0 or ranks.rank != 0:
        yield lambda loaded, unrounded=None: None
        return
    samples = checked_samples(activations)
    whole = tokens_NT.shape[1]
    with ExitStack() as stack:
        under_way: list[_Checked] = []

        def begin(length: int, first: int) -> None:
            stack.close()
            tokens = tokens_NT[samples, :length]
            forward = stack.enter_context(own_forward(skeleton, tokens, activations.device, first))
            under_way[:] = [_Checked(forward, activations, samples, length, dtype, first)]

        def check(loaded: LoadedBlock, unrounded: Forward | None = None) -> None:
            if not under_way:  # begun only here, where the caller shares an error with the other ranks
                begin(_checked_length(whole, num_tokens, activations.blocks, first), first)
            try:
                under_way[0].check(loaded, unrounded)
            except _Different as different:
                if under_way[0].length == whole:
                    raise _explained(str(different)) from None
                # A few tokens may be computed differently than as part of a whole sample: the whole sample decides.
                begin(whole, loaded.index)
                check(loaded, unrounded)

        yield check


def checked_samples(activations: Activations) -> list[int]:
    """The samples of this rank that are checked: the first and the last."""
    return list(dict.fromkeys((activations.samples[0], activations.samples[-1])))


def say_if_unchecked(checks: bool, display: Display) -> None:
    """Print a line if the check is turned off."""
    if not checks:
        display.line("self_check: off; blocks are not compared with transformers' own forward")


def _explained(different: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{different}; the stream does not compute what this model does, so nothing it gives can be trusted; please "
        "report the model's config.json"
    )


def _checked_length(length: int, num_tokens: int, blocks: Sequence[BlockPlan], first: int) -> int:
    """Tokens of each sample that are checked: all where that is cheap, else the first."""
    if first and blocks[first].arguments.carried_names:
        return length  # tensors of earlier blocks are kept for whole samples only
    if any(block.arguments.handed for block in blocks):
        return length  # tokens that a block chooses may be all tokens of a short sample
    return min(length, max(LEAST_TOKENS, int(SHARE * num_tokens / 2)))


class _Checked:
    """The samples that are checked, and the model's own forward of them."""

    def __init__(
        self, forward: OwnForward, activations: Activations, samples: list[int], length: int, dtype: torch.dtype,
        first: int,
    ):  # fmt: skip
        self.length = length
        self._forward, self._activations, self._samples = forward, activations, samples
        self._dtype, self._first = dtype, first

    @torch.no_grad()
    def check(self, loaded: LoadedBlock, unrounded: Forward | None) -> None:
        """Compare a block's output, and what enters it, with the model's own.

        Args:
            unrounded: computes the block where the stream's output is of rounded activations.

        Raises:
            _Different: the output, by more than rounding; says where, by how much and in which arguments.
            UnsupportedModelError: what enters it, or the block that is called.
        """
        index, skeleton, arguments = loaded.index, self._forward.skeleton, loaded.plan.arguments
        entering = self._activations.entering("fp", index, self._samples)
        entering_NTD = self._cut(hidden_of(entering))
        left_NTD = self._cut(self._activations.load("fp", index + 1, self._samples))
        name = f"{type(skeleton.model).__name__}: {loaded.plan.name}"

        def respond(number: int, call: Call) -> object:
            if number != index:
                raise _explained(f"{name}: the model's own forward calls {skeleton.names[number]} in its place")
            if self._first:
                call = arguments.taken_up(call, entering, self._first)
            if index == self._first > 0:  # what entered it was the input of the blocks that are left out
                call = call._replace(hidden=arguments.spread(entering_NTD))
            passed_NTD = arguments.flat(call.hidden)
            fault = self._fault("what enters it", passed_NTD, entering_NTD, entering_NTD, torch.float32)
            if fault:
                raise _explained(f"{name}: {fault}")
            returned = computed(skeleton.blocks[index], loaded.module, call, self._dtype)
            own_NTD = arguments.flat(hidden_in(returned)).float()
            streamed_NTD = self._cut(hidden_of(unrounded(entering))) if unrounded else left_NTD
            fault_of = partial(self._fault, "its output", own_NTD, streamed_NTD, entering_NTD, self._dtype)
            fault = fault_of()
            if fault and self._dtype != torch.float32 and routed_in(loaded.module) and not fault_of(OFF_ROUTED):
                fault = self._exact_fault(loaded, call, entering)
            if fault:
                names = differing(skeleton, index, call, arguments.bound(entering))
                which = f" (arguments that differ: {', '.join(names)})" if names else ""
                raise _Different(f"{name}: {fault}{which}")
            return in_place_of(arguments.spread(left_NTD), returned)

        self._forward.at_next_block(respond)

    def _exact_fault(self, loaded: LoadedBlock, call: Call, entering: Tensor | Entering) -> str | None:
        """As `_fault`, of a block's output, where both compute in float32."""
        own = computed(self._forward.skeleton.blocks[loaded.index], loaded.module, call, torch.float32)
        arguments, tensors = loaded.plan.arguments, tensors_of(loaded.module, torch.float32)
        own_NTD, passed = arguments.flat(hidden_in(own)), arguments.bound(entering)
        returned = torch.func.functional_call(loaded.module, tensors, (passed.hidden, *passed.args), passed.kwargs)
        streamed_NTD = self._cut(hidden_of(arguments.leaving(returned, passed, entering)))
        return self._fault("its output", own_NTD, streamed_NTD, self._cut(hidden_of(entering)), torch.float32)

    def _cut(self, hidden_NTD: Tensor) -> Tensor:
        """Hidden states of the checked tokens, in the memory layout of the model's own."""
        is_whole = self.length == self._activations.sequence_length
        return hidden_NTD if is_whole else hidden_NTD[:, : self.length].contiguous()

    def _fault(
        self,
        what: str,
        own_NTD: Tensor,
        streamed_NTD: Tensor,
        entering_NTD: Tensor,
        dtype: torch.dtype,
        allowed: float = OFF_TOKENS,
    ) -> str | None:
        """A text that says how hidden states of the stream differ from the model's own; None where they do not."""
        if own_NTD.shape != streamed_NTD.shape:
            return f"{what} has another shape than in transformers' own forward"
        error_NT = _norms(own_NTD - streamed_NTD)
        added_NT, size_NT = _norms(streamed_NTD - entering_NTD), _norms(streamed_NTD)
        allowed_NT = TOLERANCES[dtype] * added_NT + RESIDUAL_TOLERANCE * size_NT
        is_off_NT = (error_NT > allowed_NT) | (error_NT.isfinite() != size_NT.isfinite())
        if is_off_NT.sum() <= allowed * is_off_NT.numel():
            return None
        sample, token = is_off_NT.nonzero()[0].tolist()
        share = (error_NT / added_NT.where(added_NT > 0, size_NT))[sample, token].item()
        return (
            f"{what} is not that of transformers' own forward; {int(is_off_NT.sum())} of {is_off_NT.numel()} "
            f"tokens differ, the first is token {token} of sample {self._samples[sample]}, by {share:.1%} of what the "
            "block adds to it"
        )


class _Different(Exception):
    """A block's output in the stream is not the model's own."""


def _norms(values_NTD: Tensor) -> Tensor:
    return values_NTD.double().norm(dim=-1)
