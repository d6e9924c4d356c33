"""What the server itself needs: keys, certificate, address, log file, folder of uploads."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import tempfile
from pathlib import Path

from qwen2vl_serve.auth.keys_file import KeysFile
from qwen2vl_serve.doctor.finding import Finding, fatal, ok, refused, warning
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import SetupError

LOG_BYTES = 16 * 1024 * 1024
_STREAMS = frozenset({"/dev/stdout", "/dev/stderr"})
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})


def keys(world: World) -> Finding:
    """Read every key, so that a broken key file is not found by the first client."""
    file = KeysFile(world.profile.keys_path)
    try:
        plain = len(world.profile.api_keys())
        named = len(file.read()) if file.in_use else None
    except SetupError as error:
        return refused(error, "no client could be told from a stranger")
    if not plain and named is None:
        host = world.profile.server.host
        if host not in _THIS_MACHINE:
            return warning(
                f"none, on {host}",
                "whoever reaches this port is served",
                "`qwen2vl-serve keys add NAME`, or set QWEN2VL_API_KEY",
            )
        return ok("none: every client of this machine is served")
    return ok(f"{plain} without a name, {named or 0} named")


def certificate(world: World) -> Finding:
    """Load certificate and key as the server will."""
    server = world.profile.server
    chain, key = server.ssl_certfile, server.ssl_keyfile
    why = "HTTPS cannot be served"
    if chain is None:
        return ok("none: HTTP")
    for field, name in (("ssl_certfile", chain), ("ssl_keyfile", key)):
        if name is not None and not Path(name).is_file():
            return fatal(f"server.{field}: there is no file {name}", why, "correct the path")
        if name is not None and not os.access(name, os.R_OK):
            return fatal(
                f"server.{field}: {name} cannot be read by this user",
                why,
                f"`chmod u+r {name}`, or start as its owner",
            )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password would be asked for on the terminal.
        context.load_cert_chain(chain, key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError):
        beside = f" and {key}" if key is not None else ""
        return fatal(
            f"server.ssl_certfile: {chain}{beside} are not a PEM certificate and its "
            "unencrypted key",
            why,
            "name both files; `openssl pkey -in KEY -out NEW` takes a password off",
        )
    return ok(chain)


def address(world: World) -> Finding:
    """Bind the address for a moment, as the server will."""
    host, port = world.profile.server.host, world.profile.server.port
    why = "the server could not listen"
    ours = "use 127.0.0.1 (this machine only) or 0.0.0.0 (every network)"
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        return fatal(f"server.host: {host!r} is not an address", why, ours)
    with socket.socket(family, kind, protocol) as probe:
        if os.name == "posix":  # a port that a server left a moment ago is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
            probe.listen(1)
        except PermissionError:
            return fatal(
                f"server.port: {port} is reserved to root", why, "take one from 1024 on (--port)"
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return fatal(
                    f"server.port: {port} is in use on {host}",
                    why,
                    "stop the program that uses it or take another (--port)",
                )
            return fatal(f"server.host: {host!r} is not an address of this machine", why, ours)
    return ok(f"{host}, port {port or 'any'}")


def log(world: World) -> Finding:
    """See that the log file is one, can be written, and that its disk has 16 MiB left."""
    file = world.profile.log_path.absolute()
    if str(file) == os.devnull:
        return ok(f"{file}: none is kept")
    why = "the engine's words would be lost, and with them the cause of a failed start"
    hint = "name another with server.log_file"
    if file.is_dir():
        return fatal(f"server.log_file: {file} is a folder", why, hint)
    if str(file) in _STREAMS or (file.exists() and not file.is_file()):
        return fatal(
            f"server.log_file: {file} is not a file",
            "it is emptied at the start and read while the engine boots",
            f"name one, or {os.devnull} for none; `--verbose` shows its lines on standard output",
        )
    existing = next(place for place in (file, *file.parents) if place.exists())
    if not os.access(existing, os.W_OK) or (existing != file and not existing.is_dir()):
        return fatal(f"server.log_file: {file} cannot be written by this user", why, hint)
    free = shutil.disk_usage(existing).free
    if free < LOG_BYTES:
        return fatal(
            f"server.log_file: the disk of {file} has {free // 1024} KiB left, the log needs "
            f"{LOG_BYTES // 1024} KiB",
            why,
            f"free some or {hint}",
        )
    return ok(str(file))


def uploads(world: World) -> Finding:
    """See that the folder for uploads can be written or made."""
    files = world.profile.files
    if files.folder is None or files.max_files == 0:
        return ok("a temporary folder" if files.max_files else "off")
    folder = Path(files.folder).expanduser().absolute()
    why, hint = "no upload could be kept", "name another, or leave it out for a temporary one"
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return fatal(
            f"files.folder: {folder} cannot be written by this user",
            why,
            hint,
        )
    try:
        # Only this tells of a place that takes no files whatever its rights say, as /proc.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return fatal(
            f"files.folder: {folder} cannot be made or written ({error.strerror})", why, hint
        )
    return ok(str(folder))
