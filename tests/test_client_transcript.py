"""Conversations that are saved and gone on with, on the same server or another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen2vl_client import (
    AsyncConversation,
    Client,
    Conversation,
    InvalidArgumentError,
    MediaError,
)

from tests import stub_server as stub
from tests.context.test_overflow import texts
from tests.test_client_conversation import picture, talking


class TestSaving:
    @pytest.mark.parametrize("pictures", ["inside", "beside"])
    def test_a_conversation_goes_on_where_it_was(self, pictures: Any, tmp_path: Path) -> None:
        """Messages, events and temperature come back: both ask the next in the same words."""
        path = tmp_path / "对话.json"
        with talking(450) as (client, _, engine):
            conversation = Conversation(
                client, "简短地", overflow="summarise", keep_last=1, max_tokens=9, temperature=0.5,
                summary_max_tokens=20,
            )  # fmt: skip
            for number in range(9):
                conversation.ask(f"这 是 什么 {number} b={number}", images=picture(number % 2))
            conversation.save(path, pictures=pictures)
            loaded = Conversation.load(path, client)
            assert loaded.messages == conversation.messages
            assert loaded.events == conversation.events != []
            conversation.ask("图片 9 里 有 什么")
            loaded.ask("图片 9 里 有 什么")
            one, other = engine.requests[-2:]
            assert texts(one) == texts(other)
            assert one.temperature == other.temperature == 0.5
            assert loaded.messages == conversation.messages

    def test_each_picture_is_there_once(self, tmp_path: Path) -> None:
        """Shown in three turns it is base64 once, or beside the file one file of its bytes."""
        with talking(4096) as (client, _, _):
            conversation = Conversation(client)
            for _ in range(3):
                conversation.ask("x", images=picture(7))
            inside, beside = tmp_path / "a.json", tmp_path / "b.json"
            conversation.save(inside)
            conversation.save(beside, pictures="beside")
        document = json.loads(inside.read_text("utf-8"))
        assert len(document["pictures"]) == 1
        assert inside.read_text("utf-8").count("base64") == 1
        (file,) = (tmp_path / "b.pictures").iterdir()
        assert file.read_bytes() == picture(7)
        assert "base64" not in beside.read_text("utf-8")

    def test_a_file_and_its_folder_may_be_moved_and_renamed(self, tmp_path: Path) -> None:
        """The file has its folder's name; a folder of its own new name is found as well."""
        with talking(4096) as (client, _, _):
            conversation = Conversation(client)
            conversation.ask("x", images=picture(7))
            conversation.save(tmp_path / "a.json", pictures="beside")
            document = json.loads((tmp_path / "a.json").read_text("utf-8"))
            moved = tmp_path / "moved"
            moved.mkdir()
            (tmp_path / "a.pictures").rename(moved / "a.pictures")
            (tmp_path / "a.json").rename(moved / "b.json")
            loaded = Conversation.load(moved / "b.json", client)
            assert loaded.messages == conversation.messages
            (moved / "a.pictures").rename(moved / "b.pictures")
            loaded = Conversation.load(moved / "b.json", client)
            assert loaded.messages == conversation.messages
            (moved / "b.pictures").rename(moved / "a.pictures")
            del document["folder"]
            (moved / "a.json").write_text(json.dumps(document), "utf-8")
            assert Conversation.load(moved / "a.json", client).messages == conversation.messages
            for folder in ("../a.pictures", "..", "", 7):
                (moved / "a.json").write_text(json.dumps({**document, "folder": folder}), "utf-8")
                with pytest.raises(InvalidArgumentError, match="holds no conversation"):
                    Conversation.load(moved / "a.json", client)

    @pytest.mark.parametrize("pictures", ["inside", "beside"])
    def test_a_file_that_cannot_be_written_is_told(self, pictures: Any, tmp_path: Path) -> None:
        """A missing folder is not made: the error names the path and the system's reason."""
        path = tmp_path / "no folder" / "a.json"
        with pytest.raises(InvalidArgumentError, match=r"cannot write .*a\.json: No such file"):
            Conversation(Client("http://127.0.0.1:9")).save(path, pictures=pictures)

    @pytest.mark.parametrize("name", ["", ".", "/", "a\0b"])
    def test_a_name_that_no_file_can_have_is_told(self, name: str) -> None:
        """An error of ours that names it, not pathlib's."""
        with pytest.raises(InvalidArgumentError, match="cannot write"):
            Conversation(Client()).save(name)

    def test_what_could_not_be_written_leaves_nothing_behind(self, tmp_path: Path) -> None:
        """The folder of that name stays, and no half-written file stands beside it."""
        (tmp_path / "a").mkdir()
        with pytest.raises(InvalidArgumentError, match="cannot write"):
            Conversation(Client()).save(tmp_path / "a")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_settings_are_saved_or_told(self, tmp_path: Path) -> None:
        """A number of numpy comes back as a number; what JSON has no word for is an error."""
        path = tmp_path / "a.json"
        half: Any = np.float32(0.5)
        Conversation(Client(), temperature=half, keep_last=np.int64(3)).save(path)  # type: ignore[arg-type]
        settings = json.loads(path.read_text("utf-8"))["settings"]
        assert (settings["temperature"], settings["keep_last"]) == (0.5, 3)
        stop: Any = {"a"}
        with pytest.raises(InvalidArgumentError, match="type set is no JSON"):
            Conversation(Client(), stop=stop).save(path)

    def test_a_file_that_was_tampered_with_reads_no_other_file(self, tmp_path: Path) -> None:
        """A picture's name becomes a path: only a hash may, and only what has that hash is sent."""
        secret = tmp_path / "secret"
        secret.write_text("key")
        path = tmp_path / "a.json"
        with talking(4096) as (client, _, _):
            conversation = Conversation(client)
            conversation.ask("x", images=picture(7))
            conversation.save(path, pictures="beside")
            text = path.read_text("utf-8")
            (file,) = (tmp_path / "a.pictures").iterdir()
            path.write_text(text.replace(file.name, "../secret"), "utf-8")
            with pytest.raises(MediaError, match="lacks a picture"):
                Conversation.load(path, client)
            path.write_text(text, "utf-8")
            file.unlink()
            file.symlink_to(secret)
            with pytest.raises(MediaError, match="not the one that was saved"):
                Conversation.load(path, client)
            file.unlink()
            with pytest.raises(MediaError, match="cannot read"):
                Conversation.load(path, client)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x", "version": 1}', "\ud800"])
    def test_a_file_that_is_none_is_told(self, text: str, tmp_path: Path) -> None:
        """Other JSON, no UTF-8 or no file at all: an error of ours, never one of ``json``."""
        path = tmp_path / "a.json"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(InvalidArgumentError, match=r"a\.json"):
            Conversation.load(path, Client("http://127.0.0.1:9"))
        with pytest.raises(InvalidArgumentError, match="cannot read"):
            Conversation.load(tmp_path / "missing.json", Client("http://127.0.0.1:9"))
        with pytest.raises(InvalidArgumentError, match="inside"):
            Conversation(Client("http://127.0.0.1:9")).save(path, pictures="x")  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", [Conversation, AsyncConversation])
    @pytest.mark.parametrize(
        ("place", "value", "named"),
        [
            (("turns", 0, "user"), None, "turns[0].user=None must be an object"),
            (("turns", 0, "user", "role"), 7, "turns[0].user.role=7"),
            (("turns", 0, "user", "content"), None, "turns[0].user.content=None"),
            (("turns", 0, "user", "content", 0), "x", "turns[0].user.content[0]='x'"),
            (("turns", 0, "user", "content", 1, "text"), None, "turns[0].user.content[1].text"),
            (("turns", 0, "answer"), "x", "turns[0].answer='x'"),
            (("turns", 0, "tokens"), "x", "turns[0].tokens='x'"),
            (("turns", 0, "numbers"), [], "turns[0].numbers=[] must be the numbers of its 1 pic"),
            (("turns", 0, "numbers"), [None], "turns[0].numbers=[None]"),
            (("turns", 0), 7, "turns[0]=7"),
            (("turns",), {}, "turns={}"),
            (("seen",), None, "seen=None must be a whole number"),
            (("seen",), True, "seen=True"),
            (("changed",), 1, "changed=1"),
            (("known",), -1, "known=-1"),
            (("costs",), [], "costs=[]"),
            (("costs",), {"a": "x"}, "costs.a='x'"),
            (("system",), 7, "system=7"),
            (("summary",), [], "summary=[]"),
            (("summary", "text"), None, "summary.text=None"),
            (("summary", "tokens"), "x", "summary.tokens='x'"),
            (("summary", "pictures"), [7], "summary.pictures[0]=7"),
            (("summary", "pictures"), [["x", {}]], "summary.pictures[0]=['x', {}]"),
            (("events",), [{"kind": "x"}], "events[0].kind='x' must be one of summarised, dropped"),
            (("events",), [{"kind": "summarised", "turns": "x"}], "events[0].turns='x'"),
            (("pictures",), [], "pictures=[]"),
            (("settings",), None, "settings=None"),
            (("settings", "client"), 1, "settings=['client']"),
            (("settings", "summary_prompt"), 5, "summary_prompt=5"),
            (("settings", "overflow"), [], "overflow=[]"),
            (("settings", "model"), "m", "model="),
        ],
    )  # fmt: skip
    def test_a_file_that_is_damaged_names_its_field(
        self, place: tuple[Any, ...], value: Any, named: str, kind: Any, tmp_path: Path
    ) -> None:
        """When it is loaded, and not when the conversation goes on."""
        path = tmp_path / "a.json"
        with stub.running(stub.completion("ok")) as server, Client(server.url, "", "m") as client:
            conversation = Conversation(client)
            conversation.ask("x", images=picture(7))
        conversation.save(path)
        document = json.loads(path.read_text("utf-8"))
        inner = document
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        path.write_text(json.dumps(document), "utf-8")
        with pytest.raises(InvalidArgumentError) as caught:
            kind.load(path, client)
        assert named in str(caught.value)

    def test_half_a_character_in_an_answer_is_kept_and_breaks_nothing(self, tmp_path: Path) -> None:
        """The answer is as it came, in the history U+FFFD is in its place: no request can hold it.

        Two halves that a stream brought one by one are the character that they make.
        """
        path = tmp_path / "a.json"
        with (
            stub.running(stub.completion("a \ud83d b"), stub.completion("\ud83d\ude00")) as server,
            Client(server.url, "", "m") as client,
        ):
            conversation = Conversation(client)
            assert conversation.ask("x").text == "a \ud83d b"
            conversation.save(path)
            conversation = Conversation.load(path, client)
            conversation.ask("y")
            conversation.ask("z")
        contents = [one["content"] for one in server.requests[-1].body["messages"]]
        assert contents[1:] == ["x", "a \ufffd b", "y", "😀", "z"]

    def test_what_is_half_a_character_is_saved(self, tmp_path: Path) -> None:
        """Of a system message, which no request can hold either; the file is UTF-8 all the same."""
        path = tmp_path / "a.json"
        client = Client("http://127.0.0.1:9")
        Conversation(client, "half \ud83d").save(path)
        path.read_text("utf-8")
        assert Conversation.load(path, client).messages[0]["content"] == "half \ud83d"

    def test_what_is_given_goes_before_what_was_saved(self, tmp_path: Path) -> None:
        """Settings and the system message; the others come back as they were."""
        path = tmp_path / "a.json"
        with stub.running(stub.completion("ok")) as server, Client(server.url, "", "m") as client:
            conversation = Conversation(client, "Old", temperature=0.5, max_tokens=9)
            conversation.ask("x")
            conversation.save(path)
            for system in ("New", None):
                loaded = Conversation.load(path, client, system=system, temperature=0.0)
                loaded.ask("y")
                body = server.requests[-1].body
                assert (body["temperature"], body["max_tokens"]) == (0.0, 9)
                first = body["messages"][0]
                assert first["content"] == (system or "x")
