"""Texts to the fixed token ids [N, T] that a run calibrates or evaluates on."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shardq.calib.options import TextOptions
from shardq.calib.sets import IDS, parts_of, read_texts
from shardq.calib.tokenizer import Tokenizer, load_tokenizer
from shardq.errors import CalibrationError, CheckpointError
from shardq.formats.tensor_file import read_tensors

PIECE_CHARACTERS = 1 << 20
POOL_FACTOR = 16  # candidate sequences read for each one taken, so that a large file is not read to its end


def load_tokens(options: TextOptions, model_folder: Path, vocabulary_size: int) -> Tensor:
    """Token ids [N, T], int64.

    `samples` sequences are taken at even distances from the first `samples * 16` of a text, or from all where it has
    fewer, and from all rows of a .safetensors file; datasets of a mix alternate evenly. The choice is deterministic,
    without a seed. Each sequence of a text begins with the tokenizer's special tokens, such as `<bos>`; sequences of a
    .safetensors file are unchanged.

    Raises:
        CalibrationError: no such dataset, column or tokenizer; too few tokens; an id beyond the vocabulary.
        ConfigError: the dataset is no valid mix.
    """
    parts, tokenizer = parts_of(options), None
    places: list[tuple[float, int]] = []
    chosen: list[list[list[int]]] = []
    for number, part in enumerate(parts):
        if part.dataset.lower().endswith(IDS):
            pool = _read_ids(part)
        else:
            tokenizer = tokenizer or load_tokenizer(model_folder)
            sequences = _sequences(part, tokenizer)
            limit = part.samples * POOL_FACTOR if part.samples else None
            pool = [ids for _, ids in zip(range(limit), sequences, strict=False)] if limit else list(sequences)
        chosen.append(_spread(pool, part))
        places += [((place + 0.5) / len(chosen[-1]), number) for place in range(len(chosen[-1]))]
    left = [iter(sequences) for sequences in chosen]
    tokens_NT = torch.tensor([next(left[number]) for _, number in sorted(places)], dtype=torch.long)
    _check_ids(tokens_NT, options.dataset, vocabulary_size)
    return tokens_NT


def _check_ids(tokens_NT: Tensor, name: str, vocabulary_size: int) -> None:
    lowest, highest = tokens_NT.min().item(), tokens_NT.max().item()
    if highest >= vocabulary_size or lowest < 0:
        raise CalibrationError(
            f"{name}: token id {highest if highest >= vocabulary_size else lowest} is outside the model's vocabulary "
            f"of {vocabulary_size}; the tokenizer or the ids belong to another model"
        )


def digest(tokens_NT: Tensor) -> str:
    """Hex digest of token ids, for the manifest."""
    return hashlib.sha256(str(tuple(tokens_NT.shape)).encode() + tokens_NT.numpy().tobytes()).hexdigest()


def next_tokens(tokens_NT: Tensor) -> Tensor:
    """The next token at each position [N, T]; -1 after a sample's last token, where none is known."""
    return torch.nn.functional.pad(tokens_NT[:, 1:], (0, 1), value=-1)


def _spread(pool: list[list[int]], options: TextOptions) -> list[list[int]]:
    wanted = options.samples or len(pool)
    if not pool or len(pool) < wanted:
        raise CalibrationError(
            f"{options.dataset}: gives {len(pool)} sequences of {options.sequence_length} tokens, {wanted or 1} are "
            "needed; use a larger dataset, fewer samples or a shorter sequence_length"
        )
    return [pool[number * len(pool) // wanted] for number in range(wanted)]


def _sequences(options: TextOptions, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Sequences from a dataset's texts: `packed`, joined and cut, or one a row."""
    length, prefix = options.sequence_length - len(tokenizer.prefix), tokenizer.prefix
    if length < 1:
        raise CalibrationError(
            f"{options.dataset}: the tokenizer puts {len(prefix)} tokens in front of a text, which leaves no room in "
            f"sequence_length {options.sequence_length}; raise it"
        )
    pending: list[int] = []
    for text in _texts(options, tokenizer):
        ids = tokenizer.encode(text)
        if prefix and ids[: len(prefix)] == prefix:  # a chat template writes it, too
            ids = ids[len(prefix) :]
        if options.packing == "row":
            pending = ids[:length]  # a shorter row gives no sequence
        else:
            pending += ids
        whole = len(pending) // length * length
        yield from (prefix + pending[start : start + length] for start in range(0, whole, length))
        pending = pending[whole:]


def _texts(options: TextOptions, tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of the dataset; for packing, lines of a .txt file are joined again to pieces of limited size.

    So tokens are those of the whole text except at one boundary a piece, and memory does not grow with the file.
    """
    texts = read_texts(options)
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
        for number, text in enumerate(texts, start=1):
            where = f"{options.dataset}: row {number}"
            yield text.rstrip("\n") if isinstance(text, str) else tokenizer.written(text, where)


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
