"""Where users take their work: diffusers' folders."""
import json
import sys

import pytest
import torch

from common import weights
from common.weights import export_diffusers, load_autoencoder
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
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.logvar, expected.logvar, rtol=0, atol=2e-5)
    decoded = vae.decode(expected.mean).sample
    torch.testing.assert_close(decoded, ae.decode(expected.mean), rtol=0, atol=2e-5)
    assert vae.config.latents_std == ae.latent_std.flatten().tolist()
