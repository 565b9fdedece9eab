"""The user's terminal, on the first rank: reads lines, and keys while an answer is printed.

During a conversation the terminal is in cbreak mode (keys arrive one by one, without echo), except
while a line is edited. This handles the following cases:
- Ctrl-C. Its signal would also reach torchrun, which would end the job. Here it is read as a key.
- Ctrl-Z. It would stop torchrun but none of its ranks, so under torchrun it is disabled. Without
  torchrun the shell's mode is restored while the program is stopped, and the program's mode when
  it continues.
- Text typed while an answer is printed. It is kept and becomes the next line.
- Pasted text. Several lines become one message.
- Bytes that are not valid text are replaced. On systems without termios (Windows), lines are read
  as they arrive.
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
except ImportError:  # Windows: input() reads the lines, and Ctrl-C ends the program
    HAS_TERMIOS = False

# Input that arrives within this time after a line was pasted together with it.
PASTE_SECONDS = 0.02

# Keys that are not text: escape sequences, such as cursor keys, and control characters.
KEYS = re.compile(r"\x1b\[[\d;]*[A-Za-z~]|[\x00-\x08\x0b-\x1f\x7f]")

CTRL_C = b"\x03"
CTRL_D = b"\x04"

SPECIAL_CHARACTERS = 6  # index of the control characters in the list that tcgetattr returns


def show(text: str) -> None:
    print(text, end="", flush=True)


def is_terminal(stream: TextIO) -> bool:
    return HAS_TERMIOS and stream.isatty()


class Terminal:
    """Standard input. If it is not a terminal, or on another rank, only `ask` has an effect."""

    def __init__(self) -> None:
        self.prompt = ""  # the prompt of the line being edited, if there is one
        self.typed = b""  # keys typed while no line was being edited
        self.tty: int | None = None
        if is_terminal(sys.stdin) and dist.get_rank() == 0:
            self.tty = sys.stdin.fileno()
            self._set_up(self.tty)

    def _set_up(self, file: int) -> None:
        """Prepare the two modes of the terminal: the shell's, and ours for editing."""
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
        """The next message, stripped; None at the end of input. Pasted lines are one message."""
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
        """Store keys typed so far or within `seconds`. Returns whether Ctrl-C was among them."""
        while self.tty is not None and select.select([self.tty], [], [], seconds)[0]:
            keys = os.read(self.tty, 1024)
            if not keys:
                break
            self.typed += keys.replace(b"\r", b"\n")
        interrupted = CTRL_C in self.typed
        self.typed = self.typed.replace(CTRL_C, b"")
        return interrupted

    def _line(self, prompt: str) -> str:
        """The next line of the stored keys, or a line that the user edits.

        An incomplete stored line is the initial text of the edited line.
        """
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
        """Handle Ctrl-Z: stop with the terminal in the shell's mode, and restore ours on return."""
        assert self.tty is not None
        now = termios.tcgetattr(self.tty)
        termios.tcsetattr(self.tty, termios.TCSANOW, self.shell_mode)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # returns when the shell continues this process
        signal.signal(signal.SIGTSTP, self._stop)
        termios.tcsetattr(self.tty, termios.TCSANOW, now)
        if self.prompt:
            show(self.prompt + readline.get_line_buffer())
