"""Assigns slots of the cache to requests, and selects the tokens to run next.

The tokens that a request lacks are its ids beyond those of its slot (see engine.py). The scheduler
reads no clock, so that every rank runs the same schedule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..cache import KVCache, Span
from .drafts import PromptLookup
from .request import Request

# Prompt tokens in a pass while another request decodes. On any CPU, they take three or four times
# as long as a decode step of one row (benchmarks/README.md); a weight format may set its own
# number. On a GPU, computing them takes about as long as reading the weights.
CHUNK = 24
GPU_CHUNK = 256

# Prompt tokens in a pass while no request decodes. Longer passes were not faster and need more
# memory.
LONG_CHUNK = 512

# Chunks grow with the number of running requests, up to this many requests. For 16 clients of a 1B
# model in bfloat16, chunks of 64, 128 and 192 tokens gave 42, 52 and 53 tokens/s, the last with
# longer gaps.
MOST_BUSY = 16

# Prompt tokens scored in a pass: 256 × 32,000 float32 logits take 33 MB.
SCORE_CHUNK = 256

# Drafts are made for at most this many rows. With more, a pass is limited by arithmetic.
DRAFT_ROWS = 4


class Scheduler:
    """Running requests, each in a slot, and the queue of waiting ones.

    Running requests have the first slots, so that a pass works on a slice of the cache. Free slots
    keep their tokens as prefixes for later prompts. The least recently used one is reused first.
    """

    def __init__(self, cache: KVCache, *, draft_tokens: int = 0, chunk: int = CHUNK):
        """`draft_tokens` is the maximum length of a draft; for `chunk`, see CHUNK."""
        self.cache = cache
        self.draft_tokens = draft_tokens
        self.chunk = chunk
        self.long_chunk = LONG_CHUNK
        self.waiting: deque[Request] = deque()
        # By slot. An interrupt must not leave a request in two slots or in none, so each change is
        # one operation of the dict, or a new dict if two slots are swapped.
        self.running: dict[int, Request] = {}
        self.used = [0] * cache.n_slots  # the step at which each slot was released
        self.steps = 0
        self.some_left = False  # whether a waiting request may have been cancelled

    @property
    def busy(self) -> bool:
        """Whether a request waits or has a slot, even one that the next step releases."""
        return bool(self.waiting or self.running)

    def schedule(self) -> tuple[list[Span], list[Span]]:
        """Admit waiting requests. Return the spans to decode and the spans to prefill.

        If all running requests were admitted together, none decodes until all are prefilled.
        Otherwise decoding requests do not wait for newer ones.
        """
        self._admit()
        decoding, prefilling = self._lacking()
        if not prefilling:
            return self._decode_spans(decoding), []
        admitted = {request.admitted for request in self.running.values()}
        if not decoding or len(admitted) == 1:
            return [], self._prefill_spans(prefilling, self.long_chunk)
        # With more requests, a step takes longer anyway, and more of them wait for prefill.
        busy = min(len(decoding) + len(prefilling), MOST_BUSY)
        chunk = self._prefill_spans(prefilling, self.chunk * busy // 2)
        return self._decode_spans(decoding), chunk

    def _lacking(self) -> tuple[list[int], list[int]]:
        """Truncate slots to their requests' prefixes. Return the slots to decode and to prefill."""
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
        """The token that each slot lacks, with a draft of the next tokens if its text repeats."""
        held = self.cache.token_ids
        spans = [Span(slot, len(held[slot]), self.running[slot].output.ids[-1:]) for slot in slots]
        if not self.draft_tokens or not 0 < len(slots) <= DRAFT_ROWS:
            return spans
        # Every running slot takes part in the pass and must have room for its tokens.
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
        # A draft lengthens the pass for all rows: at least half of them must have one.
        count = sum(len(span.ids) > 1 for span in drafted)
        return drafted if 2 * count >= len(spans) else spans

    def _prefill_spans(self, slots: Sequence[int], size: int) -> list[Span]:
        """Up to `size` of the tokens that slots lack, in order of admission."""
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
        """Release finished requests, admit waiting ones, and move the last ones into the gaps."""
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
            request = self.waiting[0]  # removed last: an interrupt loses none
            if not request.over and request not in self.running.values():
                slot = self._place(request)
                request.admitted = self.steps
                self.running[slot] = request
            self.waiting.popleft()
        for slot in range(len(self.running)):
            if slot not in self.running:
                self._swap(slot, max(self.running))

    def _place(self, request: Request) -> int:
        """Return a free slot with the longest prefix of the request's ids that any slot holds."""
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
        # A request that continues a free slot's text takes that slot. If it shares only the
        # beginning, the prefix is copied.
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
        """Swap two slots, with the requests that run in them."""
        self.cache.swap(a, b)
        places = {a: b, b: a}
        self.running = {places.get(slot, slot): request for slot, request in self.running.items()}
        used = list(self.used)
        used[a] = self.used[b]
        used[b] = self.used[a]
        self.used = used
