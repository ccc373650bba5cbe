"""Let the model write its own training targets, many sequences at once.

Rows are addressed by position, as everywhere: row i of the cache is one sequence whose next token
is written at its own length, so no padding is ever attended to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ppsd import checks
from ppsd.model.cache import KVCache
from ppsd.model.layers import Attention, DecoderLayer, Product, RopeRows
from ppsd.model.packed import whole
from ppsd.model.passes import EACH_LAYER, Place
from ppsd.model.runners import CompiledRunner, Runner
from ppsd.model.stage import Stage, new_runner
from ppsd.train.batched import by_sequence, causal_attention

Keep = Callable[[int, torch.Tensor], None]  # layer, rows [n, C] that left it
Noise = Callable[[int, int], torch.Tensor]  # position, count: standard Gumbel noise [count]

MOST_AT_ONCE = 4096  # sequences: far more than any device is the faster for
PREFILL_TOKENS = {"cpu": 4096, "cuda": 32768}  # padded prompt tokens that run at once
REFILL_SHARE = 8  # a refill waits until one row in 8 is free: prompts cost less together


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of generation; the ``batch`` that a prompt shares matters only by rounding."""

    batch: int = 64
    max_new: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.integer("generate_batch", self.batch, 1, MOST_AT_ONCE)
        checks.integer("max_new", self.max_new, 1)
        checks.number("temperature", self.temperature, 0, 100)


@dataclass(frozen=True)
class Request:
    """A prompt to be answered; ``key`` (hexadecimal) names it, ``begun`` starts the answer."""

    key: str
    prompt: Sequence[int]
    begun: Sequence[int] = ()

    @property
    def tokens(self) -> list[int]:
        """Return what the model reads before it writes."""
        return [*self.prompt, *self.begun]


@dataclass(frozen=True)
class Answer:
    """New tokens; they end with an end token unless cut off.

    ``rows`` [T, C] (bfloat16) of each kept layer cover prompt and answer but for the last token,
    which the model never read: that row is zero.
    """

    request: Request
    ids: list[int]
    rows: Mapping[int, torch.Tensor]


@dataclass
class _Row:
    """One sequence being written."""

    request: Request
    limit: int
    uniforms: np.ndarray[Any, Any]  # [limit] in [0, 1): one decides each token where it is sampled
    output: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.output)


class BatchCache:
    """Keys and values [rows, K, capacity, D] of every layer; rows in use come first.

    ``kept`` [rows, capacity, C] holds what leaves the layers ``keep``, counted from 1.
    """

    def __init__(self, model: Stage, rows: int, capacity: int, keep: Collection[int] = ()) -> None:
        spec, plan = model.spec, model.plan
        sizes = spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim
        self.cells = KVCache(*sizes, plan.dtype, plan.device, slots=rows)
        self.keys, self.values = self.cells.keys, self.cells.values
        size = (rows, capacity, spec.hidden_size)
        self.kept = {layer: torch.zeros(size, dtype=torch.bfloat16) for layer in keep}

    def reach(self, first: int, lengths: Sequence[int]) -> None:
        """Declare so many rows of the sequences from row ``first`` on written."""
        for row, length in enumerate(lengths, first):
            self.cells.commit(row, length, ())

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one sequence's rows over another's."""
        self.cells.share(source, target, length)
        for tensor in self.kept.values():
            tensor[target, :length] = tensor[source, :length]

    def taken(self, row: int, length: int) -> dict[int, torch.Tensor]:
        """Copy one sequence's kept rows [length, C]; the last, never computed, is zero."""
        copies = {layer: tensor[row, :length].clone() for layer, tensor in self.kept.items()}
        for copy in copies.values():
            copy[-1] = 0
        return copies

    def filling(self, layer: int, first: int, sequences: int) -> Attention:
        """Return attention of new prompts, whose keys and values go to rows ``first``…."""
        inner = causal_attention(sequences)

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
                rows = by_sequence(new, sequences)
                cache[first : first + sequences, :, : rows.shape[2]] = rows
            return inner(q, k, v)

        return attention

    def keep_filled(self, first: int, sequences: int) -> Keep:
        """Return what keeps the rows of new prompts."""

        def keep(layer: int, x: torch.Tensor) -> None:
            rows = x.view(sequences, -1, x.shape[1])
            self.kept[layer][first : first + sequences, : rows.shape[1]] = rows

        return keep

    def keep_extended(self, positions: torch.Tensor) -> Keep:
        """Return what keeps one new row a sequence."""

        def keep(layer: int, x: torch.Tensor) -> None:
            self.kept[layer][torch.arange(len(positions)), positions.cpu()] = x.to(
                "cpu", torch.bfloat16
            )

        return keep

    def extending(self, layer: int, positions: torch.Tensor, longest: int) -> Attention:
        """Return attention of one new token a sequence, at ``positions`` [rows in use]."""
        count = len(positions)
        rows = torch.arange(count, device=positions.device)
        reach = torch.arange(longest, device=positions.device)
        mask = (reach <= positions[:, None])[:, None, None]

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
            # query heads that share a key/value head are taken as rows of it
            grouped = q.reshape(count, k.shape[1], -1, q.shape[2])
            keys, values = keys[:count, :, :longest], values[:count, :, :longest]
            return F.scaled_dot_product_attention(grouped, keys, values, mask).flatten(1)

        return attention


class Waiting:
    """Requests not begun yet; the first of them can be looked at."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._rest = iter(requests)
        self._first = next(self._rest, None)

    def __bool__(self) -> bool:
        return self._first is not None

    @property
    def first(self) -> Request:
        """Return the next request; there must be one."""
        assert self._first is not None
        return self._first

    def close(self) -> None:
        """Forget the rest."""
        self._rest, self._first = iter(()), None

    def take(self) -> Request:
        """Return the next request, which waits no longer."""
        request = self.first
        self._first = next(self._rest, None)
        return request


class BatchGenerator:
    """Answers requests in whatever order they finish.

    Memory: weights, and 2·layers·batch·K·D numbers for each position of the longest sequence.
    Padded ids from ``vocab_size`` on are never chosen. A sampled token is a function of seed,
    prompt and its place in the answer; ``noise``, where given, takes the place of the seed. Rows
    that leave the layers ``keep`` come with the answers, for 2·C bytes a token and layer. No prompt
    is begun after ``deadline`` (of time.monotonic). ``stepped`` is called after every token of the
    batch and whenever prompts were read; ``written`` and ``read`` count tokens of both.
    """

    def __init__(
        self,
        model: Stage,
        config: GenerateConfig,
        *,
        eos_ids: Collection[int],
        vocab_size: int,
        max_length: int,
        noise: Callable[[Request], Noise] | None = None,
        keep: Collection[int] = (),
        deadline: float = float("inf"),
        stepped: Callable[[], None] = lambda: None,
    ) -> None:
        self.written = self.read = 0
        self._stepped = stepped
        self._keep = keep
        self._deadline = deadline
        self._model = model
        self._config = config
        self._eos_ids = frozenset(eos_ids)
        self._vocab_size = min(vocab_size, model.spec.vocab_size)
        self._max_length = max_length
        self._layers = [DecoderLayer(weights, model.spec) for weights in model.layers]
        assert model.lm_head is not None, "the model is whole"
        spoken = whole(model.lm_head)[: self._vocab_size]
        self._score = Product(spoken, None, model.norm, model.spec.rms_norm_eps)
        self._noise = noise
        self._rows: list[_Row] = []

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Yield answers as they finish; every prompt must be shorter than ``max_length``.

        ``requests`` are taken as there is room for them.
        """
        waiting = Waiting(requests)
        model = self._model
        self._cache = BatchCache(model, self._config.batch, self._max_length, self._keep)
        self._runner: Runner | None = None
        if model.plan.device.type == "cpu":  # a GPU's batches are wider than its runner's
            self._runner = new_runner(model.layers, model.spec, model.rope, self._cache.cells)
        while waiting or self._rows:
            self._refill(waiting)
            yield from self._finished()
            if self._rows:
                self._step()
                yield from self._finished()
                self._stepped()

    def under_way(self) -> dict[str, list[int]]:
        """Return the answers so far of the requests at work, by key, but for complete ones."""
        return {row.request.key: row.output for row in self._rows if not self._is_done(row)}

    @property
    def under_way_share(self) -> float:
        """Return how many answers the requests at work amount to, at most."""
        return sum(len(row.output) / row.limit for row in self._rows)

    def _refill(self, waiting: Waiting) -> None:
        free = self._config.batch - len(self._rows)
        if self._rows and free * REFILL_SHARE < self._config.batch:
            return
        while waiting and free:
            if time.monotonic() > self._deadline:
                waiting.close()
                return
            chosen: list[Request] = []
            while waiting and len(chosen) < free and self._fits([*chosen, waiting.first]):
                chosen.append(waiting.take())
            self._prefill(chosen)
            self.read += sum(len(request.tokens) for request in chosen)
            self._stepped()
            free -= len(chosen)

    def _prefill(self, requests: list[Request]) -> None:
        model, count = self._model, len(requests)
        texts = [request.tokens for request in requests]
        length = max(map(len, texts))
        tokens = torch.zeros(count, length, dtype=torch.int64)
        for i, text in enumerate(texts):
            tokens[i, : len(text)] = torch.tensor(text)
        device = model.plan.device
        positions = torch.arange(length, device=device).repeat(count)
        first = len(self._rows)
        hidden = self._forward(
            tokens.flatten(),
            positions,
            lambda layer: self._cache.filling(layer, first, count),
            self._cache.keep_filled(first, count),
        )
        self._cache.reach(first, [len(text) for text in texts])
        ends = [i * length + len(text) - 1 for i, text in enumerate(texts)]
        new = [self._row(request) for request in requests]
        self._rows += new
        self._choose(new, hidden[torch.tensor(ends, device=device)])

    def _fits(self, requests: Sequence[Request]) -> bool:
        padded = len(requests) * max(len(r.tokens) for r in requests)
        return len(requests) == 1 or padded <= PREFILL_TOKENS[self._model.plan.device.type]

    def _row(self, request: Request) -> _Row:
        limit = min(self._config.max_new, self._max_length - len(request.prompt))
        seed = (int(request.key, 16) ^ self._config.seed) % 2**63
        uniforms = np.random.default_rng(seed).random(limit)
        return _Row(request, limit, uniforms, list(request.begun))

    def _step(self) -> None:
        tokens = torch.tensor([row.output[-1] for row in self._rows])
        lengths = [row.length - 1 for row in self._rows]  # the newest token is not cached yet
        positions = torch.tensor(lengths, device=self._model.plan.device)
        longest, keep = max(lengths) + 1, self._cache.keep_extended(positions)
        if isinstance(self._runner, CompiledRunner):
            hidden = self._run(self._runner, tokens, lengths, keep)
        else:
            attention = partial(self._cache.extending, positions=positions, longest=longest)
            hidden = self._forward(tokens, positions, attention, keep)
        self._cache.reach(0, [length + 1 for length in lengths])
        self._choose(self._rows, hidden)

    def _run(
        self, runner: CompiledRunner, tokens: torch.Tensor, lengths: Sequence[int], keep: Keep
    ) -> torch.Tensor:
        """Run one token a sequence by compiled kernels.

        PyTorch's attention reads the padded cache of every sequence, at a quarter of the speed.
        """
        assert self._model.embedding is not None
        places = [Place(row, length, length) for row, length in enumerate(lengths)]
        rows = runner.start_rows(self._model.embedding[tokens], places)
        for layer in range(1, len(self._layers) + 1):
            rows.advance(EACH_LAYER)
            if layer in self._keep:
                keep(layer, rows.hidden)
        return rows.hidden

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: Callable[[int], Attention],
        keep: Keep,
    ) -> torch.Tensor:
        model = self._model
        assert model.embedding is not None
        x = model.embedding[tokens.to(model.plan.device)]
        rope = RopeRows(model.rope, positions)
        for layer, decoder in enumerate(self._layers):
            x = decoder(x, rope, attention(layer))
            if layer + 1 in self._keep:
                keep(layer + 1, x)
        return x

    def _choose(self, rows: Sequence[_Row], hidden: torch.Tensor) -> None:
        """Append each row's next token."""
        scores = self._score(hidden).float()
        scores[:, list(self._model.spec.unused_ids)] = float("-inf")
        for row, token in zip(rows, self._drawn(rows, scores).tolist(), strict=True):
            row.output.append(token)
        self.written += len(rows)

    def _drawn(self, rows: Sequence[_Row], scores: torch.Tensor) -> torch.Tensor:
        """Draw each row's next token [rows] from ``scores`` [rows, V]."""
        if self._config.temperature == 0:
            return scores.argmax(-1)
        scores -= scores.amax(-1, keepdim=True)  # or a very low temperature would overflow
        scores /= self._config.temperature
        if self._noise is not None:
            noise = [self._noise(r.request)(r.length, scores.shape[1]) for r in rows]
            return (scores + torch.stack(noise).to(scores.device)).argmax(-1)
        # one number a token: whole rows of noise would take longer than the model
        numbers = torch.tensor([row.uniforms[len(row.output)] for row in rows], dtype=scores.dtype)
        sums = scores.softmax(-1).cumsum(-1)
        wanted = numbers.to(scores.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp_(max=scores.shape[1] - 1)

    def _is_done(self, row: _Row) -> bool:
        return row.output[-1] in self._eos_ids or len(row.output) >= row.limit

    def _finished(self) -> Iterator[Answer]:
        """Take out rows that are done; the last row in use moves into each gap."""
        for i in range(len(self._rows) - 1, -1, -1):
            if self._is_done(row := self._rows[i]):
                rows = self._cache.taken(i, row.length)
                last = self._rows.pop()
                if last is not row:
                    self._cache.move(len(self._rows), i, last.length - 1)  # the newest is not read
                    self._rows[i] = last
                yield Answer(row.request, row.output, rows)
