"""Transformers' own forward of a few samples, which waits in each block's place until that block is loaded.

So everything between the blocks is the model's, in the model's order, while memory holds one block. The forward runs in
a thread of its own; the caller computes the blocks, one at a time.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from shardq.model.arguments import Call
from shardq.model.attention import torchs_own
from shardq.model.ends import multiplying_in, prologue
from shardq.model.experts import answered, routed_in
from shardq.model.own_code import own_code
from shardq.model.skeleton import Skeleton, skeleton_of


class _Ended(BaseException):
    """Ends a forward that is no longer needed; a BaseException, so that no handler of the model catches it."""


_ENDED = object()  # the response to a block's call in that case


class OwnForward:
    """A forward under way; made by `own_forward`.

    Attributes:
        skeleton: a second skeleton of the stream's checkpoint; its blocks share nothing with the stream's.
    """

    def __init__(self, skeleton: Skeleton, embed: Callable[[Tensor], Tensor], tokens_NT: Tensor, first: int):
        """Start the forward; blocks before `first` return their input."""
        self.skeleton = skeleton
        self._called: SimpleQueue[tuple[int, Call] | None] = SimpleQueue()  # None: the forward is over
        self._returned: SimpleQueue[object] = SimpleQueue()
        for number, stand_in in enumerate(skeleton.stand_ins):
            if number >= first:
                stand_in.answer = lambda *call, number=number: self._wait_for_block(number, Call(*call))
        # Not a thread of `background`: an interruption waits for those, and this one waits for its block. As there, the
        # question keeps the setting from threads that compute later.
        torch.get_num_threads()
        executor = ThreadPoolExecutor(1, "own-forward", torch.set_num_threads, (1,))
        self._over = executor.submit(embed, tokens_NT)
        self._over.add_done_callback(lambda over: self._called.put(None))
        executor.shutdown(wait=False)

    def at_next_block(self, respond: Callable[[int, Call], object]) -> None:
        """Run the forward up to the next block, and continue with what `respond` returns for number and call.

        Raises the errors of the model's own code before that block.
        """
        called = self._called.get()
        if called is None:
            self._over.result()
            raise RuntimeError("the model's own forward is over before its last block")
        self._returned.put(respond(*called))

    def end(self) -> None:
        """End the forward at its present place."""
        self._returned.put(_ENDED)
        wait([self._over])

    def _wait_for_block(self, number: int, call: Call) -> object:
        self._called.put((number, call))
        returned = self._returned.get()
        if returned is _ENDED:
            raise _Ended
        return returned


@contextmanager
def own_forward(skeleton: Skeleton, tokens_NT: Tensor, device: torch.device, first: int = 0) -> Iterator[OwnForward]:
    """Yield the forward of a checkpoint on tokens [N, T], with a separate model; it ends with the body.

    Args:
        first: the first block that is waited for.
    """
    own = skeleton_of(skeleton.source)
    with prologue(own, device) as embed:
        forward = OwnForward(own, embed, tokens_NT, first)
        try:
            yield forward
        finally:
            forward.end()


def tensors_of(block: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A block's parameters and buffers by name; in float32, if multiplies are to be, whose weights may be rounded."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    if dtype != torch.float32:
        return tensors
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def computed(block: nn.Module, like: nn.Module, call: Call, dtype: torch.dtype) -> object:
    """Output of a block on the meta device for a call, computed with the tensors of a loaded block.

    Args:
        dtype: dtype of the matrix multiplies.
    """
    tensors = tensors_of(like, dtype)
    what = "transformers' own code fails in it"
    with ExitStack() as stack:
        for name, experts in routed_in(like).items():
            if "forward" in vars(experts):  # another function computes in the loaded block's experts' place
                stack.enter_context(answered(block.get_submodule(name), experts.forward))
        for context in (torchs_own(), multiplying_in(dtype, call.hidden.device), own_code(type(block).__name__, what)):
            stack.enter_context(context)
        return torch.func.functional_call(block, tensors, (call.hidden, *call.args), call.kwargs)
