"""Inputs with one oddity each, as people really bring them, and what the project must make of each."""
