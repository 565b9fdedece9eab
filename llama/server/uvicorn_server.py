"""The one module that reaches into uvicorn. Seen with uvicorn 0.30 to 0.54.

It defends against what uvicorn by itself does not:
- a client that opens a connection and never sends the head of a request: `Protocol` closes it in
  time;
- an end that cuts answers: on the first signal `Server` lets running answers end, as long as
  `drain` says, with new calls told to come again; on the second it ends at once;
- an engine's thread that is loading or in a long step when the server ends: it is not waited for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from .service import Busy, Service

logger = logging.getLogger(__name__)

READ_SECONDS = 30  # for the head of a request
IDLE_SECONDS = 60  # that a connection is kept for another request
STOP_SECONDS = 5  # for the engine's thread to end after its step


class Protocol(H11Protocol):
    """Closes a connection on which the head of a request has not come in time."""

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
        """Wait for a request's head, the first or the next."""
        seconds = READ_SECONDS
        if self.cycle:
            self.patience.cancel()
            seconds += IDLE_SECONDS
        self.patience = self.loop.call_later(seconds, self._give_up, self.cycle)

    def _give_up(self, last: Any) -> None:
        if self.cycle is last:
            self.transport.close()


class Server(uvicorn.Server):
    """Serves a Service's endpoints until a signal comes or the engine's thread ends."""

    def __init__(self, app: ASGIApp, service: Service, drain: float):
        """After the first signal answers have `drain` seconds left."""
        config = uvicorn.Config(
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
        super().__init__(config)
        self.service = service
        self.drain = drain
        logging.getLogger("uvicorn").setLevel(logging.ERROR)

    async def answer(self, listener: socket.socket, ready: str) -> None:
        """Serve; log `ready` once the model is built."""
        self.service.on_ready = lambda: logger.info(ready)
        self.service.on_end = self._exit
        self.loop = asyncio.get_running_loop()
        await self.serve([listener])

    def _exit(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.thread = self.service.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.service.stop()
        end = time.monotonic() + (STOP_SECONDS if self.service.llm else 0.2)
        while self.thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self.thread.is_alive():  # loading, or in a long step: nothing that it does is wanted
            os._exit(0)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.loop.call_soon_threadsafe(self._end, self.should_exit)
        self.should_exit = True

    def _end(self, at_once: bool) -> None:
        error = Busy("the server is shutting down")
        if not at_once and (self.service.calls or self._is_writing()):
            logger.info("ending what is being answered first; another signal ends at once")
            self.loop.call_later(self.drain, self.service.fail, error)
            return
        self.service.fail(error)
        for connection in list(self.server_state.connections):
            self.loop.call_later(0.5, connection.transport.abort)

    def _is_writing(self) -> bool:
        """Whether a client has not yet read all of an answer."""
        connections = self.server_state.connections
        return any(connection.transport.get_write_buffer_size() for connection in connections)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises OSError that says what else to try."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        advice = "use another --port, or 0 for one that is free"
        raise OSError(f"cannot listen on {host} port {port} ({error}): {advice}") from None
