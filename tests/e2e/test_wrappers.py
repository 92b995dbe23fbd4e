"""Text decoders within wrappers for images: quantized, exported, and loaded in the wrapper's own class."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, Gemma3Config, PretrainedConfig, PreTrainedModel, Qwen3VLConfig

import tiny
from runs import run_evaluate, run_quantize
from shardq.formats.shards import open_index, read_tensor

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
SPECIAL = {"image_token_id": 290, "vision_start_token_id": 291, "vision_end_token_id": 292, "video_token_id": 293}
TEXT = torch.arange(3, 43).view(2, 20)

WRAPPERS: dict[str, PretrainedConfig] = {
    "gemma3": Gemma3Config(
        text_config=SIZES, vision_config=VISION | {"num_hidden_layers": 2}, mm_tokens_per_image=1, image_token_id=290,
        boi_token_index=291, eoi_token_index=292,
    ),
    "qwen3-vl": Qwen3VLConfig(
        text_config=SIZES | {"rope_parameters": ROPE},
        vision_config=VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        **SPECIAL,
    ),
}  # fmt: skip


def prompt_with_image(config: PretrainedConfig) -> dict[str, Tensor]:
    """Inputs as the wrapper's processor lays them out: tokens around one image."""
    generator = torch.Generator().manual_seed(0)
    tokens_1T = torch.tensor([[5, 6, 291, 290, 292, 7, 8]])
    is_image_1T = (tokens_1T == 290).int()
    if isinstance(config, Gemma3Config):
        image = torch.randn(1, 3, 16, 16, generator=generator)
        return {"input_ids": tokens_1T, "token_type_ids": is_image_1T, "pixel_values": image}
    vision = config.vision_config
    patches = torch.randn(4, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=generator)
    return {
        "input_ids": tokens_1T, "mm_token_type_ids": is_image_1T, "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }  # fmt: skip


def loaded(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The wrapper as transformers loads it, without a missing or an unexpected tensor."""
    model, told = type(like).from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.fixture(scope="module", params=WRAPPERS)
def run(request: pytest.FixtureRequest, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wrapper's run for vLLM, beside its folder `model`, with its compressed-tensors checkpoint. Read only."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_model(folder / "model", WRAPPERS[request.param])
    run_quantize(folder / "model", token_file, folder / "run", "--optimize.iterations", 2, "--target", "vllm",
                 "--export.formats", "compressed-tensors", "--quant.group_size", 32)  # fmt: skip
    return folder / "run"


def test_wrapper_answers_with_and_without_an_image(run: Path):
    original = tiny.whole_model(run.parent / "model")
    ours, packed = loaded(run, original), loaded(run / "compressed-tensors", original)
    for inputs in ({"input_ids": TEXT}, prompt_with_image(ours.config)):
        with torch.inference_mode():
            found_NTV = packed(**inputs).logits
            assert found_NTV.shape == (*inputs["input_ids"].shape, 300) and found_NTV.isfinite().all()
            assert torch.equal(found_NTV, ours(**inputs).logits)
            assert not torch.equal(found_NTV, original(**inputs).logits.bfloat16())
    assert packed.generate(**prompt_with_image(ours.config), max_new_tokens=2, do_sample=False).shape[1] == 9


def test_model_card_names_the_class_that_loads_the_wrapper(run: Path):
    (factory,) = re.findall(r"(\w+)\.from_pretrained", (run / "compressed-tensors" / "README.md").read_text())
    model = getattr(transformers, factory).from_pretrained(run / "compressed-tensors")
    assert type(model) is type(tiny.whole_model(run))


def test_only_linears_of_the_text_decoder_are_changed_and_all_others_are_ignored_by_name(run: Path):
    source, written, packed = (open_index(path) for path in (run.parent / "model", run, run / "compressed-tensors"))
    assert set(source) == set(written)
    quantized = {name.removesuffix("_packed") for name in packed if name.endswith("_packed")}
    assert len(quantized) == 2 * 7
    for name in source:
        is_same = torch.equal(read_tensor(source[name]), read_tensor(written[name]))
        assert is_same == (name not in quantized), name
    model = tiny.whole_model(run)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ignored = set(AutoConfig.from_pretrained(run / "compressed-tensors").quantization_config["ignore"])
    assert linears - ignored == {name for name in linears if "language_model.layers." in name}
    matrices = {name for name, info in source.items() if len(info.shape) == 2}
    stored = {name for name in matrices if name.endswith(("proj.weight", "qkv.weight"))}
    assert {name for name in stored if name.removesuffix(".weight") not in ignored} == quantized


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize(("num", "length"), [(2, 24), (6, 48), (3, 200)])
def test_perplexity_on_text_is_the_wrappers_own(name: str, num: int, length: int, tmp_path: Path):
    folder = tiny.save_model(tmp_path / "model", WRAPPERS[name])
    tokens = tiny.save_tokens(tmp_path / "tokens.safetensors", num, length, vocab=280, seed=length)
    model, losses = tiny.whole_model(folder), []
    for tokens_T in load_file(tokens)["tokens"]:
        with torch.inference_mode():
            logits_TV = model(input_ids=tokens_T[None]).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits_TV, tokens_T[1:]))
    measured = run_evaluate(folder, tokens, "--eval.sequence_length", length)["perplexity"]
    assert measured == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)
