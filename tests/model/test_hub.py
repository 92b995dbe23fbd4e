"""Finding a model's files: a folder, or a hub name of which the hub's own cache may hold a copy."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from shardq.errors import CheckpointError
from shardq.model.hub import local_folder

COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network; the library read HF_HOME and HF_HUB_OFFLINE when it was imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def assert_refused(name: str, *parts: str) -> None:
    """The name is refused with one line that holds it and all parts."""
    with pytest.raises(CheckpointError) as caught:
        local_folder(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: no such folder") and "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_folder_is_given_as_it_is(tmp_path: Path):
    assert local_folder(str(tmp_path)) == tmp_path


def test_folder_wins_over_a_hub_name_of_the_same_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("owner/model") == Path("owner/model")


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../owner/model", "~/model", "model", "a/b/c"])
def test_missing_folder_is_refused_without_asking_the_hub(name: str):
    assert_refused(name, "--model takes a Hugging Face folder or a hub name (owner/model)")


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    assert_refused("owner/model", "--model takes a Hugging Face folder")


@pytest.mark.parametrize("name", ["owner/model", "owner/not a name"])
def test_hub_name_that_cannot_be_reached_is_refused_with_advice(name: str):
    assert_refused(name, "the hub cannot provide it", "check the name and the network", "pass the folder")


def test_hub_name_downloaded_earlier_is_found_without_network(cache: Path):
    snapshot = cache / "models--owner--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--owner--model" / "refs").mkdir()
    (cache / "models--owner--model" / "refs" / "main").write_text(COMMIT)
    assert local_folder("owner/model") == snapshot
