"""python -m llama serve: how a server begins and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from typing import Any, Literal

from ..checkpoints.files import path_of
from ..cli.program import is_first
from ..generation import Llama
from .service import Service

logger = logging.getLogger(__name__)

KEY = "LLAMA_API_KEY"


def serve(
    ckpt_dir: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_origin: str | None = None,
    model_name: str | None = None,
    max_waiting: int = 128,
    drain: float = 20.0,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
    adapter_dir: str | None = None,
    compile: bool = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API at /v1 and a page to chat at /. Under torchrun, over all of its ranks.

    Ready when /health answers 200. Ctrl-C or SIGTERM lets running answers end, for as long as --drain says; a second
    one ends at once.
    """
    try:
        from .app import App, Server, is_loopback
    except ImportError as error:
        raise ImportError(f"serve needs starlette and uvicorn ({error}): pip install 'starlette>=1' uvicorn") from error

    def build() -> Llama:
        kind: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, "adapter_dir": adapter_dir}
        return Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, compile=compile, **kind)

    service = Service(build, max_waiting)
    if not is_first():
        follow(service)
    else:
        key = os.environ.get(KEY) if api_key is None else api_key
        name = model_name or path_of("ckpt_dir", ckpt_dir).resolve().name
        listener = listen(host, port)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        if not key and not is_loopback(listener.getsockname()[0]):
            logger.warning("%s is open to all who reach it: set --api_key or %s", url, KEY)
        app = App(service, name, key, allow_origin, host).asgi
        asyncio.run(Server(app, service, drain).answer(listener, f"{name} answers at {url}, OpenAI's API at {url}/v1"))
    if service.error is not None:
        raise service.error


def follow(service: Service) -> None:
    """Run what the first rank runs, until it says that there is no more."""
    build = service.build

    def build_and_stay() -> Llama:
        llm = build()
        for number in (signal.SIGINT, signal.SIGTERM):  # the first rank says when to end
            signal.signal(number, signal.SIG_IGN)
        return llm

    service.build = build_and_stay
    service.run()


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises OSError with a way out."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        advice = "use another --port, or 0 for one that is free"
        raise OSError(f"cannot listen on {host} port {port} ({error}): {advice}") from None
