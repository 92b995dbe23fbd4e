"""What training a block takes, and the micro-batch that fits."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from shardq.calib.partition import largest_part
from shardq.errors import ConfigError
from shardq.model.ends import BlockArguments, run_block
from shardq.model.skeleton import Skeleton, to_meta
from shardq.optimize.options import OptimizeOptions
from shardq.pipeline.plan import Plan

# A weight while it is trained, beside its source dtype (once for this block, once for the next): fake-quantized
# weight and its gradient in the matrix multiplies' dtype, s2 and its gradient and the optimizer's moments in float32.
MOMENTS = {"adam": 2, "sign": 0}


def choose_micro_batch(
    skeleton: Skeleton,
    plan: Plan,
    arguments: list[BlockArguments],
    sequence_length: int,
    options: OptimizeOptions,
    world_size: int,
    spare_bytes: int,
) -> int:
    """The largest divisor of a rank's part of a batch whose training fits the memory; at least 1.

    Args:
        options: resolved but for the micro-batch.
        spare_bytes: what the device has to spare, if the options set no limit.

    Raises:
        ConfigError: the options set a limit that one sample exceeds.
    """
    limit = int(options.memory_gib * 2**30) if options.memory_gib else spare_bytes
    hidden_size = skeleton.model.get_input_embeddings().embedding_dim
    largest = max(
        range(plan.num_blocks), key=lambda number: _num_weights(skeleton.blocks[number], plan.linears[number])
    )
    state = state_bytes(skeleton, plan, largest, options)
    sample = saved_bytes(skeleton.blocks[largest], arguments[largest], (1, sequence_length, hidden_size))
    part = largest_part(options.batch_size, world_size)
    fitting = [size for size in range(1, part + 1) if part % size == 0 and state + size * sample <= limit]
    if not fitting and options.memory_gib:
        raise ConfigError(
            f"optimize.memory_gib: {options.memory_gib} is too little for one sample: {plan.names[largest]} needs "
            f"{state / 2**30:.2f} GiB and {sample / 2**30:.2f} GiB a sample; raise it or lower calib.sequence_length"
        )
    return max(fitting, default=1)


def _num_weights(block: nn.Module, linear_names: list[str]) -> int:
    return sum(block.get_submodule(name).weight.numel() for name in linear_names)


def state_bytes(skeleton: Skeleton, plan: Plan, block_index: int, options: OptimizeOptions) -> int:
    """Memory of a block that is being trained, without activations; the best iterate's codes are a byte a weight."""
    source = sum(info.num_bytes for info in skeleton.block_tensors(block_index).values())
    num_weights = _num_weights(skeleton.blocks[block_index], plan.linears[block_index])
    best = 1 if options.held_out else 0
    in_float32 = 2 + MOMENTS[options.optimizer]
    return 2 * source + num_weights * (4 * in_float32 + 2 * options.dtype.itemsize + best)


def saved_bytes(block: nn.Module, arguments: BlockArguments, hidden_shape: tuple[int, int, int]) -> int:
    """Bytes that a block's forward keeps for its backward, counted without computing anything.

    An upper bound: for float32, and for code that is not compiled.

    Args:
        block: on the meta device; left as it is.
        hidden_shape: samples, tokens, channels.
    """
    block = copy.deepcopy(block).requires_grad_(True)
    args, kwargs = to_meta((arguments.args, arguments.kwargs))
    hidden_NTD = torch.empty(hidden_shape, device="meta")
    kept = saved_tensors(lambda: run_block(block, hidden_NTD, args, kwargs, torch.float32))
    parameters = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    storages = [tensor.untyped_storage() for tensor in kept]
    return sum(storage.nbytes() for storage in storages if storage._cdata not in parameters)


def saved_tensors(work: Callable[[], object]) -> list[Tensor]:
    """What `work` keeps for backward on any device, one tensor for each storage: views of one count once."""
    kept: dict[int, Tensor] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        work()
    return list(kept.values())
