"""A run is made of one model's bytes and one text's tokens, wherever they lie, from its beginning to its end."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from safetensors.torch import load_file, save_file

import tiny
from runs import ONE_RANK, committed, result_files, run_quantize
from shardq.cli import parse
from shardq.commands import quantize as run
from shardq.commands.export import export
from shardq.commands.tune import tune
from shardq.errors import CheckpointError, ConfigError, ResumeError, ShardQError, Stopped
from shardq.formats.shards import open_index
from shardq.formats.source import stored_in
from shardq.model.skeleton import open_skeleton
from shardq.rundir import source

RTN = ("--quant.method", "rtn")
IN_A_BLOCK, EMBEDDING = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of its own. Read only."""
    return tiny.save_llama(tmp_path_factory.mktemp("untied") / "model", tied=False)


@pytest.fixture(scope="module")
def whole(untied: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of it. Read only."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_quantize(untied, token_file, output, *RTN)
    return output


@pytest.fixture
def model(untied: Path, tmp_path: Path) -> Path:
    """A copy of the model, to change."""
    return shutil.copytree(untied, tmp_path / "model")


@pytest.fixture(scope="module")
def begun(untied: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of it that was stopped after its second block. Read only."""
    output = tmp_path_factory.mktemp("begun") / "out"
    with pytest.raises(Stopped):
        run_quantize(untied, token_file, output, *RTN, stop_after=1)
    return output


@pytest.fixture
def output(begun: Path, tmp_path: Path) -> Path:
    """A copy of that run, without its activations: the blocks that are done are gone through again."""
    return shutil.copytree(begun, tmp_path / "out", ignore=shutil.ignore_patterns("cache"))


def change_last_bit(model: Path, name: str) -> None:
    """Change a tensor where nothing but a look at every byte finds it."""
    info = open_index(model)[name]
    with open(info.file, "r+b") as file:
        file.seek(info.offset + info.num_bytes - 2)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))


def put(model: Path, name: str, value: float) -> None:
    """Put a value at the end of a tensor."""
    info = open_index(model)[name]
    tensors = load_file(info.file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, info.file, {"format": "pt"})


def run_tune(run: Path, model: Path, output: Path, *more: object) -> dict:
    fixed = [run, "--model", model, "--output", output, "--tune.steps", 1, "--tune.batch_size", 2]
    return tune(parse("tune", [str(argument) for argument in (*fixed, *more)]), ONE_RANK)


def made_by(output: Path) -> dict[str, bytes]:
    """The files that a run computes or copies from the source's weights."""
    names = ("blocks", "encodings", "model")
    return {name: content for name, content in result_files(output).items() if name.startswith(names)}


def test_ledger_has_the_digest_of_every_tensor(whole: Path, untied: Path):
    lines = [json.loads(line) for line in (whole / "ledger.jsonl").read_text().splitlines()]
    expected = {}
    for name, info in open_index(untied).items():
        content = info.file.read_bytes()[info.offset : info.offset + info.num_bytes]
        expected[name] = xxhash.xxh3_128_hexdigest(content)
    assert {name: digest for line in lines[:3] for name, digest in line["source"].items()} == expected
    assert set(lines[1]["source"]) == {name for name in expected if name.startswith("model.layers.1.")}
    assert "source" not in lines[3]


@pytest.mark.parametrize("name", [IN_A_BLOCK, EMBEDDING, "lm_head.weight"])
def test_changed_byte_stops_a_resume(model: Path, output: Path, token_file: Path, name: str):
    change_last_bit(model, name)
    before = result_files(output)
    with pytest.raises(CheckpointError) as caught:
        run_quantize(model, token_file, output, *RTN)
    assert f"{open_index(model)[name].file}: tensor {name} is not what it was" in str(caught.value)
    assert result_files(output).items() >= before.items()
    change_last_bit(model, name)
    run_quantize(model, token_file, output, *RTN)


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.norm.weight"])
def test_change_that_a_sample_shows_is_found_at_once(model: Path, output: Path, token_file: Path, name: str):
    """Also in a block that is not yet read."""
    change_last_bit(model, name)
    shard = open_index(model)[name].file.name
    with pytest.raises(ResumeError, match=rf"different: model\.weights \(in {shard}\); choose another"):
        run_quantize(model, token_file, output, *RTN)


@pytest.mark.parametrize("name", [IN_A_BLOCK, "lm_head.weight"])
def test_changed_byte_stops_what_is_made_from_a_finished_run(
    model: Path, whole: Path, token_file: Path, tmp_path: Path, name: str
):
    output = shutil.copytree(whole, tmp_path / "out")
    change_last_bit(model, name)
    with pytest.raises(CheckpointError, match=f"tensor {name} is not what it was"):
        run_tune(whole, model, tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=f"tensor {name} is not what it was"):
        run_quantize(model, token_file, output, *RTN, "--redo", "1")


def test_bytes_that_change_under_a_run_stop_it(model: Path, token_file: Path, tmp_path: Path, monkeypatch):
    """What is copied into a block's file is what the block was computed with."""
    float_pass = run.float_pass

    def change_and_quantize(*given: object) -> object:
        change_last_bit(model, "model.layers.0.input_layernorm.weight")
        return float_pass(*given)

    monkeypatch.setattr(run, "float_pass", change_and_quantize)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.input_layernorm\.weight is not what it was"):
        run_quantize(model, token_file, tmp_path / "out", *RTN)


def test_weight_that_is_exchanged_before_its_block_is_read_stops_the_run(
    model: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin, name = run.begin, "model.layers.2.mlp.up_proj.weight"

    def begin_and_exchange(given: object) -> None:
        begin(given)
        info = open_index(model)[name]
        tensors = load_file(info.file)
        save_file({**tensors, name: tensors[name].flip(0)}, info.file, {"format": "pt"})

    monkeypatch.setattr(run, "begin", begin_and_exchange)
    with pytest.raises(CheckpointError, match=f"tensor {name} is not what it was when the run began"):
        run_quantize(model, token_file, tmp_path / "out", *RTN)
    assert committed(tmp_path / "out") == 2


def test_run_goes_on_from_where_model_and_text_are_now(
    untied: Path, begun: Path, output: Path, whole: Path, token_file: Path, tmp_path: Path
):
    model = shutil.copytree(untied, tmp_path / "elsewhere", copy_function=shutil.copy)  # other times as well
    config = json.loads((model / "config.json").read_text()) | {"transformers_version": "6.1", "use_cache": False}
    (model / "config.json").write_text(json.dumps(config))
    text = tmp_path / "text.safetensors"
    save_file({"ids": load_file(token_file)["tokens"]}, text)
    there = (*RTN, "--calib.column", "ids", "--calib.split", "test")
    run_quantize(model, text, output, *there)
    assert made_by(output) == made_by(whole)
    run_quantize(model, text, output, *there, "--redo", "1")
    assert made_by(output) == made_by(whole)
    committed = (output / "ledger.jsonl").read_bytes()
    run_quantize(untied, token_file, output, *RTN, "--redo", "1")  # the same redo, which is done
    assert (output / "ledger.jsonl").read_bytes() == committed


def test_run_that_was_begun_before_its_source_was_noted_goes_on(
    model: Path, output: Path, whole: Path, token_file: Path
):
    ledger, manifest = output / "ledger.jsonl", json.loads((output / "manifest.json").read_text())
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    of_before = [{name: line[name] for name in line if name not in ("source", "bytes", "seal")} for line in lines]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in of_before))
    del manifest["model"]["settings"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config + "\n")  # of such a run the file itself must be the same
    with pytest.raises(ResumeError, match=r"different: model\.config"):
        run_quantize(model, token_file, output, *RTN)
    (model / "config.json").write_text(config)
    run_quantize(model, token_file, output, *RTN)
    assert made_by(output) == made_by(whole)


def test_tuning_is_told_where_the_text_is(untied: Path, token_file: Path, tmp_path: Path):
    text, moved, output = (tmp_path / name for name in ("text.safetensors", "moved.safetensors", "run"))
    shutil.copy(token_file, text)
    run_quantize(untied, text, output, *RTN)
    run_tune(output, untied, tmp_path / "before")
    save_file({"ids": load_file(text)["tokens"]}, moved)
    text.unlink()
    with pytest.raises(ShardQError, match=f"{text}.*calibrated on it: restore it, or say with --calib.dataset where"):
        run_tune(output, untied, tmp_path / "after")
    run_tune(output, untied, tmp_path / "after", "--calib.dataset", moved, "--calib.column", "ids")
    assert result_files(tmp_path / "after") == result_files(tmp_path / "before")
    other = tiny.save_tokens(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(ConfigError, match=r"other.safetensors: gives other tokens than those that .* calibrated on"):
        run_tune(output, untied, tmp_path / "third", "--calib.dataset", other)


NOT_FINITE = [("lm_head.weight", float("nan")), (EMBEDDING, float("inf"))]
METHODS: dict[str, tuple] = {
    "rtn": RTN,
    "output": ("--optimize.last_block", "output"),
    "predictions": ("--optimize.last_block", "predictions"),
}


@pytest.mark.parametrize("more", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name, value", NOT_FINITE)
def test_value_outside_the_blocks_that_is_not_finite_is_found_before_work(
    model: Path, token_file: Path, tmp_path: Path, name: str, value: float, more: tuple
):
    put(model, name, value)
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds {value} at \[299, 63\]"):
        run_quantize(model, token_file, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_run_of_an_earlier_version_whose_head_is_not_finite_goes_nowhere(
    model: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output, fault = tmp_path / "out", "tensor lm_head.weight holds nan"
    put(model, "lm_head.weight", float("nan"))
    with monkeypatch.context() as unseeing:
        unseeing.setattr("shardq.formats.source._is_finite", lambda *_: True)
        run_quantize(model, token_file, output, *RTN)
    for kind in ("hf", "compressed-tensors", "gptq", "gguf", "onnx"):
        with pytest.raises(CheckpointError, match=fault):
            export(parse("export", [str(output), "--format", kind]), ONE_RANK)
        assert not (output / kind).exists()
    with pytest.raises(CheckpointError, match=fault):
        run_tune(output, model, tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "manifest.json").exists()
    with pytest.raises(CheckpointError, match=fault):
        run_quantize(model, token_file, output, *RTN, "--export.formats", "hf")


def test_ranks_that_read_other_bytes_are_told_apart(untied: Path, monkeypatch: pytest.MonkeyPatch):
    skeleton = open_skeleton(untied)
    theirs = source.check_outside(skeleton)
    monkeypatch.setattr(source, "on_rank_zero", lambda ranks, work: theirs)
    monkeypatch.setattr(source, "together", lambda ranks, work: work())
    infos, digests = stored_in(source.outside_blocks(skeleton)), skeleton.source.digests
    source.agree(digests, infos, replace(ONE_RANK, world_size=2))
    digests["lm_head.weight"] = "0" * 32
    with pytest.raises(CheckpointError, match="tensor lm_head.weight is not what rank 0 reads; give every host the sa"):
        source.agree(digests, infos, replace(ONE_RANK, world_size=2))


def test_long_reading_is_said_beforehand(untied: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    said: list[str] = []
    source.begin_with(open_skeleton(untied), {}, ONE_RANK, said.append)
    assert said == []
    monkeypatch.setattr(source, "LARGE_BYTES", 1000)
    source.begin_with(open_skeleton(untied), {}, ONE_RANK, said.append)
    assert len(said) == 1 and "reading what lies outside the blocks" in said[0]
