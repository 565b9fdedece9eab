"""Chat and text completions: a call's fields -> Prompts; Requests -> a response or its chunks."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..chat import UNSAFE_ERROR, chat_end_ids, check_dialog, encode_dialog, has_special_tags
from ..code_llama import check_infilling, encode_infilling
from ..engine import Prompt, Request, ScoredToken, make_prompts
from ..engine.request import delta
from ..errors import ArgumentError
from ..generation import Llama
from ..sampling import SamplingParams
from .fields import CONTEXT_LENGTH, BadRequest, Fields, refused, sampling_fields, shown

MAX_TOP_LOGPROBS = 20
MAX_REQUESTS = 2048  # per call: prompts × n
COMPLETION_TOKENS = 16  # default max_tokens of a text completion


class News(NamedTuple):
    """The part of a request's output that its reader has not received yet."""

    text: str
    tokens: slice  # the tokens, as a range of the request's pieces, that end within this text
    is_last: bool


class StreamCursor:
    """How much of a request its reader has received."""

    def __init__(self) -> None:
        self.characters = 0
        self.tokens = 0  # tokens whose whole text was received
        self.offset = 0  # the number of characters of these tokens
        self.finished = False

    def advance(self, request: Request) -> News | None:
        """Return the new part of the output and move past it; None if there is nothing new.

        The engine's thread may be extending the request.
        """
        text, over = delta(request, self.characters)
        if self.finished:
            return None
        # An echoed prompt is sent together with its scores, once all of them are computed.
        if not over and (not text or request.computed is not None):
            return None
        first = self.tokens
        self.characters += len(text)
        self.finished = over
        if request.prompt.params.logprobs:
            self._advance_tokens(request)
        return News(text, slice(first, self.tokens), over)

    def _advance_tokens(self, request: Request) -> None:
        """Move past the tokens whose text was received; at the end, past all remaining tokens."""
        pieces = [*request.prompt_pieces, *request.output.pieces]
        while self.tokens < len(pieces):
            end = self.offset + len(pieces[self.tokens])
            if end > self.characters and not self.finished:
                return
            self.offset = end
            self.tokens += 1


class CompletionCall:
    """A call for generated text: its Prompts, and the objects built from their Requests."""

    object_name: str  # the "object" field of a whole response
    chunk_name: str  # the "object" field of a chunk
    id_prefix: str
    prompt_field: str  # the field that holds the prompts

    def __init__(self, body: Any, llm: Llama, model: str):
        self.fields = Fields(body, model)
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self.model = model
        # The call's names for options that have a different name in SamplingParams.
        self.spelling: dict[str, str] = {}
        self.stream = self.fields.flag("stream")
        stream_options = Fields(self.fields.object("stream_options"), model)
        self.include_usage = self.stream and stream_options.flag("include_usage")
        self.n = self.fields.integer("n", 1, 1, MAX_REQUESTS)
        self.prompts = self.read()
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.cursors = [StreamCursor() for _ in self.prompts]

    def read(self) -> list[Prompt]:
        raise NotImplementedError

    def choice(self, request: Request, news: News, whole: bool) -> dict[str, Any]:
        """New text and tokens in OpenAI's format: a choice of a whole response, or of a chunk."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The call's options, keyed by field names of SamplingParams."""
        raise NotImplementedError

    def make(self, ids: Sequence[Any], name: str, **how: Any) -> list[Prompt]:
        """`n` prompts for each list of ids. Error messages call a prompt `name`.

        `how` is passed on to make_prompts.
        """
        options = self.options()
        options.setdefault("seed", secrets.randbits(63))
        repeated = [own for own in ids for _ in range(self.n)]
        count = len(repeated)
        max_seq_len = self.llm.model.params.max_seq_len
        try:
            params = [SamplingParams(**options)] * count
            prompts = make_prompts(
                self.tokenizer,
                repeated,
                params,
                max_seq_len,
                streams=range(count),
                name=name,
                **how,
            )
        except ArgumentError as error:
            raise refused(error, self.prompt_field, self.n, self.spelling) from None
        for prompt in prompts:
            if prompt.max_tokens == 0 and prompt.params.max_tokens != 0:
                raise BadRequest(
                    f"{name} {prompt.index // self.n} has {len(prompt.token_ids)} tokens, "
                    f"which leaves no room for an answer in max_seq_len {max_seq_len}: shorten it",
                    self.prompt_field,
                    code=CONTEXT_LENGTH,
                )
        return prompts

    def response(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The object for finished requests."""
        choices = [self._next_choice(index, own, whole=True) for index, own in enumerate(requests)]
        return self._object(self.object_name, choices, usage=self.usage_of(requests))

    def first_chunks(self) -> list[dict[str, Any]]:
        """The chunks that a stream begins with, before anything is computed."""
        return []

    def chunk(self, index: int, request: Request) -> dict[str, Any] | None:
        """The new part of a request's output as a chunk of a stream; None if nothing is new."""
        choice = self._next_choice(index, request, whole=False)
        return choice and self._object(self.chunk_name, [choice])

    def last_chunks(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        if not self.include_usage:
            return []
        return [self._object(self.chunk_name, [], usage=self.usage_of(requests))]

    def _next_choice(self, index: int, request: Request, whole: bool) -> dict[str, Any] | None:
        news = self.cursors[index].advance(request)
        if news is None:
            return None
        reason = request.finish_reason if news.is_last else None
        return self.choice(request, news, whole) | {"index": index, "finish_reason": reason}

    def usage_of(self, requests: Sequence[Request]) -> dict[str, int]:
        read = sum(len(request.prompt.token_ids) for request in requests[:: self.n])
        generated = sum(len(request.output.tokens) for request in requests)
        return {
            "prompt_tokens": read,
            "completion_tokens": generated,
            "total_tokens": read + generated,
        }

    def _object(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


class ChatCompletion(CompletionCall):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_field = "messages"

    def read(self) -> list[Prompt]:
        sent = self.fields.sequence("messages")
        messages = [message_of(number, message) for number, message in enumerate(sent)]
        try:
            dialog = check_dialog(messages)
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error), "messages") from None
        if has_special_tags(dialog, self.tokenizer):
            raise BadRequest(UNSAFE_ERROR.removeprefix("Error: "), "messages")
        ids = encode_dialog(dialog, self.tokenizer)
        return self.make([ids], "dialog", end_ids=chat_end_ids(self.tokenizer))

    def options(self) -> dict[str, Any]:
        """The call's options. `max_completion_tokens` is the newer name of `max_tokens`.

        Chat completions have no echo.
        """
        options = sampling_fields(self.fields, other=("echo",))
        newer = self.fields.integer("max_completion_tokens")
        if newer is not None:
            options["max_tokens"] = newer
            self.spelling = {"max_tokens": "max_completion_tokens"}
        self.fields.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)  # rejects a larger value
        return options

    def first_chunks(self) -> list[dict[str, Any]]:
        chunks = []
        for index in range(len(self.prompts)):
            opening = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": opening, "finish_reason": None}
            chunks.append(self._object(self.chunk_name, [choice]))
        return chunks

    def choice(self, request: Request, news: News, whole: bool) -> dict[str, Any]:
        logprobs = None
        if request.prompt.params.logprobs:
            tokens = request.output.tokens[news.tokens]
            logprobs = {"content": [self._scored(token) for token in tokens], "refusal": None}
        if whole:
            message = {"role": "assistant", "content": news.text, "refusal": None}
            return {"message": message, "logprobs": logprobs}
        changes = {"content": news.text} if news.text else {}
        return {"delta": changes, "logprobs": logprobs}

    def _scored(self, scored: ScoredToken) -> dict[str, Any]:
        likeliest = [self._token(token, logprob) for token, logprob in scored.top]
        return self._token(scored.id, scored.logprob) | {"top_logprobs": likeliest}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.piece_bytes(token)
        return {
            "token": data.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(data),
        }


def message_of(number: int, message: Any) -> Any:
    """The message with its content as one string.

    Clients may send the content as a list of parts. Raises BadRequest if one is not text.
    """
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        if not isinstance(part, dict):
            part = {"type": part}
        kind = part.get("type")
        text = part.get("text")
        if kind != "text" or not isinstance(text, str):
            reason = f"has a part of type {shown(kind)}: only text is supported"
            raise BadRequest(f"message {number} {reason}", "messages")
        texts.append(text)
    return message | {"content": "".join(texts)}


class TextCompletion(CompletionCall):
    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"
    prompt_field = "prompt"

    def read(self) -> list[Prompt]:
        prompts = prompts_of(self.fields.body.get("prompt"), MAX_REQUESTS // self.n)
        suffix = self.fields.text("suffix")
        if suffix is not None:
            return self.infilling(prompts, suffix)
        ids = [
            prompt
            if isinstance(prompt, list)
            else self.tokenizer.encode(prompt, bos=True, eos=False)
            for prompt in prompts
        ]
        return self.make(ids, "prompt")

    def infilling(self, prompts: Sequence[Any], suffix: str) -> list[Prompt]:
        """Prompts for the text between each prompt and the suffix."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            raise BadRequest("suffix needs a text prompt: send no token ids", "suffix")
        try:
            check_infilling(self.tokenizer, texts, [suffix] * len(texts))
        except ValueError as error:
            raise BadRequest(f"suffix: {error}", "suffix") from None
        ids = [encode_infilling(text, suffix, self.tokenizer) for text in texts]
        return self.make(ids, "prompt", starts_text=False, end_ids=[self.tokenizer.eot_id])

    def options(self) -> dict[str, Any]:
        """The call's options. Its `logprobs` is a number: `top_logprobs` in SamplingParams."""
        options = sampling_fields(self.fields, other=("logprobs", "top_logprobs"))
        options.setdefault("max_tokens", COMPLETION_TOKENS)
        likeliest = self.fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
        if likeliest is not None:
            options["logprobs"] = True
            options["top_logprobs"] = likeliest
            self.spelling = {"top_logprobs": "logprobs"}
        return options

    def choice(self, request: Request, news: News, whole: bool) -> dict[str, Any]:
        if not request.prompt.params.logprobs:
            return {"text": news.text, "logprobs": None}
        return {"text": news.text, "logprobs": self._logprobs(request, news)}

    def _logprobs(self, request: Request, news: News) -> dict[str, Any]:
        """The log-probabilities of the new tokens, those of an echoed prompt included.

        The first token of a prompt has none. A token that ended the output, such as EOS, is
        appended: evaluation tools that score a text need its log-probability.
        """
        output = request.output
        piece_of = self.tokenizer.piece
        pieces = [*request.prompt_pieces, *output.pieces]
        scored = [*request.prompt_scores, *output.tokens][news.tokens]
        begin = news.tokens.start
        offset = sum(len(piece) for piece in pieces[:begin])
        offsets = []
        for piece in pieces[news.tokens]:
            offsets.append(offset)
            offset += len(piece)
        if news.is_last and output.end is not None:
            scored.append(output.end)
            offsets.append(offset)
        values: list[float | None] = [token.logprob for token in scored]
        top: list[dict[str, float] | None] = [self._likeliest(token) for token in scored]
        if begin == 0 and request.prompt.params.echo and values:
            values[0] = None
            top[0] = None
        return {
            "tokens": [piece_of(token.id) for token in scored],
            "token_logprobs": values,
            "top_logprobs": top if request.prompt.params.top_logprobs else None,
            "text_offset": offsets,
        }

    def _likeliest(self, scored: ScoredToken) -> dict[str, float]:
        """Log-probabilities by token text. If several ids have one text, the likeliest one's."""
        piece_of = self.tokenizer.piece
        likeliest = {piece_of(scored.id): scored.logprob}
        for token, logprob in reversed(scored.top):
            likeliest[piece_of(token)] = logprob
        return likeliest


def prompts_of(prompt: Any, most: int) -> list[str] | list[list[int]]:
    """The prompts of a call, given as a text, a list of texts, ids, or a list of lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(is_id(part) for part in prompt):
            return [prompt]
        texts = all(isinstance(part, str) for part in prompt)
        if texts or all(isinstance(part, list) for part in prompt):
            if len(prompt) > most:
                message = f"{len(prompt)} prompts are too many: send at most {most} in a call"
                raise BadRequest(message, "prompt")
            if not texts:
                check_ids(prompt)
            return prompt
    raise BadRequest(
        f"prompt is {shown(prompt)}: use a string, token ids, or a list of either", "prompt"
    )


def check_ids(prompts: list[list[Any]]) -> None:
    for number, ids in enumerate(prompts):
        for token in ids:
            if not is_id(token):
                message = f"a token id of prompt {number} is {shown(token)}: use an integer"
                raise BadRequest(message, "prompt")


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
