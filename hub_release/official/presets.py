"""The operating points that the authors publish."""

from typing import Any


def _preset(region: float, gate: float | None = None, budget: tuple[int, int] | None = None) -> dict[str, Any]:
    preset: dict[str, Any] = {"region_threshold": region}
    if gate is not None:
        preset["gate_threshold"] = gate
    if budget is not None:
        preset |= {"crop_min_tokens": budget[0], "crop_max_tokens": budget[1]}
    return preset


# thresholds and budgets as published per benchmark group: text in pictures, documents, high-resolution scenes
PRESETS: dict[tuple[str, bool], dict[str, dict[str, Any]]] = {
    ("qwen2_5_vl", True): {
        "fast": _preset(0.15, 0.05, (256, 576)),
        "balanced": _preset(0.125, 0.05, (256, 576)),
        "accurate": _preset(0.04, 0.02, (512, 4096)),
    },
    ("qwen3_vl", True): {
        "fast": _preset(0.15, 0.10, (256, 576)),
        "balanced": _preset(0.125, 0.10, (128, 576)),
        "accurate": _preset(0.10, 0.025, (512, 4096)),
    },
    # SD-RPN has no gate; its groups differ in the region threshold alone
    ("qwen2_5_vl", False): {
        "fast": _preset(0.1, budget=(576, 576)),
        "balanced": _preset(0.075, budget=(576, 576)),
        "accurate": _preset(0.05, budget=(576, 576)),
    },
    ("llava", False): {"fast": _preset(0.15), "balanced": _preset(0.1), "accurate": _preset(0.05)},
}
