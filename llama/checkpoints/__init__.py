"""A folder of weights -> ModelArgs and this rank's tensors. What is done with folders besides is in `folders`."""

from .folder import Checkpoint, check_world_size
from .loading import bytes_per_weight, load
from .memory import allocating, check_memory, keep_freed_memory, memory_needs, return_freed_memory

__all__ = [
    "Checkpoint",
    "allocating",
    "bytes_per_weight",
    "check_memory",
    "check_world_size",
    "keep_freed_memory",
    "load",
    "memory_needs",
    "return_freed_memory",
]
