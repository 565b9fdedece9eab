"""One decode step of static shapes, so that it can be compiled, and captured as a CUDA graph."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import KVCache, Transformer

logger = logging.getLogger(__name__)

SHORTEST_WINDOW = 256


@dataclass
class Captured:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    start_pos: Tensor
    logits: Tensor


class DecodeStep:
    """Runs one token of every row: tokens (n, 1) at start_pos (n,) -> the logits after them, (n, vocab_size).

    Eagerly, each step attends to exactly the positions that are cached. Compiled or captured, it attends to a window
    whose length is a power of two, masked, so that few shapes occur; a graph is captured for each at its first use.
    """

    def __init__(self, model: Transformer, *, compile: bool = False, cuda_graph: bool = False):
        self.model = model
        self.static = compile or cuda_graph
        self.run = torch.compile(self._run, fullgraph=True) if compile else self._run
        self.captured: dict[tuple[int, int], Captured] | None = {} if cuda_graph else None

    def __call__(self, tokens: Tensor, start_pos: Tensor, cache: KVCache, length: int) -> Tensor:
        """`length` is the number of positions in use, those of `tokens` included."""
        if self.static:
            length = min(max(SHORTEST_WINDOW, 1 << (length - 1).bit_length()), cache.k.shape[3])
        n = tokens.shape[0]
        window = cache.window(slice(n), length)
        if self.captured is not None and (n, length) not in self.captured:
            try:
                self.captured[n, length] = self._capture(tokens, start_pos, window)
            except RuntimeError as error:
                logger.warning("decoding without CUDA graphs: %s", error)
                self.captured = None
        if self.captured is None:
            return self.run(tokens, window, start_pos)
        step = self.captured[n, length]
        step.tokens.copy_(tokens)
        step.start_pos.copy_(start_pos)
        step.graph.replay()
        return step.logits

    def _run(self, tokens: Tensor, window: KVCache, start_pos: Tensor) -> Tensor:
        return self.model.logits(self.model.hidden_states(tokens, window, start_pos)[:, 0])

    def _capture(self, tokens: Tensor, start_pos: Tensor, window: KVCache) -> Captured:
        tokens, start_pos = tokens.clone(), start_pos.clone()
        with torch.cuda.device(tokens.device):
            # Kernels choose their algorithms and allocate at first use, which a capture may not. These runs write what
            # the replay is about to write at the same positions, so they leave no trace.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.run(tokens, window, start_pos)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.run(tokens, window, start_pos)
        return Captured(graph, tokens, start_pos, logits)
