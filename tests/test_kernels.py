"""Our kernels, compared with PyTorch and float64.

test_formats.py has the products with 4-bit and 8-bit weights.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.compat import has_bfloat16_products
from llama.model import RMSNorm, apply_rotary_emb, precompute_freqs_cis
from llama.ops import CausalMask, attention, kernels, swiglu, write_cache

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="our kernels were not built")
multiplies_bfloat16 = pytest.mark.skipif(
    not has_bfloat16_products(), reason="needs bfloat16 instructions"
)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True)
def inference_mode() -> object:
    with torch.inference_mode():
        yield


def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use PyTorch's own operations from here on."""
    monkeypatch.setattr(kernels, "fits", lambda *tensors: False)


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 5, 257), (2, 40, 4096)])
def test_the_norm(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = RMSNorm(shape[-1], 1e-5), draw(*shape) * 7
    norm.weight.copy_(draw(shape[-1]))
    exact = F.rms_norm(x.double(), shape[-1:], norm.weight.double(), 1e-5)
    ours = norm(x)
    torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=1e-6)
    assert torch.equal(norm(torch.zeros(shape)), torch.zeros(shape))
    assert norm(torch.full(shape, torch.nan)).isnan().all()
    stock(monkeypatch)
    torch.testing.assert_close(norm(x), ours)


def test_the_gate_as_far_as_float32_reaches() -> None:
    gate = torch.cat(
        (
            draw(2000) * 10,
            torch.tensor([0.0, -0.0, 1e-30, 60, -60, 88, -88, 1e4, -1e4, 1e30, -1e30]),
        )
    )
    up = draw(len(gate))
    exact = F.silu(gate.double()) * up.double()
    ours = swiglu(gate[None], up[None])[0]
    torch.testing.assert_close(ours.double(), exact, atol=1e-30, rtol=2e-6)
    unknown = torch.tensor([[torch.nan, 1.0]])
    assert swiglu(unknown, unknown.flip(1)).isnan().all()


def test_the_gate_of_a_product_that_is_split() -> None:
    both = draw(2, 3, 22)
    gate, up = both.split([11, 11], dim=-1)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(swiglu(gate, up.contiguous()), F.silu(gate) * up)


@pytest.mark.parametrize("own_positions", [False, True])
def test_the_rotary_embedding(own_positions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(2, 5, 3 * 8 * 2)
    # Views of one product: their tokens are not contiguous.
    xq, xk = x.unflatten(-1, (6, 8)).split([4, 2], dim=2)
    freqs_cis = precompute_freqs_cis(8, 64)
    freqs_cis = (
        freqs_cis[torch.tensor([[3, 4, 5, 6, 7], [20, 21, 22, 23, 24]])]
        if own_positions
        else freqs_cis[2:7]
    )
    before, ours = x.clone(), apply_rotary_emb(xq, xk, freqs_cis)
    assert torch.equal(x, before)
    stock(monkeypatch)
    for near, exact in zip(ours, apply_rotary_emb(xq, xk, freqs_cis), strict=True):
        torch.testing.assert_close(near, exact)


def test_angles_that_are_not_the_originals_are_pytorchs_to_multiply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    xq, xk, freqs_cis = draw(2, 3, 4, 8), draw(2, 3, 2, 8), precompute_freqs_cis(8, 5)
    rotated = apply_rotary_emb(xq, xk, freqs_cis[:3])
    back = apply_rotary_emb(*rotated, freqs_cis[:3].conj())
    torch.testing.assert_close(back, (xq, xk))
    torch.testing.assert_close(apply_rotary_emb(xq, xk, freqs_cis[None, :3])[0], rotated[0])
    torch.testing.assert_close(
        apply_rotary_emb(xq, xk, freqs_cis[:3].to(torch.complex128))[0], rotated[0]
    )
    with pytest.raises(RuntimeError):
        apply_rotary_emb(xq, xk, freqs_cis)
    with pytest.raises(RuntimeError):
        RMSNorm(8)(draw(2, 16))


@pytest.mark.parametrize("dim", [16, 48, 64, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seqlen"), [(4, 4, 1), (4, 4, 3), (8, 1, 1), (4, 2, 4)]
)
def test_attention_sees_a_row_up_to_each_token(
    dim: int, heads: int, kv_heads: int, seqlen: int
) -> None:
    length, starts = 200, torch.tensor([[0], [63], [64], [150]])
    xq, positions = draw(4, seqlen, heads, dim), starts + torch.arange(seqlen)
    keys, values = draw(2, 6, kv_heads, 256, dim)[:, :4, :, :length]
    mask = CausalMask(positions, length, heads // kv_heads)
    exact = F.scaled_dot_product_attention(
        xq.transpose(1, 2).double(),
        keys.double().repeat_interleave(heads // kv_heads, dim=1),
        values.double().repeat_interleave(heads // kv_heads, dim=1),
        attn_mask=(torch.arange(length) <= positions[:, None, :, None]),
    )
    beyond = torch.arange(length)[:, None] > positions.amax(dim=1)[:, None, None, None]
    # Keys and values beyond the last position are never read.
    keys, values = (t.masked_fill(beyond, torch.nan) for t in (keys, values))
    ours = attention(xq, keys, values, mask)
    torch.testing.assert_close(
        ours.double(), exact.transpose(1, 2).flatten(2), atol=2e-6, rtol=2e-6
    )
    own = CausalMask(positions[2:3], length, heads // kv_heads)
    alone = attention(xq[2:3], keys[2:3], values[2:3], own)
    assert torch.equal(alone[0], ours[2])


def test_attention_with_scores_that_differ_by_far_and_with_one_that_is_no_number() -> None:
    xq, positions = torch.full((1, 1, 1, 16), 30.0), torch.tensor([[99]])
    keys, values = torch.zeros(1, 1, 100, 16), draw(1, 1, 100, 16)
    keys[0, 0, 70] = 30
    torch.testing.assert_close(
        attention(xq, keys, values, CausalMask(positions, 100, 1))[0, 0], values[0, 0, 70]
    )
    keys[0, 0, 20] = torch.nan
    assert attention(xq, keys, values, CausalMask(positions, 100, 1)).isnan().all()


def test_the_cache_is_written_where_tokens_stand_and_nowhere_else() -> None:
    cached, positions = torch.zeros(3, 2, 10, 4), torch.tensor([[0, 1], [5, 6]])
    x = draw(2, 2, 3, 4)[:, :, :2]
    wanted = cached.clone()
    wanted[torch.arange(2)[:, None], :, positions] = x
    write_cache(x, positions, cached[:2])
    assert torch.equal(cached, wanted)
    write_cache(x, torch.arange(2).expand(2, 2), cached[:2])  # positions share memory
    assert torch.equal(cached[:2, :, :2], x.transpose(1, 2))


@multiplies_bfloat16
@pytest.mark.parametrize("shape", [(1, 32), (17, 88), (64, 2048), (33, 90), (521, 40)])
def test_bfloat16_weights_are_multiplied_where_they_lie(shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight = draw(rows, columns + 6).bfloat16()[:, :columns]  # part of each row, like a shard
    for n in (1, 2, 3, 4, 5, 8, 9, 16):
        x = draw(n, 1, columns)
        exact = x.bfloat16().double() @ weight.double().T
        y = kernels.multiply_bfloat16(x, weight)
        assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()
    x[1] = 0
    x[2, 0, 3] = torch.nan
    y = kernels.multiply_bfloat16(x, weight)
    assert (y[1] == 0).all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()


def test_nothing_of_ours_computes_where_gradients_are_wanted() -> None:
    norm = RMSNorm(8)
    with torch.inference_mode(False):
        trained = RMSNorm(8)
        trained(draw(2, 8)).sum().backward()
        assert trained.weight.grad is not None
        with torch.no_grad():
            assert torch.equal(
                torch.vmap(norm)(x := draw(3, 2, 8)), F.rms_norm(x, (8,), norm.weight, norm.eps)
            )
