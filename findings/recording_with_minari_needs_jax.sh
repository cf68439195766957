#!/usr/bin/env bash
# Minari 0.5.4 with Gymnasium 1.4.0.
#
# What one would guess: `minari[hdf5]`, which reads and writes datasets (with Pillow beside it), is enough to record
# CartPole by DataCollector.
# What happens: the collector is made and reset, and the first step raises ImportError, because jax is not installed: it
# is wanted to join the steps, whatever the environment returns. `minari[create]` brings it.
# Source: minari/data_collector, read and run; the error names the extra.
# Seen on 2026-11-30: "reset, then ImportError: jax is not installed. ..."
# For us: `collect` writes its own format and needs no jax; datasets of Minari are read without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "minari[hdf5]==0.5.4" gymnasium==1.4.0 pillow==12.3.0
"$folder/venv/bin/python" - <<'PYTHON'
import gymnasium
import minari

env = minari.DataCollector(gymnasium.make("CartPole-v1"))
env.reset(seed=0)
try:
    env.step(0)
except ImportError as error:
    print(f"reset, then ImportError: {error}")
    assert "jax" in str(error), "this has changed"
else:
    raise AssertionError("this has changed: a step is recorded without jax")
PYTHON
