"""What our kernels compute beside PyTorch and float64; the products of 4 and 8 bits are in test_stores.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import Attended, Seen
from llama.engine.tape import Pool, Tape
from llama.model import RMSNorm, apply_rotary_emb, attend, precompute_freqs_cis
from llama.ops import kernels
from llama.quantization.formats import has_bfloat16_products

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="our kernels were not built")
multiplies_bfloat16 = pytest.mark.skipif(not has_bfloat16_products(), reason="needs bfloat16 instructions")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True)
def inference_mode() -> object:
    with torch.inference_mode():
        yield


def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on PyTorch's own operations compute."""
    monkeypatch.setattr(kernels, "fit", lambda *tensors: False)


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
    gate = torch.cat((draw(2000) * 10, torch.tensor([0.0, -0.0, 1e-30, 60, -60, 88, -88, 1e4, -1e4, 1e30, -1e30])))
    up = draw(len(gate))
    exact = F.silu(gate.double()) * up.double()
    ours = kernels.silu_multiply(gate[None], up[None])[0]
    torch.testing.assert_close(ours.double(), exact, atol=1e-30, rtol=2e-6)
    unknown = torch.tensor([[torch.nan, 1.0]])
    assert kernels.silu_multiply(unknown, unknown.flip(1)).isnan().all()


def test_the_gate_of_a_product_that_is_split() -> None:
    both = draw(2, 3, 22)
    gate, up = both.split([11, 11], dim=-1)
    torch.testing.assert_close(kernels.silu_multiply(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(kernels.silu_multiply(gate, up.contiguous()), F.silu(gate) * up)


@pytest.mark.parametrize("own_positions", [False, True])
def test_the_rotary_embedding(own_positions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(2, 5, 3 * 8 * 2)
    xq, xk = x.unflatten(-1, (6, 8)).split([4, 2], dim=2)  # parts of one product, whose tokens are apart
    freqs_cis = precompute_freqs_cis(8, 64)
    freqs_cis = freqs_cis[torch.tensor([[3, 4, 5, 6, 7], [20, 21, 22, 23, 24]])] if own_positions else freqs_cis[2:7]
    before, ours = x.clone(), apply_rotary_emb(xq, xk, freqs_cis)
    assert torch.equal(x, before)
    stock(monkeypatch)
    for near, exact in zip(ours, apply_rotary_emb(xq, xk, freqs_cis), strict=True):
        torch.testing.assert_close(near, exact)


def test_angles_that_are_not_the_originals_are_pytorchs_to_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    xq, xk, freqs_cis = draw(2, 3, 4, 8), draw(2, 3, 2, 8), precompute_freqs_cis(8, 5)
    rotated = apply_rotary_emb(xq, xk, freqs_cis[:3])
    back = apply_rotary_emb(*rotated, freqs_cis[:3].conj())
    torch.testing.assert_close(back, (xq, xk))
    assert torch.equal(apply_rotary_emb(xq, xk, freqs_cis[None, :3])[0], rotated[0])
    torch.testing.assert_close(apply_rotary_emb(xq, xk, freqs_cis[:3].to(torch.complex128))[0], rotated[0])
    with pytest.raises(RuntimeError):
        apply_rotary_emb(xq, xk, freqs_cis)
    with pytest.raises(RuntimeError):
        RMSNorm(8)(draw(2, 16))


@pytest.mark.parametrize("dim", [16, 48, 64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "seqlen"), [(4, 4, 1), (4, 4, 3), (8, 1, 1), (4, 2, 4)])
def test_attention_sees_a_row_up_to_each_token(dim: int, heads: int, kv_heads: int, seqlen: int) -> None:
    length, starts = 200, torch.tensor([[0], [63], [64], [150]])
    xq, positions = draw(4, seqlen, heads, dim), starts + torch.arange(seqlen)
    keys, values = draw(2, 6, kv_heads, 256, dim)[:, :4, :, :length]
    seen = Seen(positions, length, heads // kv_heads)
    exact = F.scaled_dot_product_attention(
        xq.transpose(1, 2).double(),
        keys.double().repeat_interleave(heads // kv_heads, dim=1),
        values.double().repeat_interleave(heads // kv_heads, dim=1),
        attn_mask=(torch.arange(length) <= positions[:, None, :, None]),
    )
    beyond = torch.arange(length)[:, None] > positions.amax(dim=1)[:, None, None, None]
    keys, values = (t.masked_fill(beyond, torch.nan) for t in (keys, values))  # nothing of it is touched
    assert kernels.attends(seqlen * heads // kv_heads, dim)
    ours = attend(xq, Attended(slice(None), keys, values, seen))
    torch.testing.assert_close(ours.double(), exact.transpose(1, 2).flatten(2), atol=2e-6, rtol=2e-6)
    alone = attend(
        xq[2:3], Attended(slice(None), keys[2:3], values[2:3], Seen(positions[2:3], length, heads // kv_heads))
    )
    assert torch.equal(alone[0], ours[2])


def test_attention_with_scores_that_differ_by_far_and_with_one_that_is_no_number() -> None:
    xq, positions = torch.full((1, 1, 1, 16), 30.0), torch.tensor([[99]])
    keys, values = torch.zeros(1, 1, 100, 16), draw(1, 1, 100, 16)
    keys[0, 0, 70] = 30
    torch.testing.assert_close(kernels.attend(xq, keys, values, positions)[0, 0, 0], values[0, 0, 70])
    keys[0, 0, 20] = torch.nan
    assert kernels.attend(xq, keys, values, positions).isnan().all()


def test_the_cache_is_written_where_tokens_stand_and_nowhere_else() -> None:
    cached, positions = torch.zeros(3, 2, 10, 4), torch.tensor([[0, 1], [5, 6]])
    x = draw(2, 2, 3, 4)[:, :, :2]
    wanted = cached.clone()
    wanted[torch.arange(2)[:, None], :, positions] = x
    kernels.write_cache(x, positions, cached[:2])
    assert torch.equal(cached, wanted)
    kernels.write_cache(x, torch.arange(2).expand(2, 2), cached[:2])  # positions that share their memory
    assert torch.equal(cached[:2, :, :2], x.transpose(1, 2))


@multiplies_bfloat16
@pytest.mark.parametrize("shape", [(1, 32), (17, 88), (64, 2048), (33, 90), (521, 40)])
def test_bfloat16_weights_are_multiplied_where_they_lie(shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight = draw(rows, columns + 6).bfloat16()[:, :columns]  # a part of each row, as a rank has it
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
            assert torch.equal(torch.vmap(norm)(x := draw(3, 2, 8)), F.rms_norm(x, (8,), norm.weight, norm.eps))


def test_a_tape_refuses_what_python_decides_by() -> None:
    with pytest.raises(NotImplementedError, match="returns what a tape cannot repeat"), Tape(Pool()):
        assert draw(3).sum() != 0
    assert kernels.recorders.current is None


def test_a_tape_plays_again_on_other_values_what_was_computed() -> None:
    norm, table = RMSNorm(16), nn.Embedding(50, 32)

    def work(ids: Tensor, at: Tensor) -> Tensor:
        h = table(ids)
        h = h + kernels.silu_multiply(*h.split([16, 16], dim=-1)).repeat(1, 1, 2)
        h[..., 3:5] *= 2  # in place, of a view
        counts = torch.zeros(4)
        counts += at.float().sum()
        return norm(h.unflatten(-1, (2, 16)))[..., 0] @ torch.ones(2, 3) + counts[:3]

    pool = Pool()
    tapes = []
    for n in (1, 3):
        ids, at = torch.zeros(1, n, dtype=torch.long), torch.zeros(1, n, dtype=torch.long)
        with Tape(pool) as tape:
            out = work(ids, at)
        tapes.append((n, tape, ids, at, out))
    for seed, (n, tape, ids, at, out) in enumerate(2 * tapes):  # in turns: they share a pool
        ids.copy_(torch.randint(50, (1, n), generator=torch.Generator().manual_seed(seed)))
        at.fill_(seed)
        tape.play()
        assert torch.equal(out, work(ids, at))
