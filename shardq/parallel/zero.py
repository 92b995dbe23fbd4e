"""The ZeRO engines: DeepSpeed shards a block's training state over ranks. The only file that uses DeepSpeed."""

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

# Elements in one reduction or gathering: DeepSpeed's default of 500 million would take more memory than most blocks.
BUCKET_SIZE = 1 << 25
# Settings that the run decides; a file that sets one of these would contradict the run or be ignored.
OWN_SETTINGS = {
    "optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "fp16", "bf16", "amp", "torch_autocast", "gradient_clipping", "communication_data_type",
}  # fmt: skip
OWN_ZERO_SETTINGS = {"stage", "offload_optimizer", "offload_param", "compute_grad_norm"}


class Zero(Engine):
    """The engine that shards by stage: 1 the moments, 2 also the gradients, 3 also frozen weight, s2 and s3."""

    def __init__(self, options: ParallelOptions, ranks: Ranks):
        super().__init__(options, ranks)
        self.stage = int(options.engine.removeprefix("zero"))
        self.collects_in_place = self.stage == 2 and not options.offload  # a shard's gradients, where they are stepped

    @cached_property
    def settings(self) -> dict:
        """DeepSpeed's configuration, with the settings that the user's file adds.

        Raises:
            ConfigError: the file cannot be read, or sets a value that the run decides.
        """
        zero = {
            "stage": self.stage, "overlap_comm": False, "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_SIZE, "allgather_bucket_size": BUCKET_SIZE,
            "use_multi_rank_bucket_allreduce": False,  # it would send every rank all gradients, not each its shard's
        }  # fmt: skip
        if self.stage == 3:
            # DeepSpeed's memory-efficient linear would replace torch's for the whole process.
            zero |= {"stage3_prefetch_bucket_size": BUCKET_SIZE, "stage3_max_live_parameters": BUCKET_SIZE,
                     "stage3_max_reuse_distance": 0, "memory_efficient_linear": False}  # fmt: skip
        if self.options.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        own = {
            "train_micro_batch_size_per_gpu": 1, "steps_per_print": 1 << 31, "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed's default clips at 1
            "communication_data_type": "bf16" if self.options.reduce_dtype == "bf16" else "fp32",
            # DeepSpeed's own CPU Adam would have to be compiled; torch's is fused too.
            "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        given = _read_settings(self.options.deepspeed) if self.options.deepspeed else {}
        return own | given | {"zero_optimization": zero | given.get("zero_optimization", {})}

    def demands(self) -> Iterator[Demand]:
        _ = self.settings  # reads the file, so that one that cannot be used is refused before any work
        yield from ()

    def share(self, dtype: torch.dtype) -> Everything:
        return ZeroShare(self, dtype) if self.stage == 3 else Everything()

    def stepper(self, quantizer: BlockQuantizer, options: OptimizeOptions) -> "DeepSpeedStepper":
        return DeepSpeedStepper(quantizer, options, self)

    def rank_bytes(self, kind: Kind, num_bytes: int) -> int:
        if kind == "moments" and self.options.offload:
            return 0
        sharded_from = {"moments": 1, "gradients": 2, "weights": 3}[kind]
        return num_bytes // self.ranks.world_size if self.stage >= sharded_from else num_bytes

    @property
    def keeps_gradients(self) -> bool:
        return self.collects_in_place or self.stage == 3 or self.ranks.world_size == 1

    def moved_bytes(self, size: BlockSize) -> int:
        """Bytes of the buckets that are reduced, and of the parameters that are gathered."""
        world_size = self.ranks.world_size
        if world_size == 1:  # DeepSpeed copies one gradient at a time into a buffer that it has for all of them
            return 0 if self.collects_in_place else 4 * size.largest_linear
        zero = self.settings["zero_optimization"]
        bucket = min(zero["reduce_bucket_size"], size.num_weights)
        if self.stage < 3:
            return 4 * bucket
        # A gradient is copied and reduced into a shard after the next linear's gradient is computed; at that time s2
        # and the source weight of the linear in computation are gathered.
        reduced = max(bucket, size.largest_linear)
        gathered = max(min(zero["stage3_max_live_parameters"], size.num_weights), size.largest_linear)
        moved = 4 * (2 * reduced + size.largest_linear) + 4 * reduced // world_size
        return moved + (4 + size.source // size.num_weights) * gathered

    @property
    def writer(self) -> int:
        return self.ranks.rank

    def made_with(self) -> dict:
        """Those of every engine, and DeepSpeed's settings."""
        return super().made_with() | self.settings


class ZeroShare(Everything):
    """The share of a rank that quantizes all outputs; ZeRO 3 shards each quantizer as soon as it is made."""

    def __init__(self, engine: Zero, dtype: torch.dtype):
        self._zero, self._settings, self._dtype = _imported(engine.ranks).zero, engine.settings, dtype

    def made(self, quantizer: LinearQuantizer) -> None:
        """Shard the quantizer: its parameters and its frozen weight are empty except while they are gathered."""
        quantizer.make_shardable(self._dtype)
        self._zero.Init(quantizer, config_dict_or_path=self._settings, dtype=torch.float32)


class DeepSpeedStepper:
    """An optimizer over quantizers whose state DeepSpeed shards; built once for a kind of block, reused for all."""

    def __init__(self, module: BlockQuantizer, options: OptimizeOptions, engine: Zero):
        """Take over the quantizers' parameters; for ZeRO 3 the quantizers have been made with a `ZeroShare`."""
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
        """Copy the parameters into the shards, zero the moments, go to the start of the schedule."""
        self._optimizer.refresh_fp32_params()
        for state in self._optimizer.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self._done, self._iterations, self._rate = 0, iterations, rate
        self._not_finite.zero_()

    def gathered(self, module: nn.Module, changed: bool = False) -> AbstractContextManager:
        if not self._shards_parameters:
            return nullcontext()
        writer = 0 if changed else None
        return self._deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=writer)

    def forward(self) -> list[Tensor]:
        return self._engine()

    def backward(self, collected: Tensor) -> None:
        collected.backward()

    def step(self) -> None:
        set_learning_rates(self._optimizer.optimizer, self._done, self._iterations, self._rate)
        self._engine.step()
        # DeepSpeed sums the gradients' norm over all ranks and skips a step whose norm is not finite.
        if self._optimizer.overflow:
            self._not_finite.fill_(1.0)
        self._done += 1

    def release(self) -> None:
        """Do nothing: DeepSpeed keeps its flat buffers."""

    def is_finite(self) -> bool:
        return not self._not_finite.item()

    def state(self) -> dict[str, Tensor]:
        return dict(state_of(self._optimizer.optimizer, self._shards()))

    def restore(self, state: dict[str, Tensor], done: int) -> None:
        """Load this rank's shard, and update the parameters from the shards as a step would."""
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
        """The tensors that the optimizer steps on this rank."""
        if self._shards_parameters:
            return self._optimizer.fp32_partitioned_groups_flat
        return self._optimizer.single_partition_of_fp32_groups

    def _over_shards(self, kind: str, groups: list[dict]) -> torch.optim.Optimizer:
        """An optimizer over the shards: DeepSpeed would put Adagrad's into one group, with one learning rate."""
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
        """Have DeepSpeed step this rank's shard of the float32 parameters in place, without its own float32 copy."""
        if self._shards_parameters:
            own = self._optimizer.fp16_partitioned_groups_flat
        else:
            own = [parts[dist.get_rank()] for parts in self._optimizer.parallel_partitioned_bit16_groups]
        for stepped, shard in zip(self._shards(), own, strict=True):
            stepped.data = shard.data
        if not self._shards_parameters:
            self._optimizer._link_all_hp_params()  # the map from parameters to shards would keep the copy in memory

    def _collect_in_place(self) -> None:
        """Have ZeRO 2 collect gradients in the tensors that are stepped, as it does for parameters of another dtype."""
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
    # DeepSpeed calls collectives by names that torch has deprecated, once for each linear and step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed  # takes seconds, which other engines need not wait for

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU DeepSpeed would spend a minute compiling a collective that only its inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed computes gradients' norms in float64, which copies each; the norms only have to show non-finite ones.
    deepspeed.accelerator.get_accelerator().is_fp64_supported = lambda: False
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for a launcher even here
        dist.init_process_group(backend_for(ranks.device), store=dist.HashStore(), rank=0, world_size=1)
    return deepspeed
