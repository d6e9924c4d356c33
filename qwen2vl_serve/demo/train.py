"""Train the demo model from nothing: ``python -m qwen2vl_serve.demo.train``.

Three stages, each resumed where it was interrupted: draw the pictures, learn to see, learn to
speak. The same seed gives the same model on the same machine and thread count.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER, write_checkpoint
from qwen2vl_serve.demo.pictures import build_store


@dataclass(frozen=True)
class Plan:
    """How much is drawn and how long is trained."""

    pictures: int = 40_000
    videos: int = 4_000
    first_seed: int = 1_000  # pictures with seeds below and above the store's are never trained on
    crowds: int = 14_000
    simple_steps: int = 300
    simple_batch: int = 64
    crowded_steps: int = 3_000
    crowded_batch: int = 48
    again_steps: int = 1_400
    see_rate: float = 1.5e-3
    looked_at: int = 24_000
    watched: int = 1_500
    speak_steps: int = 3_600
    both_steps: int = 500
    speak_batch: int = 16
    speak_rate: float = 1.2e-3
    both_rate: float = 3e-4
    corpus: int = 40_000
    kept: float = 0.0  # the share of the weights that it started from, in those it ends with


# Rounds that train a checkpoint further; the third, fifth and seventh with the pictures of the one
# before, the seventh with another --seed.
FURTHER = (
    Plan(
        pictures=32_000, videos=6_000, first_seed=200_000, crowds=12_000, crowded_steps=2_300,
        see_rate=1.2e-3, looked_at=16_000, watched=2_500, speak_steps=2_200, both_steps=260,
        speak_rate=1e-3,
    ),
    Plan(
        pictures=24_000, videos=3_000, first_seed=400_000, crowds=8_000, crowded_steps=1_000,
        see_rate=8e-4, looked_at=16_000, watched=1_500, speak_steps=2_700, both_steps=350,
        speak_rate=1e-3,
    ),
    Plan(
        pictures=24_000, videos=3_000, first_seed=400_000, crowds=8_000, crowded_steps=0,
        looked_at=6_000, watched=600, speak_steps=400, both_steps=0, speak_rate=4e-4,
    ),
    Plan(
        pictures=30_000, videos=3_000, first_seed=600_000, crowds=10_000, crowded_steps=1_500,
        see_rate=1e-3, looked_at=16_000, watched=1_500, speak_steps=1_900, both_steps=600,
        speak_rate=9e-4, both_rate=4e-4,
    ),
    Plan(
        pictures=30_000, videos=3_000, first_seed=600_000, crowds=10_000, crowded_steps=0,
        looked_at=9_000, watched=1_000, speak_steps=480, both_steps=0, speak_rate=5e-4, kept=0.3,
    ),
    Plan(
        pictures=30_000, videos=4_000, first_seed=800_000, crowds=10_000, crowded_steps=1_200,
        see_rate=1e-3, looked_at=16_000, watched=2_000, speak_steps=1_200, both_steps=500,
        speak_rate=8e-4, both_rate=4e-4, kept=0.5,
    ),
    Plan(
        pictures=30_000, videos=4_000, first_seed=800_000, crowds=10_000, crowded_steps=1_300,
        see_rate=7e-4, looked_at=16_000, watched=2_000, speak_steps=1_700, both_steps=700,
        speak_rate=8e-4, both_rate=4e-4, kept=0.65,
    ),
)  # fmt: skip
REHEARSAL = Plan(
    pictures=192, videos=48, crowds=48, simple_steps=4, simple_batch=4, crowded_steps=10,
    crowded_batch=4, again_steps=2, looked_at=32, watched=8, speak_steps=3, both_steps=2,
    speak_batch=2, corpus=600,
)  # fmt: skip


def tokenizer_of(plan: Plan, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer learnt from ``plan.corpus`` questions and answers."""
    from qwen2vl_serve.demo.corpus import corpus  # noqa: PLC0415
    from qwen2vl_serve.demo.tokenizer import train_tokenizer  # noqa: PLC0415

    return train_tokenizer(corpus(plan.corpus, seed))


def train(  # noqa: PLR0917
    plan: Plan,
    work: Path,
    out: Path,
    seed: int,
    say: Callable[[str], None],
    start: Path | None = None,
) -> None:
    """Run the whole course on torch's default device; ``work`` keeps the pictures and snapshots.

    With ``start``, a checkpoint's folder, its tokenizer and weights are trained further: whoever
    sees already is spared the simple pictures.
    """
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    from qwen2vl_serve.demo.network import Geometry, Network  # noqa: PLC0415
    from qwen2vl_serve.demo.rows import Encoder  # noqa: PLC0415
    from qwen2vl_serve.demo.see import (  # noqa: PLC0415
        CROWDED,
        SIMPLE,
        Heads,
        learn_to_see,
        settle,
        whiten,
    )
    from qwen2vl_serve.demo.speak import learn_to_speak  # noqa: PLC0415
    from qwen2vl_serve.demo.steps import Schedule  # noqa: PLC0415
    from qwen2vl_serve.demo.unsaid import told_apart  # noqa: PLC0415  (as all above: torch)

    workers = os.cpu_count() or 1
    amounts = {"pictures": plan.pictures, "videos": plan.videos, "crowds": plan.crowds}
    stores = {}
    for name, amount in amounts.items():
        say(f"{amount} {name} with {workers} processes")
        stores[name] = build_store(work / "store", name, amount, plan.first_seed, workers)
    tokenizer = AutoTokenizer.from_pretrained(start) if start else tokenizer_of(plan, seed)
    torch.manual_seed(seed)
    network = Network(Geometry())
    heads = Heads(network.geometry.hidden)
    say(" ".join(f"{name}: {value}" for name, value in network.describe().items()))
    begun_with: dict[str, torch.Tensor] = {}
    if start:
        weights = load_file(start / "model.safetensors", str(torch.get_default_device()))
        begun_with = {name: value.float() for name, value in weights.items()}
        network.load_state_dict(begun_with)
    else:
        stores["simple"] = stores["pictures"].simple()
        whiten(network, stores["pictures"], seed)
        simple = Schedule(400, plan.simple_batch, plan.see_rate, warm=40, until=plan.simple_steps)
        learn_to_see(network, heads, stores, SIMPLE, work / "simple.pt", simple, seed, say)
    crowded = Schedule(plan.crowded_steps, plan.crowded_batch, plan.see_rate)
    learn_to_see(network, heads, stores, CROWDED, work / "crowded.pt", crowded, seed + 1, say)
    if not start:
        # A second descent from the full rate, for letters and numbers.
        again = Schedule(plan.again_steps, plan.crowded_batch, plan.see_rate)
        learn_to_see(network, heads, stores, CROWDED, work / "again.pt", again, seed + 2, say)
    if plan.crowded_steps:
        settle(network, stores["pictures"])
    encoder = Encoder(tokenizer)
    # Looked at once and spoken about often; the last lesson meets all of them.
    some = {
        "pictures": stores["pictures"].first(plan.looked_at),
        "videos": stores["videos"].first(plan.watched),
    }
    speak = Schedule(plan.speak_steps, plan.speak_batch, plan.speak_rate)
    learn_to_speak(
        network, heads, encoder, some, work / "speak.pt", speak, seed + 3, say, awake=False
    )
    both = Schedule(plan.both_steps, plan.speak_batch, plan.both_rate)
    learn_to_speak(
        network, heads, encoder, stores, work / "both.pt", both, seed + 4, say, awake=True
    )
    state = network.state_dict()
    # A mean keeps what a short round unlearns, and most of what it teaches.
    for name, value in begun_with.items():
        state[name].lerp_(value, plan.kept)
    embeddings = "model.embed_tokens.weight"
    state[embeddings] = told_apart(state[embeddings], tokenizer)
    write_checkpoint(out, network.geometry, tokenizer, state)
    say(f"checkpoint written to {out}")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qwen2vl_serve.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="checkpoint folder")
    parser.add_argument(
        "--work", type=Path, default=Path("demo-training"), help="pictures and snapshots (9 GB)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--further", type=Path, metavar="FOLDER", help="train this checkpoint further instead"
    )
    parser.add_argument(
        "--round", type=int, choices=range(1, len(FURTHER) + 1), default=1,
        help="of those that train further",
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="a few steps, to try the script")
    options = parser.parse_args(arguments)
    import torch  # noqa: PLC0415  (--help needs none)

    from qwen2vl_serve.demo.steps import keep_memory  # noqa: PLC0415  (as torch)

    begin = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - begin:6.0f} s  {line}\n")

    plan = FURTHER[options.round - 1] if options.further else Plan()
    keep_memory()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        train(
            REHEARSAL if options.rehearse else plan, options.work, options.out, options.seed, say,
            options.further,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
