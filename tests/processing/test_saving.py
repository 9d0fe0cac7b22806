"""The processor as an object: saved and loaded, copied, shared between threads, inside a pipeline, with videos."""

import copy
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TypedDict

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, LlavaProcessor, Qwen2VLImageProcessor, pipeline
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from modeling_qzoom import QZoomProcessor, processing_qzoom
from tests.families import FAMILY
from tests.processing_fixtures import (
    LLAVA_ARGUMENTS,
    PROCESSORS,
    chat,
    llava_processor,
    noise,
    process,
    qwen_processor,
)
from tests.tiny import llava_tokenizer, qwen_tokenizer, tiny_vlm


families = pytest.mark.parametrize("family", list(PROCESSORS))
SETTINGS = ("backbone_model_type", "backbone_processor_kwargs", "min_tokens", "max_tokens", "max_source_pixels")


def some_chats() -> list:
    return [chat(noise(112, 84), "hi"), chat("text only"), chat("a", noise(224, 112, 1), "b", noise(60, 300, 2))]


def assert_same(inputs, expected) -> None:
    assert inputs.keys() == expected.keys()
    for key, value in expected.items():
        pairs = zip(inputs[key], value, strict=True) if isinstance(value, list) else [(inputs[key], value)]
        assert all(torch.equal(one, other) for one, other in pairs), key


def settings(processor) -> dict:
    return {name: getattr(processor, name) for name in SETTINGS}


@families
def test_round_trip(family, tmp_path):
    budget = FAMILY[family].budget(4, 30)
    processor = PROCESSORS[family](max_source_pixels=10**6, **budget)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_qzoom.QZoomProcessor"}
    assert saved["processor_class"] == "QZoomProcessor"
    loaded = QZoomProcessor.from_pretrained(tmp_path)
    assert settings(loaded) == settings(processor) and loaded.tokenizer.padding_side == "left"
    assert_same(process(loaded, some_chats()), process(processor, some_chats()))
    if FAMILY[family].has_budget:
        assert QZoomProcessor.from_pretrained(tmp_path, max_tokens=9).max_tokens == 9


def test_auto_class_loads_our_code_from_the_folder(tmp_path):
    """In a process that cannot import the package."""
    for family, build in PROCESSORS.items():
        build().save_pretrained(tmp_path / family)
    script = """
import sys
from transformers import AutoProcessor
from PIL import Image
for name in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    assert "modeling_qzoom" not in sys.modules and processor.backbone_model_type == name
    content = [{"type": "image", "image": Image.new("L", (80, 60))}, {"type": "text", "text": "hi"}]
    chats = [[{"role": "user", "content": content}], [{"role": "user", "content": "no"}]]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    assert inputs["source_images"][0].shape == (3, 60, 80) and inputs["attention_mask"][1, 0] == 0
    processor.save_pretrained(f"{sys.argv[1]}/{name}-again")
    AutoProcessor.from_pretrained(f"{sys.argv[1]}/{name}-again", trust_remote_code=True)
print("loaded")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *PROCESSORS],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.stdout.strip().endswith("loaded"), run.stderr[-2000:]


@families
def test_copies(family):
    processor = PROCESSORS[family]()
    expected = process(processor, some_chats())
    for copied in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert settings(copied) == settings(processor)
        assert_same(process(copied, some_chats()), expected)
    assert "QZoomProcessor" in repr(processor)


def test_missing_attributes_are_attribute_errors():
    processor = qwen_processor()
    assert not hasattr(processor, "feature_extractor") and not hasattr(processor, "_nothing")
    assert not hasattr(QZoomProcessor.__new__(QZoomProcessor), "tokenizer")  # as while unpickling


def test_from_backbone_object():
    stock = LlavaProcessor(CLIPImageProcessor(), llava_tokenizer(), **LLAVA_ARGUMENTS, chat_template="{{ 1 }}")
    processor = QZoomProcessor.from_backbone(stock, max_source_pixels=99)
    assert settings(processor) == {
        "backbone_model_type": "llava",
        "backbone_processor_kwargs": LLAVA_ARGUMENTS,
        "min_tokens": None,
        "max_tokens": None,
        "max_source_pixels": 99,
    }
    assert processor.chat_template == "{{ 1 }}"
    with pytest.raises(ValueError, match="only apply when the processor is loaded by its name"):
        QZoomProcessor.from_backbone(stock, revision="main")
    with pytest.raises(ValueError, match="not the processor of a supported backbone"):
        QZoomProcessor.from_backbone(processor)


def save_plain_folder(folder, family: str) -> QZoomProcessor:
    """A plain VLM's folder as the Hub holds them; returns a processor to compare with."""
    processor = PROCESSORS[family]()
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    if not FAMILY[family].has_budget:
        (folder / "processor_config.json").write_text(
            json.dumps({**LLAVA_ARGUMENTS, "processor_class": "LlavaProcessor"})
        )
    return processor


@families
def test_from_backbone_folder(family, tmp_path):
    expected = save_plain_folder(tmp_path, family)
    budget = FAMILY[family].budget(4, 9)
    processor = QZoomProcessor.from_backbone(str(tmp_path), **budget)
    assert settings(processor) == {**settings(expected), **budget}
    assert_same(process(processor, some_chats()), process(PROCESSORS[family](**budget), some_chats()))


def test_from_backbone_folder_without_a_model(tmp_path):
    save_plain_folder(tmp_path, "llava")
    (tmp_path / "config.json").unlink()
    assert QZoomProcessor.from_backbone(tmp_path).backbone_model_type == "llava"


def test_from_backbone_of_an_unknown_family(tmp_path):
    save_plain_folder(tmp_path, "qwen2_5_vl")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="no row for model_type 'bert'"):
        QZoomProcessor.from_backbone(tmp_path)


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="CLIPImageProcessor.* has no merge_size"):
        QZoomProcessor(CLIPImageProcessor(), qwen_tokenizer())
    with pytest.raises(ValueError, match="llava needs patch_size"):
        QZoomProcessor(CLIPImageProcessor(), llava_tokenizer(), backbone_model_type="llava")
    with pytest.raises(ValueError, match="no row for model_type 'bert'"):
        QZoomProcessor(Qwen2VLImageProcessor(), qwen_tokenizer(), backbone_model_type="bert")


@families
def test_delegated_names(family):
    processor = PROCESSORS[family]()
    stock = processor.backbone_processor
    assert processor.image_token == stock.image_token and processor.image_token_id == stock.image_token_id
    ids = processor(text=["ab", "c"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["ab", "c"]
    assert processor.post_process_image_text_to_text(ids) == stock.post_process_image_text_to_text(ids) == ["ab", "c"]
    assert processor.decode(ids[0]) == "ab"
    assert processor._get_num_multimodal_tokens([(84, 112)])["num_image_tokens"] == [
        16 if not FAMILY[family].has_budget else 12
    ]


@families
def test_pipeline_hands_the_sources_to_generate(family):
    model, calls = tiny_vlm(family), []

    def generate(input_ids, **inputs):
        calls.append({"input_ids": input_ids, **inputs})
        return torch.cat([input_ids, torch.full_like(input_ids[:, :1], 65)], dim=1)

    model.generate = generate
    processor = PROCESSORS[family]()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [chat(noise(112, 84), "hi"), chat("a", noise(84, 56, 1), "b", noise(60, 90, 2))]
    answers = pipe(text=chats[0], max_new_tokens=1, return_full_text=False)
    assert answers[0]["generated_text"] == processor.decode([65])
    expected = process(processor, chats[0])["source_images"]
    assert all(torch.equal(*pair) for pair in zip(calls[0]["source_images"], expected, strict=True))
    pipe(text=chats, batch_size=2, max_new_tokens=1)
    rows = calls[1]["source_images"]
    assert [[tuple(image.shape) for image in row] for row in rows] == [[(3, 84, 112)], [(3, 56, 84), (3, 90, 60)]]
    assert calls[1]["attention_mask"][:, -1].all()
    if not FAMILY[family].has_budget:
        assert calls[1]["source_boxes"].tolist() == [[14, 0, 98, 84], [14, 0, 70, 56], [0, 15, 60, 75]]
    pipe(images=noise(56, 56), text=processor.image_token, max_new_tokens=1)
    assert len(calls[2]["source_images"]) == 1
    with pytest.raises(ValueError, match="generate_kwargs={'zoom'"):
        pipe(text=chats[0], zoom="always")


def test_threads_share_a_processor():
    processor = qwen_processor()
    requests = [[chat(noise(28 * (1 + seed % 5), 56, seed), "x" * seed)] * (1 + seed % 3) for seed in range(40)]
    budgets = [4 + seed % 7 for seed in range(40)]
    expected = [process(processor, chats, max_tokens=most) for chats, most in zip(requests, budgets, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda chats, most: process(processor, chats, max_tokens=most), requests, budgets))
    for result, alone in zip(results, expected, strict=True):
        assert_same(result, alone)


class StubVideoKwargs(TypedDict, total=False):
    max_frames: int


class StubVideoProcessor:
    """Stands for the one that needs torchvision: 2 × 2 tokens a video."""

    merge_size, temporal_patch_size = 2, 2
    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    valid_kwargs = StubVideoKwargs

    def __init__(self, **settings):
        self.settings = settings

    @classmethod
    def from_dict(cls, settings):
        return cls(**settings)

    def __call__(self, videos, **kwargs):
        return {
            "pixel_values_videos": torch.zeros(16 * len(videos), 1176),
            "video_grid_thw": torch.tensor([[1, 4, 4]] * len(videos)),
            "video_metadata": [SimpleNamespace(sampled_fps=2.0)] * len(videos),
        }


@pytest.fixture
def stub_torchvision(monkeypatch):
    monkeypatch.setattr(processing_qzoom, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(processing_qzoom, "video_processor_class_from_name", lambda name: StubVideoProcessor)
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda self, name, argument: None)


VIDEO = np.zeros((4, 56, 56, 3), np.uint8)


def test_videos_pass_through(stub_torchvision, monkeypatch):
    settings = []
    make = StubVideoProcessor.from_dict
    monkeypatch.setattr(StubVideoProcessor, "from_dict", lambda values: settings.append(values) or make(values))
    message = [
        {"role": "user", "content": [{"type": "video", "video": VIDEO}, {"type": "image", "image": noise(56, 56)}]}
    ]
    processor = qwen_processor(video_config={"max_frames": 7})
    inputs = process(processor, message)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 4
    assert inputs["video_grid_thw"].tolist() == [[1, 4, 4]] and len(inputs["source_images"]) == 1
    assert settings == [{"max_frames": 7}]
    assert "pixel_values" not in processor(text=processor.video_token, videos=[VIDEO], max_frames=3)
    with pytest.raises(ValueError, match="llava takes no videos"):
        llava_processor()(text="hi", videos=[VIDEO])


def test_video_settings_are_kept(tmp_path):
    given = {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 7}
    qwen_processor(video_config=given).save_pretrained(tmp_path / "saved")
    assert QZoomProcessor.from_pretrained(tmp_path / "saved").video_config == given
    # a stock processor's settings lie beside ours, nested or in a file of their own
    qwen_processor().save_pretrained(tmp_path / "nested")
    config = json.loads((tmp_path / "nested" / "processor_config.json").read_text())
    (tmp_path / "nested" / "processor_config.json").write_text(json.dumps({**config, "video_processor": given}))
    assert QZoomProcessor.from_pretrained(tmp_path / "nested").video_config == given
    qwen_processor().save_pretrained(tmp_path / "file")
    (tmp_path / "file" / "video_preprocessor_config.json").write_text(json.dumps(given))
    assert QZoomProcessor.from_pretrained(tmp_path / "file").video_config == given
    plain = tmp_path / "plain"
    plain.mkdir()
    save_plain_folder(plain, "qwen2_5_vl")
    (plain / "video_preprocessor_config.json").write_text(json.dumps(given))
    assert QZoomProcessor.from_backbone(plain).video_config == given


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision videos are read, not refused")
def test_videos_without_torchvision():
    processor = qwen_processor()
    with pytest.raises(ImportError, match="Videos need torchvision"):
        processor(text=processor.video_token, videos=[VIDEO])
