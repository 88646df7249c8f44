"""Metrics against closed forms."""
import math

import pytest
import torch

from evaluate import pca_rgb, psnr, ssim

close = torch.testing.assert_close


def test_psnr_closed_form():
    """A constant error of 16 grey levels: 20 log10(255 / 16); errors below half a level vanish in 8 bits."""
    a = (torch.randint(0, 200, (3, 3, 12, 17)).float() - 127.5) / 127.5
    close(psnr(a, a + 16 / 127.5), torch.full((3,), 20 * math.log10(255 / 16)))
    close(psnr(a, a + 0.3 / 127.5), torch.full((3,), 100.0))


def test_ssim_closed_forms():
    """Identical images: 1. Two constants: the luminance term alone. A sign flip of zero-mean texture: close to -1."""
    a = torch.randn(2, 3, 16, 23) * 0.5
    close(ssim(a, a), torch.ones(2))
    x, y, c1 = 0.2, 0.6, (0.01 * 2) ** 2
    constants = ssim(torch.full((1, 3, 12, 15), x), torch.full((1, 3, 12, 15), y))
    close(constants, torch.tensor([(2 * x * y + c1) / (x * x + y * y + c1)]), rtol=1e-4, atol=1e-5)
    checkerboard = ((torch.arange(16)[:, None] + torch.arange(23)) % 2 * 2.0 - 1).expand(1, 3, 16, 23)
    assert ssim(checkerboard, -checkerboard) < -0.99


def test_ssim_against_the_definition():
    """One 11 x 11 image has one window: the formula with numpy-like weighted moments."""
    a, b = torch.rand(1, 1, 11, 11, dtype=torch.float64), torch.rand(1, 1, 11, 11, dtype=torch.float64)
    g = torch.exp(-0.5 * ((torch.arange(11) - 5) / 1.5) ** 2).double()
    w = g[:, None] * g / g.sum() ** 2
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
    c1, c2 = 1e-4, 9e-4
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))
    close(ssim(a, b, data_range=1.0), expected.float()[None], rtol=1e-4, atol=1e-5)


def test_ssim_refuses_images_smaller_than_its_window():
    """10 rows do not hold an 11 x 11 window."""
    with pytest.raises(ValueError, match="10x20"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


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
