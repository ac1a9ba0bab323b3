"""Sweeps: many runs of one config, and a table of their scores."""
