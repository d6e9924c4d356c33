"""What to change so that a profile fits: the nearest profiles that do, the least harmful first.

Every remedy is planned again before it is offered. A single change that is enough goes before
several; within one kind of change the mildest that is enough is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qwen2vl_serve.machine.hardware import Host
from qwen2vl_serve.plan.architectures import Architecture, published
from qwen2vl_serve.plan.assessment import Assessment, Verdict, assess
from qwen2vl_serve.plan.cards import Machines
from qwen2vl_serve.plan.changes import GENTLE, HARD, MENDS, Change, Step, Values
from qwen2vl_serve.profile import Profile

MOST_REMEDIES = 5


@dataclass(frozen=True, slots=True)
class Remedy:
    """Changes that together make the profile fit, and the plan that shows it."""

    changes: tuple[Change, ...]
    plan: Assessment


@dataclass(frozen=True, slots=True)
class _Search:
    machines: Machines
    host: Host | None

    def plan(self, profile: Profile, architecture: Architecture) -> Assessment:
        return assess(profile, architecture, self.machines, self.host)


@dataclass(frozen=True, slots=True, eq=False)
class _Taken:
    step: Step
    change: Change


def find_remedies(plan: Assessment, host: Host | None = None) -> tuple[Remedy, ...]:
    """Return up to five remedies, none where the plan fits or nothing helps."""
    if plan.verdict is Verdict.FITS:
        return ()
    search = _Search(plan.machines, host)
    repaired, repairs = _repair(search, plan)
    if repaired.verdict is Verdict.FITS:
        return (Remedy(_merged(repairs), repaired),)
    found: list[Remedy] = []
    for steps in _combinations():
        remedy = _try(search, repaired, steps)
        if remedy is not None and not any(_covers(known, remedy) for known in found):
            found.append(remedy)
        if len(found) == MOST_REMEDIES:
            break
    return tuple(Remedy(_merged((*repairs, *one.changes)), one.plan) for one in found)


def _merged(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Leave every field to its last change, from what it was before the first."""
    kept: list[Change] = []
    later: set[str] = set()
    before = {name: old for one in reversed(changes) for name, old in one.before.items()}
    for change in reversed(changes):
        values = {
            name: value
            for name, value in change.values.items()
            if name not in later and value != before[name]
        }
        later |= change.values.keys()
        if values:
            olds = {name: before[name] for name in values}
            kept.insert(0, replace(change, values=values, before=olds))
    return tuple(kept)


def changed(profile: Profile, values: Values) -> Profile:
    """Return ``profile`` with dotted fields replaced.

    Raises:
        pydantic.ValidationError: values that do not go together.
    """
    content = profile.model_dump()
    for name, value in values.items():
        *outer, field = name.split(".")
        target = content
        for part in outer:
            target = target[part]
        target[field] = value
    return Profile.model_validate(content).named(profile.name)


def _combinations() -> Iterator[tuple[Step, ...]]:
    """Single steps, pairs of gentle ones and all of them, then these beside those that cost more.

    Beside what costs more a single gentle step goes before all together, so that none is taken in
    place of a milder one that is enough.
    """
    yield from ((step,) for step in (*GENTLE, *HARD))
    yield from itertools.combinations(GENTLE, 2)
    yield GENTLE
    for count in range(1, len(HARD) + 1):
        for hard in itertools.combinations(HARD, count):
            if count > 1:
                yield hard
            yield from ((*hard, step) for step in GENTLE)
            yield (*hard, *GENTLE)


def _try(search: _Search, plan: Assessment, steps: tuple[Step, ...]) -> Remedy | None:
    """Take each step as far as is needed, then take back what turned out not to be."""
    taken: list[_Taken] = []
    current = plan
    for step in steps:
        strongest = None
        for change in step(current):
            tried = _apply(search, current, change)
            if tried is None:
                continue
            strongest = change, tried
            if tried.verdict is Verdict.FITS:
                break
        if strongest is None:
            continue
        taken.append(_Taken(step, strongest[0]))
        current = strongest[1]
        if current.verdict is Verdict.FITS:
            return _relaxed(search, plan, taken)
    return None


def _relaxed(search: _Search, plan: Assessment, taken: list[_Taken]) -> Remedy:
    """Drop or soften what is not needed for the whole, from the most harmful change down."""
    kept = list(taken)
    for one in reversed(taken[:-1]):
        rest = [other for other in kept if other is not one]
        base = _replayed(search, plan, rest)
        if base.verdict is Verdict.FITS:
            kept = rest
            continue
        for change in one.step(base):
            milder = _apply(search, base, change)
            if milder is not None and milder.verdict is Verdict.FITS:
                kept[kept.index(one)] = _Taken(one.step, change)
                break
    return Remedy(tuple(one.change for one in kept), _replayed(search, plan, kept))


def _replayed(search: _Search, plan: Assessment, taken: list[_Taken]) -> Assessment:
    for one in taken:
        plan = _apply(search, plan, one.change) or plan
    return plan


def _covers(known: Remedy, other: Remedy) -> bool:
    """Whether ``other`` changes all that ``known`` does, and more."""

    def fields(remedy: Remedy) -> set[str]:
        return {name for change in remedy.changes for name in change.values}

    return fields(known) <= fields(other)


def _apply(search: _Search, plan: Assessment, change: Change) -> Assessment | None:
    """Plan with ``change``; None where it makes no valid profile."""
    try:
        profile = changed(plan.profile, change.values)
    except ValueError:  # pydantic's, from fields that contradict each other
        return None
    architecture = plan.source
    if "model.model" in change.values:
        other = published(profile.model.model)
        if other is None:
            return None
        architecture = other
    return search.plan(profile, architecture)


def _repair(search: _Search, plan: Assessment) -> tuple[Assessment, tuple[Change, ...]]:
    """Mend what is fatal and has one mend, whatever the memory."""
    made: list[Change] = []
    for mend in MENDS:
        for change in mend(plan):
            tried = _apply(search, plan, change)
            if tried is not None and len(tried.problems) < len(plan.problems):
                made.append(change)
                plan = tried
                break
    return plan, tuple(made)
