"""What a recorder tells an observer."""

from __future__ import annotations

import logging

from ppsd.worker.recorder import Recorder


def test_an_observer_that_raises_is_logged_and_sees_nothing_more(caplog) -> None:
    seen = []

    def observer(event: object) -> None:
        seen.append(event)
        raise KeyError("mine")

    recorder = Recorder()
    recorder.observer = observer
    with caplog.at_level(logging.ERROR):
        recorder.add(0, "forward", 1, 2, 3)
        recorder.tell("more")
    assert recorder.observer is None
    assert len(seen) == 1
    assert "an observer failed and sees nothing more" in caplog.text
    assert "KeyError: 'mine'" in caplog.text
    assert recorder.blocks["forward"] == 1


def test_a_failing_observer_does_not_take_its_successor_with_it() -> None:
    recorder, seen = Recorder(), []

    def observer(event: object) -> None:
        recorder.observer = seen.append  # another thread's, at the worst of moments
        raise KeyError("mine")

    recorder.observer = observer
    recorder.tell("first")
    recorder.tell("second")
    assert seen == ["second"]
