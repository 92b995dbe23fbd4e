"""The README.md of an exported checkpoint: what it is, how to serve it, how it was made."""

import re

import yaml

from shardq.export.base import Format, Grids
from shardq.rundir.account import Account

# In front of a file, or of what a path from the root, the home or the working folder ends in; a mix is cut by commas.
LOCAL_FOLDER = re.compile(r"(?<![^,])(?:[^,]*/(?=[^/,]+\.(?:txt|jsonl|json|parquet|safetensors))|[/~.][^,]*/(?=[^/,]))")


def model_card(
    manifest: dict, grids: Grids, chosen: Format, factory: str, scale_change: float, account: Account
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        manifest, grids: of the run.
        factory: the class of transformers that loads such models.
        scale_change: largest relative change of a scale by its rounding after codes were made.
        account: of the checkpoint's tensors.
    """
    head = yaml.safe_dump({"library_name": "transformers", "tags": ["shardq", chosen.name]}, sort_keys=False)
    options = {name: _public(value) for name, value in manifest["options"].items() if value is not None}
    return f"""---
{head}---

# {_scheme(grids, chosen.activation_bits)}

Quantized by shardq {manifest["shardq"]}, only the weights of the decoder's linears. {_exactness(scale_change)}

## Serve it

{chosen.how_to_serve(grids, factory)}

## What is quantized

{_accounted(account, chosen)}
## How it was made

The options of `shardq quantize`, as a recipe for `--config`:

```yaml
{yaml.safe_dump(options, sort_keys=True)}```
{_tuning(manifest)}
SHA-256 of the source's config.json: `{manifest["model"]["config"]}`; of samples of its weights:
`{manifest["model"]["weights"]}`; of the calibration tokens: `{manifest["calibration_tokens"]}`.
"""


def _accounted(account: Account, chosen: Format) -> str:
    share, *left = account.lines()
    lines = [f"{share[0].upper()}{share[1:]}", "", *(f"- {line}" for line in left), ""]
    if chosen.is_of_text and account.beside_text():
        lines += [f"This format is of the text decoder alone, without {account.beside_text()}.", ""]
    return "\n".join(lines)


def _public(value: object) -> object:
    """An option's value without the folders of the machine: a file, or a path from the root, is named only."""
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items()}
    return LOCAL_FOLDER.sub("", value) if isinstance(value, str) else value


def _tuning(manifest: dict) -> str:
    """What was done to the scales afterwards, if anything was."""
    if "tuned" not in manifest:
        return ""
    options = yaml.safe_dump({"tune": manifest["tuned"]["options"]}, sort_keys=True)
    return (
        f"\nScales were then tuned end to end by `shardq tune`; codes stayed as they were:\n\n```yaml\n{options}```\n"
    )


def _scheme(grids: Grids, activation_bits: int) -> str:
    return "; ".join(f"W{grid.bits}A{activation_bits}, {grid.description}" for grid in dict.fromkeys(grids.values()))


def _exactness(scale_change: float) -> str:
    if scale_change:
        return f"Scales were rounded after codes were made: weights differ from the run's by up to {scale_change:.2%}."
    return "Codes and scales are those that the run measured."
