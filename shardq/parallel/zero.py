"""ZeRO: a block's training state spread over ranks by DeepSpeed, which no other file knows."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardq.errors import ConfigError
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.linear_quantizer import LinearQuantizer
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.share import Everything
from shardq.optimize.stepper import (
    make_optimizer,
    parameter_groups,
    set_learning_rates,
    skipped_where,
    state_of,
    take_over,
)
from shardq.parallel.engine import BlockSize, Demand, Engine, Kind
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks, backend_for
from shardq.shipped import DEEPSPEED, read_named

# Elements that are reduced or gathered at once: DeepSpeed's own 500 million would take more than most blocks.
BUCKET_SIZE = 1 << 25
# What the run decides itself; a file that sets one of these would contradict it or be ignored.
OWN_SETTINGS = {
    "optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "fp16", "bf16", "amp", "torch_autocast", "gradient_clipping", "communication_data_type",
}  # fmt: skip
OWN_ZERO_SETTINGS = {"stage", "offload_optimizer", "offload_param", "compute_grad_norm"}


class Zero(Engine):
    """The engine of ranks that share, by its stage, the moments, the gradients too, or frozen weight and s2 too."""

    def __init__(self, options: ParallelOptions, ranks: Ranks):
        super().__init__(options, ranks)
        self.stage = int(options.engine.removeprefix("zero"))
        self.collects_in_place = self.stage == 2 and not options.offload  # a shard's gradients, where they are stepped

    @cached_property
    def settings(self) -> dict:
        """DeepSpeed's configuration, with what the user's file adds.

        Raises:
            ConfigError: the file cannot be read, or sets what the run decides itself.
        """
        zero = {
            "stage": self.stage, "overlap_comm": False, "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_SIZE, "allgather_bucket_size": BUCKET_SIZE,
            "use_multi_rank_bucket_allreduce": False,  # it would send every rank all gradients, not each its shard's
        }  # fmt: skip
        if self.stage == 3:
            # It would replace torch's linear for the whole process, for the sake of linears that it shards.
            zero |= {"stage3_prefetch_bucket_size": BUCKET_SIZE, "stage3_max_live_parameters": BUCKET_SIZE,
                     "stage3_max_reuse_distance": 0, "memory_efficient_linear": False}  # fmt: skip
        if self.options.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        own = {
            "train_micro_batch_size_per_gpu": 1, "steps_per_print": 1 << 31, "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # by default it clips at 1
            "communication_data_type": "bf16" if self.options.reduce_dtype == "bf16" else "fp32",
            # DeepSpeed's own CPU Adam would have to be compiled; torch's is fused too.
            "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        given = _read_settings(self.options.deepspeed) if self.options.deepspeed else {}
        return own | given | {"zero_optimization": zero | given.get("zero_optimization", {})}

    def demands(self) -> Iterator[Demand]:
        """A file that cannot be used is refused before any work."""
        _ = self.settings  # reads it
        yield from ()

    def share(self, dtype: torch.dtype) -> Everything:
        """Everything, sharded in stage 3."""
        return ZeroShare(self, dtype) if self.stage == 3 else Everything()

    def stepper(self, quantizer: BlockQuantizer, options: OptimizeOptions) -> "DeepSpeedStepper":
        """Each rank steps its shard."""
        return DeepSpeedStepper(quantizer, options, self)

    def rank_bytes(self, kind: Kind, num_bytes: int) -> int:
        """A shard from some stage on; offloaded moments are not on the device."""
        if kind == "moments" and self.options.offload:
            return 0
        sharded_from = {"moments": 1, "gradients": 2, "weights": 3}[kind]
        return num_bytes // self.ranks.world_size if self.stage >= sharded_from else num_bytes

    @property
    def keeps_gradients(self) -> bool:
        """DeepSpeed has a place for the gradient of a shard of s2."""
        return self.collects_in_place or self.stage == 3 or self.ranks.world_size == 1

    def moved_bytes(self, size: BlockSize) -> int:
        """Buckets that are reduced, and what is gathered."""
        world_size = self.ranks.world_size
        if world_size == 1:  # it copies gradients instead, one after the other, to a place that it has for all of them
            return 0 if self.collects_in_place else 4 * size.largest_linear
        zero = self.settings["zero_optimization"]
        bucket = min(zero["reduce_bucket_size"], size.num_weights)
        if self.stage < 3:
            return 4 * bucket
        # A gradient is reduced when the next linear's is there too, from a copy, into a shard; meanwhile s2 and source
        # of what is computed are gathered.
        reduced = max(bucket, size.largest_linear)
        gathered = max(min(zero["stage3_max_live_parameters"], size.num_weights), size.largest_linear)
        moved = 4 * (2 * reduced + size.largest_linear) + 4 * reduced // world_size
        return moved + (4 + size.source // size.num_weights) * gathered

    @property
    def writer(self) -> int:
        """Each rank saves its shard."""
        return self.ranks.rank

    def made_with(self) -> dict:
        """DeepSpeed's settings too."""
        return super().made_with() | self.settings


class ZeroShare(Everything):
    """All of every linear's outputs, each quantizer sharded by ZeRO 3 as soon as it is made."""

    def __init__(self, engine: Zero, dtype: torch.dtype):
        self._zero, self._settings, self._dtype = _imported(engine.ranks).zero, engine.settings, dtype

    def made(self, quantizer: LinearQuantizer) -> None:
        """Its parameters, the frozen weight among them, are empty from here on but while they are gathered."""
        quantizer.make_shardable(self._dtype)
        self._zero.Init(quantizer, config_dict_or_path=self._settings, dtype=torch.float32)


class DeepSpeedStepper:
    """An optimizer over quantizers whose state DeepSpeed shards; built once for a kind of block, reused for all."""

    def __init__(self, module: BlockQuantizer, options: OptimizeOptions, engine: Zero):
        """Take over the parameters of quantizers; those for ZeRO 3 have been made with a `ZeroShare`."""
        self._deepspeed = _imported(engine.ranks)
        stand_in = torch.optim.SGD(parameter_groups(module, options))
        self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
            model=module, optimizer=stand_in, config=engine.settings, dist_init_required=False
        )
        self._shards_parameters = engine.stage == 3
        self._optimizer.optimizer = self._over_shards(options.optimizer, stand_in.param_groups)
        if not engine.options.offload:
            self._step_in_place()
        if engine.collects_in_place:
            self._collect_in_place()
        self._done, self._iterations, self._rate = 0, 0, 1.0
        # Where the shards are: with offload that is the CPU, whatever the rank's device.
        self._not_finite = skipped_where(self._optimizer.optimizer, self._shards()[0].device)

    def start(self, iterations: int, rate: float = 1.0) -> None:
        """Take the parameters' start into the shards, zero the moments, go to the start of the schedule."""
        self._optimizer.refresh_fp32_params()
        for state in self._optimizer.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self._done, self._iterations, self._rate = 0, iterations, rate
        self._not_finite.zero_()

    def gathered(self, module: nn.Module, changed: bool = False) -> AbstractContextManager:
        """Have the module's parameters whole on every rank; every rank has to take part."""
        if not self._shards_parameters:
            return nullcontext()
        writer = 0 if changed else None
        return self._deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=writer)

    def forward(self) -> list[Tensor]:
        """The fake-quantized weights, gathered linear by linear."""
        return self._engine()

    def backward(self, collected: Tensor) -> None:
        """Average the gradient over ranks as it is made, each rank keeping its shard."""
        collected.backward()

    def step(self) -> None:
        """Step each rank's shard, and give the others what changed."""
        set_learning_rates(self._optimizer.optimizer, self._done, self._iterations, self._rate)
        self._engine.step()
        # DeepSpeed adds up the gradients' norm over all ranks, and leaves out a step whose norm is not finite.
        if self._optimizer.overflow:
            self._not_finite.fill_(1.0)
        self._done += 1

    def release(self) -> None:
        """Nothing: DeepSpeed keeps its flat buffers."""

    def is_finite(self) -> bool:
        """Read the flag: all ranks have set it by the same norms."""
        return not self._not_finite.item()

    def state(self) -> dict[str, Tensor]:
        """This rank's shard of the parameters and the moments."""
        return dict(state_of(self._optimizer.optimizer, self._shards()))

    def restore(self, state: dict[str, Tensor], done: int) -> None:
        """Take the shard over, and bring the parameters to where a step would leave them."""
        take_over(self._optimizer.optimizer, self._shards(), state)
        if self._shards_parameters:
            self._optimizer.checkpoint_event_prologue()
            for number in range(len(self._shards())):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
            self._optimizer.checkpoint_event_epilogue()
        else:
            self._optimizer.update_lp_params()
        self._done = done

    def _shards(self) -> list[Tensor]:
        """What DeepSpeed has the optimizer step on this rank."""
        if self._shards_parameters:
            return self._optimizer.fp32_partitioned_groups_flat
        return self._optimizer.single_partition_of_fp32_groups

    def _over_shards(self, kind: str, groups: list[dict]) -> torch.optim.Optimizer:
        """Made here: DeepSpeed would put all of Adagrad's shards into one group, with one learning rate."""
        groups = [{"params": [], "start_lr": group["start_lr"]} for group in groups]
        owners = self._optimizer.sub_group_to_group_id if self._shards_parameters else range(len(groups))
        for number, shard in enumerate(self._shards()):
            groups[owners[number]]["params"].append(shard)
        optimizer = make_optimizer(kind, groups)
        if self._shards_parameters:  # DeepSpeed puts one shard at a time into its group, and steps that
            for group in optimizer.param_groups:
                group["params"] = []
        return optimizer

    def _step_in_place(self) -> None:
        """Have DeepSpeed step this rank's shard of the parameters themselves, float32 as they are, and no copy."""
        if self._shards_parameters:
            own = self._optimizer.fp16_partitioned_groups_flat
        else:
            own = [parts[dist.get_rank()] for parts in self._optimizer.parallel_partitioned_bit16_groups]
        for stepped, shard in zip(self._shards(), own, strict=True):
            stepped.data = shard.data
        if not self._shards_parameters:
            self._optimizer._link_all_hp_params()  # its map from parameters to what is stepped would keep the copy

    def _collect_in_place(self) -> None:
        """Have ZeRO 2 collect gradients where they are stepped, as it does for parameters of another dtype."""
        self._optimizer.use_grad_accum_attribute = True
        self._optimizer._use_compact_grad_partition_buffer = lambda group: True


def _read_settings(path: str) -> dict:
    content = read_named(path, DEEPSPEED, "parallel.deepspeed")
    try:
        given = json.loads(content)
    except ValueError as error:
        raise ConfigError(
            f"parallel.deepspeed: {path} is no JSON file ({error}); give DeepSpeed's own format"
        ) from error
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization", {}), dict):
        raise ConfigError(f"parallel.deepspeed: {path} holds no JSON object; give DeepSpeed's own format")
    contradicting = sorted(OWN_SETTINGS & given.keys())
    zero = given.get("zero_optimization", {})
    contradicting += [f"zero_optimization.{name}" for name in sorted(OWN_ZERO_SETTINGS & zero.keys())]
    if contradicting:
        raise ConfigError(
            f"parallel.deepspeed: {path} sets {', '.join(contradicting)}, which the run decides itself; remove it and "
            "use --parallel.engine, --parallel.offload and --optimize options"
        )
    return given


def _imported(ranks: Ranks) -> ModuleType:
    """DeepSpeed, quiet, on the ranks' device, with a process group to work in."""
    os.environ["DS_ACCELERATOR"] = ranks.device.type
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch is about to give up, once a linear and step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed  # takes seconds, which other engines need not wait for

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU it would compile, for a minute, a collective that only its inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    # It takes gradients' norms in float64, for which each would be copied; here they are to show what is not finite.
    deepspeed.accelerator.get_accelerator().is_fp64_supported = lambda: False
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for a launcher even here
        dist.init_process_group(backend_for(ranks.device), store=dist.HashStore(), rank=0, world_size=1)
    return deepspeed
