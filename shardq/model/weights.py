"""Real tensors into meta modules, and out again."""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardq.errors import UnsupportedModelError
from shardq.formats.shards import read_weight
from shardq.lookahead import lookahead
from shardq.model.skeleton import Skeleton

COMPUTE_DTYPE = torch.float32


def stream_blocks(
    skeleton: Skeleton, block_indices: Iterable[int], device: torch.device
) -> Iterator[tuple[int, nn.Module]]:
    """Yield `(block_index, block)` with the block's weights on the device, the next block's being read meanwhile.

    The block goes back to the meta device when the next one is asked for.
    """

    def read(block_index: int) -> dict[str, Tensor]:
        return {name: read_weight(info) for name, info in skeleton.block_tensors(block_index).items()}

    for block_index, tensors in lookahead(read, block_indices):
        block = skeleton.blocks[block_index]
        fill(skeleton.model, block, tensors, device)
        yield block_index, block
        block.to("meta")
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Give what a block has freed back to the system, so that the next block starts from the same memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim:
        trim(0)


def fill(model: nn.Module, module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put tensors into a meta module in the compute dtype; empties `tensors` so that no second copy stays alive.

    Args:
        model: the transformers model, which knows how to make buffers that checkpoints do not store.
        tensors: parameters and persistent buffers by name within the module.
    """
    _make_buffers(model, module, device)
    while tensors:
        name, tensor = tensors.popitem()
        if tensor.is_floating_point():
            tensor = tensor.to(device, COMPUTE_DTYPE)
        owner = module.get_submodule(name.rpartition(".")[0])
        _assign(owner, name.rpartition(".")[2], tensor.to(device))


def _assign(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def _make_buffers(model: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Compute non-persistent buffers, such as rotary frequencies, the way the model initialises them."""
    for name, owner in module.named_modules():
        computed = [key for key, value in owner._buffers.items() if value is not None and value.is_meta]
        computed = [key for key in computed if key in owner._non_persistent_buffers_set]
        for key in computed:
            meta = owner._buffers[key]
            owner._buffers[key] = torch.full_like(meta, torch.nan if meta.is_floating_point() else 0, device=device)
        if computed:
            model._init_weights(owner)
        for key in computed:
            if owner._buffers[key].is_floating_point() and owner._buffers[key].isnan().any():
                raise UnsupportedModelError(
                    f"{type(model).__name__}: buffer {name}.{key} is neither stored nor initialised by transformers"
                )


@contextmanager
def materialised(
    skeleton: Skeleton,
    module: nn.Module,
    prefix: str,
    device: torch.device,
    unread: frozenset[str] = frozenset(),
) -> Iterator[None]:
    """Hold the weights of a module outside the blocks (embeddings, norm, head) while the body runs.

    Args:
        prefix: the module's name in the model, "" for the model itself.
        unread: stored names whose values do not matter; they become zeros that take no memory.
    """
    names = [f"{prefix}.{name}" if prefix else name for name in module.state_dict()]
    tensors: dict[str, Tensor] = {}
    by_storage: dict[str, Tensor] = {}
    for name in names:
        info = skeleton.stored(name)
        if info.name not in by_storage:  # a tied tensor is read, and held, once
            zeros = torch.zeros((), dtype=COMPUTE_DTYPE, device=device).expand(info.shape)
            by_storage[info.name] = zeros if info.name in unread else read_weight(info).to(device, COMPUTE_DTYPE)
        tensors[name.removeprefix(f"{prefix}.") if prefix else name] = by_storage[info.name]
    by_storage.clear()
    fill(skeleton.model, module, tensors, device)
    try:
        yield
    finally:
        module.to("meta")
