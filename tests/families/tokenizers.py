"""Tokenizers and images that need neither network nor files."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(image: str, video: str = "") -> str:
    """A chat template that writes these texts for an image and for a video."""
    return _TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def byte_tokenizer(specials: list[str], **kwargs) -> PreTrainedTokenizerFast:
    """One token per byte, plus special tokens."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **kwargs)
    fast.add_special_tokens({"additional_special_tokens": specials})
    return fast


def random_source(height: int, width: int, seed: int) -> torch.Tensor:
    """A smooth (3, height, width) uint8 image."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, max(2, height // 16), max(2, width // 16), generator=generator)
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return (large[0] * 255).round().to(torch.uint8)
