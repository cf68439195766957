#!/usr/bin/env bash
# discrete-continuous-embed-readout 0.2.12, the readouts of metacontroller-pytorch 0.3.3.
#
# What one would guess: a mask that leaves nothing out changes no loss.
# What happens: without a mask the loss of a continuous readout is a mean over batch, time and entries; with one it is
# summed over entries and averaged over steps. With 6 entries and a mask that is true everywhere it is 6 times as large.
# A state loss therefore grows by the size of the state as soon as lengths of episodes are given.
# Source: calculate_loss(..., mask=...) of the class Readout in that package, read and run.
# Seen on 2026-11-30: unmasked 1.5941, masked 9.5646, ratio 6.0000.
# For us: losses with and without lengths are on one scale; a mean over entries in a model's call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
packages=(torch==2.13.0 numpy==2.4.6 discrete-continuous-embed-readout==0.2.12)
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from discrete_continuous_embed_readout import Readout

torch.manual_seed(0)
readout = Readout(8, num_continuous=6)
parameters, target = readout(torch.randn(2, 5, 8)), torch.randn(2, 5, 6)
with torch.no_grad():
    plain = readout.calculate_loss(parameters, target).item()
    masked = readout.calculate_loss(parameters, target, mask=torch.ones(2, 5, dtype=torch.bool)).item()
print(f"unmasked {plain:.4f}, masked {masked:.4f}, ratio {masked / plain:.4f}")
assert abs(masked / plain - 6) < 1e-4, "this has changed"
PYTHON
