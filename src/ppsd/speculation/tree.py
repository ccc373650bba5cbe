"""A candidate tree: what may follow the newest verified token, and where its rows are kept.

Pure, for the wave policy (waves.py). Scores are probabilities that a node is on the true path,
given its root: the product of the probabilities along the way.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from math import exp, inf

from ppsd.speculation.copies import Copy, CopyIndex
from ppsd.speculation.lookup import CONFIDENCE

UNFED = 0
MAX_DEPTH = 64  # levels below the root
FLOOR = 0.002  # a row worth less is not worth its message
UNHEARD = -1  # no head has spoken of a node's children yet

Said = Sequence[tuple[int, float]]  # a head's candidates for a node's children: token, probability


class Node:
    """A token that may come at ``position``, after its parent's.

    ``probability`` is that of the token given the parent. ``wave`` numbers the wave that its row
    went into, UNFED before; then ``id``, ``cell`` and ``base`` (the verified rows of that wave)
    hold. ``children`` have been fed, ``waiting`` have not: the most probable is the last.
    """

    __slots__ = (
        "base",
        "cell",
        "children",
        "copy",
        "id",
        "level",
        "parent",
        "position",
        "probability",
        "rank",
        "token",
        "waiting",
        "wave",
    )

    def __init__(self, parent: Node | None, position: int, token: int, probability: float) -> None:
        self.parent, self.position, self.token = parent, position, token
        self.probability = probability
        self.id = self.cell = self.base = -1
        self.wave = UNFED
        self.level = UNHEARD
        self.rank = 0  # among its siblings, when it was fed
        self.copy: Copy | None = None
        self.children: dict[int, Node] = {}
        self.waiting: list[Node] = []

    def child(self, token: int) -> Node | None:
        """Return the child with a token, fed or waiting."""
        found = self.children.get(token)
        if found is None:
            found = next((node for node in self.waiting if node.token == token), None)
        return found


def _order(node: Node) -> tuple[float, int]:
    return node.probability, -node.token


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
    use.
    """

    def __init__(
        self, root: Node, end: int, depth: int, cells: Cells, copies: CopyIndex | None
    ) -> None:
        self.root = root
        self.nodes: dict[int, Node] = {root.id: root}  # fed and alive
        self._end = end
        self._depth = depth
        self._cells = cells
        self._copies = copies

    def offers(self, wave: int) -> Iterator[tuple[float, Node]]:
        """Yield unfed nodes and their values for ``wave``, the most valuable first.

        The value counts the waves that a row saves if it is on the true path. A node that is
        wanted has to be fed before the next is asked for; what it leads to then follows.
        """
        root, most = self.root, self._depth / max(1, self._depth - 1)
        end = min(self._end, root.position + MAX_DEPTH)
        heap: list[tuple[float, int, int, int, float, Node]] = []
        pushed = count()  # nodes themselves have no order

        def push(key: float, score: float, node: Node) -> None:
            heappush(heap, (key, node.position, node.token, next(pushed), score, node))

        def expand(node: Node, score: float) -> None:
            for child in node.children.values():
                reach = score * child.probability
                if reach > FLOOR:
                    push(-reach * most, reach, child)
            offer(node, score)

        def offer(node: Node, score: float) -> None:
            if node.level == UNHEARD and node.copy is None:
                self._copy(node)
            if node.waiting:
                child = node.waiting[-1]
                reach = score * child.probability
                value = reach * (self._depth - (wave - node.wave)) / max(1, self._depth - 1)
                if value > FLOOR and child.position < end:
                    push(-value, reach, child)

        if root.wave == UNFED:
            yield inf, root
            if root.wave == UNFED:
                return
        expand(root, 1.0)
        while heap:
            value, *_, score, node = heappop(heap)
            if node.wave == UNFED:
                yield -value, node
                parent = node.parent
                if node.wave == UNFED or parent is None:
                    return
                offer(parent, score / node.probability)
            expand(node, score)

    def feed(self, node: Node, identity: int, wave: int, base: int) -> bool:
        """Give a node its place in ``wave``; return False if there is no cell for it."""
        cell = self._cells.take(node.position)
        if cell is None:
            return False
        node.id, node.cell, node.wave, node.base = identity, cell, wave, base
        parent = node.parent
        if parent is not None and node is not self.root:
            node.rank = len(parent.children)
            parent.waiting.remove(node)
            parent.children[node.token] = node
        self.nodes[identity] = node
        return True

    def hear(self, node: Node, level: int, said: Said, odds: Sequence[float]) -> None:
        """Take the candidates (token, probability) that a head at ``level`` has for a node.

        A deeper head knows better. What it does not name keeps no more than it leaves over.
        ``odds`` [LENGTHS]: the log of a copy's weight against the head's 1, by length.
        """
        if level <= node.level:
            return
        if node.copy is None:
            self._look_up(node)
        candidates = mixture(said, node.copy, odds)
        left = max(0.0, 1.0 - sum(candidates.values()))
        known = {child.token: child for child in (*node.waiting, *node.children.values())}
        for token, child in known.items():
            child.probability = candidates.pop(token, min(child.probability, left))
        node.waiting += [Node(node, node.position + 1, t, p) for t, p in candidates.items()]
        node.waiting.sort(key=_order)
        node.level = level

    def advance(self, token: int, identity: int) -> tuple[Node, list[Node]]:
        """Make the root's child with ``token`` the root; return it, and the fed nodes that die.

        A child that nobody thought of is made, with ``identity``.
        """
        old = self.root
        root = old.child(token)
        if root is None:
            root = Node(old, old.position + 1, token, 1.0)
        if root.wave == UNFED:
            root.id = identity
        dead: list[Node] = []
        pending = [child for child in old.children.values() if child is not root]
        while pending:
            node = pending.pop()
            dead.append(node)
            pending += node.children.values()
        for node in dead:
            self._cells.give(node.cell)
            del self.nodes[node.id]
        self.nodes.pop(old.id, None)
        root.parent = None
        self.root = root
        return root, dead

    def _copy(self, node: Node) -> None:
        """Let what followed the same tokens before wait as a candidate."""
        self._look_up(node)
        if node.copy is not None:
            probability = CONFIDENCE[node.copy.slot]
            insort(
                node.waiting,
                Node(node, node.position + 1, node.copy.token, probability),
                key=_order,
            )

    def _look_up(self, node: Node) -> None:
        if self._copies is None:
            return
        parent = node.parent
        before = parent.copy if parent is not None else None
        if before is not None and before.token == node.token:
            node.copy = self._copies.following(before)
        if node.copy is None:
            node.copy = self._copies.find(self._branch(node))

    def _branch(self, node: Node) -> list[int]:
        """Return the tokens from below the root to a node."""
        tokens = []
        at: Node | None = node
        while at is not None and at is not self.root:
            tokens.append(at.token)
            at = at.parent
        return tokens[::-1]


def mixture(said: Said, copy: Copy | None, odds: Sequence[float]) -> dict[int, float]:
    """Return probabilities of a head's candidates, mixed with the token that was copied.

    As in ``lookup.mixed``.
    """
    if copy is None:
        return dict(said)
    weight = exp(odds[copy.slot])
    mixed = {token: p / (1.0 + weight) for token, p in said}
    mixed[copy.token] = mixed.get(copy.token, 0.0) + weight / (1.0 + weight)
    return mixed
