"""Works on batches: one of each key at a time, their requests in turn, beside all else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from qwen2vl_serve.batches import lines
from qwen2vl_serve.batches.asking import Asker
from qwen2vl_serve.batches.lines import Fault, Line
from qwen2vl_serve.batches.store import Batch, BatchStore, Status
from qwen2vl_serve.errors import APIError, EngineUnavailable, RateLimited

logger = logging.getLogger("qwen2vl_serve.requests")

_T = TypeVar("_T")

RESULT = "batch_output"
"""The purpose of files with outcomes."""

PAUSE_SECONDS = 5.0
"""After a request that could not be asked, where the server does not say when it can.

Also between two looks whether a full disk has room.
"""

MOST_PAUSE_SECONDS = 60.0

SWEEP_SECONDS = 60.0


class Runner:
    """Brings the batches of ``store`` to their ends.

    At most ``concurrency`` requests are asked at a time. A batch holds at most ``most_lines``, each
    of at most as many bytes as ``most_bytes`` then says. ``counted`` is told what became of each.
    """

    def __init__(
        self,
        store: BatchStore,
        asker: Asker,
        *,
        concurrency: int,
        most_lines: int,
        most_bytes: Callable[[], int],
        counted: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.store = store
        self.asker = asker
        self.most_lines = most_lines
        self.most_bytes = most_bytes
        self._counted = counted
        self._slots = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._owners: set[str] = set()  # those who are being served
        self._held: set[str] = set()  # batches that somebody works on
        self._pauses: dict[str, float] = {}  # by owner, until when
        self._started = False

    def _read(self, batch: Batch) -> tuple[Sequence[Line], Sequence[Fault]]:
        return lines.read(self.store.input(batch), self.most_lines, self.most_bytes())

    def start(self) -> None:
        """Go on where an earlier server ended; further calls do nothing. Needs a running loop."""
        if self._started:
            return
        self._started = True
        for batch in self.store.unfinished():
            self.take(batch)
        self._spawn(self._sweep())

    async def close(self) -> None:
        """Leave everything as it is, for the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def take(self, batch: Batch) -> None:
        """Begin with a batch, or go on."""
        self.store.batches[batch.id] = batch
        if batch.status == "validating":
            self._spawn(self._validate(batch))
        else:
            self._serve(batch.owner)

    async def cancel(self, batch: Batch) -> None:
        """Ask nothing more of a batch; what is being answered is still written."""
        if batch.status not in ("validating", "in_progress"):
            return
        batch.reach("cancelling")
        await asyncio.to_thread(self.store.save, batch)
        if batch.id not in self._held and batch.unfinished:
            self._held.add(batch.id)
            self._spawn(self._cancelled(batch))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)

    def _serve(self, owner: str) -> None:
        if owner not in self._owners:
            self._owners.add(owner)
            self._spawn(self._serve_all(owner))

    async def _serve_all(self, owner: str) -> None:
        try:
            while (batch := self._next(owner)) is not None and not self.asker.server.draining:
                with self._holding(batch):
                    await self._work(batch)
        finally:
            self._owners.discard(owner)

    @contextlib.contextmanager
    def _holding(self, batch: Batch) -> Iterator[None]:
        """Have a batch for oneself; it fails where its files cannot be read or written."""
        self._held.add(batch.id)
        try:
            yield
        except OSError as error:
            logger.error("batch %s: %s", batch.id, error)
            message = (
                f"The server cannot keep the batch ({error.strerror or error}): make it again "
                "when its operator has mended that."
            )
            batch.faults.append(Fault("storage_error", message, None, None))
            batch.reach("failed")
            self._spawn(self._save(batch))
        finally:
            self._held.discard(batch.id)

    def _next(self, owner: str) -> Batch | None:
        for batch in self.store.unfinished():
            ready = batch.status != "validating" and batch.id not in self._held
            if batch.owner == owner and ready:
                return batch
        return None

    async def _validate(self, batch: Batch) -> None:
        with self._holding(batch):
            found, faults = await asyncio.to_thread(self._read, batch)
            if batch.status == "cancelling":
                await self._finished(batch, "cancelled")
                return
            batch.total, batch.faults = len(found), list(faults)
            batch.reach("failed" if faults else "in_progress")
            await self._save(batch)
            logger.info("batch %s: %s, %d requests", batch.id, batch.status, batch.total)
        self._serve(batch.owner)

    async def _cancelled(self, batch: Batch) -> None:
        with self._holding(batch):
            # An earlier server may have answered some of it.
            await asyncio.to_thread(self.store.settled, batch)
            await self._finished(batch, "cancelled")

    async def _work(self, batch: Batch) -> None:
        found, _ = await asyncio.to_thread(self._read, batch)
        settled = await asyncio.to_thread(self.store.settled, batch)
        waiting = deque(line for line in found if line.custom_id not in settled)
        running: set[asyncio.Task[None]] = set()
        try:
            while running or (waiting and self._goes_on(batch)):
                if not waiting or not self._goes_on(batch):
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    continue
                await self._may_ask(batch)
                if not self._goes_on(batch):
                    self._slots.release()
                    continue
                task = asyncio.create_task(self._settle(batch, waiting.popleft(), waiting))
                running.add(task)
                task.add_done_callback(running.discard)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if self.asker.server.draining:
            return
        if batch.status == "cancelling":
            await self._finished(batch, "cancelled")
        elif waiting:
            await self._with_room(partial(self._expire, batch, waiting))
            await self._finished(batch, "expired")
        else:
            await self._finished(batch, "completed")

    def _goes_on(self, batch: Batch) -> bool:
        """Whether more of its requests are to be asked."""
        in_time = time.time() < batch.expires_at
        return batch.status != "cancelling" and in_time and not self.asker.server.draining

    async def _may_ask(self, batch: Batch) -> None:
        """Wait until the owner's pause is over, and for one of the slots, which is taken."""
        until = self._pauses.get(batch.owner, 0.0)
        while (seconds := until - time.monotonic()) > 0 and self._goes_on(batch):
            await asyncio.sleep(min(seconds, 1.0))
        await self._slots.acquire()

    async def _settle(self, batch: Batch, line: Line, waiting: deque[Line]) -> None:
        """Have one request answered and written down, or put back."""
        try:
            request_id, line_id = uuid.uuid4().hex, f"batch_req_{uuid.uuid4().hex}"
            body = await asyncio.to_thread(line.body, self.store.input(batch))
            failed = False
            try:
                answer = await self.asker.ask(body, batch.owner, request_id)
                outcome = lines.answered(line_id, line.custom_id, request_id, 200, answer)
            except APIError as error:
                if _passes(error):
                    self._pause(batch.owner, error)
                    waiting.appendleft(line)
                    return
                failed = True
                outcome = lines.refused(line_id, line.custom_id, request_id, error)
            # An answer that has no room yet is kept: asking again would cost its key twice.
            await self._with_room(partial(self.store.append, batch, outcome, failed=failed))
            batch.completed += not failed
            batch.failed += failed
            self._counted("failed" if failed else "completed")
        except OSError as error:
            # A file that cannot be read or written now: asked again a little later.
            logger.error("batch %s: %s", batch.id, error)
            self._pause(batch.owner, None)
            waiting.appendleft(line)
        finally:
            self._slots.release()

    def _pause(self, owner: str, error: APIError | None) -> None:
        told = None if error is None else error.retry_after
        seconds = min(PAUSE_SECONDS if told is None else float(told), MOST_PAUSE_SECONDS)
        self._pauses[owner] = time.monotonic() + seconds

    def _expire(self, batch: Batch, waiting: deque[Line]) -> None:
        message = "The batch's time was over before this request could be asked."
        while waiting:
            line_id = f"batch_req_{uuid.uuid4().hex}"
            outcome = lines.unanswered(line_id, waiting[0].custom_id, "batch_expired", message)
            self.store.append(batch, outcome, failed=True)
            waiting.popleft()
            batch.failed += 1
            self._counted("expired")

    async def _finished(self, batch: Batch, status: Status) -> None:
        """Make files of its outcomes, and end it; done again after a crash it is the same."""
        if status == "completed":
            batch.reach("finalizing")
        keep = partial(self._keep, batch)
        batch.output_file_id = await self._with_room(partial(keep, failed=False))
        batch.error_file_id = await self._with_room(partial(keep, failed=True))
        batch.reach(status)
        await self._save(batch)
        counts = f"{batch.completed} completed, {batch.failed} failed of {batch.total}"
        logger.info("batch %s: %s, %s", batch.id, status, counts)

    async def _save(self, batch: Batch) -> None:
        await self._with_room(partial(self.store.save, batch))

    async def _with_room(self, write: Callable[[], _T]) -> _T:
        """Have something written; where the disk is full, as soon as it has room."""
        while True:
            try:
                return await asyncio.to_thread(write)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                logger.error("batches: %s", error)
                await asyncio.sleep(PAUSE_SECONDS)

    def _keep(self, batch: Batch, *, failed: bool) -> str | None:
        try:
            data = self.store.outcomes(batch, failed=failed).read_bytes()
        except FileNotFoundError:
            return None
        if not data:
            return None
        name = f"{batch.id}_{'error' if failed else 'output'}.jsonl"
        try:
            return self.store.files.add(data, name, RESULT, owner=batch.owner).id
        except ValueError as error:
            raise OSError(f"{name}: {error}, batches.max_bytes") from None

    async def _sweep(self) -> None:
        while True:
            for folder in self.store.clear():
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            await asyncio.sleep(SWEEP_SECONDS)


def _passes(error: APIError) -> bool:
    """Whether the same request may be answered later."""
    if isinstance(error, RateLimited):
        return not error.hopeless
    return isinstance(error, EngineUnavailable)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a batch failed", exc_info=error)
