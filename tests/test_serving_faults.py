"""A server under load, with clients that leave, stall or send garbage, and shutdown by signals."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from conftest import TINY, run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Served, http_get, http_post

from llama import Llama
from llama.engine import Prompt
from llama.openai.completions import TextCompletion
from llama.openai.fields import NOT_SUPPORTED, BadRequest
from llama.sampling import SamplingParams
from llama.server.app import App
from llama.server.service import Call, Service
from llama.server.uvicorn_server import Protocol, Server, listen

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

SCRIPTED = Path(__file__).with_name("serving.py")
FLAGS = ("--max_seq_len", "1024", "--dtype", "float32")
CLIENT = httpx.Client(timeout=60)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def say(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | options


def raw_post(path: str, body: str) -> bytes:
    """Return a request as bytes, to be sent over a plain socket."""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def metric(served: Served, name: str) -> float:
    text = http_get(f"{served.url}/metrics").text
    return sum(
        float(value) for value in re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    )


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def idle(served: Served) -> bool:
    return metric(served, "num_requests_running") == metric(served, "num_requests_waiting") == 0


@contextlib.contextmanager
def started(served: Served, body: dict[str, Any], path: str = CHAT) -> Iterator[Iterator[str]]:
    """Yield the lines of a stream after its first text has arrived."""
    with httpx.stream(
        "POST", served.url + path, json=body | {"stream": True}, timeout=60
    ) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()
        while '"content": " fox' not in next(lines):
            pass
        yield lines


@pytest.fixture(scope="module")
def scripted() -> Iterator[Served]:
    """A server with one slot, a queue of one, and a model that generates what prompts ask for."""
    flags = ("--max_batch_size", "1", "--max_waiting", "1")
    with Served(*FLAGS, *flags, script=SCRIPTED) as served:
        yield served
    assert served.status == 0, served.log


def test_a_client_that_leaves_frees_its_row_within_a_step(scripted: Served) -> None:
    before = metric(scripted, "generation_tokens_total")
    with started(scripted, say("slow:800")):
        assert metric(scripted, "num_requests_running") == 1
    assert http_post(scripted.url + CHAT, json=say("say:next"), timeout=60).status_code == 200
    assert metric(scripted, "generation_tokens_total") - before < 100
    # The same for calls without a stream, one running and one waiting.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: leave(scripted, say("slow:800"), 0.5), range(2)):
            pass
    until(lambda: idle(scripted))
    assert metric(scripted, "generation_tokens_total") - before < 200


def leave(served: Served, body: dict[str, Any], seconds: float) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http_post(served.url + CHAT, json=body, timeout=seconds)


def test_beyond_the_queue_clients_are_told_to_come_again_at_once(scripted: Served) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with started(scripted, say("slow:800")):
            waiting = pool.submit(
                http_post, scripted.url + CHAT, json=say("say:waited"), timeout=60
            )
            until(lambda: metric(scripted, "num_requests_waiting") == 1)
            refused = http_post(scripted.url + CHAT, json=say("say:no"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (
            refused.json()["error"]["message"]
            == "the queue is full (1 waiting, at most 1): try again later"
        )
    assert waiting.result().json()["choices"][0]["message"]["content"] == "waited"


def test_no_queue_still_fills_every_row() -> None:
    flags, slow = ("--max_batch_size", "2", "--max_waiting", "0"), say("slow:800")
    with (
        Served(*FLAGS, *flags, script=SCRIPTED) as served,
        started(served, slow),
        started(served, slow),
    ):
        assert metric(served, "num_requests_running") == 2
        assert http_post(served.url + CHAT, json=say("say:no")).status_code == 503
    assert served.status == 0


def test_openais_client_comes_again_as_late_as_it_is_told_to(scripted: Served) -> None:
    came: list[float] = []
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(1) as pool:
        stack.enter_context(started(scripted, say("slow:800")))
        waiting = pool.submit(http_post, scripted.url + CHAT, json=say("say:waited"), timeout=60)
        until(lambda: metric(scripted, "num_requests_waiting") == 1)

        class Transport(openai.DefaultHttpxClient):
            def send(self, *arguments: Any, **options: Any) -> Any:
                came.append(time.monotonic())
                answer = super().send(*arguments, **options)
                if answer.status_code == 503:
                    stack.close()  # frees the slot before the client retries
                return answer

        client = openai.OpenAI(
            base_url=f"{scripted.url}/v1", api_key="none", http_client=Transport()
        )
        answer = client.chat.completions.create(model="llama-2-tiny", **say("say:at last"))
    assert answer.choices[0].message.content == "at last" and waiting.result().status_code == 200
    assert len(came) == 2 and came[1] - came[0] >= 1, (
        "its own patience would end after half a second"
    )


def test_who_reads_slowly_holds_up_nobody(scripted: Served) -> None:
    host, port = scripted.url.removeprefix("http://").split(":")
    body = json.dumps(say("long:900", stream=True, logprobs=True))
    with socket.create_connection((host, int(port))) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        silent.sendall(raw_post(CHAT, body))
        answer = http_post(scripted.url + CHAT, json=say("say:next"), timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] == "next"
    until(lambda: idle(scripted))


def test_a_body_that_is_too_long_is_refused_before_it_is_whole(scripted: Served) -> None:
    before = resident(scripted)

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(2**20)

    with contextlib.suppress(httpx.WriteError):  # the server has stopped reading
        answer = http_post(scripted.url + TEXT, content=endless(), timeout=60)
        assert (
            answer.status_code == 413 and "send a shorter one" in answer.json()["error"]["message"]
        )
    assert resident(scripted) - before < 2**26
    assert http_get(f"{scripted.url}/health").status_code == 200


def resident(served: Served) -> int:
    status = Path(f"/proc/{served.job.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*FLAGS, "--max_batch_size", "4") as served:
        yield served
    assert served.status == 0, served.log


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\0", "[INST]"]),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "model",
    "messages",
    "prompt",
    "input",
    "tokens",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
]
FIELDS += [
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "echo",
    "suffix",
    "encoding_format",
]
FIELDS += ["max_completion_tokens", "add_special_tokens", *NOT_SUPPORTED]


@given(
    path=st.sampled_from([CHAT, TEXT, "/v1/embeddings", "/tokenize", "/detokenize"]),
    body=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4) | ANYTHING,
    right=st.booleans(),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_is_sent_is_answered_or_refused_in_openais_shape(
    served: Served, path: str, body: Any, right: bool
) -> None:
    if right and isinstance(body, dict):  # the other fields are valid
        body = say("Hello", prompt="The fox", input="Grass", tokens=[5], max_tokens=2) | body
    with contextlib.suppress(UnicodeEncodeError):
        raw = json.dumps(body).encode()
        answer = CLIENT.post(served.url + path, content=raw)
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert isinstance(error["message"], str) and error["type"] == "invalid_request_error"


def test_bytes_that_are_no_text_are_refused(served: Served) -> None:
    for raw in (b"", b"\xff\xfe", b'{"prompt": "\xff"}', b"\0" * 10, b'"' * 9):
        assert http_post(served.url + TEXT, content=raw).status_code == 400
    for prompt in ("\ud800", ["\udfff"]):
        answer = http_post(served.url + TEXT, content=json.dumps({"prompt": prompt}))
        assert answer.status_code == 400 and "surrogates" in answer.json()["error"]["message"]
    answer = http_post(served.url + TEXT, content=json.dumps({"prompt": "x", "model": "\ud800"}))
    assert answer.status_code == 404


def test_clients_cut_off_at_random_moments_leave_nothing_behind(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    first = http_post(
        served.url + CHAT, json=say("Where does the fox live?", temperature=0)
    ).json()["choices"]
    requests = []
    for stream in (True, False):
        body = json.dumps(
            say("Tell me a short story about the fox.", stream=stream, max_tokens=200)
        )
        requests.append(raw_post(CHAT, body))

    def cut(number: int) -> None:
        rng, request = random.Random(number), requests[number % 2]
        with socket.create_connection((host, int(port))) as client:
            client.sendall(request if number % 4 else request[: rng.randrange(len(request))])
            time.sleep(rng.random())

    files = Path(f"/proc/{served.job.pid}/fd")
    opened = len(list(files.iterdir()))
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        for _ in pool.map(cut, range(64)):
            pass
    until(lambda: idle(served))
    until(lambda: len(list(files.iterdir())) <= opened + 1)
    again = http_post(
        served.url + CHAT, json=say("Where does the fox live?", temperature=0)
    ).json()["choices"]
    assert again == first


def test_memory_stays_flat_over_two_thousand_requests(served: Served) -> None:
    def ask(client: httpx.Client, numbers: range) -> None:
        for number in numbers:
            body = {
                "prompt": f"{number} foxes",
                "max_tokens": 2,
                "stream": number % 2 == 0,
                "logprobs": 1,
            }
            assert client.post(served.url + TEXT, json=body, timeout=60).status_code == 200

    def load(first: int) -> None:
        with httpx.Client() as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda i: ask(client, range(first + i, first + 1000, 4)), range(4)):
                pass

    load(0)
    before = resident(served)
    load(1000)
    assert resident(served) < 1.03 * before


@contextlib.asynccontextmanager
async def serving(key: str | None = None) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    """A service with one slot in this process, and a client of its endpoints."""
    service = Service(
        lambda: Llama.build(TINY, max_seq_len=256, max_batch_size=1, device="cpu", dtype="float32"),
        8,
    )
    ready = asyncio.Event()
    service.on_ready = ready.set
    thread = service.start()
    await ready.wait()
    transport = httpx.ASGITransport(App(service, "llama-2-tiny", key, None).asgi)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
        yield service, client
    service.stop()
    await asyncio.to_thread(thread.join, 20)


def fox(max_tokens: int = 1) -> Prompt:
    return Prompt([1, 5, 9], SamplingParams(max_tokens=max_tokens), max_tokens, end_ids=frozenset())


def test_a_client_that_leaves_while_its_call_is_taken_up_does_not_end_the_engine() -> None:
    class Leaving(dict[int, Call]):
        """Loses a call as soon as it has been looked up."""

        def __contains__(self, number: object) -> bool:
            return self.pop(number, None) is not None  # type: ignore[call-overload, no-any-return]

        def get(self, number: int, default: Any = None) -> Any:
            return self.pop(number, default)

    async def leave_and_ask() -> None:
        async with serving() as (service, client):
            service.calls = Leaving()
            service.submit([fox()])
            await asyncio.to_thread(
                until, lambda: service.llm.engine.scheduler.steps > 0 or service.error is not None
            )  # type: ignore[union-attr]
            service.calls = {}
            assert service.error is None
            assert (
                await client.post(TEXT, json={"prompt": "The fox", "max_tokens": 1})
            ).status_code == 200

    asyncio.run(leave_and_ask())


def test_health_tells_of_a_step_that_does_not_end_whoever_waits_and_of_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llama.server.service.STALLED_SECONDS", 0.3)
    go_on = threading.Event()

    async def stall() -> None:
        async with serving() as (service, client):
            assert service.llm is not None
            await asyncio.sleep(0.6)  # idle for longer than a step may take
            for call in [service.submit([fox()]) for _ in range(2)]:
                await call.changed.wait()
            step = service.llm.engine.step
            monkeypatch.setattr(service.llm.engine, "step", lambda: (go_on.wait(20), step()))
            call = service.submit([fox()])
            await asyncio.sleep(0.6)
            service.cancel(call)  # no client is waiting
            assert (await client.get("/health")).status_code == 503
            go_on.set()
            await asyncio.to_thread(until, lambda: service.step_began is None)
            assert (await client.get("/health")).status_code == 200

    asyncio.run(stall())


def test_who_leaves_the_queue_is_forgotten_at_the_next_step() -> None:
    engine = Llama.build(
        TINY, max_seq_len=64, max_batch_size=1, device="cpu", dtype="float32"
    ).engine
    running, *waiting, last = [engine.submit(fox(20)) for _ in range(5)]
    engine.step()
    for request in waiting:
        engine.cancel(request)
    engine.step()
    assert list(engine.scheduler.waiting) == [last] and not running.over
    while not last.over:
        engine.step()
    assert len(running.answer_ids) == len(last.answer_ids) == 20


def test_connections_that_have_ended_are_forgotten() -> None:
    async def connect() -> int:
        service = Service(
            lambda: Llama.build(TINY, max_seq_len=64, max_batch_size=1, device="cpu"), 8
        )
        listener = listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
        server = Server(App(service, "tiny", None, None).asgi, service, 1)
        answering = asyncio.create_task(server.answer(listener, "ready"))
        await asyncio.to_thread(lambda: [http_get(url) for _ in range(50)])
        gc.collect()
        left = sum(isinstance(thing, Protocol) for thing in gc.get_objects())
        await asyncio.to_thread(until, lambda: service.llm is not None)
        server.should_exit = True
        await answering
        return left

    assert asyncio.run(connect()) < 10


def test_a_long_answer_is_written_while_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writing, go_on, response = threading.Event(), threading.Event(), TextCompletion.response

    def slow(call: TextCompletion, requests: Any) -> Any:
        writing.set()
        go_on.wait(60)
        return response(call, requests)

    monkeypatch.setattr(TextCompletion, "response", slow)

    async def ask() -> None:
        async with serving() as (_, client):
            long = asyncio.create_task(client.post(TEXT, json={"prompt": "The fox"}))
            await asyncio.to_thread(writing.wait, 60)
            assert (await client.get("/health")).status_code == 200 and not long.done()
            go_on.set()
            assert (await long).status_code == 200

    asyncio.run(ask())


def test_a_key_may_be_any_text() -> None:
    async def ask() -> None:
        async with serving("schlüssel") as (_, client):
            for key, status in {"schlüssel": 200, "schlussel": 401, "": 401}.items():
                headers = {b"Authorization": b"Bearer " + key.encode()}
                assert (await client.get("/v1/models", headers=headers)).status_code == status

    asyncio.run(ask())


def test_what_would_take_long_to_refuse_is_refused_unread(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = http_post(
        served.url + TEXT, json={"prompt": "The fox", "stop": [f"{i:06d}" for i in range(1000)]}
    )
    assert (
        answer.status_code == 400 and "stop has 6000 characters: send at most 4096" in answer.text
    )
    llm = Llama.build(TINY, max_seq_len=64, max_batch_size=1, device="cpu")
    monkeypatch.setattr(llm.tokenizer, "encode", None)
    with pytest.raises(BadRequest, match="1025 prompts are too many: send at most 1024 in a call"):
        TextCompletion({"prompt": ["a"] * 1025, "n": 2}, llm, "tiny")


def test_an_answer_that_is_still_being_read_is_not_cut_by_a_signal() -> None:
    with Served(*FLAGS) as served:
        host, port = served.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "a" * 3_000_000})
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(raw_post("/tokenize", body))
            said = slow.recv(100)
            served.job.terminate()
            time.sleep(2)
            while part := slow.recv(2**20):
                said += part
        head, _, answer = said.partition(b"\r\n\r\n")
        assert f"content-length: {len(answer)}".encode() in head.lower()
    assert served.status == 0


SHORT_TIMES = """
import sys
from llama.server import app, service, uvicorn_server
app.BODY_SECONDS = uvicorn_server.READ_SECONDS = uvicorn_server.IDLE_SECONDS = 1
service.STALLED_SECONDS = 2
from llama.engine.engine import Engine
step = Engine.step
def slow(engine):
    import time
    if any("stall" in engine.tokenizer.decode(r.prompt.token_ids) for r in engine.scheduler.waiting):
        time.sleep(5)
    step(engine)
Engine.step = slow
from llama.__main__ import main
main()
"""


def test_half_a_request_is_not_waited_for_and_a_stalled_engine_is_told(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(SHORT_TIMES)
    with Served(*FLAGS, script=tmp_path / "short.py") as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as half_a_head:
            half_a_head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow:")
            assert half_a_head.recv(100) == b""
        with socket.create_connection((host, int(port)), timeout=60) as half_a_body:
            half_a_body.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
            )
            assert half_a_body.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection((host, int(port)), timeout=60) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while part := kept.recv(1000):  # kept open for another request, but not forever
                said += part
            assert said.startswith(b"HTTP/1.1 200")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stalled = pool.submit(
                http_post, served.url + TEXT, json={"prompt": "stall", "max_tokens": 1}, timeout=60
            )
            until(lambda: http_get(f"{served.url}/health").status_code == 503)
            assert (
                "has not finished a step"
                in http_get(f"{served.url}/health").json()["error"]["message"]
            )
            assert http_post(served.url + TEXT, json={"prompt": "x"}).status_code == 503
            assert stalled.result().status_code == 200
        until(lambda: http_get(f"{served.url}/health").status_code == 200)
    assert served.status == 0


def test_a_model_that_is_not_finite_is_an_error_to_whoever_asks_and_no_end(tmp_path: Path) -> None:
    import shutil

    state = torch.load(TINY / "consolidated.00.pth", weights_only=True)
    state["layers.3.feed_forward.w2.weight"][0, 0] = torch.nan
    folder = tmp_path / "broken"
    folder.mkdir()
    torch.save(state, folder / "consolidated.00.pth")
    for name in ("params.json", "tokenizer.model"):
        shutil.copy(TINY / name, folder / name)
    with Served(*FLAGS, folder=folder) as served:
        for _ in range(2):
            answer = http_post(served.url + TEXT, json={"prompt": "The fox"}, timeout=60)
            assert (
                answer.status_code == 500
                and "logits are not finite" in answer.json()["error"]["message"]
            )
        with httpx.stream(
            "POST", served.url + TEXT, json={"prompt": "The fox", "stream": True}
        ) as stream:
            assert stream.status_code == 200
            data = [
                json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")
            ]
        assert "logits are not finite" in data[-1]["error"]["message"]
        assert http_get(f"{served.url}/health").status_code == 200
    assert "Traceback" not in served.log and served.status == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end(number: signal.Signals) -> None:
    with Served(*FLAGS, script=SCRIPTED) as served, started(served, say("slow:40")) as lines:
        served.job.send_signal(number)
        text = "".join(re.findall(r'"content": "( fox| foxes)', "\n".join(rest := list(lines))))
        assert text.count("fox") > 5 and rest[-2] == "data: [DONE]"
        served.end()
    assert served.status == 0
    with pytest.raises(httpx.ConnectError):
        http_get(f"{served.url}/health")


def test_what_does_not_end_in_time_is_told_so() -> None:
    with (
        Served(*FLAGS, "--drain", "0.5", script=SCRIPTED) as served,
        started(served, say("slow:900")) as lines,
    ):
        served.job.terminate()
        assert '"error"' in (last := list(lines)[-2]) and "the server is shutting down" in last
        served.end()
    assert served.status == 0


def test_a_second_signal_ends_at_once() -> None:
    with (
        Served(*FLAGS, "--drain", "600", script=SCRIPTED) as served,
        started(served, say("slow:900")) as lines,
    ):
        served.job.terminate()
        served.wait_for(re.compile("another signal ends at once"))
        served.job.terminate()
        with contextlib.suppress(httpx.RemoteProtocolError):
            list(lines)
        served.end()
    assert served.status == 0


def test_a_signal_while_the_model_loads_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\nfrom llama.cli import allocator\n"
        "allocator.build = lambda *_: (print('loading', file=sys.stderr, flush=True), time.sleep(600))\n"
        "from llama.__main__ import main\nmain()\n"
    )
    served = Served(*FLAGS, script=script)
    served.wait_for(re.compile("loading"))
    began = time.monotonic()
    served.end()
    assert time.monotonic() - began < 40  # loading would take 600
    assert served.status == 0


def test_a_server_that_loads_says_so_and_is_well_once_it_has(tmp_path: Path) -> None:
    (tmp_path / "patient.py").write_text(
        "import pathlib, sys, time\nfrom llama.cli import allocator\nbuild = allocator.build\n"
        "def wait(*arguments):\n"
        "    while not pathlib.Path(__file__).with_name('go').exists():\n"
        "        time.sleep(0.02)\n"
        "    return build(*arguments)\n"
        "allocator.build = wait\nfrom llama.__main__ import main\nmain()"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return bool(http_get(f"{url}/health").status_code)
        return False

    served = Served(*FLAGS, "--port", str(port), script=tmp_path / "patient.py")
    try:
        until(is_up)
        for answer in (http_get(f"{url}/health"), http_post(url + TEXT, json={"prompt": "x"})):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["message"] == "the model is loading"
        (tmp_path / "go").touch()
        with served:
            assert http_get(f"{url}/health").json() == {"status": "ok"}
            assert http_post(url + TEXT, json={"prompt": "x", "max_tokens": 1}).status_code == 200
    finally:
        served.end()
    assert served.status == 0


def test_what_cannot_be_served_is_told_in_a_sentence(tmp_path: Path) -> None:
    job = run_python("-m", "llama", "serve", str(tmp_path / "none"), "--port", "0")
    assert job.returncode == 1 and job.stderr.strip().startswith("error: no folder"), job.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        job = run_python("-m", "llama", "serve", str(TINY), "--port", str(port))
    assert (
        job.returncode == 1
        and f"cannot listen on 127.0.0.1 port {port}" in job.stderr
        and "or 0" in job.stderr
    )
    hide = "import sys; sys.modules['uvicorn'] = None; sys.argv[1:] = ['serve', 'x']"
    job = run_python("-c", f"{hide}; from llama.__main__ import main; main()")
    assert job.returncode == 1 and "serve needs starlette and uvicorn" in job.stderr
    with Served(*FLAGS, "--host", "0.0.0.0") as served:
        assert "is open to anyone who can reach it: set --api_key or LLAMA_API_KEY" in served.log


def rank_of(served: Served, rank: int) -> int:
    """Return the process id of one of torchrun's ranks."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == served.job.pid:
                variables = (path.parent / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables:
                    return int(path.parent.name)
    raise AssertionError("no such rank")


def test_two_ranks_answer_as_one_and_end_together(served: Served) -> None:
    body = say("Where does the owl live?", temperature=0)
    want = http_post(served.url + CHAT, json=body, timeout=60).json()["choices"]
    with Served(*FLAGS, ranks=2) as split:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            posts = [
                pool.submit(http_post, split.url + CHAT, json=body, timeout=60) for _ in range(6)
            ]
        assert all(post.result().json()["choices"] == want for post in posts)
        leave(split, say("Tell me a short story about the fox.", temperature=0), 0.05)
        until(lambda: idle(split))
        os.kill(rank_of(split, 0), signal.SIGTERM)
        split.job.wait(60)
    assert split.status == 0, split.log


@pytest.mark.parametrize("state", ["answering", "idle"])
def test_a_rank_that_dies_ends_the_job_and_its_clients_are_told(state: str) -> None:
    with Served(*FLAGS, "--drain", "5", ranks=2, script=SCRIPTED) as served:
        if state == "answering":
            with started(served, say("slow:900")) as lines:
                os.kill(rank_of(served, 1), signal.SIGKILL)
                with contextlib.suppress(httpx.RemoteProtocolError):
                    assert any('"error"' in line for line in lines)
        else:
            os.kill(rank_of(served, 1), signal.SIGKILL)
        served.job.wait(60)
    assert served.status != 0 and "Signal 9 (SIGKILL)" in served.log
