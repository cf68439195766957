"""The options of a vector environment's ``reset``: Gymnasium's ``reset_mask``, and no other."""

from __future__ import annotations

from typing import Any

import numpy as np

from metacontroller.errors import UserError
from metacontroller.ranges import shown


def rows_to_reset(options: dict[str, Any] | None, num_envs: int, started: bool) -> np.ndarray | None:
    """The rows that ``options["reset_mask"]`` names, (num_envs,) bool; None for all.

    The options stay as they are, whereas Gymnasium's own environments take the mask out of the caller's dict. UserError
    for other options, for a mask that is none, and for one before all rows have ``started``.
    """
    unknown = [name for name in options or {} if name != "reset_mask"]
    if unknown:
        raise UserError(f"reset has the option {unknown[0]!r}; expected none but 'reset_mask', the rows to reset.")
    mask = (options or {}).get("reset_mask")
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray) or mask.shape != (num_envs,) or mask.dtype != bool or not mask.any():
        raise UserError(
            f"reset_mask is {shown(mask)}; expected a numpy array of {num_envs} bool, one a row, at least one True."
        )
    if not started:
        raise UserError("reset_mask is given but no episode has started; reset all rows first, without it.")
    return mask
