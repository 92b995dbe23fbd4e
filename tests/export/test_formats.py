"""Every format answers every question."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from shardq.config import ExportConfig, ExportOptions
from shardq.errors import ConfigError
from shardq.export.base import Format
from shardq.export.checkpoint import Checkpoint
from shardq.export.chosen import (
    FORMATS,
    check_installed,
    check_options,
    checkpoints_of,
    format_of,
    formats_of,
    served_as,
)
from shardq.formats.options import AimetOptions
from shardq.formats.shards import TensorInfo
from shardq.formats.source import as_stored
from shardq.model.skeleton import open_skeleton
from shardq.quant.integer_grid import IntegerGrid
from shardq.rundir.room import HEADER_BYTES

GRID = IntegerGrid(bits=4, symmetric=True, group_size=32)
GRIDS = {"model.layers.0.mlp.up_proj": GRID}
SHAPE = 1000, 32  # a scale for each output
EVERY = [format_of(name, ExportOptions()) for name in FORMATS]
SERVED = {
    "compressed-tensors": "vllm serve",
    "gptq": "vllm serve",
    "hf": "from_pretrained",
    "onnx": "onnxruntime",
    "gguf": "llama-cli",
    "aimet": "load_encodings",
}
every_format = pytest.mark.parametrize("chosen", EVERY, ids=FORMATS)


@every_format
def test_a_format_has_the_name_that_options_give_it(chosen: Format):
    assert FORMATS[EVERY.index(chosen)] == chosen.name


@every_format
def test_a_format_says_how_it_is_served(chosen: Format):
    text = chosen.how_to_serve(GRIDS, "AutoModelForMultimodalLM")
    assert SERVED[chosen.name] in text and "AutoModelForCausalLM" not in text


@every_format
def test_a_format_knows_its_size(chosen: Format):
    weights, scales = 32_000, 1000
    packed = weights // 2 + 4 * scales + 3 * HEADER_BYTES
    expected = {
        "compressed-tensors": packed,
        "gptq": packed,
        "hf": 4 * weights,
        "onnx": weights // 2 + 5 * scales,
        "gguf": weights // 32 * 20,
        "aimet": 2 * 26 * scales,
    }
    size = expected[chosen.name]
    assert chosen.matrix_bytes(SHAPE, GRID, itemsize=2) == size
    assert chosen.holds_weights == (chosen.name != "aimet")
    shapes = {"up": SHAPE, "norm": (9,)}
    infos = [TensorInfo(name, Path("x"), "BF16", shape, 0, 2 * math.prod(shape)) for name, shape in shapes.items()]
    tensors = {info.name: as_stored(info) for info in infos}
    others = (2 * 9 + 2 * HEADER_BYTES) * chosen.holds_weights
    assert chosen.block_bytes(tensors, {"up": GRID}, itemsize=2) == size + others


def test_options_change_sizes():
    options = ExportOptions(dtype="source", activation_bits=8, aimet=AimetOptions(version="0.6.1"))
    sizes = [format_of(name, options).matrix_bytes(SHAPE, GRID, 2) for name in ("hf", "compressed-tensors", "aimet")]
    assert sizes == [64_000, 32_000, 2 * 160 * 1000]


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_a_format_of_one_grid_names_linears_that_are_on_two(name: str, llama: Path):
    up, down = (f"model.layers.0.mlp.{kind}_proj" for kind in ("up", "down"))
    grids = {up: replace(GRID, bits=8), down: GRID}
    chosen = format_of(name, ExportOptions())
    with pytest.raises(ConfigError, match=f"{name} has one grid .*{up} is on 8 bits, .*{down} on 4 bits, .*choose an"):
        chosen.check(open_skeleton(llama), grids)
    format_of("hf", ExportOptions()).check(open_skeleton(llama), grids)


@every_format
def test_a_format_knows_what_it_cannot_hold(chosen: Format, llama: Path):
    wrong = {
        "compressed-tensors": IntegerGrid(bits=3, symmetric=True),
        "gptq": IntegerGrid(bits=5, symmetric=True),
        "gguf": GRID,  # this model has no tokenizer
        "aimet": None,
    }
    skeleton, name = open_skeleton(llama), "model.layers.0.mlp.up_proj"
    if chosen.name != "gguf":
        chosen.check(skeleton, {name: GRID})
    if grid := wrong.get(chosen.name):
        with pytest.raises(Exception, match="hf instead|tokenizer"):
            chosen.check(skeleton, {name: grid})


@every_format
def test_a_missing_package_is_named(chosen: Format, monkeypatch: pytest.MonkeyPatch):
    check_installed(chosen)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if chosen.package is None:
        check_installed(chosen)
        return
    with pytest.raises(ConfigError, match=rf"format {chosen.name}: the package {chosen.package} is missing; pip"):
        check_installed(chosen)


def test_formats_whose_scales_a_target_rounds():
    rounded = {chosen.name: chosen.rounded_by for chosen in EVERY if chosen.rounded_by}
    assert rounded == {"compressed-tensors": "vllm", "gptq": "vllm", "gguf": "gguf"}
    assert served_as("vllm", ExportOptions(formats="gptq")).name == "compressed-tensors"
    assert served_as("gguf", ExportOptions()).name == "gguf"


def test_checkpoints_are_written_as_a_run_goes_on():
    options = ExportOptions(formats=FORMATS)
    assert list(formats_of(options)) == list(FORMATS)
    assert list(checkpoints_of(options)) == ["compressed-tensors", "gptq", "hf"]
    assert all(isinstance(chosen, Checkpoint) for chosen in checkpoints_of(options).values())


@every_format
def test_options_of_another_format_are_refused(chosen: Format):
    asked = {
        "dtype": {"dtype": "source"},
        "activation_bits": {"activation_bits": 8},
        "aimet.version": {"aimet": AimetOptions(version="2.0.0")},
    }
    for option, values in asked.items():
        config = ExportConfig("run", chosen.name, **values)
        if option in chosen.options:
            check_options(config)
            continue
        with pytest.raises(ConfigError, match=rf"{option}: .* must be left out but for --format "):
            check_options(config)
