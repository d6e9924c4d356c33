"""The context window: what a request takes of it, and what is done where it does not fit."""
