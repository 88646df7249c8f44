"""
Frequencies of images and latents. An autoencoder's latent is easy to diffuse when its power
spectrum is a flattened copy of the image's (ESM) and when each of its frequencies decodes to the
same frequency of the image (DSM). This file holds the transforms, spectra, masks and filters that
both are written in; analysis/ideas.py draws them. Numbering: arXiv:2603.14645 v1.

    Sec. 3.3, ESM      PSD of photographs P(f) ~ f^-alpha; flattened: f^gamma * P(f)
    Prop. 3.1, Eq. 1   learnable power: S * SNR / (1 + SNR), SNR = alpha_bar * S / (1 - alpha_bar)
    Prop. 3.2, Eq. 5   RMSC^2 = energy of the normalised tokens outside DC / T
    Eq. 6              DoG = G_sigma1 - G_sigma2, sigma1 < sigma2: a band-pass without DC
    Fig. 10, A.7       triangular masks on 8x8 blocks
    Fig. 9, A.4        the top-left part of the DCT is the downsampled image

Images (B, 3, H, W) in [-1, 1]; latents (B, C, h, w), not normalised; tokens (B, T, D). Orthonormal
DCT-II, index (u, v) = (vertical, horizontal), DC at (0, 0). Everything here runs outside autocast
in float32 (float64 stays float64), and accepts bf16 input. What is finite stays finite while the
squares of one item sum to what float32 holds (3e38); a batch of 0 gives a result of 0 items.
A DCT, a resize and a blur are each a small cached matrix from the left and the right; no FFT.
"""
import functools
import math

import torch
import torch.nn.functional as F


def full_precision(function):
    """Decorator: the first argument becomes float32 (float64 stays), and autocast is off inside."""
    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return function(x if x.dtype == torch.float64 else x.float(), *args, **kwargs)
    return wrapped


def cached_matrix(function):
    """Decorator: computes a matrix once, outside inference mode, since training may use it next."""
    return functools.lru_cache(maxsize=None)(torch.inference_mode(False)(function))


def check_shape(function, x, dims):
    """x.shape; ValueError unless it is dims ("*HW": any before H); only the first may be empty."""
    fits = x.ndim >= len(dims) - 1 if dims[0] == "*" else x.ndim == len(dims)
    if not fits or 0 in x.shape[1 - len(dims):]:
        expected = f"({', '.join(dims)}) without empty sides"
        raise ValueError(f"{function}: needs a tensor {expected}, got {tuple(x.shape)}")
    return x.shape


# --------------------------------------------------------------------------------------------------
# The DCT

@cached_matrix
def dct_matrix(n, device="cpu", dtype=torch.float32):
    """
    Orthonormal DCT-II: D[u, i] = sqrt((1 if u == 0 else 2) / n) cos(pi (2i + 1) u / 2n).
    returns  (n, n), rows are frequencies, D @ D.T = I; cached, so do not write into it
    """
    i = torch.arange(n, dtype=torch.float64)
    D = math.sqrt(2 / n) * torch.cos(math.pi / (2 * n) * i[:, None] * (2 * i + 1))
    D[0] /= math.sqrt(2)
    return D.to(device, dtype)


@full_precision
def dct2(x):
    """2-D DCT of the last two dimensions: (..., H, W) -> (..., H, W), energy kept (Parseval)."""
    H, W = check_shape("dct2", x, "*HW")[-2:]
    return dct_matrix(H, x.device, x.dtype) @ x @ dct_matrix(W, x.device, x.dtype).T


@full_precision
def idct2(x):
    """The inverse of dct2: coefficients (..., H, W) -> (..., H, W)."""
    H, W = check_shape("idct2", x, "*HW")[-2:]
    return dct_matrix(H, x.device, x.dtype).T @ x @ dct_matrix(W, x.device, x.dtype)


def _tiles(function, x, block):  # (B, C, H, W) -> (B, C, H/b, W/b, b, b)
    B, C, H, W = check_shape(function, x, "BCHW")
    if block < 1 or H % block or W % block:
        raise ValueError(f"{function}: {H}x{W} does not tile into {block}x{block} DCT blocks")
    return x.reshape(B, C, H // block, block, W // block, block).transpose(3, 4)


def _untile(tiles):              # (B, C, H/b, W/b, b, b) -> (B, C, H, W)
    B, C, rows, columns, block, _ = tiles.shape
    return tiles.transpose(3, 4).reshape(B, C, rows * block, columns * block)


@full_precision
def block_dct2(x, block=8):
    """DCT of every tile, as in JPEG: (B, C, H, W) -> (B, C, H/block, W/block, block, block)."""
    return dct2(_tiles("block_dct2", x, block))


@full_precision
def block_idct2(coefficients):
    """Inverse of block_dct2: (B, C, H/block, W/block, block, block) -> (B, C, H, W)."""
    return _untile(idct2(coefficients))


@cached_matrix
def zigzag(h, w, device="cpu"):
    """
    JPEG's order of the DCT coefficients of an (h, w) grid, low frequencies first: (h*w,) int64
    positions in row-major order, DC, (0, 1), (1, 0), (2, 0), ... along the anti-diagonals. Cached.
    """
    order = [(u, v) for u in range(h) for v in range(w)]
    # odd anti-diagonals run downwards, even ones upwards
    order.sort(key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1]))
    return torch.tensor([u * w + v for u, v in order]).to(device)


# --------------------------------------------------------------------------------------------------
# Low-pass masks (DSM) and downsampling (Scale Equivariance): two ways to say the same thing

def triangle_mask(n, block=8):
    """
    The mask of Fig. 10 (A.7): the n last anti-diagonals of a DCT block are removed.
    n        0 .. 2*block-1: 0 keeps everything, 2*block-2 only DC, 2*block-1 nothing
    returns  (block, block) bool, True = kept, that is u + v < 2*block - 1 - n
    """
    if n not in range(2 * block):
        raise ValueError(f"triangle_mask: n={n} is outside 0..{2 * block - 1}")
    u = torch.arange(block)
    return u[:, None] + u[None, :] < 2 * block - 1 - n


@cached_matrix
def _lowpass_matrix(n, block, device, dtype):
    """(b*b, b*b): DCT, mask and inverse DCT of a flattened tile are one symmetric projection."""
    D = dct_matrix(block, "cpu", torch.float64)
    basis = torch.kron(D, D)[triangle_mask(n, block).flatten()]  # (kept, b*b), orthonormal rows
    return (basis.T @ basis).to(device, dtype)


@full_precision
def lowpass(x, n, block=8):
    """
    Drop the last n anti-diagonals of the DCT of every block x block tile (Fig. 10).
    x        (B, C, H, W) image or latent, any range; H and W multiples of block
    n        0 .. 2*block-1, see triangle_mask; 2*block-2 keeps each tile's mean
    returns  (B, C, H, W) float32, a projection: a second pass changes nothing; may leave [-1, 1]
    raises   ValueError if a side is not a multiple of block
    """
    tiles = _tiles("lowpass", x, block)  # (B, C, H/b, W/b, b, b)
    if n == 0:                           # keeps everything: nothing to compute
        return x
    if block > 16:                       # a matrix of block^4 numbers: 34 GB for a 256 px image
        return _untile(idct2(dct2(tiles) * triangle_mask(n, block).to(x.device)))
    projection = _lowpass_matrix(n, block, x.device, x.dtype)
    return _untile((tiles.flatten(-2) @ projection).view(tiles.shape))


@full_precision
def downsample_dct(x, k):
    """
    Ideal downsampling (A.4, Fig. 9): the top-left 1/k of the DCT in each direction, inverted there.
    x        (B, C, H, W), H and W multiples of k >= 1 (else ValueError)
    returns  (B, C, H/k, W/k); the division by k keeps the mean: an orthonormal DC grows with a side
    """
    H, W = check_shape("downsample_dct", x, "BCHW")[-2:]
    if k < 1 or H % k or W % k:
        raise ValueError(f"downsample_dct: {H}x{W} does not divide by {k}")
    return idct2(dct2(x)[..., :H // k, :W // k]) / k


# --------------------------------------------------------------------------------------------------
# Power spectra (ESM)

def power_spectrum(x):
    """Squared DCT coefficients, averaged over channels: (B, C, H, W) -> (B, H, W)."""
    check_shape("power_spectrum", x, "BCHW")
    return dct2(x).square().mean(dim=1)


@cached_matrix
def _radial_bins(H, W, n_bins, device, dtype):
    """(H*W, n_bins): column b is 1/count on the coefficients of bin b, 0 elsewhere, 0 if empty."""
    u, v = torch.arange(H), torch.arange(W)
    r2 = (u[:, None] ** 2 + v[None, :] ** 2).flatten()  # (H*W,), integers: ring borders are exact
    index = (r2 * n_bins ** 2 // r2.max().clamp_min(1)).double().sqrt().long()
    members = F.one_hot(index.clamp_max(n_bins - 1), n_bins).double()  # the last bin is closed
    return (members / members.sum(0).clamp_min(1)).to(device, dtype)


@full_precision
def radial_profile(P, n_bins=16):
    """
    Mean power in rings of equal width around DC.
    P        (B, H, W) power; ring floor(r / r_max * n_bins), r = sqrt(u^2 + v^2), the last closed
    returns  (B, n_bins); a ring without a coefficient (sides much below n_bins) is 0
    """
    _, H, W = check_shape("radial_profile", P, "BHW")
    return P.flatten(1) @ _radial_bins(H, W, n_bins, P.device, P.dtype)


@full_precision
def spectrum_distribution(x, n_bins=16, gamma=0.0, remove_dc=True):
    """
    The descriptor that ESM compares: where in frequency the power of x lies.
    x        (B, C, H, W) image or latent
    gamma    flattening: ring b (from 1) is multiplied by b^gamma, which lowers the power law's
             exponent by about gamma; in -10..10 (else ValueError): 16^gamma must fit float32
    returns  (B, n_bins), sums to 1 (uniform for a constant x). Not invariant to the scale of x:
             log(1 + P) is close to P for small latents (the largest ring decides) and to log P for
             large ones (all rings count alike)
    """
    if not abs(gamma) <= 10:
        raise ValueError(f"spectrum_distribution: gamma={gamma} is outside -10..10")
    if remove_dc:
        x = x - x[..., :1, :1].detach()     # or a large mean's rounding looks like power
    P = power_spectrum(x)                   # (B, H, W)
    if remove_dc:
        P[:, 0, 0] = 0
    profile = radial_profile(P, n_bins)     # (B, n_bins)
    ring = torch.arange(1, n_bins + 1, device=x.device, dtype=x.dtype)
    S = torch.log1p(profile * ring ** gamma) + 1e-6  # 1e-6: a constant x stays finite
    return S / S.sum(dim=1, keepdim=True)


def _blur_matrix(n, sigma, radius, reflect):
    """(n, n), a normalised Gaussian of 2*radius+1 taps; the border reflects (abc|ba) or is zero."""
    offset = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    source = torch.arange(n)[:, None] + offset[None, :]  # (n, taps), may lie outside 0..n-1
    weight = (taps / taps.sum()).expand(n, -1)
    if reflect:
        period = max(2 * (n - 1), 1)
        source = (source % period + period) % period
        source = torch.where(source < n, source, period - source)  # folds as often as it must
    else:
        weight = weight * ((source >= 0) & (source < n))
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, source.clamp(0, n - 1), weight)


@cached_matrix
def _resize_matrix(n, m, blur, device, dtype):
    """(m, n) matrix of match_resolution's resize of one axis, after the 7-tap Gaussian if blur."""
    pixels = torch.eye(n, dtype=torch.float64)[None, None]
    rows = F.interpolate(pixels, size=(m, n), mode="bicubic", align_corners=False)[0, 0]
    if blur:
        rows = rows @ _blur_matrix(n, 1.2, 3, reflect=False)
    return rows.to(device, dtype)


@full_precision
def match_resolution(x, size):
    """
    What an image goes through before its spectrum is compared with a latent's (the authors' code).
    x        (B, C, H, W)
    size     (h, w) of the latent
    returns  (B, C, h, w): bicubic, align_corners=False, no antialiasing; when the reduction is 16
             or more, a 7x7 Gaussian of sigma 1.2 with zero padding goes before it
    """
    H, W = check_shape("match_resolution", x, "BCHW")[-2:]
    h, w = size
    blur = H >= 16 * h
    columns = _resize_matrix(W, w, blur, x.device, x.dtype).T
    return _resize_matrix(H, h, blur, x.device, x.dtype) @ x @ columns


@full_precision
def fit_power_law(profile):
    """
    The exponent alpha of P(f) ~ f^-alpha, by least squares on log-log rings.
    profile  (..., n_bins) radial; f is a ring's middle; DC's ring 0 and empty rings are left out
    returns  (...) alpha, no gradient; 0 for a white spectrum and for fewer than two rings of power
    """
    check_shape("fit_power_law", profile, "*R")
    profile = profile.detach()[..., 1:]
    f = torch.arange(1, profile.shape[-1] + 1, device=profile.device, dtype=profile.dtype) + 0.5
    weight = (profile > 0) / f      # linear rings crowd at high f; so every octave counts alike
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
    """Prop. 3.1: S * SNR / (1 + SNR), the error that wiener_gain saves over predicting 0."""
    return S * wiener_gain(S, alpha_bar)


# --------------------------------------------------------------------------------------------------
# Tokens and features (Prop. 3.2, Eq. 6)

@full_precision
def rmsc(tokens):
    """
    Root mean square contrast of L2-normalised tokens: how much their directions differ over space.
    tokens   (B, T, D)
    returns  (B,) sqrt(mean_t ||x_t - mean||^2), at most 1; 0, with gradient 0, when all agree
    """
    T = check_shape("rmsc", tokens, "BTD")[1]
    x = F.normalize(tokens, dim=-1)
    return torch.linalg.vector_norm(x - x.mean(dim=1, keepdim=True), dim=(1, 2)) / T ** 0.5


@full_precision
def directional_energy(tokens):
    """
    Squared norms of the DCT coefficients, along T, of the L2-normalised tokens.
    tokens   (B, T, D)
    returns  (B, T), index 0 is DC, sums to T (a token shorter than 1e-12 counts for less than 1)
    Prop. 3.2: rmsc(tokens)**2 == directional_energy(tokens)[:, 1:].sum(1) / T
    """
    T = check_shape("directional_energy", tokens, "BTD")[1]
    x = F.normalize(tokens, dim=-1)
    return (dct_matrix(T, x.device, x.dtype) @ x).square().sum(-1)


@cached_matrix
def _reflect_blur(n, sigma, device, dtype):
    radius = max(1, math.ceil(4 * sigma))
    return _blur_matrix(n, sigma, radius, reflect=True).to(device, dtype)


@full_precision
def gaussian_blur(x, sigma):
    """
    Gaussian blur, reflect padding, 4-sigma kernel; constants pass unchanged.
    x        (B, C, H, W), any size (a kernel longer than the side reflects more than once)
    sigma    in pixels (tokens), >= 0; 0 is the identity
    """
    H, W = check_shape("gaussian_blur", x, "BCHW")[-2:]
    if sigma == 0:
        return x
    columns = _reflect_blur(W, sigma, x.device, x.dtype).T
    return _reflect_blur(H, sigma, x.device, x.dtype) @ x @ columns


def dog(x, sigma1, sigma2):
    """
    Difference of Gaussians (Eq. 6): G_sigma1 * x - G_sigma2 * x, a band-pass without constants.
    x        (B, C, H, W); sigmas in pixels (tokens), 0 <= sigma1 < sigma2 (else ValueError)
    """
    if not 0 <= sigma1 < sigma2:
        raise ValueError(f"dog: needs 0 <= sigma1 < sigma2, got sigma1={sigma1}, sigma2={sigma2}")
    return gaussian_blur(x, sigma1) - gaussian_blur(x, sigma2)


@full_precision
def spatial_norm(tokens, alpha=0.6):
    """
    iREPA's target filter: (x - alpha * mean) / (std + 1e-6), over the T tokens of each channel.
    tokens   (B, T, D) -> (B, T, D); the std is the population's, so that T = 1 is finite
    alpha    0 keeps the common offset, 1 removes it
    """
    check_shape("spatial_norm", tokens, "BTD")
    std = tokens.std(dim=1, keepdim=True, correction=0)
    return (tokens - alpha * tokens.mean(dim=1, keepdim=True)) / (std + 1e-6)
