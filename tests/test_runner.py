"""Decode passes with static shapes, compiled on the CPU as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_golden, expected, run_ranks

from llama import Llama
from llama.engine import runner
from llama.engine.runner import SHORTEST_WINDOW
from llama.model import Transformer


def as_the_original(llm: Llama) -> None:
    golden = expected("gqa")
    for name, echo in (("greedy", False), ("greedy_echo", True)):
        tokens, logprobs = llm.generate(
            golden["prompt_tokens"], golden[name]["max_gen_len"], 0, 0.9, True, echo
        )
        assert tokens == golden[name]["tokens"]
        for ours, theirs in zip(logprobs or [], golden[name]["logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_static_window_gives_the_same_tokens_as_the_exact_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = build_golden(max_seq_len=1024)
    llm.engine.runner.cuda_graph = True
    # Run the program itself instead of a captured graph.
    monkeypatch.setattr(llm.engine.runner, "_capture", lambda program, *_: program)
    lengths = []
    inner = runner.decode

    def noted(*args: Any, length: int) -> torch.Tensor:
        lengths.append(length)
        return inner(*args, length=length)

    monkeypatch.setattr(runner, "decode", noted)
    as_the_original(llm)
    assert set(lengths) == {SHORTEST_WINDOW}
    llm.generate([[1] * 255], 40, temperature=0)
    assert set(lengths) == {SHORTEST_WINDOW, 2 * SHORTEST_WINDOW}
    llm.generate([[1] * 1000], 40, temperature=0)
    assert max(lengths) == 1024


def test_a_graph_runs_only_while_nobody_watches_and_is_made_anew_for_another_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = build_golden()
    llm.engine.runner.cuda_graph = True
    made: list[Any] = []
    runs: list[int] = []

    def capture(program: Any, *_: Any) -> Any:
        """Return a stand-in for a graph that runs the program and records each run."""
        made.append(program)
        number = len(made)
        return lambda ids, positions: runs.append(number) or program(ids, positions)

    monkeypatch.setattr(llm.engine.runner, "_capture", capture)
    want = llm.generate([[1, 30, 31]], 12, 0)
    assert len(made) == 1 and len(runs) == 11
    seen: list[int] = []
    handle = llm.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    runs.clear()
    assert llm.generate([[1, 30, 31]], 12, 0) == want
    assert not runs and len(seen) == 12, "a graph would have left the hook out"
    handle.remove()
    assert llm.generate([[1, 30, 31]], 12, 0) == want
    assert len(made) == 2 and set(runs) == {2}, "what was captured of the model before is of no use"


@pytest.mark.slow
def test_the_compiled_step_is_one_graph_and_equals_the_original() -> None:
    as_the_original(build_golden(compile=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "auto"}, {"quantize": "int8"}])
def test_the_compiled_step_takes_what_the_eager_one_takes(options: dict[str, Any]) -> None:
    eager, compiled = (build_golden(compile=compile, **options) for compile in (False, True))
    prompts = expected("gqa")["prompt_tokens"]
    assert compiled.generate(prompts, 4, 0)[0] == eager.generate(prompts, 4, 0)[0]


@pytest.mark.slow
def test_the_compiled_step_is_one_graph_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "compiled.py"
    script.write_text("""
from conftest import build_golden
from test_runner import as_the_original
as_the_original(build_golden("gqa-mp4", compile=True))
""")
    job = run_ranks(2, script)
    assert job.returncode == 0, job.stderr


def double_in_place(model: Transformer) -> None:
    model.layers[0].feed_forward.w2.weight.mul_(2)


def replace_the_parameter(model: Transformer) -> None:
    layer = model.layers[0].feed_forward.w2
    layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)


def replace_the_data(model: Transformer) -> None:
    model.norm.weight.data = model.norm.weight * 2


def change_a_number(model: Transformer) -> None:
    model.norm.eps = 10.0


def stretch_the_angles(model: Transformer) -> None:
    model.freqs_cis = model.freqs_cis**0.5


def replace_a_method(model: Transformer) -> None:
    layer, inner = model.layers[1], model.layers[1].forward
    layer.forward = lambda *args: inner(*args).flip(-1)


def replace_a_module(model: Transformer) -> None:
    class Steered(torch.nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return h.flip(-1)

    model.norm = Steered()


def look_at_what_is_computed(model: Transformer) -> None:
    inner = model.layers[0].forward
    model.layers[0].forward = lambda *args: inner(*args) * (2 if inner(*args).sum() > -1e9 else 1)


@pytest.mark.parametrize(
    "change",
    [
        *(
            double_in_place,
            replace_the_parameter,
            replace_the_data,
            change_a_number,
            stretch_the_angles,
        ),
        *(replace_a_method, replace_a_module, look_at_what_is_computed),
    ],
)
def test_a_model_that_changes_after_a_call_answers_as_a_changed_one(change: Any) -> None:
    llm, fresh = build_golden("mha-mp1"), build_golden("mha-mp1")
    before = llm.generate([[1, 5, 6]], 10, temperature=0, logprobs=True)
    change(llm.model)
    change(fresh.model)
    tokens, logprobs = fresh.generate([[1, 5, 6]], 10, temperature=0, logprobs=True)
    for _ in range(2):
        after = llm.generate([[1, 5, 6]], 10, temperature=0, logprobs=True)
        assert after[0] == tokens and after[1][0] == pytest.approx(logprobs[0], abs=1e-4)
        assert after[1][0] != pytest.approx(before[1][0], abs=1e-2)


def test_where_capture_is_impossible_decoding_goes_on_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = build_golden()
    llm.engine.runner.cuda_graph = True

    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(llm.engine.runner, "_capture", refuse)
    as_the_original(llm)
    messages = [record.message for record in caplog.records if record.name == "llama.engine.runner"]
    assert messages == [
        "decoding without CUDA graphs: operation not permitted when stream is capturing"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_graph_equals_the_original(compile: bool) -> None:
    llm = build_golden(device="cuda", compile=compile)
    as_the_original(llm)
    assert llm.engine.runner.cuda_graph


@pytest.mark.slow
def test_compiled_passes_of_many_shapes_and_of_two_models() -> None:
    options: dict[str, Any] = {"max_seq_len": 1100, "max_batch_size": 4}
    eager, *compiled = (build_golden(compile=compile, **options) for compile in (False, True, True))
    prompts = [[1] * n for n in (5, 300, 600, 1050)]
    for rows in (4, 3, 1):
        want = eager.generate(prompts[-rows:], 3, 0)
        assert all(llm.generate(prompts[-rows:], 3, 0) == want for llm in compiled)
    for n in (5, 300, 600):
        assert compiled[0].generate([[1] * n], 3, 0) == eager.generate([[1] * n], 3, 0)
