"""Candidate trees that grow at random in a runner's slots, beside plain decoding of each branch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ppsd.model.cache import KVCache
from ppsd.model.layers import LayerWeights, Rope
from ppsd.model.passes import Place, Watch
from ppsd.model.runners import Runner
from ppsd.model.spec import ModelSpec
from tests.support.layers import rand

CPU, CONTEXT, LOOSE = torch.device("cpu"), 64, 24
Build = Callable[[Sequence[LayerWeights], ModelSpec, Rope, KVCache], Runner]


def run(runner: Runner, rows: torch.Tensor, position: int, slot: int = 0) -> torch.Tensor:
    started = runner.start(rows, position, slot)
    assert started.advance()
    return started.hidden


@dataclass(eq=False)
class Node:
    row: torch.Tensor  # [1, C]
    place: Place
    ancestors: tuple[Node, ...]  # unverified when the node was run, and those verified since


class Trees:
    """Trees of two slots of ``runner``; ``plain`` is its like, with one slot and no loose cells.

    Every slot begins with a verified prompt.
    """

    def __init__(
        self, build: Build, weights: Sequence[LayerWeights], spec: ModelSpec, seed: int = 0
    ) -> None:
        self.luck = random.Random(seed)
        self.width, self.dtype = spec.hidden_size, weights[0].input_norm.dtype
        rope = Rope(spec, CONTEXT, self.dtype, CPU)
        sizes = (len(weights), spec.num_kv_heads, CONTEXT, spec.head_dim, self.dtype, CPU)
        cache = KVCache(*sizes, slots=2, loose=LOOSE, spare=1)
        self.runner = build(weights, spec, rope, cache)
        self.plain = build(weights, spec, rope, KVCache(*sizes, spare=1))
        self.prompts = [self.make_rows(self.luck.randint(1, 20)) for _ in range(2)]
        self.verified: list[list[Node]] = [[], []]  # behind the prompt, by slot
        self.live: list[list[Node]] = [[], []]
        for slot, prompt in enumerate(self.prompts):
            run(self.runner, prompt, 0, slot)

    def make_rows(self, count: int) -> torch.Tensor:
        return rand(count, self.width, dtype=self.dtype)

    def grow(self, count: int, *, chain: bool = False) -> list[Node]:
        """Add ``count`` nodes to any slots, parents before their children, or each its parent."""
        cache, nodes = self.runner.cache, []
        for row in torch.split(self.make_rows(count), 1):
            slot = 1 if chain else self.luck.randrange(len(self.live))
            parent = self.luck.choice([None, *self.live[slot]])
            parent = nodes[-1] if chain and nodes else parent
            ancestors = () if parent is None else (*parent.ancestors, parent)
            path = tuple(n.place.cell for n in ancestors)
            position = cache.lengths[slot] + len(path)
            taken = {n.place.cell for n in self.live[slot]}
            loose = range(cache.capacity, cache.capacity + cache.loose)
            free = [c for c in (position, *loose) if c not in taken]
            cell = position if position in free and self.luck.random() < 0.5 else free[-1]
            node = Node(row, Place(slot, position, cell, path), ancestors)
            self.live[slot].append(node)
            nodes.append(node)
        return nodes

    def commit(self, slot: int, node: Node) -> None:
        """Verify a node and its ancestors, and forget all that does not hang under it."""
        won = (*node.ancestors, node)
        moves = [(n.place.cell, n.place.position) for n in won]
        self.runner.cache.commit(
            slot, node.place.position + 1, [(a, b) for a, b in moves if a != b]
        )
        self.verified[slot] += won
        self.live[slot] = [n for n in self.live[slot] if node in n.ancestors]
        for left in self.live[slot]:
            left.ancestors = left.ancestors[len(won) :]
            left.place = left.place._replace(path=left.place.path[len(won) :])

    def expected(self, node: Node) -> torch.Tensor:
        """Return what plain decoding of the node's branch gives."""
        slot = node.place.slot
        result = run(self.plain, self.prompts[slot], 0)
        for before in (*self.verified[slot], *node.ancestors, node):
            result = run(self.plain, before.row, self.plain.cache.lengths[0])
        return result

    def check(self, nodes: list[Node], results: torch.Tensor) -> None:
        """Hold rows, keys and values of ``nodes`` against plain decoding, bit for bit."""
        for node, result in zip(nodes, torch.split(results, 1), strict=True):
            assert torch.equal(result, self.expected(node)), node.place
            slot, position, cell, _ = node.place
            for here, there in zip(self.runner.cache.whole, self.plain.cache.whole, strict=True):
                assert torch.equal(here[:, slot, :, cell], there[:, 0, :, position]), node.place

    def wave(self, count: int, watch: Watch | None = None, *, chain: bool = False) -> None:
        """Grow, run the new rows, and check them."""
        nodes = self.grow(count, chain=chain)
        rows = torch.cat([n.row for n in nodes])
        lengths = list(self.runner.cache.lengths)
        started = self.runner.start_rows(rows, [n.place for n in nodes])
        while not started.advance(watch):
            assert watch is not None
        assert self.runner.cache.lengths == lengths
        self.check(nodes, started.hidden)

    def life(self) -> None:
        """Run several waves, with commits after which cells are used again."""
        for _ in range(4):
            self.wave(self.luck.choice([1, 2, 5, 9]))
            self.wave(self.luck.choice([1, 3, 4]))
            for slot, nodes in enumerate(self.live):
                if nodes:
                    self.commit(slot, self.luck.choice(nodes))
