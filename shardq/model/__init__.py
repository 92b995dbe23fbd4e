"""Decoder blocks built from config.json without weights, and reading weights into them."""
