"""The commands of `python -m llama`."""
