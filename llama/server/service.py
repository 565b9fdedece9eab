"""An engine that runs by itself, in a thread, for calls from an event loop. Knows no HTTP.

1. `submit` puts a call into the inbox, and `cancel` its number.
2. Before each step the engine's thread takes the inbox. On several ranks the first one broadcasts
   it, so that all of them submit the same prompts and run the same schedule; the others do
   nothing but `run`.
3. After the step the event loop looks at what came of the calls, and wakes those who wait for them.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..distributed import Ranks, patient_ranks
from ..engine import Prompt, Request
from ..generation import Llama
from .metrics import Metrics

# A step that takes longer is not coming back: the largest chunk of a 7B takes some 45 s on two
# slow cores.
STALLED_SECONDS = 120


class Busy(Exception):
    """There is no room for a call, or no engine that could take it: try again later."""


class Call:
    """Prompts that came together, and their requests once the engine has them.

    Belongs to the event loop.
    """

    def __init__(self, number: int, prompts: Sequence[Prompt]):
        self.number = number
        self.prompts = prompts
        self.requests: list[Request] = []
        self.error: Exception | None = None
        self.changed = asyncio.Event()  # a step was run, or the call has failed
        # For the metrics, of each prompt:
        now = time.monotonic()
        self.read = [False] * len(prompts)  # whether it was counted
        self.counted = [0] * len(prompts)  # how many tokens of its answer were
        self.seen = [now] * len(prompts)  # when the last of them came, or the call

    @property
    def over(self) -> bool:
        if self.error is not None:
            return True
        return bool(self.requests) and all(request.over for request in self.requests)

    def check(self) -> None:
        """Raise what ended it before its time."""
        for error in (self.error, *(request.error for request in self.requests)):
            if error is not None:
                raise error


class Inbox(NamedTuple):
    """What is new on the first rank."""

    calls: list[tuple[int, Sequence[Prompt]]]  # by their numbers
    cancelled: list[int]


class Service:
    """Answers calls with a model that its own thread builds and runs."""

    def __init__(self, build: Callable[[], Llama], max_waiting: int):
        self.build = build
        self.max_waiting = max_waiting
        self.llm: Llama | None = None  # once it is built
        self.error: BaseException | None = None  # what ended the thread
        self.metrics = Metrics()
        self.calls: dict[int, Call] = {}  # those that are not over
        self.numbers = itertools.count()
        self.inbox = Inbox([], [])
        self.stopping = False
        self.wake = threading.Condition()  # guards `inbox` and `stopping`
        self.step_began: float | None = None
        self.reported = False  # the event loop was told of a step, and has not looked yet
        self.loop: asyncio.AbstractEventLoop | None = None  # there is none on the other ranks
        # Called in the event loop when the model is built, and when the thread has ended.
        self.on_ready: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None

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
        began = self.step_began
        if began is not None and time.monotonic() - began > STALLED_SECONDS:
            raise Busy(f"the engine has not finished a step for {STALLED_SECONDS} s")
        return self.llm

    def load(self, more: int = 0) -> tuple[int, int]:
        """How many requests are running and how many wait for a slot, with `more` counted too."""
        pending = more + sum(len(call.prompts) for call in self.calls.values())
        slots = self.llm.model.params.max_batch_size if self.llm else 0
        return min(pending, slots), max(0, pending - slots)

    def submit(self, prompts: Sequence[Prompt]) -> Call:
        """Hand prompts to the engine; the call's `changed` says when to look. Raises Busy."""
        self.check()
        if self.calls and self.load(len(prompts))[1] > self.max_waiting:
            _, waiting = self.load()
            raise Busy(f"{waiting} requests wait already, and no more than {self.max_waiting} may")
        call = Call(next(self.numbers), prompts)
        self.calls[call.number] = call
        with self.wake:
            self.inbox.calls.append((call.number, prompts))
            self.wake.notify()
        return call

    def cancel(self, call: Call) -> None:
        """Nobody waits for it any more: its slots are free at the next step."""
        if self.calls.pop(call.number, None):
            with self.wake:
                self.inbox.cancelled.append(call.number)
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
        """Steps were run: count what they brought, and wake those who wait for it."""
        self.reported = False
        now = time.monotonic()
        for call in list(self.calls.values()):
            over = call.over  # asked before counting: what comes after it is counted the next time
            is_longer = count_tokens(call, self.metrics, now)
            if over:
                reasons = [request.finish_reason or "error" for request in call.requests]
                self.metrics.successes.update(reasons)
                del self.calls[call.number]
            if over or is_longer:
                call.changed.set()

    def _ended(self) -> None:
        reason = "the server has shut down"
        if self.error is not None:
            reason = f"the engine has ended: {self.error}"
        self.fail(RuntimeError(reason))
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
        running: dict[int, list[Request]] = {}
        while True:
            inbox = ranks.ask_first(lambda: self._wait(llm))
            if inbox is None:
                return
            for number, prompts in inbox.calls:
                running[number] = [llm.engine.submit(prompt) for prompt in prompts]
                call = self.calls.get(number)  # the event loop may let go of it at any moment
                if call is not None:
                    call.requests = running[number]
            for number in inbox.cancelled:
                for request in running.get(number, ()):
                    llm.engine.cancel(request)
            llm.engine.step()
            for number, requests in list(running.items()):
                if all(request.over for request in requests):
                    del running[number]
            if not self.reported:  # else a busy event loop would fall behind, step by step
                self.reported = True
                self._tell(self._look)

    def _wait(self, llm: Llama) -> Inbox | None:
        """What came since the last step, once there is work; None when the thread is to end."""
        with self.wake:
            while not (self.stopping or any(self.inbox) or llm.engine.busy):
                self.step_began = None
                self.wake.wait()
            self.step_began = time.monotonic()
            inbox = self.inbox
            self.inbox = Inbox([], [])
            return None if self.stopping else inbox

    def _tell(self, what: Callable[[], None]) -> None:
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(what)


def count_tokens(call: Call, metrics: Metrics, now: float) -> bool:
    """Count what is new of a call's requests; returns whether one is longer.

    The engine's thread may be changing them; a stop string takes tokens back.
    """
    is_longer = False
    for index, request in enumerate(call.requests):
        output = request.output
        count = len(output.tokens)
        if not call.read[index] and (count or output.finish_reason is not None):
            metrics.prompt_tokens += len(request.prompt.token_ids)
            call.read[index] = True
        counted = call.counted[index]
        new = count - counted
        if new <= 0:
            continue
        if counted:
            metrics.between_tokens.observe((now - call.seen[index]) / new, new)
        else:
            metrics.first_token.observe(now - call.seen[index])
            metrics.between_tokens.observe(0.0, new - 1)  # those that were seen with it
        metrics.generation_tokens += new
        call.counted[index] = count
        call.seen[index] = now
        is_longer = True
    return is_longer
