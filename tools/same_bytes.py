#!/usr/bin/env python
"""Shows that a change of the code changes no byte of what runs leave: the digest of every file of a set of small runs.

    tools/same_bytes.py before.json                       # on the commit before
    tools/same_bytes.py after.json --against before.json  # on the commit after; exits with 1 where a file differs

The package is the first one on PYTHONPATH: this file also runs on another checkout, by its command line alone. Runs are
forks of this process, which has imported everything, one thread a rank; logs of times (events*.jsonl) are left out.
Digests of two machines, or of two versions of torch, may differ.
"""

import argparse
import importlib
import json
import os
import pkgutil
import shutil
import signal
import socket
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read as torch is imported

import torch  # noqa: E402
import xxhash  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import shardq  # noqa: E402
from shardq.cli import run_command  # noqa: E402
from shardq.rundir.folder import RunFolder  # noqa: E402

sys.path.insert(0, str(Path(shardq.__file__).parents[1] / "tests"))
import forked  # noqa: E402
import tiny  # noqa: E402  the package's own

SECONDS = 300  # that one rank may take
# That commands import where they need them.
LIBRARIES = ("deepspeed", "datasets", "gguf", "onnxscript", "torch.onnx._internal.exporter._core")

# What every command has, beside what its case says; of an option that is given twice, the later one counts.
FIXED = {
    "quantize": "--model ../llama --output run --calib.dataset ../tokens.safetensors --calib.samples 4 "
    "--calib.sequence_length 32 --optimize.batch_size 2 --optimize.iterations 4 --optimize.memory_gib 1 "
    "--optimize.compile off --optimize.precision float32 --quant.group_size -1 --export.checkpoint plain",
    "tune": "run --model ../llama --output tuned --tune.steps 2 --tune.batch_size 2 --tune.precision float32",
    "export": "run",
    "evaluate": "--model run --eval.dataset ../tokens.safetensors --eval.sequence_length 32",
}
AIMET = ("export --format aimet --output aimet0 --aimet.version 0.6.1", "export --format aimet --output aimet1",
         "export --format aimet --output aimet2 --aimet.version 2.0.0",
         "export --format aimet --output aimet3 --aimet.version 2.1.0")  # fmt: skip
GEMMA = "quantize --model ../gemma --calib.dataset ../gemma.safetensors"
RTN = "quantize --quant.method rtn"
# By name, the commands that run one after another in a folder of the case's own. Two words may stand before one: `2`,
# the number of ranks; and `stopped`, where the run is asked to stop after its first block.
CASES: dict[str, tuple[str, ...]] = {
    "channel": ("quantize", "export --format hf", "export", "export --format gptq", "export --format onnx",
                "export --format gguf", *AIMET, "tune", "evaluate"),
    "group16": ("quantize --quant.group_size 16", "export --format hf --dtype source", *AIMET[1:], "tune"),
    "group32": (RTN + " --quant.group_size 32", "export", "export --format gptq", "export --format gguf"),
    "asymmetric": ("quantize --quant.symmetric false --quant.group_size 32", "export", "export --format gptq",
                   "export --format onnx", "export --format gguf", *AIMET[1:], "tune"),
    "lpbq": ("quantize --quant.group_size 16 --quant.decompressed_bits 8", *AIMET[1:], "tune"),
    "3bits": ("quantize --quant.bits 3 --quant.group_size 32", "export --format hf", "export --format gguf", AIMET[1]),
    "8bits": ("quantize --quant.bits 8", "export --activation_bits 8", "export --format gptq", "export --format gguf",
              *AIMET),
    "positive-scales": ("quantize --quant.full_range false", "export", *AIMET),
    "for-vllm": ("quantize --target vllm --export.formats compressed-tensors,gptq,hf",),
    "for-gguf": ("quantize --target gguf --quant.group_size 32 --export.formats gguf",),
    "some-kept": ("quantize --quant.ignore *.down_proj,re:.*[.]1[.].*q_proj --export.formats compressed-tensors,gptq",),
    "as-aimet": ("quantize --optimize.preset aimet --export.formats aimet --export.dtype source",),
    "flexround": ("quantize --quant.method flexround --seed 1",),
    "lwc": ("quantize --quant.method lwc --optimize.optimizer adam --optimize.loss squared",),
    "bf16": ("quantize --optimize.optimizer adam --optimize.precision bf16",),
    "best-iterate": ("quantize --optimize.held_out 1 --optimize.last_block output",),
    "micro-batch": ("quantize --optimize.micro_batch 1 --optimize.fp_mix 0.5 --cache.placement cpu",),
    "text": ("quantize --calib.dataset ../texts.txt --calib.packing packed",),
    "inputs": ("quantize --activations.bits 8", "export --activation_bits 8", *AIMET, "tune",
               "evaluate --activations simulated"),
    "all": (RTN + " --activations.bits 12 --activations.tensors all --activations.kv_bits 6 "
            "--activations.symmetric false --activations.observer sqnr", *AIMET, "evaluate --activations simulated"),
    "kv": (RTN + " --activations.kv_bits 8 --activations.observer percentile", *AIMET[1:]),
    "tokens": (RTN + " --activations.bits 8 --activations.granularity token", "export --activation_bits 8"),
    "in-training": ("quantize --activations.bits 4 --activations.in_training true --activations.observer average",),
    "redo": ("quantize --export.formats hf", "quantize --export.formats hf --redo 1 --optimize.iterations 2"),
    "resume": ("stopped quantize --checkpoint.every_iterations 2 --optimize.iterations 20",
               "quantize --checkpoint.every_iterations 2 --optimize.iterations 20"),
    "gemma4": (GEMMA, "export", *AIMET[1:]),
    "gemma4-all": (f"{GEMMA} --activations.bits 8 --activations.tensors all --activations.kv_bits 8", *AIMET[:2]),
    "2-auto": ("2 quantize --export.formats compressed-tensors,hf,aimet", "2 tune", "2 evaluate"),
    "2-allreduce-bf16": ("2 quantize --parallel.engine allreduce --parallel.reduce_dtype bf16",),
    "2-rows": ("2 quantize --parallel.engine rows --quant.group_size 16 --activations.bits 8",),
    "2-rows-gemma4": (f"2 {GEMMA} --parallel.engine rows --activations.bits 8 --activations.in_training true",),
    "2-rows-lpbq": ("2 quantize --parallel.engine rows --quant.group_size 16 --quant.decompressed_bits 8",),
    "2-zero1": ("2 quantize --parallel.engine zero1 --optimize.held_out 1",),
    "2-zero2": ("2 quantize --parallel.engine zero2 --quant.group_size 16",),
    "2-zero2-offload": ("2 quantize --parallel.engine zero2 --parallel.offload true",),
    "2-zero3": ("2 quantize --parallel.engine zero3 --quant.symmetric false",),
    "2-resume": ("stopped 2 quantize --optimize.iterations 20", "2 quantize --optimize.iterations 20"),
    "compiled": ("quantize --optimize.compile on",),
}  # fmt: skip


def import_all() -> None:
    """Import what any command may need, so that its fork need not."""
    modules = [module.name for module in pkgutil.walk_packages(shardq.__path__, "shardq.")]
    for name in (*modules, *LIBRARIES):
        importlib.import_module(name)


def make_sources(folder: Path) -> None:
    """The float models, their tokens, a text, and a tokenizer that no order of training decides."""
    tiny.save_llama(folder / "llama")
    tiny.save_tokens(folder / "tokens.safetensors", length=32)
    tiny.save_model(folder / "gemma", tiny.GEMMA4)
    tiny.save_tokens(folder / "gemma.safetensors", length=32, vocab=tiny.GEMMA4.vocab_size)
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "llama" / "tokenizer.json"))
    (folder / "llama" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "texts.txt").write_text("the quick brown fox jumps over the lazy dog 12 times\n" * 8)


def fork_rank(verb: str, arguments: list[str], rank: int, num_ranks: int, port: int) -> int:
    """Run a command in a fork of this process, its output to the file `said-RANK`; gives its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(forked.environment_of(rank, num_ranks, port))
    said = os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.alarm(SECONDS)
    try:
        run_command(verb, arguments)
    except BaseException as error:
        os.write(said, repr(error).encode())
    os._exit(1)  # a command that comes to its end exits by itself


def run(command: str) -> None:
    """Run a command of a case in this folder.

    Raises:
        SystemExit: it does not end as it must.
    """
    words = command.split()
    stopped = words[0] == "stopped"
    words = words[stopped:]
    num_ranks = int(words.pop(0)) if words[0].isdigit() else 1
    verb, arguments = words[0], [*FIXED[words[0]].split(), *words[1:]]
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    pids = [fork_rank(verb, arguments, rank, num_ranks, port) for rank in range(num_ranks)]
    while stopped and not _has_a_line(RunFolder(Path("run")).ledger) and not _has_ended(pids[0]):
        time.sleep(0.002)
    if stopped:
        Path("run/stop").touch()
    failed = any([os.waitpid(pid, 0)[1] for pid in pids])
    said = "".join(Path(f"said-{rank}").read_text() for rank in range(num_ranks))
    if failed != stopped:
        sys.exit(f"{command}: {'came to its end' if stopped else 'failed'}\n{said}")
    if verb == "evaluate":
        summary = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
        Path("perplexity").write_text(repr(summary["perplexity"]))


def _has_a_line(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def digests_of(folder: Path) -> dict[str, str]:
    """The XXH3-128 digest of every file that a case left, by its path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in files if not path.match("events*.jsonl") and not path.match("said-*")]
    return {str(path.relative_to(folder)): xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in kept}


def is_asked_for(case: str, patterns: str) -> bool:
    """Whether a case's name matches one of some patterns, which commas separate."""
    return any(fnmatch(case, pattern) for pattern in patterns.split(","))


def digests_of_cases(patterns: str) -> dict[str, str]:
    """Run the cases that are asked for; gives the digest of every file by CASE/PATH."""
    digests: dict[str, str] = {}
    former = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sources(folder)
        try:
            for case, commands in CASES.items():
                if is_asked_for(case, patterns):
                    began = time.monotonic()
                    (folder / case).mkdir()
                    os.chdir(folder / case)  # no path of this machine is part of a command
                    for command in commands:
                        run(command)
                    digests |= {f"{case}/{path}": digest for path, digest in digests_of(folder / case).items()}
                    print(f"{case}: {time.monotonic() - began:.1f} s", flush=True)
                    shutil.rmtree(folder / case)
        finally:
            os.chdir(former)
    return digests


def differences(digests: dict[str, str], others: dict[str, str], patterns: str) -> list[str]:
    """What differs from other digests, a line a file, among the cases that are asked for."""
    lines = []
    for path in sorted(digests.keys() | others.keys()):
        if is_asked_for(path.split("/")[0], patterns) and digests.get(path) != others.get(path):
            lines.append(f"{path}: {'gone' if path not in digests else 'new' if path not in others else 'differs'}")
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file for the digests")
    parser.add_argument("--against", type=Path, help="digests to compare with")
    parser.add_argument("--only", default="*", help="patterns for the names of cases, such as group16,2-*")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    import_all()
    digests = digests_of_cases(options.only)
    options.output.write_text(json.dumps(digests, indent=1))
    print(f"{len(digests)} files, package {Path(shardq.__file__).parent}")
    if not options.against:
        return 0
    lines = differences(digests, json.loads(options.against.read_text()), options.only)
    print("\n".join(lines) or "every byte is the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
