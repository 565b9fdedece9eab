"""A person at a terminal: a conversation, or one answer."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from .chat import SPECIAL_TAGS, UNSAFE_ERROR, Message, encode_dialog, has_special_tags
from .generation import Llama, Piece
from .launch import did_you_mean

try:
    import readline
    import termios
    import tty
except ImportError:  # Windows: lines come as the system reads them, and Ctrl-C ends the program
    HAS_TTY = False
else:
    HAS_TTY = True

WORDS = {
    "/system": "TEXT tells the model how to answer from here on, - takes that back, nothing shows it",
    "/save": "FILE writes the conversation as a JSON list of messages",
    "/reset": "begins a new conversation, under the same system message",
    "/exit": "ends, as Ctrl-D does; typed during an answer, after it",
    "/help": "shows this",
}
PASTE_SECONDS = 0.02  # what comes this soon after a line was pasted with it
LINE = re.compile(r"(?!\x04)((?:\x1b\[200~.*?\x1b\[201~|(?!\x1b\[200~)[^\n])*)\n", re.DOTALL)  # pasted, with newlines
KEYS = re.compile(r"\x1b\[[\d;]*[A-Za-z~]|[\x00-\x08\x0b-\x1f\x7f]")  # those that are no text
TEXT = re.compile(r"([^\x00-\x08\x0b-\x1f\x7f]*)(.*)", re.DOTALL)  # up to the first that is none


def chat(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    *,
    system: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 2048,
    max_gen_len: int | None = None,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
    adapter_dir: str | None = None,
) -> None:
    """Talk with a chat model at the terminal. Under torchrun, with one that is split over the ranks.

    When the conversation leaves less than a quarter of `max_seq_len` for an answer, its oldest exchanges are dropped.
    """
    opening = system_message(system)
    kind: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, "adapter_dir": adapter_dir}
    llm = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, 1, seed=seed, **kind)
    settings = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len}
    with Terminal() as terminal:
        Conversation(llm, terminal, opening, settings).hold()


def run(
    ckpt_dir: str,
    prompt: str | None = None,
    *,
    plain: bool = False,
    system: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 2048,
    max_gen_len: int | None = None,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
    adapter_dir: str | None = None,
) -> None:
    """Answer one prompt as a chat model does, or with --plain continue its text. How fast is said on stderr."""
    if plain and system:
        raise ValueError("a system message is for answers: leave out --system or --plain")
    opening = system_message(system)
    kind: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, "adapter_dir": adapter_dir}
    llm = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, 1, seed=seed, **kind)
    terminal = Terminal()
    text = terminal.read() if prompt in (None, "-") else str(prompt)
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len}
    if plain:
        stream = llm.stream_text_completion([text], logprobs=True, **settings)
    elif text.strip():
        dialog = [*opening, Message(role="user", content=text)]
        stream = llm.stream_chat_completion([dialog], logprobs=True, **settings)
    else:
        raise ValueError("the prompt is empty: pass a text, or send one to standard input")
    terminal.show_with_speed(stream)


def system_message(text: str | None) -> list[Message]:
    """How a dialog under this system message begins. Raises ValueError for one that holds the layout's tags."""
    opening = [Message(role="system", content=text)] if text else []
    if has_special_tags(opening):
        raise ValueError(UNSAFE_ERROR)
    return opening


class Conversation:
    """What was said, and what the model is shown of it."""

    def __init__(self, llm: Llama, terminal: Terminal, opening: list[Message], settings: dict[str, Any]):
        self.llm = llm
        self.terminal = terminal
        self.opening = opening
        self.settings = settings
        self.history: list[Message] = []

    def hold(self) -> None:
        # Says now, not after the first message, what is wrong with the settings; a stream computes when it is read.
        self.llm.stream_chat_completion([[Message(role="user", content="")]], **self.settings)
        self.terminal.say("Ctrl-C stops an answer, /help shows what else there is, /exit or Ctrl-D ends.\n")
        while (text := self.terminal.ask()) not in (None, "/exit"):
            word, *rest = text.split(maxsplit=1) or [""]
            said = self.obey(word, *rest) if re.fullmatch(r"/\w*", word) else self.answer(text)
            self.terminal.say(said and f"{said}\n")

    def obey(self, word: str, text: str = "") -> str:
        """Do what a /word asks for; returns what to say of it."""
        if word == "/system":
            return self.set_system(text)
        if word == "/save":
            return self.save(text)
        if word in WORDS and text:
            return f"{word} stands alone"
        if word == "/help":
            return "\n".join(f"{name:8} {what}" for name, what in WORDS.items())
        if word == "/reset":
            self.history = []
            return "(a new conversation)"
        return f"{word} is no command: {did_you_mean(word, WORDS) or '/help shows them'}"

    def set_system(self, text: str) -> str:
        if not text:
            return f"({self.opening[0]['content'] if self.opening else 'no system message'})"
        try:
            self.opening = system_message("" if text == "-" else text)
        except ValueError as error:
            return str(error)
        return f"({'this' if self.opening else 'no'} system message from here on)"

    def save(self, name: str) -> str:
        file = os.path.expanduser(name)
        try:
            if self.terminal.first and name:
                with open(file, "x", encoding="utf-8") as stream:
                    json.dump(self.opening + self.history, stream, ensure_ascii=False, indent=2)
        except FileExistsError:
            return f"{file} is there already: choose another name"
        except (OSError, ValueError) as error:
            return f"{file} could not be written ({getattr(error, 'strerror', error)}): choose another place"
        return f"({len(self.history)} messages are in {file})" if name else "/save needs the name of a file"

    def answer(self, text: str) -> str:
        """Say what the model does to this; returns what else is to be said."""
        turns = [*self.history, Message(role="user", content=text)]
        if not text or has_special_tags(turns[-1:], self.llm.tokenizer):
            return text and UNSAFE_ERROR
        limit = self.llm.model.params.max_seq_len * 3 // 4
        while len(turns) > 1 and len(encode_dialog(self.opening + turns, self.llm.tokenizer)) > limit:
            turns = turns[2:]
        try:
            # What the model may say, the next prompt must be able to hold.
            stream = self.llm.stream_chat_completion([self.opening + turns], stop=SPECIAL_TAGS, **self.settings)
            if len(turns) <= len(self.history):
                self.terminal.say("(the conversation has outgrown max_seq_len: its oldest exchange is forgotten)\n")
            answer = self.terminal.show(piece["text"] for piece in stream)
        except ValueError as error:
            return str(error)
        self.history = [*turns, Message(role="assistant", content=answer)]
        return ""


class Terminal:
    """One person's terminal, at rank 0; what is typed there is known on every rank.

    Ctrl-C is read as a character, for the signal would also reach torchrun, which ends the job. The ranks that wait for
    a person to type do so in a group of their own, whose time limit is not that of the model's collectives.
    """

    def __init__(self) -> None:
        self.first = dist.get_rank() == 0
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if dist.get_world_size() > 1 else None
        self.tty = sys.stdin.fileno() if self.first and HAS_TTY and sys.stdin.isatty() else None
        self.mode = [] if self.tty is None else termios.tcgetattr(self.tty)  # as the shell has it
        self.marks = self.tty is not None and os.environ.get("TERM", "dumb") != "dumb"  # where a paste begins and ends
        self.prompt = ""  # while a line is asked for
        self.typed = ""  # while none was
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __enter__(self) -> Terminal:
        if self.tty is not None:
            own = termios.tcgetattr(self.tty)
            own[6][termios.VINTR] = off = bytes([os.fpathconf(self.tty, "PC_VDISABLE")])
            if dist.is_torchelastic_launched():
                own[6][termios.VSUSP] = off  # Ctrl-Z would stop torchrun and none of its ranks
            else:
                signal.signal(signal.SIGTSTP, self._stop)
            termios.tcsetattr(self.tty, termios.TCSADRAIN, own)
            readline.parse_and_bind('"\\C-c": kill-whole-line')
            readline.parse_and_bind(f"set enable-bracketed-paste {'on' if self.marks else 'off'}")
        return self

    def __exit__(self, *_: object) -> None:
        if self.tty is not None:
            self._mark_pastes("l")
            termios.tcsetattr(self.tty, termios.TCSADRAIN, self.mode)

    def say(self, text: str, end: str = "\n") -> None:
        if self.first and text:
            print(text, end=end, flush=True)

    def read(self) -> str:
        """All of standard input, without its last newline."""
        if self.tty is not None:
            print("(type the prompt, then Ctrl-D on a line of its own)", file=sys.stderr)
        return str(self._tell(sys.stdin.read().removesuffix("\n") if self.first else ""))

    def ask(self) -> str | None:
        """The next message, stripped; None at their end. What is pasted is one message, whatever its lines."""
        message = None
        if self.first:
            try:
                message = self._message().strip()
            except EOFError:
                self.say("\n", end="")
        return self._tell(message)

    def show(self, pieces: Iterator[str]) -> str:
        """Print pieces as they come, until their end or Ctrl-C; returns what was printed."""
        shown = ""
        with self._keys():
            self._mark_pastes("h")
            for piece in pieces:
                self.say(piece, end="")
                shown += piece
                if self._tell(self._interrupted()):
                    self.say(" (stopped)", end="")
                    break
        self.say("\n")
        return shown

    def show_with_speed(self, stream: Iterator[Piece]) -> None:
        """Print a stream's only text, and to stderr, how many tokens there were and how fast."""
        start, waited = time.perf_counter(), 0.0
        for piece in stream:
            waited = waited or time.perf_counter() - start
            self.say(piece["text"], end="")
        self.say("\n", end="")
        n, seconds = len(piece["tokens"]), time.perf_counter() - start
        if self.first:
            print(f"{n} tokens, {n / seconds:.1f} tokens/s, the first after {waited:.2f} s", file=sys.stderr)

    def _message(self) -> str:
        if line := LINE.match(self.typed):
            self.typed = self.typed[line.end() :]
            text = KEYS.sub("", line[1])
            self.say(f"> {text}")
            return text
        if self.typed.startswith("\x04"):
            raise EOFError
        begun, self.typed = KEYS.sub("", self.typed), ""
        text = self._line("> ", begun)
        while pasted := self._pasted():  # by a terminal that does not mark it
            lines, newline, begun = pasted.rpartition("\n")
            self.say(lines)
            text += newline + lines + (begun and "\n" + self._line("", begun))
        return text

    def _line(self, prompt: str, begun: str) -> str:
        if self.tty is not None:
            readline.set_startup_hook(lambda: readline.insert_text(begun))
        self.prompt = prompt
        line = input(prompt)
        self.prompt = ""
        return line

    def _pasted(self) -> str:
        """What came together with the line before, up to a key that is no text."""
        with self._keys():
            self._read(PASTE_SECONDS)
        text, self.typed = TEXT.findall(self.typed)[0]
        return text

    @contextlib.contextmanager
    def _keys(self) -> Iterator[None]:
        """Keys come one by one, without echo."""
        if self.tty is None:
            yield
            return
        before = termios.tcgetattr(self.tty)
        tty.setcbreak(self.tty, termios.TCSADRAIN)
        try:
            yield
        finally:
            termios.tcsetattr(self.tty, termios.TCSADRAIN, before)

    def _interrupted(self) -> bool:
        """Whether Ctrl-C was pressed since; other keys are kept for the next line."""
        self._read()
        interrupted = "\x03" in self.typed
        self.typed = self.typed.replace("\x03", "")
        return interrupted

    def _read(self, seconds: float = 0) -> None:
        """Take what was typed, and what is within this time."""
        while self.tty is not None and select.select([self.tty], [], [], seconds)[0]:
            if not (keys := os.read(self.tty, 1024)):
                break
            self.typed += self.decoder.decode(keys).replace("\r", "\n")

    def _mark_pastes(self, switch: str) -> None:
        """Have the terminal put marks around what is pasted, or not; readline does so while it reads."""
        if self.marks:
            self.say(f"\x1b[?2004{switch}", end="")

    def _stop(self, *_: object) -> None:
        """Ctrl-Z: the shell has the terminal as it was; when it lets this go on, the terminal is again as it is now."""
        assert self.tty is not None
        now = termios.tcgetattr(self.tty)
        self._mark_pastes("l")
        termios.tcsetattr(self.tty, termios.TCSANOW, self.mode)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._stop)
        termios.tcsetattr(self.tty, termios.TCSANOW, now)
        self._mark_pastes("h")
        if self.prompt:
            self.say(self.prompt + readline.get_line_buffer(), end="")

    def _tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]
