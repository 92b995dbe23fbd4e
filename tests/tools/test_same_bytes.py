"""The comparison of all bytes: it sees every file that a run leaves, and names what differs."""

import json
import subprocess
from pathlib import Path

import forked

TOOL = Path(__file__).resolve().parents[2] / "tools" / "same_bytes.py"


def compared(folder: Path, others: dict[str, str]) -> tuple[dict[str, str], subprocess.CompletedProcess]:
    """Digests of one small case, and how they were told beside others."""
    other = folder / "other.json"
    other.write_text(json.dumps(others))
    done = forked.ranks(1, [TOOL, folder / "digests.json", "--only", "for-gguf", "--against", other])
    return json.loads((folder / "digests.json").read_text()), done


def test_a_case_gives_the_same_bytes_twice_and_what_differs_is_named(tmp_path):
    others = {"for-gguf/run/manifest.json": "0", "for-gguf/run/former": "0", "another-case/run/manifest.json": "0"}
    found, done = compared(tmp_path, others)
    assert done.returncode == 1
    assert "for-gguf/run/manifest.json: differs\n" in done.stdout
    assert "for-gguf/run/former: gone\n" in done.stdout
    assert "for-gguf/run/blocks/block-00000.safetensors: new\n" in done.stdout
    assert "another-case" not in done.stdout
    assert "for-gguf/run/gguf/model.gguf" in found and not any("events" in path for path in found)
    again, done = compared(tmp_path, found)
    assert again == found
    assert done.returncode == 0 and done.stdout.endswith("every byte is the same\n")
