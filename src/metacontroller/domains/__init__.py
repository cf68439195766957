"""Worlds: the interface and what stands behind it."""
