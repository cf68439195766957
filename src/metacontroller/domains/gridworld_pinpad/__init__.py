"""gridworld-pinpad: colored cells of a grid, to be visited in the order of a hidden task (arXiv 2512.20605, §4).

Importing this registers the Gymnasium id, for ``gymnasium.make`` and ``make_vec``; it does not import PyTorch.
"""

import gymnasium

ENV_ID = "metacontroller/GridworldPinpad-v0"

gymnasium.register(
    id=ENV_ID,
    entry_point=f"{__name__}.gymnasium_env:GridworldPinpadEnv",
    vector_entry_point=f"{__name__}.gymnasium_env:GridworldPinpadVectorEnv",
)
