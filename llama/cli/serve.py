"""python -m llama serve: start a server, on one rank or several."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Annotated

from ..checkpoints.files import path_of
from ..errors import ArgumentError
from ..generation import BuildOptions, Llama
from ..server.service import Service
from .allocator import build_llama
from .arguments import Hidden
from .common import FolderOrFile
from .program import is_first

logger = logging.getLogger(__name__)

KEY = "LLAMA_API_KEY"

SERVED = BuildOptions(max_seq_len=2048, max_batch_size=8)

Host = Annotated[str, "address to listen on; 0.0.0.0 for all interfaces"]
Port = Annotated[int, "port to listen on; 0 picks a free one and prints it"]
Key = Annotated[
    str | None,
    f"API key that clients must send; set {KEY} instead to hide it from other users",
]
Origin = Annotated[
    str | None, "origin whose pages may call this server, such as https://example.org; * for all"
]
Name = Annotated[str | None, "name of the model for clients; by default the name of its folder"]
Waiting = Annotated[int, "limit on waiting requests; further ones get status 503"]
Drain = Annotated[float, "time limit in seconds for running answers when the server is stopped"]


def serve(
    ckpt_dir: FolderOrFile,
    *,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    allow_origin: Origin = None,
    model_name: Name = None,
    max_waiting: Waiting = 128,
    drain: Drain = 20.0,
    build: Annotated[BuildOptions, Hidden(["model_parallel_size", "seed"])] = SERVED,
) -> None:
    """Serve a model over HTTP, with OpenAI's API at /v1 and a chat page at /.

    Under torchrun the model is split over all ranks. The server is ready when /health answers
    200. Ctrl-C or SIGTERM stops it after running answers have finished, for at most --drain
    seconds; a second signal stops it immediately.
    """
    try:
        from ..server.app import App, is_loopback
        from ..server.uvicorn_server import Server, listen
    except ImportError as error:
        advice = "pip install 'starlette>=1' uvicorn"
        raise ImportError(f"serve needs starlette and uvicorn ({error}): {advice}") from error
    for option, value in {"max_waiting": max_waiting, "drain": drain}.items():
        if value < 0:
            raise ArgumentError(option, None, f"is {value}: use 0 or more")
    if not is_first():
        follow(ckpt_dir, build)
        return
    service = Service(lambda: build_llama(ckpt_dir, build), max_waiting)
    key = os.environ.get(KEY) if api_key is None else api_key
    name = model_name or path_of("ckpt_dir", ckpt_dir).resolve().name
    listener = listen(host, port)
    address, bound_port, *_ = listener.getsockname()
    shown_host = f"[{host}]" if ":" in host else host
    url = f"http://{shown_host}:{bound_port}"
    if not key and not is_loopback(address):
        logger.warning("%s is open to anyone who can reach it: set --api_key or %s", url, KEY)
    app = App(service, name, key, allow_origin, host).asgi
    ready = f"{name} answers at {url}, OpenAI's API at {url}/v1"
    asyncio.run(Server(app, service, drain).answer(listener, ready))
    if service.error is not None:
        raise service.error


def follow(ckpt_dir: str, options: BuildOptions) -> None:
    """Run the same steps as the first rank, until it ends."""

    def build_and_stay() -> Llama:
        llm = build_llama(ckpt_dir, options)
        for number in (signal.SIGINT, signal.SIGTERM):  # the first rank decides when to end
            signal.signal(number, signal.SIG_IGN)
        return llm

    service = Service(build_and_stay, max_waiting=0)
    service.run()
    if service.error is not None:
        raise service.error
