"""What transformers loads from a checkpoint is what is read of it, and goes back to the same places."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps, PermuteForRope, WeightConverter

import tiny
from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.source import open_source
from shardq.model import conversion
from shardq.model.build import build_on_meta
from shardq.model.conversion import layout_of
from shardq.model.layout import put_together, tensor_in
from shardq.model.skeleton import open_skeleton
from tests.families.tiny_config import tiny_config

# Experts each by itself, under other names, and fused; one matrix that the model splits, and several that it joins.
FAMILIES = ["mixtral", "qwen3_moe", "phimoe", "gpt_oss", "granitemoe", "hrm_text", "kimi_linear", "nemotron_h"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path, tiny_config(request.param), dtype=torch.float32)


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_values_are_those_that_transformers_loads_and_go_back(folder: Path):
    source, expected = open_source(folder), loaded(folder).state_dict()
    layout = layout_of(source, build_on_meta(folder))
    assert layout.keys() == expected.keys()
    read = {}
    for name, pieces in layout.items():
        read[name] = source.read(tensor_in(source.tensors, name, tuple(expected[name].shape), pieces))
        assert torch.equal(read[name], expected[name]), name
    of_source: dict[str, list] = {}
    for name, pieces in layout.items():
        for piece in pieces:
            of_source.setdefault(piece.source, []).append((piece.in_source, piece.in_model.of(read[name])))
    assert of_source.keys() == source.tensors.keys()
    for name, parts in of_source.items():
        stored = source.read(source.tensors[name])
        assert torch.equal(put_together(tuple(stored.shape), parts), stored), name


@pytest.mark.parametrize(("family", "are_joined"), [("qwen3_moe", True), ("gpt_oss", False)])
def test_what_is_stored_fused_is_read_in_parts_and_known_to_be_joined(tmp_path: Path, family: str, are_joined: bool):
    """Qwen3-MoE's rules join experts, and take fused ones as they are; gpt-oss has none."""
    shard = tiny.save_model(tmp_path, tiny_config(family), max_shard_size="1GB") / "model.safetensors"
    tensors = load_file(shard)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    if fused not in tensors:
        for number in range(tiny_config(family).num_hidden_layers):
            experts = f"model.layers.{number}.mlp.experts"
            taken = {name: [tensors.pop(f"{experts}.{n}.{name}_proj.weight") for n in range(4)]
                     for name in ("gate", "up", "down")}  # fmt: skip
            tensors[f"{experts}.gate_up_proj"] = torch.cat([torch.stack(taken["gate"]), torch.stack(taken["up"])], 1)
            tensors[f"{experts}.down_proj"] = torch.stack(taken["down"])
        save_file(tensors, shard, {"format": "pt"})
    skeleton = open_skeleton(tmp_path)
    read = skeleton.source.read(skeleton.tensor("model.layers.0.mlp.experts.2.up_proj.weight"))
    expected = tensors[fused][2].chunk(2)[1] if are_joined else tensors[fused][2][:, 1::2].t()
    assert torch.equal(read, expected) and skeleton.joins_experts == are_joined


def test_an_expert_that_is_missing_is_told(tmp_path: Path):
    folder = tiny.save_model(tmp_path, tiny_config("mixtral"), max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"of model.layers.1.mlp.experts.gate_up_proj there are 4 like .* 3 like"):
        open_skeleton(folder)
    for name in [name for name in tensors if "layers.1" in name and ".w2" in name][:2]:
        del tensors[name]
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"] = torch.ones(96, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\(2 like model.*w2.weight\) make \[2, .*config.json asks for \[4, "):
        open_skeleton(folder)


def test_rows_that_a_rule_permutes_are_read_permuted(llama: Path, monkeypatch: pytest.MonkeyPatch):
    rule = WeightConverter("q_proj.weight", "q_proj.weight", [PermuteForRope()])
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: [rule])
    skeleton, name = open_skeleton(llama), "model.layers.0.self_attn.q_proj.weight"
    stored, read = (skeleton.source.read(tensors[name]) for tensors in (skeleton.source.tensors, skeleton.tensors))
    made = PermuteForRope().convert({name: stored}, [name], [name], skeleton.model.config)
    assert torch.equal(read, made[name]) and not torch.equal(read, stored)
    (piece,) = skeleton.layout[name]
    assert torch.equal(put_together(tuple(stored.shape), [(piece.in_source, piece.in_model.of(read))]), stored)


class Doubled(ConversionOps):
    def convert(self, input_dict: dict, source_patterns: list, target_patterns: list, **kwargs: object) -> dict:
        return {target_patterns[0]: next(iter(input_dict.values()))[0] * 2}


def test_a_rule_that_changes_values_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch):
    rule = WeightConverter("q_proj.weight", "q_proj.weight", [Doubled()])
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: [rule])
    with pytest.raises(UnsupportedModelError, match="q_proj.weight of LlamaForCausalLM by Doubled, which is not"):
        open_skeleton(llama)
