"""The tensors of a checkpoint under the names that a model asks for, however they are stored.

The digest of a stored tensor is taken as its bytes go by, without a pass for it, and compared when they are read again.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.config_file import read_config, scheme_of
from shardq.formats.shards import (
    DTYPES,
    Index,
    TensorInfo,
    open_index,
    read_pieces,
    read_rows,
    read_sample,
    read_tensor,
    sample_place,
)

Digests = dict[str, str]
"""XXH3-128 of all bytes of stored tensors, 32 hex digits, by the tensor's name."""

Rows = list[int] | None
"""Indices of a tensor's first dimension, ascending; None for all of it."""

Read = Callable[[TensorInfo, Rows], Tensor]
"""Reads some rows of a stored tensor, or all."""

Decode = Callable[[Read, Rows], Tensor]
"""Makes a tensor's values, of some rows or of all, from its stored tensors."""


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that a model asks for, and the stored tensors that its values are made of.

    Attributes:
        dtype: of the values, as safetensors names it.
        shape: of the values.
        stored: at least one.
        decode: None where the values are those of the one stored tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[TensorInfo, ...]
    decode: Decode | None = None

    @property
    def file(self) -> Path:
        """The file that messages name."""
        return self.stored[0].file

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize if self.decode else self.stored[0].num_bytes


Decoder = Callable[[Index, Any], Iterable[SourceTensor]]
"""Finds the tensors of a checkpoint that one storage scheme encodes; the others are taken as they are stored. Stored
tensors of a weight that say how programs round what enters it are parts that its values do not need. The second
argument is config.json's scheme, or None."""


def as_stored(info: TensorInfo) -> SourceTensor:
    """A tensor whose values are stored as they are."""
    return SourceTensor(info.name, info.dtype, info.shape, (info,))


def stored_in(tensors: Iterable[SourceTensor]) -> list[TensorInfo]:
    """The stored tensors that some tensors are made of, each once, in order."""
    return list({info.name: info for tensor in tensors for info in tensor.stored}.values())


def values_of(tensor: SourceTensor, read: Read, rows: Rows = None) -> Tensor:
    """A tensor's values, of some rows or of all, from what `read` gives of its stored tensors."""
    return tensor.decode(read, rows) if tensor.decode else read(tensor.stored[0], rows)


@dataclass(frozen=True)
class WeightSource:
    """The tensors of a checkpoint folder.

    Attributes:
        index: where every stored tensor lies.
        tensors: what the stored tensors stand for, by name; every stored tensor is part of one.
        scheme: the name of the scheme by which some tensors are encoded; empty: none is.
        digests: of the stored tensors that have been read whole.
        samples: digests of parts of stored tensors that had not been read when `note_samples` was called.
    """

    folder: Path
    index: Index
    tensors: dict[str, SourceTensor]
    scheme: str = ""
    digests: Digests = field(default_factory=dict)
    samples: Digests = field(default_factory=dict)

    def read(self, tensor: SourceTensor, is_buffer: bool = False, pinned: bool = False) -> Tensor:
        """Read a tensor's values into CPU memory; its bytes must be those of the first time, its values finite.

        Args:
            is_buffer: it is no parameter; such a one may be infinite, as a limit that is not there, but hold no NaN.
            pinned: in memory that a GPU takes them from, where they are stored as they are.

        Raises:
            CheckpointError: a NaN or an infinity is found, the bytes are others, or `read_tensor`'s reasons.
        """
        whole = {info.name: read_tensor(info, pinned and tensor.decode is None) for info in tensor.stored}
        values = values_of(tensor, lambda info, rows: whole[info.name] if rows is None else whole[info.name][rows])
        _check_finite(tensor, values, is_buffer=is_buffer)
        for info in tensor.stored:
            self._check_same(info, whole[info.name])
        return values

    def read_unchecked(self, tensor: SourceTensor) -> Tensor:
        """Read a tensor's values, which may not be finite, from bytes that may have changed; raises `read_tensor`'s."""
        return values_of(tensor, read_stored)

    def read_rows(self, tensor: SourceTensor, rows: list[int]) -> Tensor:
        """Read some rows of a floating-point tensor's values, which must be finite.

        Raises:
            CheckpointError: a NaN or an infinity is found, or a file ended early.
        """
        values = values_of(tensor, read_stored, rows)
        _check_finite(tensor, values, rows)
        return values

    def read_plain(self, tensor: SourceTensor) -> Tensor:
        """Read a tensor for a checkpoint that encodes nothing: as it is stored, or else its values.

        Raises:
            CheckpointError: as `read` where it is encoded; else its bytes are others, or `read_tensor`'s reasons.
        """
        if tensor.decode is not None:
            return self.read(tensor)
        raw = read_tensor(tensor.stored[0])
        self._check_same(tensor.stored[0], raw)
        return raw

    def check(self, tensor: SourceTensor, is_buffer: bool = False) -> None:
        """Check a tensor as `read` does, and raise as it does; piece by piece where it is stored as it is."""
        if tensor.decode is not None:
            self.read(tensor, is_buffer)
            return
        [info] = tensor.stored
        whole = xxhash.xxh3_128()
        for piece in read_pieces(info):
            if not _is_finite(piece, is_buffer):
                self.read(tensor, is_buffer)  # says where
            whole.update(_bytes_of(piece))
        _compare(info, whole.hexdigest(), self.digests)

    def note_samples(self, stored: Iterable[TensorInfo]) -> None:
        """Note some bytes of each of these that has not been read: files may be exchanged before it is."""
        unread = [info for info in stored if info.name not in self.digests]
        self.samples.update({info.name: xxhash.xxh3_128_hexdigest(read_sample(info)) for info in unread})

    def _check_same(self, info: TensorInfo, raw: Tensor) -> None:
        """Check a stored tensor, as it was just read, against what is known of it, and note what was not known."""
        content = _bytes_of(raw)
        if info.name in self.samples:
            _compare(info, xxhash.xxh3_128_hexdigest(content[sample_place(info)]), self.samples)
        _compare(info, xxhash.xxh3_128_hexdigest(content), self.digests)


def open_source(folder: Path, decoder: Decoder | None = None) -> WeightSource:
    """Open a checkpoint folder: read config.json and the shards' headers.

    Args:
        decoder: default: every tensor must be stored as it is.

    Raises:
        CheckpointError: as `open_index` and `read_config`, or a tensor is stored encoded and plain.
        UnsupportedModelError: config.json names a scheme, and no decoder is given.
    """
    index, scheme = open_index(folder), scheme_of(read_config(folder))
    decoded = list((decoder or partial(only_plain, folder))(index, scheme))
    encoded = {info.name for info in stored_in(decoded)}
    plain = [as_stored(info) for info in index.values() if info.name not in encoded]
    for tensor in decoded:
        if tensor.name in index and tensor.name not in encoded:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} is stored encoded and plain; delete the one that is not meant"
            )
    for tensor in plain:
        if tensor.dtype.startswith("F8_"):
            raise UnsupportedModelError(
                f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}, and nothing says by which scale; "
                "pass a checkpoint with its scales and quantization_config in its config.json, or one in bfloat16"
            )
    name = str(scheme["quant_method"]) if decoded and isinstance(scheme, dict) and "quant_method" in scheme else ""
    return WeightSource(folder, index, {tensor.name: tensor for tensor in (*plain, *decoded)}, name)


def only_plain(folder: Path, index: Index, scheme: Any) -> Iterable[SourceTensor]:
    """The decoder of checkpoints whose tensors are all stored as they are, which finds none.

    Raises:
        UnsupportedModelError: config.json names a scheme.
    """
    if scheme:
        method = scheme.get("quant_method", "unknown method") if isinstance(scheme, dict) else scheme
        raise UnsupportedModelError(
            f"{folder}: already quantized ({method}), which shardq does not read; pass the checkpoint it was made from"
        )
    return ()


def read_stored(info: TensorInfo, rows: Rows) -> Tensor:
    """Read some rows of a stored tensor, or all; raises as `read_tensor`."""
    return read_tensor(info) if rows is None else read_rows(info, rows)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _compare(info: TensorInfo, found: str, digests: Digests) -> None:
    if digests.setdefault(info.name, found) != found:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} is not what it was when the run began; restore that file, or "
            "begin in another --output"
        )


def _check_finite(tensor: SourceTensor, values: Tensor, rows: Rows = None, is_buffer: bool = False) -> None:
    """Raise if a value is not finite; `rows` says which rows of the tensor these are, if not all."""
    if not _is_finite(values, is_buffer):
        where = (values.isnan() if is_buffer else ~torch.isfinite(values)).nonzero()[0].tolist()
        value = values[tuple(where)].item()
        where = where if rows is None else [rows[where[0]], *where[1:]]
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} holds {value} at {where}; "
            "the checkpoint is damaged, download it again or retrain"
        )


def _is_finite(tensor: Tensor, is_buffer: bool) -> bool:
    # One pass that makes nothing: a NaN comes through it, an infinity is the least value or the greatest.
    ends = tensor.aminmax() if tensor.numel() else ()
    return not any(end.isnan() if is_buffer else not end.isfinite() for end in ends)
