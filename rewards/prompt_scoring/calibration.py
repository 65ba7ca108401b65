"""Calibration of label likelihoods: a frozen model prefers some labels whatever the input, and prompts move that bias.

Both methods divide the probability of each label, normalised over the labels, by what the prompt gives the label
without regard to the input, and normalise again.

* ``contextual`` (Zhao et al. 2021, arXiv 2102.09690, section 5): the mean of the label probabilities of content-free
  inputs, here the paper's three, ``N/A``, ``[MASK]`` and the empty text.
* ``batch`` (Zhou et al. 2023, arXiv 2309.17249, section 3): their mean over the examples that are scored together.

``contextual`` is the default where calibration is on: the score of an example then depends on the prompt and on the
example alone, so a minibatch of one example has a score, equal requests have equal scores, and they can be cached. The
bias that ``batch`` takes off depends on which examples are in the batch, and takes off a part of the signal where their
labels are not balanced; in exchange it reads the bias off real inputs, and costs no calls of the model.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np

from ...llm_backends.errors import InputError

Calibration: TypeAlias = Literal["none", "contextual", "batch"]

CONTENT_FREE = ("N/A", "[MASK]", "")
"""The inputs that say nothing."""


def calibration_method(calibrate: bool | str) -> Calibration:
    """The method of a flag: True is ``contextual``, False ``none``.

    Raises:
        InputError: for an unknown name.
    """
    if isinstance(calibrate, bool):
        return "contextual" if calibrate else "none"
    if calibrate not in get_args(Calibration):
        raise InputError(f"unknown calibration {calibrate!r}: use {', '.join(get_args(Calibration))}")
    return calibrate  # type: ignore[return-value]


def check_batch(method: Calibration, examples: int) -> None:
    """Refuses ``batch`` for fewer than two examples with an InputError: their mean is all that there is of the one."""
    if method == "batch" and examples < 2:
        raise InputError("batch calibration of one example leaves no signal: score more, or use 'contextual'")


def normalised(logprobs: np.ndarray) -> np.ndarray:
    """Log-probs over the labels: float64, of the shape of ``logprobs`` (..., labels), their exponentials summing to 1.

    Raises nothing: a label of probability 0 (``-inf``) keeps it as long as another has more.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    highest = values.max(axis=-1, keepdims=True)
    return values - highest - np.log(np.exp(values - highest).sum(axis=-1, keepdims=True))


def without_bias(logprobs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Label log-probs with the bias of a prompt removed.

    Args:
        logprobs: shape (examples, labels), in nats.
        reference: shape (inputs, labels): those of content-free inputs, or of the batch.

    Returns:
        Normalised over the labels, float64, shape (examples, labels).

    Raises:
        InputError: without a reference.
    """
    if not len(reference):
        raise InputError("calibration needs at least one reference input")
    bias = np.log(np.maximum(np.exp(normalised(reference)).mean(axis=0), np.finfo(np.float64).tiny))
    return normalised(normalised(logprobs) - bias)
