"""Formats that programs read, made of a run."""
