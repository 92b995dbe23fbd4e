"""Texts and id files to token sequences, against ids counted by hand; every way to fail is one line."""

import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from shardq.calib.options import TextOptions
from shardq.calib.sets import parts_of
from shardq.calib.tokens import digest, load_tokens
from shardq.errors import CalibrationError, ConfigError

VOCABULARY = 50
NEWLINE_ID = 49


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory) -> Path:
    """A model folder whose tokenizer knows the words w0, w1, ... and the line break."""
    folder = tmp_path_factory.mktemp("model")
    words = {f"w{number}": number for number in range(NEWLINE_ID)} | {"\n": NEWLINE_ID}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def ids_of(text: str) -> list[int]:
    """What the model's tokenizer gives, by hand."""
    return [NEWLINE_ID if word == "\n" else int(word[1:]) for word in text.replace("\n", " \n ").split(" ") if word]


def cut(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def random_texts(num: int, num_words: int = 12) -> list[str]:
    lengths = torch.randint(1, num_words, (num,)).tolist()
    return [" ".join(f"w{word}" for word in torch.randint(NEWLINE_ID, (length,)).tolist()) for length in lengths]


def write_rows(path: Path, texts: list[str], column: str = "text") -> Path:
    """A file of rows, with another column beside the text."""
    rows = [{"id": number, column: text} for number, text in enumerate(texts)]
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def loaded(path: Path | str, model: Path, **options: object) -> list[list[int]]:
    options = {"samples": None, "sequence_length": 5} | options
    tokens = load_tokens(TextOptions(dataset=str(path), **options), model, VOCABULARY)
    assert tokens.dtype == torch.int64
    return tokens.tolist()


def message_of(path: Path | str, model: Path, **options: object) -> str:
    with pytest.raises(CalibrationError) as caught:
        loaded(path, model, **options)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


# Packing


@pytest.mark.parametrize("length", [2, 5, 16])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_packed_rows_are_joined_and_cut(tmp_path, model, suffix: str, length: int):
    texts = random_texts(40)
    path = write_rows(tmp_path / f"a{suffix}", texts)
    expected = cut(list(chain(*map(ids_of, texts))), length)
    assert loaded(path, model, sequence_length=length) == expected


@pytest.mark.parametrize("ending", ["", "\n", "\n\n\n"], ids=["no break", "break", "breaks"])
def test_packed_text_file_is_the_whole_text(tmp_path, model, ending: str):
    text = "w1 w2\nw3\n\n\nw4 w5 w6\n w7" + ending + "w8 w9" * (ending == "\n\n\n")
    (tmp_path / "a.txt").write_text(text)
    assert loaded(tmp_path / "a.txt", model, sequence_length=2) == cut(ids_of(text), 2)


def test_long_text_file_is_the_whole_text_across_its_pieces(tmp_path, model):
    """More than two pieces of a million characters: nothing may be lost or doubled where they meet."""
    text = "\n".join(line + " " * 1000 for line in random_texts(2300))  # blanks are no tokens
    assert len(text) > 2.2 * 2**20
    (tmp_path / "a.txt").write_text(text)
    assert loaded(tmp_path / "a.txt", model, sequence_length=10) == cut(ids_of(text), 10)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_long_enough_row_is_one_sequence_in_row_mode(tmp_path, model, suffix: str):
    texts = random_texts(40)
    path = write_rows(tmp_path / f"a{suffix}", texts)
    expected = [ids_of(text)[:5] for text in texts if len(ids_of(text)) >= 5]
    assert 0 < len(expected) < 40
    assert loaded(path, model, packing="row") == expected


def test_each_long_enough_line_is_one_sequence_in_row_mode(tmp_path, model):
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4 w5\nw6\n\nw7 w8 w9 w10 w11 w12\nw1 w1 w1 w1\nw2 w2 w2 w2 w2")
    assert loaded(tmp_path / "a.txt", model, packing="row") == [
        [1, 2, 3, 4, 5], [7, 8, 9, 10, 11], [2, 2, 2, 2, 2],
    ]  # fmt: skip


def test_column_is_the_one_that_is_named(tmp_path, model):
    path = write_rows(tmp_path / "a.jsonl", ["w1 w2", "w3 w4"], column="content")
    assert loaded(path, model, column="content", sequence_length=2) == [[1, 2], [3, 4]]


# Which sequences are taken


def save_ids(path: Path, ids: Tensor, **others: Tensor) -> Path:
    save_file({"tokens": ids} | others, path)
    return path


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_id_file_is_taken_as_it_is(tmp_path, model, dtype: torch.dtype):
    ids = torch.randint(VOCABULARY, (6, 5)).to(dtype)
    assert loaded(save_ids(tmp_path / "a.safetensors", ids), model) == ids.tolist()


def test_id_file_needs_no_tokenizer(tmp_path):
    ids = torch.randint(VOCABULARY, (6, 5))
    assert loaded(save_ids(tmp_path / "a.safetensors", ids), tmp_path / "nowhere") == ids.tolist()


def test_longer_ids_are_cut_to_the_sequence_length(tmp_path, model):
    ids = torch.randint(VOCABULARY, (6, 9))
    assert loaded(save_ids(tmp_path / "a.safetensors", ids), model) == ids[:, :5].tolist()


def test_ids_are_those_of_the_tensor_that_is_named(tmp_path, model):
    ids = torch.randint(VOCABULARY, (6, 5))
    path = save_ids(tmp_path / "a.safetensors", torch.zeros(6, 5, dtype=torch.long), test=ids)
    assert loaded(path, model, column="test") == ids.tolist()


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 9, 10])
def test_samples_are_spread_evenly_over_the_file(tmp_path, model, samples: int):
    path = save_ids(tmp_path / "a.safetensors", torch.arange(10)[:, None].expand(10, 5).contiguous())
    chosen = [row[0] for row in loaded(path, model, samples=samples)]
    assert len(chosen) == samples and chosen[0] == 0
    # Each of `samples` equal parts gives its first sequence.
    assert chosen == [min(n for n in range(10) if n + 1 > part * 10 / samples) for part in range(samples)]


def test_text_is_read_only_as_far_as_sixteen_times_the_samples(tmp_path, model):
    texts = random_texts(400)
    path = write_rows(tmp_path / "a.jsonl", texts)
    pool = cut(list(chain(*map(ids_of, texts))), 5)[:32]
    assert loaded(path, model, samples=2) == [pool[0], pool[16]]


def test_smaller_text_is_spread_over_all_of_it(tmp_path, model):
    texts = random_texts(20)
    path = write_rows(tmp_path / "a.jsonl", texts)
    pool = cut(list(chain(*map(ids_of, texts))), 5)
    assert 4 < len(pool) < 48
    assert loaded(path, model, samples=3) == [pool[part * len(pool) // 3] for part in range(3)]


def test_same_options_give_the_same_tokens(tmp_path, model):
    path = write_rows(tmp_path / "a.jsonl", random_texts(400))
    assert loaded(path, model, samples=7) == loaded(path, model, samples=7)


def test_digest_is_of_shape_and_ids():
    tokens = torch.arange(12).reshape(3, 4)
    little_endian = b"".join(number.to_bytes(8, "little") for number in range(12))
    assert digest(tokens) == hashlib.sha256(b"(3, 4)" + little_endian).hexdigest()
    others = [tokens.reshape(4, 3), tokens + 1, tokens.flip(0), tokens[:2]]
    assert len({digest(other) for other in [tokens, *others]}) == 5
    assert digest(tokens.T.contiguous().T) == digest(tokens)


# What can be wrong


def test_missing_column_names_those_that_are_there(tmp_path, model):
    path = write_rows(tmp_path / "a.jsonl", ["w1 w2"], column="content")
    message = message_of(path, model)
    assert "'text'" in message and "content, id" in message


def test_column_without_text_says_what_it_holds(tmp_path, model):
    path = write_rows(tmp_path / "a.parquet", ["w1 w2"])
    message = message_of(path, model, column="id")
    assert "'id'" in message and "int" in message


@pytest.mark.parametrize("packing", ["packed", "row"])
def test_too_little_text_says_how_much_there_is(tmp_path, model, packing: str):
    path = write_rows(tmp_path / "a.jsonl", ["w1 w2 w3 w4 w5"] * 3)
    message = message_of(path, model, samples=4, packing=packing)
    assert "3 sequences of 5 tokens" in message and "4 are needed" in message


@pytest.mark.parametrize("content", ["\n", "w1 w2"], ids=["blank", "short"])
def test_text_without_a_whole_sequence_is_refused(tmp_path, model, content: str):
    (tmp_path / "a.txt").write_text(content)
    assert "0 sequences of 5 tokens" in message_of(tmp_path / "a.txt", model)


def test_too_few_ids_say_how_many_there_are(tmp_path, model):
    path = save_ids(tmp_path / "a.safetensors", torch.zeros(3, 5, dtype=torch.long))
    assert "3 sequences of 5 tokens, 4 are needed" in message_of(path, model, samples=4)
    path = save_ids(tmp_path / "b.safetensors", torch.zeros(0, 5, dtype=torch.long))
    assert "0 sequences of 5 tokens" in message_of(path, model)


def test_ids_shorter_than_the_sequence_length_are_refused(tmp_path, model):
    path = save_ids(tmp_path / "a.safetensors", torch.zeros(3, 4, dtype=torch.long))
    message = message_of(path, model)
    assert "4 tokens" in message and "sequence_length 5" in message


@pytest.mark.parametrize("beyond", [VOCABULARY, VOCABULARY + 7, -1])
def test_id_outside_the_vocabulary_is_named(tmp_path, model, beyond: int):
    ids = torch.zeros(3, 5, dtype=torch.long)
    ids[1, 2] = beyond
    message = message_of(save_ids(tmp_path / "a.safetensors", ids), model)
    assert f"token id {beyond} " in message and f"vocabulary of {VOCABULARY}" in message


def test_last_id_of_the_vocabulary_is_allowed(tmp_path, model):
    ids = torch.full((1, 5), VOCABULARY - 1)
    assert loaded(save_ids(tmp_path / "a.safetensors", ids), model) == ids.tolist()


def test_tokenizer_of_a_larger_model_is_refused(tmp_path, model):
    path = write_rows(tmp_path / "a.jsonl", ["w1 w2 w48 w4 w5"])
    options = TextOptions(dataset=str(path), samples=1, sequence_length=5)
    with pytest.raises(CalibrationError, match="token id 48 is outside the model's vocabulary of 48"):
        load_tokens(options, model, 48)


def test_model_without_tokenizer_is_named(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["w1 w2"])
    options = TextOptions(dataset=str(path), samples=1, sequence_length=2)
    with pytest.raises(CalibrationError) as caught:
        load_tokens(options, tmp_path, VOCABULARY)
    assert str(caught.value).startswith(f"{tmp_path}: no tokenizer") and "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [torch.zeros(5, dtype=torch.long), torch.zeros(3, 5)], ids=["one row", "floats"])
def test_tensor_that_holds_no_sequences_of_ids_is_named(tmp_path, model, ids: Tensor):
    message = message_of(save_ids(tmp_path / "a.safetensors", ids), model)
    assert "integer token ids [N, T]" in message and "'tokens'" in message


def test_tensor_that_is_not_there_is_named_with_those_that_are(tmp_path, model):
    path = save_ids(tmp_path / "a.safetensors", torch.zeros(3, 5, dtype=torch.long))
    message = message_of(path, model, column="ids")
    assert "'ids'" in message and "tokens" in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.safetensors", "folder", "a/b/c"])
def test_file_that_is_not_there_is_named(tmp_path, model, name: str):
    message = message_of(tmp_path / name, model)
    assert "no such file" in message or "missing" in message


def test_relative_path_that_is_not_there_is_no_hub_name(model):
    assert "no such file" in message_of("./nowhere", model)


@pytest.mark.parametrize("suffix", [".TXT", ".JSONL", ".Parquet", ".SafeTensors"])
def test_case_of_a_suffix_does_not_matter(tmp_path, model, suffix: str):
    if suffix == ".SafeTensors":
        path = save_ids(tmp_path / f"a{suffix}", torch.tensor([[1, 2], [3, 4]]))
    elif suffix == ".TXT":
        path = tmp_path / f"a{suffix}"
        path.write_text("w1 w2\nw3 w4\n")
        assert loaded(path, model, packing="packed", sequence_length=6) == [[1, 2, NEWLINE_ID, 3, 4, NEWLINE_ID]]
        return
    else:
        path = write_rows(tmp_path / f"a{suffix.lower()}", ["w1 w2", "w3 w4"]).rename(tmp_path / f"a{suffix}")
    assert loaded(path, model, sequence_length=2) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "plain"])
def test_file_of_another_type_names_the_types_that_are_read(tmp_path, model, name: str):
    (tmp_path / name).write_text("w1 w2")
    message = message_of(tmp_path / name, model)
    assert all(suffix in message for suffix in (".txt", ".jsonl", ".json", ".parquet"))


DAMAGED = {
    "a.jsonl": b'{"text": "w1 w2 w3 w4 w5"}\n{"text": ',
    "b.jsonl": b"garbage",
    "a.json": b"garbage",
    "a.parquet": b"garbage",
    "a.txt": b"\xff\xfe w1",
    "a.safetensors": b"garbage",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_named(tmp_path, model, name: str):
    (tmp_path / name).write_bytes(DAMAGED[name])
    message_of(tmp_path / name, model)


# The hub; nothing leaves this machine


def test_hub_dataset_is_named_when_the_hub_is_off(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = message_of("owner/name", model)
    assert "check its name and the network" in message and "local" in message
    assert "did you mean ultrachat?" in message_of("ultra_chat", model)


@pytest.fixture(name="empty_hub")
def _empty_hub(monkeypatch) -> Iterator[list[str]]:
    """A hub on this machine that knows no dataset; gives the paths that it was asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments):
            """Keep the test's output clean."""

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    file_address = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_address)
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_dataset_that_the_hub_does_not_have_is_named(model, empty_hub):
    message = message_of("owner/name", model)
    assert "doesn't exist on the Hub" in message and "check its name and the network" in message
    assert any("owner/name" in path for path in empty_hub)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_empty_file_is_said_to_be(tmp_path, model, name: str):
    (tmp_path / name).write_text("")
    assert "is empty" in message_of(tmp_path / name, model)


def test_folder_is_said_to_be_one(tmp_path, model):
    assert "is a folder; pass one file in it" in message_of(tmp_path, model)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_row_without_text_is_named(tmp_path, model, suffix: str):
    path = write_rows(tmp_path / f"a{suffix}", [*(["w1 w2"] * 49), None, "w3"])
    assert "column 'text' of row 50 holds null" in message_of(path, model)


# Conversations


CHAT = {"chat_template": "{% for turn in messages %}{{ turn.role }} {{ turn.content }} {% endfor %}"}


@pytest.fixture(name="chat_model")
def _chat_model(tmp_path, model) -> Path:
    """The model with a chat template and w0 in front of texts; `user` and `assistant` are words w7 and w8."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {"user": words.pop("w7"), "assistant": words.pop("w8")}
    (tmp_path / "model").mkdir()
    own = Tokenizer.from_str(json.dumps(tokenizer))
    own.post_processor = processors.TemplateProcessing(single="w0 $A", special_tokens=[("w0", 0)])
    own.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(CHAT))
    return tmp_path / "model"


@pytest.mark.parametrize("names", [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")])
@pytest.mark.parametrize("column", ["messages", "conversations", "own"])
def test_conversations_go_through_the_chat_template(tmp_path, chat_model, names: tuple[str, ...], column: str):
    role, content, user, assistant = names
    chats = [[{role: user, content: "w1 w2"}, {role: assistant, content: "w3"}], [{role: user, content: "w4 w5"}]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({column: chat}) + "\n" for chat in chats))
    options = {"column": column} if column == "own" else {}
    assert loaded(tmp_path / "a.jsonl", chat_model, sequence_length=4, **options) == [[0, 7, 1, 2], [0, 8, 3, 7]]
    by_row = loaded(tmp_path / "a.jsonl", chat_model, sequence_length=4, packing="row", **options)
    assert by_row == [[0, 7, 1, 2], [0, 7, 4, 5]]


def test_conversations_need_a_chat_template(tmp_path, model):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "w1"}]}) + "\n")
    message = message_of(tmp_path / "a.jsonl", model)
    assert "row 1 holds a conversation" in message and f"{model} has no chat template" in message


@pytest.mark.parametrize("turn", [{"role": "user"}, {"role": "user", "content": None}, "w1", {"content": "w1"}])
def test_turn_without_role_or_text_is_named(tmp_path, chat_model, turn: object):
    chat = [{"role": "user", "content": "w1"}]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": chat}, {"messages": [turn]}]))
    message = message_of(tmp_path / "a.json", chat_model)
    assert "row 2 holds no conversation: each turn needs role and content" in message


# What stands in front of a text


@pytest.mark.parametrize("packing, expected", [("packed", [[0, 1, 2, 3], [0, 4, 5, 6]]), ("row", [[0, 3, 4, 5]])])
def test_every_sequence_begins_with_what_the_tokenizer_puts_in_front(tmp_path, chat_model, packing, expected):
    path = write_rows(tmp_path / "a.jsonl", ["w1 w2", "w0 w3 w4 w5 w6"])  # w0 once, also where a text begins with it
    assert loaded(path, chat_model, sequence_length=4, packing=packing) == expected


def test_ids_of_a_file_get_nothing_in_front(tmp_path, chat_model):
    path = save_ids(tmp_path / "a.safetensors", torch.tensor([[1, 2, 3]]))
    assert loaded(path, chat_model, sequence_length=3) == [[1, 2, 3]]


# Mixes and short names


def texts_of(word: str, num: int) -> list[str]:
    return [" ".join([word] * 5)] * num


@pytest.mark.parametrize(
    "shares, samples, counts",
    [(":3,:1", 4, (3, 1)), (":0.5,:0.5", 5, (3, 2)), (",", 4, (2, 2)), (":0.7,:0.3", 8, (6, 2)), (":9,:1", 6, (5, 1))],
)
def test_mix_takes_each_datasets_share(tmp_path, model, shares: str, samples: int, counts: tuple[int, int]):
    first = write_rows(tmp_path / "a.jsonl", texts_of("w1", 9))
    second = save_ids(tmp_path / "b.safetensors", torch.full((9, 5), 2))
    of_first, of_second = shares.split(",")
    rows = [row[0] for row in loaded(f"{first}{of_first}, {second}{of_second}", model, samples=samples)]
    assert (rows.count(1), rows.count(2)) == counts
    half = rows[: samples // 2]  # each stands among the other, so that a batch sees both and the last ones are of both
    assert all(abs(half.count(word) - count / 2) <= 1 for word, count in zip((1, 2), counts, strict=True))


def test_samples_of_a_mix_are_those_of_each_dataset_by_itself(tmp_path, model):
    first = write_rows(tmp_path / "a.jsonl", [f"w{number} w1 w1 w1 w1" for number in range(2, 20)])
    second = write_rows(tmp_path / "b.jsonl", [f"w{number} w1 w1 w1 w1" for number in range(20, 40)])
    mixed = loaded(f"{first}:2,{second}:1", model, samples=9)
    assert [row for row in mixed if row[0] < 20] == loaded(first, model, samples=6)
    assert [row for row in mixed if row[0] >= 20] == loaded(second, model, samples=3)
    assert mixed == loaded(f"{first}:0.5,{second}:0.25", model, samples=9)


MIXES = [
    ("a.jsonl:1,b.jsonl", "b.jsonl: has no share"), ("a.jsonl:x,b.jsonl:1", "a.jsonl: share 'x' of a mix is not"),
    ("a.jsonl:0,b.jsonl:1", "a.jsonl: share '0'"), ("a.jsonl:nan,b:1", "share 'nan'"), (":1,b.jsonl:1", "share '1'"),
    ("a.jsonl:1,a.jsonl:2", "a.jsonl: stands twice"), ("a.jsonl:1,b.jsonl:1000", "a.jsonl: its share is less than one"),
]  # fmt: skip


@pytest.mark.parametrize("mix, said", MIXES)
def test_mix_that_makes_no_sense_is_refused_before_anything_is_read(mix: str, said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parts_of(TextOptions(dataset=mix, samples=8))
    with pytest.raises(ConfigError, match="needs a number of samples"):
        parts_of(TextOptions(dataset="a.jsonl,b.jsonl", samples=None))


def test_file_with_a_comma_and_a_colon_in_its_name_is_no_mix(tmp_path, model):
    path = write_rows(tmp_path / "a,b:c.jsonl", ["w1 w2 w3 w4 w5"])
    assert loaded(path, model) == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    "options, asked",
    [
        ({"dataset": "ultrachat"}, ("HuggingFaceH4/ultrachat_200k", None, "train_sft")),
        (
            {"dataset": "HuggingFaceH4/ultrachat_200k", "split": "test_sft"},
            ("HuggingFaceH4/ultrachat_200k", None, "test_sft"),
        ),
        ({"dataset": "c4"}, ("allenai/c4", "en", "train")),
        ({"dataset": "allenai/c4", "subset": "de"}, ("allenai/c4", "de", "train")),
        ({"dataset": "wikitext", "split": "test"}, ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ({"dataset": "pile-10k"}, ("NeelNanda/pile-10k", None, "train")),
        ({"dataset": "owner/name"}, ("owner/name", None, "train")),
    ],
)  # fmt: skip
def test_hub_dataset_is_asked_for_as_it_is_used(chat_model, monkeypatch, options: dict, asked: tuple):
    calls = []

    def load(name: str, subset: str | None, split: str, **others: object) -> list[dict]:
        calls.append((name, subset, split))
        chat = [{"role": "user", "content": "w1 w2"}]
        return [{"messages": chat}] if "ultrachat" in name else [{"text": "w1 w2 w3"}]

    monkeypatch.setattr("shardq.calib.sets.load_dataset", load)
    text = TextOptions(**options, samples=1, sequence_length=4)
    expected = [0, 7, 1, 2] if "ultrachat" in asked[0] else [0, 1, 2, 3]
    assert load_tokens(text, chat_model, VOCABULARY).tolist() == [expected]
    assert calls == [asked]


def test_text_beside_conversations_is_read(tmp_path, model):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user"}], "text": "w1 w2"}) + "\n")
    assert loaded(tmp_path / "a.jsonl", model, sequence_length=2) == [[1, 2]]


def test_damaged_local_file_is_not_blamed_on_the_network(tmp_path, model):
    (tmp_path / "a.jsonl").write_text("garbage")
    message = message_of(tmp_path / "a.jsonl", model)
    assert "cannot be read as .jsonl" in message and "network" not in message


def test_id_file_without_tensors_is_refused(tmp_path, model):
    save_file({}, tmp_path / "a.safetensors")
    assert "'tokens'" in message_of(tmp_path / "a.safetensors", model)


def test_file_is_read_where_the_librarys_cache_cannot_be_written(model, tmp_path, monkeypatch):
    texts = random_texts(40)
    path = write_rows(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/no-home/datasets")  # also by root
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert loaded(path, model) == cut(ids_of(" ".join(texts)), 5)
