"""How to run a model: stages, split, schedule, placement. Checked before anything is loaded."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from numbers import Real

from ppsd import checks
from ppsd.errors import ConfigError
from ppsd.settings import TEMPLATE_HELP, setting
from ppsd.speculation.policy import MAX_IN_SCHEDULE, MAX_ROWS, MODES, Schedule, schedule_for

TRANSPORTS = ("auto", "shared-memory", "distributed", "inprocess")
ACCEPTANCES = ("coupled", "rejection")
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
AUTO = "auto"
AUTO_ROWS = 16  # at most, where times decide
INNER_HEADS = ("none", "auto")
HEADS = ("auto", "lookup", "untrained", "none")  # what ``head`` may be beside a directory
DEFAULT_CONTEXT = 8192
DEFAULT_STAGES = 2
MAX_STAGES = 64
MAX_LAYERS = 1024
MAX_CONCURRENT = 256
SECONDS = "a number of seconds in (0, 1e6]"


class _Checked:
    """Replace what was given by what was checked, in a frozen record."""

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _set_integer(self, name: str, low: int, high: int) -> None:
        self._set(name, checks.integer(name, getattr(self, name), low, high))

    def _set_truths(self, *names: str) -> None:
        for name in names:
            self._set(name, checks.truth(name, getattr(self, name)))

    def _set_texts(self, *names: str) -> None:
        for name in names:
            text = checks.text(name, getattr(self, name))
            if not text:  # as a path it would be this directory
                raise ConfigError(name, text, "a text or a path that is not empty")
            self._set(name, text)


@dataclass(frozen=True)
class Placement(_Checked):
    """Say which model runs where, and how its stages talk to each other.

    ``split`` gives the layers at which later stages begin (``(8, 16)`` is three stages);
    otherwise ``stages`` stages are cut where ``plan`` says. ``devices`` names one device for all
    stages or one each. ``threads_per_stage`` 0 shares the cores evenly. Times are seconds; ``pace``
    is what a stage takes for one block (LM head included, an exit head's draft comes on top) on
    the emulated device, one for all stages or one each, nothing for real time. ``escape_special``
    takes control tokens in prompts and messages for plain text. ``chat_template``, a file, Jinja
    text or the name of one that the model has, takes the place of the model's default.
    """

    model: str | None = setting(
        "Directory, .gguf file or hub id; the embedded SmolLM2-135M if left out.", None, short="-m"
    )
    chat_template: str | None = setting(TEMPLATE_HELP, None, metavar="FILE|TEXT")
    stages: int = setting("Number of stages.", DEFAULT_STAGES)
    split: tuple[int, ...] | None = setting(
        "Layers at which later stages begin, such as 8,16.", None, metavar="L,…"
    )
    dtype: str = setting("auto, float64, float32, bfloat16 or float16.", "auto", metavar="DTYPE")
    devices: tuple[str, ...] = setting(
        "One device, or one a stage: cpu or cuda:0,cuda:1.", ("cpu",), metavar="D,…"
    )
    threads_per_stage: int = setting("CPU threads a stage; 0 shares the cores evenly.", 0)
    max_context: int | None = setting(
        f"Positions the cache holds; the model's, at most {DEFAULT_CONTEXT}.", None
    )
    transport: str = setting(
        "auto, shared-memory, distributed or inprocess.", "auto", metavar="KIND", expert=True
    )
    concurrent: int = setting(
        "Requests that may be under way at once; each has a cache of max_context positions.",
        1,
        metavar="N",
    )
    prefill_chunk: int = setting("Prompt tokens that travel together.", 128, expert=True)
    pace: tuple[float, ...] = setting(
        "Emulate devices: seconds a stage takes for a block, one or one a stage.",
        (),
        metavar="S,…",
        expert=True,
    )
    escape_special: bool = setting(
        "Take control tokens in prompts and messages for plain text.", False, expert=True
    )
    timeout: float = setting("Seconds to wait for a stage.", 60.0, expert=True)
    init_timeout: float = setting("Seconds to wait for loading and joining.", 300.0, expert=True)

    def __post_init__(self) -> None:
        for name in ("model", "chat_template"):
            if getattr(self, name) is not None:
                self._set_texts(name)
        checks.one_of("transport", self.transport, TRANSPORTS)
        checks.one_of("dtype", self.dtype, DTYPES)
        self._set_integer("stages", 1, MAX_STAGES)
        if self.split is not None:
            layers = checks.items("split", self.split, "the layers at which later stages begin")
            self._set("split", tuple(checks.integer("split", n, 1, MAX_LAYERS) for n in layers))
            if self.stages != DEFAULT_STAGES:  # which follows the split
                self.check_stages(self.stages)
            self._set("stages", len(layers) + 1)
            self._set_integer("stages", 1, MAX_STAGES)
        self._set_integer("threads_per_stage", 0, 1024)
        self._set_integer("concurrent", 1, MAX_CONCURRENT)
        self._set_integer("prefill_chunk", 1, 8192)
        self._set_truths("escape_special")
        for name in ("timeout", "init_timeout"):
            self._set(name, _seconds(name, getattr(self, name), 1e6, SECONDS))
        self._check_devices()
        self._check_pace()

    def check_stages(self, given: int) -> None:
        """Raise ConfigError if a given number of stages is not that of the given split."""
        if self.split is not None and given != len(self.split) + 1:
            raise ConfigError("stages", given, f"{len(self.split) + 1} with split {self.split}")

    def _check_devices(self) -> None:
        one = self.devices  # a text alone is one device, not one for each of its letters
        devices = (one,) if isinstance(one, str) else checks.items("devices", one, "device names")
        for device in devices:
            if not isinstance(device, str):
                raise ConfigError("devices", device, "names such as cpu or cuda:0")
        self._set("devices", devices)
        if len(devices) not in (1, self.stages):
            raise ConfigError("devices", devices, f"one device or {self.stages}, one a stage")

    def _check_pace(self) -> None:
        allowed = f"seconds above 0 and below the timeout of {self.timeout:g}"
        one = isinstance(self.pace, Real)
        times = (self.pace,) if one else checks.items("pace", self.pace, allowed)
        if len(times) not in (0, 1, self.stages):
            raise ConfigError("pace", times, f"one time or {self.stages}, one a stage")
        end = math.nextafter(self.timeout, 0.0)
        self._set("pace", tuple(_seconds("pace", s, end, allowed) for s in times))

    def device(self, rank: int) -> str:
        """Return the device of a stage."""
        return self.devices[rank if len(self.devices) > 1 else 0]

    def pace_of(self, rank: int) -> float:
        """Return the seconds a block takes on a stage's emulated device, 0 for real time."""
        return self.pace[rank if len(self.pace) > 1 else 0] if self.pace else 0.0


@dataclass(frozen=True)
class Decoding(_Checked):
    """Say how tokens are drafted and verified.

    ``plan`` is ``auto`` (times from this machine's profile, or else from parameter counts), a
    profile file, or ``off`` (evenly by parameters, no mode but the asked one); it decides what is
    left open, among that ``mode`` when it is ``auto``. ``exit_layer`` is where stage 0 ends.
    ``head`` is a head directory, ``auto`` (the best one found), ``lookup`` (no head: repeat earlier
    text), ``untrained`` or ``none``; ``force_head`` uses a directory's head though it was trained
    on another model. ``lookup`` mixes into a head's drafts what followed the same tokens before.
    ``gate`` lets speculation pause while it does not pay. In ``ppsd`` mode the ``rows`` most
    valuable nodes of a candidate tree go into a wave, with ``auto`` as many as the plan names and
    pay; ``heads`` on later boundaries propose others in the place of wrong ones.
    """

    mode: str = setting("auto, autoregressive, draft-then-verify or ppsd.", "auto", metavar="MODE")
    head: str = setting(
        "Exit head: a name of `ppsd heads list` or a directory, auto (the best found), lookup "
        "(repeat earlier text), untrained or none.",
        "auto",
        metavar="HEAD",
    )
    exit_layer: int | None = setting("Layer the exit head reads; the end of stage 0.", None)
    plan: str = setting(
        "What decides the rest: auto, off, or a file of `ppsd profile`.", "auto", metavar="PLAN"
    )
    block: int | None = setting(
        "Tokens that travel together (m); set by the mode.", None, expert=True
    )
    in_flight: int | None = setting(
        "Blocks in the pipeline at once (w); set by the mode.", None, expert=True
    )
    rows: int | str = setting(
        "Rows of a candidate tree in a wave: 1 drafts a chain, auto takes as many as `ppsd plan` "
        "names and leaves out those that do not pay by the measured times.",
        1,
        metavar="auto|R",
    )
    heads: str | None = setting(
        "Heads on later boundaries, which correct drafts on the way: none, or auto (all that "
        "exist for the split). If left out, auto with several rows.",
        None,
        metavar="HEADS",
    )
    acceptance: str = setting(
        "coupled (same tokens as plain decoding) or rejection.",
        "coupled",
        metavar="RULE",
        expert=True,
    )
    lookup: bool = setting("Let drafts repeat earlier text.", True, expert=True)
    gate: bool = setting("Pause speculation while it does not pay.", True, expert=True)
    force_head: bool = setting(
        "Use the head's directory though it was trained on another model; the output stays exact.",
        False,
        expert=True,
    )

    def __post_init__(self) -> None:
        self._set_texts("head", "plan")
        checks.one_of("mode", self.mode, ("auto", *MODES))
        checks.one_of("acceptance", self.acceptance, ACCEPTANCES)
        for name in ("block", "in_flight"):
            if getattr(self, name) is not None:
                self._set_integer(name, 1, MAX_IN_SCHEDULE)
        if self.rows != AUTO:
            allowed = f"auto or an integer in [1, {MAX_ROWS}]"
            self._set("rows", checks.integer("rows", self.rows, 1, MAX_ROWS, allowed))
        if self.heads is not None:
            checks.one_of("heads", self.heads, INNER_HEADS)
        self._set_truths("lookup", "gate", "force_head")
        if self.force_head and self.head in HEADS:
            raise ConfigError("force_head", self.force_head, "used with head as a directory only")

    @property
    def schedule_given(self) -> bool:
        """Return True if the user fixed m or w."""
        return self.block is not None or self.in_flight is not None


@dataclass(frozen=True)
class EngineConfig(Decoding, Placement):
    """Hold all settings of a run but the request's own: placement and decoding.

    Raises ConfigError for values that no model could make right. ``trace`` records what each
    stage does.
    """

    trace: bool = False

    def __post_init__(self) -> None:
        Placement.__post_init__(self)
        Decoding.__post_init__(self)
        self._set_truths("trace")
        self._check_schedule()
        if self.waves and self.acceptance == "rejection":
            raise ConfigError("acceptance", self.acceptance, "coupled where rows travel in waves")
        if self.concurrent > 1 and self.schedule.block > 1:
            allowed = f"1 with blocks of {self.schedule.block} tokens"
            raise ConfigError("concurrent", self.concurrent, allowed)

    @property
    def most_rows(self) -> int:
        """Return the most rows of a candidate tree that a wave may have."""
        return AUTO_ROWS if isinstance(self.rows, str) else self.rows

    @property
    def many_rows(self) -> bool:
        """Return True if several rows of a candidate tree were asked for by number."""
        return self.rows != AUTO and self.rows != 1

    @property
    def inner_heads(self) -> bool:
        """Return True if heads on later boundaries are to be used."""
        return self.heads == "auto" if self.heads is not None else self.most_rows > 1

    @property
    def waves(self) -> bool:
        """Return True if rows travel in waves: of candidate trees, or of several requests."""
        return self.concurrent > 1 or (self.stages > 1 and (self.most_rows > 1 or self.inner_heads))

    def check_use(self) -> None:
        """Raise ConfigError for what is asked for by name or number and could not be used.

        Not for what a plan has filled in: the mode may be changed later.
        """
        for used, why in (
            (self.mode in ("auto", "ppsd"), f"in mode {self.mode}, which sends no waves"),
            (self.schedule.block == 1, f"with blocks of {self.schedule.block} tokens"),
            (self.stages > 1, "with one stage, which has no exit to draft at"),
            (self.head != "none", "without a head or lookup to draft with"),
        ):
            if self.many_rows and not used:
                raise ConfigError("rows", self.rows, f"1 {why}")
            if self.heads == "auto" and not used:
                raise ConfigError("heads", self.heads, f"none {why}")

    def _check_schedule(self) -> None:
        alone = self.stages == 1
        why = "with one stage: drafting needs an exit between two stages"
        for name in ("block", "in_flight"):  # before the mode: no other one would help
            if alone and (getattr(self, name) or 1) > 1:
                raise ConfigError(name, getattr(self, name), f"1 {why}")
        if alone and self.exit_layer is not None:
            raise ConfigError("exit_layer", self.exit_layer, f"left out {why}")
        if self.schedule.drafts and alone:  # the schedule itself may not suit the mode
            raise ConfigError("mode", self.mode, f"autoregressive or ppsd {why}")
        if self.exit_layer is not None and self.split and self.exit_layer != self.split[0]:
            allowed = f"the end of stage 0, {self.split[0]} in this split"
            raise ConfigError("exit_layer", self.exit_layer, allowed)

    @property
    def schedule(self) -> Schedule:
        """Return the (m, w) of the mode; while that is open, of ``ppsd``."""
        mode = "ppsd" if self.mode == "auto" else self.mode
        return schedule_for(mode, self.stages, self.block, self.in_flight)

    def replaced(self, **changes: object) -> EngineConfig:
        """Return a checked copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]  # checked by __post_init__


def available_cores() -> list[int]:
    """Return the CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core_shares(stages: int, threads: int) -> tuple[tuple[int, ...], ...]:
    """Return the CPUs of each stage, ``threads`` of them; all empty when there are not enough.

    To be asked before anything is pinned: a pinned process has its own share left and no other.
    """
    cores = available_cores()
    if stages * threads > len(cores):
        return ((),) * stages
    return tuple(tuple(cores[r * threads : (r + 1) * threads]) for r in range(stages))


def _seconds(name: str, value: object, most: float, allowed: str) -> float:
    return checks.number(name, value, 0.0, most, low_open=True, allowed=allowed)
