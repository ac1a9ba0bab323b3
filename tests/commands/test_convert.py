"""Released checkpoints in and out: by names and shapes at full size, by commands at a tiny one."""

import dataclasses
import json

import numpy as np
import pytest
import torch_format
from helpers import GOLDENS, command
from PIL import Image
from safetensors.numpy import load_file

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.models.autoencoder import MAR_VAE
from causalfusion_jax.models.presets import PRESETS, preset
from causalfusion_jax.prepare.conversion import make_plan
from causalfusion_jax.prepare.names import unfilled

NOT_GIVEN = dict(patch_size=None, image_size=None, frames=None, block_size=None)
GRID = {"CausalFusion": "causalfusion", "ACDiT": "acdit"}


def full_size():
    for name in ("causalfusion", "acdit"):
        for model, shapes in json.loads((GOLDENS / f"{name}_checkpoint_shapes.json").read_text()).items():
            if model.partition("-")[0] in GRID:
                yield pytest.param(name, model.partition("-")[2], {k: tuple(v) for k, v in shapes.items()}, id=model)


def plan_of(kind, shapes, metadata=None, **geometry):
    return make_plan(kind, shapes, metadata or {}, NOT_GIVEN | geometry, lambda s: experiment.from_dict(s).transformer)


@pytest.mark.parametrize(("kind", "size", "shapes"), list(full_size()))
def test_full_size_checkpoints_map_without_their_weights(kind, size, shapes):
    plan = plan_of(kind, shapes)
    assert not unfilled(plan.table, plan.shapes) and not plan.ignored
    model = experiment.from_dict(plan.settings).model
    known = preset(size if kind == "causalfusion" else f"acdit_{size}")
    assert {name: getattr(model, name) for name in known} == known
    assert (model.mlp_ratio, model.patch_size) == (4.0, 1)


def test_every_released_size_is_listed():
    sizes = {(case.values[0], case.values[1]) for case in full_size()}
    assert {("causalfusion", "L"), ("causalfusion", "XL"), ("causalfusion", "H")} <= sizes
    assert {("acdit", name.removeprefix("acdit_")) for name in PRESETS if name.startswith("acdit_")} <= sizes


def test_full_size_autoencoder_maps_without_its_weights():
    shapes = json.loads((GOLDENS / "causalfusion_checkpoint_shapes.json").read_text())["MAR-KL16"]
    plan = plan_of("mar_vae", {name: tuple(shape) for name, shape in shapes.items()})
    assert not unfilled(plan.table, plan.shapes)
    assert plan.settings == dataclasses.asdict(MAR_VAE)


def test_training_arguments_tell_the_grid_of_a_video():
    kind, _, shapes = next(case.values for case in full_size() if case.id == "ACDiT-B")
    shapes = shapes | {"x_embedder.weight": (768, 16), "final_layer.linear.weight": (16, 768)}
    shapes |= {"final_layer.linear.bias": (16,), "y_embedder.embedding_table.weight": (102, 768)}
    args = dict(
        patch_size=2, num_frames=8, image_size=128, vae_patch_pixels=8, block_size=256, ar_len=2, nd_split="2_3_3"
    )
    config = experiment.from_dict(plan_of(kind, shapes, {"args": args}).settings)
    assert config.transformer.grid == (8, 8, 8) and config.data.num_classes == 101
    assert (config.factorization.order, config.sampling.ar_steps) == ("raster", 2)
    # Without them, the released model with tokens of this size, or the flags.
    assert experiment.from_dict(plan_of(kind, shapes).settings).transformer.grid == (16, 16, 16)
    by_flags = plan_of(kind, shapes, {"args": args}, frames=4, block_size=64)
    assert experiment.from_dict(by_flags.settings).transformer.grid == (4, 8, 8)
    with pytest.raises(InputError, match="nd_split"):
        plan_of(kind, shapes, {"args": args | {"nd_split": "1_1_1"}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.3.mlp.fc1.bias"), ["blocks.3.mlp.fc1.bias", "missing"]),
        (lambda s: s.update({"blocks.3.mlp.fc9.bias": (4,)}), ["blocks.3.mlp.fc9.bias", "unknown use"]),
        (lambda s: s.update({"blocks.5.norm2.weight": (7,)}), ["blocks.5.norm2.weight", "[7]", "must be"]),
        (lambda s: s.pop("x_proj.weight", None) or s.pop("x_embedder.weight", None), ["not a checkpoint of"]),
    ],
    ids=["missing", "extra", "shape", "other model"],
)
@pytest.mark.parametrize(("kind", "size", "shapes"), [next(full_size()), list(full_size())[-1]])
def test_wrong_names_and_shapes(kind, size, shapes, change, words):
    shapes = dict(shapes)
    change(shapes)
    with pytest.raises(InputError) as error:
        plan_of(kind, shapes)
    assert all(word in str(error.value) for word in words), error.value


def released_weights(golden):
    arrays = np.load(GOLDENS / golden)
    prefix = "state_dict/"
    return {name.removeprefix(prefix): arrays[name].astype(np.float32) for name in arrays if name.startswith(prefix)}


def files_of(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def converted(kind, checkpoint, out, *args):
    done = command("convert", f"--kind={kind}", f"--checkpoint={checkpoint}", f"--out={out}", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tiny_checkpoints_convert_sample_and_return(tmp_path):
    """Both families, in the layout of their releases; CausalFusion with an autoencoder."""
    vae = released_weights("mar_vae_tiny.npz")
    torch_format.save(tmp_path / "vae.ckpt", {"model": vae})
    assert "mar_vae" in converted("mar_vae", tmp_path / "vae.ckpt", tmp_path / "vae")

    fusion = released_weights("causalfusion_tiny.npz")
    other = {name: array + 1 for name, array in fusion.items()}
    torch_format.save(tmp_path / "fusion.pt", torch_format.released(other, ema=fusion))
    converted("causalfusion", tmp_path / "fusion.pt", tmp_path / "fusion")

    acdit = released_weights("acdit_image_tiny.npz")
    args = dict(
        patch_size=1, num_frames=1, image_size=32, vae_patch_pixels=8, block_size=4, ar_len=4, nd_split=None, lr=1e-4
    )
    torch_format.save(tmp_path / "acdit.pt", torch_format.released(acdit, ema=acdit, args=args))
    converted("acdit", tmp_path / "acdit.pt", tmp_path / "acdit", "--weights=model")

    quick = ("--num=4", "--solver_steps=3")
    for name, vae, shape in (("fusion", ["--vae", tmp_path / "vae"], (4, 8, 8, 3)), ("acdit", [], (4, 4, 4, 4))):
        out = tmp_path / f"{name}_samples"
        done = command("sample", f"--checkpoint={tmp_path / name}", f"--out={out}", *vae, *quick)
        assert done.returncode == 0, done.stderr
        with np.load(out / "samples.npz") as arrays:
            assert arrays["arr_0"].shape == shape and (arrays["arr_0"].dtype == np.uint8) == bool(vae)
            assert np.isfinite(arrays["arr_0"]).all()
        assert Image.open(out / "grid.png").size[0] > 32
        file = tmp_path / f"{name}.safetensors"
        done = command("convert", "--reverse", f"--checkpoint={tmp_path / name}", f"--out={file}")
        assert done.returncode == 0, done.stderr
        weights = load_file(file)
        expected = {"fusion": fusion, "acdit": acdit}[name]
        assert weights.keys() == expected.keys()
        for key, array in expected.items():
            assert weights[key].tobytes() == array.tobytes(), key
    edits_with_autoencoder(tmp_path)
    again = command("convert", "--reverse", f"--checkpoint={tmp_path / 'fusion'}", f"--out={file}")
    assert again.returncode == 2 and "exists; give a new file" in again.stderr


def edits_with_autoencoder(folder):
    """Kept pixels come back bit for bit, or as decoded; without the autoencoder, kept latents."""
    args = (f"--checkpoint={folder / 'fusion'}", "--mask=left", "--label=1", "--solver_steps=3", "--ar_steps=1")
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    np.savez(folder / "latents.npz", latents)
    pixels = (f"--vae={folder / 'vae'}", f"--image={folder / 'image.png'}")
    for name, more, before in (
        ("pasted", pixels, image), ("decoded", (*pixels, "--nopaste"), image),
        ("latents", (f"--image={folder / 'latents.npz'}",), latents),
    ):  # fmt: skip
        done = command("edit", *args, *more, f"--out={folder / name}")
        assert done.returncode == 0, done.stderr
        with np.load(folder / name / "samples.npz") as arrays:
            after, mask = arrays["arr_0"], arrays["mask"]
        assert after.shape[1:] == before.shape[-3:] and mask[:, 0].all() and not mask[:, -1].any()
        same = (after == before)[:, ~mask]
        assert same.all() == (name != "decoded") and (after != before)[:, mask].mean() > 0.5


def refused(tmp_path, checkpoint, *args, kind="causalfusion"):
    """The one line with which a conversion is refused, nothing written."""
    out = tmp_path / "out"
    before = files_of(tmp_path)
    done = command("convert", f"--kind={kind}", f"--checkpoint={checkpoint}", f"--out={out}", *args)
    assert done.returncode == 2 and files_of(tmp_path) == before, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_bad_files_are_refused_and_nothing_is_written(tmp_path):
    weights = released_weights("causalfusion_tiny.npz")
    whole = tmp_path / "whole.pt"
    torch_format.save(whole, weights)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "cut.pt" in refused(tmp_path, tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "text.pt" in refused(tmp_path, tmp_path / "text.pt")
    marker = tmp_path / "marker"
    evil = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    torch_format.zip_file(tmp_path / "evil.pt", {"data.pkl": evil})
    assert "os.system" in refused(tmp_path, tmp_path / "evil.pt") and not marker.exists()
    assert "not a checkpoint of acdit" in refused(tmp_path, whole, kind="acdit")
    assert "no meaning" in refused(tmp_path, whole, "--frames=2", kind="mar_vae")
    assert "--frames=2" in refused(tmp_path, whole, "--frames=2")
    assert "--kind" in refused(tmp_path, whole, kind="")


def test_damaged_converted_checkpoint_is_refused(tmp_path):
    torch_format.save(tmp_path / "fusion.pt", released_weights("causalfusion_tiny.npz"))
    converted("causalfusion", tmp_path / "fusion.pt", tmp_path / "fusion")
    written = [path for path in (tmp_path / "fusion" / "params").rglob("*") if path.is_file()]
    victim = max(written, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = command("sample", f"--checkpoint={tmp_path / 'fusion'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "damaged" in done.stderr and not (tmp_path / "out").exists()
