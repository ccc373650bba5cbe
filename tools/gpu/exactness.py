"""Check on a GPU what exactness rests on: plain against PPSD, and rows against their neighbours.

Three parts, each a list in the result:
  rows       products, norms and attention of a fixed number of rows: does a row keep its bits when
             its neighbours, its place or the masked tail change?
  decoding   stages as processes on one device: tokens and logits of PPSD, with one row and with
             trees, against plain decoding
  reference  tiny float64 models against transformers' generate: tokens

    python tools/gpu/exactness.py --device cuda --out exactness.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ppsd import LLM, SamplingParams
from ppsd.measure.verify import verify
from ppsd.measure.workload import Task
from ppsd.model.layers import attend, rms_norm
from ppsd.provenance import provenance
from tests.support.tiny_models import FAMILIES, reference_generate, save_tiny

WIDTHS = (4, 8, 16, 32)
ROWS = (1, 16)  # of a wave
TRIALS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = {  # hidden, inner, query heads, key/value heads, head size
    "135M": (576, 1536, 9, 3, 64),
    "8B": (4096, 14336, 32, 8, 128),
}
SENTENCES = ("Why is the sky blue?", "Count from one to twenty.", "Write a haiku about rain.")
Kernel = Callable[[torch.Tensor], torch.Tensor]


def rows_kernels(shape: Sequence[int], dtype: torch.dtype, device: str) -> dict[str, Kernel]:
    """Return what maps rows [n, C] to rows, by name."""
    hidden, inner, *_ = shape
    up = torch.randn(inner, hidden, device=device, dtype=dtype) / hidden**0.5
    down = torch.randn(hidden, hidden, device=device, dtype=dtype) / hidden**0.5
    norm = torch.randn(hidden, device=device, dtype=dtype)
    return {
        "product [F, C]": lambda x: F.linear(x, up),
        "product [C, C]": lambda x: F.linear(x, down),
        "norm": lambda x: rms_norm(x, norm, 1e-5),
    }


def keeps_bits(kernel: Kernel, width: int, like: torch.Tensor) -> tuple[int, int]:
    """Return in how many trials a row changed with its neighbours, and with its place."""
    neighbours = place = 0
    for trial in range(TRIALS):
        row = torch.randn_like(like)
        first, other = torch.randn(2, width, len(like), device=like.device, dtype=like.dtype)
        at, to = trial % width, (trial + 1) % width
        first[at] = other[at] = row
        moved = other.clone()
        moved[to] = row
        one = kernel(first)[at]
        neighbours += not torch.equal(one, kernel(other)[at])
        place += not torch.equal(one, kernel(moved)[to])
    return neighbours, place


def attention_keeps_bits(
    width: int, shape: Sequence[int], dtype: torch.dtype, device: str, bucket: int
) -> tuple[int, int]:
    """Return in how many trials a row changed with what is masked, and with a longer bucket."""
    _, _, heads, groups, size = shape
    contents = length = 0
    for trial in range(TRIALS):
        seen = 3 + 29 * trial % (bucket - 4)
        q = torch.randn(width, heads, size, device=device, dtype=dtype)
        keys, values = torch.randn(2, groups, 2 * bucket, size, device=device, dtype=dtype)
        positions = torch.full((width,), seen, device=device)
        reach = torch.arange(2 * bucket, device=device)
        mask = reach <= positions[:, None]
        one = attend(q, keys[:, :bucket], values[:, :bucket], mask[:, :bucket])[0]
        keys[:, seen + 1 :] = torch.randn_like(keys[:, seen + 1 :])
        again = attend(q, keys[:, :bucket], values[:, :bucket], mask[:, :bucket])[0]
        longer = attend(q, keys, values, mask)[0]
        contents += not torch.equal(one, again)
        length += not torch.equal(one, longer)
    return contents, length


def check_rows(device: str, tiny: bool) -> list[dict[str, Any]]:
    """Return what changed a row's bits, for each kernel, shape, dtype and width."""
    found = []
    for name, shape in list(SHAPES.items())[: 1 if tiny else None]:
        for dtype in DTYPES[:2] if tiny else DTYPES:
            like = torch.empty(shape[0], device=device, dtype=dtype)
            kernels = rows_kernels(shape, dtype, device)
            for width in WIDTHS[:2] if tiny else WIDTHS:
                about = {"shape": name, "dtype": str(dtype).removeprefix("torch."), "width": width}
                for title, kernel in kernels.items():
                    neighbours, place = keeps_bits(kernel, width, like)
                    found.append({**about, "kernel": title, "trials": TRIALS,
                                  "by_neighbours": neighbours, "by_place": place})  # fmt: skip
                for bucket in (256, 1024):
                    contents, length = attention_keeps_bits(width, shape, dtype, device, bucket)
                    found.append({**about, "kernel": f"attention over {bucket}", "trials": TRIALS,
                                  "by_masked_contents": contents,
                                  "by_longer_bucket": length})  # fmt: skip
    return found


def check_decoding(device: str, model: str | None, tiny: bool) -> list[dict[str, Any]]:
    """Return how PPSD's tokens and logits compare with plain decoding's."""
    tasks = [Task(str(i), "", ({"role": "user", "content": s},)) for i, s in enumerate(SENTENCES)]
    tasks = tasks[: 1 if tiny else None]
    found = []
    # Lookup is right often enough and always there; trained heads read verified rows and copy.
    heads = ("untrained",) if tiny else ("lookup", "auto")
    dtypes = ("float32",) if tiny else ("bfloat16", "float32")
    for head, dtype in product(heads, dtypes):
        for stages in (2,) if tiny else (2, 4):
            started = time.monotonic()
            with LLM(model, stages=stages, dtype=dtype, devices=(device,), head=head,
                     plan="off", mode="ppsd", gate=False, rows=ROWS[-1],
                     timeout=120.0) as llm:  # fmt: skip
                for rows, temperature in product(ROWS, (0.0,) if tiny else (0.0, 0.8)):
                    llm.use("ppsd", rows=rows)
                    params = SamplingParams(
                        max_tokens=8 if tiny else 48, temperature=temperature, seed=7
                    )
                    result = verify(llm, tasks, params)
                    found.append({
                        "head": head, "dtype": dtype, "stages": stages, "rows": rows,
                        "temperature": temperature, "prompts": len(tasks),
                        "exact": result.exact, "bitwise": result.bitwise,
                        "accepted": sum(c.accepted for c in result.comparisons),
                        "judged": sum(c.judged for c in result.comparisons),
                        "seconds": round(time.monotonic() - started, 1),
                    })  # fmt: skip
    return found


def check_reference(device: str, tiny: bool) -> list[dict[str, Any]]:
    """Return how many tokens of tiny float64 models are those of transformers on the CPU."""
    found = []
    prompt, count = list(range(5, 45, 2)), 16 if tiny else 48
    for family in list(FAMILIES)[: 1 if tiny else None]:
        with tempfile.TemporaryDirectory() as place:
            model = save_tiny(Path(place), family)
            plain = reference_generate(model, prompt, count)
            with LLM(str(model), stages=3, dtype="float64", devices=(device,), head="untrained",
                     plan="off", mode="ppsd", gate=False, timeout=120.0) as llm:  # fmt: skip
                params = SamplingParams(max_tokens=count, ignore_eos=True)
                tokens = llm.generate(prompt, params)[0].token_ids
        equal = sum(a == b for a, b in zip(plain, tokens, strict=False))
        found.append({"family": family, "tokens": count, "equal": equal})
    return found


def main() -> None:
    """Run the parts; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", help="directory, .gguf file or hub id; the default model's")
    parser.add_argument("--only", action="append", choices=("rows", "decoding", "reference"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "rows": lambda: check_rows(args.device, args.tiny),
        "reference": lambda: check_reference(args.device, args.tiny),
        "decoding": lambda: check_decoding(args.device, args.model, args.tiny),
    }
    result: dict[str, Any] = {"device": args.device, "provenance": provenance()}
    if args.device.startswith("cuda"):
        result["gpu"] = torch.cuda.get_device_name()
    for name, part in parts.items():
        if args.only is None or name in args.only:
            try:
                result[name] = part()
            except Exception as error:  # the other parts are worth having all the same
                result[name] = f"{type(error).__name__}: {error}"[:500]
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
