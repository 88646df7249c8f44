"""The theory of spectral.py: transforms against scipy, propositions by Monte Carlo, masks."""
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch
import torch.nn.functional as F

import spectral
from common.builtin import BuiltInImages
from spectral import dct2, idct2, lowpass, rmsc, spectrum_distribution, triangle_mask

close = torch.testing.assert_close


def test_dct2_equals_scipy_and_keeps_energy():
    """Against scipy.fft.dctn (type 2, ortho), also of an odd side; Parseval; the inverse."""
    x = torch.randn(2, 3, 9, 14, dtype=torch.float64)
    X = dct2(x)
    expected = scipy.fft.dctn(x.numpy(), type=2, norm="ortho", axes=(-2, -1))
    close(X, torch.from_numpy(expected))
    close(X.square().sum(), x.square().sum())
    close(idct2(X), x)


def test_block_dct_equals_scipy_tile_by_tile():
    """Tile (i, j) of block_dct2 is the DCT of that tile of the image; block_idct2 inverts."""
    x = torch.randn(2, 3, 16, 24)
    tiles = spectral.block_dct2(x)
    assert tiles.shape == (2, 3, 2, 3, 8, 8)
    expected = scipy.fft.dctn(x[1, 2, 8:16, 16:24].numpy(), norm="ortho")
    close(tiles[1, 2, 1, 2], torch.from_numpy(expected))
    close(spectral.block_idct2(tiles), x)


# ---- masks and downsampling
def test_mask_counts():
    """Coefficients left of 8x8 without the n last of 15 anti-diagonals; u and v alike."""
    kept = {0: 64, 1: 63, 2: 61, 7: 36, 8: 28, 10: 15, 12: 6, 13: 3, 14: 1, 15: 0}
    assert {n: triangle_mask(n).sum().item() for n in kept} == kept
    assert all(torch.equal(triangle_mask(n), triangle_mask(n).T) for n in kept)


def test_lowpass_is_the_masked_block_dct_and_a_projection():
    """n = 0 is the identity, twice is once, n = 14 leaves each tile's mean, n = 15 nothing."""
    x = torch.randn(2, 3, 16, 24)
    for n, block in ((3, 8), (8, 8), (12, 8), (3, 4)):
        expected = spectral.block_idct2(spectral.block_dct2(x, block) * triangle_mask(n, block))
        close(lowpass(x, n, block), expected, rtol=1e-5, atol=1e-5)
    close(lowpass(x, 0), x, rtol=0, atol=0)
    close(lowpass(lowpass(x, 10), 10), lowpass(x, 10), rtol=1e-5, atol=1e-5)
    means = F.interpolate(F.avg_pool2d(x, 8), scale_factor=8, mode="nearest")
    close(lowpass(x, 14), means, rtol=1e-5, atol=1e-5)
    close(lowpass(x, 15), torch.zeros_like(x), rtol=0, atol=0)


def test_downsample_dct_is_determined_by_the_low_frequencies():
    """A.4: downsample_dct depends on the top-left 1/k of the coefficients, and keeps the mean."""
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    for k in (2, 4):
        small = spectral.downsample_dct(x, k)
        close(dct2(small) * k, dct2(x)[..., :16 // k, :24 // k])
        close(small.mean((-2, -1)), x.mean((-2, -1)))


def test_downsample_dct_agrees_with_area_and_bicubic_on_images():
    """A.4's premise: on images of power f^-2 all are a low-pass; on white noise they differ."""
    def difference(x):
        ideal = spectral.downsample_dct(x, 2)
        variance = ideal.var(dim=(1, 2, 3)).mean()
        area = F.avg_pool2d(x, 2)
        bicubic = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
        return [((y - ideal).square().mean() / variance).item() for y in (area, bicubic)]
    leaves = BuiltInImages(64, 16)
    assert max(difference(torch.stack([leaves[i][0] for i in range(16)]) / 127.5 - 1)) < 0.05
    assert min(difference(torch.randn(16, 3, 64, 64))) > 0.15


# ---- spectra
def test_only_the_mean_lives_in_dc():
    """The descriptor ignores it unless remove_dc is off; sign and order of the axes, too."""
    x = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    difference = dct2(x) - dct2(x - x.mean((-2, -1), keepdim=True))
    assert difference.flatten(2)[..., 1:].abs().max() < 1e-12
    assert difference[..., 0, 0].abs().min() > 1e-3
    close(spectrum_distribution(x + 5), spectrum_distribution(x))
    close(spectrum_distribution(-x.mT), spectrum_distribution(x))
    with_dc = spectrum_distribution(x, remove_dc=False)
    assert (spectrum_distribution(x + 5, remove_dc=False) - with_dc).abs().max() > 0.1


def test_spectrum_distribution_by_its_definition():
    """profile with DC zeroed, times ring^gamma, log(1 + .), sum 1, written out with scipy."""
    x = torch.randn(1, 2, 16, 24, dtype=torch.float64) * 3
    P = (scipy.fft.dctn(x[0].numpy(), norm="ortho", axes=(-2, -1)) ** 2).mean(0)
    P[0, 0] = 0
    profile = spectral.radial_profile(torch.from_numpy(P)[None], 16)[0].numpy()
    S = np.log1p(profile * np.arange(1, 17) ** 1.4)
    expected = torch.from_numpy(S / S.sum())
    close(spectrum_distribution(x, 16, gamma=1.4)[0], expected, rtol=1e-5, atol=1e-6)


def test_fit_power_law_recovers_the_exponent():
    """Gaussian fields with P = r^-alpha, on 64 x 96; empty rings are left out; of one ring 0."""
    for alpha in (0.0, 1.0, 2.0, 3.0):
        u, v = torch.arange(64.0), torch.arange(96.0)
        r = (u[:, None] ** 2 + v[None] ** 2).sqrt().clamp_min(1)
        x = idct2(torch.randn(32, 3, 64, 96) * r ** (-alpha / 2))
        profile = spectral.radial_profile(spectral.power_spectrum(x), 32).mean(0)
        assert abs(spectral.fit_power_law(profile).item() - alpha) < 0.1
    profile = 1e-30 * (torch.arange(16) + 0.5) ** -1.5
    profile[1::2] = 0
    assert abs(spectral.fit_power_law(profile).item() - 1.5) < 1e-3
    profile[3:] = 0
    assert spectral.fit_power_law(profile) == 0


def test_match_resolution_is_gaussian_then_bicubic():
    """Against torch's own: a blur from reduction 16 on, none at 8; on H != W."""
    bicubic = lambda x, size: F.interpolate(x, size, mode="bicubic", align_corners=False)
    x = torch.randn(2, 3, 64, 96)
    close(spectral.match_resolution(x, (8, 12)), bicubic(x, (8, 12)), rtol=1e-4, atol=1e-5)
    taps = torch.exp(-0.5 * (torch.arange(-3.0, 4) / 1.2) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 7, 7)
    blurred = F.conv2d(x, kernel, padding=3, groups=3)
    close(spectral.match_resolution(x, (4, 6)), bicubic(blurred, (4, 6)), rtol=1e-4, atol=1e-5)
    close(spectral.match_resolution(x, (64, 96)), x)


# ---- propositions
@pytest.mark.parametrize("alpha_bar", [0.9, 0.3])
def test_prop_3_1_learnable_power_by_monte_carlo(alpha_bar):
    """By how much the best linear denoiser beats predicting 0 equals S * SNR / (1 + SNR)."""
    S = torch.tensor([4.0, 1.0, 0.3, 0.05], dtype=torch.float64)
    z0 = torch.randn(400_000, 4, dtype=torch.float64) * S.sqrt()
    zt = alpha_bar ** 0.5 * z0 + (1 - alpha_bar) ** 0.5 * torch.randn_like(z0)
    gain = (z0 * zt).mean(0) / zt.square().mean(0)             # least squares, without the formula
    reduction = z0.square().mean(0) - (z0 - gain * zt).square().mean(0)
    close(reduction, spectral.learnable_power(S, alpha_bar), rtol=0.03, atol=2e-4)
    close(gain * alpha_bar ** 0.5, spectral.wiener_gain(S, alpha_bar), rtol=0.03, atol=2e-3)
    assert spectral.wiener_gain(torch.tensor(3e38), alpha_bar) == 1  # though the SNR leaves float32


def test_lemma_a2_flat_spectrum_maximises_the_mean_log():
    """Lemma A.2: of all spectra of equal total power, the flat one has the largest mean log."""
    S = torch.rand(1000, 16, dtype=torch.float64) ** 3 + 1e-6
    S = S / S.mean(1, keepdim=True)                      # total power as the flat spectrum of ones
    nearly_flat = 1 + 1e-3 * (S - 1)
    assert (S.log().mean(1) < nearly_flat.log().mean(1)).all()
    assert (nearly_flat.log().mean(1) < 0).all()


@pytest.mark.parametrize("tokens", [
    torch.randn(2, 24, 16), torch.randn(2, 7, 3) + 4, torch.ones(2, 9, 5), torch.randn(3, 1, 8)])
def test_prop_3_2_rmsc_is_the_energy_outside_dc(tokens):
    """Prop. 3.2, of normalised tokens; equal tokens have none; rotations, lengths do not matter."""
    energy = spectral.directional_energy(tokens)                    # (B, T)
    close(rmsc(tokens) ** 2, energy[:, 1:].sum(1) / energy.shape[1], rtol=1e-4, atol=1e-6)
    close(energy.sum(1), torch.full((len(tokens),), float(tokens.shape[1])))
    if tokens.shape[1] == 1 or tokens.std(1).max() == 0:
        assert rmsc(tokens).max() < 1e-6
    D = tokens.shape[2]
    rotation, _ = torch.linalg.qr(torch.randn(D, D))
    lengths = torch.rand(*tokens.shape[:2], 1) + 0.5
    close(rmsc(tokens @ rotation * lengths), rmsc(tokens), rtol=1e-4, atol=1e-5)


# ---- filters
def test_gaussian_blur_and_dog_equal_scipy():
    """scipy.ndimage with mode="mirror" (torch's reflect), also with kernels beyond the side."""
    x = torch.randn(1, 2, 9, 14, dtype=torch.float64)
    for sigma in (0.5, 1.0, 2.5, 6.0):
        radius = max(1, int(np.ceil(4 * sigma)))
        expected = scipy.ndimage.gaussian_filter(x[0].numpy(), sigma, mode="mirror",
                                                 axes=(1, 2), radius=radius)
        close(spectral.gaussian_blur(x, sigma)[0], torch.from_numpy(expected))
    narrow, wide = (spectral.gaussian_blur(x, sigma) for sigma in (0.5, 2.5))
    close(spectral.dog(x, 0.5, 2.5), narrow - wide)
    # Eq. 6 has no DC: constants vanish up to the border
    assert spectral.dog(torch.full((1, 3, 8, 13), 7.0), 1.0, 2.0).abs().max() < 1e-5
    close(spectral.gaussian_blur(x, 0.0), x)


def test_zigzag_is_jpegs_order():
    """The first ten entries of JPEG's table; on a grid with H != W all once, by diagonals."""
    assert spectral.zigzag(8, 8)[:10].tolist() == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]
    order = spectral.zigzag(3, 5).tolist()
    assert sorted(order) == list(range(15)) and order[-1] == 14
    sums = [k // 5 + k % 5 for k in order]
    assert sums == sorted(sums)
