#!/usr/bin/env python
"""Writes the tables of README and docs/ that come from the code and from results: python tools/docs_tables.py

Each part stands between two comments of its page, `<!-- NAME: by tools/docs_tables.py -->` and `<!-- end of NAME -->`.
tests/test_docs.py compares them.
"""

import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import shardq  # noqa: E402
from shardq import api, summaries  # noqa: E402
from shardq.errors import ConfigError  # noqa: E402
from shardq.formats import compressed_tensors, gguf_tensors, gptq  # noqa: E402
from shardq.help import docstrings  # noqa: E402
from shardq.quant.integer_grid import IntegerGrid  # noqa: E402
from shardq.rundir.loaded import FinishedBlock, LoadedRun  # noqa: E402
from shardq.shipped import RECIPES, shipped  # noqa: E402
from shardq.verbs import COMMANDS  # noqa: E402

KINDS: dict[str, dict[str, object]] = {
    "symmetric": {"symmetric": True},
    "symmetric, full-range": {"symmetric": True, "full_range": True},
    "asymmetric": {"symmetric": False},
    "two-level (LPBQ)": {"symmetric": True, "decompressed_bits": 8},
}
GROUP_SIZES = {"per-channel": None, "groups": 64}
PROGRAMS: dict[str, Callable[[IntegerGrid], object]] = {
    "`compressed-tensors`": lambda grid: compressed_tensors.check_grid(grid, 16),
    "the same, int8 activations": lambda grid: compressed_tensors.check_grid(grid, 8),
    "`gptq`": gptq.check_grid,
    "`gptq` in vLLM": lambda grid: _require(gptq.is_served_by_vllm(grid)),
    "`gguf`": gguf_tensors.block_type,
    "`onnx`": lambda grid: None,
    "`aimet`": lambda grid: None,
    "`hf`": lambda grid: None,
}


def options_text() -> str:
    """A table for each command and each group of its options."""
    parts = []
    for verb, command in COMMANDS.items():
        for title, rows in _groups(command.config, None, "", ""):
            head = f"### {title}" if title else f"## `shardq {verb}`"
            parts.append(f"{head}\n\n{_table(('option', 'meaning', 'values', 'default'), rows)}")
    return "\n".join(parts)


def _groups(config_class: type, start: object, prefix: str, title: str) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """The options of a class and of its sections; defaults are those of `start`, or else the fields' own."""
    hints, texts = get_type_hints(config_class), docstrings(config_class)
    rows = []
    for each in fields(config_class):
        if not is_dataclass(hints[each.name]):
            default = _default(each.default if start is None else getattr(start, each.name))
            rows.append((f"`--{prefix}{each.name}`", _cell(texts[each.name]), _values(hints[each.name]), default))
    yield title, rows
    for each in fields(config_class):
        section = hints[each.name]
        if is_dataclass(section):
            section_start = each.default_factory() if start is None else getattr(start, each.name)
            yield from _groups(section, section_start, f"{prefix}{each.name}.", section.__doc__.removesuffix("."))


def _values(hint: object) -> str:
    """What an option takes, where that is a choice or not plain text."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    if get_origin(hint) is tuple:
        return _values(parts[0]) or "names"
    if parts:
        return next(filter(None, map(_values, parts)), "")
    return {int: "a whole number", float: "a number", bool: "`true`, `false`"}.get(hint, "")


def _default(value: object) -> str:
    if value is MISSING:
        return "required"
    if value in (None, ()):
        return ""
    shown = ", ".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value
    return _cell(f"`{shown}`")


def recipes_text() -> str:
    """The recipes of the package, with the comment that each begins with."""
    rows = []
    for name, file in shipped(RECIPES).items():
        comment = re.match(r"(#.*\n)+", file.read_text()).group()
        rows.append((f"`{name}`", _cell(" ".join(line.strip("# ") for line in comment.splitlines()))))
    return _table(("recipe", "what it is for"), rows)


def formats_text() -> str:
    """Which format, and which program, holds which grid."""
    rows = []
    for kind, facts in KINDS.items():
        by_bits = [(bits, _held(kind, bits, facts)) for bits in range(2, 9)]
        for cells, alike in groupby([row for row in by_bits if row[1]], key=lambda row: row[1]):
            numbers = [bits for bits, _ in alike]
            bits = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
            rows.append((kind, bits, *cells))
    return _table(("weight grid", "bits", *PROGRAMS), rows)


def _held(kind: str, bits: int, facts: dict[str, object]) -> tuple[str, ...]:
    """For each program how it holds a grid; nothing where there is no such grid."""
    sizes = {name: size for name, size in GROUP_SIZES.items() if size or "decompressed_bits" not in facts}
    if "decompressed_bits" in facts and bits >= 8:
        return ()
    grids = {name: IntegerGrid(**{"bits": bits, "group_size": size} | facts) for name, size in sizes.items()}
    cells = []
    for holds in PROGRAMS.values():
        held = [name for name, grid in grids.items() if _is_held(holds, grid)]
        cells.append("yes" if len(held) == len(grids) else " ".join(held) or "no")
    return tuple(cells)


def _is_held(holds: Callable[[IntegerGrid], object], grid: IntegerGrid) -> bool:
    try:
        holds(grid)
    except ConfigError:
        return False
    return True


def _require(holds: bool) -> None:
    if not holds:
        raise ConfigError("not served")


def demo_text() -> str:
    """The demo's results as its commands printed them, kept in docs/results/demo.json."""
    told = json.loads((ROOT / "docs/results/demo.json").read_text())
    run, size = told["run"], [f"{told[name] / 1e6:.0f} MB" for name in ("source_bytes", "quantized_bytes")]
    cost = f"{run['seconds']:.0f} s", f"{run['peak_rss_bytes'] / 2**20:.0f} MiB"
    perplexity = {name: f"{told[name]['perplexity']:.3f}" for name in ("float", "rtn", "quantized")}
    rows = [
        ("float (bfloat16)", perplexity["float"], "", "", size[0]),
        ("round-to-nearest, 4 bits", perplexity["rtn"], "", "", ""),
        ("**shardq, 4 bits**", f"**{perplexity['quantized']}**", *cost, f"{size[1]}, of which 57 MB are embeddings"),
    ]
    return _table(("model", "perplexity", "quantizing", "peak memory a rank", "tensors"), rows)


def models_text() -> str:
    """What the sweep found of every family and its forms: how many, those that run or do not, and the others."""
    rows = [line.split("\t") for line in (ROOT / "tests/families/support.tsv").read_text().splitlines()]
    by_outcome: dict[str, list[str]] = defaultdict(list)
    for family, outcome, *_ in rows:
        by_outcome[outcome].append(family)
    decoders = [row for row in rows if row[1] not in ("not built", "no decoder")]
    kinds = {"equal": "run", "refused": "are refused in one line"}
    counts = [f"{len(by_outcome[outcome])} {said}" for outcome, said in kinds.items()]
    counts += [f"{len(found)} end in: {outcome}" for outcome, found in by_outcome.items()
               if outcome not in (*kinds, "not built", "no decoder")]  # fmt: skip
    cells = [_model_cells(*row) for row in decoders]
    text = f"Of {len(decoders)} decoders and forms {', '.join(counts)}.\n\n"
    text += _table(("`model_type`", "form", "runs", "quantized of the blocks", "why not"), cells)
    for outcome, said in (
        ("no decoder", "No decoders, though listed as causal"),
        ("not built", "Not built from a small config"),
    ):
        text += (
            f"\n{said}: {', '.join(f'`{family}`' for family in by_outcome[outcome])}.\n" if by_outcome[outcome] else ""
        )
    return text


def _model_cells(name: str, outcome: str, stage: str, share: str, detail: str) -> tuple[str, ...]:
    family, _, form = name.partition(", ")
    is_equal = outcome == "equal"
    why = "" if is_equal else re.sub(r"^model: ", "", detail) or outcome
    return f"`{family}`", form, "yes" if is_equal else "no", f"{share} %" if is_equal else "", _cell(why)


def python_text() -> str:
    """The functions of `shardq.api`, and what they give."""
    parts = []
    for name, function in inspect.getmembers(api, inspect.isfunction):
        if function.__module__ == api.__name__ and name in shardq.__all__:
            purpose, *sections = inspect.getdoc(function).split("\n\n")
            signature = str(inspect.signature(function)).split(" -> ")[0]
            names = re.sub(r": [^,)=]+?(?= =|[,)])", "", signature).replace(" = ", "=")
            parts.append(f"### `shardq.{name}{names}`\n\n{purpose}\n")
            parts += [_section(section) for section in sections]
    for described in (LoadedRun, FinishedBlock):
        purpose, *sections = inspect.getdoc(described).split("\n\n")
        parts += [f"### `{described.__name__}`\n\n{purpose}\n", *map(_section, sections)]
        methods = inspect.getmembers(described, lambda each: inspect.isfunction(each) and not each.__name__[0] == "_")
        lines = [f"- `{name}()`: {' '.join(inspect.getdoc(method).split())}\n" for name, method in methods]
        parts += ["Methods:\n\n" + "".join(lines)] if lines else []
    for name, summary in inspect.getmembers(summaries, inspect.isclass):
        if summary.__module__ == summaries.__name__:
            rows = [(f"`{field}`", _cell(text)) for field, text in docstrings(summary).items()]
            parts.append(f"### `{name}`\n\n{summary.__doc__}\n\n{_table(('key', 'meaning'), rows)}")
    return "\n".join(parts)


def _section(text: str) -> str:
    """`Args:` or the like of a docstring, as a list."""
    head, _, body = text.partition("\n")
    entries = re.split(r"\n {4}(?! )", "\n" + body)[1:]
    lines = [" ".join(entry.split()) for entry in entries]
    return f"{head}\n\n" + "\n".join("- `{}`: {}".format(*line.split(": ", 1)) for line in lines) + "\n"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "results of the demo": ("README.md", demo_text),
    "demo": ("docs/results.md", demo_text),
    "recipes": ("docs/options.md", recipes_text),
    "options": ("docs/options.md", options_text),
    "grids and programs": ("docs/formats.md", formats_text),
    "models": ("docs/models.md", models_text),
    "functions": ("docs/python.md", python_text),
}


def with_part(page: str, name: str, text: str) -> str:
    """A page with the part of a name replaced."""
    begin, end = f"<!-- {name}: by tools/docs_tables.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"a page has no place for {name}; put {begin} and {end} there")
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n{end}", page)


if __name__ == "__main__":
    for name, (path, text) in PARTS.items():
        file = ROOT / path
        file.write_text(with_part(file.read_text(), name, text()))
        print(f"{path}: {name}")
