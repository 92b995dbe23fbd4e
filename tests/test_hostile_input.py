"""Whatever bytes the readers find, they end with the project's own errors, and read nothing elsewhere."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some
from safetensors.torch import save

from shardq.cli import parse
from shardq.errors import CheckpointError, ConfigError, ResumeError, ShardQError
from shardq.formats import encodings
from shardq.formats.block_file import read_activations, read_block, write_block
from shardq.formats.checkpoint import copy_companions
from shardq.formats.shards import INDEX_FILE, open_index, read_header, read_tensor
from shardq.formats.tensor_file import read_checked
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.record import RunRecord, open_run

hostile = settings(
    max_examples=400, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
NAMES = some.sampled_from(["block", "files", "options", "quant", "weight_map", "a", "../a", "/etc/passwd", "x" * 300])
VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8) | NAMES,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(NAMES | some.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NESTED = b"[" * 100_000  # deeper than a parser's stack


def mutated(whole: bytes) -> some.SearchStrategy[bytes]:
    """Bytes like a whole file's: some overwritten, some cut off or added."""
    return some.builds(
        lambda place, new, cut: (whole[:place] + new + whole[place + len(new) :])[: len(whole) + 4 - cut],
        some.integers(0, len(whole)), some.binary(min_size=1, max_size=12), some.integers(0, len(whole)) | some.just(4),
    )  # fmt: skip


def only_own_errors(kind: type[ShardQError] | tuple, call: Callable, *arguments: object) -> None:
    """The call succeeds, or fails with an error of this kind."""
    with suppress(kind):
        call(*arguments)


SHARD = save({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})
HUGE_HEADERS = [size.to_bytes(8, "little") + b"{}" for size in (2**63, 2**32, 10**8 + 1, len(SHARD))]


def read_all(path: Path) -> None:
    for info in read_header(path).values():
        read_tensor(info)


@hostile
@given(content=some.binary(max_size=64) | mutated(SHARD) | some.sampled_from(HUGE_HEADERS))
def test_shard_reader(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    only_own_errors(CheckpointError, read_all, tmp_path / "model.safetensors")
    only_own_errors(CheckpointError, read_checked, tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", HUGE_HEADERS)
def test_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(tmp_path / "a")


@hostile
@given(value=VALUES, shard=NAMES | some.text(max_size=6), raw=some.binary(max_size=16) | some.just(NESTED))
def test_index_reader(tmp_path, value, shard, raw):
    for content in (
        raw,
        json.dumps(value),
        json.dumps({"weight_map": value}),
        json.dumps({"weight_map": {"a": shard}}),
    ):
        (tmp_path / INDEX_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
        only_own_errors(ShardQError, open_index, tmp_path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ""])
def test_index_never_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "a.safetensors").write_bytes(SHARD)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError):
        open_index(tmp_path / "model")


@pytest.fixture
def hub_cache(tmp_path) -> Path:
    """A snapshot as `huggingface_hub` keeps it: links, from its own folder into one of blobs beside it."""
    repository = tmp_path / "models--owner--model"
    snapshot = repository / "snapshots" / "0123abc"
    for name, content in (("a.safetensors", SHARD), (INDEX_FILE, json.dumps({"weight_map": {"a": "a.safetensors"}}))):
        blob = repository / "blobs" / name.encode().hex()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content if isinstance(content, bytes) else content.encode())
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize(
    "how",
    ["itself", "through a link to the folder", "through a link to the cache", "blobs on another disk"],
)
def test_links_of_the_hub_cache_are_followed(hub_cache, tmp_path, how):
    if how == "blobs on another disk":
        blobs = hub_cache.parents[1] / "blobs"
        blobs.rename(tmp_path / "elsewhere")
        blobs.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder").symlink_to(hub_cache)
    (tmp_path / "cache").symlink_to(tmp_path / "models--owner--model")
    folder = {"itself": hub_cache, "through a link to the folder": tmp_path / "folder"}.get(
        how, tmp_path / "cache" / "snapshots" / "0123abc"
    )
    assert torch.equal(read_tensor(open_index(folder)["a"]), torch.ones(3, 2))


def test_links_within_the_folder_are_followed(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "kept.bin").write_bytes(SHARD)
    (tmp_path / "model" / "model.safetensors").symlink_to("kept.bin")
    assert set(open_index(tmp_path / "model")) == {"a", "b"}


OUTSIDE = ["secret", "models--owner--model/secret", "models--owner--model/blobs/deeper/secret",
           "models--owner--other/blobs/secret"]  # fmt: skip


@pytest.mark.parametrize("target", OUTSIDE)
@pytest.mark.parametrize("name", ["a.safetensors", "model.safetensors"])
def test_link_out_of_the_folder_is_refused(hub_cache, tmp_path, target, name):
    """Also one that leads elsewhere in the cache, and one that no index names."""
    secret, link = tmp_path / target, hub_cache / name
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_bytes(SHARD)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    if name == "model.safetensors":
        (hub_cache / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: a link out of the folder, to {secret}; refused"):
        open_index(hub_cache)


def test_link_in_a_circle_is_refused(hub_cache):
    (hub_cache / "a.safetensors").unlink()
    (hub_cache / "a.safetensors").symlink_to("a.safetensors")
    with pytest.raises(CheckpointError, match="'a.safetensors' is no file's name"):
        open_index(hub_cache)


def test_link_out_of_the_folder_is_not_copied_into_the_output(tmp_path):
    for folder in ("model", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "secret").write_text("words")
    (tmp_path / "model" / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE: a link out of the folder"):
        copy_companions(tmp_path / "model", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


LINE = json.dumps({"block": 0, "files": {"a": "0" * 64}}).encode() + b"\n"


@hostile
@given(value=VALUES, files=VALUES, raw=some.binary(max_size=40) | mutated(LINE * 2) | some.just(NESTED + b"\n"))
def test_ledger_reader(tmp_path, value, files, raw):
    for content in (
        raw,
        json.dumps(value).encode(),
        json.dumps({"block": 0, "files": files}).encode() + b"\n",
        json.dumps({"redo": value, "manifest": files}).encode() + b"\n",
    ):
        (tmp_path / "ledger.jsonl").write_bytes(content)
        only_own_errors(ResumeError, RunRecord.read, tmp_path)
        only_own_errors(ShardQError, lambda: RunRecord.read(tmp_path).check_finished())


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "blocks/../../a"])
def test_ledger_never_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"block": 0, "files": {name: "0"}}) + "\n")
    with pytest.raises(ResumeError, match="line 1 names a file outside the folder"):
        RunRecord.read(tmp_path)


@hostile
@given(value=VALUES, raw=some.binary(max_size=16) | some.just(NESTED))
def test_manifest_reader(tmp_path, value, raw):
    for content in (raw, json.dumps(value).encode(), json.dumps({"options": value}).encode()):
        (tmp_path / "manifest.json").write_bytes(content)
        only_own_errors(ResumeError, lambda: RunRecord.read(tmp_path).options("quant"))
        for redo in (None, [0]):
            only_own_errors(ShardQError, open_run, tmp_path, {"options": {}}, "auto", redo)


def make_block(path: Path) -> bytes:
    codes = torch.randint(-4, 4, (3, 10)).to(torch.int8)
    grid = IntegerGrid(bits=3, symmetric=False)
    write_block(path, {"a": QuantizedLinear(codes, torch.ones(3, 1), torch.zeros(3, 1), grid)})
    return path.read_bytes()


@hostile
@given(data=some.data(), described=VALUES)
def test_block_file_reader(tmp_path, data, described):
    whole = make_block(tmp_path / "block")
    for text in (data.draw(mutated(whole)), save({"a.scale": torch.ones(1, 1)}, {"shardq": json.dumps(described)}),
                 save({}, {"shardq": json.dumps({"version": 1, "linears": {"a": described}})}),
                 save({}, {"shardq": json.dumps({"version": 1, "activations": described})}),
                 save({}, {"shardq": json.dumps({"version": 1, "activations": [described]})})):  # fmt: skip
        (tmp_path / "block").write_bytes(text)
        only_own_errors(CheckpointError, read_block, tmp_path / "block")
        only_own_errors(CheckpointError, read_activations, tmp_path / "block")


@hostile
@given(
    raw=some.binary(max_size=16)
    | mutated(
        b'{"activation_encodings": [], "version": "1.0.0", "param_encodings": [\n{"name": "a"},\n{"name": "b"}\n]}\n'
    )
)
def test_encodings_reader(tmp_path, raw):
    (tmp_path / "encodings").write_bytes(raw)
    for version in encodings.LAYOUTS:
        only_own_errors(CheckpointError, lambda version=version: list(encodings.read(tmp_path / "encodings", version)))
        only_own_errors(CheckpointError, encodings.read_activations, tmp_path / "encodings", version)


OPTIONS = some.sampled_from(["model", "quant", "calib", "optimize", "bits", "seed", "dataset", "config", "resume"])
CONFIGS = some.recursive(VALUES, lambda inner: some.dictionaries(OPTIONS, inner, max_size=3), max_leaves=6)
TAGGED = [b"model: !!python/object/apply:os.system ['true']", b"!!python/name:os.system", b"a: &a [*a]", b"{", b"\x00",
          b"quant: {bits: !!python/object:x.Y {}}", b"- - - -", b"model: ${oc.env:HOME}"]  # fmt: skip


@settings(hostile, max_examples=40)
@given(value=CONFIGS, raw=some.binary(max_size=24) | some.sampled_from(TAGGED))
def test_config_reader(tmp_path, value, raw):
    for content in (raw, yaml.safe_dump(value).encode(), yaml.safe_dump({"model": "m", "quant": value}).encode()):
        (tmp_path / "recipe.yaml").write_bytes(content)
        only_own_errors(ConfigError, parse, "quantize", ["--config", str(tmp_path / "recipe.yaml")])
