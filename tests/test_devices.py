"""What differs between CPU and GPU; here the CPU's half, and what is asked of the system."""

import psutil
import pytest
import torch
from torch.nn.attention import SDPBackend

from shardq.devices import (
    mark_ready,
    memory_errors,
    multiplies_bf16,
    spare_bytes,
    storage_threads,
    to_device,
    to_host,
    training_attention,
    values_at_once,
)
from shardq.errors import MemoryShortageError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, False),
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"arm_bf16": True}, True),
    ],
    ids=str,
)
def test_cpu_multiplies_bf16_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict, expected: bool
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_bf16(CPU) is expected


def test_names_of_the_instructions_are_those_that_torch_uses():
    """On x86 torch names all of them, present or not; on ARM its own."""
    known = torch.cpu.get_capabilities()
    names = {"x86_64": {"avx2"}, "aarch64": {"arm_bf16"}}.get(known.get("architecture", "x86_64"), set())
    assert names <= known.keys()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpu_multiplies_bf16_from_ampere_on(monkeypatch: pytest.MonkeyPatch, capability: tuple, expected: bool):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_bf16(GPU) is expected


def test_plain_attention_is_for_short_float32_sequences_on_a_cpu_alone():
    assert training_attention(CPU, 1024, torch.float32) == [SDPBackend.MATH]
    others = [(CPU, 1025, torch.float32), (CPU, 512, torch.bfloat16), (GPU, 1024, torch.float32)]
    for kernels in [training_attention(*other) for other in others]:
        assert kernels[0] == SDPBackend.FLASH_ATTENTION
        assert kernels[-1] == SDPBackend.MATH, "nothing is left for what no fused kernel takes"


def test_pieces_fit_a_cpus_cache_and_are_large_on_a_gpu():
    assert 4 * values_at_once(CPU) <= 1 << 20
    assert 4 * values_at_once(GPU) >= 32 << 20


def test_a_cpu_that_computes_gives_the_store_one_thread():
    assert storage_threads(CPU) == storage_threads(CPU, 8) == 1
    assert 1 < storage_threads(GPU, 8) < storage_threads(GPU)


def test_on_a_cpu_nothing_moves():
    tensor = torch.randn(3)
    assert to_device(tensor, CPU) is tensor
    assert mark_ready(tensor) is None
    assert to_host(tensor, None) is tensor


@pytest.mark.parametrize("local_world_size", [1, 2, 8])
def test_ranks_of_a_host_share_half_of_what_is_available(monkeypatch: pytest.MonkeyPatch, local_world_size: int):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=64 << 30))
    assert spare_bytes(CPU, local_world_size) == (32 << 30) // local_world_size


def test_gpu_is_not_shared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert spare_bytes(GPU, 4) == 900


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGpu:
    def test_tensor_comes_back_as_it_went(self):
        tensor = torch.randn(1000, 1000)
        moved = to_device(tensor, GPU)
        assert moved.is_cuda and torch.equal(to_host(moved, mark_ready(moved)), tensor)

    def test_what_comes_back_is_what_was_still_being_computed(self):
        factor = torch.eye(4096, device=GPU) * 2
        product = factor
        for _ in range(20):
            product = product @ factor
        assert torch.equal(to_host(product, mark_ready(product)), torch.eye(4096) * 2**21)


def allocate_too_much() -> None:
    """An allocation that fails for real."""
    torch.empty(1 << 50)


def fail(error: Exception) -> None:
    """Raise, where a lambda cannot."""
    raise error


CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 18.32 GiB is "
    "free. Including non-PyTorch memory, this process has 60.78 GiB memory in use. See documentation"
)


@pytest.mark.parametrize(
    "work, named",
    [
        (allocate_too_much, "can't allocate memory: you tried to allocate 4503599627370496 bytes"),
        (lambda: fail(torch.OutOfMemoryError(CUDA_MESSAGE)), "Tried to allocate 20.00 GiB. GPU 0 has a total capacity"),
        (lambda: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")), "ALLOC_FAILED"),
        (lambda: fail(MemoryError()), "MemoryError"),
    ],
    ids=["host", "GPU", "GPU library", "Python"],
)
def test_memory_that_runs_out_is_one_line_with_advice(work, named):
    with pytest.raises(MemoryShortageError) as caught, memory_errors("buy more"):
        work()
    message = str(caught.value)
    assert message.startswith("out of memory (") and message.endswith("); buy more") and named in message
    assert "\n" not in message and "non-PyTorch" not in message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_than_a_failed_allocation_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, memory_errors("buy more"):
        fail(error)
    assert caught.value is error
