"""What the verbs' functions make of their arguments, and what importing the package costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from shardq.api import config_of
from shardq.calib.options import TextOptions
from shardq.cli import parse
from shardq.config import QuantizeConfig, QuantOptions, TuneConfig
from shardq.errors import ConfigError


def test_options_are_those_of_the_command_line():
    sections = {
        "quant": {"bits": 3, "symmetric": False, "ignore": ["*.down_proj", "re:a{1,2}"]},
        "calib": TextOptions(dataset="text.txt", samples=12),
        "optimize": {"weight_lr": 3e-3, "micro_batch": None},
        "export": {"formats": ("hf", "gptq")},
    }
    typed = ["model", "--output", "out", "--quant.bits", "3", "--quant.symmetric", "false", "--quant.ignore",
             "*.down_proj,re:a{1,2}", "--calib.dataset", "text.txt", "--calib.samples", "12",
             "--optimize.weight_lr", "3e-3", "--export.formats", "hf,gptq"]  # fmt: skip
    assert config_of("quantize", Path("model"), (), {"output": Path("out"), **sections}) == parse("quantize", typed)


def test_config_object_comes_back_as_it_is_and_single_options_win():
    config = QuantizeConfig(model="m", quant=QuantOptions(group_size=32, ignore="a,b"), redo="1,2")
    same = config_of("quantize", config, (), {})
    assert (same.quant.ignored, same.quant.grid, same.redo) == (config.quant.ignored, config.quant.grid, "1,2")
    assert config_of("quantize", config, (), {"quant": {"bits": 8}}).quant.grid.bits == 8
    assert config_of("tune", TuneConfig("run", model="m"), (), {}) == TuneConfig("run", model="m")


def test_recipes_come_before_single_options(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.yaml").write_text(f"quant: {{bits: {number + 1}, group_size: {32 * number}}}\n")
    recipes = [tmp_path / "1.yaml", tmp_path / "2.yaml"]
    assert config_of("quantize", "m", recipes[0], {}).quant.group_size == 32
    config = config_of("quantize", "m", recipes, {"quant": {"bits": 8}})
    assert (config.quant.bits, config.quant.group_size) == (8, 64)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"quant": {"bit": 3}}, "quantize(): quant.bit: no such option; did you mean quant.bits?"),
        ({"sed": 3}, "quantize(): sed: no such option; did you mean seed?"),
        ({"seed": 1.5}, "quantize(): seed: 1.5 is not allowed, it must be a whole number"),
        ({"seed": True}, "quantize(): seed: True is not allowed, it must be a whole number"),
        ({"quant": {"method": "none"}}, "quantize(): quant.method: none is not allowed, it must be one of adascale"),
        ({"quant": 4}, "quantize(): quant: must hold options by name, such as quant.bits"),
        ({"calib": {"dataset": object()}}, "quantize(): calib.dataset: an object of object is not allowed"),
    ],
)
def test_refused_option_is_named_with_what_to_do(options, said):
    with pytest.raises(ConfigError) as refused:
        config_of("quantize", "m", (), options)
    assert str(refused.value).startswith(said) and refused.value.agreed


def test_names_of_the_package_are_found_whatever_was_imported_before():
    import shardq.export.chosen  # noqa: F401  the room that has the name of a verb

    assert [name for name in shardq.__all__ if getattr(shardq, name).__name__ != name] == []
    assert callable(shardq.export)
    with pytest.raises(AttributeError, match="quantise"):
        _ = shardq.quantise


def test_importing_the_package_and_its_functions_imports_nothing_heavy():
    program = "import sys, shardq; shardq.quantize; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"
