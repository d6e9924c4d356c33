"""An answer as it is printed: for 80 columns, and for pipes that keep no colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan import memory
from qwen2vl_serve.plan.answer import PARTS, Answer
from qwen2vl_serve.plan.assessment import Assessment, StagePlan, Verdict, host_bytes
from qwen2vl_serve.plan.cards import decoder_attention, vision_attention
from qwen2vl_serve.plan.memory import Range
from qwen2vl_serve.plan.request import Request

BAR_CELLS = 50
MOST_BARS = 16
"""Beyond as many cards, one bar stands for those of a stage."""
_COLOURS = {Verdict.FITS: "bold green", Verdict.TIGHT: "bold yellow", Verdict.NO: "bold red"}
_TITLES = {
    "weights": "text weights",
    "vision": "vision weights",
    "activations": "activations",
    "buffers": "buffers",
    "graphs": "CUDA graphs",
    "other": "kernels, NCCL",
}
# Letters, not shades: they say the same without colour.
_MARKS = (
    ("weights", "W", "blue", "text weights"),
    ("vision", "V", "magenta", "vision"),
    ("activations", "A", "yellow", "activations"),
    ("graphs", "G", "red", "graphs, NCCL"),
    ("cache", "K", "green", "KV cache"),
    ("free", "·", "bright_black", "free"),
)
_WHENCE = {
    "given": "",
    "found": " (found here)",
    "profile": " (the profile's own; no card was found here)",
}


def report(told: Answer, whence: str = "given") -> RenderableType:
    """Lay out everything that is known."""
    parts: list[RenderableType] = [_headline(told.plan, whence)]
    if told.plan.problems:
        parts += ["", *_listed([f"✗ {problem}" for problem in told.plan.problems], "red")]
    parts += ["", *_bars(told.plan), "", _memory(told.plan), "", *_requests(told)]
    if told.pictures:
        parts += ["", _pictures(told)]
    notes = [finding for finding in told.plan.findings if not finding.fatal]
    if notes:
        parts += ["", *_listed([f"note: {note}" for note in notes], "")]
    if not told.fits:
        parts += ["", *_remedies(told)]
    return Group(*parts)


def _headline(plan: Assessment, whence: str) -> RenderableType:
    deployment = plan.deployment
    name = plan.profile.model.model
    profile = f"profile {plan.profile.name}: " if plan.profile.name else ""
    split = f"TP {deployment.tensor_parallel} × PP {deployment.stages}"
    split += f" × DP {deployment.replicas}" if deployment.replicas > 1 else ""
    packing = deployment.architecture.quantisation
    numbers = f"{packing.method} {packing.bits} bit, " if packing else ""
    first = f"[bold]{escape(profile + name)}[/bold] on {escape(_cards(plan))}"
    first += _WHENCE[whence] if plan.deployment.on_cards else ""
    second = f"{deployment.architecture.parameters / 1e9:.2f} G parameters, {numbers}"
    second += f"{deployment.dtype}, {split}"
    if deployment.on_cards:
        decoder = decoder_attention(plan.capability, deployment.kv_dtype)
        second += f", {decoder}; pictures: {vision_attention(plan.capability)}"
    verdict = Text("verdict: ") + Text(plan.verdict.value, _COLOURS[plan.verdict])
    verdict += Text(_reason(plan))
    return Group(first, second, verdict)


def _reason(plan: Assessment) -> str:
    """Say what the verdict rests on, where it is the memory."""
    if plan.problems:
        return ""
    request = f"one request of {plan.deployment.max_model_len} tokens"
    each = _each(plan)
    spare = [stage.cache.size + memory.exactly(-stage.needed) for stage in plan.stages]
    least = min(stage.low for stage in spare) / GIB
    likely = min(stage.likely for stage in spare) / GIB
    most = min(stage.high for stage in spare) / GIB
    if plan.verdict is Verdict.FITS:
        return f", with {least:.2f} GiB {each} to spare where everything takes the most"
    if plan.verdict is Verdict.NO:
        lacking = f"{-least:.2f}" if most == least else f"{-most:.2f} to {-least:.2f}"
        return f": {lacking} GiB {each} are lacking for {request}"
    if likely >= 0:
        return (
            f", but likely to fit: {likely:.2f} GiB {each} to spare, or {-least:.2f} lacking where "
            f"everything takes the most, for {request}"
        )
    return (
        f", and likely not to fit: {-likely:.2f} GiB {each} are lacking for {request}, unless "
        "everything takes the least"
    )


def _each(plan: Assessment) -> str:
    return "a card" if plan.deployment.on_cards else "a worker"


def _cards(plan: Assessment) -> str:
    if not plan.deployment.on_cards:
        return "the CPU"
    kinds = [
        f"{len(list(group))} × {name} ({memory:.4g} GiB)"
        for (name, memory), group in groupby(
            plan.machines.cards, key=lambda card: (card.name, card.memory_gib)
        )
    ]
    nodes = "" if plan.nodes == 1 else f", on {plan.nodes or 'the'} machines"
    nodes += " of a Ray cluster" if plan.nodes is None else ""
    return ", ".join(kinds) + nodes


def _bars(plan: Assessment) -> Iterator[RenderableType]:
    if not plan.stages[0].total:
        return
    several = len(plan.stages) > 1
    each = plan.deployment.cards <= MOST_BARS
    for stage in plan.stages:
        names = [f"GPU {number}" for number in stage.cards if number < len(plan.machines.cards)]
        if not each:
            names = [f"{len(stage.cards)} GPUs"]
        for name in names if stage.cards else ["memory"]:
            label = f"{name} stage {stage.index}" if several else name
            bar = Text(f"{label:<14} ") + _bar(stage)
            yield bar + Text(f" {stage.total / GIB:.4g} GiB")
    legend = Text()
    for number, (_, mark, colour, title) in enumerate(_MARKS):
        legend += Text("  " if number else "") + Text(mark, colour) + Text(f" {title}")
    yield legend


def _bar(stage: StagePlan) -> Text:
    """Draw a card to scale; what does not fit into it is cut off at its end."""
    likely = {name: getattr(stage.parts, name).likely for name in PARTS}
    sizes = {
        "weights": likely["weights"],
        "vision": likely["vision"],
        "activations": likely["activations"] + likely["buffers"],
        "graphs": likely["graphs"] + likely["other"],
        "cache": max(0.0, stage.cache.size.likely),
    }
    bar, drawn, reached = Text("["), 0, 0.0
    for name, mark, colour, _ in _MARKS[:-1]:
        reached += sizes[name]
        end = min(BAR_CELLS, round(BAR_CELLS * reached / stage.total))
        if sizes[name] > stage.total / BAR_CELLS / 4:
            end = max(end, min(BAR_CELLS, drawn + 1))
        bar += Text(mark * (end - drawn), colour)
        drawn = max(drawn, end)
    over = reached > stage.total * 1.001 or stage.cache.size.likely < 0
    bar += Text(_MARKS[-1][1] * (BAR_CELLS - drawn), _MARKS[-1][2])
    return bar + (Text("!", "bold red") if over else Text("]"))


def _memory(plan: Assessment) -> RenderableType:
    """Tell each stage's parts as ranges, stages that are alike once."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"GiB {_each(plan)}")
    shown = [stage for stage, _ in _distinct(plan.stages)]
    for stage, names in _distinct(plan.stages):
        title = f"stage {names}" if len(plan.stages) > 1 else "least – likely – most"
        table.add_column(f"{title} ({stage.layers} layers)", justify="right")
    for name in PARTS:
        values = [_span(getattr(stage.parts, name)) for stage in shown]
        if any(getattr(stage.parts, name).high for stage in shown):
            table.add_row(_TITLES[name], *values)
    table.add_row("[bold]KV cache[/bold]", *(_span(stage.cache.size) for stage in shown))
    needed = [f"{stage.needed / GIB:.2f}" for stage in shown]
    table.add_row(f"  needed for {plan.deployment.max_model_len} tokens", *needed)
    if plan.deployment.on_cards:
        share = f"vLLM's share ({plan.deployment.utilisation:g})"
        table.add_row(share, *(f"{stage.share / GIB:.2f}" for stage in shown))
        table.add_row("outside it: CUDA", *(_span(stage.outside) for stage in shown))
    return table


def _distinct(stages: Sequence[StagePlan]) -> list[tuple[StagePlan, str]]:
    """Group stages that hold the same: the first, those between, the last."""
    found: list[tuple[StagePlan, list[int]]] = []
    for stage in stages:
        like = (stage.layers, stage.parts, stage.total)
        if found and (found[-1][0].layers, found[-1][0].parts, found[-1][0].total) == like:
            found[-1][1].append(stage.index)
        else:
            found.append((stage, [stage.index]))
    return [
        (stage, str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}")
        for stage, numbers in found
    ]


def _requests(told: Answer) -> Iterator[RenderableType]:
    plan, tokens = told.plan, told.plan.kv_tokens
    each = plan.deployment.kv_bytes_per_token() * plan.deployment.tensor_parallel / 1024
    held = f"{tokens.low:,.0f} – [bold]{tokens.likely:,.0f}[/bold] – {tokens.high:,.0f}"
    if tokens.low == tokens.high:
        held = f"[bold]{tokens.likely:,.0f}[/bold]"
    over = "cards" if plan.deployment.on_cards else "workers"
    size = ""
    if not plan.deployment.on_cards or plan.deployment.kv_cache_bytes is not None:
        size = f"; its size is that of {plan.deployment.kv_cache_field}"
    yield f"KV cache: {held} tokens at {each:g} KiB each over all {over}{size}"
    if not plan.deployment.on_cards:
        taken = host_bytes(plan.deployment, plan.stages) / GIB
        yield f"Memory: {taken:.1f} GiB for all of the server, its processes included"
    if told.plan.verdict is not Verdict.NO and tokens.likely:
        yield (
            f"Requests at once: {told.full.together} of {told.full.tokens:,} tokens "
            f"(max_model_len), or {told.typical.together} of {told.typical.tokens:,} "
            f"({_typical(told.request)}: {told.cost.visual:,} visual tokens)"
        )
        if told.typical.tokens > told.full.tokens:
            yield (
                f"The typical request is refused: {told.typical.tokens:,} tokens are beyond "
                f"engine.max_model_len {told.full.tokens}; raise it or ask for less"
            )
    low, likely, high = plan.longest.low, plan.longest.likely, plan.longest.high
    longest = f"{likely:,.0f}" if low == high else f"{low:,.0f} – {likely:,.0f} – {high:,.0f}"
    yield f"Longest request: {longest} tokens"


def _typical(request: Request) -> str:
    words = []
    for medium in request.media:
        kind = "picture" if medium.seconds is None else f"{medium.seconds:g} s video"
        size = f"{medium.width} × {medium.height}"
        words.append(f"{medium.count} {kind}{'s' * (medium.count > 1)} {size}")
    return ", ".join([*words, f"{request.text} in", f"{request.answer} out"])


def _pictures(told: Answer) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("picture")
    for width, height, _ in told.pictures:
        table.add_column(f"{width}×{height}", justify="right")
    table.add_row("tokens", *(str(tokens) for *_, tokens in told.pictures))
    return Group(f"Visual tokens under max_pixels {told.plan.profile.media.max_pixels}:", table)


def _remedies(told: Answer) -> Iterator[RenderableType]:
    if not told.remedies:
        machine = "larger or more cards" if told.plan.deployment.on_cards else "more memory"
        yield f"No change of the profile mends that: take {machine}, or a smaller model."
        return
    yield "[bold]What would fit[/bold], the least harmful first (--fix writes the first):"
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    grid.add_column()
    for number, remedy in enumerate(told.remedies, 1):
        lines = [
            f"{escape(str(change))}\n  [dim]{escape(change.cost)}[/dim]"
            for change in remedy.changes
        ]
        lines.append(f"  {remedy.plan.kv_tokens.likely:,.0f} tokens of KV cache")
        grid.add_row(f"{number}.", "\n".join(lines))
    yield grid


def _listed(lines: Sequence[str], style: str) -> list[RenderableType]:
    return [Text(line, style) for line in lines]


def _span(size: Range) -> str:
    low, likely, high = (f"{bound / GIB:.2f}" for bound in (size.low, size.likely, size.high))
    return likely if low == high else f"{low} – {likely} – {high}"
