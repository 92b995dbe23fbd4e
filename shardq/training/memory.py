"""The memory that training a block takes, and the micro-batch that fits it."""

import copy
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from shardq.calib.partition import largest_part
from shardq.devices import spare_bytes
from shardq.errors import ConfigError
from shardq.model.arguments import BlockArguments
from shardq.model.block import BlockPlan, run_block
from shardq.model.experts import answered, routed_in
from shardq.model.own_code import own_code
from shardq.model.skeleton import Skeleton
from shardq.optimize.loss import LOGITS_TOKENS
from shardq.optimize.options import OptimizeOptions
from shardq.parallel.engine import BlockSize, Engine
from shardq.parallel.ranks import Ranks
from shardq.rundir.plan import Plan
from shardq.torch_internals import storage_key
from shardq.training.objective import LIKELY_TOKENS
from shardq.training.streamed import of_experts

# Memory for each weight in training: the frozen weight in the source's dtype, s2 and the optimizer's moments in
# float32; the fake-quantized weight in the matrix multiplies' dtype, whose memory its gradient takes; later, in that
# memory's place, the gradient of s2 in float32.
MOMENTS = {"adam": 2, "rms": 1}  # in float32 numbers a weight
CHOSEN_EXPERTS = 8  # of a token, for the estimate of an expert's tokens; no model of 2026 chooses many more


@dataclass(frozen=True)
class LargestBlock:
    """The block with the most weights to train, which decides how much memory a run takes.

    Attributes:
        sample_bytes: memory that one sample's forward keeps for backward.
        head_bytes: further memory for training to the model's predictions.
    """

    name: str
    size: BlockSize
    sample_bytes: int
    head_bytes: int = 0


def largest_block(
    skeleton: Skeleton, plan: Plan, sequence_length: int, options: OptimizeOptions, by_parts: bool = False
) -> LargestBlock:
    """The first block with the most weights to train; it counts as the last block, for which the head may be loaded.

    Args:
        plan: with the blocks' arguments.
        options: resolved but for the micro-batch.
        by_parts: blocks have no routed experts.
    """
    blocks = plan.blocks
    if by_parts:
        blocks = [_without_experts(block, skeleton.blocks[block.index]) for block in blocks]
    largest = max(blocks, key=lambda block: block.num_weights)
    block, hidden_shape = skeleton.blocks[largest.index], (1, sequence_length, largest.arguments.width)
    with ExitStack() as stack:
        for experts in routed_in(block).values() if by_parts else ():
            stack.enter_context(answered(experts, lambda hidden_TD, *others: torch.zeros_like(hidden_TD)))
        sample = saved_bytes(block, largest.arguments, hidden_shape)
    head = head_bytes(skeleton, options.dtype) if options.last_block == "predictions" else 0
    return LargestBlock(
        largest.name, block_size(skeleton, largest, of_experts(block) if by_parts else ()), sample, head
    )


def _without_experts(plan: BlockPlan, block: nn.Module) -> BlockPlan:
    experts = set(of_experts(block))
    return replace(plan, grids={matrix: grid for matrix, grid in plan.grids.items() if matrix.tensor not in experts})


def choose_micro_batch(block: LargestBlock, options: OptimizeOptions, engine: Engine, limit: int) -> int:
    """The largest divisor of a rank's part of a batch whose training fits the memory; at least 1.

    Args:
        options: resolved but for the micro-batch.
        limit: bytes that a rank may use.

    Raises:
        ConfigError: the options set a limit that one sample exceeds.
    """
    needed = _needed_bytes(block, options, engine)
    fitting = [micro_batch for micro_batch, count in needed.items() if count <= limit]
    if not fitting and options.memory_gib:
        raise ConfigError(
            f"optimize.memory_gib: {options.memory_gib} is too little for one sample: {block.name} needs "
            f"{min(needed.values()) / 2**30:.2f} GiB, {block.sample_bytes / 2**30:.2f} GiB of it for the sample; "
            "raise it or lower calib.sequence_length"
        )
    return max(fitting, default=1)


def choose_experts(
    block: LargestBlock, options: OptimizeOptions, engines: list[Engine], limit: int
) -> tuple[Literal["joint", "parts"], str]:
    """Whether routed experts are trained with the rest of their blocks or by parts; and why, in words.

    Args:
        block: with its routed experts.
        limit: bytes that a rank may use.
    """
    if options.experts != "auto":
        return options.experts, "as asked"
    engine, _ = choose_engine(block, options, engines, limit)
    needed = min(_needed_bytes(block, options, engine).values())
    why = f"{block.name} takes {needed / 2**30:.2f} GiB a rank with all its experts, of {limit / 2**30:.2f} GiB"
    return ("joint" if needed <= limit else "parts"), why


def choose_engine(
    block: LargestBlock, options: OptimizeOptions, engines: list[Engine], limit: int
) -> tuple[Engine, str]:
    """The first of some engines that fits the memory with some micro-batch, else the last; and why, in words.

    Args:
        engines: as `candidates` gives them.
        limit: bytes that a rank may use.
    """
    if len(engines) == 1:  # no choice
        return engines[0], "one rank"
    taken: list[str] = []
    for engine in engines:
        needed = min(_needed_bytes(block, options, engine).values())
        taken.append(f"{engine.options.engine} takes {needed / 2**30:.2f} GiB a rank")
        if needed <= limit:
            break
    return engine, f"{', '.join(taken)}, of {limit / 2**30:.2f} GiB"


def _needed_bytes(block: LargestBlock, options: OptimizeOptions, engine: Engine) -> dict[int, int]:
    """Bytes that training takes by micro-batch: the one that is asked for, or all that divide a part equally."""
    part = largest_part(options.batch_size, engine.ranks.world_size)
    sizes = [options.micro_batch] if options.micro_batch else [n for n in range(1, part + 1) if part % n == 0]
    return {size: training_bytes(block, options, engine, size) for size in sizes}


def memory_limit(options: OptimizeOptions, ranks: Ranks) -> int:
    """Bytes that a rank may use on its device: the options' limit, or else its spare memory."""
    if options.memory_gib:
        return int(options.memory_gib * 2**30)
    return spare_bytes(ranks.device, ranks.local_world_size)


def reads_ahead(block: LargestBlock, options: OptimizeOptions, engine: Engine, limit: int) -> bool:
    """Whether the next block's weights fit in memory during a block's training.

    Args:
        options: resolved.
        limit: bytes that a rank may use.
    """
    needed = training_bytes(block, options, engine, options.micro_batch)
    return needed + block.size.source <= limit


def experts_at_once(skeleton: Skeleton, plan: Plan, num_tokens: int, options: OptimizeOptions, limit: int) -> int:
    """Experts of a block that fit the memory at the same time, with their tokens, where they are trained by parts.

    Args:
        num_tokens: calibration tokens of a rank.
        limit: bytes that a rank may use.
    """
    fitting = []
    for block in plan.blocks:
        for experts in routed_in(skeleton.blocks[block.index]).values():
            expert = experts.get_submodule("0")
            num_weights = sum(parameter.numel() for parameter in expert.parameters())
            # Each token chooses a few experts; that their number is that of the shares of a token is an upper bound
            # for evenly used experts. Both streams' inputs and the target in float32.
            tokens = num_tokens * CHOSEN_EXPERTS // experts.num_experts * expert.down_proj.out_features * 12
            # In training: the source, s2, moments, the fake-quantized weight and its gradient, of one expert.
            trained = (4 + 4 + 4 * MOMENTS[options.optimizer] + 4 + 4 + 4) * num_weights
            fitting.append((limit - trained) // (tokens + 8 * num_weights))
    return max(1, min(fitting, default=1))


def block_size(skeleton: Skeleton, block: BlockPlan, but: Collection[str] = ()) -> BlockSize:
    """Size of one of the model's blocks.

    Args:
        but: names within the block of tensors that do not count.
    """
    tensors = skeleton.block_tensors(block.index)
    source = sum(info.num_bytes for name, info in tensors.items() if name not in set(but))
    return BlockSize(source, block.num_weights, max((matrix.num_weights for matrix in block.grids), default=0))


def training_bytes(block: LargestBlock, options: OptimizeOptions, engine: Engine, micro_batch: int) -> int:
    """A rank's memory for training a block with some samples at once, without the next block."""
    adding_up = micro_batch < largest_part(options.batch_size, engine.ranks.world_size)
    state = state_bytes(block.size, options, engine, adding_up)
    return state + micro_batch * block.sample_bytes + block.head_bytes


def state_bytes(size: BlockSize, options: OptimizeOptions, engine: Engine, adding_up: bool = False) -> int:
    """A rank's memory for a block that is being trained, without activations and without the next block.

    Args:
        adding_up: the gradients of several micro-batches add up.
    """
    num_weights = size.num_weights
    state = engine.rank_bytes("moments", int(4 * MOMENTS[options.optimizer] * num_weights))
    state += engine.rank_bytes("weights", 4 * num_weights) + engine.rank_bytes("weights", size.source)
    if options.held_out:
        state += num_weights  # the best iterate's codes
    quantized, gradients = options.dtype.itemsize * num_weights, engine.rank_bytes("gradients", 4 * num_weights)
    if adding_up:  # also in memory: the sum of the gradients in float32, and the gradient that is added to it
        quantized += (4 + options.dtype.itemsize) * num_weights
    at_once = quantized + gradients if engine.keeps_gradients else max(quantized, gradients)
    # One linear's gradient is in memory together with that of its s2.
    return state + at_once + engine.moved_bytes(size) + 4 * size.largest_linear


def head_bytes(skeleton: Skeleton, dtype: torch.dtype) -> int:
    """The head in the matrix multiplies' dtype, its rows for likely tokens, and a piece of both streams' logits."""
    head = skeleton.head
    num_rows = head.out_features + min(LIKELY_TOKENS, head.out_features)
    # Logits and their gradient in that dtype; both in float32, their logarithms, p and q.
    logits = LOGITS_TOKENS * head.out_features * (3 * dtype.itemsize + 6 * 4)
    return dtype.itemsize * num_rows * sum(parameter[0].numel() for parameter in head.parameters()) + logits


def saved_bytes(block: nn.Module, arguments: BlockArguments, hidden_shape: tuple[int, int, int]) -> int:
    """Bytes that a block's forward keeps for its backward, counted without computing anything.

    An upper bound: for float32, and for code that is not compiled.

    Args:
        block: on the meta device; left as it is.
        hidden_shape: samples, tokens, channels.
    """
    block = copy.deepcopy(block).requires_grad_(True)
    call = arguments.on_meta(hidden_shape)
    with own_code(type(block).__name__, "its memory for training cannot be counted"):
        kept = saved_tensors(lambda: run_block(block, call, torch.float32))
    parameters = {storage_key(parameter) for parameter in block.parameters()}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept if storage_key(tensor) not in parameters)


def saved_tensors(work: Callable[[], object]) -> list[Tensor]:
    """Tensors that `work` keeps for backward on any device, one for each storage: views of a tensor count once."""
    kept: dict[int, Tensor] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[storage_key(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        work()
    return list(kept.values())
