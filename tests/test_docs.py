"""README and docs against the code: commands, links, options, verbs, formats, exit codes, error texts."""

import ast
import importlib.util
import re
import shlex
import sys
import tomllib
from dataclasses import replace

import pytest
import torch
import yaml

import shardq
from shardq import errors
from shardq.api import config_of
from shardq.checks import check_evaluate, check_quantize
from shardq.cli import parse
from shardq.export.chosen import FORMATS
from shardq.formats.quantized_source import DECODERS
from shardq.optimize.options import resolved
from shardq.parallel.ranks import Ranks
from shardq.shipped import DEEPSPEED, shipped
from shardq.verbs import COMMANDS
from shown import LINES, PAGES, ROOT, ours

OTHER_PROGRAMS = ("vllm", "llama-cli", "pip", "mkdocs", "docker", "export")
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
    source = "".join(other.read_text() for other in (ROOT / script.group()).parent.rglob("*.py"))
    if script.group().endswith(".py") and line.startswith("python"):
        options = [word.removeprefix("--") for word in shlex.split(line.split(" -- ")[0]) if word.startswith("--")]
        assert all(option in source for option in options), line


def python_calls(text):
    """Calls of shardq's functions in the Python blocks of a page: (verb, first argument, options)."""
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("shardq."):
                options = {each.arg: ast.literal_eval(each.value) for each in node.keywords}
                yield node.func.attr, ast.literal_eval(node.args[0]), options


def test_python_calls_have_options_that_are_there():
    calls = [call for text in PAGES.values() for call in python_calls(text)]
    assert {verb for verb, _, _ in calls} >= {"quantize", "evaluate", "export", "verify"}
    for verb, first, options in calls:
        if verb in COMMANDS:
            config_of(verb, first, (), options)
        else:
            assert verb in shardq.__all__


def test_settings_that_pages_show_are_yaml():
    blocks = [block for text in PAGES.values() for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert blocks and all(all(yaml.safe_load_all(block)) for block in blocks)


def test_extras_that_pages_install_are_declared():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = re.findall(r"pip install '(?:shardq|\.)\[([\w,]+)\]'", "\n".join(PAGES.values()))
    assert {name for names in shown for name in names.split(",")} <= set(extras) and shown


def test_readme_shows_every_verb():
    assert {ours(line)[0] for page, line in COMMAND_LINES if page == "README.md"} == set(COMMANDS)


def test_readme_is_read_in_five_minutes():
    assert len(PAGES["README.md"].splitlines()) <= 250


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text):
    """The anchors of a page's headings, as Markdown makes them of plain words."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


LINKS = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)]+)\)", without_code(text))]


@pytest.mark.parametrize(("page", "link"), [row for row in LINKS if not row[1].startswith("https://")])
def test_links_within_the_documents_resolve(page, link):
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target.read_text())


def test_the_site_shows_every_page():
    def pages(entry):
        return [entry] if isinstance(entry, str) else [page for part in entry for page in pages(entry[part] if
                                                       isinstance(entry, dict) else part)]  # fmt: skip

    shown = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(shown) == sorted(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/"))


def test_tables_from_the_code_are_as_the_code_is():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "tools" / "docs_tables.py")
    docs_tables = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = docs_tables
    spec.loader.exec_module(docs_tables)
    for name, (page, text) in docs_tables.PARTS.items():
        assert docs_tables.with_part(PAGES[page], name, text()) == PAGES[page], "run python tools/docs_tables.py"


def test_every_format_has_a_section():
    assert set(FORMATS) <= anchors(PAGES["docs/formats.md"])


TROUBLES = PAGES["docs/troubleshooting.md"]


def test_every_kind_of_quantized_source_is_listed():
    models = (ROOT / "docs" / "models.md").read_text()
    assert [method for method in DECODERS if f"`{method}`" not in models] == []


def test_every_exit_code_is_explained():
    classes = [each for each in vars(errors).values() if isinstance(each, type) and hasattr(each, "exit_code")]
    explained = {int(code) for code in re.findall(r"^\| (\d+) \|", TROUBLES, re.MULTILINE)}
    assert {each.exit_code for each in classes} | {0} == explained


def test_texts_to_look_up_are_texts_of_the_code():
    """Each first cell is in a text of the package, apart from what stands for `...` in it."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "shardq").rglob("*.py")]
    texts = [node.value for tree in trees for node in ast.walk(tree)
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    shown = re.findall(r"^\| `([^`]+)` \|", TROUBLES, re.MULTILINE)
    parts = [part.strip() for cell in shown for part in cell.split("…")]
    assert len(parts) > 40
    assert [part for part in parts if not any(part in text for text in texts)] == []


def test_deepspeed_settings_are_explained():
    assert all(f"`{name}`" in PAGES["docs/tasks/ranks.md"] for name in shipped(DEEPSPEED))
