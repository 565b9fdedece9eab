"""A folder of weights, or a GGUF file -> ModelArgs and this rank's tensors."""

from .folder import Checkpoint, check_world_size
from .loading import bytes_per_weight, load
from .memory import allocating, check_memory, memory_needs

__all__ = [
    "Checkpoint",
    "allocating",
    "bytes_per_weight",
    "check_memory",
    "check_world_size",
    "load",
    "memory_needs",
]
