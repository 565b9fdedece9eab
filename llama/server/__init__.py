"""People over HTTP: a server with OpenAI's API and a chat page. Its packages are the extra `serve`."""

from .serve import serve

__all__ = ["serve"]
