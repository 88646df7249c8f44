"""Where users take their work, and what they bring: diffusers' folders, latents of anybody."""
import json
import sys

import numpy as np
import pytest
import torch

import evaluate
from common import weights
from common.weights import export_diffusers, load_autoencoder
from conftest import run_main
from spectral import dct2, idct2
from test_vae import SMALL, small
from vae import CONFIGS


def random_autoencoder(config):
    """With statistics of its latents."""
    ae, C = small(config), config.latent_channels
    ae.set_latent_stats(torch.randn(C), torch.rand(C) + 0.5)
    return ae


@pytest.mark.parametrize("config", [SMALL, CONFIGS["f4d4-tiny"]])
@pytest.mark.parametrize("package", [True, False], ids=["safetensors", "bin"])
def test_an_export_is_read_back_bit_for_bit(config, package, tmp_path, monkeypatch):
    """Weights, configuration and statistics; attention at a level, too; nothing is overwritten."""
    if not package:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    ae = random_autoencoder(config)
    export_diffusers(ae, tmp_path / "vae")
    read = load_autoencoder(tmp_path / "vae")
    assert read.config == ae.config and read.state_dict().keys() == ae.state_dict().keys()
    assert all(map(torch.equal, read.state_dict().values(), ae.state_dict().values()))
    assert {path.suffix for path in (tmp_path / "vae").iterdir()} == {
        ".json", ".safetensors" if package else ".bin"}
    with pytest.raises(ValueError, match="vae: is not empty"):
        export_diffusers(ae, tmp_path / "vae")


def test_export_is_a_command(tmp_path, monkeypatch, capsys):
    ae = random_autoencoder(CONFIGS["f2d2-tiny"])
    export_diffusers(ae, tmp_path / "a")
    monkeypatch.setattr(sys, "argv", ["weights.py", "export", "--ae", str(tmp_path / "a"),
                                      "--out", str(tmp_path / "b")])
    weights.main()
    assert f"wrote {tmp_path}/b" in capsys.readouterr().out
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert a == b


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_opens_it(name, tmp_path):
    """The same posterior and decoding in the real package, H != W; f16d32 attends at a level."""
    diffusers = pytest.importorskip("diffusers")
    ae = random_autoencoder(CONFIGS[name])
    export_diffusers(ae, tmp_path / "vae")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    expected, found = ae.encode(images), vae.encode(images).latent_dist
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logvar, expected.logvar, rtol=1e-4, atol=1e-4)
    decoded = vae.decode(expected.mean).sample
    torch.testing.assert_close(decoded, ae.decode(expected.mean), rtol=1e-4, atol=1e-4)
    assert vae.config.latents_std == ae.latent_std.flatten().tolist()


@pytest.mark.parametrize("data", [[], ["--data", "discs", "--image_size", "64"]])
def test_spectra_of_anybodys_latents(data, tmp_path, monkeypatch):
    """Exponents of arrays of two shapes, with the images' curves only if --data names them."""
    monkeypatch.chdir(tmp_path)
    noise, smooth = torch.randn(20, 3, 16, 24), torch.randn(30, 5, 20, 18)
    smooth = idct2(dct2(smooth) / (1 + torch.arange(20.0)[:, None] + torch.arange(18.0)) ** 2)
    for name, latents in dict(noise=noise, smooth=smooth).items():
        np.save(f"{name}.npy", latents.numpy())
    run_main(evaluate, "spectrum", "--latents", "noise.npy", "smooth.npy", "--val_images", 25,
             "--out", "a.png", *data, monkeypatch=monkeypatch)
    first, second = map(json.loads, open("results.jsonl"))
    assert abs(first["alpha"]) < 0.1 and second["alpha"] > 3
    assert (first["n"], second["n"], second["latent"]) == (20, 25, "5x20x18")
    assert ("alpha_images" in first) == bool(data) == ("target" in open("a.csv").read())
    np.save("flat.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match="flat.npy: of shape"):
        run_main(evaluate, "spectrum", "--latents", "flat.npy", monkeypatch=monkeypatch)
