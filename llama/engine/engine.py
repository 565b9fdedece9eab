"""Which rows run next. Requests come in at any time, share passes, and leave when they are over.

One truth governs it: the cache says which ids each row holds, and what an answer's ids have beyond them is the work to
do. So there is no phase for prompts and none for decoding: a prompt is fed in chunks, a row that begins as another did
is copied, a guess that was wrong is forgotten, and what an interrupt left undone is done by the next step. The engine
reads no clock, so that every rank runs the same schedule. It knows no prompt format.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..cache import Run
from ..model import Transformer
from ..parallel import Ranks
from ..sampling import sample
from ..tokenizer import Tokenizer
from .request import Answer, Request, Score
from .runner import Runner, uninterrupted
from .scheduler import Schedule

# Tokens of prompts in a pass while others wait for their next token: as many as take three or four times as long as a
# step of one row (benchmarks/README.md), on any CPU; a store may have its own. A GPU reads the weights for about as
# long as it multiplies so many.
CHUNK, GPU_CHUNK = 24, 256

# And while nobody waits. More gained nothing, and would need more memory.
LONG_CHUNK = 512

# Rows from which on chunks grow no further. With 16 of them, of `1b` in bfloat16, 128 tokens instead of 64 answered 16
# clients at 52 tokens/s instead of 42; 192 gained 1 more, and the longest gaps grew from 0.46 to 0.63 s.
MOST_BUSY = 16

# Positions of a prompt whose logits are held at once while it is scored: 256 × 32,000 float32 are 33 MB.
SCORE_CHUNK = 256

# Guesses are for few rows: beyond, a pass is bound by arithmetic, and each of their tokens costs.
GUESS_ROWS = 4


class Engine:
    """Runs requests over the rows of a model's cache: `submit` them, `step`, read the answers, `cancel` some.

    Several threads may submit and `progress` at once: whichever comes first steps for all.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        guess_tokens: int = 0,
        chunk_tokens: int = 0,
        runner: Runner | None = None,
    ):
        """`guess_tokens` are guessed by prompt lookup, and verified, in a pass over rows whose text repeats itself.
        On a CPU `chunk_tokens` of prompts are fed at once while others answer, or CHUNK if it is 0."""
        runner = runner or Runner(model)
        self.model, self.tokenizer, self.cache = model, tokenizer, runner.cache
        self.version = model.version()
        self.schedule = Schedule(runner.cache)
        self.passes = Passes(runner, self.schedule, model.ranks, tokenizer.n_used)
        self.guess_tokens, self.long_chunk = guess_tokens, LONG_CHUNK
        self.chunk = (chunk_tokens or CHUNK) if runner.device.type == "cpu" else GPU_CHUNK
        self.turn = threading.Condition()
        self.stepping: int | None = None  # the thread that does

    def submit(self, request: Request) -> Answer:
        answer = Answer(request, self.tokenizer)
        if not answer.over:
            self.schedule.waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """Let an answer go at the next step, whether it waits, is half fed or being answered."""
        answer.cancelled = answer.cancelled or not answer.over
        self.schedule.left = True

    @property
    def busy(self) -> bool:
        """Whether an answer waits or has a row, if only until the next step lets it go."""
        return bool(self.schedule.waiting) or any(answer is not None for answer in self.schedule.answers)

    @contextlib.contextmanager
    def answering(self, requests: Iterable[Request]) -> Iterator[list[Answer]]:
        """Their answers, submitted; those that are not over when the block is left, however it is, are cancelled."""
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(self.submit(request))
            yield answers
        finally:
            for answer in answers:
                self.cancel(answer)

    def progress(self, answers: Sequence[Answer]) -> Iterator[None]:
        """Step until `answers` are over, and yield after each step. Raises the error of the first one that fails."""
        while True:
            for answer in answers:
                if answer.error is not None:
                    raise answer.error
            if all(answer.over for answer in answers):
                return
            self._step_or_wait()
            yield

    def _step_or_wait(self) -> None:
        me = threading.get_ident()
        if self.stepping == me:
            raise RuntimeError("a hook on the model's pass asked the model itself: wait until the pass is done")
        try:
            with self.turn:
                if self.stepping is not None:
                    self.turn.wait(1)  # another thread's step is for our answers too
                    return
                self.stepping = me
            self.step()
        finally:
            if self.stepping == me:
                self.stepping = None
                with self.turn:
                    self.turn.notify_all()

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what waits, give each answering row a token or more, then run a chunk of the prompts."""
        idle = all(answer is None or answer.over for answer in self.schedule.answers)
        if idle and (version := self.model.version()) != self.version:
            self.cache.clear()  # the weights were trained, loaded or written to since
            self.passes.runner.forget()
            self.version = version
        answering, feeding = self.schedule.advance()
        # Rows that were admitted together begin to answer together; those that answer do not wait for newer ones.
        together = len({self.schedule.admitted[row] for row in answering + feeding}) == 1
        if answering and not (feeding and together):
            self._attempt(self.passes.decode, self._guesses(answering))
        if feeding:
            alone = together or not answering
            # The more rows there are, the longer a step takes anyway, and the more of them wait for their prompts.
            busy = min(len(answering) + len(feeding), MOST_BUSY)
            size = self.long_chunk if alone else self.chunk * busy // 2
            self._attempt(self.passes.feed, self._chunk(feeding, size))

    def _chunk(self, rows: Sequence[int], size: int) -> list[Run]:
        """The next `size` tokens that rows lack, of those that were admitted first."""
        runs = []
        for row in sorted(rows, key=lambda row: self.schedule.admitted[row]):
            start = len(self.cache.held[row])
            ids = self.schedule[row].ids[start : start + size]
            size -= len(ids)
            if ids:
                runs.append(Run(row, start, ids))
        return runs

    def _guesses(self, rows: Sequence[int]) -> list[Run]:
        """The one token that each row lacks and, where its text repeats itself, guesses of what follows it."""
        runs = [Run(row, len(self.cache.held[row]), self.schedule[row].ids[-1:]) for row in rows]
        room = min(self.guess_tokens, self.cache.length - 1 - max(run.start for run in runs))
        if room < 1 or len(rows) > GUESS_ROWS:
            return runs
        answers = [self.schedule[run.row] for run in runs]
        guessed = [r._replace(ids=r.ids + a.lookup.guess(a.ids, room)) for r, a in zip(runs, answers, strict=True)]
        # Each guess lengthens the pass for all rows: it has to be worth it for half of them.
        return guessed if 2 * sum(len(run.ids) > 1 for run in guessed) >= len(runs) else runs

    def _attempt(self, run_pass: Callable[[list[Run]], None], runs: list[Run]) -> None:
        """Run a pass. Where it raises, its answers fail, and others go on; several ranks can only all stop."""
        try:
            run_pass(runs)
        except Exception as error:
            if self.model.ranks.size > 1:
                raise
            for run in runs:
                self.schedule[run.row].error = error


class Passes:
    """Runs of ids in, and what their answers get of it out. Rows hold the ids once a pass is done, and not before."""

    def __init__(self, runner: Runner, schedule: Schedule, ranks: Ranks, pieces: int):
        """Rows of the output beyond `pieces` are padding, and never drawn."""
        self.runner, self.cache, self.schedule, self.ranks = runner, runner.cache, schedule, ranks
        self.pieces = pieces
        self.count = self.tokens = 0  # what was run, for those who measure

    def decode(self, runs: list[Run]) -> None:
        """A pass over the first rows. Those among them that lack more than it gives run along, and hold nothing new."""
        by_row, seqlen, filler = {run.row: run for run in runs}, max(len(run.ids) for run in runs), runs[0].ids[0]
        tokens, starts = [], []
        for row in range(self.runner.rows(runs[-1].row + 1)):
            ids = by_row[row].ids if row in by_row else []
            if not ids:  # something has to be written, beyond what is held
                self.cache.forget(row, self.cache.length - seqlen)
            starts.append(len(self.cache.held[row]))
            tokens.append(ids + [filler] * (seqlen - len(ids)))
        self._note(runs)
        logits = self.runner.decode(tokens, starts)
        with uninterrupted():
            for run in runs:
                self.cache.held[run.row] += run.ids
            self._draw(runs, logits if len(tokens) == len(runs) else logits[[run.row for run in runs]])

    def feed(self, runs: list[Run]) -> None:
        """A pass over chunks of prompts; those that are whole with it get the first token of their answers."""
        self._note(runs)
        h = self.runner.feed(runs)
        with uninterrupted():
            self._take(runs, h)

    def _take(self, runs: list[Run], h: Tensor) -> None:
        states = h.split([len(run.ids) for run in runs])
        finite = self.ranks.share(torch.stack([part.isfinite().all() for part in states]).int()).tolist()
        ended = []
        for run, part, good in zip(runs, states, finite, strict=True):
            answer = self.schedule[run.row]
            if not good:
                self._fail(answer, run.row, run.start + len(run.ids) - 1)
                continue
            self._keep_states(answer, run, part)
            self.cache.held[run.row] += run.ids
            if run.start + len(run.ids) < len(answer.ids):
                continue
            if answer.request.pooling is not None or answer.request.max_tokens == 0:
                answer.finish("length")
            else:
                ended.append((run._replace(ids=run.ids[-1:]), part[-1]))
        if ended:
            self._draw([run for run, _ in ended], self.runner.logits(torch.stack([last for _, last in ended]))[:, None])
        if not all(finite):
            self.cache.wipe()

    def _keep_states(self, answer: Answer, run: Run, h: Tensor) -> None:
        """What a request wants of its prompt's hidden states h (n, dim): themselves, or the next tokens' logprobs."""
        if answer.request.pooling is not None:
            if answer.states is None:
                answer.states = torch.empty(len(answer.ids), h.shape[1], dtype=torch.float32, device=h.device)
            answer.states[run.start : run.start + len(h)] = h
        if answer.request.scores_prompt:
            targets = list(answer.request.prompt)[run.start + 1 : run.start + 1 + len(h)]
            for first in range(0, len(targets), SCORE_CHUNK):
                chunk = torch.tensor(targets[first : first + SCORE_CHUNK], device=h.device)
                logits = self.runner.logits(h[first : first + len(chunk)])[:, : self.pieces]
                k, at = answer.request.top_logprobs, run.start + 1 + first
                scores = self.ranks.share(score(logits, chunk, k)).tolist()
                answer.prompt_scores[at : at + len(scores)] = [score_of(row, k) for row in scores]
        answer.kept = run.start + len(h)

    def _draw(self, runs: list[Run], logits: Tensor) -> None:
        """Give each answer its next tokens, as far as the guesses among its run's ids were right.

        logits (n, seqlen, vocab_size) follow the ids of the runs.
        """
        drawn, alive = [0] * len(runs), list(range(len(runs)))
        for i in range(logits.shape[1]):
            answers = [self.schedule[runs[j].row] for j in alive]
            tokens = self.choose(answers, logits[:, i] if len(alive) == len(runs) else logits[alive, i])
            right = []
            for j, answer, (token, scored) in zip(alive, answers, tokens, strict=True):
                if token < 0:
                    self._fail(answer, runs[j].row, runs[j].start + i)
                    continue
                answer.append(token, scored)
                drawn[j] += 1
                if not answer.over and runs[j].ids[i + 1 : i + 2] == [token]:
                    right.append(j)
            alive = right
            if not alive:
                break
        for run, n in zip(runs, drawn, strict=True):
            if len(run.ids) > 1 and n:
                self.schedule[run.row].lookup.judge(n - 1)
        if min(drawn) == 0 or (logits.shape[1] > 1 and not logits.sum(dim=-1).isfinite().all()):
            for run in runs:
                self.cache.forget(run.row, self.cache.known(run.row, self.schedule[run.row].ids))
            self.cache.wipe()

    def choose(self, answers: list[Answer], logits: Tensor) -> list[tuple[int, Score]]:
        """The next token of each answer and, where asked for, its score; token -1 where logits are not finite.

        The first rank's choice counts on all of them: ranks may differ in a logit's last bit, and must not in a token.
        """
        logits = logits[:, : self.pieces]
        tokens = sample(
            logits,
            temperature=[answer.request.temperature for answer in answers],
            top_p=[answer.request.top_p for answer in answers],
            uniform=[answer.uniform(len(answer.pieces)) for answer in answers],
        )
        requests = [answer.request for answer in answers]
        finite = logits.sum(dim=-1).isfinite()  # one pass: a sum keeps what is not finite
        choice = torch.where(finite, tokens, -1).float()[:, None]
        if any(request.logprobs for request in requests):
            choice = torch.cat((choice, score(logits, tokens, max(r.top_logprobs for r in requests))), dim=1)
        rows = self.ranks.share(choice).tolist()
        return [(int(row[0]), score_of(row[1:], r.top_logprobs)) for row, r in zip(rows, requests, strict=True)]

    def _fail(self, answer: Answer, row: int, position: int) -> None:
        """End an answer whose logits are not finite; whoever calls wipes what it leaves, for a NaN would spread."""
        dtype = str(self.cache.k.dtype).removeprefix("torch.")
        advice = {"float16": 'try dtype="bfloat16"', "bfloat16": 'try dtype="float32"'}
        answer.error = ValueError(
            f"logits are not finite (row {answer.request.index}, position {position}, {dtype}): "
            + advice.get(dtype, "the checkpoint's weights are damaged or of another model")
        )
        self.cache.forget(row, 0)

    def _note(self, runs: list[Run]) -> None:
        self.count += 1
        self.tokens += sum(len(run.ids) for run in runs)


def score(logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """(n, 1 + 2k) float32 for logits (n, vocab_size): the logprob of each row's token, then the ids and the logprobs of
    the k likeliest. Ids are exact in float32, and one tensor takes one broadcast and one read by the host."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])
    if not k:
        return own
    likeliest = logprobs.topk(k)
    return torch.cat((own, likeliest.indices.float(), likeliest.values), dim=1)


def score_of(row: list[float], k: int) -> Score:
    """A row of `score`, of which no more than the `k` likeliest were asked for."""
    if not row:
        return Score(0.0)
    at = 1 + len(row) // 2
    return Score(row[0], tuple(zip(map(int, row[1 : 1 + k]), row[at : at + k], strict=True)))
