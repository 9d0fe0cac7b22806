"""Without a zoom the model is the plain backbone: bit for bit in float32, as long as no token is left out."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from modeling_qzoom.backbone_cache_qzoom import CACHE
from modeling_qzoom.backbones_qzoom import BACKBONES
from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, qwen_tokenizer, tiny_model, tiny_vlm


NEW_TOKENS = 4
PROMPTS = {
    "one image": [Row(["look ", None, "what?"], [(3, 4)], seed=1)],
    "image last": [Row(["what is on it?", None], [(2, 5)], seed=2)],
    "several images": [Row([None, "and", None, "then", None, "compare"], [(2, 3), (1, 4), (4, 2)], seed=3)],
    "text only": [Row(["no picture at all"])],
    "left padding": [
        Row([None, "short"], [(2, 2)], seed=4),
        Row(["a much longer text before the image ", None, "and a question?"], [(3, 5)], seed=5),
        Row(["only text"]),
        Row([None, "two", None, "images"], [(1, 5), (4, 1)], seed=6),
    ],
}
# (family, K); a second tap for Qwen3-VL, among its DeepStack layers
MODELS = [*((family, 3) for family in FAMILIES), ("qwen3_vl", 1)]


def generate(model, inputs: dict, **options):
    options = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, do_sample=False, **options)


def assert_identical(ours, theirs) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == len(theirs.logits) == NEW_TOKENS
    for step, (our_logits, their_logits) in enumerate(zip(ours.logits, theirs.logits)):
        assert torch.equal(our_logits, their_logits), f"logits of step {step}"


def assert_equal_but_rounding(ours, theirs) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for our_logits, their_logits in zip(ours.logits, theirs.logits, strict=True):
        scale = their_logits.max() - their_logits.min()
        assert (our_logits - their_logits).abs().max() <= 1e-5 * scale


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: f"{param[0]}-{param[1]}")
def pair(request):
    """(family, Q-Zoom model, an independent copy of its backbone)."""
    family, branch_layer = request.param
    return family, tiny_model(family, branch_layer=branch_layer), tiny_vlm(family)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_zoom_never_is_the_plain_backbone(pair, prompt):
    family, model, vlm = pair
    inputs = make_inputs(family, PROMPTS[prompt])
    plain = generate(vlm, plain_inputs(inputs))
    assert_identical(generate(model, inputs, zoom="never"), plain)
    assert_identical(generate(model, plain_inputs(inputs), zoom="never"), plain)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_without_a_zoom_unread_tokens_are_left_out_where_a_call_asks_for_it(pair, prompt, monkeypatch):
    family, model, vlm = pair
    inputs, lengths = make_inputs(family, PROMPTS[prompt]), []
    last = model.vlm.get_decoder().layers[-1]
    hook = last.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    output = generate(model, inputs, zoom="never", skip_unread=True, return_zoom_reports=True)
    hook.remove()
    assert lengths == [1] * NEW_TOKENS
    assert_equal_but_rounding(output, generate(vlm, plain_inputs(inputs)))
    has_image = [bool(row.grids) or None in row.pieces for row in PROMPTS[prompt]]
    assert [report.reason for report in output.zoom_reports] == ["off" if has else "no_image" for has in has_image]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_closed_gates_are_the_plain_backbone(pair, prompt):
    family, model, vlm = pair
    inputs = make_inputs(family, PROMPTS[prompt])
    options = {"zoom": "auto", "gate_threshold": 1.5, "return_zoom_reports": True}
    output, plain = generate(model, inputs, **options, skip_unread=False), generate(vlm, plain_inputs(inputs))
    assert_identical(output, plain)
    assert_equal_but_rounding(generate(model, inputs, **options), plain)
    images = [bool(row.grids) or None in row.pieces for row in PROMPTS[prompt]]
    assert [report.reason for report in output.zoom_reports] == [
        "gate_closed" if has_image else "no_image" for has_image in images
    ]
    assert [report.gate_probability is not None for report in output.zoom_reports] == images


@pytest.mark.parametrize("prompt", PROMPTS)
def test_empty_maps_are_the_plain_backbone(pair, prompt):
    family, model, vlm = pair
    inputs = make_inputs(family, PROMPTS[prompt])
    options = {"zoom": "always", "region_threshold": 1.0, "return_zoom_reports": True}
    output, plain = generate(model, inputs, **options, skip_unread=False), generate(vlm, plain_inputs(inputs))
    assert_identical(output, plain)
    assert_equal_but_rounding(generate(model, inputs, **options), plain)
    assert not any(report.zoomed for report in output.zoom_reports)


def test_a_zoom_changes_the_logits(pair):
    """The comparisons above would notice a crop."""
    family, model, vlm = pair
    inputs = make_inputs(family, PROMPTS["one image"])
    zoomed = generate(model, inputs, zoom="always", region_threshold=0.5, region_threshold_mode="peak")
    plain = generate(vlm, plain_inputs(inputs))
    assert (zoomed.logits[0] - plain.logits[0]).abs().max() > 0.05


def test_skipping_rows_of_a_mixed_batch_are_the_plain_backbone(pair):
    family, model, vlm = pair
    rows = PROMPTS["left padding"]
    inputs = make_inputs(family, rows)
    options = {"region_threshold": 0.5, "region_threshold_mode": "peak", "return_zoom_reports": True}
    probe = generate(model, inputs, zoom="auto", gate_threshold=0, **options)
    gates = [report.gate_probability for report in probe.zoom_reports]
    present = sorted(gate for gate in gates if gate is not None)
    threshold = (present[0] + present[-1]) / 2
    output = generate(model, inputs, zoom="auto", gate_threshold=threshold, **options)
    assert {report.reason for report in output.zoom_reports} == {"gate_open", "gate_closed", "no_image"}
    for row, report in enumerate(output.zoom_reports):
        plain = generate(vlm, plain_inputs(make_inputs(family, [rows[row]])))
        difference = (output.logits[0][row] - plain.logits[0][0]).abs().max()
        if report.zoomed:
            assert difference > 0.02
            continue
        assert difference < 1e-4
        assert torch.equal(output.sequences[row, -NEW_TOKENS:], plain.sequences[0, -NEW_TOKENS:])
        for ours, theirs in zip(output.logits, plain.logits):
            assert (ours[row] - theirs[0]).abs().max() < 1e-4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_forward_is_the_plain_backbone(pair, prompt):
    family, model, vlm = pair
    inputs = plain_inputs(make_inputs(family, PROMPTS[prompt]))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ours, theirs = model(**inputs, labels=labels), vlm(**inputs, labels=labels)
    assert torch.equal(ours.loss, theirs.loss)
    valid = inputs["attention_mask"].bool()
    assert torch.equal(ours.logits[valid], theirs.logits[valid])
    last = model(**inputs, logits_to_keep=1).logits
    assert torch.equal(last[:, 0], vlm(**inputs, logits_to_keep=1).logits[:, 0])


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_answers_to_both_names(pair, name):
    """Whichever of them the installed transformers uses."""
    family, model, vlm = pair
    inputs = plain_inputs(make_inputs(family, PROMPTS["one image"]))
    token, plain = torch.full((1, 1), 40), vlm(**inputs, use_cache=True)
    cache = DynamicCache(config=model.config.get_text_config())
    first = model(**inputs, **{name: cache})
    assert first.past_key_values is cache and first[CACHE] is cache
    assert list(first.keys()) == list(plain.keys())
    assert [value is cache for value in first.to_tuple()] == [key == CACHE for key in first.keys()]
    second = model(input_ids=token, **{name: cache})
    assert torch.equal(first.logits, plain.logits)
    assert torch.equal(second.logits, vlm(input_ids=token, **{CACHE: plain[CACHE]}).logits)
    inputs = make_inputs(family, PROMPTS["one image"])
    for zoom in ("never", "always"):
        options = {"zoom": zoom, "region_threshold": 0.5, "region_threshold_mode": "peak"}
        cache = DynamicCache(config=model.config.get_text_config())
        output = generate(model, inputs, **options, **{name: cache})
        assert output.past_key_values is cache and cache.get_seq_length() > inputs["input_ids"].shape[1]
        assert_identical(output, generate(model, inputs, **options))


def test_a_call_with_two_caches_is_refused(pair):
    family, model, _ = pair
    inputs = plain_inputs(make_inputs(family, PROMPTS["text only"]))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(**inputs, past_key_values=DynamicCache(), cache=DynamicCache())


def video_inputs(family: str, rows: list[Row], frames: int = 2) -> dict:
    """A row with one video, then the given rows."""
    tokenizer = qwen_tokenizer()
    image, video = (tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video"))
    height, width = 2, 3
    patch = FAMILY[family].patch
    block = FAMILY[family].video_text(frames, height * width)
    inputs = make_inputs(family, [Row(["film " + block + "what happens?"]), *rows])
    inputs["pixel_values_videos"] = torch.randn(4 * height * width * frames, 6 * patch * patch)
    inputs["video_grid_thw"] = torch.tensor([[frames, 2 * height, 2 * width]])
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == image).int() + 2 * (ids == video).int()
    return inputs


# LLaVA-1.5 takes no videos
@pytest.mark.parametrize("pair", [model for model in MODELS if FAMILY[model[0]].takes_videos], indirect=True)
@pytest.mark.parametrize("with_image_row", [False, True])
def test_videos_pass_through_unzoomed(pair, with_image_row):
    family, model, vlm = pair
    rows = [Row(["see", None, "?"], [(3, 4)], seed=8)] if with_image_row else []
    inputs = video_inputs(family, rows)
    output = generate(
        model,
        inputs,
        zoom="always",
        region_threshold=0.5,
        region_threshold_mode="peak",
        return_zoom_reports=True,
    )
    plain = generate(vlm, plain_inputs(inputs))
    assert output.zoom_reports[0].reason == "video" and not output.zoom_reports[0].zoomed
    if not with_image_row:
        assert_identical(output, plain)
        return
    assert output.zoom_reports[1].reason == "forced" and output.zoom_reports[1].zoomed
    for ours, theirs in zip(output.logits, plain.logits):
        assert (ours[0] - theirs[0]).abs().max() < 1e-4
    alone = generate(
        model, make_inputs(family, rows), zoom="always", region_threshold=0.5, region_threshold_mode="peak"
    )
    for ours, theirs in zip(output.logits, alone.logits):
        assert (ours[1] - theirs[0]).abs().max() < 1e-4


def test_every_row_of_the_registry_has_a_tiny_model():
    """Without one, a new row would pass through these tests and those of its like unseen."""
    assert set(FAMILIES) == set(BACKBONES)
