"""`train-fusion` (stage 2): the decoder learns to answer from coarse view and crop as the plain model did (III-D).

Vision tower, embeddings of the prompt, region branch and gate stay as they are.
"""

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from ... import QZoomForConditionalGeneration
from ...asking.session import Session
from ...loading_lora_qzoom import has_unmerged_lora
from ..common.labelled import Labelled
from ..common.run import train
from ..common.stage import Parts, TrainStage
from .config import TrainFusionConfig
from .record import FusionRecord
from .samples import FusionSamples, choose_records, collate_fusion


_PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
_LORA = {"r": 16, "lora_alpha": 32}
_LEARNING_RATE = {"full": 1e-6, "lora": 1e-4}  # the paper's is for full training
_BATCH = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 64}


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


def _add_lora(model: QZoomForConditionalGeneration, config: TrainFusionConfig) -> list[nn.Parameter]:
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


class FusionStage(TrainStage[TrainFusionConfig, FusionRecord]):
    """Stage 2: the decoder on the rows of `mine-fusion`."""

    name, labels = "train-fusion", "mine-fusion"

    def record(self, row: dict[str, Any]) -> FusionRecord:
        return FusionRecord.from_row(row)

    def check(self) -> None:
        if self.config.method == "lora":
            check_peft()

    def dataset(self, labelled: Labelled[FusionRecord]) -> FusionSamples:
        records = choose_records(labelled.records, self.config.anchor_share, self.config.seed)
        return FusionSamples(labelled.session.processor, records, labelled.rows, self.config)

    def parts(self, session: Session) -> Parts:
        """What the method trains: an adapter, or the decoder's layers and the output embedding."""
        if self.config.keep_share is not None:
            session.model.config.keep_share = self.config.keep_share
        if self.config.method == "lora":
            return _add_lora(session.model, self.config)
        return [session.model.get_decoder().layers, session.model.get_output_embeddings()]

    def collate(self, items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
        return collate_fusion(items, pad_token_id)

    def defaults(self) -> dict[str, Any]:
        return {"learning_rate": _LEARNING_RATE[self.config.method], **_BATCH}

    def finish(self, session: Session) -> None:
        if self.config.merges:
            session.model.merge_lora()


def run(config: TrainFusionConfig) -> None:
    """Train on the mined rows and write the checkpoint to `config.output`.

    Raises:
        ValueError: labels, model or options do not fit, or no row got worse by zooming.
        ImportError: peft is missing, or too old for this transformers.
    """
    train(FusionStage(config))
