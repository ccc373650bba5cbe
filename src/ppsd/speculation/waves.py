"""The wave policy: many rows of a candidate tree in flight, chosen by value.

A pure state machine like policy.py, which feeds a chain. The engine asks it what to feed whenever
stage 0 is free, so what an answer has changed by then counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from ppsd.errors import ConfigError, ProtocolError
from ppsd.speculation.copies import CopyIndex
from ppsd.speculation.masks import Mask, Masks
from ppsd.speculation.policy import UNVERIFIED, Command, Counts, Emit, Feed, Finish, Judged
from ppsd.speculation.tree import UNFED, Cells, Node, Offer, Tree

TENTHS = 10  # of a probability, in which counts tell stated and true ones apart


class Row(NamedTuple):
    """A row of a wave: ``token`` at ``position`` of a slot, whose keys and values go to ``cell``.

    ``nodes`` and ``cells`` are those of its ancestors that the part's ``length`` leaves out, in
    order of position. ``parent`` is the node before it, verified or not.
    """

    slot: int
    node: int
    parent: int
    position: int
    token: int
    cell: int
    nodes: tuple[int, ...]
    cells: tuple[int, ...]


class Part(NamedTuple):
    """What a stage must know of a slot before it runs a wave's rows.

    ``root`` is the newest verified node as rank 0 knew it. The first ``length`` rows are verified,
    and lie in their positions' own cells once ``moves`` (from, to) have been made.
    """

    slot: int
    root: int
    length: int
    moves: tuple[tuple[int, int], ...]


class Verified(NamedTuple):
    """The target's ``tokens`` after the nodes ``nodes``, each of which is the root in its turn."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass
class WaveCounts(Counts):
    """Counts of a request decoded in waves.

    ``opinions``: heard of live nodes from later heads. ``ranks`` and ``levels``: how many right
    drafts were fed as the first, second, … of their siblings, and which stage's head spoke last of
    their parent (-1: lookup alone). ``stated``: how many judged rows had so many tenths of
    probability among their siblings, and ``right``: how many of them were.
    """

    opinions: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    levels: dict[int, int] = field(default_factory=dict)
    stated: list[int] = field(default_factory=lambda: [0] * TENTHS)
    right: list[int] = field(default_factory=lambda: [0] * TENTHS)


class WavePolicy:
    """One request's decoding by a candidate tree, at most ``depth`` waves in flight.

    ``depth`` is the number of stages. ``epoch`` is the newest root that fed rows died for: a row
    lives if it is that node or descends from it. It only grows, and node ids with it, over all
    requests of a slot, so late answers to an older request mean nothing.

    ``restarted``: the last verdict left the pipeline empty. ``held``: so many rows lie verified in
    their own cells on every stage. ``masks`` tells what may follow an answer so far.
    """

    def __init__(
        self,
        slot: int,
        depth: int,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        cells: Cells,
        lookup: bool = True,
        epoch: int = 1,
        prefill_chunk: int = 128,
        masks: Masks | None = None,
    ) -> None:
        self.slot = slot
        self._masks = masks
        self.epoch = epoch
        self.counts = WaveCounts()
        self.finished = False
        self.restarted = False
        self.held = 0
        self.waves: dict[int, int] = {}  # rows, or a piece of the prompt, in flight by wave
        self._depth = depth
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._cells = cells
        self._lookup = lookup
        self._chunk = prefill_chunk
        self.paused = False
        self._tokens: list[int] = []  # committed
        self._prompt = 0
        self._fed = 0  # prompt tokens that entered stage 0
        self._blocks: deque[tuple[int, int, int]] = deque()  # (position, judged, wave) in flight
        self._newest = epoch  # node id
        self._before = epoch  # the root before this one
        self._moves: list[tuple[int, int]] = []  # to be told with the next wave
        self._copies: CopyIndex | None = None

    def start(self, prompt: Sequence[int], cached: int = 0) -> list[Command]:
        """Begin with ``prompt``, of which the pipeline already holds the first ``cached`` rows."""
        if not 0 <= cached < len(prompt):
            raise ConfigError("cached", cached, f"in [0, {len(prompt) - 1}] for this prompt")
        self._tokens = list(prompt)
        self._prompt = length = len(prompt)
        self._fed = self.held = cached
        self._copies = CopyIndex(prompt) if self._lookup else None
        root = Node(None, length - 1, prompt[-1], 1.0)
        root.id, root.base, root.cell = self.epoch, length, length - 1
        end = length + self._max_tokens - 1
        masks = None if self._masks is None else self._mask_after
        self.tree = Tree(root, end, self._depth, self._cells, self._copies, masks)
        return []

    @property
    def emitted(self) -> int:
        """Count the tokens committed so far."""
        return len(self._tokens) - self._prompt

    @property
    def committed(self) -> int:
        """Return how many tokens are final, the prompt's among them."""
        return len(self._tokens)

    def tokens(self, first: int, end: int) -> list[int]:
        """Return the committed tokens at positions from ``first`` to below ``end``."""
        return self._tokens[first:end]

    def branch(self, node: int) -> list[int] | None:
        """Return the tokens behind the committed ones that lead to a node; None if it is dead."""
        at: Node | None = self.tree.nodes.get(node)
        if at is None:
            return None
        tokens = []
        while at is not None and at is not self.tree.root:
            tokens.append(at.token)
            at = at.parent
        return tokens[::-1]

    def pause(self) -> None:
        """Go on as plain decoding; what is under way is still judged."""
        self.paused = True

    def resume(self) -> None:
        """Feed drafts again."""
        self.paused = False

    def stop(self, reason: str) -> list[Command]:
        """End the request now, for a reason the policy cannot see (stop string, client gone)."""
        return [] if self.finished else [self._finish(reason)]

    def chunk(self, wave: int) -> Feed | None:
        """Return the next piece of the prompt, as wave ``wave``; None if all is fed or in flight.

        Chunks end at multiples of the chunk size, so equal prompts give equal shapes.
        """
        if self.finished or self._fed == self._prompt:
            return None
        position = self._fed
        end = min(self._prompt, (position // self._chunk + 1) * self._chunk)
        last = end == self._prompt
        self._fed = end
        self._blocks.append((position, int(last), wave))
        self.waves[wave] = 1
        if last:
            self.tree.root.wave = wave
        tokens = tuple(self._tokens[position:end])
        return Feed(self.epoch, position, tokens, position, int(last), True, last, UNVERIFIED)

    def certain(self) -> bool:
        """Return True if the root is to be fed."""
        return not self.finished and self._fed == self._prompt and self.tree.root.wave == UNFED

    def offers(self, wave: int, index: int) -> list[Offer]:
        """Return the drafts that may go into a wave (see Tree.offers)."""
        return [] if self.finished or self.paused else self.tree.offers(wave, index)

    def feed(self, parent: Node | None, wave: int) -> Node | None:
        """Put the root, or the best unfed child of a node, into a wave; None for want of a cell."""
        tree, counts = self.tree, self.counts
        root = tree.root
        base = root.position + (root.wave not in (UNFED, wave))
        node = tree.feed(parent, root.id if parent is None else self._newest + 1, wave, base)
        if node is None:
            return None
        if parent is None:
            self._cells.keep(node)
        else:
            self._newest += 1
            counts.drafted += 1
        counts.rows += 1
        self.waves[wave] = self.waves.get(wave, 0) + 1
        return node

    def part(self, nodes: Sequence[Node]) -> tuple[Part, list[Row]]:
        """Return the nodes fed to a wave as the stages see them; moves are told once."""
        root, base = self.tree.root, nodes[0].base
        moves, self._moves = tuple(self._moves), []
        rows = [
            Row(
                self.slot,
                node.id,
                self._before if node.parent is None else node.parent.id,
                node.position,
                node.token,
                node.cell,
                node.nodes,
                node.cells,
            )
            for node in nodes
        ]
        return Part(self.slot, root.id, base, moves), rows

    def masks(self, nodes: Sequence[Node]) -> list[Mask | None]:
        """Return what may follow fed nodes (see Tree.mask)."""
        return [self.tree.mask(node) for node in nodes]

    def _mask_after(self, branch: Sequence[int]) -> Mask:
        assert self._masks is not None
        return self._masks([*self._tokens[self._prompt :], *branch])

    def hear(self, node: int, level: int, tokens: Sequence[int], numbers: Sequence[float]) -> None:
        """Take what a head says of a node's children (see Tree.hear); of dead nodes nothing."""
        found = self.tree.nodes.get(node)
        if found is not None and not self.finished:
            self.counts.opinions += level > 0
            self.tree.hear(found, level, tokens, numbers)

    def on(self, event: Judged | Verified) -> list[Command]:
        """Take verdicts; return what they make final. Old ones mean nothing."""
        if self.finished:
            return []
        if isinstance(event, Verified):
            return self._commit(event.nodes, event.tokens)
        if event.epoch != self.epoch:
            return []
        *expected, wave = self._blocks.popleft() if self._blocks else (None, None, 0)
        if expected != [event.block, len(event.tokens)]:
            raise ProtocolError(
                f"verdict for {len(event.tokens)} tokens of block {event.block} does not answer "
                f"the oldest block in flight {expected}"
            )
        if event.tokens:
            return self._commit((self.tree.root.id,), event.tokens)
        del self.waves[wave]
        return []

    def _commit(self, nodes: Sequence[int], tokens: Sequence[int]) -> list[Command]:
        emitted: list[int] = []
        accepted, end = 0, ""
        for node, token in zip(nodes, tokens, strict=True):
            if node != self.tree.root.id:
                break
            accepted += self._advance(token)
            emitted.append(token)
            if token in self._stop_ids:
                end = "stop"
            elif self.emitted == self._max_tokens:
                end = "length"
            if end:
                break
        if not emitted:
            return []
        self.restarted = not self.waves
        commands: list[Command] = [Emit(tuple(emitted), accepted)]
        return [*commands, self._finish(end)] if end else commands

    def _advance(self, token: int) -> bool:
        """Make the target's token the root; return True if it had been fed."""
        tree, counts = self.tree, self.counts
        old = tree.root
        self._leave(old)
        self._before = old.id
        self.held = max(self.held, old.base)
        tried = bool(old.children)
        child = old.children.get(token)
        for sibling in old.children.values():
            tenth = min(TENTHS - 1, int(TENTHS * sibling.probability))
            counts.stated[tenth] += 1
            counts.right[tenth] += sibling is child
        if child is None:
            self._newest += 1
        root, dead = tree.advance(token, self._newest)
        for node in dead:
            self._leave(node)
        if dead:
            self.epoch = root.id
        counts.judged += tried
        counts.accepted += child is not None
        counts.discarded += len(dead) - (tried and child is None)
        counts.resyncs += tried and child is None
        if child is not None:
            counts.ranks[child.rank] = counts.ranks.get(child.rank, 0) + 1
            counts.levels[old.level] = counts.levels.get(old.level, 0) + 1
            if (move := self._cells.keep(child)) is not None:
                self._moves.append(move)
        self._tokens.append(token)
        if self._copies is not None:
            self._copies.append(token)
        return child is not None

    def _leave(self, node: Node) -> None:
        """Note that a fed node no longer waits for its verdict."""
        left = self.waves.get(node.wave, 0) - 1
        if left > 0:
            self.waves[node.wave] = left
        else:
            self.waves.pop(node.wave, None)

    def _finish(self, reason: str) -> Finish:
        self.finished = True
        tree = self.tree
        for node in tree.nodes.values():
            if node is not tree.root:
                self._cells.give(node.cell)
                self.counts.discarded += 1
        self.epoch = self._newest = self._newest + 1
        self.waves.clear()
        self._blocks.clear()
        return Finish(reason)


def choose(
    policies: Sequence[WavePolicy], rows: int, wave: int, costs: Sequence[float] = ()
) -> list[tuple[WavePolicy, Node]]:
    """Feed a wave the most valuable nodes of all sequences; return them.

    Certain rows come first and are not counted; drafts follow while there are fewer than ``rows``
    rows, and while each raises the wave's value over its time, which ``costs`` has for 1, 2, …
    rows. Equal values go to the policy that comes first.
    """
    fed = []
    for policy in policies:
        if policy.certain() and (root := policy.feed(None, wave)) is not None:
            fed.append((policy, root))
    if len(fed) >= rows:
        return fed
    heap = [offer for i, policy in enumerate(policies) for offer in policy.offers(wave, i)]
    heapify(heap)
    worth = float(len(fed))  # of the rows so far
    while heap and len(fed) < rows:
        value, index, *_, parent = heappop(heap)
        policy, offering = policies[index], [parent]
        if parent.said:
            policy.tree.settle(parent)
        elif not _pays(worth, -value, len(fed), costs):
            break
        elif (node := policy.feed(parent, wave)) is not None:
            fed.append((policy, node))
            worth -= value
            offering.append(node)
        else:  # its cells are taken
            heap = [offer for offer in heap if offer[1] != index]
            heapify(heap)
            continue
        for node in offering:
            if (offer := policy.tree.offer(node, index)) is not None:
                heappush(heap, offer)
    return fed


def _pays(worth: float, gain: float, rows: int, costs: Sequence[float]) -> bool:
    """Return True if one more row raises the value of a wave of ``rows`` rows over its time."""
    if not rows or rows >= len(costs):
        return True
    return (worth + gain) * costs[rows - 1] >= worth * costs[rows]
