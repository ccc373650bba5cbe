"""A candidate tree: what may follow the newest verified token, and where its rows are kept.

Pure, for the wave policy (waves.py). Scores are probabilities that a node is on the true path,
given its root: the product of the probabilities along the way.

It runs between two passes of the first stage, so it does little: tokens become nodes when they are
fed, and what a head said is looked at when it could matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import exp, inf

from ppsd.speculation.copies import Copy, CopyIndex
from ppsd.speculation.lookup import CONFIDENCE
from ppsd.speculation.masks import Mask, Masks, permits

CANDIDATES = 8  # of a head for each row: more are hardly ever fed
UNFED = 0
MAX_DEPTH = 64  # levels below the root
KEPT = 0.3  # what earlier heads weigh against a deeper one: together they are right more often
FLOOR = 0.002  # a row worth less is not worth its message
UNHEARD = -1  # no head has spoken of a node's children yet

NOTHING: Mapping[int, float] = {}

Waiting = list[tuple[float, int]]  # negated probabilities and tokens, the first of them last


class Node:
    """A token that may come at ``position``, after its parent's.

    ``probability`` is that of the token given the parent. ``wave`` numbers the wave that its row
    went into, UNFED before; then ``id``, ``cell`` and ``base`` (the verified rows of that wave)
    hold. ``children`` have been fed, the ``waiting`` tokens have not. ``nodes`` and ``cells`` are
    those of the ancestors that were not verified when it was fed. ``mask``: see Tree.mask.
    """

    __slots__ = (
        "base",
        "candidates",
        "cell",
        "cells",
        "children",
        "copy",
        "id",
        "level",
        "mask",
        "nodes",
        "parent",
        "position",
        "probability",
        "rank",
        "said",
        "score",
        "token",
        "waiting",
        "wave",
        "worth",
    )

    def __init__(self, parent: Node | None, position: int, token: int, probability: float) -> None:
        self.parent, self.position, self.token = parent, position, token
        self.probability = probability
        self.score = self.worth = 1.0
        self.id = self.cell = self.base = -1
        self.nodes: tuple[int, ...] = ()
        self.cells: tuple[int, ...] = ()
        self.wave = UNFED
        self.level = UNHEARD
        self.rank = 0  # among its siblings, when it was fed
        self.copy: Copy | None = None
        self.mask: Mask | None = None
        self.children: dict[int, Node] = {}
        self.said: tuple[tuple[Sequence[int], Sequence[float]], ...] = ()  # not yet looked at
        self.candidates = NOTHING  # probabilities, by what has been looked at
        self.waiting: Waiting = []


class Cells:
    """Where rows that are not verified are kept: in their position's own cell, or in a loose one.

    The cells of positions come first, ``capacity`` of them, then ``loose`` ones.
    """

    def __init__(self, capacity: int, loose: int) -> None:
        self._capacity = capacity
        self._loose = list(range(capacity + loose - 1, capacity - 1, -1))
        self._own: set[int] = set()

    def take(self, position: int) -> int | None:
        """Return a free cell for a row at ``position``, None if all are taken."""
        if position not in self._own:
            self._own.add(position)
            return position
        return self._loose.pop() if self._loose else None

    def give(self, cell: int) -> None:
        """Take back a cell whose row is dead, or has moved."""
        if cell < self._capacity:
            self._own.discard(cell)
        else:
            self._loose.append(cell)

    def keep(self, node: Node) -> tuple[int, int] | None:
        """Let a verified row have its position's own cell; return (from, to) if it must move."""
        cell, position = node.cell, node.position
        if cell == position:
            self._own.discard(position)  # no other row will ever stand there
            return None
        self._loose.append(cell)
        return cell, position


class Tree:
    """The nodes under one sequence's root, which is its newest verified token.

    ``depth`` P is after how many waves a row's verdict comes. ``copies`` finds what followed the
    same tokens before; without it only heads have candidates. Rows at ``end`` or later are of no
    use. ``masks`` tells what may follow the tokens from below the root to a node; what it does not
    permit is no candidate.
    """

    def __init__(
        self,
        root: Node,
        end: int,
        depth: int,
        cells: Cells,
        copies: CopyIndex | None,
        masks: Masks | None = None,
    ) -> None:
        self.root = root
        self._masks = masks
        self._worth = [max(1, depth - age) / max(1, depth - 1) for age in range(depth)]
        self.nodes: dict[int, Node] = {root.id: root}  # fed and alive, parents before children
        self._end = end
        self._cells = cells
        self._copies = copies
        self._look_up(root)

    def offers(self, wave: int) -> Iterator[tuple[float, Node]]:
        """Yield unfed nodes and their values for ``wave``, the most valuable first.

        The value counts the waves that a row saves if it is on the true path, where 1 is what the
        child of a row of the wave before saves. A node that is wanted has to be fed before the
        next is asked for; what it leads to then follows.
        """
        root = self.root
        if root.wave == UNFED:
            yield inf, root
            if root.wave == UNFED:
                return
        last = min(self._end, root.position + MAX_DEPTH) - 1  # whose children are of use no more
        oldest, worth = len(self._worth) - 1, self._worth
        heap: list[tuple[float, int, int, int, Node]] = []
        for node in self.nodes.values():
            parent = node.parent
            node.score = 1.0 if parent is None else parent.score * node.probability
            if node.score > FLOOR and node.position < last:
                node.worth = node.score * worth[min(wave - node.wave, oldest)]
                if node.said and node.children:  # whose scores come next
                    self._settle(node)
                if node.said:  # worth a look if its most probable child could be wanted
                    heap.append((-node.worth, node.position, -1, node.id, node))
                elif node.waiting:
                    heap.append(_first(node))
        heapify(heap)
        while heap and -heap[0][0] > FLOOR:
            value, position, token, _, parent = heap[0]
            fed: Node | None = None
            if parent.said:
                self._settle(parent)
            else:
                fed = Node(parent, position, token, -parent.waiting[-1][0])
                yield -value, fed
                if fed.wave == UNFED:
                    return
            if parent.waiting:
                heapreplace(heap, _first(parent))
            else:
                heappop(heap)
            if fed is not None and fed.waiting and position < last:
                fed.score = parent.score * fed.probability
                fed.worth = fed.score * worth[0]
                heappush(heap, _first(fed))

    def feed(self, node: Node, identity: int, wave: int, base: int) -> bool:
        """Give a node its place in ``wave``; return False if there is no cell for it.

        Nodes but the root come from ``offers``, and are fed at once.
        """
        cell = self._cells.take(node.position)
        if cell is None:
            return False
        node.id, node.cell, node.wave, node.base = identity, cell, wave, base
        parent = node.parent
        if parent is not None:
            parent.waiting.pop()
            node.rank = len(parent.children)
            parent.children[node.token] = node
            verified = base - (parent.position - len(parent.nodes))  # of the ancestors
            node.nodes = (*parent.nodes, parent.id)[verified:]
            node.cells = (*parent.cells, parent.cell)[verified:]
        self.nodes[identity] = node
        self._look_up(node)
        return True

    def hear(self, node: Node, level: int, tokens: Sequence[int], numbers: Sequence[float]) -> None:
        """Take what a head at ``level`` says of a node's children, if it is the deepest so far.

        ``numbers``: the probabilities of ``tokens``, and then the log of a copy's weight against
        the head's 1, by lookup.LENGTHS.
        """
        if level > node.level:
            node.level = level
            node.said = (*node.said, (tokens, numbers))

    def advance(self, token: int, identity: int) -> tuple[Node, list[Node]]:
        """Make the root's child with ``token`` the root; return it, and the fed nodes that die.

        A child that was not fed is made, with ``identity``.
        """
        old = self.root
        root = old.children.pop(token, None)
        if root is None:
            root = Node(None, old.position + 1, token, 1.0)
            root.id = identity
        dead = list(old.children.values())
        for node in dead:  # grows meanwhile
            dead += node.children.values()
            self._cells.give(node.cell)
            del self.nodes[node.id]
        self.nodes.pop(old.id, None)
        root.parent = None
        self.root = root
        return root, dead

    def mask(self, node: Node) -> Mask | None:
        """Return the mask of what follows a fed node, None where everything may."""
        if node.mask is None and self._masks is not None:
            node.mask = self._masks(self._branch(node))
        return node.mask

    def _settle(self, node: Node) -> None:
        """Work out a node's candidates from what heads have said since the last time.

        Fed children that a head does not name keep no more than it leaves over.
        """
        children = node.children
        for tokens, numbers in node.said:
            candidates = mixture(tokens, numbers, node.copy, node.candidates)
            if children:
                left = max(0.0, 1.0 - sum(candidates.values()))
                for token, child in children.items():
                    kept = min(child.probability, left)
                    child.probability = candidates.setdefault(token, kept)
            node.candidates = candidates
        node.said = ()
        mask = self.mask(node)
        node.waiting = [
            (-p, t)
            for t, p in node.candidates.items()
            if t not in children and (mask is None or permits(mask, t))
        ]
        node.waiting.sort(reverse=True)

    def _look_up(self, node: Node) -> None:
        """Let what followed the same tokens before wait as a candidate."""
        if self._copies is None:
            return
        parent = node.parent
        before = parent.copy if parent is not None else None
        if before is not None and before.token == node.token:
            node.copy = self._copies.following(before)
        if node.copy is None:
            node.copy = self._copies.find(self._branch(node))
        mask = None if node.copy is None else self.mask(node)
        if node.copy is not None and (mask is None or permits(mask, node.copy.token)):
            node.waiting = [(-CONFIDENCE[node.copy.slot], node.copy.token)]

    def _branch(self, node: Node) -> list[int]:
        """Return the tokens from below the root to a node."""
        tokens = []
        at: Node | None = node
        while at is not None and at is not self.root:
            tokens.append(at.token)
            at = at.parent
        return tokens[::-1]


def _first(parent: Node) -> tuple[float, int, int, int, Node]:
    """Return where the first waiting token stands among those of other nodes."""
    negated, token = parent.waiting[-1]
    return parent.worth * negated, parent.position + 1, token, parent.id, parent


def mixture(
    tokens: Sequence[int],
    numbers: Sequence[float],
    copy: Copy | None,
    before: Mapping[int, float] = NOTHING,
) -> dict[int, float]:
    """Return probabilities of what a head names (see Tree.hear), mixed with the copied token.

    As in ``lookup.mixed``. What earlier heads said ``before`` keeps a share of it all.
    """
    share = 1.0 - KEPT if before else 1.0
    mixed = {token: p * KEPT for token, p in before.items()}
    if copy is not None:
        weight = exp(numbers[len(tokens) + copy.slot])
        share /= 1.0 + weight
        mixed[copy.token] = mixed.get(copy.token, 0.0) + weight * share
    for token, p in zip(tokens, numbers, strict=False):
        mixed[token] = mixed.get(token, 0.0) + p * share
    return mixed
