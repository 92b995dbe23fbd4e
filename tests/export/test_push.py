"""Upload of an export, to a hub on this machine that keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from shardq.errors import ConfigError, StorageError
from shardq.export.push import check_push, push

REPOSITORY = "owner/model-w4"


@pytest.fixture(name="hub")
def _hub(monkeypatch) -> Iterator[SimpleNamespace]:
    """What the hub was told of the repository, the files that it holds, and the status that it answers with."""
    held = SimpleNamespace(created={}, files={}, status=200, tokens=set())

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            held.tokens.add(self.headers["Authorization"])
            answer = {}
            if self.path == "/api/repos/create":
                held.created = json.loads(body)
                answer = {"url": f"{held.address}/{REPOSITORY}"}
            elif self.path == f"/api/models/{REPOSITORY}/preupload/main":
                files = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]}
            elif self.path == f"/api/models/{REPOSITORY}/commit/main":
                lines = [json.loads(line)["value"] for line in body.splitlines()]
                held.files = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
                answer = {"commitUrl": f"{held.address}/{REPOSITORY}/commit/1", "commitOid": "1"}
            self.send_response(held.status)
            content = json.dumps(answer).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            """Keep the test's output clean."""

    server = HTTPServer(("127.0.0.1", 0), Hub)
    held.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", held.address)
    monkeypatch.setenv("HF_TOKEN", "hf_one")
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(name="folder")
def _folder(tmp_path) -> Path:
    for name, content in (("config.json", "{}"), ("model.bin", "weights"), ("lock", "")):
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize("private", [True, False])
def test_files_are_uploaded_but_for_the_lock(hub, folder, private: bool):
    said = []
    assert push(folder, REPOSITORY, private, said.append) == f"{hub.address}/{REPOSITORY}"
    assert hub.files == {"config.json": b"{}", "model.bin": b"weights"} and hub.tokens == {"Bearer hf_one"}
    assert (hub.created["organization"], hub.created["name"]) == tuple(REPOSITORY.split("/"))
    assert (hub.created.get("visibility") == "private") is private
    assert said == [f"{folder}: uploading to {hub.address}/{REPOSITORY}"]


@pytest.mark.parametrize("status, said", [(403, "has no right to write"), (401, "no right"), (400, "or refuses")])
def test_hub_that_refuses_is_one_line(hub, folder, status: int, said: str):
    hub.status = status
    with pytest.raises(StorageError) as caught:
        push(folder, REPOSITORY, False, print)
    assert said in str(caught.value) and "\n" not in str(caught.value) and "same command uploads" in str(caught.value)


def test_hub_that_cannot_be_reached_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="push_to_hub: owner/model-w4: the hub cannot be reached, or refuses .*same"):
        push(folder, REPOSITORY, False, print)


@pytest.mark.parametrize("name", ["model", "", "a/b/c", "own er/model", "owner/"])
def test_name_that_is_no_repositorys_is_refused_before_work(hub, name: str):
    with pytest.raises(ConfigError, match="push_to_hub: .*; give owner/name"):
        check_push(name)
    check_push(REPOSITORY)


def test_missing_token_is_said_before_work(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="there is no token for the hub; set HF_TOKEN"):
        check_push(REPOSITORY)
