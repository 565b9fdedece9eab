from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import GOLDEN, expected, real_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from llama import Tokenizer, encode_dialog
from llama.chat import SPECIAL_TAGS, UNSAFE_ERROR, has_special_tags

TOKENIZER = Tokenizer(GOLDEN / "tokenizer.model")


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A dialog whose roles are in order."""
    dialog = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return dialog if system is None else [{"role": "system", "content": system}, *dialog]


def test_prompt_ids_equal_the_originals_with_the_real_tokenizer() -> None:
    tokenizer = real_tokenizer()
    for case in json.loads((GOLDEN / "llama2-chat-format.json").read_text())["cases"]:
        assert encode_dialog(case["dialog"], tokenizer) == case["prompt_tokens"]


@pytest.mark.parametrize("model", ["mha", "gqa"])
def test_prompt_ids_equal_the_originals_with_the_small_tokenizer(model: str) -> None:
    chat = expected(model)["chat_completion"]
    for dialog, prompt_tokens in zip(chat["dialogs"], chat["prompt_tokens"], strict=True):
        if not has_special_tags(dialog):
            assert encode_dialog(dialog, TOKENIZER) == prompt_tokens


roles = st.sampled_from(["system", "user", "assistant"])
texts = st.text(max_size=12) | st.sampled_from([*SPECIAL_TAGS, " ", "\n<</SYS>>x"])
ordered = st.builds(
    lambda contents, system: say(*contents, system=system),
    st.lists(texts, min_size=1, max_size=5).filter(lambda contents: len(contents) % 2),
    st.none() | texts,
)
disordered = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=5)


@given(ordered | disordered)
def test_a_dialog_is_laid_out_as_documented_or_refused_as_documented(dialog: list[Any]) -> None:
    names = [message["role"] for message in dialog]
    turns = names[1:] if names[:1] == ["system"] else names
    if len(turns) % 2 == 0 or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        with pytest.raises(ValueError, match=r"message \d+: expected role"):
            encode_dialog(dialog, TOKENIZER)
        return
    if any(tag in message["content"] for message in dialog for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")):
        with pytest.raises(ValueError, match="special tags are not allowed"):
            encode_dialog(dialog, TOKENIZER)
        return
    contents = [message["content"] for message in dialog]
    if names[0] == "system":
        contents = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}", *contents[2:]]
    layout: list[int] = []
    for i in range(0, len(contents) - 1, 2):
        turn = f"[INST] {contents[i].strip()} [/INST] {contents[i + 1].strip()} "
        layout += TOKENIZER.encode(turn, bos=True, eos=True)
    layout += TOKENIZER.encode(f"[INST] {contents[-1].strip()} [/INST]", bos=True, eos=False)
    assert encode_dialog(dialog, TOKENIZER) == layout


@pytest.mark.parametrize(
    ("dialog", "sentence"),
    [
        ([], "message 0: expected role 'user' as the last one, got none"),
        (say("a", "b"), "message 2: expected role 'user' as the last one, got none"),
        (say(system="s"), "message 1: expected role 'user' as the last one, got none"),
        ([*say("a"), *say("b")], "message 1: expected role 'assistant', got 'user'"),
        ([{"role": "bot", "content": "a"}], "message 0: expected role 'user', got 'bot'"),
        ([{"role": "user"}], r"message 0: expected a dict with 'role' and 'content', got \{'role': 'user'\}"),
        (say("Hi [INST] there"), UNSAFE_ERROR),
    ],
)
def test_a_bad_dialog_is_refused_with_a_sentence(dialog: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        encode_dialog(dialog, TOKENIZER)


def test_content_that_is_no_text_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="message 0: content must be a str, got int"):
        encode_dialog([{"role": "user", "content": 7}], TOKENIZER)  # type: ignore[typeddict-item]
