"""The private parts of PyTorch that this library uses, in one place.

They exist in PyTorch 2.6 to 2.13. If a release renames one of them, change this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Like torch.compiler.assume_constant_result, whose import takes most of a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


profiler = torch.autograd.profiler  # _is_profiler_enabled: whether a profiler is active

is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

# Global hooks, which run for all modules, by id. Ids are never reused.
GLOBAL_HOOKS: list[dict[int, Any]] = [
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
]


@constant
def has_bfloat16_products() -> bool:
    """Whether this CPU can multiply bfloat16 (AVX512-BF16, which every CPU with AMX also has)."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


def pack_bfloat16(weight: Tensor) -> Any:
    """Pack a weight into oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())


def multiply_packed_bfloat16(x: Tensor, packed: Any) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return y


def pack_int4(q: Tensor, tiles: int) -> Tensor:
    """Pack q, (rows, inputs) int32 in [0, 15], for PyTorch's int4 kernel on q's device."""
    if q.is_cuda:
        pairs = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
        return torch._convert_weight_to_int4pack(pairs, tiles)
    return torch._convert_weight_to_int4pack_for_cpu(q, 1)


def multiply_int4(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    multiply = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
    return multiply(x, packed, group_size, scales_and_zeros)


def multiply_int8(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, q, scales)


def hash_store() -> Any:
    """A store for a single-process group; it needs no port."""
    return dist.HashStore()  # type: ignore[attr-defined]


def group_backends() -> list[Any]:
    """The backends of all process groups."""
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(device) for group in groups for device in group._device_types]
