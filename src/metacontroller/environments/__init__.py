"""Internal RL as an environment for other libraries."""
