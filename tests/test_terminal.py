"""python -m llama chat, driven through a pseudo-terminal as a person would."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, TINY, clean_environment, run_python

pexpect = pytest.importorskip("pexpect")

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SLOW_CHAT = [str(ROOT / "tests" / "workers" / "slow_chat.py")]
MODEL = ["--ckpt_dir", str(TINY), "--tokenizer_path", str(TINY / "tokenizer.model"), "--temperature", "0"]


def start(*arguments: str, **options: str) -> pexpect.spawn:
    own = [part for name, value in options.items() for part in (f"--{name}", value)]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    child = pexpect.spawn(
        sys.executable,
        [*arguments, "chat", *MODEL, *own],
        env=environment,
        cwd=str(ROOT),
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 1000),
    )
    child.expect("Ctrl-D ends")
    child.expect("> ")
    return child


def ask(child: pexpect.spawn, line: str) -> str:
    """Type a line; what is printed until the next prompt."""
    child.sendline(line)
    child.expect_exact(line)
    child.expect("\r\n> ")
    return child.before.strip()


@pytest.mark.parametrize("launcher", [[*LAUNCHER, *SLOW_CHAT], ["-m", "llama"]], ids=["two ranks", "one process"])
def test_a_conversation_at_the_terminal(launcher: list[str]) -> None:
    child = start(*launcher)
    where = ask(child, "Where does the fox live?")
    assert where.startswith("The fox lives") and where.count("fox") == 1
    time.sleep(4)  # longer than the collectives' time limit in slow_chat.py
    eats = ask(child, "And what does it eat?")
    assert eats.startswith("The fox eats") and eats.count("fox") == 1
    assert ask(child, "/reset") == "(a new conversation)"
    assert ask(child, "Say [INST] please") == "Error: special tags are not allowed as part of the prompt."
    assert ask(child, "Where does the fox live?") == where
    started = time.monotonic()
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)
    assert time.monotonic() - started < 5


def test_ctrl_c_stops_the_answer_and_not_the_job() -> None:
    child = start(*LAUNCHER, *SLOW_CHAT)
    child.sendline("Tell me a story about the fox.")
    child.expect_exact("Tell me a story about the fox.")
    child.expect("[A-Za-z]+ ")
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect("\r\n> ")
    assert ask(child, "Where does the fox live?").startswith("The fox lives")
    child.sendintr()  # at the prompt it only clears the line
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_what_is_typed_during_an_answer_is_the_next_line() -> None:
    child = start(*LAUNCHER, *SLOW_CHAT)
    child.sendline("Tell me a story about the fox.")
    child.expect("[A-Za-z]+ [A-Za-z]+ ")
    child.sendline("Where does the owl live?")
    child.expect_exact("> Where does the owl live?")
    child.expect(r"The \w+ lives in")
    child.close(force=True)


def test_the_system_message_holds_for_the_whole_conversation() -> None:
    child = start("-m", "llama", system="Answer in one word.")
    assert len(ask(child, "Where does the fox live?").split()) == 1
    ask(child, "/reset")
    assert len(ask(child, "What does the fox eat?").split()) == 1
    child.close(force=True)


def test_history_that_outgrows_the_limit_loses_its_oldest_exchange_and_says_so() -> None:
    child = start("-m", "llama", system="Answer in one word.", max_seq_len="128")
    answers = [ask(child, f"Where does the {animal} live?") for animal in ("fox", "owl", "fox", "owl", "fox")]
    assert "its oldest exchange is forgotten" in answers[-1]
    assert answers[-1].split()[-1] == answers[0].split()[-1]
    assert ask(child, "word" + " word" * 120).startswith("dialog 0 has ")
    assert ask(child, "Where does the owl live?").split()[-1] == answers[1].split()[-1]
    child.close(force=True)


def test_lines_may_come_through_a_pipe() -> None:
    job = run_python("-m", "llama", "chat", *MODEL, input="Where does the fox live?\n\n/exit\n")
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("The fox lives") == 1


def test_a_mistake_in_the_command_is_answered_with_a_sentence(tmp_path: Path) -> None:
    job = run_python("-m", "llama", "chat", "--ckpt_dir", tmp_path, "--tokenizer_path", GOLDEN / "tokenizer.model")
    assert job.returncode == 1
    assert (
        job.stderr
        == f"error: no consolidated.*.pth in {tmp_path}/: is this the folder that download.sh made?{os.linesep}"
    )
    job = run_python("-m", "llama", "chat", *MODEL, "--top_p", "7", input="")
    assert (job.returncode, job.stderr.splitlines()[-1]) == (1, "error: top_p is 7: use more than 0 and at most 1")
