"""Train the demo model from nothing: ``python -m qwen2vl_serve.demo.train``.

Three stages, each resumed where it was interrupted: draw the pictures, learn to see, learn to
speak. The same seed gives the same model on the same machine and thread count.
"""

from __future__ import annotations

import argparse
import ctypes
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
    crowded_steps: int = 1_100
    crowded_batch: int = 48
    see_rate: float = 1.5e-3
    first_words: int = 400
    crowded_again: int = 2_000
    speak_steps: int = 600  # of a course laid out for 1300
    more_steps: int = 1_350
    speak_batch: int = 16
    speak_rate: float = 1.2e-3
    corpus: int = 40_000


REHEARSAL = Plan(
    pictures=192, videos=48, crowds=48, simple_steps=4, simple_batch=4,
    crowded_steps=10, crowded_batch=4, first_words=2, crowded_again=4,
    speak_steps=3,
    more_steps=2, speak_batch=2, corpus=600,
)  # fmt: skip


def keep_memory() -> None:
    """Let glibc keep what it freed: returning each large tensor to the kernel costs a third."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of <malloc.h>
        for option, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_max, 0)):
            libc.mallopt(option, value)


def tokenizer_of(plan: Plan, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer learnt from ``plan.corpus`` questions and answers."""
    from qwen2vl_serve.demo.corpus import corpus  # noqa: PLC0415
    from qwen2vl_serve.demo.tokenizer import train_tokenizer  # noqa: PLC0415

    return train_tokenizer(corpus(plan.corpus, seed))


def train(plan: Plan, work: Path, out: Path, seed: int, say: Callable[[str], None]) -> None:
    """Run the whole course; ``work`` keeps the drawn pictures and the snapshots."""
    import torch  # noqa: PLC0415

    from qwen2vl_serve.demo.network import Geometry, Network  # noqa: PLC0415
    from qwen2vl_serve.demo.rows import Encoder  # noqa: PLC0415
    from qwen2vl_serve.demo.see import CROWDED, SIMPLE, Heads, learn_to_see, whiten  # noqa: PLC0415
    from qwen2vl_serve.demo.speak import learn_to_speak  # noqa: PLC0415
    from qwen2vl_serve.demo.steps import Schedule  # noqa: PLC0415

    workers = os.cpu_count() or 1
    amounts = {"pictures": plan.pictures, "videos": plan.videos, "crowds": plan.crowds}
    stores = {}
    for name, amount in amounts.items():
        say(f"{amount} {name} with {workers} processes")
        stores[name] = build_store(work / "store", name, amount, plan.first_seed, workers)
    tokenizer = tokenizer_of(plan, seed)
    torch.manual_seed(seed)
    network = Network(Geometry())
    heads = Heads(network.geometry.hidden)
    say(" ".join(f"{name}: {value}" for name, value in network.describe().items()))
    stores["simple"] = stores["pictures"].simple()
    whiten(network, stores["pictures"], seed)
    simple = Schedule(400, plan.simple_batch, plan.see_rate, warm=40, until=plan.simple_steps)
    learn_to_see(network, heads, stores, SIMPLE, work / "simple.pt", simple, seed, say)
    crowded = Schedule(plan.crowded_steps, plan.crowded_batch, plan.see_rate)
    learn_to_see(network, heads, stores, CROWDED, work / "crowded.pt", crowded, seed + 1, say)
    encoder = Encoder(tokenizer)
    words = Schedule(2_600, plan.speak_batch, plan.speak_rate, until=plan.first_words)
    learn_to_speak(network, heads, encoder, stores, work / "words.pt", words, seed, say, eyes=True)
    # With words learnt, eyes are what is missing, and they learn thrice as fast on their own.
    again = Schedule(plan.crowded_again, plan.crowded_batch, plan.see_rate)
    learn_to_see(network, heads, stores, CROWDED, work / "again.pt", again, seed + 2, say)
    speak = Schedule(1_300, plan.speak_batch, plan.speak_rate, until=plan.speak_steps)
    learn_to_speak(
        network, heads, encoder, stores, work / "speak.pt", speak, seed + 3, say, eyes=False
    )
    more = Schedule(plan.more_steps, plan.speak_batch, plan.speak_rate * 0.65, warm=20)
    learn_to_speak(
        network, heads, encoder, stores, work / "more.pt", more, seed + 5, say, eyes=False
    )
    write_checkpoint(out, network.geometry, tokenizer, network.state_dict())
    say(f"checkpoint written to {out}")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qwen2vl_serve.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="checkpoint folder")
    parser.add_argument(
        "--work", type=Path, default=Path("demo-training"), help="pictures and snapshots (9 GB)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rehearse", action="store_true", help="a few steps, to try the script")
    options = parser.parse_args(arguments)
    begin = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - begin:6.0f} s  {line}\n")

    keep_memory()
    train(REHEARSAL if options.rehearse else Plan(), options.work, options.out, options.seed, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
