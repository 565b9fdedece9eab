"""One person's terminal, which the first rank has: lines in, keys while an answer is printed.

During a conversation the terminal is in cbreak mode (keys come one by one, without echo), except
while a line is edited. That defends against
- Ctrl-C, whose signal would also reach torchrun, which would end the job: here it is a key;
- Ctrl-Z, which would stop torchrun and none of its ranks; without torchrun the shell gets its own
  mode back while the program is stopped, and the program its mode when it continues;
- what is typed while an answer is printed: it is kept, and becomes the next line;
- what is pasted: several lines are one message;
- bytes that are no text, and systems without termios (Windows), where lines come as they are.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from typing import TextIO

import torch.distributed as dist

try:
    import readline
    import termios
    import tty

    HAS_TERMIOS = True
except ImportError:  # Windows: lines come as the system reads them, and Ctrl-C ends the program
    HAS_TERMIOS = False

# What comes so soon after a line was pasted with it.
PASTE_SECONDS = 0.02

# Keys that are no text: cursor keys and the like, control characters.
KEYS = re.compile(r"\x1b\[[\d;]*[A-Za-z~]|[\x00-\x08\x0b-\x1f\x7f]")

CTRL_C = b"\x03"
CTRL_D = b"\x04"

SPECIAL_CHARACTERS = 6  # their place in what tcgetattr returns


def show(text: str) -> None:
    print(text, end="", flush=True)


def is_terminal(stream: TextIO) -> bool:
    return HAS_TERMIOS and stream.isatty()


class Terminal:
    """Standard input. Where it is no terminal, or on another rank, only `ask` does anything."""

    def __init__(self) -> None:
        self.prompt = ""  # what stands before the line that is edited, while one is
        self.typed = b""  # keys that came while none was
        self.tty: int | None = None
        if is_terminal(sys.stdin) and dist.get_rank() == 0:
            self.tty = sys.stdin.fileno()
            self._set_up(self.tty)

    def _set_up(self, file: int) -> None:
        """Prepare two modes of the terminal: the shell's, and ours for editing."""
        self.shell_mode = termios.tcgetattr(file)
        self.editing_mode = termios.tcgetattr(file)
        off = bytes([os.fpathconf(file, "PC_VDISABLE")])
        self.editing_mode[SPECIAL_CHARACTERS][termios.VINTR] = off
        if dist.is_torchelastic_launched():
            self.editing_mode[SPECIAL_CHARACTERS][termios.VSUSP] = off
        else:
            signal.signal(signal.SIGTSTP, self._stop)
        readline.parse_and_bind('"\\C-c": kill-whole-line')

    def close(self) -> None:
        if self.tty is not None:
            termios.tcsetattr(self.tty, termios.TCSADRAIN, self.shell_mode)

    def ask(self) -> str | None:
        """The next message, stripped; None at the end of input. What is pasted is one message."""
        typed_before = b"\n" in self.typed
        try:
            lines = [self._line("> ")]
            while not typed_before and self.typed[:1] not in (b"", CTRL_D):
                lines.append(self._line(""))
        except EOFError:
            show("\n")
            return None
        return "\n".join(lines).strip()

    def listen(self, seconds: float = 0) -> bool:
        """Keep what was typed and is typed within this time; returns whether it had a Ctrl-C."""
        while self.tty is not None and select.select([self.tty], [], [], seconds)[0]:
            keys = os.read(self.tty, 1024)
            if not keys:
                break
            self.typed += keys.replace(b"\r", b"\n")
        interrupted = CTRL_C in self.typed
        self.typed = self.typed.replace(CTRL_C, b"")
        return interrupted

    def _line(self, prompt: str) -> str:
        """A line of what was typed before; the beginning of one is left to be edited."""
        if self.typed.startswith(CTRL_D):
            raise EOFError
        keys, newline, self.typed = self.typed.partition(b"\n")
        begun = KEYS.sub("", keys.decode(errors="replace"))
        if newline:
            show(f"{prompt}{begun}\n")
            return begun
        if self.tty is None:
            return input(prompt)
        return self._edit(self.tty, prompt, begun)

    def _edit(self, file: int, prompt: str, begun: str) -> str:
        termios.tcsetattr(file, termios.TCSADRAIN, self.editing_mode)
        readline.set_startup_hook(lambda: readline.insert_text(begun))
        self.prompt = prompt
        line = input(prompt)
        self.prompt = ""
        tty.setcbreak(file, termios.TCSADRAIN)
        self.listen(PASTE_SECONDS)
        return line

    def _stop(self, *_: object) -> None:
        """Ctrl-Z: stop in the shell's mode of the terminal, and continue in the present one."""
        assert self.tty is not None
        now = termios.tcgetattr(self.tty)
        termios.tcsetattr(self.tty, termios.TCSANOW, self.shell_mode)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # returns when the shell continues this process
        signal.signal(signal.SIGTSTP, self._stop)
        termios.tcsetattr(self.tty, termios.TCSANOW, now)
        if self.prompt:
            show(self.prompt + readline.get_line_buffer())
