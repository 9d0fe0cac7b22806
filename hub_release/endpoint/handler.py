"""Answers requests of a hosted endpoint with the model beside this file; needs torch, transformers and pillow only.

    {"inputs": {"question": "what is written there?", "image": "data:image/png;base64,…"},
     "parameters": {"max_new_tokens": 64, "zoom": "always", "report": true}}

`inputs` may also be a text, or `{"messages": […]}` in the form of OpenAI's API; `images` stands for several. Images
are data URLs or base64 text: nothing is fetched, and no file is read. What cannot be answered raises a `ValueError`,
whose sentence the caller gets.
"""

import base64
import binascii
import io
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


NEW_TOKENS, MOST_NEW_TOKENS = 128, 4096
# parameters of `generate` that a request may set, beside the zoom options
DECODING = {"max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}
ZOOMING = {
    *("zoom", "effort", "gate_threshold", "region_threshold", "region_threshold_mode"),
    *("crop_min_tokens", "crop_max_tokens", "position_alignment"),
}
BUDGET = {"min_tokens", "max_tokens"}
REPORTING = {"report", "overlay"}


def _image(value: Any) -> bytes:
    """The bytes of an image.

    Raises:
        ValueError: neither a data URL nor base64 text.
    """
    if not isinstance(value, str):
        raise ValueError(f"an image must be a data URL or base64 text, got a {type(value).__name__}.")
    payload = value.partition(",")[2] if value[:5].lower() == "data:" else value
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            f"an image must be a data URL or base64 text, got {value[:40]!r}; addresses and paths are not followed."
        ) from None


def _part(part: Any) -> dict[str, Any]:
    """A part of a message as the chat template takes it, images as bytes."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": _image(url.get("url") if isinstance(url, dict) else url)}
    if kind == "image":
        return {"type": "image", "image": _image(part.get("image"))}
    raise ValueError(f"a part of a message must be of type text, image_url or image, got {part!r:.80}.")


def _placeholder(part: dict[str, Any]) -> dict[str, Any]:
    """A part without its image, which the chat template only has to know of."""
    return {"type": "image"} if part["type"] == "image" else part


def _messages(inputs: Any) -> list[dict[str, Any]]:
    """The chat that a request asks to go on with.

    Raises:
        ValueError: it has none of the known forms.
    """
    if isinstance(inputs, dict) and "messages" in inputs:
        messages = inputs["messages"]
        is_chat = isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)
        if not is_chat or set(inputs) != {"messages"}:
            raise ValueError("inputs.messages must be a list of messages, and nothing may stand beside it.")
        return [
            {
                "role": message.get("role"),
                "content": [_part(part) for part in _listed(message.get("content", []))],
            }
            for message in messages
        ]
    fields = {"question": inputs} if isinstance(inputs, str) else inputs
    if not isinstance(fields, dict) or not isinstance(fields.get("question"), str):
        raise ValueError("inputs must be a text, an object with a question, or an object with messages.")
    if unknown := sorted(set(fields) - {"question", "image", "images"}):
        raise ValueError(f"inputs holds {unknown}; it may hold question, image and images.")
    images = [*_listed(fields.get("image")), *_listed(fields.get("images"))]
    content = [{"type": "image", "image": _image(image)} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": fields["question"]}]}]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _parameters(parameters: Any) -> dict[str, Any]:
    """The parameters of a request, checked.

    Raises:
        ValueError: an unknown name, or an answer that is too long.
    """
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError("parameters must be an object.")
    known = DECODING | ZOOMING | BUDGET | REPORTING
    if unknown := sorted(set(parameters or {}) - known):
        raise ValueError(f"parameters holds {unknown}; it may hold {sorted(known)}.")
    given = {name: value for name, value in (parameters or {}).items() if value is not None}
    length = given.setdefault("max_new_tokens", NEW_TOKENS)
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= MOST_NEW_TOKENS:
        raise ValueError(f"max_new_tokens must be a whole number from 1 to {MOST_NEW_TOKENS}, got {length!r:.40}.")
    return given


class EndpointHandler:
    """The model of a repository behind a hosted endpoint.

    Args:
        path: folder of the repository.
    """

    def __init__(self, path: str = "") -> None:
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype="auto").eval()
        if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
            model = model.to("cuda")
        self.model = model

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Answers one request.

        Returns:
            One object with `generated_text`, and `zoom_report` where `report` or `overlay` is set.

        Raises:
            ValueError: the request is malformed; the sentence says what and how.
        """
        parameters = _parameters(data.get("parameters"))
        messages = _messages(data.get("inputs"))
        inputs = self._encode(messages, {name: parameters[name] for name in BUDGET & set(parameters)})
        options = {name: parameters[name] for name in (DECODING | ZOOMING) & set(parameters)}
        output = self.model.generate(**inputs, **{"do_sample": False, **options}, return_zoom_reports=True)
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        answer = {"generated_text": self.processor.decode(new, skip_special_tokens=True)}
        if parameters.get("report") or parameters.get("overlay"):
            report = output.zoom_reports[0]
            answer["zoom_report"] = report.to_dict()
            if parameters.get("overlay") and "source_images" in inputs:
                picture = io.BytesIO()
                report.overlay(inputs["source_images"][report.image_index or 0]).save(picture, "PNG")
                answer["zoom_report"]["overlay"] = base64.b64encode(picture.getvalue()).decode()
        return [answer]

    def _encode(self, messages: list[dict[str, Any]], budget: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs, on its device and in its type."""
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        shown = [{**message, "content": [_placeholder(part) for part in message["content"]]} for message in messages]
        text = self.processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(images=[images] if images else None, text=[text], **budget).to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return dict(inputs)
