"""Which matrices of the blocks are quantized, and what is said of patterns that choose none."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from transformers import Zamba2Config

import tiny
from shardq.errors import ConfigError, UnsupportedModelError
from shardq.matrix import is_linear
from shardq.model.choice import matrices_to_quantize, shared_linears
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.quant.options import DEFAULT_IGNORE
from tests.families.tiny_config import tiny_config

LINEARS = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip


def chosen(skeleton: Skeleton, ignore: tuple[str, ...]) -> list[list[str]]:
    """Names of the matrices chosen in each block."""
    return [[matrix.name for matrix in matrices] for matrices in matrices_to_quantize(skeleton, ignore)]


def test_matrices_know_their_shape(llama: Path):
    skeleton = open_skeleton(llama)
    for number, matrices in enumerate(matrices_to_quantize(skeleton, DEFAULT_IGNORE)):
        for matrix in matrices:
            assert matrix.shape == skeleton.source.tensors[f"model.layers.{number}.{matrix.name}.weight"].shape


def test_weights_that_blocks_share_stay_in_float_and_are_stored_once(tmp_path: Path):
    config = Zamba2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        layers_block_type=["linear_attention", "hybrid"] * 2, hybrid_layer_ids=[1, 3], mamba_d_state=8,
        n_mamba_heads=4, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1,
    )  # fmt: skip
    skeleton = open_skeleton(tiny.save_model(tmp_path, config))
    of_mamba = ["mamba.in_proj", "mamba.out_proj"]
    of_hybrid = ["linear", *(f"mamba_decoder.{name}" for name in of_mamba)]
    assert chosen(skeleton, DEFAULT_IGNORE) == [of_mamba, of_hybrid, of_mamba, of_hybrid]
    shared = [f"{name}.weight" for name in shared_linears(skeleton)]
    assert len(shared) == 10 and all(name.startswith("model.layers.1.shared_transformer.") for name in shared)
    held = [tensor.name for number in range(4) for tensor in skeleton.held_tensors(number).values()]
    assert len(held) == len(set(held)) and set(shared) <= set(held)


@pytest.mark.parametrize(
    ("family", "left"),
    [("qwen2_moe", "mlp.shared_expert_gate"), ("phimoe", "mlp.router"), ("afmoe", "mlp.router.gate")],
)
def test_linears_that_weigh_experts_are_not_quantized(tmp_path: Path, family: str, left: str):
    skeleton = open_skeleton(tiny.save_model(tmp_path, tiny_config(family)))
    names = {name for name, module in skeleton.blocks[-1].named_modules() if is_linear(module)}
    assert names - set(chosen(skeleton, ())[-1]) == {left}


class TestIgnore:
    """Expected choices are written out by hand from the names of a Llama block's linears."""

    @pytest.mark.parametrize(
        ("patterns", "left_out"),
        [
            ((), []),
            (("mlp.down_proj",), ["mlp.down_proj"]),
            (("down_proj",), ["mlp.down_proj"]),
            (("*.down_proj",), ["mlp.down_proj"]),
            (("mlp.*",), ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
            (("[qk]_proj",), ["self_attn.q_proj", "self_attn.k_proj"]),
            (("re:.*(gate|up)_proj",), ["mlp.gate_proj", "mlp.up_proj"]),
            (("o_proj", "re:self_attn[.]v.*"), ["self_attn.v_proj", "self_attn.o_proj"]),
        ],
    )
    def test_pattern_holds_in_every_block(self, llama: Path, patterns: tuple[str, ...], left_out: list[str]):
        found = chosen(open_skeleton(llama), (*DEFAULT_IGNORE, *patterns))
        assert found == [[name for name in LINEARS if name not in left_out]] * 3

    @pytest.mark.parametrize("pattern", ["model.layers.1.mlp.up_proj", "*.1.mlp.up_proj", r"re:.*\.1\.mlp\.up_proj"])
    def test_full_name_holds_in_its_block_alone(self, llama: Path, pattern: str):
        without = [name for name in LINEARS if name != "mlp.up_proj"]
        assert chosen(open_skeleton(llama), (pattern,)) == [LINEARS, without, LINEARS]

    def test_block_may_be_left_out_whole(self, llama: Path):
        assert chosen(open_skeleton(llama), ("model.layers.0.*",)) == [[], LINEARS, LINEARS]

    @pytest.mark.parametrize("pattern", ["donw_proj", "proj", "re:down", "DOWN_PROJ", "layers.1.mlp.up_proj"])
    def test_pattern_that_matches_nothing_is_refused(self, llama: Path, pattern: str):
        with pytest.raises(ConfigError) as caught:
            chosen(open_skeleton(llama), ("down_proj", pattern))
        message = str(caught.value)
        assert f"quant.ignore: {pattern!r} matches no linear" in message and "\n" not in message
        assert "model.layers.0.self_attn.q_proj" in message, "an example of a name is missing"

    def test_nothing_left_to_quantize_is_refused(self, llama: Path):
        with pytest.raises(UnsupportedModelError, match="^LlamaForCausalLM: no linear .*quant.ignore.*[*]_proj"):
            chosen(open_skeleton(llama), ("*_proj",))

    def test_blocks_without_linears_are_refused(self, llama: Path):
        skeleton = replace(open_skeleton(llama), blocks=[nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)])
        with pytest.raises(UnsupportedModelError) as caught:
            chosen(skeleton, DEFAULT_IGNORE)
        message = str(caught.value)
        assert "LlamaForCausalLM: no linear would be quantized" in message and "other kinds (Conv1d)" in message
        assert "\n" not in message

    def test_pattern_that_is_no_regular_expression_is_refused(self, llama: Path):
        with pytest.raises(ConfigError, match=r"^quant.ignore: 're:\('"):
            chosen(open_skeleton(llama), ("re:(",))
