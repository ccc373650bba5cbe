"""``ppsd plan``: where to cut, where to exit, which schedule, and what that will bring."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table

from ppsd import checks
from ppsd.cli.flags import flag, integers, numbers, pairs
from ppsd.cli.streams import visible
from ppsd.config import DEFAULT_CONTEXT, DEFAULT_STAGES, MAX_CONCURRENT, EngineConfig
from ppsd.errors import ConfigError

if TYPE_CHECKING:
    from ppsd.engine.choose import Outlook
    from ppsd.plan.planner import Exit, Plan, Problem
    from ppsd.plan.profile import Profile
    from ppsd.plan.sizes import Sizes
    from ppsd.plan.waves import WavePlan

PIPE_WIDTH = 160
IMAGINED_LAYERS, IMAGINED_VOCABULARY = 1, 8192  # of a head that --alpha speaks of

_model = functools.partial(flag, panel="Model and workers")
_decided = functools.partial(flag, panel="What is decided already")
_output = functools.partial(flag, panel="Output")


@dataclass
class WorkerOptions:
    """The model, and what it would run on."""

    model: Annotated[
        str | None,
        _model("Directory, .gguf file or hub id, or a named shape with --hardware.", "-m",
               "--model", envvar="PPSD_MODEL", show_envvar=False),
    ] = None  # fmt: skip
    workers: Annotated[
        int | None, _model("Number of workers; each is a stage. 2, or as --split says.")
    ] = None
    profile: Annotated[
        Path | None, _model("A file of `ppsd profile`; this machine's if left out.")
    ] = None
    hardware: Annotated[
        str | None, _model("Predict for h100-nvlink, pcie-consumer, 10gbe or wan.")
    ] = None
    worker_speed: Annotated[
        str | None, _model("Relative speeds in pipeline order, such as 1,0.5.", metavar="X,…")
    ] = None
    link_ms: Annotated[
        str | None,
        _model("Hop latency: one, or one a worker, the last back to the first.", metavar="MS,…"),
    ] = None
    context: Annotated[int, _model("Positions already cached.")] = 256
    load: Annotated[int, _model("Requests under way at once.", min=1, max=MAX_CONCURRENT)] = 1
    dtype: Annotated[str, _model("As in generate.", metavar="DTYPE")] = "auto"
    threads_per_stage: Annotated[int, _model("As in generate.")] = 0


@dataclass
class DecidedOptions:
    """What the planner has to keep."""

    alpha: Annotated[
        str | None,
        _decided("Plan for heads of these exits and rates instead of those found.",
                 metavar="EXIT:α,…"),
    ] = None  # fmt: skip
    split: Annotated[str | None, _decided("Layers at which later stages begin.", metavar="L,…")] = (
        None
    )
    exit_layer: Annotated[int | None, _decided("Layer the exit head reads.")] = None
    mode: Annotated[str | None, _decided("One mode only.", metavar="MODE")] = None
    block: Annotated[int | None, _decided("Tokens that travel together (m).")] = None
    in_flight: Annotated[int | None, _decided("Blocks in the pipeline at once (w).")] = None


@dataclass
class PlanOutput:
    """What is shown."""

    top: Annotated[
        int, _output("Number of alternatives to show, beside the best bitwise equal one.", min=1)
    ] = 8
    every_split: Annotated[
        bool, _output("List every split, not only the best of each exit.", "--every-split")
    ] = False
    as_json: Annotated[bool, _output("Print one JSON object.", "--json")] = False


def plan(workers: WorkerOptions, decided: DecidedOptions, output: PlanOutput) -> None:
    """Find split, exit, mode and window for some workers, and predict what they bring."""
    from ppsd.plan.planner import alternatives
    from ppsd.plan.waves import price

    split = None if decided.split is None else integers("split", decided.split)
    stages = DEFAULT_STAGES if split is None else len(split) + 1
    stages = stages if workers.workers is None else workers.workers
    try:
        subject = _outlook(workers, decided, stages)
        problem = _problem(workers, decided, subject, stages, split)
    except ConfigError as error:
        if error.field != "stages":
            raise
        raise ConfigError("workers", error.value, error.allowed) from None  # its name here
    found = alternatives(problem, every_split=output.every_split)
    if not found:
        raise ConfigError("mode", decided.mode, "one that the heads and the split allow")
    verdict, waves = _verdict(found, problem), price(problem, found, workers.load)
    if output.as_json:
        rows = [_record(plan, subject.memory(plan)) for plan in found]
        about = {"source": problem.profile.source, "assumed": _assumed(problem)}
        trees = [asdict(plan) for plan in waves]
        print(json.dumps(about | {"verdict": verdict, "plans": rows, "waves": trees}))
    else:
        text = " ".join(filter(None, (verdict, _waves_text(waves, workers.load))))
        exact = _exact(found)  # what is chosen unless another is asked for
        shown = [each for i, each in enumerate(found) if i < output.top or each is exact]
        _show(shown, problem, subject.memory, text)


def _outlook(workers: WorkerOptions, decided: DecidedOptions, stages: int) -> Outlook:
    """Return what to plan with: heads are those of --alpha, or those found for the model.

    On this machine as many workers compute at once as it has cores for, elsewhere all of them. A
    profile without a model may be of any model, such as one measured on another machine.
    """
    from ppsd.engine.choose import outlook
    from ppsd.plan.profile import load_profile

    config = EngineConfig(
        workers.model,
        stages=stages,
        dtype=workers.dtype,
        threads_per_stage=workers.threads_per_stage,
        plan="auto" if workers.profile is None else str(workers.profile),
    )
    if workers.hardware is not None:
        found = _predicted(workers, config, workers.hardware)
    elif workers.profile is not None and workers.model is None and decided.alpha is not None:
        for name in ("dtype", "threads_per_stage"):  # the profile was taken with its own
            if (value := getattr(workers, name)) != getattr(WorkerOptions, name):
                raise ConfigError(name, value, "left out with --profile and --alpha but no --model")
        found = _of_shape(load_profile(workers.profile))  # of whatever model it says, here or not
    else:
        found = outlook(config)
    if decided.alpha is not None:
        found = replace(found, exits=_imagined(decided.alpha, found.profile))
    if workers.worker_speed is not None or workers.link_ms is not None:
        found = replace(found, at_once=None)
    return found


def _of_shape(profile: Profile, context: int = DEFAULT_CONTEXT) -> Outlook:
    """Return what to plan with where only the model's shape is known."""
    from ppsd.engine.choose import Outlook
    from ppsd.engine.memory import shape_bytes

    memory = functools.partial(shape_bytes, profile, min(context, DEFAULT_CONTEXT))
    return Outlook(profile, (), None, memory)


def _predicted(workers: WorkerOptions, config: EngineConfig, name: str) -> Outlook:
    """Return what to plan with on named hardware; a model that is here brings its heads."""
    import torch

    from ppsd.engine.choose import dtype_name, outlook_elsewhere
    from ppsd.plan.presets import find_hardware, known_shape
    from ppsd.plan.profile import estimate
    from ppsd.plan.sizes import Sizes

    if workers.profile is not None:
        raise ConfigError("profile", str(workers.profile), "left out with --hardware")
    if workers.threads_per_stage:
        allowed = "left out with --hardware"
        raise ConfigError("threads_per_stage", workers.threads_per_stage, allowed)
    hardware, dtype = find_hardware(name), dtype_name(config)

    def predict(model: str, sizes: Sizes) -> Profile:
        itemsize = getattr(torch, dtype).itemsize
        source = f"prediction: {model} on {hardware.name}"
        speed, link = hardware.memory_bandwidth, hardware.link
        return estimate(sizes, itemsize, speed, link, model=model, dtype=dtype, source=source)

    if shape := known_shape(config.model):
        return _of_shape(predict(shape.name, shape.sizes), shape.context or DEFAULT_CONTEXT)
    return outlook_elsewhere(config, lambda spec: predict(spec.name, Sizes.of(spec)))


def _imagined(text: str, profile: Profile) -> tuple[Exit, ...]:
    """Read ``8:0.5,15:0.6``: transformer heads of one layer with a draft vocabulary."""
    from ppsd.plan.planner import Exit

    scored = min(IMAGINED_VOCABULARY, profile.sizes.vocabulary)
    depth = profile.sizes.head_layers(IMAGINED_LAYERS, feedback=True)
    draft = profile.head_time(depth, scored)
    weights = profile.sizes.exit_head(depth, scored)
    rates = pairs("alpha", text, "exit:rate")
    for layer in rates:
        if not 0 < layer < profile.sizes.layers:
            raise ConfigError("alpha", text, f"for exits in [1, {profile.sizes.layers - 1}]")
    return tuple(Exit(layer, alpha, draft, weights) for layer, alpha in rates.items())


def _problem(
    workers: WorkerOptions,
    decided: DecidedOptions,
    subject: Outlook,
    stages: int,
    split: tuple[int, ...] | None,
) -> Problem:
    from ppsd.plan.planner import Problem
    from ppsd.speculation.policy import MODES, schedule_for

    if decided.mode is not None:
        checks.one_of("mode", decided.mode, MODES)
    schedule_for(decided.mode or "ppsd", stages, decided.block, decided.in_flight)
    if workers.context < 0:
        raise ConfigError("context", workers.context, "at least 0")
    return Problem(
        profile=subject.profile,
        workers=stages,
        exits=subject.exits,
        speeds=numbers("worker_speed", workers.worker_speed or ""),
        links=_links(workers.link_ms, stages, subject.profile),
        context=workers.context,
        split=split,
        exit_layer=decided.exit_layer,
        mode=decided.mode,
        block=decided.block,
        in_flight=decided.in_flight,
        at_once=subject.at_once,
    )


def _links(given: str | None, stages: int, profile: Profile) -> tuple[Any, ...]:
    from ppsd.plan.model import Link

    hops = numbers("link_ms", given or "")
    for ms in hops:
        checks.number("link_ms", ms, 0)
    hops = hops * stages if len(hops) == 1 else hops
    return tuple(Link(ms / 1e3, profile.bandwidth) for ms in hops)


def _verdict(plans: Sequence[Plan], problem: Problem) -> str:
    """Return a sentence that says if speculation pays."""
    drafting = next((plan for plan in plans if plan.exit), None)
    if drafting is None:
        return _undrafted(problem)
    if not drafting.pays:
        return f"Speculation will not pay: the best is {drafting.speedup:.2f} times plain decoding."
    exact = _exact(plans)
    fastest = f"{_words(drafting)}, {drafting.speedup:.2f} times"
    if exact is None:
        return f"Best: {fastest} plain decoding, equal up to rounding."
    text = f"Best: {_words(exact)}, {exact.speedup:.2f} times plain decoding, bit for bit the same."
    if not exact.pays:
        text = f"Speculation with bitwise equal output will not pay ({exact.speedup:.2f} times)."
    return text if drafting.bitwise else f"{text} Faster, equal up to rounding: {fastest}."


def _exact(plans: Sequence[Plan]) -> Plan | None:
    """Return the best plan with drafts whose output is bitwise that of plain decoding."""
    return next((plan for plan in plans if plan.exit and plan.bitwise), None)


def _undrafted(problem: Problem) -> str:
    """Return a sentence that says why no plan drafts."""
    if problem.workers == 1:
        return "One worker, no speculation: drafting needs an exit inside the model."
    if problem.mode == "autoregressive" or (problem.block, problem.in_flight) == (1, 1):
        return "No speculation: plain decoding was asked for."
    if not problem.exits:
        return (
            "No head, no speculation: train one with ppsd distill, or give --alpha EXIT:α,… to "
            "see what one would bring."
        )
    exits = sorted({exit_.layer for exit_ in problem.exits})
    decided = problem.split[0] if problem.split else problem.exit_layer
    latest = problem.profile.sizes.layers - problem.workers + 1
    end = f"at layer {decided}" if decided else f"at a layer in [1, {latest}]"
    return f"No head suits, no speculation: stage 0 ends {end}, and heads are for exits in {exits}."


def _waves_text(plans: Sequence[WavePlan], load: int) -> str:
    if not plans:
        return ""
    from ppsd.plan.planner import LEAST_GAIN
    from ppsd.plan.waves import fastest

    best = fastest(plans)
    about = f" for {load} requests at once (--concurrent {load})" if load > 1 else ""
    way = f"--split {','.join(map(str, best.split))} --rows {best.rows}"
    way += " --heads auto" if best.heads == "auto" else ""
    each = ", ".join(f"{plan.speedup:.2f} with {plan.rows}" for plan in plans)
    if best.speedup < LEAST_GAIN:
        return f"Candidate trees{about} will not pay: {each} rows."
    return f"Candidate trees{about}: {way}, {best.speedup:.2f} times plain decoding ({each} rows)."


def _words(plan: Plan) -> str:
    split = ",".join(map(str, plan.bounds[1:-1]))
    return (
        f"--split {split} --mode {plan.mode} (m={plan.schedule.block}, w={plan.schedule.in_flight})"
    )


def _record(plan: Plan, memory: Sequence[int]) -> dict[str, Any]:
    """Return a plan in plain numbers; memory with a full cache of the default context."""
    return {
        "mode": plan.mode,
        "block": plan.schedule.block,
        "in_flight": plan.schedule.in_flight,
        "split": list(plan.bounds[1:-1]),
        "exit_layer": plan.exit.layer if plan.exit else None,
        "alpha": plan.exit.alpha if plan.exit else None,
        "alpha_origin": plan.exit.origin if plan.exit else None,
        "head": plan.exit.name if plan.exit else None,
        "tokens_per_second": 1 / plan.token_time,
        "ms_per_token": plan.token_time * 1e3,
        "speedup": plan.speedup,
        "bound": plan.speedup_at(1.0),
        "bottleneck": plan.bottleneck,
        "stage_ms": [time * 1e3 for time in plan.stage_times],
        "memory_bytes": list(memory),
        "bitwise": plan.bitwise,
    }


def _assumed(problem: Problem) -> str:
    from ppsd.engine.choose import assumed_together

    together = assumed_together(problem.at_once, problem.workers)
    return f"{together}, {problem.context} positions cached"


def _show(
    plans: Sequence[Plan], problem: Problem, memory: Callable[[Plan], list[int]], verdict: str
) -> None:
    profile = problem.profile
    titles = ("mode", "m", "w", "split", "α", "tokens/s", "speedup", "at α=1", "slowest stage")
    table = Table(*titles, "GiB a worker", "output is plain's", box=None)
    for plan in plans:
        table.add_row(
            plan.mode,
            str(plan.schedule.block),
            str(plan.schedule.in_flight),
            ",".join(map(str, plan.bounds[1:-1])) or "–",
            "–" if plan.exit is None else f"{plan.exit.alpha:.2f} {plan.exit.origin}",
            f"{1 / plan.token_time:.1f}" if _absolute(profile) else "–",
            f"{plan.speedup:.2f}×",
            f"{plan.speedup_at(1.0):.2f}×",
            f"{plan.bottleneck} ({plan.stage_times[plan.bottleneck] * 1e3:.2f} ms)"
            if _absolute(profile)
            else str(plan.bottleneck),
            " ".join(f"{size / 2**30:.2f}" for size in memory(plan)),
            "bit for bit" if plan.bitwise else "up to rounding",
        )
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)
    console.print(table)
    console.print(verdict, style="bold")
    source = visible(profile.source)
    console.print(f"Predicted, not measured; times: {source}; {_assumed(problem)}")


def _absolute(profile: Profile) -> bool:
    """Return True if its seconds are seconds; parameter counts are good for ratios only."""
    from ppsd.plan.profile import COUNTS

    return not profile.source.startswith(COUNTS)
