"""Run decode steps on GPUs: fixed buffers, rows of one width, a graph for each context bucket.

Every step runs the same kernels over ``width`` rows, so a row's bits depend neither on how many
rows came with it nor on what they are. Positions and cells live on the device: nothing on the way
asks it for a number. On a CPU, or where a graph cannot be captured, the same step runs eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ppsd.model.cache import KVCache
from ppsd.model.layers import Attention, DecoderLayer, LayerWeights, Rope, RopeRows, attend
from ppsd.model.passes import Pass, Place, Watch
from ppsd.model.runners import PassesTogether, TorchRunner
from ppsd.model.spec import ModelSpec

BUCKET = 256  # cells: a graph serves all contexts up to the next multiple
WARM_UPS = 3  # runs before a capture, in which libraries choose their kernels
WIDTH = 16  # rows of a stage's step; more of them take as long on a GPU, up to about 64
logger = logging.getLogger(__name__)

Replay = Callable[[], None]


class Graphs(Protocol):
    """Recorder of work over fixed buffers that can be run again and again."""

    def capture(self, work: Replay) -> Replay:
        """Record ``work`` and return what repeats it; raises RuntimeError where that fails."""


class CudaGraphs:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Replay) -> Replay:
        """Capture on a stream of its own, after a few runs, as CUDA demands."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        replay: Replay = graph.replay
        return replay


class Step:
    """A step of up to ``width`` rows of one sequence through consecutive layers.

    ``keys``, ``values`` are [K, cells, D] for each layer; their last cell is given to the rows that
    only fill up the width, and the ``loose`` ones before it to none. ``finish`` maps the layers'
    rows [width, C] to what is wanted of them, within the graph. ``graphs`` None runs eagerly.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        spec: ModelSpec,
        rope: Rope,
        cache: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
        width: int,
        graphs: Graphs | None,
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
        loose: int = 0,
    ) -> None:
        self._layers = [DecoderLayer(weights, spec) for weights in layers]
        self._rope, self._finish = rope, finish
        self._cache = cache
        self._graphs = graphs
        first = cache[0][0]
        self._spare = first.shape[1] - 1
        self._end = self._spare - loose
        self._rows = first.new_zeros(width, spec.hidden_size)
        self._places = torch.zeros(2, width, dtype=torch.int64, device=first.device)
        self._reach = torch.arange(first.shape[1], device=first.device)
        self._replays: dict[int, tuple[Replay, torch.Tensor]] = {}

    @property
    def width(self) -> int:
        return len(self._rows)

    def start(self, rows: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Launch ``rows`` [n, C] at ``positions``; return where their results will be [n, …].

        What is returned is overwritten by the next step. Raises ValueError for more rows than the
        width and positions beyond the cache.
        """
        count = len(positions)
        if not 0 < count <= self.width or not 0 <= min(positions) <= max(positions) < self._end:
            raise ValueError(f"{count} rows at {positions} do not fit {self.width} x {self._end}")
        self._place(positions)
        replay, result = self._replay(-(-(max(positions) + 1) // BUCKET) * BUCKET)
        self._rows[:count].copy_(rows, non_blocking=True)
        replay()
        return result[:count]

    def _place(self, positions: Sequence[int]) -> None:
        rest = self.width - len(positions)
        places = [[*positions, *[0] * rest], [*positions, *[self._spare] * rest]]
        # Pinned, so that the copy does not wait; new each time, as the last may still be read.
        here = torch.tensor(places, pin_memory=self._places.is_cuda)
        self._places.copy_(here, non_blocking=True)

    def _replay(self, bucket: int) -> tuple[Replay, torch.Tensor]:
        """Return the step for contexts of up to ``bucket`` cells, and where its results will be."""
        if bucket not in self._replays:
            results: list[torch.Tensor] = []

            def work() -> None:
                y = self._forward(bucket)
                results[:] = [results[0].copy_(y) if results else y.clone()]

            work()
            self._replays[bucket] = self._captured(work), results[0]
        return self._replays[bucket]

    def _captured(self, work: Replay) -> Replay:
        if self._graphs is None:
            return work
        try:
            return self._graphs.capture(work)
        except RuntimeError as error:
            self._graphs = None
            logger.warning(
                "a step cannot be captured (%s); it runs eagerly from now on, which is slower",
                str(error).splitlines()[0],
            )
            return work

    @torch.inference_mode()
    def _forward(self, bucket: int) -> torch.Tensor:
        positions, cells = self._places
        rope = RopeRows(self._rope, positions)
        size = min(bucket, self._end)
        mask = self._reach[:size] <= positions[:, None]
        x = self._rows
        for layer, keys, values in zip(self._layers, *self._cache, strict=True):
            x = layer(x, rope, _celled_attention(keys, values, cells, mask))
        return self._finish(x)


def _celled_attention(
    keys: torch.Tensor, values: torch.Tensor, cells: torch.Tensor, mask: torch.Tensor
) -> Attention:
    """Return attention over the first cells, as many as ``mask`` [n, T] has, of ``keys``.

    The rows' own keys and values go to ``cells`` [n] first.
    """
    size = mask.shape[1]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys.index_copy_(1, cells, k.transpose(0, 1))
        values.index_copy_(1, cells, v.transpose(0, 1))
        return attend(q, keys[:, :size], values[:, :size], mask)

    return attention


class CudaRunner:
    """Run up to WIDTH rows as a Step of their slot, and longer blocks as TorchRunner does.

    The cache needs a spare cell. A step is launched as a whole: once begun it is not stopped, which
    would cost more than the few milliseconds it takes.
    """

    def __init__(
        self,
        weights: Sequence[LayerWeights],
        spec: ModelSpec,
        rope: Rope,
        cache: KVCache,
        graphs: Graphs | None,
    ) -> None:
        self.cache = cache
        self._blocks = TorchRunner(weights, spec, rope, cache)
        self.steps: list[Step] = []
        for slot in range(len(cache.lengths)):
            keys, values = zip(*cache.views(slot), strict=True)
            step = Step(weights, spec, rope, (keys, values), WIDTH, graphs, loose=cache.loose)
            self.steps.append(step)

    def start(self, rows: torch.Tensor, position: int, slot: int = 0) -> Pass:
        """Start a pass."""
        if len(rows) > WIDTH:
            return self._blocks.start(rows, position, slot)
        self.cache.reserve(position, len(rows), slot)
        return CudaPass(self, rows, position, slot)

    def start_rows(self, rows: torch.Tensor, places: Sequence[Place]) -> Pass:
        """Start a pass of rows of trees: a step for each chain among them, in turn.

        One step of several branches would have to gather what each row sees, which is another
        product than plain decoding's, with other bits.
        """
        self.cache.check(places, len(rows))
        chains = _chains(places)
        parts = torch.split(rows, [len(chain) for chain in chains])
        passes = [CudaChainPass(self, *both) for both in zip(parts, chains, strict=True)]
        return PassesTogether(passes)


class CudaPass:
    """A pass through the layers of a CudaRunner."""

    def __init__(self, runner: CudaRunner, rows: torch.Tensor, position: int, slot: int) -> None:
        self.hidden = rows
        self._runner, self._position, self._slot = runner, position, slot

    def advance(self, watch: Watch | None = None) -> bool:
        """Launch the step and return True; nobody needs to wait for its rows yet."""
        positions = range(self._position, self._position + len(self.hidden))
        found = self._runner.steps[self._slot].start(self.hidden, positions)
        self.hidden = found.clone()  # the next step overwrites it
        self._runner.cache.advance(self._position, len(positions), self._slot)
        return True


class CudaChainPass:
    """A pass of rows of a tree, each the child of the one before it, through a CudaRunner."""

    def __init__(self, runner: CudaRunner, rows: torch.Tensor, chain: Sequence[Place]) -> None:
        self.hidden = rows
        self._runner, self._chain = runner, chain

    def advance(self, watch: Watch | None = None) -> bool:
        """Launch the step, as CudaPass does."""
        runner, chain = self._runner, self._chain
        with runner.cache.in_order(chain):
            step = runner.steps[chain[0].slot]
            self.hidden = step.start(self.hidden, [place.position for place in chain]).clone()
        return True


def _chains(places: Sequence[Place]) -> list[list[Place]]:
    """Cut ``places`` where one is not the child of the one before it, or a step is full."""
    chains: list[list[Place]] = []
    last: Place | None = None
    for place in places:
        is_child = (
            last is not None
            and (place.slot, place.path) == (last.slot, (*last.path, last.cell))
            and len(chains[-1]) < WIDTH
        )
        if is_child:
            chains[-1].append(place)
        else:
            chains.append([place])
        last = place
    return chains
