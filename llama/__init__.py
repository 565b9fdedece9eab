"""Llama 2 inference, with the public names of the original release."""

from .chat import Dialog, Message, encode_dialog
from .generation import ChatPrediction, CompletionPrediction, Llama
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__version__ = "0.2.0"

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
