"""Ids at positions -> logits and hidden states: a pass' shapes and threads, recorded, compiled or captured."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Batch, KVCache, Run, Runs
from ..model import Transformer
from ..ops import kernels
from .tape import Pool, Tape

logger = logging.getLogger(__name__)

SHORTEST_WINDOW = 256

# Multiplications of a matrix product from which on a second thread gains more than it costs to wake.
PARALLEL_WORK = 2**18

# Tokens of a pass up to which it is recorded: of more, products take so long that Python's way to them does not count.
RECORDED_TOKENS = 8

# Tokens (n, seqlen) and positions (n, seqlen) -> logits (n, seqlen, vocab_size).
Program = Callable[[Tensor, Tensor], Tensor]


class Recording(NamedTuple):
    """A decode pass to be played again, and where it finds its tokens and leaves its logits."""

    tape: Tape
    ids: Tensor
    positions: Tensor
    logits: Tensor


class Runner:
    """Runs passes over a model's cache. What the rows then hold is for the caller to say.

    Eagerly, a decode pass attends to exactly the positions in use; of few tokens on a CPU it is recorded at the first
    of its shape, and played from then on. Compiled or captured, its rows and the window that it attends to are rounded
    up to powers of two, so that few shapes occur; each is made at its first use.
    """

    def __init__(self, model: Transformer, *, compile: bool = False, cuda_graph: bool = False):
        assert model.cache is not None, "allocate_cache first"
        self.model, self.cache = model, model.cache
        self.compile, self.cuda_graph = compile, cuda_graph
        self.graph_pool: Any = None
        self.stream: Any = None
        self.pool = Pool()
        model.angles(self.device)  # else they would change what the model consists of at its first pass
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
        """Logits (n, seqlen, vocab_size) after tokens (n, seqlen) of the first n rows, from positions `starts` on.

        The next call may write over them.
        """
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
        """The model's parts are others: what was made of the former ones is of no use."""
        self.programs: dict[tuple[int, ...], Program] = {}
        self.recordings: dict[tuple[int, ...], Recording | None] = {}  # None: of a shape that cannot be recorded
        hooked = [torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks]
        self.hooks = [*hooked, *(h for m in self.model.modules() for h in (m._forward_hooks, m._forward_pre_hooks))]

    def _can_record(self, n: int, seqlen: int) -> bool:
        """Whether a pass may be recorded: few tokens, whose attention goes by positions and not by a window's length,
        and nobody who looks on."""
        queries, dim = seqlen * self.model.groups, self.model.params.head_dim
        small = not self.static and n * seqlen <= RECORDED_TOKENS and self.model.ranks.size == 1
        watched = any(self.hooks) or torch.autograd.profiler._is_profiler_enabled
        return small and kernels.attends(queries, dim) and kernels.fit(self.cache.k) and not watched

    def _recorded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The pass, recorded at the first of its shape and played from then on."""
        key = (*ids.shape, torch.get_num_threads(), self.model.moves)
        run = partial(decode, self.model, self.cache, length=self.cache.length)
        made = self.recordings.get(key)
        if key in self.recordings and made is None:
            return run(ids, positions)
        if made is None or made.tape.has_moved():
            own, tape = (ids.clone(), positions.clone()), Tape(self.pool)
            try:
                with uninterrupted(), tape:
                    logits = run(*own)
            except NotImplementedError:  # somebody's model, which looks at what it computes
                self.recordings[key] = None
                return run(ids, positions)
            self.recordings[key] = Recording(tape, *own, logits)
            return logits
        made.ids.copy_(ids)
        made.positions.copy_(positions)
        made.tape.play()
        return made.logits

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
            # One stream for all graphs, because cuBLAS keeps 32 MB for every stream that it ever ran on; one pool,
            # because no two graphs run at once, and so they share the memory of one.
            side = self.stream = self.stream or torch.cuda.Stream()
            self.graph_pool = self.graph_pool or torch.cuda.graph_pool_handle()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    program(tokens, positions)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.graph_pool, side, capture_error_mode="thread_local"):
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


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: an answer, perhaps another call's, is not left with half a token."""
    pending: list[Any] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda *args: pending.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            handler(*pending[0])
