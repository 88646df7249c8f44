"""What users bring: diffusers' folders, anybody's latents, trackers, Apple GPUs, research knobs."""
import contextlib
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dit
import test_train_ae
import test_train_diffusion
import train_ae
from common import run, weights
from common.latents import _encode
from common.metrics import Moments
from common.weights import export_diffusers, load_autoencoder
from conftest import read_lines, run_main, same
from spectral import dct2, idct2, lowpass
from test_vae import SMALL, small
from vae import CONFIGS, AutoencoderKL


def random_autoencoder(config):
    """With statistics of its latents."""
    ae, C = small(config), config.latent_channels
    ae.set_latent_stats(torch.randn(C), torch.rand(C) + 0.5)
    return ae


@pytest.mark.parametrize("config", [SMALL, CONFIGS["f4d4-tiny"]])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_export_is_read_back_bit_for_bit(config, suffix, tmp_path, monkeypatch, capsys):
    """Also an export of it, by the command; attention at a level, too."""
    if suffix == ".bin":                                   # without the package
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    ae, a, b = random_autoencoder(config), tmp_path / "a", tmp_path / "b"
    export_diffusers(ae, a)
    run_main(weights, "export", "--ae", a, "--out", b)
    assert f"wrote {b}" in capsys.readouterr().out
    for folder in (a, b):
        read = load_autoencoder(folder)
        assert read.config == ae.config and same(read.state_dict(), ae.state_dict())
        assert {path.suffix for path in folder.iterdir()} == {".json", suffix}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_opens_it(name, tmp_path):
    """The same posterior and decoding in the real package, H != W; f16d32 attends at a level."""
    diffusers = pytest.importorskip("diffusers")
    ae = random_autoencoder(CONFIGS[name])
    export_diffusers(ae, tmp_path / "vae")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    q, p = ae.encode(images), vae.encode(images).latent_dist
    expected = q.mean, q.logvar, ae.decode(q.mean)
    found = p.mean, p.logvar, vae.decode(q.mean).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert vae.config.latents_std == ae.latent_std.flatten().tolist()


@pytest.mark.parametrize("data", [[], ["--data", "discs", "--image_size", "64"]])
def test_spectra_of_anybodys_latents(data, main):
    """Exponents of arrays of two shapes, with the images' curves only if --data names them."""
    noise, smooth = torch.randn(20, 3, 16, 24), torch.randn(30, 5, 20, 18)
    smooth = idct2(dct2(smooth) / (1 + torch.arange(20.0)[:, None] + torch.arange(18.0)) ** 2)
    for name, latents in dict(noise=noise, smooth=smooth).items():
        np.save(f"{name}.npy", latents.numpy())
    latents = "--latents", "noise.npy", "smooth.npy"
    first, second = main("spectrum", *latents, "--val_images", 25, "--out", "a.png", *data)
    assert abs(first["alpha"]) < 0.1 and second["alpha"] > 3
    assert (first["n"], second["n"], second["latent"]) == (20, 25, "5x20x18")
    assert ("alpha_images" in first) == bool(data) == ("target" in open("a.csv").read())


# ---- Trackers ------------------------------------------------------------------------------------
def test_tensorboard_shows_the_log_and_a_resume_continues_it(tmp_path, capsys):
    """Each number of log.jsonl at its step, whatever was stopped; figures, memory, speed."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = "--reg esm --track tensorboard --eval_every 2 --log_every 1 --resume --steps".split()
    test_train_ae.train(tmp_path, *flags, 3)
    log = test_train_ae.train(tmp_path, *flags, 5)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "esm", "val_psnr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], pytest.approx(line[name])) for line in log if name in line]
        assert dict(found) == dict(expected) and len(dict(found)) > 2
    tags = events.Tags()
    assert {"images_per_s", "memory_GB"} <= set(tags["scalars"])
    assert tags["images"] == ["figure"] and "flags/text_summary" in tags["tensors"]
    assert "images/s" in capsys.readouterr().out and "memory_GB" not in log[-1]


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    """Offline: one id for a run and its resumption, another for a run from the start."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for flags in (["--steps", "1"], ["--steps", "2", "--resume"], ["--steps", "1", "--overwrite"]):
        test_train_ae.train(tmp_path, "--track", "wandb", *flags)
        ids.append((tmp_path / "wandb_id.txt").read_text())
        wandb.finish()                                     # as at the end of a process
    assert ids[0] == ids[1] != ids[2]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    """And nothing of the run that was to be replaced is lost."""
    before = test_train_ae.train(tmp_path, "--steps", 1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--track wandb: needs `pip install wandb`"):
        test_train_ae.train(tmp_path, "--track", "wandb", "--steps", 1, "--overwrite")
    assert read_lines(tmp_path / "log.jsonl") == before and (tmp_path / "ckpt.pt").exists()


# ---- --device mps: no float64 there --------------------------------------------------------------
class NoFloat64(TorchDispatchMode):
    """The meta device in the place of an Apple GPU: float64 there is an error, a copy is zeros."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_device = args and getattr(args[0], "is_meta", False)
        if on_device and function is torch.ops.aten._local_scalar_dense.default:
            return 1                                       # .item()
        if on_device and function is torch.ops.aten._to_copy.default:
            if (kwargs.get("device") or args[0].device).type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        result = function(*args, **kwargs)
        for tensor in torch.utils._pytree.tree_leaves(result):
            wide = getattr(tensor, "is_meta", False) and tensor.dtype == torch.float64
            assert not wide, f"{function} on the device in float64"
        return result


@pytest.fixture
def device(monkeypatch):
    """A device without float64, for which `to_state` and Moments decide as for mps."""
    monkeypatch.setattr(dit, "to_state", lambda noise, device: noise.to(device, torch.float32))
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    return torch.device("meta")


@pytest.mark.parametrize("process, options", [
    (dit.Interpolant(), {}), (dit.Interpolant(), dict(sampler="ode", cfg=2.0)),
    (dit.DDPM("sd"), dict(cfg=2.0))])
def test_samplers_and_losses_without_float64(process, options, device):
    model = dit.MODELS["SiT-tiny/2"](input_size=8, in_channels=4, num_classes=3).to(device)
    y = torch.zeros(2, dtype=torch.int64, device=device)
    with NoFloat64():
        process.sample(model, (2, 4, 8, 8), steps=3, y=y, **options)
        x, t = torch.randn(2, 4, 8, 8, device=device), torch.rand(2, device=device)
        process.loss(model, x, t, torch.randn_like(x), y).backward()


def test_validation_and_the_cache_without_float64(device):
    """The stand-in stops what is left on the device in float64."""
    ae = AutoencoderKL(CONFIGS["f2d2-tiny"]).to(device)
    images, rows = torch.randn(2, 3, 32, 48, device=device), torch.arange(2)
    args, batches = SimpleNamespace(seed=0, gamma=1.0), [(images, rows, rows)]
    arrays = [np.zeros((2, 2, 4, 16, 24), np.float16), np.zeros(2, int), np.zeros(2, bool)]
    with torch.no_grad(), NoFloat64():
        with pytest.raises(AssertionError, match="in float64"):
            images.double()
        train_ae.validate(ae, batches, args, contextlib.nullcontext())
        _encode("cache", ae, batches, *arrays)


def test_mps_is_float32_and_not_compiled():
    """Said in one line; nothing of it is chosen by default. No Mac was at hand."""
    args = SimpleNamespace(dtype=None, compile=None)
    run.device_choices(args, torch.device("mps"))
    assert (args.dtype, args.compile) == ("fp32", "off")
    for flags in (dict(dtype="bf16", compile=None), dict(dtype=None, compile="on")):
        with pytest.raises(ValueError, match="--device mps"):
            run.device_choices(SimpleNamespace(**flags), torch.device("mps"))
    state = dit.to_state(torch.zeros(1), torch.device("cpu"))
    assert state.dtype == torch.float64 and Moments(3, "mps").sums.device.type == "cpu"
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="--device mps: PyTorch sees no such device"):
            run.init_distributed("mps")


# ---- Knobs of research ---------------------------------------------------------------------------
def test_alignment_ends_at_repa_until(material, tmp_path):
    """Its term and its projector's updates end there; until then the run is the aligned one."""
    train = lambda name, steps, *flags: test_train_diffusion.train(
        material, tmp_path / name, "--repa", "dog", "--encoder_source", "random", "--steps", steps,
        *flags)
    log, ended = train("a", 4, "--repa_until", 2)
    assert ["align" in line for line in log] == [True, True, False, False]
    _, aligned = train("b", 2)
    assert same(ended["projector"], aligned["projector"])
    assert not same(ended["model"], aligned["model"])
    other, whole = train("c", 4)
    assert log[:2] == other[:2] and not same(ended["projector"], whole["projector"])


def test_dsm_block_is_that_of_both_sides():
    """draw_pair's mask cuts blocks of this side; what does not fit is in test_bad_input.py."""
    args = SimpleNamespace(reg=["dsm"], dsm_masks=[5], dsm_block=4)
    x, z = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 8, 12)
    _, pair = train_ae.draw_pair(args, random.Random(0))
    assert same(pair(x, z), (lowpass(x, 5, 4), lowpass(z, 5, 4)))
