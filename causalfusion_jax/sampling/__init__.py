"""Sampling: the KV-cached sampler, editing, long videos, captions, and what they are given."""
