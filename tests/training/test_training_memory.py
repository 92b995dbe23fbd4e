"""What training a block takes, against a count of what autograd really keeps; and the micro-batch that fits."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Gemma2Config, Gemma4TextConfig, GPTNeoXConfig, LlamaConfig, PretrainedConfig

import tiny
from shardq.config import QuantOptions
from shardq.errors import ConfigError
from shardq.model.block import LoadedBlock
from shardq.model.ends import prologue
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.model.weights import stream_blocks
from shardq.optimize.options import OptimizeOptions
from shardq.parallel.engine import Engine
from shardq.parallel.engines import candidates, engine_for
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks
from shardq.rundir.plan import Plan, make_plan
from shardq.training import memory
from shardq.training.memory import (
    LargestBlock,
    block_size,
    choose_engine,
    choose_micro_batch,
    largest_block,
    memory_limit,
    reads_ahead,
    saved_bytes,
    state_bytes,
    training_bytes,
)

CPU = torch.device("cpu")
ATTENTION, MLP = 2 * 48 * 48 + 2 * 24 * 48, 3 * 80 * 48  # weights of the linears of a gated block
NUM_WEIGHTS, LARGEST, SOURCE = ATTENTION + MLP, 80 * 48, 2 * (ATTENTION + MLP + 2 * 48)
HIDDEN, LENGTH = 48, 32
SHAPE = {"vocab_size": 60, "hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0}  # fmt: skip
GATED = SHAPE | {"num_key_value_heads": 2}
KINDS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "gemma2": Gemma2Config(**GATED, head_dim=12, sliding_window=7),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
}
TWO_KINDS = Gemma4TextConfig(
    **GATED, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model that is ready to be quantized."""

    skeleton: Skeleton
    plan: Plan

    @property
    def largest(self) -> LargestBlock:
        return self.largest_with(OptimizeOptions(last_block="output", precision="float32"))

    def largest_with(self, options: OptimizeOptions) -> LargestBlock:
        return largest_block(self.skeleton, self.plan, LENGTH, options)

    def choose(self, options: OptimizeOptions, spare_bytes: int, world_size: int = 1) -> int:
        limit = limit_of(options, spare_bytes)
        return choose_micro_batch(self.largest, options, engine_of(world_size), limit)

    def engine(self, spare_bytes: int, world_size: int, **chosen: object) -> tuple[str, str]:
        options = OptimizeOptions(batch_size=world_size, precision="float32", optimizer="adam", **chosen)
        return self.choose_engine(options, limit_of(options, spare_bytes), world_size)

    def choose_engine(self, options: OptimizeOptions, limit: int, world_size: int) -> tuple[str, str]:
        engines = candidates(ParallelOptions(), Ranks(0, world_size, CPU))
        chosen, reason = choose_engine(self.largest, options, engines, limit)
        return chosen.options.engine, reason


def engine_of(world_size: int, name: str = "allreduce", offload: bool = False) -> Engine:
    return engine_for(ParallelOptions(engine=name, offload=offload), Ranks(0, world_size, CPU))


def limit_of(options: OptimizeOptions, spare_bytes: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "spare_bytes", lambda device, local_world_size: spare_bytes)
        return memory_limit(options, Ranks(0, 1, CPU))


def opened(folder: Path, config: PretrainedConfig, length: int = LENGTH, ignore: str = "") -> Model:
    skeleton = open_skeleton(tiny.save_model(folder, config))
    with prologue(skeleton, CPU) as embed:
        arguments = record_arguments(skeleton, embed, length)
    return Model(skeleton, make_plan(skeleton, QuantOptions(ignore=ignore)).with_arguments(arguments))


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened(tmp_path_factory.mktemp("model"), KINDS["llama"])


def options_for(batch_size: int, memory_gib: float | None = None, precision: str = "float32") -> OptimizeOptions:
    return OptimizeOptions(batch_size=batch_size, memory_gib=memory_gib, precision=precision, optimizer="adam")


def really_saved(loaded: LoadedBlock, hidden_NTD: Tensor) -> int:
    """Bytes that autograd keeps, beside the weights, while a block with real weights computes."""
    kept: dict[int, Tensor] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    loaded.module.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), saved_tensors_hooks(count, lambda tensor: tensor):
        loaded(hidden_NTD)
    weights = {parameter.untyped_storage().data_ptr() for parameter in loaded.module.parameters()}
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)


def test_head_counts_where_the_last_block_is_trained_to_predictions(llama_model: Model, monkeypatch):
    monkeypatch.setattr(memory, "LOGITS_TOKENS", 10)
    monkeypatch.setattr(memory, "LIKELY_TOKENS", 15)
    options = OptimizeOptions(last_block="predictions", precision="bf16", optimizer="rms", batch_size=1)
    with_head = llama_model.largest_with(options)
    assert with_head.head_bytes == 2 * (60 + 15) * 48 + 10 * 60 * (3 * 2 + 6 * 4)
    without = llama_model.largest_with(replace(options, last_block="output"))
    assert without == replace(with_head, head_bytes=0)
    needed, less = (training_bytes(block, options, engine_of(1), 1) for block in (with_head, without))
    assert needed - less == with_head.head_bytes


class TestSavedBytes:
    @pytest.mark.parametrize("num", [1, 3])
    @pytest.mark.parametrize("length", [16, 128])
    @pytest.mark.parametrize("kind", KINDS)
    def test_count_without_computing_is_what_autograd_keeps(self, tmp_path: Path, kind: str, length: int, num: int):
        model = opened(tmp_path, KINDS[kind], length)
        shape = (num, length, HIDDEN)
        counted = saved_bytes(model.skeleton.blocks[1], model.plan.blocks[1].arguments, shape)
        [loaded] = stream_blocks(model.skeleton, [model.plan.blocks[1]], CPU)
        kept = really_saved(loaded, torch.randn(shape))
        assert kept <= counted <= 1.05 * kept

    def test_block_stays_as_it_was(self, llama_model: Model):
        block, arguments = llama_model.skeleton.blocks[0], llama_model.plan.blocks[0].arguments
        saved_bytes(block, arguments, (2, LENGTH, HIDDEN))
        assert all(parameter.is_meta and not parameter.requires_grad for parameter in block.parameters())
        assert not arguments.kwargs["position_embeddings"][0].is_meta


@pytest.mark.parametrize(
    ("chosen", "bytes_a_weight"),
    [
        ({"precision": "float32"}, 16),
        ({"precision": "bf16"}, 16),
        ({"precision": "float32", "held_out": 4}, 17),
        ({"precision": "float32", "optimizer": "rms"}, 12),
    ],
    ids=str,
)
def test_state_is_counted_by_the_weight(llama_model: Model, chosen: dict, bytes_a_weight: int):
    """s2: 4 bytes; Adam's moments: 8; the quantized weight, in whose place its gradient comes, then that of s2: 4; the
    best iterate's code: 1. One linear's gradient is there beside that of its s2.

    Where gradients of several micro-batches add up, there are the weight, the next gradient and the float32 sum.
    """
    options = OptimizeOptions(**{"optimizer": "adam"} | chosen)
    size = block_size(llama_model.skeleton, llama_model.plan.blocks[1])
    counted, adding_up = (state_bytes(size, options, engine_of(2), several) for several in (False, True))
    assert counted == SOURCE + bytes_a_weight * NUM_WEIGHTS + 4 * LARGEST
    width = 2 if chosen["precision"] == "bf16" else 4
    assert adding_up - counted == (2 * width + 4 - 4) * NUM_WEIGHTS


@pytest.mark.parametrize(
    ("engine", "offload", "whole", "shared"),
    [
        ("rows", False, 2, 4 + 8),
        ("zero1", False, 4 + 4, 8),
        ("zero2", False, 4 + 2, 8 + 4),
        ("zero3", False, 2, 4 + 4 + 8),
        ("zero2", True, 4 + 2, 0),
    ],
)
def test_engines_share_state_between_ranks(llama_model: Model, engine: str, offload: bool, whole: int, shared: int):
    """Shared by ZeRO: moments, then s2's gradient, then s2. Rows share all but the quantized weight, here in bf16.

    Stages 2 and 3 have a place for the gradient's shard beside the quantized weight, here in bf16; with offload it is
    not on the device. Beside that ZeRO has what is reduced: a bucket, here as large as all gradients; with stage 3 the
    largest linear's gradient too, a copy and a shard of the bucket, and s2 and weights gathered.
    """
    options = options_for(4, precision="bf16")
    counted = state_bytes(
        block_size(llama_model.skeleton, llama_model.plan.blocks[1]), options, engine_of(4, engine, offload)
    )
    held = SOURCE // 4 if engine in ("rows", "zero3") else SOURCE
    moved = {
        "rows": 0,
        "zero1": 4 * NUM_WEIGHTS,
        "zero2": 4 * NUM_WEIGHTS,
        "zero3": 4 * (NUM_WEIGHTS + LARGEST) + (4 + 1) * NUM_WEIGHTS + (4 + 2) * NUM_WEIGHTS,
    }[engine]
    assert counted == held + whole * NUM_WEIGHTS + shared * NUM_WEIGHTS // 4 + moved + 4 * LARGEST


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_on_one_rank_has_a_place_for_all_gradients_beside_the_quantized_weight(llama_model: Model, engine: str):
    size, options = block_size(llama_model.skeleton, llama_model.plan.blocks[1]), options_for(1, precision="bf16")
    counted = state_bytes(size, options, engine_of(1, engine))
    copied = 0 if engine == "zero2" else 4 * LARGEST  # a gradient, but where it is collected in its place
    assert counted == SOURCE + (4 + 8 + 2 + 4) * NUM_WEIGHTS + copied + 4 * LARGEST


class TestEngine:
    def test_one_rank_trains_alone(self, llama_model: Model):
        assert llama_model.engine(1, 1) == ("local", "one rank")

    def test_ranks_hold_everything_where_that_fits_else_their_rows(self, llama_model: Model):
        size = block_size(llama_model.skeleton, llama_model.plan.blocks[0])
        sample = llama_model.largest.sample_bytes
        whole, rows = (
            sample + state_bytes(size, options_for(4), engine_of(4, engine)) for engine in ("allreduce", "rows")
        )
        assert rows < whole
        chosen = [llama_model.engine(spare, 4)[0] for spare in (whole, whole - 1, rows, 1)]
        assert chosen == ["allreduce", "rows", "rows", "rows"]

    def test_what_counts_is_the_micro_batch_asked_for_or_the_one_that_takes_least(self, llama_model: Model):
        def needed(micro_batch: int) -> int:
            options = replace(options_for(8), micro_batch=micro_batch)
            return training_bytes(llama_model.largest, options, engine_of(2), micro_batch)

        assert needed(1) < needed(4)
        for asked, least in ((None, needed(1)), (4, needed(4))):
            options = replace(options_for(8), micro_batch=asked)
            chosen = [llama_model.choose_engine(options, limit, 2)[0] for limit in (least, least - 1)]
            assert chosen == ["allreduce", "rows"]

    def test_reason_names_what_each_engine_takes(self, llama_model: Model):
        _, reason = llama_model.engine(1, 4)
        assert [word for word in reason.split() if word in ("allreduce", "rows")] == ["allreduce", "rows"]
        assert reason.endswith("of 0.00 GiB")


def test_next_block_is_read_ahead_where_there_is_room_for_it(llama_model: Model):
    options = replace(options_for(1), micro_batch=1)
    size = block_size(llama_model.skeleton, llama_model.plan.blocks[0])
    sample = llama_model.largest.sample_bytes
    needed = state_bytes(size, options, engine_of(1)) + sample + SOURCE
    for limit, expected in ((needed, True), (needed - 1, False)):
        assert reads_ahead(llama_model.largest, options, engine_of(1), limit) == expected


def test_linears_that_are_not_trained_have_no_state(tmp_path: Path):
    model = opened(tmp_path, KINDS["llama"], ignore="mlp.*")
    size = block_size(model.skeleton, model.plan.blocks[0])
    assert state_bytes(size, options_for(1), engine_of(2)) == SOURCE + 16 * ATTENTION + 4 * 48 * 48


class TestChoice:
    @staticmethod
    def bytes_for(model: Model, num_samples: float, block_index: int = 0) -> int:
        """Memory for a block's training with some of a batch's samples at once."""
        state = state_bytes(
            block_size(model.skeleton, model.plan.blocks[block_index]), options_for(1), engine_of(1), True
        )
        sample = saved_bytes(
            model.skeleton.blocks[block_index], model.plan.blocks[block_index].arguments, (1, LENGTH, HIDDEN)
        )
        return int(state + num_samples * sample)

    @pytest.mark.parametrize(
        ("fitting", "expected"),
        [(1, 1), (1.99, 1), (2, 2), (3.5, 3), (4, 4), (5.9, 4), (6, 6), (10, 6), (1000, 12)],
    )
    def test_largest_divisor_of_the_batch_that_fits_is_chosen(self, llama_model: Model, fitting: float, expected: int):
        assert llama_model.choose(options_for(12), self.bytes_for(llama_model, fitting)) == expected

    def test_whole_part_needs_no_room_for_a_sum(self, llama_model: Model):
        state = state_bytes(llama_model.largest.size, options_for(1), engine_of(1))
        needed = state + 12 * llama_model.largest.sample_bytes
        assert needed < self.bytes_for(llama_model, 12)
        assert [llama_model.choose(options_for(12), limit) for limit in (needed, needed - 1)] == [12, 6]

    @pytest.mark.parametrize(("world_size", "expected"), [(1, 6), (2, 6), (3, 4), (5, 3), (6, 2), (12, 1), (16, 1)])
    def test_only_a_ranks_part_of_the_batch_counts(self, llama_model: Model, world_size: int, expected: int):
        assert llama_model.choose(options_for(12), self.bytes_for(llama_model, 7), world_size) == expected

    @pytest.mark.parametrize("spare_bytes", [0, 1000])
    def test_one_sample_is_tried_where_nothing_fits(self, llama_model: Model, spare_bytes: int):
        assert llama_model.choose(options_for(12), spare_bytes) == 1

    def test_limit_goes_before_what_there_is_to_spare(self, llama_model: Model):
        limit = (self.bytes_for(llama_model, 3) + 1) / 2**30
        assert llama_model.choose(options_for(12, limit), 1 << 40) == 3
        assert llama_model.choose(options_for(12, limit), 0) == 3

    def test_limit_that_one_sample_exceeds_is_refused(self, llama_model: Model):
        limit = (self.bytes_for(llama_model, 1) - 1) / 2**30
        with pytest.raises(ConfigError) as caught:
            llama_model.choose(options_for(12, limit), 1 << 40)
        message = str(caught.value)
        assert message.startswith("optimize.memory_gib: ") and "model.layers." in message and "\n" not in message

    def test_largest_block_decides(self, tmp_path: Path):
        model = opened(tmp_path, TWO_KINDS)
        small, large = (self.bytes_for(model, 4, number) for number in (0, 1))
        assert small < large
        assert model.choose(options_for(4), small) < 4
        assert model.choose(options_for(4), large) == 4

    def test_block_with_more_to_train_is_the_largest(self, tmp_path: Path):
        model = opened(tmp_path, KINDS["llama"], ignore="model.layers.1.mlp.*")
        with pytest.raises(ConfigError, match="model.layers.0 needs"):
            model.choose(options_for(1, 1e-9), 0)
