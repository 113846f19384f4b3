"""Inversion-DPO: preference alignment of diffusion models on inverted trajectories."""
