"""What a run is and what it has finished: when a folder is taken up again, and when and why it is refused."""

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from shardq.cache.options import CacheOptions
from shardq.calib.options import TextOptions
from shardq.config import QuantizeConfig, QuantOptions
from shardq.errors import ResumeError
from shardq.files import xxh128_of
from shardq.formats.shards import open_index
from shardq.formats.source import open_source
from shardq.optimize.options import OptimizeOptions
from shardq.rundir.ledger import append, begin_run, blocks_to_do, commit, complete, finished, read_lines
from shardq.rundir.manifest import differences, make_manifest
from shardq.rundir.record import open_run

MANIFEST = {
    "shardq": "1.0",
    "calibration_tokens": "d",
    "options": {"seed": 0, "quant": {"bits": 4, "group_size": None}},
}


def assert_refused(output: Path, *parts: str, manifest: dict = MANIFEST, resume: str = "auto") -> None:
    """Opening the run is refused with one line that holds all parts."""
    with pytest.raises(ResumeError) as caught:
        open_run(output, manifest, resume)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def opened(output: Path, manifest: dict, resume: str) -> list[dict]:
    """The ledger's lines of a run that is opened without a redo."""
    record, redo = open_run(output, manifest, resume)
    assert redo is None
    begin_run(output, manifest)
    return record.lines


def write(path: Path, text: str) -> Path:
    """Write a file and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Folder of a run with two finished blocks of one file each."""
    folder = tmp_path / "out"
    assert opened(folder, MANIFEST, "auto") == []
    for block in range(2):
        commit(folder, block, [write(folder / "blocks" / f"{block}.bin", f"block {block}")], loss_after=0.5 + block)
    return folder


class TestResumeModes:
    @pytest.mark.parametrize("resume", ["auto", "never"])
    @pytest.mark.parametrize("exists", [True, False])
    def test_new_run_begins_with_its_manifest(self, tmp_path: Path, resume: str, exists: bool):
        folder = tmp_path / "a" / "b"
        if exists:
            folder.mkdir(parents=True)
        assert opened(folder, MANIFEST, resume) == []
        assert json.loads((folder / "manifest.json").read_text()) == MANIFEST

    @pytest.mark.parametrize("resume", ["auto", "require"])
    def test_begun_run_goes_on_after_its_finished_blocks(self, output: Path, resume: str):
        entries = opened(output, MANIFEST, resume)
        assert [(entry["block"], entry["loss_after"]) for entry in entries] == [(0, 0.5), (1, 1.5)]

    def test_run_without_a_finished_block_goes_on_from_the_start(self, tmp_path: Path):
        opened(tmp_path / "out", MANIFEST, "auto")
        assert opened(tmp_path / "out", MANIFEST, "require") == []

    def test_complete_run_ends_with_an_entry_of_no_block(self, output: Path):
        commit(output, None, [write(output / "config.json", "{}")])
        assert [entry["block"] for entry in opened(output, MANIFEST, "auto")] == [0, 1, None]

    def test_never_refuses_a_begun_run(self, output: Path):
        assert_refused(output, str(output), "--resume is never", "another --output", resume="never")

    @pytest.mark.parametrize("exists", [True, False])
    def test_require_refuses_to_begin(self, tmp_path: Path, exists: bool):
        folder = tmp_path / "out"
        if exists:
            folder.mkdir()
        assert_refused(folder, str(folder), "no run to resume", "manifest.json", resume="require")
        assert folder.exists() == exists and not (folder / "manifest.json").exists()

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_folder_with_other_files_is_refused_and_left_alone(self, tmp_path: Path, resume: str):
        write(tmp_path / "thesis.txt", "words")
        assert_refused(tmp_path, str(tmp_path), "not empty and not a run", "another --output", resume=resume)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


class TestOtherRun:
    def test_every_difference_is_named_with_both_values(self, output: Path):
        options = {"seed": 0, "quant": {"bits": 3, "group_size": 64}}
        other = {"shardq": "1.0", "calibration_tokens": "e", "options": options}
        assert_refused(
            output, str(output), "belongs to another run", "calibration_tokens (was d, is e)",
            "quant.bits (was 4, is 3)", "quant.group_size (was None, is 64)", manifest=other,
        )  # fmt: skip

    def test_what_is_equal_is_not_named(self, output: Path):
        with pytest.raises(ResumeError) as caught:
            opened(output, MANIFEST | {"calibration_tokens": "e"}, "auto")
        assert "bits" not in str(caught.value) and "seed" not in str(caught.value)

    def test_field_that_one_side_lacks_is_a_difference(self, output: Path):
        assert_refused(output, "new_field (was None, is 1)", manifest=MANIFEST | {"new_field": 1})
        without = {name: value for name, value in MANIFEST.items() if name != "calibration_tokens"}
        assert_refused(output, "calibration_tokens (was d, is None)", manifest=without)

    def test_long_values_are_cut_short(self, output: Path):
        assert_refused(output, "(was 1.0, is aaaaaaaaaaaa...)", manifest=MANIFEST | {"shardq": "a" * 64})

    def test_refused_run_stays_as_it_was(self, output: Path):
        before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
        assert_refused(output, manifest=MANIFEST | {"calibration_tokens": "e"})
        assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before

    @pytest.mark.parametrize("content", [b'{"shardq": ', b"", b"\xff\xfe"])
    def test_damaged_manifest_is_named(self, output: Path, content: bytes):
        (output / "manifest.json").write_bytes(content)
        assert_refused(output, str(output / "manifest.json"), "damaged", "another --output")


class TestLedger:
    def test_line_holds_the_files_digests_by_their_names_in_the_folder(self, output: Path):
        lines = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
        digests = [xxhash.xxh3_128_hexdigest(f"block {block}".encode()) for block in range(2)]
        assert [line["files"] for line in lines] == [{"blocks/0.bin": digests[0]}, {"blocks/1.bin": digests[1]}]

    @pytest.mark.parametrize("old, new", [("0.5", "0.7"), ('"seal"', '"seam"'), ('"bytes"', '"bytea"')])
    def test_line_with_a_changed_letter_is_refused(self, output: Path, old: str, new: str):
        path = output / "ledger.jsonl"
        path.write_text(path.read_text().replace(old, new, 1))
        assert_refused(output, "line 1 is damaged")

    def test_line_that_has_lost_its_seal_after_others_is_refused(self, output: Path):
        path = output / "ledger.jsonl"
        first, second = path.read_text().splitlines()
        line = {name: value for name, value in json.loads(second).items() if name not in ("seal", "bytes")}
        path.write_text(f"{first}\n{json.dumps(line)}\n")
        assert_refused(output, "line 2 is damaged")

    def test_completion_has_the_manifest_that_counts(self, output: Path):
        redone = MANIFEST | {"calibration_tokens": "e"}
        append(output, {"redo": [1], "manifest": redone})
        commit(output, 1, [output / "blocks" / "1.bin"])
        line = complete(output, [])
        assert json.loads((output / "manifest.json").read_text()) == redone
        assert line["files"] == {"manifest.json": xxh128_of(output / "manifest.json")}
        assert line["bytes"] == {"manifest.json": (output / "manifest.json").stat().st_size}

    def test_missing_manifest_of_a_begun_run_is_named(self, output: Path):
        (output / "manifest.json").unlink()
        assert_refused(output, str(output / "manifest.json"), "missing; restore it")

    @pytest.mark.parametrize("kept_bytes", [1, 20, -2])
    def test_torn_last_line_is_dropped_and_cut_off(self, output: Path, kept_bytes: int):
        path = output / "ledger.jsonl"
        first, second = path.read_text().splitlines(keepends=True)
        path.write_text(first + second[:kept_bytes])
        assert [entry["block"] for entry in opened(output, MANIFEST, "auto")] == [0]
        assert path.read_text() == first

    def test_line_without_its_line_end_was_not_committed(self, output: Path):
        path = output / "ledger.jsonl"
        first, second = path.read_text().splitlines()
        path.write_text(f"{first}\n{second}")
        assert [entry["block"] for entry in opened(output, MANIFEST, "auto")] == [0]

    def test_torn_line_that_is_the_only_one_leaves_an_empty_ledger(self, output: Path):
        path = output / "ledger.jsonl"
        path.write_text('{"block": 0, "fil')
        assert opened(output, MANIFEST, "auto") == []
        assert path.read_bytes() == b""

    def test_blocks_committed_after_a_torn_line_count(self, output: Path):
        with open(output / "ledger.jsonl", "a") as file:
            file.write('{"block": 2, "fi')
        opened(output, MANIFEST, "auto")
        commit(output, 2, [write(output / "blocks" / "2.bin", "block 2")])
        assert [entry["block"] for entry in opened(output, MANIFEST, "auto")] == [0, 1, 2]

    def test_damaged_line_before_the_last_is_refused_by_number(self, output: Path):
        path = output / "ledger.jsonl"
        first, second = path.read_text().splitlines(keepends=True)
        path.write_text(first[:10] + "\n" + second)
        assert_refused(output, str(path), "line 1 is damaged", "another --output")

    @pytest.mark.parametrize(
        ("order", "report"),
        [((1, 0), "line 1 is about block 1, not 0"), ((0, 0), "line 2 is about block 0, not 1"),
         ((1,), "line 1 is about block 1, not 0")],
    )  # fmt: skip
    def test_lines_out_of_order_are_refused(self, output: Path, order: tuple[int, ...], report: str):
        path = output / "ledger.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[number] for number in order))
        assert_refused(output, str(path), report)

    def test_changed_file_is_named(self, output: Path):
        write(output / "blocks" / "1.bin", "block !")
        assert_refused(output, str(output / "blocks" / "1.bin"), "changed since it was finished")

    def test_missing_file_is_named(self, output: Path):
        (output / "blocks" / "0.bin").unlink()
        assert_refused(output, str(output / "blocks" / "0.bin"), "missing although it was finished")

    def test_files_of_blocks_that_were_not_committed_do_not_matter(self, output: Path):
        write(output / "blocks" / "2.bin", "half a blo")
        assert len(opened(output, MANIFEST, "auto")) == 2


REWRITINGS: dict[str, Callable[[dict], str]] = {
    "formatted": lambda content: json.dumps(content, indent=7) + "\n\n",
    "in another order": lambda content: json.dumps(dict(reversed(content.items()))),
    "whole numbers": lambda content: json.dumps(content | {"vocab_size": float(content["vocab_size"])}),
    "another version": lambda content: json.dumps(content | {"transformers_version": "6.0", "use_cache": False}),
    "another place": lambda content: json.dumps(content | {"_name_or_path": "/elsewhere"}),
    "dtype's old name": lambda content: json.dumps({"torch_dtype": content.pop("dtype"), **content}),
}


class TestMakeManifest:
    """Config and model as in a real run; the model is the tiny Llama."""

    CONFIG = QuantizeConfig(model="m", output="o", calib=TextOptions(dataset="text.txt"))

    def manifest(self, folder: Path, config: QuantizeConfig = CONFIG, digest: str = "d") -> dict:
        return make_manifest(config, open_source(folder), digest)

    def test_it_survives_the_file_unchanged(self, llama: Path, tmp_path: Path):
        assert opened(tmp_path, self.manifest(llama), "auto") == []
        assert opened(tmp_path, self.manifest(llama), "require") == []

    def test_neither_time_nor_paths_are_in_it(self, llama: Path, tmp_path: Path):
        first = self.manifest(llama, dataclasses.replace(self.CONFIG, model=str(llama)))
        time.sleep(0.01)
        elsewhere = shutil.copytree(llama, tmp_path / "copy")
        moved = dataclasses.replace(self.CONFIG, model=str(elsewhere), output=str(tmp_path / "out"))
        assert json.dumps(self.manifest(elsewhere, moved)) == json.dumps(first)
        assert str(llama) not in json.dumps(first)

    def test_a_name_of_the_hub_is_in_it_and_is_no_other_run(self, llama: Path, tmp_path: Path):
        cached = tmp_path / "models--owner--name" / "snapshots" / "0123"
        shutil.copytree(llama, cached)
        named = [self.manifest(llama, dataclasses.replace(self.CONFIG, model=str(model)))
                 for model in ("owner/name", cached)]  # fmt: skip
        assert [manifest["model"]["name"] for manifest in named] == ["owner/name"] * 2
        local = self.manifest(llama, dataclasses.replace(self.CONFIG, model=str(llama)))
        assert "name" not in local["model"] and differences(local, named[0]) == {}

    @pytest.mark.parametrize(
        "change",
        [{"resume": "require"}, {"device": "cpu"}, {"cache": CacheOptions(placement="cpu")},
         {"optimize": OptimizeOptions(memory_gib=3.5)}],
        ids=str,
    )  # fmt: skip
    def test_options_that_do_not_change_the_result_may_differ(self, llama: Path, change: dict):
        assert self.manifest(llama, dataclasses.replace(self.CONFIG, **change)) == self.manifest(llama)

    @pytest.mark.parametrize(
        ("change", "report"),
        [
            ({"config": dataclasses.replace(CONFIG, seed=5)}, "seed (was 0, is 5)"),
            ({"config": dataclasses.replace(CONFIG, quant=QuantOptions(bits=3))}, "quant.bits (was 4, is 3)"),
            (
                {"config": dataclasses.replace(CONFIG, optimize=OptimizeOptions(micro_batch=4))},
                "optimize.micro_batch (was None, is 4)",
            ),
            (
                {"config": dataclasses.replace(CONFIG, calib=TextOptions(dataset="other.txt")), "digest": "e"},
                "calibration_tokens (was d, is e); calib.dataset (was text.txt, is other.txt)",
            ),
        ],
    )
    def test_what_changes_the_result_is_a_difference(self, llama: Path, tmp_path: Path, change: dict, report: str):
        opened(tmp_path, self.manifest(llama), "auto")
        assert_refused(tmp_path, report, manifest=self.manifest(llama, **change))

    @pytest.mark.parametrize(
        ("damage", "report"),
        [
            (lambda folder: flip_byte_inside_a_tensor(folder), "model.weights (in model-00003-of-00005.safetensors);"),
            (lambda folder: write(folder / "config.json", "{}"), "model.config (was "),
        ],
        ids=["weights", "config"],
    )
    def test_another_model_is_a_difference(
        self, llama: Path, tmp_path: Path, damage: Callable[[Path], object], report: str
    ):
        folder = shutil.copytree(llama, tmp_path / "model")
        opened(tmp_path / "out", self.manifest(folder), "auto")
        damage(folder)
        assert_refused(tmp_path / "out", report, manifest=self.manifest(folder))

    @pytest.mark.parametrize("change", REWRITINGS.values(), ids=REWRITINGS)
    def test_config_that_says_the_same_is_the_same(self, llama: Path, tmp_path: Path, change: Callable[[dict], str]):
        folder = shutil.copytree(llama, tmp_path / "model")
        path = folder / "config.json"
        path.write_text(change(json.loads(path.read_text())))
        assert differences(self.manifest(llama), self.manifest(folder)) == {}

    @pytest.mark.parametrize("entries", [{"rms_norm_eps": 1e-5}, {"sliding_window": None}, {"hidden_act": "gelu"}])
    def test_config_that_says_something_else_is_another(self, llama: Path, tmp_path: Path, entries: dict):
        folder = shutil.copytree(llama, tmp_path / "model")
        content = json.loads((folder / "config.json").read_text())
        assert not entries.items() <= content.items()
        (folder / "config.json").write_text(json.dumps(content | entries))
        assert list(differences(self.manifest(llama), self.manifest(folder))) == ["model.config"]

    @pytest.mark.parametrize("text", [{"dataset": "a/b.jsonl"}, {"column": "ids"}, {"split": "test"}], ids=str)
    def test_text_does_not_matter_where_its_tokens_are_the_same(self, llama: Path, text: dict):
        options = dataclasses.replace(self.CONFIG.calib, **text)
        moved = self.manifest(llama, dataclasses.replace(self.CONFIG, calib=options))
        assert moved["options"]["calib"] != self.manifest(llama)["options"]["calib"]
        assert differences(self.manifest(llama), moved) == {}

    def test_run_of_before_there_were_settings_is_compared_by_the_files_bytes(self, llama: Path):
        now = self.manifest(llama)
        before = copy.deepcopy(now)
        del before["model"]["settings"], before["model"]["files"]
        assert differences(before, now) == {}
        before["model"] |= {"config": "c" * 64, "weights": "w" * 64}
        assert list(differences(before, now)) == ["model.config", "model.weights"]


def flip_byte_inside_a_tensor(folder: Path) -> None:
    """Change one value in the middle of a weight."""
    info = open_index(folder)["model.layers.1.mlp.up_proj.weight"]
    with open(info.file, "r+b") as file:
        file.seek(info.offset + info.num_bytes // 2)
        value = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([value ^ 1]))


def test_output_that_is_a_file_is_refused(tmp_path: Path):
    assert_refused(write(tmp_path / "out", "a file"), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["manifest.json.partial", "token-0a1b.partial", "token-0a1b.partial.partial"])
def test_folder_left_by_a_kill_before_the_manifest_was_whole_is_taken(tmp_path: Path, name: str):
    write(tmp_path / name, "{")
    assert opened(tmp_path, MANIFEST, "auto") == []


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b'{"block": 0}', b'{"block": 0, "files": {}, "source": "all"}', b"\xff\xfe"]
)
def test_line_that_is_no_entry_is_refused_by_number(output: Path, line: bytes):
    (output / "ledger.jsonl").write_bytes(line + b"\n")
    assert_refused(output, "line 1 is damaged")


class TestFinished:
    """What counts after the lines of a ledger, in which `b2` stands for block 2 with the bytes b."""

    @pytest.mark.parametrize(
        "text, counting",
        [
            ("", ""),
            ("a0 a1", "a0 a1"),
            ("a0 a1 aEnd", "a0 a1 aEnd"),
            ("a0 a1 a2 aEnd redo1", "a0 a2"),
            ("a0 a1 a2 aEnd redo1 a1", "a0 a1 a2"),
            ("a0 a1 a2 aEnd redo1 b1", "a0 b1"),
            ("a0 a1 a2 aEnd redo1 b1 b2", "a0 b1 b2"),
            ("a0 a1 a2 aEnd redo1 b1 a2 aEnd", "a0 b1 a2 aEnd"),
            ("a0 a1 a2 aEnd redo0,2 a0", "a0 a1"),
            ("a0 a1 a2 aEnd redo0,2 a0 b2 bEnd", "a0 a1 b2 bEnd"),
            ("a0 a1 a2 aEnd redo", "a0 a1 a2"),
            ("a0 a1 a2 aEnd redo redo1 a1 bEnd", "a0 a1 a2 bEnd"),
            ("a0 a1 redo0 redo0 b0", "b0"),
            ("a0 a1 redo5", "a0 a1"),
        ],
    )
    def test_entries_that_count(self, tmp_path: Path, text: str, counting: str):
        lines = [self.line(word) for word in text.split()]
        write(tmp_path / "ledger.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        assert read_lines(tmp_path) == lines
        expected = {line["block"]: line for line in map(self.line, counting.split())}
        assert finished(lines) == expected

    @staticmethod
    def line(word: str) -> dict:
        if word.startswith("redo"):
            return {"redo": [int(number) for number in word[4:].split(",") if number], "manifest": {}}
        return {"block": None if word[1:] == "End" else int(word[1:]), "files": {"f": word[0]}}

    @pytest.mark.parametrize(
        "text, report",
        [
            ("a0 aEnd a1", "line 3 is about block 1 although the run was complete"),
            ("a0 a1 a2 redo1 aEnd", "line 5 is about block None, not 1"),
            ("a0 a1 a2 redo1 a3", "line 5 is about block 3, not 1"),
        ],
    )
    def test_lines_that_cannot_follow_are_refused(self, tmp_path: Path, text: str, report: str):
        lines = [self.line(word) for word in text.split()]
        write(tmp_path / "ledger.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ResumeError, match=report):
            read_lines(tmp_path)

    @pytest.mark.parametrize("blocks, num_blocks, expected", [
        ([], 3, range(0, 3)), ([0, 1], 3, range(2, 3)), ([0, 1, 2], 3, range(3, 3)), ([0, 2], 3, range(1, 2)),
        ([0, 2, None], 4, range(1, 2)), ([1, 2], 3, range(0, 1)),
    ])  # fmt: skip
    def test_blocks_to_do_end_before_finished_ones(self, blocks: list, num_blocks: int, expected: range):
        assert blocks_to_do(dict.fromkeys(blocks, {}), num_blocks) == expected


@pytest.mark.parametrize(
    "redo", ['1, "manifest": {}', '["1"], "manifest": {}', '[true], "manifest": {}', "[]", '[], "manifest": 1']
)
def test_redo_that_is_none_is_refused_by_number(output: Path, redo: str):
    write(output / "ledger.jsonl", f'{{"redo": {redo}}}\n')
    assert_refused(output, "line 1 is damaged")
