"""Where texts come from: files, datasets of the hub, well-known ones by a short name, and mixes of them."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import config as library
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from shardq.calib.options import TextOptions
from shardq.calib.tokenizer import Chat
from shardq.errors import CalibrationError, ConfigError
from shardq.files import can_be_written, temporary_folder
from shardq.spelling import nearest

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
IDS = ".safetensors"
CHATS = ("messages", "conversations", "conversation")  # usual names of columns with conversations
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for roles


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A well-known dataset of the hub, with the subset, split and column to read."""

    name: str
    subset: str | None = None
    split: str | None = None
    column: str | None = None


SHORT_NAMES = {
    "c4": HubSet(name="allenai/c4", subset="en"),
    "code": HubSet(name="codeparrot/codeparrot-clean", column="content"),
    "pile-10k": HubSet(name="NeelNanda/pile-10k"),
    "ultrachat": HubSet(name="HuggingFaceH4/ultrachat_200k", split="train_sft", column="messages"),
    "wikitext": HubSet(name="Salesforce/wikitext", subset="wikitext-2-raw-v1"),
}


def parts_of(options: TextOptions) -> list[TextOptions]:
    """The datasets of a mix, each with its own number of samples; a single dataset unchanged.

    Where shares do not give whole numbers, those with the largest remainders get one sample more.

    Raises:
        ConfigError: a share is no number above 0, or is missing; a mix of all samples; a dataset without a sample.
    """
    shares = _shares(options.dataset)
    if len(shares) == 1:
        return [_known(replace(options, dataset=next(iter(shares))))]
    if options.samples is None:
        raise ConfigError(f"{options.dataset}: a mix needs a number of samples; give one")
    exact = [options.samples * share / sum(shares.values()) for share in shares.values()]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in by_remainder[: options.samples - sum(counts)]:
        counts[place] += 1
    for name, count in zip(shares, counts, strict=True):
        if not count:
            raise ConfigError(f"{name}: its share is less than one of {options.samples} samples; take more, or drop it")
    return [_known(replace(options, dataset=name, samples=count)) for name, count in zip(shares, counts, strict=True)]


def _shares(text: str) -> dict[str, float]:
    """Share of each dataset in `a.jsonl:0.75,owner/name:0.25`, equal where none is given."""
    if os.path.exists(text) or not set(text) & {",", ":"}:
        return {text: 1.0}
    shares: dict[str, float | None] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, colon, share = item.rpartition(":")
        if (name or item) in shares:
            raise ConfigError(f"{name or item}: stands twice in a mix; give it one share")
        shares[name if colon else item] = _share(name, share) if colon else None
    missing = [name for name, share in shares.items() if share is None]
    if missing and len(missing) < len(shares):
        raise ConfigError(f"{missing[0]}: has no share, others of the mix do; write {missing[0]}:SHARE")
    return {name: 1.0 if share is None else share for name, share in shares.items()}


def _share(name: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not name or not 0 < share < math.inf:
        raise ConfigError(f"{name}: share {text!r} of a mix is not allowed, it must be a number above 0")
    return share


def _known(options: TextOptions) -> TextOptions:
    """The options with a well-known dataset's name on the hub, and its subset, split and column where none is given."""
    by_name = {known.name: known for known in SHORT_NAMES.values()}
    known = SHORT_NAMES.get(options.dataset) or by_name.get(options.dataset) or HubSet(name=options.dataset)
    return replace(
        options,
        dataset=known.name,
        subset=options.subset or known.subset,
        split=options.split or known.split or "train",
        column=options.column or known.column,
    )


def read_texts(options: TextOptions) -> Iterator[str | Chat]:
    """Texts and conversations of one dataset, in order.

    Raises:
        CalibrationError: no such dataset or column; a row without text.
    """
    name, column = options.dataset, options.column or "text"
    for number, row in enumerate(_rows(options), start=1):
        value = row.get(column)
        if options.column is None and not isinstance(value, str):
            column_of_chat = next((other for other in CHATS if isinstance(row.get(other), list)), column)
            value = row.get(column_of_chat)
        if value is None and column not in row:
            raise CalibrationError(
                f"{name}: no column {column!r}; name one of {', '.join(sorted(row))} with the option column"
            )
        if isinstance(value, list):
            yield _chat(value, f"{name}: row {number}")
        elif isinstance(value, str):
            yield value
        else:
            held = "null" if value is None else type(value).__name__
            advice = "remove that row, or give it text" if value is None else "name another with the option column"
            raise CalibrationError(f"{name}: column {column!r} of row {number} holds {held}, not text; {advice}")


def _chat(turns: list, where: str) -> Chat:
    """A conversation in the form that chat templates take."""
    chat = []
    for turn in turns:
        if isinstance(turn, str):  # the library's form for turns of a .json file whose entries differ
            with suppress(ValueError):
                turn = json.loads(turn)
        entries = turn if isinstance(turn, dict) else {}
        role, content = entries.get("role", entries.get("from")), entries.get("content", entries.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise CalibrationError(
                f"{where} holds no conversation: each turn needs role and content, or from and value, as text; mend it"
            )
        chat.append({"role": SPEAKERS.get(role, role), "content": content})
    return chat


def _rows(options: TextOptions) -> Iterator[dict]:
    """Rows of a file or a hub dataset, streamed: only rows that are asked for are downloaded and kept."""
    name, path = options.dataset, Path(options.dataset)
    if path.is_dir():
        raise CalibrationError(f"{name}: is a folder; pass one file in it ({', '.join(BUILDERS)}), or a hub name")
    is_local = path.is_file()
    if not is_local and (path.suffix.lower() in BUILDERS or name.startswith((".", "/", "~"))):
        raise CalibrationError(f"{name}: no such file; check the path, or pass a hub name (owner/name)")
    try:
        streamed = {"split": options.split, "streaming": True, "cache_dir": _library_cache()}
        yield from _rows_of_file(path) if is_local else load_dataset(name, options.subset, **streamed)
    except CalibrationError:
        raise
    except (DatasetNotFoundError, OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = (str(error).strip().splitlines() or ["it holds no rows"])[0]
        meant = [] if "/" in name else nearest(name, SHORT_NAMES)
        if is_local:
            said = f"cannot be read as {path.suffix.lower()} ({reason}); mend the file, or pass another"
        elif meant:
            said = f"the dataset cannot be read ({reason}); did you mean {' or '.join(meant)}?"
        else:
            said = f"the dataset cannot be read ({reason}); check its name and the network, or pass a local text file"
        raise CalibrationError(f"{name}: {said}") from error


def _rows_of_file(path: Path) -> Iterable[dict]:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise CalibrationError(f"{path}: file type {path.suffix!r} is not read; use {', '.join(BUILDERS)}")
    if not path.stat().st_size:
        raise CalibrationError(f"{path}: is empty; pass a file with text")
    line_breaks = {"keep_linebreaks": True} if builder == "text" else {}
    place = {"split": "train", "streaming": True, "cache_dir": _library_cache()}
    return load_dataset(builder, data_files=str(path), **place, **line_breaks)


def _library_cache() -> str | None:
    """A temporary cache folder if the library's own cannot be written; the library needs one even for streaming."""
    if can_be_written(Path(library.HF_DATASETS_CACHE)):
        return None
    return str(temporary_folder("datasets") or "") or None
