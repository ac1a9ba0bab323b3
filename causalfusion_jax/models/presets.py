"""Published model sizes, and small ones for machines without an accelerator.

Parameters of CausalFusion counted with the system setting (256 tokens of 16 values, 64
condition tokens, 1000 classes, learned positions), of ACDiT for images (1024 tokens of 4
values, 1000 classes).
"""

from causalfusion_jax.common.errors import require_one_of

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
    "acdit_B": dict(hidden=768, heads=12, layers=12),  # 130.3M
    "acdit_L": dict(hidden=1024, heads=16, layers=24),  # 457.9M
    "acdit_XL": dict(hidden=1152, heads=18, layers=28),  # 674.9M
    "acdit_H": dict(hidden=1280, heads=20, layers=32),  # 951.0M
}

ACDIT = dict(
    conditioning="adaln", num_condition_tokens=0, norm="rms", positions="rope", qkv_bias=True, token_bias=False
)
"""Settings of the network as released with ACDiT; the defaults are CausalFusion's."""

DIT = dict(conditioning="adaln", num_condition_tokens=0, norm="plain", positions="sincos", qk_norm=False, qkv_bias=True)
"""Settings of the plain DiT, the baseline of both papers."""


def preset(name: str) -> dict[str, int]:
    """hidden, heads and layers of a named size. Raises InputError for another name."""
    require_one_of("preset", name, PRESETS)
    return dict(PRESETS[name])
