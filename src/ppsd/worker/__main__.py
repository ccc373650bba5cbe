"""The program of a worker process: it dies with its parent from its first moment, then serves.

The parent keeps a pipe to standard input open. Its end tells a worker, whatever it is doing, to
leave at once. PyTorch takes seconds to import, so the watch begins before that.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppsd.worker.process import Extend

ORPHAN_S = 0.5  # how often a worker looks whose child it is


def _die_with_parent(parent: int) -> None:
    """Leave with the pipe's other end, or with the parent: a fork of it may hold that end, too."""
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], ORPHAN_S)
        if readable and not os.read(0, 1):  # not sys.stdin: its lock would outlive this thread
            break
    os._exit(1)


def main(extend: Extend | None = None) -> int:
    """Serve the stage that the line of JSON on standard input describes.

    ``extend`` may put another worker in the stage's place; see ``process.serve``.
    What is raised goes to rank 0 by message; standard error is for when that cannot get through.
    """
    line = sys.stdin.readline()
    parent = json.loads(line)["parent"]
    threading.Thread(target=_die_with_parent, args=(parent,), daemon=True).start()
    from ppsd.errors import PpsdError
    from ppsd.worker.process import WorkerConfig, serve

    config = WorkerConfig.from_json(line)
    try:
        serve(config, extend=extend)
    except PpsdError as error:
        print(f"stage {config.rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
