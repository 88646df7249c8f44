"""
The paper in two figures, drawn from one image.

    python ideas.py --plot assets/ideas.png --pipeline assets/pipeline.png

    --plot       Fig. 2; the power law; ESM's targets; Prop. 3.1; DSM's masks (Fig. 10, A.7);
                 downsampling as a low-pass (Fig. 9, A.4); the DoG of Eq. 6
    --pipeline   Fig. 1: where ESM and DSM enter the training of an autoencoder

Everything is computed by spectral.py from the image that is shown. Only the pipeline's latent is a
stand-in, the image made 8 times smaller, so that no trained autoencoder is needed.
"""
import argparse
import math
import os

import torch
import torch.nn.functional as F

import runtime
from figures import image_file, save_figure
from losses import DSM_MASKS
from repa import DOG_SIGMAS
from spectral import (
    dct2,
    downsample_dct,
    fit_power_law,
    learnable_power,
    lowpass,
    match_resolution,
    power_spectrum,
    radial_profile,
    spectrum_distribution,
    triangle_mask,
)

GREEN, BLUE, PURPLE = "#2e7d32", "#1f5fa8", "#7b1fa2"      # ESM, DSM, Fig. 9


def pixels(image):
    """(3, H, W) in [-1, 1] -> (H, W, 3) in [0, 1], as matplotlib takes it."""
    return (image.permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1)


def show(ax, image, title=""):
    """An image (3, H, W) in [-1, 1] without ticks."""
    ax.imshow(pixels(image))
    ax.set(title=title, xticks=[], yticks=[])


# --------------------------------------------------------------------------------------------------
# --plot: the ideas, one panel each

def plot_spectra(axes, image):
    """Three panels: the image's power law, ESM's flattened targets, the power one can learn."""
    law, targets, learnable = axes
    n_bins = 32
    frequency = (torch.arange(n_bins) + 0.5) / n_bins      # 1 = the corner of the DCT grid
    profile = radial_profile(power_spectrum(image), n_bins)[0]
    alpha = fit_power_law(profile).item()

    fit = frequency ** -alpha
    fit = fit * torch.exp((profile[1:].log() - fit[1:].log()).mean())
    law.loglog(frequency, profile, "o-", ms=3, label="radial PSD of the image")
    law.loglog(frequency[1:], fit[1:], "k--", label=f"fit: $f^{{-{alpha:.2f}}}$")
    law.set(title="Images follow a power law", xlabel="frequency (1 = corner of the DCT grid)",
            ylabel="power")
    law.legend()

    small = match_resolution(image, [side // 8 for side in image.shape[-2:]])
    for gamma in (0.0, 0.6, 1.0, 1.4):
        target = spectrum_distribution(small, 16, gamma)[0]
        targets.plot(range(1, 17), target, "o-", ms=3, label=f"$\\gamma$ = {gamma}")
    targets.axhline(1 / 16, color="gray", ls=":", label="white")
    targets.set(title="ESM: the target, flattened by $\\gamma$", xlabel="ring (1 = low frequency)",
                ylabel="share of log(1 + power)", ylim=(0, None))
    targets.legend()

    S = profile / profile[1:].mean()                       # power 1 on average, as a latent's
    for alpha_bar in (0.999, 0.9, 0.5, 0.1, 0.01):
        learnable.loglog(frequency[1:], learnable_power(S, alpha_bar)[1:],
                         label=f"$\\bar\\alpha_t$ = {alpha_bar}")
    learnable.loglog(frequency[1:], S[1:], "k--", label="all the power there is")
    learnable.set(title="Prop. 3.1: power a denoiser can learn", xlabel="frequency",
                  ylabel="learnable power")
    learnable.legend(fontsize=8)


def plot_masks(axes, image):
    """Two rows, a column per mask: the mask, and the middle of the image through it."""
    H, W = image.shape[-2:]
    for n, (above, below) in zip(DSM_MASKS, axes.T):
        mask = triangle_mask(n)
        above.imshow(mask, cmap="Blues", vmin=0, vmax=1.4)
        above.set(title=f"n = {n}: {mask.sum()} of 64 kept", xticks=[], yticks=[])
        show(below, lowpass(image, n)[0, :, H // 8:H * 5 // 8, W // 4:W * 3 // 4])


def plot_quarter(axes, image):
    """Fig. 9: the DCT of the whole image, its top-left quarter framed; and what that quarter is."""
    above, below = axes
    H, W = image.shape[-2:]
    size = dct2(image)[0].square().mean(0).log()           # (H, W)
    above.imshow(size, cmap="gray", vmin=size.quantile(0.02), vmax=size.quantile(0.998))
    above.add_patch(_patches().Rectangle((0, 0), W / 2, H / 2, lw=3, ec=PURPLE, fc=PURPLE + "50"))
    above.set(title="Fig. 9: the DCT of the image;\nits top-left quarter ...", xticks=[], yticks=[])
    half = downsample_dct(image, 2)[0]
    below.imshow(pixels(half), extent=(0, W / 2, H / 2, 0))
    below.add_patch(_patches().Rectangle((0, 0), W / 2, H / 2, lw=3, ec=PURPLE, fill=False))
    below.set(title="... is the image at half its size", xticks=[], yticks=[], xlim=(-W / 4, W * 3 / 4),
              ylim=(H / 2, 0))
    below.set_frame_on(False)


def plot_dog(ax):
    """The gain of DoG filters over the frequencies of a token grid, ours thick."""
    grid = 16                                              # DINOv2 tokens of a 256 px image
    omega = torch.arange(grid) / (2 * grid)                # cycles per token of DCT row u
    response = lambda sigma: torch.exp(-2 * (math.pi * sigma * omega) ** 2)
    for sigmas in ((0.5, 2.0), (1.0, 2.0), (1.0, 4.0), DOG_SIGMAS):
        ours = sigmas == DOG_SIGMAS
        ax.plot(range(grid), response(sigmas[0]) - response(sigmas[1]), marker="o", ms=3,
                lw=3 if ours else 1, label="$\\sigma$ = {}, {}".format(*sigmas) + " (ours)" * ours)
    ax.set(title="Eq. 6: DoG on a 16x16 token grid", xlabel="DCT frequency u (0 = DC)",
           ylabel="gain")
    ax.legend()


def plot(image):
    """The figure of --plot. image (1, 3, H, W) in [-1, 1], H and W multiples of 8."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(18, 9.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    axes = top.subplots(1, 5)
    show(axes[0], image[0], "{} x {} pixels".format(*image.shape[-2:]))
    show(axes[1], F.normalize(image[0], dim=0),            # every pixel, as a vector, of length 1
         "Fig. 2: without magnitudes\nthe layout is still there")
    plot_spectra(axes[2:], image)
    masks, quarter, dog = bottom.subfigures(1, 3, width_ratios=(3, 0.9, 1.1))
    masks.suptitle("DSM (Fig. 10): cut the n last anti-diagonals of every 8x8 DCT block, "
                   "in the image and in the latent (dark = kept)")
    plot_masks(masks.subplots(2, 4, height_ratios=(1, 2.2)), image)
    plot_quarter(quarter.subplots(2, 1), image)
    plot_dog(dog.subplots())
    return figure
