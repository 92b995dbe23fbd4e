"""The README.md of a run's checkpoint or of an export: what it is, how to serve it, how it was made."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from shardq.export.base import Format, Grids
from shardq.rundir.account import Account
from shardq.rundir.folder import MODEL_CARD
from shardq.rundir.record import RunRecord

# In front of a file, or of what a path from the root, the home or the working folder ends in; a mix is cut by commas.
LOCAL_FOLDER = re.compile(r"(?<![^,])(?:[^,]*/(?=[^/,]+\.(?:txt|jsonl|json|parquet|safetensors))|[/~.][^,]*/(?=[^/,]))")

OF_THE_SOURCE = ("license", "license_name", "license_link", "language")
SAID = {
    "loss": "Squared error of a block's output over the float block's power",
    "divergence": "KL divergence of predictions from the float model's, in nats a token",
}


def model_card(
    record: RunRecord, source: Path, grids: Grids, chosen: Format, factory: str, scale_change: float, account: Account
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        record, grids: of the run.
        source: folder whose card, if there is one, names the licence: that of the float model, or of the run.
        factory: the class of transformers that loads such models.
        scale_change: largest relative change of a scale by its rounding after codes were made.
        account: of the checkpoint's tensors.
    """
    manifest = record.manifest()
    options = {name: _public(value) for name, value in _options(manifest).items() if value is not None}
    return f"""---
{_head(manifest, source, chosen)}---

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
{_tuning(manifest)}{_losses(record.blocks.values())}
SHA-256 of the source's config.json: `{manifest["model"]["config"]}`; of samples of its weights:
`{manifest["model"]["weights"]}`; of the calibration tokens: `{manifest["calibration_tokens"]}`.
"""


def _head(manifest: dict, source: Path, chosen: Format) -> str:
    """The front matter: the model that this one is of, where it is one of the hub's, and its licence."""
    head: dict[str, object] = {name: value for name, value in _front_matter(source).items() if name in OF_THE_SOURCE}
    if name := manifest["model"].get("name"):
        head |= {"base_model": name, "base_model_relation": "quantized"}
    return yaml.safe_dump(head | {"library_name": "transformers", "tags": ["shardq", chosen.name]}, sort_keys=False)


def _front_matter(folder: Path) -> dict:
    """The front matter of a folder's model card; empty where there is none that can be read."""
    try:
        found = re.match(r"---\s*\n(.*?)\n---\s*\n", (folder / MODEL_CARD).read_text(encoding="utf-8"), re.DOTALL)
        head = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return head if isinstance(head, dict) else {}


def _options(manifest: dict) -> dict:
    """The run's options as a recipe that makes it again has them: with what was not written down for its default."""
    options = dict(manifest["options"])
    for name, former in {"quant": {"group_size": -1}, "export": {"checkpoint": "plain"}}.items():
        if name in options:
            given = {option: value for option, value in options[name].items() if value is not None}
            options[name] = options[name] | former | given
    return options


def _losses(blocks: Iterable[dict]) -> str:
    """How far the blocks are from the float model's, by what the ledger keeps of them; empty where it keeps nothing."""
    lines = []
    for kind, said in SAID.items():
        pairs = [(block[f"{kind}_before"], block[f"{kind}_after"]) for block in blocks if f"{kind}_after" in block]
        if pairs:
            before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            lines.append(
                f"- {said}, mean of {len(pairs)} block(s): {before:.3e} rounded to nearest, {after:.3e} trained"
            )
    return "\n".join(["", "On calibration text:", "", *lines, ""]) if lines else ""


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
