"""Graphics cards by name, and what their compute capability allows in vLLM 0.32.

Memory is what CUDA gives of a card (``torch.cuda.mem_get_info``), in GiB: vLLM takes its share of
that. NVML and nvidia-smi tell more, by what the driver keeps for itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine.hardware import Card

_SPECIFICATION = (
    "write NxNAME as 8x2080ti-11g, 2x3090 or 1xa100-80g, NxSIZE@CAPABILITY as 4x24GiB@8.6, or "
    "NODESxNxNAME"
)
MOST_CARDS, MOST_GIB = 1024, 1024
OLDEST, NEWEST = (7, 0), (12, 1)
"""Compute capabilities that ``--gpus`` takes: from Volta's to the newest that vLLM 0.32 names."""
KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""Whole GiB of KV cache for each worker on the CPU; goes before the profile's fields."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A card as it is sold: ``sizes`` maps GB as marketed to GiB that CUDA gives.

    The latter are from messages on Linux that name the card: torch's "GPU 0 has a total capacity
    of 22.03 GiB", vLLM's "(21.84/22.03 GiB) on startup". Drivers differ in what they keep, so that
    one card has several; here is a lower one, so that a plan is rather too cautious. Where no
    message was found, it is the size that is sold.
    """

    title: str
    capability: tuple[int, int]
    sizes: tuple[tuple[int, float], ...]


# ECC, on as they are sold, takes a part of the A10's, A40's, L4's, L20's, L40S's and T4's; on an
# RTX 6000 Ada it would leave 44.4.
KINDS: dict[str, Kind] = {
    "v100": Kind("V100", (7, 0), ((16, 15.77), (32, 31.73))),
    "2080": Kind("RTX 2080", (7, 5), ((8, 7.6),)),
    "2080ti": Kind("RTX 2080 Ti", (7, 5), ((11, 10.57), (22, 21.67))),
    "titanrtx": Kind("TITAN RTX", (7, 5), ((24, 23.46),)),
    "t4": Kind("T4", (7, 5), ((16, 14.56),)),
    "a100": Kind("A100", (8, 0), ((40, 39.38), (80, 79.22))),
    "a30": Kind("A30", (8, 0), ((24, 23.49),)),
    "3060": Kind("RTX 3060", (8, 6), ((12, 11.62),)),
    "3080": Kind("RTX 3080", (8, 6), ((10, 9.62), (12, 12.0))),  # no message of the larger
    "3090": Kind("RTX 3090", (8, 6), ((24, 23.55),)),
    "a10": Kind("A10", (8, 6), ((24, 21.98),)),
    "a40": Kind("A40", (8, 6), ((48, 44.34),)),
    "4060ti": Kind("RTX 4060 Ti", (8, 9), ((16, 15.6),)),
    "4090": Kind("RTX 4090", (8, 9), ((24, 23.51),)),
    "l4": Kind("L4", (8, 9), ((24, 22.03),)),
    "l20": Kind("L20", (8, 9), ((48, 44.4),)),
    "l40s": Kind("L40S", (8, 9), ((48, 44.39),)),
    "6000ada": Kind("RTX 6000 Ada", (8, 9), ((48, 47.37),)),
    "h20": Kind("H20", (9, 0), ((96, 95.22),)),
    "h100": Kind("H100", (9, 0), ((80, 79.1),)),
    "h200": Kind("H200", (9, 0), ((141, 139.8),)),
    "b200": Kind("B200", (10, 0), ((180, 178.35),)),
    "5090": Kind("RTX 5090", (12, 0), ((32, 31.34),)),
    "rtxpro6000": Kind("RTX PRO 6000", (12, 0), ((96, 94.97),)),
}


# As clouds call them.
_ALIASES = {"a10g": "a10"}


@dataclass(frozen=True, slots=True)
class Machines:
    """The cards that a plan may use: all of them, and on how many machines.

    ``cpu_cache_gib`` is what ``VLLM_CPU_KVCACHE_SPACE`` says there, None where it is not set.
    """

    cards: tuple[Card, ...]
    nodes: int = 1
    cpu_cache_gib: int | None = None

    @property
    def cards_each(self) -> int:
        """Cards of one machine."""
        return len(self.cards) // self.nodes

    def used(self, workers: int) -> tuple[Card, ...]:
        """Return the cards that ``workers`` take, the first ones; fewer where there are fewer."""
        return self.cards[:workers]


def parse_cards(specification: str) -> Machines:
    """Read ``8x2080ti-11g``, ``2x3090``, ``4x24GiB@8.6``, or several kinds with ``+`` between.

    Two numbers before a name are machines and the cards of each: ``2x8xa100-80g``. Where one kind
    is written so, a kind with one number is a single machine; all have to hold as many cards.

    Raises:
        PreflightError: no such card, a number that is none, or machines that differ in size.
    """
    cards: list[Card] = []
    machines: list[int] = []
    several = False
    groups = [group.strip() for group in re.split(r"[+,]", specification)]
    for group in groups:
        found = re.fullmatch(
            r"(?:(\d{1,4})\s*[x×*]\s*)?(?:(\d{1,4})\s*[x×*]\s*)?(.+)", group.lower()
        )
        if found is None:
            raise _unknown(specification)
        first, second, name = found.groups()
        nodes, each = (1, int(first or 1)) if second is None else (int(first), int(second))
        count, several = nodes * each, several or second is not None
        if not 1 <= count <= MOST_CARDS:
            raise PreflightError(
                f"--gpus {specification}: {count} cards; name 1 to {MOST_CARDS} of them"
            )
        machines += [each] * nodes
        title, memory, capability = _kind(name.strip(), specification)
        cards += [
            Card(len(cards) + index, title, memory, memory, capability) for index in range(count)
        ]
    if not several:
        return Machines(tuple(cards))
    if len(sizes := set(machines)) > 1:
        raise PreflightError(
            f"--gpus {specification}: machines of {min(sizes)} and of {max(sizes)} cards; name "
            "machines that hold equally many, as 2x8xh100+1x8xa100-80g"
        )
    return Machines(tuple(cards), len(machines))


def _kind(name: str, specification: str) -> tuple[str, float, tuple[int, int]]:
    if sized := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb|g)?@(\d{1,3})(?:\.(\d))?", name):
        size, unit, major, minor = sized.groups()
        memory = float(size) * (1e9 / 2**30 if unit == "gb" else 1)
        capability = _capability(major, minor)
        title = "{:g}GiB@{}.{}".format(memory, *capability)
    else:
        plain, gb = _split_size(name)
        kind = _named(plain)
        if kind is None:
            raise _unknown(specification)
        sizes = dict(kind.sizes)
        if gb is None and len(sizes) > 1:
            ways = " or ".join(f"{name}-{gb}g" for gb in sizes)
            raise PreflightError(f"--gpus {specification}: say which {kind.title}: {ways}")
        # A size that was never sold, as a modified card: taken at its word.
        gb = next(iter(sizes)) if gb is None else gb
        memory, capability = sizes.get(gb, float(gb)), kind.capability
        title = f"{kind.title} {gb} GB"
    if not 0 < memory <= MOST_GIB or not OLDEST <= capability <= NEWEST:
        shown = "{}.{}".format(*capability)
        raise PreflightError(
            f"--gpus {specification}: a card of {memory:g} GiB and compute capability {shown}; "
            f"there are cards of up to {MOST_GIB} GiB, and of {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]}: correct it"
        )
    return title, memory, capability


def _capability(major: str, minor: str | None) -> tuple[int, int]:
    """Read 8.6, 8 (as 8.0) and 86, which is the compiler's way."""
    if minor is None and int(major) >= 20:
        return int(major[:-1]), int(major[-1])
    return int(major), int(minor or 0)


def card_called(name: str, memory: float | None) -> Card:
    """Return the card that a profile or the driver calls ``name``, with ``memory`` in GiB.

    Words that no kind has are left aside, as in ``NVIDIA A100-SXM4-80GB``; what is of no kind at
    all needs its compute capability behind an ``@``, as ``recorded_name`` writes it. A size as it
    is sold, and one that ``recorded_memory`` wrote, is what NVML reports of such a card.

    Raises:
        PreflightError: no such card, or one of unknown memory.
    """
    told, kind = re.fullmatch(r".+@(\d{1,3})(?:\.(\d))?", name), _kind_within(name)
    if told is not None:
        capability, sizes = _capability(*told.groups()), {}
    elif kind is not None:
        capability, sizes = kind.capability, dict(kind.sizes)
    else:
        raise PreflightError(
            f"hardware.card: {name}: no such card; name it as NAME@CAPABILITY (RTX A6000@8.6), "
            "or say by --gpus which cards are meant"
        )
    if memory is None and len(sizes) == 1:
        (memory,) = sizes.values()
    if memory is None:
        raise PreflightError(
            f"hardware.card: {name}: say which {name} by hardware.card_memory_gib, in GiB"
        )
    for sold, given in sizes.items():
        if memory in (sold, recorded_memory(given)):
            memory = given
    return Card(0, name, memory, memory, capability)


def recorded_name(card: Card) -> str:
    """Return the name by which ``card_called`` finds a card's compute capability again."""
    kind = _kind_within(card.name)
    known = "@" in card.name or (kind is not None and kind.capability == card.capability)
    return card.name if known else "{}@{}.{}".format(card.name, *card.capability)


def recorded_memory(memory: float) -> float:
    """Return GiB as a profile asks for them: in tenths, and no more than there are."""
    return int(memory * 10) / 10


def _kind_within(name: str) -> Kind | None:
    """Return the kind that the most of a name's first words name, maker and brand aside."""
    words = re.sub(r"nvidia|geforce|tesla", "", name.lower()).replace("-", " ").split()
    kinds = (_named("".join(words[:count])) for count in range(len(words), 0, -1))
    return next((kind for kind in kinds if kind is not None), None)


def _split_size(name: str) -> tuple[str, int | None]:
    """Part ``a100-80g`` into name and GB; without a mark between them, where a card is known."""
    plain = re.sub(r"nvidia|geforce|tesla", "", name).strip()
    if found := re.fullmatch(r"(.*\S)[\s_-]+(\d{1,3})\s*g(?:i?b)?", plain):
        return re.sub(r"[\s_-]", "", found[1]), int(found[2])
    plain = re.sub(r"[\s_-]", "", plain)
    if found := re.fullmatch(r"(\w*?\d+)g(?:i?b)?", plain):
        for digits in (1, 2, 3):
            kind = _named(found[1][:-digits])
            size = found[1][-digits:]
            if kind is not None and size.isdigit() and int(size) in dict(kind.sizes):
                return found[1][:-digits], int(size)
    return plain, None


def _named(plain: str) -> Kind | None:
    plain = _ALIASES.get(plain, plain)
    return KINDS.get(plain) or KINDS.get(plain.removeprefix("rtx")) or KINDS.get(f"rtx{plain}")


def _unknown(specification: str) -> PreflightError:
    names = ", ".join(KINDS)
    return PreflightError(f"--gpus {specification}: no such card; {_SPECIFICATION}. Names: {names}")


def table() -> tuple[Card, ...]:
    """One card of every kind and size, from the oldest capability to the newest."""
    return tuple(
        Card(0, f"{kind.title} {gb} GB", memory, memory, kind.capability)
        for kind in KINDS.values()
        for gb, memory in kind.sizes
    )


def decoder_attention(capability: tuple[int, int], kv_dtype: str = "auto") -> str:
    """Name the backend that vLLM 0.32 takes for the text model.

    Source: ``_get_backend_priorities`` in ``platforms/cuda.py``; FlashAttention and FlashInfer
    need 8.0, and FlashAttention keeps an 8-bit cache on 9.0 alone (``fa_utils.py``).
    """
    if capability < (8, 0):
        return "TRITON_ATTN"
    if capability[0] == 10 or (kv_dtype.startswith("fp8") and capability[0] != 9):
        return "FLASHINFER"
    return "FLASH_ATTN"


def vision_attention(capability: tuple[int, int]) -> str:
    """Name the backend for the vision encoder (``get_vit_attn_backend``)."""
    return "FLASH_ATTN" if capability >= (8, 0) else "TORCH_SDPA"
