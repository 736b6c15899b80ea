"""The built-in tokenizer: any text, the same one every time, limits kept through JSON."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conjoin.encoders import tokenizer

CAPTIONS = ["red apple", "green apple", "a cat on a mat", "blue car"] * 3


UNUSUAL = ["Red APPLE", "\u65e5\u672c\u8a9e", "\U0001f600 na\u00efve", "\u0000\ufffd", "", " ", "a" * 1_000_000]


@pytest.mark.parametrize("text", UNUSUAL)
def test_any_text_has_tokens_within_the_limit(text: str) -> None:
    trained = tokenizer.limited(tokenizer.train(CAPTIONS), 16)
    ids, mask = tokenizer.encode(trained, [text])
    assert 2 <= ids.shape[1] <= 16
    assert mask.all()


def test_case_does_not_matter_and_words_do() -> None:
    trained = tokenizer.limited(tokenizer.train(CAPTIONS), 16)
    ids, _ = tokenizer.encode(trained, ["red apple", "RED Apple", "red cat xx"])
    assert (ids[0] == ids[1]).all()
    assert (ids[0] != ids[2]).any()


def test_unknown_characters_are_told_apart() -> None:
    trained = tokenizer.limited(tokenizer.train(CAPTIONS), 16)
    ids, _ = tokenizer.encode(trained, ["\u732b", "\u72ac"])
    assert (ids[0] != ids[1]).any()


def test_padding_is_masked() -> None:
    trained = tokenizer.limited(tokenizer.train(CAPTIONS), 16)
    ids, mask = tokenizer.encode(trained, ["red", "red apple on a mat"])
    assert ids.shape == mask.shape
    assert mask[0].sum() < mask[1].sum() == mask.shape[1]


def test_json_round_trip_keeps_tokens_and_text() -> None:
    trained = tokenizer.limited(tokenizer.train(CAPTIONS), 6)
    again = tokenizer.from_json(trained.to_str(), 6)
    assert again.to_str() == trained.to_str()
    texts = ["red apple", "a cat on a mat with a car"]
    assert (tokenizer.encode(again, texts)[0] == tokenizer.encode(trained, texts)[0]).all()


def test_another_process_trains_the_same() -> None:
    code = f"from conjoin.encoders import tokenizer; print(tokenizer.train({CAPTIONS!r}).to_str(), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == tokenizer.train(CAPTIONS).to_str()


def test_torn_json_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizer.from_json('{"model": ', 8)
