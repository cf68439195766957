"""Worlds: their interface, registry, and implementations."""
