"""Figures and commands of evaluate.py."""
import pytest
import torch

from evaluate import pca_rgb


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
