"""Llama: build a model, continue prompts with it, and answer dialogs."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank, get_model_parallel_world_size
from torch import Tensor

from .chat import UNSAFE_ERROR, Dialog, Message, check_dialog, encode_dialog, has_special_tags
from .checkpoint import Checkpoint, check_memory, check_world_size, select_dtype
from .model import KVCache, Transformer
from .parallel import init_model_parallel, model_parallel_group, share
from .sampling import sample
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]

# Positions of a prompt whose logits are held at once while it is scored: 256 × 32,000 float32 are 33 MB.
SCORE_CHUNK = 256


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # with logprobs
    logprobs: list[float]  # with logprobs
    finish_reason: FinishReason


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]  # with logprobs
    logprobs: list[float]  # with logprobs
    finish_reason: FinishReason


@dataclass
class Request:
    """One prompt on its way to a result."""

    index: int
    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    rng: random.Random  # of this request alone, so that its text does not depend on its neighbours
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of tokens
    prompt_logprobs: list[float] = field(default_factory=list)  # of prompt, where asked for
    cut: int = 0  # characters of the last token's text that belong to a stop string
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def reason(self) -> FinishReason:
        assert self.finish_reason is not None, "the request was not run to its end"
        return self.finish_reason


class Llama:
    """A loaded model and its tokenizer. One call at a time: the cache is shared by all calls."""

    @staticmethod
    def build(
        ckpt_dir: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str],
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device = "auto",
        dtype: str = "auto",
    ) -> Llama:
        """Load a checkpoint folder onto this rank's device.

        `max_seq_len` bounds prompt and generation together, in tokens; with `max_batch_size` it sets the cache's size.
        The model is split over `model_parallel_size` ranks (default: all), however many shards are on disk. `seed` is
        the default of each call's. `device` "auto" is cuda, mps or cpu, the first there is; `dtype` is "float32",
        "bfloat16", "float16" or "auto".

        Raises FileNotFoundError for missing files; ValueError for files that are broken or do not belong together, for
        ranks that cannot share the model, and where memory does not suffice.
        """
        start = time.monotonic()
        check_positive(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        tokenizer = Tokenizer(tokenizer_path)
        checkpoint = Checkpoint(ckpt_dir)
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
        with torch.device("meta"):
            model = Transformer(args)
        check_memory(checkpoint.name, model, device, torch_dtype)
        checkpoint.load(model, rank, world_size, device, torch_dtype)
        model.cache = KVCache.allocate(args, torch_dtype, device)
        logger.info(
            "loaded %s in %.2f seconds (%s, %s)", checkpoint.name, time.monotonic() - start, device, torch_dtype
        )
        return Llama(model, tokenizer, seed=seed)

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 1):
        """`model` has a cache attached and its weights on one device."""
        assert model.cache is not None, "attach a KVCache first"
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.group = model_parallel_group()
        self.cache = model.cache

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt by at most `max_gen_len` tokens; returns ids and, where asked for, their logprobs.

        A row ends at EOS (not in the result), at `max_gen_len`, at `max_seq_len`, or with the token in which a `stop`
        string's text begins, which is kept if other text stands before the string in it. `temperature` 0 is greedy;
        otherwise tokens are drawn from the `top_p` nucleus of softmax(logits / temperature). Prompt i draws from random
        stream (seed, i), or (seed[i], 0) for a list of seeds. Logprobs are natural logarithms of softmax(logits),
        whatever the temperature. With `echo` the results begin with the prompt, whose first logprob is 0.0.

        Raises ValueError or TypeError, before any compute, for an argument out of range, an empty prompt, an id that
        is not in the vocabulary, and a prompt longer than `max_seq_len`.
        """
        requests = self._requests(prompt_tokens, max_gen_len, temperature, top_p, seed, stop)
        self._run(requests, score_prompts=logprobs and echo)
        tokens = [(request.prompt if echo else []) + request.tokens for request in requests]
        return tokens, [r.prompt_logprobs + r.logprobs for r in requests] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[CompletionPrediction]:
        """Continue each text; parameters and errors as in `generate`, `max_gen_len` up to `max_seq_len` by default.

        Each result has `generation` and `finish_reason` ("stop" at EOS or a stop string, else "length"); with
        `logprobs` also `tokens`, one string per id whose concatenation is `generation`, and their `logprobs`.
        """
        check_list("prompts", prompts)
        prompt_tokens = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        requests = self._requests(prompt_tokens, max_gen_len, temperature, top_p, seed, stop)
        self._run(requests, score_prompts=logprobs and echo)
        results: list[CompletionPrediction] = []
        for request in requests:
            pieces = self._pieces(request, echo)
            result = CompletionPrediction(generation="".join(pieces), finish_reason=request.reason)
            if logprobs:
                result["tokens"] = pieces
                result["logprobs"] = request.prompt_logprobs + request.logprobs
            results.append(result)
        return results

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[ChatPrediction]:
        """The assistant's next message of each dialog; parameters and results as in `text_completion`.

        A dialog with one of the layout's own tags in a message is answered with UNSAFE_ERROR, without being run.
        Raises ValueError, naming dialog and message, for roles out of order.
        """
        check_list("dialogs", dialogs)
        prompts = [self._dialog_tokens(index, dialog) for index, dialog in enumerate(dialogs)]
        requests = self._requests(prompts, max_gen_len, temperature, top_p, seed, stop)
        self._run(requests)
        results: list[ChatPrediction] = []
        for request in requests:
            pieces = self._pieces(request)
            text = "".join(pieces) if request.prompt else UNSAFE_ERROR
            answer = Message(role="assistant", content=text)
            result = ChatPrediction(generation=answer, finish_reason=request.reason)
            if logprobs:
                result["tokens"] = pieces
                result["logprobs"] = request.logprobs
            results.append(result)
        return results

    def _dialog_tokens(self, index: int, dialog: Dialog) -> list[int] | None:
        """The dialog's prompt, or None if it must not be run."""
        try:
            check_dialog(dialog)
        except (TypeError, ValueError) as error:
            raise type(error)(f"dialog {index}, {error}") from None
        return None if has_special_tags(dialog) else encode_dialog(dialog, self.tokenizer)

    def _requests(
        self,
        prompts: Sequence[Sequence[int] | None],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        seed: int | Sequence[int] | None,
        stop: str | Sequence[str],
    ) -> list[Request]:
        """Validated requests, one per prompt; one without a prompt is finished from the start."""
        limit = self.model.params.max_seq_len
        if max_gen_len is None:
            max_gen_len = limit - 1
        if max_gen_len < 0:
            raise ValueError(f"max_gen_len is {max_gen_len}: use 0 or more")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}: use 0 for greedy decoding, or a positive number")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}: use more than 0 and at most 1")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop is {stop!r}: use strings that are not empty")
        seed = self.seed if seed is None else seed
        streams = [(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else [(s, 0) for s in seed]
        if len(streams) != len(prompts):
            raise ValueError(
                f"seed has {len(streams)} values for {len(prompts)} prompts: pass one for all, or one each"
            )

        requests = []
        for index, prompt in enumerate(prompts):
            if prompt is not None:
                self._check_prompt(index, prompt)
            request = Request(
                index=index,
                prompt=list(prompt or ()),
                max_tokens=min(max_gen_len, limit - len(prompt or ())),
                temperature=temperature,
                top_p=top_p,
                stop=stops,
                # Python hashes the text of a str seed, so that streams of neighbouring numbers have nothing in common.
                rng=random.Random("{}/{}".format(*streams[index])),
            )
            if prompt is None:
                request.finish_reason = "stop"
            elif request.max_tokens == 0:
                request.finish_reason = "length"
            requests.append(request)
        return requests

    def _check_prompt(self, index: int, prompt: Sequence[int]) -> None:
        limit, n_words = self.model.params.max_seq_len, self.tokenizer.n_words
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {index} has no tokens: begin it with the tokenizer's bos_id, {self.tokenizer.bos_id}"
            )
        if len(prompt) > limit:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, and max_seq_len is {limit}: "
                "shorten it or build with a larger max_seq_len"
            )
        for token in prompt:
            if not isinstance(token, int):
                raise TypeError(f"prompt {index} has a {type(token).__name__} ({token!r}) among its token ids")
            if not 0 <= token < n_words:
                raise ValueError(f"prompt {index} has token id {token}, and the vocabulary has {n_words} pieces")

    @torch.inference_mode()
    def _run(self, requests: list[Request], score_prompts: bool = False) -> None:
        """Finish the requests, `max_batch_size` at a time. A failure leaves the cache clean for the next call."""
        todo = [r for r in requests if r.finish_reason is None or (score_prompts and r.prompt)]
        size = self.model.params.max_batch_size
        try:
            for first in range(0, len(todo), size):
                self._run_batch(todo[first : first + size], score_prompts)
        except ValueError:
            self.cache.clear()  # a NaN left in it would spread: even a masked position is multiplied, by 0
            raise

    def _run_batch(self, requests: list[Request], score_prompts: bool) -> None:
        self._advance(requests, self._prefill(requests, score_prompts))
        while not all(request.finish_reason for request in requests):
            self._advance(requests, self._decode(requests))

    def _prefill(self, requests: list[Request], score_prompts: bool) -> Tensor:
        """Run all prompts in one pass; returns the logits after each, (n, vocab_size).

        Short prompts are padded on the right: causality keeps padding out of the prompt's sight, and each decoded token
        overwrites the cached padding at its position before anything attends to it.
        """
        lengths = [len(request.prompt) for request in requests]
        padded = [request.prompt + [0] * (max(lengths) - len(request.prompt)) for request in requests]
        h = self.model.hidden_states(self._tensor(padded), self.cache.window(slice(len(requests)), max(lengths)))
        if score_prompts:
            for row, request in enumerate(requests):
                request.prompt_logprobs = [0.0, *self._score(h[row], request.prompt[1:])]
        return self.model.logits(h[self._tensor(range(len(requests))), self._tensor(lengths) - 1])

    def _decode(self, requests: list[Request]) -> Tensor:
        """Run the last token of every row; returns the logits after it, (n, vocab_size)."""
        last = [[(request.tokens or request.prompt)[-1]] for request in requests]
        positions = [request.length - 1 for request in requests]
        window = self.cache.window(slice(len(requests)), max(positions) + 1)
        h = self.model.hidden_states(self._tensor(last), window, self._tensor(positions))
        return self.model.logits(h[:, 0])

    def _advance(self, requests: list[Request], logits: Tensor) -> None:
        """Append to each unfinished request the token that its row of logits (n, vocab_size) decides."""
        for request, (token, logprob) in zip(requests, self._choose(requests, logits), strict=True):
            if request.finish_reason is not None:
                continue
            if token < 0:
                raise self._non_finite(request)
            if token == self.tokenizer.eos_id:
                request.finish_reason = "stop"
                continue
            request.tokens.append(token)
            request.logprobs.append(logprob)
            if self._cut_at_stop(request):
                request.finish_reason = "stop"
            elif len(request.tokens) == request.max_tokens:
                request.finish_reason = "length"

    def _choose(self, requests: list[Request], logits: Tensor) -> list[tuple[int, float]]:
        """The next token of each row and its logprob; token -1 where logits are not finite.

        The first rank's choice counts on all of them: ranks may differ in a logit's last bit, and must not in a token.
        """
        tokens = sample(
            logits,
            temperature=self._tensor([request.temperature for request in requests]),
            top_p=self._tensor([request.top_p for request in requests]),
            uniform=self._tensor([request.rng.random() for request in requests]),
        )
        logprobs = -F.cross_entropy(logits, tokens, reduction="none")
        tokens = torch.where(logits.isfinite().all(dim=-1), tokens, -1)
        # Token ids are exact in float32, and one tensor takes one broadcast and one read by the host.
        choice = share(torch.stack((tokens.float(), logprobs)), self.group).tolist()
        return [(int(token), logprob) for token, logprob in zip(*choice, strict=True)]

    def _score(self, h: Tensor, targets: list[int]) -> list[float]:
        """Logprobs of the tokens that follow hidden states h (>= len(targets), dim), few positions at a time."""
        scores: list[float] = []
        for first in range(0, len(targets), SCORE_CHUNK):
            chunk = self._tensor(targets[first : first + SCORE_CHUNK])
            logits = self.model.logits(h[first : first + len(chunk)])
            scores += (-F.cross_entropy(logits, chunk, reduction="none")).tolist()
        return scores

    def _cut_at_stop(self, request: Request) -> bool:
        """If the generated text holds a stop string, drop what begins with or after it and note what to cut."""
        if not request.stop:
            return False
        text = self.tokenizer.decode(request.tokens)
        found = [at for at in map(text.find, request.stop) if at >= 0]
        if not found:
            return False
        end = 0
        for kept, piece in enumerate(self.tokenizer.decode_pieces(request.tokens)):
            if end >= min(found):
                del request.tokens[kept:], request.logprobs[kept:]
                break
            end += len(piece)
        request.cut = end - min(found)
        return True

    def _pieces(self, request: Request, echo: bool = False) -> list[str]:
        """The result's text, one string per token."""
        pieces = self.tokenizer.decode_pieces((request.prompt if echo else []) + request.tokens)
        if request.cut:
            pieces[-1] = pieces[-1][: -request.cut]
        return pieces

    def _non_finite(self, request: Request) -> ValueError:
        dtype = str(self.cache.k.dtype).removeprefix("torch.")
        advice = {"float16": 'try dtype="bfloat16"', "bfloat16": 'try dtype="float32"'}
        return ValueError(
            f"logits are not finite (row {request.index}, position {request.length - 1}, {dtype}): "
            + advice.get(dtype, "the checkpoint's weights are damaged or of another model")
        )

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, device=self.cache.k.device)


def check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}: use an integer")
        if value < 1:
            raise ValueError(f"{name} is {value}: use 1 or more")


def check_list(name: str, values: Sequence[object]) -> None:
    """A lone str or dict is a sequence too, of characters or keys, which is never what was meant."""
    if isinstance(values, (str, dict)):
        raise TypeError(f"{name} is a {type(values).__name__}: pass a list, [{values!r}]")
