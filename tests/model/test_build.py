"""What a model without weights tells of its parts; nothing is computed."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BertConfig,
    BertModel,
    Llama4Config,
    PPFormulaNetConfig,
    PreTrainedModel,
    Qwen2_5OmniConfig,
)

from shardq.errors import UnsupportedModelError
from shardq.model.build import factory_of, find_blocks, find_embeddings, find_head, find_runner, models_beside

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA4 = Llama4Config(
    text_config=SIZES | {"intermediate_size_mlp": 48, "moe_layers": [], "head_dim": 8},
    vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vision_output_dim": 16},
)


def on_meta(factory: type, config: object) -> PreTrainedModel:
    with torch.device("meta"):
        return factory.from_config(config)


@pytest.mark.parametrize("factory", [AutoModelForCausalLM, AutoModelForMultimodalLM])
def test_factory_is_the_one_that_builds_such_a_model(factory: type):
    assert factory_of(on_meta(factory, LLAMA4)) == factory.__name__


def test_head_is_found_within_the_causal_model_that_a_wrapper_contains():
    model = on_meta(AutoModelForMultimodalLM, LLAMA4)
    name, blocks = find_blocks(model)
    assert name == "language_model.model.layers" and len(blocks) == 2
    assert find_head(model, name) is model.language_model.lm_head


def test_text_of_a_wrapper_without_a_forward_goes_through_its_part_with_one():
    config = Qwen2_5OmniConfig()
    for part in (config.thinker_config.text_config, config.talker_config):
        part.num_hidden_layers, part.layer_types = 2, part.layer_types[:2]
    model = on_meta(AutoModelForMultimodalLM, config)
    name, blocks = find_blocks(model)
    assert name == "thinker.model.language_model.layers" and len(blocks) == 2
    assert find_runner(model, name) == "thinker"
    assert find_head(model, name) is model.thinker.lm_head
    assert find_embeddings(model, name) is model.thinker.get_input_embeddings()
    beside = models_beside(model, (blocks, find_head(model, name), find_embeddings(model, name)))
    assert {"talker.", "token2wav.", "thinker.model.visual.", "thinker.model.audio_tower."} <= set(beside)


def test_model_without_a_head_is_refused():
    with torch.device("meta"):
        model = BertModel(BertConfig(**SIZES))
    with pytest.raises(UnsupportedModelError, match="BertModel: it has no head"):
        find_head(model, "encoder.layer")


def test_model_without_a_table_of_embeddings_is_refused():
    model = on_meta(AutoModelForMultimodalLM, PPFormulaNetConfig())
    with pytest.raises(UnsupportedModelError, match="does not tell its table of embeddings .NotImplementedError"):
        find_embeddings(model, "model.decoder.layers")
