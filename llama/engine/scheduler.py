"""Which answer has which row of the cache: who is admitted, and what it finds there."""

from __future__ import annotations

from collections import deque
from typing import Any

from ..cache import KVCache
from .request import Answer


class Schedule:
    """Answers in rows, and those that wait for one.

    Running answers have the first rows, so that a pass works on a slice of the cache. The rows behind keep what they
    held, for prompts that begin alike, until the room is needed: the one that was used longest ago goes first.
    """

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.waiting: deque[Answer] = deque()
        self.left = False  # whether some of them may be cancelled
        self.answers: list[Answer | None] = [None] * cache.rows
        self.admitted = [0] * cache.rows  # the step at which each row's answer was
        self.used = [0] * cache.rows  # the step at which each row was let go
        self.steps = 0

    def __getitem__(self, row: int) -> Answer:
        answer = self.answers[row]
        assert answer is not None
        return answer

    def advance(self) -> tuple[list[int], list[int]]:
        """Let go what is over and admit what waits; returns the rows that lack no more than the one token whose logits
        decide the next, and those that lack more, as what a row holds says."""
        self.steps += 1
        for row, answer in enumerate(self.answers):
            if answer is not None and answer.over:
                self.answers[row], self.used[row] = None, self.steps
        self._admit()
        self._close_ranks()
        answering: list[int] = []
        feeding: list[int] = []
        for row, answer in enumerate(self.answers):
            if answer is not None:
                known = min(self.cache.known(row, answer.ids), len(answer.ids) - 1)
                self.cache.forget(row, min(known, answer.kept) if answer.wants_states else known)
                lacks_one = len(answer.ids) - len(self.cache.held[row]) == 1
                (answering if lacks_one and not answer.wants_states else feeding).append(row)
        return answering, feeding

    def _admit(self) -> None:
        if self.left:
            self.left = False
            for answer in list(self.waiting):
                if answer.over:
                    self.waiting.remove(answer)
        while self.waiting and None in self.answers:
            answer = self.waiting[0]  # leaves the queue last: an interrupt loses none
            if not answer.over and answer not in self.answers:
                row = self._place(answer)
                self.answers[row], self.admitted[row] = answer, self.steps
            self.waiting.popleft()

    def _place(self, answer: Answer) -> int:
        """A free row for an answer, holding what some row has of the beginning of its ids."""
        free = [row for row, other in enumerate(self.answers) if other is None]
        row, oldest = free[0], min(free, key=lambda row: self.used[row])
        source, known = oldest, 0
        if not answer.wants_states:
            common = [min(self.cache.known(r, answer.ids), len(answer.ids) - 1) for r in range(self.cache.rows)]
            source = max(range(self.cache.rows), key=lambda r: (common[r], r in free, -self.used[r]))
            known = common[source]
        # A conversation that goes on takes its row over; of one that only begins alike, the beginning is copied.
        goes_on = source in free and len(self.cache.held[source]) - known <= known // 8
        if goes_on or source == oldest:
            self._swap(row, source)
        else:
            self.cache.forget(oldest, 0)
            self._swap(row, oldest)
            self.cache.copy(oldest if source == row else source, row, known)
        self.cache.forget(row, known)
        return row

    def _close_ranks(self) -> None:
        """Let the last running rows move up into free ones, so that they are the first rows."""
        running = [row for row, answer in enumerate(self.answers) if answer is not None]
        for row in range(len(running)):
            if self.answers[row] is None:
                self._swap(row, running.pop())

    def _swap(self, a: int, b: int) -> None:
        self.cache.swap(a, b)
        per_row: Any
        for per_row in (self.answers, self.admitted, self.used):
            per_row[a], per_row[b] = per_row[b], per_row[a]
