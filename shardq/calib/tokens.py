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
PIECE_CHARACTERS = 1 << 20
POOL_FACTOR = 16  # candidate sequences read for each one taken, so that a large file is not read to its end


def load_tokens(options: TextOptions, model_folder: Path, vocabulary_size: int) -> Tensor:
    """Token ids [N, T], int64.

    `samples` sequences are taken at even distances from the first `samples * 16` that a text gives, or from all where
    it has fewer, and from all rows of a .safetensors file: deterministic, without a seed.

    Raises:
        CalibrationError: no such dataset, column or tokenizer; too few tokens; an id beyond the vocabulary.
    """
    if options.dataset.endswith(".safetensors"):
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
    if options.dataset.endswith(".txt") and options.packing == "packed":
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
    for row in _rows(options):
        column = options.column or "text"
        if column not in row:
            raise CalibrationError(
                f"{options.dataset}: no column {column!r}; name one of {', '.join(sorted(row))} with the option column"
            )
        if not isinstance(row[column], str):
            raise CalibrationError(f"{options.dataset}: column {column!r} holds {type(row[column]).__name__}, not text")
        yield row[column]


def _rows(options: TextOptions) -> Iterator[dict]:
    """Rows of a file or a hub dataset, streamed: nothing is downloaded or held beyond what is asked for."""
    name = options.dataset
    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in BUILDERS:
                raise CalibrationError(f"{name}: file type {path.suffix!r} is not read; use {', '.join(BUILDERS)}")
            builder = BUILDERS[path.suffix]
            line_breaks = {"keep_linebreaks": True} if builder == "text" else {}
            place = {"split": "train", "streaming": True, "cache_dir": _library_cache()}
            yield from load_dataset(builder, data_files=str(path), **place, **line_breaks)
            return
        if path.suffix in BUILDERS or name.startswith((".", "/")):
            raise CalibrationError(f"{name}: no such file; pass a text, jsonl or parquet file, or a hub name")
        subset = options.subset or DEFAULT_SUBSETS.get(name)
        yield from load_dataset(name, subset, split=options.split, streaming=True, cache_dir=_library_cache())
    except CalibrationError:
        raise
    except (DatasetNotFoundError, OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"{name}: the dataset cannot be read ({reason}); check its name and the network, "
            "or pass a local text, jsonl or parquet file"
        ) from error


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
