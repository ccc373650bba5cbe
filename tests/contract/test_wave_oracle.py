"""L1: waves over oracle stages say what plain decoding says, of all sequences under way.

As in test_exact_oracle.py, but with candidate trees, heads on any boundary, several requests that
begin, end and break off at any moment, and answers and epochs that come late.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ppsd.types import SamplingParams
from tests.contract.test_exact_oracle import prompts, samplings, stops
from tests.support.wave_rig import Asked, WaveRig, cycled

lucks = st.lists(st.booleans(), max_size=9).map(lambda values: [*values, True])
alphas = st.sampled_from([0.0, 0.5, 0.8, 1.0])


@st.composite
def requests(draw: st.DrawFn) -> list[Asked]:
    """Several, of which some begin alike, and some break off."""
    begins = draw(st.lists(prompts, min_size=1, max_size=3))
    asked = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = [*draw(st.sampled_from(begins)), *draw(prompts)]
        params = SamplingParams(**draw(samplings))
        most = draw(st.none() | st.integers(1, 40))
        asked.append(Asked(prompt, params, draw(stops), draw(st.booleans()), most))
    return asked


@settings(max_examples=80)
@given(
    data=st.data(),
    stages=st.integers(2, 5),
    rows=st.integers(0, 16),
    concurrent=st.integers(1, 4),
    asked=requests(),
    loose=st.sampled_from([1, 3, 16]),
    chunk=st.integers(1, 5),
    lookup=st.booleans(),
    feedback=st.booleans(),
)
def test_any_order_of_work_gives_the_plain_output(
    data, stages, rows, concurrent, asked, loose, chunk, lookup, feedback
) -> None:
    heads = data.draw(st.dictionaries(st.integers(0, stages - 2), alphas))
    rig = WaveRig(
        stages,
        rows,
        heads=heads,
        concurrent=concurrent,
        loose=loose,
        chunk=chunk,
        lookup=lookup,
        feedback=feedback,
    )
    turns = data.draw(st.lists(st.integers(0, stages - 1), min_size=1, max_size=12))
    moves = iter(turns * 1000)
    rig.order = lambda: next(moves, 0) or None
    rig.move_while_stage_0_computes(turns)
    rig.be_late(cycled(data.draw(lucks)))
    wills = data.draw(st.lists(st.booleans(), max_size=8))
    if wills:
        rig.pause_all_at_will(wills)
    plain = [rig.learn(one) for one in asked]
    rig.answer(asked, cycled(data.draw(lucks)))
    for one, tokens in zip(asked, plain, strict=True):
        rig.check(one, tokens)
