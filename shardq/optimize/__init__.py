"""One decoder block in, its trained quantizers out. Has never heard of files or ranks."""
