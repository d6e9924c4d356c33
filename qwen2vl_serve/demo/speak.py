"""Second lesson, to speak: questions and answers about what the tower sees.

The tower first rests, its tokens computed once; at the end it goes on learning, from the answers
and from the first lesson's pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor

from qwen2vl_serve.demo.conversation import Step
from qwen2vl_serve.demo.eyes import AtRest, Awake, Eyes
from qwen2vl_serve.demo.network import Network
from qwen2vl_serve.demo.pictures import Store
from qwen2vl_serve.demo.rows import Encoder, Packed
from qwen2vl_serve.demo.see import Heads, picture_batch, seen_loss
from qwen2vl_serve.demo.steps import Optimizers, Schedule, Snapshot, Together

# These heads of this layer are taught where to look for what is being said: left to the answers
# alone, the decoder long takes one thing for another. The layers below find out what is meant.
LOOKING_LAYER, LOOKING_HEADS = 2, (0, 2)
LOOKING_SHARE = 0.3
SEEING_SHARE = 0.5  # of the first lesson's loss, beside the answers', while the tower learns


def speak_loss(
    network: Network, eyes: Eyes, step: Step, packed: Packed
) -> tuple[Tensor, dict[str, float]]:
    """``answers_loss`` of a step's rows."""
    return answers_loss(network, eyes.look(step.shown), packed)


def answers_loss(
    network: Network, seen: list[Tensor], packed: Packed, unsaid: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Mean loss of the answers' tokens and of where they look; shares for the log.

    ``seen`` holds the tokens [tokens, hidden] of each picture of which the rows tell the index.
    ``unsaid`` are tokens that nobody would say in place of an answer's.
    """
    embeds = network.model.embed_tokens(packed.ids)
    shape = embeds.shape
    flat = embeds.reshape(-1, shape[-1])
    if packed.media:
        values = torch.cat([seen[medium.index] for medium in packed.media])
        flat = flat.index_copy(0, torch.cat(packed.sources), values.to(flat.dtype))
    weights: list[Tensor] = []
    states = network.hidden_states(flat.view(shape), packed.positions, packed.mask, weights)
    logits = network.logits(states.reshape(-1, shape[-1])[packed.asked]).float()
    if unsaid is not None:
        logits = logits.index_fill(-1, unsaid, -1e4)
    loss = F.cross_entropy(logits, packed.answers)
    log = {
        "token": float((logits.detach().argmax(-1) == packed.answers).float().mean()),
        "loss": float(loss.detach()),
    }
    if packed.looking.numel():
        row, said, seen_at = packed.looking
        shares = weights[LOOKING_LAYER][:, LOOKING_HEADS].float()
        found = shares.transpose(1, 2)[row, said, :, seen_at]
        looking = -(found + 1e-4).log().mean()
        log["looking"] = float(found.detach().mean())
        loss = loss + LOOKING_SHARE * looking
    return loss, log


def learn_to_speak(  # noqa: PLR0917
    network: Network,
    heads: Heads,
    encoder: Encoder,
    stores: dict[str, Store],
    path: Path,
    schedule: Schedule,
    seed: int,
    say: Callable[[str], None],
    *,
    awake: bool,
) -> None:
    """Train the decoder and, with ``awake``, the tower; resumes from the snapshot at ``path``."""
    modules = Together({"network": network, "heads": heads})
    trained = modules if awake else Together({"model": network.model})
    optimizer = Optimizers(trained, schedule.rate, slower=(network.visual, 0.5))
    snapshot = Snapshot(path, modules, optimizer)
    done = snapshot.restore()
    if done >= schedule.end:
        return
    shown = {name: stores[name] for name in ("pictures", "videos")}
    eyes: Eyes = Awake(network, shown) if awake else AtRest(network, shown)
    say("looking anew at each step" if awake else "every picture has been looked at")
    smooth: dict[str, float] = {}
    for number in range(done, schedule.end):
        schedule.apply(optimizer, number)
        rng = np.random.default_rng((seed, 2, number))
        step = Step(rng, stores, encoder, few_grids=awake)
        packed = step.rows(schedule.batch)
        loss, log = modules.in_working_type(partial(speak_loss, network, eyes, step, packed))
        if awake:
            crowded = number % 2 == 0
            store = stores["crowds" if crowded else "pictures"]
            batch, targets = picture_batch(store, schedule.batch, rng, crowded)
            more, also = modules.in_working_type(partial(seen_loss, network, heads, batch, targets))
            loss, log = loss + SEEING_SHARE * more, log | also
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        for name, value in log.items():
            smooth[name] = smooth.get(name, value) * 0.95 + value * 0.05
        if number % 25 == 24 or number == schedule.end - 1:
            text = " ".join(f"{name} {value:.4f}" for name, value in smooth.items())
            say(f"speak {number + 1}/{schedule.end} {text}")
        if number % 250 == 249 or number == schedule.end - 1:
            snapshot.save(number + 1)
