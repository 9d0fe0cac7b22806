"""What the server is asked, and what `generate` alone answers."""

import base64
import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import Session, open_session
from modeling_qzoom.data.drawn.rows import drawn_rows


NEW_TOKENS = 12
# options that requests mix: some zoom, some do not, some have a budget of their own
OPTIONS: tuple[dict[str, Any], ...] = ({}, {}, {"zoom": "never"}, {"zoom": "always", "crop_max_tokens": 64})


@dataclass(frozen=True)
class Asked:
    """One request and the answer that it must get.

    Attributes:
        body: JSON of the request.
        expected: the answer of `generate` to it alone; None where it was not asked for.
    """

    body: dict[str, Any]
    expected: str | None = None


def data_url(image: Image.Image) -> str:
    """An image inside a URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def body_of(model: str, question: str, url: str | None, **fields: Any) -> dict[str, Any]:
    """A request with one question and at most one image."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if url is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": NEW_TOKENS, **fields}


def alone(session: Session, question: str, url: str | None, options: dict[str, Any]) -> str:
    """The answer of `generate` to one question by itself."""
    processor = session.processor
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if url is not None:
        content.insert(0, {"type": "image"})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=None if url is None else [[url]], text=[text])
    output = session.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, **options)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def mixed_questions(model: Path, count: int, side: int | None = None) -> list[Asked]:
    """Requests about drawn pages, one in ten without a page, with the answers of the model in 32 bit.

    Args:
        model: folder of the checkpoint.
        count: number of requests, each of its own.
        side: longest side of the pages in pixels; as drawn by default.
    """
    session = open_session(ModelConfig(model=str(model), dtype="float32"), device="cpu")
    rng, asked = random.Random(0), []
    for number, row in enumerate(drawn_rows("test", count, 5)):
        image = row.load_image()
        if side is not None:
            image.thumbnail((side, side))
        url = None if number % 10 == 9 else data_url(image)
        options = OPTIONS[number % len(OPTIONS)]
        body = body_of(model.name, row.question, url, temperature=0, zoom=options)
        asked.append(Asked(body, alone(session, row.question, url, options)))
    rng.shuffle(asked)
    return asked
