"""Options of the region stages."""

from dataclasses import dataclass

from ...asking.config import ModelConfig
from ...data.options import check_positive, option
from ..common.config import BRANCH_HELP, LabelConfig, TrainConfig, check_branch


# attention heads by decoder layer, both counted from 0
Heads = dict[int, list[int]]

QUERY_TOKENS = ("response", "before")


def check_query_tokens(query_tokens: str) -> None:
    """Check which tokens of a response ask.

    Raises:
        ValueError: there are no such tokens.
    """
    if query_tokens not in QUERY_TOKENS:
        raise ValueError(f"query_tokens must be one of {list(QUERY_TOKENS)}, got {query_tokens!r}.")


@dataclass
class FindHeadsConfig(ModelConfig):
    """`find-heads`: which attention heads look at what a question asks about."""

    output: str = option("", "YAML file that label-regions reads as its option heads")
    pages: int = option(64, "number of drawn pages")
    seed: int = option(0, "seed of the pages")
    batch_size: int = option(8, "pages per forward pass")
    grounding_count: int = option(4, "number of heads to keep")
    sink_count: int = option(2, "number of sink heads to keep at most")
    sink_share: float = option(
        0.5,
        "share of its image attention from which a head is a sink, put on a few cells that nothing asks about",
    )
    query_tokens: str = option(
        "response", "response (the paper: the tokens of the answer) or before (the places that predict them)"
    )

    def __post_init__(self) -> None:
        check_positive(self, "pages", "batch_size", "grounding_count")
        check_query_tokens(self.query_tokens)


@dataclass
class LabelRegionsConfig(LabelConfig):
    """`label-regions`: where the model looks while it answers (paper III-C2)."""

    heads: str | None = option(None, "file of find-heads, instead of the two tables")
    grounding_heads: Heads = option({}, "heads by layer whose response-to-image attention makes the map")
    sink_heads: Heads = option({}, "heads by layer whose attention marks sinks")
    query_tokens: str = option("response", "as in find-heads; a heads file brings its own")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_query_tokens(self.query_tokens)


@dataclass
class LabelRule:
    """How a raw map becomes labels when it is loaded (paper III-C2; defaults of the authors' code)."""

    foreground: float = option(0.25, "share of the map's maximum above which cells are foreground (paper: 0.2)")
    background: float = option(
        0.05, "share of the map's maximum below which cells are background, outside the foreground's box"
    )
    dilation: int = option(1, "cells by which the foreground's box grows on every side")
    largest_box: float = option(0.5, "share of the grid from which a box says nothing: no labels")
    faintest_peak: float = option(5e-3, "maximum below which a map says nothing: no labels")
    sink: float = option(0.01, "sink attention from which a cell is never foreground")
    remove_sinks: bool = option(True, "use the map of the sink heads; false is the ablation")
    tri_state: bool = option(True, "false makes every cell that is not foreground background; the ablation")
    pool: bool = option(True, "bring the map to the grid of the coarse view before thresholds apply")


@dataclass
class TrainRegionsConfig(TrainConfig):
    """`train-regions`: stage 1, and stage 2.5 as a re-fit."""

    rule: LabelRule = option(LabelRule(), "how maps become labels")
    only_right: bool = option(
        False,
        "leave out maps of answers that are not the annotated one: whoever answers wrongly may have looked elsewhere; "
        "needs rows with answers; the paper uses none",
    )
    reset: bool = option(True, "start from copies of the backbone's layers; false continues (stage 2.5)")
    questions_per_image: int = option(4, "most questions about one image in one sequence")
    branch: str | None = option(None, BRANCH_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "questions_per_image")
        check_branch(self.branch)
