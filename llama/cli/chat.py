"""python -m llama chat: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Annotated

from ..chat import SPECIAL_TAGS, UNSAFE_ERROR, Message, encode_dialog, has_special_tags
from ..distributed import patient_ranks
from ..errors import did_you_mean
from ..generation import BuildOptions, Llama
from ..sampling import SamplingParams
from .allocator import build_llama
from .arguments import Hidden
from .common import (
    NO_FLAG,
    ONE_PROMPT,
    SAMPLING,
    FolderOrFile,
    System,
    keywords_of,
    system_message,
)
from .terminal import Terminal, show

WORDS = {
    "/system": "TEXT sets the system message from here on; without TEXT there is none",
    "/save": "FILE writes the conversation as a JSON list of messages",
    "/reset": "begins a new conversation with the same system message",
    "/exit": "ends, as Ctrl-D does; typed during an answer, it ends after the answer",
    "/help": "shows this list",
}


def chat(
    ckpt_dir: FolderOrFile,
    *,
    system: System = None,
    build: Annotated[BuildOptions, Hidden(["max_batch_size", "model_parallel_size"])] = ONE_PROMPT,
    sampling: Annotated[SamplingParams, Hidden(NO_FLAG)] = SAMPLING,
) -> None:
    """Talk to a chat model at the terminal. Under torchrun the model is split over the ranks.

    When the conversation leaves less than a quarter of `max_seq_len` for an answer, its oldest
    exchanges are dropped.
    """
    opening = system_message(system)
    llm = build_llama(ckpt_dir, build)
    conversation = Conversation(llm, opening, sampling)
    show("Ctrl-C stops an answer, /help lists the commands, /exit or Ctrl-D ends.\n\n")
    with contextlib.closing(Terminal()) as terminal:
        conversation.run(terminal)


class Conversation:
    """The conversation so far. All ranks run it; only the first rank has the terminal."""

    def __init__(self, llm: Llama, opening: list[Message], sampling: SamplingParams):
        self.llm = llm
        self.opening = opening  # the system message, if there is one
        self.history: list[Message] = []  # the messages that were not dropped
        self.options = keywords_of(sampling)
        # Answers become part of the next prompt, which must not contain special tags.
        self.options["stop"] = [*SPECIAL_TAGS, *sampling.stop]
        self.ranks = patient_ranks()
        # Reject a model that cannot chat now, not after the first message. A stream that is not
        # read computes nothing.
        llm.stream_chat_completion([[Message(role="user", content="")]], **self.options)

    def run(self, terminal: Terminal) -> None:
        """Answer lines until the end of input or /exit."""
        while True:
            text = self.ranks.ask_first(terminal.ask)
            if text is None or text == "/exit":
                return
            word, *rest = text.split(maxsplit=1) or [""]
            try:
                if re.fullmatch(r"/\w*", word):
                    said = self.obey(word, *rest)
                else:
                    said = self.answer(text, terminal)
            except ValueError as error:
                said = str(error)
            if said:
                show(f"{said}\n\n")

    def obey(self, word: str, text: str = "") -> str:
        """Run a /command. Returns the text to print."""
        if word == "/system":
            self.opening = system_message(text)
            which = "this" if text else "no"
            return f"({which} system message from here on)"
        if word == "/save":
            return self.save(os.path.expanduser(text)) if text else "/save needs the name of a file"
        if word == "/reset":
            self.history = []
            return "(a new conversation)"
        if word == "/help":
            return "\n".join(f"{name:8} {what}" for name, what in WORDS.items())
        return f"{word} is not a command: {did_you_mean(word, WORDS) or '/help lists them'}"

    def save(self, file: str) -> str:
        try:
            if self.ranks.rank == 0:
                with open(file, "x", encoding="utf-8") as stream:
                    json.dump(self.opening + self.history, stream, ensure_ascii=False, indent=2)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            return f"{file} could not be written ({reason}): choose another name"
        return f"({len(self.history)} messages are in {file})"

    def answer(self, text: str, terminal: Terminal) -> str:
        """Print the model's answer, until Ctrl-C. Returns an error message to print, or ""."""
        if not text:
            return ""
        message = Message(role="user", content=text)
        if has_special_tags([message], self.llm.tokenizer):
            return UNSAFE_ERROR
        turns = self.fitting([*self.history, message])
        stream = self.llm.stream_chat_completion([self.opening + turns], **self.options)
        if len(turns) <= len(self.history):
            show("(the conversation exceeds max_seq_len: its oldest messages were dropped)\n\n")
        answer = ""
        for piece in stream:
            show(piece["text"])
            answer += piece["text"]
            if self.ranks.ask_first(terminal.listen):
                show(" (stopped)")
                break
        show("\n\n")
        self.history = [*turns, Message(role="assistant", content=answer)]
        return ""

    def fitting(self, turns: list[Message]) -> list[Message]:
        """The latest messages, as many as leave a quarter of `max_seq_len` for the answer."""
        limit = self.llm.model.params.max_seq_len * 3 // 4
        while len(turns) > 1:
            ids = encode_dialog(self.opening + turns, self.llm.tokenizer)
            if len(ids) <= limit:
                break
            turns = turns[2:]
        return turns
