"""A tokenizer as GGUF's metadata: byte-level BPE from tokenizer.json, or sentencepiece from tokenizer.model.

llama.cpp splits text before BPE by one of its own rules, which `tokenizer.ggml.pre` names; a tokenizer whose rule has
no name here is refused, since another rule would give other tokens. (ggml's GGUF specification, "Tokenizer"; llama.cpp,
`llama-vocab.cpp`.)
"""

import json
from pathlib import Path

import gguf
from gguf import TokenType
from sentencepiece import SentencePieceProcessor

from shardq.errors import UnsupportedModelError

Token = tuple[str | bytes, float, TokenType]
ADDED_SCORE = -1000.0  # as llama.cpp's own converter gives
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary_size: int) -> None:
    """Add a checkpoint's tokenizer, filled up to the rows of the embedding.

    Raises:
        UnsupportedModelError: there is none, it has tokens beyond the rows, or llama.cpp would split text otherwise.
    """
    if (folder / "tokenizer.model").is_file():
        kind, split, tokens = "llama", "default", _sentencepiece_tokens(folder)
    elif (folder / "tokenizer.json").is_file():
        content = _json(folder / "tokenizer.json")
        kind, split, tokens = "gpt2", _split_rule(folder, content), _bpe_tokens(content)
    else:
        raise UnsupportedModelError(f"{folder}: GGUF needs tokenizer.json or tokenizer.model; export hf instead")
    if len(tokens) > vocabulary_size:
        raise UnsupportedModelError(
            f"{folder}: its tokenizer has {len(tokens)} tokens, the embedding {vocabulary_size} rows, and llama.cpp "
            "loads no token without a row; take those beyond out of the tokenizer's files, or export hf instead"
        )
    if kind == "llama":
        writer.add_token_scores([score for _, score, _ in tokens] + [-10000.0] * (vocabulary_size - len(tokens)))
    missing = range(len(tokens), vocabulary_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    texts: list = [text for text, _, _ in tokens]  # of bytes or of str
    writer.add_token_list(texts + [f"[PAD{number}]" for number in missing])
    writer.add_token_types([role for _, _, role in tokens] + [TokenType.UNUSED for _ in missing])
    gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocabulary_size).add_to_gguf(writer, quiet=True)


def _sentencepiece_tokens(folder: Path) -> list[Token]:
    """The model's pieces and the tokens that were added to them, as llama.cpp's own converter takes them."""
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    numbers = range(model.vocab_size())
    if any(not model.GetScore(number).is_integer() for number in numbers):  # a BPE model's are ranks
        raise UnsupportedModelError(
            f"{folder / 'tokenizer.model'}: a unigram model, which llama.cpp does not run for Llama; export hf instead"
        )
    kinds = {model.IsUnknown: TokenType.UNKNOWN, model.IsControl: TokenType.CONTROL, model.IsUnused: TokenType.UNUSED,
             model.IsByte: TokenType.BYTE}  # fmt: skip
    tokens = {}
    for number in numbers:
        role = next((role for is_kind, role in kinds.items() if is_kind(number)), TokenType.NORMAL)
        tokens[number] = (model.IdToPiece(number).encode(), model.GetScore(number), role)
    for number, (text, is_special) in _added_tokens(folder).items():
        role = tokens.get(number, ("", 0.0, TokenType.NORMAL))[2]
        if role in (TokenType.NORMAL, TokenType.UNUSED):
            role = TokenType.CONTROL if is_special else TokenType.USER_DEFINED
        tokens[number] = ((text if is_special else text.replace("\u2581", " ")).encode(), ADDED_SCORE, role)
    gaps = {number: (f"[PAD{number}]".encode(), -10000.0, TokenType.UNUSED) for number in range(max(tokens))}
    return [token for _, token in sorted((gaps | tokens).items())]


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Text of each token that was added to a sentencepiece model, and whether it is special, by its number."""
    config, beside = _json(folder / "tokenizer_config.json"), _json(folder / "special_tokens_map.json")
    named = [value for content in (config, beside) for name, value in content.items() if name.endswith("_token")]
    named += [value for content in (config, beside) for value in content.get("additional_special_tokens", [])]
    special = {value["content"] if isinstance(value, dict) else value for value in named}
    added = {number: (text, text in special) for text, number in _json(folder / "added_tokens.json").items()}
    described = {int(number): about for number, about in config.get("added_tokens_decoder", {}).items()}
    described |= {about["id"]: about for about in _json(folder / "tokenizer.json").get("added_tokens", [])}
    return added | {
        number: (about["content"], about["special"] or about["content"] in special)
        for number, about in described.items()
    }


def _json(path: Path) -> dict:
    """An object; empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _bpe_tokens(content: dict) -> list[Token]:
    roles = {token: TokenType.NORMAL for token in content["model"]["vocab"]}
    numbers = dict(content["model"]["vocab"])
    for added in content["added_tokens"]:
        numbers[added["content"]] = added["id"]
        roles[added["content"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    by_number = {number: token for token, number in numbers.items()}
    gaps = {number: f"[PAD{number}]" for number in range(max(by_number)) if number not in by_number}
    roles |= {token: TokenType.UNUSED for token in gaps.values()}
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
