"""What stages that train the decoder share: by LoRA or in full, and whether that can be written out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Generic, TypeVar

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from ... import QZoomForConditionalGeneration
from ...asking.session import Session
from ...data.options import option
from ...loading_lora_qzoom import has_unmerged_lora
from .answer_inputs import stack_answers
from .config import RunConfig


LEARNING_RATE = {"full": 1e-6, "lora": 1e-4}  # the Q-Zoom paper's is for full training
_PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
_LORA = {"r": 16, "lora_alpha": 32}


@dataclass
class DecoderConfig(RunConfig):
    """How the decoder is trained."""

    method: str = option("lora", "lora, or full (the decoder's own weights)")
    lora: dict[str, Any] = option({}, "arguments of peft.LoraConfig")
    merge: bool | None = option(
        None, "merge the adapter into the backbone at the end; by default where output_format is full"
    )

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise ValueError(f"method must be 'lora' or 'full', got {self.method!r}.")
        self._check_output()
        super().__post_init__()

    def _check_output(self) -> None:
        """Check that what the method trains can be written as it is to be written.

        Raises:
            ValueError: options that do not go together.
        """
        if self.method == "full":
            if self.load_in_4bit:
                raise ValueError(
                    "method=full cannot train a backbone in 4 bit: set method=lora or load_in_4bit=false."
                )
            if self.output_format == "addon":
                raise ValueError(
                    "method=full changes the backbone, which an add-on does not hold: set output_format=full."
                )
            return
        if self.output_format == "full" and self.merge is False:
            raise ValueError(
                "A full checkpoint has no place for an unmerged adapter: set merge=true, or output_format=addon to "
                "keep the adapter beside its base."
            )
        if self.output_format == "addon" and self.merge:
            raise ValueError(
                "An add-on does not hold the backbone that a merged adapter changes: set output_format=full."
            )

    @property
    def merges(self) -> bool:
        """Whether the adapter is merged in the end: unless told otherwise, where the whole model is written."""
        wish = self.output_format == "full" if self.merge is None else self.merge
        return wish and self.method == "lora"


Config = TypeVar("Config", bound=DecoderConfig)


class DecoderTraining(Generic[Config]):
    """What stages that train the decoder have in common; stands in front of `TrainStage` among their bases.

    Attributes:
        config: options of the stage.
        batch: its own batch sizes, as arguments of `TrainingArguments`.
    """

    config: Config
    batch: ClassVar[dict[str, int]]

    def check(self) -> None:
        """Find out before anything is loaded that the method cannot be trained here.

        Raises:
            ImportError: peft is missing, or too old.
        """
        if self.config.method == "lora":
            check_peft()

    def collate(self, items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
        """A batch of prompts with their answers as `forward`'s keywords."""
        return stack_answers(items, pad_token_id)

    def defaults(self) -> dict[str, Any]:
        """The method's learning rate and the stage's batch sizes."""
        return {"learning_rate": LEARNING_RATE[self.config.method], **self.batch}

    def finish(self, session: Session) -> None:
        """Merges the adapter, where it is to be merged."""
        if self.config.merges:
            session.model.merge_lora()


def decoder_projections(model: QZoomForConditionalGeneration) -> str:
    """Regular expression of the decoder's projections by their full names; the branches have others."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    return rf"{re.escape(name)}\.layers\.\d+\..*({_PROJECTIONS})"


def check_peft() -> None:
    """Finds out before anything is loaded that LoRA cannot be trained here.

    Raises:
        ImportError: peft is missing, or older than this transformers takes; the extra `train` installs a pair.
    """
    try:
        installed = version("peft")
    except PackageNotFoundError as error:
        raise ImportError("method=lora needs peft: pip install 'qzoom[train]'.") from error
    if Version(installed) < Version(MIN_PEFT_VERSION):
        raise ImportError(
            f"method=lora: transformers {transformers.__version__} takes peft {MIN_PEFT_VERSION} or newer, here is "
            f"{installed}. A pair that goes together: pip install 'qzoom[train]', or pip install "
            f"'peft>={MIN_PEFT_VERSION}' where there is one."
        )


def add_lora(model: QZoomForConditionalGeneration, config: DecoderConfig) -> list[nn.Parameter]:
    """Put a fresh adapter around the decoder's projections and return its weights.

    Raises:
        ValueError: `lora` does not fit, or the model has an adapter already.
    """
    from peft import LoraConfig

    if has_unmerged_lora(model):
        raise ValueError(
            f"model={config.model} has a LoRA adapter already; merge it (model.merge_lora() and save_pretrained), "
            "then train on the result."
        )
    torch.manual_seed(config.seed)
    try:
        adapter = LoraConfig(**{**_LORA, "target_modules": decoder_projections(model), **config.lora})
        model.add_adapter(adapter)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora={config.lora}: {error}") from error
    return [weight for name, weight in model.named_parameters() if "lora_" in name]
