"""Chats, batches of rows and the places of their questions."""

import pytest
import torch

from modeling_qzoom.asking.chats import chat_of, encode_prompts, query_columns, render, stack_features
from modeling_qzoom.asking.config import ModelConfig
from tests.processing_fixtures import PROCESSORS, chat, noise, process
from tests.tiny import FAMILIES, plain_inputs, tiny_model
from tests.training.stage_fixtures import budget


CONFIG = ModelConfig(prompt_suffix=" Be brief.", system_prompt="You see.")


def test_chats_show_the_image_once_and_carry_both_texts() -> None:
    messages = chat_of([("q?", "a"), ("r?", None)], CONFIG)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == [{"type": "text", "text": "You see."}]
    assert messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "q? Be brief."}]
    assert messages[3]["content"] == [{"type": "text", "text": "r? Be brief."}]
    assert chat_of([("q?", None)], ModelConfig())[0]["role"] == "user"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_open_chat_ends_where_the_model_answers(family) -> None:
    processor = PROCESSORS[family]()
    opened = render(processor, [("q?", None)], CONFIG)
    assert opened.endswith("<|im_start|>assistant\n") and opened.count(processor.image_token) == 1
    assert render(processor, [("q?", "seven")], CONFIG) == opened + "seven<|im_end|>\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_query_columns_are_the_last_prompt_tokens(family) -> None:
    processor = PROCESSORS[family](**budget(family))
    turns = [("how many?", "12"), ("where is it?", "left"), ("what?", None)]
    features = encode_prompts(processor, [noise(150, 110)], [render(processor, turns, CONFIG)])
    ids = features["input_ids"][0]
    columns = query_columns(processor, ids, turns, CONFIG)
    assert columns[-1] == len(ids) - 1 and columns == sorted(set(columns))
    for column, (question, _) in zip(columns, turns, strict=True):
        before = processor.tokenizer.decode(ids[: column + 1])
        assert before.endswith(f"{question} Be brief.<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    processor = PROCESSORS["qwen2_5_vl"]()
    # the number of turns stands in front, so a longer chat does not begin as a shorter one
    processor.chat_template = "{{ messages | length }}" + processor.tokenizer.chat_template
    turns = [("how many?", "12"), ("what?", None)]
    features = encode_prompts(processor, [noise(60, 60)], [render(processor, turns, CONFIG)])
    with pytest.raises(ValueError, match="set questions_per_image=1"):
        query_columns(processor, features["input_ids"][0], turns, CONFIG)


def _features(family: str, questions: list[str]) -> tuple[object, list[dict], list]:
    processor = PROCESSORS[family](**budget(family))
    images = [noise(150 + 40 * number, 110, number) for number in range(len(questions))]
    texts = [render(processor, [(question, None)], CONFIG) for question in questions]
    features = [encode_prompts(processor, [image], [text]) for image, text in zip(images, texts, strict=True)]
    return processor, features, [images, texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_rows_equal_a_batch_of_the_processor(family) -> None:
    processor, features, (images, texts) = _features(family, ["q?", "a longer question?", "r?"])
    stacked = stack_features(features, processor.tokenizer.pad_token_id)
    batch = encode_prompts(processor, images, texts)
    assert stacked.keys() == batch.keys()
    for name, value in plain_inputs(batch).items():
        assert torch.equal(stacked[name], value), name
    assert len(stacked["source_images"]) == 3


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_rows_of_different_budgets_share_a_batch(family) -> None:
    processor, features, (images, texts) = _features(family, ["q?", "a longer question?"])
    large = encode_prompts(processor, images[:1], texts[:1], (20, 40))
    assert large["input_ids"].shape[1] > features[0]["input_ids"].shape[1]
    batch = plain_inputs(stack_features([large, features[1]], processor.tokenizer.pad_token_id))
    model = tiny_model(family)
    with torch.no_grad():
        together = model(**batch, logits_to_keep=1).logits[:, -1]
        alone = [model(**plain_inputs(part), logits_to_keep=1).logits[0, -1] for part in (large, features[1])]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_rows_with_and_without_images_share_a_batch() -> None:
    processor = PROCESSORS["qwen2_5_vl"]()
    with_image = dict(process(processor, chat(noise(80, 60), "what?")))
    without = dict(processor(text=["hello"]))
    for features in ([with_image, without], [without, with_image]):
        batch = stack_features(features, 0)
        length = with_image["input_ids"].shape[1]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, length)
        assert batch["mm_token_type_ids"].shape == (2, length) and len(batch["source_images"]) == 1
        assert torch.equal(batch["pixel_values"], with_image["pixel_values"])
        assert batch["attention_mask"].sum(1).tolist() == [each["attention_mask"].sum() for each in features]
