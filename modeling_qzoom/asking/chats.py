"""From rows to model inputs: chats, batches of rows with their own budgets, and the places of their tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import QZoomProcessor
from .budgets import Budget
from .config import ModelConfig


Turn = tuple[str, str | None]
"""A question, and its answer where the chat goes on behind it."""


def chat_of(turns: Sequence[Turn], config: ModelConfig) -> list[dict[str, Any]]:
    """A chat about one image, which the first turn shows.

    Args:
        turns: questions in order, with the answers that are already given.
        config: its `prompt_suffix` and `system_prompt` are applied.
    """
    messages: list[dict[str, Any]] = []
    if config.system_prompt:
        messages.append({"role": "system", "content": [{"type": "text", "text": config.system_prompt}]})
    for number, (question, answer) in enumerate(turns):
        content = [{"type": "image"}] if number == 0 else []
        messages.append(
            {"role": "user", "content": [*content, {"type": "text", "text": question + config.prompt_suffix}]}
        )
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def render(processor: QZoomProcessor, turns: Sequence[Turn], config: ModelConfig) -> str:
    """The chat as text; it ends where the model has to answer, or behind the last answer."""
    open_end = turns[-1][1] is None
    return processor.apply_chat_template(chat_of(turns, config), add_generation_prompt=open_end, tokenize=False)


def encode_prompts(
    processor: QZoomProcessor,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Model inputs of rendered chats with one image each, padded on the left.

    Args:
        processor: the model's processor.
        images: one image for each chat.
        texts: chats as `render` writes them.
        budget: coarse budget; the processor's own by default.
    """
    sizes: dict[str, Any] = {} if budget is None else {"min_tokens": budget[0], "max_tokens": budget[1]}
    return dict(processor(images=[[image] for image in images], text=list(texts), return_tensors="pt", **sizes))


def query_columns(
    processor: QZoomProcessor, input_ids: Tensor, turns: Sequence[Turn], config: ModelConfig
) -> list[int]:
    """Columns of each question's last prompt token in an unpadded multi-turn sequence.

    Args:
        processor: the model's processor.
        input_ids: (n,) ids of the whole chat.
        turns: the chat.
        config: options that rendered the chat.

    Raises:
        ValueError: the chat template does not extend a chat by appending to it.
    """
    columns = []
    tokenizer = processor.tokenizer
    whole = render(processor, turns, config)
    plain = tokenizer(whole, add_special_tokens=False).input_ids
    inserted = len(input_ids) - len(plain)  # image tokens beyond the placeholder, all in the first turn
    for number in range(len(turns)):
        prefix = render(processor, [*turns[:number], (turns[number][0], None)], config)
        ids = tokenizer(prefix, add_special_tokens=False).input_ids
        column = len(ids) + inserted - 1
        if not whole.startswith(prefix) or plain[: len(ids)] != ids or int(input_ids[column]) != ids[-1]:
            raise ValueError(
                "This chat template does not extend a chat by appending to it, so several questions cannot share a "
                "sequence; set questions_per_image=1."
            )
        columns.append(column)
    return columns


def stack_features(features: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """One batch of inputs that were processed one by one, each perhaps at a budget of its own; padded on the left.

    Rows with and without images may stand in one batch.

    Args:
        features: outputs of the processor for one row each: `input_ids` and other (1, n) tensors, image tensors whose
            first axis runs over patches or images, and lists.
        pad_token_id: token that fills shorter rows.
    """
    length = max(entry["input_ids"].shape[1] for entry in features)
    batch: dict[str, Any] = {}
    for name in dict.fromkeys(name for entry in features for name in entry):
        values = [entry[name] for entry in features if name in entry]
        if isinstance(values[0], Tensor) and _is_of_tokens(name, features):
            filler = pad_token_id if name == "input_ids" else 0
            rows = [entry.get(name, torch.zeros_like(entry["input_ids"])) for entry in features]
            batch[name] = torch.cat(
                [torch.nn.functional.pad(row, (length - row.shape[1], 0), value=filler) for row in rows]
            )
        elif isinstance(values[0], Tensor):
            batch[name] = torch.cat(values)
        else:
            batch[name] = [item for value in values for item in value]
    return batch


def _is_of_tokens(name: str, features: Sequence[dict[str, Any]]) -> bool:
    """Whether a tensor has a value for each token, as far as it is there."""
    return all(entry[name].shape[:2] == entry["input_ids"].shape for entry in features if name in entry)
