"""Inference for Llama 2: the names of the original release."""

from .chat import Dialog, Message, encode_dialog
from .generation import ChatPrediction, CompletionPrediction, Llama
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "Message",
    "ModelArgs",
    "Tokenizer",
    "Transformer",
    "encode_dialog",
]
