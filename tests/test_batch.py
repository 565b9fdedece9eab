"""python -m llama batch: many prompts from a file to a file."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, clean_environment, run_python, run_ranks

from llama import Llama
from llama.cli.batch import batch
from llama.cli.batch_lines import Line
from llama.cli.batch_parts import Results
from llama.engine.engine import Engine
from llama.generation import BuildOptions
from llama.sampling import SamplingParams

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

QUESTION = {"role": "user", "content": "Where does the owl live?"}
BUILD = BuildOptions(max_seq_len=128, max_batch_size=4, device="cpu", dtype="float32")

FLAGS = ["--max_seq_len", "128", "--max_batch_size", "4", "--dtype", "float32"]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(source: Path, out: Path, **options: Any) -> str:
    """Run the batch command; `options` are fields of SamplingParams."""
    sampling = SamplingParams(**{"max_tokens": 12} | options)
    return batch(str(TINY), str(source), str(out), build=BUILD, sampling=sampling)


def prompts(count: int) -> list[dict[str, Any]]:
    animals = ["owl", "fox", "bear", "rabbit", "hedgehog"]
    return [
        {
            "prompt": f"{'Once upon a time, ' * (i % 4)}the {animals[i % 5]} number {i}",
            "max_tokens": 1 + i % 17,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tiny() -> Llama:
    return Llama.build(TINY, None, 128, 4, device="cpu", dtype="float32")


def test_each_line_is_answered_in_its_place(tmp_path: Path, tiny: Llama) -> None:
    lines: list[Any] = [
        {"prompt": "Once upon a time", "id": 7},
        {"messages": [QUESTION], "temperature": 0},
        {"prompt": "The fox", "temperature": 0, "max_tokens": 3, "logprobs": 2},
        {"prompt": "The bear", "seed": 5},
        {"prompt": "The bear", "temperature": 0, "stop": "."},
    ]
    said = run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", temperature=0.0)
    assert said.startswith(f"{tmp_path}/out.jsonl: 5 lines, 0 of them answered earlier, ")
    results = read(tmp_path / "out.jsonl")
    for line, result in zip(lines, results, strict=True):
        assert all(result[key] == value for key, value in line.items() if key != "logprobs")
    texts = tiny.text_completion(["Once upon a time", "The fox"], 0, max_gen_len=[12, 3])
    assert [results[i]["generation"] for i in (0, 2)] == [text["generation"] for text in texts]
    (chat,) = tiny.chat_completion([[QUESTION]], 0, max_gen_len=12)
    assert (
        results[1]["generation"] == chat["generation"]
        and results[1]["finish_reason"] == chat["finish_reason"]
    )
    assert len(results[2]["logprobs"]["token_logprobs"]) == 3
    assert (
        results[4]["generation"]
        == tiny.text_completion(["The bear"], 0, max_gen_len=12, stop=".")[0]["generation"]
    )


def test_lines_of_openais_batch_shape_are_answered_in_it(tmp_path: Path, tiny: Llama) -> None:
    body = {"model": "gpt-4o", "messages": [QUESTION], "temperature": 0, "max_tokens": 9}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {
            "custom_id": "b",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "The", "n": 2, "stream": True},
        },
        {"custom_id": "c", "method": "POST", "url": "/v1/embeddings", "body": {"input": "The owl"}},
        {"custom_id": "d", "method": "POST", "url": "/v1/images", "body": {}},
        {
            "custom_id": "e",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body | {"temperature": -1},
        },
    ]
    run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    results = read(tmp_path / "out.jsonl")
    assert [result["custom_id"] for result in results] == list("abcde")
    assert [result["response"]["status_code"] for result in results] == [200, 200, 200, 400, 400]
    chat, text, embedding, *errors = (result["response"]["body"] for result in results)
    (wanted,) = tiny.chat_completion([[QUESTION]], 0, max_gen_len=9)
    assert chat["choices"][0]["message"]["content"] == wanted["generation"]["content"]
    assert chat["model"] == "gpt-4o" and chat["usage"]["completion_tokens"] > 0
    assert len(text["choices"]) == 2 and text["object"] == "text_completion"
    assert len(embedding["data"][0]["embedding"]) == 128
    assert "url is '/v1/images': use method POST" in errors[0]["error"]["message"]
    assert (
        errors[1]["error"]["message"]
        == "temperature is -1: use 0 for greedy decoding, or a positive number"
    )


def test_a_bad_line_becomes_an_error_line(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"prompt": "The fox"},
        "not json\n",
        "\n",
        {"text": "The fox"},
        {"prompt": "a", "messages": []},
        {"prompt": ["a", "b"], "n": 1},
        {"prompt": "x " * 500},
        {"messages": [{"role": "assistant", "content": "I"}]},
        {"prompt": "The fox", "temperature": "hot"},
        "[1]\n",
        {"prompt": "The fox", "n": 2},
        {"prompt": "The owl"},
    ]
    assert "11 lines" in run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    results = read(tmp_path / "out.jsonl")
    assert "generation" in results[0] and "generation" in results[10]
    errors = [result["error"] for result in results[1:10]]
    assert results[1]["line"] == 2 and errors[0].startswith("line 2 is not JSON (Expecting value")
    assert (
        errors[1].startswith('the line has to have "prompt" or "messages"')
        and errors[2] == errors[1]
    )
    assert errors[4].startswith("prompt 0 has ") and "and max_seq_len is 128" in errors[4]
    assert errors[5] == "message 0: expected role 'user', got 'assistant'"
    assert errors[6] == "temperature is 'hot': use a number"
    assert errors[7] == "line 9 is not JSON (it is not an object): write one object on each line"
    assert (
        errors[8] == errors[3] == "several answers need OpenAI's batch format: "
        "otherwise give each prompt its own line, and leave out n"
    )


def test_what_no_request_can_be_made_of_ends_only_its_own_line(tmp_path: Path) -> None:
    lines: list[Any] = [
        '{"prompt": "half \\ud83d"}\n',
        {"custom_id": "a", "url": ["/v1/completions"], "body": {"prompt": "x"}},
        {"custom_id": "b", "url": "/v1/completions", "body": []},
        {"prompt": [1, 1280], "echo": True, "logprobs": 1},
        '{"prompt": "The owl", "note": "half \\ud83d", "temperature": null, "n": null, "messages": null}\n',
    ]
    for _ in range(2):
        run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", temperature=0.0)
    results = read(tmp_path / "out.jsonl")
    assert results[0]["error"].startswith("'utf-8' codec can't encode")
    urls, body = (result["response"]["body"]["error"]["message"] for result in results[1:3])
    assert (
        urls.startswith("url is ['/v1/completions']: use method POST")
        and body == "body is []: use an object"
    )
    assert results[3]["error"] == "prompt 0 has token id 1280, and the vocabulary has 1280 pieces"
    assert results[4]["note"] == "half \ud83d" and results[4]["generation"]


def test_a_seed_that_leaves_no_seeds_for_lines_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.cli.allocator.build", lambda *_: pytest.fail("loaded"))
    source = write(tmp_path / "in.jsonl", prompts(1))
    for seed in (-1, 2**40):
        with pytest.raises(
            ValueError, match=f"seed is {seed}: use 0 or more and less than 4294967296"
        ):
            batch(
                str(TINY), str(source), str(tmp_path / "out.jsonl"), build=BuildOptions(seed=seed)
            )
    assert not (tmp_path / "out.jsonl").exists()


def test_a_failure_that_is_no_requests_own_ends_the_run_which_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, prefill = (
        write(tmp_path / "in.jsonl", prompts(30)),
        tmp_path / "out.jsonl",
        Engine._prefill,
    )
    count = iter(range(10**6))

    def refuse(self: Engine, spans: Any) -> None:
        if next(count) == 3:
            raise MemoryError("no room")
        prefill(self, spans)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_prefill", refuse)
        with pytest.raises(MemoryError, match="no room"):
            run(source, out)
    run(source, out)
    assert len(read(out)) == 30 and all("generation" in result for result in read(out))


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    first = Results(out, iter([]))
    with pytest.raises(
        ValueError, match=r"out\.jsonl is being written by another run: wait for it, or stop it"
    ):
        run(source, out)
    first.close()
    run(source, out)


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", prompts(400))
    run(source, tmp_path / "whole.jsonl", max_tokens=None)
    command = [
        sys.executable,
        "-m",
        "llama",
        "batch",
        str(TINY),
        str(source),
        str(tmp_path / "out.jsonl"),
        *FLAGS,
        "--device",
        "cpu",
    ]
    rng, sizes = random.Random(0), [0]
    for _ in range(3):
        job = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(), stderr=subprocess.DEVNULL
        )
        while (size := size_of(tmp_path / "out.jsonl")) <= sizes[-1] and job.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        job.send_signal(signal.SIGKILL)
        job.wait()
        size = size_of(tmp_path / "out.jsonl")
        assert size > sizes[-1]
        sizes.append(size)
    (tmp_path / "out.jsonl").open("ab").write(
        (tmp_path / "whole.jsonl").read_bytes()[size : size + 20]
    )
    said = run(source, tmp_path / "out.jsonl", max_tokens=None)
    assert ", 0 of them answered earlier" not in said
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "400 lines, 400 of them answered earlier, 0 tokens" in run(
        source, tmp_path / "out.jsonl", max_tokens=None
    )


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_an_output_of_another_run_is_left_as_it_is(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    for content in (
        "letters to my son\n",
        "letters",
        '{"prompt": "x", "generation": "y"}\n',
        '{"prompt": "the x',
    ):
        out.write_text(content)
        with pytest.raises(
            ValueError,
            match=r"line 1 of .*out\.jsonl does not answer the same line of the input: choose",
        ):
            run(source, out)
        assert out.read_text() == content
    out.unlink()
    run(source, out)
    before = out.read_bytes()
    write(source, prompts(2))
    with pytest.raises(
        ValueError, match=r"line 3 of .*out\.jsonl does not answer the same line of the input"
    ):
        run(source, out)
    write(source, [*prompts(2), {"prompt": "another"}])
    with pytest.raises(ValueError, match=r"line 3 of .*out\.jsonl does not answer"):
        run(source, out)
    assert out.read_bytes() == before


def test_what_cannot_be_read_or_written_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.cli.allocator.build", lambda *_: pytest.fail("loaded"))
    source = write(tmp_path / "in.jsonl", prompts(1))
    with pytest.raises(
        FileNotFoundError, match="no file .*nowhere: pass one with a line of JSON for each prompt"
    ):
        run(tmp_path / "nowhere", tmp_path / "out.jsonl")
    with pytest.raises(
        ValueError, match=r"in\.jsonl is the input: choose another name for the output"
    ):
        run(source, source)
    for out in (tmp_path, tmp_path / "nowhere" / "out.jsonl", Path("/dev/null")):
        with pytest.raises(
            FileNotFoundError, match="cannot be written: pass the name of a file in an existing"
        ):
            run(source, out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_is_told_and_what_was_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, write_all = (
        write(tmp_path / "in.jsonl", prompts(30)),
        tmp_path / "out.jsonl",
        Results.write,
    )
    written: list[Line] = []

    def full_after(self: Results, lines: list[Line]) -> None:
        if len(written) >= 5:
            self.file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
        write_all(self, lines)
        written.extend(lines)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", full_after)
        with pytest.raises(
            OSError, match=r"out\.jsonl could not be written \(No space left on device\): make room"
        ):
            run(source, out)
    assert 5 <= len(read(out)) < 30
    assert ", 0 of them answered earlier" not in run(source, out)
    assert len(read(out)) == 30


def test_groups_of_ranks_take_shares_of_the_lines(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [*prompts(40), "broken\n"]), tmp_path / "out.jsonl"
    run(source, tmp_path / "whole.jsonl", max_tokens=None)
    groups = ["--model_parallel_size", "1"]
    job = run_ranks(2, "-m", "llama", "batch", TINY, source, out, *FLAGS, *groups)
    assert job.returncode == 0, job.stderr
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
        "whole.jsonl",
    ]
    assert job.stdout.startswith(f"{out}: 41 lines, 0 of them answered earlier, ")
    (tmp_path / "out.jsonl.part-2-of-2").touch()
    job = run_ranks(2, "-m", "llama", "batch", TINY, source, out, *FLAGS, *groups)
    assert job.stdout == f"{out}: 41 lines, all of them answered earlier\n", job.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
        "whole.jsonl",
    ]
    (tmp_path / "out.jsonl.part-1-of-3").touch()
    with pytest.raises(
        ValueError,
        match="part-1-of-3 is from a run with 3 groups of ranks: use the same number, or remove it",
    ):
        run(source, out)


def test_the_command_shows_its_progress_and_what_came_of_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", prompts(8))
    job = run_python(
        "-m", "llama", "batch", TINY, source, tmp_path / "out.jsonl", "--max_seq_len", "128"
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.startswith(f"{tmp_path}/out.jsonl: 8 lines, 0 of them answered earlier, ")
