"""OpenAI's API as data: fields -> requests, answers -> objects."""
