"""Finished runs as ONNX, run by onnxruntime beside transformers on the same run."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, OPTConfig, PretrainedConfig, Qwen3Config

import tiny
from runs import ONE_RANK, run_quantize
from shardq.cli import parse
from shardq.commands.export import export
from shardq.errors import ConfigError
from shardq.formats.block_file import read_block

RTN = ("--quant.method", "rtn")
VOCABULARY = 300
TOKENS = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(40) < torch.tensor([[40], [31], [40]])).long()  # one sequence is padded at its end


@pytest.fixture(scope="module")
def exported(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, 4 bits in groups of 32, whose folder `onnx` holds it as ONNX. Read only."""
    run = tmp_path_factory.mktemp("onnx") / "run"
    run_quantize(llama, token_file, run, *RTN, "--quant.group_size", 32, "--export.formats", "onnx")
    return run


def run_onnx(path: Path, *, exact: bool = True, **inputs: np.ndarray) -> np.ndarray:
    """Output of a graph; if not `exact`, with the activations rounded that onnxruntime rounds by itself."""
    options = onnxruntime.SessionOptions()
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, inputs)
    return output


def given(tokens: torch.Tensor = TOKENS, mask: torch.Tensor = MASK) -> dict[str, np.ndarray]:
    return {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()}


@torch.inference_mode()
def logits(run: Path, tokens: torch.Tensor = TOKENS, mask: torch.Tensor = MASK) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    return model(tokens, attention_mask=mask).logits.numpy()


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_onnxruntime_computes_what_transformers_computes(exported: Path):
    found, expected = run_onnx(exported / "onnx" / "model.onnx", **given()), logits(exported)
    assert_same(found[MASK.bool()], expected[MASK.bool()])
    by_default = run_onnx(exported / "onnx" / "model.onnx", exact=False, **given())
    assert 0.01 < np.abs(by_default - expected)[MASK.bool()].max() < 0.2 * np.abs(expected).max()


def test_graphs_name_no_folder_of_the_machine_that_made_them(exported: Path):
    graphs = list((exported / "onnx").glob("*.onnx"))
    assert len(graphs) == 6
    for path in graphs:
        content = path.read_bytes()
        assert b"site-packages" not in content and str(Path(__file__).parents[2]).encode() not in content


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (5, 2)], ids=str)
def test_batch_and_sequence_are_of_any_size(exported: Path, shape: tuple[int, int]):
    tokens = TOKENS.flatten()[: shape[0] * shape[1]].view(shape)
    found = run_onnx(exported / "onnx" / "model.onnx", **given(tokens, torch.ones_like(tokens)))
    assert_same(found, logits(exported, tokens, torch.ones_like(tokens)))


def test_the_parts_one_after_the_other_are_the_model(exported: Path):
    folder, mask = exported / "onnx", MASK.numpy()
    hidden = run_onnx(folder / "embedding.onnx", **given())
    for part in sorted(folder.glob("block-*.onnx")):
        hidden = run_onnx(part, hidden_states=hidden, attention_mask=mask)
    found = run_onnx(folder / "head.onnx", hidden_states=hidden, attention_mask=mask)
    assert np.array_equal(found, run_onnx(folder / "model.onnx", **given()))


def test_weights_stay_packed(exported: Path):
    folder = exported / "onnx"
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    model = onnx.load(folder / "model.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for path in sorted((exported / "blocks").iterdir()):
        for name, linear in read_block(path).items():
            codes, scale = stored[f"{name}.codes"], stored[f"{name}.scale"]
            assert codes.data_type == onnx.TensorProto.INT4 and len(codes.raw_data) == linear.codes_OI.numel() / 2
            assert np.array_equal(onnx.numpy_helper.to_array(codes).astype(np.int8), linear.codes_OI.T)
            assert np.array_equal(onnx.numpy_helper.to_array(scale), linear.scale_OG.T)
            assert not any(f"{name}.weight" in (*node.input, *node.output) for node in model.graph.node)


@pytest.mark.slow
def test_two_level_scales_are_the_runs(token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    model, run = tiny.save_llama(tmp_path / "model", num_blocks=1), tmp_path / "run"
    grid = ("--quant.group_size", 32, "--quant.decompressed_bits", 8)
    run_quantize(model, token_file, run, *RTN, *grid, "--export.formats", "onnx")
    assert_same(run_onnx(run / "onnx" / "model.onnx", **given())[MASK.bool()], logits(run)[MASK.bool()])
    said = capsys.readouterr().out
    assert f"{run}/onnx: writing onnx, " in said and "onnx: block 1/" in said


@pytest.mark.slow
def test_exporting_again_gives_the_same_bytes(exported: Path, tmp_path: Path):
    export(parse("export", [str(exported), "--format", "onnx", "--output", str(tmp_path / "again")]), ONE_RANK)
    for path in sorted((exported / "onnx").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_missing_packages_are_named_before_work_starts(llama: Path, token_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnxscript is missing; pip install 'shardq\[onnx\]'"):
        run_quantize(llama, token_file, tmp_path / "run", *RTN, "--export.formats", "onnx")
    assert not (tmp_path / "run" / "blocks").exists()


SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4,
         "max_position_embeddings": 128}  # fmt: skip
GEMMA = Gemma3TextConfig(**SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16, sliding_window=8,
                         layer_types=["sliding_attention", "full_attention", "sliding_attention"])  # fmt: skip
ARCHITECTURES = [
    GEMMA,
    Qwen3Config(**SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16),
    OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64),
    GPTNeoXConfig(**SMALL, intermediate_size=128),
]


@pytest.mark.slow
@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_architectures_are_exported_as_they_compute(config: PretrainedConfig, token_file: Path, tmp_path: Path):
    run = tmp_path / "run"
    run_quantize(tiny.save_model(tmp_path / "model", config), token_file, run, *RTN, "--export.formats", "onnx")
    assert_same(run_onnx(run / "onnx" / "model.onnx", **given())[MASK.bool()], logits(run)[MASK.bool()])
