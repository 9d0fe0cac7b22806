"""Images that do not fit the prompts, the limits or the backbone, and how their errors place them."""

import pytest
from PIL import Image

from tests.processing_fixtures import chat, llava_processor, noise, process, qwen3_processor, qwen_processor


def test_number_of_images_names_rows():
    processor = qwen_processor()
    token, image = processor.image_token, noise(56, 56)
    template = "{% if messages[0]['content'][0]['seen'] %}" + token + "{% endif %}"
    with pytest.raises(ValueError, match=r"3 image placeholder\(s\) .* \(row 0: 1, row 1: 2\), but 2 image"):
        processor(images=[image, image], text=[token, token * 2])
    with pytest.raises(ValueError, match=r"row 1 has 2 image placeholder\(s\) <\|image_pad\|> but 1 image"):
        processor(images=[[image], [image]], text=[token, token * 2])
    with pytest.raises(ValueError, match=r"1 image placeholder\(s\).*but 0 image"):
        processor(text=token)
    with pytest.raises(ValueError, match=r"0 image placeholder\(s\).*but 1 image"):
        processor(images=image, text="none")
    with pytest.raises(ValueError, match=r"row 1 has 0 image placeholder\(s\) .* but 1 image"):
        seen = [{"role": "user", "content": [{"type": "image", "image": image, "seen": True}]}]
        process(processor, [seen, chat(image)], chat_template=template)


def test_bad_image_is_placed():
    processor = qwen_processor(max_source_pixels=56 * 56)
    good = noise(56, 56)
    with pytest.raises(ValueError, match=r"^image 2 \(row 2, image 1\) has 56 × 57 = 3192 pixels"):
        process(processor, [chat(good), chat("none"), chat(good, noise(56, 57))])
    with pytest.raises(ValueError, match=r"^image 1 \(row 1, image 0\) cannot be read"):
        processor(images=[good, b"junk"], text=[processor.image_token] * 2)
    with pytest.raises(ValueError, match=r"^image 0 .*has no pixels"):
        processor(images=[Image.new("RGB", (4, 0))], text=processor.image_token)
    processor.max_source_pixels = None
    assert processor(images=[noise(200, 200)], text=processor.image_token)["source_images"]


@pytest.mark.parametrize("build", [qwen_processor, qwen3_processor])
def test_images_that_are_too_long_are_placed(build):
    processor = build()
    with pytest.raises(
        ValueError, match=r"^image 1 \(row 1, image 0\) has 2 × 402 pixels.* ratio of 201; .* 200\. Cut"
    ):
        process(processor, [chat(noise(56, 56)), chat(noise(2, 402))])
    with pytest.raises(ValueError, match="ratio of 300"):
        processor(images=[noise(600, 2)], text=processor.image_token)
    assert processor(images=[noise(400, 2)], text=processor.image_token)["source_images"][0].shape == (3, 2, 400)


def test_fixed_grids_take_every_shape():
    processor = llava_processor()
    assert processor(images=[noise(2, 402)], text=processor.image_token)["source_images"][0].shape == (3, 402, 2)


def test_text_of_a_wrong_kind():
    with pytest.raises(ValueError, match="text must be a string or a list of strings"):
        qwen_processor()(text=[1, 2])
