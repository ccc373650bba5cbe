"""Packed weights: the numbers of their file to the bit, and the products of the whole weight."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Quant
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, Qwen3Config

from ppsd.model import kernel_build, kernels
from ppsd.model.gguf_codes import KINDS, codes_of
from ppsd.model.kernels import Kind, PackedWeight
from ppsd.model.layers import LayerWeights, Product
from ppsd.model.names import EMBEDDING, expected_shapes, tensor_names
from ppsd.model.packed import Codes, can_pack, first_rows, pack, packed_bytes, whole
from ppsd.model.runners import CompiledRunner
from ppsd.model.source import describe, resolve_model
from ppsd.model.spec import spec_from_config
from ppsd.model.stage import Stage, StagePlan, packable, weight_bytes
from ppsd.model.weights import TensorSource, open_source
from tests.support.layers import rand, random_layer, run_layer
from tests.support.trees import Trees

BF16, CPU = torch.bfloat16, torch.device("cpu")
FORMATS = [Quant.Q4_0, Quant.Q4_1, Quant.Q4_K, Quant.Q8_0]
MATRICES = ("qkv", "o", "gate_up", "down")
EMULATION = Path(__file__).parents[1] / "support" / "avx512"
needs_kernels = pytest.mark.skipif(kernels.loaded() is None, reason="no C compiler")


@pytest.fixture(scope="module", autouse=True)
def _packing() -> Iterator[None]:
    """Where the CPU lacks AVX512_BF16, the kernels with its instructions in plain C."""
    if kernels.loaded() is None or kernels.packs():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        compiler = os.environ.get("CC", "cc")
        patch.setenv("CC", f"{compiler} -I{shlex.quote(str(EMULATION))} -D__AVX512BF16__")
        patch.setattr(kernels, "_in_use", None)
        patch.setattr(kernel_build, "shipped", lambda machine: None)
        assert kernels.packs()
        yield


@pytest.fixture(autouse=True)
def _as_in_decoding() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def stored(quant: Quant, rows: int, size: int) -> np.ndarray:
    """Blocks of random weights."""
    if quant is not Quant.Q4_K:  # which the package can read, not write
        return quantize(rand(rows, size).float().numpy() / 8, quant)
    blocks = torch.randint(256, (rows, size // 256, 144), dtype=torch.uint8).numpy()
    scales = rand(rows, size // 256, 2).abs().numpy().astype(np.float16) / 100
    blocks[:, :, :4] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def packed_as(quant: Quant, rows: int, size: int) -> PackedWeight:
    return pack([codes_of(stored(quant, rows, size), quant)])


def numbers(codes: Codes) -> torch.Tensor:
    """What the codes mean, by the book."""
    blocks = codes.codes.float().view(len(codes.codes), -1, 32)
    offsets = 0 if codes.offsets is None else codes.offsets.float()[..., None]
    return (blocks * codes.scales.float()[..., None] + offsets).flatten(1).to(BF16)


@pytest.mark.parametrize("quant", FORMATS)
def test_codes_mean_what_the_file_says(quant: Quant) -> None:
    rows = stored(quant, 6, 512)
    codes = codes_of(rows, quant)
    assert codes.codes.shape == (6, 512)
    assert codes.kind == KINDS[quant]
    assert torch.equal(numbers(codes), torch.from_numpy(dequantize(rows, quant)).to(BF16))


@pytest.mark.parametrize("quant", [Quant.Q4_1, Quant.Q4_K, Quant.Q8_0])
@pytest.mark.parametrize("size", [256, 768])
def test_codes_lie_where_the_kernel_reads_them(quant: Quant, size: int) -> None:
    """By the layout that products.h states, without it."""
    codes = codes_of(stored(quant, 8, size), quant)
    packed = pack([codes])
    assert packed.data.nbytes == packed_bytes(8, size, KINDS[quant])
    blocks, width = size // 32, 128 if codes.offsets is None else 64
    for row, own in enumerate(codes.codes.view(8, blocks, 32)):
        tile = packed.data[row // 4]
        values = tile[blocks * width :].clone().view(codes.scales.dtype)
        for block, expected in enumerate(own):
            data = tile[block * width : (block + 1) * width].clone()
            if codes.offsets is None:
                assert torch.equal(
                    data.view(torch.int8).view(4, 32)[row % 4], expected.view(torch.int8)
                )
                assert values[4 * block + row % 4] == codes.scales[row, block]
                continue
            words = data.view(torch.int16).int()
            assert torch.equal(words >> 4 * (row % 4) & 15, expected.int())
            assert values[8 * block + row % 4] == codes.scales[row, block]
            assert values[8 * block + 4 + row % 4] == codes.offsets[row, block]


@needs_kernels
@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("size", [32, 64, 96, 576, 1056, 2144])
def test_products_have_the_bits_of_those_with_the_whole_weight(quant: Quant, size: int) -> None:
    size = 512 if quant is Quant.Q4_K else size
    parts = [codes_of(stored(quant, rows, size), quant) for rows in (6, 5, 1)]
    packed = pack(parts)
    whole_weight = torch.cat([numbers(part) for part in parts])
    assert torch.equal(packed.whole(), whole_weight)
    assert torch.equal(whole(first_rows(packed, 4)), whole_weight[:4])
    for rows in (1, 2, 3, 4, 5, 16, 17):
        x, bias = rand(rows, size, dtype=BF16), rand(12, dtype=BF16)
        assert torch.equal(Product(packed)(x), Product(whole_weight)(x))
        assert torch.equal(Product(packed, bias)(x), Product(whole_weight, bias)(x))


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_has_the_bits_of_one_with_whole_weights(threads: int) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 416, "head_dim": 64, "vocab_size": 40}
    for config in (
        LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, attention_bias=True),
        Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=4),
    ):
        spec = spec_from_config(config, "small")
        layer = random_layer(spec, BF16)
        kinds = dict(zip(MATRICES, (Quant.Q4_1, Quant.Q8_0, Quant.Q4_0, Quant.Q4_1), strict=True))
        matrices = {n: packed_as(k, *getattr(layer, n).shape) for n, k in kinds.items()}
        packed = replace(layer, **matrices)
        unpacked = replace(layer, **{name: weight.whole() for name, weight in matrices.items()})
        x = rand(40, 192, dtype=BF16)
        torch.set_num_threads(threads)
        for blocks in ([1] * 40, [3, 16, 1, 17, 3]):
            pairs = zip(*(run_layer(spec, w, x, blocks) for w in (packed, unpacked)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@needs_kernels
def test_rows_of_trees_have_the_bits_of_plain_decoding() -> None:
    """With packed weights, and with the tiles of keys of AVX512."""
    sizes = {"hidden_size": 192, "intermediate_size": 416, "head_dim": 64, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=4)
    spec, layers = spec_from_config(config, "small"), []
    for _ in range(2):
        layer = random_layer(spec, BF16)
        packed = {n: packed_as(Quant.Q4_1, *getattr(layer, n).shape) for n in MATRICES}
        layers.append(replace(layer, **packed))
    for seed in range(3):
        Trees(CompiledRunner, layers, spec, seed).life()


def test_only_what_pays_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "packs", lambda: True)
    assert can_pack(4, 128)
    assert not can_pack(6, 128)
    assert can_pack(4, 96)
    assert not can_pack(4, 144)
    monkeypatch.setattr(kernels, "packs", lambda: False)
    assert not can_pack(4, 128)


class Described:
    """A source that knows nothing but the kinds of its weights."""

    def __init__(self, **kinds: Kind | None) -> None:
        self._kinds = kinds

    def kind(self, name: str) -> Kind | None:
        return self._kinds[name]


@pytest.mark.parametrize(
    ("kinds", "changed", "expected"),
    [
        ((Kind.CODES_4, Kind.CODES_4), {}, True),
        ((Kind.CODES_8, Kind.CODES_8), {}, True),
        ((Kind.CODES_4, Kind.CODES_8), {}, False),
        ((Kind.CODES_4, Kind.CODES_4_WIDE), {}, False),
        ((Kind.CODES_4, None), {}, False),
        ((Kind.CODES_4, Kind.CODES_4), {"dtype": torch.float32}, False),
        ((Kind.CODES_4, Kind.CODES_4), {"device": torch.device("meta")}, False),
        ((Kind.CODES_4, Kind.CODES_4), {"packed": False}, False),
    ],
)
def test_parts_are_packed_together_or_not_at_all(
    kinds: tuple[Kind | None, Kind | None],
    changed: dict,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "packs", lambda: True)
    plan = replace(StagePlan(0, 1, 8, BF16, CPU, packed=True), **changed)
    source = cast("TensorSource", Described(a=kinds[0], b=kinds[1]))  # nothing else is asked of it
    assert packable(source, plan, {"a": (3, 128), "b": (1, 128)}, ["a", "b"]) is expected
    assert not packable(source, plan, {"a": (3, 128), "b": (2, 128)}, ["a", "b"])
    if kinds[0] is not None:
        assert packable(source, plan, {"a": (4, 128)}, ["a"]) is (not changed)


def test_parts_of_odd_sizes_are_counted_as_the_whole_that_they_become(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after pruning: 130 rows of the gate and 130 of the up projection are 65 tiles of four."""
    monkeypatch.setattr(kernels, "packs", lambda: True)
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    plan = StagePlan(1, 2, 8, BF16, CPU, packed=True)

    def total(neurons: int) -> int:
        config = LlamaConfig(**sizes, intermediate_size=neurons, num_hidden_layers=3)
        spec = spec_from_config(config, "odd")
        kinds = dict.fromkeys(tensor_names(spec, 1, 2), Kind.CODES_8)
        kinds |= {name: None for name in kinds if "down" in name or "norm" in name}
        return weight_bytes(spec, plan, cast("TensorSource", Described(**kinds)))

    more = packed_bytes(4, 128, Kind.CODES_8) + 2 * 128 * BF16.itemsize
    assert more <= total(130) - total(128) < more + 128  # aligned


def held(stage: Stage) -> int:
    """Bytes of the weights of a last stage's layers, norm and LM head."""
    layers = [weight for layer in stage.layers for weight in vars(layer).values()]
    weights = [*layers, stage.norm, stage.lm_head]
    tensors = [w.data if isinstance(w, PackedWeight) else w for w in weights]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


@needs_kernels
def test_a_stage_of_the_default_model_is_packed_and_has_the_same_bits() -> None:
    path = resolve_model(None)
    spec, source = describe(path), open_source(path.path)
    plan = StagePlan(spec.num_layers - 1, spec.num_layers, 32, BF16, CPU)
    steps: list[tuple[int, int]] = []
    plain = Stage(spec, plan, source, lambda *step: steps.append(step))
    packed = Stage(spec, replace(plan, packed=True), source, lambda *step: steps.append(step))
    assert steps[: len(steps) // 2] == steps[len(steps) // 2 :]
    assert isinstance(packed.lm_head, PackedWeight)
    assert isinstance(plain.lm_head, torch.Tensor)
    for name in MATRICES:
        own: LayerWeights = packed.layers[0]
        assert isinstance(getattr(own, name), PackedWeight)
        assert torch.equal(whole(getattr(own, name)), getattr(plain.layers[0], name))
    assert expected_shapes(spec)[EMBEDDING] == packed.lm_head.shape
    x = rand(5, spec.hidden_size, dtype=BF16)
    for stage in (plain, packed):
        least = held(stage)
        assert least <= weight_bytes(spec, stage.plan, source) < least + 16 * 128  # aligned
    assert held(packed) < 0.61 * held(plain)
    rows = [stage.forward(x, 0) for stage in (plain, packed)]
    assert torch.equal(plain.logits(rows[0]), packed.logits(rows[1]))


@needs_kernels
@pytest.mark.parametrize("last", [1, 30])
def test_a_packed_stage_that_begins_has_room_for_the_embedding(last: int) -> None:
    """In one stage the LM head is the same numbers in codes; before others there is none."""
    path = resolve_model(None)
    spec, source = describe(path), open_source(path.path)
    stage = Stage(spec, StagePlan(0, last, 32, BF16, CPU, packed=True), source)
    assert isinstance(stage.embedding, torch.Tensor)
    assert isinstance(stage.lm_head, PackedWeight) == (last == spec.num_layers)
    total = held(stage) + stage.embedding.nbytes
    assert total <= weight_bytes(spec, stage.plan, source) < total + 256 * 128  # aligned
