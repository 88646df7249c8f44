"""Metrics against closed forms and against scipy."""
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from common import metrics
from common.builtin import BuiltInImages
from common.metrics import Moments, frechet_distance, sliced_wasserstein, ssim, to_uint8
from losses import PerceptualLoss
from spectral import spectrum_distribution

close = torch.testing.assert_close


def test_ssim_against_the_definition():
    """One 11 x 11 image has one window: weighted moments written out. 1 for identical images."""
    a, b = (torch.rand(1, 1, 11, 11, dtype=torch.float64) for _ in range(2))
    g = torch.exp(-0.5 * ((torch.arange(11) - 5) / 1.5) ** 2).double()
    w = g[:, None] * g / g.sum() ** 2
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
    cov = (w * (a - ma) * (b - mb)).sum()
    luminance = (2 * ma * mb + 1e-4) / (ma ** 2 + mb ** 2 + 1e-4)
    expected = luminance * (2 * cov + 9e-4) / (va + vb + 9e-4)
    close(ssim(a, b, data_range=1.0), expected.float()[None], rtol=1e-4, atol=1e-5)
    close(ssim(2 * a, 2 * b), expected.float()[None], rtol=1e-4, atol=1e-5)
    close(ssim(*2 * [torch.randn(2, 3, 16, 23)]), torch.ones(2))


# ---- Frechet distance
def mean_cov(rows):
    """Moments' number of rows, mean and covariance, from batches of 7."""
    moments = Moments(rows.shape[1])
    for part in rows.split(7):
        moments.add(part)
    return moments.mean_cov()


def test_moments_stream_to_numpys_mean_and_covariance():
    """Batches add up to np.cov of all rows, in float64."""
    rows = torch.randn(50, 6) * torch.arange(1, 7) + 3
    n, mean, cov = mean_cov(rows)
    assert n == 50
    close(mean, rows.double().mean(0))
    close(cov, torch.from_numpy(np.cov(rows.double().numpy(), rowvar=False)))


@pytest.mark.parametrize("rank1, rank2", [(12, 12), (5, 12), (5, 4), (0, 12)])
def test_frechet_distance_equals_scipys_sqrtm(rank1, rank2):
    """Random covariances of 12 dimensions, singular ones included."""
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal((12, rank)) for rank in (rank1, rank2))
    m1, m2 = rng.standard_normal((2, 12))
    c1, c2 = A @ A.T, B @ B.T
    root = scipy.linalg.sqrtm(c1 @ c2 + 1e-14 * np.eye(12))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(root))
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("count", [12, 200])
def test_equal_sets_are_at_exactly_zero(count):
    """Fewer images than features or more, in the same order or another: not even -5e-6."""
    features = torch.rand(count, 128) * torch.rand(128) ** 2
    (_, mean, cov), (_, *flipped) = mean_cov(features), mean_cov(features.flip(0))
    assert frechet_distance(mean, cov, mean, cov) == frechet_distance(mean, cov, *flipped) == 0.0
    assert frechet_distance(mean + 1e-3, cov, *flipped) == pytest.approx(128e-6)
    assert math.isnan(frechet_distance(mean * math.nan, cov, mean, cov))


@pytest.mark.parametrize("load, words", [
    (lambda: metrics.load_inception("cpu"), ["https://github.com/toshas/torch-fidelity"]),
    (PerceptualLoss, ["https://download.pytorch.org/models/vgg16-397923af.pth",
                      "hub/checkpoints/vgg16-397923af.pth", "--lpips_weight 0"])])
def test_without_network_one_line_says_where_the_file_belongs(load, words, tmp_path, offline):
    with pytest.raises(FileNotFoundError) as error:
        load()
    for word in (str(tmp_path), *words):
        assert word in str(error.value) and "\n" not in str(error.value)


# ---- metrics without weights
def test_laplacian_pyramid_adds_up():
    """Sides 64, 32, 16; expanding the coarse one and adding the fine ones gives the image back."""
    x = torch.randn(2, 3, 64, 96)
    levels = metrics.laplacian_pyramid(x)
    assert [level.shape[-2:] for level in levels] == [(64, 96), (32, 48), (16, 24)]
    taps, image = torch.tensor([1.0, 4, 6, 4, 1]) / 16, levels[-1]
    kernel = (taps[:, None] * taps).expand(3, 1, 5, 5)
    for level in reversed(levels[:-1]):
        spread = torch.zeros_like(level)
        spread[..., ::2, ::2] = 4 * image
        image = level + F.conv2d(F.pad(spread, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    close(image, x, rtol=1e-4, atol=1e-5)


def test_distances_are_zero_on_itself_and_grow_with_blur_and_noise():
    """SWD on the finest level, and the KL; another draw of the same images is close."""
    sets = (BuiltInImages(64, 24, first=first) for first in (0, 1000))
    a, b = (torch.stack([images[i][0] for i in range(24)]) / 127.5 - 1 for images in sets)
    blur = lambda x: gaussian_blur(x, 3)
    p, q = (spectrum_distribution(x).mean(0) for x in (a, b))
    expected = F.kl_div(q.log(), p, reduction="sum").item()
    assert metrics.spectral_kl(b, a) == pytest.approx(expected, rel=1e-3)
    assert metrics.spectral_kl(blur(b), a) > 10 * metrics.spectral_kl(b, a) > 0
    assert set(sliced_wasserstein(a, a).values()) == {0.0}
    noise = torch.randn_like(b)
    for worse in ([b, blur(b), blur(blur(blur(b)))], [b, b + 0.2 * noise, b + 0.6 * noise]):
        same, some, more = (sliced_wasserstein(x, a)[64] for x in worse)
        assert same < some < more


def test_to_uint8_rounds_and_clips():
    """-1 -> 0, 1 -> 255, beyond is clipped, and 8-bit images come back unchanged."""
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(x.float() / 127.5 - 1), x)
