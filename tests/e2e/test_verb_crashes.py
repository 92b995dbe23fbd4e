"""An export or a tuning that is killed, ended by a signal or out of disk: the same command gives what it should."""

from collections import Counter
from pathlib import Path

import pytest

import forked
import verb_crashes


def assert_survived(told: list[dict]) -> None:
    print(Counter((crash["what"], crash["kind"], crash["came"][:20] != "") for crash in told), len(told))
    assert [crash for crash in told if crash["wrong"]] == []


def test_some_of_all_crashes_of_an_export_and_a_tuning(tmp_path: Path):
    told = forked.told_by(verb_crashes.__file__, tmp_path, 61, "compressed-tensors", "tune")
    assert_survived(told)
    assert len(told) > 10 and sum(crash["came"] != "" for crash in told) > 0.8 * len(told)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["compressed-tensors", "gptq", "hf", "aimet", "gguf", "tune"])
def test_every_crash_of_an_export_or_a_tuning_is_survived(tmp_path: Path, what: str):
    told = forked.told_by(verb_crashes.__file__, tmp_path, 1, what)
    assert_survived(told)
    assert {crash["kind"] for crash in told} == set(verb_crashes.KINDS)
