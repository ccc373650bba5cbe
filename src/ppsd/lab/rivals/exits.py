"""What a stage can say behind its layers: by the model's own final norm and LM head, or by heads.

Which of them a rival uses, it says in its setup (jobs.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from ppsd.engine.choose import head_sizes
from ppsd.errors import NonFiniteError
from ppsd.lab.rivals.dynamic import PROMPT_ROWS, Shadow
from ppsd.lab.rivals.jobs import DIGITS
from ppsd.model.draft_vocabulary import prompt_ids
from ppsd.model.exit_head import ExitHead, lm_head_rows, load_head, untrained_head
from ppsd.model.identity import Identity
from ppsd.model.layers import Product
from ppsd.model.names import FINAL_NORM
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import Stage
from ppsd.model.weights import TensorSource
from ppsd.plan.sizes import Sizes
from ppsd.speculation.lookup import Match, mixed

UNTRAINED = "untrained"
Matches = Sequence[Match | None]
Kept = Mapping[int, torch.Tensor]  # rows [n, C] behind each exit


class Exits(Protocol):
    """The voices of a stage.

    ``layers``: what one row costs, or a few, in layers of the model, by exit.
    """

    layers: dict[int, float]

    def begin(self, prompt: Sequence[int]) -> None:
        """Speak of a request with this prompt from now on."""

    def observe(self, kept: Kept, position: int) -> None:
        """Take rows at ``position``…, those before which have been observed."""

    def forget(self) -> None:
        """Begin anew with what ``shadows`` speaks of."""

    def draft(
        self,
        exit_layer: int,
        row: torch.Tensor,
        position: int,
        match: Match | None,
        verified: torch.Tensor | None,
    ) -> Shadow:
        """Return the token behind a row [1, C] at ``position``."""

    def shadows(
        self, rows: slice, matches: Matches, verified: torch.Tensor | None
    ) -> dict[int, list[Shadow]]:
        """Return the tokens behind some of the rows that were observed since ``forget``."""


class OwnExits:
    """The model's final norm and LM head behind any layer; one product says it for all."""

    def __init__(self, stage: Stage, source: TensorSource, exits: Sequence[int]) -> None:
        spec, plan = stage.spec, stage.plan
        norm = source.load(FINAL_NORM, plan.dtype).to(plan.device)
        lm_head = lm_head_rows(spec, source, plan, None, stage.embedding)
        self._score = Product(lm_head, None, norm, spec.rms_norm_eps)
        self._spec = spec
        self._rows: dict[int, torch.Tensor] = {}
        self.layers = dict.fromkeys(exits, spec.head_parameters / spec.layer_parameters)

    def begin(self, prompt: Sequence[int]) -> None:
        """Need nothing: all tokens are scored."""

    def observe(self, kept: Kept, position: int) -> None:
        _append(self._rows, kept)

    def forget(self) -> None:
        self._rows.clear()

    def draft(
        self,
        exit_layer: int,
        row: torch.Tensor,
        position: int,
        match: Match | None,
        verified: torch.Tensor | None,
    ) -> Shadow:
        return likeliest(self._score.by_rows(row), self._spec)[0]

    def shadows(
        self, rows: slice, matches: Matches, verified: torch.Tensor | None
    ) -> dict[int, list[Shadow]]:
        exits = list(self._rows)
        parts = [self._rows[e][rows] for e in exits]
        logits = self._score.by_rows(torch.cat(parts))
        said = likeliest(logits, self._spec)
        count = len(parts[0])
        return {e: said[i * count : (i + 1) * count] for i, e in enumerate(exits)}


class HeadExits:
    """Trained heads, each behind a layer of its own, mixed with prompt lookup as ours are."""

    def __init__(self, stage: Stage, heads: Mapping[int, ExitHead]) -> None:
        self._spec = stage.spec
        self._heads = dict(heads)
        self._features: dict[int, torch.Tensor] = {}
        sizes = Sizes.of(stage.spec)
        self.layers = {e: head_sizes(sizes, h.config) / sizes.layer for e, h in heads.items()}

    def begin(self, prompt: Sequence[int]) -> None:
        for head in self._heads.values():
            head.begin(0, prompt_ids(prompt))

    def observe(self, kept: Kept, position: int) -> None:
        rows = {e: head.forward(kept[e], position) for e, head in self._heads.items()}
        _append(self._features, rows)

    def forget(self) -> None:
        self._features.clear()

    def draft(
        self,
        exit_layer: int,
        row: torch.Tensor,
        position: int,
        match: Match | None,
        verified: torch.Tensor | None,
    ) -> Shadow:
        features = self._heads[exit_layer].forward(row, position)
        return self._said(exit_layer, features, [match], verified)[0]

    def shadows(
        self, rows: slice, matches: Matches, verified: torch.Tensor | None
    ) -> dict[int, list[Shadow]]:
        features = self._features.items()
        return {e: self._said(e, rows_[rows], matches, verified) for e, rows_ in features}

    def _said(
        self,
        exit_layer: int,
        features: torch.Tensor,
        matches: Matches,
        verified: torch.Tensor | None,
    ) -> list[Shadow]:
        head = self._heads[exit_layer]
        if verified is not None:
            verified = verified.to(features.device, features.dtype).expand(len(features), -1)
        finished = head.finish(features, verified)
        logits, odds = head.logits(finished, 0), head.copy_odds(finished)
        rows = [
            row if match is None else mixed(row, match, odds[i])
            for i, (row, match) in enumerate(zip(logits.float(), matches, strict=False))
        ]
        return likeliest(torch.stack(rows), self._spec)


def load_exits(
    stage: Stage,
    source: TensorSource,
    identity: Identity,
    exits: Sequence[int],
    heads: Mapping[int, str],
) -> Exits:
    """Return the voices of a stage behind ``exits``, all of which lie in it."""
    if not heads:
        return OwnExits(stage, source, exits)
    return HeadExits(stage, {e: _load(stage, source, identity, e, heads[e]) for e in exits})


def _load(
    stage: Stage, source: TensorSource, identity: Identity, exit_layer: int, path: str
) -> ExitHead:
    plan = replace(stage.plan, last=exit_layer, slots=1, loose=0)
    embedding = stage.embedding
    if path == UNTRAINED:
        return untrained_head(stage.spec, plan, source, identity.fingerprint, embedding)
    return load_head(Path(path), stage.spec, plan, source, identity, embedding)


def likeliest(logits: torch.Tensor, spec: ModelSpec) -> list[Shadow]:
    """Return the most probable token of each row of logits [n, V], and its probability.

    Of equals it is the lowest, as in the sampler's greedy choice. Raises NonFiniteError.
    """
    values = logits[:, : spec.num_tokens].cpu()
    values = values if values.dtype == torch.float64 else values.float()
    tokens = values.numpy().argmax(1)
    tops = values[torch.arange(len(values)), torch.from_numpy(tokens)]
    if not math.isfinite(tops.sum().item()):
        raise NonFiniteError("logits of real tokens must have a finite maximum")
    chances = (tops - values.logsumexp(1)).exp().tolist()
    return [(int(t), round(c, DIGITS)) for t, c in zip(tokens, chances, strict=True)]


def _append(rows: dict[int, torch.Tensor], more: Kept) -> None:
    """Put rows behind those that are there; of a prompt the newest suffice."""
    for exit_layer, new in more.items():
        old = rows.get(exit_layer)
        rows[exit_layer] = (new if old is None else torch.cat([old, new]))[-PROMPT_ROWS:]
