"""The training network and the packed rows are transformers' Qwen2-VL, to the last logit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_serve.demo.checkpoint import FRAME_PIXELS, IMAGE_PIXELS, MODEL_FOLDER
from qwen2vl_serve.demo.compose import draw_picture, draw_video
from qwen2vl_serve.demo.network import Geometry, Network
from qwen2vl_serve.demo.pictures import CELL, resized, scaled
from qwen2vl_serve.demo.rows import Encoder, Media, Row, pack
from qwen2vl_serve.demo.wording import Dialogue, Turn
from qwen2vl_serve.torchvision_ops import declare_missing_operators

DEFAULT = "You are a helpful assistant."


@pytest.fixture(scope="module")
def reference():
    """transformers' model and processor on the shipped checkpoint, and our network."""
    declare_missing_operators()
    from safetensors.torch import load_file
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(MODEL_FOLDER)
    network = Network(Geometry())
    weights = load_file(MODEL_FOLDER / "model.safetensors")
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval(), processor, network.eval(), Encoder(processor.tokenizer)


def test_a_grid_first_met_in_inference_mode_can_be_learnt_from():
    """Its angles are kept for all later calls."""
    network = Network(Geometry())
    picture = torch.zeros(1, 1, 3, 3 * CELL, 19 * CELL, dtype=torch.uint8)  # no other test's grid
    with torch.inference_mode():
        network.visual(picture)
    network.visual(picture).sum().backward()


def through_the_processor(model, processor, messages, **media):
    """Logits [length, vocab] and ids of one conversation."""
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], return_tensors="pt", **media)
    with torch.no_grad():
        return model(**inputs).logits[0], inputs["input_ids"][0]


def our_logits(network, packed, frames):
    """Logits [rows, length, vocab] with the frames [n, 1 or 2, 3, h, w] as the media."""
    with torch.no_grad():
        embeds = network.model.embed_tokens(packed.ids)
        flat = embeds.reshape(-1, embeds.shape[-1]).clone()
        at = 0
        tokens = [network.visual(f[None]) for f in frames]
        for medium, source in zip(packed.media, packed.sources, strict=True):
            flat[source] = torch.cat(tokens[at : at + medium.frames]).flatten(0, 1)
            at += medium.frames
        states = network.hidden_states(flat.view(embeds.shape), packed.positions, packed.mask)
        return network.logits(states)


def test_a_branch_equals_the_same_conversation_alone(reference):
    """Several dialogues packed behind one picture get the logits each would get by itself."""
    model, processor, network, encoder = reference
    picture, _ = draw_picture(70_000_001)
    rows, columns = resized(picture.shape[1], picture.shape[0], IMAGE_PIXELS)
    # The processor's resize is torchvision's; give both sides the same pixels.
    small = scaled(picture, IMAGE_PIXELS)
    image = Image.fromarray(np.ascontiguousarray(small.transpose(1, 2, 0)))
    dialogues = [
        Dialogue("colour", "en", (Turn("What colour is it?", "The circle is red."),)),
        Dialogue("f", "zh", (Turn("它是什么形状？", "这是圆形。"), Turn("颜色呢？", "红色。"))),
    ]
    row = Row()
    row.text(encoder.opening(DEFAULT))
    row.medium(encoder, Media(0, 1, rows, columns, video=False))
    row.seal()
    for dialogue in dialogues:
        row.begin()
        row.dialogue(encoder, dialogue)
    packed = pack([row], encoder.pad)
    ours = our_logits(network, packed, [torch.from_numpy(small)[None]])[0]
    branch = np.array(row.branch)
    for number, dialogue in enumerate(dialogues, start=1):
        messages = []
        for n, turn in enumerate(dialogue.turns):
            media = [{"type": "image"}] if n == 0 else []
            content = [*media, {"type": "text", "text": turn.question}]
            messages += [{"role": "user", "content": content},
                         {"role": "assistant", "content": turn.answer}]  # fmt: skip
        theirs, ids = through_the_processor(model, processor, messages, images=[image])
        places = np.flatnonzero((branch == 0) | (branch == number))
        assert ids[: len(places)].tolist() == packed.ids[0, places].tolist()
        torch.testing.assert_close(ours[places], theirs[: len(places)], atol=2e-3, rtol=1e-3)


def test_a_video_equals_the_processors(reference):
    """Frame pairs and their temporal positions follow Qwen2-VL's video path."""
    model, processor, network, encoder = reference
    frames, _ = draw_video(70_000_003)
    small = np.stack([scaled(f, FRAME_PIXELS) for f in frames[:4]])
    row = Row()
    row.text(encoder.opening(DEFAULT))
    grid = (small.shape[2] // CELL, small.shape[3] // CELL)
    row.medium(encoder, Media(0, 2, *grid, video=True))
    row.seal()
    row.begin()
    row.dialogue(encoder, Dialogue("m", "en", (Turn("What moves?", "The circle."),)))
    packed = pack([row], encoder.pad)
    ours = our_logits(network, packed, list(torch.from_numpy(small).unflatten(0, (2, 2))))[0]
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]},
        {"role": "assistant", "content": "The circle."},
    ]
    theirs, ids = through_the_processor(
        model, processor, messages, videos=[torch.from_numpy(small)], do_sample_frames=False
    )
    size = len(row.ids)
    assert ids[:size].tolist() == packed.ids[0, :size].tolist()
    torch.testing.assert_close(ours[:size], theirs[:size], atol=2e-3, rtol=1e-3)


def test_the_checkpoint_is_small_and_splits_over_eight_workers():
    """At most 16 MB in all; heads divide by 4 (tensor parallel), layers by 2 (pipeline)."""
    import json

    total = sum(f.stat().st_size for f in Path(MODEL_FOLDER).iterdir())
    assert total <= 16_000_000
    config = json.loads((MODEL_FOLDER / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert text["num_attention_heads"] % 4 == 0
    assert text["num_key_value_heads"] % 4 == 0
    assert text["intermediate_size"] % 4 == 0
    assert text["num_hidden_layers"] % 2 == 0
    assert vision["num_heads"] % 4 == 0
    assert text["max_position_embeddings"] >= 8192
