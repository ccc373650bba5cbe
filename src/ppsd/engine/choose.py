"""``--plan``: what the user left open, split, exit head and schedule, decided by the planner.

What the user fixed is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from ppsd.config import AUTO, EngineConfig, available_cores, core_shares
from ppsd.engine.memory import default_context, shape_bytes, stage_bytes
from ppsd.engine.peer import Subject
from ppsd.engine.profiles import profile_for
from ppsd.errors import ConfigError, counted
from ppsd.model.head_files import HeadConfig, check_head, read_head_config
from ppsd.model.head_library import FoundHead, find_heads, known_rate, suitable
from ppsd.model.identity import Identity
from ppsd.model.source import describe, resolve_model
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import StagePlan
from ppsd.model.weights import TensorSource, check_shapes, open_source
from ppsd.plan.planner import (
    ASSUMED_ALPHA,
    LEAST_GAIN,
    LOOKUP_ALPHA,
    UNKNOWN,
    UNTRAINED_ALPHA,
    Exit,
    Plan,
    Problem,
    alternatives,
    check_split,
)
from ppsd.plan.profile import Profile, estimate
from ppsd.plan.sizes import Sizes
from ppsd.plan.waves import WavePlan, fastest, price
from ppsd.speculation.policy import schedule_for
from ppsd.transport.rendezvous import rank_from_environment

AUTO_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Choice:
    """A configuration with nothing left open, its bounds [0, …, N], and in a line the reason."""

    config: EngineConfig
    bounds: tuple[int, ...]
    reason: str


def on_torchrun(config: EngineConfig) -> bool:
    """Tell if torchrun started a process for each stage, maybe on other hosts."""
    size = os.environ.get("WORLD_SIZE", "1")
    meant = config.transport == "distributed" or (config.transport == "auto" and size != "1")
    return meant and "RANK" in os.environ


def serves_as(config: EngineConfig) -> int:
    """Return the rank that this process has to serve; 0 is the caller's own, with the engine."""
    if not on_torchrun(config):
        return 0
    rank, size = rank_from_environment()
    if size != config.stages:
        allowed = f"the {size} processes that torchrun started (WORLD_SIZE), one for each stage"
        raise ConfigError("stages", config.stages, allowed)
    return rank


def dtype_name(config: EngineConfig) -> str:
    """Return the dtype, with ``auto`` decided."""
    return AUTO_DTYPE if config.dtype == "auto" else config.dtype


def threads_of(config: EngineConfig) -> int:
    """Return the CPU threads of each stage: what was asked for, or an even share of the cores."""
    return config.threads_per_stage or max(1, len(available_cores()) // config.stages)


def head_layers(sizes: Sizes, head: HeadConfig) -> float:
    """Return how many of the model's layers a head's own weights amount to."""
    return sizes.head_layers(head.layers, head.mlp, head.feedback)


def head_sizes(sizes: Sizes, head: HeadConfig | None) -> int:
    """Count the numbers read for one draft, 0 without a head."""
    return 0 if head is None else sizes.exit_head(head_layers(sizes, head), head.draft_vocab)


def choose(
    config: EngineConfig, spec: ModelSpec, identity: Identity, profile: Profile | None = None
) -> Choice:
    """Decide what ``config`` leaves open, by the times of a profile or by parameter counts.

    With ``plan`` off an open mode is ``ppsd``. Raises ConfigError and HeadError for settings that
    contradict each other or the model.
    """
    profile = profile or estimate(Sizes.of(spec))
    exits = _exits(config, spec, identity, profile)
    mode = _mode(config)
    problem = _problem(config, mode, profile, exits)
    plans = alternatives(problem)
    drafting = next((plan for plan in plans if plan.exit), None)
    if config.head == "auto" and drafting is None:
        if config.many_rows:
            raise ConfigError("rows", config.rows, "1 without a head, and none was found")
        return choose(_plain(config), spec, identity, profile)
    plain = next((plan for plan in plans if not plan.exit), None)
    trees = _trees(config, problem, plans) if config.rows == AUTO else None
    if trees is not None:
        drafting = next(p for p in plans if p.exit and p.bounds[1:-1] == trees.split)
    pays = trees.speedup >= LEAST_GAIN if trees else drafting is not None and drafting.pays
    faster = drafting if pays else plain
    best = {"auto": faster, "autoregressive": plain}.get(mode, drafting)
    if config.stages == 1:
        best = plain
    if best is None:
        found = ", ".join(map(str, sorted({exit_.layer for exit_ in exits})))
        raise ConfigError("exit_layer", config.exit_layer, f"one of {found}, where heads are")
    chosen = _apply(config, mode, best, drafting or best)
    if config.rows == AUTO:
        used = trees if trees and best.exit else None
        chosen = chosen.replaced(rows=used.rows if used else 1, heads=used.heads if used else None)
    bounds = check_split(chosen.split or (), spec.num_layers)
    reason = ""
    if config.plan != "off":
        reason = _reason(chosen, best, drafting, profile.source, trees)
    return Choice(chosen, bounds, reason)


def _trees(config: EngineConfig, problem: Problem, plans: Sequence[Plan]) -> WavePlan | None:
    """Return what rows and heads ``ppsd plan`` names for as many requests, None without drafts."""
    if config.pace:  # emulated devices, where rows are free
        single = tuple(timed for timed in problem.profile.layer if timed.rows == 1)
        problem = replace(problem, profile=replace(problem.profile, layer=single))
    ways = price(problem, plans, config.concurrent, later=config.heads != "none")
    return fastest(ways) if ways else None


def _plain(config: EngineConfig) -> EngineConfig:
    """Decode plainly for want of a head; a schedule that never drafts may stay."""
    if config.stages == 1 and not config.schedule.drafts:
        return config.replaced(head="none")
    return config.replaced(head="none", mode="autoregressive", block=None, in_flight=None)


def _mode(config: EngineConfig) -> str:
    """Return the mode: ``auto`` unless a head or schedule was asked for, which is to be used."""
    if config.mode != "auto":
        return config.mode
    if config.head == "none" or config.stages == 1:
        return "ppsd" if config.schedule_given else "autoregressive"
    asked = config.schedule_given or config.many_rows
    return "auto" if config.head == "auto" and config.plan != "off" and not asked else "ppsd"


@dataclass(frozen=True)
class Outlook:
    """What a configuration is planned with.

    Times, heads, how many stages compute at the same time (None: all of them), and the bytes that
    the stages of a plan need.
    """

    profile: Profile
    exits: tuple[Exit, ...]
    at_once: int | None
    memory: Callable[[Plan], list[int]]


def outlook(config: EngineConfig) -> Outlook:
    """Return what ``config`` would be planned with; reads the model's files for that."""
    path, spec, identity, source = _model(config)
    profile = times(config, path, spec, source, identity.fingerprint)
    dtype = getattr(torch, dtype_name(config))

    def memory(plan: Plan) -> list[int]:
        held = [
            StagePlan(*pair, default_context(spec), dtype, torch.device(config.device(k)), True)
            for k, pair in enumerate(pairwise(plan.bounds))
        ]
        head = plan.exit.weights if plan.exit else 0
        return stage_bytes(spec, source, held, head, apart=config.transport != "inprocess")

    return Outlook(profile, _exits(config, spec, identity, profile), _at_once(config), memory)


def outlook_elsewhere(config: EngineConfig, predict: Callable[[ModelSpec], Profile]) -> Outlook:
    """Return what a model that is here would be planned with on machines that are not."""
    _, spec, identity, _ = _model(config)
    profile = predict(spec)
    memory = partial(shape_bytes, profile, default_context(spec))
    return Outlook(profile, _exits(config, spec, identity, profile), None, memory)


def planned(config: EngineConfig) -> EngineConfig:
    """Read the model's files and return what ``choose`` makes of ``config``."""
    path, spec, identity, source = _model(config)
    profile = times(config, path, spec, source, identity.fingerprint)
    return choose(config, spec, identity, profile).config


def _model(config: EngineConfig) -> tuple[Path, ModelSpec, Identity, TensorSource]:
    files = resolve_model(config.model)
    spec, source = describe(files), open_source(files.path)
    check_shapes(source, spec)
    return files.path, spec, Identity.of(spec, source), source


def times(
    config: EngineConfig, path: Path, spec: ModelSpec, source: TensorSource, fingerprint: str
) -> Profile:
    """Return the times that the model at ``path`` is planned with (see profiles.py)."""
    subject = subject_of(config, path, spec, source, fingerprint)
    return profile_for(config, subject, retake=not on_torchrun(config))


def subject_of(
    config: EngineConfig, path: Path, spec: ModelSpec, source: TensorSource, fingerprint: str
) -> Subject:
    """Return what a profile measures for the settings of a pipeline."""
    threads = threads_of(config)
    return Subject(
        path=path,
        spec=spec,
        source=source,
        fingerprint=fingerprint,
        dtype=getattr(torch, dtype_name(config)),
        threads=threads,
        cores=core_shares(2, threads),
    )


def trained_exits(
    heads: Sequence[FoundHead], profile: Profile, *, lookup: bool = True
) -> tuple[Exit, ...]:
    """Return heads as the planner sees them; those of unknown α only when there are no others."""
    known = [head for head in heads if head.rate is not None]
    return tuple(
        _exit(head.config, profile, str(head.path), lookup)
        for head in known or heads
        if head.config is not None
    )


def _exits(
    config: EngineConfig, spec: ModelSpec, identity: Identity, profile: Profile
) -> tuple[Exit, ...]:
    """Return the heads that could draft; one that fits anywhere stands at every layer."""
    if config.stages == 1:
        return ()
    if config.head == "auto":
        found = suitable(find_heads(), identity, None)
        return trained_exits(found, profile, lookup=config.lookup)
    if config.head == "untrained":
        draft, weights = profile.head_time(0, None), profile.sizes.exit_head(0, None)
        return _anywhere(Exit(1, UNTRAINED_ALPHA, draft, weights, "untrained", "assumed"), spec)
    if config.head == "lookup":
        return _anywhere(Exit(1, LOOKUP_ALPHA, 0.0, name="lookup", origin=UNKNOWN), spec)
    if config.head == "none":  # whoever drafts all the same brings a drafter
        free = Exit(1, 1.0, 0.0)
        return _anywhere(free, spec) if _mode(config) != "autoregressive" else ()
    head = read_head_config(Path(config.head))
    first = config.split[0] if config.split else config.exit_layer
    check_head(head, spec, identity, first or head.exit_layer, config.head, force=config.force_head)
    exit_ = _exit(head, profile, config.head, config.lookup)
    foreign = head.identity.difference(identity)
    return (replace(exit_, origin=f"{exit_.origin} on another model") if foreign else exit_,)


def inner_heads(
    config: EngineConfig, identity: Identity, bounds: Sequence[int]
) -> tuple[FoundHead | None, ...]:
    """Return the best head on each stage's boundary but the first and the last."""
    none: tuple[FoundHead | None, ...] = (None,) * (len(bounds) - 1)
    if not config.inner_heads or len(bounds) < 4:
        return none
    found = find_heads()
    best = [next(iter(suitable(found, identity, end)), None) for end in bounds[2:-1]]
    return (None, *best, None)


def _exit(head: HeadConfig, profile: Profile, name: str, lookup: bool) -> Exit:
    rate = known_rate(head, lookup=lookup)
    alpha, origin = (ASSUMED_ALPHA, "assumed") if rate is None else rate.expected
    return Exit(
        layer=head.exit_layer,
        alpha=alpha,
        draft=profile.head_time(head_layers(profile.sizes, head), head.draft_vocab),
        weights=head_sizes(profile.sizes, head),
        name=name,
        origin=origin,
    )


def _anywhere(exit_: Exit, spec: ModelSpec) -> tuple[Exit, ...]:
    layers = range(1, spec.num_layers)
    return tuple(replace(exit_, layer=n) for n in layers)


def _problem(config: EngineConfig, mode: str, profile: Profile, exits: tuple[Exit, ...]) -> Problem:
    """Return the planner's task; only schedules whose output is bitwise plain are allowed."""
    drafting = mode in ("ppsd", "draft-then-verify") and config.stages > 1
    block, in_flight = config.block, config.in_flight
    if drafting and (config.plan == "off" or mode == "draft-then-verify"):  # the mode's own numbers
        block, in_flight = config.schedule.block, config.schedule.in_flight
    wanted = config.exit_layer
    if wanted is None and config.split is None and len(exits) == 1 and config.head != "auto":
        wanted = exits[0].layer  # so that the refusal names it
    return Problem(
        profile=profile,
        workers=config.stages,
        exits=exits,
        split=config.split,
        exit_layer=wanted,
        mode=mode if drafting else None,
        block=block if drafting else None,
        in_flight=in_flight if drafting else None,
        bitwise=True,
        at_once=None if config.plan == "off" else _at_once(config),
    )


def _at_once(config: EngineConfig) -> int | None:
    """Return how many stages can compute at the same time; None: all, or nothing is known."""
    if config.transport == "inprocess":
        return 1
    if config.pace or on_torchrun(config) or any(device != "cpu" for device in config.devices):
        return None
    return max(1, len(available_cores()) // threads_of(config))


def _apply(config: EngineConfig, mode: str, best: Plan, cut: Plan) -> EngineConfig:
    """Fill in what was chosen; numbers that the mode implies anyway stay out.

    ``cut`` gives split and head: a pipeline that decodes plainly keeps room for its best head, as
    the mode may be changed later.
    """
    chosen = best.mode if mode == "auto" else mode
    changes: dict[str, object] = {"mode": chosen}
    if chosen == "ppsd" and best.schedule != schedule_for(chosen, config.stages):
        changes |= {"block": best.schedule.block, "in_flight": best.schedule.in_flight}
    if config.stages > 1:
        changes |= {"split": cut.bounds[1:-1], "exit_layer": cut.bounds[1]}
    if config.head == "auto" and cut.exit is not None:
        changes["head"] = cut.exit.name
    return config.replaced(**changes)


def _reason(
    config: EngineConfig,
    best: Plan,
    drafting: Plan | None,
    origin: str,
    trees: WavePlan | None,
) -> str:
    """Return the choice in one line, with what its prediction assumes."""
    stages = counted(config.stages, "stage")
    together = assumed_together(_at_once(config), config.stages)
    given = origin if config.stages == 1 else f"{together}; {origin}"
    if best.exit is not None:
        window = f"m={best.schedule.block}, w={best.schedule.in_flight}"
        if trees is not None:
            window = f"rows {trees.rows}, heads {trees.heads}"
        elif config.many_rows:
            window = f"rows {config.rows}; as a chain ({window})"
        what = f"exit {config.exit_layer}, {config.mode}, {window}: {prediction(best, trees)}"
        return f"plan: {stages}, {what}; {given}"
    if drafting is None or drafting.exit is None or config.mode != "autoregressive":
        return f"plan: {stages}, plain decoding; {given}"
    promise = f"exit {config.exit_layer} is {prediction(drafting, trees)}"
    return f"plan: {stages}, plain decoding as asked; {promise}; {given}"


def prediction(plan: Plan, trees: WavePlan | None = None) -> str:
    """Return what a plan with an exit promises, with ``trees`` or a chain, and at which α."""
    assert plan.exit is not None
    speedup = trees.speedup if trees else plan.speedup
    if plan.exit.origin == UNKNOWN and trees is None:
        return (
            f"predicted {plan.speedup_at(0):.2f}× plain with no draft right, "
            f"{plan.speedup_at(0.5):.2f}× with half of them: that depends on the text"
        )
    warning = "" if speedup >= LEAST_GAIN else "; speculation will not pay"
    alpha = f"{plan.exit.alpha:.2f} ({plan.exit.origin})"
    return f"predicted {speedup:.2f}× plain at α {alpha}{warning}"


def assumed_together(at_once: int | None, stages: int) -> str:
    """Say how many stages are taken to compute at the same time."""
    if at_once is None or at_once >= stages:
        return "all stages at once"
    return f"{at_once} of {stages} stages at once, for want of cores"
