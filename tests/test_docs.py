"""README and docs against the code: every command can be parsed by the program it is for, or run by a test."""

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardq.checks import check_evaluate, check_quantize
from shardq.cli import COMMANDS, parse
from shardq.optimize.options import resolved
from shardq.parallel.ranks import Ranks

ROOT = Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in
         [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]}  # fmt: skip
OTHER_PROGRAMS = ("vllm", "llama-cli", "touch", "pip", "ruff", "pytest", "kubectl", "sbatch")
STARTERS = r"(?:torchrun|shardq-ranks|python launch/ranks\.py)(?: --?[\w-]+(?: (?!launch/|shardq)[\w./:$-]+)?)*"
OURS = re.compile(rf"(?:{STARTERS} |python |srun .*?)?(?:launch/(\w+)\.py|shardq (\w+))(?: (.*))?")


def shown_lines(text):
    """The commands in the shell blocks of a page, without their comments; a backslash joins lines."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield shlex.join(words)


def ours(line):
    """A command of shardq in a line: (verb, number of ranks, arguments); None where it is another program's."""
    found = OURS.fullmatch(line)
    verb = found and (found.group(1) or found.group(2))
    if not verb or verb not in COMMANDS:
        return None
    ranks = re.search(r"--nproc-per-node (\d+)", line)
    return verb, int(ranks.group(1)) if ranks else 1, shlex.split(found.group(3) or "")


LINES = [(page, line) for page, text in PAGES.items() for line in shown_lines(text)]
COMMAND_LINES = [(page, line) for page, line in LINES if ours(line)]


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_shown_commands_parse(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb, num_ranks, arguments = ours(line)
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            parse(verb, arguments)
        return
    config = parse(verb, arguments)
    if verb == "evaluate":
        check_evaluate(config)
    elif verb == "quantize":
        optimize = resolved(config.optimize, config.quant.bits, num_ranks, has_bf16=False)
        check_quantize(replace(config, optimize=optimize), Ranks(0, num_ranks, torch.device("cpu")))


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in LINES if not ours(line)])
def test_other_commands_name_programs_and_options_that_are_there(page, line):
    """Scripts of the checkout have the options that are shown; what else is shown is a program that is listed here."""
    script = re.search(r"(?:tools|tests)/[\w/]+\.(?:sh|py)", line)
    if script is None:
        program = line.split()[0]
        assert program in OTHER_PROGRAMS or line == "shardq --help", line
        return
    assert (ROOT / script.group()).is_file(), line
    source = "".join(other.read_text() for other in (ROOT / script.group()).parent.glob("*.py"))
    if script.group().endswith(".py") and line.startswith("python"):
        options = [word.removeprefix("--") for word in shlex.split(line.split(" -- ")[0]) if word.startswith("--")]
        assert all(option in source for option in options), line


def test_extras_that_pages_install_are_declared():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = re.findall(r"pip install '(?:shardq|\.)\[([\w,]+)\]'", "\n".join(PAGES.values()))
    assert {name for names in shown for name in names.split(",")} <= set(extras) and shown


def test_readme_shows_every_verb():
    assert {ours(line)[0] for page, line in COMMAND_LINES if page == "README.md"} == set(COMMANDS)


def test_readme_is_read_in_five_minutes():
    assert len(PAGES["README.md"].splitlines()) <= 250
