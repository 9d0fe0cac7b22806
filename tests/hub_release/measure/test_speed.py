"""The table of seconds: its arms, its ratios, and what it says without a card."""

import torch

from hub_release.measure import speed as speed_table


def test_arms_zoom_as_they_are_named() -> None:
    arms = speed_table.arms(4096, 576)
    assert [tokens for tokens, _ in arms.values()] == [4096, 576, 576, 576]
    assert [options.get("gate_threshold") for _, options in arms.values()] == [
        None,
        None,
        speed_table.CLOSED,
        speed_table.OPEN,
    ]


def test_ratios_are_against_the_first_row() -> None:
    def row(name: str, seconds: float) -> dict:
        spent = [seconds * share for share in (0.5, 1.0, 2.0)]
        looked = {"coarse_tokens": 9, "crop_tokens": 4}
        return {"name": name, "first_token": spent, "all_tokens": spent, "peak": 2**30, **looked}

    table = speed_table.markdown([row("large", 0.4), row("small", 0.1)], 32)
    assert "| small (9 + 4) | 100 (50 – 200) | 0.25 | 100 (50 – 200) | 0.25 | 1.0 |" in table


def test_without_a_card_it_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speed_table.main([]) == 1
    assert "CUDA device" in capsys.readouterr().err
