"""
The paper in two figures, drawn from one image.

    python ideas.py --plot assets/ideas.png --pipeline assets/pipeline.png

    --plot       an image without its magnitudes, Fig. 2; its power law; the targets of ESM; what
                 a denoiser can learn, Prop. 3.1; the masks of DSM, Fig. 10; downsampling as a
                 low-pass, Fig. 9; the DoG of Eq. 6
    --pipeline   where ESM and DSM enter the training of an autoencoder, Fig. 1

Everything is computed by spectral.py from the image that is shown. Only the pipeline's latent is a
stand-in, the image made 4 times smaller, so that no trained autoencoder is needed.
"""
import argparse
import math
import os

import torch
import torch.nn.functional as F
from matplotlib import cbook
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from analysis.figures import image_file, save_figure
from common import run
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


def middle_of(image):
    """(1, 3, H, W) -> (1, 3, H/2, W/2): where a portrait has its face."""
    H, W = image.shape[-2:]
    return image[..., H // 8:H * 5 // 8, W // 4:W * 3 // 4]


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
    for n, (above, below) in zip(DSM_MASKS, axes.T):
        mask = triangle_mask(n)
        above.imshow(mask, cmap="Blues", vmin=0, vmax=1.4)
        above.set(title=f"n = {n}: {mask.sum()} of 64 kept", xticks=[], yticks=[])
        show(below, middle_of(lowpass(image, n))[0])


def plot_quarter(axes, image):
    """Fig. 9: the DCT of the whole image, its top-left quarter framed; and what that quarter is."""
    H, W = image.shape[-2:]
    power = dct2(image)[0].square().mean(0).log()          # (H, W)
    half = downsample_dct(image, 2)[0]                     # (3, H/2, W/2)
    axes[0].imshow(power, cmap="gray", vmin=power.quantile(0.02), vmax=power.quantile(0.998))
    axes[0].set(title="Fig. 9: of the image's DCT\nthe top-left quarter ...")
    axes[1].imshow(pixels(half), extent=(0, W / 2, H / 2, 0))
    axes[1].set(title="... is the image at half its size", xlim=(-W / 4, W * 3 / 4),
                ylim=(H / 2, 0), frame_on=False)
    for ax, tint in zip(axes, (PURPLE + "60", "none")):
        ax.add_patch(Rectangle((0, 0), W / 2, H / 2, lw=3, ec=PURPLE, fc=tint))
        ax.set(xticks=[], yticks=[])


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
    plot_quarter(quarter.subplots(2, 1, height_ratios=(2, 1)), image)
    plot_dog(dog.subplots())
    return figure


# --------------------------------------------------------------------------------------------------
# --pipeline: Fig. 1. All positions are in the units of one large pair of axes.

class Board:
    """Pictures, boxes and arrows on axes of the size (width, height)."""

    def __init__(self, width, height):
        self.figure = Figure(figsize=(width, height))
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.set_axis_off()
        self.limits = dict(xlim=(0, width), ylim=(0, height))
        self.ax.set(**self.limits)

    def text(self, x, y, text, **style):
        self.ax.text(x, y, text, **dict(ha="center", va="center", fontsize=13) | style)

    def picture(self, x, y, side, values, title="", **style):
        """values as imshow takes them, centred at (x, y), the title above."""
        extent = (x - side / 2, x + side / 2, y - side / 2, y + side / 2)
        self.ax.imshow(values, extent=extent, interpolation="nearest", zorder=2, **style)
        self.ax.add_patch(Rectangle(extent[::2], side, side, fill=False, lw=1, zorder=3))
        self.ax.set(**self.limits, aspect="auto")          # imshow moves the limits
        self.text(x, y + side / 2 + 0.2, title)

    def box(self, x, y, width, height, text="", color="black", fill="white", **style):
        corner = (x - width / 2, y - height / 2)
        self.ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.06",
                                         ec=color, fc=fill, lw=1.6, zorder=1))
        self.text(x, y, text, zorder=3, **style)

    def arrow(self, start, end, color="black"):
        self.ax.annotate("", end, start, zorder=1, arrowprops=dict(
            arrowstyle="-|>", lw=2, color=color, mutation_scale=18, shrinkA=0, shrinkB=0))


def draw_esm(board, image, latent, x, y):
    """The two spectra that ESM compares, between the image's row and the latent's."""
    board.box(x, y, 3.6, 2.2, color=GREEN, fill="#e8f5e9")
    board.text(x, y + 0.93, "ESM (Alg. 1): match the spectra", color=GREEN, weight="bold")
    ax = board.ax.inset_axes((x - 1.65, y - 0.85, 3.3, 1.55), transform=board.ax.transData)
    target = spectrum_distribution(match_resolution(image, latent.shape[-2:]), gamma=1.0)[0]
    mine = spectrum_distribution(latent)[0]
    ring = range(1, 17)
    ax.plot(ring, target, "--", color="black", lw=2, label="the image's, flattened")
    ax.plot(ring, mine, color=GREEN, lw=2, label="the latent's")
    ax.fill_between(ring, target, mine, color=GREEN, alpha=0.25, label="their KL joins the loss")
    ax.set(xticks=[], yticks=[], xlabel="frequency", ylabel="power")
    ax.legend(fontsize=10, loc="upper right")


def draw_dsm(board, n, x, y, top, bottom):
    """The mask that DSM puts on both rows."""
    board.box(x, y, 2.5, 2.2, color=BLUE, fill="#e3f2fd")
    board.text(x, y + 0.82, "DSM (Alg. 2):\none mask for both", color=BLUE, weight="bold")
    board.picture(x, y - 0.12, 1.1, triangle_mask(n), cmap="Blues", vmin=0, vmax=1.4)
    masks = ", ".join(map(str, DSM_MASKS))
    board.text(x, y - 0.88, f"DCT; n = {n}, drawn\nfrom {{{masks}}}", fontsize=10)
    for row, edge in ((top, y + 1.16), (bottom, y - 1.16)):
        board.arrow((x, edge), (x, row - math.copysign(0.24, row - y)), BLUE)
        board.text(x, row, r"$\odot$", fontsize=26, color=BLUE)


def pipeline(image, n=12):
    """The figure of --pipeline. image (1, 3, H, W) in [-1, 1], H and W multiples of 64."""
    board, image = Board(15.6, 7.9), middle_of(image)
    top, middle, bottom, half = 6.35, 4.05, 1.75, 0.875    # rows; half the side of a picture
    latent = downsample_dct(image, 4)                      # in the place of an encoder
    below = bottom - half - 0.22                           # titles of the lower row
    source, z, dsm, shown, decoder, answer = 1.2, 4.3, 8.0, 10.4, 12.35, 14.4

    board.picture(source, top, 2 * half, pixels(image[0]), "image $x$")
    board.arrow((source + half, top), (dsm - 0.25, top))
    board.arrow((dsm + 0.25, top), (answer - half, top))
    board.picture(answer, top, 2 * half, pixels(lowpass(image, n)[0]), "masked image")

    board.arrow((source, top - half), (source, bottom + 0.52))
    board.box(source, bottom, 1.5, 0.9, "Encoder", fill="#eeeeee")
    board.arrow((source + 0.81, bottom), (z - half, bottom))
    board.text((source + z) / 2, bottom + 0.2, "sample", fontsize=11)
    board.picture(z, bottom, 2 * half, pixels(latent[0]))
    board.text(z, below, "latent $z$")
    board.arrow((z + half, bottom), (dsm - 0.25, bottom))
    board.arrow((dsm + 0.25, bottom), (shown - half, bottom))
    board.picture(shown, bottom, 2 * half, pixels(lowpass(latent, n)[0]))
    board.text(shown, below, "masked latent")
    board.arrow((shown + half, bottom), (decoder - 0.66, bottom))
    board.box(decoder, bottom, 1.2, 0.9, "Decoder", fill="#eeeeee")
    board.arrow((decoder + 0.66, bottom), (answer - half, bottom))
    board.box(answer, bottom, 2 * half - 0.12, 2 * half - 0.12, r"$\hat{x}$", fontsize=24)
    board.text(answer, below, "reconstruction")

    board.arrow((answer, top - half), (answer, middle + 0.56))
    board.arrow((answer, bottom + half), (answer, middle - 0.56))
    board.box(answer, middle, 2.1, 1.0, "loss:\nL1 + LPIPS + GAN", fill="#fff3e0", fontsize=12)
    board.arrow((source + half, top - half), (z - 1.2, middle + 1.16), GREEN)
    board.arrow((z, bottom + half), (z, middle - 1.16), GREEN)
    draw_esm(board, image, latent, z, middle)
    draw_dsm(board, n, dsm, middle, top, bottom)
    board.text(7.8, 7.65, "Fig. 1: how an autoencoder is trained with ESM, with DSM, or with both",
               fontsize=15)
    board.text(7.8, 0.2, "Afterwards a diffusion model learns the latents. No network was trained "
               "for this figure: its latent is the image at a quarter of its size.",
               fontsize=10, color="gray")
    return board.figure


# --------------------------------------------------------------------------------------------------
# The command line

def check(args):
    """ValueError on the first flag that cannot work."""
    figures = {flag: path for flag in ("plot", "pipeline") if (path := getattr(args, flag))}
    run.need(figures, "nothing to draw: give --plot OUT.png or --pipeline OUT.png")
    for flag, path in figures.items():
        folder = os.path.dirname(path) or "."
        run.need(os.path.isdir(folder), f"--{flag} {path}: no such folder; make it first")
        run.need(path.endswith((".png", ".pdf", ".svg")),
                     f"--{flag} {path}: must end in .png, .pdf or .svg")
    cells = 64 if args.pipeline else 8                     # its latent, 1/8 of it, has 8x8 blocks
    run.need(64 <= args.size <= 4096 and args.size % cells == 0,
                 f"--size {args.size}: must be a multiple of {cells} in 64..4096")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("--plot", metavar="OUT.png", help="where the figure of the ideas goes")
    add("--pipeline", metavar="OUT.png", help="where the figure of the training goes")
    add("--image", help="an image file (default: a photograph that comes with matplotlib)")
    add("--size", type=int, default=256, help="pixels a side after a centre crop, a multiple of "
        "8, for --pipeline of 64")
    args = run.parse_args(parser, {})
    check(args)
    file = args.image or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    image = image_file(file, args.size, "cpu")             # (1, 3, size, size) in [-1, 1]
    for draw, path in ((plot, args.plot), (pipeline, args.pipeline)):
        if path:
            save_figure(draw(image), path, dpi=80)
            print(f"wrote {path}")
    alpha = fit_power_law(radial_profile(power_spectrum(image), 32)).item()
    print(f"the image's power falls as f^-{alpha:.2f}")


if __name__ == "__main__":
    with run.one_line_errors():
        main()
