"""A stage's worker process with an ear for rivals: ``python -m ppsd.lab.rivals.worker``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ppsd.worker.__main__ import main as serve


class RivalWorker:
    """A stage worker that does rivals' jobs, and leaves all other messages to the usual one."""

    def __init__(self, worker: Any, stage: Any, endpoint: Any, config: Any) -> None:
        from ppsd.lab.rivals.stage import RivalStage
        from ppsd.lab.rivals.timers import RealTimer
        from ppsd.model.identity import Identity
        from ppsd.model.weights import open_source
        from ppsd.worker.frame import Landing

        source = open_source(Path(config.model_path))
        identity = Identity.of(stage.spec, source)
        self._stage = RivalStage(stage, source, identity, RealTimer(), config.pace)
        self._stage.rank = config.rank
        self._worker, self._endpoint, self._config = worker, endpoint, config
        self._landing = Landing()

    @property
    def stopped(self) -> bool:
        """Return True once rank 0 has said so."""
        return bool(self._worker.stopped)

    def step(self, timeout: float) -> bool:
        """Handle one message; False when none came within ``timeout`` seconds."""
        from ppsd.lab.rivals import jobs
        from ppsd.worker import messages

        received = self._endpoint.receive(timeout)
        if received is None:
            return False
        frame, rows = received[1], self._endpoint.rows
        if not jobs.is_rivals(frame):
            self._worker.handle(messages.decode(frame, rows, self._landing))
            return True
        job = jobs.decode(frame, rows)
        assert isinstance(job, jobs.Job)
        self._stage.timer.arrive(0.0)
        for message in self._stage.handle(job):
            to = self._config.rank + 1 if isinstance(message, jobs.Job) else 0
            self._endpoint.send(to, jobs.encode(message), self._config.timeout)
        return True


if __name__ == "__main__":
    sys.exit(serve(RivalWorker))
