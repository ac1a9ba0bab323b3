"""Options of XLA for machine code that is quick to make: compilation is most of a test's time.

On the training step of `helpers.tiny_config`: 9 seconds with fusion emitters, 3 without.
"""

import importlib.metadata

FLAGS = "--xla_backend_optimization_level=0"
# XLA refuses to start on an option it does not know, and drops some with time.
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
