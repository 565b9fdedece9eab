"""The endpoints: OpenAI's API, health, metrics and the chat page, in front of a Service."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..generation import Llama
from ..openai.completions import ChatCompletion, CompletionCall, TextCompletion
from ..openai.embeddings import Embeddings
from ..openai.fields import BadRequest, Fields
from ..openai.objects import detokenize, error_of, models, tokenize
from .service import Busy, Call, Service

logger = logging.getLogger(__name__)

HOST = re.compile(r"(\[[^]]*\]|[^:]*)(:\d*)?")  # a Host header's name and port

MAX_BODY = 8 * 2**20  # bytes; 100,000 tokens of text are about half a megabyte
BODY_SECONDS = 30  # time limit for receiving the body of a request
SILENT_SECONDS = 10  # a stream silent for this long sends a comment, so that no proxy closes it

NO_STORE = {"Cache-Control": "no-store"}
NO_SNIFF = {"X-Content-Type-Options": "nosniff"}

# The page may load its own style and script and call its own server, and nothing else.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'nonce-{nonce}'; "
    "script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class App:
    """The endpoints and their access control."""

    def __init__(
        self,
        service: Service,
        model: str,
        key: str | None,
        allow_origin: str | None,
        host: str = "",
    ):
        """`host` is the name that the server was asked to listen on."""
        self.service = service
        self.model = model
        self.created = int(time.time())
        self.key = key and f"Bearer {key}".encode()
        self.allow_origin = allow_origin
        _, _, allowed_host = (allow_origin or "").partition("://")
        self.names = {"localhost", host.lower(), allowed_host.lower()} - {""}
        kinds = (HTTPException, BadRequest, Busy, ClientDisconnect, Exception)
        app = Starlette(
            routes=self._routes(),
            middleware=self._middleware(),
            exception_handlers=dict.fromkeys(kinds, failed),
        )
        app.router.redirect_slashes = False
        self.asgi = app

    def _routes(self) -> list[Route]:
        post = functools.partial(Route, methods=["POST"])
        return [
            post("/v1/chat/completions", functools.partial(self.complete, ChatCompletion)),
            post("/v1/completions", functools.partial(self.complete, TextCompletion)),
            post("/v1/embeddings", functools.partial(self.complete, Embeddings)),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            post("/tokenize", functools.partial(self.convert, tokenize)),
            post("/detokenize", functools.partial(self.convert, detokenize)),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/", self.page),
        ]

    def _middleware(self) -> list[Middleware]:
        """CORS headers for the pages of another origin, if one is allowed."""
        if not self.allow_origin:
            return []
        origins = [self.allow_origin]
        any_one = ["*"]
        return [
            Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=any_one, allow_headers=any_one
            )
        ]

    def admit(self, request: Request) -> None:
        """Raise HTTPException for a missing or wrong key, or a page of another origin.

        A browser lets any page send requests to any server. A site may also point its own host
        name at this machine's loopback address (DNS rebinding). So without a key, requests to
        that address are accepted only under known host names.
        """
        given = request.headers.get("authorization", "").encode("latin-1")  # the received bytes
        if self.key and not hmac.compare_digest(given, self.key):
            raise HTTPException(401, "no valid API key: send the header Authorization: Bearer KEY")
        origin = request.headers.get("origin")
        host = request.headers.get("host")
        own = origin is None or origin.partition("://")[2] == host
        if not own and self.allow_origin not in (origin, "*"):
            advice = "start it with --allow_origin"
            raise HTTPException(403, f"pages of {origin} may not call this server: {advice}")
        here, _ = request.scope["server"]
        if self.key or host is None or self.goes_by(host):  # browsers always send a Host
            return
        if is_loopback(here):
            advice = f"use {here}, or start it with --allow_origin http://{host}"
            raise HTTPException(403, f"this server does not accept the host name {host}: {advice}")

    def goes_by(self, host: str) -> bool:
        """Whether the server accepts this Host header."""
        if self.allow_origin == "*":
            return True
        match = HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1]
        known = not self.names.isdisjoint({match[0], name})
        return known or address_of(name.strip("[]")) is not None

    async def complete(self, kind: Callable[..., Any], request: Request) -> Response:
        """Answer a call, whole or as a stream. It is cancelled if its client disconnects."""
        self.admit(request)
        llm = self.service.check()
        body = await body_of(request)
        asked = await asyncio.to_thread(checked, kind, body, llm, self.model)
        call = self.service.submit(asked.prompts)
        if asked.stream:
            return EventStream(self.service, asked, call)
        try:
            await until_over(call, request)
            # Serializing a long answer takes a while. A thread keeps the event loop free.
            return await asyncio.to_thread(lambda: answer_of(asked.response(call.requests)))
        except ValueError as error:  # an error of this request alone: its logits are not finite
            return answer_of(error_of(str(error), 500), 500)
        finally:
            self.service.cancel(call)

    async def convert(self, function: Callable[..., Any], request: Request) -> Response:
        self.admit(request)
        llm = self.service.check()
        body = await body_of(request)
        return answer_of(await asyncio.to_thread(checked, function, body, llm, self.model))

    async def models(self, request: Request) -> Response:
        self.admit(request)
        listed = models(self.service.check(), self.model, self.created)
        name = request.path_params.get("name")
        if name is None:
            return answer_of(listed)
        Fields({"model": name}, self.model)  # raises BadRequest for another name
        return answer_of(listed["data"][0])

    async def health(self, request: Request) -> Response:
        self.service.check()
        return answer_of({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        running, waiting = self.service.load()
        return PlainTextResponse(self.service.metrics.text(self.model, running, waiting))

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        policy = {
            "Content-Security-Policy": POLICY.format(nonce=nonce),
            "Referrer-Policy": "no-referrer",
        }
        return Response(
            html.replace("{{nonce}}", nonce),
            media_type="text/html",
            headers=policy | NO_STORE | NO_SNIFF,
        )


class EventStream(StreamingResponse):
    """A call's answers as server-sent events. Its slots are released if the client disconnects."""

    def __init__(self, service: Service, asked: CompletionCall, call: Call):
        headers = NO_STORE | NO_SNIFF | {"X-Accel-Buffering": "no"}
        super().__init__(events(asked, call), media_type="text/event-stream", headers=headers)
        self.service = service
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.cancel(self.call)


async def events(asked: CompletionCall, call: Call) -> AsyncIterator[bytes]:
    """Yield a comment immediately, new output after each step, and finally [DONE] or an error."""
    opening = b"".join(event(chunk) for chunk in asked.first_chunks())
    yield b": the model reads the prompt\n\n" + opening
    while True:
        over = call.over
        call.changed.clear()
        chunks = [asked.chunk(index, request) for index, request in enumerate(call.requests)]
        data = b"".join(event(chunk) for chunk in chunks if chunk is not None)
        if data:
            yield data
        if over:
            break
        try:
            await asyncio.wait_for(call.changed.wait(), SILENT_SECONDS)
        except asyncio.TimeoutError:
            yield b": still there\n\n"
    try:
        call.check()
    except Exception as error:
        yield event(error_of(str(error), 500))
        return
    closing = b"".join(event(chunk) for chunk in asked.last_chunks(call.requests))
    yield closing + b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


async def until_over(call: Call, request: Request) -> None:
    """Wait until a call ends.

    Raises the call's error if it failed, and ClientDisconnect if its client disconnected.
    """
    gone = asyncio.ensure_future(disconnected(request))
    gone.add_done_callback(lambda _: call.changed.set())
    try:
        while not (call.over or gone.done()):
            call.changed.clear()
            await call.changed.wait()
        if not call.over:
            raise ClientDisconnect
        call.check()
    finally:
        gone.cancel()


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def body_of(request: Request) -> Any:
    """The parsed JSON body of a request. Raises BadRequest if it is invalid, too long or late."""
    try:
        data = await asyncio.wait_for(read_body(request), BODY_SECONDS)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {BODY_SECONDS} s: send it faster"
        raise BadRequest(message, status=408) from None
    try:
        return json.loads(data)
    except (RecursionError, ValueError) as error:
        raise BadRequest(f"the body is not JSON ({error}): send a JSON object") from None


async def read_body(request: Request) -> bytearray:
    data = bytearray()
    async for chunk in request.stream():
        data.extend(chunk)
        if len(data) > MAX_BODY:
            message = f"the body has more than {MAX_BODY} bytes: send a shorter one"
            raise BadRequest(message, status=413)
    return data


def checked(function: Callable[..., Any], body: Any, llm: Llama, model: str) -> Any:
    """Call `function` with a body. Errors of the library are raised as BadRequest."""
    try:
        return function(body, llm, model)
    except BadRequest:
        raise
    except (TypeError, ValueError) as error:
        raise BadRequest(str(error)) from error


def answer_of(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response, in ASCII: texts may hold lone surrogates, which UTF-8 cannot encode."""
    return Response(json.dumps(value), status, (headers or {}) | NO_SNIFF, "application/json")


async def failed(request: Request, error: Exception) -> Response:
    """The response for an exception, in OpenAI's format."""
    if isinstance(error, BadRequest):
        # The rest of a body that was not read to its end may still be arriving.
        close = {"Connection": "close"} if error.status in (408, 413) else {}
        body = error_of(str(error), error.status, error.param, error.code)
        return answer_of(body, error.status, close)
    if isinstance(error, Busy):
        return answer_of(error_of(str(error), 503, code="busy"), 503, {"Retry-After": "1"})
    if isinstance(error, HTTPException):
        body = error_of(error.detail, error.status_code)
        return answer_of(body, error.status_code, dict(error.headers or {}))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody receives it
    path = request.url.path
    logger.error("%s %s failed: %s", request.method, path, error, exc_info=error)
    return answer_of(error_of(str(error), 500), 500)


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def is_loopback(host: str) -> bool:
    address = address_of(host)
    return address is not None and address.is_loopback
