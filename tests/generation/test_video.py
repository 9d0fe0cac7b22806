"""Videos pass through unzoomed with the plain result; built from tensors, as there need be no torchvision."""

import pytest
import torch

from tests.families import FAMILY
from tests.generation_fixtures import always, shared_model
from tests.tiny import Row, make_inputs, qwen_tokenizer


families = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
FRAMES = 2  # after temporal merging


def video_row(family: str, text: str = "what happens?", seed: int = 5, image: tuple[int, int] | None = None) -> dict:
    """One prompt with a video of 2 frames × 2 × 3 tokens and, on request, an image behind it, as processors do it.

    Qwen3-VL writes a time stamp and a pair of markers around every frame, Qwen2.5-VL one pair around all of them.
    """
    tokenizer, patch = qwen_tokenizer(), FAMILY[family].patch
    video = FAMILY[family].video_text(FRAMES, 6)
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    if image is not None:
        height, width = image
        other = make_inputs(family, [Row([None], [image], seed)])
        inputs = {key: other[key] for key in ("pixel_values", "image_grid_thw", "source_images")}
        video += "<|vision_start|>" + "<|image_pad|>" * (height * width) + "<|vision_end|>"
    inputs |= dict(tokenizer([f"see {video} {text}"], return_tensors="pt", return_token_type_ids=False))
    ids = inputs["input_ids"]
    is_image = ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    is_video = ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return inputs | {
        "mm_token_type_ids": is_image.int() + 2 * is_video.int(),
        "pixel_values_videos": torch.randn(FRAMES * 4 * 6, 6 * patch * patch, generator=generator),
        "video_grid_thw": torch.tensor([[FRAMES, 4, 6]]),
    }


def joined(*rows: dict) -> dict:
    """Rows in one left-padded batch."""
    length = max(row["input_ids"].shape[1] for row in rows)
    pad = qwen_tokenizer().pad_token_id
    batch = {}
    for name, fill in (("input_ids", pad), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        parts = [torch.nn.functional.pad(row[name], (length - row[name].shape[1], 0), value=fill) for row in rows]
        batch[name] = torch.cat(parts)
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        parts = [row[name] for row in rows if name in row]
        if parts:
            batch[name] = torch.cat(parts)
    batch["source_images"] = [source for row in rows for source in row.get("source_images", [])]
    return batch


def without_sources(inputs):
    return {name: value for name, value in inputs.items() if name != "source_images"}


SETTINGS = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}


@families
@pytest.mark.parametrize("zoom", ["auto", "always", "never"])
def test_videos_give_the_plain_result_bit_for_bit(family, zoom):
    inputs, model = video_row(family), shared_model(family)
    expected = model.vlm.generate(**inputs, **SETTINGS)
    got = model.generate(**inputs, **SETTINGS, zoom=zoom, gate_threshold=0.0, return_zoom_reports=True)
    assert torch.stack(got.logits).equal(torch.stack(expected.logits))
    assert got.sequences.equal(expected.sequences)
    (report,) = got.zoom_reports
    assert (report.reason, report.zoomed, report.coarse_tokens) == ("video", False, FRAMES * 6)
    # the pixels matter
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)
    assert not torch.stack(model.generate(**inputs, **SETTINGS).logits).equal(torch.stack(expected.logits))


def test_frame_rates_reach_the_positions():
    """Qwen2.5-VL spaces frames by their distance in seconds."""
    model, logits = shared_model("qwen2_5_vl"), []
    for seconds in (1.0, 4.0):
        inputs = {**video_row("qwen2_5_vl"), "second_per_grid_ts": torch.tensor([seconds])}
        expected = model.vlm.generate(**inputs, **SETTINGS)
        got = model.generate(**inputs, **SETTINGS)
        assert torch.stack(got.logits).equal(torch.stack(expected.logits))
        logits.append(torch.stack(got.logits))
    assert not logits[0].equal(logits[1])


def test_frame_rates_reach_the_positions_of_a_plain_forward():
    model = shared_model("qwen2_5_vl")
    slow = {**without_sources(video_row("qwen2_5_vl")), "second_per_grid_ts": torch.tensor([3.0])}
    usual = {**slow, "second_per_grid_ts": torch.tensor([1.0])}
    with torch.no_grad():
        logits = model(**slow).logits
        assert torch.equal(logits, model.vlm(**slow).logits)
        assert not torch.equal(logits, model(**usual).logits)


@families
def test_videos_need_no_source_images(family):
    assert "source_images" not in video_row(family)
    assert shared_model(family).generate(**video_row(family), max_new_tokens=1).shape[0] == 1


@families
def test_a_row_with_image_and_video_is_not_zoomed(family):
    inputs, model = video_row(family, image=(3, 4)), shared_model(family)
    expected = model.vlm.generate(**without_sources(inputs), **SETTINGS)
    got = model.generate(**inputs, **SETTINGS, **always(), skip_unread=False, return_zoom_reports=True)
    (report,) = got.zoom_reports
    assert (report.reason, report.zoomed, report.gate_probability) == ("video", False, None)
    assert report.coarse_tokens == FRAMES * 6 + 12
    assert torch.stack(got.logits).equal(torch.stack(expected.logits))


@families
@pytest.mark.parametrize("order", ["video first", "image first", "all kinds"])
def test_only_image_rows_of_a_mixed_batch_zoom_and_all_equal_their_singles(family, order):
    image = make_inputs(family, [Row(["look ", None, " at this long question"], [(3, 4)], 1)])
    rows = {
        "video first": [video_row(family), image],
        "image first": [image, video_row(family, "?")],
        "all kinds": [
            video_row(family, "short?", 6, image=(2, 2)),
            make_inputs(family, [Row(["only words"], [], 0)]),
            image,
            video_row(family, "and a long question about it?", 7),
        ],
    }[order]
    model = shared_model(family)
    batch = model.generate(**joined(*rows), **SETTINGS, **always(), return_zoom_reports=True)
    for index, row in enumerate(rows):
        alone = model.generate(**row, **SETTINGS, **always(), return_zoom_reports=True)
        assert batch.zoom_reports[index].zoomed == alone.zoom_reports[0].zoomed == (row is image)
        assert batch.zoom_reports[index].box == alone.zoom_reports[0].box
        assert batch.zoom_reports[index].reason == alone.zoom_reports[0].reason
        torch.testing.assert_close(
            torch.stack(batch.logits)[:, index], torch.stack(alone.logits)[:, 0], atol=1e-4, rtol=0
        )
        assert batch.sequences[index, -5:].equal(alone.sequences[0, -5:])


@families
def test_beams_over_videos_and_images(family):
    rows = [video_row(family), make_inputs(family, [Row(["look ", None], [(3, 4)], 1)])]
    model = shared_model(family)
    settings = {"num_beams": 3, "max_new_tokens": 4, **always()}
    batch = model.generate(**joined(*rows), **settings)
    for index, row in enumerate(rows):
        assert batch[index, -4:].equal(model.generate(**row, **settings)[0, -4:])
