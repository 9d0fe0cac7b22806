"""The benchmark's rows in FLOPs: what Q-Zoom costs over the plain model, and what is done over what is needed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import QZoomConfig, ZoomCost, zoom_cost
from ..backbones_qzoom import token_grid_of
from ..cost_prediction_qzoom import TEXT_TOKENS
from .hollow import counted_flops, hollow_model, with_short_tower
from .questions import crop_options, question_inputs


# (height, width) of an image that fills every budget
SQUARE = (8192, 8192)
BUDGETS = (256, 576, 1024, 2048, 4096, 8192, 16384)
ZOOM_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# what the options save, each alone and all together; `skip_unread` is on in all of them but the first
VARIANTS: dict[str, dict[str, Any]] = {
    "no savings": {"gate_branch": "full", "region_branch": "full", "keep_share": 1.0, "skip_unread": False},
    "exact savings": {"gate_branch": "full", "region_branch": "full", "keep_share": 1.0, "skip_unread": True},
    "light gate": {"gate_branch": "light", "region_branch": "full", "keep_share": 1.0, "skip_unread": True},
    "foveated": {"gate_branch": "full", "region_branch": "full", "keep_share": 0.1, "skip_unread": True},
    "light gate, foveated": {"gate_branch": "light", "region_branch": "full", "keep_share": 0.1, "skip_unread": True},
    "light branches, foveated": {
        "gate_branch": "light",
        "region_branch": "light",
        "keep_share": 0.1,
        "skip_unread": True,
    },
}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        config: the model's configuration, whose options are in force where `options` leaves them out.
        source_tokens: coarse budget in merged visual tokens.
        crop_tokens: visual tokens of the crop; None for the one size of a backbone whose images all have it.
        text_tokens: tokens of the prompt beside the visual ones.
        options: options of `generate`.
    """

    config: QZoomConfig
    source_tokens: int
    crop_tokens: int | None
    text_tokens: int = TEXT_TOKENS
    options: dict[str, Any] = field(default_factory=dict)

    def cost(self, config: QZoomConfig | None = None, **options: Any) -> ZoomCost:
        """FLOPs in closed form.

        Args:
            config: another configuration of the same decoder.
            options: options in place of the setting's.

        Raises:
            InputError: budgets or options do not fit the model.
        """
        config = self.config if config is None else config
        lengths: dict[str, Any] = {"text_tokens": self.text_tokens, "crop_tokens": self.crop_tokens}
        if token_grid_of(config.vlm_config).has_budget:
            lengths |= {"max_tokens": self.source_tokens, "min_tokens": 1}
            # the checkpoint's own bounds give way
            lengths |= {"crop_min_tokens": self.crop_tokens, "crop_max_tokens": self.crop_tokens}
        cost = zoom_cost(config, SQUARE, **lengths, **(options or self.options))
        if cost.plain.visual_tokens != self.source_tokens and not token_grid_of(config.vlm_config).has_budget:
            raise ValueError(
                f"source_tokens={self.source_tokens}: images of this backbone always have "
                f"{cost.plain.visual_tokens} tokens."
            )
        return cost


def ratios(setting: Setting, questions: int) -> dict[str, Any]:
    """The setting's costs over the plain model's, in closed form, and the options in force.

    Args:
        setting: what is measured.
        questions: number of skipping questions about one page.
    """
    cost = setting.cost()
    used = cost.options
    return {
        "source_tokens": cost.plain.visual_tokens,
        "crop_tokens": cost.zoomed.visual_tokens - cost.plain.visual_tokens,
        "text_tokens": setting.text_tokens,
        "questions": questions,
        "gate": used.gate_branch,
        "region": used.region_branch,
        "keep_share": used.keep_share,
        "skip_unread": used.skips_unread,
        "skip_over_plain": cost.skip_over_plain,
        "zoom_over_plain": cost.zoom_over_plain,
        "page_over_plain": cost.page_over_plain(questions),
        "flops": {name: asdict(getattr(cost, name)) for name in ("plain", "skipped", "zoomed")},
    }


def done_over_needed(setting: Setting) -> dict[str, float]:
    """Counted FLOPs of `generate` over those of the closed form, for a row that skips and for one that zooms.

    Without a gate only for the latter.

    Real shapes, except for the vision tower, which is short in both (`hollow`).
    """
    config = with_short_tower(setting.config)
    model, cost = hollow_model(config), setting.cost(config)
    inputs = question_inputs(config.vlm_config, cost.coarse_grid, cost.crop_grid, text_tokens=setting.text_tokens)
    fixed = {**crop_options(config.vlm_config, cost.crop_grid), "max_new_tokens": 1, "return_zoom_reports": True}
    found: dict[str, float] = {}
    for name, needed, threshold in (("skipped", cost.skipped.flops, 1.5), ("zoomed", cost.zoomed.flops, 0.0)):
        if name == "skipped" and model.zoom.gate is None:
            continue  # nothing decides against zooming
        options = {**fixed, **setting.options, "zoom": "auto", "gate_threshold": threshold}
        done, output = counted_flops(lambda options=options: model.generate(**inputs, **options))  # type: ignore[misc]
        (report,) = output.zoom_reports
        if report.zoomed != (name == "zoomed"):
            raise RuntimeError(f"a row that should be {name} ended with {report.reason}; nothing was compared.")
        found[name] = done / needed
    return found


def table(
    config: QZoomConfig, budgets: Iterable[int], crop_tokens: int | None, text_tokens: int = TEXT_TOKENS
) -> Iterator[dict[str, Any]]:
    """FLOPs over the plain model's for every variant, budget and share of zooming rows; any batch size.

    Args:
        config: the model's configuration.
        budgets: coarse budgets in merged visual tokens.
        crop_tokens: as for `Setting`.
        text_tokens: tokens of the prompt beside the visual ones.
    """
    for tokens in budgets:
        setting = Setting(config, tokens, crop_tokens, text_tokens)
        for name, options in VARIANTS.items():
            cost = setting.cost(**options)
            shares = {str(share): cost.mean_flops(share) / cost.plain.flops for share in ZOOM_SHARES}
            yield {"source_tokens": tokens, "variant": name, "plain_tflops": cost.plain.flops / 1e12, "over": shares}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table's rows: one column for each share of zooming rows."""
    lines = [
        f"| tokens | options | {' | '.join(f'{float(share):.0%} zoom' for share in rows[0]['over'])} |",
        "|---" * (2 + len(rows[0]["over"])) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{ratio:.3f}" for ratio in row["over"].values())
        lines.append(f"| {row['source_tokens']} | {row['variant']} | {cells} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """A picture of the table: FLOPs of rows that skip and rows that zoom over the plain model's, by budget.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axis, share, title in zip(axes, ("0.0", "1.0"), ("rows that skip", "rows that zoom")):
        for name in dict.fromkeys(row["variant"] for row in rows):
            points = [(row["source_tokens"], row["over"][share]) for row in rows if row["variant"] == name]
            axis.plot(*zip(*points), marker="o", label=name)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="coarse budget, visual tokens", ylabel="FLOPs over plain", title=title)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
