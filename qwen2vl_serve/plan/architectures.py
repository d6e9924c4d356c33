"""What a model is made of: its sizes, and from them every parameter it holds.

Pure arithmetic. Layers and their names follow ``modeling_qwen2_vl`` and ``modeling_qwen2_5_vl`` of
transformers 5.19, which vLLM 0.32 mirrors in ``model_executor/models``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from qwen2vl_serve.checkpoints import checkpoint

Split = Literal["column", "row", "copied", "vocabulary"]
MROPE_POSITIONS = 4
"""vLLM's M-RoPE table has four rows for each position (``rotary_embedding/mrope.py``)."""
VISION_POSITIONS = 8192
VOCABULARY_STEP = 64
"""vLLM pads a vocabulary to this multiple (``vocab_parallel_embedding.py``)."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the text model's linear layers are packed.

    ``group`` is the number of inputs behind one scale, None for one scale a column; ``zeros``
    tells whether zero points stay on the card (AWQ's do; symmetric GPTQ's are dropped when its
    weights are packed for Marlin). ``vision`` tells whether the vision encoder is packed as well,
    ``ordered`` whether groups are not of neighbouring inputs (GPTQ's ``desc_act``).
    """

    method: str
    bits: int
    group: int | None = None
    zeros: bool = False
    vision: bool = False
    ordered: bool = False

    def packed_bytes(self, inputs: int, outputs: int) -> float:
        """Bytes of one matrix: packed weights, 16-bit scales and, where kept, zero points.

        Source: ``create_weights`` in vLLM's ``quantization/auto_awq.py`` and ``auto_gptq.py``.
        """
        groups = -(-inputs // self.group) if self.group else 1
        zeros = self.bits / 8 if self.zeros else 0
        return inputs * outputs * self.bits / 8 + groups * outputs * (2 + zeros)


@dataclass(frozen=True, slots=True)
class Tensors:
    """``count`` equal layers: a matrix of ``inputs`` × ``outputs`` and the ``bias`` beside it.

    ``heads`` and ``kv_heads`` are set where the outputs are attention heads of ``width`` each, of
    which the KV ones are copied to the ranks beyond their number. ``packed`` layers are those
    that a quantised checkpoint packs.
    """

    name: str
    inputs: int
    outputs: int
    split: Split
    bias: int = 0
    count: int = 1
    packed: bool = False
    heads: int = 0
    kv_heads: int = 0
    width: int = 0

    @property
    def parameters(self) -> int:
        """Parameters of all ``count`` layers, unsplit and without padding."""
        return self.count * (self.inputs * self.outputs + self.bias)


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision encoder. ``gated`` is Qwen2.5's MLP of three matrices with RMS norms."""

    depth: int
    embed: int
    heads: int
    intermediate: int
    out: int
    gated: bool
    patch: int = 14
    merge: int = 2
    frames: int = 2
    channels: int = 3
    # Qwen3-VL: learned positions, and mergers that feed the first layers of the text model.
    positions: int = 0
    deep_mergers: int = 0

    @property
    def patch_values(self) -> int:
        """Numbers of one patch: channels × frames × patch²."""
        return self.channels * self.frames * self.patch**2

    @property
    def factor(self) -> int:
        """Side in pixels of the square behind one visual token."""
        return self.patch * self.merge

    @property
    def rotary_values(self) -> int:
        """Numbers of the rotary table: 8192 positions of half a head (``models/qwen2_vl.py``)."""
        return VISION_POSITIONS * (self.embed // self.heads // 2)

    @property
    def merged(self) -> int:
        """Width of the patches that become one token, side by side."""
        return self.embed * self.merge**2

    def tensors(self) -> Iterator[Tensors]:
        """List the encoder's layers.

        Sources: ``Qwen2VisionTransformer`` in ``models/qwen2_vl.py``, and of Qwen2.5-VL and
        Qwen3-VL ``models/qwen2_5_vl.py`` and ``qwen3_vl.py``.
        """
        d, m, n, wide = self.embed, self.intermediate, self.depth, self.merged
        norm = d if self.gated else 2 * d
        bias = d if self.positions else 0
        yield Tensors("patch_embed", self.patch_values, d, "copied", bias)
        if self.positions:
            yield Tensors("pos_embed", self.positions, d, "copied")
        yield Tensors("norms", norm, 1, "copied", count=2 * n)
        yield Tensors("qkv", d, 3 * d, "column", 3 * d, n, packed=True)
        yield Tensors("proj", d, d, "row", d, n, packed=True)
        wider = 2 * m if self.gated else m
        yield Tensors("mlp_up", d, wider, "column", wider, n, packed=True)
        yield Tensors("mlp_down", m, d, "row", d, n, packed=True)
        for number in range(1 + self.deep_mergers):
            yield Tensors("merger_norm", norm if number == 0 else 2 * wide, 1, "copied")
            yield Tensors("merger_up", wide, wide, "column", wide, packed=True)
            yield Tensors("merger_down", wide, self.out, "row", self.out, packed=True)


@dataclass(frozen=True, slots=True)
class Text:
    """The language model. ``qkv_bias`` is Qwen2's, ``qk_norm`` Qwen3's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    positions: int
    qkv_bias: bool = True
    qk_norm: bool = False
    mrope: bool = True

    @property
    def rotary_values(self) -> int:
        """Numbers of the rotary table, one table for all layers of a rank."""
        return self.positions * (MROPE_POSITIONS if self.mrope else 1) * self.head_dim

    def layer_tensors(self, layers: int) -> Iterator[Tensors]:
        """List the layers of ``layers`` decoder blocks.

        Sources: ``Qwen2Attention`` and ``Qwen2MLP`` in ``models/qwen2.py``, ``models/qwen3.py``.
        """
        h, hd = self.hidden, self.head_dim
        q, kv = self.heads * hd, self.kv_heads * hd
        yield Tensors(
            "qkv_proj", h, q + 2 * kv, "column", (q + 2 * kv) * self.qkv_bias, layers,
            packed=True, heads=self.heads, kv_heads=self.kv_heads, width=hd,
        )  # fmt: skip
        yield Tensors("o_proj", q, h, "row", count=layers, packed=True)
        yield Tensors("gate_up_proj", h, 2 * self.intermediate, "column", 0, layers, packed=True)
        yield Tensors("down_proj", self.intermediate, h, "row", 0, layers, packed=True)
        yield Tensors("norms", h, 1, "copied", count=2 * layers)
        if self.qk_norm:
            yield Tensors("qk_norms", hd, 1, "copied", count=2 * layers)

    def embedding(self) -> Tensors:
        """Return the table of token embeddings; the output head has the same shape."""
        return Tensors("embed_tokens", self.hidden, self.vocabulary, "vocabulary")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A checkpoint's sizes; ``dtype_bytes`` and ``dtype`` are of its unquantised weights.

    ``stored_bytes`` is what the weight files hold, where they were seen, and ``fault`` what is
    wrong with them; ``assumed`` tells that a folder was named that is not here, and that its name
    alone was gone by.
    """

    name: str
    text: Text
    vision: Vision | None
    quantisation: Quantisation | None = None
    dtype: str = "bfloat16"
    kind: str = "qwen2_vl"
    stored_bytes: int | None = None
    assumed: bool = False
    fault: str | None = None

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        text = sum(tensor.parameters for tensor in self.text.layer_tensors(self.text.layers))
        tables = 1 if self.text.tied else 2
        table = self.text.embedding().parameters
        return text + tables * table + self.text.hidden + self.vision_parameters

    @property
    def vision_parameters(self) -> int:
        """Parameters of the vision encoder alone."""
        if self.vision is None:
            return 0
        return sum(tensor.parameters for tensor in self.vision.tensors())

    def parts(self) -> Iterator[str]:
        """Name what each block and the tables are in a checkpoint, whatever stands before it."""
        yield "embed_tokens"
        for number in range(self.text.layers):
            yield from (f"layers.{number}.self_attn", f"layers.{number}.mlp")
        if self.vision is not None:
            yield from ("visual.patch_embed", "visual.merger")
            for number in range(self.vision.depth):
                yield from (f"visual.blocks.{number}.attn", f"visual.blocks.{number}.mlp")

    def shape(self) -> checkpoint.Shape:
        """Return the sizes that decide about splitting."""
        text, vision, packing = self.text, self.vision, self.quantisation
        return checkpoint.Shape(
            heads=text.heads,
            kv_heads=text.kv_heads,
            head_dim=text.head_dim,
            intermediate=text.intermediate,
            layers=text.layers,
            vision_heads=vision.heads if vision else 0,
            vision_intermediate=vision.intermediate if vision else 0,
            group=packing.group if packing else None,
        )


# hidden, intermediate, layers, heads, KV heads, vocabulary, tied: from the config.json of each.
_QWEN2_VL = {
    "2b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}
_QWEN2_5_VL = {
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}
PADDED_72B = 29696
"""Qwen widens the 72B's 29568 to this before quantising it, so that groups of 128 divide."""
_VARIANTS = {
    "awq": Quantisation("awq", 4, 128, zeros=True),
    "gptq-int4": Quantisation("gptq", 4, 128),
    "gptq-int8": Quantisation("gptq", 8, 128),
}


def published(name: str) -> Architecture | None:
    """Return one of Qwen's published checkpoints by its hub name, None for any other.

    Owners are not looked at: ``Qwen/…`` and ModelScope's ``qwen/…`` name the same files, and so
    do folders that keep the name.
    """
    words = name.rstrip("/").rpartition("/")[2].lower()
    family, _, rest = words.partition("-vl-")
    table = {"qwen2": _QWEN2_VL, "qwen2.5": _QWEN2_5_VL}.get(family)
    size, _, variant = rest.partition("-")
    if table is None or size not in table:
        return None
    instruct, _, packing = variant.partition("-")
    if instruct not in ("", "instruct"):
        instruct, packing = "", variant
    if packing and packing not in _VARIANTS:
        return None
    quantisation = _VARIANTS.get(packing)
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = table[size]
    if quantisation is not None and size == "72b":
        intermediate = PADDED_72B
    gated = family == "qwen2.5"
    text = Text(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
        tied=tied,
        positions=128_000 if gated else 32_768,
    )
    width = (3420 if size in ("3b", "7b") else 3456) if gated else 5120
    vision = Vision(32, 1280, 16, width, hidden, gated)
    dtype = "bfloat16" if quantisation is None else "float16"
    kind = "qwen2_5_vl" if gated else "qwen2_vl"
    return Architecture(name, text, vision, quantisation, dtype, kind)


def published_names() -> tuple[str, ...]:
    """Hub names of what ``published`` knows, without the variants that were not released."""
    plain = [f"Qwen/Qwen2-VL-{size.upper()}-Instruct" for size in _QWEN2_VL]
    newer = [f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct" for size in _QWEN2_5_VL]
    variants = ("AWQ", "GPTQ-Int4", "GPTQ-Int8")
    return (
        *plain,
        *(f"{name}-{variant}" for name in plain for variant in variants),
        *newer,
        *(f"{name}-AWQ" for name in newer),
    )


def quantised_twin(architecture: Architecture) -> str | None:
    """Name the AWQ checkpoint that Qwen published beside an unquantised one."""
    if architecture.quantisation is not None or published(architecture.name) is None:
        return None
    owner, _, name = architecture.name.rstrip("/").rpartition("/")
    if "/" in owner or owner.lower() not in ("", "qwen"):
        owner = "Qwen" if "/" in owner or owner.startswith(".") else ""
    elif not owner:
        owner = "Qwen"
    # Anybody else's checkpoint of this name may hold other weights.
    return f"{owner}/{name}-AWQ" if owner else None


def with_online_fp8(architecture: Architecture, method: str) -> Architecture:
    """Return the same model as vLLM packs it at load under ``quantization: fp8…``."""
    group = 128 if method in ("fp8_per_block", "mxfp8") else None
    packing = Quantisation(method, 8, group, vision=True)
    return replace(architecture, quantisation=packing)
