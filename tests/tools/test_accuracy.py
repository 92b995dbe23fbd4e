"""The accuracy benchmark: agreement against torch's own losses, and the command lines of its cells."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "bench"))
import accuracy  # noqa: E402
import agreement  # noqa: E402
import make_ids  # noqa: E402


@pytest.fixture(name="models")
def _models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A tiny model and one with other weights in its blocks."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).eval()
    changed = copy.deepcopy(reference)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "proj" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return changed, reference


def test_agreement_is_what_torch_computes(models):
    model, reference = models
    ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    found = agreement.agreement(model, reference, ids)
    with torch.no_grad():
        logits, wanted = (m(ids).logits[:, :-1].reshape(-1, 50) for m in (model, reference))
    targets = ids[:, 1:].reshape(-1)
    assert found["perplexity"] == pytest.approx(functional.cross_entropy(logits, targets).exp().item(), rel=1e-4)
    expected = functional.cross_entropy(wanted, targets).exp().item()
    assert found["reference_perplexity"] == pytest.approx(expected, rel=1e-4)
    kl = functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-3) and found["kl"] > 0.01
    same = (logits.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    assert found["top1"] == pytest.approx(same) and 0.2 < same < 1 and found["tokens"] == 57


def test_model_agrees_with_itself(models):
    found = agreement.agreement(models[1], models[1], torch.arange(40).view(2, 20))
    assert found["kl"] == 0 and found["top1"] == 1 and found["perplexity"] == found["reference_perplexity"]


def test_variants_are_names_and_options():
    assert accuracy.variant("mix=--optimize.fp_mix 0.5") == ("mix", ["--optimize.fp_mix", "0.5"])
    assert accuracy.variant("default=") == ("default", [])
    with pytest.raises(Exception, match="NAME=OPTIONS"):
        accuracy.variant("--optimize.fp_mix")


def test_every_cell_is_run_compared_and_printed(monkeypatch, tmp_path, capsys):
    ids = tmp_path / "ids.safetensors"
    save_file(
        {"calib_ids": torch.zeros(4, 8, dtype=torch.int32), "eval_ids": torch.zeros(2, 8, dtype=torch.int32)}, ids
    )
    seen = []

    def run(bench, name, command, folder=None):
        seen.append([str(part) for part in command])
        if name.endswith("-agreement"):
            return {"perplexity": 12.0, "kl": 0.25, "top1": 0.5}, {}
        if name == "autoround" and "3" in seen[-1]:
            raise accuracy.ProcessFailed("out of memory")
        return {"peak_rss_bytes": 7}, {"wall_seconds": 3.0, "other_cpu_share": 0.0}

    monkeypatch.setattr(accuracy.Bench, "run", run)
    arguments = ["accuracy.py", "--model", str(tmp_path), "--ids", str(ids), "--bits", "4", "3", "--group-size", "64",
                 "--samples", "4", "--variant", "ours=--optimize.fp_mix 0.5", "--autoround", "AR",
                 "--llmcompressor", "LC"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        accuracy.main()
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["method"], row["bits"], row["group_size"]) for row in rows] == [
        ("ours", 4, 64), ("autoround", 4, 64), ("llmcompressor", 4, 64), ("ours", 3, 64), ("llmcompressor", 3, 64),
    ]  # fmt: skip
    assert rows[0]["perplexity"] == 12 and rows[0]["kl"] == 0.25 and rows[0]["seconds"] == 3
    assert ended.value.code == 1 and "out of memory" in printed.err
    assert [command[command.index("--optimize.fp_mix") + 1] for command in seen if "--optimize.fp_mix" in command] == [
        "0.5", "0.5",
    ]  # fmt: skip
    peers = [command for command in seen if command[0] == os.path.abspath("AR")]  # the workers run in another folder
    assert [command[command.index("--bits") + 1] for command in peers] == ["4", "3"]
    gptq = [command for command in seen if command[0] == os.path.abspath("LC")]
    grids = [command[command.index("--bits") :] for command in gptq]
    assert grids == [["--bits", bits, "--group-size", "64"] for bits in ("4", "3")]


def test_variants_are_tuned_too_if_asked(monkeypatch, tmp_path, capsys):
    seen = []

    def run(bench, name, command, folder=None):
        seen.append([str(part) for part in command])
        if name.endswith("-agreement"):
            return {"perplexity": 12.0 - len(seen), "kl": 0.25, "top1": 0.5}, {}
        return {"peak_rss_bytes": len(seen)}, {"wall_seconds": 3.0 * len(seen), "other_cpu_share": 0.0}

    monkeypatch.setattr(accuracy.Bench, "run", run)
    ids = tmp_path / "ids.safetensors"
    save_file({"calib_ids": torch.zeros(4, 8, dtype=torch.int32)}, ids)
    arguments = ["accuracy.py", "--model", str(tmp_path), "--ids", str(ids), "--variant", "ours=", "--tune",
                 "--tune.steps 4", "--autoround", "AR"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        accuracy.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(row["method"], row["perplexity"], row["seconds"]) for row in rows]
    assert found == [("ours", 10.0, 3.0), ("ours, tuned", 8.0, 12.0), ("autoround", 6.0, 15.0)]
    output, tuned = seen[0][seen[0].index("--output") + 1], seen[2][seen[2].index("--output") + 1]
    assert seen[2][1:3] == ["launch/tune.py", output] and seen[2][-2:] == ["--tune.steps", "4"]
    assert seen[1][-1] == output and seen[3][-1] == tuned != output
    with pytest.raises(SystemExit):
        accuracy.parse([*arguments[1:], "--blocks", "1"])


def test_sets_are_disjoint_and_the_model_is_cut(tmp_path):
    LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )).save_pretrained(tmp_path / "model")  # fmt: skip
    ids, folder = tmp_path / "ids.safetensors", tmp_path / "work"
    folder.mkdir()
    save_file({"calib_ids": torch.arange(40, dtype=torch.int32).view(5, 8), "eval_ids": torch.zeros(2, 8)}, ids)
    options = accuracy.parse(
        ["--model", str(tmp_path / "model"), "--ids", str(ids), "--samples", "2", "--sets", "2", "--blocks", "1"]
    )
    benches = [accuracy.bench_of(options, number, folder) for number in range(2)]
    first, second = (load_file(bench.options.ids)["calib_ids"] for bench in benches)
    assert first.tolist() == [[*range(8)], [*range(8, 16)]] and second.tolist() == [[*range(16, 24)], [*range(24, 32)]]
    assert LlamaForCausalLM.from_pretrained(benches[1].model).config.num_hidden_layers == 1
    options.sets = 3
    with pytest.raises(SystemExit, match="6 sequences in calib_ids"):
        accuracy.bench_of(options, 2, folder)


def test_spread_compares_on_the_same_set():
    rows = [
        {"method": method, "bits": 4, "group_size": -1, "set": number, "kl": kl}
        for method, kls in {"ours": (0.2, 0.4), "other": (0.1, 0.6)}.items()
        for number, kl in enumerate(kls)
    ]
    ours, other = accuracy.spread(rows)
    assert ours["kl"] == [0.3, 0.2, 0.4] and ours["kl_to_first"] == [1, 1, 1]
    assert other["kl"] == [0.35, 0.1, 0.6] and other["kl_to_first"] == [1, 0.5, 1.5] and other["sets"] == 2


def test_ids_are_the_texts_as_a_run_cuts_them(tmp_path, monkeypatch, capsys):
    words = [f"w{number}" for number in range(20)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": " ".join(words)}))
    (tmp_path / "b.txt").write_text("w3 w1 w4 w1 w5")
    columns = [f"calib_ids={tmp_path}/a.jsonl:3x6", f"other={tmp_path}/b.txt:1x5"]
    monkeypatch.setattr(sys, "argv", ["make_ids.py", str(tmp_path / "ids"), *columns, "--model", str(tmp_path)])
    make_ids.main()
    ids = load_file(tmp_path / "ids")
    assert ids["calib_ids"].flatten().tolist() == [*range(18)] and ids["other"].tolist() == [[3, 1, 4, 1, 5]]
    assert "calib_ids [3, 6]" in capsys.readouterr().out
    with pytest.raises(Exception, match="SAMPLESxLENGTH"):
        make_ids.column("calib_ids=a.jsonl")
