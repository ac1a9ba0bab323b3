"""Checkpoints of a run, their manifests and the record of evaluations."""
