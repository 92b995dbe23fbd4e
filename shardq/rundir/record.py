"""The record of a run, which reads what the run is and has done: a block counts only if the ledger has it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import xxhash

from shardq.errors import ResumeError
from shardq.files import ASIDE, json_text, storage_errors, write_text, xxh128_of
from shardq.formats.source import Digests
from shardq.logs import Event
from shardq.parallel.collectives import TOKEN
from shardq.rundir.digests import changed_files, cut_torn_line
from shardq.rundir.folder import LOCK, MANIFEST, RunFolder
from shardq.rundir.ledger import Entries, blocks_to_do, finished, manifest_of, read_lines, redo_lines
from shardq.rundir.manifest import REDO_MAY_CHANGE, differences


@dataclass(frozen=True)
class RunRecord:
    """The state of a run as its folder has it.

    Attributes:
        lines: lines of the ledger; whoever appends a line to the file adds it here.
    """

    output: Path
    lines: list[dict]

    @classmethod
    def read(cls, output: Path) -> Self:
        """Read the record of the run in a folder, an empty one where there is none.

        Raises:
            ResumeError: the ledger is damaged.
        """
        return cls(output, read_lines(output))

    @property
    def entries(self) -> Entries:
        """The ledger's entries that count."""
        return finished(self.lines)

    @property
    def blocks(self) -> dict[int, dict]:
        """The entries of the blocks that are done, by their numbers in rising order."""
        entries = self.entries
        return {number: entries[number] for number in sorted(number for number in entries if number is not None)}

    @property
    def files(self) -> list[str]:
        """Names, within the folder, of the files whose digests the entries have."""
        return [name for entry in self.entries.values() for name in entry["files"]]

    @property
    def is_finished(self) -> bool:
        """Whether all blocks are done, and the files that complete the run too."""
        return None in self.entries

    @property
    def is_of_before(self) -> bool:
        """Whether the run was finished before its ledger had all files, with their sizes."""
        return "bytes" not in self.entries[None]

    @property
    def num_done(self) -> int:
        """Number of blocks that are done."""
        return len(self.blocks)

    @property
    def num_redos(self) -> int:
        """Number of redos, one that has only begun included."""
        return len(redo_lines(self.lines))

    @property
    def source(self) -> Digests:
        """Digests of the source that the ledger keeps; none for a run begun before ledgers had them."""
        return {name: digest for line in self.lines for name, digest in line.get("source", {}).items()}

    @property
    def blocks_digest(self) -> str:
        """A digest that identifies the blocks of a finished run, made of their files' digests."""
        digests = [entry["files"] for entry in self.blocks.values()]
        return xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())

    def events(self) -> list[Event]:
        """The run's spans in all hosts' logs, log by log in the order in which they ended.

        A kill during a write leaves a line without its end, which is no event.

        Raises:
            ResumeError: a line is no event.
        """
        found = []
        for path in RunFolder(self.output).logs:
            with storage_errors(path):
                lines = path.read_bytes().split(b"\n")[:-1]
            for number, line in enumerate(lines, 1):
                try:
                    found.append(Event.parsed(line))
                except (ValueError, RecursionError) as error:
                    raise ResumeError(f"{path}: line {number} is no event; delete the line") from error
        return found

    def manifest(self) -> dict:
        """The run's manifest: that of its beginning, or of its last redo.

        Raises:
            ResumeError: the file is damaged.
        """
        return manifest_of(self.output, self.lines)

    def options(self, section: str) -> dict:
        """Options of the run; empty where there is no run, or its manifest has changed since its end."""
        path = RunFolder(self.output).manifest
        if not path.exists() or not (self.num_redos or self._is_manifest_whole()):
            return {}
        try:
            return self.manifest()["options"].get(section, {})
        except (KeyError, AttributeError) as error:
            raise ResumeError(f"{path}: damaged (it holds no options); choose another --output") from error

    def blocks_to_do(self, num_blocks: int) -> range:
        """The first blocks that are not done, up to the next one that is; empty at `num_blocks` if all are."""
        return blocks_to_do(self.entries, num_blocks)

    def damaged_files(self, is_quick: bool = False) -> Iterator[tuple[int | None, Path, str]]:
        """The block, the path, and a line about it, of each file that has changed since it was finished.

        Args:
            is_quick: whether larger files are compared only by their size.
        """
        for block, entry in self.entries.items():
            for path, fault in changed_files(self.output, entry, is_quick):
                yield block, path, fault

    def why_unfinished(self) -> str:
        """One line if the run is not finished, else an empty text."""
        if self.is_finished:
            return ""
        if RunFolder(self.output).manifest.exists():
            done = f"{self.num_done} block(s) are"
            return f"{self.output}: not finished, {done}; run its command again, which goes on after them"
        what = f"holds no run of shardq (no {MANIFEST})" if self.output.exists() else "no such folder"
        return f"{self.output}: {what}; check the path"

    def check_finished(self) -> None:
        """Check that the run is finished, and its files have their digests in the ledger.

        Raises:
            ResumeError: the run is not finished, or a file has changed.
        """
        if fault := self.why_unfinished():
            raise ResumeError(fault)
        for _, _, fault in self.damaged_files():
            raise ResumeError(f"{fault}; restore it, or run its command again, which says how to mend it")

    def mend_manifest(self, manifest: dict, say: Callable[[str], None]) -> None:
        """Write a finished run's manifest again if it has changed and the given one is the original.

        Args:
            say: gets a line if the manifest was written.
        """
        path, text = RunFolder(self.output).manifest, json_text(manifest)
        if not self._is_manifest_whole() and xxhash.xxh3_128_hexdigest(text.encode()) == self._manifest_digest():
            write_text(path, text)
            say(f"{path}: missing or changed since the run was finished; written again")

    def _is_manifest_whole(self) -> bool:
        """Whether the manifest of a finished run is unchanged; assumed of a run that is not finished."""
        path, recorded = RunFolder(self.output).manifest, self._manifest_digest()
        return recorded is None or (path.is_file() and xxh128_of(path) == recorded)

    def _manifest_digest(self) -> str | None:
        return self.entries.get(None, {}).get("files", {}).get(MANIFEST)


def check_folder(output: Path, resume: str) -> None:
    """Check, without changing it, that a run can begin or go on in a folder.

    Raises:
        ResumeError: the folder holds something else, or no run to go on with.
    """
    folder = RunFolder(output)
    if folder.is_taken:
        return
    if resume == "require":
        raise ResumeError(f"{output}: no run to resume here (no {MANIFEST}); check --output or drop --resume require")
    if output.exists() and not output.is_dir():
        raise ResumeError(f"{output}: is a file; choose another --output")
    # Files that a kill before or during the writing of the manifest leaves.
    begun = (LOCK, MANIFEST + ASIDE, TOKEN, TOKEN + ASIDE)
    if output.exists() and any(not any(map(file.match, begun)) for file in output.iterdir()):
        raise ResumeError(f"{output}: not empty and not a run of shardq; choose another --output")


def open_run(output: Path, manifest: dict, resume: str, redo: list[int] | None = None) -> tuple[RunRecord, dict | None]:
    """Read what the run in a folder has done, or check that a run may begin there.

    A finished run's files are checked by name and size, the small ones by digest; those of other runs by digest.

    Args:
        redo: blocks to do again.

    Returns:
        The record, empty for a new run; and the line that begins a redo, if one is to begin. The caller calls
        `begin_run`, appends that line, and mends the files that complete a finished run.

    Raises:
        ResumeError: the folder holds something else, another run, or files that are not what the ledger says.
    """
    check_folder(output, resume)
    folder = RunFolder(output)
    if not folder.is_taken:
        if redo is not None:
            raise ResumeError(f"{output}: no run to redo blocks of (no {MANIFEST}); check --output or drop --redo")
        return RunRecord(output, []), None
    if not folder.manifest.exists():
        raise ResumeError(f"{folder.manifest}: missing; restore it, or give the options that the run was made with")
    if resume == "never":
        raise ResumeError(f"{output}: already holds a run and --resume is never; choose another --output or delete it")
    cut_torn_line(folder.ledger)
    record = RunRecord.read(output)
    differing = differences(record.manifest(), manifest)
    lasting = [text for name, text in differing.items() if redo is None or not name.startswith(REDO_MAY_CHANGE)]
    if lasting:
        raise ResumeError(
            f"{output}: belongs to another run; different: {'; '.join(lasting)}; choose another --output or the same "
            "options"
        )
    is_quick = record.is_finished and redo is None  # nothing is computed from these files
    damaged = {block: fault for block, _, fault in record.damaged_files(is_quick)}
    line = None if redo is None else _redo_line(record.lines, redo, manifest, damaged)
    left = [block for block in damaged if block in finished([*record.lines, *([line] if line else [])])]
    if redo is None and left == [None]:
        return record, line  # the files that complete a run are written again from the source
    if left:
        numbers = ",".join("end" if block is None else str(block) for block in damaged)
        raise ResumeError(f"{damaged[left[0]]}; restore it, or do it again with --redo {numbers}")
    return record, line


def _redo_line(lines: list[dict], redo: list[int], manifest: dict, damaged: dict[int | None, str]) -> dict | None:
    """The line that begins a redo; None if the last redo has the same blocks and none of them is damaged since."""
    for last in redo_lines(lines)[-1:]:
        is_same = last["redo"] == redo and not differences(last["manifest"], manifest)
        if is_same and not damaged.keys() & {*redo, None}:
            return None
    return {"redo": redo, "manifest": manifest}
