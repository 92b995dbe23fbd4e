"""The family sweep's program: chosen families take the place of their former rows, the others stay."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import family_sweep  # noqa: E402

from sweep import Row  # noqa: E402


def test_rows_of_chosen_families_are_replaced_and_the_others_stay(tmp_path, monkeypatch, capsys):
    outcomes = {"llama": Row("llama", "equal", "quantized", 98), "gpt2": Row("gpt2", "refused", "few", 0, "a\tb\nc")}
    monkeypatch.setattr(family_sweep, "sweep_apart", outcomes.__getitem__)
    table = tmp_path / "support.tsv"
    table.write_text("opt\tequal\tquantized\t99\t\nno family\tequal\tquantized\t1\t\ngpt2\ttraceback\tfew\t0\tx\n")
    family_sweep.main(table, "llama", "gpt2")
    assert [Row.parsed(line) for line in table.read_text().splitlines()] == [
        Row("gpt2", "refused", "few", 0, "a b c"), outcomes["llama"], Row("opt", "equal", "quantized", 99),
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-1] == "2 equal, 1 refused"
