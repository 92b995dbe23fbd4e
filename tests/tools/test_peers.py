"""Comparison with the peers: figures against values worked out by hand, checkpoints cut and put together again."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

PEERS = Path(__file__).resolve().parents[2] / "tools" / "bench" / "peers"
sys.path.insert(0, str(PEERS))
import peer_worker  # noqa: E402
import peers  # noqa: E402
import peers_process  # noqa: E402
import peers_truncate  # noqa: E402

from shardq.logs import Event  # noqa: E402


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


# Seconds a step


def test_steps_are_timed_within_blocks_only():
    """Steps of 1, 2 and 4 s; the 7 s between the blocks do not count."""
    measured = peer_worker.step_statistics([[0.0, 1.0, 3.0], [10.0, 14.0]])
    assert measured["seconds_per_step_median"] == 2.0
    assert measured["seconds_per_step_mean"] == pytest.approx(7 / 3)
    assert measured["seconds_per_step_by_block"] == [1.5, 4.0]


def test_single_steps_have_no_duration():
    measured = peer_worker.step_statistics([[3.0], [5.0]])
    assert measured == {
        "seconds_per_step_median": None, "seconds_per_step_mean": None, "seconds_per_step_by_block": [],
    }  # fmt: skip
    assert peer_worker.step_statistics([]) == measured  # as GPTQ reports


def test_clock_notes_the_steps_of_one_class_by_optimizer():
    def step(optimizer_class: type, times: int) -> None:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = optimizer_class([weight], lr=0.1)
        for _ in range(times):
            weight.grad = torch.ones(1)
            optimizer.step()

    with peer_worker.StepClock("Adam") as clock:
        step(torch.optim.Adam, 3)
        step(torch.optim.SGD, 4)
        step(torch.optim.Adam, 2)
    step(torch.optim.Adam, 5)
    assert [len(times) for times in clock.blocks] == [3, 2]
    assert clock.blocks[0] == sorted(clock.blocks[0])


def test_blocks_that_were_not_trained_are_said():
    clock = peer_worker.StepClock("Adam")
    clock.blocks = [[1.0, 2.0], [3.0, 4.0]]
    clock.check(num_blocks=2, iterations=2)
    with pytest.raises(SystemExit, match=r"steps a block were \[2, 2\], not 2 in each of 3 blocks"):
        clock.check(num_blocks=3, iterations=2)


def test_events_give_the_seconds_a_step_of_rank_zero():
    """Blocks of 4 s / 8, 2 s / 8 and 12 s / 8: 0.5, 0.25, 1.5."""
    events = [Event("train", seconds, 0, 0.0, {"iterations": 8}) for seconds in (4.0, 2.0, 12.0)]
    events += [Event("train", 80.0, 1, 0.0, {"iterations": 8}), Event("export", 9.0, 0, 0.0, {})]
    measured = peers.train_statistics(events)
    assert measured == {
        "seconds_per_step_median": 0.5, "seconds_per_step_mean": 0.75, "seconds_per_step_by_block": [0.5, 0.25, 1.5],
    }  # fmt: skip


def test_events_without_training_give_none():
    assert peers.train_statistics([Event("run", 1.0, 0, 0.0, {})])["seconds_per_step_median"] is None


# Ratios and the table

SHARDQ = {"name": "shardq", "seconds_per_step_median": 0.5, "wall_seconds": 100.0, "peak_rss_bytes": 2**30}
AIMET = {"name": "aimet", "seconds_per_step_median": 1.25, "wall_seconds": 150.0, "peak_rss_bytes": 3 * 2**29}


def test_ratios_are_peer_over_shardq():
    assert peers.ratios([{"name": "float"}, AIMET, SHARDQ]) == {"aimet": {"step": 2.5, "wall": 1.5, "peak_rss": 1.5}}


def test_ratio_of_what_was_not_measured_is_none():
    unmeasured = SHARDQ | {"seconds_per_step_median": None}
    assert peers.ratios([AIMET, unmeasured])["aimet"] == {"step": None, "wall": 1.5, "peak_rss": 1.5}
    assert peers.ratios([AIMET]) == {}


def test_table_has_a_line_a_run_and_dashes_for_what_is_missing():
    lines = peers.table([{"name": "float", "perplexity": 18.3}, SHARDQ | {"dtype": "float32"}]).splitlines()
    assert lines[1].split() == ["float", "-", "-", "-", "-", "-", "-", "18.300", "-"]
    assert lines[2].split() == ["shardq", "0.5000", "-", "100.0", "-", "1024", "-", "-", "float32"]
    assert len({len(line) for line in lines}) == 1


# Processes


def test_busy_time_leaves_out_idle_and_waiting_for_disks():
    assert peers_process.busy_ticks("cpu  100 20 30 4000 500 6 7 8 0 0") == 100 + 20 + 30 + 6 + 7 + 8


@pytest.mark.parametrize(("busy", "share"), [(15.0, 0.0), (20.0, 0.25), (14.0, 0.0)])
def test_share_of_other_work(busy: float, share: float):
    """Two cores for 10 s hold 20 s, of which the process itself took 15."""
    assert peers_process.other_share(busy=busy, own=15.0, wall=10.0, cores=2) == share


def test_process_gives_its_last_line_and_cost(tmp_path):
    script = "import os; print('first'); print(os.environ['COLOR'], os.getcwd()); bytearray(100 << 20)"
    line, cost = peers_process.run_process([sys.executable, "-c", script], tmp_path / "a", {"COLOR": "red"}, tmp_path)
    assert line == f"red {tmp_path}"
    assert cost.wall_seconds > 0 and cost.cpu_seconds > 0
    assert cost.rusage_max_rss_bytes > 100 << 20
    assert 0 <= cost.other_cpu_share <= 1


def test_process_that_fails_is_one_line_with_its_reason(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(peers_process.ProcessFailed, match="exit code 1: no such model"):
        peers_process.run_process(command, tmp_path / "a", {}, tmp_path)
    with pytest.raises(peers_process.ProcessFailed, match="python: cannot be started .*; check the path"):
        peers_process.run_process([str(tmp_path / "python")], tmp_path / "a", {}, tmp_path)


def test_process_is_ended_when_the_wait_for_it_is(tmp_path, monkeypatch):
    children = []

    def interrupted(child: int, _: int) -> None:
        children.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(peers_process.os, "wait4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        peers_process.run_process(command, tmp_path / "a", {}, tmp_path)
    assert not Path(f"/proc/{children[0]}").exists()


# Checkpoints


def test_truncated_checkpoint_is_the_first_blocks(llama, tmp_path):
    peers_truncate.truncate(llama, tmp_path / "cut", 2)
    source, cut = weights_of(llama), weights_of(tmp_path / "cut")
    assert set(cut) == {name for name in source if ".layers.2." not in name}
    assert all(torch.equal(cut[name], source[name]) and cut[name].dtype == source[name].dtype for name in cut)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert model.config.num_hidden_layers == 2
    whole = AutoModelForCausalLM.from_pretrained(llama, num_hidden_layers=2)
    ids_BT = torch.arange(8)[None]
    assert torch.equal(model(ids_BT).logits, whole(ids_BT).logits)


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_blocks_that_the_model_lacks_are_one_line(llama, tmp_path, num_blocks: int):
    with pytest.raises(SystemExit, match="has 3 decoder blocks; choose --blocks from 1 to 3"):
        peers_truncate.truncate(llama, tmp_path / "cut", num_blocks)


def test_blocks_by_other_names_are_one_line(llama, tmp_path):
    save_file({"transformer.h.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(SystemExit, match="no tensor is named like one of its blocks"):
        peers_truncate.truncate(tmp_path, tmp_path / "cut", 1)


def test_lists_by_block_are_cut_with_the_blocks(tmp_path):
    config = {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "full"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}
    assert peers_truncate.truncated_config(tmp_path, 2) == expected


def test_folder_without_a_config_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="config.json: no such file; give --model"):
        peers_truncate.truncate(tmp_path, tmp_path / "cut", 1)


def test_grafted_checkpoint_has_the_blocks_of_one_and_the_rest_of_the_other(llama, tmp_path):
    """What lies outside the blocks comes from the source, though the truncated checkpoint has it too."""
    cut = tmp_path / "cut"
    peers_truncate.truncate(llama, cut, 1)
    save_file({name: tensor.float() + 1 for name, tensor in weights_of(cut).items()}, cut / "model.safetensors")
    peers_truncate.graft(llama, cut, tmp_path / "whole", 1)
    source, whole = weights_of(llama), weights_of(tmp_path / "whole")
    assert set(whole) == set(source)
    for name, tensor in whole.items():
        assert torch.equal(tensor, source[name].float() + 1 if ".layers.0." in name else source[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.num_hidden_layers == 3


def test_worker_writes_float32_with_some_weights_replaced(llama, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    source = weights_of(llama)
    peer_worker.write_checkpoint(llama, tmp_path, {name: torch.full((128, 64), 0.1)})
    written = weights_of(tmp_path)
    assert set(written) == set(source)
    for key, tensor in written.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.full((128, 64), 0.1) if key == f"{name}.weight" else source[key].float())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32 and torch.equal(model.get_submodule(name).weight, torch.full((128, 64), 0.1))


def test_worker_names_a_linear_that_the_checkpoint_lacks(llama, tmp_path):
    with pytest.raises(SystemExit, match="no weight of model.layers.9.q; its names differ"):
        peer_worker.write_checkpoint(llama, tmp_path, {"model.layers.9.q": torch.zeros(1)})


# [2, 12]: in each row three groups of four values; nine in the whole row, six in its second half.
GRIDS = torch.tensor([[0, 0.5, 1, 1.5, 0, 0.75, 1.5, 2.25, 0, 0.3, 0.6, 0.9]] * 2)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 4), (3, 6), (4, -1)])
def test_grids_of_as_many_values_as_bits_hold_pass(bits: int, group_size: int):
    peer_worker.check_grids({"up": GRIDS}, bits, group_size)


@pytest.mark.parametrize(("bits", "group_size", "found"), [(1, 4, 4), (2, 6, 6), (3, -1, 9)])
def test_weights_with_more_values_than_bits_hold_are_said(bits: int, group_size: int, found: int):
    with pytest.raises(SystemExit, match=f"^up: {found} values share a scale, more than {bits} bits hold"):
        peer_worker.check_grids({"fine": torch.zeros(2, 12), "up": GRIDS}, bits, group_size)


def test_worker_finds_the_linears_of_blocks_by_the_checkpoints_names(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    linears = peer_worker.linears_of(model.model.layers, "model.layers")
    names = {f"{name}.weight" for name in linears}
    assert len(names) == 3 * 7 and names < set(weights_of(llama))
    assert linears["model.layers.2.self_attn.k_proj"] is model.model.layers[2].self_attn.k_proj


def test_worker_reads_the_first_samples(tmp_path):
    save_file({"calib_ids": torch.arange(12, dtype=torch.int32).view(3, 4)}, tmp_path / "ids.safetensors")
    samples = peer_worker.read_samples(tmp_path / "ids.safetensors", "calib_ids", 2)
    assert [sample.tolist() for sample in samples] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert samples[0].dtype == torch.int64


# The command


@pytest.fixture(name="ids")
def _ids(tmp_path) -> Path:
    save_file({"calib_ids": torch.zeros(2, 16), "eval_ids": torch.zeros(2, 32)}, tmp_path / "ids.safetensors")
    return tmp_path / "ids.safetensors"


@pytest.fixture(name="started")
def _started(monkeypatch) -> list[list[str]]:
    """The commands that would have been started; AutoRound fails, the others succeed."""
    commands = []

    def run(command: list[str], log: Path, environment: dict, folder: Path) -> tuple[str, peers_process.Cost]:
        commands.append(command)
        steps = None if "llmcompressor_gptq.py" in command[1] else 1.0  # GPTQ takes none
        facts = {"peak_rss_bytes": 2**30, "perplexity": 20.0, "seconds_per_step_median": steps}
        if "autoround_tuning.py" in command[1]:
            raise peers_process.ProcessFailed("autoround_tuning.py: exit code 1: out of memory")
        if "quantize.py" in command[1]:
            output = Path(command[command.index("--output") + 1])
            output.mkdir()
            event = {"span": "train", "time": 0.0, "rank": 0, "seconds": 2.0, "iterations": 4}
            (output / "events.jsonl").write_text(json.dumps(event) + "\n")
            (output / "manifest.json").write_text(json.dumps({"options": {"optimize": {"precision": "bf16"}}}))
        return json.dumps(facts), peers_process.Cost(10.0, 15.0, 2**30, 0.25)

    monkeypatch.setattr(peers, "run_process", run)
    return commands


def test_all_run_on_the_same_model_samples_and_iterations(llama, ids, started, capsys):
    fixed = ["--model", str(llama), "--ids", str(ids), "--iterations", "4", "--samples", "2"]
    with pytest.raises(SystemExit) as caught:
        pythons = ["--aimet", "a/python", "--autoround", "b/python", "--llmcompressor", "c/python"]
        peers.main([*fixed, *pythons, "--shardq-options", "--seed 3"])
    assert caught.value.code == 1  # AutoRound failed
    evaluation, aimet, _, autoround, gptq, _, shardq, _ = started
    assert aimet[0].endswith("a/python") and autoround[0].endswith("b/python") and gptq[0].endswith("c/python")
    assert all(Path(command[1]).is_file() for command in (aimet, autoround, gptq)) and shardq[-2:] == ["--seed", "3"]
    assert evaluation[evaluation.index("--eval.sequence_length") + 1] == "32"
    assert shardq[shardq.index("--calib.sequence_length") + 1] == "16"
    for command, prefix in ((aimet, ""), (autoround, ""), (shardq, "optimize.")):
        assert command[command.index("--model") + 1] == str(llama)
        assert command[command.index(f"--{prefix}iterations") + 1] == "4"
    assert autoround[autoround.index("--dtype") + 1] == "default"
    assert gptq[gptq.index("--samples") + 1] == "2" and "--iterations" not in gptq  # it takes no steps
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == ["float", "aimet", "llmcompressor", "shardq"]
    assert result["rows"][3]["dtype"] == "bf16"
    assert result["ratios"] == {
        "aimet": {"step": 2.0, "wall": 1.0, "peak_rss": 1.0},
        "llmcompressor": {"step": None, "wall": 1.0, "peak_rss": 1.0},
    }
    assert "autoround: failed: autoround_tuning.py: exit code 1: out of memory" in captured.err
    assert "aimet: 25% of the processor went to other work" in captured.err


def test_peers_without_an_environment_are_skipped(llama, ids, started, capsys):
    with pytest.raises(SystemExit) as caught:
        peers.main(["--model", str(llama), "--ids", str(ids), "--iterations", "4", "--skip-eval", "--blocks", "1"])
    assert caught.value.code == 0
    assert [Path(command[1]).name for command in started] == ["quantize.py"]
    assert "aimet: skipped, no --aimet given" in capsys.readouterr().err


def test_wrong_paths_are_one_line(llama, ids, tmp_path):
    with pytest.raises(SystemExit, match="nowhere: no such file or folder; check --model"):
        peers.main(["--model", "nowhere", "--ids", str(ids), "--iterations", "4"])
    with pytest.raises(SystemExit, match="holds files already; choose another --output"):
        peers.main(["--model", str(llama), "--ids", str(ids), "--iterations", "4", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no tensor eval_ids"):
        save_file({"calib_ids": torch.zeros(2, 16)}, tmp_path / "few.safetensors")
        peers.length_of(tmp_path / "few.safetensors", "eval_ids")
