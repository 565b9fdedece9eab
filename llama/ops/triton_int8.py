"""Products of few rows with int8 weights on a GPU, in Triton.

Each weight is read once for 16 rows, without being rearranged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The block that one program multiplies. 16 is the smallest size that matrix units take, and 256
# inputs keep enough bytes in flight.
ROWS = 16
OUTPUTS = 16
INPUTS = 256


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]  # Triton would try to resolve annotations
    x,
    q,
    scales,
    y,
    n_rows,
    n_outputs,
    n_inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, n_inputs, INPUTS):
        across = first + tl.arange(0, INPUTS)[None, :]
        down = first + tl.arange(0, INPUTS)[:, None]
        a = tl.load(
            x + rows * n_inputs + across, mask=(rows < n_rows) & (across < n_inputs), other=0.0
        )
        b = tl.load(
            q + outputs * n_inputs + down, mask=(outputs < n_outputs) & (down < n_inputs), other=0
        )
        sums = tl.dot(a, b.to(a.dtype), sums, input_precision="ieee")
    scale = tl.load(scales + outputs, mask=outputs < n_outputs, other=0.0).to(tl.float32)
    tl.store(
        y + rows * n_outputs + outputs, sums * scale, mask=(rows < n_rows) & (outputs < n_outputs)
    )


def multiply(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """x (q × scales)ᵀ, (n, out_features), in x's type.

    x: (n, in_features); q: (out_features, in_features); scales: (out_features,). Sums are float32
    and scaled at the end. A row's sums do not depend on the number of rows.
    """
    y = x.new_empty(len(x), len(q))
    grid = (triton.cdiv(len(q), OUTPUTS), triton.cdiv(len(x), ROWS))
    with torch.cuda.device_of(x):
        _multiply[grid](
            x.contiguous(), q, scales, y, len(x), *q.shape, ROWS, OUTPUTS, INPUTS, num_stages=4
        )
    return y
