"""LoRA adapters: read without torch, named in the profile, or loaded while the server runs."""
