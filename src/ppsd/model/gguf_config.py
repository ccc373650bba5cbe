"""Translate a GGUF file's metadata into the contents of a config.json.

Keys that would change the numbers are obeyed or refused, as llama.cpp reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ppsd import checks
from ppsd.errors import ModelError, UnsupportedModelError, shortened
from ppsd.model.gguf_header import Header
from ppsd.model.spec import require_supported

ROPE_KEYS = {
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",  # a remark
}
ROPE_KINDS = ("none", "linear", "yarn")
YARN_KEYS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
# These change what is computed unless they have one of these values.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
# Tokens that end an answer whatever the keys say; llama.cpp keeps the same list.
END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# After these a model of code begins another file; the first key that is given, or the first name.
FILE_ENDS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}


class _Keys:
    """The keys of one architecture, without their prefix; a value of another type is refused."""

    def __init__(self, header: Header, where: str) -> None:
        self._header = header
        self.where = where
        self.architecture = header.metadata.get("general.architecture")
        self._prefix = f"{self.architecture}."

    def integer(self, key: str, *default: int) -> int:
        """Return a positive integer; without default it must exist."""
        value = self._get(key, default)
        with checks.inside(self.where, ModelError):
            return checks.integer(self._named(key), value, 1, allowed="a positive integer")

    def number(self, key: str, *default: float) -> float:
        """Return a finite number that is not negative; without default it must exist."""
        value, allowed = self._get(key, default), "a finite number, not negative"
        with checks.inside(self.where, ModelError):
            return float(checks.number(self._named(key), value, 0, allowed=allowed))

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        value = self._get(key, (default,))
        with checks.inside(self.where, ModelError):
            return checks.string(self._named(key), value)

    def __contains__(self, key: str) -> bool:
        name = self._prefix + key
        return name in self._header.metadata or name in self._header.arrays

    def refuse_what_would_be_ignored(self) -> None:
        """Raise UnsupportedModelError for a key that changes the numbers and is not obeyed."""
        yarn = self.text("rope.scaling.type", "linear") == "yarn"
        obeyed = ROPE_KEYS | NEUTRAL.keys() | (YARN_KEYS.keys() if yarn else set())
        for name in sorted({*self._header.metadata, *self._header.arrays}):
            key = name.removeprefix(self._prefix)
            if key == name:
                continue
            value = self._header.metadata.get(name)
            unknown = key.startswith("rope.") and key not in obeyed
            if unknown or (key in NEUTRAL and value not in NEUTRAL[key]):
                told = "as an array" if value is None else shortened(repr(value))
                raise UnsupportedModelError(
                    f"{self.where}: metadata {shortened(name)} {told} is not supported"
                )

    def _get(self, key: str, default: Sequence[Any]) -> Any:
        name = self._prefix + key
        if name in self._header.arrays or (name not in self._header.metadata and not default):
            told = f"metadata {shortened(name)} is missing or not a single value"
            raise ModelError(f"{self.where}: {told}")
        return self._header.metadata.get(name, *default)

    def _named(self, key: str) -> str:
        return f"metadata {shortened(self._prefix + key)}"


def config_record(header: Header, where: str) -> dict[str, Any]:
    """Translate metadata into the contents of a config.json.

    Raises ModelError for a key that is missing or of another type, UnsupportedModelError for one
    that changes the numbers in a way that is not supported; both name the key.
    """
    keys, tensors = _Keys(header, where), header.tensors
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{where}: tensor token_embd.weight is missing")
    if keys.architecture is None:
        raise ModelError(f"{where}: metadata general.architecture is missing")
    require_supported(keys.architecture, where)
    keys.refuse_what_would_be_ignored()
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    whole = max(1, hidden // heads)
    rotary = keys.integer("rope.dimension_count", whole)
    stated = "rope.dimension_count" in keys
    head_dim = keys.integer("attention.key_length", rotary)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{where}: values of another size than keys are not supported")
    window = keys.number("attention.sliding_window", 0)
    return {
        "model_type": keys.architecture,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_record(keys)
        | ({"partial_rotary_factor": rotary / head_dim} if stated else {}),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "sliding_window": int(window) or None,
        "use_sliding_window": bool(window),
        "max_window_layers": 0,
        "eos_token_id": None,
    }


def _rope_record(keys: _Keys) -> dict[str, Any]:
    base = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    old = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", old)
    kind = keys.text("rope.scaling.type", "linear")  # llama.cpp's default where a factor is given
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(
            f"{keys.where}: metadata rope.scaling.type {shortened(repr(kind))} is not supported; "
            f"supported are {', '.join(ROPE_KINDS)}"
        )
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return base | {"rope_type": "default"}
    scaled = base | {"rope_type": kind, "factor": factor or 1.0}
    if kind == "yarn":
        length = keys.integer("context_length")
        scaled["original_max_position_embeddings"] = keys.integer(
            "rope.scaling.original_context_length", length
        )
        scaled |= {name: keys.number(key) for key, name in YARN_KEYS.items() if key in keys}
    return scaled


def token_id(header: Header, where: str, key: str, default: int | None = None) -> int | None:
    """Return the id that a key of the tokenizer holds; raises ModelError for anything else."""
    name = f"tokenizer.ggml.{key}"
    value = header.metadata.get(name, default)
    if name in header.arrays or (value is not None and type(value) is not int):
        told = "an array" if name in header.arrays else shortened(repr(value))
        raise ModelError(f"{where}: metadata {name} must be a token id, got {told}")
    return value


def end_ids(header: Header, tokens: Sequence[str], where: str) -> set[int]:
    """Return the ids that end an answer, by the file's keys and by the names of its ``tokens``.

    Raises ModelError for a key that holds no id.
    """

    stated = partial(token_id, header, where)
    ids = {name: i for i, name in enumerate(tokens)}
    default = 2 if header.metadata.get("tokenizer.ggml.model") == "llama" else None
    ends = {stated("eos_token_id", default), stated("eot_token_id"), stated("eom_token_id")}
    ends |= {ids.get(name) for name in END_NAMES}
    for key, names in FILE_ENDS.items():
        ends.add(stated(key, next((ids[name] for name in names if name in ids), None)))
    spelled = {tokens[i] for i in ends if i is not None and 0 <= i < len(tokens)}
    # Where an answer has several parts, these tokens end a part only.
    if {"<|return|>", "<|call|>"} <= spelled or {"<|calls|>", "<|flush|>"} <= spelled:
        ends.discard(ids.get("<|end|>"))
    if "<|tool_response>" in spelled:
        ends.discard(ids.get("</s>"))
    return {end for end in ends if end is not None}
