"""``python -m tests.image [--target cpu] [--keep FOLDER]``: build the image and ask its server.

For machines without a container engine, as root on Debian: makes the base from Debian's
packages, carries out every step of ``docker/Dockerfile`` in it, and starts what it says as its own
user, with a read-only root and without capabilities. Takes minutes; needs the package index and
about 12 GB of disk.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.deploy.debian import program
from tests.deploy.dockerfile import Builder, Image, command, read_stages
from tests.markdown import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
PICTURES = ROOT / "clients" / "examples" / "pictures"
COMPILERS = ("cc", "gcc", "g++", "clang", "nvcc")
INNER_CERTIFICATES = "/run/certificates.crt"
START_SECONDS, STOP_SECONDS = 300, 45
INSIDE = "import os; print(os.getuid(), os.access('/opt', os.W_OK))"


def main(words: list[str]) -> int:
    """Build and ask; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.image", description=__doc__)
    parser.add_argument("--target", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--base", type=Path, help="a folder with the base, instead of making one")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.work is not None:
        return build_and_ask(options.target, options.work, options.base)
    # The mounts are gone with the inner process, so that its folder can be removed.
    with tempfile.TemporaryDirectory(prefix="image-", ignore_cleanup_errors=True) as folder:
        inner = [sys.executable, "-m", "tests.image", *words, "--work", folder]
        return subprocess.call(["unshare", "--mount", "--propagation", "private", *inner])


def build_and_ask(target: str, work: Path, base: Path | None) -> int:
    """Build ``target`` in ``work``, start it and ask; needs a mount namespace of its own."""
    begun = time.monotonic()
    base = base or make_base(work / "base")
    say(begun, "base is there")
    builder = Builder(
        dockerfile=DOCKERFILE,
        context=ROOT,
        work=work,
        base=base,
        secrets=secrets(),
        mounts=host_mounts(),
        env=host_env(),
    )
    image = builder.build(target)
    say(begun, f"target {target} built, {gib(image.root):.2f} GiB")
    examine(image, target)
    say(begun, f"user {image.user}, command {' '.join([*image.entrypoint, *image.cmd])}")
    if target == "gpu":
        refused(image)
        say(begun, "without a card it says so in one line and ends with 2")
        return 0
    with served(image) as container:
        say(begun, "ready, with a read-only root and no capabilities")
        ask(image)
        stopped = time.monotonic()
        (server,) = psutil.Process(container.pid).children()
        server.send_signal(signal.Signals[image.stopsignal])
        status = container.wait(STOP_SECONDS)
    assert status == 0, f"{image.stopsignal} ended it with {status}"
    say(begun, f"{image.stopsignal}: exit 0 after {time.monotonic() - stopped:.1f} s")
    return 0


def say(begun: float, what: str) -> None:
    print(f"== {time.monotonic() - begun:4.0f} s  {what}", flush=True)


def make_base(folder: Path) -> Path:
    """Debian's smallest system of the release that the Dockerfile is built from."""
    base = read_stages(DOCKERFILE)[0].base
    release = re.fullmatch(r"debian:(\w+)-slim@sha256:[0-9a-f]{64}", base)
    assert release is not None, base
    mmdebstrap = program("mmdebstrap", "mmdebstrap")
    sources = "".join(
        f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {address} {suite} main\n"
        for address, suite in archives(release[1])
    )
    subprocess.run(
        [
            *("perl", mmdebstrap, "--mode=root", "--variant=minbase", "--format=directory"),
            *(release[1], folder, "-"),
        ],
        input=sources,
        text=True,
        check=True,
    )
    return folder


def archives(release: str) -> list[tuple[str, str]]:
    """Pairs of address and suite, the addresses as this machine's own settings have them."""
    said = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = dict.fromkeys(tuple(line.split()) for line in said.splitlines())
    found = [(row[0], row[1]) for row in rows if row[1].startswith(release) and row[2] == "main"]
    assert found, f"apt here knows no {release}"
    return found


def secrets() -> dict[str, Path]:
    """pip's own settings of this machine, as ``--secret id=pip`` passes them."""
    names = ("/root/.config/pip/pip.conf", "/etc/pip.conf")
    return next(({"pip": Path(name)} for name in names if Path(name).exists()), {})


def host_mounts() -> list[tuple[Path, str]]:
    """What a builder's network gives to each step: names, certificates, folders that pip reads."""
    places = ["/etc/resolv.conf", "/etc/hosts"]
    text = os.environ.get("PIP_FIND_LINKS", "")
    for path in secrets().values():
        settings = configparser.ConfigParser()
        settings.read(path)
        text += " " + " ".join(value for one in settings.values() for value in one.values())
    local = [word for word in text.split() if word.startswith(("/", "file:///"))]
    places += {urlsplit(word).path.removesuffix("/simple") for word in local}
    found = [(Path(place), place) for place in places if Path(place).exists()]
    # At another place: the image's own package of certificates is installed over the usual one.
    return [*found, *((path, INNER_CERTIFICATES) for path in certificates())]


def certificates() -> list[Path]:
    path = Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
    return [path] if path.exists() else []


def host_env() -> dict[str, str]:
    """What a builder passes on by itself: proxies, and where certificates are."""
    wanted = re.compile(r"(?i)(\w+_)?proxy|PIP_\w+")
    env = {name: value for name, value in os.environ.items() if wanted.fullmatch(name)}
    names = ("SSL_CERT_FILE", "PIP_CERT") if certificates() else ()
    return env | dict.fromkeys(names, INNER_CERTIFICATES)


def gib(root: Path) -> float:
    said = subprocess.run(["du", "-sxk", root], capture_output=True, text=True, check=True)
    return int(said.stdout.split()[0]) / 2**20


def examine(image: Image, target: str) -> None:
    """Check what the image promises before anything runs in it."""
    folders = image.env["PATH"].split(":")
    have = {name for name in COMPILERS for f in folders if (image.root / f[1:] / name).exists()}
    assert have == ({"cc", "gcc", "g++"} if target == "gpu" else set()), f"compilers: {have}"
    assert not image.user.startswith("0"), image.user
    for volume in image.volumes:
        uid = (image.root / volume.lstrip("/")).stat().st_uid
        assert str(uid) == image.user.split(":")[0], f"{volume} belongs to {uid}"
    said = output(image, ["/usr/bin/python3", "-c", INSIDE])
    assert said.split() == [image.user.split(":")[0], "False"], said


def output(image: Image, words: list[str]) -> str:
    done = subprocess.run(
        command(image, words, [(PICTURES, "/mnt"), *volumes(image)], read_only=True),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def volumes(image: Image) -> list[tuple[Path, str]]:
    """A folder of its own for each volume, as empty and owned as the image's."""
    found = []
    for volume in image.volumes:
        folder = image.root.parent / "volumes" / volume.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, *map(int, image.user.split(":")))
        found.append((folder, volume))
    return found


@contextmanager
def served(image: Image) -> Iterator[subprocess.Popen[bytes]]:
    """Start what the image says and wait until its own health check passes."""
    words = [*image.entrypoint, *image.cmd]
    container = subprocess.Popen(command(image, words, volumes(image), read_only=True))
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert container.poll() is None, f"ended with {container.returncode}"
            assert time.monotonic() < deadline, "not ready in time"
            check = command(image, list(image.healthcheck), read_only=True)
            if subprocess.run(check, stderr=subprocess.DEVNULL).returncode == 0:
                break
            time.sleep(2)
        yield container
    finally:
        container.kill()
        container.wait(10)


def ask(image: Image) -> None:
    """Ask about two pictures from within."""
    for picture, question, word in (
        ("red_circle.jpg", "What colour is it?", "red"),
        ("blue_square.png", "这是什么形状？", "方"),
    ):
        words = ["qwen2vl-serve", "ask", "--image", f"/mnt/{picture}", question]
        said = output(image, words)
        print(f"   {question} {said.strip()}", flush=True)
        assert word in said.lower(), said


def refused(image: Image) -> None:
    """Start the image without a card."""
    done = subprocess.run(
        command(image, [*image.entrypoint, *image.cmd], volumes(image), read_only=True),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    print(f"   {done.stderr.strip()}", flush=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
