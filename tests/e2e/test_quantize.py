"""Whole runs on a tiny model: what comes out loads, lies on its grid, and does not depend on how it was computed."""

import json
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma3Config, OPTConfig

import forked
import tiny
from runs import (
    LAUNCH,
    assert_nearly_equal,
    last_json,
    quantize_arguments,
    result_files,
    run_evaluate,
    run_quantize,
)
from shardq.cache import store
from shardq.formats.block_file import read_block
from shardq.formats.source import WeightSource
from shardq.model import ends
from shardq.training import objective


@pytest.fixture(scope="module")
def run(llama, token_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run_quantize(llama, token_file, output)


def whole_model_perplexity(folder, token_file, transform=lambda model: None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    transform(model)
    tokens = load_file(token_file)["tokens"]
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    return math.exp(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def round_linears_to_nearest(model):
    """Symmetric 4-bit min-max rounding per output channel, written out."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            weight = module.weight.data
            step = torch.maximum(weight.amax(1) / 7, -weight.amin(1) / 8)[:, None]
            step = (7 * step - -8 * step) / 15  # as AIMET: bfloat16 weights often lie exactly between two codes
            module.weight.data = (weight / step).round().clamp(-8, 7) * step


def test_training_lowers_the_loss_and_the_summary_says_so(run):
    output, summary = run
    assert summary["blocks"] == 3 and summary["output"] == str(output)
    assert 0 < summary["loss_after"] < 0.9 * summary["loss_before"]
    assert summary["seconds"] > 0 and summary["peak_rss_bytes"] > 1 << 20


def test_output_loads_and_every_weight_is_a_grid_point(run):
    output, _ = run
    model = AutoModelForCausalLM.from_pretrained(output)
    for number in range(3):
        block = load_file(output / "blocks" / f"block-{number:05d}.safetensors")
        scales = {name.removesuffix(".scale"): scale for name, scale in block.items() if name.endswith(".scale")}
        assert len(scales) == 7
        for name, scale in scales.items():
            weight = model.get_submodule(name).weight
            codes = (weight / scale).round()
            assert weight.dtype == torch.float32 and codes.min() >= -8 and codes.max() <= 7
            assert torch.equal(codes * scale, weight)


def test_unquantized_tensors_are_the_source_bit_for_bit(run, llama):
    output, _ = run
    source = {k: v for file in llama.glob("*.safetensors") for k, v in load_file(file).items()}
    written = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
    assert written.keys() == source.keys()
    kept = [name for name in source if not name.endswith("proj.weight")]
    assert len(kept) == 8 and all(torch.equal(written[name], source[name]) for name in kept)


def test_encodings_are_there_per_block_and_merged(run):
    output, _ = run
    merged = json.loads((output / "model.encodings").read_text())
    assert merged["version"] == "1.0.0" and len(merged["param_encodings"]) == 21
    per_block = [json.loads((output / "encodings" / f"block-{n:05d}.json").read_text()) for n in range(3)]
    assert merged["param_encodings"] == [entry for block in per_block for entry in block["param_encodings"]]
    ends = json.loads((output / "model_torch.encodings").read_text())["param_encodings"]
    linear = read_block(output / "blocks" / "block-00001.safetensors")["model.layers.1.mlp.down_proj"]
    rows = ends["model.layers.1.mlp.down_proj.weight"]
    assert [row["min"] for row in rows] == linear.scale_OG[:, 0].mul(torch.tensor([[-8], [7]])).amin(0).tolist()


def test_cache_is_gone_when_the_run_ends(run):
    assert not (run[0] / "cache").exists()


def test_evaluation_agrees_with_the_whole_model(run, llama, token_file):
    for folder in (llama, run[0]):
        expected = whole_model_perplexity(folder, token_file)
        assert run_evaluate(folder, token_file)["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [299, 64, 7])
def test_evaluation_in_slices_of_the_vocabulary_agrees_with_the_whole_model(llama, token_file, monkeypatch, rows):
    whole = run_evaluate(llama, token_file)["perplexity"]
    monkeypatch.setattr(ends, "HEAD_SLICE_BYTES", rows * 64 * 4)
    sliced = run_evaluate(llama, token_file)["perplexity"]
    assert sliced == pytest.approx(whole, rel=1e-6)
    assert sliced == pytest.approx(whole_model_perplexity(llama, token_file), rel=1e-5)


def test_evaluation_of_long_sequences_agrees_with_the_whole_model(tmp_path):
    """Longer than the positions whose logits are in memory at once."""
    folder = tiny.save_llama(tmp_path / "model", max_position_embeddings=600)
    tokens = tiny.save_tokens(tmp_path / "tokens.safetensors", num=2, length=600)
    measured = run_evaluate(folder, tokens, "--eval.sequence_length", 600)
    assert measured["tokens"] == 2 * 599
    assert measured["perplexity"] == pytest.approx(whole_model_perplexity(folder, tokens), rel=1e-5)


SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        # The 350M form: embeddings are narrower than what enters a block.
        OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=32, max_position_embeddings=512),
        # Stored as published, with a vision tower beside the text decoder, and a tied head.
        Gemma3Config(
            text_config=SIZES | {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16},
            vision_config={
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 8,
            },
            mm_tokens_per_image=1,
        ),
    ],
    ids=["narrow-embeddings", "vision-tower"],
)  # fmt: skip
def test_models_of_other_forms_are_quantized_and_evaluated(config, token_file, tmp_path):
    folder, output = tiny.save_model(tmp_path / "model", config), tmp_path / "run"
    summary = run_quantize(folder, token_file, output, "--activations.bits", 8, "--optimize.iterations", 8)
    assert summary["loss_after"] < summary["loss_before"] and summary["blocks"] == 2
    perplexity = run_evaluate(output, token_file, "--eval.sequence_length", 64)["perplexity"]
    assert perplexity == pytest.approx(whole_model_perplexity(output, token_file), rel=1e-4)


def test_evaluation_rounds_to_nearest_as_a_plain_rounding_does(llama, token_file):
    expected = whole_model_perplexity(llama, token_file, round_linears_to_nearest)
    measured = run_evaluate(llama, token_file, "--quant.method", "rtn", "--quant.full_range", "false",
                            "--quant.group_size", -1)  # fmt: skip
    assert measured["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert measured["tokens"] == 8 * 63


def test_quantizing_without_training_equals_evaluating_rounded(llama, token_file, tmp_path):
    summary = run_quantize(llama, token_file, tmp_path / "out", "--quant.method", "rtn")
    assert summary["loss_before"] == summary["loss_after"]
    rounded = run_evaluate(llama, token_file, "--quant.method", "rtn", "--quant.group_size", -1)["perplexity"]
    assert run_evaluate(tmp_path / "out", token_file)["perplexity"] == pytest.approx(rounded, rel=1e-6)


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_cache_placement_does_not_change_the_result(run, llama, token_file, tmp_path, placement):
    run_quantize(llama, token_file, tmp_path / "out", "--cache.placement", placement)
    assert result_files(tmp_path / "out") == result_files(run[0])


@pytest.mark.parametrize(
    "more",
    [
        ["--quant.symmetric", "false"],
        ["--quant.group_size", 32, "--quant.bits", 3],
        ["--quant.symmetric", "false", "--quant.group_size", 64, "--quant.bits", 2],
        ["--quant.method", "flexround"],
        ["--quant.method", "lwc"],
        ["--quant.bits", 8],
        ["--optimize.fp_mix", 0],
        ["--optimize.start", "search", "--quant.bits", 3],
        ["--optimize.start", "search", "--quant.group_size", 32, "--quant.symmetric", "false", "--quant.bits", 2],
        ["--optimize.loss", "token"],
        ["--optimize.optimizer", "adam"],
        ["--quant.bits", 3, "--quant.full_range", "true"],
        ["--quant.bits", 2],
        ["--quant.group_size", 16, "--quant.decompressed_bits", 8],
        ["--quant.group_size", 16, "--quant.decompressed_bits", 5, "--optimize.start", "search", "--quant.bits", 3],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_every_grid_and_method_improves_on_its_start_and_loads(llama, token_file, tmp_path, more):
    summary = run_quantize(llama, token_file, tmp_path / "out", *more)
    assert summary["loss_after"] < summary["loss_before"]
    expected = whole_model_perplexity(tmp_path / "out", token_file)
    assert run_evaluate(tmp_path / "out", token_file)["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_searched_start_is_nearer_and_the_same_on_two_ranks(run, llama, token_file, tmp_path):
    more = ["--optimize.start", "search", "--quant.method", "rtn", "--quant.bits", 3]
    plain = run_quantize(llama, token_file, tmp_path / "plain", *more[2:])
    searched = run_quantize(llama, token_file, tmp_path / "searched", *more)
    assert searched["loss_after"] < 0.9 * plain["loss_after"]
    forked.ranks(2, [LAUNCH / "quantize.py", *quantize_arguments(llama, token_file, tmp_path / "two", *more)])
    assert_nearly_equal(tmp_path / "two", tmp_path / "searched")


def test_default_preset_is_nearer_to_the_float_model_than_aimets(run, llama, token_file, tmp_path):
    """Perplexity says nothing on random weights: the last hidden states and logits do."""
    run_quantize(llama, token_file, tmp_path / "default", "--optimize.preset", "default", "--quant.bits", 3)
    run_quantize(llama, token_file, tmp_path / "aimet", "--quant.bits", 3, "--quant.full_range", "false")
    ids = load_file(token_file)["tokens"][:4, :64]
    with torch.no_grad():
        wanted, default, aimet = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (llama, tmp_path / "default", tmp_path / "aimet")
        )
    assert (default - wanted).square().mean() < 0.9 * (aimet - wanted).square().mean()


def test_no_iterate_worse_than_the_start_is_kept(llama, token_file, tmp_path):
    destructive = ["--optimize.weight_lr", 3, "--optimize.grid_lr", 1, "--optimize.last_block", "output"]
    last = run_quantize(llama, token_file, tmp_path / "last", *destructive)
    best = run_quantize(llama, token_file, tmp_path / "best", *destructive, "--optimize.held_out", 2)
    start = run_quantize(llama, token_file, tmp_path / "start", "--quant.method", "rtn", "--optimize.held_out", 2)
    assert last["loss_after"] > 2 * start["loss_after"], "training was meant to destroy"
    assert best["loss_after"] == best["loss_before"] == start["loss_after"]
    codes, expected = (read_block(tmp_path / name / "blocks" / "block-00002.safetensors") for name in ("best", "start"))
    assert all(torch.equal(codes[name].codes_OI, expected[name].codes_OI) for name in expected)


def nats_a_token(folder, token_file):
    """Of the calibration text itself, by transformers."""
    ids = load_file(token_file)["tokens"][:8, :64].long()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def calibration_logits(folder, token_file):
    ids = load_file(token_file)["tokens"][:8, :64]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.double()


def divergence_from(llama, folder, token_file, tokens=slice(None)):
    """KL divergence of a model's predictions on the calibration tokens from the float model's, in nats a token.

    Of some tokens of the vocabulary, as if there were no others.
    """
    log_p, log_q = (calibration_logits(path, token_file)[..., tokens].log_softmax(-1) for path in (llama, folder))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_last_block_is_trained_to_the_float_models_predictions(llama, token_file, tmp_path, capsys, monkeypatch):
    """Of the whole quantized model, here by them alone; the blocks before are what the other run's are."""
    plain = run_quantize(llama, token_file, tmp_path / "plain", "--optimize.last_block", "output")
    monkeypatch.setattr(objective, "OUTPUT_WEIGHT", 0.0)
    output, summary = tmp_path / "out", run_quantize(llama, token_file, tmp_path / "out")
    reached = divergence_from(llama, output, token_file)
    assert summary["divergence_after"] == pytest.approx(reached, rel=1e-3)
    assert reached < 0.98 * divergence_from(llama, tmp_path / "plain", token_file)
    assert reached < 0.93 * summary["divergence_before"]
    assert plain["divergence_before"] is None and plain["divergence_after"] is None
    for number, same in enumerate((True, True, False)):
        name = f"blocks/block-{number:05d}.safetensors"
        assert ((output / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()) == same
    said = f"KL divergence {summary['divergence_before']:.4f} -> {summary['divergence_after']:.4f} nats a token"
    last, done = (line for line in capsys.readouterr().out.splitlines() if "KL divergence" in line)
    assert (
        last.startswith("block 2 model.layers.2, 3 of 3 done: ")
        and said in last
        and done.startswith("done: mean relative loss")
        and said in done
    )


def test_last_block_is_trained_to_the_tokens_that_the_float_model_expects(llama, token_file, tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "OUTPUT_WEIGHT", 0.0)
    run_quantize(llama, token_file, tmp_path / "all")
    expected = calibration_logits(llama, token_file)[:, :: objective.POSITION_STRIDE].softmax(-1).sum((0, 1))
    likely = sorted(expected.topk(9).indices.tolist())
    monkeypatch.setattr(objective, "LIKELY_TOKENS", 9)
    run_quantize(llama, token_file, tmp_path / "likely")
    of_likely, of_all = (divergence_from(llama, tmp_path / run, token_file, likely) for run in ("likely", "all"))
    assert of_likely < 0.98 * of_all
    others = [token for token in range(60) if token not in likely]
    of_likely, of_all = (divergence_from(llama, tmp_path / run, token_file, others) for run in ("likely", "all"))
    assert of_likely > 1.02 * of_all


def test_labels_are_the_tokens_that_come_next(llama, token_file, tmp_path, monkeypatch):
    """Trained to the text's own tokens alone, the last block makes that text likelier than trained to the model's."""
    monkeypatch.setattr(objective, "OUTPUT_WEIGHT", 0.0)
    nats = {}
    for weight in (0, 1):
        run_quantize(llama, token_file, tmp_path / str(weight), "--optimize.label_weight", weight)
        nats[weight] = nats_a_token(tmp_path / str(weight), token_file)
    assert nats[1] < nats[0] - 0.05


def test_predictions_are_the_same_objective_on_two_ranks(llama, token_file, tmp_path):
    more = ["--optimize.label_weight", 0.3]
    one = run_quantize(llama, token_file, tmp_path / "one", *more)
    arguments = quantize_arguments(llama, token_file, tmp_path / "two", *more)
    two = last_json(forked.ranks(2, [LAUNCH / "quantize.py", *arguments]).stdout)
    assert two["divergence_after"] == pytest.approx(one["divergence_after"], rel=0.01)
    assert_nearly_equal(tmp_path / "two", tmp_path / "one")


def test_iterate_with_the_best_held_out_predictions_is_kept(llama, token_file, tmp_path):
    more = ["--optimize.held_out", 2, "--optimize.weight_lr", 3, "--optimize.grid_lr", 1]
    summary = run_quantize(llama, token_file, tmp_path / "out", *more)
    assert summary["divergence_after"] == summary["divergence_before"] > 0


def test_best_iterate_is_the_same_on_two_ranks(llama, token_file, tmp_path):
    more = ["--optimize.held_out", 4]
    one = run_quantize(llama, token_file, tmp_path / "one", *more)
    assert one["loss_after"] < 0.99 * one["loss_before"]
    arguments = quantize_arguments(llama, token_file, tmp_path / "two", *more)
    two = last_json(forked.ranks(2, [LAUNCH / "quantize.py", *arguments]).stdout)
    assert two["loss_after"] == pytest.approx(one["loss_after"], rel=0.01)


def test_ignored_linears_stay_as_they_are(llama, token_file, tmp_path):
    run_quantize(llama, token_file, tmp_path / "out", "--quant.ignore", "down_proj,model.layers.0.*")
    source, written = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (llama, tmp_path / "out")
    )
    changed = {name for name in source if not torch.equal(source[name].float(), written[name].float())}
    assert changed and not any("down_proj" in name or "layers.0." in name for name in changed)


def test_source_dtype_checkpoint_is_the_grid_rounded_to_it(llama, token_file, tmp_path):
    run_quantize(llama, token_file, tmp_path / "out", "--export.dtype", "source")
    linear = read_block(tmp_path / "out" / "blocks" / "block-00000.safetensors")["model.layers.0.mlp.up_proj"]
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj").weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (linear.codes_OI.float() * linear.scale_OG).bfloat16())


def test_two_ranks_give_the_result_of_one(run, two_ranks, token_file):
    output, printed = two_ranks
    assert "48 samples a block" in printed
    assert last_json(printed)["loss_after"] == pytest.approx(run[1]["loss_after"], rel=0.01)
    assert_nearly_equal(output, run[0])
    evaluated = forked.ranks(2, [LAUNCH / "evaluate.py", "--model", output, "--eval.dataset", token_file,
                                  "--eval.sequence_length", "64"])  # fmt: skip
    expected = whole_model_perplexity(output, token_file)
    assert last_json(evaluated.stdout)["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_micro_batches_give_the_result_of_the_whole_batch(run, llama, token_file, tmp_path):
    """The run beside it takes both samples of a batch through the block at once."""
    manifest = json.loads((run[0] / "manifest.json").read_text())
    assert manifest["options"]["optimize"]["micro_batch"] == 2
    summary = run_quantize(llama, token_file, tmp_path / "out", "--optimize.micro_batch", 1)
    assert summary["loss_before"] == pytest.approx(run[1]["loss_before"], rel=1e-6)
    assert summary["loss_after"] == pytest.approx(run[1]["loss_after"], rel=1e-3)
    assert_nearly_equal(tmp_path / "out", run[0])


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_bf16_lowers_the_loss_about_as_far(run, llama, token_file, tmp_path, micro_batch):
    more = ["--optimize.precision", "bf16", "--optimize.micro_batch", micro_batch]
    summary = run_quantize(llama, token_file, tmp_path / "out", *more)
    assert summary["loss_after"] < 0.9 * summary["loss_before"]
    assert summary["loss_after"] == pytest.approx(run[1]["loss_after"], rel=0.1)
    assert summary["loss_after"] != run[1]["loss_after"], "nothing was computed in bf16"
    expected = whole_model_perplexity(tmp_path / "out", token_file)
    assert run_evaluate(tmp_path / "out", token_file)["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("command", [run_quantize, run_evaluate], ids=["quantize", "evaluate"])
def test_stored_weights_of_no_more_than_two_blocks_are_in_memory(tmp_path, token_file, monkeypatch, command):
    """The block in use and the one that is read ahead; checked at every tensor that is read."""
    read, held, most = WeightSource.read, [], []

    def noted(source, tensor, *how):
        values = read(source, tensor, *how)
        if ".layers." in tensor.name:
            held.append((tensor.name.split(".")[2], weakref.ref(values)))
            most.append({block for block, reference in held if reference() is not None})
        return values

    monkeypatch.setattr(WeightSource, "read", noted)
    folder = tiny.save_llama(tmp_path / "model", num_blocks=5)
    command(*([folder, token_file, tmp_path / "out"] if command is run_quantize else [folder, token_file]))
    assert len(most) == 5 * 9
    assert [blocks for blocks in most if len(blocks) > 2] == []


def test_what_was_chosen_for_the_machine_is_part_of_the_run(llama, token_file, tmp_path, monkeypatch):
    monkeypatch.setattr("shardq.commands.prepare.multiplies_bf16", lambda device: True)
    more = ["--optimize.memory_gib", 1, "--optimize.batch_size", 4, "--optimize.iterations", 1,
            "--optimize.precision", "auto"]  # fmt: skip
    run_quantize(llama, token_file, tmp_path / "out", *more)
    chosen = json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]["optimize"]
    assert (chosen["precision"], chosen["compile"], chosen["micro_batch"]) == ("bf16", "off", 4)
    assert "memory_gib" not in chosen


@pytest.fixture
def cached_files(monkeypatch):
    """List into which the paths of cached activations go."""
    written, write_checked = [], store.write_checked
    monkeypatch.setattr(
        store, "write_checked", lambda path, tensors: written.append(path) or write_checked(path, tensors)
    )
    return written


def test_cache_may_be_on_another_disk(run, llama, token_file, tmp_path, cached_files):
    """There it lies under a name of the run's own, and nothing else is gone in the end."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "thesis.txt").write_text("two years of work")
    run_quantize(llama, token_file, tmp_path / "out", "--cache.folder", tmp_path / "disk")
    assert result_files(tmp_path / "out") == result_files(run[0])
    [folder] = {path.parents[1] for path in cached_files}
    assert folder.parent == tmp_path / "disk" and folder.name.startswith("shardq-")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["thesis.txt"]


def test_evaluation_on_disk_gives_the_same_and_leaves_nothing(llama, token_file, tmp_path, cached_files):
    on_disk = run_evaluate(llama, token_file, "--cache.placement", "disk", "--cache.folder", tmp_path)
    assert cached_files and all(path.is_relative_to(tmp_path) for path in cached_files)
    assert list(tmp_path.iterdir()) == []
    assert on_disk["perplexity"] == run_evaluate(llama, token_file)["perplexity"]
