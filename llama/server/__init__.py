"""HTTP: OpenAI's API and a chat page. Its modules import the packages of the extra `serve`."""
