"""Random decoder layers and what they give."""

from __future__ import annotations

import torch

from ppsd.model.cache import KVCache
from ppsd.model.layers import LayerWeights, Rope
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import new_runner

CPU = torch.device("cpu")
WIDE = torch.float64
CONTEXT = 320


def rand(*shape: int, dtype: torch.dtype = WIDE) -> torch.Tensor:
    return torch.randn(shape, dtype=WIDE).to(dtype)


def random_layer(spec: ModelSpec, dtype: torch.dtype = WIDE) -> LayerWeights:
    width, inner, size = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads = spec.num_heads + 2 * spec.num_kv_heads
    bias, norm = spec.qkv_bias, spec.qk_norm
    shapes = {
        "input_norm": (width,),
        "qkv": (heads * size, width),
        "o": (width, spec.num_heads * size),
        "post_norm": (width,),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
        "qkv_bias": (heads * size,) if bias else None,
        "o_bias": (width,) if bias else None,
        "gate_up_bias": (2 * inner,) if bias else None,
        "down_bias": (width,) if bias else None,
        "q_norm": (size,) if norm else None,
        "k_norm": (size,) if norm else None,
    }
    weights = {k: None if s is None else rand(*s, dtype=dtype) / 3 for k, s in shapes.items()}
    return LayerWeights(**weights)


def run_layer(
    spec: ModelSpec, w: LayerWeights, x: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run rows ``x`` through a layer in blocks of these sizes; its output and its keys."""
    cache = KVCache(1, spec.num_kv_heads, CONTEXT, spec.head_dim, x.dtype, CPU)
    runner = new_runner([w], spec, Rope(spec, CONTEXT, x.dtype, CPU), cache)
    outputs = []
    for rows in torch.split(x, sizes):
        started = runner.start(rows, cache.lengths[0])
        assert started.advance()
        outputs.append(started.hidden)
    return torch.cat(outputs), cache.keys[0][0, :, : cache.lengths[0]]
