"""`label-gates`: replies on the ladder, what counts as right, and labels that survive a kill."""

from pathlib import Path

import pytest

from modeling_qzoom.asking.answers import ask_batch
from modeling_qzoom.asking.budgets import at_budget, check_ladder
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.data.config import DataConfig
from modeling_qzoom.data.readers import load_rows
from modeling_qzoom.training.common.label_store import read_labels
from modeling_qzoom.training.common.verdicts import verdicts
from modeling_qzoom.training.gate import label as label_gates
from modeling_qzoom.training.gate.config import LabelGatesConfig
from tests.processing_fixtures import noise
from tests.tiny import FAMILIES, vlm_config
from tests.training.stage_fixtures import budget, write_data, write_model


LADDER = [4, 9, 16]


def make_setting(folder: Path, family: str) -> dict[str, str]:
    model, data = write_model(folder / "model", family), write_data(folder / "data", images=3)
    return {"family": family, "model": model, "data": data}


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request, tmp_path_factory) -> dict[str, str]:
    return make_setting(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, str]:
    """One family, where families cannot differ."""
    return make_setting(tmp_path_factory.mktemp("single"), "qwen2_5_vl")


def config_of(setting: dict[str, str], output: Path, **fields) -> LabelGatesConfig:
    return LabelGatesConfig(
        model=setting["model"],
        data=setting["data"],
        output=str(output),
        ladder=LADDER,
        max_new_tokens=3,
        batch_size=2,
        shard_size=2,
        **budget(setting["family"]),
        **fields,
    )


def test_replies_are_the_plain_answers_at_every_rung(setting, tmp_path) -> None:
    config = config_of(setting, tmp_path)
    label_gates.run(config)
    records = list(read_labels(tmp_path, "label-gates", None))
    rows = list(load_rows(DataConfig(data=setting["data"])))
    assert [record["id"] for record in records] == [row.id for row in rows]
    session = open_session(config)
    for rung, tokens in enumerate(LADDER):
        image, budget_of_rung = at_budget(rows[0].load_image(), tokens, session.model.config.vlm_config)
        (alone,) = ask_batch(session, [(image, rows[0].question)], budget=budget_of_rung, zoom="never")
        assert records[0]["replies"][rung] == alone.text
    assert records[0]["ladder"] == LADDER
    assert all(len(record["right"]) == len(record["agrees"]) == len(LADDER) for record in records)


def test_a_kill_loses_nothing_and_doubles_nothing(single, tmp_path, monkeypatch) -> None:
    label_gates.run(config_of(single, tmp_path / "whole"))
    climb, calls = label_gates.GateLabeler.climb, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return climb(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(label_gates.GateLabeler, "climb", dying)
        label_gates.run(config_of(single, tmp_path / "killed"))
    label_gates.run(config_of(single, tmp_path / "killed"))
    whole, killed = (list(read_labels(tmp_path / name, "label-gates", None)) for name in ("whole", "killed"))
    assert killed == whole


def test_an_unreadable_image_among_many_is_named_and_skipped(single, tmp_path, caplog) -> None:
    data = write_data(tmp_path / "data", images=3)
    (tmp_path / "data" / "1.png").write_bytes(b"no image")
    label_gates.run(config_of({**single, "data": data}, tmp_path / "labels"))
    found = [record["id"] for record in read_labels(tmp_path / "labels", "label-gates", None)]
    assert found == ["0-0", "0-1", "2-0", "2-1"]
    assert "skipped 1-0: " in caplog.text


class Equal:
    """A judge by equality that notes what it is asked."""

    def __init__(self) -> None:
        self.asked = []

    def judge(self, questions, truths, answers):
        self.asked += list(zip(questions, answers))
        return [answer in accepted for accepted, answer in zip(truths, answers)]


def test_verdicts_ask_once_and_never_call_an_empty_reply_right(tmp_path) -> None:
    rows = list(load_rows(DataConfig(data=write_data(tmp_path / "data", images=1))))
    judge = Equal()
    found = verdicts(judge, rows, [("0",), ("1",)], [["0", "", "0"], ["x", "1", ""]])
    assert found == [[True, False, True], [False, True, False]]
    assert sorted(judge.asked) == [("what is 0?", "0"), ("what is 1?", "1"), ("what is 1?", "x")]
    # an empty consensus agrees with nothing, and a row without annotation gets nothing right
    assert verdicts(judge, rows, [("",), ()], [["", "a"], ["b", ""]]) == [[False] * 2] * 2


def test_rows_without_annotation_have_no_verdicts(single, tmp_path) -> None:
    lines = Path(single["data"]).read_text().replace('"answer"', '"remark"')
    data = Path(single["data"]).with_name("bare.jsonl")
    data.write_text(lines)
    label_gates.run(config_of({**single, "data": str(data)}, tmp_path))
    assert all(record["right"] is None and record["agrees"] for record in read_labels(tmp_path, "label-gates", None))


def test_a_fixed_grid_loses_detail_instead_of_tokens() -> None:
    image, config = noise(200, 100), vlm_config("llava")  # 56 × 56 pixels, 16 tokens
    half, budget = at_budget(image, 4, config)
    assert (half.size, budget) == ((56, 28), None)
    assert at_budget(image, 16, config)[0] is image
    small = noise(20, 20)
    assert at_budget(small, 4, config)[0] is small
    assert at_budget(image, 4, vlm_config("qwen3_vl")) == (image, (4, 4))


@pytest.mark.parametrize("ladder", [[], [64], [64, 64], [128, 64], [0, 4]])
def test_ladders_ascend(ladder) -> None:
    with pytest.raises(ValueError, match="ladder must hold two or more"):
        check_ladder(ladder)


def test_answers_come_with_reports(setting) -> None:
    session = open_session(ModelConfig(model=setting["model"], max_new_tokens=3, **budget(setting["family"])))
    images = [noise(150, 120, seed) for seed in range(2)]
    answers = ask_batch(session, list(zip(images, ["a?", "what is b?"])), zoom="always")
    assert len(answers) == 2
    assert {answer.report.reason for answer in answers} <= {"forced", "empty_map"}
