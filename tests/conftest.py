"""Settings shared by all tests: checks of shapes and types at run time, and repeatable random numbers."""

from __future__ import annotations

import os
import tempfile

# Before torch is imported, whatever the shell exports: two test processes of several threads each wait for one another.
# What tests start inherits it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

from jaxtyping import install_import_hook

# The kernels' compiled files are left out: Triton compiles the plain function, not a checked one.
PACKAGES = "models control domains data metrics objectives phases environments training baselines analysis variants"
CHECKED = [
    *(f"metacontroller.{name}" for name in PACKAGES.split()),
    "metacontroller.storage.run_folder",
]
# The numeric tower, so that an int is a valid float, as it is for pyright.
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# What a user notes of configs stays out of the home of whoever runs the tests; their processes inherit it.
STATE = tempfile.TemporaryDirectory(prefix="metacontroller-tests-")
os.environ["XDG_STATE_HOME"] = STATE.name

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same global random state, whichever tests ran before it."""
    torch.manual_seed(0)
