"""OpenAI's API as data, for the server and for batch files: fields -> Prompts, Requests -> objects.

Knows no HTTP. What cannot be done is refused by the name of its field. Null and neutral values
pass, and unknown fields are ignored, as other servers do.
"""
