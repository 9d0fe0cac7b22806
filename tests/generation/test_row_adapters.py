"""peft beside zooming: adapters by row follow their rows, activated LoRA begins where it should, learned prompts are
refused, and an error leaves nothing behind that a later call would meet."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from tests.families import FAMILY
from tests.generation_fixtures import always, mixed, mixed_singles
from tests.invariants.test_prefix_reuse import CropSpy, fused_prompt
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


# peft asks transformers in a way that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

families = pytest.mark.parametrize("family", FAMILIES)
NEW_TOKENS = 4
EVERYWHERE = r".*(language_model|zoom).*\.(q_proj|k_proj|v_proj|down_proj|embed_tokens|lm_head)"
DECODER = r".*language_model.*\.(q_proj|v_proj)"
INVOCATION = "!go"


def with_adapters(family: str, targets: str, **settings):
    """A model with the adapters "one" and "two"."""
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
    model = get_peft_model(tiny_model(family), lora, adapter_name="one")
    model.add_adapter("two", lora)
    return model.eval()


def run(model, inputs: dict, **options):
    settings = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_zoom_reports": True}
    return model.generate(**inputs, **{**settings, **options})


@families
@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("zoom", ["auto", "always"])
def test_every_row_has_its_own_adapter(family, zoom, beams):
    """Compared with the whole batch under one adapter after the other."""
    model = with_adapters(family, EVERYWHERE)
    inputs, options = mixed(family)
    options = {**options, "zoom": zoom, **beams}
    names = ["two", "one", "__base__"]
    probe = run(model, inputs, adapter_names=names, zoom="auto", gate_threshold=0).zoom_reports
    options["gate_threshold"] = (probe[0].gate_probability + probe[2].gate_probability) / 2
    output = run(model, inputs, adapter_names=names, **options)
    assert any(report.zoomed for report in output.zoom_reports)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = run(model, inputs, **options)
        else:
            model.set_adapter(name)
            expected = run(model, inputs, **options)
        assert output.zoom_reports[row].box == expected.zoom_reports[row].box
        assert output.sequences[row].tolist() == expected.sequences[row].tolist()
        if not beams:
            assert float((output.logits[0][row] - expected.logits[0][row]).abs().max()) < 1e-4


def test_sampled_sequences_need_names_that_peft_does_not_repeat():
    model = with_adapters("qwen2_5_vl", DECODER)
    inputs, _ = mixed("qwen2_5_vl")
    options = always(do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="adapter_names of peft has 3 entries, but 6 rows are generated"):
        run(model, inputs, adapter_names=["one"] * 3, **options)
    assert run(model, inputs, adapter_names=["one"] * 6, **options).sequences.shape[0] == 6


def test_adapters_by_row_do_not_reach_the_vision_tower():
    model = with_adapters("qwen2_5_vl", r".*(visual.*\.qkv|language_model.*\.q_proj)")
    inputs, _ = mixed("qwen2_5_vl")
    with pytest.raises(ValueError, match="the vision tower does not run: .*visual.*target_modules"):
        run(model, inputs, adapter_names=["one", "two", "one"], **always())


@families
@pytest.mark.parametrize("wrong", [{"synced_gpus": True}, {"gate_threshold": -1}, {"source_images": None}])
def test_an_error_leaves_no_adapters_behind(family, wrong):
    model = with_adapters(family, DECODER)
    inputs, _ = mixed(family)
    expected = run(model, inputs, **always())
    with pytest.raises(ValueError, match="synced_gpus|gate_threshold|source_images"):
        run(model, {**inputs, **wrong}, adapter_names=["one", "two", "one"], **always())
    again = run(model, inputs, **always())
    assert again.sequences.equal(expected.sequences)
    (single, *_), _ = mixed_singles(family)  # of another number of rows
    run(model, single, **always())


def activated(family: str, **settings):
    tokenizer = FAMILY[family].tokenizer()
    tokens = tokenizer(INVOCATION, add_special_tokens=False)["input_ids"]
    torch.manual_seed(4)
    lora = LoraConfig(
        r=8,
        lora_alpha=64,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=tokens,
        **{"target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj)", **settings},
    )
    return get_peft_model(tiny_model(family), lora).eval()


ACTIVATED_ROWS = [
    Row(["words only !go now"], [], 1),
    Row(["an image ", None, " and then !go on, please"], [(2, 3)], 2),
    Row(["before !go the image ", None, " it began"], [(4, 3)], 3),
    Row(["never invoked ", None, " here"], [(3, 3)], 4),
]


@families
def test_rows_under_an_activated_lora_equal_each_alone(family):
    model = activated(family)
    together = run(model, make_inputs(family, ACTIVATED_ROWS), **always())
    assert [report.zoomed for report in together.zoom_reports] == [False, True, True, True]
    for row, content in enumerate(ACTIVATED_ROWS):
        alone = run(model, make_inputs(family, [content]), **always())
        for ours, theirs in zip(together.logits, alone.logits):
            assert float((ours[row] - theirs[0]).abs().max()) < 1e-3 * float(theirs.max() - theirs.min())


@families
@pytest.mark.parametrize("row", [1, 2, 3])
def test_an_activated_lora_sees_the_fused_prompt(family, row, monkeypatch):
    """Whether it begins behind the image, before it (then the crop belongs to it) or never: as on the plain model that
    is asked with coarse view and crop."""
    model, spy = activated(family), CropSpy(monkeypatch)
    inputs = make_inputs(family, [ACTIVATED_ROWS[row]])
    output = run(model, inputs, **always(position_alignment="sequential"))
    crop = spy.crops[inputs["source_images"][0].data_ptr()]
    fused, _ = fused_prompt(family, plain_inputs(inputs), output.zoom_reports[0], crop)
    expected = run(model, {**fused, "attention_mask": torch.ones_like(fused["input_ids"])}, zoom="never")
    for ours, theirs in zip(output.logits, expected.logits):
        assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.max() - theirs.min())


def test_an_activated_lora_on_the_scorer_is_refused():
    model = activated("qwen2_5_vl", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="activated LoRA on the region branch's scorer.*Leave zoom out"):
        run(model, make_inputs("qwen2_5_vl", ACTIVATED_ROWS[1:2]), **always())
    assert run(model, make_inputs("qwen2_5_vl", ACTIVATED_ROWS[:1])).sequences.shape[0] == 1


LEARNED = {
    "PROMPT_TUNING": (PromptTuningConfig, 64),
    "P_TUNING": (PromptEncoderConfig, 64),
    "PREFIX_TUNING": (PrefixTuningConfig, 32),
}


@families
@pytest.mark.parametrize("kind", LEARNED)
def test_a_learned_prompt_is_refused_where_a_row_may_zoom(family, kind):
    settings, width = LEARNED[kind]
    sizes = {"num_layers": 6, "num_attention_heads": 2, "num_transformer_submodules": 1, "token_dim": width}
    base = tiny_model(family)
    inputs, options = mixed(family)
    expected = run(base, inputs, **options)
    model = get_peft_model(base, settings(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)).eval()
    for zoom in ("auto", "always"):
        with pytest.raises(
            ValueError, match=rf"a learned prompt \({kind}\) cannot go with zooming.*LoRA.*zoom='never'"
        ):
            run(model, inputs, **{**options, "zoom": zoom})
    assert run(base, inputs, **options).sequences.equal(expected.sequences)
    with model.disable_adapter():
        assert run(model, inputs, **options).sequences.equal(expected.sequences)
    if kind != "PREFIX_TUNING":
        plain = run(model, plain_inputs(inputs), zoom="never", max_new_tokens=1)
        assert not torch.equal(plain.logits[0], run(base, plain_inputs(inputs), zoom="never").logits[0])
