"""Many questions about one page in one sequence: the page's tokens once, then independent segments.

A segment is an optional crop and one question with its answer. Segments see the page and themselves, never each other,
and each starts at the position right after the page, so every segment is exactly the sequence that inference builds.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from hub_release.demo.backbone.dense_labels import ViewBatch, stack_views
from hub_release.demo.backbone.views import IGNORE, View
from modeling_qzoom.data.drawn.pages import Box, Question


@dataclass
class Segment:
    """One question, with the crop it may look at; its box in coarse cells is None for sequential positions."""

    question: Question
    crop: View | None = None
    cells: Box | None = None


@dataclass
class Sample:
    """A view of a page, the segments that ask about it, and the name that its measures go under."""

    view: View
    segments: list[Segment] = field(default_factory=list)
    name: str = ""


@dataclass
class Batch:
    """Packed samples, padded on the right.

    Args:
        input_ids: (B, n).
        positions: (3, B, n) float32.
        labels: (B, n), the token to predict at each place, -100 elsewhere.
        segment: (B, n), 0 for the page and from 1 on for the segments, -1 for padding.
        views: Every view in order of its image tokens.
        kinds: Per sample and segment the question's kind, with "+crop" where it has one, behind the sample's name.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    segment: torch.Tensor
    labels: torch.Tensor
    views: ViewBatch
    kinds: list[list[str]]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        ids, positions, segment, labels = (
            part.to(device) for part in (self.input_ids, self.positions, self.segment, self.labels)
        )
        return Batch(ids, positions, segment, labels, self.views.to(device), self.kinds)

    @property
    def mask(self) -> torch.Tensor:
        """(B, 1, n, n), True where a query may look at a key."""
        n = self.segment.shape[1]
        same = self.segment[:, :, None] == self.segment[:, None, :]
        mask = torch.ones(n, n, dtype=torch.bool, device=same.device).tril() & (same | (self.segment == 0)[:, None, :])
        return mask[:, None]


def _image_positions(view: View, start: int) -> torch.Tensor:
    """Positions (3, h * w) of a page's tokens."""
    h, w = view.grid
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros(h * w), rows.reshape(-1), cols.reshape(-1)]) + start


def _crop_positions(view: View, cells: Box | None, first: int, page_start: int) -> torch.Tensor:
    """Positions (3, h * w + 2) of a crop between its markers, which starts at position `first`.

    Continuous ones inside `cells`; those of a second image where `cells` is None.
    """
    h, w = view.grid
    if cells is None:
        cells, page_start = (0, 0, w, h), first + 1
    rows = torch.linspace(page_start + cells[1], page_start + cells[3] - 1, h)
    cols = torch.linspace(page_start + cells[0], page_start + cells[2] - 1, w)
    inner = torch.stack([torch.full((h * w,), first + 1.0), rows.repeat_interleave(w), cols.repeat(h)])
    last = first + 1 + max(h, w)
    return torch.cat([torch.full((3, 1), float(first)), inner, torch.full((3, 1), float(last))], dim=1)


class Packer:
    """Turns samples into a batch.

    Args:
        tokenizer: The demo's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self.start, self.end, self.pad = ids("<|vision_start|>"), ids("<|vision_end|>"), ids("<|image_pad|>")
        self.filler = ids("<|endoftext|>")
        self.head = tokenizer.encode("<|im_start|>user\n")
        self.answer_end = ids("<|im_end|>")
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, remembered: there are few different questions."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text)
        return self.cache[text]

    def _sample(self, sample: Sample) -> tuple[list[int], torch.Tensor, list[int], list[int], list[View]]:
        tokens = sample.view.grid[0] * sample.view.grid[1]
        ids = [*self.head, self.start, *[self.pad] * tokens, self.end]
        page_start = len(self.head) + 1
        after = page_start + max(sample.view.grid)
        lead = torch.arange(page_start).expand(3, -1)
        positions = [lead, _image_positions(sample.view, page_start), torch.full((3, 1), after)]
        labels, segment, views = [IGNORE] * len(ids), [0] * len(ids), [sample.view]
        for number, part in enumerate(sample.segments, start=1):
            first = after + 1
            if part.crop is not None:
                count = part.crop.grid[0] * part.crop.grid[1]
                ids += [self.start, *[self.pad] * count, self.end]
                labels += [IGNORE] * (count + 2)
                segment += [number] * (count + 2)
                positions.append(_crop_positions(part.crop, part.cells, first, page_start))
                views.append(part.crop)
                first += max(part.crop.grid) + 2
            prompt = self.encode(part.question.text + "<|im_end|>\n<|im_start|>assistant\n")
            answer = [*self.encode(part.question.answer), self.answer_end]
            ids += prompt + answer[:-1]
            labels += [IGNORE] * (len(prompt) - 1) + answer
            length = len(prompt) + len(answer) - 1
            segment += [number] * length
            positions.append(torch.arange(first, first + length).expand(3, -1))
        return ids, torch.cat([p.float() for p in positions], dim=1), labels, segment, views

    def __call__(self, samples: list[Sample]) -> Batch:
        """Pack samples into one batch."""
        parts = [self._sample(sample) for sample in samples]
        n = -(-max(len(ids) for ids, *_ in parts) // 8) * 8  # as fused attention kernels want it of a mask
        input_ids = torch.full((len(parts), n), self.filler)
        positions = torch.zeros(3, len(parts), n)
        labels = torch.full((len(parts), n), IGNORE)
        segment = torch.full((len(parts), n), -1)
        views = []
        for row, (ids, place, label, number, seen) in enumerate(parts):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            positions[:, row, : len(ids)] = place
            labels[row, : len(ids)] = torch.tensor(label)
            segment[row, : len(ids)] = torch.tensor(number)
            views += seen
        kinds = [
            [sample.name + part.question.kind + ("+crop" if part.crop is not None else "") for part in sample.segments]
            for sample in samples
        ]
        return Batch(input_ids, positions, segment, labels, stack_views(views), kinds)


def embed(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, image_tokens: torch.Tensor) -> torch.Tensor:
    """Input embeddings (B, n, D) with the image tokens (tokens, D) in their places."""
    embeds = model.get_input_embeddings()(batch.input_ids)
    return embeds.masked_scatter(
        (batch.input_ids == model.config.image_token_id)[..., None], image_tokens.to(embeds.dtype)
    )


def answer_loss(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, image_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers, and the hits (places,) in reading order of `batch.labels != -100`."""
    decoder: nn.Module = model.model.language_model
    hidden = decoder(
        inputs_embeds=embed(model, batch, image_tokens),
        position_ids=batch.positions,
        attention_mask={"full_attention": batch.mask},
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels != IGNORE
    logits = model.lm_head(hidden[wanted]).float()
    labels = batch.labels[wanted]
    return cross_entropy(logits, labels), logits.argmax(-1) == labels
