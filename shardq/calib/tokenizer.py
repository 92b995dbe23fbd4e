"""Text to token ids, with the tokenizer that lies in the model's folder."""

from collections.abc import Callable
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from shardq.errors import CalibrationError

Tokenize = Callable[[str], list[int]]
TRANSFORMERS_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SENTENCEPIECE_FILE = "tokenizer.model"


def load_tokenizer(folder: Path) -> Tokenize:
    """Function from a text to its token ids, without special tokens.

    transformers reads `tokenizer.json`; a `tokenizer.model` without one, as Llama 2 ships it, goes to sentencepiece.

    Raises:
        CalibrationError: no tokenizer in the folder, or one that cannot be read.
    """
    try:
        if (folder / SENTENCEPIECE_FILE).is_file() and not (folder / "tokenizer.json").is_file():
            return SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE)).encode
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
