"""The one reader of what a run is and has done: a block counts only as far as the ledger says so."""

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
    """What a run's folder says of it.

    Attributes:
        lines: of its ledger; each that is written from now on is to be added.
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
        """Names, within the folder, of the files that the entries have digests of."""
        return [name for entry in self.entries.values() for name in entry["files"]]

    @property
    def is_finished(self) -> bool:
        """Whether all blocks are done, and what completes them."""
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
        """How often blocks were, or are to be, done again."""
        return len(redo_lines(self.lines))

    @property
    def source(self) -> Digests:
        """What the ledger keeps of the source; that of a run begun before it did says nothing."""
        return {name: digest for line in self.lines for name, digest in line.get("source", {}).items()}

    @property
    def blocks_digest(self) -> str:
        """What tells the blocks of a finished run from others: a digest of their files' digests."""
        digests = [entry["files"] for entry in self.blocks.values()]
        return xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())

    def events(self) -> list[Event]:
        """What all ranks' logs keep of the run's spans, log by log in the order in which they ended.

        A kill in the middle of a line leaves one without its end, which is no event.

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
        """What the run is: as it began, or since its last redo.

        Raises:
            ResumeError: the file is damaged.
        """
        return manifest_of(self.output, self.lines)

    def options(self, section: str) -> dict:
        """Options of the run, empty where there is no run, or its manifest is not what it was at the end."""
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
        """The block, the path, and a line about it, of each file that is not what it was when it was done.

        Args:
            is_quick: whether larger files are compared only by their size.
        """
        for block, entry in self.entries.items():
            for path, fault in changed_files(self.output, entry, is_quick):
                yield block, path, fault

    def why_unfinished(self) -> str:
        """One line where the run is not finished, nothing where it is."""
        if self.is_finished:
            return ""
        if RunFolder(self.output).manifest.exists():
            done = f"{self.num_done} block(s) are"
            return f"{self.output}: not finished, {done}; run its command again, which goes on after them"
        what = f"holds no run of shardq (no {MANIFEST})" if self.output.exists() else "no such folder"
        return f"{self.output}: {what}; check the path"

    def check_finished(self) -> None:
        """Check that the run is finished, and its files are what the ledger says.

        Raises:
            ResumeError: it is not, or they are not.
        """
        if fault := self.why_unfinished():
            raise ResumeError(fault)
        for _, _, fault in self.damaged_files():
            raise ResumeError(f"{fault}; restore it, or run its command again, which says how to mend it")

    def mend_manifest(self, manifest: dict, say: Callable[[str], None]) -> None:
        """Write a finished run's manifest again where it is not what it was, and the one that is given is.

        Args:
            say: is given a line where that was done.
        """
        path, text = RunFolder(self.output).manifest, json_text(manifest)
        if not self._is_manifest_whole() and xxhash.xxh3_128_hexdigest(text.encode()) == self._manifest_digest():
            write_text(path, text)
            say(f"{path}: missing or changed since the run was finished; written again")

    def _is_manifest_whole(self) -> bool:
        """Whether the manifest of a finished run is what it was; of another run that is not known, and assumed."""
        path, recorded = RunFolder(self.output).manifest, self._manifest_digest()
        return recorded is None or (path.is_file() and xxh128_of(path) == recorded)

    def _manifest_digest(self) -> str | None:
        return self.entries.get(None, {}).get("files", {}).get(MANIFEST)


def check_folder(output: Path, resume: str) -> None:
    """Check that a folder is one to begin or to go on in, without changing it.

    Raises:
        ResumeError: it holds something else, or nothing to go on with.
    """
    folder = RunFolder(output)
    if folder.is_taken:
        return
    if resume == "require":
        raise ResumeError(f"{output}: no run to resume here (no {MANIFEST}); check --output or drop --resume require")
    if output.exists() and not output.is_dir():
        raise ResumeError(f"{output}: is a file; choose another --output")
    # What a kill before or inside the writing of the manifest leaves.
    begun = (LOCK, MANIFEST + ASIDE, TOKEN, TOKEN + ASIDE)
    if output.exists() and any(not any(map(file.match, begun)) for file in output.iterdir()):
        raise ResumeError(f"{output}: not empty and not a run of shardq; choose another --output")


def open_run(output: Path, manifest: dict, resume: str, redo: list[int] | None = None) -> tuple[RunRecord, dict | None]:
    """Find what the run in a folder has done, or that one may begin there.

    A finished run's files are checked by name and size, the small ones by digest; those of other runs by digest.

    Args:
        redo: blocks to do again.

    Returns:
        The record, an empty one of a new run; and the line, if there is to be one, that begins a redo. `begin_run`,
        appending that line and mending what completes a finished run are left to the caller.

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
    is_quick = record.is_finished and redo is None  # nothing is made from these files
    damaged = {block: fault for block, _, fault in record.damaged_files(is_quick)}
    line = None if redo is None else _redo_line(record.lines, redo, manifest, damaged)
    left = [block for block in damaged if block in finished([*record.lines, *([line] if line else [])])]
    if redo is None and left == [None]:
        return record, line  # what completes a run is written again from the source
    if left:
        numbers = ",".join("end" if block is None else str(block) for block in damaged)
        raise ResumeError(f"{damaged[left[0]]}; restore it, or do it again with --redo {numbers}")
    return record, line


def _redo_line(lines: list[dict], redo: list[int], manifest: dict, damaged: dict[int | None, str]) -> dict | None:
    """What begins a redo; None where the last one has asked for the same, and nothing of it is damaged since."""
    for last in redo_lines(lines)[-1:]:
        is_same = last["redo"] == redo and not differences(last["manifest"], manifest)
        if is_same and not damaged.keys() & {*redo, None}:
            return None
    return {"redo": redo, "manifest": manifest}
