"""A server on a free port of this machine, and what is asked of it."""

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import uvicorn
from openai import OpenAI
from PIL import Image

from modeling_qzoom import QZoomProcessor
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import Session, open_session
from modeling_qzoom.data.drawn.rows import drawn_rows
from modeling_qzoom.serving.app import build_api
from modeling_qzoom.serving.config import ServeConfig
from modeling_qzoom.serving.worker import Worker
from tests.release_fixtures import DEMO


NAME = "qzoom-demo"
NEW_TOKENS = 12


@cache
def demo_session() -> Session:
    """The demo in 32 bit, in which a row's answer does not depend on its company."""
    return open_session(ModelConfig(model=str(DEMO), dtype="float32"), device="cpu")


def demo_config(**options: Any) -> ServeConfig:
    """Options of a server with the demo."""
    return ServeConfig(**{"model": str(DEMO), "max_new_tokens": 64, **options})


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """An application under uvicorn, in a thread; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def serving(**options: Any) -> Iterator[tuple[str, Worker]]:
    """A server with the demo; yields its address and the worker behind it."""
    config = demo_config(**options)
    session = demo_session()
    own = Session(session.model, QZoomProcessor.from_pretrained(DEMO), session.config)
    worker = Worker(own, config)
    with listening(build_api(config, worker)) as address:
        yield address, worker
    worker.queue.end()


def client(address: str, key: str = "none") -> OpenAI:
    """The official client, which tries nothing twice."""
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def data_url(image: Image.Image) -> str:
    """An image inside a URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question(text: str, *images: Image.Image | str) -> list[dict[str, Any]]:
    """One user turn about images."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@cache
def pages(count: int) -> list[tuple[Image.Image, str]]:
    """Drawn pages with a question each."""
    return [(row.load_image(), row.question) for row in drawn_rows("test", count, 3)]


def body(messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A request as JSON."""
    return {"model": NAME, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, **fields}


def alone(messages: list[tuple[str, Any]], images: list[Image.Image], **options: Any) -> tuple[str, Any]:
    """What `generate` answers to one chat by itself, and its report."""
    session = demo_session()
    model, processor = session.model, session.processor
    chat = [{"role": role, "content": content} for role, content in messages]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[images] if images else None, text=[text])
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, return_zoom_reports=True, pad_token_id=0, **options
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True), output.zoom_reports[0]
