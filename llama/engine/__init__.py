"""Continuous batching: runs requests in the slots of a model's KV cache."""

from .engine import Engine
from .request import FinishReason, Pooling, Prompt, Request, ScoredToken, make_prompts
from .runner import ModelRunner

__all__ = [
    "Engine",
    "FinishReason",
    "ModelRunner",
    "Pooling",
    "Prompt",
    "Request",
    "ScoredToken",
    "make_prompts",
]
