"""Information in bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mutual_information_bits(counts: Tensor) -> float:
    """I = H(outcome) - E_code H(outcome | code) in bits, from counts (c, o) with the same number of trials per code.

    The plug-in estimate is too high by about (C - 1)(O - 1) / (2 N ln 2) (Miller and Madow), which is subtracted; O
    counts only outcomes that occurred. A true value near zero may therefore give a slightly negative estimate.
    """
    counts = counts.double()
    share, marginal = counts / counts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
    plug_in = float(_entropy_bits(marginal) - _entropy_bits(share).mean())
    bias = (len(counts) - 1) * (int((marginal > 0).sum()) - 1) / (2 * float(counts.sum()) * math.log(2))
    return plug_in - bias


def _entropy_bits(probability: Tensor) -> Tensor:
    return -torch.xlogy(probability, probability).sum(-1) / math.log(2)
