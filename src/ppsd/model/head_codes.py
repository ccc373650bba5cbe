"""Store weights of exit heads in 8-bit codes with a scale for every 32, as in GGUF's Q8_0.

A draft needs no more, and a head that ships weighs half as much.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ppsd.model.packed import BLOCK

SCALES = ".scales"
LARGEST = 127


def encode(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors to be written: matrices [out, in] as int8 codes and float16 scales.

    ``<name>.scales`` [out, in / 32] stand beside the codes. Other numbers become bfloat16; so do
    matrices whose rows do not divide into blocks. Integers stay.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            stored[name] = tensor
        elif tensor.ndim != 2 or tensor.shape[1] % BLOCK:
            stored[name] = tensor.to(torch.bfloat16)
        else:
            blocks = tensor.float().view(len(tensor), -1, BLOCK)
            scales = (blocks.abs().amax(-1) / LARGEST).to(torch.float16)
            codes = (blocks / scales.float().clamp(min=1e-30)[..., None]).round()
            codes = codes.clamp(-LARGEST, LARGEST).where(scales[..., None] > 0, 0)
            stored |= {name: codes.to(torch.int8).flatten(1), name + SCALES: scales}
    return stored


def decode(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what ``encode`` stands for; raises ValueError for codes whose scales do not fit."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(SCALES):
            continue
        weights[name] = tensor
        if tensor.dtype == torch.int8:
            scales = stored.get(name + SCALES)
            if scales is None or tensor.ndim != 2 or scales.shape != _scales_shape(tensor):
                raise ValueError(f"the scales of {name} do not fit its codes")
            weights[name] = (
                tensor.view(len(tensor), -1, BLOCK) * scales.float()[..., None]
            ).flatten(1)
    return weights


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` as it comes back from a file."""
    return decode(encode({"": tensor}))[""].to(tensor.dtype)


def _scales_shape(codes: torch.Tensor) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1] // BLOCK
