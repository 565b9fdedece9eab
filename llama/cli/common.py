"""Shared by several commands: parameters, defaults, and options as keywords of Llama's methods."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from ..chat import UNSAFE_ERROR, Message, has_special_tags
from ..generation import BuildOptions
from ..sampling import SamplingParams
from .arguments import FLAG_NAMES

FolderOrFile = Annotated[str, "folder of weights, or GGUF file"]
System = Annotated[str | None, "system message: how the model should answer"]

# Default options. Commands at a terminal run one prompt at a time.
ONE_PROMPT = BuildOptions(max_seq_len=2048, max_batch_size=1)
SAMPLING = SamplingParams()

# Fields for which no command has a flag: --seed sets the seed of BuildOptions, and the output of
# the other options is not printed.
NO_FLAG = ("seed", "logprobs", "top_logprobs", "echo")


def keywords_of(sampling: SamplingParams) -> dict[str, Any]:
    """The options that have flags, as keywords of Llama's methods."""
    return {
        FLAG_NAMES.get(field.name, field.name): getattr(sampling, field.name)
        for field in dataclasses.fields(sampling)
        if field.name not in NO_FLAG
    }


def system_message(text: str | None) -> list[Message]:
    """The start of a dialog with this system message. Raises ValueError if it has special tags."""
    if not text:
        return []
    opening = [Message(role="system", content=text)]
    if has_special_tags(opening):
        raise ValueError(UNSAFE_ERROR)
    return opening
