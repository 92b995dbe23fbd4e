"""Bytes on disk: safetensors shards, block files, encodings, the output checkpoint. Knows no model and no training."""
