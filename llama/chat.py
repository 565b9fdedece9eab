"""Dialogs -> token ids: checks of roles and tags, and Llama 2's [INST] and <<SYS>> layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict

from .code_llama import STEP, encode_steps
from .original import Refusal
from .tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """A message of a dialog. Other keys, such as a name, are ignored."""

    role: Role
    content: str


Dialog = Sequence[Message]

B_INST = "[INST]"
E_INST = "[/INST]"
B_SYS = "<<SYS>>\n"
E_SYS = "\n<</SYS>>\n\n"

SPECIAL_TAGS = [B_INST, E_INST, B_SYS.strip(), E_SYS.strip()]
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def has_special_tags(dialog: Dialog, tokenizer: Tokenizer | None = None) -> bool:
    """Whether a message contains one of the layout's tags and so could imitate another role.

    If `tokenizer` has the piece <step>, it is one of the tags.
    """
    tags = SPECIAL_TAGS
    if tokenizer is not None and tokenizer.step_id >= 0:
        tags = [*SPECIAL_TAGS, STEP]
    return any(tag in message["content"] for message in dialog for tag in tags)


def chat_end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer and are not part of it."""
    return frozenset({tokenizer.eos_id, tokenizer.step_id} - {-1})


def check_dialogs(dialogs: Any) -> list[list[Message]]:
    """Return `dialogs` as lists of messages, each with only a role and a content.

    Raises the errors of check_dialog, which give the number of the dialog.
    """
    if isinstance(dialogs, (str, bytes, dict)) or not isinstance(dialogs, Iterable):
        message = dialogs if isinstance(dialogs, dict) else {"role": "user", "content": dialogs}
        meant = [[message]]
        raise TypeError(f"dialogs is a {type(dialogs).__name__}: pass a list of dialogs, {meant!r}")
    return [
        check_dialog(dialog, f"dialog {index}", f"dialog {index}, ")
        for index, dialog in enumerate(dialogs)
    ]


def check_dialog(dialog: Any, name: str = "dialog", of: str = "") -> list[Message]:
    """Return `dialog` as a list of messages, each with only a role and a content.

    Errors call the dialog `name`, and its first message "{of}message 0".

    Raises TypeError if `dialog` is a single message or a str, which are iterable too; ValueError or
    TypeError if a message is malformed; Refusal, a ValueError, unless the roles are an optional
    system, then user and assistant in turn, ending with user.
    """
    if isinstance(dialog, dict):
        raise TypeError(
            f"{name} is a message, {dialog!r}: a dialog is a list of messages, so put it in a list"
        )
    if isinstance(dialog, (str, bytes)) or not isinstance(dialog, Iterable):
        meant = [{"role": "user", "content": dialog}]
        raise TypeError(f"{name} is a {type(dialog).__name__}: pass a list of messages, {meant!r}")
    messages: list[Message] = []
    expected: Role = "user"
    for number, message in enumerate(dialog):
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise ValueError(
                f"{of}message {number}: expected a dict with 'role' and 'content', got {message!r}"
            )
        role = message["role"]
        content = message["content"]
        if not isinstance(content, str):
            raise TypeError(
                f"{of}message {number}: content must be a str, got {type(content).__name__}"
            )
        if (number, role) != (0, "system"):
            if role != expected:
                raise Refusal(f"{of}message {number}: expected role '{expected}', got '{role}'")
            expected = "assistant" if role == "user" else "user"
        messages.append(Message(role=role, content=content))
    if expected == "user":
        raise Refusal(
            f"{of}message {len(messages)}: expected role 'user' in the last message, got none"
        )
    return messages


def encode_dialog(dialog: Dialog, tokenizer: Tokenizer) -> list[int]:
    """Encode a dialog as the prompt for the next assistant message.

    A system message becomes part of the first user message:
    "<<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user}". Each completed exchange is encoded separately, as
    "[INST] {user} [/INST] {assistant} " between BOS and EOS. The last user message is BOS, then
    "[INST] {user} [/INST]". Contents are stripped. For tokenizers with <step>, see encode_steps.

    Raises ValueError if roles are out of order, a message contains one of the layout's tags or the
    model has another chat layout; TypeError if `dialog` is not a list of messages.
    """
    if tokenizer.chat_template is not None and B_INST not in tokenizer.chat_template:
        raise ValueError(
            f"the model's chat template has no {B_INST}: it is not a Llama 2 chat model, "
            "so pass its prompts as text"
        )
    messages = check_dialog(dialog)
    if has_special_tags(messages, tokenizer):
        raise ValueError(UNSAFE_ERROR)
    if tokenizer.step_id >= 0:
        steps = [(message["role"], message["content"]) for message in messages]
        return encode_steps(steps, tokenizer)
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        contents[:2] = [f"{B_SYS}{contents[0]}{E_SYS}{contents[1]}"]
    *turns, last = (content.strip() for content in contents)

    tokens: list[int] = []
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        tokens += tokenizer.encode(f"{B_INST} {user} {E_INST} {assistant} ", bos=True, eos=True)
    return tokens + tokenizer.encode(f"{B_INST} {last} {E_INST}", bos=True, eos=False)
