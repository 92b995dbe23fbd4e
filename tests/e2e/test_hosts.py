"""Two hosts, as network namespaces of this one: the result of one host, wrong set-ups, and a cable that is pulled."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from runs import LAUNCH, committed, quantize_arguments, result_files

pytestmark = pytest.mark.slow

NAMES = ("shardq-a", "shardq-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LIMIT_SECONDS = 30
STATIC = "--node-rank {number} --master-addr 10.77.0.1 --master-port 29500"
DYNAMIC = "--rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29500 --rdzv-conf is_host={is_first} --local-addr {address}"


def ip(*arguments: str) -> None:
    """Run iproute2's `ip`; a test is skipped where this is not allowed."""
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root and iproute2: {getattr(error, 'stderr', error)}")


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them, `eth0` at both ends."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", NAMES[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(number, rendezvous, arguments, folder):
    """Start torchrun with two ranks on a host of a name of its own; its standard error goes to `err-NUMBER`."""
    options = rendezvous.format(number=number, address=ADDRESSES[number], is_first=int(number == 0)).split()
    command = ["ip", "netns", "exec", NAMES[number], "unshare", "--uts", "sh", "-c",
               'hostname "$0" && exec "$@"', f"host-{number}", sys.executable, "-m", "torch.distributed.run",
               "--nnodes", "2", "--nproc-per-node", "2", *options, LAUNCH / "quantize.py", *arguments]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    with open(folder / f"out-{number}", "w") as stdout, open(folder / f"err-{number}", "w") as stderr:
        return subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)


def wait_for_all(processes):
    """Exit codes; nothing outlives this."""
    try:
        return [process.wait(tiny.LAUNCH_TIMEOUT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.terminate()


def own_lines(folder, number):
    """What a host's console shows of shardq's own."""
    return [line for line in (folder / f"err-{number}").read_text().splitlines() if line.startswith("shardq:")]


@pytest.fixture(scope="module")
def one_host(llama, token_file, tmp_path_factory):
    """Output folder of a run on four ranks of one host."""
    output = tmp_path_factory.mktemp("one-host") / "out"
    arguments = quantize_arguments(llama, token_file, output, "--optimize.batch_size", 4)
    assert tiny.torchrun(4, [LAUNCH / "quantize.py", *arguments]).returncode == 0
    return output


@pytest.mark.parametrize("rendezvous", [STATIC, DYNAMIC], ids=["static", "c10d"])
def test_two_hosts_give_the_bytes_of_one(hosts, one_host, llama, token_file, tmp_path, rendezvous):
    """Each keeps its activations on a disk of its own."""
    arguments = quantize_arguments(llama, token_file, tmp_path / "out", "--optimize.batch_size", 4)
    processes = [
        start(number, rendezvous, [*arguments, "--cache.folder", str(tmp_path / f"disk-{number}")], tmp_path)
        for number in range(2)
    ]
    assert wait_for_all(processes) == [0, 0], (tmp_path / "err-0").read_text()
    assert result_files(tmp_path / "out") == result_files(one_host)
    assert {path.name for path in (tmp_path / "out").glob("events*")} == {"events.jsonl", "events-rank-2.jsonl"}
    assert [list((tmp_path / f"disk-{number}").iterdir()) for number in range(2)] == [[], []]


def test_output_folders_that_are_not_shared_are_refused(hosts, llama, token_file, tmp_path):
    processes = [
        start(number, STATIC, quantize_arguments(llama, token_file, tmp_path / f"disk-{number}" / "out",
                                                 "--optimize.batch_size", 4), tmp_path)
        for number in range(2)
    ]  # fmt: skip
    assert all(wait_for_all(processes))
    for number in range(2):  # each host has a console of its own
        [line] = own_lines(tmp_path, number)
        assert line.startswith("shardq: [rank 2 on host-1] ") and "/disk-1/out: rank 2 on host-1 does not find" in line
    assert sorted(path.name for path in (tmp_path / "disk-0" / "out").iterdir()) == ["manifest.json"]


def test_model_that_one_host_lacks_is_refused_by_name(hosts, llama, token_file, tmp_path):
    processes = [
        start(number, STATIC, quantize_arguments(model, token_file, tmp_path / "out", "--optimize.batch_size", 4),
              tmp_path)
        for number, model in enumerate([llama, "/no/such/model"])
    ]  # fmt: skip
    assert all(wait_for_all(processes))
    for number in range(2):
        [line] = own_lines(tmp_path, number)
        assert line.startswith("shardq: [rank 2 on host-1] /no/such/model: no such folder")


def test_host_that_is_cut_off_ends_both_and_the_run_goes_on(hosts, one_host, llama, token_file, tmp_path):
    arguments = quantize_arguments(llama, token_file, tmp_path / "out", "--optimize.batch_size", 4)
    processes = [start(number, STATIC, arguments, tmp_path) for number in range(2)]
    while committed(tmp_path / "out") < 1 and all(process.poll() is None for process in processes):
        time.sleep(0.005)
    ip("-n", NAMES[0], "link", "set", "eth0", "down")
    cut = time.monotonic()
    assert all(wait_for_all(processes))
    assert time.monotonic() - cut < LIMIT_SECONDS
    silent = "has not been heard of for 20 s: it hangs, or its host is cut off"
    assert f"on host-1 {silent}" in own_lines(tmp_path, 0)[0]
    assert f"rank 0 on host-0 {silent}" in own_lines(tmp_path, 1)[0]
    ip("-n", NAMES[0], "link", "set", "eth0", "up")
    assert 1 <= committed(tmp_path / "out") < 4
    assert wait_for_all([start(number, STATIC, arguments, tmp_path) for number in range(2)]) == [0, 0]
    assert "resuming" in Path(tmp_path / "out-0").read_text()
    assert result_files(tmp_path / "out") == result_files(one_host)
