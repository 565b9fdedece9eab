"""The engine: runs requests step by step in the slots of the KV cache.

Invariant: a slot holds the keys and values of exactly its `token_ids`, and a step computes the
tokens that a request has beyond its slot. Chunked prefill, prefix reuse, rejected draft tokens,
cancellation and recovery from an interrupt all follow from it.

Requests may be submitted at any time. One call of `Engine.step` does the following:

1. Schedule. `Scheduler.schedule` releases finished requests and gives waiting requests free slots,
   with a cached prefix of their ids if there is one. It truncates each slot to the prefix that it
   shares with its request. The ids beyond that prefix become a `Span`: a single token, which draft
   tokens may follow, is decoded; a longer span is prefilled, one chunk per step.
2. Check the version. The model's `ModelVersion` is compared with the one that the cache was filled
   with. If weights, modules or hooks have changed, the cache is cleared and step 1 is repeated.
3. Decode. `ModelRunner.decode` runs the decode spans as one pass through `Transformer.forward` and
   returns the logits after each of their tokens.
4. Draw, and accept drafts. `draw` follows each span from its first token. `Engine.choose` draws
   the next token from the logits, and `extended` adds it to a new `Output`. While the drawn token
   equals the draft token at its position, the draft token is accepted and the logits after it give
   another token. The rest of the draft is rejected.
5. Prefill. `ModelRunner.prefill` runs one chunk, which may hold spans of several prompts. `keep`
   stores a prompt's logprobs or hidden states if they are requested. `draw` draws the first output
   token of each prompt that the chunk completes.
6. Commit, at the end of each pass. `Engine._commit` appends the span's ids to the slot's
   `token_ids`, then replaces `Request.output`. After an interrupt between the two, the next step
   computes one token again and draws the same output. The next step 1 removes rejected draft tokens
   from the slot. If logits are not finite, the request fails and its slot is emptied.
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
    """Runs requests in the slots of a model's cache.

    The caller submits prompts, calls `step` or `progress`, and reads the requests' outputs. Several
    threads may call `submit` and `progress` at once: a step by any thread serves all requests.
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
        """`draft_tokens` is the maximum length of a draft.

        On a CPU, `chunk_tokens` replaces the scheduler's CHUNK unless it is 0.
        """
        self.runner = runner or ModelRunner(model)
        self.model = model
        self.tokenizer = tokenizer
        self.version = ModelVersion(model)  # of the model that filled the cache
        self.cache = self.runner.cache
        on_cpu = self.cache.device.type == "cpu"
        chunk = (chunk_tokens or CHUNK) if on_cpu else GPU_CHUNK
        self.scheduler = Scheduler(self.cache, draft_tokens=draft_tokens, chunk=chunk)
        alone = model.ranks.size == 1
        # Broadcasts the first rank's values to all ranks.
        self.share: Callable[[Tensor], Tensor] = (lambda x: x) if alone else model.ranks.share
        self.passes = 0  # passes and tokens run so far, for benchmarks
        self.tokens = 0
        self.turn = threading.Lock()  # held during a step
        self.stepping: int | None = None  # the thread that ran the latest step

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def submit(self, prompt: Prompt) -> Request:
        request = Request(prompt, self.tokenizer)
        if not request.over:
            self.scheduler.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Cancel a request, waiting or running. The next step releases its slot."""
        request.cancelled = request.cancelled or not request.over
        self.scheduler.some_left = True

    @contextlib.contextmanager
    def running(self, prompts: Iterable[Prompt]) -> Iterator[list[Request]]:
        """Submit `prompts`. On exit, cancel the requests that have not finished."""
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
        """Step until all `requests` have finished, yielding after each step.

        Raises the error of the first request that fails.
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
                    "a hook called the engine during a forward pass: call it after the pass"
                )
            # A step by another thread serves these requests too. Keep both statements on one line:
            # an interrupt between two lines would leave the lock held.
            with self.turn: self.step()  # fmt: skip  # noqa: E701
            yield

    @torch.inference_mode()
    def step(self) -> None:
        """One decode step for every running request, then at most one chunk of prefill."""
        self.stepping = threading.get_ident()
        decoding, prefilling = self.scheduler.schedule()
        version = ModelVersion(self.model)
        if not version.equals(self.version, self.model.ranks):
            # The model was trained, loaded, written to or hooked. The check follows admission, so
            # that a request submitted after a change never uses what was computed before it.
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
                    raise  # several ranks can only stop together
                for span in spans:  # only these requests fail
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
        """Draw output token `numbers[i]` of request i; None if its logits are not finite.

        logits: (n, vocab_size). All ranks use the first rank's choice: their last bits may differ.
        """
        logits = logits[:, : self.tokenizer.n_used]
        params = [request.prompt.params for request in requests]
        uniforms = [
            uniform(request.prompt.params.seed or 0, request.prompt.stream, number)
            for request, number in zip(requests, numbers, strict=True)
        ]
        finite = logits.sum(dim=-1).isfinite()  # one pass: a sum propagates inf and NaN
        tokens = self.share(torch.where(finite, sample(logits, params, uniforms), -1))
        ids = tokens.tolist()
        if not any(own.logprobs for own in params):
            return [ScoredToken(token) if token >= 0 else None for token in ids]
        scores = score(self, logits, tokens.clamp(min=0), requests)
        return [score if token >= 0 else None for score, token in zip(scores, ids, strict=True)]

    def _commit(self, span: Span, output: Output | None) -> None:
        """Record that a span was run, and its request's output (None if logits are not finite).

        The slot is updated first: after an interrupt before the output, a token is computed again.
        """
        request = self.scheduler.running[span.slot]
        if output is None:
            request.error = not_finite(request, span, self.cache.dtype)
            self.cache.truncate(span.slot, 0)
            return
        ids = self.cache.token_ids[span.slot]
        if len(ids) == span.start:  # otherwise the cache was cleared during the pass
            ids.extend(span.ids)
        request.output = output

    def _wipe(self, spans: list[Span]) -> None:
        """Zero the cache beyond the tokens of each slot, to remove values that are not finite."""
        for span in spans:
            ids = self.scheduler.running[span.slot].output.ids
            known = self.cache.prefix_length(span.slot, ids)
            self.cache.truncate(span.slot, known)
        self.cache.wipe()


class Drawn(NamedTuple):
    """A request's output after a pass, and how many tokens the pass drew for it.

    The output is None if logits are not finite.
    """

    output: Output | None
    tokens: int


class PrefillPlan(NamedTuple):
    """A span of a prompt, and the logits that its request needs."""

    span: Span
    end: int  # the position after the span's last token
    targets: list[int]  # the prompt's ids from start + 1 to end, which are scored
    draws: bool  # whether it completes a prompt and an output token is to be drawn
    places: list[int]  # the indices of the pass's tokens whose logits are needed
    first_row: int  # the row of the first of these logits in the pass's result


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
    """Draw each row's next tokens, up to the first that differs from its draft token.

    logits: (n, seqlen, vocab_size), after each id of the spans. The requests are not changed.
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
    """Store the hidden states or logprobs of a request's prompt, if they are requested.

    Overwrites anything that an interrupted pass stored from the span's start on.
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
    """Each row's token with its logprob, and the `top_logprobs` most likely tokens."""
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
        f"logits are not finite (prompt {request.prompt.index}, position {last}, {name}): "
        + advice.get(name, "check the weights with python -m llama verify")
    )


SETTINGS = (bool, int, float, str)  # attributes of user-defined modules that are compared


class ModelVersion:
    """A fingerprint of everything that a pass of a model reads.

    It covers every parameter and buffer (its address and PyTorch's count of writes to it), every
    module, its own and its class's `forward`, its hooks, the norms' eps, the rotary angles, and how
    often the model was moved. Attributes that no pass reads, such as `training`, do not count.
    Edits that PyTorch does not count, through `.data` or NumPy, are not detected.

    Making one takes 0.2 to 0.4 ms for 32 layers: the loops over all modules run in C.
    """

    def __init__(self, model: Transformer):
        modules: list[Any] = [model]
        for module in modules:
            if module.__dict__["_modules"]:
                modules += [child for child in module._modules.values() if child is not None]
        modules = list(dict.fromkeys(modules))  # fused layers share a module
        parts = list(map(vars, modules))
        tensors = [model.freqs_cis]
        for part in parts:
            for held in (part["_parameters"], part["_buffers"]):
                if held:
                    tensors += [tensor for tensor in held.values() if tensor is not None]
        # The ids of hooks, which are never reused.
        hooks = [*map(ops.FORWARD_HOOKS, parts), *map(ops.PRE_HOOKS, parts), *compat.GLOBAL_HOOKS]
        self.numbers: list[Any] = [
            (model.moves, model.params.rope_theta, model.params.rope_scaling_factor),
            list(map(tuple, filter(None, hooks))),
            [part.get("eps") for part in parts],
            list(map(Tensor.data_ptr, tensors)),
            writes_to(tensors),
        ]
        if set(map(type, modules)) - ops.TRANSPARENT.keys():  # user-defined modules
            for part in parts:
                own = {**part, "training": None}
                self.numbers.append([own[n] for n in own if isinstance(own[n], SETTINGS)])
        # Compared by identity. They are kept alive so that no new object gets the identity of an
        # old one. The weak reference to a tensor is one object for as long as the tensor lives.
        self.things: list[Any] = [
            *modules,
            *map(operator.attrgetter("forward"), map(type, modules)),
            *(part.get("forward") for part in parts),
            *map(weakref.ref, tensors),
        ]

    def equals(self, other: ModelVersion, ranks: Ranks | None = None) -> bool:
        """Whether nothing has changed on any rank: all ranks must run the same schedule."""
        same = len(self.things) == len(other.things) and self.numbers == other.numbers
        same = same and all(map(operator.is_, self.things, other.things))
        return same if ranks is None or ranks.size == 1 else ranks.all(same)


def writes_to(tensors: list[Tensor]) -> list[int]:
    """PyTorch's count of writes to each tensor; 0 for tensors made in inference mode."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
