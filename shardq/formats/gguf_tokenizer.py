"""A tokenizer as GGUF's metadata: byte-level BPE from tokenizer.json, or sentencepiece from tokenizer.model.

llama.cpp splits text before BPE by one of its own rules, which `tokenizer.ggml.pre` names; a tokenizer whose rule has
no name here is refused, since another rule would give other tokens. (ggml's GGUF specification, "Tokenizer"; llama.cpp,
`llama-vocab.cpp`.)
"""

import json
from pathlib import Path

import gguf

from shardq.errors import UnsupportedModelError

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary_size: int) -> None:
    """Add a checkpoint's tokenizer, filled up to the rows of the embedding.

    Raises:
        UnsupportedModelError: there is none, or llama.cpp would not split text as it does.
    """
    if (folder / "tokenizer.model").is_file():
        kind, split, tokens = "llama", "default", _sentencepiece_tokens(folder)
        writer.add_token_scores([score for _, score, _ in tokens] + [-10000.0] * (vocabulary_size - len(tokens)))
    elif (folder / "tokenizer.json").is_file():
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        kind, split, tokens = "gpt2", _split_rule(folder, content), _bpe_tokens(content)
    else:
        raise UnsupportedModelError(f"{folder}: GGUF needs tokenizer.json or tokenizer.model; export hf instead")
    missing = range(len(tokens), vocabulary_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list([text for text, _, _ in tokens] + [f"[PAD{number}]" for number in missing])
    writer.add_token_types([role for _, _, role in tokens] + [gguf.TokenType.UNUSED for _ in missing])
    gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocabulary_size).add_to_gguf(writer, quiet=True)


def _sentencepiece_tokens(folder: Path) -> list[tuple[bytes, float, gguf.TokenType]]:
    tokens = list(gguf.SentencePieceVocab(folder).all_tokens())
    if any(not score.is_integer() for _, score, _ in tokens):  # a BPE model's are ranks
        raise UnsupportedModelError(
            f"{folder / 'tokenizer.model'}: a unigram model, which llama.cpp does not run for Llama; export hf instead"
        )
    return tokens


def _bpe_tokens(content: dict) -> list[tuple[str, float, gguf.TokenType]]:
    roles = {token: gguf.TokenType.NORMAL for token in content["model"]["vocab"]}
    numbers = dict(content["model"]["vocab"])
    for added in content["added_tokens"]:
        numbers[added["content"]] = added["id"]
        roles[added["content"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    by_number = {number: token for token, number in numbers.items()}
    gaps = {number: f"[PAD{number}]" for number in range(max(by_number)) if number not in by_number}
    roles |= {token: gguf.TokenType.UNUSED for token in gaps.values()}
    return [(token, 0.0, roles[token]) for _, token in sorted((by_number | gaps).items())]


def _split_rule(folder: Path, content: dict) -> str:
    """llama.cpp's name for how a tokenizer splits text before BPE."""
    step = content["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    kinds = [part.get("type") for part in steps]
    last = steps[-1]
    is_plain = content["normalizer"] is None and not last.get("add_prefix_space")
    if content["model"]["type"] == "BPE" and is_plain:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and last["use_regex"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == LLAMA3_SPLIT:
            return "llama-bpe"
    raise UnsupportedModelError(
        f"{folder}: no name is known for how its tokenizer ({content['model']['type']}, {', '.join(map(str, kinds))}) "
        "splits text, by which llama.cpp would do the same; export hf instead"
    )
