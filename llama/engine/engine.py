"""The loop of steps. Requests come in at any time, share passes, and leave when they are over.

A step, in order:

1. `Scheduler.schedule` lets go what is over, gives waiting requests slots, compares each slot's ids
   with its request's, and returns what they lack as spans: of one token and maybe a draft (decode),
   or a chunk of a prompt (prefill).
2. The model's version is compared with that which filled the cache. For another the cache is
   cleared, and the spans are scheduled again.
3. `ModelRunner.decode` runs the decode spans through `Transformer.forward`, and `choose` draws a
   token of each row from the logits. Drafts are kept as far as they agree.
4. `ModelRunner.prefill` runs the chunk. Prompts that it completes get their first token.
5. Each pass ends with a commit: the slot's ids, then the request's new Output, one assignment each.
   An interrupt between the two costs a token's computation, which the next step repeats with the
   same draw.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import compat, ops
from ..cache import Span
from ..distributed import Ranks
from ..model import Transformer
from ..sampling import sample, token_logprobs, uniform
from ..tokenizer import Tokenizer
from .request import Output, Prompt, Request, ScoredToken, extended, finished, needed_of
from .runner import ModelRunner
from .scheduler import CHUNK, GPU_CHUNK, Scheduler


class Engine:
    """Runs requests over the slots of a model's cache.

    `submit` them, `step`, read their outputs, `cancel` some. Several threads may submit and
    `progress` at once: whichever comes first steps for all.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        draft_tokens: int = 0,
        chunk_tokens: int = 0,
        runner: ModelRunner | None = None,
    ):
        """`draft_tokens` are drafted by prompt lookup where a text repeats itself.

        On a CPU `chunk_tokens` of prompts are run while others answer, or CHUNK if it is 0.
        """
        self.runner = runner or ModelRunner(model)
        self.model = model
        self.tokenizer = tokenizer
        self.version = ModelVersion(model)  # of what filled the cache
        self.cache = self.runner.cache
        on_cpu = self.cache.device.type == "cpu"
        chunk = (chunk_tokens or CHUNK) if on_cpu else GPU_CHUNK
        self.scheduler = Scheduler(self.cache, draft_tokens=draft_tokens, chunk=chunk)
        alone = model.ranks.size == 1
        # The first rank's values, on every rank.
        self.share: Callable[[Tensor], Tensor] = (lambda x: x) if alone else model.ranks.share
        self.passes = 0  # how many passes were run, and over how many tokens, for those who measure
        self.tokens = 0
        self.turn = threading.Lock()  # held during a step
        self.stepping: int | None = None  # the thread that stepped last

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def submit(self, prompt: Prompt) -> Request:
        request = Request(prompt, self.tokenizer)
        if not request.over:
            self.scheduler.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Let a request go at the next step, whether it waits, is half read or being answered."""
        request.cancelled = request.cancelled or not request.over
        self.scheduler.some_left = True

    @contextlib.contextmanager
    def running(self, prompts: Iterable[Prompt]) -> Iterator[list[Request]]:
        """Their requests, submitted; what is not over when the block is left is cancelled."""
        requests: list[Request] = []
        try:
            for prompt in prompts:
                requests.append(self.submit(prompt))
            yield requests
        finally:
            for request in requests:
                if not request.over:
                    self.cancel(request)

    def progress(self, requests: Sequence[Request]) -> Iterator[None]:
        """Step until `requests` are over, and yield after each step.

        Raises the error of the first that fails.
        """
        me = threading.get_ident()
        while True:
            for request in requests:
                if request.error is not None:
                    raise request.error
            if all(request.over for request in requests):
                return
            if self.turn.locked() and self.stepping == me:
                raise RuntimeError(
                    "a hook on the model's pass asked the model itself: wait until the pass is done"
                )
            # Another thread's step is for our requests too. In one line, for an interrupt that came
            # between two would leave the lock held.
            with self.turn: self.step()  # fmt: skip  # noqa: E701
            yield

    @torch.inference_mode()
    def step(self) -> None:
        """One decode step for every running request, then at most one chunk of prefill."""
        self.stepping = threading.get_ident()
        decoding, prefilling = self.scheduler.schedule()
        version = ModelVersion(self.model)
        if not version.equals(self.version, self.model.ranks):
            # Trained, loaded, written to or hooked. After the admission of whoever came since then.
            self.model.attach_cache()
            self.cache.clear()
            self.runner.reset()
            self.version = ModelVersion(self.model)
            decoding, prefilling = self.scheduler.schedule()
        for run_pass, spans in ((self._decode, decoding), (self._prefill, prefilling)):
            if not spans:
                continue
            self.passes += 1
            self.tokens += sum(len(span.ids) for span in spans)
            try:
                run_pass(spans)
            except Exception as error:
                if self.model.ranks.size > 1:
                    raise  # several ranks can only all stop
                for span in spans:  # these fail, and others go on
                    self.scheduler.running[span.slot].error = error

    def _decode(self, spans: list[Span]) -> None:
        logits = self.runner.decode(spans)
        drawn = draw(self, spans, logits)
        for span, own in zip(spans, drawn, strict=True):
            self._commit(span, own.output)
            lookup = self.scheduler.running[span.slot].lookup
            if lookup is not None and len(span.ids) > 1 and own.tokens:
                lookup.judge(own.tokens - 1)
        drafts_finite = True
        if logits.shape[1] > 1:
            drafts_finite = bool(self.share(logits.sum(dim=-1).isfinite().all().int()))
        if not drafts_finite or any(own.output is None for own in drawn):
            self._wipe(spans)

    def _prefill(self, spans: list[Span]) -> None:
        plans = plans_of(spans, [self.scheduler.running[span.slot] for span in spans])
        wanted = [place for plan in plans for place in plan.places]
        logits, states = self.runner.prefill(spans, wanted)
        parts = states.split([len(span.ids) for span in spans])
        finite = torch.stack([part.isfinite().all() for part in parts]).int()
        good = self.share(finite).tolist()
        completed = []
        for plan, part, is_finite in zip(plans, parts, good, strict=True):
            if not is_finite:
                self._commit(plan.span, None)
                continue
            if plan.targets or self.scheduler.running[plan.span.slot].prompt.pooling is not None:
                keep(self, plan, part, logits)
            self._commit(plan.span, self.scheduler.running[plan.span.slot].output)
            if plan.draws:
                completed.append(plan)
        drawn = []
        if completed:
            last = [plan.span._replace(start=plan.end, ids=[]) for plan in completed]
            rows = [plan.first_row + len(plan.targets) for plan in completed]
            drawn = draw(self, last, logits[rows][:, None])
            for span, own in zip(last, drawn, strict=True):
                self._commit(span, own.output)
        if not all(good) or any(own.output is None for own in drawn):
            self._wipe(spans)

    def choose(
        self, requests: list[Request], numbers: list[int], logits: Tensor
    ) -> list[ScoredToken | None]:
        """Token `numbers[i]` of the answer to request i; None where its logits are not finite.

        logits: (n, vocab_size). The first rank's choice counts on all: logits may differ in a bit.
        """
        logits = logits[:, : self.tokenizer.n_used]
        params = [request.prompt.params for request in requests]
        uniforms = [
            uniform(request.prompt.params.seed or 0, request.prompt.stream, number)
            for request, number in zip(requests, numbers, strict=True)
        ]
        finite = logits.sum(dim=-1).isfinite()  # one pass: a sum keeps what is not finite
        tokens = self.share(torch.where(finite, sample(logits, params, uniforms), -1))
        ids = tokens.tolist()
        if not any(own.logprobs for own in params):
            return [ScoredToken(token) if token >= 0 else None for token in ids]
        scores = score(self, logits, tokens.clamp(min=0), requests)
        return [score if token >= 0 else None for score, token in zip(scores, ids, strict=True)]

    def _commit(self, span: Span, output: Output | None) -> None:
        """Say that a span was run, and what came of it; None where its logits are not finite.

        The slot first: an interrupt between the two leaves a request that lacks a token once more.
        """
        request = self.scheduler.running[span.slot]
        if output is None:
            request.error = not_finite(request, span, self.cache.dtype)
            self.cache.truncate(span.slot, 0)
            return
        ids = self.cache.token_ids[span.slot]
        if len(ids) == span.start:  # else somebody cleared the cache meanwhile
            ids.extend(span.ids)
        request.output = output

    def _wipe(self, spans: list[Span]) -> None:
        """Leave nothing of what is not finite behind the tokens that slots hold."""
        for span in spans:
            ids = self.scheduler.running[span.slot].output.ids
            known = self.cache.prefix_length(span.slot, ids)
            self.cache.truncate(span.slot, known)
        self.cache.wipe()


class Drawn(NamedTuple):
    """What a pass gave a request, and how many tokens.

    The output is None where logits are not finite.
    """

    output: Output | None
    tokens: int


class PrefillPlan(NamedTuple):
    """A span of a prompt, and what is wanted of it."""

    span: Span
    end: int  # of the span
    targets: list[int]  # the prompt's next ids, which its first positions score
    draws: bool  # whether it completes a prompt that is to be continued
    places: list[int]  # the places, in the row of all spans, whose logits are wanted
    first_row: int  # of these logits


def plans_of(spans: Sequence[Span], requests: Sequence[Request]) -> list[PrefillPlan]:
    plans = []
    first = 0
    row = 0
    for span, request in zip(spans, requests, strict=True):
        prompt = request.prompt
        end = span.start + len(span.ids)
        targets: list[int] = []
        if request.scores_prompt and request.computed is not None:
            targets = prompt.token_ids[span.start + 1 : end + 1]
        whole = end == len(request.output.ids)
        draws = whole and prompt.pooling is None and prompt.max_tokens > 0
        places = list(range(first, first + len(targets)))
        first += len(span.ids)
        if draws:
            places.append(first - 1)
        plans.append(PrefillPlan(span, end, targets, draws, places, row))
        row += len(places)
    return plans


def draw(engine: Engine, spans: list[Span], logits: Tensor) -> list[Drawn]:
    """The outputs after a pass: with the next token of each row, and its draft as far as it agrees.

    logits (n, seqlen, vocab_size) follow the ids of the spans. Nothing of the requests changes.
    """
    requests = [engine.scheduler.running[span.slot] for span in spans]
    drawn = [Drawn(request.output, 0) for request in requests]
    going = list(range(len(spans)))
    for place in range(logits.shape[1]):
        numbers = [len(requests[row].output.tokens) + place for row in going]
        own = logits[:, place] if len(going) == len(spans) else logits[going, place]
        tokens = engine.choose([requests[row] for row in going], numbers, own)
        agreeing = []
        for row, token in zip(going, tokens, strict=True):
            before = drawn[row]
            if token is None or before.output is None:
                drawn[row] = Drawn(None, before.tokens)
                continue
            output = extended(before.output, requests[row].prompt, token)
            drawn[row] = Drawn(output, before.tokens + 1)
            draft = spans[row].ids[place + 1 : place + 2]
            if output.finish_reason is None and draft == [token.id]:
                agreeing.append(row)
        going = agreeing
        if not going:
            break
    return drawn


def keep(engine: Engine, plan: PrefillPlan, states: Tensor, logits: Tensor) -> None:
    """Keep what a request wants of its prompt: hidden states, or the next tokens' logprobs.

    What an interrupted pass may have kept from the span's start on goes.
    """
    span = plan.span
    request = engine.scheduler.running[span.slot]
    if request.prompt.pooling is not None:
        before = states[:0].float() if request.states is None else request.states[: span.start]
        request.states = torch.cat((before, states.float()))
        request.computed = len(request.states)
    elif plan.targets:
        rows = logits[
            plan.first_row : plan.first_row + len(plan.targets), : engine.tokenizer.n_used
        ]
        targets = torch.tensor(plan.targets, device=rows.device)
        scores = score(engine, rows, targets, [request] * len(targets))
        request.prompt_scores = (*request.prompt_scores[: span.start + 1], *scores)
        request.computed = len(scores) + span.start
    if request.computed == needed_of(request.prompt):
        request.computed = None
        if request.prompt.max_tokens == 0:
            request.output = finished(request.output, request.prompt, "length")


def score(
    engine: Engine, logits: Tensor, tokens: Tensor, requests: list[Request]
) -> list[ScoredToken]:
    """Each row's token with its logprob, and as many of the likeliest as its request asks for."""
    most = max(request.prompt.params.top_logprobs for request in requests)
    ids, logprobs = token_logprobs(logits, tokens, most)
    ids_of = engine.share(ids).tolist()
    logprobs_of = engine.share(logprobs).tolist()
    scored = []
    for request, own, values in zip(requests, ids_of, logprobs_of, strict=True):
        k = request.prompt.params.top_logprobs
        top = tuple(zip(own[1 : 1 + k], values[1 : 1 + k], strict=True))
        scored.append(ScoredToken(own[0], values[0], top))
    return scored


def not_finite(request: Request, span: Span, dtype: torch.dtype) -> ValueError:
    name = str(dtype).removeprefix("torch.")
    last = span.start + len(span.ids) - 1
    advice = {"float16": 'try dtype="bfloat16"', "bfloat16": 'try dtype="float32"'}
    return ValueError(
        f"logits are not finite (row {request.prompt.index}, position {last}, {name}): "
        + advice.get(name, "the checkpoint's weights are damaged or of another model")
    )


SETTINGS = (bool, int, float, str)  # attributes of a user's own modules that count


class ModelVersion:
    """What a pass of a model reads, at one moment.

    That is every parameter and buffer (its address and how often PyTorch counted a write to it),
    every module, its own and its class' `forward`, its hooks, the norms' eps, the rotary angles,
    and how often the model was moved. What no pass reads, as `training`, is no part of it. Edits
    that PyTorch does not count, through `.data` or NumPy, are not seen.

    Taking it is a walk over all modules, in steps of C: 0.2 to 0.4 ms for 32 layers.
    """

    def __init__(self, model: Transformer):
        modules: list[Any] = [model]
        for module in modules:
            if module.__dict__["_modules"]:
                modules += [child for child in module._modules.values() if child is not None]
        modules = list(dict.fromkeys(modules))  # fused layers share one
        parts = list(map(vars, modules))
        tensors = [model.freqs_cis]
        for part in parts:
            for held in (part["_parameters"], part["_buffers"]):
                if held:
                    tensors += [tensor for tensor in held.values() if tensor is not None]
        # The numbers of hooks, which are never given twice.
        hooks = [*map(ops.FORWARD_HOOKS, parts), *map(ops.PRE_HOOKS, parts), *compat.GLOBAL_HOOKS]
        self.numbers: list[Any] = [
            (model.moves, model.params.rope_theta, model.params.rope_scaling_factor),
            list(map(tuple, filter(None, hooks))),
            [part.get("eps") for part in parts],
            list(map(Tensor.data_ptr, tensors)),
            writes_to(tensors),
        ]
        if set(map(type, modules)) - ops.TRANSPARENT.keys():  # modules of a user's own
            for part in parts:
                own = {**part, "training": None}
                self.numbers.append([own[n] for n in own if isinstance(own[n], SETTINGS)])
        # Compared by identity; kept, so that no other object takes a former one's place. The weak
        # reference to a tensor is the same object for as long as the tensor lives.
        self.things: list[Any] = [
            *modules,
            *map(operator.attrgetter("forward"), map(type, modules)),
            *(part.get("forward") for part in parts),
            *map(weakref.ref, tensors),
        ]

    def equals(self, other: ModelVersion, ranks: Ranks | None = None) -> bool:
        """Whether nothing has changed: on any of the ranks, which have to run one schedule."""
        same = len(self.things) == len(other.things) and self.numbers == other.numbers
        same = same and all(map(operator.is_, self.things, other.things))
        return same if ranks is None or ranks.size == 1 else ranks.all(same)


def writes_to(tensors: list[Tensor]) -> list[int]:
    """How often PyTorch counted a write to each: never, for those made in inference mode."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
