"""Programs of Debian's packages: unpacked once, and a clear reason where they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy import debian


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory", "apt-get"), "apt-get"),
        (
            debian.subprocess.CalledProcessError(100, "apt-get", stderr="E: Unable to locate x\n"),
            "Unable to locate",
        ),
    ],
)
def test_a_package_that_cannot_be_had_skips_with_its_reason(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A test on another system is skipped, and says which program and why."""

    def refuse(*_: str, **__: object) -> None:
        raise error

    monkeypatch.setattr(debian, "_run", refuse)
    monkeypatch.setattr(debian, "FOLDER", tmp_path)
    with pytest.raises(pytest.skip.Exception, match=f"no no-such-program here.*{reason}"):
        debian.program("no-such-program", "no-such-package")


def test_what_is_installed_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine has ``sh``, so its own comes back and no package is unpacked."""
    monkeypatch.setattr(debian, "unpacked", lambda *_: pytest.fail("a package is unpacked"))
    found = debian.program("sh", "dash")
    assert (found.name, found.is_file()) == ("sh", True)
    assert not found.is_relative_to(debian.FOLDER)
