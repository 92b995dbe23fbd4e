"""Quantized checkpoints open as the weights that the library, or the format's description element by element, gives."""

import json
from pathlib import Path

import pytest
import torch
from by_the_library import compressed
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

import tiny
from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats import compressed_tensors, gptq
from shardq.formats.quantized_source import open_checkpoint, rounds_activations
from shardq.formats.source import WeightSource
from shardq.quant.integer_grid import IntegerGrid

O, I = 40, 96  # noqa: E741


def opened(folder: Path, tensors: dict[str, torch.Tensor], scheme: dict) -> WeightSource:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    return open_checkpoint(folder)


def weight(source: WeightSource) -> torch.Tensor:
    """The weight of linear `l`, which must be the same by rows and as a whole."""
    tensor = source.tensors["l.weight"]
    values_OI = source.read(tensor)
    assert (tuple(values_OI.shape), values_OI.dtype) == (tensor.shape, source.read_unchecked(tensor).dtype)
    assert torch.equal(source.read_rows(tensor, [1, 7]), values_OI[[1, 7]])
    return values_OI


def library_folder(stored_as: str, symmetric: bool, bits: int, strategy: str) -> tuple[dict, dict, torch.Tensor]:
    """Tensors and config of what the library compresses, and what it decompresses."""
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None
    )
    shape = {"group": (O, I // 32), "channel": (O, 1), "tensor": (1,)}[strategy]
    generator = torch.Generator().manual_seed(bits)
    scale = (torch.rand(shape, generator=generator) * 0.01 + 0.001).bfloat16()
    state = {"weight": torch.randn(O, I, generator=generator).bfloat16() * 0.05, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-3, 4, shape, generator=generator).to(torch.int8)
    return compressed(args, stored_as, state)


class TestCompressedTensors:
    @pytest.mark.parametrize("strategy", ["group", "channel"])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_packed_weights_are_the_librarys(self, tmp_path: Path, bits: int, symmetric: bool, strategy: str):
        tensors, config, expected = library_folder("pack-quantized", symmetric, bits, strategy)
        found = weight(opened(tmp_path, tensors, config))
        assert found.dtype == expected.dtype and torch.equal(found, expected)

    @pytest.mark.parametrize("stored_as", ["int-quantized", "naive-quantized"])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("strategy", ["channel", "tensor"])
    def test_int8_weights_are_the_librarys(self, tmp_path: Path, strategy: str, symmetric: bool, stored_as: str):
        tensors, config, expected = library_folder(stored_as, symmetric, 8, strategy)
        assert torch.equal(weight(opened(tmp_path, tensors, config)), expected)

    def test_groups_tell_a_shape_that_is_not_stored(self, tmp_path: Path):
        tensors, config, expected = library_folder("pack-quantized", True, 4, "group")
        del tensors["l.weight_shape"]
        assert torch.equal(weight(opened(tmp_path, tensors, config)), expected)
        tensors, config, _ = library_folder("pack-quantized", True, 4, "channel")
        del tensors["l.weight_shape"]
        with pytest.raises(CheckpointError, match=r"l\.weight lacks its zero points or its shape"):
            opened(tmp_path, tensors, config)

    def test_order_of_activations_is_taken_from_the_file(self, tmp_path: Path):
        tensors, config, _ = library_folder("pack-quantized", True, 4, "group")
        plain = weight(opened(tmp_path, tensors, config)).float()
        scale_OG, order_I = tensors["l.weight_scale"].float(), torch.arange(I) % 3
        codes_OI = plain / scale_OG.repeat_interleave(32, 1)
        found = weight(opened(tmp_path, tensors | {"l.weight_g_idx": order_I.int()}, config))
        torch.testing.assert_close(found.float(), codes_OI * scale_OG[:, order_I], rtol=0.01, atol=0)
        with pytest.raises(CheckpointError, match=r"l\.weight: an input channel is of none of the 3 groups"):
            weight(opened(tmp_path, tensors | {"l.weight_g_idx": order_I.int() - 1}, config))

    @pytest.mark.parametrize(
        "changed, named",
        [
            ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
            ({"transform_config": {"R1": {}}}, "transform_config"),
            ({"format": "mxfp6-packed", "config_groups": {"g": {"weights": {"type": "float", "num_bits": 6}}}},
             "float6 by None, mxfp6-packed"),
            ({"format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 3, "strategy": "group"}}}},
             "int3 by group, pack-quantized"),
            ({"config_groups": None}, "describes no weights"),
            ({"config_groups": {"group_0": {"weights": 4}}}, "describes no weights"),
        ],
    )  # fmt: skip
    def test_what_is_not_read_is_named(self, tmp_path: Path, changed: dict, named: str):
        tensors, config, _ = library_folder("pack-quantized", True, 4, "group")
        with pytest.raises(UnsupportedModelError, match=named):
            opened(tmp_path, tensors, config | changed)

    def test_damage_is_named(self, tmp_path: Path):
        tensors, config, _ = library_folder("pack-quantized", False, 4, "group")
        with pytest.raises(CheckpointError, match=r"l\.weight lacks its zero points"):
            opened(tmp_path, {name: one for name, one in tensors.items() if "zero" not in name}, config)
        with pytest.raises(CheckpointError, match=r"l\.weight do not fit"):
            opened(tmp_path, tensors | {"l.weight_packed": tensors["l.weight_packed"][:, :-1]}, config)
        with pytest.raises(CheckpointError, match=r"l\.weight do not fit"):
            opened(tmp_path, tensors | {"l.weight_shape": torch.tensor([O])}, config)
        with pytest.raises(CheckpointError, match=r"l\.weight is stored encoded and plain"):
            opened(tmp_path, tensors | {"l.weight": torch.ones(O, I)}, config)
        with pytest.raises(CheckpointError, match="no tensor is quantized although config.json says compressed-tens"):
            opened(tmp_path, {"l.weight": torch.ones(O, I)}, config)

    def test_rounding_of_activations_is_told(self, tmp_path: Path):
        linear = tiny.random_linear(IntegerGrid(bits=8), (O, I), torch.bfloat16)
        for activation_bits in (8, 16):
            tensors = compressed_tensors.linear_tensors("l", linear, torch.bfloat16, activation_bits)
            config = compressed_tensors.quantization_config(linear.grid, activation_bits, [])
            assert torch.equal(weight(opened(tmp_path, tensors, config)), linear.dequantized().bfloat16())
            assert rounds_activations(tmp_path) == (activation_bits == 8)


class TestGptq:
    @pytest.mark.parametrize("group_size", [None, 32])
    @pytest.mark.parametrize("kind", ["symmetric", "full_range", "asymmetric"])
    @pytest.mark.parametrize("bits", gptq.BITS)
    def test_weights_are_the_grid_points(self, tmp_path: Path, bits: int, kind: str, group_size: int | None):
        grid = IntegerGrid(
            bits=bits, symmetric=kind != "asymmetric", full_range=kind == "full_range", group_size=group_size
        )
        linear = tiny.random_linear(grid, (32, I), torch.bfloat16)
        tensors = gptq.linear_tensors("l", linear, torch.bfloat16)
        found = weight(opened(tmp_path, tensors, gptq.quantization_config(grid, [])))
        assert torch.equal(found, linear.dequantized().bfloat16())

    @pytest.fixture
    def by_hand(self) -> dict[str, torch.Tensor]:
        """4 bits, all codes 5 and stored zero points 2, groups in an order of activations."""
        scales = torch.tensor([[0.5], [2.0]]).repeat(1, 32)
        return {"l.qweight": torch.full((4, 32), 0x55555555, dtype=torch.int32), "l.scales": scales,
                "l.qzeros": torch.full((2, 4), 0x22222222, dtype=torch.int32),
                "l.g_idx": (torch.arange(32) % 2).int()}  # fmt: skip

    @pytest.mark.parametrize("version, step", [("gptq", 2), ("gptq_v2", 3), (None, 2)])
    def test_order_of_activations_and_versions(self, tmp_path: Path, by_hand: dict, version: str | None, step: int):
        named = {"checkpoint_format": version} if version else {}
        found = weight(opened(tmp_path, by_hand, {"quant_method": "gptq", "desc_act": True, "bits": 4} | named))
        assert torch.equal(found, step * torch.tensor([0.5, 2.0]).repeat(32, 16))

    def test_what_is_not_read_is_named(self, tmp_path: Path, by_hand: dict):
        with pytest.raises(UnsupportedModelError, match="packing marlin"):
            opened(tmp_path, by_hand, {"quant_method": "gptq", "checkpoint_format": "marlin"})
        with pytest.raises(UnsupportedModelError, match=r"already quantized \(hqq\)"):
            opened(tmp_path, by_hand, {"quant_method": "hqq"})
        with pytest.raises(UnsupportedModelError, match="already quantized"):
            opened(tmp_path, by_hand, {"quant_method": ["gptq"]})

    def test_damage_is_named(self, tmp_path: Path, by_hand: dict):
        unordered = {name: one for name, one in by_hand.items() if "g_idx" not in name}
        with pytest.raises(CheckpointError, match="l lacks a tensor"):
            opened(tmp_path, unordered, {"quant_method": "gptq", "desc_act": True})
        with pytest.raises(CheckpointError, match="of l do not fit"):
            opened(tmp_path, by_hand | {"l.qzeros": by_hand["l.qzeros"][:1]}, {"quant_method": "gptq"})
        with pytest.raises(CheckpointError, match="of l are not three matrices"):
            opened(tmp_path, by_hand | {"l.scales": by_hand["l.scales"][0]}, {"quant_method": "gptq"})
        with pytest.raises(CheckpointError, match="an input channel is of none of the 2 groups"):
            weight(opened(tmp_path, by_hand | {"l.g_idx": by_hand["l.g_idx"][1:]}, {"quant_method": "gptq"}))
        ambiguous = by_hand | {"l.qzeros": torch.full((2, 4), -1, dtype=torch.int32)}
        with pytest.raises(CheckpointError, match=r"l has a zero point that programs read as 0 or as 2\^4"):
            weight(opened(tmp_path, ambiguous, {"quant_method": "gptq"}))


class TestAwq:
    SCHEME = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

    @pytest.fixture
    def stored(self) -> dict[str, torch.Tensor]:
        """Random words, which are codes in any case."""
        generator = torch.Generator().manual_seed(7)
        words = [torch.randint(-(2**31), 2**31, (size, O // 8), generator=generator).int() for size in (I, I // 32)]
        scales = (torch.rand(I // 32, O, generator=generator) * 0.01 + 0.001).half()
        return {"l.qweight": words[0], "l.qzeros": words[1], "l.scales": scales}

    @pytest.mark.parametrize("zero_point", [True, False])
    def test_weights_are_the_librarys(self, tmp_path: Path, stored: dict, zero_point: bool):
        if not zero_point:
            del stored["l.qzeros"]
        scheme = self.SCHEME | {"zero_point": zero_point}
        converted = AutoAWQConverter(group_size=32, zero_point=zero_point).process(dict(stored))
        args = QuantizationArgs(num_bits=4, symmetric=not zero_point, strategy="group", group_size=32)
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        state = {name.removeprefix("l."): tensor for name, tensor in converted.items()}
        expected = compressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
        found = weight(opened(tmp_path, stored, scheme))
        assert found.dtype == torch.float16 and torch.equal(found, expected)

    def test_what_is_not_read_is_named(self, tmp_path: Path, stored: dict):
        with pytest.raises(UnsupportedModelError, match="awq: 4 bits packed as gemv cannot be read"):
            opened(tmp_path, stored, self.SCHEME | {"version": "GEMV"})
        with pytest.raises(UnsupportedModelError, match="awq: 8 bits packed as gemm"):
            opened(tmp_path, stored, self.SCHEME | {"bits": 8})

    def test_damage_is_named(self, tmp_path: Path, stored: dict):
        with pytest.raises(CheckpointError, match="l lacks a tensor of qzeros and scales"):
            opened(tmp_path, {name: one for name, one in stored.items() if "zeros" not in name}, self.SCHEME)
        with pytest.raises(CheckpointError, match="of l do not fit together"):
            opened(tmp_path, stored | {"l.qzeros": stored["l.qzeros"][1:]}, self.SCHEME)
        with pytest.raises(CheckpointError, match="of l are not matrices"):
            opened(tmp_path, stored | {"l.scales": stored["l.scales"][0]}, self.SCHEME)
