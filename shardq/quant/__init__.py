"""Quantizer mathematics on plain tensors: grids, AdaScale, packing. Imports torch only."""
