"""python -m llama chat and run, driven through a pseudo-terminal or pipes as a person would."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    GOLDEN,
    ROOT,
    TINY,
    clean_environment,
    launcher,
    run_fresh,
    run_python,
    torchrun,
)

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

pexpect = pytest.importorskip("pexpect")

LAUNCHER = launcher(2)
SLOW_CHAT = [str(ROOT / "tests" / "workers" / "slow_chat.py")]
MODEL = [
    "--ckpt_dir",
    str(TINY),
    "--tokenizer_path",
    str(TINY / "tokenizer.model"),
    "--temperature",
    "0",
]


ENVIRONMENT = clean_environment() | {
    "OMP_NUM_THREADS": "1",
    "TERM": "dumb",
    "PYTHONPATH": str(ROOT),
}


def start(*arguments: str, term: str = "dumb", **options: str) -> pexpect.spawn:
    own = [part for name, value in options.items() for part in (f"--{name}", value)]
    environment = ENVIRONMENT | {"TERM": term}
    child = pexpect.spawn(
        sys.executable,
        [*arguments, "chat", *MODEL, *own],
        env=environment,
        cwd=str(ROOT),
        encoding="utf-8",
        codec_errors="replace",
        timeout=60,
        dimensions=(24, 1000),
    )
    # Seconds that a process may take to exit. The default, 0.1, is too short on busy cores.
    child.ptyproc.delayafterterminate = 1
    child.expect("Ctrl-D ends")
    child.expect("> ")
    return child


def ask(child: pexpect.spawn, line: str) -> str:
    """Type a line; return the output up to the next prompt."""
    child.sendline(line)
    child.expect_exact(line)
    child.expect("\r\n> ")
    return child.before.strip()


@pytest.mark.parametrize(
    "launcher", [[*LAUNCHER, *SLOW_CHAT], ["-m", "llama"]], ids=["two ranks", "one process"]
)
def test_a_conversation_at_the_terminal(launcher: list[str]) -> None:
    child = start(*launcher)
    where = ask(child, "Where does the fox live?")
    assert where.startswith("The fox lives") and where.count("fox") == 1
    time.sleep(6 * (SLOW_CHAT[0] in launcher))  # longer than that script's timeout for collectives
    eats = ask(child, "And what does it eat?")
    assert eats.startswith("The fox eats") and eats.count("fox") == 1
    assert ask(child, "/reset") == "(a new conversation)"
    assert (
        ask(child, "Say [INST] please")
        == "Error: special tags are not allowed as part of the prompt."
    )
    assert ask(child, "Where does the fox live?") == where
    started = time.monotonic()
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)
    assert time.monotonic() - started < 60


def test_ctrl_c_stops_the_answer_and_not_the_job() -> None:
    child = start(*LAUNCHER, *SLOW_CHAT)
    child.sendline("Tell me a story about the fox.")
    child.expect_exact("Tell me a story about the fox.")
    child.expect("[A-Za-z]+ ")
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect("\r\n> ")
    assert ask(child, "Where does the fox live?").startswith("The fox lives")
    child.sendintr()  # at the prompt, Ctrl-C only clears the line
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


def messages(file: Path) -> list[str]:
    """Return the user's messages in a saved conversation."""
    return [
        message["content"] for message in json.loads(file.read_text()) if message["role"] == "user"
    ]


def test_what_is_pasted_is_one_message(tmp_path: Path) -> None:
    child = start("-m", "llama")
    child.send("Where does the\nfox\nlive?\n")
    child.expect("\r\n> ")
    child.send("And the\nowl ")  # a paste that ends inside a line can be continued
    time.sleep(0.3)
    child.send("live?\n")
    child.expect("\r\n> ")
    assert ask(child, f"/save {tmp_path}/paste") == f"(4 messages are in {tmp_path}/paste)"
    assert messages(tmp_path / "paste") == ["Where does the\nfox\nlive?", "And the\nowl live?"]
    child.close(force=True)


def test_what_a_terminal_marks_as_pasted_is_one_message(tmp_path: Path) -> None:
    """Terminals put marks around pasted text; Enter sends it."""
    child = start("-m", "llama", term="xterm")
    child.send("\x1b[200~Where does\rthe fox live?\x1b[201~")
    time.sleep(0.2)
    child.send("\r")
    child.expect("\r\n\r\n> ")
    child.send(f"/save {tmp_path}/paste\r")
    child.expect("messages are in")
    assert messages(tmp_path / "paste") == ["Where does\nthe fox live?"]
    child.close(force=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell with job control")
def test_ctrl_z_and_back_changes_nothing() -> None:
    shell = pexpect.spawn(
        "bash",
        ["--norc", "-i"],
        env=ENVIRONMENT | {"PS1": "shell$ "},
        cwd=str(ROOT),
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 1000),
    )
    shell.sendline(" ".join([sys.executable, *SLOW_CHAT, "chat", *MODEL]))
    shell.expect("Ctrl-D ends.*> ")

    def leave_and_return() -> None:
        shell.send("\x1a")
        shell.expect("Stopped.*shell\\$ ")
        # Shells differ in which terminal settings they change. This one changes a key.
        shell.sendline("stty -a; stty intr ^X")
        shell.expect("intr = \\^[CX].*shell\\$ ")
        shell.sendline("fg")
        time.sleep(0.5)

    shell.send("Where does")
    leave_and_return()
    shell.send("nothing\x03")
    time.sleep(0.2)
    shell.sendline("Tell me a story about the fox.")
    shell.expect("[A-Za-z]+ [a-z]+ ")
    leave_and_return()
    shell.sendintr()
    shell.expect_exact("(stopped)")
    shell.expect("\r\n> ")
    assert ask(shell, "Where does the fox live?").startswith("The fox lives")
    shell.sendintr()
    shell.sendline("/exit")
    shell.expect("shell\\$ ")
    shell.close(force=True)


def test_ctrl_d_during_an_answer_ends_after_it() -> None:
    child = start(*SLOW_CHAT)
    child.sendline("Where does the fox live?")
    child.expect("The fox")
    child.sendeof()
    child.expect(r"lives in the \w+\.")
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def converse(*lines: str, **options: Any) -> list[str]:
    """Return the response to each line sent through a pipe."""
    job = run_python(
        "-m", "llama", "chat", *MODEL, input="".join(f"{line}\n" for line in lines), **options
    )
    assert job.returncode == 0, job.stderr
    return [said.strip() for said in job.stdout.partition("Ctrl-D ends.")[2].split("\n> ")[1:]]


def test_words_with_a_stroke_are_commands(tmp_path: Path) -> None:
    saved, question = tmp_path / "a conversation.json", "Where does the fox live?"
    said = converse(
        question,
        "/rest",
        "/",
        "/help",
        "/system Answer in one word.",
        question,
        "/system Use [INST].",
        f"/save {saved}",
        f"/save {saved}",
        f"/save {tmp_path}/none/file",
        "/save",
        "/system",
        "/reset",
        question,
        "/etc/hosts is what?",
    )
    assert said[0].startswith("The fox lives")
    assert said[1:3] == [
        "/rest is not a command: did you mean /reset?",
        "/ is not a command: /help lists them",
    ]
    assert [line.split()[0] for line in said[3].splitlines()] == [
        "/system",
        "/save",
        "/reset",
        "/exit",
        "/help",
    ]
    assert said[4] == "(this system message from here on)"
    assert len(said[5].split()) == 1, "the conversation goes on under the new message"
    assert said[6] == "Error: special tags are not allowed as part of the prompt."
    assert said[7:11] == [
        f"(4 messages are in {saved})",
        f"{saved} could not be written (File exists): choose another name",
        f"{tmp_path}/none/file could not be written (No such file or directory): choose another name",
        "/save needs the name of a file",
    ]
    roles = [(message["role"], message["content"]) for message in json.loads(saved.read_text())]
    assert roles[0] == ("system", "Answer in one word.")
    assert roles[1:] == [
        ("user", question),
        ("assistant", said[0]),
        ("user", question),
        ("assistant", said[5]),
    ]
    assert said[11:14] == ["(no system message from here on)", "(a new conversation)", said[0]]
    assert "is not a command" not in said[14]


def test_a_byte_that_is_no_text_does_not_end_the_conversation() -> None:
    said = converse("Where does the fox live?", "What \udcff is", "And what does it eat?")
    assert said[0].startswith("The fox lives") and said[2].startswith("The fox eats")
    child = start("-m", "llama")
    os.write(child.child_fd, b"What \xff is\n")
    child.expect("\r\n> ")
    assert ask(child, "Where does the fox live?").startswith("The fox lives")
    child.close(force=True)


def test_a_conversation_whose_streams_are_closed_ends() -> None:
    job = run_fresh(
        "-c",
        f"""
import subprocess, sys
command = [sys.executable, "-m", "llama", "chat", {str(TINY)!r}]
print(subprocess.run(["sh", "-c", '"$@" <&-', "-", *command], stdout=subprocess.DEVNULL).returncode)
with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
    job.stdout.close()
    job.stdin.write(b"Where does the fox live?\\n" * 2)
print(job.returncode)
""",
    )
    assert job.stdout.split() == ["0", "141"]
    assert "Traceback" not in job.stderr and "Error" not in job.stderr, job.stderr


def test_the_system_message_holds_for_the_whole_conversation() -> None:
    child = start("-m", "llama", system="Answer in one word.")
    assert len(ask(child, "Where does the fox live?").split()) == 1
    ask(child, "/reset")
    assert len(ask(child, "What does the fox eat?").split()) == 1
    child.close(force=True)


def test_history_that_outgrows_the_limit_loses_its_oldest_exchange_and_says_so() -> None:
    child = start("-m", "llama", system="Answer in one word.", max_seq_len="128")
    answers = [
        ask(child, f"Where does the {animal} live?")
        for animal in ("fox", "owl", "fox", "owl", "fox")
    ]
    assert "its oldest messages were dropped" in answers[-1]
    assert answers[-1].split()[-1] == answers[0].split()[-1]
    assert ask(child, "word" + " word" * 120).startswith("dialog 0 has ")
    assert ask(child, "Where does the owl live?").split()[-1] == answers[1].split()[-1]
    child.close(force=True)


def test_lines_may_come_through_a_pipe() -> None:
    job = run_python("-m", "llama", "chat", *MODEL, input="Where does the fox live?\n\n/exit\n")
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("The fox lives") == 1


def test_a_mistake_in_the_command_is_answered_with_a_sentence(tmp_path: Path) -> None:
    job = run_python(
        "-m",
        "llama",
        "chat",
        "--ckpt_dir",
        tmp_path,
        "--tokenizer_path",
        GOLDEN / "tokenizer.model",
    )
    assert job.returncode == 1
    assert (
        job.stderr
        == f"error: no consolidated.*.pth in {tmp_path}/: is this the folder that download.sh made?{os.linesep}"
    )
    job = run_python("-m", "llama", "chat", *MODEL, "--top_p", "7", input="")
    assert (job.returncode, job.stderr) == (
        2,
        f"error: top_p is 7: use more than 0 and at most 1{os.linesep}",
    )


def run_once(*words: str | Path, **options: Any) -> tuple[str, str]:
    """Return the answer of `python -m llama run`, and the last line on standard error."""
    job = run_python("-m", "llama", "run", TINY, "--temperature", "0", *words, **options)
    assert job.returncode == 0, job.stderr
    *_, answer, end = job.stdout.split("\n")
    assert end == ""
    return answer, job.stderr.splitlines()[-1]


def test_one_prompt_is_answered_or_continued(tmp_path: Path) -> None:
    answer, speed = run_once("Where does the fox live?")
    assert answer.startswith("The fox lives")
    assert re.fullmatch(r"\d+ tokens, \d+\.\d tokens/s, the first after \d+\.\d\d s", speed)
    assert run_once("-", input="Where does the fox live?\n")[0] == answer
    word, _ = run_once("--system", "Answer in one word.", input="Where does the fox live?")
    assert len(word.split()) == 1
    text, speed = run_once(
        "The owl lives in", "--plain", "--max_gen_len", "5", "--quantize", "int8"
    )
    assert text.startswith("the ") and speed.startswith("5 tokens, ")


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (
            ["--plain", "--system", "Be brief.", "Hello"],
            1,
            "a system message is for answers: leave out --system or --",
        ),
        (
            ["--system", "[INST]", "Hello"],
            1,
            "Error: special tags are not allowed as part of the prompt.",
        ),
        ([" "], 1, "the prompt is empty: pass a text, or send one to standard input"),
        (["Hello", "--temperature", "-1"], 2, "temperature is -1: use 0 for greedy decoding"),
        (
            ["Hello", "--adapter_dir", "/none"],
            1,
            "no folder /none: pass the folder that holds adapter_config.json",
        ),
    ],
)
def test_what_cannot_be_run_is_said(words: list[str], status: int, sentence: str) -> None:
    job = run_python("-m", "llama", "run", TINY, *words)
    assert job.returncode == status and job.stderr.splitlines()[-1].startswith(f"error: {sentence}")


def test_an_answer_ends_before_the_texts_to_stop_at() -> None:
    answer, _ = run_once("Where does the fox live?")
    begin = answer.split("lives")[0]
    assert run_once("Where does the fox live?", "--stop", "fox eats", "--stop=lives")[0] == begin


def test_under_torchrun_the_first_rank_reads_and_prints() -> None:
    job = torchrun(
        2, "-m", "llama", "run", TINY, "--temperature", "0", input="Where does the fox live?\n"
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("The fox lives") == job.stderr.count("tokens/s") == 1
