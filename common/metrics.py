"""
Metrics between two images (PSNR, SSIM) and between two sets of images (Frechet distance, sliced
Wasserstein distance, KL of radial spectra). The Inception network is torch-fidelity's, as are the
Inception score, KID, precision and recall in analysis/fid.py.

Images are (B, 3, H, W) in [-1, 1]. PSNR and SSIM are per image, (B,), so that their mean does not
depend on how images are split into batches and processes.
"""
import contextlib
import io
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import run
from spectral import spectrum_distribution


# ---- Two images ----------------------------------------------------------------------------------
def to_uint8(images):
    """[-1, 1] -> 0..255, rounded, as saved in a PNG. (B, 3, H, W) uint8."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def jpeg_round_trip(images):
    """(B, 3, H, W) uint8 through PIL's default JPEG: quality 75, chroma subsampled 2x2."""
    read = []
    for image in images.movedim(1, -1).cpu().numpy():  # (H, W, 3)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG")
        read.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(read)).movedim(-1, 1).to(images.device)


def psnr(a, b):
    """
    Peak signal-to-noise ratio in dB of images rounded to 8 bits: 10 log10(255^2 / MSE).
    (B, 3, H, W) in [-1, 1] -> (B,) float32; identical images give 100 dB
    """
    mse = (to_uint8(a).float() - to_uint8(b).float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255 ** 2 / mse.clamp_min(255 ** 2 * 1e-10))


def ssim(a, b, data_range=2.0):
    """
    Structural similarity (Wang et al. 2004): 11x11 Gaussian window with sigma 1.5,
    K = (0.01, 0.03), no padding; computed per channel, then averaged over channels and windows.
    a, b     (B, C, H, W), H and W at least 11; data_range 2 for [-1, 1]
    returns  (B,) float32, 1 for identical images
    """
    a, b = a.float(), b.float()
    C = a.shape[1]
    taps = torch.exp(-0.5 * ((torch.arange(11, device=a.device) - 5) / 1.5) ** 2)
    taps = (taps / taps.sum()).expand(C, 1, 11)

    def window(x):  # Gaussian mean over every 11x11 window
        with torch.autocast(x.device.type, enabled=False):  # E[a^2] - E[a]^2 cancels in bf16
            return F.conv2d(F.conv2d(x, taps[..., None], groups=C), taps[..., None, :], groups=C)

    mean_a, mean_b = window(a), window(b)
    var_a, var_b = window(a * a) - mean_a ** 2, window(b * b) - mean_b ** 2
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    shared = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = shared / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(1)


# ---- Two sets of images --------------------------------------------------------------------------
class Moments:
    """Streaming float64 mean and covariance: add (b, D) features on each rank, then mean_cov."""

    def __init__(self, D, device="cpu"):
        # [1, f] [1, f]^T: count, sum, outer product
        device = "cpu" if torch.device(device).type == "mps" else device       # no float64 there
        self.sums = torch.zeros(D + 1, D + 1, dtype=torch.float64, device=device)

    def add(self, features):
        rows = F.pad(features.to(self.sums.device).double(), (1, 0), value=1.0)
        self.sums += rows.T @ rows

    def mean_cov(self):
        """n (int, at least 2), mean (D,), unbiased covariance (D, D), over all ranks."""
        sums = run.all_sum(self.sums.clone()).cpu()
        n, total = sums[0, 0], sums[0, 1:]
        covariance = (sums[1:, 1:] - torch.outer(total, total) / n) / (n - 1)
        return int(n), total / n, covariance


def frechet_distance(mean1, cov1, mean2, cov2):
    """
    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), float64 (Heusel et al. 2017).
    mean (D,), cov (D, D) tensors or arrays -> float >= 0; below 1e-9 of the traces it is set to 0
    """
    moments = (mean1, cov1, mean2, cov2)
    mean1, cov1, mean2, cov2 = (torch.as_tensor(a, dtype=torch.float64) for a in moments)
    # no sqrtm: (cov1 cov2)^(1/2) has the nonzero eigenvalues of (A' cov2 A)^(1/2), A A' = cov1
    values, vectors = torch.linalg.eigh(cov1)                              # ascending
    # few images: cov1 is singular; drop zeros up to rounding, as their square roots are not small
    positive = values > 10 * torch.finfo(values.dtype).eps * values[-1]
    A = vectors[:, positive] * values[positive].sqrt()                     # (D, rank)
    overlap = torch.linalg.eigvalsh(A.T @ cov2 @ A).clamp_min(0).sqrt().sum()
    traces = cov1.trace() + cov2.trace()
    distance = (mean1 - mean2).square().sum() + traces - 2 * overlap
    return 0.0 if distance <= 1e-9 * traces else float(distance)           # NaN stays NaN


def load_inception(device):
    """
    FID's Inception, float32: (B, 3, H, W) uint8 -> (B, 2048) features, (B, 1008) unbiased logits.
    FileNotFoundError if the weights are missing and cannot be downloaded, ValueError if damaged.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    url = fidelity.URL_INCEPTION_V3
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat",
                                                           ["2048", "logits_unbiased"])
    except OSError as error:  # no connection, or it was interrupted
        raise FileNotFoundError("no FID: the Inception weights could not be downloaded "
                                f"({error}); fetch {url} and put it at {path}") from None
    except Exception as error:  # a damaged file can raise any exception
        raise ValueError(f"{path}: not the Inception weights ({type(error).__name__}); remove the "
                         f"file, it is fetched anew from {url}") from None
    network = network.to(device, memory_format=torch.channels_last)

    def features(images):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return network(images.to(device))
    return features


def load_or_none(load, args):
    """load() on every rank, or None, printing the reason, if any rank lacks the weights."""
    network = None
    if args.networks == "off":
        return None
    try:
        with run.local_rank_zero_first():
            network = load()
    except FileNotFoundError as error:                     # cut its advice, meant for train_ae.py
        run.print0(str(error).partition(", or train without it")[0])
    return network if all(run.all_gather(network is not None)) else None


def laplacian_pyramid(images, smallest=16):
    """Band-pass levels of (B, C, H, W), fine to coarse (Burt & Adelson), then the low-pass rest."""
    C = images.shape[1]
    taps = torch.tensor([1.0, 4, 6, 4, 1], device=images.device) / 16
    kernel = (taps[:, None] * taps).expand(C, 1, 5, 5)
    blur = lambda x: F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=C)
    levels = []
    while all(side >= 2 * smallest and side % 2 == 0 for side in images.shape[-2:]):
        small = blur(images)[..., ::2, ::2]
        spread = torch.zeros_like(images)
        spread[..., ::2, ::2] = 4 * small
        levels.append(images - blur(spread))
        images = small
    return levels + [images]


def sliced_wasserstein(samples, reference, seed=0, patches=64, directions=256):
    """
    Sliced Wasserstein distance of 7x7 patches on a Laplacian pyramid (Karras et al. 2018), x 1000.
    samples, reference  (N, 3, H, W), same H and W; the first N of each, N the smaller count
    returns  {side: distance} from fine to coarse
    """
    N = min(len(samples), len(reference))
    image, offset = torch.arange(N).repeat_interleave(patches)[:, None, None], torch.arange(7)
    distances = {}
    pyramids = (laplacian_pyramid(x[:N].float()) for x in (samples, reference))
    for a, b in zip(*pyramids):
        generator = torch.Generator().manual_seed(seed)
        H, W = a.shape[-2:]
        corner = torch.randint((H - 6) * (W - 6), (N * patches,), generator=generator)
        rows = (corner // (W - 6))[:, None] + offset  # (N*patches, 7)
        columns = (corner % (W - 6))[:, None] + offset
        at = (image, slice(None), rows[:, :, None], columns[:, None, :])
        a, b = a[at].movedim(-1, 1), b[at].movedim(-1, 1)  # (N*patches, 3, 7, 7)
        # normalise both by the reference's mean and std, so that lost contrast is penalised
        mean = b.mean((0, 2, 3), keepdim=True)
        std = b.std((0, 2, 3), keepdim=True).clamp_min(1e-8)
        a, b = ((x - mean).div(std).flatten(1) for x in (a, b))
        axes = F.normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0)
        gap = (a @ axes).sort(0).values - (b @ axes).sort(0).values
        distances[H] = 1000 * gap.abs().mean().item()
    return distances


def spectral_kl(samples, reference, n_bins=16):
    """KL(reference || samples) in nats of mean spectrum_distribution; (N, 3, H, W) in [-1, 1]."""
    p, q = (spectrum_distribution(x, n_bins).mean(0) for x in (reference, samples))
    return (p * (p.log() - q.log())).sum().item()
