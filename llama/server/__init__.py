"""HTTP: OpenAI's API and a chat page. Its modules need the packages of the extra `serve`."""
