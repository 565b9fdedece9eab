"""Llama: load a model, complete texts and answer dialogs."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack  # a dependency of PyTorch

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
from .checkpoints import Checkpoint, load_model
from .code_llama import check_infilling, encode_infilling
from .distributed import init_model_parallel
from .engine import Engine, FinishReason, ModelRunner, Pooling, Prompt, Request, make_prompts
from .engine.request import delta, refuse
from .errors import ArgumentError, ArgumentTypeError, check_positive
from .model import ModelArgs, Transformer
from .options import check_fields, check_names, option
from .original import sample_top_p
from .quantization.formats import DTYPES, select_dtype, select_formats
from .sampling import SamplingOptions, params_of, streams_of
from .tokenizer import Tokenizer

__all__ = [  # scripts for the original import some of these from here
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

# Takes a text and returns None, or a refusal that replaces the answer.
Check = Callable[[str], "str | None"]

PathLike = str | os.PathLike[str]


class Prediction(TypedDict, total=False):
    tokens: list[str]  # with logprobs
    logprobs: list[float]  # with logprobs
    # With top_logprobs: (text, logprob) of the most likely tokens at each position.
    top_logprobs: list[list[tuple[str, float]]]
    finish_reason: FinishReason


class CompletionPrediction(Prediction, total=False):
    generation: str


class ChatPrediction(Prediction, total=False):
    generation: Message


class InfillingPrediction(Prediction, total=False):
    generation: str
    full_text: str


class Piece(Prediction, total=False):
    """The next text of prompt `index`.

    A prompt's last piece also has `finish_reason` and, if requested, the logprobs.
    """

    index: int
    text: str


@dataclass(frozen=True)
class BuildOptions:
    """How a model is built: arguments of `Llama.build`, and flags of commands that load a model.

    `max_seq_len` limits prompt plus output, in tokens. `max_batch_size` is the number of prompts
    that run at once. Together they set the size of the KV cache. `seed` is the default seed of each
    call. `device` "auto" takes cuda, mps or cpu, the first one available. `dtype` "auto" is the
    checkpoint's 16-bit type on a GPU; on a CPU it is float32, with linear weights in 16 bits if
    that is faster. `quantize` stores linear weights in 8 or 4 bits. `prompt_lookup_num_tokens` is
    the number of draft tokens for prompt-lookup decoding: 0 for none, None for as many as are
    nearly free.

    All are checked before anything is loaded. Raises ArgumentError, a ValueError, if a value is out
    of range, and ArgumentTypeError, also a TypeError, if its type is wrong.
    """

    tokenizer_path: Any = option(
        None, "path of tokenizer.model, if not in the folder or next to it"
    )
    max_seq_len: int = option(512, "limit of prompt plus answer, in tokens")
    max_batch_size: int = option(8, "number of prompts that run at once")
    model_parallel_size: int | None = option(
        None, "number of ranks that share one model; all by default"
    )
    seed: int = option(1, "the same seed gives the same text")
    device: Any = option("auto", "cuda, mps or cpu; auto takes the first one available")
    dtype: Any = option(
        "auto",
        "float32, bfloat16 or float16; auto takes the fastest with at least 16 bits",
        valid=lambda value: value in ("auto", *DTYPES, *DTYPES.values()),
        use="'auto', 'float32', 'bfloat16', 'float16'",
    )
    quantize: Literal["int8", "int4"] | None = option(
        None,
        "int8 or int4: store linear weights in 8 or 4 bits",
        valid=lambda value: value in ("int8", "int4"),
        use="'int8', 'int4' or None",
    )
    compile: bool = option(False, "compile the decode step, which takes minutes at first use")
    cuda_graph: bool = option(True, "capture the decode step as a CUDA graph")
    adapter_dir: Any = option(None, "folder of a LoRA adapter (PEFT) to merge into the weights")
    prompt_lookup_num_tokens: int | None = option(
        None,
        "draft tokens for prompt-lookup decoding; 0: none, None: as many as are nearly free",
        valid=lambda value: value >= 0,
        use="0 for no drafts, or a positive number",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(max_seq_len=self.max_seq_len, max_batch_size=self.max_batch_size)


class BuildKeywords(TypedDict, total=False):
    """The keywords of `Llama.build`, beyond the original's parameters."""

    device: str | torch.device
    dtype: str | torch.dtype
    quantize: Literal["int8", "int4"] | None
    compile: bool
    cuda_graph: bool
    adapter_dir: PathLike | None
    prompt_lookup_num_tokens: int | None


class Llama:
    """A loaded model and its tokenizer, made by `Llama.build`.

    Methods take the original's parameters and, as keywords, the other fields of SamplingParams:
    `seed`, `stop` and `top_logprobs`. `temperature`, `top_p`, `max_gen_len`, `seed` and `stop` take
    one value for all prompts, or a list with one value per prompt. Calls and streams may overlap,
    from several threads (on several ranks, from one), and share the model's forward passes.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int = 1,
        engine: Engine | None = None,
    ):
        """`engine`, if given, runs `model`. All weights must be on one device."""
        if engine is None and model.cache is None:
            model.allocate_cache()
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.engine = engine or Engine(model, tokenizer)

    @staticmethod
    def build(
        ckpt_dir: PathLike,
        tokenizer_path: PathLike | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        **options: Unpack[BuildKeywords],
    ) -> Llama:
        """Load a release folder, Hugging Face folder or GGUF file onto this rank's device.

        `max_seq_len` limits prompt plus output, in tokens. With `max_batch_size`, it sets the size
        of the KV cache. The model is split over `model_parallel_size` ranks (default: all), however
        many shards are on disk. `seed` is the default seed of each call. BuildOptions describes the
        keywords.

        Raises FileNotFoundError if files are missing; ValueError if files are broken or do not
        belong together, if the ranks cannot share the model, or if memory does not suffice.
        """
        check_names(BuildOptions, options)
        sizes = (tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed)
        return build(ckpt_dir, BuildOptions(*sizes, **options))

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | Sequence[int],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt by at most `max_gen_len` tokens; return ids, and logprobs or None.

        An output ends at EOS (which is not returned), at `max_gen_len`, at `max_seq_len` or before
        a `stop` string (a token that also holds text before the string is kept). `temperature` 0 is
        greedy; otherwise tokens are sampled from the `top_p` nucleus of softmax(logits /
        temperature). Prompt i uses random stream (seed, i), or (seed[i], 0) with a list of seeds.
        Logprobs are natural logarithms of softmax(logits), whatever the temperature. With `echo`,
        results begin with the prompt, whose first logprob is 0.0.

        Raises ValueError or TypeError, before computing anything, if an argument is out of range or
        a prompt is empty, is longer than `max_seq_len` or has an id outside the vocabulary.
        """
        asked = (temperature, top_p, max_gen_len, logprobs, echo)
        prompts = prompts_of(self, lambda: as_list("prompt_tokens", prompt_tokens), asked, options)
        requests = run(self, prompts)
        tokens = [request.output.ids if echo else request.answer_ids for request in requests]
        return tokens, [logprobs_of(request) for request in requests] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[CompletionPrediction]:
        """Continue each text, by default up to `max_seq_len`; raises the errors of `generate`.

        Each result has `generation` and `finish_reason` ("stop" at EOS or a stop string, else
        "length"). With `logprobs`, it also has `tokens`, one string per id, which join to
        `generation`, and their `logprobs`. With `top_logprobs` k, it also has the (text, logprob)
        pairs of the k most likely tokens at each position, most likely first.
        """
        asked = (temperature, top_p, max_gen_len, logprobs, echo)
        requests = run(self, prompts_of(self, lambda: encoded(self, prompts), asked, options))
        return [CompletionPrediction(generation=r.full_text, **outcome_of(r)) for r in requests]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        *,
        input_check: Check | None = None,
        output_check: Check | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatPrediction]:
        """Generate the assistant's next message in each dialog; results as in `text_completion`.

        A dialog with one of the layout's tags in a message is answered with UNSAFE_ERROR and not
        run. A check takes a text and returns None, or a refusal, which becomes the answer:
        `input_check` sees every system and user message before the dialog is run, `output_check`
        every answer. On several ranks, only the first rank's checks are called. Raises ValueError,
        with the numbers of dialog and message, if roles are out of order.
        """
        asked = (temperature, top_p, max_gen_len, logprobs, False)
        requests = run(self, dialog_prompts(self, dialogs, asked, options, input_check))
        for request in requests:
            apply_check(self, request, output_check)
        return [ChatPrediction(generation=answer_of(r), **outcome_of(r)) for r in requests]

    def stream_text_completion(
        self,
        prompts: Sequence[str],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Piece]:
        """Stream `text_completion`: yield pieces of whole characters, of all prompts in turn.

        The pieces of one prompt join to its `generation`. The last one has `finish_reason`, and
        logprobs if requested. A stream may be closed before its end; on several ranks, after the
        same piece on each. Other calls and streams may run at the same time.
        """
        asked = (temperature, top_p, max_gen_len, logprobs, echo)
        return stream(self, prompts_of(self, lambda: encoded(self, prompts), asked, options))

    def stream_chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        *,
        input_check: Check | None = None,
        output_check: Check | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Piece]:
        """Stream `chat_completion`; see `stream_text_completion`.

        With `output_check`, each answer is yielded in one piece, once it is complete.
        """
        asked = (temperature, top_p, max_gen_len, logprobs, False)
        prompts = dialog_prompts(self, dialogs, asked, options, input_check)
        return stream(self, prompts, output_check)

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float | Sequence[float] = 0.6,
        top_p: float | Sequence[float] = 0.9,
        max_gen_len: int | Sequence[int] | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[InfillingPrediction]:
        """Generate the text between each prefix and suffix, with Code Llama 7B or 13B.

        In each result, `generation` is the text between the two, up to the model's
        end-of-infilling token, and `full_text` is prefix, generation and suffix. `suffix_first`
        selects the prompt format that begins with the suffix. Raises the errors of `generate`, and
        ValueError if the tokenizer has no infilling pieces.
        """
        asked = (temperature, top_p, max_gen_len, logprobs, False)
        return infilled(self, prefixes, suffixes, suffix_first, asked, options)

    def embed(self, prompts: Sequence[str], pooling: Pooling = "mean") -> Tensor:
        """Return the final norm's output for each text, pooled over its tokens: (n, dim) float32.

        `pooling` is "mean", over all tokens including BOS, or "last", the last token's output.
        """
        return embedded(self, prompts, pooling)

    def clear_cache(self) -> None:
        """Empty the KV cache, after weight edits that PyTorch cannot detect (`.data`, NumPy)."""
        self.engine.cache.clear()


def build(ckpt_dir: PathLike, options: BuildOptions) -> Llama:
    """Load a model with options that have been checked; see Llama.build."""
    start = time.monotonic()
    checkpoint = Checkpoint(ckpt_dir, options.adapter_dir)
    tokenizer = checkpoint.open_tokenizer(options.tokenizer_path)
    args = checkpoint.model_args(options.max_seq_len, options.max_batch_size)
    device = init_model_parallel(options.device, options.model_parallel_size)
    formats = select_formats(
        options.quantize, options.dtype, device, options.compile, checkpoint.stored_bits
    )
    dtype = select_dtype(options.dtype, checkpoint.dtype, device)
    model = load_model(checkpoint, args, device, dtype, formats)
    cuda_graph = options.cuda_graph and device.type == "cuda"
    runner = ModelRunner(model, compile=options.compile, cuda_graph=cuda_graph)
    logger.info(
        "loaded %s in %.2f seconds (%s, %s, %d CPU threads for each of %d ranks)",
        checkpoint.name,
        time.monotonic() - start,
        device,
        str(runner.cache.dtype).removeprefix("torch."),
        torch.get_num_threads(),
        model.ranks.size,
    )
    # As in the original: all ranks have the same global seed, and only the first one prints.
    if "WORLD_SIZE" in os.environ:
        torch.manual_seed(options.seed)
        if model.ranks.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    drafts = options.prompt_lookup_num_tokens
    if drafts is None:
        drafts = formats.wide.draft_tokens if formats else 0
    chunk = formats.wide.chunk_tokens if formats else 0
    engine = Engine(model, tokenizer, draft_tokens=drafts, chunk_tokens=chunk, runner=runner)
    return Llama(model, tokenizer, seed=options.seed, engine=engine)


# The original's sampling parameters, in the methods' order, under their names in SamplingParams.
PARAMETERS = ("temperature", "top_p", "max_tokens", "logprobs", "echo")


def prompts_of(
    llm: Llama,
    encode: Callable[[], Sequence[Any]],
    parameters: Sequence[Any],
    options: SamplingOptions,
    **how: Any,
) -> list[Prompt]:
    """Make prompts from the ids that `encode` returns. Every rank gets the same result or an error.

    `parameters` are the values of PARAMETERS. `how` is passed to make_prompts. Errors call
    max_tokens by the name of the parameter, max_gen_len.
    """
    seed = options.get("seed")
    seed = llm.seed if seed is None else seed
    asked = {**dict(zip(PARAMETERS, parameters, strict=True)), **options, "seed": seed}
    max_seq_len = llm.model.params.max_seq_len

    def make() -> list[Prompt]:
        ids = encode()
        try:
            params = params_of(len(ids), asked)
            params = [
                own if own.seed is not None else replace(own, seed=llm.seed) for own in params
            ]
        except ArgumentError as error:
            if error.name != "max_tokens":
                raise
            raise type(error)("max_gen_len", error.index, error.reason) from None
        streams = range(len(ids)) if isinstance(seed, int) else streams_of(len(ids), seed)
        return make_prompts(llm.tokenizer, ids, params, max_seq_len, streams=streams, **how)

    return make() if llm.model.ranks.size == 1 else llm.model.ranks.alike(make)


def as_list(name: str, values: Any) -> list[Any]:
    """Return `values` as a list. A str or dict is iterable too, but is surely a mistake."""
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise ArgumentTypeError(
            name, None, f"is a {type(values).__name__}: pass a list, [{values!r}]"
        )
    return list(values)


def encoded(llm: Llama, texts: Sequence[str]) -> list[list[int]]:
    return [llm.tokenizer.encode(text, bos=True, eos=False) for text in as_list("prompts", texts)]


def dialog_prompts(
    llm: Llama,
    dialogs: Sequence[Dialog],
    parameters: Sequence[Any],
    options: SamplingOptions,
    check: Check | None,
) -> list[Prompt]:
    """One prompt per dialog. A refused dialog's prompt carries the refusal."""
    ranks = llm.model.ranks
    tokenizer = llm.tokenizer
    checked = ranks.alike(lambda: check_dialogs(dialogs))
    refusals = [UNSAFE_ERROR if has_special_tags(dialog, tokenizer) else None for dialog in checked]
    pairs = list(zip(refusals, checked, strict=True))
    if check is not None:
        refusals = ranks.ask_first(
            lambda: [own or input_refusal(check, dialog) for own, dialog in pairs]
        )

    def encode() -> list[list[int]]:
        pairs = zip(refusals, checked, strict=True)
        return [[] if refusal else encode_dialog(dialog, tokenizer) for refusal, dialog in pairs]

    how = {"name": "dialog", "end_ids": chat_end_ids(tokenizer), "refusals": refusals}
    return prompts_of(llm, encode, parameters, options, **how)


def run(llm: Llama, prompts: Sequence[Prompt]) -> list[Request]:
    """Run prompts to completion and return their requests."""
    with llm.engine.running(prompts) as requests:
        for _ in llm.engine.progress(requests):
            pass
    return requests


def stream(
    llm: Llama, prompts: Sequence[Prompt], output_check: Check | None = None
) -> Iterator[Piece]:
    with llm.engine.running(prompts) as requests:
        steps = llm.engine.progress(requests)
        going = list(range(len(requests)))
        sent = [0] * len(requests)
        while going:
            for i in list(going):
                request = requests[i]
                text, over = delta(request, sent[i])
                if over and output_check is not None:
                    apply_check(llm, request, output_check)
                    text, _ = delta(request, 0)
                if over or request.error is not None or request.cancelled:
                    going.remove(i)
                # With a check, the answer is yielded only after the check has seen all of it.
                if over or (text and output_check is None):
                    sent[i] += len(text)
                    yield Piece(index=i, text=text, **(outcome_of(request) if over else {}))
            next(steps, None)


def infilled(
    llm: Llama,
    prefixes: Sequence[str],
    suffixes: Sequence[str],
    suffix_first: bool,
    parameters: Sequence[Any],
    options: SamplingOptions,
) -> list[InfillingPrediction]:
    pairs: list[tuple[str, str]] = []

    def encode() -> list[list[int]]:
        before = as_list("prefixes", prefixes)
        after = as_list("suffixes", suffixes)
        check_infilling(llm.tokenizer, before, after)
        pairs.extend(zip(before, after, strict=True))
        return [encode_infilling(*pair, llm.tokenizer, suffix_first) for pair in pairs]

    how = {"starts_text": False, "end_ids": [llm.tokenizer.eot_id]}
    requests = run(llm, prompts_of(llm, encode, parameters, options, **how))
    results = []
    for (prefix, suffix), request in zip(pairs, requests, strict=True):
        text = request.output.text
        whole = prefix + text + suffix
        results.append(InfillingPrediction(generation=text, full_text=whole, **outcome_of(request)))
    return results


def embedded(llm: Llama, texts: Sequence[str], pooling: Pooling) -> Tensor:
    if pooling not in ("mean", "last"):
        raise ValueError(f"pooling is {pooling!r}: use 'mean' or 'last'")
    nothing = (0, 1, 0, False, False)  # generate no tokens
    prompts = prompts_of(llm, lambda: encoded(llm, texts), nothing, {}, pooling=pooling)
    pooled = []
    for request in run(llm, prompts):
        assert request.states is not None
        pooled.append(request.states.mean(dim=0) if pooling == "mean" else request.states[-1])
    if not pooled:
        return torch.empty(0, llm.model.params.dim, dtype=torch.float32)
    return torch.stack(pooled)


def answer_of(request: Request) -> Message:
    return Message(role="assistant", content=request.output.text)


def outcome_of(request: Request) -> Prediction:
    """The keys that all results have in common."""
    assert request.output.finish_reason is not None, "the request was not run to its end"
    params = request.prompt.params
    result = Prediction(finish_reason=request.output.finish_reason)
    if params.logprobs:
        result["tokens"] = [*request.prompt_pieces, *request.output.pieces]
        result["logprobs"] = logprobs_of(request)
    if params.top_logprobs:
        piece = request.output.detokenizer.tokenizer.piece
        scored = (*request.prompt_scores, *request.output.tokens)
        result["top_logprobs"] = [
            [(piece(token), logprob) for token, logprob in s.top] for s in scored
        ]
    return result


def logprobs_of(request: Request) -> list[float]:
    """The logprobs of the result's ids, which include the prompt's with echo."""
    return [scored.logprob for scored in (*request.prompt_scores, *request.output.tokens)]


def apply_check(llm: Llama, request: Request, check: Check | None) -> None:
    """Replace the answer with the refusal of `check`, if it returns one."""
    if check is None or request.prompt.refusal is not None:
        return
    refusal = llm.model.ranks.ask_first(lambda: refusal_of(check, request.output.text))
    if refusal is not None:
        refuse(request, refusal)


def input_refusal(check: Check, dialog: Dialog) -> str | None:
    """The refusal of the first system or user message that `check` refuses, or None."""
    for message in dialog:
        if message["role"] != "assistant":
            refusal = refusal_of(check, message["content"])
            if refusal is not None:
                return refusal
    return None


def refusal_of(check: Check, text: str) -> str | None:
    refusal = check(text)
    if refusal is None or isinstance(refusal, str):
        return refusal
    raise TypeError(f"a check returned {refusal!r}: return None, or the text of a refusal")
