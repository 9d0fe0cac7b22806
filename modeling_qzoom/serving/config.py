"""Options of the server; each is a flag of the command and a name under `args` of a Serve YAML."""

import os
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..asking.config import ModelConfig


class ModelOptions(BaseModel):
    """Which model answers, and how it is loaded."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1, description="folder or Hub name of a Q-Zoom checkpoint")
    name: str = Field("", description="name of the model in requests and answers; by default the end of its path")
    revision: str | None = Field(None, description="revision of the model on the Hub")
    dtype: str = Field("auto", description="auto (as stored), float32, bfloat16 or float16")
    attn_implementation: str | None = Field(None, description="sdpa, flash_attention_2, …; the library's choice")
    four_bit: bool = Field(False, description="load the backbone in 4 bit (nf4)")
    min_tokens: int | None = Field(None, ge=1, description="smallest coarse budget; the checkpoint's by default")
    max_tokens: int | None = Field(None, ge=1, description="largest coarse budget; the checkpoint's by default")

    @model_validator(mode="after")
    def _named(self) -> "ModelOptions":
        self.name = self.name or PurePosixPath(self.model.rstrip("/\\").replace("\\", "/")).name or self.model
        return self

    def as_model_config(self) -> ModelConfig:
        """The same as `open_session` takes it."""
        return ModelConfig(
            model=self.model,
            revision=self.revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            load_in_4bit=self.four_bit,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
        )


class BatchOptions(BaseModel):
    """How requests share a pass, and how many may wait."""

    batch_rows: int = Field(16, ge=1, description="most answers of one batch; those of `n` count each")
    batch_tokens: int = Field(65536, ge=1, description="most tokens of one batch, rows times the longest of them")
    batch_wait: float = Field(0.005, ge=0, description="seconds that a batch waits for others; tenfold for known ones")
    queue_rows: int = Field(64, ge=1, description="most answers that wait in a replica; beyond it 503 is answered")
    queue_mib: float = Field(4096.0, gt=0, description="most memory of prompts that wait in a replica, in MiB")
    request_seconds: float = Field(120.0, gt=0, description="seconds after which a request is given up")
    prepare_threads: int = Field(2, ge=1, description="threads of a replica that decode images and tokenize")


class LimitOptions(BaseModel):
    """What one request may ask for."""

    max_new_tokens: int = Field(1024, ge=1, description="longest answer, and its limit where a request names none")
    max_choices: int = Field(8, ge=1, description="largest `n`")
    max_messages: int = Field(256, ge=1, description="most messages of a chat")
    max_images: int = Field(16, ge=1, description="most images of a chat")
    max_pixels: int = Field(50_000_000, ge=1, description="most pixels of a chat's images, all of them together")
    max_visual_tokens: int = Field(
        16384, ge=1, description="largest budget that a request may set, per image and crop"
    )
    max_body_mib: float = Field(32.0, gt=0, description="largest body of a request, in MiB")
    image_hosts: list[str] = Field([], description="hosts that image URLs may name; none by default")
    image_mib: float = Field(16.0, gt=0, description="largest image behind a URL, in MiB")
    image_seconds: float = Field(10.0, gt=0, description="seconds that one image behind a URL may take")


class ServeConfig(ModelOptions, BatchOptions, LimitOptions):
    """All options of a server.

    Raises:
        pydantic.ValidationError: an unknown name, a wrong type, or a value out of range.
    """

    api_key_variable: str | None = Field(
        None, description="environment variable that holds the API key; without it nobody is asked for one"
    )
    replicas: int = Field(1, ge=1, description="copies of the model; a Serve YAML may scale them by itself instead")
    gpus: float | None = Field(None, ge=0, description="GPUs of a replica; by default 1 where the machine has any")

    def api_key(self) -> str | None:
        """The key that requests must carry, None for none.

        Raises:
            ValueError: the variable that should hold it is not set.
        """
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "")
        if not key:
            raise ValueError(
                f"api_key_variable names {self.api_key_variable}, which is not set in this process: export it, or "
                "leave the option out to serve without a key."
            )
        return key
