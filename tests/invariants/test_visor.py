"""VISOR's configurations: what they compute, against stock layers over whole sequences and states put back by hand."""

import random

import pytest
import torch

from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.backbone_layers_qzoom import causal_mask, rotary, run_layers
from modeling_qzoom.zoom_coarse_qzoom import coarse_view
from tests.invariants.test_flops import ROW, ClosedForm, count_flops, large_inputs, large_model
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model
from tests.training.test_forward_fused import with_answers


LAYERS, NEW_TOKENS = 6, 4
CONFIGURATIONS = {
    "whole": "SSSSSS",
    "upper": "SSSSRR",
    "mixed": "SRSRTR",
    "read": "RRRRRR",
    "thin": "STRTTR",
    "blind end": "SSSTTT",
    "late": "TSRSRT",
}
SETTINGS = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_dict_in_generate": True}
ROWS = [
    Row(["look ", None, "what?"], [(3, 4)], seed=1),
    Row([None, "and", None, "then, a longer question"], [(4, 4), (3, 5)], seed=2),
    Row(["only words"]),
    Row(["what is in ", None], [(5, 4)], seed=3),
]
families = pytest.mark.parametrize("family", FAMILIES)


def visor_model(family: str):
    return tiny_model(family, visor={"configurations": CONFIGURATIONS})


@torch.no_grad()
def recomputed(model, inputs: dict, kinds: str) -> torch.Tensor:
    """(n, vocabulary) logits of one row: stock layers, after each of which frozen tokens get their old states back."""
    view = coarse_view(model, inputs["input_ids"], inputs["attention_mask"], vision_of(inputs))
    decoder, hidden = model.vlm.get_decoder(), view.embeds
    ids = inputs["input_ids"][0]
    tokens = [model.config.image_token_id, model.config.video_token_id]
    visual = torch.tensor([token in tokens for token in ids.tolist()])
    visual[inputs["prompt"] - 1] = False
    tables = rotary(decoder, hidden, view.positions.for_decoder())
    for layer, kind in enumerate(kinds):
        columns = (~visual).nonzero()[:, 0] if kind == "T" else torch.arange(len(ids))
        part = hidden[:, columns]
        after = hidden.clone()
        after[:, columns] = run_layers(
            decoder,
            part,
            layer,
            layer + 1,
            mask=causal_mask(decoder, part, None, None),
            position_embeddings=tuple(table[:, columns] for table in tables),
        )
        if kind != "S":
            after[:, visual] = hidden[:, visual]
        hidden = after if view.deepstack is None else view.deepstack.add(after, layer)
    return model.get_output_embeddings()(decoder.norm(hidden))[0]


def vision_of(inputs: dict) -> dict:
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    return {name: inputs[name] for name in names if name in inputs}


def with_answer(inputs: dict, tokens: torch.Tensor) -> dict:
    """One row's prompt and the tokens that were fed back."""
    fed = tokens[None, :-1]
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], fed], dim=1),
        "prompt": inputs["input_ids"].shape[1],
    }
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in inputs:
            tail = torch.ones_like(fed) if name == "attention_mask" else torch.zeros_like(fed)
            whole[name] = torch.cat([inputs[name], tail.to(inputs[name])], dim=1)
    return whole


@pytest.mark.parametrize("name", CONFIGURATIONS)
@families
def test_prefill_and_steps_equal_a_recomputation_of_the_whole_sequence(family, name):
    model = visor_model(family)
    inputs = make_inputs(family, ROWS)
    output = model.generate(**inputs, zoom="never", vision=name, return_zoom_reports=True, **SETTINGS)
    assert [report.vision for report in output.zoom_reports] == [name] * len(ROWS)
    for row, content in enumerate(ROWS):
        tokens = output.sequences[row, -NEW_TOKENS:]
        whole = with_answer(plain_inputs(make_inputs(family, [content])), tokens)
        expected = recomputed(model, whole, CONFIGURATIONS[name])[-NEW_TOKENS:]
        actual = torch.stack([step[row] for step in output.logits])
        assert (actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@families
def test_dense_is_the_plain_model(family):
    model, inputs = visor_model(family), make_inputs(family, ROWS)
    plain = model.vlm.generate(**plain_inputs(inputs), **SETTINGS)
    dense = model.generate(**inputs, zoom="never", vision="dense", **SETTINGS)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(dense.logits, plain.logits, strict=True))
    whole = model.generate(**inputs, zoom="never", vision="whole", **SETTINGS)
    for ours, theirs in zip(whole.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    upper = model.generate(**inputs, zoom="never", vision="upper", **SETTINGS)
    assert max((ours - theirs).abs().max() for ours, theirs in zip(upper.logits, plain.logits)) > 1e-3


@families
def test_rows_of_different_configurations_equal_their_own_calls(family):
    model, rng = visor_model(family), random.Random(family)
    for _ in range(6):
        rows = rng.sample(ROWS, rng.randrange(2, 5))
        names = [rng.choice(["dense", *CONFIGURATIONS]) for _ in rows]
        batch = model.generate(**make_inputs(family, rows), zoom="never", vision=names, **SETTINGS)
        for row, (content, name) in enumerate(zip(rows, names)):
            single = model.generate(**make_inputs(family, [content]), zoom="never", vision=name, **SETTINGS)
            assert torch.equal(batch.sequences[row, -NEW_TOKENS:], single.sequences[0, -NEW_TOKENS:])
            for ours, theirs in zip(batch.logits, single.logits, strict=True):
                torch.testing.assert_close(ours[row], theirs[0], atol=1e-4, rtol=0)


@families
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_equal_those_of_single_rows(family, settings):
    model = visor_model(family)
    names = ["mixed", "dense", "late", "upper"]
    options = {"zoom": "never", "max_new_tokens": NEW_TOKENS, **settings}
    batch = model.generate(**make_inputs(family, ROWS), vision=names, **options)
    returned = settings.get("num_return_sequences", 1)
    for row, (content, name) in enumerate(zip(ROWS, names)):
        single = model.generate(**make_inputs(family, [content]), vision=name, **options)
        assert torch.equal(batch[row * returned : (row + 1) * returned, -NEW_TOKENS:], single[:, -NEW_TOKENS:])


@families
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
def test_a_training_pass_computes_what_generate_does(family, right):
    model, inputs = visor_model(family), make_inputs(family, ROWS)
    for name in ("mixed", "late", "dense"):
        output = model.generate(**inputs, zoom="never", vision=name, **SETTINGS)
        batch = with_answers(inputs, output.sequences, right)
        batch.pop("source_images")
        passed = model(**batch, vision=name)
        columns = (batch["labels"] != -100).nonzero()[:, 1].view(len(ROWS), -1)
        rows = torch.arange(len(ROWS))[:, None]
        torch.testing.assert_close(passed.logits[rows, columns - 1], torch.stack(output.logits, 1), atol=1e-4, rtol=0)
        expected = torch.nn.functional.cross_entropy(
            torch.stack(output.logits, 1).flatten(0, 1), output.sequences[:, -NEW_TOKENS:].flatten()
        )
        torch.testing.assert_close(passed.loss, expected, atol=1e-4, rtol=0)
        passed.loss.backward()
        decoder = model.vlm.get_decoder()
        assert all(weight.grad is not None for weight in decoder.layers.parameters())


CHOICES = ["dense", "upper", "mixed"]
ROUTED = [Row(["ask ", None, f" number {seed}?"], [(3, 4)], seed) for seed in range(5)] + [ROWS[1], ROWS[2]]


def routed_model(family: str):
    """A model whose router's choices differ from row to row."""
    router = {"layer": 1, "choices": CHOICES}
    model = tiny_model(family, visor={"configurations": CONFIGURATIONS, "router": router})
    seen = []
    hook = model.visor.router.register_forward_hook(lambda module, args, logits: seen.append(logits))
    model.generate(**make_inputs(family, ROUTED), zoom="never", vision="auto", max_new_tokens=1)
    hook.remove()
    with torch.no_grad():
        model.visor.router.outer.bias.sub_(seen[0].mean(0))
    return model


@families
def test_the_router_chooses_by_row(family, tmp_path):
    model = routed_model(family)
    rows = ROUTED
    options = {"zoom": "never", "return_zoom_reports": True, **SETTINGS}
    batch = model.generate(**make_inputs(family, rows), vision="auto", **options)
    chosen = [report.vision for report in batch.zoom_reports]
    assert len(set(chosen)) > 1 and set(chosen) <= set(CHOICES)
    for row, (content, name) in enumerate(zip(rows, chosen)):
        inputs = make_inputs(family, [content])
        alone, named = (model.generate(**inputs, vision=vision, **options) for vision in ("auto", name))
        assert alone.zoom_reports[0].vision == name
        for ours, routed, theirs in zip(batch.logits, alone.logits, named.logits, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(routed, theirs, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = QZoomForConditionalGeneration.from_pretrained(tmp_path)
    again = loaded.generate(**make_inputs(family, rows), vision="auto", **options)
    assert [report.vision for report in again.zoom_reports] == chosen


@families
def test_static_caches(family):
    model, inputs = visor_model(family), make_inputs(family, ROWS)
    options = {"zoom": "never", "vision": ["mixed", "thin", "dense", "late"], **SETTINGS}
    static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static.sequences, model.generate(**inputs, **options).sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": "tiny"}, "not a configuration of this checkpoint; it has \\['dense', 'whole'"),
        ({"vision": ["dense"]}, "names the configurations of 1 rows, the batch has 4"),
        ({"vision": "auto"}, "needs a checkpoint with a router"),
        ({"vision": 3}, "vision must be a name, or one name a row"),
        ({"vision": "upper", "zoom": "always"}, "does not go with zoom='always' yet"),
        ({"vision": "upper", "use_cache": False}, "zooming needs a plain DynamicCache"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    model, inputs = visor_model("qwen2_5_vl"), make_inputs("qwen2_5_vl", ROWS)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **{"zoom": "never", **options}, max_new_tokens=2)


def routed(**router) -> dict:
    return {"configurations": {"a": "SSSSSR", "b": "SSSSRR"}, "router": router}


@pytest.mark.parametrize(
    ("visor", "message"),
    [
        ({"configurations": {"dense": "SSSSSS"}}, "needs a name other than"),
        ({"configurations": {"a": "SSS"}}, "names 3 layers, the VLM's decoder has 6"),
        ({"configurations": {"a": "SSSSSX"}}, "one letter a decoder layer"),
        ({"layers": {}}, "visor must be"),
        (routed(layer=1, choices=["a"]), "needs two or more different choices"),
        (routed(layer=1, choices=["a", "c"]), "the router's choice 'c' is no configuration"),
        (routed(layer=5, choices=["a", "b"]), "its choices share the first 4 layers"),
        (routed(layer=0, choices=["a", "b"]), "in front of layer 0"),
        ({"configurations": {}, "router": 3}, "router must be"),
    ],
)
def test_a_bad_configuration_is_named(visor, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("qwen2_5_vl", visor=visor)


@families
@pytest.mark.parametrize("kinds", ["SSSSSSRR", "SRRRRRRR", "SRTRTTRT", "TTTTTTTT"])
def test_a_configuration_costs_its_closed_form(family, kinds):
    """Nothing is computed for tokens that a layer leaves out, and keys and values alone for those that are read."""
    model, inputs = large_model(family), large_inputs(family, [ROW])
    model.config.visor = {"configurations": {"sparse": kinds}}
    form = ClosedForm(model, inputs, {})
    segments = {
        "S": [(0, form.prompt)],
        "R": [(0, form.before), (form.visual, form.after)],
        "T": [(0, form.before + form.after)],
    }
    last = form.before + form.after if kinds[-1] == "T" else form.prompt
    layers = [segments[kind] for kind in kinds[:-1]] + [[(last - 1, 1)]]
    expected = sum(map(form.layer, layers)) + form.head()
    features = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    tower = count_flops(lambda: model.vlm.get_image_features(**features))
    counted = count_flops(lambda: model.generate(**inputs, zoom="never", vision="sparse", max_new_tokens=1))
    assert abs(counted - tower - expected) <= 0.002 * expected
