"""EngineConfig refuses what no model could make right, naming field, value and what is allowed."""

from __future__ import annotations

import pytest

from ppsd.config import EngineConfig
from ppsd.errors import ConfigError
from ppsd.speculation.policy import Schedule

BAD = [
    ("mode", {"mode": "fast"}),
    ("transport", {"transport": "tcp"}),
    ("acceptance", {"acceptance": "maybe"}),
    ("dtype", {"dtype": "int8"}),
    ("stages", {"stages": 0}),
    ("stages", {"stages": 65}),
    ("stages", {"stages": True}),
    ("block", {"block": 0}),
    ("in_flight", {"in_flight": 65}),
    ("threads_per_stage", {"threads_per_stage": -1}),
    ("prefill_chunk", {"prefill_chunk": 0}),
    ("timeout", {"timeout": 0}),
    ("timeout", {"timeout": float("nan")}),
    ("init_timeout", {"init_timeout": "long"}),
    ("devices", {"stages": 3, "devices": ("cpu", "cpu")}),
    ("mode", {"stages": 1, "mode": "draft-then-verify"}),
    ("mode", {"mode": "autoregressive", "in_flight": 2}),
    ("exit_layer", {"split": (4, 8), "exit_layer": 5}),
    ("stages", {"split": (4, 8), "stages": 4}),
    ("concurrent", {"concurrent": 8, "mode": "draft-then-verify"}),
    ("concurrent", {"concurrent": 2, "mode": "ppsd", "block": 2}),
]


@pytest.mark.parametrize(("field", "settings"), BAD)
def test_bad_settings_are_named(field, settings) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be ") as caught:
        EngineConfig(**settings)
    assert caught.value.field == field
    assert repr(settings[field]) in str(caught.value)


def test_a_split_decides_the_number_of_stages_and_with_it_the_schedule() -> None:
    config = EngineConfig(split=(4, 8, 12))
    assert (config.stages, config.schedule) == (4, Schedule(1, 4))
    assert config.replaced(mode="draft-then-verify", block=5).schedule == Schedule(5, 1)
    assert config.replaced(mode="autoregressive").schedule == Schedule(1, 1)


def test_devices_are_one_for_all_or_one_each() -> None:
    assert [EngineConfig(stages=3).device(rank) for rank in range(3)] == ["cpu"] * 3
    each = EngineConfig(stages=2, devices=("cuda:0", "cpu"))
    assert [each.device(rank) for rank in range(2)] == ["cuda:0", "cpu"]
