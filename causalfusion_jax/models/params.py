"""The type of parameters, and compute types."""

from typing import Any

Params = dict[str, Any]
"""A nested dict of the trained arrays."""

DTYPES = ("float32", "bfloat16")
"""Compute types of a network; parameters are float32."""
