"""What a model weighs, as plain integers: the part of its shape that time and memory depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppsd.model.spec import ModelSpec

# What Python and PyTorch take, measured with two stages: 395 MiB on rank 0, which also imports
# transformers, and 284 in a worker.
RUNTIME_BYTES, WORKER_BYTES = 400 << 20, 300 << 20


@dataclass(frozen=True)
class Sizes:
    """Numbers held by one decoder layer, by the tables, and cached a position and layer.

    ``inner`` counts the neurons of a layer's MLP, ``lm_head`` the final norm too. ``tied``:
    embedding and LM head are one table.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    layer: int
    cached: int
    lm_head: int
    tied: bool

    @classmethod
    def of(cls, spec: ModelSpec) -> Sizes:
        """Read a model's spec."""
        return cls(
            layers=spec.num_layers,
            hidden=spec.hidden_size,
            inner=spec.intermediate_size,
            vocabulary=spec.vocab_size,
            layer=spec.layer_parameters,
            cached=2 * spec.num_kv_heads * spec.head_dim,
            lm_head=spec.head_parameters,
            tied=spec.tie_embeddings,
        )

    def head_layers(self, layers: int, mlp: int | None = None, feedback: bool = False) -> float:
        """Return a head's weights in layers of the model; its fields are those of HeadConfig.

        Its square matrices count as well, but not what is smaller, nor its LM head rows.
        """
        neurons = self.inner if mlp is None else mlp
        layer = self.layer - 3 * self.hidden * (self.inner - neurons)
        matrices = (layers > 0) + feedback
        return (layers * layer + matrices * self.hidden**2) / self.layer

    def exit_head(self, layers: float, draft_vocab: int | None) -> int:
        """Count the numbers read for a draft over ``draft_vocab`` tokens.

        ``layers`` come from ``head_layers``.
        """
        scored = self.vocabulary if draft_vocab is None else draft_vocab
        return round(layers * self.layer) + scored * self.hidden

    def stage_bytes(
        self,
        bounds: Sequence[int],
        rank: int,
        itemsize: int,
        context: int,
        head: int = 0,
        weights: int | None = None,
    ) -> int:
        """Estimate a stage's memory in the split ``bounds`` [0, …, N]: weights, cache, runtime.

        ``context`` positions are cached; ``head`` numbers of an exit head lie on stage 0.
        ``weights`` are their bytes; those of whole ones where left out.
        """
        layers = bounds[rank + 1] - bounds[rank]
        first, last = rank == 0, rank == len(bounds) - 2
        if weights is None:
            tables = 1 if first and last and self.tied else first + last
            weights = (layers * self.layer + tables * self.vocabulary * self.hidden) * itemsize
        cache = layers * self.cached * context
        runtime = RUNTIME_BYTES if first else WORKER_BYTES
        return weights + (cache + (head if first else 0)) * itemsize + runtime
