"""Do aimet_torch's quantizers, loaded from a run's encodings, give the run's own codes? Every version, every linear.

    python tools/aimet_check.py --run runs/mine --aimet AIMET/bin/python

AIMET/bin/python is the interpreter of an environment of its own (`pip install torch==2.14.1 torchvision==0.29.1
aimet-torch==2.42.0 transformers==5.7.0 safetensors`). Each version is exported and given to `load_encodings` of a
QuantizationSimModel of the run's checkpoint in float32. Prints one JSON line: by version the error with which it is
refused, or how many codes and weights, and logits of 32 tokens, differ from the run's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
AS_AIMET = "--as-aimet"  # how this program calls itself under the other interpreter
NUM_TOKENS = 32


def main() -> None:
    """Export the versions, ask AIMET, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="output folder of a finished run")
    parser.add_argument("--aimet", required=True, help="Python interpreter of the environment that has aimet-torch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = dict(exported(options.run, Path(folder)))
        asked = {"run": str(options.run), "files": files} | write_codes(options.run, Path(folder))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [options.aimet, __file__, AS_AIMET, json.dumps(asked)]
        answered = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if answered.returncode:
            sys.exit(f"{options.run}: AIMET cannot simulate it; its own message is above")
        print(answered.stdout.strip().splitlines()[-1], flush=True)


def exported(run: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Versions, and the file of the whole model in each."""
    for version in VERSIONS:
        command = [sys.executable, ROOT / "launch" / "export.py", run, "--format", "aimet", "--aimet.version", version,
                   "--output", folder / version]  # fmt: skip
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(f"{run}: version {version} cannot be exported")
        yield version, str(next((folder / version).glob("*.encodings")))


def write_codes(run: Path, folder: Path) -> dict:
    """The run's codes, counted from 0 on a grid of positive scales, in one file; bits and group size."""
    sys.path.insert(0, str(ROOT))
    from safetensors.torch import save_file

    from shardq.formats.block_file import read_block

    linears = {}
    for path in sorted((run / "blocks").glob("*.safetensors")):
        linears |= {name: linear.with_positive_scales() for name, linear in read_block(path).items()}
    grid = next(iter(linears.values())).grid
    save_file({name: linear.codes_OI.short() - grid.qmin for name, linear in linears.items()}, folder / "codes")
    return {"codes": str(folder / "codes"), "bits": grid.bits, "group_size": grid.group_size}


def ask_aimet(asked: dict) -> dict:
    """Under AIMET's interpreter: what it makes of each file."""
    import aimet_torch
    import torch

    answer = {"aimet": aimet_torch.__version__, "torch": torch.__version__}
    for version, path in asked["files"].items():
        try:
            answer[version] = compare(path, asked)
        except (AttributeError, RuntimeError, KeyError, TypeError) as error:  # how it refuses a layout
            answer[version] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip(": ")
    return answer


def compare(path: str, asked: dict) -> dict:
    """What the quantizers that are loaded from one file make of the run's weights, beside its codes."""
    import torch
    from aimet_torch.quantsim.config_utils import set_blockwise_quantization_for_weights
    from safetensors.torch import load_file

    sys.path.insert(0, str(ROOT / "tools" / "bench" / "peers"))
    from aimet_adascale import simulate

    ids_BT = torch.arange(NUM_TOKENS).unsqueeze(0)
    sim, linears = simulate(Path(asked["run"]), ids_BT, asked["bits"])
    if asked["group_size"]:
        set_blockwise_quantization_for_weights(sim, list(linears.values()), asked["bits"], True, asked["group_size"])
    for module in sim.model.modules():
        if hasattr(module, "param_quantizers"):
            module.input_quantizers = torch.nn.ModuleList([None] * len(module.input_quantizers))
            module.output_quantizers = torch.nn.ModuleList([None] * len(module.output_quantizers))
    with torch.inference_mode():
        encodings = json.loads(Path(path).read_text())
        if isinstance(encodings.get("param_encodings"), dict):  # `simulate` puts the model into another
            weights = {f"causal_lm.{name}": item for name, item in encodings["param_encodings"].items()}
            encodings |= {"param_encodings": weights}
        sim.load_encodings(encodings, partial=False)
        codes, found = load_file(asked["codes"]), {"linears": 0, "codes_differing": 0, "weights_differing": 0}
        quantized_logits = sim.model(ids_BT)
        for name, linear in linears.items():
            quantized = linear.param_quantizers["weight"](linear.weight)
            counted = quantized.quantize().quantized_repr().short()
            counted -= int(linear.param_quantizers["weight"].qmin)
            found["linears"] += 1
            found["codes_differing"] += int((counted != codes[name]).sum())
            found["weights_differing"] += int((quantized != linear.weight).sum())
            linear.param_quantizers["weight"] = None
        found["largest_logit_difference"] = (sim.model(ids_BT) - quantized_logits).abs().max().item()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == [AS_AIMET]:
        print(json.dumps(ask_aimet(json.loads(sys.argv[2]))))
    else:
        main()
