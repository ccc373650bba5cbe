"""What is decided before anything is loaded: the model, its split, and how each stage is held."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ppsd import checks
from ppsd.config import AUTO, EngineConfig, core_shares
from ppsd.engine.choose import (
    choose,
    dtype_name,
    head_sizes,
    inner_heads,
    on_torchrun,
    threads_of,
    times,
)
from ppsd.engine.memory import check_free, default_context, stage_bytes
from ppsd.errors import ConfigError
from ppsd.model import kernels
from ppsd.model.draft_vocabulary import NEWEST
from ppsd.model.head_files import HeadConfig, check_head, read_head_config
from ppsd.model.head_library import FoundHead
from ppsd.model.identity import Identity
from ppsd.model.source import ModelFiles, describe
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import StagePlan
from ppsd.model.weights import TensorSource, check_shapes, open_source
from ppsd.plan.sizes import Sizes


@dataclass(frozen=True)
class Layout:
    """What was decided before loading: the model, its split, and how each stage is held.

    ``cores`` are the CPUs that each stage stays on, empty when there are not enough for all.
    ``kernels`` names what computes in each stage (Kernels of model/kernels.py).
    ``reason`` says in a line what was planned, nothing with ``plan`` off.
    """

    files: ModelFiles
    spec: ModelSpec
    identity: Identity
    bounds: tuple[int, ...]  # [0, …, N]
    head: HeadConfig | None
    dtype: torch.dtype
    max_context: int
    inner: tuple[FoundHead | None, ...]  # on later boundaries, by stage
    threads: int
    cores: tuple[tuple[int, ...], ...]
    kernels: tuple[str, ...]
    loose: int = 0  # cells of a slot for rows of branches
    costs: tuple[float, ...] = ()  # times of 1, 2, … rows over one's, to feed only rows that pay
    slots: int = 1  # requests that may be under way at once
    reason: str = ""

    @property
    def stages(self) -> int:
        """Return the number of stages."""
        return len(self.bounds) - 1

    def plan(self, rank: int, device: str) -> StagePlan:
        """Return how to hold the layers of one stage."""
        return StagePlan(
            first=self.bounds[rank],
            last=self.bounds[rank + 1],
            max_context=self.max_context,
            dtype=self.dtype,
            device=torch.device(device),
            packed=True,
            loose=self.loose,
            slots=self.slots,
        )


def plan_layout(
    config: EngineConfig, files: ModelFiles
) -> tuple[EngineConfig, Layout, TensorSource]:
    """Check the configuration against the model's files without loading weights.

    The configuration comes back with all that it left open decided (see choose.py).
    """
    _check_devices(config)
    spec = describe(files)
    source = open_source(files.path)
    check_shapes(source, spec)
    identity = Identity.of(spec, source)
    profile = times(config, files.path, spec, source, identity.fingerprint)
    choice = choose(config, spec, identity, profile)
    priced = config.rows == AUTO and not config.pace
    config, bounds = choice.config, choice.bounds
    head = _head_config(config, spec, identity)
    if head is not None and head.trained:
        check_head(head, spec, identity, bounds[1], config.head, force=config.force_head)
    threads = threads_of(config)
    layout = Layout(
        files=files,
        spec=spec,
        identity=identity,
        bounds=bounds,
        head=head,
        dtype=getattr(torch, dtype_name(config)),
        max_context=_context(config, spec),
        inner=inner_heads(config, identity, bounds),
        threads=threads,
        cores=_cores(config, threads),
        kernels=tuple(  # compiled here if need be, before there are workers
            kernels.name(dtype_name(config), config.device(rank)) for rank in range(config.stages)
        ),
        loose=config.most_rows * config.stages if config.waves else 0,
        costs=tuple(profile.growth(n + 1) for n in range(config.most_rows)) if priced else (),
        slots=config.concurrent,
        reason=choice.reason,
    )
    return config, layout, source


def _cores(config: EngineConfig, threads: int) -> tuple[tuple[int, ...], ...]:
    if on_torchrun(config):  # nothing is known of other hosts
        return ((),) * config.stages
    return core_shares(config.stages, threads)


def _check_devices(config: EngineConfig) -> None:
    """Raise ConfigError for a device that is not here; torchrun's ranks look for themselves."""
    for rank in range(1 if on_torchrun(config) else config.stages):
        try:
            torch.empty(0, device=config.device(rank))
        except (RuntimeError, AssertionError) as error:  # each backend refuses in its own way
            allowed = "devices that PyTorch finds here, such as cpu or cuda:0"
            raise ConfigError("devices", config.device(rank), allowed) from error


def _head_config(config: EngineConfig, spec: ModelSpec, identity: Identity) -> HeadConfig | None:
    if config.head in ("none", "lookup") or config.stages == 1:
        return None
    if config.head == "untrained":
        return HeadConfig("norm", 0, 0, None, spec.name, identity.fingerprint, trained=False)
    return read_head_config(Path(config.head))


def _context(config: EngineConfig, spec: ModelSpec) -> int:
    if config.max_context is None:
        return default_context(spec)
    allowed = f"an integer in [2, {spec.max_context}], what {spec.name} was made for"
    return checks.integer("max_context", config.max_context, 2, spec.max_context, allowed)


def check_memory(config: EngineConfig, layout: Layout, source: TensorSource) -> list[int]:
    """Return the bytes each process needs; raises InsufficientMemoryError when this host lacks it.

    Under torchrun that is stage 0 for certain; nothing is known of where the others are.
    """
    plans = [layout.plan(rank, config.device(rank)) for rank in range(layout.stages)]
    sizes = Sizes.of(layout.spec)
    first = _held(sizes, layout.head, plans[0])
    apart = config.transport != "inprocess"
    found = [head.config if head else None for head in layout.inner]
    inner = [_held(sizes, *pair) for pair in zip(found, plans, strict=False)]
    every = stage_bytes(layout.spec, source, plans, first, apart=apart, inner=inner)
    here = every[:1] if on_torchrun(config) else every
    what = f"{layout.spec.name} in {layout.dtype}"
    check_free(here, what, layout.max_context, config.concurrent)
    return every


def _held(sizes: Sizes, head: HeadConfig | None, plan: StagePlan) -> int:
    """Return the numbers held by a head: weights, cache, and LM head rows for its prompts' tokens.

    No prompt has more of these than positions that are scored.
    """
    if head is None:
        return 0
    cached = plan.slots * (plan.max_context + plan.loose) * head.layers * sizes.cached
    scored = 0 if head.draft_vocab is None else min(NEWEST, plan.max_context)
    return head_sizes(sizes, head) + cached + plan.slots * scored * sizes.hidden


def head_seconds(pace: float, layout: Layout, rank: int, head: HeadConfig | None) -> float:
    """Return what a head takes where its stage of an emulated device takes ``pace`` seconds.

    As many layer times as it has layers' parameters; 0 in real time.
    """
    sizes = Sizes.of(layout.spec)
    layers = layout.bounds[rank + 1] - layout.bounds[rank]
    return pace / layers * head_sizes(sizes, head) / sizes.layer
