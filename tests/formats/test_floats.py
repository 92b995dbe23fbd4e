"""Weights of 8-bit and 4-bit floats are what transformers and compressed-tensors make of them, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from by_the_library import compressed
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.floats import FP4_VALUES
from shardq.formats.quantized_source import open_checkpoint, rounds_activations
from shardq.formats.source import WeightSource

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
ALL_FLOAT8 = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)


def opened(folder: Path, tensors: dict[str, Tensor], scheme: dict) -> WeightSource:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    return open_checkpoint(folder)


def values(source: WeightSource, name: str = "l.weight", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor's values, which must be the same by rows and as a whole."""
    tensor = source.tensors[name]
    found = source.read(tensor)
    assert (tuple(found.shape), found.dtype) == (tensor.shape, dtype)
    assert tensor.num_bytes == found.numel() * 2
    assert torch.equal(source.read_rows(tensor, [1, 5]), found[[1, 5]])
    return found


def float8(*shape: int) -> Tensor:
    """Every finite code, over and over."""
    codes = ALL_FLOAT8[torch.randint(len(ALL_FLOAT8), shape, generator=torch.Generator().manual_seed(0))]
    return codes.view(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-4


class TestFp8:
    @pytest.mark.parametrize("shape", [(256, 384), (128, 128), (100, 384), (384, 200), (130, 129), (7, 5)])
    def test_blocks_with_cut_edges_are_the_librarys(self, tmp_path: Path, shape: tuple[int, int]):
        stored = {"l.weight": float8(*shape), "l.weight_scale_inv": scales(-(-shape[0] // 128), -(-shape[1] // 128))}
        found = values(opened(tmp_path, stored, BLOCKS))
        assert torch.equal(found, FP8BlockDequantizer().process(dict(stored))["l.weight"])
        assert rounds_activations(tmp_path)

    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "e8m0", "bytes"])
    @pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 32)])
    def test_blocks_are_transformers(self, tmp_path: Path, block: tuple[int, int], kind: str):
        grid = (256 // block[0], 384 // block[1])
        exponents = torch.randint(100, 130, grid, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
        scale = {"float32": scales(*grid), "bfloat16": scales(*grid).bfloat16(),
                 "e8m0": exponents.view(torch.float8_e8m0fnu), "bytes": exponents}[kind]  # fmt: skip
        stored = {"weight": float8(256, 384), "weight_scale_inv": scale}
        scheme = BLOCKS | {"weight_block_size": list(block)}
        found = values(opened(tmp_path, {f"l.{name}": tensor for name, tensor in stored.items()}, scheme))
        assert torch.equal(found, Fp8Dequantize(None).convert(stored)["weight"].bfloat16())

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1), (40,), (40, 1), (1, 48)])
    @pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
    def test_one_scale_for_all_or_one_a_row_or_a_column(self, tmp_path: Path, name: str, shape: tuple[int, ...]):
        stored = {"l.weight": float8(40, 48), f"l.{name}": scales(*shape), "l.activation_scale": torch.ones(1)}
        source = opened(tmp_path, stored, {"quant_method": "fp8", "activation_scheme": "static"})
        scale = scales(*shape)[:, None] if shape == (40,) else scales(*shape)
        assert torch.equal(values(source), (stored["l.weight"].float() * scale).bfloat16())
        assert source.tensors.keys() == {"l.weight"}  # nothing of the inputs' is left

    def test_a_row_comes_before_a_column_where_both_fit(self, tmp_path: Path):
        for shape in ((48,), (48, 1), (1, 48)):
            stored = {"l.weight": float8(48, 48), "l.weight_scale": scales(*shape)}
            found = values(opened(tmp_path, stored, {"quant_method": "fbgemm_fp8"}))
            scale = scales(*shape)[:, None] if len(shape) == 1 else scales(*shape)
            assert torch.equal(found, (stored["l.weight"].float() * scale).bfloat16())

    def test_fused_experts_are_decoded_one_by_one(self, tmp_path: Path):
        stored = {"e.gate_up_proj": float8(6, 200, 130), "e.gate_up_proj_scale_inv": scales(6, 2, 2),
                  "e.down_proj": float8(6, 48, 40), "e.down_proj_scale": scales(6, 1, 40)}  # fmt: skip
        source = opened(tmp_path, stored, BLOCKS)
        found = values(source, "e.gate_up_proj")
        for expert in range(6):
            alone = {name.replace("e.gate_up_proj", "l.weight"): tensor[expert] for name, tensor in stored.items()}
            assert torch.equal(found[expert], FP8BlockDequantizer().process(alone)["l.weight"])
        expected = stored["e.down_proj"].float() * stored["e.down_proj_scale"]
        assert torch.equal(values(source, "e.down_proj"), expected.bfloat16())

    def test_experts_of_two_codes_a_byte(self, tmp_path: Path):
        packed = torch.randint(-128, 128, (64, 32), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
        exponents = torch.randint(110, 130, (64, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
        stored = {"l.weight": packed, "l.scale": exponents, "a.weight": float8(256, 128), "a.scale": scales(2, 1)}
        found = values(opened(tmp_path, stored, BLOCKS | {"expert_dtype": "fp4", "scale_fmt": "ue8m0"}))
        both = {"weight": packed, "weight_scale_inv": exponents}
        assert torch.equal(found, Fp8Dequantize(None).convert(both)["weight"])

    def test_what_is_not_known_is_named(self, tmp_path: Path):
        stored = {"l.weight": float8(256, 128), "l.weight_scale_inv": scales(2, 1)}
        for changed in ({"fmt": "e5m2"}, {"scale_fmt": "x"}, {"expert_dtype": "int4"}, {"weight_block_size": 128}):
            key, value = next(iter(changed.items()))
            with pytest.raises(UnsupportedModelError, match=f"fp8: {key} {value} of config.json is not known"):
                opened(tmp_path, stored, BLOCKS | changed)

    def test_damage_is_named(self, tmp_path: Path):
        stored = {"l.weight": float8(256, 128), "l.weight_scale_inv": scales(2, 1)}
        with pytest.raises(CheckpointError, match=r"tensor l\.weight is float8, but has no scales"):
            opened(tmp_path, {"l.weight": stored["l.weight"]}, BLOCKS)
        for wrong in (scales(1, 2), scales(2), scales(4, 1)):
            with pytest.raises(CheckpointError, match=r"has not the scales of l\.weight \[256, 128\] in blocks of"):
                opened(tmp_path, stored | {"l.weight_scale_inv": wrong}, BLOCKS | {"weight_block_size": [128, 64]})
        stored["l.weight"].view(torch.uint8)[3, 4] = 127
        with pytest.raises(CheckpointError, match=r"tensor l\.weight holds nan at \[3, 4\]"):
            values(opened(tmp_path, stored, BLOCKS))

    @pytest.mark.parametrize("place", ["compression_config", "text_config", "thinker_config"])
    def test_the_scheme_may_stand_elsewhere_in_the_config(self, tmp_path: Path, place: str):
        inner = {"quantization_config": BLOCKS}
        config = {"text_config": inner, "thinker_config": {"text_config": inner}}.get(place, BLOCKS)
        save_file({"l.weight": float8(100, 48), "l.weight_scale_inv": scales(1, 1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({place: config}))
        source = open_checkpoint(tmp_path)
        assert source.scheme == "fp8" and source.tensors["l.weight"].dtype == "BF16"

    def test_float8_that_no_scheme_explains_is_refused(self, tmp_path: Path):
        stored = {"l.weight": float8(256, 128), "l.weight_scale_inv": scales(2, 1)}
        with pytest.raises(UnsupportedModelError, match=r"l\.weight is stored as F8_E4M3, and nothing says by which"):
            opened(tmp_path, stored, {})


FORMS = {
    "fp8 tensor": ("float-quantized", {"strategy": "tensor"}, (1,)),
    "fp8 channel": ("float-quantized", {"strategy": "channel"}, (130, 1)),
    "fp8 block": ("naive-quantized", {"strategy": "block", "block_structure": [128, 128]}, (2, 2)),
    "fp8 group": ("float-quantized", {"strategy": "group", "group_size": 32}, (130, 6)),
    "mxfp8": ("mxfp8-quantized", {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, (130, 6)),
    "nvfp4": ("nvfp4-pack-quantized", {"strategy": "tensor_group", "group_size": 16, "num_bits": 4,
                                       "scale_dtype": "torch.float8_e4m3fn"}, (130, 12)),
    "mxfp4": ("mxfp4-pack-quantized", {"strategy": "group", "group_size": 32, "num_bits": 4,
                                       "scale_dtype": "torch.uint8"}, (130, 6)),
}  # fmt: skip


def by_the_library(form: str, scale_dtype: torch.dtype) -> tuple[dict[str, Tensor], dict, Tensor]:
    """Tensors and config of a linear [130, 192] that the library compresses, and what it decompresses."""
    stored_as, more, shape = FORMS[form]
    args = QuantizationArgs(**{"num_bits": 8, "type": "float", "symmetric": True} | more)
    generator = torch.Generator().manual_seed(5)
    state = {"weight": torch.randn(130, 192, generator=generator).bfloat16() * 0.05, "weight_scale": scales(*shape)}
    if form.startswith("mx"):
        state["weight_scale"] = torch.exp2(state["weight_scale"].log2().floor())
    elif form == "nvfp4":
        state |= {"weight_scale": scales(*shape) * 300, "weight_global_scale": torch.tensor([321.7])}
    state["weight_scale"] = state["weight_scale"].to(scale_dtype)
    return compressed(args, stored_as, state)


class TestCompressedTensors:
    @pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("form", FORMS)
    def test_floats_are_the_librarys(self, tmp_path: Path, form: str, scale_dtype: torch.dtype):
        stored, config, expected = by_the_library(form, scale_dtype)
        source = opened(tmp_path, stored | {"l.input_scale": torch.ones(1)}, config)
        dtype = stored["l.weight_scale"].dtype
        found = values(source, dtype=dtype if dtype == torch.float16 else torch.bfloat16)
        assert found.abs().max() > 0.01 and torch.equal(found, expected.to(found.dtype))
        assert source.tensors.keys() == {"l.weight"}

    def test_a_block_may_be_written_as_text(self, tmp_path: Path):
        stored, config, expected = by_the_library("fp8 block", torch.float32)
        config["config_groups"]["group_0"]["weights"]["block_structure"] = "128x128"
        assert torch.equal(values(opened(tmp_path, stored, config)), expected.bfloat16())

    def test_damage_is_named(self, tmp_path: Path):
        stored, config, _ = by_the_library("nvfp4", torch.float32)
        with pytest.raises(CheckpointError, match=r"l\.weight lacks its global scale"):
            opened(tmp_path, {name: one for name, one in stored.items() if "global" not in name}, config)
        with pytest.raises(CheckpointError, match=r"has not the scales of l\.weight .* in blocks of \[1, 16\]"):
            opened(tmp_path, stored | {"l.weight_scale": stored["l.weight_scale"][:, 1:]}, config)


class TestModelOpt:
    SCHEME = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}

    def test_nvfp4_is_the_product_of_codes_and_both_scales(self, tmp_path: Path):
        by_library, _, decompressed = by_the_library("nvfp4", torch.float32)
        second = 1 / by_library.pop("l.weight_global_scale")
        packed = by_library.pop("l.weight_packed")
        stored = by_library | {"l.weight": packed, "l.weight_scale_2": second, "l.input_scale": torch.ones(())}
        source = opened(tmp_path, stored | {"l.k_scale": torch.ones(())}, self.SCHEME)
        found = values(source)
        codes_OI = torch.tensor(FP4_VALUES)[torch.stack((packed & 15, packed >> 4), 2).flatten(1).int()]
        scale_OI = (stored["l.weight_scale"].float() * second).repeat_interleave(16, 1)
        assert torch.equal(found, (codes_OI * scale_OI).bfloat16())
        torch.testing.assert_close(found, decompressed, rtol=0.01, atol=0)
        assert source.tensors.keys() == {"l.weight"} and rounds_activations(tmp_path)

    def test_fp8_has_one_scale(self, tmp_path: Path):
        stored = {"l.weight": float8(40, 48), "l.weight_scale": scales(), "n.weight": torch.ones(3)}
        source = opened(tmp_path, stored, self.SCHEME | {"quant_algo": "FP8"})
        assert torch.equal(values(source), (stored["l.weight"].float() * scales()).bfloat16())

    def test_what_is_not_read_is_named(self, tmp_path: Path):
        stored = {"l.weight": torch.zeros(40, 24, dtype=torch.uint8), "l.weight_scale": float8(40, 3)}
        with pytest.raises(UnsupportedModelError, match="modelopt: quant_algo W4A8_AWQ cannot be read"):
            opened(tmp_path, stored, self.SCHEME | {"quant_algo": "W4A8_AWQ"})
        with pytest.raises(CheckpointError, match=r"l\.weight has a scale, but not its codes, or not all scales"):
            opened(tmp_path, stored, self.SCHEME)


class TestMxfp4:
    @pytest.fixture
    def stored(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(4)
        blocks = torch.randint(0, 256, (6, 64, 3, 16), generator=generator, dtype=torch.uint8)
        exponents = torch.arange(6 * 64 * 3).view(6, 64, 3) % 252
        return {"e.down_proj_blocks": blocks, "e.down_proj_scales": exponents.to(torch.uint8),
                "e.down_proj_bias": torch.ones(6, 64)}  # fmt: skip

    def test_experts_are_transformers(self, tmp_path: Path, stored: dict[str, Tensor]):
        source = opened(tmp_path, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
        expected = convert_moe_packed_tensors(stored["e.down_proj_blocks"], stored["e.down_proj_scales"])
        assert expected.shape == (6, 96, 64) and torch.equal(values(source, "e.down_proj"), expected)
        assert source.tensors.keys() == {"e.down_proj", "e.down_proj_bias"}

    def test_damage_is_named(self, tmp_path: Path, stored: dict[str, Tensor]):
        scheme = {"quant_method": "mxfp4"}
        with pytest.raises(CheckpointError, match=r"e\.down_proj lacks its scales"):
            opened(tmp_path, {name: one for name, one in stored.items() if "scales" not in name}, scheme)
        with pytest.raises(CheckpointError, match=r"blocks and scales of e\.down_proj do not fit"):
            opened(tmp_path, stored | {"e.down_proj_scales": stored["e.down_proj_scales"][:5]}, scheme)
        with pytest.raises(CheckpointError, match="no tensor is quantized although config.json says mxfp4"):
            opened(tmp_path, {"e.down_proj_bias": torch.ones(3)}, scheme)
