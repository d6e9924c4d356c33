"""Hostile input and faults: ``python -m tests.hostile --target http://127.0.0.1:8000``.

Classes A to K against any OpenAI-compatible server, by its public interface. Pictures by address
come from a site of this command's own on loopback; cases that need it are left out where the
server's profile does not let it fetch from there (``--site-port`` fixes the port; the settings are
printed). With ``--start`` the command starts our server with the demo model and ends it again, and
runs class L as well; with ``--stock`` also vLLM's own server, with the same model and arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.servers import BenchError
from tests.hostile import boot, classes, faults, fetching
from tests.hostile.case import Case, Outcome
from tests.hostile.servers import is_alive, started
from tests.hostile.sites import Sites, sites
from tests.hostile.table import Result, Run, markdown, rows, safe
from tests.hostile.target import Target, attempt

TITLES = {
    **{letter: module.TITLE for letter, module in classes.CLASSES.items()},
    classes.LIFE: "faults and boot",
}

STARTED_PATIENCE = 10.0
"""Of servers that are started here; ``servers.SETTINGS`` has what ours is given."""

CAPTION = """\
As promised: status, error code and shape as documented here, nothing told, and afterwards the next
good request works, nothing is held, the process is the same. Safe: the same without our codes and
exact statuses (a refusal is any 4xx where one is due, a closed connection where it is no HTTP).
Compared are the cases on which no server may decide otherwise; a field that vLLM serves by design,
a value that it converts or a limit that only a profile of ours has is not among them."""


def attack(target: Target, letters: str, run: Run, extras: frozenset[str], stock: bool) -> None:
    """Run the cases of classes against a server that is up, and note the results."""
    for case in classes.cases("".join(one for one in letters if one != classes.LIFE)):
        if stock and case.ours:
            continue
        if case.needs and case.needs not in extras:
            run.left_out[case.id] = case.needs
            continue
        note(run, case, attempt(target, case))


def note(run: Run, case: Case, outcome: Outcome) -> None:
    """Keep a result, and say a failure at once."""
    run.results.append(Result(case.group, case.name, outcome, not case.ours))
    if outcome.wrong:
        kind = "UNSAFE" if outcome.unsafe else "unlike"
        print(f"{run.server:6} {kind} {case.id}: {_line(outcome.wrong)}", file=sys.stderr)


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) < 200 else text[:199] + "…"


def live_and_die(kind: str, folder: Path, run: Run) -> None:
    """Run class L: servers that are started only to end."""

    def keep(name: str, outcome: Outcome, ours: bool) -> None:
        note(run, Case(classes.LIFE, name, lambda target: outcome, ours), outcome)

    for scenario in faults.SCENARIOS:
        try:
            verdicts = scenario.play(kind, folder)
        except Exception as error:  # one scenario less, not all that was found
            verdicts = {check: Outcome(repr(error)) for check in scenario.checks}
        for check in scenario.checks:
            ours = check in scenario.ours
            if check in verdicts and not (kind == "stock" and ours):
                keep(f"{scenario.name}: {check}", verdicts[check], ours)
    for number, one in enumerate(boot.BOOTS):
        if kind == "ours" or one.stock:
            outcome = boot.judge(one, kind, folder / f"{kind}-{number}")
            keep(f"start: {one.name}", outcome, not one.stock)


@contextmanager
def aimed(arguments: argparse.Namespace, kind: str, places: Sites) -> Iterator[Target]:
    """Yield the server that was named, or one that is started for this."""
    if not arguments.start:
        yield Target(arguments.target, places, arguments.key)
        return
    settings = places.settings() if kind == "ours" else ()
    with started(kind, arguments.folder, settings) as own:
        target = Target(own.url, places, own.key, is_alive(own.process), STARTED_PATIENCE)
        target.warm_up()
        yield target


def whole(arguments: argparse.Namespace, kind: str, places: Sites) -> Run:
    """Return all results at one server."""
    run = Run(kind)
    letters = arguments.classes
    if set(letters) - {classes.LIFE}:
        with aimed(arguments, kind, places) as target:
            extras = {"no tools", *(["key"] if target.key else [])}
            extras |= {"limits"} if arguments.start else set()
            if kind == "stock" or fetching.fetches(target).wrong is None:
                extras.add("fetching")
            attack(target, letters, run, frozenset(extras), kind == "stock")
    if arguments.start and classes.LIFE in letters:
        live_and_die(kind, arguments.folder, run)
    return run


def report(arguments: argparse.Namespace, runs: Sequence[Run], places: Sites) -> int:
    """Print the table and the failures; 0 where the first server's cases all passed."""
    table = rows(TITLES, runs)
    if arguments.json:
        told = [
            {
                "server": run.server,
                "cases": [
                    {"class": one.group, "name": one.name, "compared": one.compared,
                     "unsafe": one.outcome.unsafe, "unlike": one.outcome.unlike}
                    for one in run.results
                ],
                "left_out": run.left_out,
            }
            for run in runs
        ]  # fmt: skip
        print(json.dumps({"table": table, "runs": told}, ensure_ascii=False, indent=1))
    else:
        print(markdown(table), CAPTION, sep="\n\n")
        needs = set(runs[0].left_out.values())
        for need in sorted(needs):
            count = sum(one == need for one in runs[0].left_out.values())
            print(f"\nleft out: {count} cases that need {_needed(need, places)}")
    if arguments.start or not arguments.safe:
        return 1 if runs[0].failures else 0
    return 0 if safe(runs[0].results) == len(runs[0].results) else 1


def _needed(need: str, places: Sites) -> str:
    words = {
        "key": "a key (--key)",
        "limits": "small limits (--start sets them)",
        "fetching": f"a profile with {', '.join(places.settings())}",
    }
    return words[need]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--target", help="address of a server that is up, with or without /v1")
    which.add_argument("--start", action="store_true", help="start our server for this")
    parser.add_argument("--stock", action="store_true", help="with --start: vLLM's as well")
    parser.add_argument("--key", default="", help="API key of the target")
    parser.add_argument(
        "--class", dest="classes", default="".join(TITLES), metavar="LETTERS", help="as DEF"
    )
    parser.add_argument("--site-port", type=int, default=0, help="port of the site on loopback")
    parser.add_argument("--safe", action="store_true", help="exit 0 where all cases are safe")
    parser.add_argument("--json", action="store_true", help="print every result as JSON")
    parser.add_argument("--folder", type=Path, help="where the servers' logs go")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; 0 where all cases passed, else 1, 2 where none could be run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.stock and not arguments.start:
        parser.error("--stock needs --start")
    arguments.classes = arguments.classes.upper()
    if unknown := set(arguments.classes) - set(TITLES):
        parser.error(f"no class {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}")
    with tempfile.TemporaryDirectory() as folder, sites(arguments.site_port) as places:
        arguments.folder = arguments.folder or Path(folder)
        kinds = ["ours", "stock"] if arguments.stock else ["ours"]
        if not arguments.start:
            kinds = ["target"]
        try:
            runs = [whole(arguments, kind, places) for kind in kinds]
        except (BenchError, OSError) as error:
            print(f"hostile: {error}", file=sys.stderr)
            return 2
        return report(arguments, runs, places)


if __name__ == "__main__":
    sys.exit(main())
