"""The reference: transformers' model with ``qwen_vl_utils``, greedy, in float32."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen2vl_serve.torchvision_ops import declare_missing_operators
from tests.reference_prompts import Clip, Part, Picture, Prompt

Resizer = Literal["qwen_vl_utils", "processor"]
"""Who brings pictures to the model's size: Pillow in one, torchvision in the other.

Their bicubic results differ by at most one level of 255, in about 0.14 % of the values.
"""


@dataclass(frozen=True)
class Answer:
    """A greedy answer: ``prefixes[k]`` is the text of the first k tokens, without the end token.

    ``margins[k]`` is the log-probability by which the token after them won over the second.
    """

    prefixes: tuple[str, ...]
    margins: tuple[float, ...]

    @property
    def text(self) -> str:
        return self.prefixes[-1]

    def agreement(self, text: str) -> int | None:
        """Return the index of the token at which ``text`` departs; None when it never does.

        An unfinished character at the cut is not a difference. Within a character of several
        tokens the departure cannot be told from the text: it is put where it was likeliest.
        """
        if whole(self.text) == whole(text):
            return None
        shared = [whole(p) for p in self.prefixes if text.startswith(whole(p))]
        first, last = shared.index(shared[-1]), min(len(shared), len(self.margins)) - 1
        return min(range(first, last + 1), key=self.margins.__getitem__)


class Reference:
    """A checkpoint on transformers; ``bounds`` are the pixel bounds of pictures and of frames."""

    def __init__(
        self, checkpoint: Path, *, pictures: tuple[int, int], frames: tuple[int, int]
    ) -> None:
        declare_missing_operators()
        self._torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        self._vision: Any = importlib.import_module("qwen_vl_utils")
        self._processor = transformers.AutoProcessor.from_pretrained(checkpoint)
        self._model = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=self._torch.float32
        ).eval()
        self._pictures, self._frames = pictures, frames

    def answer(self, prompt: Prompt, max_tokens: int, resizer: Resizer = "qwen_vl_utils") -> Answer:
        """Generate at most ``max_tokens`` greedily."""
        inputs = self._inputs(prompt, resizer)
        with self._torch.inference_mode():
            made = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        best = self._torch.cat(made.logits).log_softmax(-1).topk(2).values
        ends = set(self._model.generation_config.eos_token_id)
        spoken = tokens[:-1] if tokens[-1] in ends else tokens
        return Answer(
            prefixes=tuple(self._decode(spoken[:k]) for k in range(len(spoken) + 1)),
            margins=tuple((best[:, 0] - best[:, 1]).tolist()),
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._processor.tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def _inputs(self, prompt: Prompt, resizer: Resizer) -> Any:
        messages = prompt.messages(self._part)
        text = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        options: dict[str, Any] = {"do_sample_frames": False}
        if resizer == "qwen_vl_utils":
            images, clips, options = self._vision.process_vision_info(
                messages, return_video_kwargs=True, return_video_metadata=True
            )
        else:
            images, clips = _media(prompt)
        if clips:
            options["videos"] = [frames for frames, _ in clips]
            options["video_metadata"] = [metadata for _, metadata in clips]
        return self._processor(
            text=[text], images=images, return_tensors="pt", **(options if clips else {})
        )

    def _part(self, part: Part) -> dict[str, Any]:
        match part:
            case str():
                return {"type": "text", "text": part}
            case Picture():
                least, most = self._pictures
                return {
                    "type": "image",
                    "image": part.open(),
                    "min_pixels": least,
                    "max_pixels": most,
                }
            case Clip():
                least, most = self._frames
                return {
                    "type": "video",
                    "video": [frame.open() for frame in part.frames],
                    "sample_fps": part.fps,
                    "min_pixels": least,
                    "max_pixels": most,
                }


def whole(text: str) -> str:
    """Drop the characters at the end that a cut between bytes left unfinished."""
    return text.rstrip("\ufffd")


def _media(prompt: Prompt) -> tuple[list[Any] | None, list[tuple[Any, dict[str, Any]]]]:
    """Pictures, and frames with their metadata, as they were sent: the processor resizes them."""
    vision: Any = importlib.import_module("qwen_vl_utils.vision_process")
    images: list[Any] = []
    clips: list[tuple[Any, dict[str, Any]]] = []
    for _, content in prompt.turns:
        for part in content if isinstance(content, tuple) else ():
            if isinstance(part, Picture):
                images.append(vision.to_rgb(part.open()))
            elif isinstance(part, Clip):
                frames = np.stack([np.asarray(frame.open()) for frame in part.frames])
                count = len(frames)
                clips.append((frames, {"total_num_frames": count, "fps": part.fps}))
    return images or None, clips
