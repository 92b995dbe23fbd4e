"""Checkpoints whose tensors are encoded: a decoder, here of a scheme of this test's own, is all that they take."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardq.config import QuantOptions
from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.export.hf import Hf
from shardq.export.run_output import RunOutput
from shardq.formats.shards import INDEX_FILE, Index, TensorInfo, open_index, read_tensor
from shardq.formats.source import Rows, SourceTensor, WeightSource, open_source, stored_in
from shardq.model.block import block_plans
from shardq.model.ends import epilogue, prologue
from shardq.model.skeleton import Skeleton, open_skeleton, skeleton_of
from shardq.model.weights import stream_blocks
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.plan import make_plan
from shardq.rundir.record import RunRecord
from shardq.rundir.source import check_outside, noted

CPU = torch.device("cpu")


def int8_with_scales(index: Index, scheme: object) -> Iterable[SourceTensor]:
    """The scheme: each row of a weight is int8 `NAME_codes` times its number of `NAME_scale`."""
    for name in [name.removesuffix("_codes") for name in index if name.endswith("_codes")]:
        codes, scale = index[f"{name}_codes"], index[f"{name}_scale"]

        def decode(read: Callable[[TensorInfo, Rows], Tensor], rows: Rows, codes=codes, scale=scale) -> Tensor:
            return read(codes, rows).float() * read(scale, rows)[:, None]

        yield SourceTensor(name, "F32", codes.shape, (codes, scale), decode)


class TestWeightSource:
    CODES = torch.arange(-8, 12, dtype=torch.int8).reshape(5, 4)
    SCALE = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    VALUES = CODES.float() * SCALE[:, None]

    @pytest.fixture
    def source(self, tmp_path: Path) -> WeightSource:
        tensors = {"norm": torch.ones(3), "w_codes": self.CODES, "w_scale": self.SCALE}
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        return open_source(tmp_path, int8_with_scales)

    def test_one_name_stands_for_several_stored_tensors(self, source: WeightSource):
        tensor = source.tensors["w"]
        assert source.tensors.keys() == {"norm", "w"} and source.index.keys() == {"norm", "w_codes", "w_scale"}
        assert (tensor.shape, tensor.dtype, tensor.num_bytes) == ((5, 4), "F32", 80)
        stored = stored_in([source.tensors["norm"], tensor, tensor])
        assert [info.name for info in stored] == ["norm", "w_codes", "w_scale"]

    def test_values_are_decoded_whole_and_by_rows(self, source: WeightSource):
        tensor = source.tensors["w"]
        assert torch.equal(source.read(tensor), self.VALUES)
        assert torch.equal(source.read_unchecked(tensor), self.VALUES)
        assert torch.equal(source.read_rows(tensor, [0, 3]), self.VALUES[[0, 3]])
        assert torch.equal(source.read_plain(tensor), self.VALUES)

    @pytest.mark.parametrize("part", ["w_codes", "w_scale"])
    @pytest.mark.parametrize("read", [WeightSource.read, WeightSource.check])
    def test_every_stored_part_must_stay_as_it_was(self, source: WeightSource, read: Callable, part: str):
        read(source, source.tensors["w"])
        content = {"w_codes": self.CODES.numpy().tobytes(), "w_scale": self.SCALE.numpy().tobytes()}
        assert source.digests == {name: xxhash.xxh3_128_hexdigest(raw) for name, raw in content.items()}
        source.digests[part] = "0" * 32
        with pytest.raises(CheckpointError, match=f"tensor {part} is not what it was"):
            read(source, source.tensors["w"])

    def test_sample_of_a_part_is_compared(self, source: WeightSource):
        source.note_samples(source.index.values())
        source.samples["w_scale"] = "0" * 32
        with pytest.raises(CheckpointError, match="tensor w_scale is not what it was"):
            source.read(source.tensors["w"])

    @pytest.mark.parametrize("read", [WeightSource.read, WeightSource.check])
    def test_decoded_value_that_is_not_finite_is_named(self, tmp_path: Path, read: Callable):
        scale = self.SCALE.index_fill(0, torch.tensor(3), torch.nan)
        save_file({"w_codes": self.CODES, "w_scale": scale}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        source = open_source(tmp_path, int8_with_scales)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor w holds nan at \[3, 0\]"):
            read(source, source.tensors["w"])


@pytest.fixture(scope="module")
def folders(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny Llama with its matrices encoded, and with what they decode to, each in one file."""
    encoded, plain = {}, {}
    for name, info in open_index(llama).items():
        values = read_tensor(info).float()
        if values.dim() == 2:
            scale_O = values.abs().amax(1) / 127
            codes_OI = (values / scale_O[:, None]).round().to(torch.int8)
            encoded |= {f"{name}_codes": codes_OI, f"{name}_scale": scale_O}
            values = codes_OI.float() * scale_O[:, None]
        else:
            encoded[name] = values
        plain[name] = values
    made = tmp_path_factory.mktemp("encoded")
    for kind, tensors in {"encoded": encoded, "plain": plain}.items():
        shutil.copytree(llama, made / kind, ignore=shutil.ignore_patterns("*.safetensors", INDEX_FILE))
        save_file(tensors, made / kind / "model.safetensors")
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": {"quant_method": "int8 rows"}}
    (made / "encoded" / "config.json").write_text(json.dumps(config))
    return made / "encoded", made / "plain"


class TestModel:
    @pytest.fixture
    def encoded(self, folders: tuple[Path, Path]) -> Skeleton:
        return skeleton_of(open_source(folders[0], int8_with_scales))

    @pytest.fixture
    def plain(self, folders: tuple[Path, Path]) -> Skeleton:
        return open_skeleton(folders[1])

    def test_without_its_decoder_it_is_refused(self, folders: tuple[Path, Path]):
        with pytest.raises(UnsupportedModelError, match=r"encoded: already quantized \(int8 rows\), which shardq"):
            open_skeleton(folders[0])

    def test_blocks_stream_as_those_that_store_the_values(self, encoded: Skeleton, plain: Skeleton):
        streams = (stream_blocks(skeleton, block_plans(skeleton), CPU) for skeleton in (encoded, plain))
        for found, expected in zip(*streams, strict=True):
            assert found.source.keys() == expected.source.keys() and len(found.source) == 9
            assert [name for name, value in found.source.items() if not torch.equal(value, expected.source[name])] == []
        name = "model.layers.2.mlp.up_proj.weight"
        assert {f"{name}_codes", f"{name}_scale"} < encoded.source.digests.keys() < encoded.source.index.keys()

    def test_rows_of_embedding_and_tied_head_are_decoded(self, encoded: Skeleton, plain: Skeleton):
        tokens_NT, hidden, logits = torch.tensor([[5, 299, 5, 0]]), [], []
        for skeleton in (encoded, plain):
            with prologue(skeleton, CPU) as embed:
                hidden.append(embed(tokens_NT))
            with epilogue(skeleton, CPU) as slices:
                logits += [to_logits(hidden[-1]) for _, to_logits in slices]
        assert torch.equal(*hidden) and torch.equal(*logits) and logits[0].shape == (1, 4, 300)

    def test_all_but_quantized_weights_is_written_decoded(self, encoded: Skeleton, plain: Skeleton, tmp_path: Path):
        plan = make_plan(encoded, QuantOptions(ignore=("re:.*([qkvo]|gate|up)_proj",)))
        outside = check_outside(encoded)
        assert outside.keys() == {
            "model.norm.weight",
            "model.embed_tokens.weight_codes",
            "model.embed_tokens.weight_scale",
        }
        weight_OI = torch.ones(64, 128)
        linear = QuantizedLinear(
            weight_OI.to(torch.int8), torch.ones(64, 1), torch.zeros(64, 1), QuantOptions(symmetric=True).grid
        )
        result = RunOutput(tmp_path, encoded, plan, Hf("float32"))
        for block in plan.blocks:
            result.write_block(block, {"mlp.down_proj": linear}, {}, CPU, {})
        manifest = {"shardq": "0", "options": {"quant": {}}, "model": {"config": "", "weights": ""}}
        result.write_end(RunRecord(tmp_path, [{"redo": [], "manifest": manifest | {"calibration_tokens": ""}}]))
        expected, written = load_file(plain.folder / "model.safetensors"), {}
        for shard in set(json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"].values()):
            written |= load_file(tmp_path / shard)
        for block in plan.blocks:
            linear_name = f"{block.name}.mlp.down_proj.weight"
            expected[linear_name] = weight_OI
        assert written.keys() == expected.keys()
        assert [name for name, tensor in written.items() if not torch.equal(tensor, expected[name])] == []
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())

    def test_digests_of_all_stored_parts_are_kept_with_the_block(self, encoded: Skeleton):
        check_outside(encoded)
        next(stream_blocks(encoded, block_plans(encoded), CPU, ahead=False))
        kept = noted(encoded.source.digests, encoded, 0)
        assert kept == encoded.source.digests and len(kept) == 3 + 2 + 7 * 2
