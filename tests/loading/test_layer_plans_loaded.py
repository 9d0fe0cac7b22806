"""Light branches, foveation and pages with checkpoints: saved, loaded, as an add-on, in 4 bit, on the disk."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from modeling_qzoom import QZoomForConditionalGeneration
from tests.loading_fixtures import CLOSE, VISION, ZOOM_CONFIG, answer, perturb_branches, plain_folder
from tests.tiny import FAMILIES, Row, make_inputs


load = QZoomForConditionalGeneration.from_pretrained
PLANS = {"gate_branch": "light", "region_branch": "light", "keep_share": 0.3, "keep_margin": 0}
FULL = {"gate_branch": "full", "region_branch": "full", "keep_share": 1.0}


@pytest.fixture(scope="module", params=FAMILIES)
def attached(request, tmp_path_factory):
    """(family, a model whose configuration asks for every plan, on the folder of its base)."""
    base = plain_folder(request.param, tmp_path_factory.mktemp(request.param) / "base")
    torch.manual_seed(0)
    model = QZoomForConditionalGeneration.from_backbone(
        base, branch_layer=3, branch_depth=2, zoom_config={**ZOOM_CONFIG[request.param], **PLANS}
    )
    return request.param, perturb_branches(model)


def test_a_checkpoint_answers_as_it_did_before_it_was_saved(attached, tmp_path):
    family, model = attached
    expected = answer(model, family)
    assert expected.report.zoomed and answer(model, family, **FULL).difference(expected) > 1e-3
    model.save_pretrained(tmp_path / "full")
    model.save_addon(tmp_path / "addon")
    for folder in ("full", "addon"):
        loaded = load(tmp_path / folder)
        assert {name: getattr(loaded.config, name) for name in PLANS} == PLANS
        assert answer(loaded, family).difference(expected) < CLOSE


def test_a_4_bit_model_answers_as_one_with_the_same_rounded_weights(attached, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    family, model = attached
    model.save_pretrained(tmp_path / "full")
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=VISION[family],
    )
    small, rounded = load(tmp_path / "full", quantization_config=recipe), load(tmp_path / "full")
    for name, module in small.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            rounded.get_submodule(name).weight.data = weight
    given, expected = answer(small, family), answer(rounded, family)
    assert given.report.zoomed and given.report.box == expected.report.box
    assert abs(given.report.gate_probability - expected.report.gate_probability) < 0.05
    assert float((given.logits[0] - expected.logits[0]).abs().max()) < 0.2 * float(expected.logits[0].std())
    continued = answer(small, family, page=read_page(small, family))
    assert continued.report.box == given.report.box and continued.difference(given) < 0.2 * float(
        given.logits[0].std()
    )


@pytest.mark.parametrize("kind", ["full", "light"])
def test_pages_of_a_model_that_lies_on_the_disk(attached, tmp_path, kind):
    """Layers and branches give keys and values of the page where they run."""
    family, model = attached
    model.save_pretrained(tmp_path / "full")
    options = {"gate_branch": kind, "region_branch": kind, "keep_share": 1.0}
    expected = answer(model, family, **options)
    placement = {"vlm": "disk", "zoom": "disk"}
    offloaded = load(tmp_path / "full", device_map=placement, offload_folder=tmp_path / "off")
    page = read_page(offloaded, family)
    for _ in range(2):
        assert answer(offloaded, family, page=page, **options).difference(expected) < CLOSE


def read_page(model, family: str):
    """The page of `answer`'s question."""
    inputs = make_inputs(family, [Row(["hello ", None, " who?"], [(4, 5)], seed=3)])
    return model.read_page(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gate_branch", "thin", "gate_branch must be one of"),
        ("region_branch", None, "region_branch must be one of"),
        ("keep_share", 1.5, "keep_share must be a share between 0 and 1"),
        ("keep_share", float("nan"), "keep_share must be a finite number"),
        ("keep_margin", 0.5, "keep_margin must be a whole number of cells"),
        ("skip_unread", "yes", "skip_unread must be True, False or None"),
    ],
)
def test_a_bad_field_is_named(attached, field, value, message):
    config = attached[1].config
    with pytest.raises(ValueError, match=message):
        type(config)(**{**config.to_dict(), field: value})
