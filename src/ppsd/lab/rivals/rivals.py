"""Rivals by name, on a running pipeline or in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppsd.config import EngineConfig
from ppsd.engine.build import RunningPipeline
from ppsd.engine.choose import head_sizes, on_torchrun
from ppsd.engine.llm import LLM
from ppsd.errors import ConfigError
from ppsd.lab.emulated import EmulatedPipeline
from ppsd.lab.rivals.chain import Chain, LocalChain, ProcessChain
from ppsd.lab.rivals.decoders import (
    Decoded,
    Drafting,
    Dynamic,
    Ends,
    Fixed,
    Skipping,
    Took,
    begin,
    decode,
)
from ppsd.lab.rivals.exits import UNTRAINED
from ppsd.lab.rivals.skips import find_skips
from ppsd.lab.rivals.stage import RivalStage
from ppsd.lab.rivals.timers import RealTimer, VirtualTimer
from ppsd.model.head_files import HeadConfig, weights_digest
from ppsd.model.head_library import find_heads, suitable
from ppsd.model.identity import Identity
from ppsd.model.spec import ModelSpec
from ppsd.model.weights import open_source
from ppsd.plan.sizes import Sizes
from ppsd.types import SamplingParams

DEL, DEL_HEADS, KNN_SSD = "del", "del-heads", "knn-ssd"
NAMES = (DEL, DEL_HEADS, KNN_SSD)
FIXED = "draft-then-verify γ="

Heads = Mapping[int, tuple[str, HeadConfig]]  # by exit, the best first


class RivalPipeline(RunningPipeline):
    """A pipeline whose worker processes do rivals' jobs, too."""

    program = "ppsd.lab.rivals.worker"


def heads_for(identity: Identity) -> Heads:
    """Return the best trained head at every exit of a model that has one."""
    found: dict[int, tuple[str, HeadConfig]] = {}
    for head in suitable(find_heads(), identity, None):
        assert head.config is not None
        found.setdefault(head.config.exit_layer, (str(head.path), head.config))
    return found


def drafting_of(
    name: str, spec: ModelSpec, identity: Identity, heads: Heads, *, lookup: bool
) -> Drafting:
    """Return a rival's way to draft, its heads mixed with prompt ``lookup`` or not."""
    layers, sizes = spec.num_layers, Sizes.of(spec)
    if name == DEL:  # exits cost their layers, as published
        return Dynamic({e: float(e) for e in range(1, layers)}, layers, {}, lookup=False)
    if name == KNN_SSD:
        return Skipping(layers, find_skips(identity.fingerprint))
    if not heads:
        raise ConfigError("variants", name, "one that needs no trained head: the model has none")
    paths = {e: path for e, (path, _) in heads.items()}
    if name == DEL_HEADS:
        costs = {
            e: e + head_sizes(sizes, head) / sizes.layer for e, (_, head) in sorted(heads.items())
        }
        return Dynamic(costs, layers + sizes.lm_head / sizes.layer, paths, lookup=lookup)
    best = next(iter(paths))
    return Fixed(best, paths[best], int(name.removeprefix(FIXED)), lookup=lookup)


def used_by(names: Sequence[str], identity: Identity) -> dict[str, Any]:
    """Return what rivals of these names use besides the model and the pipeline's own heads.

    Digests of the heads that they find, and of the skip sets, with the budget of their search.
    """
    used: dict[str, Any] = {}
    if any(name == DEL_HEADS or name.startswith(FIXED) for name in names):
        found = sorted(heads_for(identity).items())
        used["rival_heads"] = {exit_: weights_digest(Path(path)) for exit_, (path, _) in found}
    if KNN_SSD in names:
        sets = find_skips(identity.fingerprint)
        used[KNN_SSD] = {} if sets is None else {**sets.budget, "sha256": sets.digest}
    return used


class Rivals:
    """Rivals on the stages of ``llm``, between the requests of its engine."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        if on_torchrun(llm.config):
            raise ConfigError("variants", "rivals", "used on one host: other hosts know none")
        self._chain: Chain = llm.on_pipeline(lambda running: _chain(running, llm.config))
        self._heads = dict(heads_for(llm.layout.identity))
        if (own := llm.layout.head) is not None:
            exit_layer = llm.layout.bounds[1]
            path = llm.config.head if own.trained else UNTRAINED
            self._heads = {exit_layer: (path, own)} | self._heads
            self._heads[exit_layer] = (path, own)

    def run(
        self,
        name: str,
        ids: Sequence[int],
        params: SamplingParams,
        took: Took = lambda tokens: None,
    ) -> Decoded:
        """Complete token ids in a rival's way; ``took`` hears of tokens as they become final."""
        layout = self._llm.layout
        given = name, layout.spec, layout.identity, self._heads
        drafting = drafting_of(*given, lookup=self._llm.config.lookup)
        ends = ends_of(layout.spec, params, layout.max_context - len(ids))

        def complete(running: RunningPipeline) -> Decoded:
            before = self._chain.now()
            text = begin(self._chain, drafting, ids, self._llm.config.prefill_chunk)
            first = self._chain.now() - before
            return replace(decode(self._chain, drafting, text, ends, took), first_seconds=first)

        found: Decoded = self._llm.on_pipeline(complete)
        return found


def ends_of(spec: ModelSpec, params: SamplingParams, room: int) -> Ends:
    """Return when a request ends that has room for so many tokens; raises ConfigError."""
    if not params.greedy:
        raise ConfigError("temperature", params.temperature, "0: rivals decode greedily")
    eos = () if params.ignore_eos else spec.eos_ids
    return Ends(min(params.max_tokens, room), frozenset((*eos, *params.stop_token_ids)))


def _chain(running: RunningPipeline, config: EngineConfig) -> Chain:
    """Return the stages of a running pipeline as rivals use them."""
    layout, virtual = running.layout, isinstance(running, EmulatedPipeline)
    source = open_source(layout.files.path)
    stages = [
        RivalStage(
            model,
            source,
            layout.identity,
            VirtualTimer() if virtual else RealTimer(),
            config.pace_of(rank),
        )
        for rank, model in enumerate(running.models)
    ]
    if len(stages) == layout.stages:
        return LocalChain(stages, virtual=virtual)
    return ProcessChain(stages[0], running, config.timeout)
