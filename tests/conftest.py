"""Options and fixtures of all tests."""

import os

import quick_compilation

# Fixed here, before jax starts: eight devices to shard over, which wait for one another
# longer than usual, as there may be fewer cores; more threads than they can all be waiting
# in, or they wait for ever; and machine code that is quick to make, as compilation is most
# of a test's time.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# The processes that run tests inherit what is left here by the one that starts them.
if os.environ.get("XLA_FLAGS", FLAGS) == FLAGS:
    os.environ["XLA_FLAGS"] = f"{FLAGS} {quick_compilation.FLAGS}"
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import pytest  # noqa: E402

# Read now, and not left for the TPU compiler, which does not know them all.
jax.devices()
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(f" {quick_compilation.FLAGS}")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
