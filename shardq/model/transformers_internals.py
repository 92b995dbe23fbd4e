"""Private parts of transformers that the package uses, with the reason for each; checked with transformers 5.23."""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

# How stored names become a model's; only whole models can be loaded by public functions.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

# Transformers' table of functions that compute experts; it is exported nowhere else.
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

__all__ = ["ALL_EXPERTS_FUNCTIONS", "WeightConverter", "WeightRenaming", "dot_natural_key",
           "get_model_conversion_mapping", "rename_source_key"]  # fmt: skip


def block_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes that the model declares as blocks; the public functions that use them need weights."""
    return set(model._no_split_modules or ())


def initialise(model: PreTrainedModel, module: nn.Module) -> None:
    """Compute a module's own weights and buffers as the model does; the public function does all, unless marked."""
    model._init_weights(module)


def attention_name(config: PreTrainedConfig) -> str:
    """Entry of transformers' table of attention functions that a model uses; the public argument is for writing."""
    return config._attn_implementation


def use_experts_function(experts: nn.Module, name: str) -> None:
    """Have a module of experts compute by an entry of the table; the public setter asks the source text of a model."""
    experts.config._experts_implementation = name


def gated(experts: nn.Module, gate_up_SI: Tensor) -> Tensor:
    """Join gate and up, side by side or in turns as a module of experts stores them, by its own activation."""
    return experts._apply_gate(gate_up_SI)
