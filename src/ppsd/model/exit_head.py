"""Exit heads: small modules that read an early hidden state and guess the next token.

Their files are in head_files.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ppsd.errors import HeadError, NonFiniteError, cause_of
from ppsd.model import kernels
from ppsd.model.draft_vocabulary import DraftVocabulary, Rows
from ppsd.model.head_codes import decode
from ppsd.model.head_files import (
    WEIGHTS_FILE,
    HeadConfig,
    check_head,
    check_regular,
    read_head_config,
)
from ppsd.model.identity import Identity
from ppsd.model.kernels import Weight
from ppsd.model.layers import LayerWeights, Norm, Product, Rope
from ppsd.model.names import FINAL_NORM, layer_prefix, lm_head_name
from ppsd.model.packed import pack
from ppsd.model.passes import Place
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import StagePlan, fuse_layer, new_cache, new_runner, packable
from ppsd.model.weights import TensorSource
from ppsd.speculation.lookup import LENGTHS, ODDS, Array, Match, likeliest

BLOCK = 64  # columns, the largest of which says whether to look at the others

Shape = Callable[[HeadConfig, int], tuple[int, ...] | None]  # for a hidden size; None: no tensor


def _in_file(name: str, shape: Shape) -> dict[str, Any]:
    return {"name": name, "shape": shape}


NORM = _in_file("norm.weight", lambda head, width: (width,))
DRAFT_IDS = _in_file("draft_ids", lambda head, _: (head.draft_vocab,) if head.draft_vocab else None)
INPUT = _in_file("input.weight", lambda head, width: (width, width) if head.layers else None)
FEEDBACK_NORM = _in_file("feedback_norm.weight", lambda head, w: (w,) if head.feedback else None)
FEEDBACK = _in_file("feedback.weight", lambda head, w: (w, w) if head.feedback else None)
COPY = _in_file("copy.weight", lambda head, w: (len(LENGTHS), w) if head.copy_gate else None)
COPY_BIAS = _in_file("copy.bias", lambda head, _: (len(LENGTHS),) if head.copy_gate else None)


@dataclass(frozen=True)
class HeadTensors:
    """The tensors of a head beside its decoder layers, None for those that it does without."""

    norm: torch.Tensor = field(metadata=NORM)
    draft_ids: torch.Tensor | None = field(default=None, metadata=DRAFT_IDS)  # int64, ascending
    input: torch.Tensor | None = field(default=None, metadata=INPUT)
    feedback_norm: torch.Tensor | None = field(default=None, metadata=FEEDBACK_NORM)
    feedback: torch.Tensor | None = field(default=None, metadata=FEEDBACK)
    copy_weight: torch.Tensor | None = field(default=None, metadata=COPY)
    copy_bias: torch.Tensor | None = field(default=None, metadata=COPY_BIAS)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> HeadTensors:
        """Pick the tensors out of a file's."""
        held: dict[str, Any] = {f.name: weights.get(f.metadata["name"]) for f in fields(cls)}
        return cls(**held)

    def named(self) -> dict[str, torch.Tensor]:
        """Return the tensors that there are by their names in a file."""
        held = {f.metadata["name"]: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


class ExitHead:
    """Hidden rows after layer E to draft logits, over a cache like a stage's.

    ``norm``: own norm, then LM head rows. ``transformer``: before that a matrix that brings rows
    of layer E near those of the last layer, and decoder layers with their own key/value cache.
    With ``feedback`` the last layer's newest verified row is added, through a norm and a matrix of
    its own: it saw all of the model, if not the newest tokens. It comes behind the layers, so
    keys and values do not depend on when a verdict came. With a draft vocabulary only
    ``draft_ids`` (ascending) are scored, and the tokens of the prompt that the slot's request
    began with. With a copy gate the head was trained as one half of a mixture with prompt lookup
    (speculation/lookup.py), and says how much weight the other half gets (See et al. 2017, "Get To
    The Point", where the copy is made by attention).
    """

    def __init__(
        self,
        config: HeadConfig,
        spec: ModelSpec,
        plan: StagePlan,
        weights: dict[str, torch.Tensor],
        lm_head: Weight,
        rows: Rows | None = None,
    ) -> None:
        self.config = config
        self.spec = head_spec(config, spec)
        weights = {
            name: t.to(plan.device) if name == "draft_ids" else t.to(plan.device, plan.dtype)
            for name, t in weights.items()
        }
        self.tensors = held = HeadTensors.of(weights)
        self._normed = Norm(held.norm, spec.rms_norm_eps)
        ids = torch.arange(spec.vocab_size) if held.draft_ids is None else held.draft_ids
        self.lm_head = lm_head  # [draft vocabulary or V, C]
        self._vocabulary = DraftVocabulary(ids, lm_head, rows, plan.device)
        self._enter = _product(held.input)
        self._recall = _product(held.feedback, None, held.feedback_norm, spec.rms_norm_eps)
        self._odds = _product(held.copy_weight, held.copy_bias)
        self.layers: list[LayerWeights] = [
            fuse_layer(weights, layer_prefix(i)) for i in range(config.layers)
        ]
        self.rope = Rope(spec, plan.max_context, plan.dtype, plan.device)
        self.cache = new_cache(self.spec, len(self.layers), plan)
        self._runner = new_runner(self.layers, self.spec, self.rope, self.cache)

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Score the tokens ``prompt`` (``prompt_ids`` of one) in a slot from now on."""
        self._vocabulary.begin(slot, prompt)

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return rows [n, C] after layer E as the head's layers want them."""
        return hidden if self._enter is None else self._enter(hidden)

    def forward(self, hidden: torch.Tensor, position: int, slot: int = 0) -> torch.Tensor:
        """Run rows [n, C] after layer E at ``position`` to the head's own rows [n, C]."""
        started = self._runner.start(self.enter(hidden), position, slot)
        started.advance()
        return started.hidden

    def forward_rows(self, hidden: torch.Tensor, places: Sequence[Place]) -> torch.Tensor:
        """Run rows [n, C] of candidate trees like ``forward``; each as if it came alone."""
        entered = hidden if self._enter is None else self._enter.by_rows(hidden)
        started = self._runner.start_rows(entered, places)
        started.advance()
        return started.hidden

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        """Declare the first ``length`` rows of a slot verified; see KVCache."""
        self.cache.commit(slot, length, moves)

    def share(self, source: int, slot: int, length: int) -> None:
        """Copy the first ``length`` rows of a slot to another; see KVCache."""
        self.cache.share(source, slot, length)

    def finish(self, features: torch.Tensor, verified: torch.Tensor | None = None) -> torch.Tensor:
        """Add feedback to ``forward``'s rows [n, C] and norm them, to be scored.

        ``verified`` [n, C]: the last layer's row of each row's newest verified position, or None.
        """
        if self._recall is not None and verified is not None:
            features = features + self._recall(verified.to(features.device))
        return self._normed(features)

    def copy_odds(self, finished: torch.Tensor) -> torch.Tensor:
        """Return the ``odds`` [n, LENGTHS] of ``lookup.mixed`` for each finished row."""
        return ODDS.expand(len(finished), -1) if self._odds is None else self._odds(finished)

    def scores(self, finished: torch.Tensor, slot: int) -> torch.Tensor:
        """Return the draft logits of finished rows of a slot, for what is scored there alone."""
        return self._vocabulary.scores(finished, slot)

    def logits(self, finished: torch.Tensor, slot: int) -> torch.Tensor:
        """Return the draft logits [n, V] of finished rows; -inf for what is not scored."""
        return self.spread(self.scores(finished, slot), slot)

    def drafts_below(self, size: int, slot: int) -> bool:
        """Return True if only tokens below ``size`` are scored."""
        return bool(self._vocabulary.ids(slot)[-1] < size)

    def likeliest(
        self, scores: torch.Tensor, match: Match | None, odds: torch.Tensor, slot: int
    ) -> int:
        """Return the token with the largest ``mixed`` logit, for one row of ``scores``.

        Raises NonFiniteError like ``lookup.likeliest``.
        """
        ids = self._vocabulary.ids(slot)
        if match is None and (found := kernels.largest(scores, len(ids))) is not None:
            return int(ids[found[0]])
        values = scores[0].to("cpu", torch.promote_types(scores.dtype, torch.float32)).numpy()
        return likeliest(values, ids, match, odds)

    def opinions(
        self,
        finished: torch.Tensor,
        k: int,
        slots: Sequence[int],
        perturb: Callable[[torch.Tensor, Sequence[Array]], torch.Tensor] = lambda scores, _: scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ``k`` most probable tokens of finished rows [n, C] of ``slots`` [n].

        There are fewer only if the draft vocabulary has fewer. Their ids, int64 [n, k], are by
        falling probability; of equals those of the draft vocabulary come first, and of these the
        lower ids. Then come their probabilities, float32 [n, k], under a softmax over all that is
        scored. Both are on the CPU, and do not depend on other rows. ``perturb`` changes the scores
        before, given the tokens of each row. Raises NonFiniteError like ``likeliest``.
        """
        scores, ids = self._vocabulary.scores_of(finished, slots)
        most = self.config.draft_vocab or self.spec.vocab_size
        columns, probabilities = most_probable(perturb(scores, ids), min(k, most))
        chosen = [own[row] for own, row in zip(ids, columns.cpu().numpy(), strict=True)]
        return torch.from_numpy(np.stack(chosen)), probabilities.cpu()

    def spread(self, scores: torch.Tensor, slot: int) -> torch.Tensor:
        """Spread the ``scores`` of a slot over the whole vocabulary; -inf for what has none."""
        if self.tensors.draft_ids is None:
            return scores
        return self._vocabulary.spread(scores, slot, self.spec.vocab_size)


def most_probable(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first ``k`` columns of each row of ``scores`` [n, V] by softmax, and the softmax.

    Of equals the lower column is first. Raises NonFiniteError.
    """
    probabilities = scores.float().softmax(1)
    rows, size = probabilities.shape
    if math.isnan(probabilities[:, 0].sum()):  # if one score of a row is NaN, all of it are
        raise NonFiniteError("draft logits must have a finite maximum")
    if size % BLOCK:
        probabilities = F.pad(probabilities, (0, -size % BLOCK), value=-1.0)
    blocks = probabilities.view(rows, -1, BLOCK)
    count = min(k, blocks.shape[1])  # no other blocks can hold the first k columns
    chosen = _first(blocks.amax(2), torch.arange(blocks.shape[1], device=scores.device), count)
    columns = (chosen[..., None] * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    among = blocks[torch.arange(rows, device=scores.device)[:, None], chosen].flatten(1)
    first = _first(among, columns, min(k, size))
    return columns.gather(1, first), among.gather(1, first)


def _first(values: torch.Tensor, places: torch.Tensor, k: int) -> torch.Tensor:
    """Return where the ``k`` largest float32 ``values`` [n, m] are, equals by rising place."""
    bits = values.contiguous().view(torch.int32).long()  # in the order of floats that are not < 0
    return ((bits << 32) - places).topk(k, 1).indices


def _product(weight: torch.Tensor | None, *rest: Any) -> Product | None:
    return None if weight is None else Product(weight, *rest)


def head_spec(config: HeadConfig, spec: ModelSpec) -> ModelSpec:
    """Return the sizes of a head's decoder layers: the model's, but for its own MLP."""
    return spec if config.mlp is None else replace(spec, intermediate_size=config.mlp)


def head_tensor_shapes(config: HeadConfig, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in ``head.safetensors``."""
    about = [tensor.metadata for tensor in fields(HeadTensors)]
    every = {tensor["name"]: tensor["shape"](config, spec.hidden_size) for tensor in about}
    shapes: dict[str, tuple[int, ...]] = {n: shape for n, shape in every.items() if shape}
    layer = head_spec(config, spec).layer_shapes()
    for i in range(config.layers):
        shapes |= {layer_prefix(i) + name: shape for name, shape in layer.items()}
    return shapes


def load_head(
    directory: Path,
    spec: ModelSpec,
    plan: StagePlan,
    source: TensorSource,
    identity: Identity,
    embedding: torch.Tensor | None = None,
    *,
    force: bool = False,
) -> ExitHead:
    """Load a head for the stage of ``plan`` (its last layer is the exit layer).

    ``embedding`` [V, C], when given for a tied model, serves as LM head without a second copy.
    Raises HeadError when the head is damaged or belongs to another exit layer or, without
    ``force``, model.
    """
    config = read_head_config(directory)
    check_head(config, spec, identity, plan.last, str(directory), force=force)
    weights = read_weights(directory, config, spec)
    lm_head = lm_head_rows(spec, source, plan, weights.get("draft_ids"), embedding)
    rows = None if config.draft_vocab is None else further_rows(spec, source, plan, embedding)
    return ExitHead(config, spec, plan, weights, lm_head, rows)


def read_weights(directory: Path, config: HeadConfig, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return the tensors of a head's file by name; raises HeadError for a damaged one."""
    path = directory / WEIGHTS_FILE
    check_regular(path)
    try:
        weights = decode(load_file(path))
    except Exception as error:  # safetensors raises its own class for damage, OSError for absence
        raise HeadError(f"cannot read {path}: {cause_of(error)}") from error
    _check_tensors(weights, head_tensor_shapes(config, spec), spec, path)
    return weights


def _check_tensors(
    weights: dict[str, torch.Tensor],
    expected: dict[str, tuple[int, ...]],
    spec: ModelSpec,
    path: Path,
) -> None:
    if set(weights) != set(expected):
        odd = sorted(set(weights) ^ set(expected))
        raise HeadError(f"{path} does not hold the tensors of its configuration: {odd[:4]}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise HeadError(f"{path}: {name} is {tuple(weights[name].shape)}, not {shape}")
        if not bool(weights[name].isfinite().all()):
            raise HeadError(f"{path}: {name} holds numbers that are not finite")
    ids = weights.get("draft_ids")
    if ids is not None and not (
        ids.dtype == torch.int64
        and ids[0] >= 0
        and ids[-1] < spec.vocab_size
        and bool((ids[1:] > ids[:-1]).all())
    ):
        raise HeadError(f"{path}: draft_ids must be int64 and ascend within [0, {spec.vocab_size})")


def lm_head_rows(
    spec: ModelSpec,
    source: TensorSource,
    plan: StagePlan,
    draft_ids: torch.Tensor | None,
    embedding: torch.Tensor | None,
) -> Weight:
    """Return the model's LM head rows for ``draft_ids`` (None: all), [draft vocabulary or V, C]."""
    name = lm_head_name(spec)
    count = spec.vocab_size if draft_ids is None else len(draft_ids)
    if packable(source, plan, {name: (count, spec.hidden_size)}, [name]):
        codes = source.codes(name)
        return pack([codes if draft_ids is None else codes.rows(draft_ids)])
    if embedding is None or not spec.tie_embeddings:
        embedding = source.load(name, plan.dtype).to(plan.device)
    return embedding if draft_ids is None else embedding[draft_ids.to(embedding.device)]


def further_rows(
    spec: ModelSpec, source: TensorSource, plan: StagePlan, embedding: torch.Tensor | None
) -> Rows:
    """Return a function that reads the LM head's rows [k, C] of tokens [k] while the head lives."""
    if embedding is not None and spec.tie_embeddings:
        return lambda ids: embedding[ids.to(embedding.device)]
    rows = source.rows(lm_head_name(spec), plan.dtype)
    return lambda ids: rows(ids).to(plan.device)


def untrained_head(
    spec: ModelSpec,
    plan: StagePlan,
    source: TensorSource,
    fingerprint: str,
    embedding: torch.Tensor | None = None,
) -> ExitHead:
    """Make a ``norm`` head of the model's own final norm and LM head, which is rarely right."""
    config = HeadConfig("norm", plan.last, 0, None, spec.name, fingerprint, trained=False)
    weights = {"norm.weight": source.load(FINAL_NORM, plan.dtype)}
    lm_head = lm_head_rows(spec, source, plan, None, embedding)
    return ExitHead(config, spec, plan, weights, lm_head)
