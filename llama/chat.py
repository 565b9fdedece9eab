"""Dialogs -> token ids: the roles, the [INST]/<<SYS>> layout, and the tags that a user may not write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from .tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"

SPECIAL_TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def has_special_tags(dialog: Dialog) -> bool:
    """Whether a message contains one of the layout's own tags, and so could pose as another role."""
    return any(tag in message["content"] for message in dialog for tag in SPECIAL_TAGS)


def check_dialog(dialog: Dialog) -> None:
    """Raise ValueError or TypeError unless roles are an optional system, then user and assistant in turn, user last."""
    for number, message in enumerate(dialog):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f"message {number}: expected a dict with 'role' and 'content', got {message!r}")
        if not isinstance(message["content"], str):
            raise TypeError(f"message {number}: content must be a str, got {type(message['content']).__name__}")
    roles = [message["role"] for message in dialog]
    first_turn = 1 if roles[:1] == ["system"] else 0
    for number in range(first_turn, len(roles)):
        expected = "user" if (number - first_turn) % 2 == 0 else "assistant"
        if roles[number] != expected:
            raise ValueError(f"message {number}: expected role '{expected}', got '{roles[number]}'")
    if (len(roles) - first_turn) % 2 == 0:
        raise ValueError(f"message {len(roles)}: expected role 'user' as the last one, got none")


def encode_dialog(dialog: Dialog, tokenizer: Tokenizer) -> list[int]:
    """The prompt that asks for the next assistant message.

    A system message is folded into the first user message: "<<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user}". Each finished
    exchange is "[INST] {user} [/INST] {assistant} " between BOS and EOS, encoded by itself; the last user message is
    "[INST] {user} [/INST]" after BOS. Contents are stripped.

    Raises ValueError for roles out of order and for a message with one of SPECIAL_TAGS.
    """
    check_dialog(dialog)
    if has_special_tags(dialog):
        raise ValueError(UNSAFE_ERROR)
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        contents[:2] = [f"{B_SYS}{contents[0]}{E_SYS}{contents[1]}"]
    *turns, last = (content.strip() for content in contents)

    tokens: list[int] = []
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        tokens += tokenizer.encode(f"{B_INST} {user} {E_INST} {assistant} ", bos=True, eos=True)
    return tokens + tokenizer.encode(f"{B_INST} {last} {E_INST}", bos=True, eos=False)
