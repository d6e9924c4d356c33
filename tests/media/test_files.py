"""Uploaded files: kept by content within a quota and a time, and gone when they should be."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen2vl_serve.media import files
from qwen2vl_serve.media.files import FileStore, NoSuchFile


class Clock:
    """Stands in for the module's ``time``."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(files, "time", one)
    return one


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., FileStore]:
    """Stores over one folder, as one server after another has it."""

    def make(**options: Any) -> FileStore:
        settings = {"max_files": 3, "max_bytes": 1000, "ttl_seconds": 100.0, **options}
        return FileStore(settings.pop("folder", tmp_path / "kept"), **settings)

    return make


def test_the_same_bytes_have_the_same_id(store: Callable[..., FileStore]) -> None:
    """The id is the content's hash, whatever the name; other bytes have another."""
    one = store()
    first = one.add(b"abc", "a.png", "vision")
    again = one.add(b"abc", "b.png", "vision")
    other = one.add(b"abd", "a.png", "vision")
    assert first.id == again.id == f"file-{blake3(b'abc').hexdigest()}"
    assert other.id != first.id
    assert one.read(first.id) == b"abc"
    assert [file.filename for file in one.listing() if file.id == first.id] == ["b.png"]


def test_bytes_come_back_as_they_went_in(store: Callable[..., FileStore]) -> None:
    """Line ends, zeros and emptiness included: the stored head does not touch them."""
    one = store()
    for data in (b"", b"\n", b"\r\n{}\n\0", bytes(range(256))):
        assert one.read(one.add(data, "x\n\u2028é", "vision").id) == data


def test_an_unknown_id_is_no_path(store: Callable[..., FileStore], tmp_path: Path) -> None:
    """An id is looked up, never followed."""
    (tmp_path / "secret").write_bytes(b"{}\nsecret")
    one = store()
    one.add(b"abc", "a", "vision")
    for name in ("../secret", str(tmp_path / "secret"), "", ".", "file-", "file-" + "0" * 64):
        with pytest.raises(NoSuchFile):
            one.read(name)
        with pytest.raises(NoSuchFile):
            one.delete(name)
    assert (tmp_path / "secret").exists()


def test_deleted_is_gone_from_memory_and_disk(
    store: Callable[..., FileStore], tmp_path: Path
) -> None:
    """Nothing of it is left in the folder, and it cannot be read, found or deleted again."""
    one = store()
    file = one.add(b"abc", "a", "vision")
    one.delete(file.id)
    assert list((tmp_path / "kept").iterdir()) == []
    for ask in (one.read, one.find, one.delete):
        with pytest.raises(NoSuchFile):
            ask(file.id)


def test_an_expired_file_is_not_served_and_leaves_the_disk(
    store: Callable[..., FileStore], tmp_path: Path, clock: Clock
) -> None:
    """At its time, whoever asks for whatever; a second upload begins the time anew."""
    one = store()
    old, renewed, short = (one.add(data, "a", "vision") for data in (b"1", b"2", b"3"))
    assert one.add(b"3", "a", "vision", seconds=10).id == short.id
    clock.now += 60
    assert {file.id for file in one.listing()} == {old.id, renewed.id}
    one.add(b"2", "a", "vision")
    clock.now += 40
    with pytest.raises(NoSuchFile):
        one.read(old.id)
    assert one.read(renewed.id) == b"2"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [renewed.id]


def test_no_file_outlives_the_profiles_time(store: Callable[..., FileStore], clock: Clock) -> None:
    """A client may ask for less, not for more."""
    file = store().add(b"1", "a", "vision", seconds=10**9)
    assert file.expires_at - file.created_at == 100


def test_expired_files_leave_the_disk_though_nobody_asks(
    store: Callable[..., FileStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the store's own sees to it, and ends with it."""
    monkeypatch.setattr(files, "SWEEP_SECONDS", 0.05)
    one = store(ttl_seconds=0.2)
    one.add(b"abc", "a", "vision")
    gone = threading.Event()
    for _ in range(200):
        if not list((tmp_path / "kept").iterdir()):
            gone.set()
            break
        gone.wait(0.05)
    assert gone.is_set()
    one.close()
    sweeper = next((t for t in threading.enumerate() if t is one._sweeper), None)
    if sweeper is not None:
        sweeper.join(60)
        assert not sweeper.is_alive()


def test_the_longest_unused_makes_room(store: Callable[..., FileStore]) -> None:
    """By count and by bytes; being read counts as use."""
    one = store()
    ids = [one.add(bytes([n]) * 300, "a", "vision").id for n in range(3)]
    one.read(ids[0])
    ids.append(one.add(b"x" * 300, "a", "vision").id)
    assert {file.id for file in one.listing()} == {ids[0], ids[2], ids[3]}
    big = one.add(b"y" * 700, "a", "vision").id
    assert {file.id for file in one.listing()} == {ids[3], big}
    with pytest.raises(ValueError, match="1001"):
        one.add(b"z" * 1001, "a", "vision")
    assert {file.id for file in one.listing()} == {ids[3], big}


def test_a_folder_keeps_files_over_a_restart(store: Callable[..., FileStore], clock: Clock) -> None:
    """Names, times and bytes; what expired in between is gone."""
    before = store()
    kept, short = before.add(b"abc", "ä.png", "vision"), before.add(b"d", "b", "vision", 10)
    before.close()
    clock.now += 50
    after = store()
    assert list(after.listing()) == [kept]
    assert after.read(kept.id) == b"abc"
    with pytest.raises(NoSuchFile):
        after.find(short.id)


def test_what_a_crash_left_is_cleared(store: Callable[..., FileStore], tmp_path: Path) -> None:
    """Unfinished, cut, renamed and forged files go; what is not ours stays."""
    folder = tmp_path / "kept"
    file = store().add(b"abc" * 50, "a", "vision")
    whole = (folder / file.id).read_bytes()
    broken = {
        ".upload-1": whole,
        f"file-{'1' * 64}": whole,
        f"file-{'2' * 64}": b"",
        f"file-{'3' * 64}": b'{"id": 5}\n',
        f"file-{'4' * 64}": b"\xff\xfe\n" + bytes(99),
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    (folder / f"file-{'5' * 64}").mkdir()
    (folder / "notes.txt").write_bytes(b"mine")
    (folder / "file-mine").write_bytes(b"mine")
    one = store()
    assert [one.id for one in one.listing()] == [file.id]
    left = {path.name for path in folder.iterdir()}
    assert left == {file.id, "notes.txt", "file-mine", f"file-{'5' * 64}"}
    (folder / file.id).write_bytes(whole[:-1])
    assert list(store().listing()) == []


def test_servers_that_share_a_folder_find_each_others_files(
    store: Callable[..., FileStore], clock: Clock
) -> None:
    """Uploaded, prolonged, listed and deleted by one, and so for the other; owners are kept."""
    one, other = store(shared=True), store(shared=True)
    mine = one.add(b"mine", "a.png", "vision", 10, owner="alice")
    assert other.read(mine.id, "alice") == b"mine"
    assert other.look_up(mine.id, "alice") == mine
    with pytest.raises(NoSuchFile):
        other.read(mine.id, "bob")
    theirs = other.add(b"theirs", "b.png", "vision", 10)
    assert [file.id for file in one.listing()] == [theirs.id]
    clock.now += 5
    other.add(b"theirs", "b.png", "vision", 10)
    clock.now += 6
    assert one.read(theirs.id) == b"theirs", "the other began its time anew"
    other.delete(theirs.id)
    for gone in (theirs, mine):
        with pytest.raises(NoSuchFile):
            one.find(gone.id, gone.owner)
    assert one.listing() == []
    assert (one.count(), one.size()) == (0, 0)


def test_a_file_that_another_server_renewed_outlives_its_first_time(
    store: Callable[..., FileStore], tmp_path: Path, clock: Clock
) -> None:
    """Whoever sweeps looks at what the file says by now, not at what it said when it was read."""
    one, other = store(shared=True), store(shared=True)
    file = one.add(b"picture", "a.png", "vision", 10)
    clock.now += 5
    other.add(b"picture", "a.png", "vision", 100)
    clock.now += 6
    assert [kept.id for kept in one.listing()] == [file.id]
    assert other.read(file.id) == b"picture"
    clock.now += 100
    assert one.listing() == []
    assert list((tmp_path / "kept").iterdir()) == []


def on_opening(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]) -> None:
    """Have something done once, right behind the next opening of a file."""
    opened = Path.open

    def open_once(path: Path, *how: Any) -> Any:
        source = opened(path, *how)
        monkeypatch.setattr(Path, "open", opened)
        meanwhile()
        return source

    monkeypatch.setattr(Path, "open", open_once)


def test_a_file_that_is_replaced_while_it_is_looked_at_stays(
    store: Callable[..., FileStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server's upload under a longer name is no damage to the one before."""
    one, other = store(shared=True), store(shared=True)
    file = one.add(b"picture", "a.png", "vision")
    on_opening(monkeypatch, lambda: other.add(b"picture", "a longer name.png", "vision"))
    assert one.find(file.id).filename == "a.png"
    assert one.find(file.id).filename == "a longer name.png"


def test_what_was_put_in_the_place_of_a_damaged_file_stays(
    store: Callable[..., FileStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was looked at is cleared away."""
    one, other = store(shared=True), store(shared=True)
    file = one.add(b"picture", "a.png", "vision")
    path = tmp_path / "kept" / file.id
    path.write_bytes(b"half")
    on_opening(monkeypatch, lambda: other.add(b"picture", "a.png", "vision"))
    with pytest.raises(NoSuchFile):
        one.find(file.id)
    assert one.read(file.id) == b"picture"


def test_servers_that_share_a_folder_share_its_quota(
    store: Callable[..., FileStore], tmp_path: Path
) -> None:
    """Three files are kept, whoever took them; an id that is no name of a file is no path."""
    one, other = store(shared=True), store(shared=True)
    for number in range(5):
        (one, other)[number % 2].add(b"%d" % number, "a", "vision")
    assert len(list((tmp_path / "kept").iterdir())) == 3
    assert {file.id for file in one.listing()} == {file.id for file in other.listing()}
    with pytest.raises(NoSuchFile):
        one.find("../kept")


def test_what_another_server_has_not_finished_is_left_alone(
    store: Callable[..., FileStore], tmp_path: Path
) -> None:
    """In a shared folder only what is an hour old is a crash's."""
    folder = tmp_path / "kept"
    folder.mkdir()
    old, new = folder / ".upload-old", folder / ".upload-new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * files.UNFINISHED_SECONDS,) * 2)
    store(shared=True)
    assert [path.exists() for path in (old, new)] == [False, True]


def test_a_smaller_quota_holds_for_what_lies_there(store: Callable[..., FileStore]) -> None:
    """A restart under a smaller profile keeps the newest."""
    before = store()
    for n in range(3):
        before.add(bytes([n]) * 300, "a", "vision")
    assert len(store(max_files=1).listing()) == 1
    assert len(store(max_bytes=10).listing()) == 0


def test_a_file_that_vanished_is_unknown(store: Callable[..., FileStore], tmp_path: Path) -> None:
    """Removed behind the store's back, it is as good as deleted."""
    one = store()
    file = one.add(b"abc", "a", "vision")
    (tmp_path / "kept" / file.id).unlink()
    with pytest.raises(NoSuchFile):
        one.read(file.id)
    assert list(one.listing()) == []


def test_only_the_servers_user_may_read_them(
    store: Callable[..., FileStore], tmp_path: Path
) -> None:
    """Folder and files are closed to everyone else on the machine."""
    one = store()
    file = one.add(b"abc", "a", "vision")
    folder = tmp_path / "kept"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / file.id).stat().st_mode) == 0o600


def test_without_a_folder_nothing_survives_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary folder exists from the first upload to the end."""
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    one = FileStore(None, max_files=3, max_bytes=1000, ttl_seconds=100)
    assert list(tmp_path.iterdir()) == []
    file = one.add(b"abc", "a", "vision")
    assert one.read(file.id) == b"abc"
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    other = one.add(b"abd", "a", "vision")
    assert one.read(other.id) == b"abd", "though the folder was cleared away in between"
    with pytest.raises(NoSuchFile):
        one.read(file.id)
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    """At once, as ``OSError``."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        FileStore(tmp_path / "file", max_files=1, max_bytes=1, ttl_seconds=1)


def test_many_threads_see_whole_files_or_none(store: Callable[..., FileStore]) -> None:
    """Adding, reading and deleting the same few at once: the right bytes, or ``NoSuchFile``."""
    one = store(max_bytes=50_000)
    contents = [bytes([n]) * 12_000 for n in range(6)]

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(60):
            data = dice.choice(contents)
            file_id = one.add(data, "a", "vision").id
            try:
                assert one.read(file_id) == data
                if dice.random() < 0.3:
                    one.delete(file_id)
            except NoSuchFile:
                pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert len(one.listing()) <= 3
    assert sum(file.bytes for file in one.listing()) == one._total <= 50_000


class Quota(RuleBasedStateMachine):
    """Any order of uploads, reads, deletions and time keeps the quota and the right bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.real_time, self.clock = files.time, Clock()
        files.time = self.clock  # type: ignore[assignment]
        self.store = FileStore(None, max_files=4, max_bytes=500, ttl_seconds=60)
        self.seen: dict[str, bytes] = {}

    def teardown(self) -> None:
        self.store.close()
        files.time = self.real_time

    @rule(data=st.binary(max_size=300), seconds=st.none() | st.floats(1, 100))
    def add(self, data: bytes, seconds: float | None) -> None:
        file = self.store.add(data, "a", "vision", seconds)
        self.seen[file.id] = data
        assert self.store.find(file.id) == file

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        file_id = data.draw(st.sampled_from(sorted(self.seen)))
        with contextlib.suppress(NoSuchFile):
            self.store.delete(file_id)
        assert file_id not in {file.id for file in self.store.listing()}

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def quota_and_content(self) -> None:
        kept = self.store.listing()
        assert len(kept) <= 4
        assert sum(file.bytes for file in kept) <= 500
        assert all(file.expires_at > self.clock.now for file in kept)
        folder = self.store._folder
        names = set() if folder is None else {path.name for path in folder.iterdir()}
        assert names == {file.id for file in kept}
        for file in kept:
            assert self.store.read(file.id) == self.seen[file.id]


Quota.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestQuota = Quota.TestCase
