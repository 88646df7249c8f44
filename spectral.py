"""
Frequencies of images and latents. The paper's hypothesis: diffusion models learn a latent easily if
its power spectrum is a flattened copy of the image's (ESM) and each of its frequencies decodes to
the same frequency of the image (DSM). This file holds the transforms, spectra, masks and filters
behind both; analysis/ideas.py plots them. Equations are numbered as in arXiv:2603.14645 v1.

    Sec. 3.3, ESM      PSD of natural images P(f) ~ f^-alpha; flattened: f^gamma * P(f)
    Prop. 3.1, Eq. 1   learnable power: S * SNR / (1 + SNR), SNR = alpha_bar * S / (1 - alpha_bar)
    Prop. 3.2, Eq. 5   RMSC^2 = (DCT energy of the normalised tokens, without DC) / T
    Eq. 6              DoG = G_sigma1 - G_sigma2, sigma1 < sigma2: a band-pass that removes DC
    Fig. 10, A.7       triangular masks on 8x8 DCT blocks
    Fig. 9, A.4        the top-left corner of the DCT is the DCT of the downsampled image

Images (B, 3, H, W) in [-1, 1]; latents (B, C, h, w), not normalised; tokens (B, T, D). Orthonormal
DCT-II, index (u, v) = (vertical, horizontal), DC at (0, 0). Everything runs in float32, outside
autocast (float64 stays float64), and accepts bf16 input. Finite input gives finite output as long
as the sum of squares of each item fits float32 (3e38); an empty batch gives an empty result.
DCT, resize and blur are multiplications by small cached matrices from both sides; no FFT.
"""
import functools
import math

import torch
import torch.nn.functional as F


def full_precision(function):
    """Decorator: cast the first argument to float32 (keep float64) and disable autocast."""
    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return function(x if x.dtype == torch.float64 else x.float(), *args, **kwargs)
    return wrapped


def cached_matrix(function):
    """Decorator: cache a matrix, created outside inference mode so that training can use it too."""
    return functools.lru_cache(maxsize=None)(torch.inference_mode(False)(function))


def check_shape(function, x, dims):
    """x.shape; ValueError unless it matches dims ("*": any number), nonempty after the first."""
    fits = x.ndim >= len(dims) - 1 if dims[0] == "*" else x.ndim == len(dims)
    if not fits or 0 in x.shape[1 - len(dims):]:
        expected = f"({', '.join(dims)}) with non-empty sides"
        raise ValueError(f"{function}: needs a tensor {expected}, got {tuple(x.shape)}")
    return x.shape


# --------------------------------------------------------------------------------------------------
# The DCT

@cached_matrix
def dct_matrix(n, device="cpu", dtype=torch.float32):
    """
    Orthonormal DCT-II: D[u, i] = sqrt((1 if u == 0 else 2) / n) cos(pi (2i + 1) u / 2n).
    returns  (n, n), rows are frequencies, D @ D.T = I; cached, so do not modify it in place
    """
    i = torch.arange(n, dtype=torch.float64)
    D = math.sqrt(2 / n) * torch.cos(math.pi / (2 * n) * i[:, None] * (2 * i + 1))
    D[0] /= math.sqrt(2)
    return D.to(device, dtype)


@full_precision
def dct2(x):
    """2-D DCT of the last two dimensions: (..., H, W) -> (..., H, W), same energy (Parseval)."""
    H, W = check_shape("dct2", x, "*HW")[-2:]
    return dct_matrix(H, x.device, x.dtype) @ x @ dct_matrix(W, x.device, x.dtype).T


@full_precision
def idct2(x):
    """Inverse of dct2: coefficients (..., H, W) -> (..., H, W)."""
    H, W = check_shape("idct2", x, "*HW")[-2:]
    return dct_matrix(H, x.device, x.dtype).T @ x @ dct_matrix(W, x.device, x.dtype)


@full_precision
def block_dct2(x, block=8):
    """DCT of each tile, as in JPEG: (B, C, H, W) -> (B, C, H/block, W/block, block, block)."""
    B, C, H, W = check_shape("block_dct2", x, "BCHW")
    if block < 1 or H % block or W % block:
        raise ValueError(f"block_dct2: {H}x{W} does not tile into {block}x{block} DCT blocks")
    return dct2(x.reshape(B, C, H // block, block, W // block, block).transpose(3, 4))


@full_precision
def block_idct2(coefficients):
    """Inverse of block_dct2: (B, C, H/block, W/block, block, block) -> (B, C, H, W)."""
    B, C, rows, columns, block, _ = coefficients.shape
    tiles = idct2(coefficients).transpose(3, 4)
    return tiles.reshape(B, C, rows * block, columns * block)


@cached_matrix
def zigzag(h, w, device="cpu"):
    """
    JPEG's zigzag order of (h, w) DCT coefficients, low frequencies first: (h*w,) int64 row-major
    indices of DC, (0, 1), (1, 0), (2, 0), ... along the anti-diagonals. Cached.
    """
    order = [(u, v) for u in range(h) for v in range(w)]
    # odd anti-diagonals run downwards, even ones upwards
    order.sort(key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1]))
    return torch.tensor([u * w + v for u, v in order]).to(device)


# --------------------------------------------------------------------------------------------------
# Low-pass masks (DSM) and downsampling (Scale Equivariance): both remove high frequencies

def triangle_mask(n, block=8, device=None):
    """
    The mask of Fig. 10 (A.7), which removes the last n anti-diagonals of a DCT block.
    n        0 .. 2*block-1: 0 keeps everything, 2*block-2 only DC, 2*block-1 nothing
    returns  (block, block) bool, True = kept: u + v < 2*block - 1 - n
    """
    if not 0 <= n < 2 * block:
        raise ValueError(f"triangle_mask: n={n} is outside 0..{2 * block - 1}")
    u = torch.arange(block, device=device)
    return u[:, None] + u[None, :] < 2 * block - 1 - n


@full_precision
def lowpass(x, n, block=8):
    """
    Drop the last n anti-diagonals of the DCT of every block x block tile (Fig. 10).
    x        (B, C, H, W) image or latent, any range; H and W multiples of block
    n        0 .. 2*block-1, see triangle_mask; 2*block-2 keeps each tile's mean
    returns  (B, C, H, W) float32, a projection: a second pass changes nothing; may leave [-1, 1]
    raises   ValueError if a side is not a multiple of block, unless n = 0
    """
    if n == 0:                           # keeps everything, exactly
        return x
    return block_idct2(block_dct2(x, block) * triangle_mask(n, block, x.device))


@full_precision
def downsample_dct(x, k):
    """
    Ideal downsampling (A.4, Fig. 9): inverse DCT of the top-left 1/k of the DCT in each direction.
    x        (B, C, H, W), H and W multiples of k >= 1 (else ValueError)
    returns  (B, C, H/k, W/k); dividing by k keeps the mean, since DC is sqrt(H*W) times the mean
    """
    H, W = check_shape("downsample_dct", x, "BCHW")[-2:]
    if k < 1 or H % k or W % k:
        raise ValueError(f"downsample_dct: {H}x{W} is not divisible by {k}")
    return idct2(dct2(x)[..., :H // k, :W // k]) / k


# --------------------------------------------------------------------------------------------------
# Power spectra (ESM)

def power_spectrum(x):
    """Squared DCT coefficients, averaged over channels: (B, C, H, W) -> (B, H, W)."""
    check_shape("power_spectrum", x, "BCHW")
    return dct2(x).square().mean(dim=1)


@cached_matrix
def _radial_bins(H, W, n_bins, device, dtype):
    """(H*W, n_bins): column b averages the coefficients of bin b; it is 0 if the bin is empty."""
    u, v = torch.arange(H), torch.arange(W)
    r2 = (u[:, None] ** 2 + v[None, :] ** 2).flatten()  # (H*W,), integers: exact ring boundaries
    index = (r2 * n_bins ** 2 // r2.max().clamp_min(1)).double().sqrt().long()
    members = F.one_hot(index.clamp_max(n_bins - 1), n_bins).double()  # last bin includes r_max
    return (members / members.sum(0).clamp_min(1)).to(device, dtype)


@full_precision
def radial_profile(P, n_bins=16):
    """
    Mean power in rings of equal width around DC.
    P        (B, H, W) power; ring floor(r / r_max * n_bins), r = sqrt(u^2 + v^2), r_max in the last
    returns  (B, n_bins); 0 in rings that contain no coefficient (sides much below n_bins)
    """
    _, H, W = check_shape("radial_profile", P, "BHW")
    return P.flatten(1) @ _radial_bins(H, W, n_bins, P.device, P.dtype)


@full_precision
def spectrum_distribution(x, n_bins=16, gamma=0.0, remove_dc=True):
    """
    ESM's spectral descriptor: the distribution of x's power over radial frequency.
    x        (B, C, H, W) image or latent
    gamma    flattening: multiplies ring b = 1 .. n_bins by b^gamma, which lowers the power law's
             exponent by about gamma; in -10..10 (else ValueError), as 16^gamma must fit float32
    returns  (B, n_bins), sums to 1 (uniform for a constant x). Depends on the scale of x:
             log(1 + P) is close to P for small latents (the largest ring dominates) and to log P
             for large ones (all rings count alike)
    """
    if not abs(gamma) <= 10:
        raise ValueError(f"spectrum_distribution: gamma={gamma} is outside -10..10")
    if remove_dc:
        x = x - x[..., :1, :1].detach()     # else rounding of a large mean looks like power
    P = power_spectrum(x)                   # (B, H, W)
    if remove_dc:
        P[:, 0, 0] = 0
    profile = radial_profile(P, n_bins)     # (B, n_bins)
    ring = torch.arange(1, n_bins + 1, device=x.device, dtype=x.dtype)
    S = torch.log1p(profile * ring ** gamma) + 1e-6  # 1e-6: a constant x stays finite
    return S / S.sum(dim=1, keepdim=True)


@cached_matrix
def _blur_matrix(n, sigma, radius, reflect, device="cpu", dtype=torch.float64):
    """(n, n) blur, a normalised Gaussian of 2*radius+1 taps; reflect (abc|ba) or zero padding."""
    offset = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    source = torch.arange(n)[:, None] + offset[None, :]  # (n, taps), may lie outside 0..n-1
    weight = (taps / taps.sum()).expand(n, -1)
    if reflect:                          # a triangle wave: any number of reflections
        source = n - 1 - (source % max(2 * n - 2, 1) - (n - 1)).abs()
    else:
        weight = weight * ((source >= 0) & (source < n))
    rows = torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, source.clamp(0, n - 1), weight)
    return rows.to(device, dtype)


@cached_matrix
def _resize_matrix(n, m, blur, device, dtype):
    """(m, n) matrix by which match_resolution resizes one axis, after a 7-tap Gaussian if blur."""
    pixels = torch.eye(n, dtype=torch.float64)[None, None]
    rows = F.interpolate(pixels, size=(m, n), mode="bicubic", align_corners=False)[0, 0]
    if blur:
        rows = rows @ _blur_matrix(n, 1.2, 3, reflect=False)
    return rows.to(device, dtype)


@full_precision
def match_resolution(x, size):
    """
    Resize images to a latent's size to compare their spectra (at 256 px as in the authors' code).
    x        (B, C, H, W)
    size     (h, w) of the latent
    returns  (B, C, h, w): bicubic, align_corners=False, no antialiasing; preceded, at a reduction
             of 16 or more, by a 7x7 Gaussian blur of sigma 1.2 with zero padding
    """
    H, W = check_shape("match_resolution", x, "BCHW")[-2:]
    h, w = size
    blur = H >= 16 * h
    columns = _resize_matrix(W, w, blur, x.device, x.dtype).T
    return _resize_matrix(H, h, blur, x.device, x.dtype) @ x @ columns


@full_precision
def fit_power_law(profile):
    """
    The exponent alpha of P(f) ~ f^-alpha, by weighted least squares on log P against log f.
    profile  (..., n_bins) radial; f is a ring's centre; ring 0 (DC) and empty rings are ignored
    returns  (...) alpha, no gradient; 0 for a white spectrum or fewer than two rings with power
    """
    check_shape("fit_power_law", profile, "*R")
    profile = profile.detach()[..., 1:]
    f = torch.arange(1, profile.shape[-1] + 1, device=profile.device, dtype=profile.dtype) + 0.5
    weight = (profile > 0) / f      # rings are linear in f: this gives every octave equal weight
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
    log_P = torch.where(profile > 0, profile, 1).log()
    log_f = f.log() - (weight * f.log()).sum(-1, keepdim=True)
    return -(weight * log_f * log_P).sum(-1) / (weight * log_f ** 2).sum(-1).clamp_min(1e-30)


# --------------------------------------------------------------------------------------------------
# How much of a spectrum diffusion can learn (Prop. 3.1)

@full_precision
def wiener_gain(S, alpha_bar):
    """
    SNR / (1 + SNR): gain of the best linear denoiser at a frequency of power S
    when z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps.
    S          tensor of powers >= 0, any shape
    alpha_bar  in (0, 1), number or tensor
    returns    like S, in [0, 1]
    """
    signal = alpha_bar * S
    return signal / (signal + (1 - alpha_bar))  # the SNR itself may overflow float32


@full_precision
def learnable_power(S, alpha_bar):
    """Prop. 3.1: S * SNR / (1 + SNR), by how much wiener_gain lowers the MSE of predicting 0."""
    return S * wiener_gain(S, alpha_bar)


# --------------------------------------------------------------------------------------------------
# Tokens and features (Prop. 3.2, Eq. 6)

@full_precision
def rmsc(tokens):
    """
    RMS spatial contrast (RMSC) of L2-normalised tokens: how much their directions vary over space.
    tokens   (B, T, D)
    returns  (B,) sqrt(mean_t ||x_t - mean||^2), at most 1; 0, with gradient 0, if all are equal
    """
    T = check_shape("rmsc", tokens, "BTD")[1]
    x = F.normalize(tokens, dim=-1)
    return torch.linalg.vector_norm(x - x.mean(dim=1, keepdim=True), dim=(1, 2)) / T ** 0.5


@full_precision
def directional_energy(tokens):
    """
    Squared norms of the DCT coefficients, along T, of the L2-normalised tokens.
    tokens   (B, T, D)
    returns  (B, T), index 0 is DC; sums to T (less if a token has a norm below 1e-12)
    Prop. 3.2: rmsc(tokens)**2 == directional_energy(tokens)[:, 1:].sum(1) / T
    """
    T = check_shape("directional_energy", tokens, "BTD")[1]
    x = F.normalize(tokens, dim=-1)
    return (dct_matrix(T, x.device, x.dtype) @ x).square().sum(-1)


@full_precision
def gaussian_blur(x, sigma):
    """
    Gaussian blur with reflect padding, kernel cut off at 4 sigma; constants are unchanged.
    x        (B, C, H, W), any size (a kernel longer than a side is reflected more than once)
    sigma    in pixels or tokens, >= 0; 0 is the identity
    """
    H, W = check_shape("gaussian_blur", x, "BCHW")[-2:]
    if sigma == 0:
        return x
    radius = max(1, math.ceil(4 * sigma))
    rows, columns = (_blur_matrix(n, sigma, radius, True, x.device, x.dtype) for n in (H, W))
    return rows @ x @ columns.T


def dog(x, sigma1, sigma2):
    """
    Difference of Gaussians (Eq. 6): G_sigma1 * x - G_sigma2 * x, a band-pass; constants become 0.
    x        (B, C, H, W); sigmas in pixels or tokens, 0 <= sigma1 < sigma2 (else ValueError)
    """
    if not 0 <= sigma1 < sigma2:
        raise ValueError(f"dog: needs 0 <= sigma1 < sigma2, got sigma1={sigma1}, sigma2={sigma2}")
    return gaussian_blur(x, sigma1) - gaussian_blur(x, sigma2)


@full_precision
def spatial_norm(tokens, alpha=0.6):
    """
    iREPA's target filter: (x - alpha * mean) / (std + 1e-6), over the T tokens of each channel.
    tokens   (B, T, D) -> (B, T, D); population std, so that T = 1 stays finite
    alpha    fraction of the mean that is subtracted: 0 keeps it, 1 removes it
    """
    check_shape("spatial_norm", tokens, "BTD")
    std = tokens.std(dim=1, keepdim=True, correction=0)
    return (tokens - alpha * tokens.mean(dim=1, keepdim=True)) / (std + 1e-6)
