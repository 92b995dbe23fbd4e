"""A sealed object is given back as it was, and no changed letter of its text goes unseen."""

import json

import pytest

from shardq.formats.sealed import sealed, unsealed

VALUE = {"block": 3, "loss": 0.1, "files": {"a": "ff", "b": "0"}, "none": None}


def test_it_comes_back_from_its_text():
    assert unsealed(json.loads(json.dumps(sealed(VALUE)))) == VALUE
    assert unsealed(VALUE) == VALUE


def test_every_flipped_bit_is_seen():
    text, unseen = json.dumps(sealed(VALUE)).encode(), []
    for place in range(len(text)):
        for bit in range(8):
            changed = text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :]
            try:
                value = unsealed(json.loads(changed))
            except ValueError:
                continue
            if value == VALUE or "seal" in json.loads(changed):
                unseen.append(changed)
    assert unseen == []


def test_a_seal_of_another_object_is_refused():
    with pytest.raises(ValueError, match="seal"):
        unsealed(VALUE | {"seal": sealed({})["seal"]})
