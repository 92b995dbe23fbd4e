"""The example of the documentation runs, cell by cell, on a model of this suite's."""

import ast
import re
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "quantize.py"


def code_cells(text: str) -> list[str]:
    """The cells that are no prose; lines are left where they are, for tracebacks."""
    cells, line = [], 0
    for cell in re.split("^# %%", text, flags=re.MULTILINE):
        if not cell.startswith(" [markdown]"):
            cells.append("\n" * line + cell)
        line += cell.count("\n")
    return cells[1:]  # what stands before the first mark


def test_example_runs_and_shows_what_it_says(llama, token_file, tmp_path, capsys):
    settings, *cells = code_cells(EXAMPLE.read_text())
    names: dict = {}
    exec(compile(settings, EXAMPLE, "exec"), names)
    chosen = {name for name in names if name.isupper()}
    text = {"dataset": str(token_file), "sequence_length": 64}
    ours = {
        "MODEL": str(llama),
        "OUTPUT": str(tmp_path / "out"),
        "CALIBRATION": text | {"samples": 8},
        "EVALUATION": text,
        "OPTIMIZE": {"iterations": 4, "compile": "off"},
    }
    assert ours.keys() == chosen
    names |= ours
    for cell in cells:
        exec(compile(cell, EXAMPLE, "exec"), names)
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("3 blocks in ") for line in said)
    assert [line.split()[0] for line in said if " bytes" in line and "loss" in line] == [
        f"model.layers.{number}" for number in range(2)
    ]
    assert any("perplexity" in line and str(tmp_path / "out") in line for line in said)
    facts = {"output": str(tmp_path / "out"), "blocks": 3, "linears": 21}
    assert facts.items() <= ast.literal_eval(said[-2]).items()
    assert said[-1] == "quantize(): quant.bit: no such option; did you mean quant.bits?"
