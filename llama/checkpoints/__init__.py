"""Read ModelArgs and this rank's model from a checkpoint folder or a GGUF file."""

from .folder import Checkpoint, check_world_size
from .loading import load, load_model
from .memory import memory_needs

__all__ = [
    "Checkpoint",
    "check_world_size",
    "load",
    "load_model",
    "memory_needs",
]
