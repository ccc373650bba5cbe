"""The training loop: it learns, resumes exactly, trains heads apart, and refuses clearly."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppsd.errors import ConfigError, PpsdError
from ppsd.train.batched import whole_sequences
from ppsd.train.checkpoint import CHECKPOINT, METRICS, RunDirectory
from ppsd.train.distill import StepReport, Trainer
from ppsd.train.evaluate import Agreement
from ppsd.train.settings import DistillConfig
from tests.support.teachers import tiny_config, tiny_teacher, tiny_trainer

Models = Callable[[str], Path]


class StoppedError(Exception):
    pass


def ignore(report: StepReport) -> None:
    pass


def stop_at(step: int) -> Callable[[StepReport], None]:
    def report(r: StepReport) -> None:
        if r.step == step:
            raise StoppedError

    return report


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach() for s in trainer.students for _, p in s.parameters()]


def test_it_learns(tiny_model: Models, tmp_path: Path) -> None:
    config = tiny_config(2, 4, epochs=8, learning_rate=1e-2)
    trainer = tiny_trainer(tiny_teacher(tiny_model("llama"), config), config, tmp_path)
    losses: list[dict[int, float]] = []
    trainer.run(lambda r: losses.append(r.loss))
    for layer in (2, 4):
        first, last = (sum(x[layer] for x in part) for part in (losses[:5], losses[-5:]))
        assert last < 0.7 * first


def test_a_time_budget_ends_training_with_the_rate_at_zero(
    tiny_model: Models, tmp_path: Path
) -> None:
    config = tiny_config(2, epochs=100, minutes=1 / 60)
    trainer = tiny_trainer(tiny_teacher(tiny_model("llama"), config), config, tmp_path)
    assert trainer.run(ignore)[2].alpha >= 0
    assert 0 < trainer.step < trainer.steps
    rates = [r["rates"][0] for r in trainer.directory.metrics() if "rates" in r]
    assert rates[-1] < 0.2 * max(rates)


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_stopped_run_ends_with_the_same_weights(
    tiny_model: Models, tmp_path: Path, stop: int
) -> None:
    config = tiny_config(2, 4, epochs=2)
    teacher = tiny_teacher(tiny_model("llama"), config)
    whole = tiny_trainer(teacher, config, tmp_path / "whole", checkpoint=3, validate=4)
    whole.run(ignore)
    with pytest.raises(StoppedError):
        tiny_trainer(teacher, config, tmp_path / "cut", checkpoint=3, validate=4).run(stop_at(stop))
    again = tiny_trainer(teacher, config, tmp_path / "cut", checkpoint=3, validate=4)
    again.run(ignore)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    logged = [[(r["step"], r.get("loss")) for r in t.directory.metrics()] for t in (whole, again)]
    assert [x for x in logged[0] if x[1]] == [x for x in logged[1] if x[1]]


def test_the_start_is_kept_where_training_does_not_help(tiny_model: Models, tmp_path: Path) -> None:
    """At a rate that ruins the heads, every tenth of the run is worse than where it began."""
    config = tiny_config(2, 4, learning_rate=10.0)
    teacher = tiny_teacher(tiny_model("llama"), config)
    trainer = tiny_trainer(teacher, config, tmp_path / "ruined")
    found = trainer.run(ignore)
    fresh = tiny_trainer(teacher, config, tmp_path / "fresh")
    fresh._start()
    for student in fresh.students:
        student.round()
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(fresh), strict=True))
    for layer, kept in trainer.best.kept.items():
        assert (kept.step, kept.alpha) == (0, kept.start)
        assert trainer.last[layer].alpha < found[layer].alpha


def agreed(alpha: float, high: float) -> dict[int, Agreement]:
    return {3: Agreement(alpha, alpha, (0.0, high), 4)}


def test_training_ends_when_a_head_has_long_been_surely_worse_than_at_the_start(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not within the first half of the run, whose rate is high."""
    config = tiny_config(epochs=4)
    trainer = tiny_trainer(tiny_teacher(tiny_model("llama"), config), config, tmp_path)
    monkeypatch.setattr(trainer, "_validate", lambda final=False: agreed(0.5, 0.6))
    trainer._begin()
    monkeypatch.setattr(trainer, "_validate", lambda final=False: agreed(0.3, 0.4))
    trainer.run(ignore)
    assert trainer.gave_up
    assert trainer.steps / 2 <= trainer.step <= trainer.steps / 2 + 1
    checkpoint = trainer.directory.load()
    assert checkpoint is not None
    assert checkpoint.step == trainer.step, "heads that find no room can be written later"


def test_a_head_that_may_be_as_good_as_at_the_start_goes_on(
    tiny_model: Models, tmp_path: Path
) -> None:
    config = tiny_config()
    trainer = tiny_trainer(tiny_teacher(tiny_model("llama"), config), config, tmp_path)
    best = trainer.best
    best.consider(0, agreed(0.5, 0.6))
    for step, (alpha, high) in enumerate([(0.3, 0.4), (0.3, 0.4), (0.45, 0.55)], 1):
        best.consider(step, agreed(alpha, high))
    best.consider(4, agreed(0.3, 0.4))
    assert not best.hopeless
    figures, _ = best.state()
    assert figures == {"3": [0, 0.5, 0.5, 1]}


def test_what_is_to_come_is_told_and_changes_nothing(tiny_model: Models, tmp_path: Path) -> None:
    config = tiny_config(2, 4)
    teacher = tiny_teacher(tiny_model("llama"), config)
    told, silent = (tiny_trainer(teacher, config, tmp_path / name) for name in ("told", "silent"))
    forecast = told.forecast()
    assert forecast.tokens == told.total_tokens
    assert forecast.seconds > 0
    assert forecast.alpha == {layer: kept.start for layer, kept in told.best.kept.items()}, "small"
    told.run(ignore)
    silent.run(ignore)
    assert all(torch.equal(a, b) for a, b in zip(weights(told), weights(silent), strict=True))
    assert told.forecast().tokens == 0


def test_short_runs_are_validated_ten_times(tiny_model: Models, tmp_path: Path) -> None:
    config = tiny_config(epochs=4)
    trainer = tiny_trainer(tiny_teacher(tiny_model("llama"), config), config, tmp_path)
    trainer.run(ignore)
    validated = [r["step"] for r in trainer.directory.metrics() if "validation" in r]
    assert len(validated) >= 10
    assert validated[0] == 0
    assert trainer.best.kept[3].step in validated


def test_a_run_that_time_cuts_short_goes_as_a_short_run_does(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many epochs as the time allows are validated as often, and learn at the same rate."""
    pace = property(lambda trainer: 60.0 / trainer.total_tokens * 50)
    monkeypatch.setattr(Trainer, "_pace", pace)
    by_epochs = tiny_config(epochs=2, learning_rate=None)
    by_time = tiny_config(epochs=100, learning_rate=None, minutes=1.0)
    teacher = tiny_teacher(tiny_model("llama"), by_epochs)
    found = []
    for i, config in enumerate((by_epochs, by_time)):
        trainer = tiny_trainer(teacher, config, tmp_path / str(i))
        trainer._begin()
        [student] = trainer.students
        found.append((trainer._expected, trainer._validate_every, trainer._peak(student)))
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert found[0][2] < 2e-3


def test_a_finished_run_leaves_no_checkpoint(tiny_model: Models, tmp_path: Path) -> None:
    config = tiny_config()
    trainer = tiny_trainer(tiny_teacher(tiny_model("llama"), config), config, tmp_path)
    assert not trainer.directory.finished()
    trainer.run(ignore)
    assert (tmp_path / CHECKPOINT).exists()
    trainer.directory.finish()
    assert not (tmp_path / CHECKPOINT).exists()
    assert RunDirectory(tmp_path, {}).finished()
    with pytest.raises(PpsdError, match="holds another run: seed was None and is now 1"):
        RunDirectory(tmp_path, {"seed": 1}).finished()


def test_heads_trained_together_equal_heads_trained_apart(
    tiny_model: Models, tmp_path: Path
) -> None:
    both = tiny_config(2, 4)
    teacher = tiny_teacher(tiny_model("llama"), both)
    together = tiny_trainer(teacher, both, tmp_path / "both")
    together.run(ignore)
    apart = tiny_trainer(teacher, tiny_config(4), tmp_path / "one")
    apart.run(ignore)
    pairs = zip(together.students[1].parameters(), apart.students[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_a_head_begins_as_the_best_linear_guess(tiny_model: Models, tmp_path: Path) -> None:
    """What it says before training misses the last layer's rows by no more than the least."""
    config = tiny_config(3, head_mlp=8)
    teacher = tiny_teacher(tiny_model("llama"), config)
    trainer = tiny_trainer(teacher, config, tmp_path)
    trainer._start()
    [student] = trainer.students
    found, wanted, read = [], [], []
    for step in range(trainer.steps):
        batch = trainer._batch(step)
        features = trainer._lesson.features(batch)
        verified = trainer._verified(batch, features, step)
        rope = whole_sequences(teacher.stage.rope, *batch.tokens.shape)
        with torch.no_grad():
            student.tensors.norm.fill_(1)
            rows = (features.exits[3], verified, rope, batch.tokens.shape[0], batch.rows)
            found.append(student.forward(*rows))
            read.append(student.reads(features.exits[3][batch.rows], verified))
        wanted.append(features.last[batch.rows])
    inputs, outputs = torch.cat(read), torch.cat(wanted)
    scale = outputs.square().mean(1, keepdim=True).rsqrt()
    best = inputs @ torch.linalg.lstsq(inputs * scale, outputs * scale).solution
    normed = best * best.square().mean(1, keepdim=True).rsqrt()
    off = (torch.cat(found) - normed).norm() / normed.norm()
    assert off < 0.03  # the ridge


def test_another_run_in_the_same_directory_is_refused(tiny_model: Models, tmp_path: Path) -> None:
    RunDirectory(tmp_path, {"seed": 0})
    config = tiny_config()
    trainer = tiny_trainer(tiny_teacher(tiny_model("llama"), config), config, tmp_path)
    trainer.run(ignore)
    with pytest.raises(PpsdError, match="holds another run: seed was None and is now 1"):
        RunDirectory(tmp_path, {"seed": 1}).load()


def test_a_full_disk_leaves_the_last_checkpoint(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(epochs=2)
    teacher = tiny_teacher(tiny_model("llama"), config)
    with pytest.raises(StoppedError):
        tiny_trainer(teacher, config, tmp_path, checkpoint=2).run(stop_at(3))
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "rewind_metrics", lambda self, step: None)
        patch.setattr(os, "fsync", full)
        with pytest.raises(PpsdError, match="No space left on device; the one before is untouched"):
            tiny_trainer(teacher, config, tmp_path, checkpoint=2).run(ignore)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.new"))
    assert tiny_trainer(teacher, config, tmp_path, checkpoint=2).run(ignore)


def test_divergence_stops_the_run(tiny_model: Models, tmp_path: Path) -> None:
    config = tiny_config(learning_rate=1e300, clip=1e300)
    trainer = tiny_trainer(tiny_teacher(tiny_model("llama"), config), config, tmp_path)
    with pytest.raises(PpsdError, match="diverged at step"):
        trainer.run(ignore)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"exit_layers": (3, 3)}, "exit_layer"),
        ({"kind": "mlp"}, "head must be one of"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"kl_weight": float("nan")}, "kl_weight"),
        ({"kl_weight": 0.0, "ce_weight": 0.0}, "kl_weight"),
        ({"epochs": 0}, "epochs"),
        ({"kind": "norm", "head_mlp": 40}, "head_mlp must be left out with norm heads"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        DistillConfig(**{"exit_layers": (3,), **changes})


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (tiny_config(6), r"exit_layer must be in \[1, 5\]"),
        (tiny_config(4, init="exit", head_layers=3), "head_layers must be at most 2"),
        (tiny_config(max_length=1024), "max_length must be at most 512, the context"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    tiny_model: Models, config: DistillConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        tiny_teacher(tiny_model("llama"), config)


@pytest.mark.parametrize(
    ("layers", "exits"), [(2, (1,)), (3, (1,)), (5, (1, 2)), (30, (8, 15)), (32, (8, 16))]
)
def test_heads_are_put_where_stages_would_end(layers: int, exits: tuple[int, ...]) -> None:
    assert DistillConfig().suited(layers, "cpu").exit_layers == exits
    assert DistillConfig((1,)).suited(layers, "cpu").exit_layers == (1,)


def test_steps_suit_the_device() -> None:
    sizes = [DistillConfig().suited(4, name).batch_tokens for name in ("cpu", "cuda", "cuda:1")]
    assert sizes == [512, 2048, 2048]
    assert DistillConfig((1,), batch_tokens=96).suited(4, "cpu").batch_tokens == 96


def test_a_model_of_one_layer_has_no_place_for_a_head() -> None:
    with pytest.raises(ConfigError, match="of 2 layers or more"):
        DistillConfig().suited(1, "cpu")
    with pytest.raises(ConfigError, match="one or more layers"):
        DistillConfig().check_model(4, 64, 64)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    config = tiny_config(learning_rate=1.0, warmup=0.1)
    rates = [config.rate(step / 1000, 1000, 1.0) for step in range(1001)]
    assert rates[:100] == pytest.approx([0.01 * i for i in range(100)])
    assert max(rates) == rates[100] == 1.0
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[1000] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("share", "steps", "rising"), [(0.05, 200, 50), (0.05, 40, 20), (0.5, 40, 20), (0.0, 40, 0)]
)
def test_a_short_run_warms_up_for_long_enough(share: float, steps: int, rising: int) -> None:
    config = tiny_config(learning_rate=1.0, warmup=share)
    rates = [config.rate(step / steps, steps, 1.0) for step in range(steps)]
    assert rates.index(max(rates)) == rising


def test_the_default_rate_is_low_where_there_is_much_to_lose() -> None:
    def peak(steps: int, start: float, width: int = 576, begun: bool = False) -> float:
        return tiny_config(learning_rate=None).peak_rate(steps, width, start, begun)

    rates = [peak(steps, 0.6) for steps in (40, 1000, 9000)]
    assert rates == pytest.approx([8e-4, 4e-3, 4e-3])
    assert peak(10, 0.3) == peak(10, 0.3, width=64) == pytest.approx(8e-4)
    assert peak(250, 0.3) == 4e-3
    assert peak(9000, 0.6, begun=True) == 1e-3
    assert peak(9000, 0.6, width=2 * 576) == 2e-3


@pytest.mark.parametrize(
    "broken", [b'{"step": ', b"\xff", b"[" * 100_000], ids=["cut", "bytes", "deep"]
)
def test_a_broken_line_is_told_by_its_number(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / METRICS
    path.write_bytes(b'{"step": 1}\n\n' + broken + b'\n{"step": 2}\n')
    with pytest.raises(PpsdError, match=f"^{re.escape(str(path))}, line 3: not JSON"):
        RunDirectory(tmp_path, {}).metrics()
