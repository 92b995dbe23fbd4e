"""Every family that transformers builds from a small config streams as transformers computes it, or is refused."""

import pytest
import transformers

import sweep as sweep_module
from shardq.errors import UnsupportedModelError
from sweep import OUTCOMES, families, kept_rows, sweep, sweep_apart
from tiny_config import FIRST_SPECIAL_TOKEN, tiny_config

# Kinds of decoder that differ in what streaming depends on: rotary and learned positions, biases by distance, windows
# and capped logits, tied and own heads, keys of low rank, convolutions and states, weights that blocks share, a wrapper
# whose tensors are renamed, fused experts, weights that are stored transposed.
QUICK = ("opt, narrow embedding", "falcon, alibi", "gemma3n_text", "zamba2", "mistral3", "granitemoe", "gpt2")
KEPT = {row.family: row for row in kept_rows()}


@pytest.mark.parametrize("family", QUICK)
def test_family_is_as_transformers_computes_it_before_and_after_quantization(family: str):
    row = sweep(family)
    assert row.outcome == "equal", row


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_family_is_as_the_table_of_the_documents_says(family: str):
    row = sweep_apart(family)
    assert row == KEPT[family], "run python tools/family_sweep.py with its name, then tools/docs_tables.py"
    assert row.outcome not in ("different", "traceback"), row


def test_the_table_has_every_family_and_none_is_wrong_without_a_word():
    """A new transformers has other families: the sweep is to be run with it."""
    assert KEPT.keys() == set(families()), (
        f"run python tools/family_sweep.py with transformers {transformers.__version__}"
    )
    assert {row.outcome for row in KEPT.values()} <= set(OUTCOMES)
    assert [row for row in KEPT.values() if row.outcome == "different"] == []
    assert [family for family in QUICK if KEPT[family].outcome != "equal"] == []


def test_nine_of_ten_decoders_run():
    decoders = [row for row in KEPT.values() if row.outcome not in ("not built", "no decoder")]
    assert len([row for row in decoders if row.outcome == "equal"]) >= 0.9 * len(decoders)


@pytest.mark.parametrize(
    ("outcome", "planted"),
    [("different", 300.0), ("refused", UnsupportedModelError("no")), ("traceback", KeyError("no"))],
)
def test_what_came_is_told_apart(outcome: str, planted: float | Exception, monkeypatch: pytest.MonkeyPatch):
    def planted_evaluate(*_):
        if isinstance(planted, Exception):
            raise planted
        return {"perplexity": planted}

    monkeypatch.setattr(sweep_module, "evaluate", planted_evaluate)
    row = sweep("llama")
    assert (row.outcome, row.stage) == (outcome, "few")


def test_a_model_that_looks_ahead_is_no_decoder():
    assert sweep("bert").outcome == "no decoder"


def test_a_small_config_keeps_a_layer_of_each_kind():
    config = tiny_config("gemma3_text")
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers <= 4


def test_special_tokens_lie_behind_those_of_texts():
    config = tiny_config("gemma3")
    assert len({config.image_token_id, config.boi_token_index, config.text_config.eos_token_id}) == 3
    assert min(config.image_token_id, config.boi_token_index, config.text_config.eos_token_id) >= FIRST_SPECIAL_TOKEN
    assert config.text_config.vocab_size > FIRST_SPECIAL_TOKEN
