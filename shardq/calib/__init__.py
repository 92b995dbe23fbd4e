"""Text to token ids, and which rank owns which sample."""
