"""What rank 0's own work takes a wave, in CPU time: candidates, choice, messages. A program.

    python -m tests.stress.rank0

The policy, the tree and the messages are the real ones; stages and heads only say what heads of
SmolLM2-135M would say about as often. Between two waves other memory is read, as by a pass over
weights, so that the code finds the caches as cold as at work.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from ppsd.speculation.lookup import LENGTHS
from ppsd.speculation.policy import Judged
from ppsd.speculation.tree import CANDIDATES, Cells, Node
from ppsd.speculation.waves import Verified, WavePolicy, choose
from ppsd.worker.wave_messages import Wave, encode_wave_message

STAGES, HIDDEN, VOCABULARY = 4, 576, 49152
CHANCES = (0.62, 0.13, 0.06, 0.04, 0.02, 0.02, 0.01, 0.01)
PROMPT, TOKENS = 200, 4000
COLD = torch.zeros(4 << 20, dtype=torch.int64)  # more than caches hold

Fed = list[tuple[WavePolicy, Node]]


class Rank0:
    """Requests on their way; ``seconds`` of rank 0's work for each wave."""

    def __init__(self, requests: int, rows: int) -> None:
        self._luck = random.Random(0)
        self._rows = rows
        self._policies = [self._begun(slot) for slot in range(requests)]
        self._flying: list[Fed] = [[] for _ in range(STAGES - 1)]
        self._wave = 1
        self.seconds: list[float] = []

    def _begun(self, slot: int) -> WavePolicy:
        policy = WavePolicy(
            slot,
            STAGES,
            max_tokens=TOKENS,
            stop_ids=frozenset(),
            cells=Cells(PROMPT + TOKENS, STAGES * self._rows),
        )
        policy.start([self._luck.randrange(VOCABULARY) for _ in range(PROMPT)])
        while (feed := policy.chunk(1)) is not None:
            answer = (1,) if feed.judge else ()
            end = feed.position + len(feed.tokens)
            policy.on(Judged(policy.epoch, feed.position, end, answer, STAGES - 1))
        return policy

    def step(self) -> None:
        """Send a wave, hear the first head of it, and the verdicts on the one that is done."""
        COLD.sum()
        self._wave += 1
        time.thread_time()  # so that the clock itself is not cold
        start = time.thread_time()
        fed = choose(self._policies, self._rows, self._wave)
        groups: dict[int, tuple[WavePolicy, list[Node]]] = {}
        for policy, node in fed:
            groups.setdefault(policy.slot, (policy, []))[1].append(node)
        shares = [policy.part(nodes) for policy, nodes in groups.values()]
        rows = tuple(row for _, own in shares for row in own)
        spent = time.thread_time() - start
        hidden = torch.zeros(len(rows), HIDDEN, dtype=torch.bfloat16)
        start = time.thread_time()
        encode_wave_message(Wave(tuple(part for part, _ in shares), rows, hidden))
        spent += time.thread_time() - start
        said = [self._said(node) for _, node in fed]
        start = time.thread_time()
        for (policy, node), (tokens, numbers) in zip(fed, said, strict=True):
            policy.hear(node.id, 0, tokens, numbers)
        spent += time.thread_time() - start
        self._flying.append(fed)
        verdicts = self._judged(self._flying.pop(0))
        start = time.thread_time()
        for policy, verified in verdicts:
            policy.on(verified)
        self.seconds.append(spent + time.thread_time() - start)

    def _said(self, node: Node) -> tuple[list[int], list[float]]:
        right = self._target(node.position + 1)
        tokens = self._luck.sample(range(1000, VOCABULARY), CANDIDATES)
        place = self._luck.choices(range(CANDIDATES + 1), (*CHANCES, 1 - sum(CHANCES)))[0]
        if place < CANDIDATES:
            tokens[place] = right
        return tokens, [*CHANCES, *[0.0] * len(LENGTHS)]

    def _target(self, position: int) -> int:
        return position * 7919 % 997  # never the same twice in a row: nothing to look up

    def _judged(self, fed: Fed) -> list[tuple[WavePolicy, Verified]]:
        """Return the verdicts of a wave, as far as each request's true path goes in it."""
        found: dict[int, tuple[WavePolicy, list[Node]]] = {}
        for policy, node in fed:
            path = found.setdefault(policy.slot, (policy, []))[1]
            follows = node is policy.tree.root if not path else node.parent is path[-1]
            if follows and (not path or node.token == self._target(node.position)):
                path.append(node)
        return [
            (
                policy,
                Verified(
                    tuple(node.id for node in path),
                    tuple(self._target(node.position + 1) for node in path),
                ),
            )
            for policy, path in found.values()
            if path
        ]


def main() -> None:
    """Print what a wave takes rank 0, for one request and for many."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--waves", type=int, default=400)
    waves = parser.parse_args().waves
    for requests, rows in ((1, 1), (1, 16), (8, 32), (32, 32), (32, 64)):
        rank0 = Rank0(requests, rows)
        for _ in range(waves):
            rank0.step()
        times = [seconds * 1e3 for seconds in rank0.seconds[waves // 10 :]]
        low, middle, high = statistics.quantiles(times)
        print(
            f"{requests} requests, {rows} rows: {middle:.3f} ms a wave ({low:.3f}–{high:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
