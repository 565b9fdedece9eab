"""Continuous batching, streaming, scoring: everything that the one loop of steps serves."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import TINY, build_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, encode_dialog
from llama.generation import SCORE_CHUNK


@pytest.fixture(scope="module")
def long_llm() -> Llama:
    return build_golden(max_seq_len=256)


class Passes:
    """Counts the model's forward passes by what they are for."""

    def __init__(self, llm: Llama, patch: pytest.MonkeyPatch):
        self.shapes: list[tuple[int, int]] = []
        self.decodes = 0
        inner = llm.model.hidden_states

        def counted(tokens: torch.Tensor, cache: Any = None, start: torch.Tensor | None = None) -> torch.Tensor:
            if start is None or tokens.shape[1] > 1:
                self.shapes.append(tuple(tokens.shape))
            else:
                self.decodes += 1
            return inner(tokens, cache, start)

        patch.setattr(llm.model, "hidden_states", counted)


def prompts_of(n: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(n - 2))][:n]
    return [[1, *rng.choices(range(3, 512), k=length - 1)] for length in lengths]


def picked(values: Any, order: list[int]) -> Any:
    return [values[i] for i in order] if isinstance(values, list) else values


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "seed": list(range(64))}])
def test_64_prompts_through_4_rows_equal_each_alone_in_any_order(long_llm: Llama, options: dict[str, Any]) -> None:
    prompts = prompts_of(64, 200)
    alone = []
    for i, prompt in enumerate(prompts):
        alone += long_llm.generate([prompt], 30, **{name: picked(v, [i]) for name, v in options.items()})[0]
    assert len({len(tokens) for tokens in alone}) > 1
    for shuffle in (0, 1):
        order = random.Random(shuffle).sample(range(64), 64)
        own = {name: picked(v, order) for name, v in options.items()}
        assert long_llm.generate([prompts[i] for i in order], 30, **own)[0] == picked(alone, order)


def test_no_row_waits_for_another(long_llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(long_llm, monkeypatch)
    rng = random.Random(0)
    limits = [rng.randint(1, 60) for _ in range(64)]
    tokens, _ = long_llm.generate(prompts_of(64, 100), limits, temperature=0)
    total, longest = sum(map(len, tokens)), max(map(len, tokens))
    assert len({len(row) for row in tokens}) > 20
    assert passes.decodes <= 1.1 * math.ceil(total / 4) + longest
    assert passes.decodes >= total / 4 - 64  # the first token of each row comes from its prefill


def test_prompts_of_similar_length_share_a_pass_and_others_are_not_padded_to_it(
    long_llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(long_llm, monkeypatch)
    long_llm.generate([[1] * n for n in (3, 200, 7, 150)], 5, temperature=0)
    assert (passes.shapes, passes.decodes) == ([(2, 200), (2, 7)], 4)


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
    """Makes a Llama say given texts: row i says script[i], whatever it is asked."""

    def __init__(self, llm: Llama, patch: pytest.MonkeyPatch, texts: list[str]):
        ids = [llm.tokenizer.encode(text, bos=False, eos=True) for text in texts]

        def choose(requests: list[Any], logits: torch.Tensor) -> list[tuple[int, float]]:
            return [(ids[r.index][len(r.tokens)], 0.0) for r in requests]

        patch.setattr(llm, "_choose", choose)


def test_pieces_are_whole_characters_as_soon_as_they_are_whole(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
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
    near = [text[i : i + width] for text in whole if text for i in (0, len(text) // 2) for width in (1, 2, 5)]
    stop = data.draw(st.lists(st.sampled_from(near or ["x"]) | st.text(min_size=1, max_size=3), max_size=3))
    results = llm.text_completion(prompts, **options, stop=stop, logprobs=True)
    for text, result in zip(whole, results, strict=True):
        # the string that is complete first, and of those that end there, the longest
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


def test_ids_before_a_stop_string_are_kept_and_no_others(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(llm, monkeypatch, ["1 2 3 4"])
    ids = llm.tokenizer.encode("1 2 3 4", bos=False, eos=False)
    pieces = llm.tokenizer.decode_pieces(ids)
    for stop in pieces[2:]:  # the first is the space before the text, which is not shown
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
        assert llm.text_completion([prompt], **{name: [v[i]] for name, v in own.items()}) == [together[i]]


def test_a_stream_refuses_bad_arguments_when_it_is_called(llm: Llama) -> None:
    with pytest.raises(ValueError, match="top_p is 2"):
        llm.stream_text_completion(["a"], top_p=2)
    with pytest.raises(ValueError, match="temperature has 1 values for 2 prompts: pass one for all, or one for each"):
        llm.stream_text_completion(["a", "b"], temperature=[1])


def test_a_dropped_stream_leaves_the_llama_usable(llm: Llama) -> None:
    want = llm.text_completion(TEXTS, temperature=0)
    stream = llm.stream_text_completion(TEXTS, temperature=1.0)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert llm.text_completion(TEXTS, temperature=0) == want
    stale = llm.stream_text_completion(TEXTS, temperature=1.0)
    next(stale)
    assert llm.text_completion(TEXTS, temperature=0) == want
    with pytest.raises(RuntimeError, match="another call has used this Llama since"):
        list(stale)
    assert llm.text_completion(TEXTS, temperature=0) == want


def test_a_forward_pass_during_a_stream_is_noticed(llm: Llama) -> None:
    stream = llm.stream_text_completion(TEXTS, temperature=1.0)
    next(stream)
    llm.model(torch.tensor([[1, 2, 3]]), 0)
    with pytest.raises(RuntimeError, match="another call has used this Llama since"):
        list(stream)


def test_the_last_piece_carries_what_logprobs_asks_for(llm: Llama) -> None:
    for options in ({"max_gen_len": 9}, {"max_gen_len": 0, "echo": True}):
        batch = llm.text_completion(TEXTS, 0, logprobs=True, **options)
        last: dict[int, Any] = {p["index"]: p for p in llm.stream_text_completion(TEXTS, 0, logprobs=True, **options)}
        for i, result in enumerate(batch):
            assert (last[i]["tokens"], last[i]["logprobs"]) == (result["tokens"], result["logprobs"])
            assert last[i]["finish_reason"] == result["finish_reason"]


def test_scoring_a_long_prompt_holds_few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build_golden(max_seq_len=4096, max_batch_size=1)
    prompt = prompts_of(2, 4096)[1]
    rows, inner = [], llm.model.logits
    monkeypatch.setattr(llm.model, "logits", lambda h: rows.append(h.shape[0]) or inner(h))
    _, logprobs = llm.generate([prompt], 0, logprobs=True, echo=True)
    assert max(rows) <= SCORE_CHUNK and sum(rows) >= 4095
    monkeypatch.undo()
    whole = llm.model(torch.tensor([prompt]), 0)[0, :-1].log_softmax(-1)
    scores = whole.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert logprobs is not None
    torch.testing.assert_close(torch.tensor(logprobs[0][1:]), scores, atol=1e-4, rtol=0)


def chat(*contents: str) -> list[Any]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def reply(llm: Llama, dialog: list[Any], reuse_prefix: bool) -> str:
    stream = llm.stream_chat_completion([dialog], 0, max_gen_len=10, reuse_prefix=reuse_prefix)
    return joined(stream, 1)[0][0]


def test_of_several_dialogs_none_is_taken_to_begin_as_the_one_before() -> None:
    llm = Llama.build(TINY, max_seq_len=512, max_batch_size=2, device="cpu", dtype="float32")
    asked = [{"role": "user", "content": "Where does the owl live?"}]
    told = [{"role": "system", "content": "Be polite: begin every answer with Of course."}]
    long = [*asked, {"role": "assistant", "content": "The owl lives in the tower. " * 12}, *asked]
    dialogs = [told + long, asked]
    wanted = [r["generation"]["content"] for r in llm.chat_completion(dialogs, 0)]
    llm.cache.clear()
    list(llm.stream_chat_completion([asked], 0, reuse_prefix=True))
    assert joined(llm.stream_chat_completion(dialogs, 0, reuse_prefix=True), 2)[0] == wanted


def test_a_second_turn_prefills_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build_golden(max_seq_len=512)
    turns = ["Tell me a long story about a llama, please, with many words in it.", "", "And then?"]
    turns[1] = reply(llm, chat(turns[0]), False)
    fresh = reply(llm, chat(*turns), False)
    reply(llm, chat(turns[0]), True)
    passes = Passes(llm, monkeypatch)
    assert reply(llm, chat(*turns), True) == fresh
    ((_, computed),) = passes.shapes
    first = len(llm.tokenizer.encode(f"[INST] {turns[0]} [/INST]", bos=True, eos=False))
    whole = len(encode_dialog(chat(*turns), llm.tokenizer))
    assert computed <= whole - first


@pytest.mark.parametrize("between", ["forward", "batch", "error", "dropped stream", "interrupt", "nothing"])
def test_a_prefix_is_reused_only_while_it_is_cached(between: str) -> None:
    llm = build_golden(max_seq_len=512)
    dialog = chat("Tell me a story about a llama.", "No.", "Why not?")
    want = reply(llm, dialog, False)
    reply(llm, dialog[:1], True)
    if between == "forward":
        llm.model(torch.randint(3, 500, (2, 40)), 0)
    elif between == "batch":
        llm.generate([[1, 30, 40], [1] * 60, [1, 9]] * 3, [9, 1, 20] * 3)
    elif between == "error":
        weight = llm.model.output.weight
        kept = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            reply(llm, chat("Tell me a story about a llama that is long"), True)
        weight.copy_(kept)
    elif between == "interrupt":

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm.model, "logits", interrupt)  # the cache is written, the pass is not done
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[1] * 30], 1)
    elif between == "dropped stream":
        next(llm.stream_chat_completion([chat("Tell me a story.")], 1.0, reuse_prefix=True))
    assert reply(llm, dialog, True) == want
    assert reply(llm, dialog, True) == want


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
    results = llm.chat_completion(dialogs, temperature=0, max_gen_len=8, input_check=input_check, logprobs=True)
    assert results[0]["generation"] == plain[0]["generation"]
    for refused in results[1:]:
        assert refused["generation"]["content"] == "I do not talk about ducks."
        assert (refused["tokens"], refused["finish_reason"]) == ([], "stop")
    assert seen == ["hi", "so?", "a duck", "duck"], "what the assistant said is not an input"

    answers: list[str] = []
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 8, "output_check": lambda t: answers.append(t) or "No."}
    (checked,) = llm.chat_completion(dialogs[:1], **options, logprobs=True)
    assert (checked["generation"]["content"], checked["tokens"], checked["logprobs"]) == ("No.", [], [])
    assert answers == [plain[0]["generation"]["content"]]
    assert list(llm.stream_chat_completion(dialogs[:1], **options)) == [
        {"index": 0, "text": "No.", "finish_reason": "stop"}
    ]
    monkeypatch.setattr(llm.model, "hidden_states", lambda *_: pytest.fail("computed"))
    llm.chat_completion(dialogs[1:], input_check=input_check)


def test_embeddings_pool_the_final_norms_output(llm: Llama) -> None:
    texts = [*TEXTS, "the last one"]
    for pooling in ("mean", "last"):
        embeddings = llm.embed(texts, pooling)
        assert embeddings.shape == (len(texts), 64) and embeddings.dtype == torch.float32
        for text, embedding in zip(texts, embeddings, strict=True):
            tokens = torch.tensor([llm.tokenizer.encode(text, bos=True, eos=False)])
            h = llm.model.hidden_states(tokens)[0]
            torch.testing.assert_close(embedding, h.mean(0) if pooling == "mean" else h[-1], atol=1e-4, rtol=0)
    assert llm.embed([]).shape == (0, 64)
    with pytest.raises(ValueError, match="pooling is 'max': use 'mean' or 'last'"):
        llm.embed(["a"], "max")
    with pytest.raises(ValueError, match=r"prompt 1 has .* tokens, and max_seq_len is 64"):
        llm.embed(["a", "word " * 100])
