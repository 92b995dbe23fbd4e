"""The end of one rank ends all: where a rank fails, dies or falls silent, the others learn it in seconds, and end.

Rank 0 keeps a connection to each other rank. Both sides send a beat a second, and their last words before they end. A
separate thread listens, so a rank receives messages even while it is blocked in a collective or a long computation.
"""

import json
import os
import selectors
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from shardq.errors import Interrupted, RankError, ShardQError
from shardq.liveness.meeting import Peer, connect, gather, launcher
from shardq.liveness.stall import Pace, Stall
from shardq.logs import print_error, tell_launcher

BEAT_SECONDS = 1.0
# Counted in this process's own beats: time in which this process or the whole machine was stopped does not count.
MAX_MISSED_BEATS = 20
# Time for a rank to end by itself after a signal has ended another: more than a rank that got the signal too needs.
INTERRUPTED_BEATS = 6


@contextmanager
def ended_together(name: str, rank: int, world_size: int, store: dist.Store) -> Iterator[Pace]:
    """During the body, the end of any rank ends this process with one line that names that rank and says why.

    If this rank's body fails, the others get its error, unless all ranks raise the same one. The yielded pace takes the
    steps of the main thread, which have a tighter limit than other work.

    Args:
        name: this rank's name in lines.
        store: one that all ranks can reach.

    Raises:
        RankError: a rank has not connected in time, or rank 0 cannot be reached.
    """
    pace = Pace()
    watch = Watch(name, gather(name, world_size, store) if rank == 0 else [connect(name, rank, store)], pace)
    try:
        yield pace
    except BaseException as error:
        if isinstance(error, RankError):
            watch.wait()  # the watch knows which rank failed first, and why
        watch.leave(_last_words(error), isinstance(error, Interrupted))
        raise
    watch.leave("")


class Watch:
    """Listens to the peers in a separate thread, from construction on; see `ended_together`."""

    def __init__(self, name: str, peers: list[Peer], pace: Pace):
        self._name, self._peers, self._leaving = name, peers, False
        self._stall = Stall(pace)
        self._sending = threading.Lock()
        self._launcher, self._parent = launcher(), os.getppid()
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait while the watch finds out which rank is gone; returns only if it finds none."""
        self._thread.join((MAX_MISSED_BEATS + 5) * BEAT_SECONDS)

    def leave(self, last_words: str, interrupted: bool = False) -> None:
        """Tell the peers that this rank ends, and why; they react after it has ended."""
        self._leaving = True
        self._send_all("leaving", last_words, interrupted)

    def _listen(self) -> None:
        due = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while not self._leaving:
                for key, _ in selector.select(max(0.0, due - time.monotonic())):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                if time.monotonic() >= due:
                    due = time.monotonic() + BEAT_SECONDS
                    self._beat()
                    if how := self._stall.look(BEAT_SECONDS):
                        self._end_alone(how)

    def _hear(self, peer: Peer) -> bool:
        """Process a peer's messages; False once it has left."""
        reason = "it was killed, by a scheduler or for want of memory (its host's system log says)"
        try:
            data = peer.connection.recv(1 << 16)
        except ConnectionError:  # the peer died with bytes unread
            data = b""
        except OSError as error:
            data, reason = b"", f"its connection broke ({error.strerror or error})"
        if not data:
            if peer.last_words != "":
                failed = f"failed: {peer.last_words}" if peer.last_words else f"ended without a message: {reason}"
                failed = f"was {peer.last_words}" if peer.interrupted else failed
                self._end_all(f"{peer.name} {failed}", interrupted=peer.interrupted)
            return False
        peer.missed_beats = 0
        *lines, peer.received = (peer.received + data).split(b"\n")
        for kind, *words in (json.loads(line) for line in lines):
            if kind == "leaving":
                peer.last_words, peer.interrupted = words
            elif kind == "verdict":
                self._end(*words)
        return True

    def _beat(self) -> None:
        for peer in self._peers:
            if peer.last_words == "":
                continue
            peer.missed_beats += 1
            if peer.missed_beats > MAX_MISSED_BEATS:
                silence = f"has not been heard of for {MAX_MISSED_BEATS * BEAT_SECONDS:.0f} s"
                reason = peer.last_words or "it hangs, or its host is cut off"
                self._end_all(f"{peer.name} {silence}: {reason}", peer)
        self._send_all("beat")
        if dist.is_torchelastic_launched() and os.getppid() != self._parent:
            self._end_alone("its launcher, torchrun, is gone")

    def _end_all(self, verdict: str, silent: Peer | None = None, interrupted: bool = False) -> None:
        if not self._leaving:
            hung = [silent.launcher, silent.pid] if silent else None
            self._send_all("verdict", verdict, hung, interrupted)
            self._end(verdict, hung, interrupted)

    def _end_alone(self, words: str) -> None:
        """End this process for a reason that lies in it; the others get the reason."""
        self.leave(words)
        print_error(words, self._name)
        tell_launcher(words, RankError.exit_code)
        os._exit(RankError.exit_code)

    def _end(self, verdict: str, hung: tuple[str, int] | None, interrupted: bool) -> None:
        """End this process, unless it is about to end with its own last words.

        A hung rank of the same launcher is killed: torchrun would give it 30 s to leave by itself. A signal that ends
        one rank of a host mostly goes to all of them: each gets time to end by itself, and one line a host is enough.
        """
        if interrupted:
            time.sleep(INTERRUPTED_BEATS * BEAT_SECONDS)
        if self._leaving:
            return
        if hung and hung[0] == self._launcher and hung[1] != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(hung[1], signal.SIGKILL)
        if not interrupted or os.environ.get("LOCAL_RANK") == "0":
            print_error(verdict, self._name)
        tell_launcher(verdict, RankError.exit_code)
        os._exit(RankError.exit_code)

    def _send_all(self, *message: object) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for peer in self._peers:
                with suppress(OSError):  # the next receive from this peer reports its state
                    peer.connection.sendall(line)


def _last_words(error: BaseException) -> str:
    """The reason why a rank ends; empty if it ends regularly or all ranks raise the same error."""
    if isinstance(error, ShardQError):
        return "" if error.agreed else str(error)
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, SystemExit) and not error.code:
        return ""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}".removesuffix(": ")
