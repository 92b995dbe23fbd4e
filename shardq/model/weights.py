"""Loading weights into modules on the meta device, and freeing them."""

import copy
import ctypes
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import NoneType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardq.background import lookahead, one_by_one
from shardq.devices import to_device
from shardq.errors import UnsupportedModelError
from shardq.model.block import BlockPlan, LoadedBlock
from shardq.model.build import models_around
from shardq.model.own_code import own_code
from shardq.model.skeleton import Skeleton
from shardq.model.transformers_internals import initialise
from shardq.torch_internals import non_persistent_buffers

COMPUTE_DTYPE = torch.float32


def read_weights(
    skeleton: Skeleton, block: BlockPlan, device: torch.device, but: Container[str] = ()
) -> dict[str, Tensor]:
    """Read a block's parameters and persistent buffers, by name within it, in the source's dtype.

    Args:
        but: those to leave out.

    Raises:
        CheckpointError: as `WeightSource.read`.
    """
    buffers, pinned = dict(skeleton.blocks[block.index].named_buffers()), device.type == "cuda"
    return {
        name: to_device(skeleton.source.read(tensor, name in buffers, pinned), device)
        for name, tensor in skeleton.block_tensors(block.index).items()
        if name not in but
    }


def stream_blocks(
    skeleton: Skeleton,
    blocks: Iterable[BlockPlan],
    device: torch.device,
    dtype: torch.dtype = COMPUTE_DTYPE,
    waiting: Callable[[], AbstractContextManager] = nullcontext,
    ahead: bool = True,
    read: Callable[[BlockPlan], dict[str, Tensor]] | None = None,
) -> Iterator[LoadedBlock]:
    """Yield blocks with their weights on the device.

    Blocks of the same structure share one module, whose storage is allocated once, so a yielded block is valid until
    the next is asked for.

    Args:
        dtype: dtype of the blocks' matrix multiplies.
        waiting: entered while the next block's weights are waited for.
        ahead: read the next block's weights during the use of a block, which takes their memory; else on demand.
        read: gives a block's tensors on the device, by name within it (default: those of the checkpoint).
    """
    slots: dict[tuple, nn.Module] = {}
    read = read or partial(read_weights, skeleton, device=device)
    for plan, source in (lookahead if ahead else one_by_one)(read, blocks, waiting):
        block = skeleton.blocks[plan.index]
        kind = _signature(block)
        if kind not in slots:
            slots[kind] = copy.deepcopy(block)
        _carry_attributes(block, slots[kind])
        with skeleton.stand_ins[plan.index].showing(slots[kind]):
            fill(_model_around(skeleton, plan.name), slots[kind], dict(source), device)
        yield LoadedBlock(plan=plan, module=slots[kind], source=source, dtype=dtype)
        del source
        return_freed_memory()


def _signature(block: nn.Module) -> tuple:
    """A key that is equal for blocks that can share a module: submodules and the shapes of their tensors."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    tensors = (*block.named_parameters(), *block.named_buffers())
    return modules, tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)


def _carry_attributes(block: nn.Module, slot: nn.Module) -> None:
    """Copy a block's plain attributes, such as `layer_idx`, to the shared module that represents it."""
    for source, target in zip(block.modules(), slot.modules(), strict=True):
        for name, value in vars(source).items():
            is_plain = isinstance(value, (bool, int, float, str, tuple, NoneType))
            if is_plain and not name.startswith("_") and getattr(target, name, None) != value:
                setattr(target, name, value)


def return_freed_memory() -> None:
    """Return a block's freed memory to the system, so that the next block starts from the same memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim:
        trim(0)


def _model_around(skeleton: Skeleton, name: str) -> PreTrainedModel:
    """The innermost transformers model that contains the module of a name, or is it; it can initialise the module."""
    innermost = list(models_around(skeleton.model, name).values())[-1]
    module = skeleton.model.get_submodule(name)
    return module if isinstance(module, PreTrainedModel) else innermost


def fill(model: nn.Module, module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put tensors into a module in the compute dtype; empties `tensors` so that no second copy stays in memory.

    A parameter on the meta device is allocated, one that has storage is overwritten in place.

    Args:
        model: the transformers model around the module, which can compute buffers that checkpoints do not store.
        tensors: parameters and persistent buffers by name within the module.
    """
    _make_buffers(model, module, device)
    while tensors:
        name, tensor = tensors.popitem()
        owner = module.get_submodule(name.rpartition(".")[0])
        _place(owner, name.rpartition(".")[2], tensor, device)


@torch.no_grad()
def _place(owner: nn.Module, name: str, tensor: Tensor, device: torch.device) -> None:
    current = getattr(owner, name)
    if not current.is_meta:
        current.copy_(tensor)
        return
    tensor = _computed(tensor, device)
    is_parameter = isinstance(current, nn.Parameter)
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _computed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in the dtype that it is computed in."""
    return tensor.to(device, COMPUTE_DTYPE if tensor.is_floating_point() else tensor.dtype)


def _make_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Compute non-persistent buffers, such as rotary frequencies, the way the model initialises them."""
    for name, owner, own_model in _with_models("", module, model):
        computed = non_persistent_buffers(owner)
        for key in computed:
            like = getattr(owner, key)
            setattr(owner, key, torch.full_like(like, torch.nan if like.is_floating_point() else 0, device=device))
        if computed:
            with own_code(type(own_model).__name__, f"it cannot initialise the buffers of {type(owner).__name__}"):
                initialise(own_model, owner)
                if _without_value(owner, computed):  # some models compute the buffers of all their blocks themselves
                    initialise(own_model, own_model)
        for key in _without_value(owner, computed):
            raise UnsupportedModelError(
                f"{type(model).__name__}: buffer {f'{name}.{key}'.removeprefix('.')} is neither stored nor "
                "initialised by transformers"
            )


def _without_value(owner: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of a module's buffers that hold NaN, which stands for what nothing has computed."""
    buffers = {name: getattr(owner, name) for name in names}
    return [name for name, buffer in buffers.items() if buffer.is_floating_point() and buffer.isnan().any()]


def _with_models(
    name: str, module: nn.Module, model: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """A module and those in it, by name, each with the innermost model that it is in: transformers asks that one."""
    model = module if isinstance(module, PreTrainedModel) else model
    yield name, module, model
    for child_name, child in module.named_children():
        yield from _with_models(f"{name}.{child_name}".removeprefix("."), child, model)


@contextmanager
def materialised(
    skeleton: Skeleton,
    module: nn.Module,
    prefix: str,
    device: torch.device,
    unread: frozenset[str] = frozenset(),
) -> Iterator[None]:
    """Hold the weights of a module outside the blocks (embeddings, norm, head) while the body runs.

    Models besides the text decoder, such as those for images, get NaN that takes no memory: tokens do not reach them.

    Args:
        prefix: the module's name in the model, "" for the model itself.
        unread: names of the source's tensors whose values do not matter; they become zeros that take no memory.
    """
    buffers = dict(module.named_buffers())
    tensors: dict[str, Tensor] = {}
    by_source: dict[str, Tensor] = {}
    for name, empty in module.state_dict().items():
        full_name = f"{prefix}.{name}".removeprefix(".")
        if full_name.startswith(
            skeleton.beside
        ):  # not left on the meta device: transformers asks a model where its first tensor is
            nothing = torch.nan if empty.is_floating_point() else 0
            tensors[name] = torch.full((), nothing, dtype=empty.dtype, device=device).expand(empty.shape)
            continue
        tensor = skeleton.tensor(full_name)
        if tensor.name not in by_source:  # a tied tensor is read and kept once
            zeros = torch.zeros((), dtype=COMPUTE_DTYPE, device=device).expand(tensor.shape)
            read = zeros if tensor.name in unread else skeleton.source.read(tensor, name in buffers)
            by_source[tensor.name] = _computed(read, device)
        tensors[name] = by_source[tensor.name]
    by_source.clear()
    fill(_model_around(skeleton, prefix), module, tensors, device)
    try:
        yield
    finally:
        module.to("meta")
