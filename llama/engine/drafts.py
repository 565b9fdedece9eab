"""Guesses at the next tokens: what followed the last ones where they occurred before (prompt lookup decoding)."""

from __future__ import annotations

# How many of the last tokens must have occurred together before. Two guess wrong too often, four too seldom.
NGRAM = 3

# After each wrong guess in a row, twice as many passes go by without one, up to so many.
LONGEST_REST = 32


class PromptLookup:
    """The n-grams of one text as it grows; a guess is as cheap as a look into a dictionary."""

    def __init__(self) -> None:
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it last begins
        self.seen = NGRAM
        self.rest, self.resting = 0, 0

    def guess(self, ids: list[int], n: int) -> list[int]:
        """At most `n` ids that may follow; none while guesses rest."""
        if self.resting:
            self.resting -= 1
            return []
        for at in range(self.seen, len(ids)):
            self.follows[tuple(ids[at - NGRAM : at])] = at
        self.seen = max(len(ids), NGRAM)
        begin = self.follows.get(tuple(ids[-NGRAM:]))
        if begin is None or n == 0:
            return []
        guessed = ids[begin : begin + n]
        while len(guessed) < n:  # the text repeats itself: so may the guess
            guessed.append(guessed[len(guessed) - (len(ids) - begin)])
        return guessed

    def judge(self, right: int) -> None:
        """Say how many ids of a guess were right."""
        self.rest = 0 if right else min(2 * self.rest + 1, LONGEST_REST)
        self.resting = self.rest
