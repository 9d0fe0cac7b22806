"""From a request of OpenAI's API to a prompt: limits checked, images read."""

import asyncio
from typing import Any

from ..messages_qzoom import shown
from ..processing_reading_qzoom import UnusableImage, decode_text
from ..zoom_options_qzoom import OPTION_NAMES, check_order, check_tokens
from .config import ServeConfig
from .errors import BAD_REQUEST, NOT_FOUND, failed
from .events import Prompt, Sampling
from .fetching import GuardedTransport, fetch_image
from .schema import ChatRequest, ImagePart, Message, ZoomObject


_BUDGET = ("min_tokens", "max_tokens")


def read_image(url: str, config: ServeConfig, place: str) -> bytes:
    """The encoded image that a URL holds or leads to.

    Args:
        url: a data URL, or an http(s) address at one of `config.image_hosts`.
        config: limits.
        place: path of the field, for the error.

    Raises:
        RequestFailed: 400; the URL is of another kind, or the image cannot be had.
    """
    scheme = url[:8].partition(":")[0].lower()
    try:
        if scheme == "data":
            return decode_text(url, config.max_pixels)[1]
        if scheme not in ("http", "https"):
            raise UnusableImage(f"{shown(url)} is neither a data URL (data:image/png;base64,…) nor an http(s) address")
        transport = GuardedTransport(config.image_hosts)
        return fetch_image(url, int(config.image_mib * 2**20), config.image_seconds, transport).getvalue()
    except UnusableImage as error:
        raise failed(BAD_REQUEST, f"{place}: {error}.", param=place) from None


def _check_limits(request: ChatRequest, config: ServeConfig) -> None:
    """Checks what a request asks for against what the server grants."""
    if request.model != config.name:
        raise failed(
            NOT_FOUND,
            f"there is no model {shown(request.model)} here; the model of this server is {config.name!r}.",
            param="model",
            code="model_not_found",
        )
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise failed(BAD_REQUEST, "max_tokens and max_completion_tokens are two names of one limit; pass one of them.")
    if request.stream_options is not None and not request.stream:
        raise failed(BAD_REQUEST, "stream_options belong to streams; set stream=true, or leave them out.")
    if request.messages[-1].role != "user":
        raise failed(BAD_REQUEST, "the last message must be the user's: there is nothing else to answer.")
    if request.stop is not None and not all(request.stop):
        raise failed(BAD_REQUEST, "stop holds an empty text, at which every answer would end.", param="stop")
    images = sum(isinstance(part, ImagePart) for message in request.messages for part in message.content)
    asked = {
        "max_tokens": (request.max_tokens or request.max_completion_tokens or 0, config.max_new_tokens),
        "n": (request.n, config.max_choices),
        "messages": (len(request.messages), config.max_messages),
        "images": (images, config.max_images),
    }
    for name, (count, limit) in asked.items():
        if count > limit:
            raise failed(BAD_REQUEST, f"{name}: {count} is more than this server grants ({limit}).", param=name)
    if request.n > config.batch_rows:
        raise failed(BAD_REQUEST, f"n: {request.n} is more than one batch holds ({config.batch_rows}).", param="n")


def _budgets(zoom: ZoomObject, config: ServeConfig) -> dict[str, int]:
    """The bounds of the coarse view that a request sets; all its budgets are checked against the server's limit.

    Raises:
        InputError: no positive whole number, or bounds that cross.
        RequestFailed: more than the server grants.
    """
    for name in (*_BUDGET, "crop_min_tokens", "crop_max_tokens"):
        value = getattr(zoom, name)
        check_tokens(f"zoom.{name}", value)
        if value is not None and value > config.max_visual_tokens:
            raise failed(
                BAD_REQUEST,
                f"zoom.{name}: {shown(value)} tokens are more than this server grants ({config.max_visual_tokens}).",
                param=f"zoom.{name}",
            )
    check_order(("zoom.min_tokens", "zoom.max_tokens"), zoom.min_tokens, zoom.max_tokens)
    return {name: getattr(zoom, name) for name in _BUDGET if getattr(zoom, name) is not None}


async def _parts(message: Message, config: ServeConfig, place: str) -> list[dict[str, Any]]:
    """The parts of a message, images read side by side."""

    async def part(index: int) -> dict[str, Any]:
        entry = message.content[index]
        if not isinstance(entry, ImagePart):
            return {"type": "text", "text": entry.text}
        field = f"{place}.content.{index}.image_url.url"
        return {"type": "image", "image": await asyncio.to_thread(read_image, entry.image_url.url, config, field)}

    return list(await asyncio.gather(*(part(index) for index in range(len(message.content)))))


async def to_prompt(request: ChatRequest, config: ServeConfig) -> Prompt:
    """A request as the engine takes it.

    Args:
        request: as the caller wrote it.
        config: limits, and from where images may be fetched.

    Raises:
        RequestFailed: 400 or 404; names the field.
        InputError: a budget that is no positive whole number.
    """
    _check_limits(request, config)
    budget = _budgets(request.zoom, config)
    zoom = {name: getattr(request.zoom, name) for name in (*OPTION_NAMES, "effort")}
    parts = [await _parts(message, config, f"messages.{index}") for index, message in enumerate(request.messages)]
    roles = ["system" if message.role == "developer" else message.role for message in request.messages]
    return Prompt(
        messages=[{"role": role, "content": content} for role, content in zip(roles, parts, strict=True)],
        choices=request.n,
        max_new_tokens=request.max_tokens or request.max_completion_tokens,
        stop=tuple(request.stop or ()),
        sampling=Sampling(request.temperature, request.top_p, request.seed),
        zoom={name: value for name, value in zoom.items() if value is not None},
        budget=budget,
        report=request.zoom.report or request.zoom.overlay,
        overlay=request.zoom.overlay,
        stream=request.stream,
    )
