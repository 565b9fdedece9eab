"""Unmodified clients of OpenAI's API against a real server."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import tiktoken
import torch
from conftest import TINY
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from serving import Served, http_get, http_post

from llama import Llama
from llama.engine import Prompt, Request, ScoredToken, make_prompts
from llama.engine.request import extended
from llama.errors import ArgumentError
from llama.openai.completions import ChatCompletion, TextCompletion
from llama.openai.fields import NOT_SUPPORTED, BadRequest, Fields, refused, sampling_fields
from llama.options import option
from llama.sampling import SamplingParams
from llama.server.service import Call, Service

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

FOX = [{"role": "user", "content": "Where does the fox live?"}]
FLAGS = ("--max_seq_len", "256", "--max_batch_size", "4", "--dtype", "float32")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*FLAGS) as served:
        yield served
    assert served.status == 0, served.log


@pytest.fixture(scope="module")
def tiny() -> Llama:
    """The library itself, for comparison."""
    return Llama.build(TINY, max_seq_len=256, max_batch_size=4, dtype="float32", device="cpu")


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def post(served: Served, path: str, **body: Any) -> httpx.Response:
    return http_post(served.url + path, json=body, timeout=60)


def refusal(served: Served, path: str, **body: Any) -> dict[str, Any]:
    """Return the error with which the server refuses a body."""
    answer = post(served, path, **body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert (
        error.keys() == {"message", "type", "param", "code"}
        and error["type"] == "invalid_request_error"
    )
    return error


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "llama-2-tiny", "messages": FOX, "temperature": 0} | options
    )


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "llama-2-tiny", "prompt": prompt, "temperature": 0} | options
    )


def test_an_answer_is_the_librarys_own(client: openai.OpenAI, tiny: Llama) -> None:
    want = tiny.chat_completion([FOX], temperature=0, logprobs=True, top_logprobs=3)[0]
    got = chat(client, logprobs=True, top_logprobs=3)
    (choice,) = got.choices
    assert (choice.message.role, choice.message.content) == (
        "assistant",
        want["generation"]["content"],
    )
    assert choice.finish_reason == want["finish_reason"] == "stop"
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
        want["logprobs"], abs=1e-4
    )
    for token, top in zip(choice.logprobs.content, want["top_logprobs"], strict=True):
        assert [other.token for other in token.top_logprobs] == [text for text, _ in top]
        assert token.bytes == list(token.token.encode())
    generated = len(want["tokens"])
    assert (got.usage.completion_tokens, got.usage.total_tokens) == (
        generated,
        got.usage.prompt_tokens + generated,
    )


def test_a_seed_draws_what_the_library_draws_and_none_draws_another_each_time(
    client: openai.OpenAI, tiny: Llama
) -> None:
    options = {"temperature": 5, "top_p": 1.0, "max_tokens": 20}
    want = tiny.chat_completion([FOX], 5, 1.0, 20, seed=7)[0]["generation"]["content"]
    assert chat(client, seed=7, **options).choices[0].message.content == want
    drawn = {chat(client, **options).choices[0].message.content for _ in range(4)}
    assert len(drawn) > 1
    several = chat(client, seed=7, n=3, **options).choices
    assert [choice.index for choice in several] == [0, 1, 2]
    assert (
        several[0].message.content == want
        and len({choice.message.content for choice in several}) > 1
    )


def test_the_pieces_of_a_stream_join_to_the_answer(client: openai.OpenAI) -> None:
    want = chat(client, logprobs=True, n=2).choices
    texts, tokens, reasons = ["", ""], [list[str](), list[str]()], [None, None]
    chunks = list(
        chat(client, logprobs=True, n=2, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert chunk.usage is None and reasons[choice.index] is None
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += (
            [token.token for token in choice.logprobs.content] if choice.logprobs else []
        )
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in want] and reasons == ["stop", "stop"]
    assert tokens == [[token.token for token in choice.logprobs.content] for choice in want]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == sum(map(len, tokens))
    assert all(chunk.choices for chunk in chat(client, stream=True)), (
        "usage comes only where it is asked for"
    )


def test_prompts_are_texts_or_ids_alone_or_in_lists(client: openai.OpenAI, tiny: Llama) -> None:
    texts = ["The fox lives", "The owl"]
    want = [
        result["generation"] for result in tiny.text_completion(texts, temperature=0, max_gen_len=8)
    ]
    ids = [tiny.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    for prompts in (texts, ids):
        assert [choice.text for choice in complete(client, prompts, max_tokens=8).choices] == want
        assert complete(client, prompts[0], max_tokens=8).choices[0].text == want[0]
    assert len(complete(client, texts, max_tokens=2, n=3).choices) == 6
    chunks = complete(client, texts[0], max_tokens=8, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == f"{texts[0]} {want[0]}"
    stopped = complete(client, texts[0], max_tokens=8, stop=["in"]).choices[0]
    assert stopped.text == want[0].split("in")[0] and stopped.finish_reason == "stop"
    assert complete(client, texts[0]).usage.completion_tokens <= 16, (
        "as many as OpenAI's where none are asked for"
    )


@pytest.mark.parametrize("echo", [False, True])
def test_a_text_is_scored_as_the_library_scores_it(
    client: openai.OpenAI, tiny: Llama, echo: bool
) -> None:
    asked: dict[str, Any] = {"temperature": 0, "echo": echo}
    want = tiny.text_completion(
        ["The fox lives"], max_gen_len=8, logprobs=True, top_logprobs=3, **asked
    )[0]
    choice = complete(client, "The fox lives", max_tokens=8, logprobs=3, echo=echo).choices[0]
    assert (choice.text, choice.finish_reason) == (want["generation"], want["finish_reason"])
    got, given = choice.logprobs, int(echo)  # nothing predicts the first token of an echo
    assert "".join(got.tokens[given:]).strip() == want["generation"]
    assert got.token_logprobs[given:] == pytest.approx(want["logprobs"][given:], abs=1e-4)
    for scores, top in zip(got.top_logprobs[given:], want["top_logprobs"][given:], strict=True):
        assert {text: scores[text] for text, _ in top} == pytest.approx(dict(top), abs=1e-4)
    ends = [*got.text_offset[1:], len(choice.text)]
    pieces = [choice.text[begin:end] for begin, end in zip(got.text_offset, ends, strict=True)]
    assert pieces == want["tokens"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_as_many_tokens_come_as_are_asked_for(client: openai.OpenAI, max_tokens: int) -> None:
    for answer in (
        complete(client, ["The fox", "The owl"], max_tokens=max_tokens),
        chat(client, max_tokens=max_tokens),
    ):
        assert answer.usage.completion_tokens == max_tokens * len(answer.choices)
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert (
        complete(client, "The fox", max_tokens=max_tokens, echo=True)
        .choices[0]
        .text.startswith("The fox")
    )
    *_, last = chat(client, max_tokens=max_tokens, stream=True)
    assert last.choices[0].finish_reason == "length"


def test_texts_are_scored_as_evaluations_ask(served: Served, tiny: Llama) -> None:
    question = "[INST] What does the cow eat? [/INST] Grass."
    whole = [*tiny.tokenizer.encode(question, bos=True, eos=False)]
    want = tiny.generate([whole], 0, logprobs=True, echo=True)[1]
    assert want is not None
    body = {
        "prompt": [whole, whole[:9]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "seed": 1234,
    }
    first, second = post(served, "/v1/completions", **body).json()["choices"]
    for choice, ids in ((first, whole), (second, whole[:9])):
        scores, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(scores) == len(top) == len(choice["logprobs"]["tokens"]) == len(ids) + 1
        assert scores[0] is top[0] is None
        assert scores[1 : len(ids)] == pytest.approx(want[0][1 : len(ids)], abs=1e-4)
        assert scores[-1] == max(top[-1].values()), "greedy, to the last bit"
        assert all(
            score <= max(likeliest.values())
            for score, likeliest in zip(scores[1:], top[1:], strict=True)
        )
    end = tiny.generate([whole], 1, temperature=0)[0][0]
    assert end == [] and first["logprobs"]["tokens"][-1] == "</s>", (
        "an end of sequence is scored too"
    )
    only = post(served, "/v1/completions", **body | {"max_tokens": 0}).json()["choices"][0]
    assert only["logprobs"]["token_logprobs"] == first["logprobs"]["token_logprobs"][:-1]
    offsets = first["logprobs"]["text_offset"]
    assert first["text"][offsets[3] :].startswith(first["logprobs"]["tokens"][3].strip())


def test_a_stream_waits_for_the_scores_of_a_prompt_that_it_echoes(client: openai.OpenAI) -> None:
    # More prompts than slots.
    prompts = [f"The {animal} lives" for animal in ("fox", "owl", "cow", "bear", "frog", "mouse")]
    options = {"echo": True, "logprobs": 2, "max_tokens": 12}
    want = [choice.logprobs for choice in complete(client, prompts, **options).choices]
    got: list[dict[str, list[Any]]] = [
        {name: [] for name in logprobs.to_dict()} for logprobs in want
    ]
    for chunk in complete(client, prompts, stream=True, **options):
        (choice,) = chunk.choices
        for name, values in choice.logprobs.to_dict().items():
            got[choice.index][name] += values
    assert got == [logprobs.to_dict() for logprobs in want]


def test_embeddings_come_as_floats_and_in_base64(
    client: openai.OpenAI, tiny: Llama, served: Served
) -> None:
    texts = ["The fox lives in the forest.", "Grass"]
    want = torch.nn.functional.normalize(tiny.embed(texts))
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        data = client.embeddings.create(model="llama-2-tiny", input=texts, **options).data
        vectors = [
            struct.unpack(f"<{want.shape[1]}f", base64.b64decode(e.embedding))
            if isinstance(e.embedding, str)
            else e.embedding
            for e in data
        ]
        torch.testing.assert_close(torch.tensor(vectors), want, atol=1e-5, rtol=1e-4)
    assert (
        "check_embedding_ctx_length=False"
        in refusal(served, "/v1/embeddings", input=[[1, 2]])["message"]
    )


def test_models_are_listed_and_others_are_not_there(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "llama-2-tiny" and client.models.retrieve("llama-2-tiny").id == model.id
    calls: list[Callable[[], Any]] = [
        lambda: client.models.retrieve("gpt-4"),
        lambda: chat(client, model="gpt-4"),
        lambda: complete(client, "x", model="gpt-4"),
        lambda: client.embeddings.create(model="gpt-4", input="x"),
    ]
    for call in calls:
        with pytest.raises(
            openai.NotFoundError, match="model 'gpt-4' is not available: use 'llama-2-tiny'"
        ):
            call()
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="llama-2-tiny", input="x")


def test_langchain_chats_completes_and_embeds(served: Served, tiny: Llama) -> None:
    base: dict[str, Any] = {
        "base_url": f"{served.url}/v1",
        "api_key": "none",
        "model": "llama-2-tiny",
    }
    model = ChatOpenAI(temperature=0, max_tokens=30, **base)
    want = tiny.chat_completion([FOX], temperature=0, max_gen_len=30)[0]["generation"]["content"]
    assert model.invoke(FOX[0]["content"]).content == want
    assert "".join(chunk.content for chunk in model.stream(FOX[0]["content"])) == want
    assert [answer.content for answer in model.batch([FOX[0]["content"]] * 3)] == [want] * 3
    text = tiny.text_completion(["The fox"], temperature=0, max_gen_len=8)[0]["generation"]
    completing = OpenAI(temperature=0, max_tokens=8, **base)
    assert completing.invoke("The fox") == text and "".join(completing.stream("The fox")) == text
    vector = OpenAIEmbeddings(check_embedding_ctx_length=False, **base).embed_query("Grass")
    assert vector == pytest.approx(
        torch.nn.functional.normalize(tiny.embed(["Grass"]))[0].tolist(), abs=1e-5
    )


def test_ids_of_another_model_are_refused_with_the_switch_that_sends_texts(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands in for a file that tiktoken would download.
    bytes_of = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=bytes_of, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    base: dict[str, Any] = {
        "base_url": f"{served.url}/v1",
        "api_key": "none",
        "model": "llama-2-tiny",
    }
    with pytest.raises(
        openai.BadRequestError, match="use text \\(langchain: check_embedding_ctx_length=False\\)"
    ):
        OpenAIEmbeddings(**base).embed_query("Grass")
    assert (
        len(
            OpenAIEmbeddings(check_embedding_ctx_length=False, **base).embed_documents(
                ["Grass", "Honey"]
            )
        )
        == 2
    )


def test_many_clients_at_once_are_each_answered_as_if_alone(served: Served, tiny: Llama) -> None:
    animals = ["fox", "owl", "cow", "bear", "rabbit", "hedgehog", "frog", "mouse"]
    dialogs = [[{"role": "user", "content": f"What does the {animal} eat?"}] for animal in animals]
    want = [
        answer["generation"]["content"] for answer in tiny.chat_completion(dialogs, temperature=0)
    ]

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            asked = [
                client.chat.completions.create(model="llama-2-tiny", messages=dialog, temperature=0)  # type: ignore[call-overload]
                for dialog in dialogs
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == want


def test_streams_of_an_async_client_come_at_once(served: Served, client: openai.OpenAI) -> None:
    animals = ["fox", "owl", "cow"]
    want = [complete(client, f"The {animal}", max_tokens=12).choices[0].text for animal in animals]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as several:

            async def one(animal: str) -> str:
                options: dict[str, Any] = {
                    "model": "llama-2-tiny",
                    "temperature": 0,
                    "max_tokens": 12,
                    "stream": True,
                }
                stream = await several.completions.create(prompt=f"The {animal}", **options)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, animals))

    assert asyncio.run(ask()) == want


def test_mistakes_are_told_by_the_library_sentence_and_the_field(
    client: openai.OpenAI, served: Served
) -> None:
    with pytest.raises(
        openai.BadRequestError, match="message 0: expected role 'user', got 'assistant'"
    ) as caught:
        chat(client, messages=[{"role": "assistant", "content": "Hello"}])
    assert caught.value.param == "messages"
    path = "/v1/chat/completions"
    for raw, sentence in {
        "[]": "the body is not a JSON object",
        "{": "the body is not JSON",
        "[" * 10000: "the body is not JSON",
        '{"n": 1' + "0" * 5000 + "}": "the body is not JSON",
    }.items():
        answer = http_post(served.url + path, content=raw)
        assert answer.status_code == 400 and sentence in answer.json()["error"]["message"], (
            answer.text
        )
    image = [{"role": "user", "content": [{"type": "image_url"}]}]
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"messages": None}, "no messages is given"),
        (
            {"messages": [{"role": "user", "content": "[INST]"}]},
            "special tags are not allowed as part of the prompt.",
        ),
        ({"messages": []}, "message 0: expected role 'user' in the last message, got none"),
        ({"messages": "hello"}, "messages is 'hello': use a list"),
        ({"messages": image}, "message 0 has a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogates not allowed"),
        ({"temperature": "hot"}, "temperature is 'hot': use a number"),
        ({"temperature": -1}, "temperature is -1: use 0 for greedy decoding"),
        ({"temperature": 10**400}, "use 0 for greedy decoding"),
        ({"top_p": 0}, "top_p is 0: use more than 0 and at most 1"),
        ({"max_tokens": -1}, "max_tokens is -1: use 0 or more"),
        ({"max_tokens": True}, "max_tokens is True: use an integer"),
        ({"n": 0}, "n is 0: use 1 or more, at most 2048"),
        ({"stop": [""]}, "use strings that are not empty"),
        ({"stream": "yes"}, "stream is 'yes': use true or false"),
        ({"top_logprobs": 2}, "logprobs is False"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
    ]
    for body, sentence in bodies:
        answer = http_post(served.url + path, content=json.dumps({"messages": FOX} | body))
        assert answer.status_code == 400 and sentence in answer.json()["error"]["message"], (
            body,
            answer.text,
        )
    sentences = {
        300: "prompt 0 has 300 tokens, and max_seq_len is 256",
        256: "leaves no room for an answer",
    }
    for n, sentence in sentences.items():
        too_long = refusal(served, "/v1/completions", prompt=[1] * n)
        assert sentence in too_long["message"] and too_long["code"] == "context_length_exceeded"
    assert "token id 99999" in refusal(served, "/v1/completions", prompt=[1, 99999])["message"]
    assert refusal(served, "/v1/completions")["param"] == "prompt"
    assert http_get(f"{served.url}/v1/nothing").status_code == 404
    assert http_get(f"{served.url}/v1/completions").status_code == 405
    assert (
        http_get(f"{served.url}/v1/completions").json()["error"]["message"] == "Method Not Allowed"
    )


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": FOX, "temperature": -1}, "temperature"),
        ("chat/completions", {"messages": FOX, "top_p": 2}, "top_p"),
        ("chat/completions", {"messages": FOX, "stop": [1]}, "stop"),
        ("chat/completions", {"messages": FOX, "max_tokens": -1}, "max_tokens"),
        (
            "chat/completions",
            {"messages": FOX, "max_completion_tokens": -1},
            "max_completion_tokens",
        ),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("chat/completions", {"messages": FOX, "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"messages": [{"role": "user", "content": "fox " * 300}]}, "messages"),
        ("completions", {"prompt": [1] * 300}, "prompt"),
        ("completions", {"prompt": [1] * 256}, "prompt"),
        ("completions", {"prompt": ["a"] * 2049}, "prompt"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("embeddings", {"input": "fox " * 300}, "input"),
        ("embeddings", {"input": "fox", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_a_refusal_names_the_field_that_it_is_about(
    served: Served, path: str, body: dict[str, Any], param: str
) -> None:
    assert refusal(served, f"/v1/{path}", **body)["param"] == param


def test_a_refusal_counts_prompts_as_the_client_does(served: Served) -> None:
    prompts = [[1, 5], [1, 99999], [1] * 300]
    assert refusal(served, "/v1/completions", prompt=prompts, n=2)["message"].startswith(
        "prompt 1 has token id 99999"
    )
    too_long = refusal(served, "/v1/completions", prompt=[prompts[0], prompts[2]], n=3)
    assert too_long["message"].startswith("prompt 1 has 300 tokens, and max_seq_len is 256")
    assert too_long["code"] == "context_length_exceeded" and too_long["param"] == "prompt"
    full = refusal(served, "/v1/completions", prompt=[prompts[0], [1] * 256], n=2)
    assert full["message"].startswith("prompt 1 has 256 tokens, which leaves no room for an answer")
    word = refusal(served, "/v1/completions", prompt=[[1], ["a"]], n=2)
    assert word["message"] == "a token id of prompt 1 is 'a': use an integer"


def test_every_sampling_option_is_taken_from_a_body(tiny: Llama) -> None:
    """Each option keeps its own name, unless OpenAI's API has a different one."""
    values = {"temperature": 0.25, "top_p": 0.5, "max_tokens": 3, "seed": 4, "stop": ["a"]}
    scored = values | {"logprobs": True, "top_logprobs": 2}
    echoed = values | {"echo": True, "logprobs": 2}
    assert scored.keys() | echoed.keys() == {
        field.name for field in dataclasses.fields(SamplingParams)
    }
    params = ChatCompletion({"messages": FOX} | scored, tiny, "tiny").prompts[0].params
    assert params == SamplingParams(**scored)
    params = TextCompletion({"prompt": "The fox"} | echoed, tiny, "tiny").prompts[0].params
    assert params == SamplingParams(**scored, echo=True)


def test_a_new_sampling_option_reaches_clients_without_another_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = option(0.0, "a new one", valid=lambda value: value <= 1, use="at most 1")
    fields = [("min_p", float, new)]
    grown = dataclasses.make_dataclass("Grown", fields, bases=(SamplingParams,), frozen=True)
    monkeypatch.setattr("llama.openai.fields.SamplingParams", grown)
    for body, options in (({"min_p": 0.5}, {"min_p": 0.5}), ({"min_p": None}, {}), ({}, {})):
        assert sampling_fields(Fields(body, "tiny")) == options
    with pytest.raises(BadRequest, match="min_p is 'x': use a number"):
        sampling_fields(Fields({"min_p": "x"}, "tiny"))
    with pytest.raises(ArgumentError) as caught:
        grown(min_p=2)
    refusal = refused(caught.value, "prompt")
    assert (str(refusal), refusal.param) == ("min_p is 2: use at most 1", "min_p")


@pytest.mark.parametrize("field", NOT_SUPPORTED)
def test_what_cannot_be_done_is_refused_by_name_and_neutral_values_pass(
    served: Served, field: str
) -> None:
    asking: dict[str, Any] = {
        "response_format": {"type": "json_object"},
        "tool_choice": "required",
        "best_of": 2,
    }
    error = refusal(served, "/v1/chat/completions", messages=FOX, **{field: asking.get(field, 1.5)})
    assert (error["message"], error["param"]) == (f"{field} is not supported: leave it out", field)
    for neutral in (None, *NOT_SUPPORTED[field]):
        body = {
            "messages": FOX,
            "max_tokens": 1,
            field: neutral,
            "unknown": 1,
            "seed": None,
            "stop": None,
        }
        assert post(served, "/v1/chat/completions", **body).status_code == 200


def test_content_in_parts_and_any_content_type_are_read(served: Served) -> None:
    parts = [{"type": "text", "text": "Where does "}, {"type": "text", "text": "the fox live?"}]
    body = {
        "messages": [{"role": "user", "content": parts, "name": "me"}],
        "temperature": 0,
        "max_completion_tokens": 3,
    }
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
    answer = http_post(
        f"{served.url}/v1/chat/completions", content=json.dumps(body), headers=form
    ).json()
    assert (
        answer["usage"]["completion_tokens"] == 3
        and answer["choices"][0]["finish_reason"] == "length"
    )


def test_a_suffix_needs_an_infilling_model(served: Served) -> None:
    assert (
        "tokenizer has no piece ▁<PRE>"
        in refusal(served, "/v1/completions", prompt="def", suffix="end")["message"]
    )


def test_texts_become_ids_and_back(served: Served, tiny: Llama) -> None:
    ids = tiny.tokenizer.encode("The fox", bos=True, eos=False)
    answer = post(served, "/tokenize", prompt="The fox").json()
    assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids}
    assert (
        post(served, "/tokenize", prompt="The fox", add_special_tokens=False).json()["tokens"]
        == ids[1:]
    )
    assert post(served, "/tokenize", messages=FOX).json()["count"] > 5
    assert post(served, "/detokenize", tokens=ids).json() == {"prompt": "The fox"}
    assert (
        "token id 5000 is not in the vocabulary"
        in refusal(served, "/detokenize", tokens=[5000])["message"]
    )


def test_metrics_count_under_vllms_names(served: Served) -> None:
    def read() -> dict[str, float]:
        lines = http_get(f"{served.url}/metrics").text.splitlines()
        return {
            line.split(" ")[0]: float(line.split(" ")[1])
            for line in lines
            if not line.startswith("#")
        }

    name, before = 'vllm:%s{model_name="llama-2-tiny"}', read()
    answer = post(served, "/v1/completions", prompt="The fox", max_tokens=5, temperature=0).json()
    after = read()
    assert after[name % "generation_tokens_total"] - before[name % "generation_tokens_total"] == 5
    used = answer["usage"]["prompt_tokens"]
    assert after[name % "prompt_tokens_total"] - before[name % "prompt_tokens_total"] == used
    assert after[name % "num_requests_running"] == after[name % "num_requests_waiting"] == 0
    first = 'vllm:time_to_first_token_seconds_count{model_name="llama-2-tiny"}'
    between = 'vllm:inter_token_latency_seconds_count{model_name="llama-2-tiny"}'
    assert after[first] - before[first] == 1 and after[between] - before[between] == 4
    length = 'vllm:request_success_total{model_name="llama-2-tiny",finished_reason="length"}'
    assert after[length] - before[length] == 1
    scored = post(
        served, "/v1/completions", prompt="The fox", max_tokens=0, echo=True, logprobs=1
    ).json()["usage"]
    embedded = post(served, "/v1/embeddings", input=["The fox", "Grass"]).json()["usage"]
    read_too = scored["prompt_tokens"] + embedded["prompt_tokens"]
    assert read()[name % "prompt_tokens_total"] - after[name % "prompt_tokens_total"] == read_too


def prompts_of(llm: Llama, ids: list[int], **options: Any) -> list[Prompt]:
    return make_prompts(llm.tokenizer, [ids], [SamplingParams(**options)], 256, streams=[0])


def append(request: Request, token: int) -> None:
    request.output = extended(request.output, request.prompt, ScoredToken(token))


def test_what_a_stop_string_takes_back_is_not_subtracted_from_the_metrics(tiny: Llama) -> None:
    ids = tiny.tokenizer.encode("The hedgehog lives", bos=True, eos=False)
    prompts = prompts_of(tiny, ids[:2], max_tokens=9, stop=tiny.tokenizer.decode(ids)[4:])
    service = Service(lambda: tiny, 1)
    call = service.calls[0] = Call(0, prompts)
    (request,) = call.requests = [Request(prompts[0], tiny.tokenizer)]
    seen = []
    for token in ids[2:]:
        append(request, token)
        service._look()
        seen.append(service.metrics.generation_tokens)
    assert request.finish_reason == "stop" and len(request.output.tokens) < seen[-1]
    assert seen == sorted(seen)
    assert (
        min(service.metrics.between_tokens.counts) >= 0 and service.metrics.between_tokens.sum >= 0
    )


def test_tokens_that_are_seen_together_are_all_counted(tiny: Llama) -> None:
    service = Service(lambda: tiny, 1)
    prompts = prompts_of(tiny, [1, 2], max_tokens=5)
    call = service.calls[0] = Call(0, prompts)
    call.requests = [Request(prompts[0], tiny.tokenizer)]
    for together in (2, 3):
        for _ in range(together):
            append(call.requests[0], 300)
        service._look()
    assert (
        sum(service.metrics.first_token.counts),
        sum(service.metrics.between_tokens.counts),
    ) == (1, 4)


def test_streams_say_that_they_want_no_buffer_and_pages_that_they_load_nothing_else(
    served: Served,
) -> None:
    body = {"messages": FOX, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert (
            stream.headers["x-accel-buffering"] == "no"
            and stream.headers["cache-control"] == "no-store"
        )
        lines = list(stream.iter_lines())
    assert lines[0].startswith(":") and lines[-2:] == ["data: [DONE]", ""]
    page = http_get(served.url)
    policy = page.headers["content-security-policy"]
    (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
    assert "default-src 'none'" in policy and page.text.count(f'nonce="{nonce}"') == 2
    assert "{{nonce}}" not in page.text and nonce not in http_get(served.url).text
    assert not re.search(r"(src|href)=.?https?:", page.text)


def test_only_the_key_opens_and_other_sites_pages_are_kept_out(served: Served) -> None:
    key = {"Authorization": "Bearer sesame"}
    flags = (
        "--allow_origin",
        "https://friend.example",
        "--model_name",
        "fox",
        "--api_key",
        "sesame",
    )
    with Served(*FLAGS, *flags, LLAMA_API_KEY="what the flag outdoes") as locked:
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"}):
            for path in ("/v1/models", "/v1/models/fox"):
                assert http_get(locked.url + path, headers=headers).status_code == 401
            answer = http_post(
                f"{locked.url}/v1/completions", json={"prompt": "x"}, headers=headers
            )
            assert (
                answer.status_code == 401
                and "Authorization: Bearer" in answer.json()["error"]["message"]
            )
        with pytest.raises(openai.AuthenticationError):
            chat(openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong"))
        right = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sesame")
        assert chat(right, model="fox", max_tokens=1).model == "fox"
        assert (
            http_get(f"{locked.url}/health").status_code == http_get(locked.url).status_code == 200
        )
        friend = {"Origin": "https://friend.example"}
        answer = http_get(f"{locked.url}/v1/models", headers=key | friend)
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        asking = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        # The preflight request that a browser sends first.
        answer = httpx.options(f"{locked.url}/v1/chat/completions", headers=friend | asking)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        assert (
            http_get(f"{locked.url}/v1/models", headers=key | {"Host": "any.example"}).status_code
            == 200
        )
        stranger = http_get(
            f"{locked.url}/v1/models", headers=key | {"Origin": "https://stranger.example"}
        )
        assert (
            stranger.status_code == 403 and "--allow_origin" in stranger.json()["error"]["message"]
        )
    assert locked.status == 0
    stranger = http_post(
        f"{served.url}/v1/completions",
        json={"prompt": "x"},
        headers={"Origin": "https://a.example"},
    )
    assert stranger.status_code == 403 and "access-control-allow-origin" not in stranger.headers
    own = http_get(f"{served.url}/v1/models", headers={"Origin": served.url})
    assert own.status_code == 200
    port = served.url.rpartition(":")[2]
    known = "localhost", "LOCALHOST", "127.0.0.1", "[::1]", "192.0.2.1"
    for name in (
        *known,
        "{a}.example",
        "a_b.example",
        "a`b",
        "\u00e9.example",
        "a@localhost",
        "a.example",
    ):
        host = f"{name}:{port}".encode()
        answer = http_get(
            f"{served.url}/v1/models", headers={b"Host": host, b"Origin": b"http://" + host}
        )
        assert answer.status_code == (200 if name in known else 403), name
    assert f"--allow_origin http://a.example:{port}" in answer.json()["error"]["message"]
    assert http_get(f"{served.url}/v1/models", headers={"Host": ""}).status_code == 403
    with Served(*FLAGS, "--host", "localhost", "--allow_origin", "http://a.example") as open_to:
        for name, status in {"a.example": 200, "b.example": 403, "localhost": 200}.items():
            assert (
                http_get(f"{open_to.url}/v1/models", headers={"Host": name}).status_code == status
            )


def test_prompts_are_not_logged_and_the_key_may_come_from_the_environment() -> None:
    with Served(*FLAGS, LLAMA_API_KEY="sesame") as served:
        assert post(served, "/v1/completions", prompt="hippopotamus").status_code == 401
        key = {"Authorization": "Bearer sesame"}
        for body in (
            {"max_tokens": 1},
            {"temperature": "x"},
            {"temperature": -1},
            {"suffix": "x"},
            {"stream": True},
        ):
            http_post(
                f"{served.url}/v1/completions", json={"prompt": "hippopotamus"} | body, headers=key
            )
    assert not re.search("hippopotamus|sesame", served.log) and served.status == 0
