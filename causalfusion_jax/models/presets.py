"""Published model sizes, and small ones for machines without an accelerator.

Parameters counted with the system setting (256 tokens of 16 values, 64 condition
tokens, 1000 classes, learned positions).
"""

from causalfusion_jax.errors import require_one_of

PRESETS = {
    # name: hidden, heads, layers               parameters
    "nano": dict(hidden=96, heads=3, layers=4),
    "tiny": dict(hidden=256, heads=4, layers=8),
    "S": dict(hidden=384, heads=6, layers=12),
    "B": dict(hidden=768, heads=12, layers=12),
    "L": dict(hidden=1024, heads=16, layers=24),  # 369.5M
    "XL": dict(hidden=1280, heads=20, layers=32),  # 714.0M
    "H": dict(hidden=1408, heads=22, layers=48),  # 1235.6M, as released
    "H40": dict(hidden=1408, heads=22, layers=40),  # as the paper's text says
}


def preset(name: str) -> dict[str, int]:
    """hidden, heads and layers of a named size. Raises InputError for another name."""
    require_one_of("preset", name, PRESETS)
    return dict(PRESETS[name])
