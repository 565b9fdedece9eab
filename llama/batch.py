"""Thousands of prompts from a file to a file: python -m llama batch FOLDER in.jsonl out.jsonl"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch.distributed as dist
from tqdm import tqdm

from .arguments import check_positive, integer
from .checkpoints.files import path_of
from .distributed import patient_ranks
from .generation import Llama
from .parallel import Ranks
from .request import Answer
from .serving.openai import BadRequest, ChatCompletion, Embeddings, TextCompletion, error_of

# Lines that are read ahead of the first one that is not answered, for each row of the batch: answers are written in
# order, so that a long one lets so many others wait for it.
AHEAD = 32

TOLD = ("generation", "finish_reason", "logprobs", "error")  # what a result has beside the fields of its line

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
                self.asked = kind(body | {"stream": False}, llm, body.get("model") or "llama")
            except BadRequest as error:
                self.error = error
                return
            # Equal whenever it is run, so that a run that was cut short and went on leaves no trace.
            self.asked.id, self.asked.created = f"{self._id()}-answer", self.time
            self.answers = [llm.engine.submit(request) for request in self.asked.requests]

    def _kind_and_body(self, defaults: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = {"seed": (defaults["seed"] << 40) + self.number}  # draws that depend on no other line
        settings = {key: value for key, value in defaults.items() if value is not None} | own
        if self.in_openais_shape:
            url, body = self.fields.get("url"), self.fields["body"]
            if url not in URLS or self.fields.get("method", "POST") != "POST" or not isinstance(body, dict):
                raise BadRequest(f"url is {url!r}: use method POST, an object as body, and {', '.join(URLS)}", "url")
            settings.pop("max_tokens", None)
            return URLS[url], settings | body
        asks = [name for name in ("prompt", "messages") if name in self.fields]
        if len(asks) != 1:
            raise BadRequest('the line has to have "prompt" or "messages", or custom_id, method, url and body')
        asked = self.fields[asks[0]]
        several = isinstance(asked, list) and asks[0] == "prompt" and not all(isinstance(token, int) for token in asked)
        if several or self.fields.get("n", 1) != 1:
            raise BadRequest(
                "several answers are for OpenAI's shape: give each prompt a line, and leave out n", asks[0]
            )
        return (TextCompletion if asks[0] == "prompt" else ChatCompletion), settings | self.fields

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
        begin = json.dumps(fields, ensure_ascii=False)[:-1].encode(errors="replace")
        return begin.startswith(data) or data.startswith(begin)


def lines_of(path: Path, share: slice) -> Iterator[Line]:
    """A share of a file's lines, those that are empty left out; read as they are asked for."""
    created = int(path.stat().st_mtime)
    with path.open("rb") as file:
        number = 0
        for data in file:
            if data.strip():
                if number % share.step == share.start:
                    yield Line(number, data, created)
                number += 1


def resume(output: Path, lines: Iterator[Line]) -> int:
    """How many lines an earlier run has answered, and passes over them. What it began to write of another is cut off.

    Raises ValueError where the output is not of this input.
    """
    if not output.exists():
        return 0
    done = end = 0
    with output.open("r+b") as file:
        for data in file:
            line, whole = next(lines, None), data.endswith(b"\n")
            if line is None or not (line.is_answered_by(data) if whole else line.may_begin(data)):
                raise ValueError(
                    f"line {done + 1} of {output} does not answer that of the input: choose another name, or remove it"
                )
            if whole:
                done, end = done + 1, end + len(data)
        file.truncate(end)
    return done


class Writer:
    """Writes results in order, as they come; on the first rank only."""

    def __init__(self, output: Path, done: int, ranks: Ranks):
        self.output, self.done = output, done
        self.file: BinaryIO | None = output.open("ab") if ranks.rank == 0 else None

    def write(self, lines: list[Line]) -> None:
        """Raises OSError, of a full disk, saying how much is written and how to go on."""
        self.done += len(lines)
        if self.file is None:
            return
        try:
            results = (json.dumps(line.result(), ensure_ascii=False) for line in lines)
            self.file.write("".join(f"{result}\n" for result in results).encode(errors="replace"))
            self.file.flush()
        except OSError as error:
            advice = "make room, and run it again: it goes on where it was"
            raise OSError(f"{self.output} could not be written ({error.strerror}): {advice}") from error

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # of what was told when it was written
                self.file.close()


def run(llm: Llama, lines: Iterator[Line], writer: Writer, total: int, defaults: dict[str, Any]) -> int:
    """Answer lines; returns how many tokens were generated."""
    engine, pending, tokens = llm.engine, deque[Line](), 0
    ahead = AHEAD * llm.model.params.max_batch_size
    quiet = True if llm.model.ranks.rank or (dist.is_initialized() and dist.get_rank()) else None
    bar = tqdm(total=total, initial=writer.done, desc="answering", unit="line", disable=quiet)
    start, more = time.monotonic(), True
    with bar:
        while more or pending:
            while more and len(pending) < ahead and len(engine.schedule.waiting) < llm.model.params.max_batch_size:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    line.ask(llm, defaults)
                    pending.append(line)
            if engine.busy:
                engine.step()
            ready = []
            while pending and pending[0].over:
                ready.append(pending.popleft())
            if ready:
                writer.write(ready)
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
    source, target = path_of("input", input), path_of("output", output)
    check_positive(max_seq_len=max_seq_len)
    defaults: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": integer("seed", seed)}
    # All that there is room for, where nothing else is said: OpenAI's 16 tokens are for who asks in its shape.
    defaults["max_tokens"] = max_seq_len if max_gen_len is None else integer("max_gen_len", max_gen_len)
    if not source.is_file():
        raise FileNotFoundError(f"no file {input}: pass one with a line of JSON for each prompt")
    if target.exists() and source.samefile(target):
        raise ValueError(f"{output} is the input: choose another name for the output")
    if target.is_dir() or not target.parent.is_dir():
        raise FileNotFoundError(f"{output} cannot be written: pass the name of a file in a folder that is there")
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
    ranks, everyone = llm.model.ranks, patient_ranks()
    share = slice(everyone.rank // ranks.size, None, everyone.size // ranks.size)
    parts = [target] if share.step == 1 else [part_of(target, n, share.step) for n in range(share.step)]
    check_parts(target, parts)
    own, whole = parts[share.start], sum(1 for _ in lines_of(source, slice(0, None, 1)))
    if share.step > 1 and target.exists():
        if everyone.ask_first(lambda: resume(target, lines_of(source, slice(0, None, 1)))) == whole:
            return f"{output}: {whole} lines, all of them from before"
        raise ValueError(f"{output} was begun by one group of ranks: run one, or remove it")
    done, lines = ranks.ask_first(lambda: resume(own, lines_of(source, share))), lines_of(source, share)
    for _ in range(done):
        next(lines)
    total = len(range(share.start, whole, share.step))
    writer = Writer(own, done, ranks)
    try:
        tokens = run(llm, lines, writer, total, defaults)
    finally:
        writer.close()
    everyone.alike(lambda: None)  # all are done
    if share.step > 1 and everyone.rank == 0:
        merge(parts, target)
    return f"{output}: {total} lines, {done} of them from before, {tokens} tokens generated now"


def part_of(target: Path, number: int, count: int) -> Path:
    """What one of several groups of ranks writes, until all are done."""
    return target.with_name(f"{target.name}.part-{number + 1}-of-{count}")


def check_parts(target: Path, parts: list[Path]) -> None:
    """Raise ValueError where an earlier run with another number of groups has left something to go on from."""
    there = sorted(target.parent.glob(f"{target.name}.part-*-of-*"))
    if others := [path for path in there if path not in parts]:
        count = others[0].name.rpartition("-")[2]
        raise ValueError(f"{others[0]} is of a run with {count} groups of ranks: run as many, or remove it")


def merge(parts: list[Path], target: Path) -> None:
    """One line of each part in turn, in the order of the input; the parts go once all is written."""
    merged = target.with_name(f"{target.name}.part-all")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        with merged.open("wb") as out:
            while line := files[0].readline():
                out.write(line)
                out.writelines(file.readline() for file in files[1:])
    merged.replace(target)
    for part in parts:
        part.unlink()
