"""``chat``: a conversation, turn by turn.

On a terminal lines are edited, remembered and completed by prompt_toolkit (extra ``chat``); without
it, or where lines come from a pipe, they are read as they are.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwen2vl_client.cli.options import (
    add_sampling,
    add_server,
    client_of,
    given_of,
    run,
    text_of,
    with_advice,
)
from qwen2vl_client.client import Client
from qwen2vl_client.conversation import Conversation
from qwen2vl_client.errors import (
    APIStatusError,
    ClientError,
    InvalidArgumentError,
)
from qwen2vl_client.fitting import Event, Policy
from qwen2vl_client.media import image_part, video_part

PATHS = ("/image", "/video", "/save", "/load")
PLAIN = ("/help", "/tokens", "/clear", "/quit")
OVERFLOW = ("error", "summarise", "drop_oldest_images", "drop_oldest_turns")
USUAL: Policy = "drop_oldest_images"

_NOT_OF_THE_QUESTION = frozenset({401, 408, 409, 429})
"""Refusals that the same question need not meet another time."""

HELP = """\
/image PATH|URL   add a picture to the next question
/video PATH|URL   add a video to the next question
/tokens           what the conversation takes of the model's window
/save PATH        write the conversation to a file
/load PATH        go on with one that was saved
/clear            forget all turns
/quit             end (or Ctrl-D); Ctrl-C stops an answer"""


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Talk with a running server. Earlier turns, pictures included, are sent again "
        "with each question. Type /help for what can be typed beside questions.",
    )
    parser.add_argument("--load", metavar="PATH", help="go on with a conversation that was saved")
    parser.add_argument(
        "--overflow",
        choices=OVERFLOW,
        help=f"what gives way when the window is full (default: {USUAL})",
    )
    add_server(parser)
    add_sampling(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "qwen2vl-serve chat") -> int:
    """Talk until the user ends it, and return the exit status."""
    return run(build_parser(prog), argv, _run)


def _run(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:

        def begin(saved: str | None = None) -> Conversation:
            given = given_of(arguments)
            if arguments.overflow is not None:
                given["overflow"] = arguments.overflow
            if saved is not None:
                return Conversation.load(saved, client, **given)
            return Conversation(client, **{"overflow": USUAL, **given})

        chat = Chat(client, begin, begin(arguments.load))
        if sys.stdin.isatty():
            sys.stdout.write(f"{client.model} at {client.base_url}; /help lists the commands\n")
        for line in _lines():
            if not chat.take(line):
                break
    return 0


class Chat:
    """What is typed, line by line; ``take`` answers each and says whether to go on.

    ``begin`` makes a conversation: a new one, or from a file that one was saved to.
    """

    def __init__(
        self, client: Client, begin: Callable[[str | None], Conversation], talk: Conversation
    ) -> None:
        self._client = client
        self._begin = begin
        self._talk = talk
        self._images: list[str] = []
        self._videos: list[str] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(HELP),
            "/image": lambda path: self._attach(self._images, "picture", path),
            "/video": lambda path: self._attach(self._videos, "video", path),
            "/tokens": lambda _: self._tokens(),
            "/save": self._save,
            "/load": self._load,
            "/clear": lambda _: self._clear(),
        }

    def take(self, line: str) -> bool:
        """Do what a line asks for; False where it ends the chat. Failures are told, not raised."""
        line = line.strip()
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        try:
            if word in self._commands:
                self._commands[word](rest.strip())
            elif word.startswith("/") and "/" not in word[1:]:
                _say(f"there is no {word}; /help lists the commands")
            elif line:
                self._ask(text_of(line))
        except KeyboardInterrupt:
            _say("\n(stopped; the question is not part of the conversation)")
        except ClientError as error:
            _say(f"error: {with_advice(error)}")
        except OSError as error:
            _say(f"error: {error.strerror or error}: {error.filename}")
        return True

    def _ask(self, text: str) -> None:
        try:
            self._answer(text)
        except (InvalidArgumentError, APIStatusError) as error:
            if isinstance(error, APIStatusError) and (
                error.status >= 500 or error.status in _NOT_OF_THE_QUESTION
            ):
                raise
            if self._images or self._videos:  # else every further question would end the same way
                _say("(what was attached is not sent again)")
            self._detach()
            raise
        self._detach()

    def _detach(self) -> None:
        self._images.clear()
        self._videos.clear()

    def _answer(self, text: str) -> None:
        seen = len(self._talk.events)
        with self._talk.stream(text, images=self._images, videos=self._videos) as stream:
            for event in self._talk.events[seen:]:
                _say(_told(event))
            try:
                for piece in stream:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            finally:
                if stream.text:
                    sys.stdout.write("\n")

    def _attach(self, to: list[str], what: str, path: str) -> None:
        path = _unquoted(path)
        if not path:
            _say(f"/{'image' if what == 'picture' else what} needs a path or an address")
            return
        # What is no picture is told now, and not with the question.
        image_part(path) if what == "picture" else video_part(path)
        to.append(path)
        _say(f"({what} {len(to)} for the next question: {path})")

    def _tokens(self) -> None:
        messages = self._talk.messages
        if all(message["role"] == "system" for message in messages):
            _say("(nothing yet)")
            return
        cost = self._client.explain(messages=messages, system=None)
        _say(
            f"({cost.prompt_tokens} of {cost.max_model_len} tokens, "
            f"{cost.visual_tokens} of them visual)"
        )

    def _save(self, path: str) -> None:
        if not path:
            _say("/save needs a path")
            return
        self._talk.save(Path(_unquoted(path)).expanduser())
        _say(f"(saved to {path})")

    def _load(self, path: str) -> None:
        if not path:
            _say("/load needs a path")
            return
        self._talk = self._begin(str(Path(_unquoted(path)).expanduser()))
        _say(f"({len(self._talk.messages)} messages)")

    def _clear(self) -> None:
        self._talk = self._begin(None)
        self._detach()
        _say("(forgotten)")


def _told(event: Event) -> str:
    """Return what the conversation gave up to go on, in a line."""
    what = {
        "summarised": f"{event.turns} turns were summed up",
        "dropped_turns": f"{event.turns} turns were left out",
        "dropped_images": f"{event.images} pictures were left out",
        "dropped_videos": f"{event.videos} videos were left out",
    }[event.kind]
    return f"({what}, about {event.tokens} tokens)"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _unquoted(path: str) -> str:
    """Return a path as a terminal gives it when a file is dropped there: quoted, or escaped."""
    if len(path) > 1 and path[0] == path[-1] and path[0] in "\"'":
        return path[1:-1]
    return path.replace("\\ ", " ")


def _lines() -> Iterator[str]:
    """Yield what is typed until Ctrl-D, or what a pipe holds."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield from sys.stdin
        return
    read = _prompt()
    while True:
        try:
            yield read()
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # Ctrl-C at the prompt drops the line, not the conversation
        except EOFError:
            return


def _prompt() -> Callable[[], str]:
    """Return what reads a line from the terminal; bytes that are no text as Python has paths."""
    try:
        from prompt_toolkit import PromptSession  # noqa: PLC0415 -- an extra
        from prompt_toolkit.completion import NestedCompleter, PathCompleter  # noqa: PLC0415
        from prompt_toolkit.history import FileHistory  # noqa: PLC0415
    except ImportError:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        return lambda: input("> ")

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            super().store_string(text_of(string))  # the file is UTF-8

    paths = PathCompleter(expanduser=True)
    completer = NestedCompleter.from_nested_dict(
        {**dict.fromkeys(PLAIN), **dict.fromkeys(PATHS, paths)}
    )
    session: PromptSession[str] = PromptSession(
        "> ", history=History(str(_history())), completer=completer, complete_while_typing=False
    )
    return session.prompt


def _history() -> Path:
    """Return the file of the lines that were typed; its owner's alone, as they may be private."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    folder = Path(state).expanduser() / "qwen2vl-serve"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / "chat_history"
    file.touch(mode=0o600, exist_ok=True)
    return file
