"""Tell models apart in a way that survives conversion between formats, for their heads."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppsd.model.names import FINAL_NORM
from ppsd.model.spec import ModelSpec
from ppsd.model.weights import FINGERPRINTED, TensorSource, fingerprint

# Conversions pad the vocabulary, and a head checks its own token ids.
SIZES = tuple(name for name in FINGERPRINTED if name != "vocab_size")
SAMPLED = 256  # values of the final norm: 1.4 kB of text
# A bfloat16 copy is off by at most 2^-8; one step in bfloat16, the least that training changes, is
# more. The slack is for float32, the floor for float16, which cannot hold smaller values.
ROUNDING, FLOOR = 2.0**-8 * (1 + 2.0**-16), 2.0**-24
FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True)
class Identity:
    """A model's sizes and a sample of its final norm, beside its exact ``fingerprint``.

    The final norm tells models apart: full training changes it, quantisation and conversion do not,
    and quantisers that move scales into norms (AWQ) leave it alone, unlike the layers' norms.
    """

    fingerprint: str
    sizes: Mapping[str, float] = field(default_factory=dict)
    final_norm: tuple[float, ...] = ()

    @classmethod
    def of(cls, spec: ModelSpec, source: TensorSource) -> Identity:
        """Read a model's norms and biases; raises ModelError."""
        import torch

        norm = source.load(FINAL_NORM, torch.float32)
        sample = norm[:: -(-len(norm) // SAMPLED)]
        sizes = {name: getattr(spec, name) for name in SIZES}
        return cls(fingerprint(spec, source), sizes, tuple(sample.tolist()))

    @classmethod
    def from_json(cls, mark: str, record: Mapping[str, Any]) -> Identity:
        """Restore what ``to_json`` gave of the model ``mark``; raises ValueError."""
        if not record:  # a head of an earlier version
            return cls(mark)
        try:
            sizes = {name: float(record["sizes"][name]) for name in SIZES}
            content = base64.b64decode(record["final_norm"], validate=True)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"model holds no sizes and final_norm ({error!r})") from error
        return cls(mark, sizes, tuple(np.frombuffer(content, FLOAT32).tolist()))

    def to_json(self) -> dict[str, Any]:
        """Return all but the fingerprint; the norm as base64 of little-endian float32."""
        content = np.asarray(self.final_norm, FLOAT32).tobytes()
        return {"sizes": dict(self.sizes), "final_norm": base64.b64encode(content).decode()}

    def difference(self, other: Identity) -> str:
        """Say how the ``other`` model differs from this one, in a clause; empty if it does not."""
        if self.fingerprint == other.fingerprint:
            return ""
        if not (self.sizes and other.sizes):
            return (
                f"all that is known is its fingerprint {self.fingerprint[:12]}, "
                f"and the model's is {other.fingerprint[:12]}"
            )
        for name in SIZES:
            if np.float32(self.sizes[name]) != np.float32(other.sizes[name]):
                return f"{name} was {self.sizes[name]:g} there and is {other.sizes[name]:g} here"
        return self._norm_difference(other)

    def _norm_difference(self, other: Identity) -> str:
        ours, theirs = (np.asarray(x.final_norm, np.float64) for x in (self, other))
        if len(ours) != len(theirs):
            return f"its final norm was sampled {len(ours)} times, the model's {len(theirs)} times"
        sizes = np.maximum(np.abs(ours), np.abs(theirs))
        off = np.abs(ours - theirs)
        changed = off > ROUNDING * sizes + FLOOR
        if not changed.any():
            return ""
        most = float((off[changed] / sizes[changed]).max())
        return (
            f"the final norm differs in {changed.sum()} of {len(ours)} sampled values, by up to "
            f"{most:.2g} of their size: another model, or one trained further"
        )
