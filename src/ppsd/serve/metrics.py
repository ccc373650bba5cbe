"""Counts and times for Prometheus, under vLLM's names where the meaning is the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from ppsd.engine.answer import Chunk, Completion
from ppsd.engine.stats import Totals
from ppsd.serve.figures import speculation

TEXT_FORMAT = CONTENT_TYPE_LATEST
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The server's counters; ``running``, ``waiting`` and ``totals`` are asked by who reads."""

    def __init__(
        self,
        prefix: str,
        running: Callable[[], int],
        waiting: Callable[[], int],
        totals: Callable[[], Totals],
    ) -> None:
        self._registry = CollectorRegistry()
        self._stages = Stages(prefix, self._registry, totals)
        gauges = (
            ("num_requests_running", "Choices under way.", running),
            ("num_requests_waiting", "Choices that wait.", waiting),
        )
        for name, about, ask in gauges:
            Gauge(prefix + name, about, registry=self._registry).set_function(ask)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(prefix + name, about, labels, registry=self._registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(prefix + name, about, buckets=buckets, registry=self._registry)

        self.prompt = counter("prompt_tokens", "Tokens of prompts, cached ones included.")
        self.new = counter("generation_tokens", "New tokens.")
        self.ends = counter("request_success", "Choices by how they ended.", "finished_reason")
        self.rows = counter("spec_decode_num_drafts", "Rows of drafts of complete choices.")
        self.by_position = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Right drafts by place in a row.", "position"
        )
        self.drafted = counter("spec_decode_num_draft_tokens", "Drafts of complete choices.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Those of them that were right.")
        self.first = histogram("time_to_first_token_seconds", "From request to first token.", LONG)
        self.next = histogram("inter_token_latency_seconds", "Between two tokens.", SHORT)
        self.whole = histogram("e2e_request_latency_seconds", "From request to last token.", LONG)
        self.queue = histogram("request_queue_time_seconds", "From request to its start.", LONG)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's format."""
        self._stages.update()
        return generate_latest(self._registry)

    @contextmanager
    def watch(self, choices: int, begun: float) -> Iterator[Watch]:
        """Count what the choices of one request bring; those not complete at the end, too."""
        watch = Watch(self, begun)
        try:
            yield watch
        finally:
            if missing := choices - watch.complete:
                self.ends.labels("abort").inc(missing)


class Stages:
    """Gauges of the pipeline between two readings; they keep still while nothing is under way."""

    def __init__(
        self, prefix: str, registry: CollectorRegistry, totals: Callable[[], Totals]
    ) -> None:
        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(prefix + name, about, labels, registry=registry)

        self._cache = gauge("kv_cache_usage_perc", "Share of cache positions in use; 1 is all.")
        self._busy = gauge("stage_busy_share", "Share of the time that a stage works.", "stage")
        self._bubble = gauge("bubble_share", "Share of the time that stages wait, on average.")
        self._rows = gauge("rows_per_wave", "Rows of a decoding pass, on average.")
        self._totals = totals
        self._before = totals()
        for unknown in (self._bubble, self._rows):
            unknown.set(math.nan)

    def update(self) -> None:
        """Bring the gauges up to date."""
        now, before = self._totals(), self._before
        self._before = now
        self._cache.set(now.cache_used)
        if (seconds := now.seconds - before.seconds) > 0:
            busy = zip(now.busy_seconds, before.busy_seconds, strict=True)
            shares = [min(1.0, (new - old) / seconds) for new, old in busy]
            for stage, share in enumerate(shares):
                self._busy.labels(stage).set(share)
            self._bubble.set(1.0 - sum(shares) / len(shares))
        if (passes := now.passes - before.passes) > 0:
            self._rows.set((now.rows - before.rows) / passes)


class Watch:
    """The times of one request, from ``begun`` on, when it was asked for."""

    def __init__(self, metrics: Metrics, begun: float) -> None:
        self.complete = 0
        self._metrics = metrics
        self._begun = begun
        self._last: dict[int, float] = {}  # when a choice's newest token came

    def see(self, index: int, part: Chunk | Completion, *, first: bool) -> None:
        """Count a part of a choice, the prompt only with the ``first`` choice of it."""
        if isinstance(part, Completion):
            self._conclude(part, first=first)
        elif part.token_ids:
            now, count = time.monotonic(), len(part.token_ids)
            self._metrics.new.inc(count)
            if index not in self._last:
                self._metrics.first.observe(now - self._begun)
            else:
                for _ in part.token_ids:
                    self._metrics.next.observe((now - self._last[index]) / count)
            self._last[index] = now

    def _conclude(self, completion: Completion, *, first: bool) -> None:
        metrics, stats = self._metrics, completion.stats
        self.complete += 1
        metrics.ends.labels(completion.finish_reason).inc()
        if first:
            metrics.prompt.inc(stats.prompt_tokens)
        drafts = speculation([completion])
        metrics.rows.inc(drafts.rows)
        metrics.drafted.inc(drafts.drafted)
        metrics.accepted.inc(drafts.accepted)
        for position, count in enumerate(drafts.by_position):
            metrics.by_position.labels(position).inc(count)
        seconds = time.monotonic() - self._begun
        metrics.whole.observe(seconds)
        metrics.queue.observe(max(0.0, seconds - stats.prefill_seconds - stats.decode_seconds))
