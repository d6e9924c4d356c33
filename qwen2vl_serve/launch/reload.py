"""Taking a changed profile into a running server, as far as that goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qwen2vl_serve.errors import ServeError
from qwen2vl_serve.profile import Profile

Take = Callable[[Profile], object]
"""Takes what it needs of the new profile; a ``ServeError`` of its own keeps the old."""


class Reload:
    """Reads the profile again and hands it to those who can use it.

    ``read`` returns it as it is now. What nobody takes is named: it waits for a restart.
    """

    def __init__(
        self,
        profile: Profile,
        read: Callable[[], Profile] | None,
        report: Callable[[str], object],
    ) -> None:
        self._port = profile.server.port
        self._running = dict(_values(profile.model_dump()))
        self._read = read
        self._report = report
        self._takers: list[tuple[tuple[str, ...], Take]] = []

    def register(self, take: Take, *names: str) -> None:
        """Have ``take`` called at each reload; what one of ``names`` begins is then taken.

        A name is a section, or the beginning of a field's dotted name, as ``server.api_key``.
        """
        self._takers.append((names, take))

    def __call__(self) -> None:
        """Read and hand over; says in one line what came of it."""
        if self._read is None:
            self._report("reload  there is no profile to read again")
            return
        try:
            new = self._read().at_port(self._port)
            for _, take in self._takers:
                take(new)
        except ServeError as error:
            self._report(f"reload  kept as it was: {' '.join(str(error).split())}")
            return
        values = dict(_values(new.model_dump()))
        names = tuple(name for several, _ in self._takers for name in several)
        fields = self._running.keys() | values.keys()
        changed = {one for one in fields if self._running.get(one) != values.get(one)}
        taken = {one for one in changed if one.startswith(names)}
        # What waits for a restart is told against what runs, at each reload anew.
        self._running |= {one: values[one] for one in taken}
        told = ", ".join(sorted(taken)) or "no field has changed that is taken while running"
        waiting = ", ".join(sorted(changed - taken))
        self._report(f"reload  {told}{f'; needs a restart: {waiting}' if waiting else ''}")


def _values(section: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names of all fields with their values."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _values(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
