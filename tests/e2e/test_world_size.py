"""Any number of ranks: work that does not divide evenly, and runs that go on with another number of them."""

import json
import shutil

import pytest

import forked
from runs import (
    LAUNCH,
    assert_nearly_equal,
    committed,
    last_json,
    quantize_arguments,
    result_files,
    run_evaluate,
    run_quantize,
    start_and_kill,
)
from shardq.errors import ShardQError


def arguments_for(llama, token_file, output, *more):
    """A run whose batch is what the number of ranks makes it, with enough iterations to be killed in a block."""
    arguments = quantize_arguments(llama, token_file, output, "--optimize.iterations", 60, *more)
    where = arguments.index("--optimize.batch_size")
    return arguments[:where] + arguments[where + 2 :]


@pytest.fixture(scope="module")
def whole(llama, token_file, tmp_path_factory):
    """Output folder and summary of the run on two ranks that nothing interrupts. Read only."""
    output = tmp_path_factory.mktemp("whole") / "out"
    finished = forked.ranks(2, [LAUNCH / "quantize.py", *arguments_for(llama, token_file, output)])
    assert finished.returncode == 0, finished.stderr
    return output, last_json(finished.stdout)


@pytest.fixture(scope="module")
def begun(llama, token_file, tmp_path_factory):
    """Output folder of the same run, killed in its second block. Read only."""
    output = tmp_path_factory.mktemp("begun") / "out"
    assert start_and_kill(2, arguments_for(llama, token_file, output), output, after_blocks=1) != 0
    assert committed(output) == 1
    return output


def committed_files(output):
    """What must stay as it is: the manifest, the first ledger line, and the files that it names."""
    line = (output / "ledger.jsonl").read_bytes().splitlines()[0]
    names = ["manifest.json", *json.loads(line)["files"]]
    return {"line": line} | {name: (output / name).read_bytes() for name in names}


NOTHING, REPLAY = "nothing is done again", "activations are computed again through 1 block(s) for {} rank(s)"


@pytest.mark.parametrize(
    "num_ranks, placement, cost",
    [
        (1, "disk", NOTHING),
        (4, "disk", NOTHING),
        (1, "cpu", REPLAY.format(1)),
        pytest.param(4, "cpu", REPLAY.format(4), marks=pytest.mark.slow),
    ],
)
def test_run_goes_on_with_another_number_of_ranks(
    begun, whole, llama, token_file, tmp_path, num_ranks, placement, cost
):
    output = shutil.copytree(begun, tmp_path / "out")
    before = committed_files(output)
    arguments = arguments_for(llama, token_file, output, "--cache.placement", placement)
    finished = forked.ranks(num_ranks, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode == 0, finished.stderr
    assert f"1 of 3 blocks are done; {num_ranks} rank(s), begun with 2; {cost}\n" in finished.stdout
    assert "60 iterations of 2 sample(s)" in finished.stdout
    assert ("2 sample(s) a step do not divide among 4 ranks" in finished.stdout) == (num_ranks == 4)
    assert committed_files(output) == before
    lines = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert [line.get("world_size") for line in lines] == [2, num_ranks, num_ranks, None]
    # The same batches, added up in another order.
    assert_nearly_equal(output, whole[0])
    assert last_json(finished.stdout)["loss_after"] == pytest.approx(whole[1]["loss_after"], rel=0.01)
    perplexities = [run_evaluate(folder, token_file)["perplexity"] for folder in (output, whole[0])]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)


def test_only_ranks_whose_samples_are_gone_compute_them_again(begun, whole, llama, token_file, tmp_path):
    output = shutil.copytree(begun, tmp_path / "out")
    (output / "cache" / "generation-00001" / "quant-000006.safetensors").unlink()
    finished = forked.ranks(4, [LAUNCH / "quantize.py", *arguments_for(llama, token_file, output)])
    assert finished.returncode == 0, finished.stderr
    assert REPLAY.format(1) in finished.stdout
    assert_nearly_equal(output, whole[0])


def test_run_in_memory_leaves_no_older_activations_on_the_disk(begun, llama, token_file, tmp_path, monkeypatch):
    """A later attempt on the disk would take them for those of the blocks that were committed meanwhile."""
    output = shutil.copytree(begun, tmp_path / "out")
    assert (output / "cache").exists()

    def stop(*args):
        raise ShardQError("stop")

    monkeypatch.setattr("shardq.commands.quantize.float_pass", stop)
    with pytest.raises(ShardQError, match="stop"):
        run_quantize(llama, token_file, output, "--optimize.iterations", 60, "--cache.placement", "cpu")
    assert not (output / "cache").exists()


def test_finished_run_is_left_as_it_is_by_other_ranks(whole, llama, token_file):
    before = result_files(whole[0])
    summary = run_quantize(llama, token_file, whole[0], "--optimize.iterations", 60)
    assert summary["loss_after"] == whole[1]["loss_after"]
    assert result_files(whole[0]) == before


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_batch_that_does_not_divide_gives_the_result_of_one_rank(llama, token_file, tmp_path, batch_size):
    """Parts of 2, 1 and 1 samples, or of one and two idle ranks: each sample has the same weight all the same."""
    more = ["--calib.samples", 6, "--optimize.batch_size", batch_size]
    run_quantize(llama, token_file, tmp_path / "one", *more)
    arguments = quantize_arguments(llama, token_file, tmp_path / "three", *more)
    finished = forked.ranks(3, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode == 0, finished.stderr
    assert f"{batch_size} sample(s) a step do not divide among 3 ranks" in finished.stdout
    assert_nearly_equal(tmp_path / "three", tmp_path / "one")


def test_samples_that_do_not_divide_train_as_well(llama, token_file, tmp_path):
    """8 samples, one of them held out, on 3 ranks."""
    more = ["--optimize.batch_size", 3, "--optimize.held_out", 1]
    one = run_quantize(llama, token_file, tmp_path / "one", *more)
    arguments = quantize_arguments(llama, token_file, tmp_path / "three", *more)
    finished = forked.ranks(3, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode == 0, finished.stderr
    three = last_json(finished.stdout)
    assert three["loss_before"] == pytest.approx(one["loss_before"], rel=0.05)
    assert three["loss_after"] == pytest.approx(one["loss_after"], rel=0.05) and one["loss_after"] < one["loss_before"]


@pytest.mark.parametrize("num_sequences", [1, 7])
def test_evaluation_takes_any_number_of_sequences(llama, token_file, num_sequences):
    """More than ranks, or fewer: a rank without any adds nothing."""
    more = ["--eval.samples", num_sequences]
    one = run_evaluate(llama, token_file, *more)
    fixed = ["--model", llama, "--eval.dataset", token_file, "--eval.sequence_length", 64]
    finished = forked.ranks(2, [LAUNCH / "evaluate.py", *map(str, (*fixed, *more))])
    assert finished.returncode == 0, finished.stderr
    assert last_json(finished.stdout)["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
    assert last_json(finished.stdout)["tokens"] == one["tokens"] == 63 * num_sequences
