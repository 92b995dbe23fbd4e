"""The benchmarks' arithmetic: operations of a step, spans that add up to a run, bytes between ranks."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import forked
from shardq.logs import Event
from shardq.matrix import matrices_in
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.quant.adascale import Kernels
from shardq.quant.integer_grid import IntegerGrid

BENCH = Path(__file__).parents[2] / "tools" / "bench"


def load(name: str) -> ModuleType:
    """A script of tools/bench as a module."""
    grid = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(grid)
    sys.modules[grid.name] = module  # dataclasses look their module up
    grid.loader.exec_module(module)
    return module


step, run = load("step"), load("run")


def test_operations_of_a_smollm2_step_are_those_counted_by_hand():
    shape = step.parse_shape("smollm2")
    # q, o: 576 x 576; k, v: 192 x 576; gate, up, down: 576 x 1536.
    assert shape.num_weights == 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536
    linears = 2 * 512 * (3 * shape.num_weights - (576 + 2 * 192) * 576)  # no gradient of the block's input
    attention = 6 * 2 * 512 * 512 * 576
    assert shape.step_flop(512) == linears + attention
    assert round(linears / 1e9, 2) == 10.31 and round(attention / 1e9, 2) == 1.81


def test_named_shapes_have_the_weights_of_their_blocks():
    assert step.parse_shape("llama3-8b").num_weights == 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336
    assert round(step.parse_shape("llama3-70b").num_weights / 1e6) == 856


@pytest.mark.parametrize("text", ["llama", "64x128x4", "64x128x5x5", "64x128x4x3"])
def test_shape_that_makes_no_block_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        step.parse_shape(text)


def test_weight_and_scales_are_what_is_saved():
    shape = step.parse_shape("64x128x4x2")
    block, source, _ = step.make_block(shape, 8, torch.device("cpu"))
    quantizer = BlockQuantizer(
        block, dict.fromkeys(matrices_in(block), IntegerGrid(bits=4)), "adascale", Kernels(), torch.float32
    )
    quantizer.start(source)
    saved = step.saved_bytes(quantizer, shape)
    assert saved["saved_bytes_per_weight"] == 6  # bfloat16 weight, float32 s2
    assert 12 <= saved["saved_bytes_per_row"] <= 64  # s3, and what the learned grid is computed from


SPANS = [
    Event("start-up", 1.0, 0, 0.0, {}),
    Event("train", 6.0, 0, 0.0, {"iterations": 20, "waiting_for_input": 0.5}),
    Event("fp pass", 1.0, 0, 0.0, {"waiting_for_output": 0.25}),
    Event("train", 10.0, 0, 0.0, {"iterations": 20}),
    Event("run", 20.0, 0, 0.0, {}),
]


def test_spans_of_one_name_are_added_up_and_the_rest_is_named():
    rows = {row["span"]: row for row in run.span_table(SPANS)}
    assert list(rows) == ["train", "unaccounted", "start-up", "fp pass"]
    assert rows["train"]["seconds"] == 16 and rows["train"]["count"] == 2 and rows["train"]["share"] == 0.8
    assert rows["unaccounted"]["seconds"] == 2
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_summary_gives_the_step_and_the_shares():
    summary = run.summarize(SPANS)
    assert summary["ms_per_step"] == 400
    assert summary["share_outside_training"] == 0.2
    assert summary["share_waiting_for_input"] == 0.025 and summary["share_waiting_for_output"] == 0.0125


@pytest.mark.parametrize(("engine", "bytes_a_parameter"), [("allreduce-bf16", 2 * 2), ("zero2", 4 + 4)])
def test_bytes_that_an_engine_sends_are_those_of_its_formula(engine: str, bytes_a_parameter: int):
    """All-reducing takes two rounds, each of half the values on two ranks; ZeRO's reducing one, its gathering one."""
    shape = step.parse_shape("64x128x4x2")
    command = [BENCH / "engines.py", "--shape", "64x128x4x2", "--tokens", "8", "--iterations", "2", "--compile", "off",
               "--precision", "float32", "--engines", engine]  # fmt: skip
    if engine == "allreduce-bf16":
        finished = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=False)
    else:  # without the program's own launch, which takes seconds
        finished = forked.ranks(2, [*command, "--rank-of-launch"])
    assert finished.returncode == 0, finished.stderr
    row = json.loads(finished.stdout.splitlines()[-1])
    num_rows = sum(outputs for outputs, _ in shape.linears.values())
    expected = (shape.num_weights + 3 * num_rows) * bytes_a_parameter / 2  # s2; s3, beta, gamma
    assert row["expected_sent_bytes"] == expected
    assert row["sent_bytes"] == pytest.approx(expected, rel=0.01)
    assert (row["engine"], row["ranks"], row["weights"]) == (engine.removesuffix("-bf16"), 2, shape.num_weights)
    assert row["seconds"] > 0 and 0 < row["waiting_share"] < 1 and row["peak_bytes"] > 0
