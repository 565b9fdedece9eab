"""An engine that runs by itself: calls come from an event loop, and one thread runs the passes. Knows no HTTP.

On several ranks the first one tells the others before each step which calls came and which were cancelled, so that all
of them run the same schedule; the others do nothing but `run`.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..distributed import patient_ranks
from ..engine.request import Answer, Request
from ..generation import Llama
from ..parallel import Ranks
from .metrics import Metrics

# A step that takes longer is not coming back: the largest chunk of a 7B takes some 45 s on two slow cores.
STALLED_SECONDS = 120


class Busy(Exception):
    """There is no room for a call, or no engine that could take it: try again later."""


class Call:
    """Requests that came together, and their answers once the engine has them. Belongs to the event loop."""

    def __init__(self, number: int, requests: Sequence[Request]):
        self.number, self.requests = number, requests
        self.answers: list[Answer] = []
        self.error: Exception | None = None
        self.changed = asyncio.Event()  # a step was run, or the call has failed
        self.read = [False] * len(requests)  # whether the metrics know of each answer's prompt
        self.counted = [0] * len(requests)  # and of how many of its tokens
        self.seen = [time.monotonic()] * len(requests)  # when each answer's last token came, or the call

    @property
    def over(self) -> bool:
        return self.error is not None or (bool(self.answers) and all(answer.over for answer in self.answers))

    def check(self) -> None:
        """Raise what ended it before its time."""
        for error in (self.error, *(answer.error for answer in self.answers)):
            if error is not None:
                raise error


class Todo(NamedTuple):
    """What is new on the first rank."""

    calls: list[tuple[int, Sequence[Request]]]  # by their numbers
    cancelled: list[int]


class Service:
    """Answers calls with a model that its own thread builds and runs."""

    def __init__(self, build: Callable[[], Llama], max_waiting: int):
        self.build, self.max_waiting = build, max_waiting
        self.llm: Llama | None = None  # once it is built
        self.error: BaseException | None = None  # what ended the thread
        self.metrics = Metrics()
        self.calls: dict[int, Call] = {}  # those that are not over
        self.numbers = itertools.count()
        self.new, self.stopping = Todo([], []), False
        self.began: float | None = None  # when the step that runs did
        self.looking = False  # the event loop was told of a step, and has not looked yet
        self.wake = threading.Condition()  # guards `new` and `stopping`
        self.loop: asyncio.AbstractEventLoop | None = None  # there is none on the other ranks
        self.on_ready: Callable[[], None] = lambda: None  # told in the event loop, and so is
        self.on_end: Callable[[], None] = lambda: None  # that the thread has ended

    # In the event loop of the first rank.

    def start(self) -> threading.Thread:
        self.loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self.run, name="engine", daemon=True)
        thread.start()
        return thread

    def check(self) -> Llama:
        """The model, if it is there and steps whenever it has to. Raises Busy."""
        if self.error is not None or self.stopping:
            raise Busy("the server is shutting down")
        if self.llm is None:
            raise Busy("the model is loading")
        began = self.began
        if began is not None and time.monotonic() - began > STALLED_SECONDS:
            raise Busy(f"the engine has not finished a step for {STALLED_SECONDS} s")
        return self.llm

    def load(self, more: int = 0) -> tuple[int, int]:
        """How many requests are running, and how many wait for a row; `more` ones counted too."""
        pending = more + sum(len(call.requests) for call in self.calls.values())
        rows = self.llm.model.params.max_batch_size if self.llm else 0
        return min(pending, rows), max(0, pending - rows)

    def submit(self, requests: Sequence[Request]) -> Call:
        """Hand requests to the engine; the call's `changed` tells when to look at its answers. Raises Busy."""
        self.check()
        if self.calls and self.load(len(requests))[1] > self.max_waiting:
            raise Busy(f"{self.load()[1]} requests wait already, and no more than {self.max_waiting} may")
        call = Call(next(self.numbers), requests)
        self.calls[call.number] = call
        with self.wake:
            self.new.calls.append((call.number, requests))
            self.wake.notify()
        return call

    def cancel(self, call: Call) -> None:
        """Nobody waits for it any more: its rows are free at the next step."""
        if self.calls.pop(call.number, None):
            with self.wake:
                self.new.cancelled.append(call.number)
                self.wake.notify()

    def fail(self, error: Exception) -> None:
        """End all calls."""
        for call in list(self.calls.values()):
            call.error = error
            call.changed.set()
            self.cancel(call)

    def stop(self) -> None:
        """End the thread, on all ranks, after the step that it is in."""
        with self.wake:
            self.stopping = True
            self.wake.notify()

    def _look(self) -> None:
        """Steps were run: count what they brought, and let those look who wait for it."""
        self.looking = False
        now, metrics = time.monotonic(), self.metrics
        for call in list(self.calls.values()):
            before = sum(call.counted)
            for i, answer in enumerate(call.answers):
                count = len(answer.pieces)  # which the engine's thread may change; a stop string takes some back
                if not call.read[i] and (count or answer.finish_reason is not None):
                    metrics.prompt_tokens += len(answer.request.prompt)
                    call.read[i] = True
                if (new := count - call.counted[i]) > 0:
                    if call.counted[i]:
                        metrics.between_tokens.observe((now - call.seen[i]) / new, new)
                    else:
                        metrics.first_token.observe(now - call.seen[i])
                        metrics.between_tokens.observe(0.0, new - 1)  # those that were seen with it
                    metrics.generation_tokens += new
                    call.counted[i], call.seen[i] = count, now
            if call.over:
                metrics.successes.update(answer.finish_reason or "error" for answer in call.answers)
                del self.calls[call.number]
            if call.over or sum(call.counted) > before:
                call.changed.set()

    def _ended(self) -> None:
        self.fail(RuntimeError(f"the engine has ended: {self.error}" if self.error else "the server has shut down"))
        self.on_end()

    # In the engine's thread, which on the other ranks is the main one.

    def run(self) -> None:
        """Build the model, then run passes while there is work, until `stop`."""
        try:
            self.llm = self.build()
            self._tell(self.on_ready)
            self._run(self.llm, patient_ranks())
        except BaseException as error:
            self.error = error
        self._tell(self._ended)

    def _run(self, llm: Llama, ranks: Ranks) -> None:
        running: dict[int, list[Answer]] = {}
        while (todo := ranks.ask_first(lambda: self._wait(llm))) is not None:
            for number, requests in todo.calls:
                running[number] = [llm.engine.submit(request) for request in requests]
                if call := self.calls.get(number):  # the event loop may let go of it at any moment
                    call.answers = running[number]
            for number in todo.cancelled:
                for answer in running.get(number, ()):
                    llm.engine.cancel(answer)
            llm.engine.step()
            running = {number: answers for number, answers in running.items() if not all(a.over for a in answers)}
            if not self.looking:  # else a busy event loop would fall behind, step by step
                self.looking = True
                self._tell(self._look)

    def _wait(self, llm: Llama) -> Todo | None:
        """What came since the last step, as soon as there is work; None once the thread is to end."""
        with self.wake:
            while not (self.stopping or any(self.new) or llm.engine.busy):
                self.began = None
                self.wake.wait()
            self.began = time.monotonic()
            todo, self.new = self.new, Todo([], [])
            return None if self.stopping else todo

    def _tell(self, what: Callable[[], None]) -> None:
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(what)
