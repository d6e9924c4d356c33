"""The uses without a server: what the tutorials do with transformers and ``qwen_vl_utils``.

For those uses that they show so. Counted by ``test_uses_docs.py``, and run there on the demo model.
Every function is whole, imports and model included, with no system prompt and no sampling, as
theirs; a card takes ``device_map="auto"`` in the call that loads, and no line more.
"""

# ruff: noqa: PTH123  (each function holds all that it needs, in the tutorials' words)

from __future__ import annotations

MODEL = "Qwen/Qwen2-VL-2B-Instruct"


def ocr(path: str) -> None:
    from qwen_vl_utils import process_vision_info
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype="auto")
    processor = AutoProcessor.from_pretrained(MODEL)
    content = [
        {"type": "image", "image": path},
        {"type": "text", "text": "Read all the text in the picture."},
    ]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(messages)
    inputs = processor(text=[text], images=images, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=1024)[:, inputs.input_ids.shape[1] :]
    print(processor.batch_decode(made, skip_special_tokens=True)[0])


def extract_fields(path: str) -> None:
    from pydantic import BaseModel
    from qwen_vl_utils import process_vision_info
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    class Receipt(BaseModel):
        shop: str
        date: str | None = None
        total: float

    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype="auto")
    processor = AutoProcessor.from_pretrained(MODEL)
    content = [
        {"type": "image", "image": path},
        {"type": "text", "text": "Return JSON with shop, date, total."},
    ]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(messages)
    inputs = processor(text=[text], images=images, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=1024)[:, inputs.input_ids.shape[1] :]
    said = processor.batch_decode(made, skip_special_tokens=True)[0]
    receipt = Receipt.model_validate_json(said.removeprefix("```json").removesuffix("```"))
    print(receipt.shop, receipt.total)


def locate(path: str) -> None:
    import re

    from PIL import Image
    from qwen_vl_utils import process_vision_info
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype="auto")
    processor = AutoProcessor.from_pretrained(MODEL)
    content = [
        {"type": "image", "image": path},
        {"type": "text", "text": "Output the bounding box coordinates of the yellow star."},
    ]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(messages)
    inputs = processor(text=[text], images=images, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=1024)[:, inputs.input_ids.shape[1] :]
    said = processor.batch_decode(made, skip_special_tokens=False)[0]
    width, height = Image.open(path).size
    pattern = r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>"
    pattern += r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>"
    for label, left, top, right, bottom in re.findall(pattern, said):
        xs = [round(int(x) * width / 1000) for x in (left, right)]
        ys = [round(int(y) * height / 1000) for y in (top, bottom)]
        print(label, xs[0], ys[0], xs[1], ys[1])


def compare(first: str, second: str) -> None:
    from qwen_vl_utils import process_vision_info
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype="auto")
    processor = AutoProcessor.from_pretrained(MODEL)
    content = [{"type": "image", "image": path} for path in (first, second)]
    content.append({"type": "text", "text": "What is the difference between the two pictures?"})
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(messages)
    inputs = processor(text=[text], images=images, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=1024)[:, inputs.input_ids.shape[1] :]
    print(processor.batch_decode(made, skip_special_tokens=True)[0])


def describe_video(path: str) -> None:
    from qwen_vl_utils import process_vision_info
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype="auto")
    processor = AutoProcessor.from_pretrained(MODEL)
    video = {"type": "video", "video": path, "max_pixels": 360 * 420, "fps": 1.0}
    content = [video, {"type": "text", "text": "Describe the video."}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _, videos = process_vision_info(messages)
    inputs = processor(text=[text], videos=videos, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=1024)[:, inputs.input_ids.shape[1] :]
    print(processor.batch_decode(made, skip_special_tokens=True)[0])


def batch(folder: str) -> None:
    import json
    from pathlib import Path

    from qwen_vl_utils import process_vision_info
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype="auto")
    processor = AutoProcessor.from_pretrained(MODEL, padding_side="left")
    paths = sorted(Path(folder).glob("*.png"))
    with open("texts.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, len(paths), 8):
            some = paths[start : start + 8]
            question = {"type": "text", "text": "Read all the text in the picture."}
            chats = [
                [{"role": "user", "content": [{"type": "image", "image": str(path)}, question]}]
                for path in some
            ]
            texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            images, _ = process_vision_info(chats)
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
            inputs = inputs.to(model.device)
            made = model.generate(**inputs, max_new_tokens=1024)[:, inputs.input_ids.shape[1] :]
            said = processor.batch_decode(made, skip_special_tokens=True)
            for path, text in zip(some, said, strict=True):
                file.write(json.dumps({"id": path.name, "text": text}, ensure_ascii=False) + "\n")
                print(path.name, text)
