"""The chat request as this server accepts it: from the bytes of a body to a ``ChatRequest``."""
