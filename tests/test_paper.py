"""Statements of the paper and of related methods' code that have no other home, as tests."""
import math

import pytest
import torch
import torch.nn.functional as F

import losses
import train_ae
import train_diffusion
from conftest import args_of
from dit import DDPM
from spectral import dct2, power_spectrum, radial_profile
from vae import AEConfig, AutoencoderKL


def test_a1_the_pixel_loss_is_the_sum_of_the_losses_per_frequency():
    """A.1, by Parseval: of the denoiser's error, in the unitary DFT of the paper and in our DCT."""
    x, prediction = torch.randn(2, 2, 3, 24, 40, dtype=torch.float64)
    pixels = (x - prediction).square().sum()
    fourier = torch.fft.fft2(x, norm="ortho") - torch.fft.fft2(prediction, norm="ortho")
    torch.testing.assert_close(fourier.abs().square().sum(), pixels)
    torch.testing.assert_close((dct2(x) - dct2(prediction)).square().sum(), pixels)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a4_rotation_keeps_the_psd(turns):
    """A.4: a quarter turn swaps the axes of the power spectrum and moves no ring's power."""
    x = torch.randn(2, 4, 24, 40)
    P, turned = power_spectrum(x), power_spectrum(torch.rot90(x, turns, (2, 3)))
    torch.testing.assert_close(turned.mT if turns % 2 else turned, P, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(radial_profile(turned), radial_profile(P), rtol=1e-4, atol=1e-5)


def test_remark_a1_the_gaussian_has_the_most_entropy():
    """Remark A.1: of variables of one variance a Laplacian and a uniform one have less."""
    gaussian = 0.5 * math.log(2 * math.pi * math.e)
    laplace, uniform = 1 + math.log(2 / math.sqrt(2)), math.log(math.sqrt(12))
    assert gaussian > laplace and gaussian > uniform
    samples = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    logs = -0.5 * samples.square() - 0.5 * math.log(2 * math.pi)
    assert abs(-logs.mean().item() - gaussian) < 0.01


def test_the_vp_schedule_is_the_vp_sde():
    """Levels of --schedule vp against exp(-int beta) of the SDE with beta(t) from 0.1 to 20."""
    alpha_bar = DDPM("vp").alpha_bar
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    closed = torch.exp(-(0.1 * t + 0.5 * (20 - 0.1) * t ** 2))
    assert (alpha_bar.sqrt() - closed.sqrt()).abs().max() < 2e-3 and len(alpha_bar) == 1001
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    assert DDPM("sd").alpha_bar[-1] == pytest.approx(0.0047, abs=1e-4)


@pytest.mark.parametrize("reg", ["eq", "vf"])
def test_kl_beside_a_mean_is_the_authors_kl_beside_a_sum(reg):
    """EQ-VAE, VA-VAE: 1e-6 KL beside |x - x^| summed; here beside its mean: all / (3 * H * W)."""
    size = 16
    weight = args_of(train_ae, "--reg", reg, "--image_size", str(size)).kl_weight
    ae = AutoencoderKL(AEConfig((1, 2), 4, ch=8, num_res_blocks=1, norm_groups=4))
    images = torch.rand(3, 3, size, size) * 2 - 1
    recon, target, _, posterior = ae(images, torch.randn(ae.latent_shape(images)),
                                     lambda x, z: (x, z))
    kl = 1e6 * losses.kl_loss(posterior.mean, posterior.logvar)        # not lost in rounding
    summed = (recon - target).abs().flatten(1).sum(1).mean() + 1e-6 * kl
    mean = F.l1_loss(recon, target) + weight * kl
    gradients = [torch.autograd.grad(loss, list(ae.parameters()), retain_graph=True)
                 for loss in (summed, mean)]
    for of_sum, of_mean in zip(*gradients):
        torch.testing.assert_close(of_sum / (3 * size ** 2), of_mean, rtol=1e-3, atol=1e-7)


def test_defaults_of_the_methods():
    """At 256 px eq and vf weigh KL 196,608 times less than kl does; encoders are the authors'."""
    args = lambda *reg: args_of(train_ae, "--reg", *reg)
    assert args("kl").kl_weight == 1e-6 == args("kl", "eq").kl_weight
    assert args("eq").kl_weight * 196_608 == pytest.approx(1e-6)
    assert args("vf", "--kl_weight", "0.5").kl_weight == 0.5
    assert (args("vf").encoder, args("uae").encoder) == ("dinov2_vitl14", "dinov2_vitb14_reg")


def test_presets_follow_the_authors_runs():
    """U-ViT on CelebA: vp, no clipping, 300k or 500k steps, kept every 25k; ImageNet: REPA's."""
    args = lambda preset: args_of(train_diffusion, "--preset", preset, "--ae", "ckpt.pt")
    for preset, steps in (("celeba-f16d16", 300_000), ("celeba-f8d4", 500_000)):
        found = args(preset)
        assert (found.steps, found.schedule, found.clip_grad) == (steps, "vp", 0)
        assert (found.keep_every, found.mirror, found.warmup_steps) == (25_000, "on", 5000)
    for preset in ("imagenet-f16d16", "imagenet-repa"):
        found = args(preset)
        assert (found.mirror, found.ema_warmup, found.clip_grad) == ("off", "off", 1.0)
        assert (found.steps, found.keep_every) == (400_000, 100_000)
    assert args("quick").keep_every == -1 and args("quick").clip_grad == 1.0
