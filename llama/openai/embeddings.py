"""Embeddings: the mean of each text's final hidden states, normalized to length 1 as OpenAI's."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import Prompt, Request, make_prompts
from ..errors import ArgumentError
from ..generation import Llama
from ..sampling import SamplingParams
from .completions import MAX_REQUESTS
from .fields import BadRequest, Fields, refused, shown


class Embeddings:
    """A call for embeddings: its Prompts, and the object built from their Requests."""

    stream = False

    def __init__(self, body: Any, llm: Llama, model: str):
        self.model = model
        fields = Fields(body, model)
        texts = texts_of(fields)
        encoding = fields.text("encoding_format", "float")
        if encoding not in ("float", "base64"):
            message = f"encoding_format is {shown(encoding)}: use 'float' or 'base64'"
            raise BadRequest(message, "encoding_format")
        self.base64 = encoding == "base64"
        self.prompts = self._prompts(texts, llm)

    def _prompts(self, texts: list[str], llm: Llama) -> list[Prompt]:
        ids = [llm.tokenizer.encode(text, bos=True, eos=False) for text in texts]
        params = [SamplingParams(max_tokens=0)] * len(ids)
        max_seq_len = llm.model.params.max_seq_len
        streams = range(len(ids))
        try:
            return make_prompts(
                llm.tokenizer,
                ids,
                params,
                max_seq_len,
                streams=streams,
                name="input",
                pooling="mean",
            )
        except ArgumentError as error:
            raise refused(error, "input") from None

    def response(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The object for finished requests."""
        data = []
        for index, request in enumerate(requests):
            assert request.states is not None
            embedding = self._embedding(request.states)
            data.append({"object": "embedding", "index": index, "embedding": embedding})
        tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.model, "usage": usage}

    def _embedding(self, states: Tensor) -> str | list[float]:
        vector = torch.nn.functional.normalize(states.mean(dim=0), dim=0).cpu()
        if not self.base64:
            floats: list[float] = vector.tolist()
            return floats
        # OpenAI's clients expect little-endian float32.
        packed = vector.numpy().astype("<f4").tobytes()
        return base64.b64encode(packed).decode()


def texts_of(fields: Fields) -> list[str]:
    """The call's texts. Token ids are rejected: clients may send those of another tokenizer."""
    texts = fields.body.get("input")
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        reason = f"{shown(texts)}: use a string or a list of strings"
        if isinstance(texts, list) and texts and isinstance(texts[0], (int, list)):
            advice = "use text (langchain: check_embedding_ctx_length=False)"
            reason = f"token ids, perhaps of another model: {advice}"
        raise BadRequest(f"input is {reason}", "input")
    if len(texts) > MAX_REQUESTS:
        message = f"input has {len(texts)} texts: send at most {MAX_REQUESTS} in a call"
        raise BadRequest(message, "input")
    return texts
