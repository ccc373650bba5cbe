"""Long simulations, fast: what the simulator has done once from a state it does the same way again.

Between two drafts nothing is random, so a run is a path through states (Simulator.state), each with
two ways on: a right draft or a wrong one. A way is simulated, by the real policy, when it is first
taken; after that only its figures are added up. Whole nanoseconds make the sum exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ppsd.lab.simulator import RIGHT, WRONG, Simulated, Simulator
from ppsd.plan.model import CostModel
from ppsd.speculation.policy import Schedule

ENDLESS = 2**40  # tokens: the end of the request must not be felt before it is near
MAX_STATES = 4000  # beyond these a run hardly repeats, and is simulated to its end


@dataclass
class Way:
    """What happens from a draft to the next: how far the draft's position moves, and what it costs.

    ``taken`` counts how often.
    """

    to: State
    shift: int
    cost: tuple[int, ...]
    taken: int = 0


@dataclass
class State:
    """A simulation where a draft is due, at ``position``; the ways on after a wrong and a right."""

    simulation: Simulator
    position: int
    ways: list[Way | None] = field(default_factory=lambda: [None, None])


class Replay:
    """The states seen so far in runs of one cost model and schedule."""

    def __init__(self) -> None:
        self._states: dict[object, State] = {}

    def at(self, simulation: Simulator, position: int) -> State:
        """The state that ``simulation`` is in; nobody may move it afterwards."""
        return self._states.setdefault(simulation.state(), State(simulation, position))

    def explore(self, state: State, hit: int) -> Way:
        """Simulate one way on."""
        simulation = state.simulation.copy()
        before = simulation.figures()
        simulation.draft(RIGHT if hit else WRONG)
        position = simulation.until_draft()
        assert position is not None, "an endless request ended"
        cost = tuple(b - a for a, b in zip(before, simulation.figures(), strict=True))
        way = Way(self.at(simulation, position), position - state.position, cost)
        state.ways[hit] = way
        return way

    @property
    def full(self) -> bool:
        """Whether there are too many states to go on like this."""
        return len(self._states) > MAX_STATES

    def costs(self) -> list[tuple[int, ...]]:
        """The figures of every way, as often as it was taken."""
        ways = [way for state in self._states.values() for way in state.ways if way]
        return [tuple(way.taken * value for value in way.cost) for way in ways]


def replay(
    cost: CostModel, schedule: Schedule, hits: bytes, *, prompt_tokens: int = 1, **options: Any
) -> Simulated:
    """Return what ``Simulator(…).run()`` returns, for a schedule that drafts."""
    live = Simulator(cost, schedule, hits, prompt_tokens=prompt_tokens, **options)
    live.policy.resize(ENDLESS)
    live.start()
    position = _go(live, hits, -prompt_tokens, until_token=True)
    assert position is not None, "an endless request ended"
    known, begun = Replay(), live.figures()
    state = known.at(live, position)
    here = position - prompt_tokens
    last = len(hits) - 2 * schedule.block * (schedule.in_flight + 1)  # then the end is near
    while here < last and not known.full:
        way = state.ways[hits[here]] or known.explore(state, hits[here])
        way.taken += 1
        here += way.shift
        state = way.to
    ending = state.simulation.copy()
    before = ending.figures()
    offset = here - state.position
    ending.policy.resize(len(hits) - prompt_tokens - offset)
    _go(ending, hits, offset, position=state.position)
    rest = tuple(b - a for a, b in zip(before, ending.figures(), strict=True))
    figures = [sum(column) for column in zip(begun, rest, *known.costs(), strict=True)]
    return live.result(figures)


def _go(
    simulation: Simulator,
    hits: bytes,
    offset: int,
    *,
    position: int | None = None,
    until_token: bool = False,
) -> int | None:
    """Draft on, the draft for position p being right if ``hits[p + offset]``.

    Return the position of the next draft once a token has come, if asked to; None at the end.
    """
    if position is None:
        position = simulation.until_draft()
    while position is not None and not (until_token and simulation.tokens):
        simulation.draft(RIGHT if hits[position + offset] else WRONG)
        position = simulation.until_draft()
    return position
