"""Where a run's files are."""

from pathlib import Path

import pytest
import torch

from shardq.cache.options import CacheOptions
from shardq.config import QuantizeConfig, QuantOptions
from shardq.parallel.ranks import Ranks
from shardq.rundir.folder import RunFolder, output_folder


def config(**options: object) -> QuantizeConfig:
    """A run on a model in the folder `tiny`."""
    return QuantizeConfig(model="models/tiny", **options)


@pytest.mark.parametrize(
    "options, folder",
    [
        ({"output": "mine"}, "mine"),
        ({}, "runs/tiny-w4"),
        ({"quant": QuantOptions(bits=3, group_size=64)}, "runs/tiny-w3-g64"),
    ],
    ids=["asked for", "per-channel", "groups"],
)
def test_output_folder_is_named_after_model_and_grid(options: dict, folder: str):
    assert output_folder(config(**options)) == Path(folder)


def make_run(output: Path, manifest: str) -> Path:
    """An output folder with a manifest."""
    output.mkdir()
    (output / "manifest.json").write_text(manifest)
    return output


def test_cache_is_in_the_output_folder(tmp_path: Path):
    assert RunFolder(tmp_path).cache(CacheOptions()) == tmp_path / "cache"


def test_cache_elsewhere_is_found_again_by_the_same_run_alone(tmp_path: Path):
    there = CacheOptions(folder=str(tmp_path / "disk"))
    first, other = make_run(tmp_path / "a", "one"), make_run(tmp_path / "b", "one")
    folder = RunFolder(first).cache(there)
    assert folder.parent == tmp_path / "disk" and folder == RunFolder(tmp_path / "b" / ".." / "a").cache(there)
    assert folder != RunFolder(other).cache(there), "two runs at a time would share one cache"
    assert folder != RunFolder(first).cache(there, 1), "blocks that are done again would find the former ones'"
    (first / "manifest.json").write_text("another")
    assert folder != RunFolder(first).cache(there), "a run would take another's activations for its own"


@pytest.mark.parametrize("rank, local_rank, name", [(1, 1, "events.jsonl"), (5, 1, "events-rank-4.jsonl")])
def test_each_host_has_a_log_of_times(rank: int, local_rank: int, name: str):
    ranks = Ranks(rank, 8, torch.device("cpu"), local_world_size=4, local_rank=local_rank)
    assert RunFolder(Path("out")).log(ranks) == Path("out") / name
