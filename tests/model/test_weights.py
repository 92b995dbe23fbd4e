"""Weights in and out of the skeleton: right values, one block at a time, the next one read ahead."""

import json
import shutil
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma4TextConfig

import tiny
from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.shards import INDEX_FILE
from shardq.formats.source import SourceTensor, WeightSource
from shardq.model.block import LoadedBlock, block_plans
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.model.weights import fill, materialised, read_weights, stream_blocks
from shardq.rundir.source import check_outside

CPU = torch.device("cpu")
# Sliding attention with heads of 8 channels, full attention with heads of 16.
TWO_KINDS = Gemma4TextConfig(
    vocab_size=50, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip


def is_on_meta(module: nn.Module) -> bool:
    """Whether nothing of a module is in memory."""
    return all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(llama, tmp_path / "model")


def streamed_blocks(skeleton: Skeleton, indices: Iterable[int], **options: object) -> Iterator[LoadedBlock]:
    """Some blocks of a model, none of which is to be quantized."""
    plans = block_plans(skeleton)
    return stream_blocks(skeleton, [plans[index] for index in indices], CPU, **options)


def streamed(skeleton: Skeleton, block_indices: range) -> Iterator[tuple[LoadedBlock, dict[str, Tensor]]]:
    """Each block with a copy of what its module holds, which lasts beyond the next block."""
    for loaded in streamed_blocks(skeleton, block_indices):
        yield loaded, {name: tensor.clone() for name, tensor in loaded.module.state_dict().items()}


class TestStreamBlocks:
    def test_blocks_hold_the_stored_weights_in_float32(self, llama: Path):
        reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()
        seen = {}
        for loaded, state in streamed(open_skeleton(llama), range(3)):
            seen |= {f"model.layers.{loaded.index}.{name}": tensor for name, tensor in state.items()}
        expected = {name: tensor for name, tensor in reference.items() if ".layers." in name}
        assert seen.keys() == expected.keys()
        assert all(tensor.dtype == torch.float32 for tensor in seen.values())
        assert [name for name in seen if not torch.equal(seen[name], expected[name])] == []

    def test_source_is_what_is_stored_in_its_dtype(self, llama: Path):
        stored = {name: tensor for file in llama.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for loaded in streamed_blocks(open_skeleton(llama), range(3)):
            prefix = f"model.layers.{loaded.index}."
            assert {prefix + name for name in loaded.source} == {name for name in stored if name.startswith(prefix)}
            for name, tensor in loaded.source.items():
                assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, stored[prefix + name])

    @pytest.mark.parametrize("ahead", [True, False])
    def test_only_the_asked_blocks_come_in_the_asked_order(self, llama: Path, ahead: bool):
        assert [loaded.index for loaded in streamed_blocks(open_skeleton(llama), [2, 0], ahead=ahead)] == [2, 0]

    def test_weights_are_frozen(self, llama: Path):
        for loaded in streamed_blocks(open_skeleton(llama), range(2)):
            assert not any(parameter.requires_grad for parameter in loaded.module.parameters())

    def test_blocks_that_are_alike_share_one_module_and_its_storage(self, llama: Path):
        modules, storages = [], []
        for loaded in streamed_blocks(open_skeleton(llama), range(3)):
            modules.append(loaded.module)
            storages.append({name: tensor.data_ptr() for name, tensor in loaded.module.named_parameters()})
        assert modules[0] is modules[1] is modules[2]
        assert storages[0] == storages[1] == storages[2] and len(set(storages[0].values())) == 9

    def test_shared_module_has_the_attributes_of_the_block_that_it_is(self, llama: Path):
        skeleton = open_skeleton(llama)
        for loaded in streamed_blocks(skeleton, [2, 0, 1]):
            assert loaded.module.self_attn.layer_idx == loaded.index
        assert [block.self_attn.layer_idx for block in skeleton.blocks] == [0, 1, 2]

    def test_skeletons_own_blocks_stay_without_weights(self, llama: Path):
        skeleton = open_skeleton(llama)
        for _ in streamed_blocks(skeleton, range(3)):
            assert all(is_on_meta(block) for block in skeleton.blocks)

    def test_what_was_done_to_a_block_is_gone_in_the_next(self, llama: Path):
        expected = [state for _, state in streamed(open_skeleton(llama), range(3))]
        for loaded in streamed_blocks(open_skeleton(llama), range(3)):
            state = loaded.module.state_dict()
            assert [name for name in state if not torch.equal(state[name], expected[loaded.index][name])] == []
            for parameter in loaded.module.parameters():
                parameter.data.fill_(torch.nan)

    def test_source_of_a_used_block_is_freed_before_the_next_is_waited_for(self, llama: Path):
        used: list[weakref.ref] = []
        left = []

        @contextmanager
        def waiting() -> Iterator[None]:
            left.append(sum(reference() is not None for reference in used))
            yield

        for loaded in streamed_blocks(open_skeleton(llama), range(3), waiting=waiting):
            used += [weakref.ref(tensor) for tensor in loaded.source.values()]
            del loaded
        assert len(used) == 27 and left == [0, 0, 0]

    def test_blocks_of_other_shapes_have_a_module_of_their_own(self, tmp_path: Path):
        skeleton = open_skeleton(tiny.save_model(tmp_path, TWO_KINDS))
        modules, channels = [], []
        for loaded in streamed_blocks(skeleton, range(4)):
            modules.append(loaded.module)
            channels.append(loaded.module.self_attn.q_proj.out_features)
            stored = {name: tensor.float() for name, tensor in read_weights(skeleton, loaded.plan, CPU).items()}
            state = loaded.module.state_dict()
            assert state.keys() == stored.keys()
            assert [name for name in stored if not torch.equal(state[name], stored[name])] == []
        assert channels == [32, 64, 32, 64]
        assert modules[0] is modules[2] and modules[1] is modules[3] and modules[0] is not modules[1]

    def test_waiting_is_entered_once_a_block(self, llama: Path):
        entered = []

        @contextmanager
        def waiting() -> Iterator[None]:
            entered.append(len(entered))
            yield

        for loaded in streamed_blocks(open_skeleton(llama), range(3), waiting=waiting):
            assert entered == list(range(loaded.index + 1))

    def test_next_block_is_read_while_one_is_in_use(self, llama: Path, monkeypatch: pytest.MonkeyPatch):
        skeleton = open_skeleton(llama)
        started: list[str] = []
        second_is_read = threading.Event()
        last_of_second = list(skeleton.block_tensors(1).values())[-1].name

        def noted(source: WeightSource, tensor: SourceTensor, *how: bool) -> Tensor:
            started.append(tensor.name)
            values = read(source, tensor, *how)
            if tensor.name == last_of_second:
                second_is_read.set()
            return values

        read = WeightSource.read
        monkeypatch.setattr(WeightSource, "read", noted)
        blocks = streamed_blocks(skeleton, range(3))
        next(blocks)
        assert second_is_read.wait(timeout=10), "block 1 was not read while block 0 was in use"
        assert not any(name.startswith("model.layers.2.") for name in started), "more than one block was read ahead"
        blocks.close()

    def test_damaged_block_stops_the_stream_only_when_it_is_reached(self, copied: Path):
        skeleton = open_skeleton(copied)
        [info] = skeleton.block_tensors(2)["mlp.down_proj.weight"].stored
        with open(info.file, "r+b") as file:
            file.truncate(info.offset + 10)
        blocks = streamed_blocks(skeleton, range(3))
        assert [next(blocks).index, next(blocks).index] == [0, 1]
        with pytest.raises(CheckpointError) as caught:
            next(blocks)
        assert str(info.file) in str(caught.value) and "truncated inside tensor model.layers.2." in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_value_that_is_not_finite_is_named_with_its_place(self, copied: Path, value: float):
        info = open_skeleton(copied).source.index["model.layers.1.self_attn.v_proj.weight"]
        tensors = load_file(info.file)
        tensors[info.name][5, 7] = value
        save_file(tensors, info.file)
        blocks = streamed_blocks(open_skeleton(copied), range(3))
        next(blocks)
        with pytest.raises(CheckpointError) as caught:
            next(blocks)
        assert f"{info.file}: tensor {info.name} holds {value} at [5, 7]" in str(caught.value)
        assert "\n" not in str(caught.value)


class TestReadSource:
    def test_what_is_no_parameter_may_be_infinite(self, copied: Path):
        info = open_skeleton(copied).source.index["model.norm.weight"]
        tensors = load_file(info.file)
        save_file({**tensors, "model.limit": torch.full((2,), -torch.inf)}, info.file)
        listed = json.loads((copied / INDEX_FILE).read_text())
        listed["weight_map"]["model.limit"] = info.file.name
        (copied / INDEX_FILE).write_text(json.dumps(listed))
        skeleton = open_skeleton(copied)
        with pytest.raises(CheckpointError, match=r"tensor model\.limit holds -inf at \[0\]"):
            check_outside(skeleton)
        skeleton = open_skeleton(copied)
        model = skeleton.model.model
        model.register_buffer("limit", torch.empty(2, device="meta"))
        skeleton.tensors["model.limit"] = skeleton.source.tensors["model.limit"]
        check_outside(skeleton)
        with materialised(skeleton, model, "model", CPU):
            assert model.limit.tolist() == [-torch.inf] * 2

    def test_bytes_are_those_of_the_first_time(self, copied: Path):
        skeleton = open_skeleton(copied)
        for _ in streamed_blocks(skeleton, [0, 1]):
            pass
        info = skeleton.source.index["model.layers.1.mlp.up_proj.weight"]
        with open(info.file, "r+b") as file:
            file.seek(info.offset)
            file.write(b"\x01")
        blocks = streamed_blocks(skeleton, [0, 1])
        assert next(blocks).index == 0
        with pytest.raises(CheckpointError, match=f"{info.file}: tensor {info.name} is not what it was"):
            next(blocks)
        assert len(list(streamed_blocks(open_skeleton(copied), [0, 1]))) == 2


class TestMaterialised:
    def test_tied_tensor_is_held_once_and_gone_afterwards(self, llama: Path):
        skeleton = open_skeleton(llama)
        with materialised(skeleton, skeleton.model, "", CPU):
            head, embedding = skeleton.model.lm_head.weight, skeleton.model.model.embed_tokens.weight
            stored = load_file(skeleton.tensor("lm_head.weight").file)["model.embed_tokens.weight"]
            assert torch.equal(head, stored.float())
            assert head.data_ptr() == embedding.data_ptr()
        assert is_on_meta(skeleton.model)

    def test_unread_tensor_takes_no_memory(self, llama: Path):
        skeleton = open_skeleton(llama)
        name = "model.embed_tokens.weight"
        with materialised(skeleton, skeleton.model.model, "model", CPU, unread=frozenset([name])):
            embedding = skeleton.model.model.embed_tokens.weight
            assert embedding.shape == (300, 64) and not embedding.any()
            assert embedding.untyped_storage().nbytes() <= 8

    def test_everything_leaves_memory_after_an_error(self, llama: Path):
        skeleton = open_skeleton(llama)
        with pytest.raises(KeyError), materialised(skeleton, skeleton.model.model, "model", CPU):
            raise KeyError
        assert is_on_meta(skeleton.model)


class TestBuffers:
    """Limits that are not there are stored as infinite; a parameter that is infinite, or any NaN, is damage."""

    @staticmethod
    def limited(folder: Path, value: float) -> Skeleton:
        """A skeleton with a buffer that the checkpoint stores, in the model and in its first block."""
        names = ("model.limit", "model.layers.0.limit")
        listed = json.loads((folder / INDEX_FILE).read_text())
        listed["weight_map"] |= dict.fromkeys(names, "limits.safetensors")
        (folder / INDEX_FILE).write_text(json.dumps(listed))
        save_file({name: torch.full((64,), value) for name in names}, folder / "limits.safetensors")
        skeleton = open_skeleton(folder)
        for owner in (skeleton.model.model, skeleton.blocks[0]):
            owner.register_buffer("limit", torch.zeros(64, device="meta"))
        skeleton.tensors.update({name: skeleton.source.tensors[name] for name in names})
        return skeleton

    @pytest.mark.parametrize("in_block", [True, False])
    @pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
    def test_buffer_may_be_infinite(self, copied: Path, value: float, in_block: bool):
        limited = self.limited(copied, value)

        def limit() -> Tensor:
            if in_block:
                return next(streamed_blocks(limited, [0])).module.limit
            with materialised(limited, limited.model.model, "model", CPU):
                return limited.model.model.limit

        if value == value:
            assert torch.equal(limit(), torch.full((64,), value))
            return
        with pytest.raises(CheckpointError, match="limit holds nan"):
            limit()


class TestFill:
    def test_tensors_are_handed_over(self, llama: Path):
        skeleton = open_skeleton(llama)
        tensors = read_weights(skeleton, block_plans(skeleton)[0], CPU)
        fill(skeleton.model, skeleton.blocks[0], tensors, CPU)
        assert tensors == {} and not is_on_meta(skeleton.blocks[0])

    def test_storage_that_is_there_is_overwritten_in_place(self, llama: Path):
        skeleton = open_skeleton(llama)
        first, second = (read_weights(skeleton, block, CPU) for block in block_plans(skeleton)[:2])
        fill(skeleton.model, skeleton.blocks[0], first, CPU)
        before = {name: tensor.data_ptr() for name, tensor in skeleton.blocks[0].named_parameters()}
        expected = {name: tensor.float() for name, tensor in second.items()}
        fill(skeleton.model, skeleton.blocks[0], second, CPU)
        assert second == {}
        assert {name: tensor.data_ptr() for name, tensor in skeleton.blocks[0].named_parameters()} == before
        assert all(torch.equal(tensor, expected[name]) for name, tensor in skeleton.blocks[0].named_parameters())

    def test_integer_buffer_keeps_its_dtype(self, llama: Path):
        module = nn.Module()
        module.register_buffer("count", torch.zeros(2, dtype=torch.int64, device="meta"))
        fill(open_skeleton(llama).model, module, {"count": torch.tensor([3, 4])}, CPU)
        assert module.count.tolist() == [3, 4] and module.count.dtype == torch.int64

    def test_buffer_that_nobody_initialises_is_refused_by_name(self, llama: Path):
        module = nn.Module()
        module.inner = nn.Module()
        module.inner.register_buffer("frequencies", torch.zeros(2, device="meta"), persistent=False)
        with pytest.raises(UnsupportedModelError) as caught:
            fill(open_skeleton(llama).model, module, {}, CPU)
        assert "LlamaForCausalLM: buffer inner.frequencies" in str(caught.value) and "\n" not in str(caught.value)
