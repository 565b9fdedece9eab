"""What scripts written for the original release import, call and catch."""

from __future__ import annotations

import cmath
import importlib
import inspect
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import GOLDEN, ROOT, build_golden, expected, random_state, run_python, torchrun
from torch import Tensor
from workers.old_script import continue_prompts, lines

from llama import Llama, ModelArgs, Tokenizer, Transformer, chat, generation, model, original
from llama.original import Refusal

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

NAMES = {
    "llama": ["Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"],
    "llama.generation": [
        *("B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR"),
        *("ChatPrediction", "CompletionPrediction", "Dialog", "Message", "Role"),
        *("Llama", "ModelArgs", "Tokenizer", "Transformer", "sample_top_p"),
    ],
    "llama.model": [
        *("Attention", "FeedForward", "ModelArgs", "RMSNorm", "Transformer", "TransformerBlock"),
        *("apply_rotary_emb", "precompute_freqs_cis", "repeat_kv", "reshape_for_broadcast"),
    ],
    "llama.tokenizer": ["Tokenizer"],
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in NAMES.items() for name in names]
)
def test_every_name_is_where_the_original_has_it(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_names_are_the_same_thing_wherever_they_stand() -> None:
    assert generation.sample_top_p is original.sample_top_p
    assert (
        model.repeat_kv is original.repeat_kv
        and model.reshape_for_broadcast is original.reshape_for_broadcast
    )
    assert generation.Transformer is model.Transformer is Transformer
    assert generation.Message is chat.Message and generation.SPECIAL_TAGS is chat.SPECIAL_TAGS


def test_the_tags_and_types_are_the_originals() -> None:
    assert (generation.B_INST, generation.E_INST) == ("[INST]", "[/INST]")
    assert (generation.B_SYS, generation.E_SYS) == ("<<SYS>>\n", "\n<</SYS>>\n\n")
    assert generation.SPECIAL_TAGS == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert generation.UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."
    assert get_args(generation.Role) == ("system", "user", "assistant")
    keys = {"generation", "tokens", "logprobs"}
    assert (
        keys
        <= generation.CompletionPrediction.__optional_keys__
        | generation.CompletionPrediction.__required_keys__
    )
    assert (
        keys
        <= generation.ChatPrediction.__optional_keys__ | generation.ChatPrediction.__required_keys__
    )
    fields = [(name, field.default) for name, field in ModelArgs.__dataclass_fields__.items()]
    assert fields[:10] == [
        *(
            ("dim", 4096),
            ("n_layers", 32),
            ("n_heads", 32),
            ("n_kv_heads", None),
            ("vocab_size", -1),
        ),
        *(("multiple_of", 256), ("ffn_dim_multiplier", None), ("norm_eps", 1e-5)),
        *(("max_batch_size", 32), ("max_seq_len", 2048)),
    ]


# The original's parameters, in its order, with their defaults.
COMPLETION = "temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False"
SIGNATURES = {
    "generation:Llama": "model, tokenizer",
    "generation:Llama.build": (
        "ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size=None, seed=1"
    ),
    "generation:Llama.generate": (
        "self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, logprobs=False, echo=False"
    ),
    "generation:Llama.text_completion": f"self, prompts, {COMPLETION}, echo=False",
    "generation:Llama.chat_completion": f"self, dialogs, {COMPLETION}",
    "generation:sample_top_p": "probs, p",
    "model:RMSNorm": "dim, eps=1e-06",
    "model:precompute_freqs_cis": "dim, end, theta=10000.0",
    "model:reshape_for_broadcast": "freqs_cis, x",
    "model:apply_rotary_emb": "xq, xk, freqs_cis",
    "model:repeat_kv": "x, n_rep",
    "model:Attention": "args",
    "model:FeedForward": "dim, hidden_dim, multiple_of, ffn_dim_multiplier",
    "model:TransformerBlock": "layer_id, args",
    "model:Transformer": "params",
    "model:Attention.forward": "self, x, start_pos, freqs_cis, mask",
    "model:TransformerBlock.forward": "self, x, start_pos, freqs_cis, mask",
    "model:FeedForward.forward": "self, x",
    "model:RMSNorm.forward": "self, x",
    "model:Transformer.forward": "self, tokens, start_pos",
    "tokenizer:Tokenizer": "model_path",
    "tokenizer:Tokenizer.encode": "self, s, bos, eos",
    "tokenizer:Tokenizer.decode": "self, t",
}


@pytest.mark.parametrize(("where", "wanted"), SIGNATURES.items())
def test_parameters_have_the_originals_names_order_and_defaults(where: str, wanted: str) -> None:
    module, path = where.split(":")
    thing: Any = importlib.import_module(f"llama.{module}")
    for name in path.split("."):
        thing = getattr(thing, name)
    parameters = list(inspect.signature(thing).parameters.values())
    originals = [parameter.split("=") for parameter in wanted.split(", ")]
    for parameter, (name, *default) in zip(parameters, originals, strict=False):
        assert parameter.name == name and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert not default or repr(parameter.default) == default[0]
    assert len(parameters) >= len(originals)
    for added in parameters[len(originals) :]:
        # The options that the original does not have.
        if added.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        assert added.default is not inspect.Parameter.empty, f"{added.name} must be given"
        assert added.kind is inspect.Parameter.KEYWORD_ONLY or module != "generation"


def test_rms_norm_has_a_default_eps() -> None:
    norm, x = model.RMSNorm(8), torch.arange(8.0)[None] / 1000
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8.0) + 1)
    root = math.sqrt(sum(v * v for v in x[0].tolist()) / 8 + 1e-6)
    torch.testing.assert_close(norm(x).detach(), x / root * (torch.arange(8.0) + 1))


def test_frequencies_are_the_originals() -> None:
    freqs = model.precompute_freqs_cis(8, 6, 500.0)
    wanted = [
        [cmath.exp(1j * position * 500.0 ** (-2 * i / 8)) for i in range(4)]
        for position in range(6)
    ]
    torch.testing.assert_close(freqs, torch.tensor(wanted, dtype=torch.complex64))
    torch.testing.assert_close(
        model.precompute_freqs_cis(8, 6), model.precompute_freqs_cis(8, 6, theta=10000.0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated_together(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    xq, xk = torch.randn(2, 5, 4, 8).to(dtype), torch.randn(2, 5, 2, 8).to(dtype)
    # Shape (seqlen, head_dim / 2), as the original's layers pass it.
    freqs = model.precompute_freqs_cis(8, 12)[3:8]
    rotated = model.apply_rotary_emb(xq, xk, freqs)
    assert len(rotated) == 2
    for x, y in zip((xq, xk), rotated, strict=True):
        assert y.dtype == dtype and y.shape == x.shape
        for b, s, h, i in [(0, 0, 0, 0), (1, 4, 1, 3), (0, 2, x.shape[2] - 1, 1), (1, 3, 0, 2)]:
            pair = complex(*x[b, s, h, 2 * i : 2 * i + 2].tolist()) * complex(freqs[s, i])
            near = pytest.approx(
                [pair.real, pair.imag], rel=1e-2 if dtype == torch.bfloat16 else 1e-5, abs=1e-6
            )
            assert y[b, s, h, 2 * i : 2 * i + 2].tolist() == near


def test_heads_are_repeated_side_by_side() -> None:
    x = torch.randn(2, 3, 2, 4)
    y = original.repeat_kv(x, 3)
    assert y.shape == (2, 3, 6, 4)
    assert all(torch.equal(y[:, :, head], x[:, :, head // 3]) for head in range(6))
    assert torch.equal(original.repeat_kv(x, 1), x)


def test_frequencies_are_viewed_to_multiply_heads() -> None:
    freqs = torch.randn(5, 4)
    view = original.reshape_for_broadcast(freqs, torch.randn(2, 5, 3, 4))
    assert view.shape == (1, 5, 1, 4) and view.data_ptr() == freqs.data_ptr()
    assert original.reshape_for_broadcast(freqs, torch.randn(2, 5, 4)).shape == (1, 5, 4)
    for wrong in (torch.randn(2, 6, 3, 4), torch.randn(2, 5, 3, 8), torch.randn(5, 4)):
        with pytest.raises(AssertionError, match=r"freqs_cis is \(5, 4\) and x "):
            original.reshape_for_broadcast(freqs, wrong)


def test_the_nucleus_is_what_has_no_more_mass_than_p_before_it() -> None:
    probs = torch.tensor([[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25]])
    kept = probs.clone()
    torch.manual_seed(0)
    for p, first in [(0.0, {1}), (0.49, {1}), (0.5, {1, 2}), (0.74, {1, 2}), (1.0, {0, 1, 2, 3})]:
        draws = torch.cat([original.sample_top_p(probs, p) for _ in range(200)], dim=1)
        assert draws.shape == (2, 200)
        assert set(draws[0].tolist()) == first
    assert torch.equal(probs, kept)


def test_draws_are_those_of_the_nucleus_and_of_torchs_seed() -> None:
    probs = torch.tensor([0.1, 0.6, 0.3]).expand(20_000, 3)
    torch.manual_seed(1)
    draws = original.sample_top_p(probs, 0.6)
    torch.manual_seed(1)
    assert torch.equal(original.sample_top_p(probs, 0.6), draws)
    assert not torch.equal(original.sample_top_p(probs, 0.6), draws)
    assert (torch.bincount(draws[:, 0], minlength=3) / 20_000).tolist() == pytest.approx(
        [0, 2 / 3, 1 / 3], abs=0.02
    )
    assert original.sample_top_p(probs[0], 0.5).tolist() == [1]
    assert original.sample_top_p(probs[:6].reshape(2, 3, 3), 0.5).tolist() == [[[1]] * 3] * 2


@pytest.mark.parametrize(("multiplier", "width"), [(None, 192), (1.3, 224)])
def test_a_feed_forward_layer_rounds_its_width_as_the_original_does(
    multiplier: float | None, width: int
) -> None:
    layer = model.FeedForward(64, 4 * 64, 32, multiplier)
    assert layer.w1.weight.shape == layer.w3.weight.shape == (
        width,
        64,
    ) and layer.w2.weight.shape == (64, width)
    assert layer(torch.zeros(2, 3, 64)).shape == (2, 3, 64)


def test_a_block_is_made_of_its_number_and_the_arguments(args: ModelArgs) -> None:
    block = model.TransformerBlock(1, args)
    whole = Transformer(args).layers[1].state_dict()
    assert {name: t.shape for name, t in block.state_dict().items()} == {
        name: t.shape for name, t in whole.items()
    }
    assert model.Attention(args).wk.weight.shape == (32, 64)


@pytest.fixture
def bare(args: ModelArgs) -> Transformer:
    """A model without a Llama around it."""
    bare = Transformer(args)
    bare.load_state_dict(random_state(args))
    return bare


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_bare_model_goes_on_from_what_it_has_seen(
    bare: Transformer, mode: Callable[[], Any]
) -> None:
    tokens = torch.randint(3, 512, (3, 12), generator=torch.Generator().manual_seed(0))
    whole = bare.train()(tokens, 0).detach()  # one uncached pass
    bare.eval()
    with mode():
        steps = [bare(tokens[:, :5], 0), bare(tokens[:, 5:6], 5), bare(tokens[:, 6:10], 6)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, :10], atol=1e-4, rtol=0)
        fewer = bare(tokens[:2, 10:], 10)  # each row continues from its own slot
        torch.testing.assert_close(fewer, whole[:2, 10:], atol=1e-4, rtol=0)
        # Another sequence in the first slot.
        torch.testing.assert_close(bare(tokens[2:], 0), whole[2:], atol=1e-4, rtol=0)
    assert bare.state_dict().keys() == random_state(bare.params).keys()


@torch.no_grad()
def test_a_bare_model_refuses_what_it_cannot_hold(bare: Transformer) -> None:
    some = torch.ones(1, 60, dtype=torch.long)
    bare(some, 0)
    for tokens, start, sentence in [
        (torch.ones(5, 2, dtype=torch.long), 0, "tokens have 5 rows, and max_batch_size is 4"),
        (some[:, :5], 60, "tokens reach position 65, and max_seq_len is 64"),
        (some[0], 0, r"tokens have shape \(60,\) and begin at position 0"),
        (some, -1, r"tokens have shape \(1, 60\) and begin at position -1"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            bare(tokens, start)
    assert bare(some[:, :4], 60).isfinite().all()


def test_a_bare_model_needs_no_context_to_run_as_the_originals_does(bare: Transformer) -> None:
    tokens = torch.randint(3, 512, (2, 8), generator=torch.Generator().manual_seed(0))
    logits = torch.cat((bare(tokens[:, :7], 0), bare(tokens[:, 7:], 7)), dim=1)
    assert logits.numpy().shape == (2, 8, 512) and not logits.requires_grad
    torch.testing.assert_close(logits, bare.train()(tokens).detach(), atol=1e-4, rtol=0)
    bare.train()(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in bare.parameters())


def test_a_llama_made_by_hand_equals_a_built_one() -> None:
    folder, tokenizer = GOLDEN / "gqa-mp1", Tokenizer(GOLDEN / "tokenizer.model")
    args = ModelArgs(
        max_seq_len=64, max_batch_size=4, **json.loads((folder / "params.json").read_text())
    )
    args.vocab_size = tokenizer.n_words
    by_hand = Transformer(args)
    by_hand.load_state_dict(
        torch.load(folder / "consolidated.00.pth", weights_only=True), strict=False
    )
    golden = expected("gqa")
    tokens, logprobs = Llama(by_hand, tokenizer).generate(
        golden["prompt_tokens"], 20, 0, logprobs=True
    )
    assert tokens == golden["greedy"]["tokens"]
    for ours, theirs in zip(logprobs or [], golden["greedy"]["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_script_with_its_own_loop_generates_what_generate_does(llm: Llama) -> None:
    golden = expected("gqa")
    assert continue_prompts(llm, golden["prompt_tokens"], 20, 0) == golden["greedy"]["tokens"]
    assert llm.generate(golden["prompt_tokens"], 20, 0)[0] == golden["greedy"]["tokens"]
    assert continue_prompts(llm, golden["prompt_tokens"], 20, 0) == golden["greedy"]["tokens"]
    torch.manual_seed(5)
    drawn = continue_prompts(llm, golden["prompt_tokens"], 20, 1.0)
    torch.manual_seed(5)
    assert (
        continue_prompts(llm, golden["prompt_tokens"], 20, 1.0)
        == drawn
        != golden["greedy"]["tokens"]
    )


def test_under_torchrun_the_seed_of_build_is_torchs_seed_too(tmp_path: Path) -> None:
    script = tmp_path / "drawing.py"
    script.write_text("""
import torch, torch.distributed as dist
from conftest import build_golden
draws = []
for seed in (7, 7, 8):
    build_golden("gqa-mp2", seed=seed)
    draws.append(torch.rand(3).tolist())
everywhere = [None, None]
dist.all_gather_object(everywhere, draws)
assert everywhere[0] == everywhere[1] and draws[0] == draws[1] != draws[2], everywhere
""")
    job = torchrun(2, script)
    assert job.returncode == 0, job.stderr


def test_callers_that_catch_an_assertion_go_on(llm: Llama) -> None:
    prompts = [[1, 30, 31], [1] * 65, [1, 40]]
    results: list[list[int] | None] = []
    for prompt in prompts:
        try:
            results.append(llm.generate([prompt], 5, 0)[0][0])
        except AssertionError as error:
            assert isinstance(error, ValueError) and isinstance(error, Refusal)
            assert "has 65 tokens, and max_seq_len is 64" in str(error)
            results.append(None)
    assert results[1] is None
    assert [results[0], results[2]] == llm.generate([prompts[0], prompts[2]], 5, 0)[0]


@pytest.mark.parametrize("roles", ["au", "uu", "ua", "s", "ss", "sa", ""])
def test_callers_that_catch_an_assertion_for_roles_go_on(llm: Llama, roles: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    with pytest.raises(AssertionError, match="dialog 0, message .: expected role"):
        llm.chat_completion([[{"role": names[role], "content": "hi"} for role in roles]])  # type: ignore[typeddict-item]


def test_a_batch_that_the_original_refused_is_welcome(llm: Llama) -> None:
    prompts = [[1, *range(10, 12 + n)] for n in range(9)]
    together = llm.generate(prompts, 6, 0)[0]
    assert together == [llm.generate([prompt], 6, 0)[0][0] for prompt in prompts]


def test_messages_may_have_a_name(llm: Llama) -> None:
    plain = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
    named = [message | {"name": "Ada"} for message in plain]
    dialogs: Any = [plain, named]
    first, second = llm.chat_completion(dialogs, 0, max_gen_len=8)
    assert first == second
    assert [piece["text"] for piece in llm.stream_chat_completion(dialogs[1:], 0, max_gen_len=8)]


def test_a_dialog_that_is_not_nested_is_told_to_be_put_in_a_list(llm: Llama) -> None:
    hi: Any = {"role": "user", "content": "hi"}
    for call in (llm.chat_completion, llm.stream_chat_completion):
        with pytest.raises(TypeError, match="dialog 0 is a message, .*put it in a list"):
            call([hi])


def test_results_have_the_originals_keys(llm: Llama) -> None:
    text, scored = (
        llm.text_completion(["hi"], 0, 0.9, 4, logprobs)[0] for logprobs in (False, True)
    )
    assert text["generation"] == scored["generation"]
    assert "tokens" not in text and "logprobs" not in text
    assert len(scored["tokens"]) == len(scored["logprobs"]) > 0
    (answer,) = llm.chat_completion([[{"role": "user", "content": "hi"}]], 0, 0.9, 4)
    assert (
        answer["generation"].keys() == {"role", "content"}
        and answer["generation"]["role"] == "assistant"
    )


def test_hooks_fire_on_every_linear_layer_and_parameters_are_whole() -> None:
    llm = build_golden("mha-mp1")
    wanted = torch.load(GOLDEN / "mha-mp1" / "consolidated.00.pth", weights_only=True)
    wanted = {name: tensor.float() for name, tensor in wanted.items() if name != "rope.freqs"}
    held = dict(llm.model.named_parameters())
    for found in (held, llm.model.state_dict()):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    fired: dict[str, int] = {}
    layers = [name.removesuffix(".weight") for name, tensor in wanted.items() if tensor.ndim == 2]
    for name in layers:

        def note(module: torch.nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            fired[name] = output.shape[-1]

        llm.model.get_submodule(name).register_forward_hook(note)
    for run in (
        lambda: llm.generate([[1, 30, 31]], 3, 0),
        lambda: llm.model(torch.tensor([[1, 30]]), 0),
    ):
        fired.clear()
        run()
        widths = {name: wanted[f"{name}.weight"].shape[0] for name in layers}
        assert fired == widths | {"tok_embeddings": wanted["tok_embeddings.weight"].shape[1]}


def test_a_hook_may_change_what_a_layer_gives(llm: Llama) -> None:
    before = llm.generate([[1, 30, 31]], 8, 0)[0]
    handle = llm.model.get_submodule("layers.0.attention.wv").register_forward_hook(
        lambda m, x, y: -y
    )
    try:
        assert llm.generate([[1, 30, 31]], 8, 0)[0] != before
    finally:
        handle.remove()
    assert llm.generate([[1, 30, 31]], 8, 0)[0] == before


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_a_model_may_be_converted_after_it_is_built(dtype: str) -> None:
    llm, tokens = build_golden("mha-mp1"), torch.tensor(expected("mha")["prompt_tokens"][:1])
    with torch.inference_mode():
        before = llm.model(tokens, 0)
        getattr(llm.model, dtype)()
        after = llm.model(tokens, 0)
    assert {parameter.dtype for parameter in llm.model.parameters()} == {
        getattr(torch, dtype.replace("half", "float16"))
    }
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, atol=0.2, rtol=0)
    (row,), _ = llm.generate(tokens.tolist(), 12, 0)
    assert len(row) == 12
    chat = llm.chat_completion([[{"role": "user", "content": "hi"}]], 0.6, max_gen_len=5)
    assert chat[0]["generation"]["role"] == "assistant"


def test_threads_that_share_one_model_get_their_own_texts(llm: Llama) -> None:
    texts = ["The model is", "def main():", "1234 + 5678 =", "hello " * 5]
    alone = [llm.text_completion([text], 0, max_gen_len=12) for text in texts]
    found: dict[int, list[Any]] = {i: [] for i in range(len(texts))}

    def ask(i: int) -> None:
        for _ in range(5):
            try:
                found[i].append(llm.text_completion([texts[i]], 0, max_gen_len=12))
            except Exception as error:
                found[i].append(error)

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: [alone[i]] * 5 for i in found}


@pytest.mark.parametrize("ranks", [0, 1, 2], ids=["python", "one rank", "two ranks"])
def test_a_script_prints_each_line_once_and_nothing_else(ranks: int) -> None:
    script = ROOT / "tests" / "workers" / "old_script.py"
    job = torchrun(ranks, script) if ranks else run_python(script)
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines() == lines(build_golden("mha-mp1"))
