"""Any messages of the protocol, for hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from ppsd.speculation.lookup import LENGTHS
from ppsd.speculation.waves import Part, Row
from ppsd.types import SamplingParams
from ppsd.worker.frame import DTYPES
from ppsd.worker.messages import Begin, Block, Control, Refusal, Status, Verdict
from ppsd.worker.scores import Scores
from ppsd.worker.wave_messages import Opinion, Verdicts, Wave

words = st.integers(0, 2**16 - 1)
positions = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 2**64 - 1)
ids = st.integers(-(2**63), 2**63 - 1)


@st.composite
def rows_of_numbers(draw: st.DrawFn, rows: int, min_width: int = 0) -> torch.Tensor:
    width, dtype = draw(st.integers(min_width, 5)), draw(st.sampled_from(DTYPES))
    size = rows * width * dtype.itemsize
    bits = draw(st.binary(min_size=size, max_size=size))  # any bits: NaN must survive too
    return torch.tensor(list(bits), dtype=torch.uint8).view(dtype).view(rows, width)


def token_ids(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(ids, min_size=count, max_size=count).map(tuple)


@st.composite
def masks_of(draw: st.DrawFn, rows: int) -> tuple[bytes, ...]:
    width = draw(st.sampled_from([0, 4, 12]))
    mask = st.binary(min_size=width, max_size=width)
    return tuple(draw(mask) for _ in range(rows)) if width else ()


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    rows = draw(st.integers(1, 4))
    judge = draw(st.integers(0, rows))
    return Block(
        slot=draw(words),
        epoch=draw(epochs),
        position=draw(positions),
        parent=draw(st.integers(-1, 2**31 - 1)),
        judge=judge,
        tokens=draw(token_ids(rows)),
        hidden=draw(rows_of_numbers(rows, min_width=1)),
        masks=draw(masks_of(judge)),
        joins=draw(st.booleans()),
    )


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    judged = draw(st.integers(0, 4))
    logits = draw(st.none() | rows_of_numbers(judged, min_width=1))
    feedback = draw(st.none() | rows_of_numbers(judged, min_width=1))
    if logits is not None and feedback is not None:
        feedback = feedback.to(logits.dtype)  # as both come from one stage
    return Verdict(
        slot=draw(words),
        epoch=draw(epochs),
        source=draw(words),
        position=draw(positions),
        rows=draw(st.integers(judged, 9)),
        tokens=draw(token_ids(judged)),
        logits=logits,
        feedback=feedback,
    )


@st.composite
def waves(draw: st.DrawFn) -> Wave:
    """Rows of any parts; at times none, as when all have died."""
    parts = []
    for slot in draw(st.lists(ids, min_size=1, max_size=3, unique=True)):
        moves = draw(st.lists(st.tuples(ids, ids), max_size=3).map(tuple))
        parts.append(Part(slot, draw(ids), draw(ids), moves))
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        depth = draw(st.integers(0, 3))
        alone = draw(st.sampled_from(parts)).slot, *draw(token_ids(5))
        rows.append(Row(*alone, draw(token_ids(depth)), draw(token_ids(depth))))
    hidden = draw(rows_of_numbers(len(rows), min_width=1)) if rows else torch.empty(0, 3)
    return Wave(tuple(parts), tuple(rows), hidden, draw(masks_of(len(rows))))


@st.composite
def wave_verdicts(draw: st.DrawFn) -> Verdicts:
    count = draw(st.integers(0, 4))
    logits = draw(st.none() | rows_of_numbers(count, min_width=1)) if count else None
    feedback = draw(st.none() | rows_of_numbers(count, min_width=1)) if count else None
    if logits is not None and feedback is not None:
        feedback = feedback.to(logits.dtype)
    nodes = tuple(zip(draw(token_ids(count)), draw(token_ids(count)), strict=True))
    return Verdicts(draw(words), nodes, draw(token_ids(count)), logits, feedback)


@st.composite
def opinions(draw: st.DrawFn) -> Opinion:
    count, width = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    nodes = tuple(zip(draw(token_ids(count)), draw(token_ids(count)), strict=True))
    tokens = tuple(draw(token_ids(width)) for _ in range(count))
    return Opinion(draw(words), nodes, tokens, torch.rand(count, width + len(LENGTHS)))


@st.composite
def prompt_scores(draw: st.DrawFn) -> Scores:
    count, width = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    tokens = tuple(draw(token_ids(width)) for _ in range(count))
    numbers = torch.rand(count, 1 + width, dtype=torch.float64)
    return Scores(draw(words), draw(epochs), draw(words), draw(positions), tokens, numbers)


params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)
begins = st.builds(
    Begin,
    slot=words,
    params=params,
    prompt_length=positions,
    stop_ids=st.lists(positions, max_size=4).map(tuple),
    vocab_size=positions,
    want_logits=st.booleans(),
    want_feedback=st.booleans(),
    want_opinions=st.booleans(),
    scores=st.integers(-1, 20),
    source=words,
    shared=positions,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
statuses = st.builds(Status, words, st.text(), st.dictionaries(st.text(), json_values, max_size=4))
refusals = st.builds(Refusal, slot=words, epoch=epochs, source=words, message=st.text())
MESSAGES = {
    "block": blocks(),
    "verdict": verdicts(),
    "wave": waves(),
    "verdicts": wave_verdicts(),
    "opinion": opinions(),
    "scores": prompt_scores(),
    "refusal": refusals,
    "begin": begins,
    "control": st.builds(Control, st.text()),
    "status": statuses,
}
all_messages = st.one_of(*MESSAGES.values())
