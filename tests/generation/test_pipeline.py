"""The stock pipeline of transformers on a folder: one chat, several, batches, options and refusals."""

import pytest
import torch
from transformers import pipeline

from modeling_qzoom import QZoomForConditionalGeneration
from tests.processing_fixtures import chat, noise, process
from tests.release_fixtures import built_folder
from tests.tiny import FAMILIES


OPTIONS = {"zoom": "always", "max_new_tokens": 4, "do_sample": False}
CHATS = [
    chat(noise(300, 200, 1), "hi there?"),
    chat("first ", noise(150, 310, 2), "what is the code on the red circle?"),
    chat(noise(200, 200, 3), noise(90, 120, 4), "x"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request, tmp_path_factory):
    folder = built_folder(request.param, tmp_path_factory.mktemp(request.param))
    return pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)


def _direct(pipe, messages: list[dict], **options) -> str:
    inputs = process(pipe.processor, messages)
    ids = pipe.model.generate(**inputs, **options)
    return pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _answers(outputs: list) -> list[str]:
    return [output[0]["generated_text"] for output in outputs]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_equal_direct_generation(pipe, batch_size):
    """Rows of different images, and of different numbers of images, in one batch."""
    assert isinstance(pipe.model, QZoomForConditionalGeneration)
    expected = [_direct(pipe, messages, **OPTIONS) for messages in CHATS]
    outputs = pipe(CHATS, batch_size=batch_size, generate_kwargs=OPTIONS, return_full_text=False)
    assert _answers(outputs) == expected


def test_options_reach_generate(pipe):
    tiny = {"region_threshold": 0.9, "region_threshold_mode": "peak"}
    said = []
    for options in (
        OPTIONS,
        {**OPTIONS, "zoom": "never"},
        {**OPTIONS, "gate_threshold": 2, "zoom": "auto"},
        OPTIONS | tiny,
        OPTIONS | tiny | {"gate_branch": "light", "region_branch": "light", "keep_share": 0.2},
    ):
        said.append(_answers(pipe(CHATS[:1], generate_kwargs=options, return_full_text=False))[0])
        assert said[-1] == _direct(pipe, CHATS[0], **options)
    assert said[1] == said[2] and len(set(said)) > 1


def test_prompt_does_not_leak_into_the_answer(pipe):
    answer = _direct(pipe, CHATS[0], **OPTIONS)
    full = pipe(CHATS[0], generate_kwargs=OPTIONS)[0]["generated_text"]
    assert full[:-1] == CHATS[0]
    assert full[-1] == {"role": "assistant", "content": answer}


def test_text_and_images_without_a_chat_template(pipe):
    image, token = noise(120, 100, 7), pipe.processor.image_token
    prompt = f"{token}what is it?"
    inputs = pipe.processor(images=image, text=prompt)
    ids = pipe.model.generate(**inputs, **OPTIONS)
    expected = pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    output = pipe(image, text=prompt, generate_kwargs=OPTIONS, return_full_text=False)
    assert output[0]["generated_text"] == expected


def test_reports_are_refused_with_the_way_out(pipe):
    with pytest.raises(ValueError, match=r"return_zoom_reports=True.*model.generate directly"):
        pipe(CHATS[0], generate_kwargs={**OPTIONS, "return_zoom_reports": True})


def test_options_outside_generate_kwargs_are_refused_with_the_way_out(pipe):
    with pytest.raises(ValueError, match="generate_kwargs="):
        pipe(CHATS[0], zoom="always")


def test_pipeline_from_objects(pipe):
    again = pipeline("image-text-to-text", model=pipe.model, processor=pipe.processor, dtype=torch.float32)
    outputs = again(CHATS[:1], generate_kwargs=OPTIONS, return_full_text=False)
    assert _answers(outputs) == [_direct(pipe, CHATS[0], **OPTIONS)]
