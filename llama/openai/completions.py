"""OpenAI's API: the fields that its clients send -> checked Requests, and Answers -> the objects that they expect.

Knows no HTTP. What cannot be done is refused by the name of its field; null and neutral values pass, and fields that
nobody here knows are ignored, as other servers do.
"""

from __future__ import annotations

import base64
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any

import torch

from ..arguments import Settings, TooLong, make_requests
from ..chat import UNSAFE_ERROR, chat_end_ids, check_dialogs, encode_dialog, has_special_tags
from ..code_llama import check_infilling, encode_infilling
from ..engine.request import Answer, Request, Score
from ..generation import Llama

MAX_TOP_LOGPROBS = 20
MAX_REQUESTS = 2048  # of one call: prompts × n
MAX_STOP = 4096  # characters of a call's stop strings, all of which are looked for after each token
COMPLETION_TOKENS = 16  # of a text completion that does not say how many

# What is refused, and the values that ask for nothing.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    "modalities": (["text"],),
    "audio": (),
    "dimensions": (),
}

TOO_LONG = "context_length_exceeded"  # the code by which clients know that a dialog has to be shortened


class BadRequest(ValueError):
    """What a client asked for cannot be done: the sentence, the field, and an HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Fields:
    """A call's fields. Reading one raises BadRequest where its value is of another type than is asked for."""

    def __init__(self, body: Any, model: str):
        if not isinstance(body, dict):
            raise BadRequest('the body is no JSON object: send one, as {"model": …}')
        self.body = body
        for name, neutral in NOT_SUPPORTED.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise BadRequest(f"{name} is not supported: leave it out", name)
        asked = self.text("model", model)
        if asked != model:
            raise BadRequest(f"no model {shown(asked)} is here: use {model!r}", "model", 404, "model_not_found")

    def read(self, name: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BadRequest(f"{name} is {shown(value)}: use {what}", name)
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        return self.read(name, default, (str,), "a string")

    def number(self, name: str, default: float) -> Any:
        return self.read(name, default, (int, float), "a number")

    def integer(self, name: str, default: int | None = None, low: int = 0, high: float = float("inf")) -> Any:
        value = self.read(name, default, (int,), "an integer")
        if value is not None and not low <= value <= high:
            raise BadRequest(f"{name} is {shown(value)}: use {low} or more" + f", at most {high}" * (high < 1e9), name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value: bool = self.read(name, default, (bool,), "true or false")
        return value

    def object(self, name: str) -> Any:
        return self.read(name, {}, (dict,), "an object")

    def sequence(self, name: str) -> Any:
        value = self.read(name, None, (list,), "a list")
        if value is None:
            raise BadRequest(f"no {name} is given: send a list", name)
        return value


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


class Asked:
    """A call for generated text: its Requests, and how their Answers are to be told."""

    object: str  # what OpenAI calls a whole answer
    chunk: str  # and a part of one
    prefix: str  # of its id
    source: str  # the field that its prompts come in

    def __init__(self, body: Any, llm: Llama, model: str):
        self.fields, self.llm, self.tokenizer, self.model = Fields(body, model), llm, llm.tokenizer, model
        self.stream = self.fields.flag("stream")
        options = self.fields.object("stream_options")
        self.usage = self.stream and Fields(options, model).flag("include_usage")
        self.n = self.fields.integer("n", 1, 1, MAX_REQUESTS)
        self.requests = self.read()
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.told = [Told() for _ in self.requests]

    def read(self) -> list[Request]:
        raise NotImplementedError

    def choice(self, index: int, answer: Answer, text: str, tokens: slice, whole: bool) -> dict[str, Any]:
        """What is told of choice `index`: some text, and the tokens that it ends with it, in OpenAI's shape."""
        raise NotImplementedError

    def make(self, prompts: Sequence[Any], max_tokens: int | None, what: str, **options: Any) -> list[Request]:
        """n requests for each prompt."""
        fields, max_seq_len = self.fields, self.llm.model.params.max_seq_len
        stop = fields.read("stop", (), (str, list), "a string or a list of strings")
        if (size := sum(len(part) for part in stop if isinstance(part, str))) > MAX_STOP:
            raise BadRequest(f"stop has {size} characters: send at most {MAX_STOP} in a call", "stop")
        seed = fields.integer("seed", None, low=-(2**63))
        settings = Settings(
            max_tokens,
            fields.number("temperature", 0.6),
            fields.number("top_p", 0.9),
            secrets.randbits(63) if seed is None else seed,
            [stop if isinstance(stop, str) else tuple(stop)] * (len(prompts) * self.n),
            *self.scores(),
        )
        repeated = [prompt for prompt in prompts for _ in range(self.n)]
        try:
            requests = make_requests(self.tokenizer, repeated, settings, max_seq_len, what=what, **options)
        except (TypeError, ValueError) as error:  # its sentence begins with what it is about
            name = str(error).split()[0]
            code = TOO_LONG if isinstance(error, TooLong) else None
            raise BadRequest(str(error), name if name in fields.body else self.source, code=code) from None
        for request in requests:
            if request.max_tokens == 0 and max_tokens != 0:
                raise BadRequest(
                    f"{what} {request.index // self.n} has {len(request.prompt)} tokens, which leaves no room for an "
                    f"answer in max_seq_len {max_seq_len}: shorten it",
                    self.source,
                    code=TOO_LONG,
                )
        return requests

    def scores(self) -> tuple[bool, int, bool]:
        """logprobs, top_logprobs and echo, as Settings has them."""
        raise NotImplementedError

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The object for finished answers."""
        choices = [self.news(index, answer, whole=True) for index, answer in enumerate(answers)]
        return self._object(self.object, choices, usage=self.usage_of(answers))

    def opening(self) -> list[dict[str, Any]]:
        """What a stream tells before anything was computed."""
        return []

    def part(self, index: int, answer: Answer) -> dict[str, Any] | None:
        """What is new of an answer, for a stream."""
        choice = self.news(index, answer, whole=False)
        return choice and self._object(self.chunk, [choice])

    def closing(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        return [self._object(self.chunk, [], usage=self.usage_of(answers))] if self.usage else []

    def news(self, index: int, answer: Answer, whole: bool) -> dict[str, Any] | None:
        told = self.told[index]
        text, over = answer.news(told.characters)
        if told.over or not (over or (text and not answer.wants_states)):  # an echo comes with its scores
            return None
        begin = told.tokens
        told.add(text, answer, over)
        choice = self.choice(index, answer, text, slice(begin, told.tokens), whole)
        return choice | {"index": index, "finish_reason": answer.finish_reason if over else None}

    def usage_of(self, answers: Sequence[Answer]) -> dict[str, int]:
        prompts = sum(len(answer.request.prompt) for answer in answers[:: self.n])
        generated = sum(len(answer.tokens) for answer in answers)
        return {"prompt_tokens": prompts, "completion_tokens": generated, "total_tokens": prompts + generated}

    def _object(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices} | more


class Told:
    """How much of an answer its reader has."""

    def __init__(self) -> None:
        self.characters = self.tokens = self.offset = 0
        self.over = False

    def add(self, text: str, answer: Answer, over: bool) -> None:
        """Some more text and, where they have scores, the tokens whose text is now whole."""
        self.characters, self.over = self.characters + len(text), over
        if not answer.request.logprobs:
            return
        pieces = answer.prompt_pieces + answer.pieces
        while self.tokens < len(pieces) and (over or self.offset + len(pieces[self.tokens]) <= self.characters):
            self.offset += len(pieces[self.tokens])
            self.tokens += 1


class ChatCompletion(Asked):
    object, chunk, prefix, source = "chat.completion", "chat.completion.chunk", "chatcmpl", "messages"

    def read(self) -> list[Request]:
        messages = [message_of(number, message) for number, message in enumerate(self.fields.sequence("messages"))]
        try:
            (dialog,) = check_dialogs([messages])
            if has_special_tags(dialog, self.tokenizer):
                raise BadRequest(UNSAFE_ERROR.removeprefix("Error: "), "messages")
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error).removeprefix("dialog 0, "), "messages") from None
        max_tokens = self.fields.integer("max_completion_tokens", self.fields.integer("max_tokens"))
        prompt = encode_dialog(dialog, self.tokenizer)
        return self.make([prompt], max_tokens, "dialog", end_ids=chat_end_ids(self.tokenizer))

    def scores(self) -> tuple[bool, int, bool]:
        return self.fields.flag("logprobs"), self.fields.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS), False

    def opening(self) -> list[dict[str, Any]]:
        message = {"role": "assistant", "content": ""}
        roles = [{"index": i, "delta": message, "finish_reason": None} for i in range(len(self.requests))]
        return [self._object(self.chunk, [role]) for role in roles]

    def choice(self, index: int, answer: Answer, text: str, tokens: slice, whole: bool) -> dict[str, Any]:
        logprobs = None
        if answer.request.logprobs:
            pairs = zip(answer.tokens[tokens], answer.scores[tokens], strict=True)
            content = [
                self._token(token, score.logprob) | {"top_logprobs": [self._token(*pair) for pair in score.top]}
                for token, score in pairs
            ]
            logprobs = {"content": content, "refusal": None}
        if whole:
            return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}
        return {"delta": {"content": text} if text else {}, "logprobs": logprobs}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.piece_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def message_of(number: int, message: Any) -> Any:
    """A message whose content is one text. Clients may send it in parts, all of which have to be text."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRequest(f"message {number} has a part of type {shown(kind)}: only text is supported", "messages")
        texts.append(part["text"])
    return message | {"content": "".join(texts)}


class TextCompletion(Asked):
    object, chunk, prefix, source = "text_completion", "text_completion", "cmpl", "prompt"

    def read(self) -> list[Request]:
        prompts = prompts_of(self.fields.body.get("prompt"), MAX_REQUESTS // self.n)
        max_tokens = self.fields.integer("max_tokens", COMPLETION_TOKENS)
        suffix = self.fields.text("suffix")
        if suffix is None:
            encoded = [p if isinstance(p, list) else self.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
            return self.make(encoded, max_tokens, "prompt")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            raise BadRequest("suffix goes with a prompt of text: send no ids", "suffix")
        try:
            check_infilling(self.tokenizer, texts, [suffix] * len(texts))
        except ValueError as error:
            raise BadRequest(f"suffix: {error}", "suffix") from None
        encoded = [encode_infilling(prompt, suffix, self.tokenizer) for prompt in texts]
        return self.make(encoded, max_tokens, "prompt", continues=True, end_ids=[self.tokenizer.eot_id])

    def scores(self) -> tuple[bool, int, bool]:
        likeliest = self.fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
        return likeliest is not None, likeliest or 0, self.fields.flag("echo")

    def choice(self, index: int, answer: Answer, text: str, tokens: slice, whole: bool) -> dict[str, Any]:
        over = self.told[index].over
        return {"text": text, "logprobs": self._logprobs(answer, tokens, over) if answer.request.logprobs else None}

    def _logprobs(self, answer: Answer, tokens: slice, over: bool) -> dict[str, Any]:
        """Of some of the prompt's and the answer's tokens, the first of which has none; at last of the id that ended
        it, for who scores a text asks whether it would have ended."""
        pieces = answer.prompt_pieces + answer.pieces
        ids = answer.ids if answer.request.echo else answer.tokens
        entries: list[tuple[int, Score]] = list(zip(ids, answer.prompt_scores + answer.scores, strict=False))[tokens]
        offsets = [sum(map(len, pieces[: tokens.start]))]
        for piece in pieces[tokens]:
            offsets.append(offsets[-1] + len(piece))
        if over and answer.end is not None:
            entries.append(answer.end)
        unknown = tokens.start == 0 and answer.request.echo  # nothing comes before the first
        k, piece_of = answer.request.top_logprobs, self.tokenizer.piece
        values: list[float | None] = [score.logprob for _, score in entries]
        top: list[dict[str, float] | None] = []
        for token, score in entries:
            likeliest = {piece_of(token): score.logprob}
            for other, logprob in reversed(score.top):  # of ids of one text, the likeliest
                likeliest[piece_of(other)] = logprob
            top.append(likeliest)
        if unknown and values:
            values[0] = top[0] = None
        return {
            "tokens": [piece_of(token) for token, _ in entries],
            "token_logprobs": values,
            "top_logprobs": top if k else None,
            "text_offset": offsets[: len(entries)],
        }


def prompts_of(prompt: Any, most: int) -> list[str] | list[list[int]]:
    """A text, a list of texts, ids, or a list of lists of ids, as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, int) and not isinstance(part, bool) for part in prompt):
            return [prompt]
        if all(isinstance(part, str) for part in prompt) or all(isinstance(part, list) for part in prompt):
            if len(prompt) > most:
                raise BadRequest(f"{len(prompt)} prompts are too many: send at most {most} in a call", "prompt")
            return prompt
    raise BadRequest(f"prompt is {shown(prompt)}: use a string, token ids, or a list of either", "prompt")


class Embeddings:
    """A call for embeddings: the mean of each text's final hidden states, of length 1 as OpenAI's are."""

    stream = False

    def __init__(self, body: Any, llm: Llama, model: str):
        self.model, fields = model, Fields(body, model)
        texts = fields.body.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            ids = isinstance(texts, list) and texts and isinstance(texts[0], (int, list))
            advice = "of another model, perhaps: use text (langchain: check_embedding_ctx_length=False)"
            reason = f"token ids, {advice}" if ids else f"{shown(texts)}: use a string or a list of strings"
            raise BadRequest(f"input is {reason}", "input")
        encoding = fields.text("encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise BadRequest(f"encoding_format is {shown(encoding)}: use 'float' or 'base64'", "encoding_format")
        self.base64 = encoding == "base64"
        if len(texts) > MAX_REQUESTS:
            raise BadRequest(f"input has {len(texts)} texts: send at most {MAX_REQUESTS} in a call", "input")
        prompts = [llm.tokenizer.encode(text, bos=True, eos=False) for text in texts]
        max_seq_len = llm.model.params.max_seq_len
        try:
            self.requests = make_requests(
                llm.tokenizer, prompts, Settings(0), max_seq_len, what="input", pooling="mean"
            )
        except ValueError as error:
            raise BadRequest(str(error), "input") from None

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        data = []
        for index, answer in enumerate(answers):
            assert answer.states is not None
            vector = torch.nn.functional.normalize(answer.states.mean(dim=0), dim=0).cpu()
            packed = vector.numpy().astype("<f4").tobytes()  # little-endian float32, as OpenAI's clients read it
            value = base64.b64encode(packed).decode() if self.base64 else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": value})
        tokens = sum(len(request.prompt) for request in self.requests)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.model, "usage": usage}


def tokenize(body: Any, llm: Llama, model: str) -> dict[str, Any]:
    """vLLM's: the ids of a `prompt`, or of `messages`."""
    fields, max_seq_len = Fields(body, model), llm.model.params.max_seq_len
    if fields.body.get("messages") is not None:
        ids = list(ChatCompletion(body | {"stream": False}, llm, model).requests[0].prompt)
    else:
        special = fields.flag("add_special_tokens", default=True)
        ids = llm.tokenizer.encode(fields.text("prompt", ""), bos=special, eos=False)
    return {"count": len(ids), "max_model_len": max_seq_len, "tokens": ids}


def detokenize(body: Any, llm: Llama, model: str) -> dict[str, Any]:
    ids = Fields(body, model).sequence("tokens")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BadRequest(f"tokens is {shown(ids)}: use a list of token ids", "tokens")
    return {"prompt": llm.tokenizer.decode(ids)}


def models(llm: Llama, model: str, created: int) -> dict[str, Any]:
    size = llm.model.params.max_seq_len
    card = {"id": model, "object": "model", "created": created, "owned_by": "llama", "max_model_len": size}
    return {"object": "list", "data": [card]}


def error_of(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
