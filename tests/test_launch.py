"""How programs begin and end: the command line, help, errors, signals, closed streams."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import fire
import pytest
from conftest import ROOT, TINY, clean_environment, run_fresh, wait_for_line

import example_chat_completion
import example_text_completion
import llama
from llama.__main__ import COMMANDS
from llama.cli.arguments import Hidden, call, flags_of
from llama.cli.program import program, say
from llama.generation import BuildOptions
from llama.sampling import SamplingParams

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

PYTHON = "python -m llama"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A program's own handlers do not outlive its test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


Start = Callable[..., tuple[int, str, str]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    def start(command: Any, *words: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a program with these words: one of commands, or an example."""
        monkeypatch.setattr(sys, "argv", ["program.py", *words])
        status = 0
        try:
            if isinstance(command, dict):
                with program():
                    say(call(command, sys.argv[1:], PYTHON))
            else:
                with program(command):
                    fire.Fire(command)
        except SystemExit as end:
            status = int(end.code or 0)
        return (status, *capsys.readouterr())

    return start


BUILD = BuildOptions(max_seq_len=64)


def sample(
    ckpt_dir: str,
    text: str | None = None,
    count: int = 1,
    *,
    share: float = 0.5,
    limit: int | None = None,
    plain: bool = False,
    kind: Literal["a", "b"] | None = None,
    build: Annotated[BuildOptions, Hidden(["compile"])] = BUILD,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008
) -> None:
    """Nothing but what it was given."""
    given.append((ckpt_dir, text, count, share, limit, plain, kind))
    options.append((build, sampling))


SAMPLE = {"sample": sample}
given: list[Any] = []
options: list[tuple[BuildOptions, SamplingParams]] = []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x", "--cuont", "3"], "unknown option --cuont: did you mean --count?"),
        (["x", "--zzz=3"], "unknown option --zzz: see python -m llama sample --help"),
        (["x", "--max_seq", "8"], "unknown option --max_seq: did you mean --max_seq_len?"),
        (["x", "--compile"], "unknown option --compile: "),
        (["--count", "3"], "no ckpt_dir is given: see python -m llama sample --help"),
        (
            ["x", "a", "1", "b c"],
            "'b c' is one word too many: put a text of several words in quotes, or see python",
        ),
        (["x", "--count", "1", "--text"], "--text needs a value"),
        (
            ["x", "--text", "--plain"],
            "--text needs a value; write one that looks like a flag as --text=--…",
        ),
        (["x", "--text"], "--text needs a value"),
        (["x", "--count", "3.5"], "--count is '3.5': use a whole number"),
        (["x", "--limit", "many"], "--limit is 'many': use a whole number"),
        (["x", "--share", "half"], "--share is 'half': use a number"),
        (["x", "--share", "nan"], "--share is 'nan': use a number"),
        (["x", "--plain=maybe"], "--plain is 'maybe': use True or False"),
        (["x", "--kind", "c"], "--kind is 'c': use a or b"),
        (["x", "--seed", "abc"], "--seed is 'abc': use a whole number"),
        (["x", "--temperature", "warm"], "--temperature is 'warm': use a number"),
        (
            ["x", "--temperature", "-1"],
            "temperature is -1: use 0 for greedy decoding, or a positive number",
        ),
        (["x", "--top_p=2"], "top_p is 2: use more than 0 and at most 1"),
        (["x", "--max_tokens", "-2"], "max_gen_len is -2: use 0 or more"),
        (["x", "--stop", ""], "stop is ['']: use strings that are not empty"),
        (["x", "--max_seq_len", "0"], "max_seq_len is 0: use 1 or more"),
        (["x", "--quantize", "int3"], "--quantize is 'int3': use int8 or int4"),
    ],
)
def test_what_cannot_be_understood_is_refused_before_anything_runs(
    start: Start, words: list[str], sentence: str
) -> None:
    given.clear()
    status, out, err = start(SAMPLE, "sample", *words)
    assert (
        (status, out) == (2, "") and err.startswith(f"error: {sentence}") and err.count("\n") == 1
    )
    assert not given


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Short, friendly",
            "Hello # there",
            "2024",
            "1e3",
            "None",
            "True",
            "a,b",
            "{a: b}",
            "'x'",
            "two\nlines",
        ),
        *("- dash", "-", "--", "-1", "x=1", "~", "~/x", "", "100 %", "%s", "@file"),
    ],
)
def test_text_arrives_as_typed(start: Start, text: str) -> None:
    for words in (
        ["x", text],
        ["x", "--text", text],
        ["x", f"--text={text}"],
        ["--text", text, "x"],
    ):
        given.clear()
        assert start(SAMPLE, "sample", *words) == (0, "", "")
        assert given[0][:2] == ("x", text)
    given.clear()
    start(SAMPLE, "sample", "x", "--text=--what is this?")
    assert given[0][1] == "--what is this?"


def test_values_are_of_their_parameters_types(start: Start) -> None:
    for words, values in {
        "x": ("x", None, 1, 0.5, None, False, None),
        "7 7 7 --share 7 --limit 7 --plain": ("7", "7", 7, 7, 7, True, None),
        "x --limit None --plain --kind None": ("x", None, 1, 0.5, None, True, None),
        "--plain False --kind a --ckpt-dir x --share -1.5": ("x", None, 1, -1.5, None, False, "a"),
    }.items():
        given.clear()
        assert start(SAMPLE, "sample", *words.split()) == (0, "", "")
        assert given == [values] and [type(v) for v in given[0]] == [type(v) for v in values]


def test_flags_are_the_fields_of_the_options(start: Start) -> None:
    for words, build, sampling in (
        ("x", BUILD, SamplingParams()),
        ("x --max_gen_len 5", BUILD, SamplingParams(max_tokens=5)),
        ("x --max-tokens=5 --top-p .5", BUILD, SamplingParams(max_tokens=5, top_p=0.5)),
        ("x --max_gen_len None --stop . --stop=7", BUILD, SamplingParams(stop=(".", "7"))),
        (
            "x --max_seq_len 9 --device cpu",
            BuildOptions(max_seq_len=9, device="cpu"),
            SamplingParams(),
        ),
        ("x --quantize None --seed 3", BuildOptions(max_seq_len=64, seed=3), SamplingParams()),
        (
            "x --cuda_graph False --quantize int8",
            dataclasses.replace(BUILD, cuda_graph=False, quantize="int8"),
            None,
        ),
    ):
        options.clear()
        assert start(SAMPLE, "sample", *words.split()) == (0, "", "")
        assert options == [(build, sampling or SamplingParams())]


HIDDEN = {
    "chat": {"max_batch_size", "model_parallel_size"},
    "run": {"max_batch_size", "model_parallel_size"},
    "serve": {"model_parallel_size", "seed"},
    "batch": set(),
    "perplexity": {"model_parallel_size", "prompt_lookup_num_tokens", "seed"},
}
PER_PROMPT = {"logprobs", "top_logprobs", "echo"}  # each call, or line of a batch, has its own


@pytest.mark.parametrize("command", HIDDEN)
def test_a_new_option_is_a_flag_of_every_command_that_does_not_hide_it(
    start: Start, command: str
) -> None:
    help = start(COMMANDS, command, "--help")[1]
    wanted = {field.name for field in dataclasses.fields(BuildOptions)} - HIDDEN[command]
    if command in ("chat", "run", "batch"):
        wanted |= {field.name for field in dataclasses.fields(SamplingParams)} - PER_PROMPT
    shown = set(re.findall(r"^  --(\w+)", help, flags=re.MULTILINE))
    own = {flag.name for flag in flags_of(COMMANDS[command]).values() if flag.field is None}
    assert shown - own == {name.replace("max_tokens", "max_gen_len") for name in wanted}
    assert len(re.findall(r"^  --seed\b", help, flags=re.MULTILINE)) == ("seed" in wanted)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        *(
            ([*command, "--max_seq_len", "0"], "max_seq_len is 0: use 1 or more")
            for command in (
                ["chat", TINY],
                ["run", TINY, "Hello"],
                ["serve", TINY],
                ["batch", TINY, "in", "out"],
                ["perplexity", TINY, "text"],
                ["info", TINY],
            )
        ),
        (["chat", TINY, "--temperature", "-1"], "temperature is -1: use 0 for greedy decoding"),
        (["run", TINY, "Hello", "--top_p", "7"], "top_p is 7: use more than 0 and at most 1"),
        (["batch", TINY, "in", "out", "--max_gen_len", "-5"], "max_gen_len is -5: use 0 or more"),
        (
            ["batch", TINY, "in", "out", "--seed", "-1"],
            "seed is -1: use 0 or more and less than 4294967296",
        ),
        (["perplexity", TINY, "text", "--stride", "0"], "stride is 0: use 1 or more"),
        (["serve", TINY, "--max_waiting", "-1"], "max_waiting is -1: use 0 or more"),
        (["serve", TINY, "--drain", "-1"], "drain is -1: use 0 or more"),
        (["reshard", TINY, "out", "0"], "model_parallel_size is 0: use 1 or more"),
        (["convert", TINY, "out", "onnx"], "to is 'onnx': use 'hf', 'meta' or 'gguf'"),
        (
            ["verify", TINY, "--seed", "1"],
            "unknown option --seed: see python -m llama verify --help",
        ),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_loaded(
    start: Start, monkeypatch: pytest.MonkeyPatch, words: list[Any], sentence: str
) -> None:
    monkeypatch.setattr("llama.cli.allocator.build", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("llama.checkpoints.convert.open_whole", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr("llama.cli.info.open_whole", lambda *_: pytest.fail("opened"))
    status, out, err = start(COMMANDS, *map(str, words))
    assert status in (1, 2) and out == "" and err.startswith(f"error: {sentence}")


def test_a_tilde_is_the_home_folder_in_paths(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").symlink_to(TINY)
    status, out, err = start(COMMANDS, "info", "--ckpt_dir=~/models")
    assert status == 0 and "release layout" in out, err


def test_bytes_that_are_no_text_are_replaced(start: Start) -> None:
    given.clear()
    start(SAMPLE, "sample", "x", "What \udcff is")
    assert given[0][:2] == ("x", "What \ufffd is")


@pytest.mark.parametrize("name", ["2024", "7", "my#model", "a,b", "None", "llama [1]", "-x"])
def test_info_finds_a_folder_of_any_name(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).symlink_to(TINY)
    monkeypatch.chdir(tmp_path)
    status, out, err = start(COMMANDS, "info", f"--ckpt_dir={name}" if name[0] == "-" else name)
    assert status == 0 and "release layout, 1 file(s) of weights" in out, err


def test_reshard_with_an_unknown_flag_writes_nothing(start: Start, tmp_path: Path) -> None:
    status, _, err = start(COMMANDS, "reshard", str(TINY), str(tmp_path / "out"), "1", "--dry_run")
    assert status == 2
    assert err == "error: unknown option --dry_run: see python -m llama reshard --help\n"
    assert not list(tmp_path.iterdir())


def test_without_a_command_the_commands_are_shown(start: Start) -> None:
    status, out, err = start(COMMANDS)
    assert (status, err) == (0, "")
    assert out == start(COMMANDS, "--help")[1] == start(COMMANDS, "-h")[1]
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]", out, flags=re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


def test_an_unknown_command_is_told_with_a_suggestion(start: Start) -> None:
    assert start(COMMANDS, "chta")[2] == "error: 'chta' is not a command: did you mean chat?\n"
    status, _, err = start(COMMANDS, "llama-2-tiny")
    assert status == 2 and err.startswith(
        "error: 'llama-2-tiny' is not a command: use chat, run, serve, batch, "
    )


def test_the_version_is_that_of_the_package_and_the_changelog(start: Start) -> None:
    assert start(COMMANDS, "--version")[1].startswith(f"llama {llama.__version__} (torch ")
    assert version("llama") == llama.__version__
    assert f"\n## {llama.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_every_flag_on_stdout(start: Start, name: str) -> None:
    status, out, err = start(COMMANDS, name, "--help")
    assert (status, err) == (0, "")
    for flag in flags_of(COMMANDS[name]).values():
        assert flag.help, flag.name
        assert re.search(rf"^  --{flag.name} +\w", out, flags=re.MULTILINE), flag.name
    assert (inspect.getdoc(COMMANDS[name]) or "").split()[0] in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert start(COMMANDS, name, "x", "--help")[1] == out


EXAMPLES = {"text": example_text_completion.main, "chat": example_chat_completion.main}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_refuse_an_unknown_flag_before_they_load(
    start: Start, monkeypatch: pytest.MonkeyPatch, example: str
) -> None:
    monkeypatch.setattr(llama.Llama, "build", lambda *_, **__: pytest.fail("loaded"))
    sentence = "error: unknown option --temprature: did you mean --temperature?\n"
    for words in (
        ["--temprature", "0"],
        ["--temprature=0"],
        ["x", "--top_p", "1", "--temprature", "0"],
    ):
        assert start(EXAMPLES[example], *words) == (2, "", sentence)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_take_their_flags_with_dashes_and_show_help(
    start: Start, example: str
) -> None:
    status, out, err = start(EXAMPLES[example], "--max-gen-len", "3", "--temperature", "0")
    assert status == 0 and out.count(">") >= 4, err
    status, out, err = start(EXAMPLES[example], "--help")
    assert status == 0 and "--temperature" in out + err and "loaded" not in err


def test_the_first_rank_alone_shows_help(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert start(COMMANDS, "chat", "--help") == (0, "", "")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    command = command.replace("LLAMA", f"{sys.executable} -m llama")
    return subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_streams_end_in_no_traceback() -> None:
    job = shell(f"LLAMA info {TINY} | true; exit ${{PIPESTATUS[0]}}")
    assert (job.returncode, job.stderr) == (141, "")
    job = shell(f"LLAMA info {TINY} <&- >&- 2>&-")
    assert (job.returncode, job.stdout, job.stderr) == (0, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's file that is always full")
def test_output_that_cannot_be_written_is_a_sentence() -> None:
    job = shell(f"LLAMA info {TINY} > /dev/full")
    assert (job.returncode, job.stderr) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_pressed_again_and_again_shows_no_traceback() -> None:
    environment = clean_environment() | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / "workers" / "endless.py")]
    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_line(job, "generating")
        end = time.monotonic() + 120
        while job.poll() is None and time.monotonic() < end:
            job.send_signal(signal.SIGINT)
            time.sleep(0.002)
        _, errors = job.communicate(timeout=1)
    finally:
        job.kill()
    assert job.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors and "KeyboardInterrupt" not in errors


def test_where_there_is_no_termios_the_commands_run(tmp_path: Path) -> None:
    """As on Windows: info runs, and chat takes its lines."""
    script = tmp_path / "windows.py"
    script.write_text("""
import sys
sys.modules.update(dict.fromkeys(["readline", "termios", "tty"]))
from llama.__main__ import main
main()
""")
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    job = run_fresh(script, "info", TINY, env=environment)
    assert job.returncode == 0 and "release layout" in job.stdout, job.stderr
    job = run_fresh(
        script, "chat", TINY, "--temperature=0", input="Where does the fox live?\n", env=environment
    )
    assert job.returncode == 0 and "The fox lives" in job.stdout, job.stderr


def test_what_answers_leaves_the_compiler_and_optional_packages_alone() -> None:
    names = "torch._dynamo", "transformers", "safetensors", "gguf", "starlette", "numpy.testing"
    code = f"""
import sys
import llama.__main__
llm = llama.Llama.build({str(TINY)!r}, None, 64, 2, device="cpu")
llm.text_completion(["The owl"], max_gen_len=4)
print([name for name in {names} if name in sys.modules])
"""
    job = run_fresh("-c", code)
    assert job.stdout == "[]\n", job.stderr
