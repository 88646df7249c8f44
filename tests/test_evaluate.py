"""
Figures and commands of evaluate.py, on small material and with random Inception weights in place of
the real ones.
"""
import csv
import json
import urllib.error

import numpy as np
import pytest
import torch

import evaluate
import runtime
import train_diffusion
from conftest import run
from data import ImageSet
from figures import pca_rgb
from sources import open_source
from test_train_diffusion import flags_of


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_pca_rgb_shows_the_strongest_direction_first(channels):
    """Red carries the direction of largest variance, whatever the channel count; H != W."""
    u, v = torch.arange(6.0), torch.arange(9.0)
    pattern = (u[:, None] * 0.7 + v).sin()
    latents = 0.01 * torch.randn(2, channels, 6, 9)
    latents[:, -1] += pattern
    rgb = pca_rgb(latents)
    assert rgb.shape == (2, 3, 6, 9) and rgb.min() >= 0 and rgb.max() <= 1
    correlation = torch.corrcoef(torch.stack([rgb[0, 0].flatten(), pattern.flatten()]))[0, 1]
    assert correlation.abs() > 0.99


def flags(material, tmp_path, *more):
    return ["--ae", material / "ae" / "ckpt.pt", "--val_images", 1, "--batch_size", 2,
            "--device", "cpu", "--results", tmp_path / "results.jsonl", *more]


def test_spectrum_writes_figure_and_csv(material, tmp_path, monkeypatch):
    """16 rings for images, target and each of two autoencoders; shares sum to 1."""
    ae = material / "ae" / "ckpt.pt"
    more = ["--ae", ae, ae, "--out", tmp_path / "s.png"]
    run(evaluate, "spectrum", *flags(material, tmp_path, *more), monkeypatch=monkeypatch)
    with open(tmp_path / "s.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["curve"] for row in rows} == {"images", "target, gamma 1", "ae"}
    assert len(rows) == 4 * 16
    assert sum(float(row["share"]) for row in rows) == pytest.approx(4, rel=1e-4)
    assert len(results(tmp_path)) == 2 and (tmp_path / "s.png").stat().st_size > 5000


def test_bands_and_latents_draw(material, tmp_path, monkeypatch):
    """Both commands write their figure; bands reports a PSNR per mask."""
    for command in ("bands", "latents"):
        out = tmp_path / f"{command}.png"
        run(evaluate, command, *flags(material, tmp_path, "--out", out), monkeypatch=monkeypatch)
        assert out.stat().st_size > 3000
    assert {"psnr_n0", "psnr_n8", "psnr_n10", "psnr_n12"} <= results(tmp_path)[0].keys()


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_similarity_and_feature_spectrum(material, tmp_path, monkeypatch):
    """Figs. 6 and 7 with the untrained encoder: figures, RMSC per target, the features' curve."""
    common = ["--encoder_source", "random", "--device", "cpu", "--val_images", 1,
              "--results", tmp_path / "results.jsonl"]
    run(evaluate, "similarity", *common, "--image_size", 56, "--data", material / "images",
        "--out", tmp_path / "f.png", monkeypatch=monkeypatch)
    result, = results(tmp_path)
    assert {"rmsc_none", "rmsc_spnorm", "rmsc_dog"} <= result.keys()
    assert (tmp_path / "f.png").stat().st_size > 3000
    run(evaluate, "spectrum", *common, "--ae", material / "ae" / "ckpt.pt",
        "--encoder", "dinov2_vitb14", "--out", tmp_path / "s.png", monkeypatch=monkeypatch)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert any(line.startswith("random encoder,") for line in lines)


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_similarity_of_one_file_and_features_without_an_autoencoder(
        material, tmp_path, monkeypatch):
    """--image takes one file; spectrum --encoder needs no autoencoder."""
    monkeypatch.chdir(tmp_path)                        # no out/ae here
    common = ["--encoder_source", "random", "--device", "cpu"]
    image = sorted((material / "images").glob("*/*.png"))[0]
    run(evaluate, "similarity", *common, "--image_size", 56, "--image", image,
        monkeypatch=monkeypatch)
    assert results(tmp_path)[0]["n"] == 1
    run(evaluate, "spectrum", *common, "--encoder", "dinov2_vitb14", "--data", material / "images",
        "--image_size", 64, "--val_images", 1, monkeypatch=monkeypatch)
    assert (tmp_path / "out" / "spectrum.csv").read_text().count("random encoder") == 16
    with pytest.raises(ValueError, match="--image nowhere.png: No such file"):
        run(evaluate, "similarity", *common, "--image", "nowhere.png", monkeypatch=monkeypatch)


def test_recon_counts_every_image(material, tmp_path, monkeypatch, inception_home):
    """PSNR, SSIM, L1 and rFID of 7 images in batches of 2; without VGG weights no LPIPS."""
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(material / "images")
    (tmp_path / "set" / "val").symlink_to(material / "images")
    more = ["--data", tmp_path / "set", "--val_images", 7, "--workers", 0]
    run(evaluate, "recon", *flags(material, tmp_path, *more), monkeypatch=monkeypatch)
    result, = results(tmp_path)
    assert {"psnr", "ssim", "l1", "rFID@7"} <= result.keys() and "lpips" not in result
    assert result["n"] == 7
    assert result["rFID@7"] > 0 and 5 < result["psnr"] < 40


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


def test_fid_of_folder_npz_and_statistics(material, tmp_path, monkeypatch, inception_home):
    """
    The same pictures as a folder and as an npz of images: 0. Statistics files need no network at
    all: the closed form.
    """
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    pictures = []
    for i, name in enumerate(sorted((material / "images").glob("*/*.png"))):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        (folder / name.name).symlink_to(name)
        source = open_source(str(folder))
        one = ImageSet("", source, np.arange(1), np.zeros(1), [], 16)
        pictures.append(np.asarray(one[0][0]).transpose(1, 2, 0))
    np.savez(tmp_path / "images.npz", arr_0=np.stack(pictures))
    common = ["--image_size", 16, "--batch_size", 5, "--device", "cpu",
              "--results", tmp_path / "results.jsonl"]
    run(evaluate, "fid", material / "images", tmp_path / "images.npz", *common,
        monkeypatch=monkeypatch)
    assert results(tmp_path)[0]["FID@12"] == pytest.approx(0, abs=1e-3)
    monkeypatch.setattr(evaluate, "load_inception", lambda device: pytest.fail("no network"))
    for name, mean in (("a", 0.0), ("b", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(3, mean), sigma=np.eye(3))
    run(evaluate, "fid", tmp_path / "a.npz", tmp_path / "b.npz", *common,
        monkeypatch=monkeypatch)
    assert results(tmp_path)[1]["FID"] == pytest.approx(12.0)


def test_gen_with_inception_weights(material, tmp_path, monkeypatch, inception_home):
    """
    FID, IS, KID, precision and recall come out of the real path; the reference statistics are
    reused, and refused when changed.
    """
    monkeypatch.chdir(tmp_path)                        # out/reference belongs to this test
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    run(train_diffusion, *flags_of(material, tmp_path / "run", "--steps", 1),
        monkeypatch=monkeypatch)
    gen = ["gen", "--ckpt", tmp_path / "run" / "ckpt.pt", "--num_samples", 6, "--steps", 2,
           "--batch_size", 4, "--workers", 0, "--device", "cpu"]
    run(evaluate, *gen, monkeypatch=monkeypatch)
    run(evaluate, *gen, monkeypatch=monkeypatch)
    first, second = results(tmp_path)
    assert {"FID@6", "IS", "KID_x1e3_subset6", "precision", "recall"} <= first.keys()
    assert first["FID@6"] > 0
    assert first["FID@6"] == second["FID@6"] and first["weights"] == "torch-fidelity"
    reference, = (tmp_path / "out" / "reference").iterdir()
    stored = dict(np.load(reference))
    how = dict(json.loads(str(stored["how"])), size=99)
    np.savez(reference, **dict(stored, how=json.dumps(how)))
    with pytest.raises(ValueError, match="remove the file"):
        run(evaluate, *gen, monkeypatch=monkeypatch)


@pytest.mark.parametrize("command, culprit", [
    (["fid", "nowhere", "nowhere"], "nowhere: no such folder"),
    (["recon", "--ae", "nowhere.pt"], "nowhere.pt"),
    (["gen", "--ckpt", "nowhere.pt"], "nowhere.pt"),
    (["gen", "--num_samples", "0"], "--num_samples 0"),
    (["spectrum"], "--ae"),
    (["fid", __file__, "cifar10"], "neither a folder nor a .zip")])
def test_bad_flags_end_with_one_line(command, culprit, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line with the culprit."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit, runtime.one_line_errors():
        run(evaluate, *command, "--device", "cpu", monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and culprit in error and error.count("\n") == 1
