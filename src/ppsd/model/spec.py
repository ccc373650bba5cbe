"""Describe a model by sizes, rotary frequencies and switches, as numbers without any library.

Rank 0 computes a ModelSpec once and sends it as JSON; workers never import transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import inf, prod
from typing import TYPE_CHECKING, Any

from ppsd import checks
from ppsd.errors import ModelError, UnsupportedModelError, shortened

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
SUPPORTED_TEXT = "Llama (also Vicuna and SmolLM2), Mistral, Qwen2/2.5 and Qwen3"
ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = {  # the settings of each; any other would be ignored by transformers
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor", ORIGINAL},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow", "truncate", ORIGINAL),
        *("mscale", "mscale_all_dim"),
    },
}
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
# Sizes in [1, limit]: beyond any model of the family, and before they cost memory or time.
LIMITS = {
    "num_hidden_layers": 1024,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": (1 << 31) - 1,
    "sliding_window": (1 << 31) - 1,
}
READ = {
    *("model_type", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"),
    *("attention_bias", "mlp_bias", "quantization_config", "partial_rotary_factor"),
    *("use_sliding_window", "max_window_layers", "layer_types", "is_causal"),
    *("rope_theta", "rope_scaling", "rope_parameters", ORIGINAL, "tokenizer_class"),
}


@dataclass(frozen=True)
class ModelSpec:
    """One decoder-only model of the Llama family.

    ``inv_freq`` are the head_dim/2 rotary inverse frequencies, exact float32 values, and
    ``rope_scale`` the factor on cos and sin (yarn; else 1). ``max_context`` is in positions.
    Of ``vocab_size`` rows the first ``num_tokens`` have tokens, but for ``unused_ids``; a row
    without a token is never sampled.
    ``notices`` say where the model's files are not followed to the letter.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_tokens: int
    max_context: int
    rms_norm_eps: float
    inv_freq: tuple[float, ...]
    rope_scale: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    eos_ids: tuple[int, ...]
    unused_ids: tuple[int, ...] = ()
    notices: tuple[str, ...] = ()

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one decoder layer's tensors by their names inside the layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (queries, hidden, self.qkv_bias),
            "self_attn.k_proj": (keys, hidden, self.qkv_bias),
            "self_attn.v_proj": (keys, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, queries, self.o_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        for name, (rows, columns, _) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
        shapes |= {f"{name}.bias": (rows,) for name, (rows, _, bias) in linears.items() if bias}
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes

    @property
    def layer_parameters(self) -> int:
        return sum(prod(shape) for shape in self.layer_shapes().values())

    @property
    def head_parameters(self) -> int:
        """Count final norm and LM head, which the last stage holds even when tied."""
        return self.vocab_size * self.hidden_size + self.hidden_size

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary from which ``from_json`` restores an equal object."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ModelSpec:
        """Restore what ``to_json`` returned."""
        values = {field.name: record[field.name] for field in fields(cls)}
        names = ("inv_freq", "eos_ids", "unused_ids", "notices")
        lists = {name: tuple(record[name]) for name in names}
        return cls(**values | lists)


def require_supported(architecture: object, where: str) -> None:
    """Raise UnsupportedModelError unless ``architecture`` is of the Llama family."""
    if architecture not in SUPPORTED:
        raise UnsupportedModelError(
            f"{where}: architecture {shortened(repr(architecture))} is not supported; "
            f"supported are {SUPPORTED_TEXT}"
        )


def config_from_dict(record: Mapping[str, Any], where: str) -> PretrainedConfig:
    """Build transformers' own config object from the contents of a config.json.

    Only the four built-in classes are ever used, so code named by ``auto_map`` cannot run.
    Raises UnsupportedModelError for another architecture and ModelError for values that the
    class refuses; both name ``where``.
    """
    model_type = record.get("model_type")
    require_supported(model_type, where)
    check_sizes(record, where)
    for name in ("rope_parameters", "rope_scaling"):  # else transformers quotes all of it in a log
        _check_rope(record.get(name) or {}, where)
    from transformers import CONFIG_MAPPING

    # Only what is read here: others can fill the memory, as num_labels does.
    known = {key: value for key, value in record.items() if key in READ or key in LIMITS}
    try:
        return CONFIG_MAPPING[str(model_type)].from_dict(known)
    except Exception as error:  # the classes validate with several unrelated exception types
        raise ModelError(
            f"{where}: not a valid {model_type} configuration: {shortened(str(error))}"
        ) from error


def check_sizes(record: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for a size of another type or out of range; transformers checks neither."""
    for name, limit in LIMITS.items():
        value = record.get(name)
        if value is None:  # left out: transformers has a default
            continue
        with checks.inside(where, ModelError):
            checks.integer(name, value, 1, limit)


def token_ids(value: object, where: str) -> set[int]:
    """Read the eos_token_id of the file ``where``: one id, several, or none."""
    ids = [] if value is None else value if isinstance(value, list | tuple | set) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelError(
            f"{where}: eos_token_id must be a token id or a list of them, "
            f"got {shortened(repr(value))}"
        )
    return set(ids)


def spec_from_config(
    config: PretrainedConfig, name: str, more_eos: Iterable[int] = ()
) -> ModelSpec:
    """Describe the model of a transformers config.

    ``more_eos`` are end tokens that other files name, which are added to the config's own; ids
    that the model has no logit for are dropped with a notice. Raises UnsupportedModelError, naming
    the setting, where the model is not plain causal attention with full rotary embedding and a
    SiLU-gated MLP.
    """
    _refuse_unsupported(config, name)
    kind = config.model_type
    inv_freq, rope_scale = _rope(config, name)
    max_context, note = _context(config)
    if max_context < 2:  # a token of the prompt and one of the answer
        told = f" ({note})" if note else ""
        raise ModelError(f"{name}: a context of 1 token{told} leaves no room for an answer")
    eos_ids, dropped = speakable(
        {*token_ids(config.eos_token_id, name), *more_eos}, config.vocab_size
    )
    attention_bias = kind in ("llama", "qwen3") and bool(config.attention_bias)
    return ModelSpec(
        name=name,
        architecture=kind,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        num_tokens=config.vocab_size,
        max_context=max_context,
        rms_norm_eps=config.rms_norm_eps,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        qkv_bias=attention_bias or kind == "qwen2",
        o_bias=attention_bias,
        mlp_bias=kind == "llama" and bool(config.mlp_bias),
        qk_norm=kind == "qwen3",
        tie_embeddings=bool(config.tie_word_embeddings),
        eos_ids=eos_ids,
        notices=((note,) if note else ()) + dropped,
    )


def speakable(ends: Iterable[int], size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return those of the end tokens that lie in [0, size), and a notice about the others."""
    inside = tuple(sorted(token for token in set(ends) if 0 <= token < size))
    outside = sorted(set(ends).difference(inside))
    if not outside:
        return inside, ()
    told = shortened(", ".join(map(str, outside)))
    return inside, (f"end token {told} is ignored: the model's tokens are [0, {size - 1}]",)


def _refuse_unsupported(config: PretrainedConfig, name: str) -> None:
    require_supported(config.model_type, name)
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"{name}: hidden_act {shortened(repr(config.hidden_act))} is not supported; "
            "supported is 'silu'"
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups < 1 or heads % groups:
        raise UnsupportedModelError(
            f"{name}: num_key_value_heads {groups} is not supported; it has to divide "
            f"num_attention_heads {heads}"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            f"{name}: quantization_config is not supported; use unquantised safetensors or GGUF"
        )
    if not (causal := getattr(config, "is_causal", True)):  # by its truth, as transformers does
        raise UnsupportedModelError(
            f"{name}: is_causal {shortened(repr(causal))} is not supported; supported is true"
        )
    if _head_dim(config) < 2 or _head_dim(config) % 2:
        raise UnsupportedModelError(
            f"{name}: head_dim {_head_dim(config)} is not supported; supported are even numbers"
        )
    if not 0 <= config.rms_norm_eps < inf:
        raise ModelError(f"{name}: rms_norm_eps must be finite, got {config.rms_norm_eps}")
    others = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if others:
        raise UnsupportedModelError(f"{name}: layer_types {sorted(others)} are not supported")


def _head_dim(config: PretrainedConfig) -> int:
    stated: int | None = getattr(config, "head_dim", None)
    return stated or int(config.hidden_size // config.num_attention_heads)


def _context(config: PretrainedConfig) -> tuple[int, str]:
    """Return the longest context that full attention and fixed frequencies treat exactly.

    Up to its window, sliding-window attention *is* full attention. Dynamic NTK scaling leaves the
    frequencies alone up to max_position_embeddings and changes them with every position after.
    """
    limit: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window and window < limit and (types is None or "sliding_attention" in types):
        return window, f"capped from {limit} to the model's sliding window"
    if config.rope_parameters["rope_type"] == "dynamic":
        return limit, "dynamic rope scaling is used within the original context only"
    return limit, ""


def _rope(config: PretrainedConfig, name: str) -> tuple[tuple[float, ...], float]:
    """Return transformers' inverse frequencies, bit for bit in float32, and its cos/sin factor."""
    rope = config.rope_parameters
    _check_rope(rope, name)
    try:
        frequencies, scale = _frequencies(config)
        usable = all(0 < value < inf for value in (*frequencies, scale))
    except Exception as error:  # settings that are missing or of another type fail in many ways
        told = f"{type(error).__name__}: {error}"
        raise ModelError(f"{name}: rope settings cannot be used ({shortened(told)})") from error
    if not usable:
        told = shortened(repr(rope))
        raise ModelError(f"{name}: rope settings give frequencies out of range: {told}")
    return frequencies, scale


def _check_rope(rope: object, name: str) -> None:
    if not isinstance(rope, Mapping):
        raise ModelError(f"{name}: rope settings must be an object, got {shortened(repr(rope))}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{name}: rope_type {shortened(repr(kind))} is not supported; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(
            f"{name}: partial_rotary_factor {shortened(str(partial))} is not supported; "
            "supported is 1.0"
        )
    for key in sorted(rope.keys() - ROPE_TYPES[kind] - ROPE_COMMON):
        if rope[key] is not None:
            raise UnsupportedModelError(
                f"{name}: rope setting {key} {shortened(repr(rope[key]))} is not supported "
                f"with rope_type {kind!r}"
            )


def _frequencies(config: PretrainedConfig) -> tuple[tuple[float, ...], float]:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] == "default":  # Su et al. 2021, section 3.2.2; not in transformers' table
        dim = _head_dim(config)
        inv_freq = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        return tuple(inv_freq.tolist()), 1.0
    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return tuple(inv_freq.tolist()), float(scale)
