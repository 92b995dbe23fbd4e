"""The output checkpoint: names and index as the Hugging Face libraries write them, config, and what is copied."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

import tiny
from shardq.errors import CheckpointError
from shardq.formats import checkpoint
from shardq.formats.shards import INDEX_FILE, TensorInfo, open_index
from shardq.formats.source import SourceTensor, as_stored


def tensors_of(*sizes: int) -> list[SourceTensor]:
    return [as_stored(TensorInfo(f"t{n}", Path("a"), "U8", (size,), 0, size)) for n, size in enumerate(sizes)]


def sizes_of(groups: list[list[SourceTensor]]) -> list[list[int]]:
    return [[tensor.num_bytes for tensor in group] for group in groups]


def test_tensors_are_grouped_in_order_up_to_the_limit():
    assert sizes_of(checkpoint.group_by_size(tensors_of(4, 6, 1, 9, 5, 5), 10)) == [[4, 6], [1, 9], [5, 5]]
    assert sizes_of(checkpoint.group_by_size(tensors_of(4, 7, 3), 10)) == [[4], [7, 3]]


def test_tensor_beyond_the_limit_is_a_group_of_its_own():
    assert sizes_of(checkpoint.group_by_size(tensors_of(3, 25, 3, 3), 10)) == [[3], [25], [3, 3]]
    assert sizes_of(checkpoint.group_by_size(tensors_of(25), 10)) == [[25]]
    assert checkpoint.group_by_size([], 10) == []


def test_random_groups_lose_nothing_and_keep_to_the_limit():
    sizes = torch.randint(1, 30, (300,)).tolist()
    groups = sizes_of(checkpoint.group_by_size(tensors_of(*sizes), 50))
    assert [size for group in groups for size in group] == sizes
    assert all(sum(group) <= 50 for group in groups)
    # No group could have taken the first of the next one.
    assert all(sum(group) + following[0] > 50 for group, following in zip(groups, groups[1:], strict=False))


@pytest.fixture(name="library_checkpoint")
def _library_checkpoint(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Three shards with an index, written by huggingface_hub."""
    tensors = {f"layers.{n}.weight": torch.randn(16, 16).to(torch.bfloat16) for n in range(3)}
    save_torch_state_dict(tensors, tmp_path, max_shard_size=600)
    return tmp_path, tensors


def test_shards_are_named_as_the_library_names_them(library_checkpoint):
    folder, _ = library_checkpoint
    expected = [checkpoint.shard_name(number, 3) for number in (1, 2, 3)]
    assert sorted(file.name for file in folder.glob("*.safetensors")) == expected


def test_index_is_the_one_that_the_library_writes(library_checkpoint):
    folder, _ = library_checkpoint
    expected = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).unlink()
    checkpoint.write_index(folder, [checkpoint.shard_name(number, 3) for number in (1, 2, 3)])
    assert json.loads((folder / INDEX_FILE).read_text()) == expected


def test_index_that_was_written_is_read_back(tmp_path):
    save_file({"x": torch.zeros(4), "y": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"z": torch.ones(3).half()}, tmp_path / "b.safetensors")
    checkpoint.write_index(tmp_path, ["a.safetensors", "b.safetensors"])
    index = open_index(tmp_path)
    assert {name: info.file.name for name, info in index.items()} == {
        "x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors",
    }  # fmt: skip
    assert json.loads((tmp_path / INDEX_FILE).read_text())["metadata"]["total_size"] == 4 * 4 + 2 * 4 + 3 * 2


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_keeps_every_field_but_the_dtype(tmp_path, key: str):
    source, folder = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    fields = json.loads(LlamaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=11).to_json_string())
    fields.pop("dtype", None)
    (source / "config.json").write_text(json.dumps(fields | {key: "bfloat16", "note": "é"}), encoding="utf-8")
    checkpoint.write_config(source, folder, torch.float32)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written == fields | {"dtype": "float32", "note": "é"}
    assert AutoConfig.from_pretrained(folder).dtype == torch.float32


def test_config_has_no_trace_of_how_the_source_was_stored(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    folder.mkdir()
    scheme = {"quantization_config": {"quant_method": "fp8"}}
    config = {
        "model_type": "llama",
        "thinker_config": {"text_config": {"hidden_size": 8} | scheme},
        "rope": {"factor": 2},
    }
    (source / "config.json").write_text(json.dumps(config | scheme), encoding="utf-8")
    checkpoint.write_config(source, folder, torch.bfloat16)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written == config | {"thinker_config": {"text_config": {"hidden_size": 8}}, "dtype": "bfloat16"}
    checkpoint.write_config(source, folder, torch.bfloat16, {"quant_method": "gptq"})
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (
        written["quantization_config"] == {"quant_method": "gptq"}
        and len(written["thinker_config"]["text_config"]) == 1
    )


LEFT = ["model.safetensors", "consolidated.safetensors", "consolidated.00.pth", "tokenizer.bin", "vocab.gguf",
        "config.json", INDEX_FILE, "pytorch_model.bin", "README.md", "params.json", "adapter_config.json",
        "original/tokenizer.model", "onnx/model.onnx", "tokenizer.json.partial", "tokenizer_backup/tokenizer.json",
        "quantize_config.json"]  # fmt: skip


def test_companions_are_copied_byte_by_byte_and_weights_are_not(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "output"
    for number, name in enumerate(tiny.COMPANIONS + LEFT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(bytes([number, 0, 255]))
    checkpoint.copy_companions(source, folder)
    written = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    assert sorted(written) == sorted(tiny.COMPANIONS)
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in tiny.COMPANIONS)


@pytest.mark.parametrize("name", ["LICENSE", "additional_chat_templates/a.jinja"])
def test_companion_that_is_a_link_to_nothing_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="a link to nothing; restore the file"):
        checkpoint.companions(tmp_path)


def test_empty_tensor_first_starts_a_group():
    assert sizes_of(checkpoint.group_by_size(tensors_of(0, 4, 7), 10)) == [[0, 4], [7]]


def test_folders_are_no_companions(tmp_path):
    (tmp_path / "source" / "tokenizer_backup").mkdir(parents=True)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    checkpoint.copy_companions(tmp_path / "source", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
