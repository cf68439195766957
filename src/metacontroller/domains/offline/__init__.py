"""Your own dataset as a world, with an environment or without."""
