"""A person at a terminal: a conversation, or one answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import sys
import time
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch.distributed as dist

from ..chat import SPECIAL_TAGS, UNSAFE_ERROR, Message, encode_dialog, has_special_tags
from ..distributed import patient_ranks
from ..generation import Llama
from .program import did_you_mean

try:
    import readline
    import termios
    import tty

    HAS_TTY = True
except ImportError:  # Windows: lines come as the system reads them, and Ctrl-C ends the program
    HAS_TTY = False

WORDS = {
    "/system": "TEXT tells the model how to answer from here on; without a text, nothing does",
    "/save": "FILE writes the conversation as a JSON list of messages",
    "/reset": "begins a new conversation, under the same system message",
    "/exit": "ends, as Ctrl-D does; typed during an answer, after it",
    "/help": "shows this",
}
PASTE_SECONDS = 0.02  # what comes this soon after a line was pasted with it
KEYS = re.compile(r"\x1b\[[\d;]*[A-Za-z~]|[\x00-\x08\x0b-\x1f\x7f]")  # those that are no text


@dataclass
class Session:
    """A model, from the flags that chat and run share."""

    ckpt_dir: str
    _: KW_ONLY
    tokenizer_path: str | None = None
    system: str | None = None
    temperature: float = 0.6
    top_p: float = 0.9
    max_seq_len: int = 2048
    max_gen_len: int | None = None
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"
    quantize: Literal["int8", "int4"] | None = None
    adapter_dir: str | None = None

    def __post_init__(self) -> None:
        self.opening = system_message(self.system)
        self.settings = {name: getattr(self, name) for name in ("temperature", "top_p", "max_gen_len")}
        kind = {name: getattr(self, name) for name in ("seed", "device", "dtype", "quantize", "adapter_dir")}
        self.llm = Llama.build(self.ckpt_dir, self.tokenizer_path, self.max_seq_len, 1, **kind)
        self.ranks = patient_ranks()


@dataclass
class Run(Session):
    """Answer one prompt as a chat model does, or with --plain continue its text. How fast is said on stderr."""

    prompt: str | None = None
    _: KW_ONLY
    plain: bool = False

    def __post_init__(self) -> None:
        if self.plain and self.system:
            raise ValueError("a system message is for answers: leave out --system or --plain")
        super().__post_init__()

    def __call__(self) -> None:
        text = self.ranks.ask_first(read_stdin) if self.prompt in (None, "-") else str(self.prompt)
        if self.plain:
            stream = self.llm.stream_text_completion([text], logprobs=True, **self.settings)
        elif text.strip():
            dialog = [*self.opening, Message(role="user", content=text)]
            stream = self.llm.stream_chat_completion([dialog], logprobs=True, **self.settings)
        else:
            raise ValueError("the prompt is empty: pass a text, or send one to standard input")
        start, waited = time.perf_counter(), 0.0
        for piece in stream:
            waited = waited or time.perf_counter() - start
            say(piece["text"])
        say("\n")
        n, seconds = len(piece["tokens"]), time.perf_counter() - start
        if self.ranks.rank == 0:
            print(f"{n} tokens, {n / seconds:.1f} tokens/s, the first after {waited:.2f} s", file=sys.stderr)


class Chat(Session):
    """Talk with a chat model at the terminal. Under torchrun, with one that is split over the ranks.

    When the conversation leaves less than a quarter of `max_seq_len` for an answer, its oldest exchanges are dropped.
    """

    def __call__(self) -> None:
        self.history: list[Message] = []  # what was said and is not forgotten
        # Says now, not after the first message, what is wrong with the settings; a stream computes when it is read.
        self.llm.stream_chat_completion([[Message(role="user", content="")]], **self.settings)
        say("Ctrl-C stops an answer, /help shows what else there is, /exit or Ctrl-D ends.\n\n")
        with contextlib.closing(Terminal()) as self.terminal:
            while (text := self.ranks.ask_first(self.terminal.ask)) not in (None, "/exit"):
                try:
                    word, *rest = text.split(maxsplit=1) or [""]
                    said = self.obey(word, *rest) if re.fullmatch(r"/\w*", word) else self.answer(text)
                except ValueError as error:
                    said = str(error)
                say(said and f"{said}\n\n")

    def obey(self, word: str, text: str = "") -> str:
        """Do what a /word asks for; returns what to say of it."""
        if word == "/system":
            self.opening = system_message(text)
            return f"({'this' if text else 'no'} system message from here on)"
        if word == "/save":
            return self.save(os.path.expanduser(text)) if text else "/save needs the name of a file"
        if word == "/reset":
            self.history = []
            return "(a new conversation)"
        if word == "/help":
            return "\n".join(f"{name:8} {what}" for name, what in WORDS.items())
        return f"{word} is no command: {did_you_mean(word, WORDS) or '/help shows them'}"

    def save(self, file: str) -> str:
        try:
            if self.ranks.rank == 0:
                with open(file, "x", encoding="utf-8") as stream:
                    json.dump(self.opening + self.history, stream, ensure_ascii=False, indent=2)
        except (OSError, ValueError) as error:
            return f"{file} could not be written ({getattr(error, 'strerror', error)}): choose another name"
        return f"({len(self.history)} messages are in {file})"

    def answer(self, text: str) -> str:
        """Say what the model does to this, until Ctrl-C; returns what is to be said instead."""
        turns = [*self.history, Message(role="user", content=text)]
        if not text or has_special_tags(turns[-1:], self.llm.tokenizer):
            return text and UNSAFE_ERROR
        limit = self.llm.model.params.max_seq_len * 3 // 4
        while len(turns) > 1 and len(encode_dialog(self.opening + turns, self.llm.tokenizer)) > limit:
            turns = turns[2:]
        # What the model may say, the next prompt must be able to hold.
        stream = self.llm.stream_chat_completion([self.opening + turns], stop=SPECIAL_TAGS, **self.settings)
        if len(turns) <= len(self.history):
            say("(the conversation has outgrown max_seq_len: its oldest exchange is forgotten)\n\n")
        answer = ""
        for piece in stream:
            say(piece["text"])
            answer += piece["text"]
            if self.ranks.ask_first(self.terminal.listen):
                say(" (stopped)")
                break
        say("\n\n")
        self.history = [*turns, Message(role="assistant", content=answer)]
        return ""


def system_message(text: str | None) -> list[Message]:
    """How a dialog under this system message begins. Raises ValueError for one that holds the layout's tags."""
    opening = [Message(role="system", content=text)] if text else []
    if has_special_tags(opening):
        raise ValueError(UNSAFE_ERROR)
    return opening


def say(text: str) -> None:
    print(text, end="", flush=True)


def read_stdin() -> str:
    """All of standard input, without its last newline."""
    if HAS_TTY and sys.stdin.isatty():
        print("(type the prompt, then Ctrl-D on a line of its own)", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


class Terminal:
    """One person's terminal, which the first rank has.

    In a conversation, keys come one by one and without echo, but for the time in which a line is edited. Ctrl-C is one
    of them: its signal would also reach torchrun, which ends the job.
    """

    def __init__(self) -> None:
        self.prompt = ""  # while a line is asked for
        self.typed = b""  # while none was
        self.tty = sys.stdin.fileno() if HAS_TTY and sys.stdin.isatty() and dist.get_rank() == 0 else None
        if self.tty is not None:
            self.mode, self.editing = termios.tcgetattr(self.tty), termios.tcgetattr(self.tty)  # the shell's, and ours
            self.editing[6][termios.VINTR] = off = bytes([os.fpathconf(self.tty, "PC_VDISABLE")])
            if dist.is_torchelastic_launched():
                self.editing[6][termios.VSUSP] = off  # Ctrl-Z would stop torchrun and none of its ranks
            else:
                signal.signal(signal.SIGTSTP, self._stop)
            readline.parse_and_bind('"\\C-c": kill-whole-line')

    def close(self) -> None:
        if self.tty is not None:
            termios.tcsetattr(self.tty, termios.TCSADRAIN, self.mode)

    def ask(self) -> str | None:
        """The next message, stripped; None at their end. What is pasted is one message, whatever its lines."""
        typed_before = b"\n" in self.typed
        try:
            lines = [self._line("> ")]
            while not typed_before and self.typed[:1] not in (b"", b"\x04"):
                lines.append(self._line(""))
        except EOFError:
            say("\n")
            return None
        return "\n".join(lines).strip()

    def listen(self, seconds: float = 0) -> bool:
        """Keep what was typed, and what is within this time, for the next line; whether Ctrl-C was pressed."""
        while self.tty is not None and select.select([self.tty], [], [], seconds)[0]:
            if not (keys := os.read(self.tty, 1024)):
                break
            self.typed += keys.replace(b"\r", b"\n")
        interrupted = b"\x03" in self.typed
        self.typed = self.typed.replace(b"\x03", b"")
        return interrupted

    def _line(self, prompt: str) -> str:
        """What was typed before, to the end of its line; if it has none, it can be gone on with."""
        if self.typed.startswith(b"\x04"):
            raise EOFError
        keys, newline, self.typed = self.typed.partition(b"\n")
        begun = KEYS.sub("", keys.decode(errors="replace"))
        if newline:
            say(f"{prompt}{begun}\n")
            return begun
        if self.tty is None:
            return input(prompt)
        termios.tcsetattr(self.tty, termios.TCSADRAIN, self.editing)
        readline.set_startup_hook(lambda: readline.insert_text(begun))
        self.prompt = prompt
        line = input(prompt)
        self.prompt = ""
        tty.setcbreak(self.tty, termios.TCSADRAIN)
        self.listen(PASTE_SECONDS)
        return line

    def _stop(self, *_: object) -> None:
        """Ctrl-Z: the shell has the terminal as it was; when it lets this go on, the terminal is again as it is now."""
        assert self.tty is not None
        now = termios.tcgetattr(self.tty)
        termios.tcsetattr(self.tty, termios.TCSANOW, self.mode)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._stop)
        termios.tcsetattr(self.tty, termios.TCSANOW, now)
        if self.prompt:
            say(self.prompt + readline.get_line_buffer())
