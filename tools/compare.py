"""Compare the speed of two source trees, request by request in turn, on the same cores.

``tools/compare.py OLD NEW`` with two checkouts whose ``.venv`` is installed. Both load the embedded
model with two stages; each repeat decodes one prompt plainly and by PPSD in either tree, in an
order that changes. Prints JSON: for each mode the ratio new over old of decoding speed, median and
quartiles over the repeats, whether both said the same tokens, and where the figures come from.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
from pathlib import Path
from typing import Any

from ppsd.provenance import provenance

MODES = ("autoregressive", "ppsd")
PROMPT = "Write a short story about a lighthouse keeper who finds an old map."
DRIVER = """
import json, sys
from ppsd import LLM, SamplingParams
tokens = int(sys.argv[1])
with LLM(stages=2, split=(18,), plan="off", gate=False) as llm:
    print("ready", flush=True)
    for line in sys.stdin:
        llm.use(line.strip())
        done = llm.generate(sys.argv[2], SamplingParams(max_tokens=tokens, ignore_eos=True))[0]
        print(json.dumps([done.stats.tokens_per_second, list(done.token_ids)]), flush=True)
"""


class Tree:
    """A process that decodes with the source of one tree."""

    def __init__(self, path: Path, tokens: int) -> None:
        self.commit = _commit(path)
        self._process = subprocess.Popen(
            [path / ".venv/bin/python", "-P", "-c", DRIVER, str(tokens), PROMPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"

    def decode(self, mode: str) -> tuple[float, list[int]]:
        """Return tokens a second and the tokens of one request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(mode + "\n")
        self._process.stdin.flush()
        speed, tokens = json.loads(self._process.stdout.readline())
        return speed, tokens

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def compare(trees: tuple[Tree, Tree], repeats: int) -> dict[str, Any]:
    """Return the ratios by mode, after one request each to warm up."""
    ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    same = True
    for repeat in range(-1, repeats):
        for mode in MODES:
            order = [0, 1]
            random.shuffle(order)
            found = {which: trees[which].decode(mode) for which in order}
            same = same and found[0][1] == found[1][1]
            if repeat >= 0:
                ratios[mode].append(found[1][0] / found[0][0])
                speeds[mode].append(found[1][0])
    return {
        "provenance": provenance() | {"command": "tools/compare.py OLD NEW"},
        "old": trees[0].commit,
        "new": trees[1].commit,
        "repeats": repeats,
        "same_tokens": same,
        "ratio": {mode: _spread(values) for mode, values in ratios.items()},
        "tokens_per_second": {mode: _spread(values) for mode, values in speeds.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def _commit(path: Path) -> str:
    told = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    command = ["git", "-C", str(path), *told]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Compare the two trees of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    trees = Tree(options.old, options.tokens), Tree(options.new, options.tokens)
    try:
        result = compare(trees, options.repeats) | {"tokens": options.tokens}
        print(json.dumps(result, indent=1))
    finally:
        for tree in trees:
            tree.close()


if __name__ == "__main__":
    main()
