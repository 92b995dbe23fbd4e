"""A model of a disk: what of a folder would survive a power cut; `crashes.py` records runs on it."""

import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from shardq.files import xxh128_of
from shardq.rundir import ledger


class Disk:
    """What of a folder would survive a power cut, told from the calls that sync, rename and delete.

    After each sync two states are kept: `synced`, with nothing that was not synced; and `ordered`, where names reach
    the disk at once but a file's bytes only when it is synced, as a journal of names alone may leave them.
    """

    def __init__(self, root: Path, states: Path):
        self.root, self.states, self.number = root, states, 0
        self.bytes: dict[tuple[int, int], bytes] = {}  # by inode and how often its number was used before
        self.uses: dict[int, int] = {}
        self.names: dict[Path, dict[str, tuple[int, int]]] = {root: {}}
        for owner, name, note in (
            (os, "fsync", self.sync), (os, "unlink", self.forget), (os, "replace", self.forget_target)
        ):  # fmt: skip
            self.wrap(owner, name, note)

    def wrap(self, owner: object, name: str, note: Callable) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: note(original, *args, **kwargs))

    def key(self, path: Path) -> tuple[int, int]:
        inode = path.stat().st_ino
        return inode, self.uses.get(inode, 0)

    def forget(self, original: Callable, path: str | Path, **options: object) -> None:
        inode = os.stat(path).st_ino if os.path.exists(path) else None
        original(path, **options)
        self.uses[inode] = self.uses.get(inode, 0) + 1

    def forget_target(self, original: Callable, source: str | Path, target: str | Path) -> None:
        if os.path.exists(target):
            inode = os.stat(target).st_ino
            self.uses[inode] = self.uses.get(inode, 0) + 1
        original(source, target)

    def sync(self, original: Callable, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self.root):
            self.keep("ordered", self.live(self.root))  # a cut just before this sync
        original(descriptor)
        if path.is_relative_to(self.root):
            if path.is_dir():
                self.names[path] = {entry.name: self.key(entry) for entry in path.iterdir()}
            else:
                self.bytes[self.key(path)] = path.read_bytes()
            self.keep("synced", self.durable(self.root))

    def durable(self, folder: Path) -> dict[str, bytes | None]:
        """Files by path, and folders without bytes, that are there whatever was not synced."""
        found: dict[str, bytes | None] = {}
        for name, key in self.names.get(folder, {}).items():
            path = folder / name
            is_folder = path in self.names or path.is_dir()
            found[str(path.relative_to(self.root))] = None if is_folder else self.bytes.get(key, b"")
            if is_folder:
                found |= self.durable(path)
        return found

    def live(self, folder: Path) -> dict[str, bytes | None]:
        """Every name that there is now, with the bytes that were synced."""
        return {
            str(path.relative_to(self.root)): None if path.is_dir() else self.bytes.get(self.key(path), b"")
            for path in folder.rglob("*")
        }

    def lost(self, output: Path) -> list[str]:
        """Files that a run's ledger counts, or that enter its next block, and would not survive a power cut now."""
        durable = {self.root / name: content for name, content in self.durable(self.root).items()}
        entries = ledger.finished(ledger.read_lines(output))
        expected = {output / name: digest for entry in entries.values() for name, digest in entry["files"].items()}
        cached = (output / "cache" / f"generation-{len(entries):05d}").glob("*")
        expected |= {path: xxh128_of(path) for path in (output / "ledger.jsonl", output / "manifest.json", *cached)}
        return [
            str(path.relative_to(output))
            for path, digest in expected.items()
            if xxhash.xxh3_128_hexdigest(durable.get(path) or b"") != digest
        ]

    def keep(self, kind: str, state: dict[str, bytes | None]) -> None:
        folder = self.states / f"{self.number:05d}-{kind}"
        self.number += 1
        for name, content in sorted(state.items()):
            path = folder / name
            path.mkdir(parents=True, exist_ok=True) if content is None else path.parent.mkdir(
                parents=True, exist_ok=True
            )
            if content is not None:
                path.write_bytes(content)
