"""The README.md of an exported checkpoint: what it is, how to serve it, how it was made."""

import yaml

from shardq.formats import gptq
from shardq.quant.spec import QuantSpec

LOAD_PLAIN = 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")'
LOAD_GGUF = 'AutoModelForCausalLM.from_pretrained("path/to/this/folder", gguf_file="model.gguf")'
# Left packed, transformers 5.23 makes room for unpacked zero points only.
LOAD_ASYMMETRIC = """AutoModelForCausalLM.from_pretrained(
    "path/to/this/folder", quantization_config=CompressedTensorsConfig(dequantize=True)
)"""

USE_ENCODINGS = """AIMET encodings of the weights, by torch names, lists in [out, in] order: all in `model.encodings`
or, version 0.6.1, in `model_torch.encodings`, and block by block in `encodings/`. The weights that belong to them are
those of `shardq export RUN --format hf`, each on its grid already. aimet_torch loads version 0.6.1:"""
LOAD_ENCODINGS = 'sim.load_encodings("path/to/this/folder/model_torch.encodings")  # of a QuantizationSimModel'

LOAD_ONNX = """session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")
(logits,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})  # int64 [N, T]"""

ONNX_PARTS = """`embedding.onnx`, `block-NNNNN.onnx` and `head.onnx` are the same model in parts, each of which takes
`attention_mask` beside `input_ids` or `hidden_states`. By default onnxruntime rounds activations to int8 where it
multiplies by packed weights; the session option `session.qdq_matmulnbits_accuracy_level`, set to `1`, keeps them in
float32."""


def model_card(manifest: dict, spec: QuantSpec, kind: str, activation_bits: int, scale_change: float) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        manifest: of the run.
        kind: the format, as `shardq export` names it.
        scale_change: largest relative change of a scale by its rounding after codes were made.
    """
    head = yaml.safe_dump({"library_name": "transformers", "tags": ["shardq", kind]}, sort_keys=False)
    options = {name: value for name, value in manifest["options"].items() if value is not None}
    return f"""---
{head}---

# {_scheme(spec, activation_bits)}

Quantized by shardq {manifest["shardq"]}, weights of the decoder's linears alone. {_exactness(scale_change)}

## Serve it

{_how_to_serve(spec, kind)}

## How it was made

The options of `launch/quantize.py`, as a recipe for `--config`, beside `--model`:

```yaml
{yaml.safe_dump(options, sort_keys=True)}```
{_tuning(manifest)}
SHA-256 of the source's config.json: `{manifest["model"]["config"]}`; of samples of its weights:
`{manifest["model"]["weights"]}`; of the calibration tokens: `{manifest["calibration_tokens"]}`.
"""


def _tuning(manifest: dict) -> str:
    """What was done to the scales afterwards, if anything was."""
    if "tuned" not in manifest:
        return ""
    options = yaml.safe_dump({"tune": manifest["tuned"]["options"]}, sort_keys=True)
    return f"\nScales were then tuned end to end by `launch/tune.py`, codes stayed:\n\n```yaml\n{options}```\n"


def _scheme(spec: QuantSpec, activation_bits: int) -> str:
    grid = "symmetric" if spec.symmetric else "asymmetric"
    per = f"in groups of {spec.group_size}" if spec.group_size else "per-channel"
    return f"W{spec.bits}A{activation_bits}, {grid}, {per}"


def _exactness(scale_change: float) -> str:
    if scale_change:
        return f"Scales were rounded after codes were made: weights differ from the run's by up to {scale_change:.2%}."
    return "Codes and scales are those that the run measured."


def _how_to_serve(spec: QuantSpec, kind: str) -> str:
    if kind == "hf":
        return f"The weights are plain:\n\n```python\n{LOAD_PLAIN}\n```"
    if kind == "aimet":
        return f"{USE_ENCODINGS}\n\n```python\n{LOAD_ENCODINGS}\n```"
    if kind == "onnx":
        return f"With onnxruntime; no cache of keys and values:\n\n```python\n{LOAD_ONNX}\n```\n\n{ONNX_PARTS}"
    if kind == "gguf":
        return (
            "```bash\nllama-cli -m path/to/this/folder/model.gguf\n```\n\n"
            f"or in transformers, which unpacks it:\n\n```python\n{LOAD_GGUF}\n```"
        )
    load, package = LOAD_PLAIN, "gptqmodel optimum"
    if kind == "compressed-tensors":
        load, package = LOAD_PLAIN if spec.symmetric else LOAD_ASYMMETRIC, "compressed-tensors"
    in_transformers = f"with `pip install {package}`, in transformers:\n\n```python\n{load}\n```"
    if kind == "gptq" and not gptq.is_served_by_vllm(spec):
        return f"W{in_transformers[1:]}"
    return f"```bash\nvllm serve path/to/this/folder\n```\n\nor, {in_transformers}"
