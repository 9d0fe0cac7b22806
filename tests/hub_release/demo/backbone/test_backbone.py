"""The backbone's stages: losses fall, optimisers cover every weight, samples are what they say."""

import random
from dataclasses import replace

import torch
from PIL import Image

from hub_release.demo.backbone.dense_heads import dense_loss, label_words
from hub_release.demo.backbone.dense_labels import NOTHING
from hub_release.demo.backbone.fast_tower import fast_tower
from hub_release.demo.backbone.packing import Packer
from hub_release.demo.backbone.samples import (
    COARSE_TOKENS,
    DecoderSteps,
    crop_sample,
    fused_sample,
    part_sample,
    whole_sample,
)
from hub_release.demo.backbone.train import build_optimizers, decoder_step, right_shares, train_tower, training_parts
from hub_release.demo.backbone.view_batch import encode, stack_views
from hub_release.demo.backbone.views import fit_grid, normalise
from hub_release.demo.checkpoint import build_processor
from modeling_qzoom.data.drawn.pages import COLORS, SHAPES, WORDS
from modeling_qzoom.training_losses_qzoom import IGNORED


def test_the_optimizers_hold_every_weight_once(backbone, tokenizer) -> None:
    parts = training_parts(backbone, tokenizer)
    optimizers = build_optimizers(parts, 1e-3, tower_share=0.5)
    trained = [
        id(weight) for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]
    ]
    assert sorted(trained) == sorted(id(weight) for weight in parts.parameters())
    rates = {round(group["lr"], 7) for optimizer in optimizers for group in optimizer.param_groups}
    assert rates == {1e-3, 5e-4, 6.25e-5}


def test_the_decoder_learns_a_batch(tokenizer, backbone) -> None:
    parts, packer, rng = training_parts(backbone, tokenizer), Packer(tokenizer), random.Random(0)
    batch = packer([crop_sample(rng) for _ in range(4)])
    optimizers = build_optimizers(parts, 2e-3)
    losses = []
    with fast_tower(backbone.model.visual):
        for _ in range(8):
            loss, measures = decoder_step(backbone, parts["heads"], batch)
            losses.append(loss.item())
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert "fine" in measures


def test_the_tower_stage_leaves_the_decoder_s_layers(backbone, tokenizer, tmp_path) -> None:
    parts = training_parts(backbone, tokenizer)
    decoder = {name: weight.clone() for name, weight in parts["model"].language_model.layers.state_dict().items()}
    embedding = parts["model"].visual.patch_embed.proj.weight.clone()
    train_tower(parts, 1, tmp_path / "tower.safetensors")
    assert not torch.equal(embedding, parts["model"].visual.patch_embed.proj.weight)
    for name, weight in parts["model"].language_model.layers.state_dict().items():
        assert torch.equal(weight, decoder[name]), name
    assert all(weight.requires_grad for weight in parts.parameters())


def test_samples_ask_what_their_views_show() -> None:
    rng = random.Random(1)
    for draw in (crop_sample, part_sample):
        sample = draw(rng)
        assert {item for part in sample.segments for item in part.question.items} <= set(sample.view.legible)
        assert all(part.crop is None for part in sample.segments)
    whole = whole_sample(rng)
    assert any(part.question.kind == "coarse" for part in whole.segments)
    fused = fused_sample(rng)
    assert fused.view.grid[0] * fused.view.grid[1] <= 64
    crops = [part for part in fused.segments if part.crop is not None]
    assert crops and all(0 <= part.cells[0] < part.cells[2] <= fused.view.grid[1] for part in crops if part.cells)


def test_labels_of_a_view_agree_with_the_page() -> None:
    sample = crop_sample(random.Random(2))
    view = sample.view
    codes = {part.question.answer for part in sample.segments}
    seen = {"".join(map(str, code.tolist())) for code in view.labels["code"] if code[0] != IGNORED}
    assert codes <= seen
    assert any((view.labels[name] != NOTHING[name]).any() for name in ("color", "word"))


def test_hits_are_counted_per_segment(tokenizer) -> None:
    samples = [replace(crop_sample(random.Random(seed)), name="crop/") for seed in (3, 4)]
    batch = Packer(tokenizer)(samples)
    hit = torch.ones(int((batch.labels != IGNORED).sum()), dtype=torch.bool)
    assert set(right_shares(batch, hit).values()) == {1.0}
    hit[0] = False
    kind, asked = batch.kinds[0][0], [kind for kinds in batch.kinds for kind in kinds]
    assert kind.startswith("crop/")
    assert right_shares(batch, hit)[kind] == 1 - 1 / asked.count(kind)


def test_views_side_by_side_are_the_same_function(backbone) -> None:
    views = stack_views([crop_sample(random.Random(seed)).view for seed in range(3)])
    tower = backbone.model.visual
    with torch.no_grad(), fast_tower(tower, side_by_side=False):
        usual = encode(tower, views)
    with torch.no_grad(), fast_tower(tower, side_by_side=True):
        together = encode(tower, views)
    for one, other in zip(together, usual, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_places_without_labels_cost_nothing(backbone, tokenizer) -> None:
    views = stack_views([crop_sample(random.Random(5)).view])
    labels = {name: torch.full_like(value, IGNORED) for name, value in views.labels.items()}
    heads, embedding = training_parts(backbone, tokenizer)["heads"], backbone.get_input_embeddings().weight
    with torch.no_grad(), fast_tower(backbone.model.visual):
        logits = heads(*encode(backbone.model.visual, views), embedding)
    loss, accuracy = dense_loss(logits, labels)
    assert loss == 0 and all(value != value for value in accuracy.values())


def test_a_flat_patch_embedding_is_the_same_function(backbone) -> None:
    view = crop_sample(random.Random(4)).view
    flat = normalise(view.patches)
    both = flat.view(-1, 3, 1, 196).expand(-1, 3, 2, -1).reshape(len(flat), -1)
    embed = backbone.model.visual.patch_embed
    with torch.no_grad():
        usual = embed(both)
        with fast_tower(backbone.model.visual):
            torch.testing.assert_close(embed(flat), usual, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embed(both), usual)


def test_steps_are_a_function_of_seed_and_number(tokenizer) -> None:
    steps = DecoderSteps(tokenizer, {"crop": 1, "page": 1}, seed=3, steps=4)
    first, again, other = steps[2], steps[2], steps[3]
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.views.patches, again.views.patches)
    assert not torch.equal(first.views.patches, other.views.patches)
    assert [{kind.partition("/")[0] for kind in kinds} for kinds in first.kinds] == [{"crop"}, {"page"}]


def test_every_label_is_one_token_alone_and_in_a_sentence(tokenizer) -> None:
    words = label_words(tokenizer)
    for name, labels in {"color": COLORS, "shape": SHAPES, "word": WORDS}.items():
        spelled = [[tokenizer.decode([part]).strip() for part in spellings] for spellings in words[name]]
        assert spelled == [[label, label] for label in labels]


def test_grids_are_those_of_the_processor(tokenizer) -> None:
    """The resize rule of the library, on which the demo's pages are drawn and read."""
    processor = build_processor(tokenizer)
    for width, height in ((900, 1400), (730, 510), (300, 60)):
        text = "<|vision_start|><|image_pad|><|vision_end|>"
        _, rows, columns = processor(images=[Image.new("RGB", (width, height))], text=text)["image_grid_thw"][
            0
        ].tolist()
        assert fit_grid(width, height, COARSE_TOKENS // 2, COARSE_TOKENS) == (rows // 2, columns // 2)
