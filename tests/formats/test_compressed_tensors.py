"""compressed-tensors' own decompressors, driven by the config that is written, give back the grid points."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig

import tiny
from shardq.errors import ConfigError
from shardq.formats.compressed_tensors import check_grid, linear_tensors, quantization_config
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

SHAPE = (40, 96)


def decompressed(linear: QuantizedLinear, activation_bits: int, dtype: torch.dtype) -> torch.Tensor:
    written = linear_tensors("a.b", linear, dtype, activation_bits)
    assert all(name.startswith("a.b.") for name in written)
    config = QuantizationConfig.model_validate(quantization_config(linear.grid, activation_bits, []))
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    state = {name.removeprefix("a.b."): tensor for name, tensor in written.items()}
    assert set(state) == set(compressor.compression_param_names(scheme))
    return compressor.decompress(state, scheme)["weight"]


@pytest.mark.parametrize("group_size", [None, 32], ids=["channel", "group"])
@pytest.mark.parametrize("kind", ["symmetric", "full_range", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_the_grid_points(bits: int, kind: str, group_size: int | None):
    grid = IntegerGrid(
        bits=bits, symmetric=kind != "asymmetric", full_range=kind == "full_range", group_size=group_size
    )
    linear = tiny.random_linear(grid, SHAPE, torch.bfloat16)
    assert torch.equal(decompressed(linear, 16, torch.float32), linear.dequantized())
    assert torch.equal(decompressed(linear, 16, torch.bfloat16), linear.dequantized().bfloat16())


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, None), (4, 32)])
def test_weights_beside_int8_activations_are_the_grid_points(bits: int, group_size: int | None):
    linear = tiny.random_linear(IntegerGrid(bits=bits, group_size=group_size), SHAPE, torch.bfloat16)
    assert torch.equal(decompressed(linear, 8, torch.float32), linear.dequantized())
    scheme = QuantizationConfig.model_validate(quantization_config(linear.grid, 8, ["lm_head"])).config_groups[
        "group_0"
    ]
    activations = scheme.input_activations
    assert (activations.num_bits, activations.strategy, activations.dynamic) == (8, "token", True)


@pytest.mark.parametrize("shape", [(40, 96), (33, 50)])
@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_the_librarys_own_packing(bits: int, shape: tuple[int, int]):
    linear = tiny.random_linear(IntegerGrid(bits=bits, symmetric=False), shape, torch.bfloat16)
    written = linear_tensors("l", linear, torch.bfloat16, 16)
    assert torch.equal(written["l.weight_packed"], pack_to_int32(linear.codes_OI, bits))
    assert torch.equal(written["l.weight_zero_point"], pack_to_int32(linear.zero_point_OG.char(), bits, packed_dim=0))


def test_packing_is_dense_and_little_endian_along_the_input_channels():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 2)[:, :20]  # 20 codes: two and a half words
    linear = QuantizedLinear(codes, torch.ones(2, 1), torch.zeros(2, 1), IntegerGrid(bits=4))
    words = linear_tensors("l", linear, torch.bfloat16, 16)["l.weight_packed"]
    row = sum((code + 8) << (4 * place) for place, code in enumerate(codes[0].tolist()))
    assert [word % 2**32 for word in words[0].tolist()] == [(row >> shift) % 2**32 for shift in (0, 32, 64)]


@pytest.mark.parametrize(
    "grid, activation_bits, reason",
    [
        (IntegerGrid(bits=3), 16, "3 bits"),
        (IntegerGrid(bits=8, symmetric=False), 8, "symmetric"),
        (IntegerGrid(bits=8, group_size=64), 8, "groups of 64"),
    ],
)
def test_grids_that_no_program_reads_are_refused(grid: IntegerGrid, activation_bits: int, reason: str):
    with pytest.raises(ConfigError, match=reason):
        check_grid(grid, activation_bits)
