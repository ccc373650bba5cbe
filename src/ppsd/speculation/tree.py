"""A candidate tree: what may follow the newest verified token, and where its rows are kept.

Pure, for the wave policy (waves.py). Scores are probabilities that a node is on the true path,
given its root: the product of the probabilities along the way.

It runs between two passes of the first stage, so it does little: tokens become nodes when they are
fed, and what a head said is looked at when it could matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp

from ppsd.speculation.copies import Copy, CopyIndex
from ppsd.speculation.lookup import CONFIDENCE
from ppsd.speculation.masks import Mask, Masks, permits

CANDIDATES = 8  # of a head for each row: more are hardly ever fed
UNFED = 0
MAX_DEPTH = 64  # levels below the root
KEPT = 0.3  # what earlier heads weigh against a deeper one: together they are right more often
SUREST = 50.0  # log odds at which a copy has all but 1e-21 of the probability
FLOOR = 0.002  # a row worth less is not worth its message
UNHEARD = -1  # no head has spoken of a node's children yet

NOTHING: Mapping[int, float] = {}

Waiting = list[tuple[float, int]]  # negated probabilities and tokens, the first of them last

# The negated value of a node's best unfed child, the request's index, and what decides among
# equals: position, token, the node's id. Then the node.
Offer = tuple[float, int, int, int, int, "Node"]


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
        self._last = min(end, root.position + MAX_DEPTH) - 1  # whose children are of use no more
        self._cells = cells
        self._copies = copies
        self._look_up(root)

    def offers(self, wave: int, index: int) -> list[Offer]:
        """Return the best unfed child of every fed node that has one of use, for ``wave``.

        The value counts the waves that a row saves if it is on the true path, where 1 is what the
        child of a row of the wave before saves. ``index`` goes into the offers. Nothing follows a
        root that is not fed.
        """
        offers: list[Offer] = []
        if self.root.wave == UNFED:
            return offers
        worth, oldest = self._worth, len(self._worth) - 1
        for node in self.nodes.values():
            parent = node.parent
            node.score = score = 1.0 if parent is None else parent.score * node.probability
            if score > FLOOR:
                age = wave - node.wave
                node.worth = score * worth[age if age < oldest else oldest]
                if node.said and node.children:  # whose scores come next
                    self.settle(node)
                if (offer := self.offer(node, index)) is not None:
                    offers.append(offer)
        return offers

    def offer(self, node: Node, index: int) -> Offer | None:
        """Return the best unfed child of a fed node, None if there is none of use.

        While a head has spoken that is not settled, any token might be the best.
        """
        if node.position >= self._last:
            return None
        if node.said:
            negated, token = -1.0, -1
        elif node.waiting:
            negated, token = node.waiting[-1]
        else:
            return None
        value = node.worth * negated
        return (value, index, node.position + 1, token, node.id, node) if value < -FLOOR else None

    def feed(self, parent: Node | None, identity: int, wave: int, base: int) -> Node | None:
        """Give the best unfed child of a node, or the root, its place in ``wave``.

        Return None if there is no cell for it.
        """
        root = self.root
        cell = self._cells.take(root.position if parent is None else parent.position + 1)
        if cell is None:
            return None
        node = root if parent is None else self._sprout(parent, base)
        node.id, node.cell, node.wave, node.base = identity, cell, wave, base
        self.nodes[identity] = node
        self._look_up(node)
        return node

    def _sprout(self, parent: Node, base: int) -> Node:
        """Make a node of the best unfed child of a node."""
        negated, token = parent.waiting.pop()
        node = Node(parent, parent.position + 1, token, -negated)
        node.score = parent.score * node.probability
        node.worth = node.score * self._worth[0]
        node.rank = len(parent.children)
        parent.children[token] = node
        verified = base - (parent.position - len(parent.nodes))  # of the ancestors
        node.nodes = (*parent.nodes, parent.id)[verified:]
        node.cells = (*parent.cells, parent.cell)[verified:]
        return node

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
        del self.nodes[old.id]
        root.parent = None
        self.root = root
        self._last = min(self._end, root.position + MAX_DEPTH) - 1
        return root, dead

    def mask(self, node: Node) -> Mask | None:
        """Return the mask of what follows a fed node, None where everything may."""
        if node.mask is None and self._masks is not None:
            node.mask = self._masks(self._branch(node))
        return node.mask

    def settle(self, node: Node) -> None:
        """Work out a node's candidates from what heads have said since the last time.

        Fed children are among them: each was a copy, or one that an earlier head named.
        """
        children = node.children
        for tokens, numbers in node.said:
            node.candidates = mixture(tokens, numbers, node.copy, node.candidates)
            for token, child in children.items():
                child.probability = node.candidates[token]
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
        copy = None
        if before is not None and before.token == node.token:
            copy = self._copies.following(before)
        if copy is None:
            copy = self._copies.find(self._branch(node))
        if copy is None:
            return
        node.copy, mask = copy, self.mask(node)
        if mask is None or permits(mask, copy.token):
            node.waiting = [(-CONFIDENCE[copy.slot], copy.token)]

    def _branch(self, node: Node) -> list[int]:
        """Return the tokens from below the root to a node."""
        tokens = []
        at: Node | None = node
        while at is not None and at is not self.root:
            tokens.append(at.token)
            at = at.parent
        return tokens[::-1]


def mixture(
    tokens: Sequence[int],
    numbers: Sequence[float],
    copy: Copy | None,
    before: Mapping[int, float] = NOTHING,
) -> dict[int, float]:
    """Return probabilities of what a head names (see Tree.hear), mixed with the copied token.

    As in ``lookup.mixed``. What earlier heads said ``before`` keeps a share of it all.
    """
    if copy is None and not before:
        return dict(zip(tokens, numbers, strict=False))
    share = 1.0 - KEPT if before else 1.0
    mixed = {token: p * KEPT for token, p in before.items()}
    if copy is not None:
        weight = exp(min(numbers[len(tokens) + copy.slot], SUREST))
        share /= 1.0 + weight
        mixed[copy.token] = mixed.get(copy.token, 0.0) + weight * share
    for token, p in zip(tokens, numbers, strict=False):
        mixed[token] = mixed.get(token, 0.0) + p * share
    return mixed
