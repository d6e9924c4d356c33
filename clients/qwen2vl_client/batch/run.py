"""Asking many questions, a bounded number at a time."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any, TypeAlias

from qwen2vl_client.batch.journal import Journal
from qwen2vl_client.batch.outcome import Outcome, Report, as_data, visual_tokens
from qwen2vl_client.batch.progress import Tell, no_bar, progress_bar
from qwen2vl_client.batch.sources import UTF_8, Request, opened
from qwen2vl_client.errors import (
    APIConnectionError,
    APIStatusError,
    BatchError,
    ClientError,
    InvalidArgumentError,
)
from qwen2vl_client.tasks.task import Asker, Task

_RETRIED = frozenset({408, 409, 429})
_LONGEST_PAUSE = 30.0

#: A request, what became of it, and whether it may be answered another time.
_Asked: TypeAlias = tuple[Request, Outcome, bool]


def batch(
    client: Asker,
    requests: Iterable[Any] | str | os.PathLike[str],
    *,
    each: Callable[[Any], Task[Any]] | None = None,
    fields: Mapping[str, Any] | None = None,
    encoding: str = UTF_8,
    concurrency: int = 8,
    output: str | os.PathLike[str] | None = None,
    retries: int = 2,
    max_failures: int = 100,
    progress: bool = False,
    on_outcome: Callable[[Outcome], None] | None = None,
    media_info: bool = True,
) -> Report:
    """Ask all of ``requests``, ``concurrency`` at a time, and return what became of them.

    ``requests`` is a list or generator of questions, tasks or mappings, or a ``.jsonl`` or
    ``.csv`` file in ``encoding`` (by default UTF-8); with ``each``, which makes a task of an item,
    a mapping or a row, also a folder of pictures. A generator is read no further ahead than
    ``concurrency``. ``fields`` of the API hold for every request that does not say otherwise. With
    ``output`` each outcome is written to that file at once, and a batch that was killed goes on
    where it was when it is started again; without it the outcomes are kept in memory. Requests that
    failed in a way that may pass are asked again when the others are done, ``retries`` times.
    ``media_info`` asks the server to tell the visual tokens (a field of this project's; others may
    refuse it). What ``on_outcome`` raises ends the batch; it is called no more, and what is under
    way is still kept.

    Raises:
        KeyboardInterrupt: at once; what is under way is not waited for.
        InvalidArgumentError: an argument or a request cannot be used; ``output`` holds other
            requests or is being written.
        BatchError: more than ``max_failures`` requests in a row have failed (the server is gone,
            or refuses them all), or ``output`` cannot be written. What was answered is kept.
    """
    for name, value, least in (
        ("concurrency", concurrency, 1),
        ("retries", retries, 0),
        ("max_failures", max_failures, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise InvalidArgumentError(f"{name}={value!r} must be {least} or more")
    if inspect.iscoroutinefunction(client.chat):
        raise InvalidArgumentError(
            "batch() asks from threads: give it a Client, not an AsyncClient"
        )
    source, total = opened(requests, each, encoding)
    if fields:
        source = (request.with_fields(fields) for request in source)
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(output)) if output is not None else None
        tell = stack.enter_context(progress_bar(total) if progress else no_bar())
        run = _Run(
            client,
            journal,
            max_failures=max_failures,
            media_info=media_info,
            tell=tell,
            on_outcome=on_outcome,
        )
        run.ask(run.unanswered(source), concurrency)
        for number in range(retries):
            again = [request for request, outcome, passing in run.failed.values() if passing]
            if not again:
                break
            time.sleep(min(2.0**number, _LONGEST_PAUSE))
            run.ask(again, concurrency, attempt=number + 2)
        return run.report()


class _Run:
    """A batch under way; only the thread that called ``batch`` changes it."""

    def __init__(
        self,
        client: Asker,
        journal: Journal | None,
        *,
        max_failures: int,
        media_info: bool,
        tell: Tell,
        on_outcome: Callable[[Outcome], None] | None,
    ) -> None:
        self._client, self._journal, self._tell = client, journal, tell
        self._max_failures, self._media_info = max_failures, media_info
        self._on_outcome = on_outcome
        self._started = time.monotonic()
        self._kept: dict[int, Outcome] = {}
        self._seen: set[str] = set()
        self._answered = self._resumed = 0
        self._tokens = [0, 0, 0]
        #: By index: the request, its last outcome, and whether it may pass another time.
        self.failed: dict[int, _Asked] = {}
        self._fault: BaseException | None = None
        self._in_a_row = 0
        self._last_error: str | None = None

    def unanswered(self, source: Iterable[Request]) -> Iterator[Request]:
        """Yield the requests that an earlier run has not answered."""
        for request in source:
            if request.id in self._seen:
                raise InvalidArgumentError(f"two requests have the id {request.id!r}")
            self._seen.add(request.id)
            if self._journal is not None and self._journal.has(
                request.id, request.fingerprint, request.index
            ):
                self._resumed += 1
                self._tell(self._resumed, self._answered, len(self.failed))
            else:
                yield request

    def ask(self, requests: Iterable[Request], concurrency: int, attempt: int = 1) -> None:
        """Ask, and keep what comes back; takes a request only when there is room for it."""
        running = set[Future[_Asked]]()
        self._in_a_row = 0
        try:
            for request in requests:
                running.add(_begun(self._asked, request, attempt))
                if len(running) >= concurrency:
                    self._collect(running)
                    self._check()
            self._drain(running)
        except Exception:  # what was asked is kept, unless by Ctrl-C: it may take minutes
            self._drain(running)
            raise
        self._check()

    def _drain(self, running: set[Future[_Asked]]) -> None:
        while running:
            self._collect(running)

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._in_a_row > self._max_failures:
            raise BatchError(
                f"{self._in_a_row} requests in a row have failed, more than max_failures="
                f"{self._max_failures}; the last: {self._last_error}"
            )

    def report(self) -> Report:
        """Return the report; failures that are left are written, and the output put in order."""
        failed = [outcome for _, (_, outcome, _) in sorted(self.failed.items())]
        for outcome in failed:
            self._keep(outcome)
        if self._journal is not None:
            self._journal.finish()
            outcomes: Any = self._journal.outcomes()
        else:
            outcomes = [self._kept[index] for index in sorted(self._kept)]
        return Report(
            len(self._seen),
            self._answered,
            self._resumed,
            tuple(failed),
            time.monotonic() - self._started,
            self._tokens[0],
            self._tokens[1],
            self._tokens[2],
            outcomes,
        )

    def _asked(self, request: Request, attempt: int) -> _Asked:
        """Ask one request, in a thread of its own."""
        task = request.task
        if self._media_info and (task.images or task.videos or task.messages):
            task = replace(task, fields={"include_media_info": True, **task.fields})
        started = time.monotonic()
        blank = Outcome(request.index, request.id, request.fingerprint, attempts=attempt)
        try:
            answer = self._client.chat(**task.arguments())
        except ClientError as error:
            spent = time.monotonic() - started
            return request, replace(blank, error=str(error), seconds=spent), _may_pass(error)
        usage = answer.usage
        outcome = replace(
            blank,
            text=answer.text,
            finish_reason=answer.finish_reason,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            visual_tokens=visual_tokens(answer),
            seconds=answer.seconds,
        )
        try:
            return request, replace(outcome, value=as_data(task.read(answer))), False
        except ClientError as error:
            return request, replace(outcome, error=str(error)), False
        except Exception as error:  # a reader of the caller's own: one bad answer ends no batch
            told = f"the answer could not be read: {type(error).__name__}: {error}"
            return request, replace(outcome, error=told), False

    def _collect(self, running: set[Future[_Asked]]) -> None:
        """Wait for some, keep their outcomes and take them out of those that run."""
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            running.remove(future)
            if (fault := future.exception()) is not None:
                self._fault = fault
                continue
            request, outcome, passing = future.result()
            self._tokens[0] += outcome.prompt_tokens
            self._tokens[1] += outcome.completion_tokens
            self._tokens[2] += outcome.visual_tokens
            if outcome.ok:
                self._in_a_row = 0
                self.failed.pop(request.index, None)
                self._answered += 1
                self._keep(outcome)
            else:
                self._in_a_row += 1
                self._last_error = outcome.error
                self.failed[request.index] = (request, outcome, passing)
            self._tell(self._resumed, self._answered, len(self.failed))

    def _keep(self, outcome: Outcome) -> None:
        if self._journal is not None:
            self._journal.append(outcome)
        else:
            self._kept[outcome.index] = outcome
        if (tell := self._on_outcome) is not None:
            self._on_outcome = None  # what raises is not called again, so that the rest is kept
            tell(outcome)
            self._on_outcome = tell


def _begun(
    asked: Callable[[Request, int], _Asked], request: Request, attempt: int
) -> Future[_Asked]:
    """Ask in a thread that keeps no process alive: a pool's would be waited for after Ctrl-C."""
    future: Future[_Asked] = Future()

    def run() -> None:
        try:
            future.set_result(asked(request, attempt))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"batch {request.id}", daemon=True).start()
    return future


def _may_pass(error: ClientError) -> bool:
    """Tell whether the same request may be answered another time."""
    if isinstance(error, APIStatusError):
        return error.status in _RETRIED or error.status >= 500
    return isinstance(error, APIConnectionError)
