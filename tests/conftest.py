"""Options and fixtures of all tests."""

import os
import pathlib

import quick_compilation

# Set before jax starts: eight devices to shard over; longer timeouts of collectives, as there may
# be fewer cores; more threads than can wait in a collective at once, which would be a deadlock; and
# fast compilation, which takes most of the time of a test.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# The worker processes of pytest inherit the variables of the process that starts them.
if os.environ.get("XLA_FLAGS", FLAGS) == FLAGS:
    os.environ["XLA_FLAGS"] = f"{FLAGS} {quick_compilation.FLAGS}"
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import pytest  # noqa: E402

# jax reads the flags now; the TPU compiler, which reads them later, does not know all of them.
jax.devices()
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(f" {quick_compilation.FLAGS}")

QUICK = (
    "test_structure", "test_charts", "test_cli", "test_files", "test_hardware", "test_lock", "test_npz",  # common, cli
    "test_conditions", "test_diffusion", "test_factorization", "test_layouts", "test_solvers",  # core
    "test_captions", "test_distribution", "test_scores", "test_probe",  # metrics, evaluation
    "test_batches", "test_captioned", "test_class_names", "test_fingerprint", "test_moving_digits",
    "test_moving_digits_scores", "test_registry", "test_requests",
    "test_tokenizers",  # data
    "test_parts", "test_goldens",  # models
    "test_experiment",  # config
    "test_exported", "test_refused_checkpoints", "test_tensors",  # prepare
    "test_checkpoint", "test_loop",  # checkpoints, training
    "test_generation", "test_images", "test_labels", "test_reading", "test_shards",  # sampling
    "test_hlo",  # compile_ahead
    "test_sweep_table", "test_tables", "test_drills", "test_imagenet",  # sweeps, launch; the flags of all commands
)  # fmt: skip
"""Files of the quick tier."""


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    missing = set(QUICK) - {path.stem for path in pathlib.Path(__file__).parent.rglob("test_*.py")}
    if missing:
        raise pytest.UsageError(f"QUICK in tests/conftest.py names files that do not exist: {', '.join(missing)}")
    for item in items:
        if "slow" not in item.keywords:
            if item.path.stem in QUICK:
                item.add_marker(pytest.mark.quick)
        elif not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
