"""Llama: build a model, continue prompts with it, and answer dialogs."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from .arguments import Settings, check_positive, integer, listed, make_requests
from .chat import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    Dialog,
    Message,
    Role,
    chat_end_ids,
    check_dialogs,
    encode_dialog,
    has_special_tags,
)
from .checkpoints import (
    Checkpoint,
    allocating,
    bytes_per_weight,
    check_memory,
    check_world_size,
    keep_freed_memory,
    load,
    memory_needs,
    return_freed_memory,
)
from .code_llama import check_infilling, encode_infilling
from .distributed import init_model_parallel
from .engine.engine import Engine
from .engine.request import Answer, FinishReason, Pooling, Request
from .engine.runner import Runner
from .model import ModelArgs, Transformer
from .original import sample_top_p
from .parallel import model_ranks
from .quantization.formats import Store, select_dtype, select_store
from .tokenizer import Tokenizer

__all__ = [  # where scripts written for the original look for them
    "B_INST",
    "B_SYS",
    "E_INST",
    "E_SYS",
    "SPECIAL_TAGS",
    "UNSAFE_ERROR",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "Message",
    "ModelArgs",
    "Role",
    "Tokenizer",
    "Transformer",
    "sample_top_p",
]

logger = logging.getLogger(__name__)

# Looks at a text and returns None, or the refusal to answer with.
Check = Callable[[str], "str | None"]


class Prediction(TypedDict, total=False):
    tokens: list[str]  # with logprobs
    logprobs: list[float]  # with logprobs
    top_logprobs: list[list[tuple[str, float]]]  # with top_logprobs: the likeliest in each token's place
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


def load_model(
    checkpoint: Checkpoint, args: ModelArgs, device: torch.device, dtype: torch.dtype, store: Store | None
) -> Transformer:
    """This rank's part of a checkpoint's model, with an empty cache. Raises ValueError for what cannot be shared by the
    ranks, does not fit into memory, or is broken."""
    ranks = model_ranks()
    check_world_size(checkpoint.name, args, ranks.size)
    with torch.device("meta"):
        model = Transformer(args)
    needs = memory_needs(args, ranks.size, dtype, bytes_per_weight(checkpoint, model, dtype, store))
    check_memory(checkpoint.name, args, needs, device)
    return_freed_memory()
    with allocating(checkpoint.name, args, needs, device):
        load(checkpoint, model, device, dtype, store)
        model.allocate_cache()
    if device.type == "cpu":
        keep_freed_memory()
    return model


class Generator:
    """A loaded model, its tokenizer, and what all kinds of calls have in common."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 1, engine: Engine | None = None):
        """`engine` runs `model`, whose weights are on one device."""
        if engine is None and model.cache is None:
            model.allocate_cache()
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.engine = engine or Engine(model, tokenizer)

    def _settings(self, max_gen_len: Any, temperature: Any, top_p: Any, seed: Any, *others: Any) -> Settings:
        return Settings(max_gen_len, temperature, top_p, self.seed if seed is None else seed, *others)

    def _requests(self, prompts: Callable[[], Sequence[Any]], settings: Settings, **options: Any) -> list[Request]:
        """Requests for the prompts that `prompts` makes: the same on every rank, or a ValueError on every rank."""
        max_seq_len = self.model.params.max_seq_len
        return self.model.ranks.alike(
            lambda: make_requests(self.tokenizer, prompts(), settings, max_seq_len, **options)
        )

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in listed("prompts", prompts)]

    def _chat_requests(self, dialogs: Sequence[Dialog], settings: Settings, check: Check | None) -> list[Request]:
        """One request per dialog; those of refused dialogs say so."""
        checked = self.model.ranks.alike(lambda: check_dialogs(dialogs))
        refusals = [UNSAFE_ERROR if has_special_tags(dialog, self.tokenizer) else None for dialog in checked]
        if check is not None:
            refusals = self.model.ranks.ask_first(
                lambda: [r or input_refusal(check, dialog) for r, dialog in zip(refusals, checked, strict=True)]
            )
        pairs = list(zip(refusals, checked, strict=True))
        return self._requests(
            lambda: [[] if r is not None else encode_dialog(d, self.tokenizer) for r, d in pairs],
            settings,
            what="dialog",
            end_ids=chat_end_ids(self.tokenizer),
            refusals=refusals,
        )

    def _run(self, requests: Sequence[Request]) -> list[Answer]:
        with self.engine.answering(requests) as answers:
            for _ in self.engine.progress(answers):
                pass
        return answers

    def _check_output(self, answer: Answer, check: Check) -> None:
        if answer.request.refusal is None:
            refusal = self.model.ranks.ask_first(lambda: refusal_of(check, answer.text))
            if refusal is not None:
                answer.refuse(refusal)

    def _outcome(self, answer: Answer) -> Prediction:
        """What text and chat results have in common."""
        assert answer.finish_reason is not None, "the request was not run to its end"
        result = Prediction(finish_reason=answer.finish_reason)
        if answer.request.logprobs:
            result["tokens"] = answer.prompt_pieces + answer.pieces
            result["logprobs"] = logprobs_of(answer)
        if answer.request.top_logprobs:
            scores = answer.prompt_scores + answer.scores
            result["top_logprobs"] = [
                [(self.tokenizer.piece(token), logprob) for token, logprob in s.top] for s in scores
            ]
        return result

    def _stream(self, requests: Sequence[Request], output_check: Check | None = None) -> Iterator[Piece]:
        with self.engine.answering(requests) as answers:
            steps, going, sent = self.engine.progress(answers), list(range(len(answers))), [0] * len(answers)
            while going:
                for i in list(going):
                    answer = answers[i]
                    text, over = answer.news(sent[i])
                    if over and output_check is not None:
                        self._check_output(answer, output_check)
                        text, _ = answer.news(0)
                    if over or answer.over:
                        going.remove(i)
                    if over or (text and output_check is None):  # a check sees all of it before anybody else does
                        sent[i] += len(text)
                        yield Piece(index=i, text=text, **(self._outcome(answer) if over else {}))
                next(steps, None)

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
        top_logprobs: int = 0,
    ) -> Iterator[Piece]:
        """`text_completion` as it is generated: pieces of whole characters, of all prompts in turn.

        The pieces of one prompt join to its `generation`. A stream may be dropped before its end; on several ranks,
        after the same piece on each. Other calls meanwhile, and other streams, share its passes.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop, logprobs, top_logprobs, echo)
        return self._stream(self._requests(lambda: self._encode(prompts), settings))

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
        top_logprobs: int = 0,
        input_check: Check | None = None,
        output_check: Check | None = None,
    ) -> Iterator[Piece]:
        """`chat_completion` as it is generated; see `stream_text_completion`.

        An answer that `output_check` is to see comes in one piece, once it is whole.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop, logprobs, top_logprobs)
        return self._stream(self._chat_requests(dialogs, settings, input_check), output_check)


class Llama(Generator):
    """A loaded model and its tokenizer. Calls and streams, of one thread or several, share its passes."""

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
        dtype: str | torch.dtype = "auto",
        quantize: Literal["int8", "int4"] | None = None,
        compile: bool = False,
        cuda_graph: bool = True,
        adapter_dir: str | os.PathLike[str] | None = None,
        prompt_lookup_num_tokens: int | None = None,
    ) -> Llama:
        """Load a checkpoint onto this rank's device: a folder of the release's layout or of Hugging Face's, or a GGUF
        file.

        The tokenizer is by default the tokenizer.model in the folder or beside it, or the GGUF file's own.
        `max_seq_len` bounds prompt and generation together, in tokens; with `max_batch_size` it sets the cache's size.
        The model is split over `model_parallel_size` ranks (default: all), however many shards are on disk. `seed` is
        the default of each call's. `device` "auto" is cuda, mps or cpu, the first there is; `dtype` is "float32",
        "bfloat16", "float16" or "auto", the fastest of 16 bits or more there. `quantize` stores the linear weights in 8
        or 4 bits; where neither is given, those that a file has in fewer bits are held in their own. `compile` compiles
        the decode step; on cuda it is captured as a graph unless `cuda_graph` is False. `adapter_dir` is a LoRA adapter
        in PEFT's layout, which is merged into the weights. `prompt_lookup_num_tokens` are guessed, and verified in the
        same pass, where a text repeats itself: 0 for none, None for as many as come at nearly no cost, which are some
        where weights have 16 bits on a CPU.

        Raises FileNotFoundError for missing files; ValueError for files that are broken or do not belong together, for
        ranks that cannot share the model, and where memory does not suffice.
        """
        start = time.monotonic()
        check_positive(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        integer("seed", seed)
        if prompt_lookup_num_tokens is not None and integer("prompt_lookup_num_tokens", prompt_lookup_num_tokens) < 0:
            raise ValueError(f"prompt_lookup_num_tokens is {prompt_lookup_num_tokens}: use 0 for none, or more")
        checkpoint = Checkpoint(ckpt_dir, adapter_dir)
        tokenizer = checkpoint.open_tokenizer(tokenizer_path)
        args = checkpoint.model_args(max_seq_len, max_batch_size)
        device = init_model_parallel(device, model_parallel_size)
        store = select_store(quantize, dtype, device, compile, checkpoint.stored_bits)
        model = load_model(checkpoint, args, device, select_dtype(dtype, checkpoint.dtype, device), store)
        runner = Runner(model, compile=compile, cuda_graph=cuda_graph and device.type == "cuda")
        logger.info(
            "loaded %s in %.2f seconds (%s, %s, %d CPU threads for each of %d ranks)",
            checkpoint.name,
            time.monotonic() - start,
            device,
            str(runner.cache.k.dtype).removeprefix("torch."),
            torch.get_num_threads(),
            model.ranks.size,
        )
        if "WORLD_SIZE" in os.environ:  # as in the original: ranks that draw for themselves draw alike, and print once
            torch.manual_seed(seed)
            if model.ranks.rank:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        best = {"guess_tokens": store.spare_tokens, "chunk_tokens": store.chunk_tokens} if store else {}
        if prompt_lookup_num_tokens is not None:
            best["guess_tokens"] = prompt_lookup_num_tokens
        engine = Engine(model, tokenizer, runner=runner, **best)
        return Llama(model, tokenizer, seed=seed, engine=engine)

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
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop, logprobs, 0, echo)
        prompts = self._requests(lambda: listed("prompt_tokens", prompt_tokens), settings)
        answers = self._run(prompts)
        tokens = [answer.ids if echo else answer.tokens for answer in answers]
        return tokens, [logprobs_of(answer) for answer in answers] if logprobs else None

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
        top_logprobs: int = 0,
    ) -> list[CompletionPrediction]:
        """Continue each text; parameters and errors as in `generate`, `max_gen_len` up to `max_seq_len` by default.

        Each result has `generation` and `finish_reason` ("stop" at EOS or a stop string, else "length"); with
        `logprobs` also `tokens`, one string per id whose concatenation is `generation`, and their `logprobs`; with
        `top_logprobs` as well, for each id as many (text, logprob) of the likeliest in its place, the first one first.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop, logprobs, top_logprobs, echo)
        requests = self._requests(lambda: self._encode(prompts), settings)
        return [CompletionPrediction(generation=a.generation, **self._outcome(a)) for a in self._run(requests)]

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
        top_logprobs: int = 0,
        input_check: Check | None = None,
        output_check: Check | None = None,
    ) -> list[ChatPrediction]:
        """The assistant's next message of each dialog; parameters and results as in `text_completion`.

        A dialog with one of the layout's own tags in a message is answered with UNSAFE_ERROR, without being run; one of
        whose system and user messages `input_check` refuses any, with the refusal that it returns. `output_check` sees
        each answer and may replace it. On several ranks the first one's checks count.
        Raises ValueError, naming dialog and message, for roles out of order.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop, logprobs, top_logprobs)
        answers = self._run(self._chat_requests(dialogs, settings, input_check))
        if output_check is not None:
            for answer in answers:
                self._check_output(answer, output_check)
        return [
            ChatPrediction(generation=Message(role="assistant", content=a.text), **self._outcome(a)) for a in answers
        ]

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
        top_logprobs: int = 0,
    ) -> list[InfillingPrediction]:
        """What Code Llama puts between each prefix and suffix; parameters and errors as in `text_completion`.

        Each result's `generation` is the text between, which ends at the model's end-of-infilling token, and
        `full_text` is prefix, generation and suffix. `suffix_first` is the format that shows the model the suffix
        first. Raises ValueError for a tokenizer without the pieces that mark the three.
        """
        settings = self._settings(max_gen_len, temperature, top_p, seed, stop, logprobs, top_logprobs)
        pairs: list[tuple[str, str]] = []

        def encode() -> list[list[int]]:
            texts = listed("prefixes", prefixes), listed("suffixes", suffixes)
            check_infilling(self.tokenizer, *texts)
            pairs.extend(zip(*texts, strict=True))
            return [encode_infilling(prefix, suffix, self.tokenizer, suffix_first) for prefix, suffix in pairs]

        requests = self._requests(encode, settings, continues=True, end_ids=[self.tokenizer.eot_id])
        return [
            InfillingPrediction(generation=a.text, full_text=prefix + a.text + suffix, **self._outcome(a))
            for a, (prefix, suffix) in zip(self._run(requests), pairs, strict=True)
        ]

    def embed(self, prompts: Sequence[str], pooling: Pooling = "mean") -> Tensor:
        """The final norm's output over each text's tokens, BOS among them: their mean or the last, (n, dim) float32."""
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling is {pooling!r}: use 'mean' or 'last'")
        answers = self._run(self._requests(lambda: self._encode(prompts), Settings(0), pooling=pooling))
        pooled = [a.states.mean(dim=0) if pooling == "mean" else a.states[-1] for a in answers if a.states is not None]
        return torch.stack(pooled) if pooled else torch.empty(0, self.model.params.dim, dtype=torch.float32)


def input_refusal(check: Check, dialog: Dialog) -> str | None:
    """What a check says of the first message that it refuses, of those that the assistant did not write."""
    texts = (message["content"] for message in dialog if message["role"] != "assistant")
    return next((refusal for text in texts if (refusal := refusal_of(check, text)) is not None), None)


def refusal_of(check: Check, text: str) -> str | None:
    refusal = check(text)
    if refusal is None or isinstance(refusal, str):
        return refusal
    raise TypeError(f"a check returned {refusal!r}: return None, or the text of a refusal")


def logprobs_of(answer: Answer) -> list[float]:
    return [score.logprob for score in answer.prompt_scores + answer.scores]
