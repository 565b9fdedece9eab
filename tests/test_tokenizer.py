from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, real_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from llama import Tokenizer

SMALL = Tokenizer(GOLDEN / "tokenizer.model")


def test_ids_and_text_equal_the_originals() -> None:
    tokenizer = real_tokenizer()
    for case in json.loads((GOLDEN / "llama2-tokenizer-cases.json").read_text()):
        assert tokenizer.encode(case["text"], bos=True, eos=True) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_special_ids_and_size() -> None:
    assert (SMALL.n_words, SMALL.bos_id, SMALL.eos_id, SMALL.pad_id) == (512, 1, 2, -1)
    infilling = (SMALL.prefix_id, SMALL.suffix_id, SMALL.middle_id, SMALL.eot_id)
    assert (infilling, SMALL.step_id) == ((-1, -1, -1, -1), -1)
    assert SMALL.sp_model.vocab_size() == 512
    assert SMALL.encode("a", bos=False, eos=False) == SMALL.encode("a", bos=True, eos=True)[1:-1]


@pytest.mark.parametrize(
    "kind",
    [
        int,
        np.int64,
        np.uint16,
        torch.tensor,
        np.array,
        lambda token: torch.tensor([token]),
        lambda token: [token],
    ],
)
def test_one_id_decodes_whatever_kind_of_integer_it_is(kind: Any) -> None:
    assert [SMALL.decode(kind(token)) for token in (300, 301)] == [
        SMALL.decode([300]),
        SMALL.decode([301]),
    ]
    with pytest.raises(ValueError, match="token id 512 is not in the vocabulary of 512 pieces"):
        SMALL.decode(kind(512))


def test_many_ids_decode_from_lists_iterators_arrays_and_tensors() -> None:
    ids = SMALL.encode("the quick brown fox", bos=False, eos=False)
    for kind in (list, tuple, iter, np.array, torch.tensor):
        assert SMALL.decode(kind(ids)) == "the quick brown fox"
    assert SMALL.decode([]) == SMALL.decode(torch.tensor([], dtype=torch.long)) == ""
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        SMALL.decode([1.5])  # type: ignore[list-item]


@given(st.text())
def test_text_survives_encoding(text: str) -> None:
    text = text.replace("\u2581", "")  # SentencePiece's own mark for a space
    assert SMALL.decode(SMALL.encode(text, bos=True, eos=True)) == text


@given(st.lists(st.integers(0, SMALL.n_words - 1) | st.integers(3, 258)))
def test_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    pieces = SMALL.decode_pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == SMALL.decode(ids)


def test_pieces_of_the_real_tokenizer_keep_spaces_and_characters_of_several_bytes() -> None:
    tokenizer = real_tokenizer()
    ids = tokenizer.encode("A  llama 🦙 and 中文.", bos=True, eos=True)
    pieces = tokenizer.decode_pieces(ids)
    assert "".join(pieces) == "A  llama 🦙 and 中文."
    assert "🦙" in pieces and " and" in pieces


def test_errors_name_the_value() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer at /nowhere: pass the path of tokenizer\.model"
    ):
        Tokenizer("/nowhere")
    with pytest.raises(ValueError, match=r"params\.json is not a SentencePiece model"):
        Tokenizer(GOLDEN / "mha-mp1" / "params.json")
    with pytest.raises(TypeError, match="only a str can be encoded, got int: 3"):
        SMALL.encode(3, bos=True, eos=False)  # type: ignore[arg-type]
    for token in (512, -1):
        with pytest.raises(
            ValueError, match=f"token id {token} is not in the vocabulary of 512 pieces"
        ):
            SMALL.decode([1, token])
