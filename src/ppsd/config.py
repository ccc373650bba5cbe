"""How to run a model: stages, split, schedule, placement. Checked before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from ppsd import checks
from ppsd.errors import ConfigError
from ppsd.speculation.policy import MAX_IN_SCHEDULE, MODES, Schedule, schedule_for

TRANSPORTS = ("auto", "shared-memory", "distributed", "inprocess")
ACCEPTANCES = ("coupled", "rejection")
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
HEADS = ("auto", "lookup", "untrained", "none")  # what ``head`` may be beside a directory
DEFAULT_CONTEXT = 8192
MAX_STAGES = 64
MAX_LAYERS = 1024
SECONDS = "a number of seconds in (0, 1e6]"


@dataclass(frozen=True)
class EngineConfig:
    """Everything about a run but the request.

    ``split`` gives the layers at which later stages begin (``(8, 16)`` is three stages);
    otherwise ``stages`` stages are cut where ``plan`` says, the first ending at ``exit_layer`` when
    that is given. ``plan`` is ``auto`` (times from this machine's profile, or else from parameter
    counts), a profile file, or ``off`` (evenly by parameters, no mode but the asked one); it
    decides what is left open, among that ``mode`` when it is ``auto``. ``head`` is a head
    directory, ``auto`` (the best one found), ``lookup`` (no head: repeat earlier text),
    ``untrained`` or ``none``; ``force_head`` uses a directory's head though it was trained on
    another model. ``devices`` names one device for all stages or one each.
    ``threads_per_stage`` 0 shares the cores evenly. ``lookup`` mixes into a head's drafts what
    followed the same tokens before. ``gate`` lets speculation pause while it does not pay. Times
    are seconds; ``pace`` is what a stage takes for one block (LM head included, an exit head's
    draft comes on top) on the emulated device, one for all stages or one each, nothing for real
    time. ``escape_special`` takes control tokens in prompts and messages for plain text.
    ``chat_template``, a file, Jinja text or the name of one that the model has, takes the place of
    the model's default. Raises ConfigError for values that no model could make right.
    """

    model: str | None = None
    stages: int = 2
    split: tuple[int, ...] | None = None
    exit_layer: int | None = None
    head: str = "auto"
    force_head: bool = False
    mode: str = "auto"
    block: int | None = None
    in_flight: int | None = None
    plan: str = "auto"
    acceptance: str = "coupled"
    dtype: str = "auto"
    devices: tuple[str, ...] = ("cpu",)
    threads_per_stage: int = 0
    transport: str = "auto"
    max_context: int | None = None
    prefill_chunk: int = 128
    lookup: bool = True
    gate: bool = True
    timeout: float = 60.0
    init_timeout: float = 300.0
    trace: bool = False
    escape_special: bool = False
    pace: tuple[float, ...] = ()
    chat_template: str | None = None

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, ("auto", *MODES))
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("acceptance", self.acceptance, ACCEPTANCES)
        _one_of("dtype", self.dtype, DTYPES)
        if self.split is not None:
            layers = checks.items("split", self.split, "the layers at which later stages begin")
            self._set("split", tuple(checks.integer("split", n, 1, MAX_LAYERS) for n in layers))
            self._set("stages", len(layers) + 1)
        self._set_integer("stages", 1, MAX_STAGES)
        self._set_integer("threads_per_stage", 0, 1024)
        self._set_integer("prefill_chunk", 1, 8192)
        for name in ("block", "in_flight"):
            if getattr(self, name) is not None:
                self._set_integer(name, 1, MAX_IN_SCHEDULE)
        for name in ("lookup", "gate", "trace", "force_head", "escape_special"):
            self._set(name, checks.truth(name, getattr(self, name)))
        for name in ("model", "head", "plan", "chat_template"):
            if getattr(self, name) is not None or name in ("head", "plan"):
                self._set(name, checks.text(name, getattr(self, name)))
        for name in ("timeout", "init_timeout"):
            self._set(name, _seconds(name, getattr(self, name), 1e6, SECONDS))
        one = self.devices  # a text alone is one device, not one for each of its letters
        devices = (one,) if isinstance(one, str) else checks.items("devices", one, "device names")
        for device in devices:
            if not isinstance(device, str):
                raise ConfigError("devices", device, "names such as cpu or cuda:0")
        self._set("devices", devices)
        if len(devices) not in (1, self.stages):
            raise ConfigError("devices", devices, f"one device or {self.stages}, one a stage")
        if self.force_head and self.head in HEADS:
            raise ConfigError("force_head", self.force_head, "used with head as a directory only")
        self._check_pace()
        self._check_schedule()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _set_integer(self, name: str, low: int, high: int) -> None:
        self._set(name, checks.integer(name, getattr(self, name), low, high))

    def _check_pace(self) -> None:
        allowed = f"seconds above 0 and below the timeout of {self.timeout:g}"
        one = isinstance(self.pace, Real)
        times = (self.pace,) if one else checks.items("pace", self.pace, allowed)
        if len(times) not in (0, 1, self.stages):
            raise ConfigError("pace", times, f"one time or {self.stages}, one a stage")
        end = math.nextafter(self.timeout, 0.0)
        self._set("pace", tuple(_seconds("pace", s, end, allowed) for s in times))

    def _check_schedule(self) -> None:
        if self.schedule.drafts and self.stages == 1:
            allowed = (
                "autoregressive or ppsd with one stage: drafting needs an exit inside the model"
            )
            raise ConfigError("mode", self.mode, allowed)
        if self.exit_layer is not None and self.split and self.exit_layer != self.split[0]:
            allowed = f"the end of stage 0, {self.split[0]} in this split"
            raise ConfigError("exit_layer", self.exit_layer, allowed)

    @property
    def schedule(self) -> Schedule:
        """The (m, w) of the mode; while that is open, of ``ppsd``."""
        mode = "ppsd" if self.mode == "auto" else self.mode
        return schedule_for(mode, self.stages, self.block, self.in_flight)

    @property
    def schedule_given(self) -> bool:
        """Whether the user fixed m or w."""
        return self.block is not None or self.in_flight is not None

    def device(self, rank: int) -> str:
        """Device of a stage."""
        return self.devices[rank if len(self.devices) > 1 else 0]

    def pace_of(self, rank: int) -> float:
        """Seconds a block takes on a stage's emulated device, 0 for as fast as it goes."""
        return self.pace[rank if len(self.pace) > 1 else 0] if self.pace else 0.0

    def replaced(self, **changes: object) -> EngineConfig:
        """A checked copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]  # checked by __post_init__


def available_cores() -> list[int]:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core_shares(stages: int, threads: int) -> tuple[tuple[int, ...], ...]:
    """CPUs of each stage, ``threads`` of them; all empty when there are not enough.

    To be asked before anything is pinned: a pinned process has its own share left and no other.
    """
    cores = available_cores()
    if stages * threads > len(cores):
        return ((),) * stages
    return tuple(tuple(cores[r * threads : (r + 1) * threads]) for r in range(stages))


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(name, value, "one of " + ", ".join(allowed))


def _seconds(name: str, value: object, most: float, allowed: str) -> float:
    return checks.number(name, value, 0.0, most, low_open=True, allowed=allowed)
