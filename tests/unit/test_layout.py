"""What is decided before anything is loaded: what stages hold, and what memory they need."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppsd.config import EngineConfig
from ppsd.engine import layout as laid
from ppsd.engine.choose import head_sizes, times
from ppsd.engine.layout import Layout, check_memory, head_seconds, plan_layout
from ppsd.errors import ConfigError, HeadError
from ppsd.model import kernels
from ppsd.model.head_files import HeadConfig
from ppsd.model.head_library import FoundHead
from ppsd.model.source import ModelFiles
from ppsd.model.stage import StagePlan
from ppsd.plan.profile import LayerTime, Profile, Timing
from ppsd.plan.sizes import WORKER_BYTES, Sizes
from tests.support.tiny_models import LAYERS, save_perfect_head

SETTINGS = {"mode": "ppsd", "head": "untrained", "plan": "off", "dtype": "float32", "split": (2,)}


@pytest.fixture
def plan(tiny_model):
    def made(**settings) -> tuple[EngineConfig, Layout, object]:
        config = EngineConfig(**SETTINGS | settings)
        return plan_layout(config, ModelFiles("tiny", tiny_model(), is_gguf=False))

    return made


def slower_with_rows(*arguments) -> Profile:
    """Return a profile in which each further row takes a 64th of the first one's time."""
    layer = tuple(LayerTime(0, n, Timing(*[1.0 + (n - 1) / 64] * 3, 1)) for n in (1, 2))
    return replace(times(*arguments), layer=layer)


def test_what_each_stage_holds(plan) -> None:
    config, layout, _ = plan(rows=3, concurrent=2, max_context=100)
    assert (layout.loose, layout.slots, layout.costs) == (3 * 2, 2, ())
    assert layout.plan(1, "cpu") == StagePlan(
        first=2,
        last=LAYERS,
        max_context=100,
        dtype=torch.float32,
        device=torch.device("cpu"),
        packed=True,
        slots=2,
        loose=6,
    )
    assert config.split == (2,)
    assert layout.kernels == (kernels.name("float32", "cpu"),) * 2
    _, chains, _ = plan()
    assert (chains.loose, chains.slots) == (0, 1)
    _, narrow, _ = plan(dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16
    assert narrow.kernels == (kernels.name("bfloat16", "cpu"),) * 2


def test_rows_are_priced_by_measured_times_alone(plan, monkeypatch) -> None:
    """Where times decide on the rows of a wave; on emulated devices rows are free."""
    monkeypatch.setattr(laid, "times", slower_with_rows)
    config, layout, _ = plan(rows="auto", plan="auto")
    assert layout.reason
    assert config.most_rows > 1
    assert layout.costs == pytest.approx([1.0 + n / 64 for n in range(config.most_rows)])
    assert plan(rows=4)[1].costs == ()
    assert plan(rows="auto", plan="auto", pace=0.01)[1].costs == ()


def test_heads_that_can_draft(plan) -> None:
    _, layout, _ = plan()
    fingerprint = layout.identity.fingerprint
    assert layout.head == HeadConfig(
        "norm", 0, 0, None, layout.spec.name, fingerprint, trained=False
    )
    assert plan(head="none", mode="autoregressive")[1].head is None
    assert plan(head="lookup")[1].head is None
    assert plan(stages=1, split=(), mode="autoregressive")[1].head is None


def test_the_times_of_a_profile_decide(plan, monkeypatch) -> None:
    asked: list[object] = []
    choose = laid.choose
    monkeypatch.setattr(laid, "times", slower_with_rows)
    monkeypatch.setattr(laid, "choose", lambda *each: (asked.append(each[3]), choose(*each))[1])
    monkeypatch.setattr(kernels, "name", lambda dtype, device: f"{dtype} on {device}")
    assert plan()[1].kernels == ("float32 on cpu",) * 2
    [profile] = asked
    assert profile.growth(2) == pytest.approx(1 + 1 / 64)


def test_a_head_of_another_model_is_used_by_force_alone(plan, tiny_model, tmp_path) -> None:
    save_perfect_head(tmp_path, tiny_model(), 2)
    file = tmp_path / "head.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"fingerprint": "0" * 16, "model": {}})
    )
    with pytest.raises(HeadError):
        plan(head=str(tmp_path))
    assert plan(head=str(tmp_path), force_head=True)[1].head.trained


def test_a_context_is_one_that_the_model_was_made_for(plan) -> None:
    _, layout, _ = plan()
    most = layout.spec.max_context
    assert layout.max_context == most
    for length in (2, most):
        assert plan(max_context=length)[1].max_context == length
    for length in (1, most + 1):
        with pytest.raises(
            ConfigError, match=rf"an integer in \[2, {most}\], what tiny was made for"
        ):
            plan(max_context=length)


def test_devices_that_are_not_here_are_refused(plan, monkeypatch) -> None:
    """Under torchrun a later stage's device may be another host's."""
    with pytest.raises(
        ConfigError, match="must be devices that PyTorch finds here, such as cpu or cuda:0, g"
    ):
        plan(devices=("cpu", "nowhere:0"))
    monkeypatch.setattr(laid, "on_torchrun", lambda config: True)
    _, layout, _ = plan(devices=("cpu", "nowhere:0"))
    assert layout.cores == ((), ())
    with pytest.raises(ConfigError, match="devices must be"):
        plan(devices=("nowhere:0", "cpu"))


def test_memory_counts_every_stage_and_head_on_this_host(plan, monkeypatch) -> None:
    checked: list[list[int]] = []
    monkeypatch.setattr(laid, "check_free", lambda needed, *rest: checked.append(needed))
    config, layout, source = plan(head="none", mode="autoregressive")
    bare = check_memory(config, layout, source)
    assert len(bare) == 2
    assert checked == [bare]
    [together] = check_memory(config.replaced(transport="inprocess"), layout, source)
    assert together == sum(bare) - WORKER_BYTES
    head = HeadConfig("blocks", 1, 2, 50, layout.spec.name, "")
    sizes, held = Sizes.of(layout.spec), layout.plan(0, "cpu")
    positions = held.slots * (held.max_context + held.loose)
    prompts = held.slots * min(1024, held.max_context)
    numbers = head_sizes(sizes, head) + 2 * positions * sizes.cached + prompts * sizes.hidden
    inner = (FoundHead(Path("head"), False, head), None)
    assert check_memory(config, replace(layout, inner=inner), source) == [
        bare[0] + 4 * numbers,
        bare[1],
    ]
    first = check_memory(config, replace(layout, head=head), source)
    assert first == [bare[0] + 4 * numbers, bare[1]]
    monkeypatch.setattr(laid, "on_torchrun", lambda config: True)
    assert check_memory(config, layout, source) == bare
    assert checked[-1] == bare[:1], "nothing is known of where the other stages are"


def test_a_head_on_an_emulated_device_takes_its_share_of_a_stages_time(plan) -> None:
    _, layout, _ = plan(split=(2, 5))
    sizes, head = Sizes.of(layout.spec), layout.head
    numbers = head_sizes(sizes, head)
    for rank, layers in enumerate((2, 3, 1)):
        share = numbers / sizes.layer / layers
        assert head_seconds(0.5, layout, rank, head) == pytest.approx(0.5 * share)
    assert head_seconds(0.5, layout, 0, None) == 0
