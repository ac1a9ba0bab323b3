"""Types of parameters."""

from typing import Any

Params = dict[str, Any]
"""A nested dict of arrays: everything that is learned, and nothing else."""

DTYPES = ("float32", "bfloat16")
"""Types that a network computes in; parameters are float32."""
