"""Which graphs are traced, and what is refused; that they compute the model is tests/e2e/test_onnx.py's to show."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, Mamba2Config, PretrainedConfig, Qwen2Config

import tiny
from shardq.errors import UnsupportedModelError
from shardq.model import graph
from shardq.model.graph import traced_parts
from shardq.model.skeleton import open_skeleton

SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
# Windows longer than the traced example, in which they do not show.
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] + ["sliding_attention"] * 2}
ALTERNATING = [
    Gemma3TextConfig(**SHAPE, **SLIDING, head_dim=8),  # other masks, and other frequencies
    Qwen2Config(**SHAPE, **SLIDING, use_sliding_window=True),  # other masks alone
]


def count_traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the blocks' classes that are traced from now on; nothing is exported."""
    traced: list[str] = []

    def trace(part: nn.Module, *more: object) -> graph.ir.Model:
        traced.append("end" if part.block is None else f"block {part._block_index}")
        return graph.ir.Model(graph.ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)

    monkeypatch.setattr(graph, "_trace", trace)
    return traced


@pytest.mark.parametrize("config", ALTERNATING, ids=lambda config: config.model_type)
def test_blocks_that_compute_alike_are_traced_once(config: PretrainedConfig, tmp_path: Path, monkeypatch):
    traced = count_traces(monkeypatch)
    skeleton = open_skeleton(tiny.save_model(tmp_path, config))
    parts = list(traced_parts(skeleton, 21))
    assert [name for name, _, _ in parts] == ["embedding", *(f"block-{n:05d}" for n in range(4)), "head"]
    assert [index for _, index, _ in parts] == [None, 0, 1, 2, 3, None]
    assert traced == ["end", "block 0", "block 1", "end"]


def test_a_block_that_looks_at_its_place_is_traced_by_itself(llama: Path, monkeypatch: pytest.MonkeyPatch):
    traced = count_traces(monkeypatch)
    skeleton = open_skeleton(llama)
    own = type(skeleton.blocks[0].mlp).forward
    monkeypatch.setattr(type(skeleton.blocks[0].mlp), "forward", lambda mlp, x: own(mlp, x) * (1 + (mlp is last)))
    last = skeleton.blocks[2].mlp
    list(traced_parts(skeleton, 21))
    assert traced == ["end", "block 0", "block 2", "end"]


def test_what_the_exporter_cannot_take_is_refused_by_name(llama: Path, monkeypatch: pytest.MonkeyPatch):
    skeleton = open_skeleton(llama)

    def looks_at_values(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x if x.device.type == "meta" or x.sum() > 0 else -x

    monkeypatch.setattr(type(skeleton.blocks[0].mlp), "forward", looks_at_values)
    with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer: torch's ONNX exporter cannot take it"):
        list(traced_parts(skeleton, 21))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.slow  # the exporter takes long
def test_a_block_whose_number_of_tokens_the_exporter_fixes_is_refused(tmp_path: Path):
    config = Mamba2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=1,
        chunk_size=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="^Mamba2Block: torch's ONNX exporter fixes the number of tokens"):
        list(traced_parts(open_skeleton(tiny.save_model(tmp_path, config)), 21))
