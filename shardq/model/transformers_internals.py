"""Private parts of transformers that the package uses, with the reason for each; checked with transformers 5.23."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# How stored names become a model's; only whole models can be loaded by public functions.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["WeightConverter", "WeightRenaming", "get_model_conversion_mapping", "rename_source_key"]


def block_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes that the model declares as blocks; the public functions that use them need weights."""
    return set(model._no_split_modules or ())


def initialise(model: PreTrainedModel, module: nn.Module) -> None:
    """Compute a module's own weights and buffers as the model does; the public function does all, unless marked."""
    model._init_weights(module)


def attention_name(config: PreTrainedConfig) -> str:
    """Entry of transformers' table of attention functions that a model uses; the public argument is for writing."""
    return config._attn_implementation
