"""Text to ids with the tokenizer in the model's folder: transformers' files, or a lone sentencepiece model."""

import io
import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from shardq.calib.tokenizer import load_tokenizer
from shardq.errors import CalibrationError

TEXTS = ["the quick brown fox", "a lazy dog sleeps", "the dog and the fox run", "quick quick quick"] * 10
UNSEEN = ["the fox sleeps", "a quick dog and a lazy fox\nrun", "zebra", ""]


@pytest.fixture(name="library_tokenizer")
def _library_tokenizer() -> Tokenizer:
    """A byte-pair tokenizer that puts special tokens around every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def sentencepiece_model(model_type: str, vocab_size: int = 40, **options: object) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type=model_type, vocab_size=vocab_size,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


def message_of(folder: Path) -> str:
    with pytest.raises(CalibrationError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)
    return str(caught.value)


CONFIGS = {
    "alone": {},
    "with config": {"tokenizer_config.json": "{}"},
    "with class": {"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
    "of a model": {"config.json": '{"model_type": "llama"}'},
}


@pytest.mark.parametrize("companions", CONFIGS.values(), ids=CONFIGS)
def test_ids_are_the_librarys_without_special_tokens(tmp_path, library_tokenizer, companions: dict[str, str]):
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name, content in companions.items():
        (tmp_path / name).write_text(content)
    tokenize = load_tokenizer(tmp_path).encode
    for text in TEXTS[:4] + UNSEEN:
        ids = tokenize(text)
        assert ids == library_tokenizer.encode(text, add_special_tokens=False).ids
        assert all(type(token) is int for token in ids)


def test_text_longer_than_the_models_context_is_kept_whole(tmp_path, library_tokenizer, caplog):
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 4}))
    text = " ".join(TEXTS)
    ids = load_tokenizer(tmp_path).encode(text)
    assert ids == library_tokenizer.encode(text, add_special_tokens=False).ids
    assert caplog.text == ""


def test_lone_sentencepiece_model_gives_the_ids_of_its_pieces(tmp_path):
    """A model of whole words, so that the pieces can be told without the library: `▁` and a word."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("word"))
    library = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = {library.id_to_piece(number): number for number in range(library.get_piece_size())}
    tokenize = load_tokenizer(tmp_path).encode
    for text in TEXTS[:4]:
        assert tokenize(text) == [ids[f"▁{word}"] for word in text.split()]
    assert tokenize("the zebra") == [ids["▁the"], ids["<unk>"]]


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_lone_sentencepiece_model_gives_the_librarys_ids(tmp_path, model_type: str):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(model_type))
    library = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenize = load_tokenizer(tmp_path).encode
    for text in TEXTS[:4]:
        ids = tokenize(text)
        assert library.decode(ids) == text
        assert [library.id_to_piece(token) for token in ids] == library.encode(text, out_type=str)
        assert not {library.bos_id(), library.eos_id()} & set(ids)


def test_transformers_tokenizer_goes_before_the_sentencepiece_model(tmp_path, library_tokenizer):
    """Many models ship both; they are meant to agree, and transformers knows the added tokens."""
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    expected = library_tokenizer.encode(TEXTS[0], add_special_tokens=False).ids
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == expected


def test_folder_without_tokenizer_names_the_files_it_looked_for(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    message = message_of(tmp_path)
    assert "tokenizer.json" in message and "tokenizer.model" in message


DAMAGED_JSON = {"no JSON": "garbage", "empty": "", "cut off": '{"version": "1.0", "added', "no tokenizer": "{}"}


@pytest.mark.parametrize("content", DAMAGED_JSON.values(), ids=DAMAGED_JSON)
def test_damaged_tokenizer_is_one_line(tmp_path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    assert "cannot be read" in message_of(tmp_path)


def test_damaged_tokenizer_config_is_one_line(tmp_path, library_tokenizer):
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("garbage")
    assert "cannot be read" in message_of(tmp_path)


def test_code_in_the_folder_is_neither_run_nor_asked_about(tmp_path, capsys):
    """transformers would ask on the terminal, and ranks would wait for an answer."""
    config = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('the code was run')")
    assert "cannot be read" in message_of(tmp_path)
    assert capsys.readouterr().out == ""


def test_config_without_a_tokenizer_is_one_line(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "cannot be read" in message_of(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 0.5], ids=["empty", "seven bytes", "half"])
def test_damaged_sentencepiece_model_is_one_line(tmp_path, kept: float):
    model = sentencepiece_model("bpe")
    (tmp_path / "tokenizer.model").write_bytes(model[: int(kept if kept != 0.5 else len(model) / 2)])
    assert "cannot be read" in message_of(tmp_path)


def test_sentencepiece_model_with_a_config_beside_it_is_read_as_llama_2_ships_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    library = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenize = load_tokenizer(tmp_path).encode
    assert [tokenize(text) for text in UNSEEN] == [library.encode(text) for text in UNSEEN]


LLAMA_2 = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
IN_JSON = {"added_tokens.json": {"<|im_start|>": 330, "<|im_end|>": 331, "<|im|>": 332}}
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def in_config(**flags: bool) -> dict[str, dict]:
    tokens = {str(number): {"content": text} | FLAGS | flags for text, number in IN_JSON["added_tokens.json"].items()}
    return {"tokenizer_config.json": {"added_tokens_decoder": tokens}}


def test_prefix_is_what_the_library_puts_in_front_of_a_text(tmp_path, library_tokenizer):
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).prefix == [1]
    library_tokenizer.post_processor = None
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).prefix == []


@pytest.mark.parametrize("adds", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_prefix_of_a_lone_sentencepiece_model_is_transformers(tmp_path, adds: dict[str, bool]):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe", 330, **LLAMA_2))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | adds))
    reference, own = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert reference("the dog")["input_ids"][: len(own.prefix) + 2] == own.prefix + own.encode("the dog")
    assert len(own.prefix) == len(adds) - adds.get("add_eos_token", 0)


TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<s>{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
)


def test_conversations_are_written_by_the_models_chat_template(tmp_path, library_tokenizer):
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokenizer = load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "runs"}]
    assert tokenizer.written(chat, "a.jsonl: row 1") == "<s>user: the dog\n<s>assistant: runs\n"
    with pytest.raises(CalibrationError, match="a.jsonl: row 2: the model's chat template refuses it .no system."):
        tokenizer.written([{"role": "system", "content": "x"}], "a.jsonl: row 2")


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize(
    "files",
    [IN_JSON, in_config(), in_config(lstrip=True, rstrip=True), in_config(single_word=True), IN_JSON | in_config()],
    ids=["json", "config", "strips", "words", "both"],
)
def test_added_tokens_beside_a_lone_sentencepiece_model_are_transformers_ids(tmp_path, files, legacy):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe", 330, **LLAMA_2))
    config = {"tokenizer_class": "LlamaTokenizer"} | ({} if legacy is None else {"legacy": legacy})
    for name, content in ({"tokenizer_config.json": {}} | files).items():
        own = content | config if name == "tokenizer_config.json" else content
        (tmp_path / name).write_text(json.dumps(own))
    reference, tokenize = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path).encode
    marked = ["<|im_start|>the dog<|im_end|>\nfox", "a<|im_start|>", "dog <|im_start|>  the <|im|>", "<|im_end|>",
              "x<|im_start|><|im_end|>y", "<|im_start", "two  spaces"]  # fmt: skip
    for text in UNSEEN + marked:
        assert tokenize(text) == reference(text, add_special_tokens=False)["input_ids"], text
    assert tokenize("<|im_start|>") == [330]


@pytest.mark.parametrize(
    "content", ["garbage", "[]", '{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": 3}']
)
def test_damaged_file_of_added_tokens_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    if content != "[]":
        assert "cannot be read" in message_of(tmp_path)
    else:
        load_tokenizer(tmp_path)


def test_tokenizer_config_that_is_no_object_is_one_line(tmp_path, library_tokenizer):
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert "cannot be read" in message_of(tmp_path)
