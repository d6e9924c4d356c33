"""Media: fetch (network) → check (bytes) → decode (pixels)."""
