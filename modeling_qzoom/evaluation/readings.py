"""Rows of drawn pages as an independent reader reads them, and the rates and labels that follow."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from .. import QZoomForConditionalGeneration, QZoomProcessor
from ..asking.answers import BATCH_SIZE, Answer, ask
from ..asking.config import ModelConfig
from ..asking.gating import HELD_OPEN
from ..asking.metrics import auroc
from ..asking.session import Session
from ..backbones_qzoom import token_grid_of
from ..data.drawn.pages import Page, PageSettings, Question
from ..data.drawn.questions import code_question, draw_page, draw_rows, page_kinds
from ..data.files import damage_named
from ..zoom_crops_qzoom import CropRecipe, crop_recipe
from ..zoom_regions_qzoom import Box
from .arms import options_in_force
from .reader import Reader, is_read, line_cut
from .statistics import bootstrap_auroc, bootstrap_mean


SIZES = "sizes"
TOKENS, TOKEN_SIDE = 64, 28
VIEWS = ("coarse", "crop", "source")


@dataclass(frozen=True)
class Reading:
    """What was read of one row.

    Args:
        page_kind, kind: kinds of page and question.
        question, code: what was asked, and what is printed.
        digit_share: width of a digit as a share of the page's longer side.
        coarse, source: whether the reader reads the code at the coarse budget, and in the source image.
        crop: whether it does in the crop that the model chose; None without a model.
        needs_closer_look: not legible at the coarse budget but in the source; None where it is legible in neither.
        gate_probability: the gate's; None without a model or gate.
    """

    page_kind: str
    kind: str
    question: str
    code: str
    digit_share: float
    coarse: bool
    source: bool
    crop: bool | None
    needs_closer_look: bool | None
    gate_probability: float | None


@dataclass(frozen=True)
class Looker:
    """A model that chooses crops.

    Args:
        session: the model.
        recipe: how its crops are made.
        batch_size: rows that are asked together.
    """

    session: Session
    recipe: CropRecipe
    batch_size: int = BATCH_SIZE

    @classmethod
    def load(cls, folder: Path, batch_size: int = BATCH_SIZE) -> "Looker":
        """A checkpoint's model, which is asked for one token only: its reports are what counts."""
        with damage_named(folder):
            model = QZoomForConditionalGeneration.from_pretrained(folder).eval()
            processor = QZoomProcessor.from_pretrained(folder)
        recipe = crop_recipe(model.config, options_in_force(model, {}))
        return cls(Session(model, processor, ModelConfig(max_new_tokens=1)), recipe, batch_size)

    @property
    def token_side(self) -> int:
        """Pixels that a merged visual token covers along a side."""
        return token_grid_of(self.session.model.config.vlm_config).token_side

    def crop_view(self, image: Image.Image, box: Box | None) -> Image.Image | None:
        """The crop as the model sees it; None without a box."""
        if box is None:
            return None
        height, width = self.recipe.size(box[3] - box[1], box[2] - box[0])
        return image.crop(box).resize((width, height), Image.Resampling.BICUBIC)


PageQuestion = tuple[Page, Question]


def questions_to_read(split: str, seed: int, rows: int, settings: PageSettings) -> Iterator[PageQuestion]:
    """`rows` questions for small print on pages of all kinds, then as many for any print on pages of mixed sizes."""
    for row in draw_rows(split, seed, rows, ("fine",), settings):
        yield row.page, row.question
    for number in range(rows if SIZES in page_kinds(settings) else 0):
        # other pages than above
        page_seed = seed * 10**7 + 5 * 10**6 + number
        page, rng = draw_page(page_seed, settings, SIZES, split), random.Random(f"witness/{split}/{page_seed}")
        yield page, code_question(page, rng.randrange(len(page.entries)), rng)


def coarse_size(image: Image.Image, tokens: int) -> tuple[int, int]:
    """(width, height) at which an image has about as many pixels as `tokens` tokens cover."""
    scale = min(1.0, (tokens * TOKEN_SIDE**2 / (image.width * image.height)) ** 0.5)
    return max(1, round(scale * image.width)), max(1, round(scale * image.height))


def _in_batches(rows: Iterable[PageQuestion], looker: Looker | None) -> Iterator[tuple[PageQuestion, Answer | None]]:
    """Rows with what the model made of them."""
    if looker is None:
        yield from ((row, None) for row in rows)
        return
    kept: list[PageQuestion] = []

    def asked() -> Iterator[tuple[Image.Image, str]]:
        for page, question in rows:
            kept.append((page, question))
            yield page.image, question.text

    for answer in ask(looker.session, asked(), batch_size=looker.batch_size, **HELD_OPEN):
        yield kept.pop(0), answer


def read_rows(
    rows: Iterable[PageQuestion], reader: Reader, looker: Looker | None = None, tokens: int = TOKENS
) -> Iterator[Reading]:
    """Every row read in each view.

    Args:
        rows: pages, each with a question about one code.
        reader: who reads.
        looker: the model whose crops are read; its own coarse budget counts then.
        tokens: coarse budget without a model, in tokens of 28 × 28 pixels.
    """
    for (page, question), answer in _in_batches(rows, looker):
        image, entry = page.image, page.entries[question.items[0]]
        whole, views = (0, 0, *image.size), {"source": (image, (0, 0, *image.size))}
        if looker is None or answer is None:
            views["coarse"] = image.resize(coarse_size(image, tokens), Image.Resampling.BICUBIC), whole
        else:
            height, width = (looker.token_side * side for side in answer.grid)
            views["coarse"] = image.resize((width, height), Image.Resampling.BICUBIC), whole
            crop = looker.crop_view(image, answer.report.box)
            if crop is not None and answer.report.box is not None:
                views["crop"] = crop, answer.report.box
        cuts = {name: line_cut(view, entry.code_box, shown) for name, (view, shown) in views.items()}
        legible = {name: is_read(reader.read([cut])[0], entry.code) for name, cut in cuts.items() if cut is not None}
        yield _reading(page, question, legible, answer)


def _reading(page: Page, question: Question, legible: dict[str, bool], answer: Answer | None) -> Reading:
    entry = page.entries[question.items[0]]
    coarse, source = legible.get("coarse", False), legible.get("source", False)
    return Reading(
        page_kind=page.kind,
        kind=question.kind,
        question=question.text,
        code=entry.code,
        digit_share=round(entry.digit_width / max(page.image.size), 5),
        coarse=coarse,
        source=source,
        crop=None if answer is None else legible.get("crop", False),
        needs_closer_look=not coarse if coarse or source else None,
        gate_probability=None if answer is None else answer.report.gate_probability,
    )


def _rates(readings: Sequence[Reading]) -> dict[str, Any]:
    """Share of rows that are read in each view, with intervals."""
    rates: dict[str, Any] = {"rows": len(readings)}
    for view in VIEWS:
        values = [float(getattr(reading, view)) for reading in readings if getattr(reading, view) is not None]
        if values:
            rates[view] = {"read": fmean(values), "interval": list(bootstrap_mean(values))}
    return rates


def _mixed_sizes(readings: Sequence[Reading]) -> dict[str, Any]:
    """Which rows of mixed print sizes need a closer look, and how well the gate tells."""
    told = [reading for reading in readings if reading.needs_closer_look is not None]
    figures: dict[str, Any] = {**_rates(readings), "rows_with_label": len(told)}
    if told:
        needs = [float(bool(reading.needs_closer_look)) for reading in told]
        figures["needs_closer_look"] = {"share": fmean(needs), "interval": list(bootstrap_mean(needs))}
        figures["agrees_with_print_size"] = fmean(
            reading.needs_closer_look == (reading.kind == "fine") for reading in told
        )
    pairs = [(r.gate_probability, bool(r.needs_closer_look)) for r in told if r.gate_probability is not None]
    if len({label for _, label in pairs}) == 2:
        scores, labels = zip(*pairs, strict=True)
        figures["gate_auroc"] = {"area": auroc(scores, labels), "interval": list(bootstrap_auroc(scores, labels))}
    return figures


def witness_figures(readings: Sequence[Reading], fine_rows: int) -> dict[str, Any]:
    """The three rates over all kinds of pages and by kind, and what mixed print sizes give.

    Args:
        readings: in the order of `questions_to_read`.
        fine_rows: how many of them are questions for small print on pages of all kinds.
    """
    fine, mixed = readings[:fine_rows], readings[fine_rows:]
    kinds = sorted({reading.page_kind for reading in fine})
    by_kind = {kind: _rates([reading for reading in fine if reading.page_kind == kind]) for kind in kinds}
    figures = {"fine": _rates(fine), "fine_by_page_kind": by_kind}
    return figures | {"mixed_sizes": _mixed_sizes(mixed)} if mixed else figures
