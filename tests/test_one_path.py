"""Transformer.forward is the code that runs: a user's changes to the model see every pass.

They take effect from the next call on.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, ROOT, build_golden, expected, random_state, run_ranks
from torch import Tensor, nn
from workers.hand_made import compare

from llama import Llama, ModelArgs, Transformer, ops
from llama.cache import View
from llama.engine.engine import ModelVersion
from llama.model import Attention, TransformerBlock
from llama.parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, ShardedLinear

PROMPT = [1, 30, 31, 32, 33, 34]


def passes(llm: Llama, run: Callable[[], Any]) -> int:
    before = llm.engine.passes
    run()
    return llm.engine.passes - before


@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}])
def test_a_replaced_forward_runs_once_for_every_pass(
    where: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = build_golden(**options)
    # This call must leave nothing behind that bypasses the replaced forward.
    want = llm.generate([PROMPT], 12, 0)
    calls: list[tuple[Any, ...]] = []
    layer = llm.model.layers[1]
    inner = TransformerBlock.forward

    def counted(
        self: Any, x: Tensor, start_pos: Any, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        if self is layer:
            calls.append((x.shape, start_pos, freqs_cis.shape, mask))
        return inner(self, x, start_pos, freqs_cis, mask)

    if where == "class":
        monkeypatch.setattr(TransformerBlock, "forward", counted)
    else:
        monkeypatch.setattr(layer, "forward", counted.__get__(layer))
    for _ in range(2):
        calls.clear()
        count = passes(
            llm, lambda: want == llm.generate([PROMPT], 12, 0) or pytest.fail("another text")
        )
        assert len(calls) == count > 10
    assert all(isinstance(start_pos, View) and mask is None for _, start_pos, _, mask in calls)
    calls.clear()
    llm.model(torch.tensor([PROMPT]), 0)
    llm.model(torch.tensor([[35]]), 6)
    (first, second) = calls
    assert first[1] == 0 and first[2] == (6, 4) and first[3].shape == (6, 6)
    assert second[1] == 6 and second[2] == (1, 4) and second[3] is None


def test_a_replaced_attention_gets_the_originals_arguments_and_may_use_the_view(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = llm.generate([PROMPT, [1, 40]], 12, 0)

    def forward(
        self: Any, x: Tensor, start_pos: Any, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        bsz, seqlen, _ = x.shape
        assert start_pos.positions.shape == (bsz, seqlen)
        xq = self.wq(x).view(bsz, seqlen, self.n_local_heads, self.head_dim)
        xk = self.wk(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xv = self.wv(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xq, xk = ops.apply_rotary_emb(xq, xk, freqs_cis)
        parts = start_pos.update(self.cache, self.layer_id, xk, xv)
        attended = [ops.attention(xq[:, p.tokens], p.keys, p.values, p.mask) for p in parts]
        return self.wo(torch.cat(attended, dim=1))

    monkeypatch.setattr(Attention, "forward", forward)
    assert llm.generate([PROMPT, [1, 40]], 12, 0) == want


@pytest.mark.parametrize(
    "use",
    [
        lambda start: start + 1,
        lambda start: 1 + start,
        lambda start: start - 1,
        lambda start: start > 0,
        lambda start: start == 0,
        lambda start: [1, 2][start],
        lambda start: range(start),
        lambda start: bool(start),
        lambda start: torch.zeros(9)[start:],
        lambda start: int(start),
    ],
)
def test_arithmetic_on_a_view_says_how_to_adapt(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, use: Any
) -> None:
    inner = llm.model.layers[0].forward

    def forward(x: Tensor, start_pos: Any, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        use(start_pos)
        return inner(x, start_pos, freqs_cis, mask)

    monkeypatch.setattr(llm.model.layers[0], "forward", forward)
    llm.model(torch.tensor([PROMPT]), 0)
    with pytest.raises(
        TypeError, match=r"start_pos is a view of the cache, not an integer: .*start_pos\.positions"
    ):
        llm.generate([PROMPT], 5, 0)


def add_a_hook(model: Transformer) -> None:
    model.layers[0].attention.wv.register_forward_hook(lambda module, x, y: -y)


def edit_in_place(model: Transformer) -> None:
    with torch.no_grad():
        model.layers[0].attention.wv.weight.mul_(-1)


def assign_a_parameter(model: Transformer) -> None:
    layer = model.layers[0].attention.wv
    layer.weight = nn.Parameter(-layer.weight.detach().clone(), requires_grad=False)


def load_a_state(model: Transformer) -> None:
    name = "layers.0.attention.wv.weight"
    model.load_state_dict(model.state_dict() | {name: -model.state_dict()[name]})


def replace_a_module(model: Transformer) -> None:
    class Negated(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return -self.inner(x)

    model.layers[0].attention.wv = Negated(model.layers[0].attention.wv)


def change_eps(model: Transformer) -> None:
    model.layers[0].attention_norm.eps = 10.0


def stretch_positions(model: Transformer) -> None:
    model.params.rope_scaling_factor = 4.0


def assign_angles(model: Transformer) -> None:
    model.freqs_cis = model.freqs_cis.conj().resolve_conj()


CHANGES = [
    *(add_a_hook, edit_in_place, assign_a_parameter, load_a_state),
    *(replace_a_module, change_eps, stretch_positions, assign_angles),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_a_stream_is_half_read_counts_from_the_next_call(
    change: Callable[[Transformer], None],
) -> None:
    llm = build_golden(max_batch_size=3)
    changed = build_golden(max_batch_size=3)
    change(changed.model)
    llm.generate([PROMPT], 6, 0)  # leaves a prefix in the cache
    stream = llm.stream_text_completion(["The model is"], 0, max_gen_len=30)
    next(stream)
    change(llm.model)
    tokens, logprobs = llm.generate([PROMPT], 6, 0, logprobs=True)
    want = changed.generate([PROMPT], 6, 0, logprobs=True)
    assert tokens == want[0]
    assert logprobs is not None and want[1] is not None
    assert logprobs[0] == pytest.approx(want[1][0], abs=1e-4)
    assert list(stream)[-1]["finish_reason"]


def test_a_hook_that_is_removed_leaves_nothing(llm: Llama) -> None:
    want = llm.generate([PROMPT], 6, 0, logprobs=True)
    handle = llm.model.layers[0].attention.wv.register_forward_hook(lambda module, x, y: -y)
    assert llm.generate([PROMPT], 6, 0) != want
    handle.remove()
    again = llm.generate([PROMPT], 6, 0, logprobs=True)
    assert again[0] == want[0] and again[1][0] == pytest.approx(want[1][0], abs=1e-4)


@pytest.mark.parametrize(
    "harmless",
    [
        lambda model: model.eval(),
        lambda model: setattr(model, "note", object()),
        lambda model: model.state_dict(),
        lambda model: [p.requires_grad_(False) for p in model.parameters()],
    ],
)
def test_what_no_pass_reads_keeps_the_prefixes(harmless: Callable[[Transformer], Any]) -> None:
    llm = build_golden()
    llm.generate([PROMPT], 6, 0)
    harmless(llm.model)
    before = llm.engine.tokens
    llm.generate([PROMPT], 1, 0)
    assert llm.engine.tokens - before == 1


def test_edits_that_pytorch_does_not_count_need_one_call() -> None:
    llm, other = build_golden(), build_golden()
    llm.generate([PROMPT], 6, 0)
    for each in (llm, other):
        each.model.layers[0].attention.wv.weight.data.numpy()[:] *= -1
    llm.clear_cache()
    assert llm.generate([PROMPT], 6, 0) == other.generate([PROMPT], 6, 0)


def test_a_version_does_not_take_one_object_for_another_in_its_place() -> None:
    model = build_golden().model
    version = ModelVersion(model)
    assert ModelVersion(model).equals(version)
    for _ in range(3):  # Python may reuse the address of the last object
        model.layers[0].forward = lambda *args: args[0]
        other = ModelVersion(model)
        assert not other.equals(version)
        del model.layers[0].forward
        assert not ModelVersion(model).equals(other) and ModelVersion(model).equals(version)
        version = ModelVersion(model)
        weight = model.norm.weight
        model.norm.weight = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        del weight
        assert not ModelVersion(model).equals(version)
        version = ModelVersion(model)


@pytest.mark.parametrize("folder", ["mha-mp1", "gqa-mp1"])
def test_a_hand_made_stack_over_the_blocks_equals_the_library(folder: str) -> None:
    compare(folder)


@pytest.mark.slow
def test_a_hand_made_stack_equals_the_library_on_two_ranks() -> None:
    job = run_ranks(2, ROOT / "tests" / "workers" / "hand_made.py")
    assert job.returncode == 0, job.stderr


def test_blocks_have_the_originals_attributes(args: ModelArgs) -> None:
    block = TransformerBlock(1, args)
    assert (block.n_heads, block.dim, block.head_dim, block.layer_id) == (8, 64, 8, 1)
    attention = block.attention
    numbers = (
        attention.n_kv_heads,
        attention.n_local_heads,
        attention.n_local_kv_heads,
        attention.n_rep,
    )
    assert numbers == (4, 8, 4, 2) and attention.head_dim == 8
    assert attention.cache_k.shape == attention.cache_v.shape == (4, 64, 4, 8)
    model = Transformer(args)
    model(torch.tensor([[1, 2, 3]]), 0)
    held = model.layers[1].attention
    assert held.cache_k[0, :3].abs().sum() > 0 and held.cache_k[0, 3:].abs().sum() == 0
    held.cache_v[0, 0] = 7.0
    assert (held.cache.v[1][0, :, 0] == 7).all()
    assert model.half().layers[1].attention.cache_k.dtype == torch.float16


def test_fairscales_arguments_are_taken_or_refused_by_name() -> None:
    build_golden()
    layer = ColumnParallelLinear(8, 4, bias=False, gather_output=False, init_method=nn.init.zeros_)
    assert (layer.weight == 0).all() and layer(torch.ones(1, 1, 8)).shape == (1, 1, 4)
    assert RowParallelLinear(8, 4, bias=False, input_is_parallel=True)(
        torch.ones(1, 1, 8)
    ).shape == (1, 1, 4)
    assert ParallelEmbedding(5, 8, init_method=nn.init.ones_)(torch.tensor([[1, 2]])).sum() == 16
    for make, sentence in (
        (
            lambda: ColumnParallelLinear(8, 4),
            "bias is True, which Llama's layers do not support: pass bias=False",
        ),
        (lambda: RowParallelLinear(8, 4, bias=False, stride=2), "stride is 2, .*: pass stride=1"),
        (lambda: ParallelEmbedding(5, 8, padding_idx=0), None),
        (lambda: ParallelEmbedding(5, 8, max_norm=1.0), "max_norm is 1.0, .*: pass max_norm=None"),
        (lambda: ParallelEmbedding(5, 8, sparse=True), "sparse is True, .*: pass sparse=False"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()


@pytest.mark.slow
def test_gradients_on_several_ranks_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text("""
import torch
from conftest import build_golden
model = build_golden("gqa-mp2").model.train().requires_grad_(True)
try:
    model(torch.tensor([[1, 2, 3]])).sum().backward()
except RuntimeError as error:
    assert "gradients are not supported on 2 ranks: train on one rank" in str(error), error
else:
    raise SystemExit("silently wrong gradients")
with torch.no_grad():
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
""")
    job = run_ranks(2, script)
    assert job.returncode == 0, job.stderr


def test_fused_forms_give_way_to_whoever_watches() -> None:
    model = build_golden(quantize="int8").model
    with torch.inference_mode():
        assert not ops.must_run_plain(model)
        handle = model.layers[0].attention.wq.register_forward_pre_hook(lambda *_: None)
        assert ops.must_run_plain(model)
        handle.remove()
        everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert ops.must_run_plain(model)
        everywhere.remove()
        model.layers[1].forward = lambda *args: args[0]
        assert ops.must_run_plain(model)
        del model.layers[1].forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Attention, "forward", lambda *args: args[1])
            assert ops.must_run_plain(model)
        assert not ops.must_run_plain(model)
        model.norm = nn.LayerNorm(64)
        assert ops.must_run_plain(model)
    assert ops.must_run_plain(build_golden().model), "gradients may be wanted"


def test_plain_parameters_lie_in_no_writable_file(tmp_path: Path) -> None:
    """Editing a memory-mapped weight must not change the file."""
    state = {
        name: t.bfloat16() for name, t in torch.load(GOLDEN / "mha-mp1/consolidated.00.pth").items()
    }
    torch.save(state, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text((GOLDEN / "mha-mp1" / "params.json").read_text())
    before = (tmp_path / "consolidated.00.pth").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.compat.has_bfloat16_products", lambda: True)
        patch.setattr("llama.ops.kernels.multiplies_bfloat16", lambda: True)
        patch.setattr("llama.ops.kernels.fits_bfloat16", lambda x, weight: False)
        llm = Llama.build(tmp_path, GOLDEN / "tokenizer.model", 64, 2, device="cpu")
        names = dict(llm.model.named_parameters())
        linear = names["layers.0.attention.wq.weight"]
        assert linear.dtype == torch.bfloat16 and names["norm.weight"].dtype == torch.float32
        assert set(names) == set(llm.model.state_dict())
        copied = copy.deepcopy(llm.model)
        want = llm.generate([PROMPT], 6, 0)
        linear.data.mul_(2)
        assert llm.generate([[1, 40]], 6, 0)
        again = Llama.build(tmp_path, GOLDEN / "tokenizer.model", 64, 2, device="cpu")
        assert again.generate([PROMPT], 6, 0) == want
        assert torch.equal(copied.layers[0].attention.wq.weight * 2, linear)
    assert (tmp_path / "consolidated.00.pth").read_bytes() == before


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"quantize": "int4"}])
def test_a_packed_layers_weight_is_a_read_only_copy_until_one_is_assigned(
    options: dict[str, Any],
) -> None:
    llm = build_golden(**options)
    layer = llm.model.layers[0].attention.wv
    assert isinstance(layer, ShardedLinear)
    weight = layer.weight
    assert weight.shape == (32, 64)
    with pytest.raises(RuntimeError, match="[Ii]nference tensor"):
        weight.mul_(2)
    before = llm.generate([PROMPT], 6, 0, logprobs=True)
    layer.weight = nn.Parameter(-weight.clone(), requires_grad=False)
    assert layer.packed is None and "layers.0.attention.wv.weight" in dict(
        llm.model.named_parameters()
    )
    after = llm.generate([PROMPT], 6, 0, logprobs=True)
    assert after[1] != before[1]
    again = pickle.loads(pickle.dumps(llm.model))
    tokens = torch.tensor([expected("gqa")["prompt_tokens"][0]])
    torch.testing.assert_close(again(tokens), llm.model(tokens))


def logprobs_of(llm: Llama, prompt: list[int] = PROMPT) -> list[float]:
    return (llm.generate([prompt], 6, 0, logprobs=True)[1] or [[]])[0]


def other_block(llm: Llama) -> None:
    llm.model.layers[0](torch.ones(2, 1, 64), 3, llm.model.freqs_cis[3:4], None)


def hooked_pass(llm: Llama) -> None:
    handle = llm.model.layers[0].attention.wv.register_forward_hook(lambda module, x, y: -y)
    llm.model(torch.tensor([PROMPT] * 4), 0)
    handle.remove()


def other_weight_for_a_pass(llm: Llama) -> None:
    layer = llm.model.layers[0].attention.wv
    kept = layer.weight
    layer.weight = nn.Parameter(-kept, requires_grad=False)
    llm.model(torch.tensor([PROMPT] * 4), 0)
    layer.weight = kept


def other_forward_amid_a_stream(llm: Llama) -> None:
    stream = llm.stream_text_completion(["The model is"], 0, max_gen_len=12)
    next(stream)
    layer = llm.model.layers[0]
    inner = layer.forward
    layer.forward = lambda *args: inner(*args) * 2
    llm.engine.step()
    del layer.forward
    list(stream)


def another_cache(llm: Llama) -> None:
    llm.model.allocate_cache()


def copied_layer(llm: Llama) -> None:
    llm.model.layers[1] = copy.deepcopy(llm.model.layers[1])


def zeroed_cache(llm: Llama) -> None:
    attention = llm.model.layers[0].attention
    attention.cache_k = torch.zeros(attention.cache_k.shape)


def moved_nowhere(llm: Llama) -> None:
    llm.model.to("cpu")


def forgetting_amid_a_pass(llm: Llama) -> None:
    handle = llm.model.layers[1].register_forward_hook(lambda *_: llm.clear_cache())
    llm.generate([[1, 50, 51, 52]], 3, 0)
    handle.remove()


@pytest.mark.parametrize(
    "between",
    [
        *(other_block, hooked_pass, other_weight_for_a_pass, other_forward_amid_a_stream),
        *(another_cache, copied_layer, zeroed_cache, moved_nowhere, forgetting_amid_a_pass),
    ],
)
def test_what_comes_between_two_calls_leaves_no_trace(between: Callable[[Llama], None]) -> None:
    llm = build_golden()
    text = llm.text_completion(["The model is"], 0, max_gen_len=12)
    want = logprobs_of(llm)
    between(llm)
    assert logprobs_of(llm) == pytest.approx(want, abs=1e-4)
    again = llm.text_completion(["The model is"] * 3, 0, max_gen_len=12)
    assert again == text * 3


def test_a_new_block_joins_the_cache(args: ModelArgs) -> None:
    llm = build_golden()
    before = logprobs_of(llm)
    state = llm.model.layers[1].state_dict()
    llm.model.layers[1] = TransformerBlock(1, llm.model.params)
    llm.model.layers[1].load_state_dict(state)
    assert logprobs_of(llm) == pytest.approx(before, abs=1e-4)
    llm.model.layers.append(copy.deepcopy(llm.model.layers[1]))
    longer = logprobs_of(llm)
    assert longer != pytest.approx(before, abs=1e-2)
    whole = llm.model(torch.tensor([PROMPT]), 0).log_softmax(-1)[0, -1].max()
    assert longer[0] == pytest.approx(float(whole), abs=1e-4)


def test_copies_of_layers_and_models_have_caches_of_their_own() -> None:
    llm = build_golden()
    want = logprobs_of(llm)
    assert copy.deepcopy(llm.model.layers[0]).attention.cache is None
    copied = Llama(copy.deepcopy(llm.model), llm.tokenizer)
    assert all(layer.attention.cache is copied.model.cache for layer in copied.model.layers)
    assert logprobs_of(copied) == pytest.approx(want, abs=1e-4)
    assert logprobs_of(llm) == pytest.approx(want, abs=1e-4)


def test_settings_of_a_users_own_module_count() -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner, self.factor = inner, 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.factor

    llm = build_golden()
    scaled = llm.model.layers[0].attention.wv = Scaled(llm.model.layers[0].attention.wv)
    before = logprobs_of(llm)
    scaled.factor = -1.0
    assert logprobs_of(llm) != pytest.approx(before, abs=1e-2)
    scaled.factor = 1.0
    assert logprobs_of(llm) == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("how", ["to_empty", "assigned"])
def test_a_model_made_on_the_meta_device_runs_once_it_has_weights(
    args: ModelArgs, how: str
) -> None:
    state = random_state(args)
    with torch.device("meta"):
        model = Transformer(args)
    if how == "to_empty":
        model.to_empty(device="cpu").load_state_dict(state)
    else:
        model.load_state_dict(state, assign=True)
    plain = Transformer(args)
    plain.load_state_dict(state)
    tokens = torch.tensor([PROMPT])
    torch.testing.assert_close(model(tokens), plain(tokens))
    torch.testing.assert_close(model.train()(tokens), plain.train()(tokens))
    assert model.eval().half()(tokens).isfinite().all()


def test_blocks_by_hand_are_differentiable_and_refuse_what_their_cache_cannot_hold(
    args: ModelArgs,
) -> None:
    attention = Attention(args)
    freqs_cis = torch.ones(1, 4, dtype=torch.complex64)
    attention(torch.ones(1, 1, 64), 0, freqs_cis, None).sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())
    for start, rows in ((64, 1), (0, 5), (-1, 1)):
        with pytest.raises(ValueError, match="the cache has 4 slots of 64 positions: pass fewer"):
            attention(torch.ones(rows, 1, 64), start, freqs_cis, None)


def test_training_under_inference_mode_equals_training() -> None:
    params = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=50, multiple_of=32)
    model = Transformer(params).train()
    tokens = torch.tensor([[3, 4, 5, 6]])
    want = model(tokens).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), want)


def test_a_packed_layers_weight_is_replaced_by_parameters_only() -> None:
    layer = build_golden(quantize="int8").model.layers[0].attention.wv
    with pytest.raises(
        TypeError, match="the layer's weight is packed: assign a torch.nn.Parameter"
    ):
        layer.weight = torch.zeros(32, 64)
    assert layer.bias is None
