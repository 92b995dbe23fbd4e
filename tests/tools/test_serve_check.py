"""The check of a served checkpoint: which tokens it takes, and what it says of answers that are known."""

import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardq.calib.options import TextOptions
from shardq.calib.tokens import load_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import serve_check  # noqa: E402


@pytest.fixture
def options(llama: Path, token_file: Path) -> Namespace:
    return Namespace(
        checkpoint=str(llama), reference=None, tokens=str(token_file), column=None, samples=3, length=48, new_tokens=4
    )


@torch.inference_mode()
def answers(options: Namespace, tokens: list[list[int]]) -> dict:
    """What a server that computes as transformers does would answer, one token after the other."""
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto").eval()
    scores, continuations = [], []
    for ids in tokens:
        logits = model(torch.tensor([ids])).logits[0].double().tolist()
        pairs = zip(logits[:-1], ids[1:], strict=True)
        scores.append([row[token] - math.log(sum(map(math.exp, row))) for row, token in pairs])
        continued = list(ids[: serve_check.PROMPT_TOKENS])
        for _ in range(options.new_tokens):
            continued.append(model(torch.tensor([continued])).logits[0, -1].argmax().item())
        continuations.append(continued[serve_check.PROMPT_TOKENS :])
    return {"vllm": "0", "seconds": 1.0, "log_probabilities": scores, "continuations": continuations}


def test_tokens_are_those_that_an_evaluation_takes(options: Namespace, token_file: Path, llama: Path):
    text = TextOptions(dataset=str(token_file), samples=3, sequence_length=48)
    assert serve_check.read_tokens(options) == load_tokens(text, llama, 300).tolist()


def test_equal_answers_agree_and_others_are_counted(options: Namespace):
    tokens = serve_check.read_tokens(options)
    served = answers(options, tokens)
    same = serve_check.compare(options, tokens, served)
    assert same["tokens"] == 3 * 47 and same["greedy_tokens"] == 12 and same["greedy_agreement"] == 1
    assert same["log_probability_difference_max"] < 1e-5
    assert same["perplexity_vllm"] == pytest.approx(same["perplexity_transformers"], rel=1e-5)
    served["log_probabilities"][1][5] -= 2
    served["continuations"][2][-1] = (served["continuations"][2][-1] + 1) % 300
    other = serve_check.compare(options, tokens, served)
    assert other["log_probability_difference_max"] == pytest.approx(2, abs=1e-4)
    assert other["greedy_agreement"] == pytest.approx(11 / 12)
    assert other["perplexity_vllm"] == pytest.approx(same["perplexity_vllm"] * math.exp(2 / (3 * 47)), rel=1e-4)


def test_zero_points_are_found_in_the_config(options: Namespace, tmp_path: Path):
    assert not serve_check.has_zero_points(options.checkpoint)
    groups = '{"config_groups": {"group_0": {"weights": {"symmetric": false}}}}'
    (tmp_path / "config.json").write_text(f'{{"quantization_config": {groups}}}')
    assert serve_check.has_zero_points(str(tmp_path))
