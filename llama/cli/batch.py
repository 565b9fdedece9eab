"""Thousands of prompts from a file to a file: python -m llama batch FOLDER in.jsonl out.jsonl"""

from __future__ import annotations

import contextlib
import glob
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from tqdm import tqdm

from ..arguments import check_positive, check_settings, integer
from ..checkpoints.files import path_of
from ..distributed import patient_ranks
from ..engine.request import Answer
from ..generation import Llama
from ..openai.completions import BadRequest, ChatCompletion, Embeddings, TextCompletion, error_of, shown

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows
    import fcntl

# Lines that are read ahead of the first one that is not answered, for each row of the batch: answers are written in
# order, so that a long one lets so many others wait for it.
AHEAD = 32

TOLD = ("generation", "finish_reason", "logprobs", "error")  # what a result has beside the fields of its line

MOST_SEEDS = 2**32  # each has 2^40 lines

URLS: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": TextCompletion,
    "/v1/embeddings": Embeddings,
}


class Line:
    """A line of the input: what it asks for and, once answered, the line of the output."""

    def __init__(self, number: int, data: bytes, time: int):
        """`number` counts from 0; `time` is when OpenAI's objects say that they were created."""
        self.number, self.time = number, time
        self.asked: Any = None
        self.answers: list[Answer] = []
        self.error: BadRequest | None = None
        self.fields: dict[str, Any] = {"line": number + 1}
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict):
                raise ValueError("it is no object")
            self.fields = fields
        except (RecursionError, ValueError) as error:  # what is no UTF-8 is a ValueError too
            self.error = BadRequest(f"line {number + 1} is not JSON ({error}): write one object on each line")

    @property
    def in_openais_shape(self) -> bool:
        return "custom_id" in self.fields and "body" in self.fields

    def ask(self, llm: Llama, defaults: dict[str, Any]) -> None:
        """Submit its requests; what cannot be done is its error. `defaults` hold where the line says nothing."""
        if self.error is None:
            try:
                kind, body = self._kind_and_body(defaults)
                self.asked = kind(body | {"stream": False}, llm, body.get("model", "llama"))
            except (TypeError, ValueError) as error:
                self.error = error if isinstance(error, BadRequest) else BadRequest(str(error))
                return
            # Equal whenever it is run, so that a run that was cut short and went on leaves no trace.
            self.asked.id, self.asked.created = f"{self._id()}-answer", self.time
            self.answers = [llm.engine.submit(request) for request in self.asked.requests]

    def _kind_and_body(self, defaults: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Draws that depend on no other line. What is null is as if it were left out.
        settings = defaults | {"seed": (defaults["seed"] << 40) + self.number}
        said = {key: value for key, value in self.fields.items() if value is not None}
        if self.in_openais_shape:
            url, body = said.get("url"), said["body"]
            if not isinstance(url, str) or url not in URLS or said.get("method", "POST") != "POST":
                raise BadRequest(f"url is {url!r}: use method POST and one of {', '.join(URLS)}", "url")
            if not isinstance(body, dict):
                raise BadRequest(f"body is {shown(body)}: use an object", "body")
            del settings["max_tokens"]  # OpenAI has defaults of its own
            return URLS[url], settings | {key: value for key, value in body.items() if value is not None}
        asks = [name for name in ("prompt", "messages") if name in said]
        if len(asks) != 1:
            raise BadRequest('the line has to have "prompt" or "messages", or custom_id, method, url and body')
        asked = said[asks[0]]
        several = isinstance(asked, list) and asks[0] == "prompt" and not all(isinstance(token, int) for token in asked)
        if several or said.get("n", 1) != 1:
            raise BadRequest(
                "several answers are for OpenAI's shape: give each prompt a line, and leave out n", asks[0]
            )
        return (TextCompletion if asks[0] == "prompt" else ChatCompletion), settings | said

    def _kept(self) -> dict[str, Any]:
        return {key: value for key, value in self.fields.items() if key not in TOLD}

    def _id(self) -> str:
        return f"batch_req_{self.number}"

    @property
    def over(self) -> bool:
        return all(answer.over for answer in self.answers)

    def result(self) -> dict[str, Any]:
        """What is written of it: OpenAI's shape for a line of that shape, else the line's own fields and more."""
        failed = [answer.error for answer in self.answers if answer.error is not None]
        status = 500 if failed else self.error.status if self.error else 200
        reason = str(failed[0] if failed else self.error)
        if self.in_openais_shape:
            param = self.error.param if self.error else None
            body = self.asked.whole(self.answers) if status == 200 else error_of(reason, status, param)
            response = {"status_code": status, "request_id": self._id(), "body": body}
            return {"id": self._id(), "custom_id": self.fields["custom_id"], "response": response, "error": None}
        if status != 200:
            return self._kept() | {"error": reason}
        choice = self.asked.whole(self.answers)["choices"][0]
        message = choice.get("message")
        said = choice["text"] if message is None else {"role": message["role"], "content": message["content"]}
        logprobs = {"logprobs": choice["logprobs"]} if choice["logprobs"] is not None else {}
        return self._kept() | {"generation": said, "finish_reason": choice["finish_reason"]} | logprobs

    def is_answered_by(self, data: bytes) -> bool:
        """Whether a line of an output can be this one's."""
        try:
            written = json.loads(data)
        except ValueError:
            return False
        if not isinstance(written, dict) or (self.error is not None and "error" not in written):
            return False
        if self.in_openais_shape:
            return (written.get("id"), written.get("custom_id")) == (self._id(), self.fields["custom_id"])
        kept = self._kept()
        return any(key in written for key in TOLD) and kept == {key: written.get(key) for key in kept}

    def may_begin(self, data: bytes) -> bool:
        """Whether these bytes may be the beginning of its result, of which the rest was not written."""
        fields = {"id": self._id()} if self.in_openais_shape else self._kept()
        begin = encode(fields)[:-1]
        return begin.startswith(data) or data.startswith(begin)


def encode(result: dict[str, Any]) -> bytes:
    try:
        return json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only escape
        return json.dumps(result).encode()


def lines_of(path: Path, share: slice, skip: int = 0) -> Iterator[Line]:
    """A share of a file's lines but the first few, those that are empty left out; read as they are asked for."""
    created, first = int(path.stat().st_mtime), share.start + skip * share.step
    with path.open("rb") as file:
        for number, data in enumerate(data for data in file if data.strip()):
            if number >= first and (number - first) % share.step == 0:
                yield Line(number, data, created)


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(data.strip()) for data in file)


class Output:
    """The file of results, of which an earlier run may have written some: opened, checked and, while it is open, ours.

    What that run began to write of a line is cut off. Raises ValueError where the file does not answer `lines`, or
    another run is writing it; OSError, of a full disk, saying how to go on.
    """

    def __init__(self, path: Path, lines: Iterator[Line]):
        self.path, self.done = path, 0
        self.file = path.open("a+b")
        try:
            self._lock()
            end = self._check(lines)
            if end < path.stat().st_size:
                self.file.truncate(end)
        except BaseException:
            self.file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is being written by another run: let it end, or end it") from None

    def _check(self, lines: Iterator[Line]) -> int:
        """Count the lines that are whole; returns where they end."""
        end = 0
        self.file.seek(0)
        for data in self.file:
            line, whole = next(lines, None), data.endswith(b"\n")
            if line is None or not (line.is_answered_by(data) if whole else line.may_begin(data)):
                raise ValueError(
                    f"line {self.done + 1} of {self.path} does not answer that of the input: choose another name, "
                    "or remove it"
                )
            if whole:
                self.done, end = self.done + 1, end + len(data)
        return end

    def write(self, lines: list[Line]) -> None:
        try:
            self.file.write(b"".join(encode(line.result()) + b"\n" for line in lines))
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what was told when it was written
            self.file.close()


def cannot_write(path: Path, error: OSError) -> OSError:
    advice = "make room, and run it again: it goes on where it was"
    return OSError(f"{path} could not be written ({error.strerror}): {advice}")


def run(
    llm: Llama, lines: Iterator[Line], done: int, total: int, write: Callable[[list[Line]], None], **defaults: Any
) -> int:
    """Answer lines, in order; returns how many tokens were generated.

    Raises what fails for no fault of a request's own, of memory for instance: such a run can go on later.
    """
    engine, pending, tokens = llm.engine, deque[Line](), 0
    rows = llm.model.params.max_batch_size
    quiet = True if llm.model.ranks.rank or dist.get_rank() else None
    start, more = time.monotonic(), True
    with tqdm(total=total, initial=done, desc="answering", unit="line", disable=quiet) as bar:
        while more or pending:
            while more and len(pending) < AHEAD * rows and len(engine.schedule.waiting) < rows:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    line.ask(llm, defaults)
                    pending.append(line)
            if engine.busy:
                engine.step()
            ready = []
            while pending and pending[0].over:
                for answer in pending[0].answers:
                    if answer.error is not None and not isinstance(answer.error, ValueError):
                        raise answer.error
                ready.append(pending.popleft())
            if ready:
                write(ready)
                tokens += sum(len(answer.tokens) for line in ready for answer in line.answers)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.1f} tokens/s", refresh=False)
                bar.update(len(ready))
    return tokens


def batch(
    ckpt_dir: str,
    input: str,
    output: str,
    *,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    seed: int = 1,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 16,
    model_parallel_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
    adapter_dir: str | None = None,
    compile: bool = False,
) -> str:
    """Answer each line of a file, {"prompt": …} or {"messages": …}, or of OpenAI's batch shape, in a line of another.

    A line may have settings of its own (temperature, top_p, max_tokens, stop, seed, …). Run again after it was
    interrupted, it goes on where it was. Under torchrun with a --model_parallel_size smaller than the number of ranks,
    each group of ranks answers a share of the lines.
    """
    check_positive(max_seq_len=max_seq_len)
    # All that there is room for, where nothing else is said: OpenAI's 16 tokens are for who asks in its shape.
    longest = max_seq_len if max_gen_len is None else integer("max_gen_len", max_gen_len)
    check_settings(longest, temperature, top_p)
    if not 0 <= integer("seed", seed) < MOST_SEEDS:
        raise ValueError(f"seed is {seed}: use 0 or more and less than {MOST_SEEDS}")
    source, target = files_of(input, output)
    llm = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size,
        model_parallel_size,
        device=device,
        dtype=dtype,
        quantize=quantize,
        adapter_dir=adapter_dir,
        compile=compile,
    )
    settings = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": longest}
    return f"{output}: {answer_file(llm, source, target, settings)}"


def files_of(input: str, output: str) -> tuple[Path, Path]:
    """Raises FileNotFoundError or ValueError for what cannot be read, or written to."""
    source, target = path_of("input", input), path_of("output", output)
    if not source.is_file():
        raise FileNotFoundError(f"no file {input}: pass one with a line of JSON for each prompt")
    if target.exists() and source.samefile(target):
        raise ValueError(f"{output} is the input: choose another name for the output")
    if (target.exists() and not target.is_file()) or not target.parent.is_dir():
        raise FileNotFoundError(f"{output} cannot be written: pass the name of a file in a folder that is there")
    return source, target


def answer_file(llm: Llama, source: Path, target: Path, settings: dict[str, Any]) -> str:
    """Answer this group's share of the lines, and merge what all groups wrote; returns what is told of it."""
    ranks, everyone = llm.model.ranks, patient_ranks()
    share = slice(everyone.rank // ranks.size, None, everyone.size // ranks.size)
    parts = [target] if share.step == 1 else [part_of(target, n, share.step) for n in range(share.step)]
    check_parts(target, parts)
    own, whole = parts[share.start], count_lines(source)
    if share.step > 1 and target.exists():
        everyone.ask_first(lambda: check_whole(target, source, whole, parts))
        return f"{whole} lines, all of them from before"
    opened: list[Output] = []

    def open_output() -> int:
        opened.append(Output(own, lines_of(source, share)))
        return opened[0].done

    done, total = ranks.ask_first(open_output), len(range(share.start, whole, share.step))
    write = opened[0].write if opened else lambda lines: None  # the first rank's, of those that share a model
    try:
        tokens = run(llm, lines_of(source, share, done), done, total, write, **settings)
    finally:
        for out in opened:
            out.close()
    counts: list[Any] = [(done, tokens)]
    if everyone.size > 1:  # and so all are done
        counts *= everyone.size
        dist.all_gather_object(counts, (done, tokens), group=everyone.group)
    if share.step > 1 and everyone.rank == 0:
        merge(parts, target)
    done, tokens = (sum(column) for column in zip(*counts[:: ranks.size], strict=True))
    return f"{whole} lines, {done} of them from before, {tokens} tokens generated now"


def part_of(target: Path, number: int, count: int) -> Path:
    """What one of several groups of ranks writes, until all are done."""
    return target.with_name(f"{target.name}.part-{number + 1}-of-{count}")


def check_parts(target: Path, parts: list[Path]) -> None:
    """Raise ValueError where an earlier run with another number of groups has left something to go on from."""
    there = sorted(target.parent.glob(f"{glob.escape(target.name)}.part-*-of-*"))
    if others := [path for path in there if path not in parts]:
        count = others[0].name.rpartition("-")[2]
        raise ValueError(f"{others[0]} is of a run with {count} groups of ranks: run as many, or remove it")


def check_whole(target: Path, source: Path, count: int, parts: list[Path]) -> None:
    """Raise ValueError unless the output has all lines, and nothing is left to do but to remove the parts."""
    output = Output(target, lines_of(source, slice(0, None, 1)))
    output.close()
    if output.done < count:
        raise ValueError(f"{target} was begun by one group of ranks: run one, or remove it")
    for part in parts:
        part.unlink(missing_ok=True)


def merge(parts: list[Path], target: Path) -> None:
    """One line of each part in turn, in the order of the input; the parts go once all is written."""
    merged = target.with_name(f"{target.name}.part-all")
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(part.open("rb")) for part in parts]
            with merged.open("wb") as out:
                while line := files[0].readline():
                    out.write(line)
                    out.writelines(file.readline() for file in files[1:])
        merged.replace(target)
    except OSError as error:
        merged.unlink(missing_ok=True)
        raise cannot_write(target, error) from error
    for part in parts:
        part.unlink()
