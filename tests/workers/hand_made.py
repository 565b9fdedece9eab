"""A user's own stack of the library's blocks, as in scripts written for the original.

The layers around the blocks are fairscale's, the blocks keep their own cache, and `start_pos` is an
integer.
"""

from __future__ import annotations

import torch
from conftest import build_golden, expected
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding
from torch import Tensor, nn

from llama.model import ModelArgs, RMSNorm, TransformerBlock, precompute_freqs_cis


class Stack(nn.Module):
    def __init__(self, params: ModelArgs):
        super().__init__()
        self.params = params
        keep = lambda weight: weight  # noqa: E731
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim, init_method=keep)
        self.layers = nn.ModuleList(
            TransformerBlock(number, params) for number in range(params.n_layers)
        )
        self.norm = RMSNorm(params.dim, eps=params.norm_eps)
        self.output = ColumnParallelLinear(
            params.dim, params.vocab_size, bias=False, init_method=keep
        )
        self.freqs_cis = precompute_freqs_cis(params.dim // params.n_heads, 2 * params.max_seq_len)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        seqlen = tokens.shape[1]
        h = self.tok_embeddings(tokens)
        mask = None
        if seqlen > 1:
            later = torch.triu(torch.full((seqlen, seqlen), float("-inf")), diagonal=1)
            mask = torch.cat((torch.zeros(seqlen, start_pos), later), dim=1)
        for layer in self.layers:
            h = layer(h, start_pos, self.freqs_cis[start_pos : start_pos + seqlen], mask)
        return self.output(self.norm(h)).float()


def compare(folder: str) -> None:
    """Check the stack's logits against the library's: a prompt, then one token, then several."""
    llm = build_golden(folder)
    stack = Stack(llm.model.params)
    stack.load_state_dict(llm.model.state_dict())
    tokens = torch.tensor(
        [ids[:7] for ids in expected(folder)["prompt_tokens"] if len(ids) >= 7][:3]
    )
    for begin, end in ((0, 4), (4, 5), (5, 7)):
        ours = stack(tokens[:, begin:end], begin)
        torch.testing.assert_close(ours, llm.model(tokens[:, begin:end], begin), atol=1e-4, rtol=0)
    held = stack.layers[0].attention.cache_k
    assert held.shape == llm.model.layers[0].attention.cache_k.shape
    torch.testing.assert_close(
        held[: len(tokens), :7], llm.model.layers[0].attention.cache_k[: len(tokens), :7]
    )


if __name__ == "__main__":
    for name in ("mha-mp1", "gqa-mp4"):
        compare(name)
