"""Tiny models of every supported family, written to disk as transformers would, with tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ppsd.model.head_files import HeadConfig, save_head
from ppsd.model.identity import Identity
from ppsd.model.names import FINAL_NORM, layer_prefix
from ppsd.model.source import ModelFiles, describe
from ppsd.model.weights import open_source

LAYERS = 6
VOCAB = 300  # byte-level: 256 bytes, some merges, three special tokens
TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # flat random logits would hide mistakes
    "eos_token_id": 2,
    "bos_token_id": 1,
}
ROPE = {"rope_theta": 10000.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biased": (
        "LlamaConfig",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}


def save_tiny(directory: Path, family: str = "llama", seed: int = 0) -> Path:
    """Write a random float64 model of ``family`` and its tokenizer; return the directory."""
    class_name, changes = FAMILIES[family]
    config = getattr(transformers, class_name)(**SIZES | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide mistakes too
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return directory


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 4,  # the model's vocabulary is padded, as real ones are
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


def load_reference(directory: Path) -> Any:
    """The model in transformers, in float64 throughout.

    Its norms compute in float32 even for float64 models; that rounding is no part of the model,
    so they get the textbook formula here.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)
    return model


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)


def reference_generate(directory: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """What ``transformers.generate`` says greedily in float64."""
    model = load_reference(directory)
    model.generation_config.pad_token_id = 0
    # padded ids have no token: the pipeline never samples them, so the reference may not either
    output = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=new_tokens,
        suppress_tokens=list(range(VOCAB - 4, VOCAB)),
    )
    return output[0, len(prompt) :].tolist()


def save_perfect_head(directory: Path, model: Path, exit_layer: int, sign: float = 1.0) -> Path:
    """A head that *is* the rest of the model; with ``sign`` -1 its logits are turned round."""
    files = ModelFiles(model.name, model, is_gguf=False)
    spec, source = describe(files), open_source(model)
    weights = {
        "norm.weight": sign * source.load(FINAL_NORM, torch.float64),
        "input.weight": torch.eye(spec.hidden_size, dtype=torch.float64),
    }
    for i in range(exit_layer, spec.num_layers):
        for name in spec.layer_shapes():
            tensor = source.load(layer_prefix(i) + name, torch.float64)
            weights[layer_prefix(i - exit_layer) + name] = tensor
    identity = Identity.of(spec, source)
    config = HeadConfig(
        kind="transformer",
        exit_layer=exit_layer,
        layers=spec.num_layers - exit_layer,
        draft_vocab=None,
        base_model=spec.name,
        fingerprint=identity.fingerprint,
        model=identity.to_json(),
    )
    save_head(directory, config, weights)
    return directory
