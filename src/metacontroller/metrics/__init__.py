"""Pure functions of tensors that say how well something went."""
