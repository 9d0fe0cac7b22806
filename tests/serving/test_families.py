"""Every family behind the worker: rows in one batch get what `generate` gives each of them alone."""

import asyncio
import io

import pytest

from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.serving.config import ServeConfig
from modeling_qzoom.serving.events import Answered, Begun, Prompt
from modeling_qzoom.serving.worker import Worker
from tests.processing_fixtures import noise
from tests.tiny import FAMILIES
from tests.training.stage_fixtures import write_model


ZOOM = {"zoom": "always", "region_threshold": 0.5, "region_threshold_mode": "peak"}


def encoded(width: int, height: int, seed: int) -> bytes:
    buffer = io.BytesIO()
    noise(width, height, seed).save(buffer, "PNG")
    return buffer.getvalue()


def user(text: str, *images: bytes) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    between = [piece for part in parts for piece in (part, {"type": "text", "text": " and "})]
    return [{"role": "user", "content": [*between, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_one_batch_against_generate(family, tmp_path) -> None:
    name = write_model(tmp_path, family)
    session = open_session(ModelConfig(model=name), device="cpu")
    worker = Worker(session, ServeConfig(model=name, batch_rows=4, batch_wait=30))
    chats = [
        user("what?", encoded(120, 80, 1)),
        user("hello"),
        user("which one?", encoded(60, 90, 2), encoded(150, 70, 3)),
        user("and here?", encoded(64, 64, 4)),
    ]

    async def ask(messages):
        return [event async for event in worker.answer(Prompt(messages, zoom=ZOOM, max_new_tokens=6))]

    async def ask_all():
        return await asyncio.gather(*map(ask, chats))

    for messages, events in zip(chats, asyncio.run(ask_all()), strict=True):
        began, answered = events
        assert isinstance(began, Begun) and began.batch_rows == len(chats) and isinstance(answered, Answered)
        images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
        shown = [{**part, "image": None} if part["type"] == "image" else part for part in messages[0]["content"]]
        processor = session.processor
        text = processor.apply_chat_template(
            [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(images=[images] if images else None, text=[text])
        output = session.model.generate(
            **inputs, **ZOOM, do_sample=False, max_new_tokens=6, return_zoom_reports=True, pad_token_id=0
        )
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        assert answered.choices[0].text == processor.decode(new, skip_special_tokens=True)
        assert answered.crop_tokens == output.zoom_reports[0].crop_tokens
        assert (answered.crop_tokens > 0) == bool(images)
    worker.queue.end()
