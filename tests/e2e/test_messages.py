"""What is said and which code is left, by situation: one line that names what is wrong, where, and the thing to do."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny
from runs import ONE_RANK, quantize_arguments, run_quantize
from shardq.cli import COMMANDS, main, parse
from shardq.errors import ShardQError, Stopped

RTN = ["--quant.method", "rtn", "--optimize.last_block", "output"]


def write(name: str, content: str):
    """What makes a file in the folder where a situation is set up."""
    return lambda place: (place / name).write_text(content)


def foreign(*names: str):
    """What makes a folder `foreign` with some files."""

    def make(place: Path) -> None:
        (place / "foreign").mkdir()
        for name in names:
            (place / "foreign" / name).touch()

    return make


def overflowing(place: Path) -> None:
    """What makes a model whose block 1 gives infinities."""
    folder = tiny.save_llama(place / "huge", vocab=300)
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    save_file({other: tensor * 1e38 if other == name else tensor for other, tensor in load_file(file).items()}, file)


def rows(texts: list) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


CHAT = json.dumps({"messages": [{"role": "user", "content": "w1"}]})
RUN = "quantize RUN"  # and all that a short run needs

# situation: what sets it up, the command, the exit code, what is said (a pattern)
OPTIONS = {
    "abbreviated": (None, "quantize m --bits 4", 2, "--bits: no such option; did you mean --quant.bits or --activ"),
    "misspelt": (None, "quantize m --quant.bit 3", 2, r"--quant.bit: no such option; did you mean --quant.bits\?"),
    "dashes": (None, "quantize m --quant.group-size 32", 2, r"did you mean --quant.group_size\?"),
    "of another program": (
        None,
        "quantize m --quant.scheme W4A16",
        2,
        "--quant.scheme: no such option; did you mean --quant.",
    ),
    "of another command": (None, "evaluate m --calib.samples 3", 2, r"did you mean --eval.samples\?"),
    "like nothing": (None, "quantize m --frobnicate 3", 2, "--frobnicate: no such option; shardq quantize --help"),
    "one dash": (None, "quantize m -b 3", 2, "-b: no such option; all but -h begin with --"),
    "group": (None, "quantize m --quant 3", 2, "--quant: is a group of options; .*such as --quant.bits"),
    "no value": (None, "quantize m --quant.bits", 2, "quant.bits: no value is given, it must be a whole number"),
    "option for value": (None, "quantize m --seed --redo 3", 2, "seed: no value is given"),
    "no number": (None, "quantize m --quant.bits four", 2, "quant.bits: four is not allowed, .* a whole number"),
    "half a number": (None, "quantize m --optimize.micro_batch 1.5", 2, "micro_batch: 1.5 .* a whole number or null"),
    "infinite": (None, "quantize m --optimize.grid_lr inf", 2, "grid_lr: inf is not allowed, .* a number or null"),
    "neither": (None, "quantize m --quant.symmetric maybe", 2, "quant.symmetric: maybe .* true or false"),
    "no choice": (None, "quantize m --optimize.preset fast", 2, "must be one of default, light, best, aimet"),
    "no format": (None, "quantize m --export.formats gguf,onx", 2, "gguf,onx is not .*a list of compressed-t.*commas"),
    "format of export": (None, "export r --format ggfu", 2, "format: ggfu .* one of compressed-tensors, gptq"),
    "no model": (None, "quantize", 2, r"model: missing; shardq quantize MODEL \[options\]"),
    "no model to tune to": (None, "tune r", 2, r"model: missing; shardq tune RUN --model MODEL"),
    "no run": (None, "verify", 2, r"run: missing; shardq verify RUN"),
    "two models": (None, "quantize a b", 2, "takes one MODEL, 2 are given .a, b.; put patterns with . between quotes"),
    "model twice": (None, "evaluate a --model b", 2, "model: is given twice, as a and with --model"),
    "out of range": (None, "quantize MODEL --quant.bits 9", 2, "quant.bits: 9 is not allowed, .* between 2 and 8"),
    "for vLLM": (None, f"{RUN} --target vllm --quant.bits 3", 2, "vLLM has no kernel for 3 bits, only for 4 and 8"),
}
RECIPES = {
    "absent": (None, "quantize m --config TMP/no.yaml", 2, "no.yaml: cannot be read .No such file"),
    "no YAML": (write("a.yaml", "seed: 1\nquant: {"), "quantize m --config TMP/a.yaml", 2, "a.yaml, line 2: no valid"),
    "text": (write("a.yaml", "hello"), "quantize m --config TMP/a.yaml", 2, "a.yaml, line 1: .* options by name"),
    "unknown": (write("a.yaml", "seed: 1\nquant:\n  bit: 3"), "quantize m --config TMP/a.yaml", 2,
                r"a.yaml, line 3: quant.bit: no such option; did you mean quant.bits\?"),
    "wrong": (write("a.yaml", "seed: 1\nquant:\n  bits: x"), "quantize m --config TMP/a.yaml", 2,
              "a.yaml, line 3: quant.bits: x is not allowed, it must be a whole number"),
    "null": (write("a.yaml", "quant: {bits: null}"), "quantize m --config TMP/a.yaml", 2, "bits: null is not allowed"),
    "no section": (write("a.yaml", "quant: 4"), "quantize m --config TMP/a.yaml", 2, "quant: must hold options"),
    "tagged": (write("a.yaml", "seed: !!python/name:os.system"), "quantize m --config TMP/a.yaml", 2, "a plain value"),
}  # fmt: skip
MODELS = {
    "absent": (None, "evaluate TMP/no", 3, "no: no such folder"),
    "a file": (None, "evaluate TOKENS", 3, "tokens.safetensors: no such folder"),
    "pytorch": (foreign("pytorch_model.bin"), "evaluate TMP/foreign", 3, "pytorch_model.bin alone.*save_pretrained"),
    "adapter": (foreign("adapter_config.json"), "evaluate TMP/foreign", 3, "LoRA adapter.*merge it into its base"),
    "mistral": (foreign("params.json", "consolidated.safetensors"), "evaluate TMP/foreign", 3, "Mistral's own format"),
    "one shard": (
        foreign("model-00001-of-00002.safetensors"),
        "evaluate TMP/foreign",
        3,
        "but no model.safetensors.in",
    ),
    "empty": (foreign(), "evaluate TMP/foreign", 3, "holds neither .* pass the folder of a Hugging Face checkpoint"),
    "unfinished": (
        None,
        "evaluate STOPPED",
        3,
        "is a run of shardq that is not finished, .*; run its own command again",
    ),
}
TEXTS = {
    "absent": (None, f"{RUN} --calib.dataset TMP/a.jsonl", 4, "a.jsonl: no such file; check the path"),
    "folder": (None, f"{RUN} --calib.dataset TMP", 4, "is a folder; pass one file in it"),
    "empty": (write("a.jsonl", ""), f"{RUN} --calib.dataset TMP/a.jsonl", 4, "a.jsonl: is empty; pass a file with"),
    "other type": (write("a.csv", "a"), f"{RUN} --calib.dataset TMP/a.csv", 4, "'.csv' is not read; use .txt, .jsonl"),
    "damaged": (write("a.jsonl", "x"), f"{RUN} --calib.dataset TMP/a.jsonl", 4, "cannot be read as .jsonl .*mend"),
    "null": (write("a.jsonl", rows(["a"] * 49 + [None])), f"{RUN} --calib.dataset TMP/a.jsonl", 4,
             "column 'text' of row 50 holds null, not text; remove that row"),
    "chats": (write("a.jsonl", CHAT), f"{RUN} --calib.dataset TMP/a.jsonl", 4, "row 1 holds .* no chat template"),
    "other column": (write("a.jsonl", '{"body": "a"}'), f"{RUN} --calib.dataset TMP/a.jsonl", 4, "name one of body"),
    "too short": (None, f"{RUN} --calib.samples 9", 4, "gives 8 sequences of 64 tokens, 9 are needed"),
}  # fmt: skip
RUNS = {
    "export nowhere": (None, "export TMP/no", 6, "no: no such folder; check the path"),
    "verify nowhere": (None, "verify TMP/no", 6, "no: no such folder; check the path"),
    "tune nowhere": (None, "tune TMP/no --model MODEL", 6, "no: no such folder; check the path"),
    "verify a model": (
        None,
        "verify MODEL",
        6,
        "holds no run of shardq .no manifest.json., nor an export; check the path",
    ),
    "export a model": (None, "export MODEL", 6, "holds no run of shardq .no manifest.json.; check the path"),
    "verify unfinished": (None, "verify STOPPED", 6, r"not finished, 2 block\(s\) are; run its command again"),
    "export unfinished": (None, "export STOPPED", 6, r"not finished, 2 block\(s\) are; run its command again"),
    "tune unfinished": (
        None,
        "tune STOPPED --model MODEL",
        6,
        r"not finished, 2 block\(s\) are; run its command again",
    ),
    "other options": (None, f"{RUN} --output STOPPED --quant.bits 3", 6, r"quant.bits \(was 4, is 3\); choose another"),
    "block beyond": (None, f"{RUN} --output STOPPED --redo 3", 2, "'3' is not allowed, .* blocks from 0 to 2"),
    "no redo": (None, f"{RUN} --redo 1", 6, "no run to redo blocks of"),
    "output is a file": (None, f"{RUN} --output TOKENS", 6, "is a file; choose another --output"),
    "cache is a file": (
        None,
        f"{RUN} --cache.folder TOKENS",
        5,
        "a file stands where a folder is to be; choose another",
    ),
    "overflow": (
        overflowing,
        f"{RUN} --model TMP/huge",
        7,
        "block 1 model.layers.1: its loss is not finite; check the",
    ),
    "no room": (None, f"{RUN} --cache.folder /proc/x", 5, r"[1-9]\d*\.\d kB .*there .activations [1-9].*other --cache"),
}
TABLE = {
    f"{kind}: {situation}": row
    for kind, table in {"option": OPTIONS, "recipe": RECIPES, "model": MODELS, "text": TEXTS, "run": RUNS}.items()
    for situation, row in table.items()
}


@pytest.fixture(scope="module", name="model")
def _model(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer of two words."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("words") / "model")
    vocabulary = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}, "version": "1.0"}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary | {"added_tokens": []}))
    return folder


@pytest.fixture(scope="module", name="stopped")
def _stopped(model: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked to stop when two of its three blocks were done. Read only."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Stopped) as stop:
        run_quantize(model, token_file, output, *RTN, stop_after=1)
    assert stop.value.exit_code == 10
    assert str(stop.value) == f"{output}: stopped as asked, 2 of 3 blocks are done; the same command goes on"
    return output


def refusal(verb: str, arguments: list[str]) -> ShardQError:
    with pytest.raises(ShardQError) as refused:
        COMMANDS[verb].run(parse(verb, arguments), ONE_RANK)
    return refused.value


@pytest.mark.parametrize("set_up, command, code, said", TABLE.values(), ids=TABLE)
def test_refusal_is_one_line_with_what_to_do(model, token_file, stopped, tmp_path, set_up, command, code, said):
    if set_up:
        set_up(tmp_path)
    places = {"MODEL": model, "TOKENS": token_file, "TMP": tmp_path, "STOPPED": stopped}
    run = quantize_arguments(model, token_file, tmp_path / "out", *RTN)
    verb, *words = re.sub("|".join(places), lambda found: str(places[found[0]]), command).split()
    error = refusal(verb, [*run, *words[1:]] if words[:1] == ["RUN"] else words)
    assert re.search(said, str(error)), str(error)
    assert error.exit_code == code
    assert "\n" not in str(error) and len(str(error)) < 500
    assert not re.search(r"typing|Union|Literal|NoneType|<class|Parser|Error\b", str(error)), str(error)


@pytest.mark.parametrize("verb, meant", [("quantise", "did you mean quantize?"), ("frob", "There are quantize, tune")])
def test_unknown_command_is_one_line(monkeypatch, capsys, verb, meant):
    monkeypatch.setattr(sys, "argv", ["shardq", verb])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert re.fullmatch(rf"shardq: {verb}: no such command; .*{re.escape(meant)}.*\n", capsys.readouterr().err)


def test_version_is_the_packages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shardq", "--version"])
    with pytest.raises(SystemExit) as left:
        main()
    assert (left.value.code, capsys.readouterr().out) == (0, f"shardq {version('shardq')}\n")


def test_help_and_refused_options_need_no_heavy_package():
    """Those take seconds to import, at every typing error."""
    heavy = "{'torch', 'transformers', 'datasets', 'deepspeed', 'numpy'} & sys.modules.keys()"
    leave = f"lambda code: (print(sorted({heavy}), file=sys.stderr), sys.exit(code))"
    program = f"import sys, shardq.cli as cli; cli.os._exit = {leave}; cli.main()"
    arguments = [sys.executable, "-c", program, "quantize", "m", "--bits", "4"]
    finished = subprocess.run(arguments, capture_output=True, text=True)
    assert finished.returncode == 2
    refused, imported = finished.stderr.splitlines()
    assert refused.startswith("shardq: --bits: no such option") and imported == "[]"
