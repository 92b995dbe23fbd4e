"""Layer-streaming, data-parallel quantization of large language models."""

from typing import TYPE_CHECKING

import shardq.export  # noqa: F401  first: as it is loaded, the room takes the name that is to be the function's

if TYPE_CHECKING:
    from shardq.api import evaluate, export, load_run, quantize, tune, verify
    from shardq.config import EvaluateConfig, ExportConfig, QuantizeConfig, QuantOptions, TuneConfig, VerifyConfig
    from shardq.errors import ShardQError

__version__ = "0.1.0"
__all__ = ["EvaluateConfig", "ExportConfig", "QuantizeConfig", "QuantOptions", "ShardQError", "TuneConfig",
           "VerifyConfig", "evaluate", "export", "load_run", "quantize", "tune", "verify"]  # fmt: skip

del export  # noqa: F821  the room's


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for, and torch only when it is called."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shardq import api, config, errors

    return next(getattr(module, name) for module in (api, config, errors) if hasattr(module, name))
