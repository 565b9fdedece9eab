from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.utils.prune
from conftest import huggingface_config, random_state
from torch import Tensor

from llama import Llama, ModelArgs, Transformer
from llama.cache import DecodeBatch
from llama.checkpoints.names import huggingface_name, is_rotary, split_halves


def random_model(args: ModelArgs) -> Transformer:
    model = Transformer(args)
    model.load_state_dict(random_state(args), strict=True)
    return model.requires_grad_(False)


def tokens_of(bsz: int, seqlen: int, seed: int = 0) -> Tensor:
    return torch.randint(512, (bsz, seqlen), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_kv_heads", [None, 4, 1])
def test_logits_equal_those_of_transformers(args: ModelArgs, n_kv_heads: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    args.n_kv_heads, args.norm_eps = n_kv_heads, 0.1
    args.rope_theta = 10000.0 if n_kv_heads else 1e6  # Code Llama's value
    state = random_state(args)
    judge = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**huggingface_config(args))
    ).eval()
    renamed = {
        huggingface_name(name): split_halves(tensor, args.head_dim) if is_rotary(name) else tensor
        for name, tensor in state.items()
    }
    judge.load_state_dict(renamed, strict=True)

    tokens = tokens_of(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(
            random_model(args)(tokens), judge(tokens).logits, atol=1e-4, rtol=0
        )


def test_the_feed_forward_widths_are_the_releases() -> None:
    assert ModelArgs().hidden_dim == 11008  # 7B
    assert ModelArgs(dim=5120).hidden_dim == 13824  # 13B
    assert ModelArgs(dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3).hidden_dim == 28672  # 70B


def test_state_dict_holds_the_checkpoints_keys_and_no_request(args: ModelArgs) -> None:
    model = random_model(args)
    names = set(model.state_dict())
    model.allocate_cache()
    model(tokens_of(2, 8), 0)
    assert set(model.state_dict()) == names
    assert "layers.1.attention.wq.weight" in names and len(names) == 3 + 2 * 9


@pytest.mark.parametrize("cuts", [(0, 20), (0, 7, 20), (0, 1, 2, 3, 20), tuple(range(21))])
def test_cached_passes_equal_one_pass(args: ModelArgs, cuts: tuple[int, ...]) -> None:
    model, tokens = random_model(args), tokens_of(3, 20)
    whole = model.train()(tokens)
    model.eval()
    parts = [model(tokens[:, a:b], a) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


def test_rows_at_their_own_positions_equal_the_rows_alone(args: ModelArgs) -> None:
    model, tokens = random_model(args), tokens_of(3, 20)
    whole = model(tokens)
    model(tokens[:, :10], 0)  # rows 0 and 1 keep fewer tokens: the rest is overwritten
    positions = torch.tensor([2, 9, 10])
    view = DecodeBatch(model.cache, positions[:, None], 11, 2)
    step = model(tokens[torch.arange(3), positions][:, None], view)
    torch.testing.assert_close(step[:, 0], whole[torch.arange(3), positions], atol=1e-4, rtol=0)


def test_in_training_the_model_is_differentiable_and_keeps_no_cache(args: ModelArgs) -> None:
    model = Transformer(args).train()
    logits = model(tokens_of(6, 16))  # more rows than the cache has slots
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.cache is None
    assert not model.eval()(tokens_of(2, 16)).requires_grad
    torch.testing.assert_close(
        model(tokens_of(2, 16)), model.train()(tokens_of(2, 16)).detach(), atol=1e-4, rtol=0
    )


def test_rounding_the_weights_leaves_the_rotary_angles_exact(args: ModelArgs) -> None:
    model = random_model(args)
    model(tokens_of(1, 3))
    angles = model.freqs_cis.clone()
    model.bfloat16()(tokens_of(1, 3))
    assert torch.equal(model.freqs_cis, angles)


def test_forward_refuses_what_does_not_fit(args: ModelArgs, llm: Llama) -> None:
    with pytest.raises(ValueError, match="tokens reach position 65, and max_seq_len is 64"):
        llm.model(tokens_of(1, 5), 60)
    with pytest.raises(ValueError, match="tokens have 5 rows, and max_batch_size is 4"):
        llm.model(tokens_of(5, 1), 0)
    for tokens, start in (
        (torch.ones(3).long(), 0),
        (torch.ones(1, 0).long(), 0),
        (torch.ones(1, 3).long(), -1),
    ):
        with pytest.raises(ValueError, match="tokens have shape .* at .*: pass"):
            llm.model(tokens, start)
    with pytest.raises(
        ValueError, match="start_pos is 3 in training mode, which keeps no cache: call eval"
    ):
        random_model(args).train()(tokens_of(1, 5), 3)
    with pytest.raises(
        ValueError,
        match=r"tokens have shape \(1, 65\): pass \(bsz, seqlen\) with seqlen at most max_seq_len, 64",
    ):
        random_model(args).train()(tokens_of(1, 65))
    with pytest.raises(ValueError, match="vocab_size is -1: set it to the tokenizer's n_words"):
        Transformer(ModelArgs())


def test_training_goes_on_after_calls_in_between(args: ModelArgs) -> None:
    model, other = Transformer(args), Transformer(args)
    other.load_state_dict(model.state_dict())
    model(tokens_of(2, 16))
    for each in (model, other):
        each.train()(tokens_of(8, 16)).logsumexp(-1).sum().backward()
        torch.optim.SGD(each.parameters(), 1e-3).step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sixteen_bit_weights_may_meet_wider_activations(args: ModelArgs) -> None:
    model, tokens = random_model(args), tokens_of(2, 12)
    exact = model(tokens)
    for dtype in (torch.bfloat16, torch.float16):
        mixed = random_model(args)
        for name, parameter in mixed.named_parameters():
            if "norm" not in name and "embeddings" not in name:
                parameter.data = parameter.data.to(dtype)
        logits = torch.cat((mixed(tokens[:, :11], 0), mixed(tokens[:, 11:], 11)), dim=1)
        assert mixed.cache.dtype == torch.float32
        error = (logits - exact).norm() / exact.norm()
        assert 0 < error < (0.05 if dtype == torch.bfloat16 else 0.005)
        assert mixed.half()(tokens).isfinite().all() and mixed.cache.dtype == torch.float16


def test_pruned_layers_have_a_state_dict(args: ModelArgs) -> None:
    model = Transformer(args)
    torch.nn.utils.prune.l1_unstructured(model.layers[0].attention.wq, "weight", 0.3)
    assert "layers.0.attention.wq.weight_orig" in model.state_dict()
