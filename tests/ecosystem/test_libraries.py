"""The libraries that people put around a model, as they are: TRL, peft, datasets and accelerate."""

import peft
import pytest
import torch
from accelerate import Accelerator, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoModelForImageTextToText

from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from tests.families import FAMILY
from tests.generation_fixtures import mixed
from tests.loading_fixtures import CLOSE
from tests.processing_fixtures import PROCESSORS, noise
from tests.tiny import FAMILIES, plain_inputs, tiny_model


pytestmark = [
    pytest.mark.slow,
    # peft asks transformers in a way that transformers 5.23 has deprecated
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL, likewise
]
DECODER = r"vlm\..*language_model.*\.(q_proj|v_proj)"
CALL = {"max_new_tokens": 4, "do_sample": False}


def processor_of(family: str) -> QZoomProcessor:
    return PROCESSORS[family](**(FAMILY[family].budget(4, 16)))


# --- TRL -------------------------------------------------------------------------------------------------------------


def chats(form: str) -> list[dict]:
    """Rows as TRL documents them, with questions of several lengths; as messages, or as prompt and completion."""
    rows = []
    for number in range(4):
        question = [{"role": "user", "content": "what is this?" + number * " what?"}]
        answer = [{"role": "assistant", "content": f"it is {number}"}]
        said = {"messages": question + answer} if form == "messages" else {"prompt": question, "completion": answer}
        rows.append({"images": [noise(120 + 30 * number, 90, number)], **said})
    return rows


def sft(model, processor, form: str, output, peft_config=None):
    """Two steps of TRL's trainer; the trainer afterwards."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        max_length=None,  # a cut through the image's tokens fits no image
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    rows = Dataset.from_list(chats(form))
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=processor, peft_config=peft_config
    )
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trl_trains_what_it_trains_of_the_plain_vlm(family, form, tmp_path):
    """Its trainer calls the headless VLM and its output embedding: the coarse view, and none of the branches."""
    model, processor = tiny_model(family), PROCESSORS[family]()  # without a budget, which the plain one does not have
    branches = {name: weight.clone() for name, weight in model.zoom.state_dict().items()}
    alone = sft(tiny_model(family).vlm, processor.backbone_processor, form, tmp_path / "plain")
    trained = sft(model, processor, form, tmp_path / "ours")
    assert losses(trained) == pytest.approx(losses(alone), rel=1e-4)
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(model.vlm.state_dict()[name], weight, atol=1e-4, rtol=0, msg=name)
    assert all(torch.equal(weight, branches[name]) for name, weight in model.zoom.state_dict().items())

    trained.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    for name, weight in model.eval().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    inputs, _ = mixed(family)
    assert torch.equal(
        loaded.generate(**inputs, zoom="always", **CALL), model.generate(**inputs, zoom="always", **CALL)
    )


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_trl_trains_an_adapter_that_can_be_loaded_and_merged(form, tmp_path):
    family = "qwen2_5_vl"
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    model = QZoomForConditionalGeneration.from_pretrained(tmp_path / "base")
    recipe = peft.LoraConfig(r=4, target_modules=DECODER, task_type="CAUSAL_LM")
    trained = sft(model, processor_of(family), form, tmp_path / "out", recipe)
    trained.save_model(str(tmp_path / "adapter"))
    base = QZoomForConditionalGeneration.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs, _ = mixed(family)
    with torch.no_grad():
        expected = trained.model.eval()(**plain_inputs(inputs)).logits
        assert not torch.allclose(expected, tiny_model(family)(**plain_inputs(inputs)).logits, atol=1e-5)
        torch.testing.assert_close(loaded(**plain_inputs(inputs)).logits, expected, atol=1e-5, rtol=0)
    answer = loaded.generate(**inputs, zoom="always", **CALL)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again.generate(**inputs, zoom="always", **CALL), answer)


# --- peft ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_peft_trains_on_whatever_forward_takes(family, task_type, tmp_path):
    """The wrapper is another one for each task; all losses are those of the model without it, as it begins at zero."""
    inputs, _ = mixed(family)
    coarse, rows = plain_inputs(inputs), len(inputs["input_ids"])
    labels = inputs["input_ids"].clone()
    cases = {
        "coarse view": {"labels": labels},
        "both views": {"labels": labels, "source_images": inputs["source_images"]},
        "gate": {"gate_targets": torch.tensor([1.0, 0.0, -100.0][:rows])},
    }
    bare = tiny_model(family)
    wrapped = peft.get_peft_model(
        tiny_model(family), peft.LoraConfig(r=4, target_modules=DECODER, task_type=task_type)
    )
    for name, more in cases.items():
        with torch.no_grad():
            expected = bare(**coarse, **more).loss
        loss = wrapped.eval()(**coarse, **more).loss
        torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0, msg=name)

    wrapped.train()
    optimizer = torch.optim.AdamW([weight for weight in wrapped.parameters() if weight.requires_grad], lr=1e-2)
    seen = []
    for _ in range(3):
        loss = wrapped(**coarse, **cases["both views"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0]
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    answer = wrapped.generate(**inputs, zoom="always", **CALL)
    assert torch.equal(loaded.generate(**inputs, zoom="always", **CALL), answer)


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["torch", "numpy", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_datasets_has_stored_are_answered_alike(family, layout, tmp_path):
    """Encoded by `map`, written to disk and read again: integers are int64, arrays or lists then."""
    from datasets import Dataset, load_from_disk

    processor, model = processor_of(family), tiny_model(family).eval()
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    expected = processor(text=[prompt], images=[noise(90, 60)])

    def encode(row):
        return dict(processor(text=[prompt], images=[row["image"]], return_tensors="np"))

    rows = Dataset.from_dict({"image": [noise(90, 60)]})
    rows.map(encode, remove_columns=rows.column_names).save_to_disk(tmp_path / "rows")
    row = load_from_disk(tmp_path / "rows").with_format(layout)[0]
    # as every collator does, but for the sources, which stay as they come
    inputs = {
        name: value if name.startswith("source") else torch.as_tensor(value).to(expected[name].dtype)
        for name, value in row.items()
    }
    answer = model.generate(**inputs, zoom="always", **CALL)
    assert torch.equal(answer, model.generate(**expected, zoom="always", **CALL))


# --- accelerate ------------------------------------------------------------------------------------------------------


PLANS = {"gate_branch": "light", "region_branch": "light", "keep_share": 0.3}


@pytest.mark.parametrize("plans", [{}, PLANS], ids=["full", "layer plans"])
@pytest.mark.parametrize("way", ["disk_offload", "dispatch_model", "load_checkpoint_and_dispatch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_accelerate_has_put_on_the_disk_answers_and_is_saved(family, way, plans, tmp_path):
    model, (inputs, _) = tiny_model(family, **plans).eval(), mixed(family)
    expected = model.generate(**inputs, zoom="always", **CALL)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder, places = tmp_path / "offload", {"vlm": "disk", "zoom": "cpu"}
    folder.mkdir()
    if way == "disk_offload":
        model = disk_offload(model, folder, execution_device=torch.device("cpu"))
    elif way == "dispatch_model":
        model = dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    else:
        Accelerator(cpu=True).save_model(model, tmp_path / "weights")
        with init_empty_weights(include_buffers=False):
            model = QZoomForConditionalGeneration(model.config)
        model = load_checkpoint_and_dispatch(
            model, str(tmp_path / "weights"), places, offload_folder=str(folder), force_hooks=True
        ).eval()
    assert next(model.get_decoder().layers[0].parameters()).device.type == "meta"
    assert torch.equal(model.generate(**inputs, zoom="always", **CALL), expected)
    if way == "disk_offload":  # of which transformers saves no model, a plain VLM neither
        return
    model.save_pretrained(tmp_path / "again")
    loaded = QZoomForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    for name, weight in weights.items():
        difference = (loaded.state_dict()[name] - weight).abs().max() if weight.is_floating_point() else 0
        assert difference < CLOSE, name
    assert torch.equal(loaded.generate(**inputs, zoom="always", **CALL), expected)
