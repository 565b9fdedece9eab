"""Which request has which slot of the cache, and which tokens run next.

The cache says which token ids each slot holds; what a request's ids have beyond them is what it
lacks. Chunked prefill, reuse of prefixes, rejected drafts, cancellation and recovery from an
interrupt all follow from that one comparison. The scheduler reads no clock, so that every rank runs
the same schedule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..cache import KVCache, Span
from .drafts import PromptLookup
from .request import Request

# Tokens of prompts in a pass while others wait for their next token: as many as take three or four
# times as long as a step of one row (benchmarks/README.md), on any CPU; a weight format may have
# its own. A GPU reads the weights for about as long as it multiplies so many.
CHUNK = 24
GPU_CHUNK = 256

# And while nobody waits. More gained nothing, and would need more memory.
LONG_CHUNK = 512

# Requests from which on chunks grow no further. With 16, of `1b` in bfloat16, 128 tokens answered
# 16 clients at 52 tokens/s, 64 at 42; 192 gained 1 more, with longer gaps.
MOST_BUSY = 16

# Positions of a prompt whose logits are held at once while it is scored: 256 × 32,000 float32 are
# 33 MB.
SCORE_CHUNK = 256

# Drafts are for few rows: beyond, a pass is bound by arithmetic, and each of their tokens costs.
DRAFT_ROWS = 4


class Scheduler:
    """Requests in slots, and those that wait for one.

    Running requests have the first slots, so that a pass works on a slice of the cache. The slots
    behind keep what they held, for prompts that begin alike, until the room is needed: the one that
    was used longest ago goes first.
    """

    def __init__(self, cache: KVCache, *, draft_tokens: int = 0, chunk: int = CHUNK):
        """At most `draft_tokens` are drafted for each of few rows; `chunk`: see CHUNK."""
        self.cache = cache
        self.draft_tokens = draft_tokens
        self.chunk = chunk
        self.long_chunk = LONG_CHUNK
        self.waiting: deque[Request] = deque()
        # By slot. An interrupt must not leave a request in two slots, or in none: a change is one
        # operation of the dict, or a new dict where two slots change places.
        self.running: dict[int, Request] = {}
        self.used = [0] * cache.n_slots  # the step at which each slot was let go
        self.steps = 0
        self.some_left = False  # whether a waiting request may have been cancelled

    @property
    def busy(self) -> bool:
        """Whether a request waits or has a slot, if only until the next step lets it go."""
        return bool(self.waiting or self.running)

    def schedule(self) -> tuple[list[Span], list[Span]]:
        """Admit what waits; the spans of a decode pass, and of a prefill pass after it.

        Requests that were admitted together begin to answer together; those that answer do not wait
        for newer ones.
        """
        self._admit()
        decoding, prefilling = self._lacking()
        if not prefilling:
            return self._decode_spans(decoding), []
        admitted = {request.admitted for request in self.running.values()}
        if not decoding or len(admitted) == 1:
            return [], self._prefill_spans(prefilling, self.long_chunk)
        # The more requests there are, the longer a step takes anyway, and the more of them wait.
        busy = min(len(decoding) + len(prefilling), MOST_BUSY)
        chunk = self._prefill_spans(prefilling, self.chunk * busy // 2)
        return self._decode_spans(decoding), chunk

    def _lacking(self) -> tuple[list[int], list[int]]:
        """The slots that lack one token, whose logits decide the next; and those that lack more."""
        decoding = []
        prefilling = []
        for slot in sorted(self.running):
            request = self.running[slot]
            ids = request.output.ids
            known = min(self.cache.prefix_length(slot, ids), len(ids) - 1)
            computed = request.computed
            if computed is not None:
                known = min(known, computed)
            self.cache.truncate(slot, known)
            if computed is None and len(ids) - known == 1:
                decoding.append(slot)
            else:
                prefilling.append(slot)
        return decoding, prefilling

    def _decode_spans(self, slots: Sequence[int]) -> list[Span]:
        """The token that each slot lacks and, where its text repeats itself, a draft of what
        follows it.
        """
        held = self.cache.token_ids
        spans = [Span(slot, len(held[slot]), self.running[slot].output.ids[-1:]) for slot in slots]
        if not self.draft_tokens or not 0 < len(slots) <= DRAFT_ROWS:
            return spans
        # Every running slot takes part in the pass, and has to have room for it.
        longest = max(len(held[slot]) for slot in self.running)
        room = min(self.draft_tokens, self.cache.length - 1 - longest)
        if room < 1:
            return spans
        drafted = []
        for span in spans:
            request = self.running[span.slot]
            request.lookup = request.lookup or PromptLookup()
            draft = request.lookup.draft(request.output.ids, room)
            drafted.append(span._replace(ids=span.ids + draft))
        # Each draft lengthens the pass for all rows: it has to be worth it for half of them.
        count = sum(len(span.ids) > 1 for span in drafted)
        return drafted if 2 * count >= len(spans) else spans

    def _prefill_spans(self, slots: Sequence[int], size: int) -> list[Span]:
        """The next `size` tokens that slots lack, of those that were admitted first."""
        spans = []
        scored = SCORE_CHUNK
        for slot in sorted(slots, key=lambda slot: self.running[slot].admitted):
            request = self.running[slot]
            start = len(self.cache.token_ids[slot])
            room = size
            scores = request.scores_prompt and request.computed is not None
            if scores:
                room = min(size, scored)
            ids = request.output.ids[start : start + room]
            if scores:
                scored -= len(ids)
            size -= len(ids)
            if ids:
                spans.append(Span(slot, start, ids))
        return spans

    def _admit(self) -> None:
        """Let go what is over, give slots to what waits, and let the last running ones move up."""
        self.steps += 1
        for slot, request in list(self.running.items()):
            if request.over:
                self.used[slot] = self.steps
                del self.running[slot]
        if self.some_left:
            self.some_left = False
            for request in list(self.waiting):
                if request.over:
                    self.waiting.remove(request)
        cache = self.cache
        while self.waiting and len(self.running) < cache.n_slots:
            request = self.waiting[0]  # leaves the queue last: an interrupt loses none
            if not request.over and request not in self.running.values():
                slot = self._place(request)
                request.admitted = self.steps
                self.running[slot] = request
            self.waiting.popleft()
        for slot in range(len(self.running)):
            if slot not in self.running:
                self._swap(slot, max(self.running))

    def _place(self, request: Request) -> int:
        """A free slot for a request, holding what some slot has of the beginning of its ids."""
        cache = self.cache
        slots = range(cache.n_slots)
        free = [slot for slot in slots if slot not in self.running]
        slot = free[0]
        oldest = min(free, key=lambda slot: self.used[slot])
        source = oldest
        known = 0
        if request.computed is None:
            ids = request.output.ids
            common = [min(cache.prefix_length(other, ids), len(ids) - 1) for other in slots]
            source = max(slots, key=lambda other: (common[other], other in free, -self.used[other]))
            known = common[source]
        # A conversation that goes on takes its slot over; of one that only begins alike, the
        # beginning is copied.
        goes_on = source in free and len(cache.token_ids[source]) - known <= known // 8
        if goes_on or source == oldest:
            if slot != source:
                self._swap(slot, source)
        else:
            cache.truncate(oldest, 0)
            if slot != oldest:
                self._swap(slot, oldest)
            cache.copy(oldest if source == slot else source, slot, known)
        cache.truncate(slot, known)
        return slot

    def _swap(self, a: int, b: int) -> None:
        """Let two slots change places, with whatever runs in them."""
        self.cache.swap(a, b)
        places = {a: b, b: a}
        self.running = {places.get(slot, slot): request for slot, request in self.running.items()}
        used = list(self.used)
        used[a] = self.used[b]
        used[b] = self.used[a]
        self.used = used
