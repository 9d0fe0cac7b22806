"""Configurations from YAML and from the command line."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from modeling_qzoom.training.common.config_files import build_config, load_config, read_yaml
from modeling_qzoom.training.regions.config import LabelRegionsConfig, TrainRegionsConfig


@dataclass
class _Inner:
    share: float = 0.5
    names: list[str] = field(default_factory=list)


@dataclass
class _Outer:
    count: int = 1
    rate: float = 1.0
    flag: bool = False
    note: str | None = None
    heads: dict[int, list[int]] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    inner: _Inner = field(default_factory=_Inner)


def test_values_get_the_types_of_their_fields() -> None:
    found = build_config(
        _Outer,
        {
            "count": "3",
            "rate": "1e-4",
            "flag": True,
            "heads": {"22": [1, "4"]},
            "free": {"lr": "2e-5", "name": "adam", "on": True},
            "inner": {"share": 1, "names": ["a"]},
        },
    )
    assert found == _Outer(
        3, 1e-4, True, None, {22: [1, 4]}, {"lr": 2e-5, "name": "adam", "on": True}, _Inner(1.0, ["a"])
    )
    assert isinstance(found.inner.share, float)
    assert build_config(_Outer, {"note": None}) == _Outer()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.5}, "count must be of type int, got 1.5"),
        ({"count": True}, "count must be of type int, got True"),
        ({"count": None}, "count must be of type int"),
        ({"rate": "fast"}, "rate must be of type float, got 'fast'"),
        ({"rate": False}, "rate must be of type float"),
        ({"flag": "yes"}, "flag must be of type bool"),
        ({"note": 3}, "note must be of type str"),
        ({"heads": {"x": [1]}}, "heads must be of type int, got 'x'"),
        ({"heads": [1]}, "heads must be of type"),
        ({"heads": {22: 1}}, r"heads\.22 must be of type"),
        ({"inner": 3}, "inner must be a mapping"),
        ({"inner": {"share": "much"}}, r"inner\.share must be of type float"),
        ({"cuont": 3}, "no option cuont; did you mean count"),
        ({"inner": {"shares": 3}}, r"no option inner\.shares; did you mean inner\.share"),
        ({"zzz": 3}, "no option zzz; known are"),
    ],
)
def test_what_does_not_fit_is_named(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(_Outer, values)


def test_overrides_win_and_may_have_dots(tmp_path) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text("model: a\nlabels: b\noutput: c\nrule: {foreground: 0.2, sink: 0.02}\ntrainer: {max_steps: 3}\n")
    found = load_config(
        TrainRegionsConfig, file, ["--rule.sink=0.5", "output=d", "trainer.learning_rate=1e-4", "reset=false"]
    )
    assert (found.rule.foreground, found.rule.sink, found.output, found.reset) == (0.2, 0.5, "d", False)
    assert found.trainer == {"max_steps": 3, "learning_rate": 1e-4}


def test_tables_may_stand_on_the_line() -> None:
    overrides = ["model=m", "data=d", "output=o", "grounding_heads={22: [1, 4]}", "limit=null"]
    found = load_config(LabelRegionsConfig, None, overrides)
    assert found.grounding_heads == {22: [1, 4]} and found.limit is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model"], "An override has the form name=value, got 'model'"),
        (["model=m", "model.x=1"], "model holds a value, not options"),
        (["model=m", "output=o"], "lacks 'data'; set it in the file or as data="),
        (["data=d", "output=o"], "lacks 'model'"),
    ],
)
def test_wrong_overrides(overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(LabelRegionsConfig, None, overrides)


def test_wrong_files(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_config(LabelRegionsConfig, tmp_path / "list.yaml", [])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="is no YAML"):
        read_yaml(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="lacks 'model'"):
        load_config(LabelRegionsConfig, tmp_path / "empty.yaml", [])
