"""What the live page draws: the engine's events as waves, trees and verdicts.

A node is a token at a position, after its parent's. Rows of a chain have no names of their own, so
their positions name them: of each there is one alive. Times are milliseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from ppsd.engine.events import Event, FedBlock, FedRows, Left, Made

Json = dict[str, Any]
TRAIL = 12  # newest verified tokens that a page is told when it comes
MS = 1e-6


class Drawn(NamedTuple):
    """A node as a page knows it; ``parent`` 0 stands for one that nobody saw."""

    id: int
    parent: int
    position: int
    token: int


@dataclass
class Track:
    """The tree of one slot; ``alive`` has its nodes by the names that rows use, parents first."""

    root: Drawn | None = None
    alive: dict[int, Drawn] = field(default_factory=dict)
    trail: deque[tuple[int, bool]] = field(default_factory=lambda: deque(maxlen=TRAIL))
    wave: int = 0  # of the newest block
    prompted: bool = False  # the whole prompt has been fed

    def child(self, position: int, token: int) -> tuple[int, Drawn] | None:
        """Return the root's child with a token, and its name."""
        parents = (0, self.root.id) if self.root else (0,)
        for name, node in self.alive.items():
            if (node.position, node.token) == (position, token) and node.parent in parents:
                return name, node
        return None

    def grow(self, name: int, node: Drawn) -> list[int]:
        """Make a node the root; return the nodes that die."""
        kept, before = {node.id}, self.root
        self.root, alive, dead = node, {name: node}, []
        for key, each in self.alive.items():
            if each.parent in kept:
                kept.add(each.id)
                alive[key] = each
            elif each not in (node, before):
                dead.append(each.id)
        self.alive = alive
        return dead


class Scene:
    """Follows the engine's events while somebody looks; ``spell`` gives a token's text."""

    def __init__(self, spell: Callable[[int], str]) -> None:
        self._spell = spell
        self._tracks: dict[int, Track] = {}
        self._ids = count(1)
        self._wave = 0
        self._begun: dict[tuple[int, int, int], int] = {}  # of the newest pass: waves

    def take(self, event: Event) -> Json:
        """Return what a page is told of an event."""
        if isinstance(event, FedRows):
            return self._rows(event)
        if isinstance(event, FedBlock):
            return self._block(event)
        if isinstance(event, Made):
            return self._made(event)
        if isinstance(event, Left):
            self._tracks.pop(event.slot, None)
            return {"kind": "left", "slot": event.slot}
        start, end, kind, _, position, rows = event
        wave = self._begun.get((start, position, rows), 0)
        told = {"kind": "ran", "work": kind, "wave": wave, "rows": rows}
        return told | {"time": start * MS, "end": end * MS}

    def trees(self) -> list[Json]:
        """Return the trees as they are, for a page that has just come."""
        return [
            {
                "slot": slot,
                "trail": [[self._spell(token), hit] for token, hit in track.trail],
                "root": track.root and self._told(track.root),
                "nodes": [self._told(node) for node in track.alive.values() if node != track.root],
            }
            for slot, track in sorted(self._tracks.items())
        ]

    def _told(self, node: Drawn) -> list[Any]:
        return [node.id, node.parent, node.position, self._spell(node.token)]

    def _track(self, slot: int) -> Track:
        return self._tracks.setdefault(slot, Track())

    def _begin(self, wave: int, start: int, position: int, rows: int) -> None:
        """Note what a pass has; a piece of a prompt and a wave may share one."""
        shared = {place: other for place, other in self._begun.items() if place[0] == start}
        self._begun = shared | {(start, position, rows): wave}

    def _feed(self, wave: int, start: int, rows: Sequence[tuple[int, Drawn]]) -> Json:
        told = [[slot, *self._told(node)] for slot, node in rows]
        return {"kind": "fed", "wave": wave, "time": start * MS, "rows": told}

    def _rows(self, event: FedRows) -> Json:
        self._wave += 1
        rows = [
            (row.slot, self._place(row.slot, row.node, row.parent, row.position, row.token))
            for row in event.rows
        ]
        self._begin(self._wave, event.start, event.rows[0].position, len(rows))
        return self._feed(self._wave, event.start, rows)

    def _block(self, event: FedBlock) -> Json:
        """Tell of a chain's rows, which may join a block, or of a piece of a prompt."""
        feed, slot = event.feed, event.slot
        track = self._track(slot)
        if feed.position == feed.block or not track.wave:
            self._wave += 1
            track.wave = self._wave
        self._begin(track.wave, event.start, feed.position, len(feed.tokens))
        if not (feed.judge and len(feed.tokens) == 1 and track.prompted):
            track.prompted = feed.judge > 0
            told = self._feed(track.wave, event.start, [])
            return told | {"prompt": len(feed.tokens), "slot": slot}
        position = feed.position
        node = self._place(slot, position, position - 1, position, feed.tokens[0])
        return self._feed(track.wave, event.start, [(slot, node)])

    def _place(self, slot: int, name: int, parent: int, position: int, token: int) -> Drawn:
        """Return the node of a row, which is the root's own or a new one."""
        track = self._track(slot)
        if track.root is not None and position == track.root.position:
            others = {n: node for n, node in track.alive.items() if node != track.root}
            track.alive = {name: track.root, **others}
            return track.root
        before = track.alive.get(parent)
        node = Drawn(next(self._ids), before.id if before else 0, position, token)
        track.alive[name] = node
        return node

    def _made(self, event: Made) -> Json:
        """Walk along the tokens that are now final; others than fed ones become nodes of their own.

        ``path`` are the nodes along the way and whether each was a right draft, ``dead`` those that
        were none. ``judged`` are the nodes whose rows have been answered.
        """
        track = self._track(event.slot)
        track.prompted = True
        first = event.committed - len(event.tokens)
        path, dead, judged = [], [], []
        for index, token in enumerate(event.tokens):
            position, hit = first + index, index < event.accepted
            root = track.root
            judged.append(root.id if root else 0)
            name, node = track.child(position, token) or (
                position,  # the name in a chain; rows of trees tell their own
                Drawn(next(self._ids), root.id if root else 0, position, token),
            )
            dead += track.grow(name, node)
            track.trail.append((token, hit))
            path.append([*self._told(node), hit])
        told = {"kind": "made", "time": event.time * MS, "slot": event.slot}
        return told | {"path": path, "dead": dead, "judged": judged}
