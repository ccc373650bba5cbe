"""Whose head it is: what conversions change is overlooked, what training changes is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppsd import LLM, SamplingParams
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError, HeadError
from ppsd.model.head_files import CONFIG_FILE, read_head_config
from ppsd.model.head_library import SHIPPED
from ppsd.model.identity import Identity
from ppsd.model.source import describe, resolve_model
from ppsd.model.weights import open_source
from tests.support.tiny_models import save_perfect_head, save_tiny

Tensors = dict[str, torch.Tensor]
NORM, FIRST_NORM = "model.norm.weight", "model.layers.0.input_layernorm.weight"
NEXT_TO_1E_6 = 9.999999974752427e-07
SETTINGS = {"stages": 2, "dtype": "float64", "transport": "inprocess", "plan": "off"}


def identity(directory: Path) -> Identity:
    files = resolve_model(str(directory))
    return Identity.of(describe(files), open_source(files.path))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def changed(model: Path, change: Callable[[Tensors], object], **config: object) -> Path:
    """A copy of the model's directory with other tensors and settings."""
    copy = model.parent / f"copy-{len(list(model.parent.iterdir()))}"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    settings = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(settings))
    return copy


def rounded(dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()})


def rescaled(tensors: Tensors) -> None:
    """Move scales from a norm into the weights behind it, as AWQ does."""
    scales = torch.rand(32, dtype=torch.float64) + 0.5
    tensors[FIRST_NORM].mul_(scales)
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"].div_(scales)


@pytest.mark.parametrize(
    "change",
    [rounded(torch.float32), rounded(torch.bfloat16), rounded(torch.float16), rescaled],
    ids=["float32", "bfloat16", "float16", "scales"],
)
def test_conversions_keep_the_model(model: Path, change: Callable[[Tensors], object]) -> None:
    assert identity(model).difference(identity(changed(model, change))) == ""


def test_an_epsilon_is_a_float32(model: Path) -> None:
    first = changed(model, lambda t: None, rms_norm_eps=1e-6)
    second = changed(model, lambda t: None, rms_norm_eps=NEXT_TO_1E_6)
    assert identity(first) != identity(second)
    assert identity(first).fingerprint == identity(second).fingerprint
    third = changed(model, lambda t: None, rms_norm_eps=2e-6)
    assert identity(first).difference(identity(third)) == (
        "rms_norm_eps was 1e-06 there and is 2e-06 here"
    )


def test_the_least_step_in_bfloat16_is_training(model: Path) -> None:
    copy = changed(model, rounded(torch.bfloat16))

    def step(tensors: Tensors) -> None:
        tensors[NORM].view(torch.int16)[7] += 1

    assert "final norm differs in 1 of 32 sampled values" in identity(copy).difference(
        identity(changed(copy, step))
    )


def test_other_models_are_told_by_what_differs(model: Path, tmp_path: Path) -> None:
    ours = identity(model)
    other = identity(save_tiny(tmp_path / "other", seed=1))
    assert "another model, or one trained further" in ours.difference(other)
    deeper = replace(other, sizes={**ours.sizes, "num_layers": 7})
    assert ours.difference(deeper) == "num_layers was 6 there and is 7 here"
    padded = replace(ours, fingerprint="with a larger vocabulary")
    assert ours.difference(padded) == ""


def test_a_head_trained_on_one_copy_drafts_for_another_and_force_for_any(
    model: Path, tmp_path: Path
) -> None:
    head = str(save_perfect_head(tmp_path / "head", model, 3))
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    def accepted(path: Path, **more: object) -> int:
        with LLM(str(path), head=head, lookup=False, mode="ppsd", **SETTINGS, **more) as llm:
            drafted = llm.run([5, 7], params)
            llm.use("autoregressive")
            assert llm.run([5, 7], params).token_ids == drafted.token_ids
            return drafted.stats.counts.accepted

    assert accepted(model) == accepted(changed(model, rescaled)) > 0
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(
        HeadError, match=r"the final norm differs in .*; ppsd generate --force-head uses it"
    ):
        accepted(other)
    accepted(other, force_head=True)


def test_force_wants_a_directory() -> None:
    with pytest.raises(ConfigError, match="force_head must be used with head as a directory"):
        EngineConfig(force_head=True)


def test_force_does_not_make_shapes_fit(model: Path, tmp_path: Path) -> None:
    head = save_perfect_head(tmp_path / "head", save_tiny(tmp_path / "other", "qwen3"), 3)
    with pytest.raises(HeadError, match="does not hold the tensors of its configuration"):
        LLM(str(model), head=str(head), force_head=True, **SETTINGS)


@pytest.mark.parametrize("head", sorted(p.parent for p in SHIPPED.rglob(CONFIG_FILE)), ids=str)
def test_shipped_heads_know_their_model(head: Path) -> None:
    config = read_head_config(head)
    assert config.identity.sizes["num_layers"] == 30
    assert len(config.identity.final_norm) == 192
