"""Quantization of a decoder block, from its weights and activations to codes."""
