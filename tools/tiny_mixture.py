"""Train a tiny real mixture of experts on a text file, in minutes on two cores, to compare ways of quantizing it.

python tools/tiny_mixture.py FOLDER --text calib.txt

The folder loads with transformers: a Qwen3-MoE of 8 experts, 2 of them for each token, and a byte-level BPE tokenizer.
The text that the model is trained on is also its calibration text; measure on another.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 1024
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
    norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.003, max_position_embeddings=1024,
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def main() -> None:
    """Train and save; print the loss on the way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = make_tokenizer(args.text)
    tokens_X = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    model = Qwen3MoeForCausalLM(CONFIG)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {len(tokens_X)} tokens")
    seconds = train(model, tokens_X, args)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(json.dumps({"folder": str(args.folder), "steps": args.steps, "seconds": round(seconds)}))


def make_tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a text."""
    trained = ByteLevelBPETokenizer()
    trained.train([str(text)], vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def train(model: Qwen3MoeForCausalLM, tokens_X: Tensor, args: argparse.Namespace) -> float:
    """Train on random pieces of a text; the seconds that it takes."""
    begun = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.05)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(tokens_X) - args.length, (args.batch,))
        batch_NT = torch.stack([tokens_X[start : start + args.length] for start in starts])
        loss = model(input_ids=batch_NT, labels=batch_NT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
