"""Hostile input by the thousand against the running server; ``python -m bench.fuzz``."""
