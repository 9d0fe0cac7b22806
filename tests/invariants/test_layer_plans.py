"""Layer plans against recomputations without plans: stock layers over whole sequences, states put back by hand."""

import math

import pytest
import torch
from transformers.cache_utils import DynamicCache

import modeling_qzoom.zoom_second_pass_qzoom as second_pass
from modeling_qzoom.backbone_layers_qzoom import causal_mask, rotary, run_layers
from modeling_qzoom.backbone_plans_qzoom import (
    asking_token_plan,
    frozen_plan,
    keys_only_plan,
    last_token_plan,
    subset_plan,
)
from modeling_qzoom.zoom_fusion_qzoom import fused_deepstack, fused_embeds
from tests.tiny import FAMILIES, Row, make_inputs, tiny_model


ROWS, LENGTH, LAYERS = 3, 11, 4
families = pytest.mark.parametrize("family", FAMILIES)
NEW_TOKENS = 4
ZOOM = {"zoom": "always", "region_threshold": 0.7, "region_threshold_mode": "peak"}


class Pass:
    """Random hidden states of a left-padded batch, with a hidden token inside a row, through some layers."""

    def __init__(self, family: str):
        self.decoder = tiny_model(family).vlm.get_decoder()
        torch.manual_seed(3)
        self.hidden = torch.randn(ROWS, LENGTH, self.decoder.config.hidden_size)
        self.visible = torch.ones(ROWS, LENGTH, dtype=torch.long)
        self.visible[1, :3] = 0
        self.visible[2, 5] = 0
        positions = torch.arange(LENGTH).expand(ROWS, -1).float()
        axes = 3 if "mrope" in str(self.decoder.config.rope_parameters) else 1
        self.positions = positions.expand(3, -1, -1) if axes == 3 else positions
        self.rotary = rotary(self.decoder, self.hidden, self.positions)
        self.mask = causal_mask(self.decoder, self.hidden, self.visible, None)

    @torch.no_grad()
    def run(self, first: int = 0, last: int = LAYERS, hidden=None, **options) -> torch.Tensor:
        hidden = self.hidden if hidden is None else hidden
        return run_layers(
            self.decoder, hidden, first, last, mask=self.mask, position_embeddings=self.rotary, **options
        )

    def assert_close(self, ours: torch.Tensor, theirs: torch.Tensor, where: torch.Tensor | None = None) -> None:
        where = self.visible > 0 if where is None else where
        scale = theirs[where].max() - theirs[where].min()
        assert (ours[where] - theirs[where]).abs().max() <= 1e-5 * scale


@families
def test_a_plan_that_updates_everything_equals_the_stock_layers(family):
    batch = Pass(family)
    columns = torch.arange(LENGTH).expand(ROWS, -1)
    plan = subset_plan(columns, batch.visible)
    caches = DynamicCache(), DynamicCache()
    planned = batch.run(cache=caches[0], plans=[plan] * LAYERS)
    batch.assert_close(planned, batch.run(cache=caches[1]))
    for ours, theirs in zip(caches[0].layers, caches[1].layers):
        batch.assert_close(ours.keys.transpose(1, 2), theirs.keys.transpose(1, 2))
        batch.assert_close(ours.values.transpose(1, 2), theirs.values.transpose(1, 2))


@families
def test_frozen_tokens_are_read_as_they_are_and_stay_the_same_tensors(family):
    batch = Pass(family)
    frozen = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    frozen[0, 2:5] = frozen[0, 7:9] = frozen[1, 4:10] = True  # two runs, one run, none
    plan = frozen_plan(batch.visible, frozen)
    ours = batch.run(plans=[plan] * LAYERS)
    expected = batch.hidden
    for layer in range(LAYERS):
        updated = batch.run(layer, layer + 1, hidden=expected)
        expected = torch.where(frozen[..., None], expected, updated)
    batch.assert_close(ours, expected)
    assert torch.equal(ours[frozen], batch.hidden[frozen])


@families
def test_absent_tokens_are_unknown_to_the_others(family):
    batch = Pass(family)
    kept = torch.tensor([0, 1, 4, 6, 7, 10])
    plan = subset_plan(kept.expand(ROWS, -1), batch.visible[:, kept])
    ours = batch.run(plans=[plan] * LAYERS)
    part = Pass(family)
    part.hidden, part.visible = batch.hidden[:, kept], batch.visible[:, kept]
    part.rotary = tuple(table.expand(ROWS, -1, -1)[:, kept] for table in batch.rotary)
    part.mask = causal_mask(part.decoder, part.hidden, part.visible, None)
    batch.assert_close(ours[:, kept], part.run(), part.visible > 0)


@families
def test_plans_may_change_from_layer_to_layer(family):
    """What a layer leaves out keeps its state for the layers above."""
    batch = Pass(family)
    frozen = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    frozen[:, 4:7] = True
    plan = frozen_plan(batch.visible, frozen)
    ours = batch.run(plans=[None, plan, None, plan])
    expected = batch.hidden
    for layer in range(LAYERS):
        updated = batch.run(layer, layer + 1, hidden=expected)
        expected = torch.where(frozen[..., None], expected, updated) if layer % 2 else updated
    batch.assert_close(ours, expected)


@families
@pytest.mark.parametrize("kind", ["all", "frozen", "last", "keys only"])
def test_a_plan_on_top_of_cached_tokens_equals_one_run_over_all(family, kind):
    """Padding in front of the cached tokens, and a hidden one behind them."""
    batch, start = Pass(family), 4
    own = batch.visible[:, start:]
    frozen = torch.zeros_like(own, dtype=torch.bool)
    frozen[0, 1:3] = frozen[1, :2] = True
    columns = torch.arange(LENGTH - start).expand(ROWS, -1)
    plan = {
        "all": subset_plan(columns, own),
        "frozen": frozen_plan(own, frozen),
        "last": last_token_plan(own),
        "keys only": keys_only_plan(own),
    }[kind]
    stops = torch.ones(ROWS, LENGTH, dtype=torch.bool)  # tokens that are not updated
    stops[:, start:] = {"all": False, "frozen": frozen, "last": columns < columns.shape[1] - 1}.get(kind, True)
    stops[:, :start] = False
    expected, cache = batch.hidden, DynamicCache()
    for layer in range(LAYERS):
        expected = torch.where(stops[..., None], expected, batch.run(layer, layer + 1, hidden=expected))
    known = Pass(family)
    known.hidden, known.visible = batch.hidden[:, :start], batch.visible[:, :start]
    known.rotary = tuple(table.expand(ROWS, -1, -1)[:, :start] for table in batch.rotary)
    known.mask = causal_mask(known.decoder, known.hidden, known.visible, None)
    known.run(cache=cache)
    rest = Pass(family)
    rest.rotary = tuple(table.expand(ROWS, -1, -1)[:, start:] for table in batch.rotary)
    rest.mask = None
    ours = rest.run(hidden=batch.hidden[:, start:], cache=cache, plans=[plan] * LAYERS, cached=known.visible)
    batch.assert_close(ours, expected[:, start:], own > 0)
    assert {layer.keys.shape[2] for layer in cache.layers} == {start + plan.mask.shape[1]}


@families
def test_the_last_token_alone_leaves_the_cache_of_a_stock_layer(family):
    batch = Pass(family)
    caches = DynamicCache(), DynamicCache()
    plans = [None] * (LAYERS - 1) + [last_token_plan(batch.visible)]
    ours, theirs = batch.run(cache=caches[0], plans=plans), batch.run(cache=caches[1])
    last = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    last[:, -1] = True
    batch.assert_close(ours, theirs, last)
    for mine, stock in zip(caches[0].layers, caches[1].layers):
        batch.assert_close(mine.keys.transpose(1, 2), stock.keys.transpose(1, 2))
        batch.assert_close(mine.values.transpose(1, 2), stock.values.transpose(1, 2))


@families
def test_an_asking_token_may_stand_anywhere(family):
    batch = Pass(family)
    queries = torch.tensor([[4], [LENGTH - 1], [7]])
    ours = batch.run(3, 4, plans=[asking_token_plan(batch.visible, queries)])
    where = torch.zeros(ROWS, LENGTH, dtype=torch.bool).scatter(1, queries, True)
    batch.assert_close(ours, batch.run(3, 4), where)


class Recomputation:
    """Whole sequences of zoomed rows through stock layers: all tokens below K, the kept ones above it."""

    def __init__(self, monkeypatch):
        self.seen = None
        original = second_pass.plan_rows

        def record(model, request, view, crops):
            rows = original(model, request, view, crops)
            features = second_pass.encode_crops(model.vlm, [placed.crop for placed in crops], view.embeds.device)
            self.seen = view, rows, features
            return rows

        monkeypatch.setattr(second_pass, "plan_rows", record)

    @torch.no_grad()
    def logits(self, model, slot: int, tokens: torch.Tensor) -> torch.Tensor:
        """(new tokens, vocabulary) logits at the last prompt token and at all new ones but the last."""
        view, rows, features = self.seen
        row, decoder = rows[slot], model.vlm.get_decoder()
        assert row.upper is not None
        fed = model.get_input_embeddings()(tokens[:-1])
        hidden = torch.cat([fused_embeds(model, view, row, features.embeds[slot], full=True), fed])[None]
        steps = row.positions[:, -1:] + torch.arange(1, len(fed) + 1)
        positions = torch.cat([row.positions, steps], dim=1)[:, None]
        positions = positions if len(positions) > 1 else positions[0]
        mask = torch.cat([row.mask, row.mask.new_ones(len(fed))])[None]
        deepstack = None
        if view.deepstack is not None:
            single = type(features)([features.embeds[slot]], [[level[slot]] for level in features.deepstack])
            deepstack = fused_deepstack(view, [row], single, row.length, full=True)
            deepstack.mask = torch.cat([deepstack.mask, deepstack.mask.new_zeros(1, len(fed))], dim=1)
        present = torch.cat([row.upper, torch.arange(row.length, row.length + len(fed))])
        layer_k = model.config.branch_layer
        cos_sin = rotary(decoder, hidden, positions)
        for layer in range(len(decoder.layers)):
            columns = slice(None) if layer < layer_k else present
            part = hidden[:, columns]
            after = run_layers(
                decoder,
                part,
                layer,
                layer + 1,
                mask=causal_mask(decoder, part, mask[:, columns], None),
                position_embeddings=tuple(table[:, columns] for table in cos_sin),
            )
            hidden = hidden.clone()
            hidden[:, columns] = after
            hidden = hidden if deepstack is None else deepstack.add(hidden, layer)
        return model.get_output_embeddings()(decoder.norm(hidden))[0, -len(tokens) :]


MIXED = [
    Row(["look ", None, "what?"], [(3, 4)], seed=1),
    Row([None, "and", None, "then, a longer question"], [(4, 4), (3, 5)], seed=2),
    Row(["only words"]),
    Row(["what is in ", None], [(5, 4)], seed=3),
]
FOVEATED = [(0.25, 0), (0.5, 1), (0.0, 1)]


@pytest.mark.parametrize("keep", FOVEATED, ids=lambda keep: f"{keep[0]}-{keep[1]}")
@pytest.mark.parametrize("family, branch_layer", [*((family, 3) for family in FAMILIES), ("qwen3_vl", 1)])
def test_foveated_rows_equal_a_recomputation_of_the_whole_sequence(family, branch_layer, keep, monkeypatch):
    model, inputs = tiny_model(family, branch_layer=branch_layer), make_inputs(family, MIXED)
    recomputation = Recomputation(monkeypatch)
    options = {**ZOOM, "keep_share": keep[0], "keep_margin": keep[1], "return_zoom_reports": True}
    output = model.generate(**inputs, **options, max_new_tokens=NEW_TOKENS, output_logits=True)
    zoomed = [row for row, report in enumerate(output.zoom_reports) if report.zoomed]
    assert len(zoomed) >= 2 and len(zoomed) < len(MIXED)
    for slot, row in enumerate(zoomed):
        expected = recomputation.logits(model, slot, output.sequences[row, -NEW_TOKENS:])
        actual = torch.stack([step[row] for step in output.logits])
        assert (actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@families
def test_beams_over_foveated_rows_are_scored_as_a_recomputation_scores_them(family, monkeypatch):
    model, inputs = tiny_model(family), make_inputs(family, MIXED)
    recomputation = Recomputation(monkeypatch)
    output = model.generate(
        **inputs,
        **ZOOM,
        keep_share=0.25,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        max_new_tokens=NEW_TOKENS,
        output_scores=True,
        return_zoom_reports=True,
    )
    zoomed = [row for row, report in enumerate(output.zoom_reports) if report.zoomed]
    for slot, row in enumerate(zoomed):
        for sequence in (2 * row, 2 * row + 1):
            tokens = output.sequences[sequence, -NEW_TOKENS:]
            scores = recomputation.logits(model, slot, tokens).log_softmax(-1)
            expected = scores.gather(1, tokens[:, None]).sum()
            torch.testing.assert_close(output.sequences_scores[sequence], expected, atol=1e-3, rtol=1e-4)


@families
def test_a_foveated_cache_is_shorter_above_k_and_refused_in_a_later_turn(family):
    model, inputs = tiny_model(family), make_inputs(family, MIXED[:1])
    output = model.generate(
        **inputs, **ZOOM, keep_share=0.25, max_new_tokens=2, return_dict_in_generate=True, return_zoom_reports=True
    )
    cache, layer_k = output.past_key_values, model.config.branch_layer
    coarse = output.zoom_reports[0].coarse_tokens
    dropped = coarse - math.ceil(0.25 * coarse)
    assert cache.get_seq_length(0) - cache.get_seq_length(layer_k) == dropped
    with pytest.raises(ValueError, match="from a turn that zoomed"):
        model.generate(input_ids=output.sequences, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="only `generate` can go on"):
        model(input_ids=output.sequences[:, -1:], past_key_values=cache)


@families
def test_keeping_every_token_is_the_fused_pass(family):
    model, inputs = tiny_model(family), make_inputs(family, MIXED)
    options = {**ZOOM, "max_new_tokens": NEW_TOKENS, "output_logits": True, "return_dict_in_generate": True}
    whole, kept = (model.generate(**inputs, **options, keep_share=share) for share in (1.0, 0.999))
    assert all(torch.equal(a, b) for a, b in zip(whole.logits, model.generate(**inputs, **options).logits))
    for ours, theirs in zip(kept.logits, whole.logits):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
