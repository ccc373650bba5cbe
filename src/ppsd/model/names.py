"""Names of a model's tensors, as Hugging Face's files have them, and their shapes."""

from __future__ import annotations

from ppsd.model.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


FUSED = {  # what LayerWeights holds as one matrix, with its bias, by the names inside a layer
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def layer_prefix(layer: int) -> str:
    """Return what precedes the names of ``ModelSpec.layer_shapes`` for one decoder layer."""
    return f"model.layers.{layer}."


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all of a model's tensors; a tied LM head is the embedding."""
    table = (spec.vocab_size, spec.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, FINAL_NORM: (spec.hidden_size,)}
    if not spec.tie_embeddings:
        shapes[LM_HEAD] = table
    layer = spec.layer_shapes()
    for index in range(spec.num_layers):
        shapes |= {layer_prefix(index) + name: shape for name, shape in layer.items()}
    return shapes


def lm_head_name(spec: ModelSpec) -> str:
    """Return the name of the tensor that serves as LM head."""
    return EMBEDDING if spec.tie_embeddings else LM_HEAD


def tensor_names(spec: ModelSpec, first: int, last: int) -> list[str]:
    """Return the names of the tensors that stage [first, last) owns, in loading order."""
    names = [name for i in range(first, last) for name in layer_tensor_names(spec, i)]
    if first == 0 or (last == spec.num_layers and spec.tie_embeddings):
        names.insert(0, EMBEDDING)
    if last == spec.num_layers:
        names.append(FINAL_NORM)
        names += [] if spec.tie_embeddings else [LM_HEAD]
    return names


def layer_tensor_names(spec: ModelSpec, layer: int) -> list[str]:
    """Return the names of one layer's tensors."""
    return [layer_prefix(layer) + name for name in spec.layer_shapes()]
