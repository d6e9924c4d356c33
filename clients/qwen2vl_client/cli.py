"""The command line: one question, the answer as it is generated."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence

from qwen2vl_client.client import DEFAULT_BASE_URL, DEFAULT_TIMEOUT, Client
from qwen2vl_client.errors import (
    AuthenticationError,
    ClientError,
    InvalidArgumentError,
    ServerNotReachedError,
)
from qwen2vl_client.request import DEFAULT_SAMPLING, SYSTEM_PROMPT, Sampling


def build_parser(prog: str = "qwen2vl-serve ask") -> argparse.ArgumentParser:
    """Return the parser; its defaults are the tutorials'."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Ask a running server, with or without pictures. The answer goes to "
        "standard output as it is generated, the total time to standard error.",
    )
    parser.add_argument("question", help="what to ask")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH|URL",
        help="a picture to ask about; may be repeated",
    )
    parser.add_argument(
        "--video", action="append", default=[], metavar="PATH|URL", help="a video to ask about"
    )
    parser.add_argument(
        "--url",
        help=f"the server (default: QWEN2VL_BASE_URL, then {DEFAULT_BASE_URL})",
    )
    parser.add_argument(
        "--api-key", help="the key; other users of this machine can see it: prefer QWEN2VL_API_KEY"
    )
    parser.add_argument("--model", help="the model's name (default: the first the server offers)")
    parser.add_argument("--system", default=SYSTEM_PROMPT, help="the system prompt")
    parser.add_argument(
        "--no-stream", action="store_true", help="print the answer when it is whole"
    )
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_SAMPLING["max_tokens"])
    parser.add_argument("--temperature", type=float, default=DEFAULT_SAMPLING["temperature"])
    parser.add_argument("--top-p", type=float, default=DEFAULT_SAMPLING["top_p"])
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT, metavar="SECONDS", help="(default: 600)"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "qwen2vl-serve ask") -> int:
    """Ask and return the exit status.

    0: answered; 1: the server refused, failed or was not there; 2: an argument cannot be used
    (a picture that is missing, too); 130: interrupted.
    """
    try:
        args = build_parser(prog).parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Chinese must not end it
    started = time.monotonic()
    try:
        with Client(args.url, args.api_key, args.model, timeout=args.timeout) as client:
            _ask(client, args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has gone, and what it wanted it has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except InvalidArgumentError as error:
        return _fail(2, str(error))
    except ClientError as error:
        return _fail(1, _with_advice(error))
    sys.stderr.write(f"total time: {time.monotonic() - started:.2f} s\n")
    return 0


def _ask(client: Client, args: argparse.Namespace) -> None:
    sampling: Sampling = {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    media = {"images": args.image, "videos": args.video, "system": args.system}
    if args.no_stream:
        sys.stdout.write(client.chat(args.question, **media, **sampling).text)
    else:
        with client.stream(args.question, **media, **sampling) as stream:
            try:
                for text in stream:
                    sys.stdout.write(text)
                    sys.stdout.flush()
            except ClientError:
                sys.stdout.write("\n")  # an error starts on a line of its own
                raise
    sys.stdout.write("\n")


def _with_advice(error: ClientError) -> str:
    if isinstance(error, ServerNotReachedError):
        return (
            f"{error}. Start a server with: serve --profile demo (or name a running one with --url)"
        )
    if isinstance(error, AuthenticationError):
        return f"{error}. Give the key with QWEN2VL_API_KEY or --api-key"
    return str(error)


def _fail(status: int, message: str) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.write(f"error: {message}\n")
    return status
