"""Runs the engine in a thread of its own for calls from an event loop. Contains no HTTP.

1. In the event loop, `submit` puts a call into the inbox, and `cancel` puts its number there.
2. Before each step the engine's thread empties the inbox. On several ranks the first one
   broadcasts the contents, so that all ranks submit the same prompts and run the same schedule.
   The other ranks only execute `run`.
3. After the step the event loop checks each call for new output and wakes its waiter.
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

# A step that takes longer is considered stuck. The largest prefill chunk of a 7B model takes about
# 45 s on two slow cores.
STALLED_SECONDS = 120


class Busy(Exception):
    """The server cannot take a call now: it is full, loading, stuck or stopping. Retry later."""


class Call:
    """The prompts of one call, and their requests once the engine has accepted them.

    Belongs to the event loop.
    """

    def __init__(self, number: int, prompts: Sequence[Prompt]):
        self.number = number
        self.prompts = prompts
        self.requests: list[Request] = []
        self.error: Exception | None = None
        self.changed = asyncio.Event()  # there is new output, or the call has ended
        # For the metrics, one entry for each prompt:
        now = time.monotonic()
        self.read = [False] * len(prompts)  # whether its prompt tokens were counted
        self.counted = [0] * len(prompts)  # how many of its generated tokens were counted
        self.seen = [now] * len(prompts)  # when the last counted token, or the call, arrived

    @property
    def over(self) -> bool:
        if self.error is not None:
            return True
        return bool(self.requests) and all(request.over for request in self.requests)

    def check(self) -> None:
        """Raise the error that ended the call or one of its requests, if there was one."""
        for error in (self.error, *(request.error for request in self.requests)):
            if error is not None:
                raise error


class Inbox(NamedTuple):
    """New and cancelled calls that the engine has not seen yet."""

    calls: list[tuple[int, Sequence[Prompt]]]  # (number, prompts) of each call
    cancelled: list[int]  # numbers of calls


class Service:
    """Answers calls with a model that is built and run in a separate thread."""

    def __init__(self, build: Callable[[], Llama], max_waiting: int):
        self.build = build
        self.max_waiting = max_waiting
        self.llm: Llama | None = None  # None until it is built
        self.error: BaseException | None = None  # the error that ended the thread
        self.metrics = Metrics()
        self.calls: dict[int, Call] = {}  # unfinished calls
        self.numbers = itertools.count()
        self.inbox = Inbox([], [])
        self.stopping = False
        self.wake = threading.Condition()  # guards `inbox` and `stopping`
        self.step_began: float | None = None
        self.reported = False  # a call of `_look` is scheduled and has not run yet
        self.loop: asyncio.AbstractEventLoop | None = None  # stays None on the other ranks
        # Called in the event loop once the model is built, and after the thread has ended.
        self.on_ready: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None

    # The following methods run in the event loop of the first rank.

    def start(self) -> threading.Thread:
        self.loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self.run, name="engine", daemon=True)
        thread.start()
        return thread

    def check(self) -> Llama:
        """The model. Raises Busy if it is loading, stopping, or stuck in a step."""
        if self.error is not None or self.stopping:
            raise Busy("the server is shutting down")
        if self.llm is None:
            raise Busy("the model is loading")
        began = self.step_began
        if began is not None and time.monotonic() - began > STALLED_SECONDS:
            raise Busy(f"the engine has not finished a step for {STALLED_SECONDS} s")
        return self.llm

    def load(self, more: int = 0) -> tuple[int, int]:
        """How many requests are running and how many wait for a slot, including `more` new ones."""
        pending = more + sum(len(call.prompts) for call in self.calls.values())
        slots = self.llm.model.params.max_batch_size if self.llm else 0
        return min(pending, slots), max(0, pending - slots)

    def submit(self, prompts: Sequence[Prompt]) -> Call:
        """Hand prompts to the engine; the call's `changed` event reports progress. Raises Busy."""
        self.check()
        if self.calls and self.load(len(prompts))[1] > self.max_waiting:
            _, waiting = self.load()
            most = self.max_waiting
            raise Busy(f"the queue is full ({waiting} waiting, at most {most}): try again later")
        call = Call(next(self.numbers), prompts)
        self.calls[call.number] = call
        with self.wake:
            self.inbox.calls.append((call.number, prompts))
            self.wake.notify()
        return call

    def cancel(self, call: Call) -> None:
        """Cancel a call that nobody waits for. Its slots are released at the next step."""
        if self.calls.pop(call.number, None):
            with self.wake:
                self.inbox.cancelled.append(call.number)
                self.wake.notify()

    def fail(self, error: Exception) -> None:
        """End all calls with an error."""
        for call in list(self.calls.values()):
            call.error = error
            call.changed.set()
            self.cancel(call)

    def stop(self) -> None:
        """End the thread, on all ranks, after its current step."""
        with self.wake:
            self.stopping = True
            self.wake.notify()

    def _look(self) -> None:
        """Count the tokens of the latest steps, and wake the waiters of calls that changed."""
        self.reported = False
        now = time.monotonic()
        for call in list(self.calls.values()):
            # Read before counting: otherwise the last tokens of a finished call could be missed.
            over = call.over
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

    # The following methods run in the engine's thread. On the other ranks that is the main thread.

    def run(self) -> None:
        """Build the model, then run steps while there is work, until `stop`."""
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
                call = self.calls.get(number)  # the event loop may remove it at any moment
                if call is not None:
                    call.requests = running[number]
            for number in inbox.cancelled:
                for request in running.get(number, ()):
                    llm.engine.cancel(request)
            llm.engine.step()
            for number, requests in list(running.items()):
                if all(request.over for request in requests):
                    del running[number]
            if not self.reported:  # otherwise callbacks would pile up in a busy event loop
                self.reported = True
                self._tell(self._look)

    def _wait(self, llm: Llama) -> Inbox | None:
        """Wait for work, then return and empty the inbox. None means that the thread must end."""
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
    """Count the new tokens of a call's requests. Returns whether there are any.

    The engine's thread may be changing the requests. A stop string may remove tokens.
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
            metrics.between_tokens.observe(0.0, new - 1)  # tokens that arrived with the first
        metrics.generation_tokens += new
        call.counted[index] = count
        call.seen[index] = now
        is_longer = True
    return is_longer
