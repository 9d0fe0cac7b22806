"""Stage 2: samples, and the training of the decoder on both views."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.data.rows import Row
from modeling_qzoom.training.common import decoder, labelled
from modeling_qzoom.training.common.answer_inputs import stack_answers, target_texts
from modeling_qzoom.training.common.label_store import read_labels
from modeling_qzoom.training.fusion import train as train_fusion
from modeling_qzoom.training.fusion.config import TrainFusionConfig
from modeling_qzoom.training.fusion.record import FusionRecord
from modeling_qzoom.training.fusion.samples import (
    FusionSamples,
    choose_records,
    random_box,
)
from modeling_qzoom.training.regions import train as train_regions
from modeling_qzoom.training.regions.config import TrainRegionsConfig
from tests.lora_support import needs_lora
from tests.processing_fixtures import PROCESSORS
from tests.tiny import FAMILIES
from tests.training.stage_fixtures import rows_of, write_data, write_labels, write_model, write_region_labels


# peft asks transformers in a way that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TRAINER = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 4,
    "learning_rate": 2e-3,
    "report_to": "none",
    "save_strategy": "no",
}


def mined(row, number: int) -> FusionRecord:
    """A record of `mine-fusion`; every fourth row was right both ways."""
    return FusionRecord(
        id=row.id,
        question=row.question,
        answers=row.answers,
        plain=f"it is {number}",
        zoomed="else",
        plain_right=True,
        zoomed_right=number % 4 == 0,
        box=(5, 6, 90, 80 + number),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request, tmp_path_factory):
    """(folder of a tiny model, folder of labels that belong to it)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_model(folder / "model", request.param)
    data = write_data(folder / "data")
    return model, write_labels(folder / "labels", "mine-fusion", model, data, mined)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """As `prepared`, of one family."""
    folder = tmp_path_factory.mktemp("qwen")
    model = write_model(folder / "model", "qwen2_5_vl")
    return model, write_labels(folder / "labels", "mine-fusion", model, write_data(folder / "data"), mined)


def config(prepared, output: Path, **options) -> TrainFusionConfig:
    options = {"trainer": TRAINER, "method": "full", **options}
    return TrainFusionConfig(model=prepared[0], labels=prepared[1], output=str(output), **options)


def samples_of(settings: TrainFusionConfig) -> FusionSamples:
    processor = open_session(settings).processor
    records = [FusionRecord.from_row(row) for row in read_labels(settings.labels, "mine-fusion", None)]
    records = choose_records(records, settings.anchor_share, 0)
    return FusionSamples(processor, records, rows_of(settings.labels, "mine-fusion"), settings)


@torch.no_grad()
def loss_of(model, samples: FusionSamples) -> float:
    batch = stack_answers([samples[0, n] for n in range(len(samples))], samples.processor.tokenizer.pad_token_id)
    return float(model(**batch).loss)


def changed_parts(before, after) -> set[str]:
    """What differs, by the names of decoder layers and of everything else."""
    old = dict(before.named_parameters())
    names = [name for name, weight in after.named_parameters() if not torch.equal(weight, old[name])]
    return {name.split(".layers.")[0] if "language_model" in name else name for name in names}


@pytest.mark.parametrize("method", [pytest.param("lora", marks=needs_lora), "full"])
def test_learns_and_changes_the_decoder_only(prepared, tmp_path, method):
    settings = config(prepared, tmp_path / "out", method=method)
    train_fusion.run(settings)
    before = QZoomForConditionalGeneration.from_pretrained(prepared[0])
    after = QZoomForConditionalGeneration.from_pretrained(tmp_path / "out")
    samples = samples_of(settings)
    assert loss_of(after, samples) < 0.8 * loss_of(before, samples)
    decoder = {"vlm.model.language_model"}
    assert changed_parts(before, after) == (decoder if method == "lora" else decoder | {"vlm.lm_head.weight"})
    layers = {name for name, weight in after.named_parameters() if ".layers." in name and "language_model" in name}
    moved = {name for name in layers if not torch.equal(after.get_parameter(name), before.get_parameter(name))}
    assert moved == (
        {name for name in layers if "proj" in name and "bias" not in name} if method == "lora" else layers
    )
    processor = type(samples.processor).from_pretrained(tmp_path / "out")
    assert processor.tokenizer.chat_template == samples.processor.tokenizer.chat_template


@needs_lora
def test_an_adapter_beside_its_base(qwen, tmp_path):
    """As an add-on the adapter stays unmerged and answers as the merged one does."""
    from tests.tiny import tiny_vlm

    tiny_vlm("qwen2_5_vl").save_pretrained(tmp_path / "base")
    model = QZoomForConditionalGeneration.from_pretrained(qwen[0])
    model.save_addon(tmp_path / "addon", base_model_name_or_path=tmp_path / "base")
    open_session(ModelConfig(model=qwen[0])).processor.save_pretrained(tmp_path / "addon")
    own = (str(tmp_path / "addon"), qwen[1])
    train_fusion.run(config(own, tmp_path / "kept", method="lora", output_format="addon"))
    train_fusion.run(config(own, tmp_path / "merged", method="lora", lora={"r": 16, "lora_alpha": 32}))
    assert (tmp_path / "kept" / "lora" / "adapter_model.safetensors").exists()
    kept, merged = (QZoomForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("kept", "merged"))
    samples = samples_of(config(own, tmp_path))
    assert loss_of(kept, samples) == pytest.approx(loss_of(merged, samples), abs=1e-4)
    assert loss_of(kept, samples) < 0.8 * loss_of(model, samples)
    again = {"model": str(tmp_path / "kept"), "other_backbone": True, "trainer": TRAINER}
    more = {**again, "labels": qwen[1], "output": str(tmp_path / "more")}
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        train_fusion.run(TrainFusionConfig(**more, output_format="addon"))
    with pytest.raises(ValueError, match="carries an unmerged LoRA adapter"):
        train_fusion.run(TrainFusionConfig(**more))
    # a later stage keeps the adapter in its own add-on
    labels = write_region_labels(tmp_path / "regions", qwen[0], write_data(tmp_path / "data"))
    next_stage = {**again, "labels": labels, "output": str(tmp_path / "stage1")}
    train_regions.run(TrainRegionsConfig(**next_stage, output_format="addon"))
    assert (tmp_path / "stage1" / "lora" / "adapter_model.safetensors").exists()


@needs_lora
def test_the_same_seed_trains_the_same(qwen, tmp_path):
    trainer = {**TRAINER, "num_train_epochs": 1}
    options = {"method": "lora", "trainer": trainer, "random_box_share": 0.5}
    models = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_fusion.run(config(qwen, tmp_path / name, seed=seed, **options))
        models.append(QZoomForConditionalGeneration.from_pretrained(tmp_path / name))
    assert not changed_parts(models[0], models[1])
    assert changed_parts(models[0], models[2])


def test_nothing_got_worse(qwen, tmp_path):
    data = write_data(tmp_path / "data")
    labels = write_labels(tmp_path / "labels", "mine-fusion", qwen[0], data, lambda row, number: mined(row, 0))
    with pytest.raises(ValueError, match="none of 8 mined rows got worse by zooming: stage 2 is not needed"):
        train_fusion.run(config((qwen[0], labels), tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prompt"}, "method must be"),
        ({"random_box_share": 1.5}, "random_box_share"),
        ({"random_box_side": [0.6, 0.1]}, "random_box_side"),
        ({"anchor_share": 1.0}, "anchor_share"),
        ({"method": "full", "load_in_4bit": True}, "method=full cannot train a backbone in 4 bit"),
        ({"method": "full", "output_format": "addon"}, "method=full changes the backbone"),
        ({"method": "lora", "merge": False}, "no place for an unmerged adapter"),
        ({"method": "lora", "merge": True, "output_format": "addon"}, "does not hold the backbone"),
        pytest.param({"method": "lora", "lora": {"rank": 4}}, "lora=.*rank", marks=needs_lora),
        pytest.param({"method": "lora", "lora": {"target_modules": "nothing"}}, "lora=.*nothing", marks=needs_lora),
    ],
)
def test_refused_options(qwen, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_fusion.run(config(qwen, tmp_path / "out", **options))
    assert not (tmp_path / "out" / "config.json").exists()


def test_labels_of_another_backbone(qwen, tmp_path):
    model = QZoomForConditionalGeneration.from_pretrained(qwen[0])
    with torch.no_grad():
        model.vlm.lm_head.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "other")
    open_session(ModelConfig(model=qwen[0])).processor.save_pretrained(tmp_path / "other")
    own = (str(tmp_path / "other"), qwen[1])
    with pytest.raises(ValueError, match="another backbone"):
        train_fusion.run(config(own, tmp_path / "out"))


def test_labels_are_the_answer_and_the_end_of_the_turn(prepared):
    settings = config(prepared, Path("unused"))
    samples = samples_of(settings)
    tokenizer = samples.processor.tokenizer
    for index in (0, 3):
        sample = samples[0, index]
        ids, labels = sample["input_ids"][0], sample["labels"][0]
        answer = samples.records[index].plain
        assert tokenizer.decode(ids[labels != -100]) == f"{answer}<|im_end|>"
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert (labels == -100)[: -len(answer) - 1].all()
        assert tokenizer.decode(ids[labels == -100]).endswith("<|im_start|>assistant\n")
        assert sample["zoom_boxes"] == [samples.records[index].box]


def test_a_batch_is_padded_on_the_left(qwen):
    samples = samples_of(config(qwen, Path("unused")))
    samples.records[1] = dataclasses.replace(samples.records[1], plain="a much longer answer than the others")
    parts = [samples[0, n] for n in range(3)]
    batch = stack_answers(parts, samples.processor.tokenizer.pad_token_id)
    for row, part in enumerate(parts):
        length = part["input_ids"].shape[1]
        for name, filler in (("input_ids", samples.processor.tokenizer.pad_token_id), ("labels", -100)):
            assert torch.equal(batch[name][row, -length:], part[name][0])
            assert (batch[name][row, :-length] == filler).all()
    assert len(batch["zoom_boxes"]) == len(batch["source_images"]) == 3
    model = open_session(ModelConfig(model=qwen[0])).model
    with torch.no_grad():
        together = float(model(**batch).loss)
        pad = samples.processor.tokenizer.pad_token_id
        alone = [
            (float(model(**stack_answers([part], pad)).loss), int((part["labels"] != -100).sum())) for part in parts
        ]
    assert together == pytest.approx(sum(loss * n for loss, n in alone) / sum(n for _, n in alone), abs=1e-4)


def test_a_template_without_an_end_gets_the_end_token():
    """As LLaVA's own template, which ends an answer with a space."""
    processor = PROCESSORS["llava"]()
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
        "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    prompt, text = target_texts(processor, "what?", "a cat", ModelConfig())
    assert prompt.endswith("what? ASSISTANT:")
    assert text == prompt + " a cat</s>"


def test_a_template_that_rewrites_the_prompt():
    processor = PROCESSORS["qwen2_5_vl"]()
    processor.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not extend a chat by appending"):
        target_texts(processor, "what?", "a cat", ModelConfig())


def test_random_boxes(qwen):
    rng = random.Random(0)
    for size in ((200, 100), (30, 400), (10, 12)):
        boxes = [random_box(size, [0.1, 0.6], 28, rng) for _ in range(50)]
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
            for extent, length in ((x1 - x0, size[0]), (y1 - y0, size[1])):
                assert min(28, length) <= extent <= max(28, round(0.6 * length))
    samples = samples_of(config(qwen, Path("unused"), random_box_share=0.5))
    chosen = [samples.box(epoch, 0, (200, 150)) for epoch in range(40)]
    assert chosen == [samples.box(epoch, 0, (200, 150)) for epoch in range(40)]
    own = chosen.count(samples.records[0].box)
    assert 10 < own < 30 and len(set(chosen)) == 41 - own


def records_of(count: int) -> list[FusionRecord]:
    return [mined(Row(str(number), None, "?"), number) for number in range(count)]


def test_anchors():
    assert all(record.regression for record in choose_records(records_of(40), 0.0, 0))
    chosen = choose_records(records_of(40), 0.25, 0)
    assert len(chosen) == 40 and sum(not record.regression for record in chosen) == 10
    assert choose_records(records_of(20), 0.2, 1) != choose_records(records_of(20), 0.2, 2)


def test_fewer_anchors_than_wanted(caplog):
    assert len(choose_records(records_of(8), 0.5, 0)) == 8
    assert "asks for 6 rows that both ways got right; there are 2" in caplog.text


def test_a_peft_that_is_too_old_is_named_before_anything_is_loaded(qwen, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decoder, "MIN_PEFT_VERSION", "99.5")
    monkeypatch.setattr(labelled, "open_session", lambda config: pytest.fail("loaded"))
    with pytest.raises(ImportError, match=r"takes peft 99\.5 or newer, here is .* pip install 'qzoom\[train\]'"):
        train_fusion.run(config(qwen, tmp_path / "out", method="lora"))
    assert not (tmp_path / "out").exists()
