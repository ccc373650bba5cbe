"""From logits to a token: logit processing and position-keyed noise. Pure, on the CPU.

Stages and engine import it. Drafter and target use one ``Sampler`` each with equal arguments, so
equal logits give equal tokens, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ppsd.errors import ConfigError, NonFiniteError, RequestError
from ppsd.speculation.masks import Mask
from ppsd.types import SamplingParams


class Stream(IntEnum):
    """Independent noise streams of one position.

    ``ACCEPT`` and ``RESIDUAL`` are two streams because a residual drawn with the uniform of the
    test it just failed is not distributed as the residual.
    """

    TARGET = 0
    """The token itself; `coupled` drafts share it."""
    DRAFT = 1
    """The draft in `rejection` mode."""
    ACCEPT = 2
    """The acceptance test in `rejection` mode."""
    RESIDUAL = 3
    """The token that replaces a rejected draft."""


def uniform(seed: int, position: int, stream: Stream) -> float:
    """Return the uniform number in [0, 1) that belongs to (seed, position, stream)."""
    return float(_generator(seed, position, stream).random())


def gumbel(seed: int, position: int, size: int, stream: Stream = Stream.TARGET) -> Tensor:
    """Return standard Gumbel noise belonging to (seed, position, stream): float64 [size], finite.

    A shorter request is a prefix of a longer one.
    """
    noise = _generator(seed, position, stream).standard_exponential(size)
    # An exponential can be 0 (about once in 2**53); infinite noise would defeat every mask.
    np.maximum(noise, np.finfo(np.float64).tiny, out=noise)
    np.negative(np.log(noise, out=noise), out=noise)
    return torch.from_numpy(noise)


def _generator(seed: int, position: int, stream: Stream) -> np.random.Generator:
    """Return a generator that starts at a block of Philox of its own (Salmon et al. 2011).

    The 256-bit counter is four words, the lowest first, and drawing counts up from its lowest
    word. Stream and position fill the two highest, so 2**128 blocks separate any two starts.
    """
    counter = [0, 0, int(stream), position]
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


class Sampler:
    """Turns logits into tokens for one request.

    ``vocab_size`` counts the real tokens: logits may be longer, and what lies beyond is never
    sampled. ``stop_ids`` are EOS and stop token ids, which ``min_tokens`` bans. Raises ConfigError
    for an id outside the vocabulary.

    All methods take the logits [V] of one position, V >= vocab_size, of any float type and device,
    and ``history``, int64 [L] on the CPU: the prompt and output tokens before that position, so L
    is the position itself. A logit of -inf bans its token (a draft vocabulary). They raise
    NonFiniteError if a real token's logit is NaN or +inf or if all are -inf, RequestError if
    ``params`` leave no token, ValueError for another shape, and never change their arguments.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_length: int,
        stop_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        _check_ids("logit_bias token id", params.logit_bias, vocab_size)
        _check_ids("stop token id", stop_ids, vocab_size)
        self._params = params
        self._prompt_length = prompt_length
        self.vocab_size = vocab_size
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float64)

    def choose(self, logits: Tensor, history: Tensor, mask: Mask | None = None) -> int:
        """Choose the token of this position: plain decoding's, and both sides' when coupled.

        A ``mask`` bans the tokens that it does not permit, before all else.
        """
        if mask is not None:
            logits = self._permitted(logits, history, mask)
        return self.draw(logits, history, Stream.TARGET)

    def _permitted(self, logits: Tensor, history: Tensor, mask: Mask) -> Tensor:
        values = self._real(logits).clone()
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        values.numpy()[bits[: self.vocab_size] == 0] = -math.inf
        if not math.isfinite(float(values.numpy().max())):
            raise RequestError(f"no token that the model can say is permitted at {len(history)}")
        return values

    def takes_largest(self, position: int) -> bool:
        """Return True if ``choose`` takes the largest real logit from ``position`` on."""
        return self._params.greedy and not self._adjusts(position - self._prompt_length)

    def draw(self, logits: Tensor, history: Tensor, stream: Stream) -> int:
        """Sample with the noise of ``stream`` (Gumbel-max); ties go to the lowest id."""
        return _argmax(self.scores(logits, history, stream))

    def scores(self, logits: Tensor, history: Tensor, stream: Stream) -> Tensor:
        """Return what ``draw`` maximizes, [vocab_size]: processed logits plus their noise."""
        values = self.process(logits, history)
        if not self._params.greedy:
            values = values + gumbel(self._params.seed, len(history), self.vocab_size, stream)
        return values

    def probabilities(self, logits: Tensor, history: Tensor) -> Tensor:
        """Return the distribution of ``draw``, float64 [vocab_size]; one-hot if greedy."""
        values = self.process(logits, history)
        if self._params.greedy:
            one_hot = torch.zeros(self.vocab_size, dtype=torch.float64)
            one_hot[_argmax(values)] = 1.0
            return one_hot
        return values.softmax(0)

    def process(self, logits: Tensor, history: Tensor) -> Tensor:
        """Process logits to [vocab_size], -inf where banned; float64 unless nothing was to be done.

        In this order: logit_bias, min_tokens' ban, repetition penalty (prompt and output),
        frequency and presence penalties (output only), temperature, top-k, top-p, min-p. The last
        four are left out at temperature 0, where the result may share memory with ``logits``.
        With a temperature the largest result is 0.
        """
        values = self._adjust(self._real(logits), history)
        if self._params.greedy:
            return values
        values = values.to(torch.float64)
        # Shifting first keeps even a denormal temperature from overflowing.
        values = (values - values.amax()) / self._params.temperature
        return self._truncate(values)

    def _real(self, logits: Tensor) -> Tensor:
        if logits.ndim != 1 or len(logits) < self.vocab_size:
            shape = list(logits.shape)
            raise ValueError(f"logits must have shape [V], V >= {self.vocab_size}, got {shape}")
        values = logits[: self.vocab_size].detach().cpu()
        if values.dtype != torch.float64:
            values = values.to(torch.float32)
        top = float(values.numpy().max())  # one look suffices, as NaN and +inf win it
        if not math.isfinite(top):
            raise NonFiniteError(f"logits of real tokens must have a finite maximum, got {top}")
        return values

    def _adjust(self, values: Tensor, history: Tensor) -> Tensor:
        num_outputs = len(history) - self._prompt_length
        if not self._adjusts(num_outputs):
            return values
        values = values.to(torch.float64, copy=True)
        values[self._bias_ids] += self._bias
        if num_outputs < self._params.min_tokens:
            values[self._stop_ids] = -math.inf
        _penalise(values, history, self._prompt_length, self._params)
        if not math.isfinite(top := float(values.numpy().max())):
            raise RequestError(
                "logit_bias, min_tokens' ban and penalties must leave a finite largest logit at "
                f"position {len(history)}, got {top}"
            )
        return values

    def _adjusts(self, num_outputs: int) -> bool:
        p = self._params
        penalties = (p.repetition_penalty - 1.0, p.presence_penalty, p.frequency_penalty)
        return bool(p.logit_bias) or any(penalties) or num_outputs < p.min_tokens

    def _truncate(self, values: Tensor) -> Tensor:
        p = self._params
        if 0 < p.top_k < self.vocab_size:
            values = values.masked_fill(values < values.topk(p.top_k).values[-1], -math.inf)
        if p.top_p < 1.0:
            values = _keep_top_p(values, p.top_p)
        if p.min_p > 0.0:
            values = values.masked_fill(values < math.log(p.min_p), -math.inf)
        return values


def _penalise(values: Tensor, history: Tensor, prompt_length: int, params: SamplingParams) -> None:
    """Apply the three penalties to ``values``, in place."""
    array, tokens = values.numpy(), history.numpy()
    if params.repetition_penalty != 1.0:
        seen, penalty = np.unique(tokens), params.repetition_penalty
        hit = array[seen]
        array[seen] = np.where(hit > 0, hit / penalty, hit * penalty)
    outputs, counts = np.unique(tokens[prompt_length:], return_counts=True)
    array[outputs] -= params.frequency_penalty * counts + params.presence_penalty


def _keep_top_p(values: Tensor, top_p: float) -> Tensor:
    """Ban all but the smallest set of tokens that reaches ``top_p``; ties go to the lowest id."""
    probs = values.softmax(0)
    # Tokens below (1 - top_p) / V sum to less than 1 - top_p, so none is in the set and sorting
    # them (5 ms of a 49k vocabulary) can be saved; the half leaves room for rounding.
    candidates = (probs > 0.5 * (1.0 - top_p) / len(values)).nonzero().squeeze(1)
    order = values[candidates].sort(descending=True, stable=True).indices
    ranked = candidates[order]
    size = int((probs[ranked].cumsum(0) < top_p).sum()) + 1
    kept = ranked[:size]
    return torch.full_like(values, -math.inf).index_copy_(0, kept, values[kept])


def _argmax(values: Tensor) -> int:
    # NumPy promises the first of equal maxima, as torch does, and is 14 times faster on a CPU.
    return int(values.numpy().argmax())


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(name, token, f"in [0, {vocab_size - 1}], the model's vocabulary")
