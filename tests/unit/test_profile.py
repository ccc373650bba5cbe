"""Profiles: what is measured, how it is kept, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppsd.config import EngineConfig, core_shares
from ppsd.engine import profiler as measuring
from ppsd.engine.choose import choose, times
from ppsd.engine.peer import Subject
from ppsd.engine.profiler import profiler
from ppsd.engine.profiles import QUICK_S, RETAKEN
from ppsd.errors import ConfigError, StageLostError
from ppsd.model import kernels
from ppsd.model.identity import Identity
from ppsd.model.kernels import Kind
from ppsd.model.names import layer_prefix
from ppsd.model.source import describe, resolve_model
from ppsd.model.weights import fingerprint, open_source
from ppsd.plan.profile import Profile, Timing, estimate, load_profile, profile_path
from ppsd.plan.sizes import Sizes
from ppsd.provenance import provenance
from tests.support.command import ppsd


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def subject(tiny_model: Callable[[str], Path]) -> Subject:
    files = resolve_model(str(tiny_model("llama")))
    spec, source = describe(files), open_source(files.path)
    mark, cores = fingerprint(spec, source), core_shares(2, 1)
    return Subject(files.path, spec, source, mark, torch.float32, 1, cores)


@pytest.fixture
def made(subject: Subject) -> Profile:
    """A profile that passes for a measured one, in a moment."""
    counts = estimate(Sizes.of(subject.spec), 4, model="tiny", fingerprint=subject.fingerprint)
    names = {"dtype": "float32", "itemsize": 4, "transport": "shared-memory", "kernels": "PyTorch"}
    names |= {"source": "measured profile", "provenance": provenance()}
    return replace(counts, measured=True, bandwidth=1e9, **names)


@pytest.mark.parametrize("transport", ["shared-memory", "distributed"])
def test_everything_a_plan_needs_is_measured(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(measuring, "REPEATS", 2)
    monkeypatch.setattr(measuring, "PINGS", 4)
    steps: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    with profiler(replace(subject, transport=transport)) as take:
        earlier = take({}, lambda done, total: None)
        profile = take({"command": "test"}, lambda done, total: steps.append((done, total)))
    assert earlier.layer != profile.layer
    assert torch.get_num_threads() == threads
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    assert {(t.context, t.rows) for t in profile.layer} >= {(0, 1), (128, 1), (128, 2), (128, 8)}
    assert [t.rows for t in profile.lm_head] == [1, 2, 4, 8]
    assert {(t.layers, t.draft_vocab) for t in profile.heads} == {(n, 300) for n in range(3)}
    assert profile.head_time(1, None) >= profile.head_time(0, None) > 0
    assert all(t.time.repeats == 2 and 0 < t.time.low <= t.time.high for t in profile.layer)
    assert profile.contention.repeats == profile.latency.repeats == 4
    assert 0 < profile.bandwidth < 1e15
    assert profile.overhead.median > 0
    assert (profile.threads, profile.dtype, profile.transport) == (1, "float32", transport)
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


def test_a_profile_needs_a_second_process(subject: Subject) -> None:
    with pytest.raises(ConfigError, match="transport must be shared-memory or distributed: a prof"):
        replace(subject, transport="inprocess")


def test_a_profile_survives_its_file(made: Profile, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "profile.json"
    made.save(place)
    assert load_profile(place) == made
    assert [p.name for p in place.parent.iterdir()] == ["profile.json"]
    with pytest.raises(ConfigError, match="out must be a file that can be written"):
        made.save(place / "below-a-file.json")


def test_a_failed_save_leaves_nothing_behind(
    made: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "directory").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="out must be a file, not a directory or a device"):
        made.save(tmp_path / "directory")
    monkeypatch.setattr("ppsd.plan.profile.json.dump", full_disk)
    with pytest.raises(ConfigError, match=r"out must be a file that can be written \(No space"):
        made.save(tmp_path / "full.json")
    assert sorted(tmp_path.iterdir()) == before


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_place_is_tried_before_anything_is_measured(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("ppsd.cli.profile._measure")
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "out must be a file, not a directory or a device"),
        (tmp_path / "file" / "below.json", "out must be a file that can be written"),
    ):
        result = ppsd("profile", "--model", tiny_model("llama"), "--out", out)
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)


def torn(text: str) -> str:
    return text[: len(text) // 2]


def without(name: str) -> Callable[[str], str]:
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != name})


def changed(name: str, value: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | {name: value})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (torn, "JSONDecodeError"),
        (lambda text: "[1, 2]", "ValueError|TypeError"),
        (lambda text: "{}", "KeyError: 'format'"),
        (changed("format", "ppsd-profile-9"), "its format is not ppsd-profile-3"),
        (without("latency"), "KeyError: 'latency'"),
        (without("threads"), "missing 1 required"),
        (changed("layer", []), "holds no LayerTime"),
        (changed("surprise", 1), "unexpected keyword"),
        (changed("bandwidth", -1), "lacks the time"),
        (
            changed("latency", {"median": 1, "low": 2, "high": 3, "repeats": 1}),
            "quartiles in order",
        ),
        (changed("latency", {"median": "1", "low": 0, "high": 3, "repeats": 1}), "finite"),
    ],
)
def test_torn_and_foreign_files_are_refused_by_name(
    made: Profile, tmp_path: Path, damage: Callable[[str], str], reason: str
) -> None:
    place = tmp_path / "profile.json"
    made.save(place)
    place.write_text(damage(place.read_text()))
    with pytest.raises(ConfigError, match=reason) as caught:
        load_profile(place)
    assert str(place) in str(caught.value)
    assert "`ppsd profile` wrote" in str(caught.value)


def test_timings_refuse_what_is_no_time() -> None:
    assert Timing.of([4.0, 1.0, 2.0, 3.0]) == Timing(2.5, 1.75, 3.25, 4)
    for values in ((1.0, 2.0, 3.0), (float("nan"),) * 3, (-1.0, -1.0, -1.0)):
        with pytest.raises(ConfigError, match="timing must be finite"):
            Timing(*values, 1)


def plan(subject: Subject, **settings: object) -> tuple[EngineConfig, str]:
    fixed: dict[str, object] = {"dtype": "float32", "threads_per_stage": 1, "head": "untrained"}
    config = EngineConfig(**fixed | settings)
    profile = times(config, subject.path, subject.spec, subject.source, subject.fingerprint)
    choice = choose(config, subject.spec, Identity(subject.fingerprint), profile)
    assert choice.bounds == (0, *(choice.config.split or ()), subject.spec.num_layers)
    return choice.config, choice.reason


def test_the_profile_of_this_model_dtype_and_threads_is_used(
    subject: Subject, made: Profile
) -> None:
    _, reason = plan(subject)
    assert reason.endswith("; parameter counts")
    slow_first = replace(made, heads=(*made.heads[:1], *(_slower(h) for h in made.heads[1:])))
    slow_first.save(profile_path(subject.fingerprint, "float32", 1))
    config, reason = plan(subject)
    assert reason.endswith("; measured profile, taken today")
    assert config.split == (1,)  # drafting is so slow that stage 0 has as little else as can be
    for other in ({"dtype": "float64"}, {"threads_per_stage": 2}):
        assert plan(subject, **other)[1].endswith("; parameter counts")
    assert plan(subject, plan="off") == (plan(subject, plan="off")[0], "")


def _slower(head: object) -> object:
    return replace(head, time=Timing.computed(1.0))


def test_a_damaged_profile_is_told_and_does_without(subject: Subject) -> None:
    place = profile_path(subject.fingerprint, "float32", 1)
    place.parent.mkdir(parents=True)
    place.write_text("{")
    assert "parameter counts; profile must be a file that `ppsd profile` wrote" in plan(subject)[1]


@pytest.mark.parametrize(
    ("days", "age"), [(0, "taken today"), (1, "a day old"), (40, "40 days old")]
)
def test_a_plan_tells_the_age_of_its_profile(subject: Subject, made: Profile, days, age) -> None:
    taken = datetime.now(UTC) - timedelta(days=days, hours=1)
    old = replace(made, provenance={**made.provenance, "date": taken.isoformat()})
    old.save(profile_path(subject.fingerprint, "float32", 1))
    assert plan(subject)[1].endswith(f"; measured profile, {age}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cpu": "abacus"}, "other processors"),
        ({"cores": 999}, "other cores"),
    ],
)
def test_a_kept_profile_of_another_machine_is_stale(
    subject: Subject, made: Profile, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    other = replace(made, provenance={**made.provenance, **change})
    other.save(profile_path(subject.fingerprint, "float32", 1))
    why = f"; parameter counts; the profile here was taken with {reason}, `ppsd profile` takes"
    assert why in plan(subject)[1]
    other.save(tmp_path / "named.json")  # whoever names it wants it
    told = plan(subject, plan=str(tmp_path / "named.json"))[1]
    assert told.endswith(f"; measured profile, taken today, with {reason}")


@pytest.fixture
def retaken(made: Profile, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Measure in a moment, and note in how many seconds that was to be."""
    budgets: list[float] = []

    @contextmanager
    def profiler(subject: Subject, budget: float) -> Iterator[Callable[..., Profile]]:
        budgets.append(budget)
        yield lambda origin, progress: replace(made, provenance=origin)

    monkeypatch.setattr(measuring, "profiler", profiler)
    return budgets


@pytest.mark.parametrize("change", [{"provenance": {"kernels": "0123, torch 1"}}, {"kernels": "x"}])
def test_a_profile_is_taken_anew_when_kernels_change(
    subject: Subject,
    made: Profile,
    retaken: list[float],
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
) -> None:
    origin = {
        **made.provenance,
        **change.get("provenance", {}),
        "date": "2020-01-01T00:00:00+00:00",
    }
    replace(made, **change | {"provenance": origin}).save(subject.place)
    for _ in range(2):
        assert plan(subject)[1].endswith("; measured profile, taken today")
    assert retaken == [QUICK_S]
    assert caplog.messages == [RETAKEN % subject.spec.name]
    assert load_profile(subject.place).provenance["date"] > "2020-01-02"


def test_a_profile_that_cannot_be_taken_anew_is_done_without(
    subject: Subject, made: Profile, retaken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(made, kernels="x").save(subject.place)
    monkeypatch.setenv("WORLD_SIZE", "2")  # others wait, so rank 0 does not measure
    monkeypatch.setenv("RANK", "0")
    assert "counts; the profile here was taken with other kernels, `ppsd" in plan(subject)[1]
    assert not retaken
    monkeypatch.delenv("WORLD_SIZE")

    def fail(subject: Subject, budget: float) -> None:
        raise StageLostError("stage 1 is gone")

    monkeypatch.setattr(measuring, "profiler", fail)
    assert plan(subject)[1].endswith("; parameter counts; stage 1 is gone")


def test_weights_in_codes_have_a_profile_of_their_own(
    subject: Subject, made: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kind", lambda dtype: "packed")
    weight = layer_prefix(0) + "self_attn.q_proj.weight"
    source = SimpleNamespace(kind=lambda name: Kind.CODES_4 if name == weight else None)
    coded = replace(subject, source=source)
    assert coded.place != subject.place
    assert subject.place == profile_path(subject.fingerprint, "float32", 1)
    packed = replace(made, kernels="packed")
    packed.save(tmp_path / "numbers.json")
    with pytest.raises(ConfigError, match=f"one of codes {coded.codes}, not of none"):
        plan(coded, plan=str(tmp_path / "numbers.json"))
    replace(packed, codes=coded.codes).save(coded.place)
    assert plan(coded)[1].endswith("; measured profile, taken today")
    assert plan(subject)[1].endswith("; parameter counts")


def test_a_profile_without_provenance_is_stale_and_of_unknown_age(
    subject: Subject, made: Profile
) -> None:
    bare = replace(made, provenance={})
    bare.save(profile_path(subject.fingerprint, "float32", 1))
    assert bare.age == "of unknown age"
    assert "the profile here was taken with other processors" in plan(subject)[1]


def test_a_given_profile_must_fit(subject: Subject, made: Profile, tmp_path: Path) -> None:
    place = tmp_path / "mine.json"
    made.save(place)
    assert plan(subject, plan=str(place))[1].endswith("; measured profile, taken today")
    old = replace(made, provenance={**made.provenance, "kernels": "0123, torch 1"})
    old.save(place)
    assert plan(subject, plan=str(place))[1].endswith("taken today, with other kernels")
    for change, message in (
        ({"fingerprint": "other"}, "one of model .*, not of other"),
        ({"dtype": "float64"}, "one of dtype float32, not of float64"),
        ({"threads": 3}, "one of threads 1, not of 3"),
        ({"kernels": "compiled"}, "one of kernels PyTorch, not of compiled"),
    ):
        replace(made, **change).save(place)
        with pytest.raises(ConfigError, match=message):
            plan(subject, plan=str(place))
    with pytest.raises(ConfigError, match="No such file"):
        plan(subject, plan=str(tmp_path / "none.json"))
