"""``--head auto``: which of the heads on this machine makes a pipeline fastest.

Imported by bench/ for what layers and drafts cost.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

from ppsd.config import EngineConfig
from ppsd.errors import ConfigError
from ppsd.model.exit_head import HeadConfig
from ppsd.model.head_library import FoundHead, find_heads, suitable
from ppsd.model.spec import ModelSpec


def layer_costs(spec: ModelSpec) -> list[float]:
    """Parameters read per token by each layer, the LM head counted with the last."""
    costs = [float(spec.layer_parameters)] * spec.num_layers
    costs[-1] += spec.head_parameters
    return costs


def draft_cost(spec: ModelSpec, head: HeadConfig | None) -> float:
    """Parameters read per draft, 0 without a head."""
    if head is None:
        return 0.0
    scored = spec.vocab_size if head.draft_vocab is None else head.draft_vocab
    return float(head.layers * spec.layer_parameters + scored * spec.hidden_size)


def choose_head(config: EngineConfig, spec: ModelSpec, fingerprint: str) -> EngineConfig:
    """Replace head ``auto`` by the head of least expected token time, or by plain decoding.

    A split or exit layer that the user fixed is kept.
    """
    plain = config.replaced(head="none", mode="autoregressive", block=None, in_flight=None)
    if config.stages == 1:
        return plain if config.schedule.drafts else config.replaced(head="none")
    fixed = config.split[0] if config.split else config.exit_layer
    timed: list[tuple[float, FoundHead]] = []
    for head in suitable(find_heads(), fingerprint, fixed):
        with suppress(ConfigError):  # no split of so many stages ends stage 0 at this layer
            timed.append((_token_time(config, spec, head), head))
    if not timed:
        return plain
    best = min(timed, key=lambda pair: pair[0])[1]
    return config.replaced(head=str(best.path))


def _token_time(config: EngineConfig, spec: ModelSpec, head: FoundHead) -> float:
    """Expected time per token in parameters read: ατ + (1−α)L of the PPSD cost model.

    A draft that is accepted costs one tick, the slowest stage; a miss costs the whole pipeline.
    """
    assert head.config is not None
    costs, draft, alpha = layer_costs(spec), draft_cost(spec, head.config), head.alpha or 0.0
    if config.split is None:
        config = config.replaced(exit_layer=head.config.exit_layer)
    bounds = config.boundaries(costs, draft)
    stages = [sum(costs[a:b]) for a, b in pairwise(bounds)]
    tick = max(stages[0] + draft, *stages[1:])
    return alpha * tick + (1 - alpha) * sum(stages)
