"""OpenAI's API as data, for the server and batch files: fields -> Prompts, Requests -> objects.

Contains no HTTP. Unsupported fields are rejected with an error that names the field. Null and
neutral values are accepted and unknown fields are ignored, as in other servers.
"""
