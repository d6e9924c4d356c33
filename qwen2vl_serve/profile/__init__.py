"""Deployment profiles: which model, on which cards, within which limits."""

from qwen2vl_serve.profile.cpus import equal_shares, one_cpu_each
from qwen2vl_serve.profile.limits import Overflow
from qwen2vl_serve.profile.loading import (
    load_profile,
    make_profile,
    profile_names,
    profiles_folder,
    section_of,
)
from qwen2vl_serve.profile.profile import (
    BARE_OVERRIDES,
    DEMO_PROFILE,
    SECRETS,
    Profile,
    default_keys_path,
)
from qwen2vl_serve.profile.sections import shown_storage

__all__ = [
    "BARE_OVERRIDES",
    "DEMO_PROFILE",
    "SECRETS",
    "Overflow",
    "Profile",
    "default_keys_path",
    "equal_shares",
    "load_profile",
    "make_profile",
    "one_cpu_each",
    "profile_names",
    "profiles_folder",
    "section_of",
    "shown_storage",
]
