"""Texts to the fixed token ids [N, T] that a run calibrates or evaluates on."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from datasets import config as library
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from torch import Tensor

from shardq.calib.options import TextOptions
from shardq.calib.tokenizer import Tokenize, load_tokenizer
from shardq.errors import CalibrationError, CheckpointError
from shardq.files import can_be_written, temporary_folder
from shardq.formats.tensor_file import read_tensors

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
DEFAULT_SUBSETS = {"allenai/c4": "en"}
CHATS = ("messages", "conversations", "conversation")  # what columns of conversations are called
PIECE_CHARACTERS = 1 << 20
POOL_FACTOR = 16  # candidate sequences read for each one taken, so that a large file is not read to its end


def load_tokens(options: TextOptions, model_folder: Path, vocabulary_size: int) -> Tensor:
    """Token ids [N, T], int64.

    `samples` sequences are taken at even distances from the first `samples * 16` that a text gives, or from all where
    it has fewer, and from all rows of a .safetensors file: deterministic, without a seed.

    Raises:
        CalibrationError: no such dataset, column or tokenizer; too few tokens; an id beyond the vocabulary.
    """
    if options.dataset.lower().endswith(".safetensors"):
        pool = _read_ids(options)
    else:
        cut = {"packed": _packed, "row": _row_by_row}[options.packing]
        sequences = cut(_texts(options), load_tokenizer(model_folder), options.sequence_length)
        limit = options.samples * POOL_FACTOR if options.samples else None
        pool = [ids for _, ids in zip(range(limit), sequences, strict=False)] if limit else list(sequences)
    tokens_NT = _spread(pool, options)
    beyond = tokens_NT.max().item()
    if beyond >= vocabulary_size or tokens_NT.min() < 0:
        raise CalibrationError(
            f"{options.dataset}: token id {beyond if beyond >= vocabulary_size else tokens_NT.min().item()} is outside "
            f"the model's vocabulary of {vocabulary_size}; the tokenizer or the ids belong to another model"
        )
    return tokens_NT


def digest(tokens_NT: Tensor) -> str:
    """Hex digest of token ids, for the manifest."""
    return hashlib.sha256(str(tuple(tokens_NT.shape)).encode() + tokens_NT.numpy().tobytes()).hexdigest()


def next_tokens(tokens_NT: Tensor) -> Tensor:
    """The token that comes next at each position [N, T]; -1 behind a sample's last, where none is known."""
    return torch.nn.functional.pad(tokens_NT[:, 1:], (0, 1), value=-1)


def _spread(pool: list[list[int]], options: TextOptions) -> Tensor:
    wanted = options.samples or len(pool)
    if not pool or len(pool) < wanted:
        raise CalibrationError(
            f"{options.dataset}: gives {len(pool)} sequences of {options.sequence_length} tokens, {wanted or 1} are "
            "needed; use a larger dataset, fewer samples or a shorter sequence_length"
        )
    return torch.tensor([pool[number * len(pool) // wanted] for number in range(wanted)], dtype=torch.long)


def _packed(texts: Iterable[str], tokenize: Tokenize, length: int) -> Iterator[list[int]]:
    pending: list[int] = []
    for text in texts:
        pending += tokenize(text)
        whole = len(pending) // length * length
        yield from (pending[start : start + length] for start in range(0, whole, length))
        pending = pending[whole:]


def _row_by_row(texts: Iterable[str], tokenize: Tokenize, length: int) -> Iterator[list[int]]:
    for text in texts:
        ids = tokenize(text)
        if len(ids) >= length:
            yield ids[:length]


def _texts(options: TextOptions) -> Iterator[str]:
    """Texts of the dataset; the lines of a .txt file are joined again to pieces of some size for packing.

    Tokens are thus the whole text's but for one boundary a piece, and memory does not grow with the file.
    """
    texts = _column(options)
    if options.dataset.lower().endswith(".txt") and options.packing == "packed":
        piece, size = [], 0
        for line in texts:
            piece.append(line)
            size += len(line)
            if size >= PIECE_CHARACTERS:
                yield "".join(piece)
                piece, size = [], 0
        yield "".join(piece)
    else:
        yield from (text.rstrip("\n") for text in texts)


def _column(options: TextOptions) -> Iterator[str]:
    name, column = options.dataset, options.column or "text"
    for number, row in enumerate(_rows(options), start=1):
        value = row.get(column)
        chats = [other for other in CHATS if isinstance(row.get(other), list)]
        if chats and not isinstance(value, str):
            raise CalibrationError(
                f"{name}: column {chats[0]!r} holds conversations, not text; write each as one text, with the model's "
                "chat template, to a column text"
            )
        if column not in row:
            raise CalibrationError(
                f"{name}: no column {column!r}; name one of {', '.join(sorted(row))} with the option column"
            )
        if not isinstance(value, str):
            held = "null" if value is None else type(value).__name__
            advice = "remove that row, or give it text" if value is None else "name another with the option column"
            raise CalibrationError(f"{name}: column {column!r} of row {number} holds {held}, not text; {advice}")
        yield value


def _rows(options: TextOptions) -> Iterator[dict]:
    """Rows of a file or a hub dataset, streamed: nothing is downloaded or held beyond what is asked for."""
    name, path = options.dataset, Path(options.dataset)
    if path.is_dir():
        raise CalibrationError(f"{name}: is a folder; pass one file in it ({', '.join(BUILDERS)}), or a hub name")
    is_local = path.is_file()
    if not is_local and (path.suffix.lower() in BUILDERS or name.startswith((".", "/", "~"))):
        raise CalibrationError(f"{name}: no such file; check the path, or pass a hub name (owner/name)")
    try:
        subset = options.subset or DEFAULT_SUBSETS.get(name)
        streamed = {"split": options.split, "streaming": True, "cache_dir": _library_cache()}
        yield from _rows_of_file(path) if is_local else load_dataset(name, subset, **streamed)
    except CalibrationError:
        raise
    except (DatasetNotFoundError, OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = (str(error).strip().splitlines() or ["it holds no rows"])[0]
        if is_local:
            said = f"cannot be read as {path.suffix.lower()} ({reason}); mend the file, or pass another"
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
    """A temporary folder where the library's own cannot be written, which it asks for although it only streams."""
    if can_be_written(Path(library.HF_DATASETS_CACHE)):
        return None
    return str(temporary_folder("datasets") or "") or None


def _read_ids(options: TextOptions) -> list[list[int]]:
    try:
        tensors = read_tensors(Path(options.dataset))
    except CheckpointError as error:
        raise CalibrationError(str(error)) from error
    name = options.column or next(iter(tensors), "tokens")
    if name not in tensors or tensors[name].dim() != 2 or tensors[name].is_floating_point():
        raise CalibrationError(
            f"{options.dataset}: needs integer token ids [N, T] in tensor {name!r}; it has {', '.join(tensors)}"
        )
    if tensors[name].shape[1] < options.sequence_length:
        raise CalibrationError(
            f"{options.dataset}: sequences of {tensors[name].shape[1]} tokens are shorter than sequence_length "
            f"{options.sequence_length}; lower it"
        )
    return tensors[name][:, : options.sequence_length].tolist()
