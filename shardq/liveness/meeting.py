"""How ranks find one another when they start: rank 0 listens, the others connect within a time limit."""

import json
import math
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from shardq.errors import ConfigError, RankError

PATIENCE = "SHARDQ_MEETING_SECONDS"  # environment variable: importing from a cold network disk may take minutes
MEETING_SECONDS = 60.0
LOOK_SECONDS = 0.1
SEND_SECONDS = 5.0
MEETING_PLACE = "watch"


@dataclass
class Peer:
    """The rank at the other end of a connection, and the messages received from it.

    `launcher` names the process that started the rank, and its host; `last_words` is the reason why the rank ends,
    empty for a regular end; `interrupted`: a signal has asked the rank to end.
    """

    name: str
    pid: int
    launcher: str
    connection: socket.socket
    received: bytes = b""
    missed_beats: int = 0
    last_words: str | None = None
    interrupted: bool = False


def gather(name: str, world_size: int, store: dist.Store) -> list[Peer]:
    """Rank 0's connections, after every other rank has connected."""
    token, peers = secrets.token_hex(16), {}
    seconds = _meeting_seconds()
    deadline = time.monotonic() + seconds
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world_size) as server:
        store.set(MEETING_PLACE, json.dumps([server.getsockname()[1], token, name, os.getpid(), launcher()]))
        while len(peers) < world_size - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(rank) for rank in range(1, world_size) if rank not in peers)
                raise RankError(
                    f"not all ranks have come within {seconds:g} s, missing: {missing}; see their messages, "
                    f"or raise {PATIENCE}"
                ) from None
            with suppress(OSError, ValueError):  # some other program has connected to this port
                connection.settimeout(SEND_SECONDS)
                given, rank, *who = json.loads(_read_line(connection))
                if given == token:
                    peers[rank] = Peer(*who, connection)
    return list(peers.values())


def connect(name: str, rank: int, store: dist.Store) -> Peer:
    """Another rank's connection to rank 0."""
    address, seconds = os.environ["MASTER_ADDR"], _meeting_seconds()
    try:
        deadline = time.monotonic() + seconds
        while not store.check([MEETING_PLACE]):  # torch's own wait logs several lines when it times out
            if time.monotonic() > deadline:
                raise TimeoutError(f"it has not come within {seconds:g} s")
            time.sleep(LOOK_SECONDS)
        port, token, *who = json.loads(store.get(MEETING_PLACE))
        connection = socket.create_connection((address, port), timeout=seconds)
        connection.sendall(json.dumps([token, rank, name, os.getpid(), launcher()]).encode() + b"\n")
        connection.settimeout(seconds + SEND_SECONDS)  # rank 0 gives up first: it can say who is missing
        if not _read_line(connection):  # the first beat: all ranks have connected
            raise ConnectionError("it has ended")
        connection.settimeout(SEND_SECONDS)
    except (OSError, RuntimeError) as error:  # torch reports trouble with its store as RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise RankError(
            f"rank 0 cannot be reached at {address} ({reason}); see its message, check the network between the hosts, "
            f"or raise {PATIENCE}"
        ) from error
    return Peer(*who, connection)


def meeting_store(rank: int, world_size: int) -> dist.Store:
    """The store whose address the launcher gives to all ranks.

    Raises:
        RankError: the store cannot be reached.
        ConfigError: the environment's time limit is not a number of seconds.
    """
    seconds = _meeting_seconds()
    try:
        if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _wait_for_store(seconds)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=seconds)))
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RankError(
            f"cannot meet the other ranks ({reason}); see their messages, check the network between the hosts, "
            f"or raise {PATIENCE}"
        ) from error
    return store


def _wait_for_store(seconds: float) -> None:
    """Wait until something listens where the store is to be: torch would try for twice as long, and print its stack."""
    address = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    deadline = time.monotonic() + seconds
    while all(address):  # where one is missing, torch's own error says which
        try:
            socket.create_connection(address, timeout=max(LOOK_SECONDS, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer at {':'.join(address)} for {seconds:g} s: {error}") from error
            time.sleep(LOOK_SECONDS)


def _meeting_seconds() -> float:
    """Seconds that ranks wait for one another when they start."""
    text = os.environ.get(PATIENCE, f"{MEETING_SECONDS}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        wrong = ConfigError(f"{PATIENCE}: {text!r} is not allowed, it must be a number of seconds above 0")
        wrong.agreed = True  # all ranks of a host have the same environment
        raise wrong
    return seconds


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line


def launcher() -> str:
    """Host and number of the process that started this process."""
    return f"{socket.gethostname()} {os.getppid()}"
