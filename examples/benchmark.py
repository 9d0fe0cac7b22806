"""The plain model and Q-Zoom side by side: what a prefill costs.

    python examples/benchmark.py --flops --backbone qwen2.5-vl-7b --source-tokens 576 --crop-tokens 256
    python examples/benchmark.py --time --batch 1 4 --zoom-share 0 0.5 1           # the bundled checkpoint

--flops is exact and needs neither weights nor a GPU: ratios in closed form for one setting, a count of what `generate`
really does beside them, and a table of every option at every budget. --time loads a checkpoint and measures seconds,
as ratios with quartiles, and peak memory. Options left out are the checkpoint's, for a backbone those of a new one.
"""

import argparse
import json
import sys
from pathlib import Path

from common import demo_folder, in_one_line, positive
from transformers.utils import logging

from hub_release.measure.sizes import BACKBONES
from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from modeling_qzoom.measuring import rows, times


def share(text: str) -> float:
    """A number between 0 and 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


sys.excepthook = in_one_line
logging.set_verbosity_error()
logging.disable_progress_bar()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--flops", action="store_true", help="FLOPs (the default)")
parser.add_argument("--time", action="store_true", help="seconds and memory of a checkpoint")
parser.add_argument(
    "--backbone", "--model", help=f"{', '.join(BACKBONES)}, or a checkpoint; the bundled one by default"
)
parser.add_argument("--source-tokens", type=positive, default=576, help="coarse budget in visual tokens")
parser.add_argument("--crop-tokens", type=positive, default=256, help="visual tokens of the crop")
parser.add_argument("--text-tokens", type=positive, default=64, help="tokens of the prompt beside the visual ones")
parser.add_argument("--gate", choices=("full", "light"), help="layers of the gate branch")
parser.add_argument("--region", choices=("full", "light"), help="layers of the region branch")
parser.add_argument("--keep-share", type=share, help="share of coarse tokens that a zoomed row keeps above layer K")
parser.add_argument("--all-tokens", action="store_true", help="leave nothing out of the last layers")
parser.add_argument("--questions", type=positive, default=10, help="about one page")
parser.add_argument("--budgets", type=positive, nargs="+", default=rows.BUDGETS, help="of the table of FLOPs")
parser.add_argument("--batch", type=positive, nargs="+", default=[1], help="rows of a timed batch")
parser.add_argument("--zoom-share", type=share, nargs="+", default=[0.0, 1.0], help="of the rows of a timed batch")
parser.add_argument("--runs", type=positive, default=9, help="timed pairs of calls")
parser.add_argument("--device", default="cpu", help="for --time")
parser.add_argument("--output", type=Path, help="file for the numbers as JSON")
parser.add_argument("--picture", type=Path, help="file for a picture of the table of FLOPs")
given = parser.parse_args()

name = given.backbone or str(demo_folder())
config = BACKBONES[name].config(zooms=True)[0] if name in BACKBONES else QZoomConfig.from_pretrained(name)
named = {"gate_branch": given.gate, "region_branch": given.region, "keep_share": given.keep_share}
named |= {"skip_unread": False if given.all_tokens else None}
options = {option: value for option, value in named.items() if value is not None}
has_budget = config.backbone.grid.has_budget
if not has_budget:
    print(f"note: crops of {name} have one size, whatever --crop-tokens and --budgets say", file=sys.stderr)
crop = given.crop_tokens if has_budget else None
setting = rows.Setting(config, given.source_tokens, crop, given.text_tokens, options)
found: dict = {"backbone": name, **rows.ratios(setting, given.questions)}
if given.flops or not given.time:
    counted = rows.done_over_needed(setting)
    found |= {"done_over_needed": max(counted.values()), "done_over_needed_by_row": counted}
    budgets = given.budgets if has_budget else [given.source_tokens]
    found["table"] = list(rows.table(config, budgets, crop, given.text_tokens))
    for key in ("skip_over_plain", "zoom_over_plain", "page_over_plain", "done_over_needed"):
        print(f"{key:17} {found[key]:.4f}")
    print(f"{given.questions} questions about one page; gate {found['gate']}, region {found['region']}, ", end="")
    print(f"keep_share {found['keep_share']}\n\n{rows.markdown(found['table'])}")
    if given.picture:
        rows.draw(found["table"], str(given.picture))
if given.time:
    if name in BACKBONES:
        model = (
            QZoomForConditionalGeneration(config).to(given.device).eval()
        )  # random weights: time asks for no others
    else:
        model = QZoomForConditionalGeneration.from_pretrained(name, device_map=given.device)
    pairs = dict.fromkeys((batch, round(batch * part)) for batch in given.batch for part in given.zoom_share)
    timed = [times.compare(model, setting, batch=b, zooming=z, runs=given.runs) for b, z in pairs]
    found["time"] = {"device": given.device, "runs": given.runs, "rows": timed}
    print(times.markdown(timed))
if given.output:
    given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
