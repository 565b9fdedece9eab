"""Draft tokens by prompt-lookup decoding: what followed the last tokens where they occurred before.

Speculative decoding without a second model: drafts are run in the pass of the next token, and kept
as far as the model says the same.
"""

from __future__ import annotations

# How many of the last tokens must have occurred together before. Two guess wrong too often, four
# too seldom.
NGRAM = 3

# After each wrong draft in a row, twice as many passes go by without one, up to so many.
LONGEST_REST = 32


class PromptLookup:
    """The n-grams of one text as it grows; drafting is as cheap as a look into a dictionary."""

    def __init__(self) -> None:
        # N-gram -> where what followed it last begins
        self.follows: dict[tuple[int, ...], int] = {}
        self.seen = NGRAM
        self.rest = 0
        self.resting = 0

    def draft(self, ids: list[int], n: int) -> list[int]:
        """At most `n` ids that may follow; none while drafting rests."""
        if self.resting:
            self.resting -= 1
            return []
        for at in range(self.seen, len(ids)):
            self.follows[tuple(ids[at - NGRAM : at])] = at
        self.seen = max(len(ids), NGRAM)
        begin = self.follows.get(tuple(ids[-NGRAM:]))
        if begin is None or n == 0:
            return []
        drafted = ids[begin : begin + n]
        period = len(ids) - begin
        while len(drafted) < n:  # the text repeats itself: so may the draft
            drafted.append(drafted[len(drafted) - period])
        return drafted

    def judge(self, accepted: int) -> None:
        """Say how many ids of a draft the model agreed with."""
        self.rest = 0 if accepted else min(2 * self.rest + 1, LONGEST_REST)
        self.resting = self.rest
