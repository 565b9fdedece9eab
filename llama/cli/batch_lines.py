"""A line of a batch file: its request and, once answered, the result line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..engine import Request
from ..generation import Llama
from ..openai.completions import ChatCompletion, TextCompletion
from ..openai.embeddings import Embeddings
from ..openai.fields import BadRequest, shown
from ..openai.objects import error_of

# The fields that a result adds to the fields of its input line.
RESULT_FIELDS = ("generation", "finish_reason", "logprobs", "error")

# Each line has its own seed: the seed of the run, shifted left by this many bits, plus the line
# number.
LINE_BITS = 40

ENDPOINTS: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": TextCompletion,
    "/v1/embeddings": Embeddings,
}


class Line:
    """A line of the input: {"prompt": …}, {"messages": …}, or a line in OpenAI's batch format."""

    def __init__(self, number: int, data: bytes, created: int):
        """`number` counts from 0; `created` is the creation time in OpenAI's objects."""
        self.number = number
        self.created = created
        self.call: Any = None
        self.requests: list[Request] = []
        self.error: BadRequest | None = None
        self.fields: dict[str, Any] = {"line": number + 1}
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict):
                raise ValueError("it is not an object")
            self.fields = fields
        except (RecursionError, ValueError) as error:  # bytes that are not UTF-8: ValueError
            message = f"line {number + 1} is not JSON ({error}): write one object on each line"
            self.error = BadRequest(message)

    @property
    def in_openais_shape(self) -> bool:
        return "custom_id" in self.fields and "body" in self.fields

    def submit(self, llm: Llama, defaults: dict[str, Any]) -> None:
        """Submit the line's prompts, or store the error if that is not possible.

        `defaults` provides the fields that the line does not set.
        """
        if self.error is not None:
            return
        try:
            kind, body = self._kind_and_body(defaults)
            body = {**body, "stream": False}
            self.call = kind(body, llm, body.get("model", "llama"))
        except BadRequest as error:
            self.error = error
            return
        except (TypeError, ValueError) as error:
            self.error = BadRequest(str(error))
            return
        # The id and time do not depend on the run, so that a resumed run writes the same results
        # as an uninterrupted one.
        self.call.id = f"{self._id()}-answer"
        self.call.created = self.created
        self.requests = [llm.engine.submit(prompt) for prompt in self.call.prompts]

    def _kind_and_body(self, defaults: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The kind of call, and its fields. A null field counts as left out."""
        defaults = {**defaults, "seed": (defaults["seed"] << LINE_BITS) + self.number}
        fields = without_nulls(self.fields)
        if self.in_openais_shape:
            del defaults["max_tokens"]  # OpenAI's format has its own defaults
            return endpoint_of(fields), {**defaults, **without_nulls(fields["body"])}
        asking = [name for name in ("prompt", "messages") if name in fields]
        if len(asking) != 1:
            raise BadRequest(
                'the line has to have "prompt" or "messages", or custom_id, method, url and body'
            )
        (field,) = asking
        if (field == "prompt" and is_several(fields[field])) or fields.get("n", 1) != 1:
            message = (
                "several answers need OpenAI's batch format: "
                "otherwise give each prompt its own line, and leave out n"
            )
            raise BadRequest(message, field)
        kind = TextCompletion if field == "prompt" else ChatCompletion
        return kind, {**defaults, **fields}

    @property
    def over(self) -> bool:
        return all(request.over for request in self.requests)

    def result(self) -> dict[str, Any]:
        """The result: the line's own fields with the answer added, or OpenAI's batch format."""
        failed = [request.error for request in self.requests if request.error is not None]
        error: Exception | None = failed[0] if failed else self.error
        if self.in_openais_shape:
            return self._openais_result(error)
        if error is not None:
            return {**self._kept(), "error": str(error)}
        choice = self.call.response(self.requests)["choices"][0]
        message = choice.get("message")
        if message is None:
            generation = choice["text"]
        else:
            generation = {"role": message["role"], "content": message["content"]}
        result = {
            **self._kept(),
            "generation": generation,
            "finish_reason": choice["finish_reason"],
        }
        if choice["logprobs"] is not None:
            result["logprobs"] = choice["logprobs"]
        return result

    def _openais_result(self, error: Exception | None) -> dict[str, Any]:
        if error is None:
            status = 200
            body = self.call.response(self.requests)
        elif isinstance(error, BadRequest):
            status = error.status
            body = error_of(str(error), status, error.param)
        else:
            status = 500
            body = error_of(str(error), status)
        return {
            "id": self._id(),
            "custom_id": self.fields["custom_id"],
            "response": {"status_code": status, "request_id": self._id(), "body": body},
            "error": None,
        }

    def is_answered_by(self, data: bytes) -> bool:
        """Whether a line of an output file can be the result of this line."""
        try:
            written = json.loads(data)
        except ValueError:
            return False
        if not isinstance(written, dict) or (self.error is not None and "error" not in written):
            return False
        if self.in_openais_shape:
            return written.get("id") == self._id() and (
                written.get("custom_id") == self.fields["custom_id"]
            )
        kept = self._kept()
        has_result = any(key in written for key in RESULT_FIELDS)
        return has_result and kept == {key: written.get(key) for key in kept}

    def may_begin(self, data: bytes) -> bool:
        """Whether these bytes may be the start of this line's result."""
        fields = {"id": self._id()} if self.in_openais_shape else self._kept()
        begin = encode(fields)[:-1]
        return begin.startswith(data) or data.startswith(begin)

    def _kept(self) -> dict[str, Any]:
        return {key: value for key, value in self.fields.items() if key not in RESULT_FIELDS}

    def _id(self) -> str:
        return f"batch_req_{self.number}"


def endpoint_of(fields: dict[str, Any]) -> Any:
    """The kind of call of a line in OpenAI's batch format. Raises BadRequest if it is not valid."""
    url = fields.get("url")
    if not isinstance(url, str) or url not in ENDPOINTS or fields.get("method", "POST") != "POST":
        known = ", ".join(ENDPOINTS)
        raise BadRequest(f"url is {url!r}: use method POST and one of {known}", "url")
    if not isinstance(fields.get("body"), dict):
        raise BadRequest(f"body is {shown(fields.get('body'))}: use an object", "body")
    return ENDPOINTS[url]


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def is_several(prompt: Any) -> bool:
    """Whether a prompt is a list of prompts. A list of ids is a single prompt."""
    return isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt)


def encode(result: dict[str, Any]) -> bytes:
    try:
        return json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, which has to be escaped
        return json.dumps(result).encode()


def lines_of(path: Path, share: slice, skip: int = 0) -> Iterator[Line]:
    """Yield a share of a file's non-empty lines, without the first `skip` lines of the share."""
    created = int(path.stat().st_mtime)
    first = share.start + skip * share.step
    with path.open("rb") as file:
        filled = (data for data in file if data.strip())
        for number, data in enumerate(filled):
            if number >= first and (number - first) % share.step == 0:
                yield Line(number, data, created)


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(data.strip()) for data in file)
