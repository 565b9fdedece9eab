"""Llama: build a model, continue prompts with it, and answer dialogs."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank, get_model_parallel_world_size
from torch import Tensor

from .chat import UNSAFE_ERROR, Dialog, Message, check_dialog, encode_dialog, has_special_tags
from .checkpoints import (
    Checkpoint,
    allocating,
    check_memory,
    check_world_size,
    keep_freed_memory,
    memory_needs,
    return_freed_memory,
)
from .decode import DecodeStep
from .infilling import check_infilling, encode_infilling
from .model import KVCache, Transformer
from .parallel import (
    init_model_parallel,
    model_parallel_size,
    share,
    share_object,
)
from .quantize import select_dtype, select_store
from .request import FinishReason, Request, Settings, check_positive, integer, make_requests
from .sampling import sample
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Positions of a prompt whose logits are held at once while it is scored: 256 × 32,000 float32 are 33 MB.
SCORE_CHUNK = 256

# A prompt joins a pass of longer ones if its padding is no longer than this: about what another pass would cost.
PASS_TOKENS = 64

# Looks at a text and returns None, or the refusal to answer with.
Check = Callable[[str], "str | None"]


class Prediction(TypedDict, total=False):
    tokens: list[str]  # with logprobs
    logprobs: list[float]  # with logprobs
    finish_reason: FinishReason


class CompletionPrediction(Prediction, total=False):
    generation: str


class ChatPrediction(Prediction, total=False):
    generation: Message


class InfillingPrediction(Prediction, total=False):
    generation: str
    full_text: str


class Piece(Prediction, total=False):
    """The next text of prompt `index`; `finish_reason`, and what `logprobs` asks for, come with its last piece."""

    index: int
    text: str


class Llama:
    """A loaded model and its tokenizer. One call at a time: the cache is shared by all calls."""

    @staticmethod
    def build(
        ckpt_dir: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str] | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        quantize: Literal["int8", "int4"] | None = None,
        compile: bool = False,
        cuda_graph: bool = True,
        adapter_dir: str | os.PathLike[str] | None = None,
    ) -> Llama:
        """Load a checkpoint folder, of the release's layout or of Hugging Face's, onto this rank's device.

        The tokenizer is by default the tokenizer.model in the folder or beside it.
        `max_seq_len` bounds prompt and generation together, in tokens; with `max_batch_size` it sets the cache's size.
        The model is split over `model_parallel_size` ranks (default: all), however many shards are on disk. `seed` is
        the default of each call's. `device` "auto" is cuda, mps or cpu, the first there is; `dtype` is "float32",
        "bfloat16", "float16" or "auto", the fastest of 16 bits or more there. `quantize` stores the linear weights in 8
        or 4 bits. `compile` compiles the decode step; on cuda it is captured as a graph unless `cuda_graph` is False.
        `adapter_dir` is a LoRA adapter in PEFT's layout, which is merged into the weights.

        Raises FileNotFoundError for missing files; ValueError for files that are broken or do not belong together, for
        ranks that cannot share the model, and where memory does not suffice.
        """
        start = time.monotonic()
        check_positive(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        integer("seed", seed)
        checkpoint = Checkpoint(ckpt_dir, adapter_dir)
        tokenizer = Tokenizer(checkpoint.tokenizer_path if tokenizer_path is None else tokenizer_path)
        args = checkpoint.model_args(max_seq_len, max_batch_size)
        if tokenizer.n_words != args.vocab_size:
            raise ValueError(
                f"tokenizer has {tokenizer.n_words} pieces, the checkpoint's embedding {args.vocab_size} rows: "
                "this is not its tokenizer"
            )
        device = init_model_parallel(device, model_parallel_size)
        rank, world_size = get_model_parallel_rank(), get_model_parallel_world_size()
        check_world_size(checkpoint.name, args, world_size)
        torch_dtype = select_dtype(dtype, checkpoint.dtype, device)
        store = select_store(quantize, dtype, device, compile)
        bytes_per_weight = store.bytes_per_weight if store else torch_dtype.itemsize
        needs = memory_needs(args, world_size, torch_dtype, bytes_per_weight)
        check_memory(checkpoint.name, args, needs, device)
        with torch.device("meta"):
            model = Transformer(args)
        return_freed_memory()
        with allocating(checkpoint.name, args, needs, device):
            checkpoint.load(model, rank, world_size, device, torch_dtype, store.hold if store else None)
            model.cache = KVCache.allocate(args, torch_dtype, device)
        if device.type == "cpu":
            keep_freed_memory()
        logger.info(
            "loaded %s in %.2f seconds (%s, %s, %d CPU threads for each of %d ranks)",
            checkpoint.name,
            time.monotonic() - start,
            device,
            str(torch_dtype).removeprefix("torch."),
            torch.get_num_threads(),
            world_size,
        )
        step = DecodeStep(model, compile=compile, cuda_graph=cuda_graph and device.type == "cuda")
        return Llama(model, tokenizer, seed=seed, step=step)

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 1, step: DecodeStep | None = None):
        """`model` has a cache attached and its weights on one device."""
        assert model.cache is not None, "attach a KVCache first"
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.step = step or DecodeStep(model)
        self.world_size = model_parallel_size()
        self.cache = model.cache

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | Sequence[int],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt by at most `max_gen_len` tokens; returns ids and, where asked for, their logprobs.

        A row ends at EOS (not in the result), at `max_gen_len`, at `max_seq_len`, or before a `stop` string (a token
        that also holds text before the string is kept). `temperature` 0 is greedy; otherwise tokens are drawn from the
        `top_p` nucleus of softmax(logits / temperature). Prompt i draws from random stream (seed, i), or (seed[i], 0)
        for a list of seeds. `max_gen_len`, `temperature`, `top_p`, `seed` and `stop` may be lists with one value per
        prompt (a plain list of stop strings holds for all). Logprobs are natural logarithms of softmax(logits),
        whatever the temperature. With `echo` the results begin with the prompt, whose first logprob is 0.0.

        Raises ValueError or TypeError, before any compute, for an argument out of range, an empty prompt, an id that
        is not in the vocabulary, and a prompt longer than `max_seq_len`.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop)
        requests = self._requests(listed("prompt_tokens", prompt_tokens), settings, logprobs=logprobs, echo=echo)
        self._run(requests)
        tokens = [(request.prompt if echo else []) + request.tokens for request in requests]
        return tokens, [r.prompt_logprobs + r.logprobs for r in requests] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    ) -> list[CompletionPrediction]:
        """Continue each text; parameters and errors as in `generate`, `max_gen_len` up to `max_seq_len` by default.

        Each result has `generation` and `finish_reason` ("stop" at EOS or a stop string, else "length"); with
        `logprobs` also `tokens`, one string per id whose concatenation is `generation`, and their `logprobs`.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop)
        requests = self._requests(self._encode(prompts), settings, logprobs=logprobs, echo=echo)
        self._run(requests)
        return [CompletionPrediction(generation=r.generation, **outcome(r)) for r in requests]

    def stream_text_completion(
        self,
        prompts: Sequence[str],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    ) -> Iterator[Piece]:
        """`text_completion` as it is generated: pieces of whole characters, of all prompts in turn.

        The pieces of one prompt join to its `generation`. A stream may be dropped before its end; on several ranks,
        after the same piece on each. Once another call has used this Llama, going on with it is a RuntimeError.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop)
        return self._stream(self._requests(self._encode(prompts), settings, logprobs=logprobs, echo=echo))

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    ) -> list[InfillingPrediction]:
        """What Code Llama puts between each prefix and suffix; parameters and errors as in `text_completion`.

        Each result's `generation` is the text between, which ends at the model's end-of-infilling token, and
        `full_text` is prefix, generation and suffix. `suffix_first` is the format that shows the model the suffix
        first. Raises ValueError for a tokenizer without the pieces that mark the three.
        """
        check_infilling(self.tokenizer)
        prefixes, suffixes = listed("prefixes", prefixes), listed("suffixes", suffixes)
        if len(prefixes) != len(suffixes):
            raise ValueError(f"prefixes are {len(prefixes)} and suffixes {len(suffixes)}: pass as many of each")
        pairs = list(zip(prefixes, suffixes, strict=True))
        prompts = [encode_infilling(prefix, suffix, self.tokenizer, suffix_first) for prefix, suffix in pairs]
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop)
        requests = self._requests(prompts, settings, logprobs=logprobs, infilling=True)
        self._run(requests)
        return [
            InfillingPrediction(generation=r.text, full_text=prefix + r.text + suffix, **outcome(r))
            for r, (prefix, suffix) in zip(requests, pairs, strict=True)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
        input_check: Check | None = None,
        output_check: Check | None = None,
    ) -> list[ChatPrediction]:
        """The assistant's next message of each dialog; parameters and results as in `text_completion`.

        A dialog with one of the layout's own tags in a message is answered with UNSAFE_ERROR, without being run; one of
        whose system and user messages `input_check` refuses any, with the refusal that it returns. `output_check` sees
        each answer and may replace it. On several ranks the first one's checks count.
        Raises ValueError, naming dialog and message, for roles out of order.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop)
        requests = self._chat_requests(dialogs, settings, logprobs, input_check)
        self._run(requests)
        if output_check is not None:
            for request in requests:
                self._check_output(request, output_check)
        return [ChatPrediction(generation=Message(role="assistant", content=r.text), **outcome(r)) for r in requests]

    def stream_chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
        input_check: Check | None = None,
        output_check: Check | None = None,
        reuse_prefix: bool = False,
    ) -> Iterator[Piece]:
        """`chat_completion` as it is generated; see `stream_text_completion`.

        An answer that `output_check` is to see comes in one piece, once it is whole. With `reuse_prefix`, a single
        dialog that begins as the one before it did keeps what is cached of that and computes only the rest; in 16 bits
        this may round otherwise than computing all of it.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop)
        requests = self._chat_requests(dialogs, settings, logprobs, input_check)
        return self._stream(requests, output_check=output_check, reuse_prefix=reuse_prefix)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str], pooling: Literal["mean", "last"] = "mean") -> Tensor:
        """The final norm's output over each text's tokens, BOS among them: their mean or the last, (n, dim) float32."""
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling is {pooling!r}: use 'mean' or 'last'")
        requests = self._requests(self._encode(prompts), self._settings(0, 0.0, 1.0, 0, ()))
        size = self.model.params.max_batch_size
        pooled = torch.empty(len(requests), self.model.params.dim, dtype=torch.float32, device=self.cache.k.device)
        for first in range(0, len(requests), size):
            batch = [request.prompt for request in requests[first : first + size]]
            h = self.model.hidden_states(self._tensor(pad(batch))).float()
            for i, prompt in enumerate(batch):
                pooled[first + i] = h[i, : len(prompt)].mean(dim=0) if pooling == "mean" else h[i, len(prompt) - 1]
        return pooled

    def _settings(self, max_gen_len: Any, temperature: Any, top_p: Any, seed: Any, stop: Any) -> Settings:
        return Settings(max_gen_len, temperature, top_p, self.seed if seed is None else seed, stop)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in listed("prompts", prompts)]

    def _requests(self, prompts: Sequence[Any], settings: Settings, **options: Any) -> list[Request]:
        return make_requests(self.tokenizer, prompts, settings, self.model.params.max_seq_len, **options)

    def _chat_requests(
        self, dialogs: Sequence[Dialog], settings: Settings, logprobs: bool, check: Check | None
    ) -> list[Request]:
        """One request per dialog; those of refused dialogs are finished."""
        dialogs = listed("dialogs", dialogs)
        for index, dialog in enumerate(dialogs):
            try:
                check_dialog(dialog)
            except (TypeError, ValueError) as error:
                raise type(error)(f"dialog {index}, {error}") from None
        refusals = [UNSAFE_ERROR if has_special_tags(dialog) else None for dialog in dialogs]
        if check is not None:
            for index, dialog in enumerate(dialogs):
                inputs = [message["content"] for message in dialog if message["role"] != "assistant"]
                while refusals[index] is None and inputs:
                    refusals[index] = self._refusal(check, inputs.pop(0))
        pairs = zip(refusals, dialogs, strict=True)
        encoded = [[] if r is not None else encode_dialog(d, self.tokenizer) for r, d in pairs]
        return self._requests(encoded, settings, logprobs=logprobs, refusals=refusals)

    def _refusal(self, check: Check, text: str) -> str | None:
        """What the first rank's check says of a text."""
        refusal = share_object(check(text), self.world_size)
        if refusal is None or isinstance(refusal, str):
            return refusal
        raise TypeError(f"a check returned {refusal!r}: return None, or the text of a refusal")

    def _check_output(self, request: Request, check: Check) -> None:
        if request.prompt and (refusal := self._refusal(check, request.text)) is not None:
            request.refuse(refusal)

    def _stream(
        self, requests: list[Request], *, output_check: Check | None = None, reuse_prefix: bool = False
    ) -> Iterator[Piece]:
        sent = [0] * len(requests)
        finished = [r for r in requests if r.finish_reason is not None and not r.scores_prompt]
        for advanced in chain([finished], self._steps(requests, reuse_prefix)):
            for request in advanced:
                if output_check is not None:
                    if request.finish_reason is None:
                        continue
                    self._check_output(request, output_check)
                end = len(request.generation) - request.held_back
                piece = Piece(index=request.index, text=request.generation[sent[request.index] : end])
                sent[request.index] = end
                if request.finish_reason is not None:
                    piece |= outcome(request)  # type: ignore[typeddict-item]
                if piece["text"] or request.finish_reason is not None:
                    yield piece

    def _run(self, requests: list[Request]) -> None:
        for _ in self._steps(requests):
            pass

    @torch.inference_mode()
    def _steps(self, requests: list[Request], reuse_prefix: bool = False) -> Iterator[list[Request]]:
        """Run requests to their ends; yields after each forward pass those that it gave a token.

        Running requests occupy the first rows of the cache, so that every pass works on a slice of it. Prompts are
        admitted, all that fit at once, as soon as rows are free.
        """
        waiting = deque(r for r in requests if r.finish_reason is None or r.scores_prompt)
        running: list[Request] = []
        known = self.cache.tokens if reuse_prefix else []
        mine: list[int] = []  # whoever uses the cache puts a list of its own there, so that each sees the others come
        self.cache.tokens = mine
        first_row: Request | None = None  # the one whose tokens the cache's first row holds
        try:
            while waiting or running:
                free = self.model.params.max_batch_size - len(running)
                if waiting and free:
                    advanced = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                    advanced.sort(key=lambda request: -len(request.prompt))
                    if not running:
                        first_row = None  # until the pass is done, the first row is neither's
                    logits = self._prefill(advanced, len(running), known)
                    known = []
                    running += advanced
                else:
                    advanced = list(running)
                    logits = self._decode(running)
                first_row = running[0]
                self._advance(advanced, logits)
                self._close_ranks(running)
                first_row = running[0] if running else first_row
                yield advanced
                if self.cache.tokens is not mine:
                    raise RuntimeError("another call has used this Llama since: read a stream to its end before one")
        except ValueError:
            first_row = None
            self.cache.clear()  # a NaN left in it would spread: even a masked position is multiplied, by 0
            raise
        finally:
            if self.cache.tokens is mine and first_row is not None:
                self.cache.tokens = (first_row.prompt + first_row.tokens)[:-1]

    def _prefill(self, requests: list[Request], first: int, known: list[int]) -> Tensor:
        """Run prompts, longest first, into the rows from `first` on; returns the logits after each, (n, vocab_size).

        Prompts of similar length share a pass.
        """
        logits, begin = [], 0
        known = known if len(requests) == 1 else []
        for end in range(1, len(requests) + 1):
            longest = len(requests[begin].prompt)
            if end == len(requests) or longest - len(requests[end].prompt) > PASS_TOKENS:
                logits.append(self._prefill_together(requests[begin:end], first + begin, known))
                begin = end
        return torch.cat(logits)

    def _prefill_together(self, requests: list[Request], first: int, known: list[int]) -> Tensor:
        """One pass of `_prefill`.

        Shorter prompts are padded on the right: causality keeps padding out of the prompt's sight, and each decoded
        token overwrites the cached padding at its position before anything attends to it.
        """
        prompts = [request.prompt for request in requests]
        lengths = [len(prompt) for prompt in prompts]
        start = None
        if known:
            cached = common_prefix(known, prompts[0][:-1])
            start, prompts = self._tensor([cached]), [prompts[0][cached:]]
        window = self.cache.window(slice(first, first + len(prompts)), max(lengths))
        h = self.model.hidden_states(self._tensor(pad(prompts)), window, start)
        for row, request in enumerate(requests):
            if request.scores_prompt:
                request.prompt_logprobs = [0.0, *self._score(h[row], request.prompt[1:])]
        last = self._tensor([len(prompt) - 1 for prompt in prompts])
        return self.model.logits(h[torch.arange(len(prompts), device=h.device), last])

    def _decode(self, requests: list[Request]) -> Tensor:
        """Run the last token of every row; returns the logits after it, (n, vocab_size)."""
        positions = [request.length - 1 for request in requests]
        last = self._tensor([[request.tokens[-1]] for request in requests])
        return self.step(last, self._tensor(positions), self.cache, max(positions) + 1)

    def _advance(self, requests: list[Request], logits: Tensor) -> None:
        """Give each unfinished request the token that its row of logits (n, vocab_size) decides."""
        for request, (token, logprob) in zip(requests, self._choose(requests, logits), strict=True):
            if token < 0:
                raise self._non_finite(request)
            if request.finish_reason is not None:
                continue
            if token in request.end_ids:
                request.finish("stop")
            else:
                request.append(token, logprob)

    def _choose(self, requests: list[Request], logits: Tensor) -> list[tuple[int, float]]:
        """The next token of each row and, where asked for, its logprob; token -1 where logits are not finite.

        The first rank's choice counts on all of them: ranks may differ in a logit's last bit, and must not in a token.
        """
        tokens = sample(
            logits,
            temperature=[request.temperature for request in requests],
            top_p=[request.top_p for request in requests],
            uniform=[request.rng.random() for request in requests],
        )
        wanted = any(request.wants_logprobs for request in requests)
        logprobs = -F.cross_entropy(logits, tokens, reduction="none") if wanted else torch.zeros_like(tokens)
        tokens = torch.where(logits.sum(dim=-1).isfinite(), tokens, -1)  # one pass: a sum keeps what is not finite
        # Token ids are exact in float32, and one tensor takes one broadcast and one read by the host.
        choice = share(torch.stack((tokens.float(), logprobs.float())), self.world_size).tolist()
        return [(int(token), logprob) for token, logprob in zip(*choice, strict=True)]

    def _close_ranks(self, running: list[Request]) -> None:
        """Drop finished requests; the last rows move into the places that they leave."""
        row = 0
        while row < len(running):
            if running[row].finish_reason is None:
                row += 1
                continue
            last = running.pop()
            if last.finish_reason is None:
                self.cache.move_row(len(running), row, last.length)
                running[row] = last

    def _score(self, h: Tensor, targets: list[int]) -> list[float]:
        """Logprobs of the tokens that follow hidden states h (>= len(targets), dim), few positions at a time."""
        scores: list[float] = []
        for first in range(0, len(targets), SCORE_CHUNK):
            chunk = self._tensor(targets[first : first + SCORE_CHUNK])
            logits = self.model.logits(h[first : first + len(chunk)])
            scores += share(-F.cross_entropy(logits, chunk, reduction="none"), self.world_size).tolist()
        return scores

    def _non_finite(self, request: Request) -> ValueError:
        dtype = str(self.cache.k.dtype).removeprefix("torch.")
        advice = {"float16": 'try dtype="bfloat16"', "bfloat16": 'try dtype="float32"'}
        return ValueError(
            f"logits are not finite (row {request.index}, position {request.length - 1}, {dtype}): "
            + advice.get(dtype, "the checkpoint's weights are damaged or of another model")
        )

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, device=self.cache.k.device)


def listed(name: str, values: Any) -> list[Any]:
    """`values` as a list. A lone str or dict is iterable too, of characters or keys, which is never what was meant."""
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is a {type(values).__name__}: pass a list, [{values!r}]")
    return list(values)


def pad(rows: list[list[int]]) -> list[list[int]]:
    """Rows of one length, with ids on the right that nothing attends to."""
    longest = max(map(len, rows))
    return [row + [0] * (longest - len(row)) for row in rows]


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids the two begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def outcome(request: Request) -> Prediction:
    """What text and chat results have in common."""
    assert request.finish_reason is not None, "the request was not run to its end"
    result = Prediction(finish_reason=request.finish_reason)
    if request.wants_logprobs:
        result["tokens"] = request.prompt_pieces + request.pieces
        result["logprobs"] = request.prompt_logprobs + request.logprobs
    return result
