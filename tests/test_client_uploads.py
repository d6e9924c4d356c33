"""Files that the client uploads by itself, before servers that know less of them than ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from qwen2vl_client import BadRequestError, Client

from tests import stub_server as stub
from tests.test_client_files import LARGE

STORED = stub.answer(200, {"id": "file-" + "a" * 32, "object": "file", "bytes": 1})


class TestIdsInMessages:
    """OpenAI's own API, and proxies, keep files but know no ``file_id`` in an ``image_url``."""

    def shown(self, server: stub.Stub) -> list[str]:
        return [
            "upload" if request.path.endswith("/files")
            else next(iter(request.body["messages"][-1]["content"][0]["image_url"]))
            for request in server.requests
        ]  # fmt: skip

    @pytest.mark.parametrize("status", [400, 422])
    def test_a_server_that_does_not_know_them_gets_pictures_inline(self, status: int) -> None:
        """From then on at once."""
        refusal = stub.failure(status, "missing_required_parameter")
        with (
            stub.running(STORED, refusal, stub.completion()) as server,
            Client(server.url, "", "m") as client,
        ):
            client.chat("x", images=LARGE)
            client.chat("y", images=LARGE)
        assert self.shown(server) == ["upload", "file_id", "url", "url"]

    def test_a_refusal_of_the_request_itself_comes_through(self) -> None:
        """Inline it is refused as well, which says nothing of the ids; they are used again."""
        refusal = stub.failure(400, "invalid_value")
        with (
            stub.running(STORED, refusal, refusal, stub.completion(), refusal) as server,
            Client(server.url, "", "m") as client,
        ):
            with pytest.raises(BadRequestError):
                client.chat("x", images=LARGE)
            client.chat("x", images=LARGE)
            with pytest.raises(BadRequestError):
                client.chat("x", images=LARGE)
        assert self.shown(server) == ["upload", "file_id", "url", "file_id", "file_id"]

    @pytest.mark.parametrize(
        ("code", "param"),
        [
            ("image_download_timeout", "messages[0].content[1]"),
            ("context_length_exceeded", "messages"),
            ("too_many_items", "messages"),
            ("invalid_value", "temperature"),
        ],
    )
    def test_a_refusal_that_speaks_of_something_else_is_no_doubt(
        self, code: str, param: str
    ) -> None:
        """Nothing is sent a second time, and pictures are uploaded as before."""
        error = {"message": "no", "type": "x", "param": param, "code": code}
        refusal = stub.answer(400, {"error": error})
        with (
            stub.running(STORED, refusal, stub.completion()) as server,
            Client(server.url, "", "m") as client,
        ):
            with pytest.raises(BadRequestError):
                client.chat("x", images=LARGE)
            client.chat("x", images=LARGE)
        assert self.shown(server) == ["upload", "file_id", "file_id"]

    @pytest.mark.parametrize("inline", [stub.failure(413, "request_too_large"), stub.drop])
    def test_what_is_too_large_inline_does_not_hide_what_was_wrong(self, inline: stub.Step) -> None:
        """After a 413 or a lost connection the first refusal is raised; the id is used again."""
        refusal = stub.failure(400, "invalid_value")
        with (
            stub.running(STORED, refusal, inline, stub.completion()) as server,
            Client(server.url, "", "m", max_retries=0) as client,
        ):
            with pytest.raises(BadRequestError, match="invalid_value"):
                client.chat("x", images=LARGE)
            client.chat("x", images=LARGE)
        assert self.shown(server) == ["upload", "file_id", "url", "file_id"]

    def test_what_is_wrong_with_the_request_inline_is_told(self) -> None:
        """It says more than that an address is missing."""
        script = [stub.failure(400, "missing_required_parameter"), stub.failure(400, "some_limit")]
        with (
            stub.running(STORED, *script) as server,
            Client(server.url, "", "m") as client,
            pytest.raises(BadRequestError, match="some_limit"),
        ):
            client.chat("x", images=LARGE)
        assert self.shown(server) == ["upload", "file_id", "url"]


def test_a_file_whose_name_is_not_utf_8_is_uploaded(tmp_path: Path) -> None:
    """Its bytes are; in its name what is no character becomes a question mark."""
    path = tmp_path / os.fsdecode("照片".encode("gbk") + b".jpg")
    path.write_bytes(b"\xff\xd8\xff")
    with stub.running(STORED) as server, Client(server.url, "", "m") as client:
        client.files.upload(path)
        client.files.upload(b"\xff\xd8\xff", filename="half \ud83d.jpg")
    first, second = (request.body for request in server.requests)
    assert b'filename="??\xc6\xac.jpg"' in first  # the second letter's bytes make one of UTF-8
    assert b'filename="half ?.jpg"' in second
