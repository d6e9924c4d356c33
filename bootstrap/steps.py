"""Run pip with a line of progress, keep what it says, and explain why it failed."""

import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import List, Optional

from bootstrap.state import Lock

HEARTBEAT_S = 15.0
# pip's lines that say what it does now; those of clean-up and warnings do not.
TELLING = re.compile(r" *(Collecting|Downloading|Processing|Building|Preparing|Installing)\b")
PIP_OPTIONS = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off")


class StepError(Exception):
    """A command ended with an error; ``output`` is what it said."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


def say(text: str) -> None:
    """Show one line of progress."""
    print("==> " + text, flush=True)


class Steps:
    """Run the commands of one installation, each with its own line of progress.

    On a terminal the line below it tells what the command does at the moment; elsewhere a line
    every quarter of a minute does. ``log`` keeps all that was said.
    """

    def __init__(self, venv: Path, lock: Lock) -> None:
        self.log = venv / "install.log"
        self.python = str(venv / "bin" / "python")
        self._root = str(venv.parent)
        self._lock = lock

    def pip(self, title: str, arguments: List[str]) -> None:
        """Run ``pip install`` with these arguments; raise ``StepError`` when it fails."""
        command = [self.python, "-m", "pip", "install", *PIP_OPTIONS, *arguments]
        # Until pip says this it only downloads and builds, and .venv is as it was.
        self.run(title, command, changes_after="Installing collected packages")

    def run(self, title: str, command: List[str], changes_after: str = "") -> None:
        """Run a command that changes ``.venv`` once it has said a text; raise ``StepError``."""
        say(title)
        self._lock.mark(changing=True)
        child = subprocess.Popen(
            command,
            cwd=self._root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            errors="replace",
            pass_fds=(self._lock.fileno(),),
        )
        lines = [""]
        try:
            self._follow(child, lines)
        finally:
            if child.poll() is None:
                child.terminate()
            status = child.wait()
            output = "".join(lines)
            if status < 0:  # killed, so it could not say why itself
                output += f"\nERROR: ended from outside by signal {-status}\n"
            if status == 0 or changes_after not in output:
                self._lock.mark(changing=False)
            if self.log.parent.exists():
                with self.log.open("a", errors="replace") as log:
                    log.write(f"==> {title}: {' '.join(command)}\n{output}")
        if status != 0:
            raise StepError(output)

    def ask(self, code: str) -> str:
        """Return what ``.venv``'s Python prints for this code; empty when it fails."""
        answer = subprocess.run(
            [self.python, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
            check=False,
        )
        return answer.stdout.strip() if answer.returncode == 0 else ""

    def _follow(self, child: "subprocess.Popen[str]", lines: List[str]) -> None:
        """Collect a command's lines until it ends, and show the latest."""
        reader = threading.Thread(target=lines.extend, args=(child.stdout or (),), daemon=True)
        reader.start()
        live = sys.stdout.isatty()
        started = reported = time.monotonic()
        while reader.is_alive():
            reader.join(0.5)
            now = time.monotonic()
            latest = next((line for line in reversed(lines) if TELLING.match(line)), "")
            text = f"    {now - started:3.0f} s  {latest.strip()}"
            if live:
                columns = shutil.get_terminal_size().columns
                print("\r\033[K" + text[: columns - 1], end="", flush=True)
            elif now - reported >= HEARTBEAT_S:
                print(text[:100], flush=True)
                reported = now
        if live:
            print("\r\033[K", end="", flush=True)


def explain(output: str, where: str) -> str:
    """Turn what pip or uv said into the cause, in one line; ``where`` as Python 3.11 on x86_64."""
    if "No space left on device" in output:
        return "disk too full: the installation stopped with 'No space left on device'"
    unreachable = unreachable_because(output)
    if unreachable is not None:
        return (
            f"the package index cannot be reached ({unreachable}): check the network, the proxy "
            "and pip's index settings"
        )
    missing = missing_requirement(output)
    if missing is not None:
        return f"the configured package indexes have no {missing} for {where}"
    errors = re.findall(r"^ *(?:error|ERROR): *(.+)$", output, re.MULTILINE)
    causes = re.findall(r"^ *(?:cause|Caused by): *(.+)$", output, re.MULTILINE)
    return ": ".join((errors[-1:] or ["the command failed"]) + causes[-1:])


def missing_requirement(output: str) -> Optional[str]:
    """Return the requirement for which the indexes have no file; None when pip named none."""
    found = re.search(r"satisfies the requirement (.+?) \(from versions: ", output)
    return found.group(1) if found else None


def unreachable_because(output: str) -> Optional[str]:
    """Return what kept pip from the indexes; None when one of them answered.

    pip goes on when an index does not answer, and then says that it found no versions; when a
    file breaks off, it ends with what the network said.
    """
    found_none = "(from versions: none)" in output
    broken_off = re.search(r"Max retries exceeded|[Rr]ead timed out|IncompleteRead", output)
    retries = re.findall(r"after connection broken by '?(\w+)(.*)", output)
    if retries and (found_none or (broken_off and missing_requirement(output) is None)):
        kind, text = retries[-1]
        detail = re.search(r"\[Errno -?\d+\] ([\w ]+)", text)
        return detail.group(1) if detail else kind
    certificate = "problem confirming the ssl certificate"
    return certificate if found_none and certificate in output else None
