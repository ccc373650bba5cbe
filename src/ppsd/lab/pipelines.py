"""Cost models of pipelines that are only imagined: even ones, the paper's, predicted ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppsd.errors import ConfigError
from ppsd.plan.model import CostModel, Link, StageCost
from ppsd.plan.presets import Hardware, Shape

BYTES_PER_WEIGHT = 2  # bfloat16 or float16
DRAFT_VOCABULARY = 8192  # tokens an exit head scores


def even_split(layers: int, stages: int, exit_layer: int | None = None) -> tuple[int, ...]:
    """Return the layers of each stage: the first ``exit_layer``, the others as even as can be."""
    if not 1 <= stages <= layers:
        raise ConfigError("stages", stages, f"in [1, {layers}] for {layers} layers")
    if stages == 1:
        return (layers,)
    first = layers // stages if exit_layer is None else exit_layer
    rest, others = layers - first, stages - 1
    if first < 1 or rest < others:
        raise ConfigError("exit_layer", first, f"in [1, {layers - others}] for {stages} stages")
    return (first, *(rest // others + (k >= others - rest % others) for k in range(others)))


def paper_split(layers: int, exit_layer: int) -> tuple[int, ...]:
    """Return the paper's stages: ⌈N/E⌉ of E layers, the last with what remains."""
    if not 1 <= exit_layer <= layers:
        raise ConfigError("exit_layer", exit_layer, f"in [1, {layers}]")
    full, left = divmod(layers, exit_layer)
    return (exit_layer,) * full + ((left,) if left else ())


def uniform(
    split: Sequence[int], layer: float, link: Link | None = None, **costs: Any
) -> CostModel:
    """Build a pipeline of equal layers on equal links; ``costs`` are CostModel's other fields."""
    links = (link or Link(),) * len(split) if len(split) > 1 else ()
    return CostModel(tuple(StageCost(n, layer) for n in split), links, **costs)


def predict(shape: Shape, hardware: Hardware, split: Sequence[int]) -> CostModel:
    """Predict the cost of ``split`` (layers a stage) with a norm head and a small vocabulary.

    A decoded token reads every weight once, so a layer's time is its bytes over memory bandwidth:
    the lower bound that batch-1 decoding approaches. Caches, kernel launches and activations are
    left out.
    """
    sizes = shape.sizes
    drafted = min(DRAFT_VOCABULARY, sizes.vocabulary)

    def seconds(weights: int) -> float:
        return weights * BYTES_PER_WEIGHT / hardware.memory_bandwidth

    return uniform(
        split,
        seconds(sizes.layer),
        hardware.link,
        head=seconds(drafted * sizes.hidden + sizes.hidden),
        lm_head=seconds(sizes.lm_head),
        row_bytes=sizes.hidden * BYTES_PER_WEIGHT,
        cancel=hardware.link.latency,
        source=f"prediction: {shape.name} on {hardware.name} ({hardware.source})",
    )
