"""The only module that uses uvicorn's internals. Checked with uvicorn 0.30 to 0.54.

It handles three cases that uvicorn by itself does not:
- A client opens a connection and never sends the head of a request. `Protocol` closes the
  connection after a time limit.
- A signal arrives while answers are running. On the first signal `Server` accepts no new
  connections and gives running answers up to `drain` seconds to finish. On the second signal it
  ends immediately.
- The engine's thread is loading or in a long step when the server ends. The server does not wait
  for it.
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

READ_SECONDS = 30  # time limit for the head of a request
IDLE_SECONDS = 60  # how long an idle connection is kept open for another request
STOP_SECONDS = 5  # time limit for the engine's thread to finish its step and end


class Protocol(H11Protocol):
    """Closes a connection on which the head of a request does not arrive in time."""

    patience: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.patience.cancel()  # the timer holds a reference to the last request's data

    def _expect(self) -> None:
        """Start the timer for the head of the first or the next request."""
        seconds = READ_SECONDS
        if self.cycle:
            self.patience.cancel()
            seconds += IDLE_SECONDS
        self.patience = self.loop.call_later(seconds, self._give_up, self.cycle)

    def _give_up(self, last: Any) -> None:
        if self.cycle is last:
            self.transport.close()


class Server(uvicorn.Server):
    """Serves a Service's endpoints until a signal arrives or the engine's thread ends."""

    def __init__(self, app: ASGIApp, service: Service, drain: float):
        """After the first signal, running answers may continue for `drain` seconds."""
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
        if self.thread.is_alive():  # loading, or in a long step: its result is not needed
            os._exit(0)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.loop.call_soon_threadsafe(self._end, self.should_exit)
        self.should_exit = True

    def _end(self, at_once: bool) -> None:
        error = Busy("the server is shutting down")
        if not at_once and (self.service.calls or self._is_writing()):
            logger.info("finishing running answers first; another signal ends at once")
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
    """A listening socket at this address. Raises OSError if that fails, with advice."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        advice = "use another --port, or 0 for any free one"
        raise OSError(f"cannot listen on {host} port {port} ({error}): {advice}") from None
