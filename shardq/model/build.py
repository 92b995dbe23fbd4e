"""A model of transformers built from a checkpoint's config.json, without weights, and the list of its decoder blocks.

Works for any architecture of transformers: the blocks are the outermost `ModuleList` in the text decoder whose children
stand in the model's list of blocks' classes, if it has one. A wrapper that adds parts for images or sound to a text
decoder is built whole. No table of models.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from shardq.errors import UnsupportedModelError
from shardq.model.attention import use_pieces
from shardq.model.own_code import own_code
from shardq.model.transformers_internals import block_classes

# Transformers' lists of models that predict the next token, with what builds them.
CAUSAL = (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING)
MULTIMODAL = (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING)
SOUND = (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)  # encoders with decoders, too


def build_on_meta(folder: Path) -> PreTrainedModel:
    """Build the language model that an open checkpoint's config.json describes, on the meta device.

    A wrapper around a text decoder is built whole, with its parts for images or sound.

    Raises:
        UnsupportedModelError: transformers does not build this model.
    """
    with own_code(str(folder / "config.json"), "transformers cannot read it"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    use_pieces()
    try:
        auto_class = _auto_class(folder, config)
        with own_code(f"{folder / 'config.json'}", f"transformers' {config.model_type} cannot be built from it"):
            with torch.device("meta"):
                # float32, not the config's dtype: buffers computed from the config would be rounded to that.
                model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
                return model.eval().requires_grad_(False)
    finally:
        transformers_logging.set_verbosity(verbosity)


def _auto_class(folder: Path, config: PreTrainedConfig) -> type:
    """What builds the model: of the factories that know its config, the one whose class the config names."""
    with own_code(f"{folder / 'config.json'}", f"{type(config).__name__} does not tell its text model"):
        is_wrapper = config.get_text_config() is not config
    factories = (MULTIMODAL, SOUND, CAUSAL) if is_wrapper else (CAUSAL, MULTIMODAL)
    known = [entry for entry in factories if type(config) in entry[1]]
    # A config of a wrapper may also be that of its text model without the rest.
    named = [auto for auto, classes in known if classes[type(config)].__name__ in (config.architectures or ())]
    for auto_class in (*named, *(auto for auto, _ in known)):
        return auto_class
    raise UnsupportedModelError(
        f"{folder}: transformers has no causal language model for {type(config).__name__}; only models that predict "
        "the next token can be quantized"
    )


def factory_of(model: PreTrainedModel) -> str:
    """Name of the class of transformers that loads a checkpoint of such a model as it is built here."""
    factories = (entry for entry in (CAUSAL, MULTIMODAL, SOUND) if type(model.config) in entry[1])
    return next(auto.__name__ for auto, classes in factories if classes[type(model.config)] is type(model))


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The part that has the blocks; the model itself where that is not known.

    Raises:
        UnsupportedModelError: the model's own code fails.
    """
    with own_code(type(model).__name__, "it does not tell its text decoder"):
        decoder, text = model.get_decoder(), model.config.get_text_config()
        if decoder is not model or text is model.config:
            return decoder
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((module for module in models if module.config is text), model)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the text decoder's blocks, and its name in the model; a vision tower's list is not meant.

    Raises:
        UnsupportedModelError: there is none, or there are several.
    """
    kinds, name = block_classes(model), type(model).__name__
    inside = set(text_decoder(model).modules())
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [entry for entry in model.named_modules() if isinstance(entry[1], nn.ModuleList) and len(entry[1])]
    lists = [entry for entry in lists if entry[1] in inside] or lists
    found = [entry for entry in lists if type(entry[1][0]).__name__ in kinds] or lists
    found = [entry for entry in found if not any(entry[0].startswith(f"{path}.") for path, _ in found)]
    if len(found) > 1:
        found = [entry for entry in found if len(entry[1]) == num_layers] or found
    if len(found) == 1:
        return found[0]
    names = f"{len(found)} lists of blocks ({', '.join(path for path, _ in found)})" if found else "no list of blocks"
    raise UnsupportedModelError(
        f"{name}: its decoder has {names}; it must have one, whose blocks are called one after another"
    )


def models_around(model: PreTrainedModel, name: str) -> dict[str, PreTrainedModel]:
    """The transformers models that contain the module of a name, by their names in the outermost, which comes first."""
    parts = name.split(".")
    paths = (".".join(parts[:depth]) for depth in range(len(parts)))
    found = {path: model.get_submodule(path) for path in paths}
    return {path: module for path, module in found.items() if isinstance(module, PreTrainedModel)}


def models_beside(model: PreTrainedModel, text: Iterable[nn.Module]) -> tuple[str, ...]:
    """Prefixes of the names in transformers models within a model that contain nothing of the text decoder.

    Args:
        text: its blocks, embeddings and head.
    """
    return tuple(
        f"{name}."
        for name, inner in model.named_modules()
        if name and isinstance(inner, PreTrainedModel) and set(text).isdisjoint(inner.modules())
    )


def find_runner(model: PreTrainedModel, list_name: str) -> str:
    """Name of the outermost model around the blocks that takes tokens: some wrappers have no forward of their own."""
    around = models_around(model, list_name)
    return next((name for name, each in around.items() if type(each).forward is not nn.Module.forward), "")


def find_head(model: PreTrainedModel, list_name: str) -> nn.Module:
    """What gives the logits: the model's own, or that of the causal model within it that has the blocks.

    Args:
        list_name: name of the list of blocks.

    Raises:
        UnsupportedModelError: there is none.
    """
    heads = (module.get_output_embeddings() for module in models_around(model, list_name).values())
    found = next((head for head in heads if head is not None), None)
    if found is None:
        raise UnsupportedModelError(f"{type(model).__name__}: it has no head that gives the next token's logits")
    return found


def find_embeddings(model: PreTrainedModel, list_name: str) -> nn.Embedding:
    """The table that tokens index.

    Args:
        list_name: name of the list of blocks.

    Raises:
        UnsupportedModelError: there is none.
    """
    with own_code(type(model).__name__, "it does not tell its table of embeddings"):
        found = model.get_submodule(find_runner(model, list_name)).get_input_embeddings()
    if found is None:
        raise UnsupportedModelError(f"{type(model).__name__}: it has no table of embeddings that tokens index")
    return found
