"""Draft tokens by prompt-lookup decoding.

A draft repeats the tokens that followed the last n-gram where it occurred before. This is
speculative decoding without a second model: the pass that computes the next token also verifies the
draft.
"""

from __future__ import annotations

# Length of the n-grams that are looked up. With two tokens, drafts are wrong too often; with four,
# there are too few.
NGRAM = 3

# Each wrong draft in a row about doubles the number of passes without a draft, up to this many.
LONGEST_REST = 32


class PromptLookup:
    """The n-grams of one growing sequence. A draft costs one dictionary lookup."""

    def __init__(self) -> None:
        # N-gram -> index of the token after its latest occurrence.
        self.follows: dict[tuple[int, ...], int] = {}
        self.seen = NGRAM
        self.rest = 0
        self.resting = 0

    def draft(self, ids: list[int], n: int) -> list[int]:
        """Up to `n` draft tokens to follow `ids`; none while drafting is paused."""
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
        while len(drafted) < n:  # the end of `ids`: repeat the period
            drafted.append(drafted[len(drafted) - period])
        return drafted

    def judge(self, accepted: int) -> None:
        """Record how many tokens of the last draft were accepted."""
        self.rest = 0 if accepted else min(2 * self.rest + 1, LONGEST_REST)
        self.resting = self.rest
