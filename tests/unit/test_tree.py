"""Candidate trees and copies against slow definitions of both, on lives drawn at random."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ppsd.speculation import lookup
from ppsd.speculation.copies import TRIED, Copy, CopyIndex
from ppsd.speculation.lookup import LENGTHS, LONGEST, ODDS, Match
from ppsd.speculation.policy import Emit, Finish, Judged
from ppsd.speculation.tree import FLOOR, KEPT, UNFED, Cells, Node, mixture
from ppsd.speculation.waves import Part, Row, Verified, WavePolicy, choose

VOCAB = 5
CAPACITY = 40

tokens = st.integers(0, 3)
texts = st.lists(tokens, min_size=1, max_size=TRIED)
shares = st.lists(st.integers(0, 9), min_size=VOCAB, max_size=VOCAB)


@given(texts)
@example([0] * TRIED)
def test_without_a_branch_copies_are_those_of_lookup(text: list[int]) -> None:
    found = lookup.find(torch.tensor(text))
    copy = CopyIndex(text).find([])
    assert (copy and Match(copy.token, copy.length)) == found
    assert copy is None or found is None or (copy.slot, text[copy.place]) == (found.slot, found[0])


@given(texts, st.lists(tokens, max_size=LONGEST + 2))
@example([1, 1, 0, 1, 1, 2], [1, 1])
@example([0] * (LONGEST + TRIED), [])
def test_copies_of_a_branch_repeat_the_text_behind_which_it_stands(
    text: list[int], branch: list[int]
) -> None:
    tail = [*text, *branch][-LONGEST:]
    best = Copy(0, 0, 0)
    for place in range(1, len(text)):
        before = text[:place][::-1]
        pairs = zip(tail[::-1], before, strict=False)
        agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tail), place))
        if agreed and agreed >= best.length:
            best = Copy(place, text[place], agreed)
    assert CopyIndex(text).find(branch) == (best if best.length else None)


@given(texts, texts)
def test_an_index_that_grows_is_one_of_the_whole(text: list[int], more: list[int]) -> None:
    index = CopyIndex(text)
    for token in more:
        index.append(token)
    whole = CopyIndex([*text, *more])
    assert all(index.find([a, b]) == whole.find([a, b]) for a in range(4) for b in range(4))


def test_a_copy_goes_on_to_the_end_of_the_text() -> None:
    copies = CopyIndex([7, 8, 9, 7])
    assert (copy := copies.find([])) == Copy(1, 8, 1)
    assert (copy := copies.following(copy)) == Copy(2, 9, 2)
    assert (copy := copies.following(copy)) == Copy(3, 7, 3)
    assert copies.following(copy) is None
    assert copies.following(Copy(0, 7, LONGEST)) == Copy(1, 8, LONGEST)


@given(shares, tokens, st.sampled_from(LENGTHS))
def test_the_mixture_is_that_of_lookup(drawn: list[int], token: int, length: int) -> None:
    weights = torch.tensor(drawn, dtype=torch.float64) + 0.5
    probabilities = weights / weights.sum()
    expected = lookup.mixed(probabilities.log(), Match(token, length)).softmax(0)
    numbers = [*probabilities.tolist(), *ODDS.tolist()]
    found = mixture(range(VOCAB), numbers, Copy(0, token, length))
    assert [found[t] for t in range(VOCAB)] == pytest.approx(expected.tolist())
    assert mixture([4, 2], [0.5, 0.25, *ODDS.tolist()], None) == {4: 0.5, 2: 0.25}
    sure = mixture([4, 2], [0.5, 0.25, *[1e4] * len(ODDS)], Copy(0, 4, length))
    assert (sure[4], sure[2]) == (pytest.approx(1.0), pytest.approx(0.0))


class Life:
    """A request whose stages and heads are as ``data`` says, checked against what must hold.

    The target's next token is a function of the last two.
    """

    def __init__(self, data: st.DataObject, depth: int, rows: int, *, lookup: bool = True) -> None:
        self.data, self.depth, self.rows = data, depth, rows
        self.tokens = data.draw(st.lists(tokens, min_size=1, max_size=6))
        self.limit = data.draw(st.integers(1, 16))
        self.prompt = len(self.tokens)
        self.policy = WavePolicy(
            0,
            depth,
            max_tokens=self.limit,
            stop_ids=frozenset({VOCAB}),
            cells=Cells(CAPACITY, data.draw(st.integers(0, rows * depth))),
            lookup=lookup,
            epoch=5,
        )
        assert self.policy.epoch == 5
        self.policy.start(self.tokens, self.prompt - 1)
        feed = self.policy.chunk(1)
        assert feed is not None
        self.wave = 1
        self.flying: deque[tuple[int, list[Row]]] = deque()
        self.judged = self.policy.epoch  # node
        self.beliefs: dict[int, dict[int, float]] = {}  # of a node's children
        self.take(self.policy.on(Judged(feed.epoch, feed.block, 0, (self.target(),), 0)))

    def target(self) -> int:
        """Return the token that follows, and let it follow."""
        a, b = self.tokens[-2:] if len(self.tokens) > 1 else (0, self.tokens[0])
        self.tokens.append((2 * a + b + len(self.tokens) % 2) % 4)
        return self.tokens[-1]

    def take(self, commands: list) -> None:
        for command in commands:
            if isinstance(command, Finish):
                assert self.policy.emitted == self.limit
            else:
                assert isinstance(command, Emit)

    def hear(self) -> None:
        """Let heads speak of some nodes."""
        for identity, node in list(self.policy.tree.nodes.items()):
            if self.data.draw(st.booleans()):
                drawn = self.data.draw(shares)
                named = sorted(range(VOCAB), key=lambda t: (-drawn[t], t))[: max(drawn[:2])]
                numbers = [drawn[t] / (sum(drawn) + 1) for t in named]
                level = self.data.draw(st.integers(0, 2))
                if level > node.level:
                    self.believe(node, dict(zip(named, numbers, strict=True)))
                self.policy.hear(identity, level, named, [*numbers, *ODDS.tolist()])
                assert node.level >= level

    def believe(self, node: Node, said: dict[int, float]) -> None:
        """Take what a head says, without any copies, as a tree does."""
        old = self.beliefs.get(node.id, {})
        new = {t: KEPT * old.get(t, 0.0) + (1 - KEPT) * said.get(t, 0.0) for t in old | said}
        self.beliefs[node.id] = new if old else said

    def score(self, node: Node) -> float:
        if node is self.policy.tree.root or node.parent is None:
            return 1.0
        return self.score(node.parent) * self.beliefs[node.parent.id][node.token]

    def worth(self, age: int) -> float:
        return max(1, self.depth - age) / (self.depth - 1)

    def offers(self, wave: int) -> list[tuple[float, int, int]]:
        """Return values, positions and tokens of all rows that may be fed, the best first."""
        end = self.prompt + self.limit - 1
        return sorted(
            (-value, node.position + 1, token)
            for node in self.policy.tree.nodes.values()
            for token, p in self.beliefs.get(node.id, {}).items()
            if self.score(node) > FLOOR
            and (value := self.score(node) * p * self.worth(wave - node.wave)) > FLOOR
            and token not in node.children
            and node.position + 1 < end
        )

    def feed(self) -> list[Node]:
        self.wave += 1
        chosen = choose([self.policy], self.rows, self.wave)
        nodes = [node for _, node in chosen]
        if nodes:
            part, rows = self.policy.part(nodes)
            self.check_rows(part, nodes, rows)
            self.flying.append((self.wave, rows))
        return nodes

    def check_rows(self, part: Part, nodes: list[Node], rows: list[Row]) -> None:
        root = self.policy.tree.root
        assert part.length in (root.position, root.position + 1)
        for node, row in zip(nodes, rows, strict=True):
            path = []
            at = node.parent
            while at is not None and at.position >= part.length:
                path.insert(0, at)
                at = at.parent
            assert row[:2] == (0, node.id)
            assert row[3:6] == (node.position, node.token, node.cell)
            assert row.nodes == tuple(n.id for n in path)
            assert row.cells == tuple(n.cell for n in path)
            assert node is root or node.parent is not None
            assert node.position < self.prompt + self.limit - 1 or node is root

    def check_tree(self) -> None:
        tree = self.policy.tree
        cells = [node.cell for node in tree.nodes.values() if node is not tree.root]
        own = {tree.root.position, *cells}  # a verified row moves to its position's own cell
        assert len(own) == len(cells) + 1
        for identity, node in tree.nodes.items():
            assert node.id == identity
            assert node.wave != UNFED
            assert node.cell == node.position or node.cell >= CAPACITY
            at: Node | None = node
            while at is not tree.root:
                assert at is not None
                assert at.parent is not None
                assert at.parent.children[at.token] is at
                assert at.parent.id in tree.nodes
                at = at.parent
        assert self.policy.tokens(0, self.policy.committed) == self.tokens[: self.policy.committed]
        assert sum(self.policy.waves.values()) == len(tree.nodes)

    def answer(self) -> None:
        """Judge the oldest wave as the last stage does."""
        _, rows = self.flying.popleft()
        nodes, said = [], []
        following = {(row.parent, row.token): row.node for row in rows}
        while (node := following.get((self.judged, self.tokens[-1]))) is not None:
            nodes.append(node)
            self.judged = node
            said.append(self.target())
        if nodes:
            self.take(self.policy.on(Verified(tuple(nodes), tuple(said))))

    def live(self) -> None:
        for _ in range(500):
            if self.policy.finished:
                break
            self.hear()
            self.feed()
            self.check_tree()
            full = len(self.policy.waves) >= self.depth
            if self.flying and (full or self.data.draw(st.booleans())):
                self.answer()
                if not self.policy.finished:
                    self.check_tree()
        assert self.policy.finished


@given(st.data(), st.integers(2, 4), st.integers(1, 6), st.booleans())
@settings(max_examples=80)
def test_a_request_says_what_the_target_says(
    data: st.DataObject, depth: int, rows: int, lookup: bool
) -> None:
    life = Life(data, depth, rows, lookup=lookup)
    life.live()
    counts = life.policy.counts
    assert counts.drafted == counts.judged + counts.discarded
    assert counts.accepted + counts.resyncs == counts.judged
    assert sum(counts.ranks.values()) == sum(counts.levels.values()) == counts.accepted
    assert sum(counts.right) == counts.accepted
    assert sum(counts.stated) >= counts.judged
    assert all(right <= stated for right, stated in zip(counts.right, counts.stated, strict=True))


def test_a_loose_cell_is_free_again_once_its_row_has_moved() -> None:
    cells = Cells(8, loose=1)
    assert [cells.take(3) for _ in range(3)] == [3, 8, None]
    node = Node(None, 3, 0, 1.0)
    node.cell = 8
    assert cells.keep(node) == (8, 3)
    assert [cells.take(4) for _ in range(3)] == [4, 8, None]


@given(st.data(), st.integers(1, 6))
@settings(max_examples=200)
def test_the_most_valuable_rows_are_fed(data: st.DataObject, rows: int) -> None:
    life = Life(data, 4, rows, lookup=False)
    while not life.policy.finished and life.wave < 5:
        life.hear()
        offered, root = life.offers(life.wave + 1), life.policy.tree.root
        certain = root.wave == UNFED
        drafts = [node for node in life.feed() if node is not root]
        found = [(node.position, node.token) for node in drafts]
        assert found == [row[1:] for row in offered[: rows - certain][: len(found)]]
        if life.wave > 3:
            life.answer()
