from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, expected, real_tokenizer, real_tokenizer_path
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from llama import Tokenizer, encode_dialog
from llama.chat import SPECIAL_TAGS, UNSAFE_ERROR, chat_end_ids, check_dialogs, has_special_tags

TOKENIZER = Tokenizer(GOLDEN / "tokenizer.model")


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return a dialog with alternating roles."""
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
    if any(
        tag in message["content"]
        for message in dialog
        for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    ):
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
        ([], "message 0: expected role 'user' in the last message, got none"),
        (say("a", "b"), "message 2: expected role 'user' in the last message, got none"),
        (say(system="s"), "message 1: expected role 'user' in the last message, got none"),
        ([*say("a"), *say("b")], "message 1: expected role 'assistant', got 'user'"),
        ([{"role": "bot", "content": "a"}], "message 0: expected role 'user', got 'bot'"),
        (
            [{"role": "user"}],
            r"message 0: expected a dict with 'role' and 'content', got \{'role': 'user'\}",
        ),
        (say("Hi [INST] there"), UNSAFE_ERROR),
    ],
)
def test_a_bad_dialog_is_refused_with_a_sentence(dialog: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        encode_dialog(dialog, TOKENIZER)


def test_content_that_is_no_text_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="message 0: content must be a str, got int"):
        encode_dialog([{"role": "user", "content": 7}], TOKENIZER)  # type: ignore[typeddict-item]


@pytest.mark.parametrize("role_order", [[], say("a", "b"), say(system="s"), [*say("a"), *say("b")]])
def test_what_the_original_asserted_is_a_value_error_and_an_assertion_error(
    role_order: Any,
) -> None:
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="expected role"):
            encode_dialog(role_order, TOKENIZER)


def test_further_keys_are_ignored() -> None:
    plain = say("hi", "hello", "bye", system="short")
    named = [message | {"name": "Ada", "weight": 0} for message in plain]
    assert encode_dialog(named, TOKENIZER) == encode_dialog(plain, TOKENIZER)  # type: ignore[arg-type]
    assert check_dialogs([named]) == [plain]


HI = {"role": "user", "content": "hi"}


def test_dialogs_come_back_as_lists() -> None:
    assert check_dialogs([]) == []
    assert check_dialogs(([HI], (HI,), iter([HI]))) == [[HI], [HI], [HI]]
    assert check_dialogs(dialog for dialog in [[HI]]) == [[HI]]


@pytest.mark.parametrize(
    ("dialogs", "error", "sentence"),
    [
        (
            "hi",
            TypeError,
            "dialogs is a str: pass a list of dialogs, [[{'role': 'user', 'content': 'hi'}]]",
        ),
        (
            HI,
            TypeError,
            "dialogs is a dict: pass a list of dialogs, [[{'role': 'user', 'content': 'hi'}]]",
        ),
        (None, TypeError, "dialogs is a NoneType: pass a list of dialogs"),
        (
            [HI],
            TypeError,
            f"dialog 0 is a message, {HI}: a dialog is a list of messages, so put it in a list",
        ),
        (
            [[HI], HI],
            TypeError,
            f"dialog 1 is a message, {HI}: a dialog is a list of messages, so put it in a list",
        ),
        (
            ["hi"],
            TypeError,
            "dialog 0 is a str: pass a list of messages, [{'role': 'user', 'content': 'hi'}]",
        ),
        ([7], TypeError, "dialog 0 is a int: pass a list of messages"),
        (
            [["hi"]],
            ValueError,
            "dialog 0, message 0: expected a dict with 'role' and 'content', got 'hi'",
        ),
        ([[HI | {"content": 7}]], TypeError, "dialog 0, message 0: content must be a str, got int"),
        (
            [[HI], []],
            AssertionError,
            "dialog 1, message 0: expected role 'user' in the last message, got none",
        ),
        (
            [[HI], [HI, HI]],
            AssertionError,
            "dialog 1, message 1: expected role 'assistant', got 'user'",
        ),
        ([[HI, HI]], ValueError, "dialog 0, message 1: expected role 'assistant', got 'user'"),
    ],
)
def test_dialogs_that_are_none_are_refused_with_the_way_out(
    dialogs: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        check_dialogs(dialogs)
    assert str(caught.value).startswith(sentence)


def test_one_dialog_is_told_so_too() -> None:
    with pytest.raises(
        TypeError,
        match="dialog is a message, .*: a dialog is a list of messages, so put it in a list",
    ):
        encode_dialog(HI, TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dialog is a str: pass a list of messages"):
        encode_dialog("hi", TOKENIZER)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with one piece per character, and <step>.

    Like CodeLlama-70b-Instruct's, it does not put a space before the first word of a text.
    """
    folder = tmp_path_factory.mktemp("steps")
    (folder / "text.txt").write_text(
        "Source: system user assistant Destination: hi there be brief bye\n" * 9
    )
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="char",
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        user_defined_symbols=["<step>"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer(folder / "tokenizer.model")


def piece_by_piece(layout: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a layout, one piece per character; | is BOS and # is <step>."""
    names = {" ": "▁", "\n": "<0x0A>", "|": "<s>", "#": "<step>"}
    ids = [tokenizer.sp_model.piece_to_id(names.get(character, character)) for character in layout]
    assert 0 not in ids
    return ids


@pytest.mark.parametrize(
    ("dialog", "layout"),
    [
        (
            say("hi", system="be brief"),
            "| Source: system\n\n be brief# Source: user\n\n hi# Source: assistant\nDestination: user\n\n ",
        ),
        (
            say(" hi\n", "hi there ", "bye"),
            "| Source: system# Source: user\n\n hi# Source: assistant\n\n hi there# Source: user\n\n bye"
            "# Source: assistant\nDestination: user\n\n ",
        ),
        (
            say("", system=" "),
            "| Source: system\n\n # Source: user# Source: assistant\nDestination: user\n\n ",
        ),
    ],
)
def test_a_tokenizer_with_step_lays_dialogs_out_in_steps(
    dialog: Any, layout: str, steps: Tokenizer
) -> None:
    assert steps.step_id == steps.sp_model.piece_to_id("<step>")
    assert encode_dialog(dialog, steps) == piece_by_piece(layout, steps)


def test_answers_end_at_eos_and_where_there_is_one_at_step(steps: Tokenizer) -> None:
    assert chat_end_ids(TOKENIZER) == {2}
    assert chat_end_ids(steps) == {2, steps.step_id}


@pytest.mark.parametrize("text", ["a <step> Source: system", "[INST]", "<</SYS>>"])
def test_steps_refuse_their_own_tag_and_the_others(text: str, steps: Tokenizer) -> None:
    assert has_special_tags(say("hi", system=text), steps)
    with pytest.raises(ValueError, match=UNSAFE_ERROR):
        encode_dialog(say(text), steps)


def test_step_is_text_to_other_tokenizers() -> None:
    assert not has_special_tags(say("a <step> ahead"), TOKENIZER)
    assert encode_dialog(say("a <step> ahead"), TOKENIZER)


def test_steps_check_roles_as_the_other_layout_does(steps: Tokenizer) -> None:
    with pytest.raises(AssertionError, match="message 1: expected role 'assistant', got 'user'"):
        encode_dialog([*say("a"), *say("b")], steps)


def test_text_without_a_space_before_its_first_word_decodes_piece_by_piece(
    steps: Tokenizer,
) -> None:
    ids = steps.encode(" hi  there<step> bye", bos=True, eos=True)
    assert "".join(steps.decode_pieces(ids)) == steps.decode(ids) == " hi  there<step> bye"


@pytest.mark.parametrize("kind", [3, 4], ids=["control piece", "user-defined piece"])
def test_prompt_ids_in_steps_equal_the_published_ones(tmp_path: Path, kind: int) -> None:
    """Compare with the ids on huggingface.co/codellama/CodeLlama-70b-Instruct-hf.

    That page shows the output of the original function.
    """
    llama2 = real_tokenizer_path()

    def piece(name: str) -> bytes:  # a SentencePiece in a ModelProto: its text and type
        text = name.encode()
        return bytes([0x0A, len(text) + 4, 0x0A, len(text)]) + text + bytes([0x18, kind])

    # More fields can be appended to a serialized message. The last one here turns off the
    # normalizer's add_dummy_prefix.
    pieces = [*(f"<extra {i}>" for i in range(15)), "<step>"]
    (tmp_path / "tokenizer.model").write_bytes(
        llama2.read_bytes() + b"".join(map(piece, pieces)) + b"\x1a\x02\x18\x00"
    )
    dialog = say(
        "First user query",
        "Model response to first query",
        "Second user query",
        system="System prompt    ",
    )
    step = 32015
    source, newline, user, assistant, query = (7562, 29901), 13, 1404, 20255, 2346
    assert encode_dialog(dialog, Tokenizer(tmp_path / "tokenizer.model")) == [
        *(1, *source, 1788, newline, newline, 2184, 9508, step),
        *(*source, user, newline, newline, 3824, user, query, step),
        *(*source, assistant, newline, newline, 8125, 2933, 304, 937, query, step),
        *(*source, user, newline, newline, 6440, user, query, step),
        *(*source, assistant, newline, 14994, 3381, 29901, user, newline, newline, 29871),
    ]
