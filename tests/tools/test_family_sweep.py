"""The family sweep's program: what it has is not run again, and its table counts what came."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import family_sweep  # noqa: E402

from sweep import Row  # noqa: E402


def test_families_that_the_result_holds_are_not_run_again(tmp_path, monkeypatch, capsys):
    run = []

    def planted_sweep(family):
        run.append(family)
        return Row(family, "refused" if family == "gpt2" else "equal", "few", "a | b")

    monkeypatch.setattr(family_sweep, "sweep", planted_sweep)
    result = tmp_path / "result.json"
    family_sweep.main(result, "llama", "gpt2")
    family_sweep.main(result, "llama", "gpt2", "opt")
    assert run == ["llama", "gpt2", "opt"]
    assert [row["family"] for row in json.loads(result.read_text())] == run
    lines = (tmp_path / "result.md").read_text().splitlines()
    assert lines[0] == "2 equal, 1 refused." == capsys.readouterr().out.splitlines()[-1]
    assert lines[-1] == "| gpt2 | refused | few | a / b |"
