"""Text to token ids, with the tokenizer that lies in the model's folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from shardq.errors import CalibrationError

Tokenize = Callable[[str], list[int]]
TRANSFORMERS_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SENTENCEPIECE_FILE, ADDED_FILE, CONFIG_FILE = "tokenizer.model", "added_tokens.json", "tokenizer_config.json"
AHEAD = "\ue000"  # for private use: no piece has it, so what stands behind it is cut into pieces by itself


def load_tokenizer(folder: Path) -> Tokenize:
    """Function from a text to its token ids, without special tokens.

    transformers reads `tokenizer.json`; a `tokenizer.model` without one, as Llama 2 ships it, goes to sentencepiece,
    and tokens that files beside it add are one id each, as in transformers.

    Raises:
        CalibrationError: no tokenizer in the folder, or one that cannot be read.
    """
    try:
        if (folder / SENTENCEPIECE_FILE).is_file() and not (folder / "tokenizer.json").is_file():
            return _sentencepiece(folder)
        if any((folder / name).is_file() for name in TRANSFORMERS_FILES):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # Whole articles are longer than the model's context; they are cut afterwards, so no warning is due.
            return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise CalibrationError(
            f"{folder}: its tokenizer cannot be read ({str(error).strip().splitlines()[0]}); copy it there again"
        ) from error
    raise CalibrationError(
        f"{folder}: no tokenizer ({', '.join(TRANSFORMERS_FILES)} or {SENTENCEPIECE_FILE}); "
        "copy the model's tokenizer files there, or pass token ids as a .safetensors file"
    )


def _sentencepiece(folder: Path) -> Tokenize:
    """A lone sentencepiece model with the tokens added to it; behind one of those no word begins, but for `legacy`."""
    start = SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE)).encode
    config = _read_object(folder / CONFIG_FILE)
    added = {text: {"id": int(number)} for text, number in _read_object(folder / ADDED_FILE).items() if text}
    added |= {
        token["content"]: token | {"id": int(number)}
        for number, token in config.get("added_tokens_decoder", {}).items()
        if token["content"]
    }
    if not added:
        return start
    num_ahead = len(start(AHEAD))

    def inner(text: str) -> list[int]:
        begins_word = config.get("legacy") and not text.startswith(" ")
        return start(text) if begins_word else start(AHEAD + text)[num_ahead:]

    longest_first = sorted(added, key=len, reverse=True)
    pattern = re.compile("|".join(_pattern_of(text, added[text]) for text in longest_first))
    ids_of_tokens = [added[text]["id"] for text in longest_first]

    def tokenize(text: str) -> list[int]:
        ids, end = [], 0
        for found in pattern.finditer(text):
            ids += (inner if end else start)(text[end : found.start()])
            ids.append(ids_of_tokens[found.lastindex - 1])
            end = found.end()
        return ids + (inner if end else start)(text[end:])

    return tokenize


def _pattern_of(text: str, token: dict) -> str:
    """Pattern with one group; an added token may take the blanks beside it along, or stand as a word alone."""
    edge = (r"(?<!\w)", r"(?!\w)") if token.get("single_word") else ("", "")
    before, behind = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
    return f"{before}{edge[0]}({re.escape(text)}){edge[1]}{behind}"


def _read_object(path: Path) -> dict:
    """A JSON object, empty where there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
