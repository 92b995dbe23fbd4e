"""How ranks find one another; with real processes in `test_watch.py`."""

import socket
import time

import pytest

from shardq.errors import ConfigError, RankError
from shardq.liveness.meeting import meeting_store


@pytest.fixture(autouse=True)
def closed_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """The launcher has named a port at which nobody listens."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def test_store_that_is_not_there_is_told_in_time_and_in_one_line(monkeypatch, capfd, closed_port):
    monkeypatch.setenv("SHARDQ_MEETING_SECONDS", "0.5")
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        meeting_store(1, 2)
    message = str(caught.value)
    assert message.startswith(f"cannot meet the other ranks (no answer at localhost:{closed_port} for 0.5 s: ")
    assert message.endswith("or raise SHARDQ_MEETING_SECONDS") and "\n" not in message
    assert time.monotonic() - start >= 0.5
    assert capfd.readouterr() == ("", "")  # torch would print its stack


@pytest.mark.parametrize("text", ["", "soon", "0", "-3", "inf", "nan"])
def test_time_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("SHARDQ_MEETING_SECONDS", text)
    with pytest.raises(ConfigError, match="SHARDQ_MEETING_SECONDS: .* must be a number of seconds above 0"):
        meeting_store(0, 2)
