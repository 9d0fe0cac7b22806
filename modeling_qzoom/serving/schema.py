"""The request of `/v1/chat/completions`: OpenAI's fields that this server obeys, and its `zoom` object."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..messages_qzoom import close_miss, shown
from .errors import BAD_REQUEST, RequestFailed, failed


# fields of OpenAI's API without an effect here, and the values that ask for none
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


def _as_parts(content: Any) -> Any:
    """A text as the list of parts that it stands for."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """A null asks for nothing; clients send them for what they do not set."""
        if not isinstance(values, dict):
            return values
        known = set(cls.model_fields)
        return {name: value for name, value in values.items() if value is not None or name in known}


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """Where an image is: a data URL, or an address at a host that the server admits."""

    url: str = Field(min_length=1)
    detail: Literal["auto"] | None = None


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(_Strict):
    """What holds for the whole chat."""

    role: Literal["system", "developer"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]


class UserMessage(_Strict):
    """A turn of the user."""

    role: Literal["user"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)] = Field(min_length=1)


class AssistantMessage(_Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """What a stream holds besides words."""

    include_usage: bool = False


class ZoomObject(_Strict):
    """What the request says about zooming; the options are those of `generate`, checked by the library."""

    zoom: Any = Field(None, description='"auto", "always" or "never"')
    effort: Any = Field(None, description="a preset of the checkpoint")
    gate_threshold: Any = Field(None, description="gate probability from which on a row zooms")
    region_threshold: Any = Field(None, description="heat-map value above which a cell belongs to the region")
    region_threshold_mode: Any = Field(None, description='"absolute" or "peak"')
    crop_min_tokens: Any = Field(None, description="smallest crop, in merged visual tokens")
    crop_max_tokens: Any = Field(None, description="largest crop")
    position_alignment: Any = Field(None, description='"continuous" or "sequential"')
    min_tokens: Any = Field(None, description="smallest coarse view")
    max_tokens: Any = Field(None, description="largest coarse view")
    report: bool = Field(False, description="adds `zoom_reports` to the answer, one for each choice")
    overlay: bool = Field(False, description="adds a picture of heat map and box to the reports, as a PNG data URL")


class ChatRequest(_Strict):
    """A chat to go on with."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    n: int = Field(1, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_as_list)] | None = Field(None, max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="whose request it is; of no effect")
    metadata: dict[str, str] | None = Field(None, description="notes of the caller; of no effect")
    zoom: ZoomObject = ZoomObject()

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults = ("n", "stream", "zoom")  # where null stands for the default
        values = {name: value for name, value in values.items() if value is not None or name not in defaults}
        for name, allowed in _NEUTRAL.items():
            if name in values and values.pop(name) not in (None, *allowed):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return values


def parse_request(body: bytes) -> ChatRequest:
    """A request from its JSON text.

    Raises:
        RequestFailed: 400; names the field and what is wrong with it.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _as_failure(error) from None


def _is_tag(step: int | str, before: int | str | None) -> bool:
    return isinstance(step, str) and isinstance(before, int)


def _as_failure(error: ValidationError) -> RequestFailed:
    """The first of pydantic's findings as one sentence."""
    found = error.errors(include_url=False, include_context=False)[0]
    steps = found["loc"]
    # behind an index stands the tag of a union, which is no part of the path that the caller wrote
    path = ".".join(str(step) for step, before in zip(steps, (None, *steps)) if not _is_tag(step, before))
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        name = str(found["loc"][-1])
        known = ZoomObject.model_fields if found["loc"][:1] == ("zoom",) else ChatRequest.model_fields
        meant = close_miss(name, known)
        message = "there is no such field" + (f"; did you mean {meant}?" if meant else "")
    elif isinstance(found["input"], str | int | float | bool) and found["type"] != "json_invalid":
        message = f"{message}, got {shown(found['input'])}"
    return failed(BAD_REQUEST, f"{path}: {message}." if path else f"{message}.", param=path or None)
