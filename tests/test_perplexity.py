"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, TINY, run_python
from hypothesis import given
from hypothesis import strategies as st

from llama import Llama
from llama.cli.perplexity import perplexity, score, windows_of
from llama.generation import BuildOptions

TEXT = "The owl lives in the tower. It likes to read.\nOnce upon a time, there was a little fox. Äpfel, 猫."


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_windows_predict_every_id_but_the_first_once(
    count: int, length: int, data: st.DataObject
) -> None:
    ids, stride = list(range(count)), data.draw(st.integers(1, length - 1))
    predicted = []
    for window in windows_of(ids, length, stride):
        assert 1 <= window.scored < len(window.ids) <= length
        assert window.ids == ids[window.ids[0] : window.ids[0] + len(window.ids)]
        seen = len(window.ids) - window.scored
        assert window.ids[0] == 0 or seen == length - window.scored >= length - stride
        predicted += window.ids[seen:]
    assert predicted == ids[1:]


@pytest.mark.parametrize(("length", "stride"), [(16, 15), (16, 4), (64, 63)])
def test_the_score_is_the_sum_of_each_windows_logprobs(
    llm: Llama, length: int, stride: int
) -> None:
    ids = llm.tokenizer.encode(TEXT, bos=True, eos=False)
    windows = windows_of(ids, length, stride)
    total = 0.0
    for window in windows:
        logprobs = llm.model(torch.tensor([window.ids]))[0].log_softmax(-1)
        own = logprobs[:-1].gather(1, torch.tensor(window.ids[1:])[:, None])
        total += own[len(own) - window.scored :].double().sum().item()
    result = score(llm, windows)
    assert result.tokens == len(ids) - 1 and result.logprob == pytest.approx(total, abs=1e-2)
    assert result.perplexity == pytest.approx(math.exp(-total / result.tokens), rel=1e-4)


@pytest.mark.slow
def test_the_command_tells_perplexity_and_bits_per_byte(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    job = run_python(
        "-m",
        "llama",
        "perplexity",
        TINY,
        tmp_path / "text",
        "--max_seq_len",
        "32",
        "--dtype",
        "float32",
    )
    assert job.returncode == 0, job.stderr
    llm = Llama.build(TINY, None, 32, 1, device="cpu", dtype="float32")
    result = score(llm, windows_of(llm.tokenizer.encode(TEXT, bos=True, eos=False), 32, 31))
    bits = -result.logprob / math.log(2) / len(TEXT.encode())
    assert job.stdout.startswith(
        f"perplexity {result.perplexity:.4f} per token, {bits:.4f} bits per byte ("
    )
    assert (
        f"({result.tokens} tokens, {len(TEXT.encode())} bytes, 2 window(s) of at most 32, stride 31)"
        in job.stdout
    )


def test_what_cannot_be_predicted_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes("Äpfel".encode("latin-1"))
    folder = str(GOLDEN / "gqa-mp1")
    build = BuildOptions(GOLDEN / "tokenizer.model", max_seq_len=64, max_batch_size=1, device="cpu")
    with pytest.raises(ValueError, match="empty is empty: pass a file with text"):
        perplexity(folder, str(tmp_path / "empty"), build=build)
    with pytest.raises(ValueError, match=r"latin is not UTF-8 \(.*\): convert it first"):
        perplexity(folder, str(tmp_path / "latin"), build=build)
    with pytest.raises(
        FileNotFoundError, match=r"nowhere cannot be read \(No such file or directory\): pass a"
    ):
        perplexity(folder, str(tmp_path / "nowhere"), build=build)
    for stride in (64, 0, 100):
        with pytest.raises(ValueError, match=f"stride is {stride}"):
            perplexity(folder, str(tmp_path / "empty"), stride=stride, build=build)
