"""The table of options: every arm is measured under options that exist, and stands in the table with its figures."""

import json

from hub_release.demo import options
from modeling_qzoom.evaluation.__main__ import build_parser
from modeling_qzoom.zoom_options_qzoom import ZoomOptions, validate_options


def test_every_arm_is_measured_under_its_options(tmp_path, monkeypatch) -> None:
    seen = []

    def evaluate(model, output, rows, *arguments):
        parsed = build_parser().parse_args(["--model", str(model), "--rows", str(rows), *arguments])
        seen.append(dict(parsed.option))
        figures = {name: len(seen) / 8 for name, _ in options._FIGURES}
        return {
            "summary": figures,
            "other": figures,
            "intervals": {"fine_accuracy_zoom": [0.5, 0.75]},
            "conditions": {},
        }

    monkeypatch.setattr(options, "evaluate", evaluate)
    results = options.measure_arms(tmp_path, tmp_path, 12, "validation", 7)
    assert seen == [arm["options"] for arm in json.loads(json.dumps(results))["arms"].values()]
    for given in seen:
        validate_options(ZoomOptions(**given), mrope=True)
    lines = options.markdown(results).splitlines()
    assert len(lines) == 2 + len(options.ARMS) + 2
    assert lines[2].startswith("| every token in every layer | 0.125 (0.500 – 0.750) | 0.125 |")
