"""
The paper in two figures, drawn from one image.

    python -m analysis.ideas --plot assets/ideas.png --pipeline assets/pipeline.png

    --plot       what the paper's figures and equations say, each on this image
    --pipeline   where ESM and DSM enter the training of an autoencoder, Fig. 1. Its latent is a
                 stand-in, the image made 4 times smaller, so that nothing has to be trained
"""
import argparse
import math

import torch
import torch.nn.functional as F
from matplotlib import cbook
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import spectral
from analysis.figures import image_file, psd_exponent, save_figure
from common import run
from losses import DSM_MASKS
from repa import DOG_SIGMAS

GREEN, BLUE, PURPLE = "#2e7d32", "#1f5fa8", "#7b1fa2"      # ESM, DSM, Fig. 9


def show(ax, image, title=""):
    """An image (3, H, W) in [-1, 1], or DSM's mask (8, 8), dark where it keeps; no ticks."""
    if image.ndim == 2:
        ax.imshow(image, cmap="Blues", vmin=0, vmax=1.4)
    else:
        ax.imshow((image.permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1))
    ax.set(title=title, xticks=[], yticks=[])


def crop_face(image):
    """(1, 3, H, W) -> (1, 3, H/2, W/2): where a portrait has its face."""
    H, W = image.shape[-2:]
    return image[..., H // 8:H * 5 // 8, W // 4:W * 3 // 4]


def plot_spectra(axes, image):
    """Three panels: the image's power law, ESM's flattened targets, the power one can learn."""
    law, targets, learnable = axes
    frequency = (torch.arange(32) + 0.5)[1:] / 32          # 1 = the corner; without DC's ring
    power = spectral.radial_profile(spectral.power_spectrum(image), 32)[0]
    alpha, power = spectral.fit_power_law(power).item(), power[1:]
    fit = frequency ** -alpha
    law.loglog(frequency, power, "o-", ms=3, label="radial PSD of the image")
    law.loglog(frequency, fit * (power / fit).log().mean().exp(), "k--",
               label=f"fit: $f^{{-{alpha:.2f}}}$")
    small = spectral.match_resolution(image, [side // 8 for side in image.shape[-2:]])
    for gamma in (0.0, 0.6, 1.0, 1.4):
        target = spectral.spectrum_distribution(small, 16, gamma)[0]
        targets.plot(range(1, 17), target, "o-", ms=3, label=f"$\\gamma$ = {gamma}")
    targets.axhline(1 / 16, color="gray", ls=":", label="white")
    S = power / power.mean()                               # power 1 on average, as a latent's
    for alpha_bar in (0.999, 0.9, 0.5, 0.1, 0.01):
        learnable.loglog(frequency, spectral.learnable_power(S, alpha_bar),
                         label=f"$\\bar\\alpha_t$ = {alpha_bar}")
    learnable.loglog(frequency, S, "k--", label="all the power there is")
    for ax, title, xlabel, ylabel in (
            (law, "Images follow a power law", "frequency (1 = corner of the DCT grid)", "power"),
            (targets, "ESM: the target, flattened by $\\gamma$", "ring (1 = low frequency)",
             "share of log(1 + power)"),
            (learnable, "Prop. 3.1: power a denoiser can learn", "frequency", "learnable power")):
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.legend(fontsize=8)
    targets.set_ylim(0)


def plot_dog(ax):
    """The gain of DoG filters over the frequencies of a token grid, ours thick."""
    grid = 16                                              # DINOv2 tokens of a 256 px image
    omega = torch.arange(grid) / (2 * grid)                # cycles per token of DCT row u
    response = lambda sigma: torch.exp(-2 * (math.pi * sigma * omega) ** 2)
    for sigma1, sigma2 in ((0.5, 2.0), (1.0, 2.0), (1.0, 4.0), DOG_SIGMAS):
        default = (sigma1, sigma2) == DOG_SIGMAS
        ax.plot(response(sigma1) - response(sigma2), marker="o", ms=3, lw=3 if default else 1,
                label=f"$\\sigma$ = {sigma1}, {sigma2}" + " (ours)" * default)
    ax.set(title="Eq. 6: DoG on a 16x16 token grid", xlabel="DCT frequency u (0 = DC)",
           ylabel="gain")
    ax.legend()


def plot(image):
    """The figure of --plot. image (1, 3, H, W) in [-1, 1], H and W multiples of 8."""
    H, W = image.shape[-2:]
    figure = Figure((18, 9.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    whole, directions, *spectra = top.subplots(1, 5)
    show(whole, image[0], f"{H} x {W} pixels")
    # every pixel, as a vector, of length 1
    show(directions, F.normalize(image[0], dim=0),
         "Fig. 2: without magnitudes\nthe layout is still there")
    plot_spectra(spectra, image)
    masks, quarter, dog = bottom.subfigures(1, 3, width_ratios=(3, 0.9, 1.1))
    masks.suptitle("DSM (Fig. 10): cut the n last anti-diagonals of every 8x8 DCT block, "
                   "in the image and in the latent (dark = kept)")
    for n, column in zip(DSM_MASKS, masks.subplots(2, 4, height_ratios=(1, 2.2)).T):
        mask = spectral.triangle_mask(n)
        show(column[0], mask, f"n = {n}: {mask.sum()} of 64 kept")
        show(column[1], crop_face(spectral.lowpass(image, n))[0])
    dct, half = quarter.subplots(2, 1, height_ratios=(2, 1))
    power = spectral.dct2(image)[0].square().mean(0).log()                 # (H, W)
    dct.imshow(power, cmap="gray", vmin=power.quantile(0.02), vmax=power.quantile(0.998))
    dct.add_patch(Rectangle((0, 0), W / 2, H / 2, lw=3, ec=PURPLE, fc=PURPLE + "60"))
    dct.set(title="Fig. 9: of the image's DCT\nthe top-left quarter ...", xticks=[], yticks=[])
    show(half, spectral.downsample_dct(image, 2)[0], "... is the image at half its size")
    half.spines[:].set(color=PURPLE, lw=3)
    plot_dog(dog.subplots())
    return figure


def pipeline(image, n=12):
    """The figure of --pipeline. image (1, 3, H, W) in [-1, 1], H and W multiples of 64."""
    image = crop_face(image)
    latent = spectral.downsample_dct(image, 4)             # in the place of an encoder's
    figure = Figure((15.6, 7.9))
    board = figure.add_axes((0, 0, 1, 1), xlim=(0, 15.6), ylim=(0, 7.9))   # one unit = one inch
    board.set_axis_off()

    def panel(x, y, width=1.76, height=1.76):              # axes centred at (x, y)
        return board.inset_axes((x - width / 2, y - height / 2, width, height),
                                transform=board.transData)

    # upper row, y = 6.3: image and masked image; lower row, y = 1.75: encoder to reconstruction
    for x, y, shown, title in ((1.2, 6.3, image, "image $x$"), (4.3, 1.75, latent, "latent $z$"),
                               (14.4, 6.3, spectral.lowpass(image, n), "masked image"),
                               (10.4, 1.75, spectral.lowpass(latent, n), "masked latent")):
        show(panel(x, y), shown[0], title)
    for x, y, text, color in (
            (1.2, 1.75, "Encoder", "#eeeeee"), (12.4, 1.75, "Decoder", "#eeeeee"),
            (14.4, 1.75, "reconstruction\n$\\hat{x}$", "white"),
            (14.4, 4.05, "loss:\nL1 + LPIPS + GAN", "#fff3e0")):
        board.text(x, y, text, ha="center", va="center", fontsize=13,
                   bbox=dict(boxstyle="round,pad=0.8", fc=color, lw=1.6))
    for x, y, text, size, color in (
            (2.6, 1.95, "sample", 11, "black"),
            (8, 6.3, r"$\odot$", 26, BLUE), (8, 1.75, r"$\odot$", 26, BLUE),
            (7.8, 7.65, "Fig. 1: how an autoencoder is trained with ESM, with DSM, or with both",
             15, "black"),
            (7.8, 0.2, "Afterwards a diffusion model learns the latents. No network was trained "
             "here: the latent is the image at a quarter of its size.", 10, "gray")):
        board.text(x, y, text, ha="center", va="center", fontsize=size, color=color)
    for color, *arrows in (                                # from (x, y) to (x, y)
            ("black", (2.08, 6.3, 7.75, 6.3), (8.25, 6.3, 13.52, 6.3), (1.75, 1.75, 3.42, 1.75),
             (5.18, 1.75, 7.75, 1.75), (8.25, 1.75, 9.52, 1.75), (11.28, 1.75, 11.85, 1.75),
             (12.95, 1.75, 13.58, 1.75), (1.2, 5.42, 1.2, 2.03), (14.4, 5.42, 14.4, 4.45),
             (14.4, 2.15, 14.4, 3.65)),
            (GREEN, (2.08, 5.75, 2.75, 5.42), (4.3, 2.9, 4.3, 3.15)),
            (BLUE, (8, 5.2, 8, 6.05), (8, 2.9, 8, 2.0))):
        for x1, y1, x2, y2 in arrows:
            board.annotate("", (x2, y2), (x1, y1), arrowprops=dict(
                arrowstyle="-|>", lw=2, color=color, mutation_scale=18, shrinkA=0, shrinkB=0))

    esm, dsm = panel(4.3, 4.25, 3.6, 1.7), panel(8, 4, 1.3, 1.3)
    target = spectral.match_resolution(image, latent.shape[-2:])
    target = spectral.spectrum_distribution(target, gamma=1.0)[0]
    current = spectral.spectrum_distribution(latent)[0]
    esm.plot(target, "k--", lw=2, label="the image's, flattened")
    esm.plot(current, color=GREEN, lw=2, label="the latent's")
    esm.fill_between(range(16), target, current, color=GREEN, alpha=0.25,
                     label="their KL joins the loss")
    esm.set(xticks=[], yticks=[], xlabel="frequency", ylabel="power", facecolor="#e8f5e9")
    esm.set_title("ESM (Alg. 1): match the spectra", color=GREEN, weight="bold")
    esm.legend(fontsize=10)
    show(dsm, spectral.triangle_mask(n))
    dsm.set_title("DSM (Alg. 2):\none mask for both", color=BLUE, weight="bold")
    dsm.set_xlabel(f"DCT; n = {n}, drawn\nfrom {{{', '.join(map(str, DSM_MASKS))}}}")
    return figure


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
    run.need(args.plot or args.pipeline, "nothing to draw: give --plot OUT.png or --pipeline "
             "OUT.png")
    for path in filter(None, (args.plot, args.pipeline)):
        run.need(path.endswith((".png", ".pdf", ".svg")), f"{path}: must end in .png, .pdf or .svg")
    multiple = 64 if args.pipeline else 8                  # its latent, 1/8 of it, has 8x8 blocks
    run.need(64 <= args.size <= 4096 and args.size % multiple == 0,
             f"--size {args.size}: must be a multiple of {multiple} in 64..4096")
    file = args.image or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    image = image_file(file, args.size, "cpu")             # (1, 3, size, size) in [-1, 1]
    for draw, path in ((plot, args.plot), (pipeline, args.pipeline)):
        if path:
            save_figure(draw(image), path, dpi=80)
            print(f"wrote {path}")
    print(f"the image's power falls as f^-{psd_exponent(image, 32):.2f}")


if __name__ == "__main__":
    with run.one_line_errors():
        main()
