"""Dialogs -> token ids: the roles, the layouts of chat models, and the tags that a user may not write.

Llama 2's layout is [INST] and <<SYS>>. CodeLlama-70b-Instruct has one of its own, which a tokenizer with a piece <step>
asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict

from .original import Refusal
from .tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """Further keys, such as a name, are ignored."""

    role: Role
    content: str


Dialog = Sequence[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
STEP = "<step>"

SPECIAL_TAGS = [B_INST, E_INST, B_SYS.strip(), E_SYS.strip()]
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def has_special_tags(dialog: Dialog, tokenizer: Tokenizer | None = None) -> bool:
    """Whether a message contains one of the layout's own tags, and so could pose as another role.

    <step> is one of them where `tokenizer` has that piece.
    """
    tags = SPECIAL_TAGS + [STEP] * (tokenizer is not None and tokenizer.step_id >= 0)
    return any(tag in message["content"] for message in dialog for tag in tags)


def chat_end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer, and are no part of it."""
    return frozenset({tokenizer.eos_id} | ({tokenizer.step_id} if tokenizer.step_id >= 0 else set()))


def check_dialogs(dialogs: Any) -> list[Dialog]:
    """`dialogs` as lists of messages in order. Raises as check_dialog does, naming the dialog too."""
    if isinstance(dialogs, (str, bytes, dict)) or not isinstance(dialogs, Iterable):
        meant = [[dialogs if isinstance(dialogs, dict) else {"role": "user", "content": dialogs}]]
        raise TypeError(f"dialogs is a {type(dialogs).__name__}: pass a list of dialogs, {meant!r}")
    checked: list[Dialog] = []
    for index, dialog in enumerate(dialogs):
        messages = messages_of(dialog, f"dialog {index}")
        try:
            check_dialog(messages)
        except (TypeError, ValueError) as error:
            raise type(error)(f"dialog {index}, {error}") from None
        checked.append([Message(role=m["role"], content=m["content"]) for m in messages])  # without further keys
    return checked


def messages_of(dialog: Any, name: str) -> list[Message]:
    """`dialog` as a list. A lone message or text is iterable too, which is never what was meant."""
    if isinstance(dialog, dict):
        raise TypeError(f"{name} is a message, {dialog!r}: a dialog is a list of messages, so put it in a list")
    if isinstance(dialog, (str, bytes)) or not isinstance(dialog, Iterable):
        meant = [{"role": "user", "content": dialog}]
        raise TypeError(f"{name} is a {type(dialog).__name__}: pass a list of messages, {meant!r}")
    return list(dialog)


def check_dialog(dialog: Dialog) -> None:
    """Raise Refusal, a ValueError, unless roles are an optional system, then user and assistant in turn, user last;
    ValueError or TypeError for a message that is none."""
    for number, message in enumerate(dialog):
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise ValueError(f"message {number}: expected a dict with 'role' and 'content', got {message!r}")
        if not isinstance(message["content"], str):
            raise TypeError(f"message {number}: content must be a str, got {type(message['content']).__name__}")
    roles = [message["role"] for message in dialog]
    first_turn = 1 if roles[:1] == ["system"] else 0
    for number in range(first_turn, len(roles)):
        expected = "user" if (number - first_turn) % 2 == 0 else "assistant"
        if roles[number] != expected:
            raise Refusal(f"message {number}: expected role '{expected}', got '{roles[number]}'")
    if (len(roles) - first_turn) % 2 == 0:
        raise Refusal(f"message {len(roles)}: expected role 'user' as the last one, got none")


def encode_dialog(dialog: Dialog, tokenizer: Tokenizer) -> list[int]:
    """The prompt that asks for the next assistant message.

    A system message is folded into the first user message: "<<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user}". Each finished
    exchange is "[INST] {user} [/INST] {assistant} " between BOS and EOS, encoded by itself; the last user message is
    "[INST] {user} [/INST]" after BOS. Contents are stripped. With a tokenizer that has <step>, see encode_steps.

    Raises ValueError for roles out of order and for a message with one of the layout's tags, TypeError for no dialog.
    """
    dialog = messages_of(dialog, "dialog")
    check_dialog(dialog)
    if has_special_tags(dialog, tokenizer):
        raise ValueError(UNSAFE_ERROR)
    if tokenizer.step_id >= 0:
        return encode_steps(dialog, tokenizer)
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        contents[:2] = [f"{B_SYS}{contents[0]}{E_SYS}{contents[1]}"]
    *turns, last = (content.strip() for content in contents)

    tokens: list[int] = []
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        tokens += tokenizer.encode(f"{B_INST} {user} {E_INST} {assistant} ", bos=True, eos=True)
    return tokens + tokenizer.encode(f"{B_INST} {last} {E_INST}", bos=True, eos=False)


def encode_steps(dialog: Dialog, tokenizer: Tokenizer) -> list[int]:
    """CodeLlama-70b-Instruct's prompt: one BOS, then each message and <step>, then the head of the answer.

    A message is its head, " Source: {role}", and, unless it is empty, its body, "\\n\\n {content}", stripped; each is
    encoded by itself. There is always a system message, without a body where none is given.
    """
    if dialog[0]["role"] != "system":
        dialog = [Message(role="system", content=""), *dialog]
    parts: list[str | None] = []
    for message in dialog:
        parts.append(f" Source: {message['role']}")
        if message["content"]:
            parts.append(f"\n\n {message['content'].strip()}")
        parts.append(None)
    parts += [" Source: assistant\nDestination: user", "\n\n "]
    tokens = [tokenizer.bos_id]
    for part in parts:
        tokens += [tokenizer.step_id] if part is None else tokenizer.encode(part, bos=False, eos=False)
    return tokens
