"""Checkpoints: where hubs keep them, and what a folder holds, read without torch."""
