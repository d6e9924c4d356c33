"""What a profile must have to be served by a fleet, asked before a replica starts."""

from __future__ import annotations

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.auth.keys_file import KeysFile
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.http.door import LOOPBACK
from qwen2vl_serve.profile import Profile


def refuse_what_is_one_servers(profile: Profile) -> None:
    """Return if replicas can serve the profile side by side.

    Raises:
        PreflightError: they cannot; names the field.
    """
    if profile.batches.enabled:
        raise PreflightError(
            "batches.enabled: the batches of a folder are one server's; turn them off for a fleet, "
            "and run one server with batches beside it."
        )
    if profile.files.max_files and profile.files.folder is None:
        raise PreflightError(
            "files.folder: an upload has to be found by every replica; name a folder on a disk "
            "that all machines mount, or turn uploads off with files.max_files=0."
        )
    if profile.adapters.allowed_paths:
        raise PreflightError(
            "adapters.allowed_paths: an adapter that is loaded while a fleet runs would be on one "
            "replica, and gone with it; name it in adapters.lora_modules and deploy again, with "
            "adapters.allowed_paths=[]."
        )
    if profile.server.ssl_certfile is not None:
        raise PreflightError(
            "server.ssl_certfile: a fleet's requests come in by Ray's proxies, which would not use "
            "it; leave it out, and have a balancer with TLS stand in front, as in deploy/nginx."
        )
    if profile.engine.distributed_executor_backend == "ray":
        raise PreflightError(
            "engine.distributed_executor_backend: a replica is a process with the cards of its "
            "machine (mp); a model over several machines is a group of its own, as in "
            "deploy/kubernetes/overlays/several-nodes."
        )


def door_keys(profile: Profile) -> Keys:
    """Return the keys that this machine has; none only where no other machine asks.

    Raises:
        PreflightError: there are none, and ``server.host`` is no loopback address.
        ProfileError: a file of keys cannot be read.
    """
    keys = Keys(profile.api_keys(), KeysFile(profile.keys_path))
    host = profile.server.host
    if not keys and host not in LOOPBACK:
        raise PreflightError(
            f"server.host: {host} without a key on this machine, so whoever reaches it would be "
            "served; name a file with server.api_key_file that is on every machine, or stay with "
            "server.host=127.0.0.1."
        )
    return keys
