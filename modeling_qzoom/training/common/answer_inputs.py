"""Model inputs of a prompt and the answer that is to be learned, and batches of them."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ... import QZoomProcessor
from ...asking.chats import encode_prompts, render, stack_features
from ...asking.config import ModelConfig
from ...training_losses_qzoom import IGNORED


def target_texts(processor: QZoomProcessor, question: str, answer: str, config: ModelConfig) -> tuple[str, str]:
    """The prompt, and the chat up to the end of the model's turn as the template renders it.

    A template that closes a turn with no special token, as LLaVA's, gets the tokenizer's end token: the model has to
    learn to stop.

    Raises:
        ValueError: the chat template does not extend a chat by appending to it.
    """
    prompt = render(processor, [(question, None)], config)
    text = render(processor, [(question, answer)], config)
    if not text.startswith(prompt):
        raise ValueError(
            "This chat template does not extend a chat by appending to it, so that nothing tells which tokens are the "
            "answer; give the tokenizer a template that does."
        )
    tokenizer, tail = processor.tokenizer, text[len(prompt) :]
    ends = [(tail.index(token), -len(token)) for token in tokenizer.all_special_tokens if token in tail]
    if not ends:
        return prompt, text.rstrip() + tokenizer.eos_token
    start, length = min(ends)
    return prompt, prompt + tail[: start - length]


def encode_target(
    processor: QZoomProcessor, image: Image.Image, question: str, answer: str, config: ModelConfig
) -> dict[str, Any]:
    """Model inputs of a prompt and its answer, with `labels` (1, n) on the answer and the end of the turn."""
    prompt, text = target_texts(processor, question, answer, config)
    feature = encode_prompts(processor, [image], [text])
    before, after = (processor.tokenizer(part).input_ids for part in (prompt, text))
    # a tokenizer may merge the end of a prompt with the beginning of an answer
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after)))
    ids = feature["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    answer_tokens = len(after) - shared
    labels[0, -answer_tokens:] = ids[0, -answer_tokens:]
    return {**feature, "labels": labels}


def stack_answers(samples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """A batch for `forward`, padded on the left; labels with -100."""
    features = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
    batch = stack_features(features, pad_token_id)
    length = batch["input_ids"].shape[1]
    labels: list[Tensor] = [
        torch.nn.functional.pad(sample["labels"], (length - sample["labels"].shape[1], 0), value=IGNORED)
        for sample in samples
    ]
    batch["labels"] = torch.cat(labels)
    return batch
