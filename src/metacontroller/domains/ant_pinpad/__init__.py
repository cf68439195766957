"""ant-pinpad: colored cells of a plane, to be visited by MuJoCo's ant in the order of a hidden task (arXiv 2512.20605,
§4). Its physics needs MuJoCo, the extra ``ant``; its config and its layouts do not.

Importing this registers the Gymnasium id, for ``gymnasium.make`` and ``make_vec``; it imports neither PyTorch nor
MuJoCo.
"""

import gymnasium

ENV_ID = "metacontroller/AntPinpad-v0"

gymnasium.register(
    id=ENV_ID,
    entry_point=f"{__name__}.gymnasium_env:AntPinpadEnv",
    vector_entry_point=f"{__name__}.gymnasium_env:AntPinpadVectorEnv",
)
