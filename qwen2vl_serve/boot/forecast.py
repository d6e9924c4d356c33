"""What is foreseen of a start, beside what came of it: weights, KV cache, seconds.

Weights and KV cache are the plan's. Seconds are those of this profile's last starts here: disks,
downloads and compilations differ too much between machines to be computed.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.http.envelope import Metrics
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.environment import machines_here
from qwen2vl_serve.profile import Profile

KEPT_STARTS = 5


@dataclass(frozen=True, slots=True)
class Start:
    """A start in figures: weights in GiB on the fullest card, tokens of KV cache, seconds.

    None is what nobody knows: the engine does not tell of weights on the CPU, and before the first
    start nothing is known of its time.
    """

    weights_gib: float | None = None
    kv_tokens: int | None = None
    seconds: float | None = None


class StartTimes:
    """How long the last starts took, by what was started; a small file beside the log."""

    def __init__(self, profile: Profile) -> None:
        self._path = profile.log_path.absolute().parent / "starts.json"
        engine = profile.engine
        size = f"{engine.tensor_parallel_size}x{engine.pipeline_parallel_size}"
        if engine.data_parallel_size > 1:
            size += f"x{engine.data_parallel_size}"
        self._key = f"{profile.name} {profile.model.path} {size}"

    def usual(self) -> float | None:
        """Return the median of the last starts in seconds, None before the first."""
        seconds = self._read().get(self._key)
        return median(seconds) if seconds else None

    def add(self, seconds: float) -> None:
        """Keep one more; where the file cannot be written, nothing is kept."""
        kept = self._read()
        kept[self._key] = [*kept.get(self._key, []), round(seconds, 1)][-KEPT_STARTS:]
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            fresh.write_text(json.dumps(kept, indent=1))
            fresh.replace(self._path)

    def _read(self) -> dict[str, list[float]]:
        try:
            content = json.loads(self._path.read_text("utf-8"))
            return {str(key): [float(one) for one in value] for key, value in content.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # none yet, or nothing that we wrote


def foresee(profile: Profile) -> Start:
    """Return what this machine's next start of ``profile`` should bring."""
    seconds = StartTimes(profile).usual()
    try:
        plan = plan_for(profile, machines_here(), host=hardware.host(), ask_hub=False)
    except PreflightError:
        return Start(seconds=seconds)
    return Start(max(plan.weights_gib), round(plan.kv_tokens.likely), seconds)


def comparison(foreseen: Start, actual: Start) -> str:
    """Put both into a line, as ``… as foreseen`` where they agree within 5 %."""
    told = [
        _told("weights", foreseen.weights_gib, actual.weights_gib, "{:.2f} GiB a card"),
        _told("KV cache", foreseen.kv_tokens, actual.kv_tokens, "{:,} tokens"),
        _told("start", foreseen.seconds, actual.seconds, "{:.1f} s"),
    ]
    return "; ".join(told)


def _told(name: str, foreseen: float | None, actual: float | None, form: str) -> str:
    if actual is None:
        return f"{name} " + ("unknown" if foreseen is None else form.format(foreseen) + " foreseen")
    if foreseen is None:
        return f"{name} {form.format(actual)}"
    if abs(actual - foreseen) <= 0.05 * abs(actual):
        return f"{name} {form.format(actual)} as foreseen"
    return f"{name} {form.format(actual)}, {form.format(foreseen)} foreseen"


def expose(foreseen: Start, actual: Start, metrics: Metrics) -> None:
    """Set the gauges of both."""
    for kind, start in (("foreseen", foreseen), ("actual", actual)):
        if start.weights_gib is not None:
            metrics.start_weights_bytes.labels(kind).set(start.weights_gib * GIB)
        if start.kv_tokens is not None:
            metrics.start_kv_tokens.labels(kind).set(start.kv_tokens)
        if start.seconds is not None:
            metrics.start_seconds.labels(kind).set(start.seconds)
