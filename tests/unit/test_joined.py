"""A piece of a prompt and a wave in one pass: the rows of each are as if they ran alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ppsd.model import kernels
from ppsd.model.passes import EACH_LAYER, Piece, Place, Watch
from ppsd.model.source import ModelFiles, describe
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.weights import open_source
from ppsd.speculation.waves import Part, Row
from ppsd.worker.frame import Landing
from ppsd.worker.loop import Worker
from ppsd.worker.messages import Block, Message, decode, encode
from ppsd.worker.recorder import Recorder
from ppsd.worker.wave_messages import Wave
from tests.support.hash_model import CAPACITY, HashStage, pack

CONTEXT, CPU = 64, torch.device("cpu")
TREE = [Place(1, 2, 2), Place(1, 2, CONTEXT), Place(1, 3, 3, (CONTEXT,))]
TOKENS = torch.tensor([40, 7, 81])


def stage_of(path, dtype: torch.dtype) -> Stage:
    spec, source = describe(ModelFiles("tiny", path, is_gguf=False)), open_source(path)
    return Stage(spec, StagePlan(0, 4, CONTEXT, dtype, CPU, slots=2, loose=4), source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("watch", [None, EACH_LAYER], ids=["whole", "by layers"])
@pytest.mark.parametrize("length", [1, 5, kernels.MAX_ROWS + 4])
def test_both_have_the_bits_that_they_have_alone(tiny_model, dtype, watch, length) -> None:
    path, prompt = tiny_model(), torch.arange(3, 3 + length)
    joined, alone = stage_of(path, dtype), stage_of(path, dtype)
    with torch.inference_mode():
        for stage in (joined, alone):
            stage.start(torch.tensor([5, 9]), 0, 1).advance()
        both = joined.start_joined(Piece(prompt, 0, 0), TOKENS, TREE)
        while not both.advance(watch):
            pass
        apart = [alone.start(prompt, 0, 0), alone.start_rows(TOKENS, TREE)]
        for started in apart:
            started.advance()
    assert torch.equal(both.hidden, torch.cat([started.hidden for started in apart]))
    assert joined.cache.lengths == alone.cache.lengths == [length, 2]
    for here, there in zip(joined.cache.whole, alone.cache.whole, strict=True):
        assert torch.equal(here, there)


class Line:
    """A stage's link whose messages come as frames, each over the rows of the one before."""

    def __init__(self, *epochs: int) -> None:
        self.sent: list[Message] = []
        self._landing, self._epochs = Landing(), epochs

    def hand(self, message: Message) -> Message:
        header, *rest = [
            bytes(memoryview(part).cast("B")) for part in map(as_bytes, encode(message))
        ]
        return decode(memoryview(b"".join([header, *rest])), None, self._landing)

    def send(self, to: int, message: Message) -> None:
        self.sent.append(message)

    def epoch(self, slot: int) -> int:
        return self._epochs[slot]

    def watch(self, *slots: int) -> Watch:
        return Watch()


def as_bytes(part) -> bytes:
    return part.view(torch.uint8).numpy().tobytes() if isinstance(part, torch.Tensor) else part


def rows_of(nodes: Sequence[int]) -> tuple[Row, ...]:
    return tuple(Row(1, node, 1, 2, 7, CAPACITY + i, (), ()) for i, node in enumerate(nodes))


def played(*epochs: int, position: int = 0) -> tuple[list[Message], Recorder]:
    """Return what a stage in the middle sends of a prompt of two tokens and a wave of two rows."""
    line, recorder = Line(*epochs), Recorder()
    stage = HashStage(1, 3, 8, slots=2, loose=8)
    stage.start(pack([5, 9]), 0, 1).advance()
    worker = Worker(1, stage, line, None, recorder)
    block = Block(0, 1, position, position - 1, 0, (3, 4), pack([11, 12]), joins=True)
    for message in (block, Wave((Part(1, 1, 2, ()),), rows_of([2, 3]), pack([21, 22]))):
        worker.handle(line.hand(message))
        assert isinstance(message, Wave) or not line.sent
    assert worker.joining is None
    return line.sent, recorder


def test_a_stage_passes_both_on_in_one_pass() -> None:
    (block, wave), recorder = played(1, 1)
    assert (block.joins, wave.rows) == (True, rows_of([2, 3]))
    assert torch.equal(block.hidden, HashStage(1, 3, 8).forward(pack([11, 12]), 0))
    assert recorder.blocks == {"prefill": 1, "verify": 1}
    assert recorder.busy_ns["prefill"] == 0, "its time is the wave's"


def test_a_piece_goes_on_alone_if_its_wave_has_died() -> None:
    (block,), recorder = played(1, 9)
    assert not block.joins
    assert torch.equal(block.hidden, HashStage(1, 3, 8).forward(pack([11, 12]), 0))
    assert recorder.blocks == {"prefill": 1, "dropped": 1}


def test_a_wave_goes_on_alone_if_its_piece_is_stale() -> None:
    """Earlier pieces may have been dropped, so this one must not be run."""
    (wave,), recorder = played(2, 1, position=4)
    assert wave.rows == rows_of([2, 3])
    assert recorder.blocks == {"dropped": 1, "verify": 1}


def test_nothing_goes_on_if_both_are_over() -> None:
    sent, recorder = played(2, 9)
    assert sent == []
    assert recorder.blocks == {"dropped": 2}
