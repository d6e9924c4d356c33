"""``docs/hardware.md`` and its Chinese twin: every profile that ships on every card of the table.

``python -m qwen2vl_serve.plan.hardware_page docs`` writes both; a test holds them to the planner.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen2vl_serve.machine.hardware import GIB, Card, Host
from qwen2vl_serve.plan.assessment import Assessment, Verdict, host_bytes
from qwen2vl_serve.plan.capacity import capacity
from qwen2vl_serve.plan.cards import decoder_attention, table, vision_attention
from qwen2vl_serve.plan.planning import plan_for
from qwen2vl_serve.plan.remedies import Remedy, find_remedies
from qwen2vl_serve.profile import Profile, load_profile, profile_names

_FREE_GIB = (1, 2, 3, 4)
COMMAND = "python -m qwen2vl_serve.plan.hardware_page docs"


@dataclass(frozen=True, slots=True)
class Words:
    """What the page says, in one language."""

    title: str
    twin: str
    introduction: str
    cards_title: str
    cards_head: str
    any_title: str
    any_text: str
    any_head: str
    any_cards: str
    several: str
    one: str
    head: str
    verdicts: dict[Verdict, str]
    nothing: str
    as_is: str


ENGLISH = Words(
    title="# Hardware: what fits where",
    twin="[中文](hardware.zh-CN.md) · [the planner](plan.md) · [profiles](profiles.md)",
    introduction="""\
Written by the planner, not by hand: `{command}` writes this page
and its twin anew, and a test fails where they differ from the planner.

Every profile that ships is planned on as many cards of each kind as it uses; nothing here was run
on them. *KV tokens* is the likely size of the KV cache and *at once* the requests of
`max_model_len` tokens that it holds, each with the change of the last column. *fits* holds even
where everything takes the most that is expected; *tight* may. The last column is the change that
does the least harm where a profile does not surely fit, planned again: each is a `--set` of
`serve`. For cards and settings of your own ask [`qwen2vl-serve plan`](plan.md).""",
    cards_title="## Cards",
    cards_head="| `--gpus` | card | GiB | capability | attention | attention of pictures |",
    any_title="## {name}",
    any_text="""\
{description}, for machines without a card: Linux on x86_64 with AVX2 or on
aarch64, and vLLM's CPU build. It takes {taken:.1f} GiB of memory, {cache:.1f} of them for the
KV cache, {weights:.2f} for the weights and the rest, as measured, for its processes:""",
    any_head="| free memory | | KV tokens | at once | fits with |",
    any_cards="With vLLM's CUDA build it starts on a card instead: any of those above but {cards}.",
    several="{description}. {model}, {count} cards: tensor {tensor} × pipeline {stages}.",
    one="{description}. {model}, one card.",
    head="| card | | KV tokens | at once | fits with |",
    verdicts={Verdict.FITS: "fits", Verdict.TIGHT: "tight", Verdict.NO: "no"},
    nothing="nothing in the profile",
    as_is="as it is",
)
CHINESE = Words(
    title="# 硬件：什么装得下",
    twin="[English](hardware.md) · [规划器](plan.zh-CN.md) · [配置](profiles.zh-CN.md)",
    introduction="""\
本页由规划器生成，不是手写的：`{command}` 会重写本页及其英文版，
与规划器不一致时测试会失败。

每个随附的配置都按它所用的卡数在每种卡上规划一遍；这里没有任何一项是在真卡上跑出来的。
*KV token* 是 KV 缓存的可能大小，*同时* 是其中能放下多少个长度为 `max_model_len` 的请求，
两者都已计入最后一列的改动。*可以* 指每一项都取预期的最大值时也装得下，*紧张* 则未必。
最后一列是不能确保装下时代价最小的改动，已重新规划验证，每一条都是 `serve` 的一个 `--set`。
自己的卡和设置请用 [`qwen2vl-serve plan`](plan.zh-CN.md) 规划。""",
    cards_title="## 显卡",
    cards_head="| `--gpus` | 卡 | GiB | 计算能力 | 注意力 | 图片的注意力 |",
    any_title="## {name}",
    any_text="""\
{description}，为没有显卡的机器准备：Linux，x86_64（支持 AVX2）或 aarch64，vLLM 的 CPU 版本。
它占 {taken:.1f} GiB 内存：KV 缓存 {cache:.1f}，权重 {weights:.2f}，其余属于各进程（实测）：""",
    any_head="| 空闲内存 | | KV token | 同时 | 如何装下 |",
    any_cards="使用 vLLM 的 CUDA 版本时，它改在一张卡上启动：上面的卡都可以，{cards} 除外。",
    several="{description}。{model}，{count} 张卡：张量并行 {tensor} × 流水线并行 {stages}。",
    one="{description}。{model}，一张卡。",
    head="| 卡 | | KV token | 同时 | 如何装下 |",
    verdicts={Verdict.FITS: "可以", Verdict.TIGHT: "紧张", Verdict.NO: "不行"},
    nothing="改配置无济于事",
    as_is="原样",
)
# Profiles describe themselves in English.
_CHINESE_DESCRIPTIONS = {
    "demo": "随本软件包附带的小模型",
    "multi-gpu": "Qwen2-VL-7B，半精度，八张 12 GB 卡，张量并行 4 × 流水线并行 2",
    "multi-gpu-72b-awq": "Qwen2-VL-72B，4 bit（AWQ），四张 24 GB 卡",
    "single-3090": "Qwen2-VL-7B，bfloat16，一张 24 GB 卡",
    "single-gpu-2b": "Qwen2-VL-2B，一张 8 GB 或更大的卡",
    "single-gpu-awq": "Qwen2-VL-7B，4 bit（AWQ），一张 12 至 16 GB 的卡",
}


def page(words: Words) -> str:
    """Write the page in one language."""
    lines = [words.title, "", words.twin, "", words.introduction.format(command=COMMAND), ""]
    lines += [words.cards_title, "", words.cards_head, "|---|---|---|---|---|---|"]
    lines += [_card_row(card) for card in table()]
    for name in profile_names():
        lines += ["", words.any_title.format(name=name), "", *_profile(load_profile(name), words)]
    return "\n".join(lines) + "\n"


def _card_row(card: Card) -> str:
    name = card.name.lower().removeprefix("rtx ").removesuffix(" gb")
    name = "".join(name.rpartition(" ")[0].split()) + "-" + name.rpartition(" ")[2] + "g"
    capability = "{}.{}".format(*card.capability)
    return (
        f"| `{name}` | {card.name} | {card.memory_gib:.5g} | {capability} | "
        f"{decoder_attention(card.capability)} | {vision_attention(card.capability)} |"
    )


def _profile(profile: Profile, words: Words) -> Iterator[str]:
    description = (profile.description or profile.name).partition(", on any machine")[0]
    if words is CHINESE:
        description = _CHINESE_DESCRIPTIONS.get(profile.name, description)
    if profile.hardware.device != "cuda":
        yield from _without_cards(profile, description, words)
        return
    engine = profile.engine
    text = words.several if profile.workers > 1 else words.one
    yield text.format(
        description=description,
        model=f"`{profile.model.model}`",
        count=profile.workers,
        tensor=engine.tensor_parallel_size,
        stages=engine.pipeline_parallel_size,
    )
    yield ""
    yield words.head
    yield "|---|---|---|---|---|"
    for card in table():
        cards = tuple(replace(card, index=index) for index in range(profile.workers))
        plan = plan_for(profile, cards)
        yield _row(plan, find_remedies(plan), card.name, words)


def _without_cards(profile: Profile, description: str, words: Words) -> Iterator[str]:
    hosts = [Host((0,), memory_gib=free, available_gib=free) for free in _FREE_GIB]
    plans = [plan_for(profile, (), host=host) for host in hosts]
    first = plans[0]
    yield words.any_text.format(
        description=description,
        taken=host_bytes(first.deployment, first.stages) / GIB,
        cache=(first.deployment.kv_cache_bytes or 0) / GIB,
        weights=sum(first.weights_gib),
    )
    yield ""
    yield words.any_head
    yield "|---|---|---|---|---|"
    for plan, host in zip(plans, hosts, strict=True):
        yield _row(plan, find_remedies(plan, host), f"{host.available_gib:g} GiB", words)
    yield ""
    lacking = [
        card.name for card in table() if plan_for(profile, (card,)).verdict is not Verdict.FITS
    ]
    yield words.any_cards.format(cards=" / ".join(lacking))


def _row(plan: Assessment, remedies: Sequence[Remedy], name: str, words: Words) -> str:
    verdict = words.verdicts[plan.verdict]
    if plan.verdict is Verdict.FITS:
        held = capacity(plan, plan.deployment.max_model_len)
        tokens = f"{plan.kv_tokens.likely:,.0f}"
        return f"| {name} | {verdict} | {tokens} | {held.together} | {words.as_is} |"
    if not remedies:
        return f"| {name} | {verdict} | | | {words.nothing} |"
    first = remedies[0]
    values = {name: value for change in first.changes for name, value in change.values.items()}
    settings = " ".join(
        f"`{name}={'null' if value is None else value}`"
        for name, value in values.items()
        if name != "model.served_model_name"
    )
    held = capacity(first.plan, first.plan.deployment.max_model_len)
    tokens = f"{first.plan.kv_tokens.likely:,.0f}"
    return f"| {name} | {verdict} | {tokens} | {held.together} | {settings} |"


PAGES = {"hardware.md": ENGLISH, "hardware.zh-CN.md": CHINESE}


def write(folder: Path) -> None:
    """Write both pages into ``folder``."""
    for name, words in PAGES.items():
        (folder / name).write_text(page(words), "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
