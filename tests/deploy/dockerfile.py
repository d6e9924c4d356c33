"""Carries out the instructions of our Dockerfile in folders, where no container engine can run.

Knows what ``docker/Dockerfile`` uses and refuses the rest. Each stage is an overlay over the one
that it is built from; ``RUN`` is a shell in it. Needs root and a mount namespace of its own.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dockerfile_parse import DockerfileParser

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What a container has where its image sets none."""

VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True)
class Stage:
    """One ``FROM``, and the pairs of instruction and value that follow it."""

    name: str
    base: str
    steps: tuple[tuple[str, str], ...]


@dataclass
class Image:
    """A root file system and what its container is started with."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    labels: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stopsignal: str = "SIGTERM"


def read_stages(path: Path) -> list[Stage]:
    """Return the stages of a Dockerfile in their order, the arguments of ``FROM`` filled in."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    with path.open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    for one in structure:
        name, value = one["instruction"], one["value"]
        if name == "COMMENT":
            continue
        if name == "FROM":
            base, _, alias = expanded(value, arguments).partition(" AS ")
            stages.append(Stage(alias, base, ()))
        elif not stages:
            assert name == "ARG", name
            key, _, default = value.partition("=")
            arguments[key] = default
        else:
            last = stages[-1]
            stages[-1] = replace(last, steps=(*last.steps, (name, value)))
    return stages


def expanded(text: str, variables: dict[str, str]) -> str:
    """Put in the values of ``$NAME`` and ``${NAME}``; what is not known is empty."""
    return VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), text)


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Tell whether a ``.dockerignore`` keeps a file, named from its folder, out of the context."""
    out = False
    names = path.split("/")
    parents = ["/".join(names[: count + 1]) for count in range(len(names))]
    for line in patterns:
        pattern = line.removeprefix("!").strip("/")
        forms = {pattern, pattern.removeprefix("**/")}
        if any(
            (
                fnmatch.fnmatchcase(parent, form)
                and ("**" in pattern or parent.count("/") == form.count("/"))
            )
            or ("**" in pattern and fnmatch.fnmatchcase(parent, f"*/{form}"))
            for parent in parents
            for form in forms
        ):
            out = not line.startswith("!")
    return out


class Builder:
    """Builds targets of one Dockerfile in ``work``.

    ``mounts`` are pairs of host path and path within, which every step sees beside the image, as
    the network's settings; ``secrets`` are the files of ``--mount=type=secret``.
    """

    def __init__(
        self,
        *,
        dockerfile: Path,
        context: Path,
        work: Path,
        base: Path,
        secrets: dict[str, Path],
        mounts: Sequence[tuple[Path, str]],
        env: dict[str, str],
    ) -> None:
        self.stages = {stage.name: stage for stage in read_stages(dockerfile)}
        self.context = context
        self.work = work
        self.base = base
        self.secrets = secrets
        self.mounts = mounts
        self.env = env
        lines = (context / ".dockerignore").read_text("utf-8").splitlines()
        self.patterns = [line for line in lines if line and not line.startswith("#")]
        self.built: dict[str, Image] = {}

    def build(self, name: str) -> Image:
        """Return the image of a stage; those that it needs are built first, each once."""
        if name in self.built:
            return self.built[name]
        stage = self.stages[name]
        below = self.build(stage.base) if stage.base in self.stages else Image(self.base)
        upper, scratch, root = (self.work / name / part for part in ("upper", "scratch", "root"))
        for folder in (upper, scratch, root):
            folder.mkdir(parents=True)
        options = f"lowerdir={self._lower(stage)},upperdir={upper},workdir={scratch}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
        image = replace(below, root=root, env=dict(below.env), labels=dict(below.labels))
        arguments: dict[str, str] = {}
        for instruction, value in stage.steps:
            print(f"{name}: {instruction} {' '.join(value.split())[:90]}", flush=True)
            self._step(image, instruction, value, arguments)
        self.built[name] = image
        return image

    def _lower(self, stage: Stage) -> str:
        layers = []
        while stage.base in self.stages:
            layers.append(str(self.work / stage.base / "upper"))
            stage = self.stages[stage.base]
        return ":".join([*layers, str(self.base)])

    def _step(self, image: Image, name: str, value: str, arguments: dict[str, str]) -> None:
        known = image.env | arguments
        match name:
            case "RUN":
                self._run(image, value, arguments)
            case "COPY":
                self._copy(image, shlex.split(value))
            case "ARG":
                key, _, default = value.partition("=")
                arguments[key] = default.strip('"')
            case "ENV":
                image.env |= pairs(expanded(value, known))
            case "LABEL":
                image.labels |= pairs(expanded(value, known))
            case "WORKDIR":
                image.workdir = value
                (image.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "EXPOSE":
                pass
            case _:
                _set(image, name, value)

    def _run(self, image: Image, value: str, arguments: dict[str, str]) -> None:
        words = value.split()
        flags = [word for word in words if word.startswith("--mount=")]
        command = value
        mounts = list(self.mounts)
        for flag in flags:
            command = command.replace(flag, "", 1)
            if (mount := self._mount(flag.removeprefix("--mount="))) is not None:
                mounts.append(mount)
        run(image, ["/bin/sh", "-c", command.strip()], mounts, env=arguments | self.env)

    def _mount(self, text: str) -> tuple[Path, str] | None:
        options = dict(part.split("=", 1) for part in text.split(","))
        target = options["target"]
        match options["type"]:
            case "secret":
                path = self.secrets.get(options["id"])
                return None if path is None else (path, target)
            case "cache":
                folder = self.work / "cache" / target.strip("/").replace("/", "-")
                folder.mkdir(parents=True, exist_ok=True)
                return folder, target
            case "bind":
                source = self.build(options["from"]).root if "from" in options else self.context
                return source / options["source"].lstrip("/"), target
            case kind:
                raise ValueError(f"a mount that is not known here: {kind}")

    def _copy(self, image: Image, words: list[str]) -> None:
        stage = None
        if words[0].startswith("--from="):
            stage = words.pop(0).removeprefix("--from=")
        *sources, target = words
        destination = image.root / (Path(image.workdir) / target).as_posix().lstrip("/")
        for source in sources:
            many = len(sources) > 1 or target.endswith("/")
            place = destination / Path(source).name if many else destination
            place.parent.mkdir(parents=True, exist_ok=True)
            if stage is not None:
                path = self.build(stage).root / source.lstrip("/")
                subprocess.run(["cp", "-a", path, place], check=True)
            else:
                self._copy_context(source, place)

    def _copy_context(self, source: str, place: Path) -> None:
        top = self.context / source
        found = [top] if top.is_file() else [p for p in sorted(top.rglob("*")) if p.is_file()]
        taken = [p for p in found if not self._kept_out(p)]
        assert taken, f"COPY {source}: the context has none of it"
        for path in taken:
            target = place if path == top else place / path.relative_to(top)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)

    def _kept_out(self, path: Path) -> bool:
        return ignored(path.relative_to(self.context).as_posix(), self.patterns)


def _set(image: Image, name: str, value: str) -> None:
    """Keep what a container is started with."""
    match name:
        case "USER":
            image.user = value
        case "STOPSIGNAL":
            image.stopsignal = value
        case "VOLUME":
            image.volumes = tuple(json.loads(value))
        case "ENTRYPOINT":
            image.entrypoint, image.cmd = tuple(json.loads(value)), ()
        case "CMD":
            image.cmd = tuple(json.loads(value))
        case "HEALTHCHECK":
            image.healthcheck = tuple(json.loads(value.partition(" CMD ")[2]))
        case _:
            raise ValueError(f"an instruction that is not known here: {name}")


def pairs(text: str) -> dict[str, str]:
    """Read ``A=1 B="two"`` as of ENV and LABEL."""
    return dict(word.split("=", 1) for word in shlex.split(text))


def command(
    image: Image,
    words: Sequence[str],
    mounts: Sequence[tuple[Path, str]] = (),
    *,
    env: dict[str, str] | None = None,
    read_only: bool = False,
) -> list[str]:
    """Return the words that run ``words`` in the image, as its user and with its environment.

    ``read_only``: as a container is run with a read-only root, no capability and no way to gain
    one, its volumes and /tmp the only places to write to; ``/tmp`` takes no programs.
    """
    root = image.root
    lines = ["set -e"]
    for host, within in mounts:
        _mount_point(root / within.lstrip("/"), folder=host.is_dir())
    if read_only:
        root = root.with_name("read-only")
        root.mkdir(exist_ok=True)
        lines += [f"mount --bind {image.root} {root}", f"mount -o remount,ro,bind {root}"]
    lines += [f"mount --rbind {host} {root}{within}" for host, within in mounts]
    lines += [
        f"mount -t proc proc {root}/proc",
        f"mount --bind -o ro /sys {root}/sys",
        f"mount --rbind /dev {root}/dev",
    ]
    if read_only:
        lines.append(f"mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs {root}/tmp")
    uid, gid = image.user.split(":")
    drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
    if read_only:
        drop += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    variables = {**image.env, **(env or {})}
    inner = ["env", "-i", *(f"{k}={v}" for k, v in variables.items()), *words]
    shell = f"cd {shlex.quote(image.workdir)} && exec {shlex.join([*drop, *inner])}"
    lines.append(f"exec chroot {root} /bin/sh -c {shlex.quote(shell)}")
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(lines)]


def _mount_point(path: Path, *, folder: bool) -> None:
    if folder:
        path.mkdir(parents=True, exist_ok=True)
    elif not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def run(
    image: Image,
    words: Sequence[str],
    mounts: Sequence[tuple[Path, str]] = (),
    *,
    env: dict[str, str] | None = None,
) -> None:
    """Run ``words`` in the image to their end; raise ``CalledProcessError`` where they fail."""
    done = subprocess.run(
        command(image, words, mounts, env=env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        print(done.stdout[-4000:], flush=True)
        raise subprocess.CalledProcessError(done.returncode, list(words))
