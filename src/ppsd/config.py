"""How to run a model: stages, split, schedule, placement. Checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ppsd.errors import ConfigError
from ppsd.speculation.policy import MODES, Schedule, schedule_for

TRANSPORTS = ("auto", "shared-memory", "distributed", "inprocess")
ACCEPTANCES = ("coupled", "rejection")
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
HEADS = ("auto", "lookup", "untrained", "none")  # what ``head`` may be beside a directory
DEFAULT_CONTEXT = 8192
MAX_STAGES = 64
MAX_LAYERS = 1024


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
        if self.split is not None:
            object.__setattr__(self, "split", tuple(self.split))
            object.__setattr__(self, "stages", len(self.split) + 1)
        _one_of("mode", self.mode, ("auto", *MODES))
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("acceptance", self.acceptance, ACCEPTANCES)
        _one_of("dtype", self.dtype, DTYPES)
        _integer("stages", self.stages, 1, MAX_STAGES)
        for layer in self.split or ():
            _integer("split", layer, 1, MAX_LAYERS)
        _integer("threads_per_stage", self.threads_per_stage, 0, 1024)
        _integer("prefill_chunk", self.prefill_chunk, 1, 8192)
        for name, value in (("timeout", self.timeout), ("init_timeout", self.init_timeout)):
            if not isinstance(value, int | float) or not 0 < value < 1e6:
                raise ConfigError(name, value, "a number of seconds in (0, 1e6)")
        if len(self.devices) not in (1, self.stages):
            raise ConfigError("devices", self.devices, f"one device or {self.stages}, one a stage")
        if self.force_head and self.head in HEADS:
            raise ConfigError("force_head", self.force_head, "used with head as a directory only")
        self._check_pace()
        self._check_schedule()

    def _check_pace(self) -> None:
        object.__setattr__(self, "pace", tuple(self.pace))
        if len(self.pace) not in (0, 1, self.stages):
            raise ConfigError("pace", self.pace, f"one time or {self.stages}, one a stage")
        for seconds in self.pace:
            if not isinstance(seconds, int | float) or not 0 < seconds < self.timeout:
                allowed = f"seconds above 0 and below the timeout of {self.timeout:g}"
                raise ConfigError("pace", seconds, allowed)

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


def _integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(name, value, f"an integer in [{low}, {high}]")
