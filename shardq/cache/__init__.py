"""Activations between blocks, in CPU memory or on disk."""
