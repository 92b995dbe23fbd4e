"""Finding a model's files: a folder, or a hub name of which the hub's own cache may hold a copy."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save

from shardq.errors import CheckpointError, ConfigError
from shardq.model.hub import local_folder as folder_of

COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network; the library read HF_HOME and HF_HUB_OFFLINE when it was imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def local_folder(name: str, revision: str | None = None, said: list[str] | None = None) -> Path:
    return folder_of(name, revision, [].append if said is None else said.append)


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


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../owner/model", "~/model", "a/b/c"])
def test_missing_folder_is_refused_without_asking_the_hub(name: str):
    assert_refused(name, "--model takes a Hugging Face folder or a hub name (owner/model)")


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    assert_refused("owner/model", "--model takes a Hugging Face folder")


@pytest.mark.parametrize("name", ["owner/model", "owner/not a name", "model"])
def test_hub_name_that_cannot_be_reached_is_refused_with_advice(name: str):
    assert_refused(name, "the hub cannot provide it", "check the name and the network", "pass the folder")


@pytest.mark.parametrize("name", ["owner/model", "gpt2"])
def test_hub_name_downloaded_earlier_is_found_without_network_which_is_said(cache: Path, name: str):
    repository, said = cache / f"models--{name.replace('/', '--')}", []
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert local_folder(name, said=said) == snapshot
    [line] = said
    assert line.startswith(f"{name}: the hub cannot provide it (") and line.endswith(f"the copy in {cache} is used")


def test_folder_has_no_revision(tmp_path: Path):
    with pytest.raises(ConfigError, match=f"revision: v1 is asked for, but {tmp_path} is a folder"):
        local_folder(str(tmp_path), "v1")


WEIGHTS = save({"a": torch.ones(3)})
ASKED = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.model": b"pieces", "LICENSE": b"words",
         "additional_chat_templates/tool.jinja": b"{{ x }}", "modeling_x.py": b"x = 1",
         "README.md": b"words"}  # fmt: skip
NOT_ASKED = {"consolidated.safetensors": WEIGHTS, "original/tokenizer.model": b"other", "original/params.json": b"{}",
             "pytorch_model.bin": WEIGHTS, "onnx/model.safetensors": WEIGHTS, "onnx/README.md": b"words"}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """One model, at commit 0123456789... and none at any other, as the hub answers for it."""

    def do_GET(self) -> None:
        """Answer by the address."""
        parts = self.path.partition("?")[0].strip("/").split("/")
        repository = {"id": "owner/model", "sha": COMMIT, "private": False, "siblings": [], "tags": []}
        everything = ASKED | NOT_ASKED
        if parts[:4] == ["api", "models", "owner", "model"] and parts[4:5] == ["tree"]:
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in everything.items()
            ]
            self._answer(200, json.dumps(listed).encode(), "application/json")
        elif parts[:4] == ["api", "models", "owner", "model"] and parts[4:] in (
            [],
            ["revision", "main"],
            ["revision", "v1"],
        ):
            self._answer(200, json.dumps(repository).encode(), "application/json")
        elif parts[:4] == ["owner", "model", "resolve", COMMIT] and "/".join(parts[4:]) in everything:
            self._answer(200, everything["/".join(parts[4:])], "application/octet-stream")
        else:
            self._answer(404, b"{}", "application/json")

    do_HEAD = do_GET

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RevisionNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(name="hub")
def _hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub on this machine that the library asks."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("revision", [None, "v1"])
def test_what_is_needed_is_downloaded_and_nothing_else_and_found_again_when_the_hub_is_gone(hub, cache, revision):
    said = []
    folder = local_folder("owner/model", revision, said)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == ASKED
    [line] = said
    assert "comes from the hub" in line and str(cache) in line
    hub.shutdown()
    hub.server_close()
    assert local_folder("owner/model", revision, said) == folder
    assert said[1].endswith(f"the copy in {cache} is used")


def test_revision_that_the_hub_does_not_have_is_refused(hub):
    with pytest.raises(CheckpointError, match="owner/model at v2: no such folder, and the hub cannot provide it"):
        local_folder("owner/model", "v2")


def test_copy_without_all_weights_is_not_used_when_the_hub_is_gone(hub):
    folder = local_folder("owner/model")
    hub.shutdown()
    hub.server_close()
    (folder / "LICENSE").unlink()
    assert local_folder("owner/model") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the hub cannot provide it"):
        local_folder("owner/model")
