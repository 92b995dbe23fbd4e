"""Who a process is, from what torchrun tells it and from the devices there are."""

import pytest
import torch
import torch.distributed as dist

from shardq.errors import ConfigError
from shardq.parallel.ranks import Ranks, started, this_rank


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a launcher around the tests may have set."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[torch.device]:
    """Make torch report some GPUs; gives the list into which chosen devices go."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def assert_refused(device: str, *parts: str) -> None:
    """Starting is refused with one line that holds all parts."""
    with pytest.raises(ConfigError) as caught, started(device):
        pass
    message = str(caught.value)
    assert message.startswith("device: ") and "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_plain_process_is_rank_0_of_1_without_a_process_group():
    with started("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.device) == (0, 1, torch.device("cpu"))
        assert not dist.is_initialized()


def test_plain_process_has_its_host_for_itself():
    with started("cpu") as ranks:
        assert ranks.local_world_size == 1


def test_number_of_ranks_on_the_host_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with started("cpu") as ranks:
        assert (ranks.world_size, ranks.local_world_size) == (1, 3)


def test_ranks_cannot_be_changed():
    with started("cpu") as ranks, pytest.raises(AttributeError):
        ranks.rank = 1


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    pretend_gpus(monkeypatch, 0)
    with started("auto") as ranks:
        assert ranks.device == torch.device("cpu")


def test_first_rank_on_the_host_is_counted_from_the_local_number():
    ranks = Ranks(rank=5, world_size=8, device=torch.device("cpu"), local_world_size=4, local_rank=1)
    assert ranks.first_on_host == 4


@pytest.mark.parametrize(
    "place, name",
    [
        ({}, ""),
        ({"RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}, "rank 1"),
        ({"RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}, "rank 1 on gpu-7"),
    ],
    ids=["alone", "one host", "several hosts"],
)
def test_rank_is_called_by_its_number_and_its_host_where_that_matters(monkeypatch: pytest.MonkeyPatch, place, name):
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-7")
    for variable, value in place.items():
        monkeypatch.setenv(variable, str(value))
    assert this_rank() == name


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_rank_takes_the_gpu_of_its_local_number(monkeypatch: pytest.MonkeyPatch, name: str):
    chosen = pretend_gpus(monkeypatch, 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with started(name) as ranks:
        assert ranks.device == torch.device("cuda", 2)
    assert chosen == [torch.device("cuda", 2)]


def test_cpu_is_taken_where_it_is_asked_for_in_spite_of_gpus(monkeypatch: pytest.MonkeyPatch):
    chosen = pretend_gpus(monkeypatch, 1)
    with started("cpu") as ranks:
        assert ranks.device == torch.device("cpu")
    assert chosen == []


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    pretend_gpus(monkeypatch, 0)
    assert_refused("cuda", "no GPU", "--device cpu")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, device: str):
    pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert_refused(device, "2 GPUs on this host", "local rank 2", "--nproc-per-node")
