"""An oracle model: logits are a hash of the whole prefix, through every stage's own rows.

Each pseudo-layer keeps a checksum for every row in the product's own cache, where a real one keeps
keys and values. A row is a hash of the rows that it sees, in their order, and of its position, so
any stale, missing, extra or misplaced row changes the logits for certain.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from types import SimpleNamespace

import torch

from ppsd.model.cache import KVCache
from ppsd.model.passes import Pass, Piece, Place, Watch
from ppsd.model.runners import PassesTogether
from ppsd.speculation.lookup import ODDS
from ppsd.speculation.sampling import Sampler
from ppsd.types import SamplingParams

WIDTH = 4  # a 64-bit checksum travels as four 16-bit numbers, exact in float32
PADDING = 2  # logits of no token, and the highest of all, as a padded vocabulary may have
CAPACITY = 96  # positions


def digest(*words: int) -> int:
    data = array("q", words).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def pack(checksums: Sequence[int]) -> torch.Tensor:
    rows = [[(c % 2**64) >> shift & 0xFFFF for shift in (0, 16, 32, 48)] for c in checksums]
    return torch.tensor(rows, dtype=torch.float32)


def unpack(rows: torch.Tensor) -> list[int]:
    values = (sum(int(x) << (16 * i) for i, x in enumerate(row)) for row in rows.tolist())
    return [v - 2**64 if v >= 2**63 else v for v in values]


class HashPass:
    """A pass through the pseudo-layers of a HashStage."""

    def __init__(self, stage: HashStage, values: list[int], places: Sequence[Place]) -> None:
        self._stage, self._values, self._places = stage, values, places
        self._done = 0

    @property
    def hidden(self) -> torch.Tensor:
        return pack(self._values)

    def advance(self, watch: Watch | None = None) -> bool:
        stage, values = self._stage, self._values
        while self._done < stage.layers:
            rows = stage.rows[self._done]  # [slots, cells]
            for i, (slot, position, cell, path) in enumerate(self._places):
                seen = rows[slot, : position - len(path)].tolist()
                seen += [int(rows[slot, other]) for other in path]
                words = stage.rank, self._done, position, *seen, values[i]
                values[i] = rows[slot, cell] = digest(*words)
            self._done += 1
            paused = watch is not None and (watch.blind or watch.changed())
            if paused and self._done < stage.layers:
                return False
        self.end()
        return True

    def end(self) -> None:
        """Leave lengths alone, as rows of candidate trees do."""


class PromptPass(HashPass):
    """A pass of rows that stand one after another."""

    def end(self) -> None:
        slot, first, *_ = self._places[0]
        self._stage.cache.advance(first, len(self._places), slot)


class HashStage:
    """A StageModel of ``layers`` pseudo-layers; ``rank`` tells stages apart."""

    def __init__(
        self,
        rank: int,
        stages: int,
        vocab: int,
        layers: int = 3,
        *,
        slots: int = 1,
        loose: int = 0,
    ) -> None:
        self.is_last = rank == stages - 1
        self.rank = rank
        self.vocab = vocab
        self.layers = layers
        sizes = layers, 1, CAPACITY, 1, torch.int64, torch.device("cpu")
        self.cache = KVCache(*sizes, slots=slots, loose=loose)
        self.rows = self.cache.whole[0].numpy()[:, :, 0, :, 0]

    def start(self, inputs: torch.Tensor, position: int, slot: int = 0) -> HashPass:
        self.cache.reserve(position, len(inputs), slot)
        places = [Place(slot, p, p) for p in range(position, position + len(inputs))]
        return PromptPass(self, as_values(inputs), places)

    def start_rows(self, inputs: torch.Tensor, places: Sequence[Place]) -> HashPass:
        self.cache.check(places, len(inputs))
        return HashPass(self, as_values(inputs), places)

    def start_joined(self, piece: Piece, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        return PassesTogether([self.start(*piece), self.start_rows(inputs, places)])

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        self.cache.commit(slot, length, moves)

    def share(self, source: int, slot: int, length: int) -> None:
        self.cache.share(source, slot, length)

    def forward(self, inputs: torch.Tensor, position: int, slot: int = 0) -> torch.Tensor:
        started = self.start(inputs, position, slot)
        started.advance()
        return started.hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # bfloat16 holds a byte exactly, and takes the way of the compiled kernels where they are
        return torch.tensor([self._row(c) for c in unpack(hidden)], dtype=torch.bfloat16)

    row_logits = logits

    def _row(self, checksum: int) -> list[float]:
        seed = checksum.to_bytes(8, "little", signed=True)
        data = hashlib.blake2b(seed, digest_size=self.vocab).digest()
        # ties happen: the lowest id must win everywhere
        return [byte / 32 for byte in (*data, *[255] * PADDING)]


def as_values(inputs: torch.Tensor) -> list[int]:
    """Return token ids, or the checksums of hidden rows."""
    return inputs.tolist() if inputs.dtype == torch.int64 else unpack(inputs)


class HashHead:
    """An exit head that knows what the target says after the texts that it has learnt.

    It is right with probability ``alpha``; else the target's token is among its other candidates,
    or not at all. It recognises a row by a checksum of all rows before, so a row that is missing
    or misplaced in its own cache makes it say what comes to mind. It is ``torn`` if two requests
    want different tokens after the same text.
    """

    def __init__(self, rank: int, vocab: int, alpha: float, *, slots: int, loose: int) -> None:
        self.spec = SimpleNamespace(vocab_size=vocab)
        self._make = lambda: HashStage(100 + rank, 0, vocab, 1, slots=slots, loose=loose)
        self._own, self.alpha, self.torn = self._make(), alpha, False
        self._following: dict[int, int] = {}  # token by checksum
        self._verified: set[int] = set()  # checksums of the last stage
        self._begun: set[int] = set()  # slots

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        assert list(prompt) == sorted(set(prompt)) != []
        self._begun.add(slot)

    def learn(
        self, prompt: int, tokens: Sequence[int], hidden: torch.Tensor, last: torch.Tensor
    ) -> None:
        """Know the answer behind ``prompt`` tokens, from rows [n, C] of its stage and the last."""
        rows = unpack(self._make().forward(hidden, 0))[prompt - 1 : -1]
        for row, token in zip(rows, tokens[prompt:], strict=True):
            self.torn |= self._following.setdefault(row, token) != token
        self._verified.update(unpack(last))

    def forward(self, hidden: torch.Tensor, position: int, slot: int = 0) -> torch.Tensor:
        return self._own.forward(hidden, position, slot)

    def forward_rows(self, hidden: torch.Tensor, places: Sequence[Place]) -> torch.Tensor:
        started = self._own.start_rows(hidden, places)
        started.advance()
        return started.hidden

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        self._own.commit(slot, length, moves)

    def share(self, source: int, slot: int, length: int) -> None:
        self._own.share(source, slot, length)

    def finish(self, features: torch.Tensor, verified: torch.Tensor | None = None) -> torch.Tensor:
        if verified is not None:
            assert len(verified) == len(features)
            assert self._verified.issuperset(unpack(verified))
        return features

    def copy_odds(self, finished: torch.Tensor) -> torch.Tensor:
        return ODDS.expand(len(finished), -1)

    def opinions(
        self, finished: torch.Tensor, k: int, slots: Sequence[int], perturb: object
    ) -> tuple[torch.Tensor, ...]:
        assert len(slots) == len(finished)
        assert self._begun.issuperset(slots)
        count = min(k, self.spec.vocab_size)
        tokens = [self._candidates(row)[:count] for row in unpack(finished)]
        probabilities = torch.tensor([0.5**i for i in range(1, count + 1)])
        return torch.tensor(tokens), probabilities.expand(len(tokens), -1)

    def _candidates(self, row: int) -> list[int]:
        vocab = self.spec.vocab_size
        tokens = sorted(range(vocab), key=lambda token: digest(row, token))
        right = self._following.get(row)
        luck = digest(row, vocab) % 1000 / 1000
        if right is not None and luck < self.alpha:
            tokens.remove(right)
            tokens.insert(0, right)
        return tokens


def last_rows(tokens: torch.Tensor, stages: int, vocab: int) -> torch.Tensor:
    """Rows of the last stage for a whole sequence, by fresh stages."""
    return all_rows(tokens, stages, vocab)[-1]


def all_rows(tokens: torch.Tensor, stages: int, vocab: int) -> list[torch.Tensor]:
    """Rows of every stage for a whole sequence, by fresh stages."""
    rows = [tokens]
    for rank in range(stages):
        rows.append(HashStage(rank, stages, vocab).forward(rows[-1], 0))
    return rows[1:]


def plain_decode(
    prompt: Sequence[int], params: SamplingParams, stop: frozenset[int], stages: int, vocab: int
) -> list[int]:
    """What any pipeline must say: stages of its own, a row at a time, no policy."""
    sampler = Sampler(params, len(prompt), stop, vocab)
    pipeline = [HashStage(rank, stages, vocab) for rank in range(stages)]
    tokens, fed = list(prompt), 0
    while len(tokens) < len(prompt) + params.max_tokens:
        history = torch.tensor(tokens)
        rows = history[fed:]
        for stage in pipeline:
            rows = stage.forward(rows, fed)
        fed = len(tokens)
        tokens.append(sampler.choose(pipeline[-1].logits(rows[-1:])[0], history))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]
