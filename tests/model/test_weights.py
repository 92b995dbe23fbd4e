"""Weights in and out of the skeleton: right values, one block at a time, the next one read ahead."""

import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.shards import TensorInfo, read_weight
from shardq.model import weights
from shardq.model.skeleton import open_skeleton
from shardq.model.weights import fill, materialised, stream_blocks

CPU = torch.device("cpu")


def is_on_meta(module: nn.Module) -> bool:
    """Whether nothing of a module is in memory."""
    return all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(llama, tmp_path / "model")


class TestStreamBlocks:
    def test_blocks_hold_the_stored_weights_in_float32(self, llama: Path):
        reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()
        seen = {}
        for block_index, block in stream_blocks(open_skeleton(llama), range(3), CPU):
            seen |= {f"model.layers.{block_index}.{name}": tensor for name, tensor in block.state_dict().items()}
        expected = {name: tensor for name, tensor in reference.items() if ".layers." in name}
        assert seen.keys() == expected.keys()
        assert all(tensor.dtype == torch.float32 for tensor in seen.values())
        assert [name for name in seen if not torch.equal(seen[name], expected[name])] == []

    def test_only_the_asked_blocks_come_in_the_asked_order(self, llama: Path):
        assert [number for number, _ in stream_blocks(open_skeleton(llama), [2, 0], CPU)] == [2, 0]

    def test_weights_are_frozen(self, llama: Path):
        _, block = next(stream_blocks(open_skeleton(llama), range(1), CPU))
        assert not any(parameter.requires_grad for parameter in block.parameters())

    def test_one_block_is_in_memory_at_a_time(self, llama: Path):
        skeleton = open_skeleton(llama)
        for block_index, _ in stream_blocks(skeleton, range(3), CPU):
            assert [not is_on_meta(block) for block in skeleton.blocks] == [n == block_index for n in range(3)]
        assert all(is_on_meta(block) for block in skeleton.blocks)

    def test_memory_of_a_used_block_is_freed(self, llama: Path):
        blocks = stream_blocks(open_skeleton(llama), range(2), CPU)
        _, block = next(blocks)
        used = [weakref.ref(parameter.untyped_storage()) for parameter in block.parameters()]
        used_parameters = [weakref.ref(parameter) for parameter in block.parameters()]
        next(blocks)
        assert [ref() for ref in used_parameters] == [None] * len(used_parameters)
        assert [ref() for ref in used] == [None] * len(used)

    def test_next_block_is_read_while_one_is_in_use(self, llama: Path, monkeypatch: pytest.MonkeyPatch):
        skeleton = open_skeleton(llama)
        started: list[str] = []
        second_is_read = threading.Event()
        last_of_second = list(skeleton.block_tensors(1).values())[-1].name

        def noted(info: TensorInfo) -> torch.Tensor:
            started.append(info.name)
            tensor = read_weight(info)
            if info.name == last_of_second:
                second_is_read.set()
            return tensor

        monkeypatch.setattr(weights, "read_weight", noted)
        blocks = stream_blocks(skeleton, range(3), CPU)
        next(blocks)
        assert second_is_read.wait(timeout=10), "block 1 was not read while block 0 was in use"
        assert not any(name.startswith("model.layers.2.") for name in started), "more than one block was read ahead"
        blocks.close()

    def test_damaged_block_stops_the_stream_only_when_it_is_reached(self, copied: Path):
        skeleton = open_skeleton(copied)
        info = skeleton.block_tensors(2)["mlp.down_proj.weight"]
        with open(info.file, "r+b") as file:
            file.truncate(info.offset + 10)
        blocks = stream_blocks(skeleton, range(3), CPU)
        assert [next(blocks)[0], next(blocks)[0]] == [0, 1]
        with pytest.raises(CheckpointError) as caught:
            next(blocks)
        assert str(info.file) in str(caught.value) and "truncated inside tensor model.layers.2." in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_value_that_is_not_finite_is_named_with_its_place(self, copied: Path, value: float):
        info = open_skeleton(copied).index["model.layers.1.self_attn.v_proj.weight"]
        tensors = load_file(info.file)
        tensors[info.name][5, 7] = value
        save_file(tensors, info.file)
        blocks = stream_blocks(open_skeleton(copied), range(3), CPU)
        next(blocks)
        with pytest.raises(CheckpointError) as caught:
            next(blocks)
        assert f"{info.file}: tensor {info.name} holds {value} at [5, 7]" in str(caught.value)
        assert "\n" not in str(caught.value)


class TestMaterialised:
    def test_tied_tensor_is_held_once_and_gone_afterwards(self, llama: Path):
        skeleton = open_skeleton(llama)
        with materialised(skeleton, skeleton.model, "", CPU):
            head, embedding = skeleton.model.lm_head.weight, skeleton.model.model.embed_tokens.weight
            stored = load_file(skeleton.stored("lm_head.weight").file)["model.embed_tokens.weight"]
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


class TestFill:
    def test_tensors_are_handed_over(self, llama: Path):
        skeleton = open_skeleton(llama)
        tensors = {name: read_weight(info) for name, info in skeleton.block_tensors(0).items()}
        fill(skeleton.model, skeleton.blocks[0], tensors, CPU)
        assert tensors == {} and not is_on_meta(skeleton.blocks[0])

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
