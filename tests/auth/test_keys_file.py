"""Named keys: the file, the commands that write it, and a server's view of it."""

from __future__ import annotations

import json
import re
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qwen2vl_serve import cli
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.auth.keys_file import KeyLimits, KeysFile, expiry_of
from qwen2vl_serve.errors import InvalidAPIKey, ProfileError, SetupError
from qwen2vl_serve.profile import load_profile


@pytest.fixture
def file(tmp_path: Path) -> KeysFile:
    return KeysFile(tmp_path / "made" / "keys.json")


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2vl_serve.auth.keys.LOOK_SECONDS", 0.0)


def opens(keys: Keys, secret: str) -> bool:
    try:
        keys.check(f"Bearer {secret}")
    except InvalidAPIKey:
        return False
    return True


def test_a_secret_is_shown_once_and_never_kept(file: KeysFile) -> None:
    """The file holds a hash of the secret, and only its owner may read it."""
    secret = file.add("alice", KeyLimits(requests_per_minute=3))
    assert re.fullmatch(r"sk-q2vl-[A-Za-z0-9_-]{43}", secret)
    text = file.path.read_text("utf-8")
    assert secret not in text
    assert secret.removeprefix("sk-q2vl-") not in text
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert Keys(file=file).check(f"Bearer {secret}").limits == KeyLimits(requests_per_minute=3)


def test_secrets_differ(file: KeysFile) -> None:
    """No two keys share a secret."""
    assert len({file.add(f"key{number}") for number in range(20)}) == 20


def test_the_file_changes_at_once_or_not_at_all(file: KeysFile) -> None:
    """Many writers at a time lose nothing, and a reader never sees half a file."""
    file.add("first")
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(len(file.read()))

    def add(number: int) -> None:
        for step in range(10):
            KeysFile(file.path).add(f"key{number}-{step}")

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    reader.start()
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    done.set()
    reader.join()
    assert len(file.read()) == 41
    assert seen == sorted(seen)
    assert [path.name for path in file.path.parent.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "a\nb", "a/b", "é"])
def test_names_fit_into_a_log_line(file: KeysFile, name: str) -> None:
    """A name is one short word of ASCII."""
    with pytest.raises(SetupError, match="unfit"):
        file.add(name)
    assert not file.path.exists()


def test_a_name_is_taken_once(file: KeysFile) -> None:
    """Two keys of one name could not be told apart in logs or revoked one by one."""
    file.add("alice")
    with pytest.raises(SetupError, match="already"):
        file.add("alice")
    with pytest.raises(SetupError, match="there are: alice"):
        file.revoke("bob")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"keys": [{}]}',
        '{"keys": [], "more": 1}',
        '{"keys": [{"name": "a", "sha256": "00", "created_at": 1}]}',
    ],
)
def test_a_broken_file_stops_a_start(file: KeysFile, text: str) -> None:
    """A server does not start open, or half closed, over a file it cannot read."""
    file.path.parent.mkdir()
    file.path.write_text(text, "utf-8")
    with pytest.raises(ProfileError, match=r"keys\.json"):
        Keys(file=file)


def test_a_file_with_one_name_twice_is_broken(file: KeysFile) -> None:
    """Whose limits would hold?"""
    file.add("alice")
    document = json.loads(file.path.read_text("utf-8"))
    document["keys"] *= 2
    file.path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(ProfileError, match="one name"):
        file.read()


def test_a_file_that_is_named_and_not_there_stops_a_start(file: KeysFile) -> None:
    """A wrong path must not open the server, nor leave plain keys alone to close it."""
    for plain in ((), ("plain",)):
        with pytest.raises(ProfileError) as caught:
            Keys(plain, file)
        message = str(caught.value)
        assert f"keys file {file.path}: No such file" in message
        assert f"qwen2vl-serve keys add NAME --file {file.path}" in message
        assert "server.keys_file" in message
        assert "\n" not in message
    alice = file.add("alice")
    assert opens(Keys(file=file), alice)


def test_added_and_revoked_keys_need_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that no profile names may come later: a server notices it and its changes.

    It stays closed when the last key is gone, and when the file is.
    """
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = KeysFile(load_profile("demo").keys_path)
    keys = Keys(file=file)
    keys.check(None)
    assert not keys
    alice = file.add("alice")
    assert opens(keys, alice)
    assert not opens(keys, "other")
    bob = file.add("bob")
    assert opens(keys, bob)
    file.revoke("alice")
    assert not opens(keys, alice)
    assert opens(keys, bob)
    file.revoke("bob")
    assert not opens(keys, bob)
    for _ in ("empty", "gone"):
        with pytest.raises(InvalidAPIKey):
            keys.check(None)
        assert keys
        file.path.unlink(missing_ok=True)


@pytest.mark.parametrize("damage", ["broken", "gone", "unreadable"])
def test_a_file_that_breaks_while_serving_changes_nothing(
    file: KeysFile, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The keys stay as they were, one line says so, and the mended file is read again."""
    alice = file.add("alice")
    keys = Keys(file=file)
    good = file.path.read_text("utf-8")
    if damage == "broken":
        file.path.write_text("{", "utf-8")
    else:
        file.path.unlink()
        if damage == "unreadable":
            file.path.mkdir()
    with caplog.at_level("WARNING"):
        for _ in range(3):
            assert opens(keys, alice)
            assert not opens(keys, "other")
    assert len([one for one in caplog.records if "keys as before" in one.message]) == 1
    if damage == "unreadable":
        file.path.rmdir()
    file.path.write_text(good, "utf-8")
    assert opens(keys, file.add("bob"))


def test_plain_keys_go_on_beside_named_ones(file: KeysFile) -> None:
    """A plain key has no name, no limits and all models."""
    secret = file.add("alice", models=["demo"])
    keys = Keys(["plain"], file)
    plain = keys.check("Bearer plain")
    assert (plain.name, plain.limits, plain.may_use("anything")) == ("", None, True)
    alice = keys.check(f"Bearer {secret}")
    assert (alice.name, alice.may_use("demo"), alice.may_use("other")) == ("alice", True, False)


def test_a_key_whose_time_is_over_is_refused(file: KeysFile) -> None:
    """Expiry is judged at each request, without a change of the file."""
    secret = file.add("alice", expires_at=1_000_000_000)
    with pytest.raises(InvalidAPIKey, match="expired"):
        Keys(file=file).check(f"Bearer {secret}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2027-01-01", datetime(2027, 1, 1, tzinfo=UTC)),
        ("30d", datetime(2026, 12, 1, 12, tzinfo=UTC)),
        ("12h", datetime(2026, 11, 2, tzinfo=UTC)),
    ],
)
def test_expiries_are_days_or_spans(text: str, expected: datetime) -> None:
    """A date is its first second in UTC, a span counts from now."""
    now = datetime(2026, 11, 1, 12, tzinfo=UTC)
    assert expiry_of(text, now) == expected.timestamp()


@pytest.mark.parametrize(
    "text", ["", "soon", "0d", "-1d", "2026-13-01", "2020-01-01", "1w", "9" * 99]
)
def test_other_expiries_are_refused(text: str) -> None:
    """What is over or cannot be read is told at once."""
    with pytest.raises(SetupError, match="expires"):
        expiry_of(text, datetime(2026, 11, 1, tzinfo=UTC))


def test_the_commands_add_list_and_revoke(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output holds the secret alone, so that it can be piped; the list never does."""
    path = str(tmp_path / "keys.json")

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main(["keys", *words, "--file", path])
        return (status, *capsys.readouterr())

    status, secret, note = run(
        "add", "alice", "--requests-per-minute", "60", "--concurrent", "2", "--models", "a, b",
        "--expires", "30d",
    )  # fmt: skip
    assert (status, secret.count("\n")) == (0, 1)
    assert "once" in note
    (key,) = KeysFile(Path(path)).read()
    assert key.models == ("a", "b")
    assert key.limits == KeyLimits(requests_per_minute=60, concurrent=2)
    status, listing, _ = run("list")
    assert status == 0
    assert "alice" in listing
    assert "requests_per_minute=60 concurrent=2" in listing
    assert secret.strip() not in listing
    assert run("revoke", "alice")[0] == 0
    status, _, error = run("revoke", "alice")
    assert (status, error.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "words", [["add", "a", "--concurrent", "0"], ["add", "a", "--models", ","], ["add"], []]
)
def test_bad_commands_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, as for every refusal before a start."""
    assert cli.main(["keys", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
