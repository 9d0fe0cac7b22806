"""Short runs of the stock Trainer, in one process or, started by torchrun, in several.

As a program (`torchrun -m tests.training.two_processes FOLDER`) it does every run of `RUNS` and leaves the weights in
FOLDER.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from modeling_qzoom import QZoomForConditionalGeneration
from tests.families import FAMILY
from tests.tiny import Row, make_inputs, plain_inputs, tiny_model


GRIDS = [(2, 3), (4, 4), (3, 5), (5, 2)]
STEPS = 3
VISOR = {"configurations": {"thin": "SSSRTR"}, "router": {"layer": 2, "choices": ["dense", "thin"]}}


def rows_of(family: str, numbers: list[int]) -> dict:
    return make_inputs(family, [Row(["row ", None, f"? {x}"], [GRIDS[x % 4]], x) for x in numbers])


def with_labels(inputs: dict) -> dict:
    # as many labels in every row, so that the mean over rows is the mean over processes
    columns = torch.arange(inputs["input_ids"].shape[1])
    return {**inputs, "labels": inputs["input_ids"].masked_fill(columns < len(columns) - 3, -100)}


def maps(numbers: list[int]) -> list[torch.Tensor]:
    return [torch.tensor([[[1.0, 0.0], [x % 2, 1.0]]]) for x in numbers]


def plain_labels(family: str, numbers: list[int]) -> dict:
    return with_labels(plain_inputs(rows_of(family, numbers)))


def fused_labels(family: str, numbers: list[int]) -> dict:
    return with_labels(rows_of(family, numbers))


def region(family: str, numbers: list[int]) -> dict:
    return {**plain_inputs(rows_of(family, numbers)), "region_targets": maps(numbers)}


def gate(family: str, numbers: list[int]) -> dict:
    return {**plain_inputs(rows_of(family, numbers)), "gate_targets": torch.tensor([float(x % 2) for x in numbers])}


def both(family: str, numbers: list[int]) -> dict:
    return {**region(family, numbers), **gate(family, numbers)}


def sparse_labels(family: str, numbers: list[int]) -> dict:
    return {**plain_labels(family, numbers), "vision": "thin"}


def routes(family: str, numbers: list[int]) -> dict:
    return {**plain_inputs(rows_of(family, numbers)), "route_targets": torch.tensor([x % 2 for x in numbers])}


def scattered(family: str, numbers: list[int]) -> dict:
    """Either kind of target, some rows without, whole batches without."""
    inputs = plain_inputs(rows_of(family, numbers))
    targets = [part if x == 5 else None for x, part in zip(numbers, maps(numbers))]
    inputs["region_targets"] = targets
    if 3 in numbers:
        inputs["gate_targets"] = torch.full((len(numbers),), -100)
    return inputs


# name: (family, what a batch holds, TrainingArguments over the common ones)
RUNS: dict[str, tuple[str, Callable[[str, list[int]], dict], dict]] = {
    "labels": ("qwen2_5_vl", plain_labels, {}),
    "labels, reentrant": ("qwen3_vl", plain_labels, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "labels, no checkpointing": ("llava", plain_labels, {"gradient_checkpointing": False}),
    "smoothed labels": ("qwen2_5_vl", plain_labels, {"label_smoothing_factor": 0.1}),
    "fused labels": ("qwen3_vl", fused_labels, {}),
    "region": ("qwen3_vl", region, {}),
    "region, reentrant": ("llava", region, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "gate": ("qwen2_5_vl", gate, {}),
    "both": ("llava", both, {}),
    "scattered": ("qwen2_5_vl", scattered, {}),
    "labels under a configuration": ("qwen3_vl", sparse_labels, {}),
    "routes": ("qwen2_5_vl", routes, {}),
}
# there a process has fewer targets than another, so the mean over processes is not that over rows
UNEVEN = ("scattered",)


def model_of(name: str) -> QZoomForConditionalGeneration:
    """The model that a run begins with; each has all that a pass may leave out."""
    family = RUNS[name][0]
    torch.manual_seed(0)
    return tiny_model(family, visor=VISOR, crop_max_tokens=6 if FAMILY[family].has_budget else None)


def train(name: str, batch_size: int) -> dict[str, torch.Tensor]:
    """The weights after a run; `batch_size` rows a process and step."""
    family, batch, options = RUNS[name]
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, **options}
    if hasattr(TrainingArguments, "activation_checkpointing"):  # the later name, after which the other one warns
        options = {key.replace("gradient_ch", "activation_ch"): value for key, value in options.items()}
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        learning_rate=1e-3,
        optim="sgd",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_strategy="no",
        ddp_backend="gloo" if "RANK" in os.environ else None,
        **options,
    )
    model = model_of(name)
    if not FAMILY[
        family
    ].has_budget:  # it never uses its tower's last layer, so that the plain VLM, too, needs it frozen
        model.get_encoder(modality="image").requires_grad_(False)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=lambda numbers: batch(family, numbers),
        train_dataset=list(range(4 * STEPS)),
    )
    trainer.train()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def main(folder: Path) -> None:
    for name in RUNS:
        weights = train(name, 2)
        if torch.distributed.get_rank() == 0:
            save_file(weights, folder / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
