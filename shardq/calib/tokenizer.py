"""Text to token ids, with the tokenizer in the model's folder."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jinja2 import TemplateError
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from shardq.errors import CalibrationError

Chat = list[dict[str, str]]
Encode = Callable[[str], list[int]]

TRANSFORMERS_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SENTENCEPIECE_FILE, ADDED_FILE, CONFIG_FILE = "tokenizer.model", "added_tokens.json", "tokenizer_config.json"
AHEAD = "\ue000"  # a private-use character: no piece contains it, so the text after it is split independently


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A model's tokenizer and its chat template.

    Attributes:
        encode: from a text to its token ids, without special tokens.
        prefix: the special tokens that the tokenizer puts in front of a text.
        render: from a conversation to its text, by the chat template; None: there is no template.
    """

    folder: Path
    encode: Encode
    prefix: list[int] = field(default_factory=list)
    render: Callable[[Chat], str] | None = None

    def written(self, chat: Chat, where: str) -> str:
        """A conversation as text.

        Raises:
            CalibrationError: there is no chat template, or it refuses the conversation at `where`.
        """
        if self.render is None:
            raise CalibrationError(
                f"{where} holds a conversation, and the tokenizer in {self.folder} has no chat template; "
                "pass texts, or a folder with the chat template"
            )
        try:
            return self.render(chat)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CalibrationError(
                f"{where}: the model's chat template refuses it ({reason}); remove that row"
            ) from error


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder.

    transformers reads `tokenizer.json`; a `tokenizer.model` without one, as Llama 2 ships it, goes to sentencepiece,
    and tokens that files beside it add are one id each, as in transformers.

    Raises:
        CalibrationError: no tokenizer in the folder, or one that cannot be read.
    """
    try:
        if (folder / SENTENCEPIECE_FILE).is_file() and not (folder / "tokenizer.json").is_file():
            return _sentencepiece(folder)
        if any((folder / name).is_file() for name in TRANSFORMERS_FILES):
            return _transformers(folder)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise CalibrationError(
            f"{folder}: its tokenizer cannot be read ({str(error).strip().splitlines()[0]}); copy it there again"
        ) from error
    raise CalibrationError(
        f"{folder}: no tokenizer ({', '.join(TRANSFORMERS_FILES)} or {SENTENCEPIECE_FILE}); "
        "copy the model's tokenizer files there, or pass token ids as a .safetensors file"
    )


def _transformers(folder: Path) -> Tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        # Texts may be longer than the model's context: they are cut afterwards, so no warning is needed.
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    marked = tokenizer("a", return_special_tokens_mask=True)
    num_ahead = [*marked["special_tokens_mask"], 0].index(0)
    return Tokenizer(
        folder=folder,
        encode=encode,
        prefix=marked["input_ids"][:num_ahead],
        render=partial(tokenizer.apply_chat_template, tokenize=False) if tokenizer.chat_template else None,
    )


def _sentencepiece(folder: Path) -> Tokenizer:
    library = SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))
    config = _read_object(folder / CONFIG_FILE)
    prefix = [library.bos_id()] if config.get("add_bos_token") else []
    return Tokenizer(folder=folder, encode=_with_added(library.encode, folder, config), prefix=prefix)


def _with_added(start: Encode, folder: Path, config: dict) -> Encode:
    """A sentencepiece model with its added tokens; except with `legacy`, no word begins after an added token."""
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
    """Pattern with one group; an added token may include the blanks around it, or match only as a whole word."""
    edge = (r"(?<!\w)", r"(?!\w)") if token.get("single_word") else ("", "")
    before, behind = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
    return f"{before}{edge[0]}({re.escape(text)}){edge[1]}{behind}"


def _read_object(path: Path) -> dict:
    """A JSON object, empty where there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
