"""Activations [T, D] that enter block k: generation k of the fp and of the quantized stream.

Generation 0 is the embeddings' output, the same for both streams, and is kept once. Other tensors that enter a block
sample by sample are kept under names of their own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shardq.cache.options import CacheOptions
from shardq.errors import ShardQError, StorageError
from shardq.files import remove
from shardq.formats.tensor_file import read_checked, write_checked

Stream = str
"""Name of a kept tensor: `fp` or `quant` for hidden states, or the name of another tensor that enters a block."""
STREAMS: tuple[Stream, ...] = ("fp", "quant")
HIDDEN = "hidden"


class ActivationStore(Protocol):
    """Keeps hidden states, and other tensors that enter a block, by stream, generation and sample."""

    def write(self, stream: Stream, generation: int, sample: int, hidden_TD: Tensor) -> None:
        """Keep one sample's hidden states [T, D]."""

    def read(self, stream: Stream, generation: int, sample: int) -> Tensor:
        """Hidden states [T, D] in CPU memory."""

    def holds(self, generation: int, sample: int, streams: Sequence[Stream] = STREAMS) -> bool:
        """Whether these streams of a sample are kept and undamaged."""

    def drop(self, generation: int, sample: int, streams: Sequence[Stream] = STREAMS) -> None:
        """Forget these streams of a sample; one that is not kept is no error."""


class MemoryStore:
    """Activations in CPU memory, lost when the process ends."""

    def __init__(self):
        self._hidden: dict[tuple[str, int, int], Tensor] = {}

    def write(self, stream: Stream, generation: int, sample: int, hidden_TD: Tensor) -> None:
        """Keep a copy: a view would keep the whole batch in memory."""
        self._hidden[_kept_stream(stream, generation), generation, sample] = hidden_TD.detach().cpu().clone()

    def read(self, stream: Stream, generation: int, sample: int) -> Tensor:
        """The kept hidden states [T, D] themselves, no copy."""
        return self._hidden[_kept_stream(stream, generation), generation, sample]

    def holds(self, generation: int, sample: int, streams: Sequence[Stream] = STREAMS) -> bool:
        return all((_kept_stream(stream, generation), generation, sample) in self._hidden for stream in streams)

    def drop(self, generation: int, sample: int, streams: Sequence[Stream] = STREAMS) -> None:
        for stream in streams:
            self._hidden.pop((stream, generation, sample), None)


class DiskStore:
    """Activations on disk: one safetensors file a sample, stream and generation, each written whole."""

    def __init__(self, folder: Path, pinned: bool = False):
        """Keep files in a folder, and read them into pinned memory or not."""
        self._folder, self._pinned = folder, pinned

    def _path(self, stream: Stream, generation: int, sample: int) -> Path:
        name = f"{_kept_stream(stream, generation)}-{sample:06d}.safetensors"
        return self._folder / f"generation-{generation:05d}" / name

    def write(self, stream: Stream, generation: int, sample: int, hidden_TD: Tensor) -> None:
        """Write one file; it is on the disk when this returns."""
        write_checked(self._path(stream, generation, sample), {HIDDEN: hidden_TD})

    def read(self, stream: Stream, generation: int, sample: int) -> Tensor:
        """Read one file into CPU memory. A damaged one is deleted, so that a resume computes it again.

        Raises:
            StorageError: the file is gone or damaged.
        """
        path = self._path(stream, generation, sample)
        try:
            return read_checked(path, self._pinned)[0][HIDDEN]
        except (ShardQError, KeyError) as error:
            remove(path)
            raise StorageError(
                f"{path}: cached activations are gone or damaged; run the same command again to compute them anew"
            ) from error

    def holds(self, generation: int, sample: int, streams: Sequence[Stream] = STREAMS) -> bool:
        """Whether the files are there and undamaged; reads them."""
        try:
            for stream in streams:
                self.read(stream, generation, sample)
        except StorageError:
            return False
        return True

    def drop(self, generation: int, sample: int, streams: Sequence[Stream] = STREAMS) -> None:
        """Delete a sample's files; the generation's folder stays: another rank may be about to write there."""
        for stream in streams:
            remove(self._path(stream, generation, sample))


def open_store(options: CacheOptions, folder: Path, device: torch.device) -> ActivationStore:
    """The store that the options ask for; `folder` holds its files if it is on disk.

    Args:
        device: where the activations are used; for a GPU they are read into pinned memory, from which it copies.
    """
    return MemoryStore() if options.placement == "cpu" else DiskStore(folder, device.type == "cuda")


def _kept_stream(stream: Stream, generation: int) -> Stream:
    return "fp" if generation == 0 and stream in STREAMS else stream
