"""Spans of tokens -> logits: passes that run eagerly, compiled or as CUDA graphs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..cache import DecodeBatch, PrefillBatch, Span
from ..model import Transformer

logger = logging.getLogger(__name__)

SHORTEST_WINDOW = 256

# The smallest matrix product, in multiplications, for which waking a second thread saves time.
PARALLEL_WORK = 2**18

# Tokens (n, seqlen) and positions (n, seqlen) -> logits (n, seqlen, vocab_size).
Program = Callable[[Tensor, Tensor], Tensor]


class ModelRunner:
    """Runs passes over a model's cache. The caller updates `token_ids` afterwards.

    An eager decode pass attends to exactly the positions in use. In a compiled or captured pass,
    the number of rows and the attended length are rounded up to powers of two, so that few shapes
    occur. Each shape is compiled or captured at its first use.
    """

    def __init__(self, model: Transformer, *, compile: bool = False, cuda_graph: bool = False):
        assert model.cache is not None, "allocate_cache first"
        self.model = model
        self.cache = model.cache
        self.compile = compile
        self.cuda_graph = cuda_graph
        args = model.params
        self.work = args.dim * args.hidden_dim // model.ranks.size  # of a token's largest product
        self.graph_pool: Any = None
        self.stream: Any = None
        self.programs: dict[tuple[int, ...], Program] = {}

    def reset(self) -> None:
        """Discard all compiled and captured passes, because the model has changed."""
        self.programs = {}

    def decode(self, spans: Sequence[Span]) -> Tensor:
        """Logits (len(spans), seqlen, vocab_size) after each id of the spans.

        The pass runs all slots up to the last span's, or more if their number is rounded up. In
        slots without a span, filler tokens are written beyond `token_ids`, which is shortened if
        they do not fit. The next call may overwrite the logits.
        """
        cache = self.cache
        seqlen = max(len(span.ids) for span in spans)
        filler = spans[0].ids[0]  # any id; this one is computed anyway
        static = (self.compile or self.cuda_graph) and not ops.must_run_plain(self.model)
        count = spans[-1].slot + 1
        if static:
            count = min(1 << (count - 1).bit_length(), cache.n_slots)
        own = {span.slot: span.ids for span in spans}
        tokens = []
        starts = []
        for slot in range(count):
            ids = own.get(slot, [])
            if not ids:
                cache.truncate(slot, cache.length - seqlen)
            starts.append(len(cache.token_ids[slot]))
            tokens.append(ids + [filler] * (seqlen - len(ids)))
        rows = torch.tensor(tokens, device=cache.device)
        first = torch.tensor(starts, device=cache.device)[:, None]
        positions = first + torch.arange(seqlen, device=cache.device)
        length = max(starts) + seqlen
        with self._threads(rows.numel()):
            if static:
                logits = self._static(rows, positions, length)
            else:
                view = DecodeBatch(cache, positions, length, self.model.n_rep)
                logits = self.model(rows, view)
        return logits if count == len(spans) else logits[[span.slot for span in spans]]

    def _static(self, ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """A compiled or captured pass, with the attended length rounded up."""
        window = max(SHORTEST_WINDOW, 1 << (length - 1).bit_length())
        length = min(window, self.cache.length)
        key = (*ids.shape, length, self.model.moves)
        if key not in self.programs:
            self.programs[key] = self._program(ids, positions, length)
        return self.programs[key](ids, positions)

    def prefill(self, spans: Sequence[Span], wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One pass over all spans: logits (len(wanted), vocab_size) and states (total, dim).

        `wanted` are indices into the concatenated ids. States are the final norm's output.
        """
        tokens = torch.tensor(
            [[token for span in spans for token in span.ids]], device=self.cache.device
        )
        with self._threads(tokens.numel()):
            batch = PrefillBatch(self.cache, spans, self.model.n_rep, wanted)
            logits = self.model(tokens, batch)
        assert batch.states is not None
        return logits[:, 0], batch.states

    def _program(self, tokens: Tensor, positions: Tensor, length: int) -> Program:
        run = decode
        if self.compile:
            # Dynamo compiles a code object at most eight times, so each shape gets its own.
            name = f"decode_{tokens.shape[0]}_{tokens.shape[1]}_{length}"
            own = decode.__code__.replace(co_name=name)
            run = torch.compile(
                FunctionType(own, decode.__globals__), fullgraph=True, dynamic=False
            )
        program: Program = partial(run, self.model, length=length)
        if not self.cuda_graph:
            return program
        try:
            return self._capture(program, tokens.clone(), positions.clone())
        except RuntimeError as error:
            logger.warning("decoding without CUDA graphs: %s", error)
            self.cuda_graph = False
            return program

    def _capture(self, program: Program, tokens: Tensor, positions: Tensor) -> Program:
        with torch.cuda.device(self.cache.device):
            # At first use, kernels choose algorithms and allocate memory, which a capture does not
            # allow, so the program runs twice before it. These runs write the same values to the
            # same positions as the replay. All graphs share a stream, because cuBLAS keeps 32 MB
            # for each stream that it has run on, and a memory pool, because no two run at once.
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
        """Use one thread for small passes: on busy cores, waiting for more takes far too long."""
        threads = torch.get_num_threads()
        if threads == 1 or self.cache.device.type != "cpu" or tokens * self.work >= PARALLEL_WORK:
            yield
            return
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)


def decode(model: Transformer, tokens: Tensor, positions: Tensor, *, length: int) -> Tensor:
    assert model.cache is not None
    logits: Tensor = model(tokens, DecodeBatch(model.cache, positions, length, model.n_rep))
    return logits
