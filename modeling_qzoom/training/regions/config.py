"""Options of the region stages."""

from dataclasses import dataclass, field

from ...asking.config import ModelConfig
from ..common.config import LabelConfig, TrainConfig


Heads = dict[int, list[int]]
"""Attention heads by decoder layer, both counted from 0."""


@dataclass
class FindHeadsConfig(ModelConfig):
    """`find-heads`: which attention heads look at what a question asks about.

    Args:
        output: YAML file that `label-regions` reads as its configuration's `heads`.
        pages: Drawn pages.
        seed: Of the pages.
        batch_size: Pages per forward pass.
        grounding_count: Heads to keep.
        sink_count: Sink heads to keep at most.
        sink_share: A head is a sink when it puts at least this share of its image attention on a few cells that
            nothing asks about.
        query_tokens: "response" (the paper: the tokens of the answer) or "before" (the places that predict them).
    """

    output: str = ""
    pages: int = 64
    seed: int = 0
    batch_size: int = 8
    grounding_count: int = 4
    sink_count: int = 2
    sink_share: float = 0.5
    query_tokens: str = "response"


@dataclass
class LabelRegionsConfig(LabelConfig):
    """`label-regions`: where the model looks while it answers (paper III-C2).

    Args:
        heads: File of `find-heads`, instead of the two tables.
        grounding_heads: Heads whose response-to-image attention makes the map.
        sink_heads: Heads whose attention marks sinks.
        query_tokens: As in `find-heads`; a heads file brings its own.
    """

    heads: str | None = None
    grounding_heads: Heads = field(default_factory=dict)
    sink_heads: Heads = field(default_factory=dict)
    query_tokens: str = "response"


@dataclass
class TriStateConfig:
    """Thresholds that turn a raw map into labels when it is loaded (paper III-C2; defaults of the authors' code).

    Args:
        foreground: Cells above this share of the map's maximum are foreground (paper: 0.2).
        background: Cells below this share are background, outside the foreground's box.
        dilation: Cells by which the foreground's box grows on every side.
        largest_box: A box that covers this share of the grid says nothing: no labels.
        faintest_peak: A map whose maximum is lower says nothing: no labels.
        sink: Cells whose sink attention reaches this are never foreground.
        remove_sinks: Use the map of the sink heads; False is the ablation.
        tri_state: False makes every cell that is not foreground background; the ablation.
        pool: Bring the map to the grid of the coarse view before thresholds apply.
    """

    foreground: float = 0.25
    background: float = 0.05
    dilation: int = 1
    largest_box: float = 0.5
    faintest_peak: float = 5e-3
    sink: float = 0.01
    remove_sinks: bool = True
    tri_state: bool = True
    pool: bool = True


@dataclass
class TrainRegionsConfig(TrainConfig):
    """`train-regions` (stage 1, and 2.5 as a re-fit).

    Args:
        rule: Thresholds of the labels.
        only_right: Leave out maps of answers that are not the annotated one: whoever answers wrongly may have looked
            elsewhere. Needs rows with answers; the paper uses none.
        reset: Start from copies of the backbone's layers; False continues (stage 2.5).
        questions_per_image: Most questions about one image in one sequence.
    """

    rule: TriStateConfig = field(default_factory=TriStateConfig)
    only_right: bool = False
    reset: bool = True
    questions_per_image: int = 4
