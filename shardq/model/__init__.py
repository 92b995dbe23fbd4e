"""Decoder blocks built from config.json without weights, and the streams that fill them."""
