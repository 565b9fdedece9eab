"""The operations of a layer: in plain PyTorch, and where there is a faster form, in C or Triton."""
