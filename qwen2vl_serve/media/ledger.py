"""A bound on the bytes that all requests hold, where none knows beforehand what it will need.

A request takes bytes as they come and gives all of them back at its end. Were each let take
until nothing is left, all could wait for one another; so a share that suffices for one request
is kept for the oldest that still loads. It goes on, ends, and the next one is the oldest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

AT_ONCE = 16
"""How many addresses one request reads at a time, so that a list of frames is no flood."""


class TooManyBytes(Exception):
    """One request asks for more than ``limit``, the most that any may hold."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


class Ledger:
    """At most ``capacity`` bytes over all accounts, at most ``share`` of them in one.

    For one event loop.
    """

    def __init__(self, capacity: int, share: int) -> None:
        self.capacity = capacity
        self._kept = 0  # for the oldest: the largest share that there was
        self.resize(share)
        self.held = 0
        self._loading: dict[Account, None] = {}  # the oldest first

    @property
    def waiting(self) -> int:
        """How many accounts wait for bytes."""
        return sum(account.waits for account in self._loading)

    def resize(self, share: int) -> None:
        """Give new accounts another share; those that are open keep theirs."""
        self.share = min(share, self.capacity)
        self._kept = max(self._kept, self.share)

    def account(self, owner: str = "") -> Account:
        """Return a request's account: a context, whose end gives everything back.

        ``owner`` is whose uploads the request may show.
        """
        account = Account(self, owner)
        self._loading[account] = None
        return account

    def is_loading(self, account: Account) -> bool:
        """Whether ``account`` may still ask for more."""
        return account in self._loading

    def fits(self, account: Account, size: int) -> bool:
        """Whether ``account`` may have ``size`` more."""
        oldest = next(iter(self._loading)) is account
        most = self.capacity if oldest else self.capacity - self._kept
        return self.held + size <= most

    def retire(self, account: Account) -> None:
        """Let the next one be the oldest."""
        self._loading.pop(account, None)
        self.admit()

    def admit(self) -> None:
        """Let on whoever can go on, in order of age, so that nobody is overtaken for ever."""
        for account in list(self._loading):
            if not account.admit():
                return


class Account:
    """What one request holds, in bytes; ``reading`` is held while an address is read."""

    def __init__(self, ledger: Ledger, owner: str = "") -> None:
        self.owner = owner
        self.reading = asyncio.Semaphore(AT_ONCE)
        self._ledger = ledger
        self._share = ledger.share
        self._wanted = 0  # held or waited for
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waits(self) -> bool:
        """Whether it waits for bytes."""
        return bool(self._waiting)

    async def take(self, size: int) -> None:
        """Wait until ``size`` more may be held.

        Raises:
            TooManyBytes: with them it were more than one request may hold; nothing is taken.
            RuntimeError: the account is settled.
        """
        ledger = self._ledger
        if not ledger.is_loading(self):
            raise RuntimeError("a settled account takes nothing more")
        if self._wanted + size > self._share:
            raise TooManyBytes(self._share)
        self._wanted += size
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        ledger.admit()
        try:
            await turn
        except asyncio.CancelledError:
            # What was granted already stays until the account is closed.
            if turn.cancelled():
                self._wanted -= size
                ledger.admit()
            raise

    def give_back(self, size: int) -> None:
        """Hold ``size`` less, of what was taken."""
        self._ledger.held -= size
        self._held -= size
        self._wanted -= size
        self._ledger.admit()

    def settle(self) -> None:
        """Say that nothing more will be taken; what is held stays."""
        self._ledger.retire(self)

    def admit(self) -> bool:
        """Grant what fits, in order; return whether nothing is left waiting."""
        while self._waiting:
            size, turn = self._waiting[0]
            # Who was cancelled while waiting leaves the line here, before its task has run.
            if not turn.cancelled() and not self._ledger.fits(self, size):
                return False
            self._waiting.popleft()
            if not turn.cancelled():
                self._ledger.held += size
                self._held += size
                turn.set_result(None)
        return True

    async def __aenter__(self) -> Account:
        """Return the account, open since it was made."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give everything back."""
        self._ledger.held -= self._held
        self._held = self._wanted = 0
        self._ledger.retire(self)
