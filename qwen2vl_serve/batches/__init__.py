"""Batches in OpenAI's shape: many requests in one file, answered while nobody waits."""
