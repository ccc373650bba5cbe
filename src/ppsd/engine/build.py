"""Assemble a running pipeline from a layout: start workers, load, connect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ppsd.config import EngineConfig
from ppsd.engine.blame import raise_if_lost
from ppsd.engine.choose import on_torchrun
from ppsd.engine.drafter import Drafter, HeadDrafter, LookupDrafter, PacedDrafter
from ppsd.engine.first_stage import FirstStage
from ppsd.engine.layout import Layout, head_seconds
from ppsd.engine.links import Links, OwnLinks, StageLinks
from ppsd.errors import KernelError, PipelineError
from ppsd.model.exit_head import ExitHead, load_head, untrained_head
from ppsd.model.head_files import HeadConfig
from ppsd.model.stage import Stage, StageModel, StagePlan
from ppsd.model.weights import TensorSource
from ppsd.speculation.masks import mask_bytes
from ppsd.transport.base import Endpoint, Geometry
from ppsd.transport.inprocess import InProcessHub
from ppsd.worker.frame import frame_bytes
from ppsd.worker.inner_head import InnerHead
from ppsd.worker.judge import Judge
from ppsd.worker.loop import Worker
from ppsd.worker.machine import memory_used, pin, set_own_threads
from ppsd.worker.messages import Status
from ppsd.worker.pace import paced
from ppsd.worker.process import (
    Supervisor,
    WorkerConfig,
    endpoint_over,
    open_endpoint,
    stage_worker,
)
from ppsd.worker.recorder import Recorder
from ppsd.worker.scores import scores_bytes
from ppsd.worker.wave_messages import wave_bytes

if TYPE_CHECKING:
    from ppsd.transport.rendezvous import Meeting

CLOSE_GRACE_S = 1.0  # leaving takes a worker milliseconds

Progress = Callable[[int, int, int], None]  # rank, tensors loaded, tensors in all


def _own_gpus(config: EngineConfig) -> bool:
    """Return True if every stage has a GPU that no other stage uses."""
    devices = {config.device(rank) for rank in range(config.stages)}
    return len(devices) == config.stages and all(d.startswith("cuda") for d in devices)


class RunningPipeline:
    """A loaded pipeline and all it holds, processes and transport. ``close`` frees them.

    ``open`` pins the thread it runs on, and sets the thread count that PyTorch uses there; after
    it ``stage`` and ``links`` are ready for an engine.
    """

    stage: FirstStage
    links: Links
    program = "ppsd.worker"  # the module that worker processes run

    def __init__(self, config: EngineConfig, layout: Layout, source: TensorSource) -> None:
        self.layout = layout
        self.models: list[Stage] = []  # those of this process, by rank
        self._loaded: list[int] = []  # memory in use after loading
        self._supervisor = Supervisor(config.timeout, self.program)
        self._config = config
        self._source = source
        self._cleanup = ExitStack()

    def open(self, progress: Progress, check: Callable[[], None]) -> None:
        """Start workers and load all stages.

        From now on every wait calls ``check``, which raises to end it.
        """
        self._check = check
        try:
            self._open(progress)
        except BaseException:  # an interrupt, too: no worker is to be left behind
            self.close()
            raise

    def memory(self) -> list[int]:
        """Return the bytes in use by each process now; by one on another host, after loading."""
        pids = self._supervisor.pids()
        others = [
            memory_used(pids[rank]) if rank in pids else loaded
            for rank, loaded in enumerate(self._loaded)
            if rank
        ]
        return [memory_used(), *others]

    def pids(self) -> list[int]:
        """Return the process ids of the workers on this host."""
        return list(self._supervisor.pids().values())

    def check(self) -> None:
        """Raise PipelineError if a worker on this host is lost."""
        self._supervisor.check()

    def close(self) -> None:
        """Stop workers and give back everything; may be called twice."""
        self._cleanup.close()

    def _open(self, progress: Progress) -> None:
        config, layout = self._config, self.layout
        pin(layout.cores[0])
        set_own_threads(layout.threads)
        self._cleanup.callback(self._supervisor.close, CLOSE_GRACE_S)
        endpoint, workers = self._connect()
        self.endpoint = endpoint
        self._cleanup.callback(endpoint.close)
        plan = layout.plan(0, config.device(0))

        def loaded(done: int, total: int) -> None:
            raise_if_lost(endpoint, self._alive)
            progress(0, done, total)

        own = Stage(layout.spec, plan, self._source, loaded)
        self.models.insert(0, own)
        recorder = Recorder(config.trace)
        stage = self._paced(own, 0, recorder)
        head = self._load_head(layout.head, own, plan) if layout.head else None
        seconds = head_seconds(config.pace_of(0), layout, 0, layout.head)
        drafter = self._drafter(head, seconds)
        speaker = None if head is None else InnerHead(head, seconds)
        self.stage = FirstStage(stage, drafter, recorder, speaker)
        if layout.stages == 1:
            self.links = OwnLinks(
                Judge(stage, 0, layout.max_context, layout.slots), recorder, layout.slots
            )
        else:
            links = StageLinks(
                endpoint, timeout=config.timeout, check=self._alive, slots=layout.slots
            )
            self.links = links
            self._cleanup.callback(links.close)
            if not workers:
                ready = links.wait_ready(config.init_timeout, progress)
                self._check_kernels(ready)
                self._loaded = [memory_used(), *(s.fields["memory"] for s in ready)]
        del self._source  # unmaps the model's file

    def _alive(self) -> None:
        self._check()
        self._supervisor.check()

    def _check_kernels(self, ready: Sequence[Status]) -> None:
        """Raise KernelError unless all stages use what they were told to."""
        for status in ready:
            own, told = status.fields["kernels"], self.layout.kernels[status.source]
            if own != told:
                raise KernelError(f"stage {status.source} uses the kernels {own}, not {told}")

    def _drafter(self, head: ExitHead | None, seconds: float) -> Drafter | None:
        if head is None:
            lookup = self._config.head == "lookup" and self.layout.stages > 1
            return LookupDrafter() if lookup else None
        drafter = HeadDrafter(head, lookup=self._config.lookup)
        return PacedDrafter(drafter, seconds) if seconds else drafter

    def _load_head(self, head: HeadConfig, stage: Stage, plan: StagePlan) -> ExitHead:
        layout, embedding = self.layout, stage.embedding
        if not head.trained:
            mark = layout.identity.fingerprint
            return untrained_head(layout.spec, plan, self._source, mark, embedding)
        return load_head(
            Path(self._config.head),
            layout.spec,
            plan,
            self._source,
            layout.identity,
            embedding,
            force=self._config.force_head,
        )

    def _most_rows(self) -> int:
        """Return the most rows of a block or wave that is no piece of a prompt."""
        config = self._config
        return max(config.schedule.block, config.most_rows, config.concurrent)

    def _geometry(self) -> Geometry:
        config, spec, dtype = self._config, self.layout.spec, self.layout.dtype
        rows = max(config.prefill_chunk, self._most_rows())
        window = max(config.schedule.in_flight, self.layout.stages)
        fields = wave_bytes(self._most_rows(), config.concurrent)
        masks = self._most_rows() * mask_bytes(spec.num_tokens)
        verdicts = self._most_rows(), spec.hidden_size + spec.vocab_size
        return Geometry(
            size=self.layout.stages,
            forward_bytes=frame_bytes(rows, spec.hidden_size, dtype) + fields + masks,
            return_bytes=max(frame_bytes(*verdicts, dtype) + fields, scores_bytes(rows)),
            # a window of stale work, one of new work, requests that begin, and control
            frames=2 * window + config.concurrent + 3,
            slots=self.layout.slots,
        )

    def _connect(self) -> tuple[Endpoint, list[Worker]]:
        """Join the transport and start what is behind it; workers only when in-process."""
        geometry = self._geometry()
        kind = self._config.transport
        if self.layout.stages == 1 or kind == "inprocess":
            return self._connect_inprocess(geometry)
        if kind == "distributed" or on_torchrun(self._config):
            return self._connect_distributed(geometry), []
        return self._connect_shared_memory(geometry), []

    def _connect_inprocess(self, geometry: Geometry) -> tuple[Endpoint, list[Worker]]:
        hub = InProcessHub(geometry)
        workers = []
        for rank in range(1, geometry.size):
            config = self._worker_config(rank, geometry)
            worker, stage = stage_worker(config, hub.endpoint(rank), self._source)
            workers.append(worker)
            self.models.append(stage)
        hub.on_idle = lambda: any(worker.step(0.0) for worker in workers)
        return hub.endpoint(0), workers

    def _paced(self, stage: Stage, rank: int, recorder: Recorder) -> StageModel:
        return paced(stage, self._config.pace_of(rank), self._most_rows(), recorder)

    def _connect_shared_memory(self, geometry: Geometry) -> Endpoint:
        from ppsd.transport.shared_memory import SharedMemoryEndpoint, create_segment

        segment = create_segment(geometry)
        self._cleanup.callback(os.close, segment)
        for rank in range(1, geometry.size):
            self._supervisor.start(self._worker_config(rank, geometry, segment=segment))
        return SharedMemoryEndpoint(segment, geometry, 0, bool(self.layout.cores[0]))

    def _connect_distributed(self, geometry: Geometry) -> Endpoint:
        from ppsd.transport.rendezvous import listen, meet_from_environment

        ranks = range(1, geometry.size)
        if on_torchrun(self._config):
            meeting = meet_from_environment(self._config.init_timeout, self._alive)
            self._invite(meeting, geometry)
            return endpoint_over(self._worker_config(0, geometry), meeting, self._alive)
        with listen() as listener:  # before any rank looks for it
            master = listener.getsockname()
            for rank in ranks:
                self._supervisor.start(self._worker_config(rank, geometry, master=master))
            own = self._worker_config(0, geometry, master=master)
            return open_endpoint(own, self._alive, listener)

    def _invite(self, meeting: Meeting, geometry: Geometry) -> None:
        """Send all ranks their configuration; raises PipelineError if one does not take it."""
        from ppsd.transport.rendezvous import receive_text, send_text

        ranks = range(1, geometry.size)
        for rank in ranks:
            config, head = self._worker_config(rank, geometry), self.layout.inner[rank]
            config = replace(config, head="" if head is None else head.name)  # paths may differ
            send_text(meeting, rank, json.dumps(asdict(config)))
        for rank in ranks:
            if refusal := receive_text(meeting, rank, self._config.init_timeout, self._alive):
                raise PipelineError(f"rank {rank} does not take part: {refusal}")

    def _worker_config(
        self,
        rank: int,
        geometry: Geometry,
        *,
        segment: int | None = None,
        master: tuple[str, int] | None = None,
    ) -> WorkerConfig:
        config, layout, found = self._config, self.layout, self.layout.inner[rank]
        return WorkerConfig(
            rank=rank,
            model_path=str(layout.files.path),
            spec=layout.spec.to_json(),
            fingerprint=layout.identity.fingerprint,
            first=layout.bounds[rank],
            last=layout.bounds[rank + 1],
            max_context=layout.max_context,
            dtype=str(layout.dtype).removeprefix("torch."),
            device=config.device(rank),
            threads=layout.threads,
            cores=layout.cores[rank],
            timeout=config.timeout,
            init_timeout=config.init_timeout,
            trace=config.trace,
            geometry=asdict(geometry),
            kernels=layout.kernels[rank],
            segment=segment,
            master=master,
            own_gpus=_own_gpus(config),
            pace=config.pace_of(rank),
            loose=layout.loose,
            head="" if found is None else str(found.path),
            head_seconds=head_seconds(
                config.pace_of(rank), layout, rank, None if found is None else found.config
            ),
            block=self._most_rows(),
        )
