from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_state, write_release
from sentencepiece import SentencePieceTrainer

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.code_llama import encode_infilling
from llama.openai.completions import TextCompletion
from llama.openai.fields import BadRequest

PIECES = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]


@pytest.fixture(scope="module")
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer has one piece per character, and Code Llama's four."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "text.txt").write_text(
        "def add(a, b):\n    return a + b\nthe quick brown fox jumps over the lazy dog\n" * 9
    )
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="char",
        vocab_size=64,
        hard_vocab_limit=False,
        user_defined_symbols=PIECES,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    n_words = Tokenizer(folder / "tokenizer.model").n_words
    args = ModelArgs(dim=64, n_layers=2, n_heads=8, vocab_size=n_words, multiple_of=32)
    return write_release(folder, args, random_state(args))


@pytest.fixture(scope="module")
def code_llm(code_folder: Path) -> Llama:
    return Llama.build(code_folder, max_seq_len=64, max_batch_size=2, device="cpu", dtype="float32")


def test_the_prompts_are_those_of_the_published_format(code_llm: Llama) -> None:
    tokenizer = code_llm.tokenizer
    pre, suf, mid, eot = (tokenizer.sp_model.piece_to_id(piece) for piece in PIECES)
    assert (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id) == (
        pre,
        suf,
        mid,
        eot,
    )

    def ids(text: str) -> list[int]:
        return [tokenizer.sp_model.piece_to_id(character) for character in text]

    # SentencePiece puts a space before the first word. The prefix has that space, the suffix does
    # not.
    prefix, suffix = ids("▁add(a"), ids("b▁fox")
    assert encode_infilling("add(a", "b fox", tokenizer) == [1, pre, *prefix, suf, *suffix, mid]
    assert encode_infilling("add(a", "b fox", tokenizer, True) == [
        1,
        pre,
        suf,
        *suffix,
        mid,
        *prefix,
    ]
    assert encode_infilling("", " b", tokenizer) == [1, pre, suf, *ids("▁b"), mid]
    assert encode_infilling("a ", "", tokenizer) == [1, pre, *ids("▁a▁"), suf, mid]


def test_the_generation_lies_between_prefix_and_suffix_and_ends_at_eot(
    code_llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes, suffixes = ["def add(", "the ", "a"], ["):", " fox", ""]
    monkeypatch.setattr(code_llm.tokenizer, "eot_id", 10**6)
    results = code_llm.text_infilling(
        prefixes, suffixes, temperature=0, max_gen_len=12, logprobs=True
    )
    prompts = [
        encode_infilling(*pair, code_llm.tokenizer) for pair in zip(prefixes, suffixes, strict=True)
    ]
    tokens, logprobs = code_llm.generate(prompts, 12, 0, logprobs=True)
    for prefix, suffix, result, row, scores in zip(
        prefixes, suffixes, results, tokens, logprobs or [], strict=True
    ):
        model = code_llm.tokenizer.sp_model
        pieces = [
            " ⁇ " if token == 0 else model.id_to_piece(token).replace("▁", " ") for token in row
        ]
        assert result["tokens"] == pieces
        assert result["generation"] == "".join(pieces)
        assert result["full_text"] == prefix + result["generation"] + suffix
        assert result["logprobs"] == pytest.approx(scores, abs=1e-5)
        assert result["finish_reason"] == ("length" if len(row) == 12 else "stop")
    ending = tokens[0][5]
    cut = tokens[0].index(ending)
    monkeypatch.setattr(code_llm.tokenizer, "eot_id", ending)
    (result,) = code_llm.text_infilling(
        prefixes[:1], suffixes[:1], temperature=0, max_gen_len=12, logprobs=True
    )
    assert (result["tokens"], result["finish_reason"]) == (results[0]["tokens"][:cut], "stop")
    assert code_llm.generate(prompts[:1], 12, 0)[0] == tokens[:1]  # eot_id ends only infilling


def test_a_leading_space_of_the_generation_is_kept(
    code_llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = code_llm.tokenizer.sp_model.piece_to_id("▁")
    logits = torch.nn.functional.one_hot(torch.tensor([space]), code_llm.tokenizer.n_words).float()
    monkeypatch.setattr(
        code_llm.model.output, "forward", lambda h: logits.expand(*h.shape[:-1], -1)
    )
    (result,) = code_llm.text_infilling(["a"], ["b"], temperature=0, max_gen_len=3)
    assert result["full_text"] == "a   b"


def test_what_cannot_be_infilled_is_refused(code_llm: Llama, llm: Llama) -> None:
    with pytest.raises(
        ValueError, match="tokenizer has no piece ▁<PRE>: infilling needs the 7B or 13B Code Llama"
    ):
        llm.text_infilling(["a"], ["b"])
    with pytest.raises(ValueError, match="got 2 prefixes and 1 suffixes: pass equal numbers"):
        code_llm.text_infilling(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="prefixes is a str: pass a list"):
        code_llm.text_infilling("a", ["c"])
    with pytest.raises(ValueError, match="prompt 0 has 1.. tokens, and max_seq_len is 64"):
        code_llm.text_infilling(["a" * 50], ["b" * 60])


@pytest.mark.parametrize("extra", [{}, {"rope_theta": 1000000}], ids=["Llama 1", "Code Llama"])
def test_folders_of_llama_1_and_code_llama_load_as_they_are(
    tmp_path: Path, code_folder: Path, extra: dict[str, int]
) -> None:
    tokenizer = code_folder / "tokenizer.model"
    args = ModelArgs(
        dim=64,
        n_layers=2,
        n_heads=8,
        vocab_size=Tokenizer(tokenizer).n_words,
        multiple_of=32,
        **extra,
    )
    state = random_state(args)
    folder = write_release(tmp_path / "7B", args, state)
    torch.save(state | {"rope.freqs": torch.ones(4)}, folder / "consolidated.00.pth")
    params = {
        "dim": 64,
        "multiple_of": 32,
        "n_heads": 8,
        "n_layers": 2,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params | extra))
    llm = Llama.build(folder, tokenizer, 64, 2, device="cpu", dtype="float32")
    model = Transformer(args)
    model.load_state_dict(state)
    tokens = torch.tensor([[1, 5, 9, 7, 12]])
    torch.testing.assert_close(llm.model(tokens, 0), model(tokens).detach(), atol=1e-4, rtol=0)


def test_a_completion_with_a_suffix_is_infilling(code_llm: Llama) -> None:
    (prompt,) = TextCompletion({"prompt": "def add(", "suffix": "):"}, code_llm, "model").prompts
    ids = prompt.token_ids
    assert ids.count(code_llm.tokenizer.suffix_id) == 1 and ids[-1] != code_llm.tokenizer.eos_id
    assert not prompt.starts_text, "its first word's space stays"
    (want,) = code_llm.text_infilling(["def add("], ["):"], temperature=0, max_gen_len=12)
    call = TextCompletion(
        {"prompt": "def add(", "suffix": "):", "temperature": 0, "max_tokens": 12},
        code_llm,
        "model",
    )
    (request,) = [code_llm.engine.submit(prompt) for prompt in call.prompts]
    while not request.over:
        code_llm.engine.step()
    (choice,) = call.response([request])["choices"]
    assert (choice["text"], choice["finish_reason"]) == (want["generation"], want["finish_reason"])
    with pytest.raises(BadRequest, match="send no token ids"):
        TextCompletion({"prompt": [1, 2], "suffix": "):"}, code_llm, "model")
