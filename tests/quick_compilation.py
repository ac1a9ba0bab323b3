"""Options of XLA for fast compilation, which takes most of the time of a test.

On the training step of `helpers.tiny_config`: 9 seconds with fusion emitters, 3 without.
"""

import importlib.metadata

FLAGS = "--xla_backend_optimization_level=0"
# XLA refuses to start with an option it does not know, and removes some over time.
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
