"""HTTP: OpenAI's endpoints, health, metrics and the chat page, before a Service; and the server's own end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..generation import Llama
from ..openai.completions import (
    Asked,
    BadRequest,
    ChatCompletion,
    Embeddings,
    Fields,
    TextCompletion,
    detokenize,
    error_of,
    models,
    tokenize,
)
from .service import Busy, Call, Service

logger = logging.getLogger(__name__)

HOST = re.compile(r"(\[[^]]*\]|[^:]*)(:\d*)?")  # the header's name and port

MAX_BODY = 8 * 2**20  # bytes; the text of a hundred thousand tokens is half a megabyte
READ_SECONDS = 30  # for the head of a request, and again for its body
IDLE_SECONDS = 60  # that a connection is kept for another request
SILENT_SECONDS = 10  # after which a stream says that it is still there

NO_STORE, NO_SNIFF = {"Cache-Control": "no-store"}, {"X-Content-Type-Options": "nosniff"}

# The page's own style and script, its own server, and nothing else.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'nonce-{nonce}'; "
    "script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Protocol(H11Protocol):
    """Closes a connection on which the head of a request has not come in time; uvicorn would wait for ever."""

    patience: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.patience.cancel()  # its timer holds all that is known of the last request

    def _expect(self) -> None:
        if self.cycle:
            self.patience.cancel()
        seconds = READ_SECONDS + (IDLE_SECONDS if self.cycle else 0)
        self.patience = self.loop.call_later(seconds, self._give_up, self.cycle)

    def _give_up(self, last: Any) -> None:
        if self.cycle is last:
            self.transport.close()


class Server(uvicorn.Server):
    """Ends on a signal once its answers are told, after `drain` seconds without them, or at once on another signal."""

    def __init__(self, app: ASGIApp, service: Service, drain: float):
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=int(drain) + 3,
            )
        )
        self.service, self.drain = service, drain
        logging.getLogger("uvicorn").setLevel(logging.ERROR)

    async def answer(self, listener: socket.socket, ready: str) -> None:
        """Serve until a signal comes or the engine's thread ends."""
        self.service.on_ready = lambda: logger.info(ready)
        self.service.on_end = lambda: setattr(self, "should_exit", True)
        self.loop = asyncio.get_running_loop()
        await self.serve([listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.thread = self.service.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.service.stop()
        end = time.monotonic() + (5 if self.service.llm else 0.2)
        while self.thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self.thread.is_alive():  # loading, or in a long step: nothing that it does is wanted
            os._exit(0)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.loop.call_soon_threadsafe(self._end, self.should_exit)
        self.should_exit = True

    def _end(self, now: bool) -> None:
        error = Busy("the server is shutting down")
        unread = any(connection.transport.get_write_buffer_size() for connection in self.server_state.connections)
        if not now and (self.service.calls or unread):
            logger.info("ending what is being answered first; another signal ends at once")
            self.loop.call_later(self.drain, self.service.fail, error)
            return
        self.service.fail(error)
        for connection in list(self.server_state.connections):
            self.loop.call_later(0.5, connection.transport.abort)


class App:
    """The endpoints, and what has to hold for a request to come to one."""

    def __init__(self, service: Service, model: str, key: str | None, allow_origin: str | None, host: str = ""):
        """`host`: the name that the server was told to listen on."""
        self.service, self.model, self.created = service, model, int(time.time())
        self.names = {"localhost", host.lower(), (allow_origin or "").partition("://")[2].lower()} - {""}
        self.key, self.allow_origin = key and f"Bearer {key}".encode(), allow_origin
        post = functools.partial(Route, methods=["POST"])
        routes = [
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
        origins = [allow_origin] if allow_origin else []
        guards = [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])]
        kinds = (HTTPException, BadRequest, Busy, ClientDisconnect, Exception)
        app = Starlette(
            routes=routes, middleware=guards if origins else [], exception_handlers=dict.fromkeys(kinds, failed)
        )
        app.router.redirect_slashes = False
        self.asgi = app

    def admit(self, request: Request) -> None:
        """Raise HTTPException for who lacks the key, and for pages of other servers, which a browser would let ask.

        A site may also make its own name stand for this machine's loopback address, and its pages ask there: without a
        key, only known names are answered.
        """
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that came
        if self.key and not hmac.compare_digest(given, self.key):
            raise HTTPException(401, "no valid API key: send the header Authorization: Bearer KEY")
        origin, host = request.headers.get("origin"), request.headers.get("host")
        own = origin is None or origin.partition("://")[2] == host
        if not own and self.allow_origin not in (origin, "*"):
            raise HTTPException(403, f"pages of {origin} may not ask this server: start it with --allow_origin")
        here, _ = request.scope["server"]
        if host is not None and not (self.key or self.goes_by(host)) and is_loopback(here):  # browsers send one
            way = f"ask {here}, or start it with --allow_origin http://{host}"
            raise HTTPException(403, f"this server does not know the name {host}: {way}")

    def goes_by(self, host: str) -> bool:
        """Whether this server has the name in a Host header."""
        named = HOST.fullmatch(host.lower())
        if named is None or self.allow_origin == "*":
            return self.allow_origin == "*"
        return not self.names.isdisjoint({named[0], named[1]}) or address_of(named[1].strip("[]")) is not None

    async def complete(self, kind: Callable[..., Any], request: Request) -> Response:
        """Answer a call, whole or as a stream, unless its client leaves before."""
        self.admit(request)
        llm, body = self.service.check(), await body_of(request)
        asked = await asyncio.to_thread(checked, kind, body, llm, self.model)
        call = self.service.submit(asked.requests)
        if asked.stream:
            return EventStream(self.service, asked, call)
        gone = asyncio.ensure_future(disconnected(request))
        gone.add_done_callback(lambda _: call.changed.set())
        try:
            while not (call.over or gone.done()):
                call.changed.clear()
                await call.changed.wait()
            if not call.over:
                raise ClientDisconnect
            call.check()
            return await asyncio.to_thread(lambda: answer_of(asked.whole(call.answers)))  # it may be long
        except ValueError as error:  # the request's own: its logits are not finite
            return answer_of(error_of(str(error), 500), 500)
        finally:
            gone.cancel()
            self.service.cancel(call)

    async def convert(self, function: Callable[..., Any], request: Request) -> Response:
        self.admit(request)
        llm, body = self.service.check(), await body_of(request)
        return answer_of(await asyncio.to_thread(checked, function, body, llm, self.model))

    async def models(self, request: Request) -> Response:
        self.admit(request)
        listed = models(self.service.check(), self.model, self.created)
        name = request.path_params.get("name")
        if name is None:
            return answer_of(listed)
        Fields({"model": name}, self.model)  # which refuses another
        return answer_of(listed["data"][0])

    async def health(self, request: Request) -> Response:
        self.service.check()
        return answer_of({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        running, waiting = self.service.load()
        return PlainTextResponse(self.service.metrics.text(self.model, running, waiting))

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        html = Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        headers = {"Content-Security-Policy": POLICY.format(nonce=nonce), "Referrer-Policy": "no-referrer"}
        return Response(html, media_type="text/html", headers=headers | NO_STORE | NO_SNIFF)


class EventStream(StreamingResponse):
    """A call's answers as server-sent events, from before they begin. Its rows are free when the client leaves."""

    def __init__(self, service: Service, asked: Asked, call: Call):
        super().__init__(
            self.events(asked, call),
            media_type="text/event-stream",
            headers=NO_STORE | NO_SNIFF | {"X-Accel-Buffering": "no"},
        )
        self.service, self.call = service, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.cancel(self.call)

    async def events(self, asked: Asked, call: Call) -> AsyncIterator[bytes]:
        yield b": the model reads the prompt\n\n" + b"".join(map(event, asked.opening()))
        while True:
            over = call.over
            call.changed.clear()
            parts = (asked.part(i, answer) for i, answer in enumerate(call.answers))
            if data := b"".join(event(part) for part in parts if part is not None):
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
        else:
            yield b"".join(map(event, asked.closing(call.answers))) + b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def body_of(request: Request) -> Any:
    """The JSON of a request's body. Raises BadRequest for what is none, too long, or too slow."""
    data = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            data.extend(chunk)
            if len(data) > MAX_BODY:
                raise BadRequest(f"the body has more than {MAX_BODY} bytes: send less at once", status=413)

    try:
        await asyncio.wait_for(read(), READ_SECONDS)
        return json.loads(data)
    except asyncio.TimeoutError:
        raise BadRequest(f"the body did not come within {READ_SECONDS} s: send it faster", status=408) from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"the body is not JSON ({error}): send a JSON object") from None


def checked(function: Callable[..., Any], body: Any, llm: Llama, model: str) -> Any:
    """What `function` makes of a body; what the library refuses is the client's mistake."""
    try:
        return function(body, llm, model)
    except BadRequest:
        raise
    except (TypeError, ValueError) as error:
        raise BadRequest(str(error)) from error


def answer_of(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: a text may hold halves of characters, which UTF-8 cannot."""
    return Response(json.dumps(value), status, (headers or {}) | NO_SNIFF, "application/json")


async def failed(request: Request, error: Exception) -> Response:
    """An error in OpenAI's shape."""
    if isinstance(error, BadRequest):
        close = {"Connection": "close"} if error.status in (408, 413) else {}  # its body may still be coming
        return answer_of(error_of(str(error), error.status, error.param, error.code), error.status, close)
    if isinstance(error, Busy):
        return answer_of(error_of(str(error), 503, code="busy"), 503, {"Retry-After": "1"})
    if isinstance(error, HTTPException):
        return answer_of(error_of(error.detail, error.status_code), error.status_code, dict(error.headers or {}))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # which nobody hears
    logger.error("%s %s failed: %s", request.method, request.url.path, error, exc_info=error)
    return answer_of(error_of(str(error), 500), 500)


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def is_loopback(host: str) -> bool:
    address = address_of(host)
    return address is not None and address.is_loopback
