"""Attention stays with SDPA or FlashAttention.

FlashAttention cannot run here. Its two functions are written in plain torch and put under transformers' own
FlashAttention path, which unpads by 2-D masks and detects packed sequences from `position_ids`.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlamaConfig, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


# transformers takes its variable-length paths where "flash" is in the name
FLASH = "flash_on_cpu"
NEW_TOKENS = 4
ZOOM = {"zoom": "always", "region_threshold": 0.6, "region_threshold_mode": "peak"}
ROWS = [
    Row(["see", None, "?"], [(3, 4)], seed=1),
    Row([None, "two", None, "images, a longer question"], [(2, 3), (4, 4)], seed=2),
    Row(["text before a strip", None], [(1, 6)], seed=3),
    Row(["no image here"]),
]


def _attend(query, key, value, scaling: float, is_causal: bool) -> torch.Tensor:
    """One sequence: (q, heads, d), (k, kv_heads, d) → (q, heads, d); the last query sees the last key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    if is_causal:
        first = key.shape[0] - query.shape[0]
        visible = torch.arange(key.shape[0]) <= first + torch.arange(query.shape[0])[:, None]
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """(B, n, heads, d) of rows without padding."""
    return torch.stack([_attend(*row, softmax_scale, causal) for row in zip(q, k, v)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """(total, heads, d) of sequences end to end, with their cumulative lengths."""
    q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert sum(q_lengths) == len(q) and sum(k_lengths) == len(k) == len(v)
    parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths))
    return torch.cat([_attend(*part, softmax_scale, causal) for part in parts])


class Watch:
    """Counts what transformers' FlashAttention path did."""

    def __init__(self):
        self.masked = self.holes = self.packed = 0

    def attach(self, patch) -> None:
        utils = modeling_flash_attention_utils
        unpad, is_packed = utils._upad_input, utils._is_packed_sequence

        def watched_unpad(query, key, value, mask, query_length, unpad_input):
            self.masked += 1
            # padding after a token: the hole between a row's prefix and its chunk
            self.holes += query_length > 1 and bool((mask[:, 1:].int() < mask[:, :-1].int()).any())
            return unpad(query, key, value, mask, query_length, unpad_input)

        def watched_packed(position_ids, batch_size):
            packed = bool(is_packed(position_ids, batch_size))
            self.packed += packed
            return packed

        patch.setattr(utils, "_upad_input", watched_unpad)
        patch.setattr(utils, "_is_packed_sequence", watched_packed)


@pytest.fixture(autouse=True)
def watch(monkeypatch):
    """FlashAttention on the CPU under the name `FLASH`."""
    utils = modeling_flash_attention_utils
    functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    AttentionInterface.register(FLASH, flash_attention_forward)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    watch = Watch()
    watch.attach(monkeypatch)
    yield watch
    del AttentionInterface._global_mapping[FLASH]
    del AttentionMaskInterface._global_mapping[FLASH]


def generate(model, inputs: dict, **options):
    arguments = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_zoom_reports": True, "do_sample": False}
    return model.generate(**inputs, **{**arguments, **options})


def assert_close(ours, theirs) -> None:
    for mine, other in zip(ours.zoom_reports, theirs.zoom_reports):
        assert (mine.reason, mine.box, mine.image_index) == (other.reason, other.box, other.image_index)
        if other.gate_probability is not None:
            assert abs(mine.gate_probability - other.gate_probability) < 1e-5
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.logits, theirs.logits):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


ALIGNMENTS = [(family, alignment) for family in FAMILIES[:2] for alignment in ("continuous", "sequential")]


@pytest.mark.parametrize("implementation", [FLASH, "eager"])
@pytest.mark.parametrize("family, alignment", [*ALIGNMENTS, ("llava", None)])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2]], ids=["batch", "one image", "two images"])
def test_zoomed_rows_agree_with_sdpa(family, alignment, implementation, rows, watch):
    model, inputs = tiny_model(family), make_inputs(family, rows)
    options = {**ZOOM, "position_alignment": alignment}
    sdpa = generate(model, inputs, **options)
    model.set_attn_implementation(implementation)
    assert_close(generate(model, inputs, **options), sdpa)
    assert any(report.zoomed for report in sdpa.zoom_reports)
    if implementation == FLASH:
        assert watch.packed == 0
        if len(rows) > 1:
            assert watch.masked > 0 and watch.holes > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_decisions_agree_with_sdpa(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    gates = [report.gate_probability for report in generate(model, inputs, **{**ZOOM, "zoom": "auto"}).zoom_reports]
    gates = sorted(gate for gate in gates if gate is not None)
    options = {**ZOOM, "zoom": "auto", "gate_threshold": (gates[0] + gates[-1]) / 2}
    sdpa = generate(model, inputs, **options)
    assert {report.reason for report in sdpa.zoom_reports} >= {"gate_open", "gate_closed", "no_image"}
    model.set_attn_implementation(FLASH)
    assert_close(generate(model, inputs, **options), sdpa)
    assert_close(generate(model, inputs, zoom="never"), generate(tiny_model(family), inputs, zoom="never"))


@pytest.mark.parametrize("implementation", [FLASH, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_plans_agree_with_sdpa(family, implementation, watch):
    """Light branches run around their images in causal chunks, which FlashAttention can express."""
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    options = {**ZOOM, "zoom": "auto", "gate_threshold": 0, "keep_share": 0.3}
    options |= {"gate_branch": "light", "region_branch": "light"}
    sdpa = generate(model, inputs, **options)
    assert any(report.zoomed for report in sdpa.zoom_reports)
    model.set_attn_implementation(implementation)
    assert_close(generate(model, inputs, **options), sdpa)
    assert watch.packed == 0


@pytest.mark.parametrize("implementation", [FLASH, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pages_agree_with_sdpa(family, implementation, watch):
    """Rows of different lengths continue from one page, with a second image behind it or without."""
    model = tiny_model(family)
    rows = [Row(["see ", None, "?"], [(3, 4)], seed=1), Row(["see ", None, "or ", None, "this?"], [(3, 4), (2, 3)], 1)]
    rows.append(Row(["no image here"]))
    inputs = make_inputs(family, rows)
    kinds = [{}, {"keep_share": 0.3, "gate_branch": "light", "region_branch": "light"}]
    calls = [{**ZOOM, **kind, **zoom} for kind in kinds for zoom in ({}, {"zoom": "auto", "gate_threshold": 2})]
    sdpa = [generate(model, inputs, **options, skip_unread=False) for options in calls]
    assert any(report.zoomed for output in sdpa for report in output.zoom_reports)
    model.set_attn_implementation(implementation)
    page = model.read_page(**make_inputs(family, rows[:1]))
    for options, output in zip(calls, sdpa):
        assert_close(generate(model, inputs, **options), output)
        assert_close(generate(model, inputs, **options, page=[page, page, None]), output)
    assert watch.packed == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sub_models_may_differ(family, watch):
    """The branches follow the text model, whatever the vision tower uses."""
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    sdpa = generate(model, inputs, **ZOOM)
    model.vlm.get_decoder().set_attn_implementation(FLASH)
    assert_close(generate(model, inputs, **ZOOM), sdpa)
    assert watch.masked > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_training_passes_agree_with_sdpa(family, watch):
    model = tiny_model(family)
    inputs = make_inputs(family, ROWS[:2])
    plain, sources = plain_inputs(inputs), inputs["source_images"]
    targets = [[torch.ones(1, 2, 2)] * len(row.grids) for row in ROWS[:2]]
    calls = [
        {**plain, "region_targets": targets, "gate_targets": torch.tensor([1.0, 0.0])},
        {**plain, "labels": inputs["input_ids"], "source_images": sources, "zoom_boxes": [(9, 9, 70, 80), None]},
    ]
    losses = [model(**call).loss for call in calls]
    model.set_attn_implementation(FLASH)
    for call, loss in zip(calls, losses):
        torch.testing.assert_close(model(**call).loss, loss, atol=1e-4, rtol=0)
    assert watch.packed == 0 and watch.masked > 0


class _NoAttentionMaps(TorchDispatchMode):
    """Fails where scores of all tokens against all tokens come into being."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.fused = length, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.fused += "scaled_dot_product" in name
        assert "softmax" not in name, f"{name} in the path"
        if "bmm" in name:
            assert min(result.shape[-2:]) < self.length, f"{name} returns {tuple(result.shape)}"
        return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["batch", "single"])
def test_no_attention_map_is_made(family, rows):
    model, inputs = tiny_model(family), make_inputs(family, rows)
    with _NoAttentionMaps(length=16) as maps:
        output = generate(model, inputs, **{**ZOOM, "zoom": "auto", "gate_threshold": 0})
    assert any(report.zoomed for report in output.zoom_reports) and maps.fused > 0
    model.set_attn_implementation("eager")
    with pytest.raises(AssertionError, match="in the path|returns"), _NoAttentionMaps(length=16):
        generate(model, inputs, **ZOOM)


def test_packed_positions_split_a_row(watch):
    """What the path above would do to a row whose fractional or jumping positions reached it without a mask."""
    module = torch.nn.Linear(2, 2)
    module.is_causal, module.config = True, LlamaConfig(attn_implementation=FLASH)
    states = torch.randn(1, 2, 6, 4)

    def attend(**kwargs):
        return flash_attention_forward(module, states, states, states, None, scaling=0.5, **kwargs)[0]

    whole = attend()
    reference = torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True, scale=0.5)
    torch.testing.assert_close(whole, reference.transpose(1, 2), atol=1e-5, rtol=0)
    assert watch.packed == 0
    split = attend(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert watch.packed == 1
    torch.testing.assert_close(split[:, :3], whole[:, :3])
    assert (split[:, 3:] - whole[:, 3:]).abs().max() > 0.01
