"""Weights in 8 and 4 bits: quantization groups, and the formats of linear layers."""
