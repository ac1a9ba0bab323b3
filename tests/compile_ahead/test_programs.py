"""All programs of a run, the arrays that are resident beside them, and that a run starts no other programs."""

import json
import re

import jax
import numpy as np
import pytest
from compiled_programs import compiled_modules, content, listed_modules, name_of
from helpers import tiny_config, train_run
from tiny_data import write_inception, write_vae

from causalfusion_jax.common import hardware, sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.hardware import GIB
from causalfusion_jax.compile_ahead import run_report
from causalfusion_jax.compile_ahead.compiler import Compiled, CompilerError, Memory
from causalfusion_jax.compile_ahead.costs import Costs
from causalfusion_jax.config import experiment, slices
from causalfusion_jax.config.slices import SliceJob
from causalfusion_jax.evaluation import programs, understanding
from causalfusion_jax.evaluation.periodic import Evaluator
from causalfusion_jax.models.autoencoder import MAR_VAE, SD_VAE
from causalfusion_jax.prepare.settings import EncodeConfig
from causalfusion_jax.sampling.trained import from_run

V5E = hardware.topology("v5e:2x2")
LATENTS = dict(source="latents", path="x", latents=True, channels=4, image_size=8, num_classes=10)
EVALUATED = dict(
    eval_every=4,
    metric="fid",
    inception="no/inception",
    reference="no.npz",
    vae="no/vae",
    num_images=64,
    sample_batch_size=8,
)
PROBES = [
    "probe, features",
    "probe, map of clean tokens",
    "probe, map of noisy tokens",
    "probe, linear step",
    "probe, nearest neighbours",
    "fine-tuning, initial state",
    "fine-tuning step",
    "fine-tuning, test",
]


@pytest.fixture(autouse=True)
def no_tpu(monkeypatch):
    """Slices made of the devices of this machine."""
    for module in (slices, programs):
        monkeypatch.setattr(module, "devices", lambda topology: jax.devices()[: topology.devices])


def make_job(**sections):
    return SliceJob(experiment.from_dict(tiny_config(**sections)), V5E)


def names(listing):
    return [program.name for program in listing.programs]


def test_every_program_of_a_run_is_named():
    shared = dict(steps="decay", steps_shared_by="batch")
    job = make_job(train=dict(length_buckets=2), factorization=shared, logging=dict(sample_every=4))
    assert names(programs.run_programs(job)) == [
        "initial state",
        "training step, 8 clean tokens",
        "training step, 16 clean tokens",
        "weights for sampling",
        "grid sampler",
        *PROBES,
    ]
    job = make_job(data=LATENTS, evaluation=EVALUATED)
    assert names(programs.run_programs(job)) == [
        "initial state",
        "training step",
        "weights for sampling",
        "evaluation sampler",
        "decoder",
        "Inception, resizing",
        "Inception",
        *PROBES,
    ]
    precision = make_job(data=LATENTS, evaluation=dict(EVALUATED, metric="precision"))
    listed = {program.name: program for program in programs.run_programs(precision).programs}
    radii, coverage = (listed[f"precision and recall, {part}"].lower() for part in ("radii", "coverage"))
    assert [a.shape for a in radii.in_avals[0]] == [(1024, 2048), (10_000, 2048)]
    assert [a.shape for a in coverage.in_avals[0]] == [(64, 2048), (64,), (10_000, 2048), (10_000,)]
    video = dict(data=dict(source="moving_digits", frames=16, image_size=12))
    assert names(programs.run_programs(make_job(**video)))[-2:] == ["I3D, resizing", "I3D"]


def test_resident_arrays_are_not_arguments_of_the_program():
    job = make_job(data=LATENTS, evaluation=EVALUATED, logging=dict(sample_every=4), mesh=dict(preset="fsdp"))
    beside = {program.name: set(program.resident) for program in programs.run_programs(job).programs}
    networks, training = {"decoder weights", "encoder weights", "Inception weights"}, {"training state", "batch"}
    assert beside["initial state"] == beside["training step"] == networks
    assert beside["weights for sampling"] == networks | {"batch", "rest of the state"}
    assert beside["grid sampler"] == beside["evaluation sampler"] == networks | training
    assert beside["decoder"] == training | {"encoder weights", "Inception weights", "replicated weights"}
    assert beside["Inception, resizing"] == networks | training | {"replicated weights"}
    assert beside["Inception"] == training | {"decoder weights", "encoder weights", "replicated weights"}
    assert all(not beside[name] for name in PROBES), "these are commands of their own"
    sizes = next(p for p in programs.run_programs(job).programs if p.name == "Inception, resizing").resident
    params = sum(leaf.size for leaf in jax.tree.leaves(programs.abstract_model(job.config.transformer)[1]))
    assert sizes["replicated weights"] == 4 * params
    # Parameters, average and two moments, split over four devices, but for small ones.
    assert 4 * params < sizes["training state"] < 4.2 * params


def test_missing_weights_are_identified_by_name_or_by_the_latents_of_the_model(tmp_path):
    assert programs.autoencoder_settings("store/sd_vae", 16)[0] == SD_VAE
    settings, notes = programs.autoencoder_settings("store/kl16", 16)
    assert settings == MAR_VAE and "store/kl16 is not there: taken as mar_vae" in notes[0]
    with pytest.raises(InputError, match="mar_vae or sd_vae"):
        programs.autoencoder_settings("store/vae", None)
    with pytest.raises(InputError, match="not a converted checkpoint"):
        programs.autoencoder_settings(str(tmp_path), 16)


@pytest.mark.parametrize(
    "sections",
    [
        dict(data=dict(source="moving_digits", frames=4, image_size=12), evaluation=dict(eval_every=4)),
        dict(data=LATENTS, evaluation=dict(eval_every=4)),
        dict(data=LATENTS, evaluation=dict(EVALUATED, metric="fd")),
    ],
    ids=["video", "no autoencoder", "pixels of latents"],
)
def test_an_evaluation_that_the_run_refuses_is_refused_in_its_words(sections):
    job = make_job(**sections)
    with pytest.raises(InputError) as refused:
        programs.run_programs(job)
    with pytest.raises(InputError) as by_the_run:
        Evaluator(job.config, job.mesh())
    assert str(refused.value) == str(by_the_run.value)


def test_impossible_probes_are_reported_and_do_not_fail_a_run():
    listing = programs.run_programs(make_job(model=dict(class_dropout=0.0), finetune=dict(batch_size=6)))
    assert names(listing) == ["initial state", "training step"]
    assert "never trained without a class" in listing.impossible["probe"] and "fine-tuning" in listing.impossible
    listing = programs.run_programs(make_job(finetune=dict(batch_size=6)))
    assert "multiple of 4" in listing.impossible["fine-tuning"] and names(listing)[-1] == "probe, nearest neighbours"


def test_the_encoder_is_compiled_for_the_devices_of_a_host():
    job = make_job(data=dict(LATENTS, source="image_folder"))
    listing = programs.encode_programs(job, EncodeConfig(batch_size=8))
    assert names(listing) == ["encoder"] and "sd_vae" in listing.notes[0]
    images = jax.tree.leaves(listing.programs[0].lower().in_avals)[-1]
    assert images.shape == (8, 64, 64, 3)
    with pytest.raises(InputError, match="batch_size"):
        programs.encode_programs(job, EncodeConfig(batch_size=6))
    with pytest.raises(InputError, match="data.source"):
        programs.encode_programs(make_job(data=LATENTS), EncodeConfig())


# --- The report -------------------------------------------------------------------


def compiled_of(size):
    memory = Memory(size, 0, 0) if size <= 16 * GIB else None
    return Compiled(1.0, size, 16 * GIB, memory, Costs(flops=1e12) if memory else None)


def outcomes(compiler):
    job = make_job(data=LATENTS, evaluation=EVALUATED)
    listing = slices.Listing(
        (slices.Program("training step", None, {}), slices.Program("decoder", None, {"training state": 8 * GIB})),
        {"probe": "refused"},
        ("assumed",),
    )
    lines = []
    by_name = iter(listing.programs)
    result = run_report.preflight_run(job, listing, lines.append, lambda lower, topology: compiler(next(by_name).name))
    record = json.loads(json.dumps(run_report.record(result, "run")))
    assert [p["name"] for p in record["programs"]] == ["training step", "decoder"] and record["fits"] == result.fits
    assert record["impossible"] == {"probe": "refused"} and len(lines) == 2
    return result, record


def test_a_program_that_fits_only_without_resident_arrays_is_reported_with_them():
    result, record = outcomes(lambda name: compiled_of(10 * GIB))
    assert not result.fits and [p["fits"] for p in record["programs"]] == [True, False]
    assert record["programs"][1]["hbm_with_resident_bytes"] == 18 * GIB
    first = run_report.verdict(result).splitlines()[0]
    assert "decoder does not fit, 18.00 of 16.00 GiB" in first and "its own 10.00, training state 8.00" in first
    assert re.search(r"decoder +NO +10.00 +8.00 +18.00 +16.00", run_report.table(result))
    assert "no probe: refused\nnote: assumed" in run_report.verdict(result)
    result, _ = outcomes(lambda name: compiled_of(7 * GIB))
    assert result.fits and "all 2 programs compile and fit; most HBM takes decoder" in run_report.verdict(result)


def test_a_program_that_does_not_compile_is_named_and_the_others_go_on():
    def compiler(name):
        if name == "training step":
            raise CompilerError("NotImplementedError: Mosaic kernels cannot be partitioned automatically\n" + 999 * "x")
        return compiled_of(GIB)

    result, record = outcomes(compiler)
    assert not result.fits and record["programs"][1]["fits"]
    first = run_report.verdict(result).splitlines()[0]
    assert "training step does not compile: NotImplementedError: Mosaic kernels" in first and len(first) < 400
    assert "Mosaic" in record["programs"][0]["error"] and "does not compile" in run_report.table(result)
    result, record = outcomes(lambda name: compiled_of(20 * GIB))
    assert not any(p["fits"] for p in record["programs"]) and "at least" in run_report.table(result)


# --- Against real runs ------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch):
    """A machine of two devices."""
    make_mesh, two = sharding.make_mesh, jax.devices()[:2]
    monkeypatch.setattr(
        sharding, "make_mesh", lambda config, devices=None: make_mesh(config, two if devices is None else devices)
    )
    monkeypatch.setattr(jax, "local_devices", lambda *args: two)
    return two


@pytest.mark.slow
def test_a_run_with_everything_starts_the_programs_that_are_listed(tmp_path, monkeypatch, two_devices):
    write_inception(tmp_path / "inception")
    rng = np.random.default_rng(0)
    for part in ("data", "held_out"):
        (tmp_path / part).mkdir()
        np.save(tmp_path / part / "image.npy", rng.standard_normal((24, 8, 8, 4), np.float32))
        np.save(tmp_path / part / "label.npy", np.arange(24, dtype=np.int32) % 10)
    job = make_job(
        data=dict(LATENTS, source="arrays", path=str(tmp_path / "data")), mesh=dict(preset="fsdp"),
        model=dict(hidden=16, heads=2, layers=2), sampling=dict(solver_steps=2), logging=dict(every=6, sample_every=6),
        train=dict(steps=6, batch_size=4, length_buckets=2), factorization=dict(steps="decay", steps_shared_by="batch"),
        evaluation=dict(
            eval_every=6, metric="inception_score", num_images=6, inception=str(tmp_path / "inception"),
            vae=write_vae(tmp_path / "vae"),
        ),
        probe=dict(
            held_out_path=str(tmp_path / "held_out"), read_batch_size=8, batch_size=8, epochs=2, warmup_epochs=1.0,
            neighbours=3, map_noise_levels=(0.1,),
        ),
        finetune=dict(batch_size=8, epochs=1, warmup_epochs=0.0),
    )  # fmt: skip
    (tmp_path / "training").mkdir()
    with compiled_modules(tmp_path / "training") as started:
        train_run(job.config, str(tmp_path / "run"))
    of_training = ("initial", "training", "weights", "grid", "evaluation", "decoder", "Inception")
    listed = listed_modules(job, monkeypatch, two_devices, *of_training)
    assert set(listed) == {
        "training step, 8 clean tokens",
        "training step, 16 clean tokens",
        "grid sampler",
        "evaluation sampler",
        "decoder",
        "Inception",
    }
    assert set(map(content, started)) == set(map(content, listed.values()))

    trained = from_run(str(tmp_path / "run"))
    study = understanding.Study(job.config, job.config.data)
    (tmp_path / "later").mkdir()
    with compiled_modules(tmp_path / "later") as started:
        for kind in ("linear", "knn"):
            study.classify(kind, trained.params(), "trained")
        study.map(trained.params(), "trained")
        study.finetune(study.finetuning("trained", tmp_path / "tuned"), trained.params)
    listed = listed_modules(job, monkeypatch, two_devices, "probe", "fine-tuning")
    # Learning rates and neighbours depend on the number of images, which a listing does not have.
    assert {name_of(module) for module in started} == {name_of(module) for module in listed.values()}
    read = {content(module) for module in started if name_of(module) in ("jit_pooled", "jit_logits_of")}
    assert {content(module) for name, module in listed.items() if "features" in name or "map" in name} <= read
