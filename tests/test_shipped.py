"""Files that come with the package: found by name wherever the command runs, and all of them in the wheel."""

import re
import tomllib
from pathlib import Path

import pytest

from shardq.cli import parse
from shardq.errors import ConfigError
from shardq.shipped import DEEPSPEED, RECIPES, read_named, shipped
from shardq.spelling import nearest

ROOT = Path(__file__).parents[1]


def test_package_data_has_every_file_of_the_configs():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["shardq"]
    packed = {file.resolve() for pattern in patterns for file in (ROOT / "shardq").glob(pattern)}
    assert {file for file in ROOT.glob("configs/**/*") if file.is_file()} <= packed
    assert {file.resolve() for kind in (RECIPES, DEEPSPEED) for file in shipped(kind).values()} <= packed


def test_dockerfile_copies_what_is_there_and_installs_extras_that_are_declared():
    dockerfile, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    copied = [name for line in re.findall(r"^COPY ([^-].*) \S+$", dockerfile, re.MULTILINE) for name in line.split()]
    assert copied and all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r"\[([a-z,]+)\]\"", dockerfile)
    assert set(extras.split(",")) <= declared.keys()


@pytest.mark.parametrize("recipe", shipped(RECIPES))
def test_recipe_by_name_is_the_file_in_configs(tmp_path, monkeypatch, recipe: str):
    (tmp_path / recipe).mkdir()  # such as the output folder of a run with it
    monkeypatch.chdir(tmp_path)
    by_path = parse("quantize", ["m", "--config", str(ROOT / "configs" / f"{recipe}.yaml")])
    assert parse("quantize", ["m", "--config", recipe]) == by_path


def test_file_without_a_suffix_is_read_where_no_recipe_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "own").write_text("seed: 3")
    monkeypatch.chdir(tmp_path)
    assert parse("quantize", ["m", "--config", "own"]).seed == 3


@pytest.mark.parametrize(
    "name, said",
    [
        ("w4a16-g12", "--config: there is no w4a16-g12; did you mean w4a16-g128? It takes one of aimet, "),
        ("zzz", "--config: there is no zzz. It takes one of aimet, "),
        ("w4a16.yml", "w4a16.yml: cannot be read (No such file or directory); check --config"),
        ("own/w4a16", "own/w4a16: cannot be read (No such file or directory); check --config"),
    ],
)
def test_unknown_recipe_is_one_line(tmp_path, monkeypatch, name: str, said: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse("quantize", ["m", "--config", name])
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_unknown_deepspeed_settings_get_the_names_of_those_there_are():
    with pytest.raises(ConfigError, match="parallel.deepspeed: there is no fruga; did you mean frugal[?] .*overlap"):
        read_named("fruga", DEEPSPEED, "parallel.deepspeed")


@pytest.mark.parametrize(
    "name, meant",
    [("group-size", ["quant.group_size"]), ("W4A16_G128", ["w4a16-g128"]), ("xyz", [])],
)
def test_names_may_differ_in_dashes_and_case(name: str, meant: list[str]):
    assert nearest(name, ["quant.group_size", "w4a16-g128", "w4a16-vllm", "quant.bits"])[: len(meant) or 1] == meant
