"""Objects of OpenAI's API that need no generation: errors, models, tokens."""

from __future__ import annotations

from typing import Any

from ..generation import Llama
from .completions import ChatCompletion
from .fields import BadRequest, Fields, shown


def error_of(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error object in OpenAI's format."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    other = "invalid_request_error" if status < 500 else "server_error"
    kind = kinds.get(status, other)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models(llm: Llama, model: str, created: int) -> dict[str, Any]:
    card = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "llama",
        "max_model_len": llm.model.params.max_seq_len,
    }
    return {"object": "list", "data": [card]}


def tokenize(body: Any, llm: Llama, model: str) -> dict[str, Any]:
    """vLLM's /tokenize: the token ids of a `prompt`, or of `messages`."""
    fields = Fields(body, model)
    if fields.body.get("messages") is not None:
        call = ChatCompletion(body | {"stream": False}, llm, model)
        ids = call.prompts[0].token_ids
    else:
        special = fields.flag("add_special_tokens", default=True)
        ids = llm.tokenizer.encode(fields.text("prompt", ""), bos=special, eos=False)
    return {"count": len(ids), "max_model_len": llm.model.params.max_seq_len, "tokens": ids}


def detokenize(body: Any, llm: Llama, model: str) -> dict[str, Any]:
    ids = Fields(body, model).sequence("tokens")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BadRequest(f"tokens is {shown(ids)}: use a list of token ids", "tokens")
    return {"prompt": llm.tokenizer.decode(ids)}
