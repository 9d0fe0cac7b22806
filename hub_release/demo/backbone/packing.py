"""Many questions about one page in one sequence: the page's tokens once, then independent segments.

A segment is an optional crop and one question with its answer. Segments see the page and themselves, never each other,
and each starts at the position right after the page, so every segment is exactly the sequence that inference builds.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from hub_release.demo.backbone.view_batch import ViewBatch, stack_views
from hub_release.demo.backbone.views import View
from modeling_qzoom.data.drawn.pages import Question
from modeling_qzoom.training_losses_qzoom import IGNORED
from modeling_qzoom.zoom_fusion_qzoom import crop_positions
from modeling_qzoom.zoom_regions_qzoom import Box


@dataclass
class Segment:
    """One question, and the crop that it may look at.

    Attributes:
        question: the question, with its answer.
        crop: view of the crop, None without one.
        cells: the crop's rectangle in cells of the page's grid; None places the crop after the page.
    """

    question: Question
    crop: View | None = None
    cells: Box | None = None


@dataclass
class Sample:
    """A view of a page, the segments that ask about it, and the name under which its measures are logged."""

    view: View
    segments: list[Segment] = field(default_factory=list)
    name: str = ""


@dataclass
class Batch:
    """Packed samples, padded on the right.

    Attributes:
        input_ids: (B, n).
        positions: (3, B, n) float32.
        segment: (B, n), 0 for the page and from 1 on for the segments, -1 for padding.
        labels: (B, n), the token to predict at each place, -100 elsewhere.
        views: every view in order of its image tokens.
        kinds: for each sample and segment the sample's name and the question's kind, with "+crop" where it has one.
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


def _image_positions(grid: tuple[int, int], start: int) -> torch.Tensor:
    """Positions (3, h * w) of a whole page's tokens: those of any image in its place."""
    return crop_positions(start, start, (0, 0, grid[1], grid[0]), grid, "sequential")


def _crop_positions(grid: tuple[int, int], cells: Box | None, first: int, page_start: int) -> torch.Tensor:
    """Positions (3, h * w + 2) of a crop between its markers, which starts at position `first`.

    Continuous ones inside `cells`; those of a second image where `cells` is None.
    """
    if cells is None:
        inner = _image_positions(grid, first + 1)
    else:
        inner = crop_positions(first + 1, page_start, cells, grid, "continuous")
    last = first + 1 + max(grid)
    return torch.cat([torch.full((3, 1), float(first)), inner, torch.full((3, 1), float(last))], dim=1)


class Packer:
    """Turns samples into a batch.

    Args:
        tokenizer: the demo's tokenizer.
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
        positions = [lead, _image_positions(sample.view.grid, page_start), torch.full((3, 1), after)]
        labels, segment, views = [IGNORED] * len(ids), [0] * len(ids), [sample.view]
        for number, part in enumerate(sample.segments, start=1):
            first = after + 1
            if part.crop is not None:
                count = part.crop.grid[0] * part.crop.grid[1]
                ids += [self.start, *[self.pad] * count, self.end]
                labels += [IGNORED] * (count + 2)
                segment += [number] * (count + 2)
                positions.append(_crop_positions(part.crop.grid, part.cells, first, page_start))
                views.append(part.crop)
                first += max(part.crop.grid) + 2
            prompt = self.encode(part.question.text + "<|im_end|>\n<|im_start|>assistant\n")
            answer = [*self.encode(part.question.answer), self.answer_end]
            ids += prompt + answer[:-1]
            labels += [IGNORED] * (len(prompt) - 1) + answer
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
        labels = torch.full((len(parts), n), IGNORED)
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
    is_answer = batch.labels != IGNORED
    logits = model.lm_head(hidden[is_answer]).float()
    labels = batch.labels[is_answer]
    return cross_entropy(logits, labels), logits.argmax(-1) == labels
