"""A model of transformers built from a checkpoint's config.json, without weights, and the list of its decoder blocks.

Works for any architecture of transformers: the blocks are the outermost `ModuleList` in the text decoder whose children
stand in the model's list of blocks' classes, if it has one. No table of models.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from shardq.errors import UnsupportedModelError
from shardq.model.attention import use_pieces
from shardq.model.own_code import own_code
from shardq.model.transformers_internals import block_classes


def build_on_meta(folder: Path) -> PreTrainedModel:
    """Build the causal language model that an open checkpoint's config.json describes, on the meta device.

    Raises:
        UnsupportedModelError: transformers does not build this model.
    """
    with own_code(str(folder / "config.json"), "transformers cannot read it"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    use_pieces()
    try:
        _check_is_causal(folder, config)
        with own_code(f"{folder / 'config.json'}", f"transformers' {config.model_type} cannot be built from it"):
            with torch.device("meta"):
                # float32, not the config's dtype: buffers computed from the config would be rounded to that.
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
                return model.eval().requires_grad_(False)
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_is_causal(folder: Path, config: PreTrainedConfig) -> None:
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    with own_code(f"{folder / 'config.json'}", f"{type(config).__name__} does not tell its text model"):
        parts, text = list(config.sub_configs), config.get_text_config()
    if text is not config:
        raise UnsupportedModelError(
            f"{folder}: {type(config).__name__} is of a wrapper around a text model ({', '.join(parts)}), for which "
            "transformers has no causal language model; such wrappers are not supported yet, pass a checkpoint of the "
            "text model alone"
        )
    raise UnsupportedModelError(
        f"{folder}: transformers has no causal language model for {type(config).__name__}; only models that predict "
        "the next token can be quantized"
    )


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the text decoder's blocks, and its name in the model; a vision tower's list is not meant.

    Raises:
        UnsupportedModelError: there is none, or there are several.
    """
    kinds, name = block_classes(model), type(model).__name__
    with own_code(name, "it does not tell its text decoder"):
        inside = set(model.get_decoder().modules())
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
