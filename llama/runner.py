"""Ids at positions -> logits and hidden states: a pass' shapes and threads, compiled or captured as a CUDA graph."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .cache import Batch, KVCache, Run, Runs
from .model import Transformer
from .tape import Pool, Tape

logger = logging.getLogger(__name__)

SHORTEST_WINDOW = 256

# Multiplications of a matrix product from which on a second thread gains more than it costs to wake.
PARALLEL_WORK = 2**18

# Tokens of a pass up to which it is recorded: of more, products take so long that Python's way to them does not count.
RECORDED_TOKENS = 8

# Tokens (n, seqlen) and positions (n, seqlen) -> logits (n, seqlen, vocab_size).
Program = Callable[[Tensor, Tensor], Tensor]


class Runner:
    """Runs passes over a model's cache. What the rows then hold is for the caller to say.

    Eagerly, a decode pass attends to exactly the positions in use. Compiled or captured, its rows and the window that
    it attends to are rounded up to powers of two, so that few shapes occur; each is made at its first use.
    """

    def __init__(self, model: Transformer, *, compile: bool = False, cuda_graph: bool = False):
        assert model.cache is not None, "allocate_cache first"
        self.model, self.cache = model, model.cache
        self.compile, self.cuda_graph = compile, cuda_graph
        self.graph_pool: Any = None
        self.pool = Pool()
        self.forget()

    @property
    def static(self) -> bool:
        return self.compile or self.cuda_graph

    @property
    def device(self) -> torch.device:
        return self.cache.k.device

    def rows(self, n: int) -> int:
        """How many rows a decode pass over the first `n` takes."""
        return min(1 << (n - 1).bit_length(), self.cache.rows) if self.static else n

    def decode(self, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Logits (n, seqlen, vocab_size) after tokens (n, seqlen) of the first n rows, from positions `starts` on."""
        n, seqlen = len(tokens), len(tokens[0])
        length = max(starts) + seqlen
        if self.static:
            length = min(max(SHORTEST_WINDOW, 1 << (length - 1).bit_length()), self.cache.length)
        ids = torch.tensor(tokens, device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(seqlen, device=self.device)
        with self._threads(n * seqlen):
            if self._can_record(n, seqlen):
                return self._recorded(ids, positions)
            if not self.static:
                return decode(self.model, self.cache, ids, positions, length=length)
            key = (n, seqlen, length, self.model.moves)
            if key not in self.programs:
                self.programs[key] = self._program(ids, positions, length)
            return self.programs[key](ids, positions)

    def feed(self, runs: Sequence[Run]) -> Tensor:
        """The hidden states (total, dim) of runs, one after another."""
        tokens = torch.tensor([[token for run in runs for token in run.ids]], device=self.device)
        with self._threads(tokens.numel()):
            return self.model.hidden_states(tokens, Runs(self.cache, runs, self.model.groups))[0]

    def logits(self, h: Tensor) -> Tensor:
        """(n, vocab_size) for hidden states (n, dim), each rounded as if it were alone."""
        with self._threads(len(h)):
            return self.model.logits(h[:, None])[:, 0]

    def forget(self) -> None:
        """The model's tensors are others: what was made of the former ones is of no use."""
        self.programs: dict[tuple[int, ...], Program] = {}
        self.met: set[tuple[int, ...]] = set()
        self.hooks = [h for m in self.model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]

    def _can_record(self, n: int, seqlen: int) -> bool:
        """Whether a pass is one of our kernels from end to end: what it calls does not depend on lengths."""
        args = self.model.params
        return (
            not self.static
            and n * seqlen <= RECORDED_TOKENS
            and self.model.ranks.size == 1
            and kernels.attends(seqlen * self.model.groups, args.head_dim)
            and kernels.fit(self.cache.k)
            and not any(self.hooks)
        )

    def _recorded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Play a pass of this shape again. The first of its kind is none: it may make what later ones find."""
        key = (*ids.shape, torch.get_num_threads(), self.model.moves)
        if key in self.programs:
            return self.programs[key](ids, positions)
        run = partial(decode, self.model, self.cache, length=self.cache.length)
        if key not in self.met:
            self.met.add(key)
            return run(ids, positions)
        ids, positions = ids.clone(), positions.clone()
        with Tape(self.pool) as tape:
            logits = run(ids, positions)

        def play(tokens: Tensor, at: Tensor) -> Tensor:
            ids.copy_(tokens)
            positions.copy_(at)
            tape.play()
            return logits

        self.programs[key] = play
        return logits

    def _program(self, tokens: Tensor, positions: Tensor, length: int) -> Program:
        run = decode
        if self.compile:
            # dynamo counts the compilations of each code object, and stops at the eighth: every shape has its own.
            own = decode.__code__.replace(co_name=f"decode_{tokens.shape[0]}_{tokens.shape[1]}_{length}")
            run = torch.compile(FunctionType(own, decode.__globals__), fullgraph=True, dynamic=False)
        program: Program = partial(run, self.model, self.cache, length=length)
        if not self.cuda_graph:
            return program
        try:
            return self._capture(program, tokens.clone(), positions.clone())
        except RuntimeError as error:
            logger.warning("decoding without CUDA graphs: %s", error)
            self.cuda_graph = False
            return program

    def _capture(self, program: Program, tokens: Tensor, positions: Tensor) -> Program:
        with torch.cuda.device(self.device):
            # Kernels choose their algorithms and allocate at first use, which a capture may not. These runs write what
            # the replay is about to write at the same positions, so they leave no trace.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    program(tokens, positions)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # One pool for all graphs: no two run at once, and so they share the memory of one.
            self.graph_pool = self.graph_pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self.graph_pool, capture_error_mode="thread_local"):
                logits = program(tokens, positions)

        def replay(ids: Tensor, at: Tensor) -> Tensor:
            tokens.copy_(ids)
            positions.copy_(at)
            graph.replay()
            return logits

        return replay

    @contextlib.contextmanager
    def _threads(self, tokens: int) -> Iterator[None]:
        """One thread for passes so small that others would only be waited for: on busy cores, many times too long."""
        threads, args = torch.get_num_threads(), self.model.params
        work = tokens * args.dim * args.hidden_dim // self.model.ranks.size
        if threads == 1 or self.device.type != "cpu" or work >= PARALLEL_WORK:
            yield
            return
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)


def decode(model: Transformer, cache: KVCache, tokens: Tensor, positions: Tensor, *, length: int) -> Tensor:
    return model.logits(model.hidden_states(tokens, Batch(cache, positions, length, model.groups)))
