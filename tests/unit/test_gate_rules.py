"""The gate's rules one by one, in whole seconds: what is lost, how long a pause is, what counts."""

from __future__ import annotations

import pytest

from ppsd.speculation.gate import PROBE, RECHECKS, Gate, Switches
from ppsd.speculation.policy import Schedule
from tests.unit.test_gate import PPSD_2, ROUNDS, Script


class Timed:
    """A gate before requests under way whose verdicts take as long as they are told to."""

    def __init__(self, gate: Gate, requests: int = 1, *, empty: bool = True) -> None:
        self.gate, self.now = gate, 0.0
        self.policies: list[Script] = []
        for _ in range(requests):
            self.begin()
        self.all(0.0, empty=empty)  # the prompts' own verdicts

    def begin(self) -> Switches:
        self.policies.append(Script())
        self.switches = self.gate.begin(self.policies[-1], self.now)
        return self.switches

    def again(self) -> Switches:
        """Let one request follow upon all that were under way."""
        while self.policies:
            self.gate.end(self.policies.pop())
        switches = self.begin()
        self.all(0.0)
        return switches

    def all(self, seconds: float, tokens: int = 1, *, empty: bool = True) -> bool:
        """Let each request have a verdict; return whether speculation is paused then."""
        self.now += seconds
        for policy in self.policies:
            policy.emitted += tokens
            policy.restarted = empty
            self.gate.watch(policy, self.now)
        assert all(policy.paused == self.gate.paused for policy in self.policies)
        return self.gate.paused

    def until(self, paused: bool, seconds: float, tokens: int = 1, *, empty: bool = True) -> int:
        """Count the verdicts of each until speculation is paused, or resumed."""
        for count in range(1, 3000):
            if self.all(seconds, tokens, empty=empty) == paused:
                return count
        raise AssertionError("never")


def measured(requests: int = 1) -> Timed:
    """Return rounds before a gate that has seen plain tokens take 1 s, and speculates since."""
    timed = Timed(Gate(ROUNDS), requests)
    first = requests > 1  # in the first round the others' prompts were still passing
    assert timed.until(False, 1.0) == PROBE + first
    assert timed.gate.plain == 1.0
    timed.all(1.0)  # it was fed before
    return timed


@pytest.mark.parametrize(
    ("seconds", "rounds", "lengths"),
    [(4.0, 1, [60, 120, 240, 480, 600, 600]), (1.05, 21, [32, 64, 128, 210, 210])],
)
def test_a_pause_is_as_long_as_its_loss_asks_for(
    seconds: float, rounds: int, lengths: list[int]
) -> None:
    """A round of a token loses its time but 1; 3 may be lost, less each time by a 32nd of that."""
    timed = measured()
    for length in lengths:
        assert timed.until(True, seconds) == rounds
        assert timed.until(False, 1.0) == length + PROBE + 1
        timed.all(1.0)
    assert timed.until(True, seconds) == rounds
    timed.all(seconds)
    assert timed.until(False, 2 * seconds) == PROBE, "plain decoding has become slower"


def test_speculation_that_gains_nothing_stays_paused() -> None:
    timed = measured()
    assert timed.until(True, 1.0) == 129
    assert timed.until(False, 1.0) == 32 + PROBE + 1


def test_after_a_gain_pauses_are_short_again() -> None:
    timed = measured()
    for length in (60, 120):
        timed.until(True, 4.0)
        assert timed.until(False, 1.0) == length + PROBE + 1
        timed.all(1.0)
    assert timed.until(True, 0.96) == 65
    assert timed.until(False, 1.0) == PROBE + 1
    timed.all(1.0)
    while not timed.all(4.0):
        pass
    assert timed.until(False, 1.0) < 120
    assert timed.switches.pauses == 5
    assert [paused for _, paused in timed.switches.times] == [True, False] * 5


def test_the_newest_rounds_alone_count() -> None:
    timed = measured()
    for _ in range(34):
        assert not timed.all(2.0, 3)
    assert timed.until(True, 2.0) == 17, "of 32, with a token less each"


@pytest.mark.parametrize("rounds", [9, 10])
def test_a_disturbance_counts_as_three_rounds(rounds: int) -> None:
    """Then 2 tokens are lost, which is more than may be from the 11th round on."""
    timed = measured()
    for _ in range(rounds):
        assert not timed.all(1.0)
    assert timed.all(1000.0) == (rounds == 10)


def test_plain_decoding_is_the_mean_of_the_newest_samples_without_disturbances() -> None:
    timed = measured()
    timed.until(True, 4.0)
    for seconds in (4.0, 1.0, 1.0, 1.0, 2.0):
        timed.all(seconds)
    assert timed.gate.plain == 5 / 4, "the first is of a round fed before"
    for _ in range(12):
        timed.all(2.0)
    assert timed.gate.plain == (3 + 26) / 16
    timed.all(50.0)
    assert timed.gate.plain == (2 + 26 + 6) / 16


def test_until_plain_decoding_is_measured_the_latency_after_a_miss_bounds_it() -> None:
    """A miss is taken for a quarter of a token lost, where half of one may be."""
    timed = Timed(Gate(PPSD_2))
    assert not timed.all(2.0)
    assert timed.gate.plain is None
    assert timed.all(2.0)
    timed.all(2.0)  # it was fed before
    assert timed.until(False, 1.0) == PROBE + 60, "3 tokens were lost"
    good = Timed(Gate(PPSD_2))
    for _ in range(3):
        good.all(2.0, empty=False)
        assert not good.all(1.0), "(2 + 1) / 2 is less than 0.8 · 2"
    switches = good.again()
    assert switches.plain_bounds == pytest.approx((1.6, 2.0))


def test_a_latency_that_has_fallen_bounds_what_was_measured_before() -> None:
    timed = Timed(Gate(PPSD_2))
    timed.until(True, 2.0)
    timed.until(False, 2.0)
    timed.all(2.0)
    assert timed.gate.plain == pytest.approx(2.0)
    assert timed.until(True, 1.0) < 80, "as fast as plain decoding would be by now"


def test_a_latency_that_nobody_has_seen_lately_bounds_nothing() -> None:
    timed = Timed(Gate(PPSD_2))
    timed.until(True, 1.0)
    timed.until(False, 2.0)
    timed.all(2.0, empty=False)
    assert timed.gate.plain == pytest.approx(2.0)
    assert not any(timed.all(1.8, empty=False) for _ in range(200))


@pytest.mark.parametrize(
    ("seconds", "ages"),
    [(0.97, [128, 256, 512, 1024, 1024]), (0.8, [1024, 1024]), (0.6, [])],
)
def test_what_was_measured_long_ago_is_measured_again_where_it_matters(
    seconds: float, ages: list[int]
) -> None:
    timed = measured()
    for age in ages:
        assert timed.until(True, seconds) == age + 1
        assert timed.until(False, 1.0) == PROBE + 1
        timed.all(1.0)
    if not ages:
        assert not any(timed.all(seconds) for _ in range(2000))


@pytest.mark.parametrize("requests", [1, 3])
def test_without_a_miss_so_many_tokens_of_each_are_enough(requests: int) -> None:
    timed = Timed(Gate(PPSD_2), requests, empty=False)
    assert timed.until(True, 0.1, empty=False) == 256


def test_a_new_request_finds_a_few_rounds_and_half_the_pause() -> None:
    timed = measured()
    for _ in range(32):
        timed.all(2.0, 3)
    assert timed.again() == Switches(plain=1.0)
    assert timed.until(True, 2.0) == 10, "8 of those that gained a token each"
    timed = measured()
    timed.until(True, 4.0)
    for _ in range(PROBE + 1):
        timed.all(1.0)
    assert timed.gate.paused
    timed.begin()
    timed.gate.end(timed.policies.pop())  # with another under way it was no new text
    switches = timed.again()
    assert (switches.pauses, switches.times) == (1, [(timed.now, True)])
    assert timed.until(False, 1.0) == 29
    assert switches.times[1:] == [(timed.now, False)]
    assert switches.paused_tokens == 30


def test_a_pause_that_a_new_request_ends_is_over_at_once() -> None:
    timed = measured()
    timed.until(True, 4.0)
    for _ in range(1 + PROBE + 30):
        assert timed.all(1.0)
    timed.gate.end(timed.policies.pop())
    assert timed.begin().times == []
    assert not timed.gate.paused


@pytest.mark.parametrize(("block", "paused"), [(1, False), (2, True), (4, True)])
def test_a_gate_of_blocks_begins_with_plain_decoding(block: int, paused: bool) -> None:
    """What a block takes says nothing of it."""
    policy = Script()
    Gate(Schedule(block, 3)).begin(policy, 0.0)
    assert policy.paused == paused


def test_of_requests_together_each_counts_as_much_as_alone() -> None:
    """They may lose twice as much if they are four."""
    timed = measured(4)
    assert timed.until(True, 2.0) == 2, "of at most 6 tokens lost"
    assert timed.until(False, 1.0) == 44, "12 plain tokens, and 20 for each of 8 lost"
    assert timed.gate.plain == 1.0
    assert measured(4).until(True, 0.97) == 128, "as old as of one alone"


def test_a_verdict_without_tokens_or_of_a_request_that_is_over_says_nothing() -> None:
    timed = measured()
    assert not timed.all(1e6, 0)
    timed.now -= 1e6
    assert not timed.all(1.0)
    timed.policies[0].finished = True
    assert not timed.all(1e6)


def crowded(seconds: float) -> Timed:
    """Return rounds that were found to gain while another's prompt passed and all took long."""
    timed = Timed(Gate(ROUNDS))
    late = Script()
    timed.gate.begin(late, timed.now)
    assert timed.until(False, seconds) == PROBE
    assert timed.gate.plain == seconds
    timed.all(seconds)  # it was fed before
    timed.gate.end(late)
    return timed


def test_what_was_measured_while_prompts_passed_is_soon_measured_again() -> None:
    """Rounds that lose take for a gain only what is allowed where the margin is thin."""
    timed, calm = crowded(1.5), measured()
    assert timed.until(True, 1.25) == RECHECKS[0][1] + 1
    assert timed.until(False, 1.0) > PROBE, "plain decoding is faster"
    assert timed.gate.plain == 1.0
    assert calm.until(True, 0.8) == RECHECKS[1][1] + 1


def test_what_is_measured_while_prompts_pass_stands_in_for_better_alone() -> None:
    timed = measured()
    assert timed.until(True, 4.0) == 1
    late = Script()
    timed.gate.begin(late, timed.now)
    timed.all(4.0)  # a round that was under way
    timed.all(3.0)
    assert timed.gate.plain == 3.0
    timed.gate.end(late)
    timed.all(3.0)
    assert timed.gate.plain == 3.0, "it began while the prompt was passing"
    timed.all(1.0)
    assert timed.gate.plain == 1.0
    timed.gate.begin(late, timed.now)
    timed.all(3.0)
    assert timed.gate.plain == 1.0
