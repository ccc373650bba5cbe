"""Time a stage's step on a GPU: an 8B-shaped model with random weights, cut into four stages.

By rows (1 to 64), eager and as a CUDA graph, against the time that reading the weights takes; what
a tick costs beyond its kernels; an exit head; a hop between two processes. Written as JSON, with a
profile that ``ppsd plan --profile`` reads.

    python tools/gpu/step.py --device cuda --out step.json --profile-out profile.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from ppsd.model.layers import LayerWeights, Rope, rms_norm
from ppsd.model.packed import whole
from ppsd.model.spec import ModelSpec, spec_from_config
from ppsd.model.steps import CudaGraphs, Graphs, Step
from ppsd.plan.profile import HeadTime, LayerTime, Profile, RowsTime, Timing
from ppsd.plan.sizes import Sizes
from ppsd.provenance import provenance

STAGES = 4
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 1024, 4096)
REPEATS = 30
DRAFT_VOCABULARY = 32_768
BIG: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "eos_token_id": 2,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 1024, "tie_word_embeddings": False, "eos_token_id": 2,
}  # fmt: skip

Work = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """One device and model shape to be timed."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    tiny: bool

    @property
    def is_gpu(self) -> bool:
        """True on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def layers(self) -> int:
        """Layers of a stage."""
        return self.spec.num_layers // STAGES

    def random(self, *shape: int) -> torch.Tensor:
        """Return numbers of a size that leaves rows finite."""
        return torch.randn(shape, device=self.device, dtype=self.dtype) / math.sqrt(shape[-1])

    def seconds(self, work: Work) -> Timing:
        """Return the wall time of ``work`` from launch to end, over repeats."""
        for _ in range(3):
            work()
        times = []
        for _ in range(3 if self.tiny else REPEATS):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return Timing.of(times)

    def kernel_seconds(self, work: Work, repeats: int = 20) -> float:
        """Return the time of ``work`` where many follow one another without a wait between."""
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - started) / repeats

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def random_layer(bench: Bench) -> LayerWeights:
    """Return a decoder layer's weights."""
    spec = bench.spec
    inner, hidden = spec.num_heads * spec.head_dim, spec.hidden_size
    keys = spec.num_kv_heads * spec.head_dim
    norms = torch.ones(2, hidden, device=bench.device, dtype=bench.dtype)
    return LayerWeights(
        input_norm=norms[0],
        qkv=bench.random(inner + 2 * keys, hidden),
        o=bench.random(hidden, inner),
        post_norm=norms[1],
        gate_up=bench.random(2 * spec.intermediate_size, hidden),
        down=bench.random(hidden, spec.intermediate_size),
    )


def caches(
    bench: Bench, layers: int, context: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return keys and values of each layer."""
    spec = bench.spec
    shape = (spec.num_kv_heads, context + 1, spec.head_dim)
    keys, values = ([bench.random(*shape) for _ in range(layers)] for _ in range(2))
    return keys, values


def time_steps(bench: Bench, layers: Sequence[LayerWeights]) -> list[dict[str, Any]]:
    """Return the time of a stage's step by rows and context, eager and as a graph."""
    found = []
    longest = 512 if bench.tiny else max(CONTEXTS) + 64
    rope = Rope(bench.spec, longest + 1, bench.dtype, bench.device)
    cache = caches(bench, len(layers), longest)
    for context in CONTEXTS[:1] if bench.tiny else CONTEXTS:
        for width in WIDTHS[:3] if bench.tiny else WIDTHS:
            rows = bench.random(width, bench.spec.hidden_size)
            positions = range(context, context + width)
            for graphs in (None, CudaGraphs()) if bench.is_gpu else (None,):
                step = Step(layers, bench.spec, rope, cache, width, graphs)

                def tick(
                    step: Step = step, rows: torch.Tensor = rows, at: range = positions
                ) -> None:
                    result = step.start(rows, at)
                    result[:1, :8].cpu()

                def launch(
                    step: Step = step, rows: torch.Tensor = rows, at: range = positions
                ) -> None:
                    step.start(rows, at)

                wall = bench.seconds(tick)
                found.append({
                    "context": context, "rows": width, "graph": graphs is not None,
                    "tick": vars(wall), "kernels": bench.kernel_seconds(launch),
                })  # fmt: skip
    return found


def time_reading(bench: Bench, layers: Sequence[LayerWeights]) -> dict[str, Any]:
    """Return how long reading a stage's weights once takes at least: a sum over their bytes."""
    weights = [w for layer in layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    size = sum(whole(w).nbytes for w in weights)
    big = torch.empty(size // 2, dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(big)
    copied = bench.seconds(lambda: other.copy_(big))
    return {"bytes": size, "copy_of_half": vars(copied), "seconds": copied.median}


def time_head(bench: Bench) -> list[dict[str, Any]]:
    """Return the time of a draft: one layer, norm and a product with the draft vocabulary."""
    layer = [random_layer(bench)]
    rope = Rope(bench.spec, 513, bench.dtype, bench.device)
    cache = caches(bench, 1, 512)
    size = 128 if bench.tiny else DRAFT_VOCABULARY
    table, norm = bench.random(size, bench.spec.hidden_size), layer[0].input_norm

    def draft(rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rms_norm(rows, norm, 1e-5), table).topk(8).indices

    found = []
    for width in (1, 16):
        rows = bench.random(width, bench.spec.hidden_size)
        graphs: Graphs | None = CudaGraphs() if bench.is_gpu else None
        step = Step(layer, bench.spec, rope, cache, width, graphs, draft)

        def tick(step: Step = step, rows: torch.Tensor = rows, width: int = width) -> None:
            result = step.start(rows, range(100, 100 + width))
            result.cpu()

        found.append({"rows": width, "draft_vocab": size, "tick": vars(bench.seconds(tick))})
    return found


def time_lm_head(bench: Bench) -> list[dict[str, Any]]:
    """Return the time of final norm, LM head and the greedy token, by rows."""
    table = bench.random(bench.spec.vocab_size, bench.spec.hidden_size)
    norm = torch.ones(bench.spec.hidden_size, device=bench.device, dtype=bench.dtype)
    found = []
    for width in (1, 4, 16, 64)[: 2 if bench.tiny else None]:
        rows = bench.random(width, bench.spec.hidden_size)

        def verdict(rows: torch.Tensor = rows) -> None:
            F.linear(rms_norm(rows, norm, 1e-5), table).argmax(-1).cpu()

        found.append({"rows": width, "tick": vars(bench.seconds(verdict))})
    return found


def _echo(rows: torch.Tensor, turn: Any, rounds: int) -> None:
    """Send back, by changing the number at its end, each message that another process writes."""
    for i in range(1, rounds + 1):
        while turn.value != 2 * i - 1:
            pass
        rows.add_(1)
        if rows.is_cuda:
            torch.cuda.synchronize()
        turn.value = 2 * i


def time_hop(bench: Bench) -> dict[str, Any]:
    """Return the time of a message to another process on the same device and back, halved."""
    context, rounds = get_context("spawn"), 20 if bench.tiny else 300
    rows = torch.zeros(16, bench.spec.hidden_size, device=bench.device, dtype=bench.dtype)
    if not bench.is_gpu:
        rows.share_memory_()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
    turn = context.Value("q", 0)
    child = context.Process(target=_echo, args=(rows, turn, rounds), daemon=True)
    child.start()
    times = []
    deadline = time.monotonic() + 60
    for i in range(1, rounds + 1):
        started = time.perf_counter()
        rows.add_(1)
        bench.wait()
        turn.value = 2 * i - 1
        while turn.value != 2 * i:
            if time.monotonic() > deadline:
                child.kill()
                return {"error": "the other process did not answer within a minute"}
        times.append((time.perf_counter() - started) / 2)
    child.join(10)
    return {"rows": 16, "one_way": vars(Timing.of(times[len(times) // 3 :]))}


def profile_of(bench: Bench, found: dict[str, Any]) -> Profile:
    """Return the times as ``ppsd plan`` reads them."""
    spec = bench.spec
    steps = [s for s in found["steps"] if s["graph"] == bench.is_gpu]
    layer = tuple(
        LayerTime(s["context"], s["rows"], _shared(s["tick"], bench.layers)) for s in steps
    )
    beyond = max(0.0, min(s["tick"]["median"] - s["kernels"] for s in steps))
    draft = Timing(**found["head"][0]["tick"])
    scored = found["head"][0]["draft_vocab"]
    bare = Timing.computed(
        scored * spec.hidden_size * 2 / (found["reading"]["bytes"] / found["reading"]["seconds"])
    )
    hop = Timing(**found["hop"]["one_way"]) if "one_way" in found["hop"] else Timing.computed(2e-5)
    return Profile(
        model="8B-shaped, random weights" if not bench.tiny else "tiny, random weights",
        fingerprint="0" * 64,
        sizes=Sizes.of(spec),
        dtype=str(bench.dtype).removeprefix("torch."),
        itemsize=bench.dtype.itemsize,
        threads=1,
        transport="two processes on one device",
        source="tools/gpu/step.py",
        measured=True,
        layer=layer,
        lm_head=tuple(RowsTime(s["rows"], Timing(**s["tick"])) for s in found["lm_head"]),
        heads=(HeadTime(0, scored, bare), HeadTime(1, scored, draft)),
        entry=Timing.computed(0.0),
        latency=hop,
        bandwidth=found["reading"]["bytes"] / 2 / found["reading"]["seconds"],
        overhead=Timing.computed(beyond),
        contention=Timing.computed(1.0),
        kernels="cuda graphs" if bench.is_gpu else "eager",
        provenance=found["provenance"],
    )


def _shared(timing: dict[str, float], layers: int) -> Timing:
    """Return a stage's time as one layer's."""
    median, low, high = (timing[name] / layers for name in ("median", "low", "high"))
    return Timing(median, low, high, int(timing["repeats"]))


def main() -> None:
    """Time the parts; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile-out", type=Path)
    args = parser.parse_args()
    config = transformers.LlamaConfig(**(SMALL if args.tiny else BIG))
    spec = spec_from_config(config, "8B-shaped")
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    bench = Bench(spec, torch.device(args.device), dtype, args.tiny)
    torch.manual_seed(0)
    layers = [random_layer(bench) for _ in range(bench.layers)]
    parts: dict[str, Callable[[], Any]] = {
        "reading": lambda: time_reading(bench, layers),
        "steps": lambda: time_steps(bench, layers),
        "head": lambda: time_head(bench),
        "lm_head": lambda: time_lm_head(bench),
        "hop": lambda: time_hop(bench),
    }
    found: dict[str, Any] = {"shape": SMALL if args.tiny else BIG, "stages": STAGES,
                             "provenance": provenance()}  # fmt: skip
    if bench.is_gpu:
        found["gpu"] = torch.cuda.get_device_name()
    with torch.inference_mode():
        for name, part in parts.items():
            found[name] = part()
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.profile_out:
        profile_of(bench, found).save(args.profile_out)


if __name__ == "__main__":
    main()
