"""What is quantized and which file holds what, decided before any work."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from shardq.config import QuantOptions
from shardq.errors import ConfigError
from shardq.model.block import BlockPlan
from shardq.model.skeleton import open_skeleton
from shardq.rundir import plan as plan_module
from shardq.rundir.folder import RunFolder
from shardq.rundir.plan import ENCODINGS, Plan, make_plan

SOURCE = QuantOptions()


def source_names(folder: Path) -> list[str]:
    """Names of all tensors in all shards, as the safetensors library lists them."""
    names: list[str] = []
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            names += file.keys()
    return names


def written_names(folder: Path) -> Counter[str]:
    """How often the output's files hold each tensor: those of the blocks and those of the rest."""
    skeleton = open_skeleton(folder)
    plan = make_plan(skeleton, SOURCE)
    blocks = [info.name for number in range(plan.num_blocks) for info in skeleton.block_tensors(number).values()]
    return Counter(blocks + [info.name for group in plan.rest for info in group])


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Store one more tensor in the last shard."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = sorted(folder.glob("*.safetensors"))[-1]
    save_file(load_file(shard) | {name: tensor}, shard)
    index["weight_map"][name] = shard.name
    index_path.write_text(json.dumps(index))


class TestGroupSize:
    @pytest.mark.parametrize("group_size", [None, -1, 2, 32, 64])
    def test_divisor_of_every_input_size_is_accepted(self, llama: Path, group_size: int | None):
        plan = make_plan(open_skeleton(llama), QuantOptions(group_size=group_size))
        assert [len(block.grids) for block in plan.blocks] == [7, 7, 7]

    @pytest.mark.parametrize(
        ("group_size", "channels", "name"),
        [(48, 64, "model.layers.0.self_attn.q_proj"), (128, 64, "model.layers.0.self_attn.q_proj")],
    )
    def test_group_that_does_not_divide_is_refused_by_the_linears_name(
        self, llama: Path, group_size: int, channels: int, name: str
    ):
        with pytest.raises(ConfigError) as caught:
            make_plan(open_skeleton(llama), QuantOptions(group_size=group_size))
        message = str(caught.value)
        assert message.startswith(f"quant.group_size: {group_size} does not divide the {channels} input channels of")
        assert f"{name};" in message and "\n" not in message

    def test_linear_of_another_input_size_is_found(self, tmp_path: Path):
        folder = tiny.save_llama(tmp_path, num_blocks=1, intermediate_size=96)
        with pytest.raises(ConfigError, match="64 does not divide the 96 input channels of model.layers.0.mlp.down_pr"):
            make_plan(open_skeleton(folder), QuantOptions(group_size=64))

    def test_ignored_linear_need_not_be_divisible(self, tmp_path: Path):
        folder = tiny.save_llama(tmp_path, num_blocks=1, intermediate_size=96)
        plan = make_plan(open_skeleton(folder), QuantOptions(group_size=64, ignore="down_proj"))
        names = [matrix.name for matrix in plan.blocks[0].grids]
        assert len(names) == 6 and "mlp.down_proj" not in names


class TestFiles:
    def test_shards_are_the_blocks_then_the_rest_numbered_as_transformers_does(self, llama: Path):
        plan = make_plan(open_skeleton(llama), SOURCE)
        expected = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
        assert plan.shards() == expected
        assert [plan.block_shard(number) for number in range(3)] + [plan.rest_shard(0)] == expected

    def test_names_stay_in_order_beyond_ten_thousand(self):
        blocks = [BlockPlan(index=number, name="x", is_last=False) for number in range(10_000)]
        plan = Plan(blocks=blocks, rest=[[], []])
        assert plan.block_shard(9_999) == "model-10000-of-10002.safetensors"
        assert plan.rest_shard(1) == "model-10002-of-10002.safetensors" == plan.shards()[-1]
        assert sorted(plan.shards()) == plan.shards()

    def test_every_block_has_its_own_files(self):
        folder = RunFolder(Path("o"))
        files = [folder.block(block) for block in range(12)]
        files += [folder.encodings(version, block) for version in ENCODINGS for block in (None, *range(12))]
        assert len(set(files)) == 38
        assert folder.block(7) == Path("o/blocks/block-00007.safetensors")
        assert folder.encodings("1.0.0", 7) == Path("o/encodings/block-00007.json")


class TestRest:
    @pytest.mark.parametrize("tied", [True, False])
    def test_every_tensor_of_the_source_is_written_once(self, tmp_path: Path, tied: bool):
        folder = tiny.save_llama(tmp_path, tied=tied)
        names = source_names(folder)
        assert ("lm_head.weight" in names) == (not tied)
        assert written_names(folder) == Counter(names)

    @pytest.mark.parametrize("name", ["model.layers.1.self_attn.rotary_emb.inv_freq", "extra.head.weight"])
    def test_tensor_that_no_code_uses_is_kept(self, llama: Path, tmp_path: Path, name: str):
        folder = shutil.copytree(llama, tmp_path / "model")
        add_tensor(folder, name, torch.ones(8))
        assert written_names(folder) == Counter(source_names(folder))
        assert written_names(folder)[name] == 1

    def test_groups_keep_the_order_and_the_size_of_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        folder = tiny.save_llama(tmp_path, tied=False)
        whole = [info for group in make_plan(open_skeleton(folder), SOURCE).rest for info in group]
        # Embedding and head take 300 x 64 x 2 bytes each, the norm 128: so only the norm finds room beside another.
        limit = 300 * 64 * 2 + 128
        monkeypatch.setattr(plan_module, "REST_SHARD_BYTES", limit)
        plan = make_plan(open_skeleton(folder), SOURCE)
        assert len(plan.rest) == 2 and plan.num_shards == 5
        assert [info for group in plan.rest for info in group] == whole
        assert all(sum(info.num_bytes for info in group) <= limit for group in plan.rest)

    def test_tensor_larger_than_a_file_has_one_for_itself(self, llama: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(plan_module, "REST_SHARD_BYTES", 1)
        plan = make_plan(open_skeleton(llama), SOURCE)
        assert sorted(info.name for group in plan.rest for info in group) == [
            "model.embed_tokens.weight", "model.norm.weight",
        ]  # fmt: skip
        assert [len(group) for group in plan.rest] == [1, 1]
