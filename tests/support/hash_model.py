"""An oracle model: logits are a hash of the whole prefix, through every stage's own rows.

Each pseudo-layer keeps a running checksum per position where a real one keeps keys and values, so
any stale, missing or extra row changes the logits for certain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ppsd.errors import ProtocolError
from ppsd.model.passes import Watch
from ppsd.speculation.sampling import Sampler
from ppsd.types import SamplingParams

WIDTH = 4  # a 64-bit checksum travels as four 16-bit numbers, exact in float32
PADDING = 2  # logits of no token, and the highest of all, as a padded vocabulary may have


def digest(*words: int) -> int:
    data = b"".join(word.to_bytes(8, "little", signed=True) for word in words)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def pack(checksums: Sequence[int]) -> torch.Tensor:
    rows = [[(c % 2**64) >> shift & 0xFFFF for shift in (0, 16, 32, 48)] for c in checksums]
    return torch.tensor(rows, dtype=torch.float32)


def unpack(rows: torch.Tensor) -> list[int]:
    values = (sum(int(x) << (16 * i) for i, x in enumerate(row)) for row in rows.tolist())
    return [v - 2**64 if v >= 2**63 else v for v in values]


class HashPass:
    """A pass through the pseudo-layers of a HashStage."""

    def __init__(self, stage: HashStage, values: list[int], position: int, slot: int) -> None:
        self._stage, self._values, self._position, self._slot = stage, values, position, slot
        self._done = 0

    @property
    def hidden(self) -> torch.Tensor:
        return pack(self._values)

    def advance(self, watch: Watch | None = None) -> bool:
        layers, position, values = self._stage.rows[self._slot], self._position, self._values
        while self._done < len(layers):
            rows = layers[self._done]
            for offset, value in enumerate(values):
                before = rows[position + offset - 1] if position + offset else 0
                rows[position + offset] = digest(self._stage.rank, self._done, before, value)
            values[:] = [rows[position + offset] for offset in range(len(values))]
            self._done += 1
            paused = watch is not None and (watch.blind or watch.changed())
            if paused and self._done < len(layers):
                return False
        self._stage.lengths[self._slot] = position + len(values)
        return True


class HashStage:
    """A StageModel of ``layers`` pseudo-layers; ``rank`` tells stages apart."""

    def __init__(self, rank: int, stages: int, vocab: int, layers: int = 3, slots: int = 1) -> None:
        self.is_last = rank == stages - 1
        self.rank = rank
        self.vocab = vocab
        self.rows: list[list[dict[int, int]]] = [[{} for _ in range(layers)] for _ in range(slots)]
        self.lengths = [0] * slots

    def start(self, inputs: torch.Tensor, position: int, slot: int = 0) -> HashPass:
        if not 0 <= position <= self.lengths[slot]:
            raise ProtocolError(f"rows before {position} are missing, {self.lengths[slot]} held")
        values = inputs.tolist() if inputs.dtype == torch.int64 else unpack(inputs)
        return HashPass(self, values, position, slot)

    def forward(self, inputs: torch.Tensor, position: int) -> torch.Tensor:
        started = self.start(inputs, position)
        started.advance()
        return started.hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # bfloat16 holds a byte exactly, and takes the way of the compiled kernels where they are
        return torch.tensor([self._row(c) for c in unpack(hidden)], dtype=torch.bfloat16)

    def _row(self, checksum: int) -> list[float]:
        seed = checksum.to_bytes(8, "little", signed=True)
        data = hashlib.blake2b(seed, digest_size=self.vocab).digest()
        # ties happen: the lowest id must win everywhere
        return [byte / 32 for byte in (*data, *[255] * PADDING)]


def last_rows(tokens: torch.Tensor, stages: int, vocab: int) -> torch.Tensor:
    """Rows of the last stage for a whole sequence, by fresh stages."""
    rows = tokens
    for rank in range(stages):
        rows = HashStage(rank, stages, vocab).forward(rows, 0)
    return rows


def plain_decode(
    prompt: Sequence[int], params: SamplingParams, stop: frozenset[int], stages: int, vocab: int
) -> list[int]:
    """What any pipeline must say: fresh stages, whole prefix, no cache, no policy."""
    sampler = Sampler(params, len(prompt), stop, vocab)
    tokens, judge = list(prompt), HashStage(stages - 1, stages, vocab)
    while len(tokens) < len(prompt) + params.max_tokens:
        history = torch.tensor(tokens)
        rows = last_rows(history, stages, vocab)
        tokens.append(sampler.choose(judge.logits(rows[-1:])[0], history))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]
