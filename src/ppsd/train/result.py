"""Write the heads of a run, with their origin and measured agreement."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd.errors import HeadError, PpsdError
from ppsd.model.exit_head import read_weights
from ppsd.model.head_codes import encode
from ppsd.model.head_files import HeadConfig, read_head_config
from ppsd.model.identity import Identity
from ppsd.model.spec import ModelSpec
from ppsd.provenance import provenance
from ppsd.train.distill import Trainer
from ppsd.train.evaluate import Agreement
from ppsd.train.records import DataFile
from ppsd.train.start import Beginning

WORDS = 4  # that a checkpoint holds of a weight: itself, at its best, and two moments


@dataclass(frozen=True)
class Origin:
    """A run's origin beyond its settings."""

    base_model: str
    identity: Identity
    data: Sequence[DataFile]
    lost_mass: float


def save_heads(
    trainer: Trainer, origin: Origin, agreement: Mapping[int, Agreement]
) -> dict[int, Path]:
    """Write one head directory an exit layer, ``<kind>-<layer>``; give their paths."""
    origins = _provenance(trainer, origin)
    places = {}
    for student in trainer.students:
        layer = student.exit_layer
        weights = encode(student.export())
        if trainer.draft_ids is not None:
            weights["draft_ids"] = trainer.draft_ids.cpu()
        kept = trainer.best.kept[layer]
        validation = agreement[layer].to_json() | {"start": kept.start, "step": kept.step}
        validation["lookup"] = round(trainer.lookup, 6)
        config = HeadConfig(
            kind=trainer.config.kind,
            exit_layer=layer,
            layers=trainer.config.layers,
            draft_vocab=None if trainer.draft_ids is None else len(trainer.draft_ids),
            base_model=origin.base_model,
            fingerprint=origin.identity.fingerprint,
            model=origin.identity.to_json(),
            mlp=trainer.config.mlp,
            feedback=trainer.config.feedback,
            copy_gate=trainer.config.copy_gate,
            provenance=origins | _before(trainer.starts.get(layer), trainer.tokens),
            metrics={"validation": validation, "lost_mass": origin.lost_mass},
        )
        name = _name(trainer, layer)
        before = trainer.starts[layer].prompts if layer in trainer.starts else ()
        prompts = sorted(trainer.prompts.union(before))
        places[layer] = trainer.directory.write_head(name, config, weights, prompts)
    return places


def _name(trainer: Trainer, layer: int) -> str:
    return f"{trainer.config.kind}-{layer}"


def check_heads(trainer: Trainer, spec: ModelSpec) -> None:
    """Raise PpsdError unless the heads of a finished run can still be read."""
    for layer in trainer.config.exit_layers:
        place = trainer.directory.path / _name(trainer, layer)
        try:
            read_weights(place, read_head_config(place), spec)
        except HeadError as error:
            raise PpsdError(
                f"this run is finished, but {error}; to train anew give another --out"
            ) from error


def check_room(trainer: Trainer) -> None:
    """Raise PpsdError where heads would take the place of what is not of this run, or no place."""
    numbers = sum(p.numel() for student in trainer.students for _, p in student.parameters())
    copies = 1 if trainer.directory.begun else 2  # one is written before the one before goes
    needed = copies * WORDS * 4 * numbers
    if (free := shutil.disk_usage(trainer.directory.path).free) < needed:
        raise PpsdError(
            f"{trainer.directory.path} has {free / 2**20:,.0f} MiB free, and checkpoints need "
            f"about {needed / 2**20:,.0f}"
        )
    for layer in () if trainer.directory.begun else trainer.config.exit_layers:
        place = trainer.directory.path / _name(trainer, layer)
        if place.exists():
            raise PpsdError(f"{place} is there, and not of this run; give another --out")


def _before(start: Beginning | None, tokens: int) -> dict[str, Any]:
    """Return how many tokens trained a head in all, and which head it went on from."""
    if start is None:
        return {"tokens": tokens}
    return {
        "tokens": start.tokens + tokens,
        "start": {"sha256": start.digest, "tokens": start.tokens},
    }


def _provenance(trainer: Trainer, origin: Origin) -> dict[str, Any]:
    return {
        "settings": trainer.config.to_json(),
        "data": [file.to_json() for file in origin.data],
        "steps": trainer.step,
        **provenance(),
    }
