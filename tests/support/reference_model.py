"""The plain, unsplit, uncached reference model: what every stage split must equal.

It reads like the paper (one function, unfused weights, whole sequence at once) and shares no
forward code with the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ppsd.model.spec import ModelSpec
from ppsd.model.weights import TensorSource


def reference_logits(
    spec: ModelSpec, source: TensorSource, tokens: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Logits [T, V] of ``tokens`` [T] by the textbook forward pass in ``dtype``."""

    def weight(name: str) -> torch.Tensor:
        return source.load(name + ".weight", dtype)

    def project(x: torch.Tensor, name: str, has_bias: bool) -> torch.Tensor:
        return F.linear(x, weight(name), source.load(name + ".bias", dtype) if has_bias else None)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight(name), spec.rms_norm_eps)

    length = len(tokens)
    angles = torch.outer(torch.arange(length).float(), torch.tensor(spec.inv_freq)).repeat(1, 2)
    cos, sin = ((f * spec.rope_scale).to(dtype) for f in (angles.cos(), angles.sin()))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(length, count, spec.head_dim).transpose(0, 1)

    x = F.embedding(tokens, weight("model.embed_tokens"))
    for i in range(spec.num_layers):
        layer = f"model.layers.{i}."
        attention, feed_forward = layer + "self_attn.", layer + "mlp."
        h = norm(x, layer + "input_layernorm")
        q = heads(project(h, attention + "q_proj", spec.qkv_bias), spec.num_heads)
        k = heads(project(h, attention + "k_proj", spec.qkv_bias), spec.num_kv_heads)
        v = heads(project(h, attention + "v_proj", spec.qkv_bias), spec.num_kv_heads)
        if spec.qk_norm:
            q, k = norm(q, attention + "q_norm"), norm(k, attention + "k_norm")
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0) for t in (k, v))
        scores = (q @ k.transpose(1, 2)) / spec.head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        h = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        x = x + project(h, attention + "o_proj", spec.o_bias)
        h = norm(x, layer + "post_attention_layernorm")
        gate = project(h, feed_forward + "gate_proj", spec.mlp_bias)
        up = project(h, feed_forward + "up_proj", spec.mlp_bias)
        x = x + project(F.silu(gate) * up, feed_forward + "down_proj", spec.mlp_bias)
    head = "model.embed_tokens" if spec.tie_embeddings else "lm_head"
    return F.linear(norm(x, "model.norm"), weight(head))
