"""Make docs/terminal.svg from a real conversation: python docs/make_terminal.py

Needs pexpect and rich.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pexpect
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
COMMAND = "python -m llama chat llama-2-tiny --temperature 0"
SAID = [
    "What does the rabbit eat?",
    "And where does it live?",
    "/system Answer like a pirate.",
    "What does the bear like to do?",
]


def conversation() -> list[tuple[str, str]]:
    """Styles and texts of what is typed and printed, in order."""
    job = pexpect.spawn(
        sys.executable,
        COMMAND.split()[1:],
        cwd=HERE.parent,
        encoding="utf-8",
        timeout=120,
        echo=False,
    )
    job.expect("(Ctrl-C stops .*ends.)\r\n\r\n")
    shown = [
        ("bold", f"$ {COMMAND}\n"),
        ("dim", f"{job.match[1]}\n\n"),
    ]
    for line in SAID:
        job.expect("> ")
        job.sendline(line)
        job.expect("\r\n\r\n")
        shown += [
            ("bold cyan", f"> {line}\n"),
            ("", job.before.replace("\r\n", "\n").removeprefix(line).strip() + "\n\n"),
        ]
    job.sendline("/exit")
    job.expect(pexpect.EOF)
    return shown


def main() -> None:
    console = Console(record=True, width=84, file=open("/dev/null", "w"))  # noqa: SIM115
    shown = Text.assemble(*((text, style) for style, text in conversation()))
    shown.rstrip()
    console.print(shown)
    (HERE / "terminal.svg").write_text(console.export_svg(title="llama-2-tiny"))


if __name__ == "__main__":
    main()
