"""Experiments made of phases: one seed, many seeds, every baseline, sweeps."""
