"""Run by each of several processes (`helpers.start_processes`), with --folder=FOLDER.

Writes FOLDER/PROCESS.npz: what meshes that span the processes give, for `test_multihost` to compare.
"""

import argparse

import jax
import numpy as np
from helpers import random_params, tiny_config
from tiny_data import TINY_VAE

from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.config import experiment
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.evaluation.inception_metrics import Collected
from causalfusion_jax.metrics.registry import CLASS_PROBABILITIES, POOLED_FEATURES, POOLED_STATISTICS
from causalfusion_jax.models.autoencoder import abstract_autoencoder
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.sampling.generation import SamplingJob, image_batches, image_shares
from causalfusion_jax.sampling.trained import make_autoencoder, open_autoencoder
from causalfusion_jax.training.state import place_abstract

CONFIG = experiment.from_dict(
    tiny_config(
        model=dict(layers=1, hidden=16, heads=2),
        sampling=dict(solver_steps=1),
        data=dict(source="arrays", path="none", latents=True, channels=TINY_VAE.latent_channels),
    )
)
NUM, BATCH, SEED = 5, 4, 3
LABELS = np.arange(NUM, dtype=np.int32)
METRICS = ("fid", "inception_score", "kid")
MESHES = ("fsdp", "tensor", "sequence")
FEATURES = {"2048": 2048, "logits_unbiased": 1008}


def features(numbers) -> dict[str, np.ndarray]:
    """Features of images by their numbers."""
    rows = np.asarray(numbers)[:, None] + 1.0
    return {name: np.sin(rows * np.arange(1, dim + 1)).astype(np.float32) for name, dim in FEATURES.items()}


def sampled(params, decode) -> dict[str, np.ndarray]:
    """Images in pixels: those of each process, and all."""
    job = SamplingJob(CONFIG, CONFIG.sampling, Condition(LABELS), SEED, BATCH, decode)
    numbers, own = (np.concatenate(parts) for parts in zip(*image_shares(job, params), strict=True))
    return {"numbers": numbers, "own": own, "images": np.concatenate(list(image_batches(job, params)))}


def batches_on(mesh) -> dict[str, np.ndarray]:
    """This process's rows of a global batch of numbers 0..BATCH-1, and the whole of it."""
    share = sharding.BatchShare(mesh, BATCH)
    batch = share.place({"image": np.arange(BATCH * 3, dtype=np.float32).reshape(BATCH, 3)[share.rows]})
    return {"rows": share.rows, "batch": distributed.everywhere(batch["image"])}


def collected_by(numbers) -> Collected:
    """What scores of these images need."""
    collected = Collected(METRICS)
    for number in numbers:
        collected.add(features([number]), np.array([number]))
    return collected


def main() -> None:
    """Joins the others, and writes what came out."""
    parser = argparse.ArgumentParser()
    for name, kind in {"coordinator_address": str, "num_processes": int, "process_id": int, "folder": str}.items():
        parser.add_argument(f"--{name}", type=kind)
    given = parser.parse_args()
    distributed.initialize(given.coordinator_address, given.num_processes, given.process_id)
    found = {}
    if given.process_id == 1:
        # Alone: a process may be the only one with something to read.
        open_autoencoder(f"{given.folder}/vae")[0].params(abstract_autoencoder(TINY_VAE)[1])
    for name in MESHES:
        mesh = sharding.make_mesh(sharding.MeshConfig(data=1, **{name: -1}))
        found |= {f"{name}.{key}": value for key, value in batches_on(mesh).items()}
    mesh = sharding.make_mesh(sharding.MeshConfig("fsdp"))
    _, shapes, axes = abstract_model(CONFIG.transformer)
    where = jax.tree.map(lambda leaf: leaf.sharding, place_abstract(shapes, axes, mesh))
    split = sharding.place(random_params(CONFIG.transformer), where)
    found |= sampled(split, make_autoencoder(f"{given.folder}/vae", CONFIG).decode)
    whole = collected_by(range(given.process_id, 7, given.num_processes)).of_all_processes()
    statistics, kept = whole[POOLED_STATISTICS], whole[POOLED_FEATURES].features
    score = whole[CLASS_PROBABILITIES].result()
    found |= {"mean": statistics.mean, "cov_row": statistics.cov[0], "score": score, "kept": kept}
    found["plain"] = distributed.on_primary(lambda: {"pi": np.pi * 1e-9, "nan": float("nan")})["pi"]
    np.savez(f"{given.folder}/{given.process_id}.npz", **found)


if __name__ == "__main__":
    main()
