"""An exit head in training: float32 parameters in inference's fused form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ppsd.model.exit_head import HeadTensors
from ppsd.model.head_codes import rounded
from ppsd.model.layers import DecoderLayer, LayerWeights, RopeRows, linear, rms_norm
from ppsd.model.names import FUSED, NORMS, layer_prefix
from ppsd.model.packed import whole
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import Stage, fuse_layer
from ppsd.speculation.lookup import ODDS
from ppsd.train.batched import causal_attention

ADDS = ("o", "o_bias", "down", "down_bias")  # what a layer adds to a row comes through these


@dataclass(frozen=True)
class Options:
    """Parts that a transformer head may have or not, as in HeadConfig."""

    mlp: int | None = None
    feedback: bool = False
    copy_gate: bool = False


class Student:
    """A head at one exit layer; ``layers`` 0 is the ``norm`` kind.

    It begins as the model's own final norm and, for a ``transformer``, as copies of the decoder
    layers from ``first_copied`` on, which add nothing yet; what it says then is up to ``begin``.
    """

    def __init__(
        self, model: Stage, exit_layer: int, layers: int, first_copied: int, options: Options
    ) -> None:
        assert model.norm is not None
        self.exit_layer = exit_layer
        self.spec = model.spec
        copied = model.layers[first_copied : first_copied + layers]
        self.layers = [_trainable(_pruned(weights, options.mlp)) for weights in copied]
        width = model.spec.hidden_size
        square = torch.eye(width, dtype=model.norm.dtype, device=model.plan.device)
        zeros, gate = square.new_zeros, options.copy_gate
        self.tensors = HeadTensors(
            norm=_parameter(model.norm),
            input=_parameter(square) if layers else None,
            feedback_norm=_parameter(model.norm) if options.feedback else None,
            feedback=_parameter(zeros(width, width)) if options.feedback else None,
            copy_weight=_parameter(zeros(len(ODDS), width)) if gate else None,
            copy_bias=_parameter(ODDS.to(square)) if gate else None,
        )

    def reads(self, hidden: torch.Tensor, verified: torch.Tensor) -> torch.Tensor:
        """Return what its matrices multiply, side by side: [n, C], with feedback [n, 2·C]."""
        if self.tensors.feedback_norm is None:
            return hidden
        return torch.cat([hidden, self._normed(verified)], 1)

    def _normed(self, verified: torch.Tensor) -> torch.Tensor:
        assert self.tensors.feedback_norm is not None
        return rms_norm(verified, self.tensors.feedback_norm, self.spec.rms_norm_eps)

    @torch.no_grad()
    def begin(self, solution: torch.Tensor) -> None:
        """Say what ``solution`` [C or 2·C, C], a transposed input (and feedback), makes of rows."""
        assert self.tensors.input is not None
        width = self.spec.hidden_size
        self.tensors.input.copy_(solution[:width].T)
        if self.tensors.feedback is not None:
            self.tensors.feedback.copy_(solution[width:].T)

    @torch.no_grad()
    def go_on(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the ``weights`` of a trained head with the same parts, as in its file."""
        given = HeadTensors.of(weights).named()
        for name, tensor in self.tensors.named().items():
            tensor.copy_(given[name])
        for i, layer in enumerate(self.layers):
            trained = fuse_layer(weights, layer_prefix(i))
            for field in fields(layer):
                if (tensor := getattr(layer, field.name)) is not None:
                    tensor.copy_(getattr(trained, field.name))

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all parameters with names that stay the same from run to run."""
        for name, tensor in self.tensors.named().items():
            known = "norm" if tensor is self.tensors.norm else name  # as in older checkpoints
            yield f"{self.exit_layer}.{known}", tensor
        for i, weights in enumerate(self.layers):
            for field in fields(weights):
                if (tensor := getattr(weights, field.name)) is not None:
                    yield f"{self.exit_layer}.{i}.{field.name}", tensor

    def forward(
        self,
        hidden: torch.Tensor,
        verified: torch.Tensor,
        rope: RopeRows,
        sequences: int,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Run rows [B·T, C] after the exit layer to normed rows [len(rows), C] before the LM head.

        ``verified`` [len(rows), C]: see ``ExitHead.finish``.
        """
        tensors = self.tensors
        x = hidden if tensors.input is None else linear(hidden, tensors.input)
        for weights in self.layers:
            x = DecoderLayer(weights, self.spec)(x, rope, causal_attention(sequences))
        x = x[rows]
        if tensors.feedback is not None:
            x = x + linear(self._normed(verified), tensors.feedback)
        return rms_norm(x, tensors.norm, self.spec.rms_norm_eps)

    def odds(self, normed: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return the log weights [n] of copies for rows of ``forward`` [n, C].

        ``slots`` [n] are indices into LENGTHS.
        """
        weight, bias = self.tensors.copy_weight, self.tensors.copy_bias
        if weight is None:
            return ODDS.to(normed)[slots]
        return linear(normed, weight, bias).gather(1, slots[:, None])[:, 0]

    def export(self) -> dict[str, torch.Tensor]:
        """Return tensors by the names and shapes of ``head_tensor_shapes``, on the CPU."""
        weights = self.tensors.named()
        for i, layer in enumerate(self.layers):
            weights |= unfuse_layer(layer, self.spec, layer_prefix(i))
        return {name: t.detach().cpu() for name, t in weights.items()}

    @torch.no_grad()
    def round(self) -> None:
        """Round all parameters as saving does."""
        for _, parameter in self.parameters():
            parameter.copy_(rounded(parameter))


def _parameter(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(wide, copy=True).requires_grad_()


def _pruned(weights: LayerWeights, neurons: int | None) -> LayerWeights:
    """Return the layer with those ``neurons`` of its MLP whose weights are largest."""
    if neurons is None:
        return weights
    gate_up, down = whole(weights.gate_up), whole(weights.down)
    gate, up = gate_up.chunk(2)
    sizes = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = sizes.topk(neurons).indices.sort().values
    rows = torch.cat([kept, kept + len(gate)])
    bias = weights.gate_up_bias
    return replace(
        weights,
        gate_up=gate_up[rows],
        gate_up_bias=None if bias is None else bias[rows],
        down=down[:, kept],
    )


def _trainable(weights: LayerWeights) -> LayerWeights:
    held = {f.name: getattr(weights, f.name) for f in fields(weights)}
    copies: dict[str, Any] = {n: t if t is None else _parameter(t) for n, t in held.items()}
    with torch.no_grad():
        for name in ADDS:
            if copies[name] is not None:
                copies[name].zero_()
    return LayerWeights(**copies)


def unfuse_layer(weights: LayerWeights, spec: ModelSpec, prefix: str) -> dict[str, torch.Tensor]:
    """Undo ``stage.fuse_layer``: return one layer's tensors by their canonical names."""
    named = {f"{name}.weight": getattr(weights, field) for field, name in NORMS.items()}
    shapes = spec.layer_shapes()
    for field, names in FUSED.items():
        weight, bias = whole(getattr(weights, field)), getattr(weights, f"{field}_bias")
        rows = [shapes[f"{name}.weight"][0] for name in names]
        if field == "gate_up":  # the head's MLP may have fewer neurons than the model's
            rows = [len(weight) // 2] * 2
        for kind, fused in (("weight", weight), ("bias", bias)):
            parts = [None] * len(names) if fused is None else torch.split(fused, rows)
            for name, part in zip(names, parts, strict=True):
                named[f"{name}.{kind}"] = part
    return {prefix + name: tensor for name, tensor in named.items() if tensor is not None}
