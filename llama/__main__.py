"""python -m llama: what one does with a checkpoint folder from a shell."""

from __future__ import annotations

import contextlib
import os
import readline
import select
import sys
import termios
import tty
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .chat import SPECIAL_TAGS, UNSAFE_ERROR, Message, encode_dialog, has_special_tags
from .checkpoints.folders import convert, info, reshard, verify
from .command_line import run
from .generation import Llama

HELP = "Ctrl-C stops an answer, /reset begins anew, /exit or Ctrl-D ends."


def chat(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    system: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 2048,
    max_gen_len: int | None = None,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Talk with a chat model at the terminal; under torchrun, with one that is split over the ranks.

    When the conversation leaves less than a quarter of `max_seq_len` for an answer, its oldest exchanges are dropped.
    """
    llm = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, 1, seed=seed, device=device, dtype=dtype)
    opening = [] if system is None else [Message(role="system", content=str(system))]
    if has_special_tags(opening):
        raise ValueError(UNSAFE_ERROR)
    # Says now, not after the first message, what is wrong with the settings; a stream computes when it is read.
    llm.stream_chat_completion([[Message(role="user", content="")]], temperature, top_p, max_gen_len)
    history: list[Message] = []
    with Terminal() as terminal:
        terminal.say(f"{HELP}\n")
        while (line := terminal.ask()) not in (None, "/exit"):
            if line == "/reset":
                history = []
                terminal.say("(a new conversation)\n")
                continue
            message = Message(role="user", content=line or "")
            if not line or has_special_tags([message]):
                terminal.say(f"{UNSAFE_ERROR}\n" if line else "")
                continue
            turns = [*history, message]
            while len(turns) > 1 and len(encode_dialog(opening + turns, llm.tokenizer)) > max_seq_len * 3 // 4:
                turns = turns[2:]
            try:
                stream = llm.stream_chat_completion(
                    [opening + turns],
                    temperature,
                    top_p,
                    max_gen_len,
                    stop=SPECIAL_TAGS,  # what the model may say, the next prompt must be able to hold
                    reuse_prefix=True,
                )
                if len(turns) <= len(history):
                    terminal.say("(the conversation has outgrown max_seq_len: its oldest exchange is forgotten)\n")
                answer = terminal.show(piece["text"] for piece in stream)
            except ValueError as error:
                terminal.say(f"{error}\n")
            else:
                history = [*turns, Message(role="assistant", content=answer)]


class Terminal:
    """One person's terminal, at rank 0; what is typed there is known on every rank.

    Ctrl-C is read as a character, for the signal would also reach torchrun, which ends the job. The ranks that wait for
    a person to type do so in a group of their own, whose time limit is not that of the model's collectives.
    """

    def __enter__(self) -> Terminal:
        self.first = dist.get_rank() == 0
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if dist.get_world_size() > 1 else None
        self.tty = sys.stdin.fileno() if self.first and sys.stdin.isatty() else None
        self.typed = ""  # while an answer was printed
        if self.tty is not None:
            self.mode = termios.tcgetattr(self.tty)
            quiet = termios.tcgetattr(self.tty)
            quiet[6][termios.VINTR] = bytes([os.fpathconf(self.tty, "PC_VDISABLE")])
            termios.tcsetattr(self.tty, termios.TCSADRAIN, quiet)
            readline.parse_and_bind('"\\C-c": kill-whole-line')
        return self

    def __exit__(self, *_: object) -> None:
        if self.tty is not None:
            termios.tcsetattr(self.tty, termios.TCSADRAIN, self.mode)

    def say(self, text: str, end: str = "\n") -> None:
        if self.first and text:
            print(text, end=end, flush=True)

    def ask(self) -> str | None:
        """The next line, stripped; None at its end."""
        line = None
        if self.first:
            typed, newline, rest = self.typed.partition("\n")
            try:
                if newline:
                    self.typed = rest
                    line = typed.strip()
                    self.say(f"> {line}")
                else:
                    self.typed = ""
                    readline.set_startup_hook(lambda: readline.insert_text(typed))
                    line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.say("")
        return self._tell(line)

    def show(self, pieces: Iterator[str]) -> str:
        """Print pieces as they come, until their end or Ctrl-C; returns what was printed."""
        shown = ""
        with self._keys():
            for piece in pieces:
                self.say(piece, end="")
                shown += piece
                if self._tell(self._interrupted()):
                    self.say(" (stopped)", end="")
                    break
        self.say("\n")
        return shown

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
        if self.tty is None or not select.select([self.tty], [], [], 0)[0]:
            return False
        keys = os.read(self.tty, 1024).decode(errors="ignore").replace("\r", "\n")
        self.typed += keys.replace("\x03", "")
        return "\x03" in keys

    def _tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def main() -> None:
    commands = {"chat": chat, "info": info, "verify": verify, "reshard": reshard, "convert": convert}
    run(commands, name="python -m llama")


if __name__ == "__main__":
    main()
