"""Whether the model fits into the memory of cards or host, as the plan computes it."""

from __future__ import annotations

from qwen2vl_serve.doctor import cards, machine, model
from qwen2vl_serve.doctor.finding import Finding, ok, warning
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan import Assessment, Verdict, plan_for
from qwen2vl_serve.plan.cards import Machines
from qwen2vl_serve.plan.environment import cpu_cache_gib

# The plan's rules on these fields are other checks of the doctor.
_CHECKED_ELSEWHERE = frozenset(
    {
        "engine.gpu_memory_utilization",
        "engine.pipeline_parallel_size",
        "engine.tensor_parallel_size",
        "hardware.card",
        "model.dtype",
        "model.model",
        "model.quantization",
    }
)
_STOPPED = "not planned: another check stops it"


def fit(world: World) -> Finding:
    """Compare what weights, pictures and the longest request need with the memory.

    The plan's ranges are wide where nothing was measured, so that it warns and stops nothing.
    """
    short = not world.on_cards and machine.memory(world).level != "ok"
    if short or model.config(world).level == "fatal":
        return ok(_STOPPED)
    if world.on_cards and len(world.used_cards) < world.profile.workers:
        return ok("not planned: cards are missing")
    try:
        plan = _plan(world)
    except PreflightError:
        return ok("not planned: the sizes of this model are not known here")
    for problem in plan.problems:
        if problem.field not in _CHECKED_ELSEWHERE:
            found, _, mend = str(problem).rpartition("; ")
            return warning(found or mend, "vLLM refuses it", mend if found else "change it")
    if not plan.problems:
        return _judged(plan, world)
    own_build = world.on_cards and cards.dtype(world).level == "warning"
    return ok("not planned: vLLM's wheels are not built for this card" if own_build else _STOPPED)


def _plan(world: World) -> Assessment:
    if world.on_cards:
        return plan_for(world.profile, world.used_cards, ask_hub=False)
    machines = Machines((), cpu_cache_gib=cpu_cache_gib())
    return plan_for(world.profile, machines, host=hardware.host(), ask_hub=False)


def _judged(plan: Assessment, world: World) -> Finding:
    length = f"one request of {plan.deployment.max_model_len} tokens"
    mend = world.advice(world.profile) or "take a smaller model or more memory"
    each = "a card" if world.on_cards else "a worker"
    lacking = max(stage.needed - stage.cache.size.high for stage in plan.stages) / GIB
    if plan.verdict is Verdict.NO:
        return warning(
            f"{lacking:.2f} GiB {each} or more are lacking for {length}",
            "vLLM stops after it has loaded the weights: no memory for the KV cache",
            mend,
        )
    weights = max(plan.weights_gib)
    if plan.verdict is Verdict.TIGHT:
        return warning(
            f"{weights:.2f} GiB of weights {each} leave little for {length}",
            "it fits only if other parts take less than they may",
            mend,
        )
    tokens = plan.kv_tokens.likely
    return ok(f"{weights:.2f} GiB of weights {each}, a KV cache of about {tokens:,.0f} tokens")
