"""`train-fusion` (stage 2): the decoder learns to answer from coarse view and crop as the plain model did (III-D).

Vision tower, embeddings of the prompt, region branch and gate stay as they are.
"""

import functools
import logging
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from ... import QZoomForConditionalGeneration
from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import Session, open_session
from ...loading_addons_qzoom import has_unmerged_lora
from ..common.label_store import labelled_rows, read_labels
from ..common.run import is_finished, train
from .config import TrainFusionConfig
from .mine import STAGE as MINING
from .samples import FusionSamples, choose_records, collate_fusion


logger = logging.getLogger(__name__)

STAGE = "train-fusion"
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


def trained_parts(session: Session, config: TrainFusionConfig) -> Iterable[nn.Module | nn.Parameter]:
    """What the method trains: an adapter, or the decoder's layers and the output embedding."""
    model = session.model
    if config.method == "lora":
        return _add_lora(model, config)
    return [model.get_decoder().layers, model.get_output_embeddings()]


def merges(config: TrainFusionConfig) -> bool:
    """Whether the adapter is merged in the end: unless told otherwise, where the whole model is written."""
    wanted = config.output_format == "full" if config.merge is None else config.merge
    return wanted and config.method == "lora"


def check_config(config: TrainFusionConfig) -> None:
    """Raises:
    ValueError: Options that are out of range or do not go together.
    """
    if config.method not in ("lora", "full"):
        raise ValueError(f"method must be 'lora' or 'full', got {config.method!r}.")
    if not 0 <= config.random_box_share <= 1:
        raise ValueError(f"random_box_share must lie in [0, 1], got {config.random_box_share}.")
    if not 0 <= config.anchor_share < 1:
        raise ValueError(f"anchor_share must lie in [0, 1), got {config.anchor_share}.")
    side = config.random_box_side
    if len(side) != 2 or not 0 < side[0] <= side[1] <= 1:
        raise ValueError(f"random_box_side must be two shares [low, high] in (0, 1], got {side}.")
    if config.method == "full":
        if config.load_in_4bit:
            raise ValueError("method=full cannot train a backbone in 4 bit: set method=lora or load_in_4bit=false.")
        if config.output_format == "addon":
            raise ValueError(
                "method=full changes the backbone, which an add-on does not hold: set output_format=full."
            )
        return
    if config.output_format == "full" and config.merge is False:
        raise ValueError(
            "A full checkpoint has no place for an unmerged adapter: set merge=true, or output_format=addon to keep "
            "the adapter beside its base."
        )
    if config.output_format == "addon" and config.merge:
        raise ValueError("An add-on does not hold the backbone that a merged adapter changes: set output_format=full.")


def run(config: TrainFusionConfig) -> None:
    """Train on the mined rows and write the checkpoint to `config.output`.

    Raises:
        ValueError: Labels, model or options do not fit, or no row got worse by zooming.
        ImportError: peft is missing, or too old for this transformers.
    """
    check_config(config)
    if is_finished(config, STAGE):
        return
    if config.method == "lora":
        check_peft()
    rows = labelled_rows(config.labels, MINING)
    session = open_session(config)
    backbone = None if config.other_backbone else backbone_fingerprint(session.model)
    records = choose_records(list(read_labels(config.labels, MINING, backbone)), config.anchor_share, config.seed)
    samples = FusionSamples(session.processor, records, rows, config)

    def finish(trained: Session) -> None:
        if merges(config):
            trained.model.merge_lora()

    train(
        STAGE,
        session,
        config,
        functools.partial(trained_parts, config=config),
        samples,
        functools.partial(collate_fusion, pad_token_id=session.processor.tokenizer.pad_token_id),
        defaults={"learning_rate": _LEARNING_RATE[config.method], **_BATCH},
        finish=finish,
    )
