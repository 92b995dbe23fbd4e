"""GPTQ tensors, taken apart bit by bit as the format describes them, give back the grid points."""

import re

import pytest
import torch

import tiny
from shardq.errors import ConfigError
from shardq.formats.gptq import check_grid, linear_tensors, quantization_config
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

SHAPE = (32, 96)


def numbers(words: torch.Tensor, bits: int) -> list[int]:
    """The unsigned numbers that lie in a run of int32 words, the first in the lowest bits."""
    whole = sum((word % 2**32) << (32 * place) for place, word in enumerate(words.tolist()))
    return [(whole >> (bits * place)) % 2**bits for place in range(len(words) * 32 // bits)]


def unpacked(tensors: dict[str, torch.Tensor], config: dict) -> torch.Tensor:
    """The weight [O, I] by the format's description, one element after the other."""
    bits, zeros_less_one = config["bits"], config["checkpoint_format"] == "gptq"
    codes = [numbers(column, bits) for column in tensors["l.qweight"].T]
    zero_points = [numbers(row, bits) for row in tensors["l.qzeros"]]
    groups, scales = tensors["l.g_idx"].tolist(), tensors["l.scales"]
    return torch.stack([
        torch.stack([
            (code - (zero_points[group][output] + zeros_less_one)) * scales[group, output]
            for code, group in zip(row, groups, strict=True)
        ])
        for output, row in enumerate(codes)
    ])  # fmt: skip


@pytest.mark.parametrize("group_size", [None, 32], ids=["channel", "group"])
@pytest.mark.parametrize("kind", ["symmetric", "full_range", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tensors_hold_the_grid_points(bits: int, kind: str, group_size: int | None):
    grid = IntegerGrid(
        bits=bits, symmetric=kind != "asymmetric", full_range=kind == "full_range", group_size=group_size
    )
    check_grid(grid)
    linear = tiny.random_linear(grid, SHAPE)
    tensors, config = linear_tensors("l", linear, torch.float32), quantization_config(grid, [])
    assert torch.equal(unpacked(tensors, config), linear.dequantized())
    num_groups = 96 // (group_size or 96)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "l.qweight": ((96 * bits // 32, 32), torch.int32), "l.qzeros": ((num_groups, 32 * bits // 32), torch.int32),
        "l.scales": ((num_groups, 32), torch.float32), "l.g_idx": ((96,), torch.int32),
    }  # fmt: skip
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert (config["sym"], config["group_size"]) == (kind != "asymmetric", group_size or -1)
    assert (tensors["l.scales"] < 0).any() == (kind == "full_range")


def test_three_bits_straddle_words_as_autogptq_packs_them():
    """Its description: 10 codes a word, the 11th in bits 30 and 31 and bit 0 of the next, the 22nd in bit 31 and two
    of the third."""
    codes = torch.randint(0, 8, (1, 32))
    row = codes[0].tolist()
    words = [
        sum(row[place] << (3 * place) for place in range(10)) | (row[10] << 30) % 2**32,
        (row[10] >> 2) | sum(row[11 + place] << (3 * place + 1) for place in range(10)) | (row[21] << 31) % 2**32,
        (row[21] >> 1) | sum(row[22 + place] << (3 * place + 2) for place in range(10)),
    ]
    grid = IntegerGrid(bits=3)
    linear = QuantizedLinear((codes - 4).to(torch.int8).repeat(32, 1), torch.ones(32, 1), torch.zeros(32, 1), grid)
    assert [word % 2**32 for word in linear_tensors("l", linear, torch.float16)["l.qweight"][:, 0].tolist()] == words


def test_symmetric_zero_points_are_those_that_every_reader_expects():
    """Version 1 of 4 bits: 7 in every place."""
    tensors = linear_tensors("l", tiny.random_linear(IntegerGrid(bits=4), SHAPE), torch.float16)
    assert (tensors["l.qzeros"] == 0x77777777).all()


def test_linears_left_as_they_are_are_named():
    config = quantization_config(IntegerGrid(bits=4), ["lm_head", "model.layers.0.mlp.up_proj"])
    assert set(config["dynamic"]) == {r"-:^lm_head$", r"-:^model\.layers\.0\.mlp\.up_proj$"}


@pytest.mark.parametrize(
    ("parts", "fused"),
    [("q_proj k_proj v_proj", "qkv_proj"), ("up_proj gate_proj", "gate_up_proj"),
     ("q_a_proj kv_a_proj_with_mqa", "fused_qkv_a_proj")],
)  # fmt: skip
def test_linears_of_which_vllm_makes_one_are_named_as_that_too(parts: str, fused: str):
    names = [f"model.layers.0.x.{part}" for part in parts.split()]
    left = quantization_config(IntegerGrid(bits=4), ["y.o_proj", *names])["dynamic"]
    assert f"-:^{re.escape(f'model.layers.0.x.{fused}')}$" in left and len(left) == len(names) + 2
    assert not any(fused in name for name in quantization_config(IntegerGrid(bits=4), names[1:])["dynamic"])


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(ConfigError, match=f"gptq: {bits} bits"):
        check_grid(IntegerGrid(bits=bits))


@pytest.mark.parametrize("shape, kind", [((40, 64), "40 output"), ((32, 72), "72 input")])
def test_sizes_that_do_not_fill_words_are_refused_by_name(shape: tuple[int, int], kind: str):
    with pytest.raises(ConfigError, match=f"gptq: a.b has {kind} channels"):
        linear_tensors("a.b", tiny.random_linear(IntegerGrid(bits=4), shape), torch.float16)
