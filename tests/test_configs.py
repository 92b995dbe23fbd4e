"""Every recipe and DeepSpeed file passes the checks; recipes, options and help mean the same."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from shardq.checks import check_quantize
from shardq.cli import COMMANDS, parse
from shardq.config import QuantOptions
from shardq.optimize.options import resolved
from shardq.parallel.ranks import Ranks
from shardq.parallel.zero import Zero

ROOT = Path(__file__).parents[1]


def ranks_of(number):
    return Ranks(0, number, torch.device("cpu"))


def check_on_two_ranks(config):
    optimize = resolved(config.optimize, config.quant.bits, 2, has_bf16=False)
    check_quantize(replace(config, optimize=optimize), ranks_of(2))


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_recipes_parse_and_pass_the_checks(recipe):
    check_on_two_ranks(parse("quantize", ["--model", "model", "--config", str(recipe)]))


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/deepspeed/*.json")), ids=lambda path: path.name)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_settings_are_accepted_by_us_and_by_deepspeed(engine, file):
    config = parse("quantize", ["--model", "model", "--parallel.engine", engine, "--parallel.deepspeed", str(file)])
    check_on_two_ranks(config)
    settings = Zero(config.parallel, ranks_of(2)).settings
    given = json.loads(file.read_text())["zero_optimization"]
    assert given.items() <= settings["zero_optimization"].items()
    accepted = DeepSpeedZeroConfig(**settings["zero_optimization"]).model_dump(by_alias=True)
    assert given.items() <= accepted.items()


@pytest.mark.parametrize(
    "bits, symmetric, full_range", [(2, True, True), (2, False, False), (4, True, True), (5, True, False)]
)
def test_grid_is_full_range_by_default_up_to_4_symmetric_bits_alone(bits, symmetric, full_range):
    assert QuantOptions(bits=bits, symmetric=symmetric).grid.full_range is full_range
    assert QuantOptions(bits=bits, full_range=not full_range).grid.full_range is not full_range
    assert not QuantOptions(bits=bits, group_size=64, decompressed_bits=8).grid.full_range


@pytest.mark.parametrize("recipe_comes_first", [True, False])
def test_options_win_over_recipes_wherever_they_stand(tmp_path, recipe_comes_first):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: from_recipe\nquant: {bits: 3, group_size: 64}\n")
    given = [["--config", str(recipe)], ["--quant.bits", "2"]]
    config = parse("quantize", sum(given if recipe_comes_first else given[::-1], []))
    assert (config.model, config.quant.bits, config.quant.group_size) == ("from_recipe", 2, 64)


def test_no_linears_to_ignore_but_the_default_ones(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nquant: {ignore: null}\n")
    assert parse("quantize", ["--config", str(recipe)]).quant.ignored == QuantOptions().ignored


def test_later_recipes_win_over_earlier_ones(tmp_path):
    for name, content in (("a", "model: a\nseed: 1"), ("b", "model: b")):
        (tmp_path / name).write_text(content)
    config = parse("quantize", [f"--config={tmp_path / 'a'}", "--config", str(tmp_path / "b")])
    assert (config.model, config.seed) == ("b", 1)


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_model_may_stand_alone_before_and_behind_options(command):
    for arguments in (["m", "--quant.bits", "3"], ["--quant.bits", "3", "m"], ["--model", "m", "--quant.bits=3"]):
        config = parse(command, arguments)
        assert (config.model, config.quant.bits) == ("m", 3)


@pytest.mark.parametrize("command", ["tune", "export", "verify"])
def test_run_may_be_named(command):
    more = ["--model", "m"] if command == "tune" else []
    assert parse(command, ["r", *more]) == parse(command, ["--run", "r", *more])


PATTERNS = [
    ("a,b", ("a", "b")), (" a , b, ", ("a", "b")), ("re:x{1,2},b", ("re:x{1,2}", "b")), ("[a, 're:x{1,2}']",
    ("a", "re:x{1,2}")), ("re:(a,b)[c,d],e", ("re:(a,b)[c,d]", "e")), (r"re:\(,b", (r"re:\(", "b")), ("null", ()),
    ("[ab]*.x", ("[ab]*.x",)),
]  # fmt: skip


@pytest.mark.parametrize("text, items", PATTERNS)
def test_lists_take_commas_and_yaml_alike_in_options_and_recipes(tmp_path, text, items):
    (tmp_path / "recipe.yaml").write_text(f"quant:\n  ignore: {text if text != '[ab]*.x' else repr(text)}\n")
    for arguments in (["--quant.ignore", text], ["--config", str(tmp_path / "recipe.yaml")]):
        assert parse("quantize", ["m", *arguments]).quant.ignore == items


def test_formats_take_commas_and_yaml_alike(tmp_path):
    (tmp_path / "recipe.yaml").write_text("export: {formats: 'gguf, onnx'}")
    for arguments in (["--export.formats", "gguf,onnx"], ["--export.formats", "[gguf, onnx]"],
                      ["--config", str(tmp_path / "recipe.yaml")]):  # fmt: skip
        assert parse("quantize", ["m", *arguments]).export.asked == ("gguf", "onnx")


VALUES = [
    ("weight_lr: 1e-3", "optimize", "weight_lr", 1e-3), ("compile: off", "optimize", "compile", "off"),
    ("samples: null", "calib", "samples", None), ("samples:", "calib", "samples", None),
    ("dataset: 123", "calib", "dataset", "123"), ("offload: True", "parallel", "offload", True),
    ("activation_bits: 8", "export", "activation_bits", 8), ("folder: null", "cache", "folder", None),
]  # fmt: skip


@pytest.mark.parametrize("text, section, name, value", VALUES)
def test_values_of_recipes_and_options_mean_the_same(tmp_path, text, section, name, value):
    (tmp_path / "recipe.yaml").write_text(f"model: m\n{section}: {{{text}}}\nquant:\n")
    written = text.partition(":")[2].strip() or "null"
    for arguments in (["--config", str(tmp_path / "recipe.yaml")], ["m", f"--{section}.{name}", written]):
        found = getattr(getattr(parse("quantize", arguments), section), name)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize("command", COMMANDS)
def test_printed_config_is_a_recipe_of_the_same_options(command, tmp_path, capsys):
    arguments = ["a", *(["--model", "b"] if command == "tune" else [])]
    with pytest.raises(SystemExit) as left:
        parse(command, [*arguments, "--print-config"])
    assert left.value.code == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    assert parse(command, ["--config", str(tmp_path / "recipe.yaml")]) == parse(command, arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as left:
        parse(command, ["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out.split("\noptions:")[1]
    explained = [
        re.sub(r"\(type:.*?\)", "", " ".join(option.split()[2:])) for option in re.split(r"\n  (?=--)", shown)[1:]
    ]
    assert all(len(text) > 12 for text in explained), explained
    names = [field.name for field in fields(COMMANDS[command].config)]
    assert all(re.search(rf"\n  ([A-Z]+, )?--{name}\b", shown) for name in names), shown
