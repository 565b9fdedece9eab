"""Continuous batching, streaming and scoring: everything that the engine's steps serve."""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import TINY, build_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, encode_dialog, generation
from llama.cache import DecodeBatch, PrefillBatch
from llama.engine import Engine, Prompt, ScoredToken, make_prompts
from llama.engine.engine import ModelVersion
from llama.engine.scheduler import CHUNK, SCORE_CHUNK
from llama.sampling import params_of, streams_of


@pytest.fixture(scope="module")
def long_llm() -> Llama:
    return build_golden(max_seq_len=256)


class Passes:
    """Counts decode passes and records the shapes of all other passes."""

    def __init__(self, llm: Llama, patch: pytest.MonkeyPatch):
        self.shapes: list[tuple[int, int]] = []
        self.decodes = 0
        inner = llm.model.forward

        def counted(tokens: torch.Tensor, start_pos: Any) -> torch.Tensor:
            if isinstance(start_pos, DecodeBatch):
                self.decodes += 1
            else:
                self.shapes.append(tuple(tokens.shape))
            return inner(tokens, start_pos)

        patch.setattr(llm.model, "forward", counted)


def asked(llm: Llama, prompts: list[list[int]], limit: int = 256, **options: Any) -> list[Prompt]:
    """Return these token ids as prompts for the engine."""
    params = params_of(len(prompts), {"top_p": 0.9, "seed": 1} | options)
    streams = streams_of(len(prompts), options.get("seed", 1))
    return make_prompts(llm.tokenizer, prompts, params, limit, streams=streams)


def prompts_of(n: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(n - 2))][:n]
    return [[1, *rng.choices(range(3, 512), k=length - 1)] for length in lengths]


def picked(values: Any, order: list[int]) -> Any:
    return [values[i] for i in order] if isinstance(values, list) else values


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.8, "seed": list(range(64))}]
)
def test_64_prompts_through_4_rows_equal_each_alone_in_any_order(
    long_llm: Llama, options: dict[str, Any]
) -> None:
    prompts = prompts_of(64, 200)
    alone = []
    for i, prompt in enumerate(prompts):
        alone += long_llm.generate(
            [prompt], 30, **{name: picked(v, [i]) for name, v in options.items()}
        )[0]
    assert len({len(tokens) for tokens in alone}) > 1
    for shuffle in (0, 1):
        order = random.Random(shuffle).sample(range(64), 64)
        own = {name: picked(v, order) for name, v in options.items()}
        assert long_llm.generate([prompts[i] for i in order], 30, **own)[0] == picked(alone, order)


@pytest.fixture(scope="module")
def alone(long_llm: Llama) -> dict[float, list[list[int]]]:
    """Outputs of 64 ragged prompts, each run alone and without drafts, by temperature."""
    prompts = prompts_of(64, 60, seed=1)
    return {
        warm: [long_llm.generate([p], 20, warm, seed=[i])[0][0] for i, p in enumerate(prompts)]
        for warm in (0, 0.8)
    }


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("warm", [0, 0.8])
def test_neither_chunks_nor_drafts_nor_cancelled_neighbours_change_an_answer(
    long_llm: Llama, alone: dict[float, list[list[int]]], chunk: int, drafts: int, warm: float
) -> None:
    prompts = prompts_of(64, 60, seed=1)
    engine = Engine(long_llm.model, long_llm.tokenizer, draft_tokens=drafts)
    engine.scheduler.chunk = engine.scheduler.long_chunk = chunk
    rng = random.Random(chunk + drafts)
    others = [rng.choice(prompts)[: rng.randint(1, 40)] + [7, 8, 9] * 5 for _ in range(64)]

    def requests(prompts: list[list[int]], limit: int) -> list[Prompt]:
        return asked(long_llm, prompts, max_tokens=limit, temperature=warm, seed=list(range(64)))

    with engine.running(requests(others, 5)) as earlier:  # leaves prefixes in the slots
        for _ in engine.progress(earlier):
            pass
    ours, theirs = requests(prompts, 20), requests(others, 60)
    order = rng.sample([*enumerate(ours), *((None, request) for request in theirs)], 128)
    answers: list[Any] = [None] * 64
    doomed = []
    for i, request in order:
        answer = engine.submit(request)
        if i is None:
            doomed.append(answer)
        else:
            answers[i] = answer
    for step, _ in enumerate(engine.progress(answers)):
        if step % 3 == 0 and len(doomed) > 32:  # during waiting, prefill or decoding
            engine.cancel(doomed.pop(rng.randrange(len(doomed))))
    assert [answer.answer_ids for answer in answers] == alone[warm]
    for answer in doomed:
        engine.cancel(answer)
    engine.step()
    assert engine.scheduler.running == {} and not engine.scheduler.waiting


@pytest.mark.parametrize("state", ["waiting", "half fed", "answering"])
def test_a_cancelled_answer_frees_its_row_at_the_next_step(long_llm: Llama, state: str) -> None:
    engine = Engine(long_llm.model, long_llm.tokenizer)
    engine.scheduler.chunk = engine.scheduler.long_chunk = 10
    options = {"max_tokens": 50, "temperature": 0}
    # Ids that no other case has left in a slot as a prefix.
    begin = {"waiting": 20, "half fed": 70, "answering": 120}[state]
    wanted = asked(long_llm, [[1, *range(begin, begin + 40)]], **options)
    answers = [engine.submit(request) for request in wanted * (5 if state == "waiting" else 4)]
    while state == "answering" and not answers[-1].output.pieces:
        engine.step()
    engine.step()
    assert bool(answers[-1].output.pieces) == (state == "answering")
    assert (answers[-1] in engine.scheduler.waiting) == (state == "waiting")
    engine.cancel(answers[-1])
    last = engine.submit(asked(long_llm, [[1, 30]], **options)[0])
    engine.step()
    running = list(engine.scheduler.running.values())
    assert answers[-1] not in running and (last in running) == (state != "waiting")
    for _ in engine.progress([last, *answers[:-1]]):
        pass
    assert last.answer_ids == long_llm.generate([[1, 30]], 50, 0)[0][0]


def test_rows_that_answer_wait_for_no_more_than_a_chunk_of_a_new_prompt(
    long_llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = Passes(long_llm, monkeypatch).shapes
    engine = Engine(long_llm.model, long_llm.tokenizer)
    first, second = asked(long_llm, [[1, 30], [1, *range(20, 220)]], max_tokens=40, temperature=0.9)
    answers = [engine.submit(first)]
    engine.step()
    shapes.clear()
    answers.append(engine.submit(second))
    while not answers[1].output.pieces:
        before = len(answers[0].output.pieces)
        engine.step()
        assert (
            len(answers[0].output.pieces) == before + 1 and shapes.pop()[1] <= CHUNK and not shapes
        )
    for _ in engine.progress(answers):
        pass


def test_threads_share_passes_and_each_gets_its_own_answers(long_llm: Llama) -> None:
    prompts = prompts_of(24, 200, seed=2)
    want = [
        long_llm.generate([prompt], 30, 0.7, seed=[i])[0][0] for i, prompt in enumerate(prompts)
    ]
    before = long_llm.engine.passes
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        got[i] = long_llm.generate([prompts[i]], 30, 0.7, seed=[i])[0][0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(24)] == want
    assert long_llm.engine.passes - before < sum(map(len, want)) * 0.8, "they did not share"


def test_an_output_check_may_ask_the_same_llama_amid_a_stream(llm: Llama) -> None:
    def check(text: str) -> str | None:
        return llm.text_completion([text[:9]], 0, max_gen_len=3)[0]["generation"]

    dialogs = [chat(text) for text in ("one", "two two", "three", "four", "five", "six")]
    want = [
        r["generation"]["content"]
        for r in llm.chat_completion(dialogs, 0, max_gen_len=9, output_check=check)
    ]
    stream = llm.stream_chat_completion(dialogs, 0, max_gen_len=9, output_check=check)
    assert joined(stream, len(dialogs))[0] == want


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_check_that_raises_leaves_other_streams_running(
    llm: Llama, error: type[BaseException]
) -> None:
    want = llm.text_completion(TEXTS, 0, max_gen_len=20)
    stream = llm.stream_text_completion(TEXTS, 0, max_gen_len=20)
    begun = [next(stream), next(stream)]

    def check(text: str) -> str | None:
        raise error

    for checks in ({"input_check": check}, {"output_check": check}):
        with pytest.raises(error):
            llm.chat_completion([chat("hi")], 0, max_gen_len=5, **checks)
        with pytest.raises(error):
            list(llm.stream_chat_completion([chat("hi")], 0, max_gen_len=5, **checks))
    assert joined(iter([*begun, *stream]), len(TEXTS))[0] == [
        result["generation"] for result in want
    ]


def test_a_failed_pass_ends_the_answers_that_were_in_it(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = llm.text_completion(TEXTS, 0, max_gen_len=20)
    inner = llm.model.forward
    failing = False

    def fail(tokens: torch.Tensor, start_pos: Any) -> torch.Tensor:
        if failing and isinstance(start_pos, PrefillBatch):
            raise torch.OutOfMemoryError("no room")
        return inner(tokens, start_pos)

    monkeypatch.setattr(llm.model, "forward", fail)
    stream = llm.stream_text_completion(TEXTS[:2], 0, max_gen_len=20)
    begun = [next(stream), next(stream)]
    failing = True
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        llm.generate([[1] * 30], 5)
    failing = False
    assert joined(iter([*begun, *stream]), 2)[0] == [result["generation"] for result in want[:2]]


def test_a_request_whose_logits_are_not_finite_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build_golden()
    prompts = [[1, 30, 31], [1, 40, 41], [1, 50, 51]]
    want = llm.generate(prompts, 12, 0)[0]
    inner = llm.model.tok_embeddings.forward
    bad = torch.tensor(40)
    monkeypatch.setattr(
        llm.model.tok_embeddings,
        "forward",
        lambda t: inner(t).masked_fill((t == bad)[..., None], torch.nan),
    )
    llm.clear_cache()
    answers = [
        llm.engine.submit(prompt)
        for prompt in asked(llm, prompts, 64, max_tokens=12, temperature=0)
    ]
    while not all(answer.over for answer in answers):
        llm.engine.step()
    assert [answers[0].answer_ids, answers[2].answer_ids] == [want[0], want[2]]
    assert str(answers[1].error).startswith("logits are not finite (prompt 1, position 2, float32)")
    monkeypatch.undo()
    assert all(cached.isfinite().all() for cached in (*llm.engine.cache.k, *llm.engine.cache.v))
    assert llm.generate(prompts, 12, 0)[0] == want


def test_a_stream_that_fails_in_a_step_of_another_call_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = build_golden()
    stream = llm.stream_text_completion(["a", "b"], 0, max_gen_len=20)
    begun = {next(stream)["index"], next(stream)["index"]}
    weight = llm.model.output.weight
    kept = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        llm.generate([[1, 30]], 3)
    weight.copy_(kept)
    assert begun <= {0, 1}
    with pytest.raises(ValueError, match="logits are not finite"):
        list(stream)
    assert llm.generate([[1, 30]], 3, 0) == build_golden().generate([[1, 30]], 3, 0)


@pytest.mark.parametrize("how", ["written to", "loaded", "converted"])
def test_what_was_computed_with_other_weights_is_not_reused(how: str) -> None:
    llm, prompt = build_golden(), [1, 30, 31, 32, 33, 34]
    llm.generate([prompt], 6, 0)
    with torch.no_grad():
        if how == "written to":
            llm.model.tok_embeddings.weight[30:] *= 2
        elif how == "loaded":
            llm.model.load_state_dict({name: 1.5 * t for name, t in llm.model.state_dict().items()})
        else:
            llm.model.bfloat16().float()
    again = llm.generate([prompt], 6, 0, logprobs=True)
    llm.engine.cache.clear()
    assert again == llm.generate([prompt], 6, 0, logprobs=True)


def test_a_users_own_pass_does_not_stand_in_for_what_is_scored(long_llm: Llama) -> None:
    engine, prompts = (
        Engine(long_llm.model, long_llm.tokenizer),
        [[1, *range(300, 320)], [1, *range(100, 140)]],
    )
    requests = asked(long_llm, prompts, max_tokens=[60, 2], logprobs=True, echo=True)
    answers = [engine.submit(requests[0])]
    while len(answers[0].output.pieces) < 2:
        engine.step()
    answers.append(engine.submit(requests[1]))
    engine.step()  # partly prefilled
    long_llm.model(torch.tensor([prompts[1], prompts[1]]), 0)
    for _ in engine.progress(answers):
        pass
    (want,) = long_llm.generate(prompts[1:], 2, 0, logprobs=True, echo=True)[1] or []
    assert [score.logprob for score in answers[1].prompt_scores] == pytest.approx(
        want[: len(prompts[1])], abs=1e-4
    )


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line of the engine that runs inside the `with` block.

    A signal handler can do the same: Python runs it between any two lines.
    """

    FILES = (
        "engine/engine.py",
        "engine/request.py",
        "engine/scheduler.py",
        "engine/runner.py",
        "llama/cache.py",
    )

    def __init__(self, line: int, functions: tuple[str, ...] = ()):
        """Count only the lines of `functions`; by default, of all functions in FILES."""
        self.left = line
        self.functions = functions

    def __enter__(self) -> Interrupter:
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        reads_only = isinstance(frame.f_locals.get("self"), ModelVersion)
        if reads_only or not frame.f_code.co_filename.endswith(self.FILES):
            return None
        if event == "line" and (not self.functions or frame.f_code.co_name in self.functions):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def test_an_interrupt_at_any_line_of_a_call_leaves_the_engine_usable(llm: Llama) -> None:
    want = llm.generate([[1, 30, 40]], 3, 0)
    other = llm.text_completion(["a text"], 0, max_gen_len=6)
    line = 0
    interrupted = True
    while interrupted:
        line += 1
        stream = llm.stream_text_completion(["a text"], 0, max_gen_len=6)
        begun = [next(stream)]
        try:
            with Interrupter(line, ("progress", "running", "submit", "cancel", "step")):
                assert llm.generate([[1, 30, 40]], 3, 0) == want
            interrupted = False
        except KeyboardInterrupt:
            pass
        assert llm.generate([[1, 30, 40]], 3, 0) == want, line
        assert joined(iter([*begun, *stream]), 1)[0] == [other[0]["generation"]], line
    assert line > 50


def test_a_stream_that_another_thread_finishes_keeps_its_end(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = llm.text_completion(["a text"], 0, max_gen_len=20)[0]["generation"]
    inner = generation.delta

    def late(request: Any, sent: int) -> tuple[str, bool]:
        found = inner(request, sent)
        for _ in llm.engine.progress([request]):  # as another thread may do at this point
            pass
        return found

    monkeypatch.setattr(generation, "delta", late)
    texts, reasons = joined(llm.stream_text_completion(["a text"], 0, max_gen_len=20), 1)
    assert texts == [want] and reasons == ["length"]


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3])
def test_an_interrupt_at_any_line_leaves_no_answer_with_half_a_token(drafts: int) -> None:
    llm = build_golden(prompt_lookup_num_tokens=drafts, max_batch_size=3)
    prompts = [[1, 30, 40, 50, 30, 40, 50, 30], [1, 60, 61, 60, 61, 60]]
    options: dict[str, Any] = {
        "temperature": 0.9,
        "seed": [4, 5],
        "logprobs": True,
        "echo": True,
        "stop": ["zz"],
    }
    want = llm.generate(prompts, 5, **options)
    other = llm.generate([[1, 70, 71]], 2, 0.9, seed=[6])
    line = 0
    while True:
        line += 1
        engine = llm.engine
        llm.clear_cache()
        requests = [
            engine.submit(prompt) for prompt in asked(llm, prompts, 64, max_tokens=5, **options)
        ]
        for _ in range(line % 3):  # in the middle of a prompt or an output
            engine.step()
        late = engine.submit(
            asked(llm, [[1, 70, 71]], 64, max_tokens=2, temperature=0.9, seed=[6])[0]
        )
        interrupted = False
        try:
            with Interrupter(line):
                engine.step()
                engine.step()
        except KeyboardInterrupt:
            interrupted = True
        for _ in engine.progress([*requests, late]):
            pass
        assert [request.token_ids for request in requests] == want[0], line
        for request, logprobs in zip(requests, want[1] or [], strict=True):
            scored = (*request.prompt_scores, *request.output.tokens)
            assert [token.logprob for token in scored] == pytest.approx(logprobs, abs=1e-4), line
            pieces = (*request.prompt_pieces, *request.output.pieces)
            assert "".join(pieces) == request.full_text, line
        assert late.answer_ids == other[0][0], line
        if not interrupted and line % 3 == 2:
            break
    assert line > 300


def test_drafts_need_fewer_passes_where_an_answer_is_in_the_prompt() -> None:
    llm = Llama.build(TINY, max_seq_len=512, max_batch_size=1, device="cpu", dtype="float32")
    known = {
        "Where does the bear live?": "The bear lives in the cave.",
        "What does the cow eat?": "The cow eats grass.",
        "What does the rabbit eat?": "The rabbit eats carrots.",
    }
    text = "".join(
        f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in known.items()
    )
    prompts = [f"{text}{text}Question: {question}\nAnswer:" for question in known]
    passes = []
    for drafts in (0, 3):
        llm.engine.scheduler.draft_tokens = drafts
        before = llm.engine.passes
        results = llm.text_completion(prompts, 0, stop="\n")
        assert [result["generation"] for result in results] == list(known.values())
        passes.append(llm.engine.passes - before)
    assert passes[1] < 0.7 * passes[0], passes


def test_no_row_waits_for_another(long_llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(long_llm, monkeypatch)
    rng = random.Random(0)
    limits = [rng.randint(1, 60) for _ in range(64)]
    tokens, _ = long_llm.generate(prompts_of(64, 100), limits, temperature=0)
    total, longest = sum(map(len, tokens)), max(map(len, tokens))
    assert len({len(row) for row in tokens}) > 20
    assert passes.decodes <= 1.1 * math.ceil(total / 4) + longest
    assert passes.decodes >= total / 4 - 64  # prefill gives each request's first token


def test_prompts_of_all_lengths_share_a_pass_without_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = build_golden(max_seq_len=256)
    passes = Passes(llm, monkeypatch)
    llm.generate([[i] * n for i, n in enumerate((3, 200, 7, 150), 10)], 5, temperature=0)
    assert (passes.shapes, passes.decodes) == ([(1, 360)], 4)


def joined(stream: Iterator[Any], n: int) -> tuple[list[str], list[str | None]]:
    texts, reasons = [""] * n, [None] * n
    for piece in stream:
        assert reasons[piece["index"]] is None, "a piece after the last one"
        texts[piece["index"]] += piece["text"]
        reasons[piece["index"]] = piece.get("finish_reason")
    return texts, reasons


TEXTS = ["  two spaces", "emoji 🦙🦙", "中文字符", "", "plain", " é", "a\n\nb"]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stop", [(), ["e", " t", "ing", "中"]])
def test_joined_streams_equal_the_batch(llm: Llama, echo: bool, stop: tuple[str, ...]) -> None:
    options = {"temperature": 0.9, "top_p": 1.0, "max_gen_len": 40, "echo": echo, "stop": stop}
    for seed in range(5):
        batch = llm.text_completion(TEXTS, **options, seed=seed)
        texts, reasons = joined(llm.stream_text_completion(TEXTS, **options, seed=seed), len(TEXTS))
        assert texts == [result["generation"] for result in batch]
        assert reasons == [result["finish_reason"] for result in batch]


class Script:
    """Makes a Llama generate given texts: the output of prompt i is texts[i]."""

    def __init__(self, llm: Llama, patch: pytest.MonkeyPatch, texts: list[str]):
        ids = [llm.tokenizer.encode(text, bos=False, eos=True) for text in texts]

        def choose(
            requests: list[Any], numbers: list[int], logits: torch.Tensor
        ) -> list[ScoredToken]:
            rows = zip(requests, numbers, strict=True)
            return [ScoredToken(ids[request.prompt.index][number]) for request, number in rows]

        patch.setattr(llm.engine, "choose", choose)


def test_pieces_are_whole_characters_as_soon_as_they_are_whole(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["A llama 🦙 and 中文 and é.", "  leading spaces", "\ufffd is a character too"]
    Script(llm, monkeypatch, said)
    pieces = list(llm.stream_text_completion(["x"] * 3))
    for i, text in enumerate(said):
        own = [piece["text"] for piece in pieces if piece["index"] == i]
        assert "".join(own) == text and len(own) > 5
        assert sum("\ufffd" in piece for piece in own) == text.count("\ufffd")
        assert all(own[:-1]), "an empty piece says nothing"
    assert [piece["index"] for piece in pieces][:6] != [0] * 6, "rows take turns"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_stop_strings_in_any_batch_cut_where_the_first_one_begins(data: st.DataObject) -> None:
    llm = STOPPING
    n = data.draw(st.integers(1, 6))
    prompts = data.draw(st.lists(st.sampled_from(TEXTS), min_size=n, max_size=n))
    seeds = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    options = {"temperature": 0.9, "max_gen_len": 20, "seed": seeds}
    whole = [result["generation"] for result in llm.text_completion(prompts, **options)]
    near = [
        text[i : i + width]
        for text in whole
        if text
        for i in (0, len(text) // 2)
        for width in (1, 2, 5)
    ]
    stop = data.draw(
        st.lists(st.sampled_from(near or ["x"]) | st.text(min_size=1, max_size=3), max_size=3)
    )
    results = llm.text_completion(prompts, **options, stop=stop, logprobs=True)
    for text, result in zip(whole, results, strict=True):
        # The stop string that ends first counts; of several that end there, the longest.
        cuts = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        assert result["generation"] == text[: min(cuts, default=(0, len(text)))[1]]
        assert "".join(result["tokens"]) == result["generation"]
        assert len(result["tokens"]) == len(result["logprobs"])
        assert result["finish_reason"] == "stop" or not cuts
    texts, _ = joined(llm.stream_text_completion(prompts, **options, stop=stop), n)
    assert texts == [result["generation"] for result in results]


STOPPING = build_golden(max_batch_size=3)


def test_stop_strings_that_overlap_cut_alike_however_the_text_is_split(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stop in (["b cd", "c"], ["c", "b cd"]):
        for said in ("a b cd e", "a  b cd"):
            Script(llm, monkeypatch, [said])
            assert llm.text_completion(["x"], stop=stop)[0]["generation"] == said[: said.index("c")]


def test_ids_before_a_stop_string_are_kept_and_no_others(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(llm, monkeypatch, ["1 2 3 4"])
    ids = llm.tokenizer.encode("1 2 3 4", bos=False, eos=False)
    pieces = llm.tokenizer.decode_pieces(ids)
    for stop in pieces[2:]:  # the first piece is the space before the text, which is not shown
        tokens, _ = llm.generate([[1]], 20, stop=stop)
        assert tokens[0] == ids[: pieces.index(stop)]


def test_each_prompt_may_have_settings_of_its_own(llm: Llama) -> None:
    own: dict[str, list[Any]] = {
        "temperature": [0, 1.0, 0.5],
        "top_p": [1.0, 0.5, 0.9],
        "max_gen_len": [3, 20, 7],
        "seed": [4, 5, 6],
        "stop": [[], ["e", "a"], "o"],
    }
    together = llm.text_completion(["a", "b", "c"], **own)
    for i, prompt in enumerate("abc"):
        assert llm.text_completion([prompt], **{name: [v[i]] for name, v in own.items()}) == [
            together[i]
        ]


def test_a_stream_refuses_bad_arguments_when_it_is_called(llm: Llama) -> None:
    with pytest.raises(ValueError, match="top_p is 2"):
        llm.stream_text_completion(["a"], top_p=2)
    with pytest.raises(
        ValueError,
        match="temperature has 1 values for 2 prompts: pass one for all, or one for each",
    ):
        llm.stream_text_completion(["a", "b"], temperature=[1])


def test_a_dropped_stream_leaves_the_llama_usable(llm: Llama) -> None:
    want = llm.text_completion(TEXTS, temperature=0)
    stream = llm.stream_text_completion(TEXTS, temperature=1.0)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert llm.text_completion(TEXTS, temperature=0) == want


def test_streams_and_calls_in_between_share_one_llama(llm: Llama) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_gen_len": 30}
    want = llm.text_completion(TEXTS, **options), llm.text_completion(["b"], **options)
    streams = [llm.stream_text_completion(texts, **options) for texts in (TEXTS, ["b"])]
    begun = [[next(stream), next(stream)] for stream in streams]
    assert llm.text_completion(TEXTS, **options) == want[0]
    llm.model(torch.tensor([[1, 2, 3]] * 4), 0)  # overwrites the streams' cache
    for pieces, stream, results in zip(begun, streams, want, strict=True):
        texts, reasons = joined(iter([*pieces, *stream]), len(results))
        assert texts == [result["generation"] for result in results]
        assert reasons == [result["finish_reason"] for result in results]


def test_the_last_piece_carries_what_logprobs_asks_for(llm: Llama) -> None:
    for options in ({"max_gen_len": 9}, {"max_gen_len": 0, "echo": True}):
        batch = llm.text_completion(TEXTS, 0, logprobs=True, **options)
        last: dict[int, Any] = {
            p["index"]: p for p in llm.stream_text_completion(TEXTS, 0, logprobs=True, **options)
        }
        for i, result in enumerate(batch):
            assert last[i]["tokens"] == result["tokens"]
            assert last[i]["logprobs"] == pytest.approx(result["logprobs"], abs=1e-4)
            assert last[i]["finish_reason"] == result["finish_reason"]


def test_scoring_a_long_prompt_holds_few_logits_at_once() -> None:
    llm = build_golden(max_seq_len=4096, max_batch_size=1)
    prompt = prompts_of(2, 4096)[1]
    rows: list[int] = []
    handle = llm.model.output.register_forward_hook(lambda module, x, y: rows.append(x[0].shape[0]))
    _, logprobs = llm.generate([prompt], 0, logprobs=True, echo=True)
    assert max(rows) <= SCORE_CHUNK and sum(rows) >= 4095
    handle.remove()
    whole = llm.model(torch.tensor([prompt]), 0)[0, :-1].log_softmax(-1)
    scores = whole.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert logprobs is not None
    torch.testing.assert_close(torch.tensor(logprobs[0][1:]), scores, atol=1e-4, rtol=0)


def chat(*contents: str) -> list[Any]:
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def reply(llm: Llama, dialog: list[Any]) -> str:
    return joined(llm.stream_chat_completion([dialog], 0, max_gen_len=10), 1)[0][0]


def test_a_second_turn_computes_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build_golden(max_seq_len=512)
    passes = Passes(llm, monkeypatch)
    turns = ["Tell me a long story about a llama, please, with many words in it.", "", "And then?"]
    turns[1] = reply(llm, chat(turns[0]))
    fresh = reply(build_golden(max_seq_len=512), chat(*turns))
    passes.shapes.clear()
    assert reply(llm, chat(*turns)) == fresh
    ((_, computed),) = passes.shapes
    first = len(llm.tokenizer.encode(f"[INST] {turns[0]} [/INST]", bos=True, eos=False))
    whole = len(encode_dialog(chat(*turns), llm.tokenizer))
    assert computed <= whole - first


def test_eight_conversations_in_turn_compute_only_what_is_new() -> None:
    llm, fresh = (
        Llama.build(TINY, max_seq_len=512, max_batch_size=8, device="cpu", dtype="float32")
        for _ in range(2)
    )
    system = [{"role": "system", "content": "Answer like a pirate."}]
    animals = ("owl", "bear", "fox", "cow", "rabbit", "horse", "hen", "cat")
    asked = [f"Where does the {animal} live?" for animal in animals]
    dialogs: list[list[Any]] = [[*system] for _ in asked]
    new = 0
    for turn in ("{}", "And what does it eat? {}", "Who is its friend? {}", "Thank you. {}"):
        for number, question in enumerate(asked):
            dialog = dialogs[number]
            before = len(encode_dialog(dialog[:-1], llm.tokenizer)) if len(dialog) > 1 else 0
            answered = (
                len(llm.tokenizer.encode(dialog[-1]["content"], bos=False, eos=False))
                if before
                else 0
            )
            dialog.append({"role": "user", "content": turn.format(question)})
            (result,) = llm.chat_completion([dialog], 0, max_gen_len=30, logprobs=True)
            fresh.clear_cache()
            assert (
                fresh.chat_completion([dialog], 0, max_gen_len=30)[0]["generation"]
                == result["generation"]
            )
            new += (
                len(encode_dialog(dialog, llm.tokenizer))
                - before
                - answered
                + len(result["tokens"])
            )
            dialog.append(result["generation"])
    assert llm.engine.tokens <= 1.2 * new, (llm.engine.tokens, new)


@pytest.mark.parametrize(
    "between", ["forward", "batch", "error", "dropped stream", "interrupt", "nothing"]
)
def test_a_prefix_is_reused_only_while_it_is_cached(between: str) -> None:
    llm = build_golden(max_seq_len=512)
    dialog = chat("Tell me a story about a llama.", "No.", "Why not?")
    want = reply(build_golden(max_seq_len=512), dialog)
    reply(llm, dialog[:1])
    if between == "forward":
        llm.model(torch.randint(3, 500, (2, 40)), 0)
    elif between == "batch":
        llm.generate([[1, 30, 40], [1] * 60, [1, 9]] * 3, [9, 1, 20] * 3)
    elif between == "error":
        weight = llm.model.output.weight
        kept = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            reply(llm, chat("Tell me a story about a llama that is long"))
        weight.copy_(kept)
    elif between == "interrupt":

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            # The cache has been written, but the pass is not complete.
            patch.setattr(llm.model.output, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[1] * 30], 1)
    elif between == "dropped stream":
        next(llm.stream_chat_completion([chat("Tell me a story.")], 1.0))
    assert reply(llm, dialog) == want
    assert reply(llm, dialog) == want


def test_checks_refuse_inputs_before_they_cost_anything_and_answers_after(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def input_check(text: str) -> str | None:
        seen.append(text)
        return "I do not talk about ducks." if "duck" in text else None

    dialogs = [
        chat("hi", "no duck", "so?"),
        chat("a duck", "no", "go on"),
        [{"role": "system", "content": "duck"}, *chat("hi")],
    ]
    plain = llm.chat_completion(dialogs[:1], temperature=0, max_gen_len=8)
    results = llm.chat_completion(
        dialogs, temperature=0, max_gen_len=8, input_check=input_check, logprobs=True
    )
    assert results[0]["generation"] == plain[0]["generation"]
    for refused in results[1:]:
        assert refused["generation"]["content"] == "I do not talk about ducks."
        assert (refused["tokens"], refused["finish_reason"]) == ([], "stop")
    assert seen == ["hi", "so?", "a duck", "duck"], "what the assistant said is not an input"

    answers: list[str] = []
    options: dict[str, Any] = {
        "temperature": 0,
        "max_gen_len": 8,
        "output_check": lambda t: answers.append(t) or "No.",
    }
    (checked,) = llm.chat_completion(dialogs[:1], **options, logprobs=True)
    assert (checked["generation"]["content"], checked["tokens"], checked["logprobs"]) == (
        "No.",
        [],
        [],
    )
    assert answers == [plain[0]["generation"]["content"]]
    assert list(llm.stream_chat_completion(dialogs[:1], **options)) == [
        {"index": 0, "text": "No.", "finish_reason": "stop"}
    ]
    monkeypatch.setattr(llm.model, "forward", lambda *_: pytest.fail("computed"))
    llm.chat_completion(dialogs[1:], input_check=input_check)


def final_norm(llm: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Return the output of the final norm, (seqlen, dim), for tokens (1, seqlen)."""
    seen: list[torch.Tensor] = []
    handle = llm.model.norm.register_forward_hook(lambda module, x, y: seen.append(y[0]))
    llm.model(tokens, 0)
    handle.remove()
    return seen[0]


def test_embeddings_pool_the_final_norms_output(llm: Llama) -> None:
    texts = [*TEXTS, "the last one"]
    for pooling in ("mean", "last"):
        embeddings = llm.embed(texts, pooling)
        assert embeddings.shape == (len(texts), 64) and embeddings.dtype == torch.float32
        for text, embedding in zip(texts, embeddings, strict=True):
            tokens = torch.tensor([llm.tokenizer.encode(text, bos=True, eos=False)])
            h = final_norm(llm, tokens)
            torch.testing.assert_close(
                embedding, h.mean(0) if pooling == "mean" else h[-1], atol=1e-4, rtol=0
            )
    assert llm.embed([]).shape == (0, 64)
    with pytest.raises(ValueError, match="pooling is 'max': use 'mean' or 'last'"):
        llm.embed(["a"], "max")
    with pytest.raises(ValueError, match=r"prompt 1 has .* tokens, and max_seq_len is 64"):
        llm.embed(["a", "word " * 100])
