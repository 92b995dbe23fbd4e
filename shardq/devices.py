"""The differences between CPU and GPU: precision, sizes of work, memory, and transfers between the two."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from shardq.errors import MemoryShortageError

# Parts of torch's messages when the GPU's allocator, its libraries, or the host's allocator got no memory.
SIGNS_OF_SHORTAGE = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def pass_tokens(device: torch.device) -> int:
    """Tokens to take through a block at once where nothing is trained.

    Enough to keep matrix multiplies busy. A CPU is kept busy by few, and activations that stay in its cache make the
    pass faster (measured: 4096 tokens take 1.2 to 1.3 times as long as 1024).
    """
    return 1024 if device.type == "cpu" else 4096


def values_at_once(device: torch.device) -> int:
    """Number of values in a piece over which many passes are made before the next piece.

    Few enough for a CPU's cache; on a GPU, enough to make a kernel's launch worthwhile.
    """
    return 1 << 18 if device.type == "cpu" else 1 << 24


def storage_threads(device: torch.device, num_samples: int = 1) -> int:
    """Number of background threads that read activations from the store or write them.

    A CPU needs its cores for the computation. A GPU leaves them free, and one core is slower than the GPU: a sample of
    2048 tokens of 8192 channels takes 23 ms to read and check, and a step uses two of them in 29 (measured, H100).

    Args:
        num_samples: samples that a thread reads at once; it keeps them in the GPU's memory until they are asked for.
    """
    return 1 if device.type == "cpu" else max(2, 4 // num_samples)


def training_attention(device: torch.device, sequence_length: int, dtype: torch.dtype) -> list[SDPBackend]:
    """Attention kernels to train a block with; the first that fits is used.

    On a CPU in float32, plain matrix multiplies with a fused softmax between them are faster than the flash kernel,
    whose backward is slow, while a head's scores stay in the cache (measured: 0.8 of the whole step's time at 512
    tokens, 1.2 at 2048). In bf16, causal attention of so short sequences is our own (`model/attention.py`).

    Args:
        dtype: dtype of the matrix multiplies.
    """
    if device.type == "cpu" and sequence_length <= 1024 and dtype == torch.float32:
        return [SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, ready for any stream; for background threads.

    On a GPU the bytes go through pinned memory on a side stream, and only the calling thread waits for them.
    """
    if device.type != "cuda":
        return tensor
    stream = _side_stream(device)
    with torch.cuda.stream(stream):
        moved = tensor.pin_memory().to(device, non_blocking=True)
    stream.synchronize()
    moved.record_stream(torch.cuda.default_stream(device))
    return moved


def to_host(tensor: Tensor, ready: torch.cuda.Event | None) -> Tensor:
    """A copy of a tensor in CPU memory, pinned if it comes from a GPU; the calling thread waits for it.

    Args:
        ready: the result of `mark_ready` after the tensor's computation was queued.
    """
    if ready is None:
        return tensor
    stream = _side_stream(tensor.device)
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    stream.synchronize()
    return pinned


def mark_ready(tensor: Tensor) -> torch.cuda.Event | None:
    """A mark on the current stream after the computation of `tensor`; None where nothing runs asynchronously."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def spare_bytes(device: torch.device, local_world_size: int) -> int:
    """Memory that a rank may take on its device: 90 % of what is free on a GPU, half of its share on a CPU."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available // 2 // local_world_size


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn a failed allocation, on a GPU or in host memory, into one line that ends with the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        # Torch's message says first how much memory was asked for and is free, then how to tune its allocator.
        reason = ". ".join(" ".join(str(error).split()).split(". ")[:3]) or type(error).__name__
        raise MemoryShortageError(f"out of memory ({reason}); {advice}") from error


def is_shortage(error: Exception) -> bool:
    """Whether an error is a failed allocation, on a GPU or in host memory."""
    if isinstance(error, RuntimeError):
        return any(sign in str(error) for sign in SIGNS_OF_SHORTAGE)
    return isinstance(error, MemoryError)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One stream for the whole process: torch keeps freed memory by stream, and more streams would keep more.
    return torch.cuda.Stream(device)
