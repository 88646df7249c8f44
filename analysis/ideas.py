"""
The paper in two figures, drawn from one image: its main ideas (--plot), and where ESM and DSM enter
autoencoder training, as in Fig. 1 (--pipeline). Its latent is a placeholder, the image downsampled
by 4, so that nothing has to be trained.

    python -m analysis.ideas --plot assets/ideas.png --pipeline assets/pipeline.png
"""
import argparse
import itertools
import math

import torch
import torch.nn.functional as F
from matplotlib import cbook
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

import spectral
from analysis.figures import image_file, log_axes, save_figure
from common import run
from losses import DSM_MASKS
from repa import DOG_SIGMAS

GREEN, BLUE, PURPLE = "#2e7d32", "#1f5fa8", "#7b1fa2"      # ESM, DSM, Fig. 9


def show(ax, image, title=""):
    """An image (3, H, W) in [-1, 1], or a map (H, W) in [0, 1], dark where it is 1; no ticks."""
    rgb = (image * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0) if image.ndim == 3 else image
    ax.imshow(rgb, cmap="Blues", vmin=0, vmax=1.4)         # cmap applies only to maps
    ax.set(title=title, xticks=[], yticks=[])


def crop_face(image):
    """(1, 3, H, W) -> (1, 3, H/2, W/2): the part where a portrait shows the face."""
    H, W = image.shape[-2:]
    return image[..., H // 8:H * 5 // 8, W // 4:W * 3 // 4]


def plot_dog(ax):
    """Frequency response of DoG filters on a token grid; the default one is the thick line."""
    u = torch.arange(16)                                   # DCT row u: u / 32 cycles per token
    gain = lambda sigma: torch.exp(-2 * (math.pi * sigma * u / 32) ** 2)
    for sigmas in (DOG_SIGMAS, (1.0, 4.0), (0.5, 2.5)):
        default = sigmas == DOG_SIGMAS
        ax.plot(u, gain(sigmas[0]) - gain(sigmas[1]), "o-", ms=4, lw=3 if default else 1.5,
                label="$\\sigma$ = {}, {}".format(*sigmas) + " (default)" * default)
    ax.set(xlabel="DCT index u (0 = DC)", xticks=u[::3], ylabel="gain", ylim=(0, 1.3))
    ax.legend(loc="upper right")


def plot(image):
    """Draw the --plot figure. image (1, 3, H, W) in [-1, 1], H and W multiples of 8."""
    H, W = image.shape[-2:]
    figure = Figure((12, 10.4), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1, 0.9, 1.05))
    whole, directions, law = top.subplots(1, 3)
    show(whole, image[0], f"1  An image, {H} x {W} pixels")
    show(directions, F.normalize(image[0], dim=0),         # unit length per pixel
         "2  Without magnitudes the layout\nis still there (Fig. 2)")
    frequency = (torch.arange(32) + 0.5)[1:] / 32          # 1 = the corner; ring 0 (DC) left out
    power = spectral.radial_profile(spectral.power_spectrum(image), 32)[0]
    alpha, power = spectral.fit_power_law(power).item(), power[1:]
    fit = frequency ** -alpha
    law.plot(frequency, power, "o-", ms=4, label="radial power")
    law.plot(frequency, fit * (power / fit).log().mean().exp(), "k--",
             label=f"fit: $f^{{-{alpha:.2f}}}$")
    law.set(title="3  Its power follows a power law")
    targets, learnable = middle.subplots(1, 2)
    small = spectral.match_resolution(image, [side // 8 for side in image.shape[-2:]])
    for gamma in (0.0, 0.6, 1.0, 1.4):
        target = spectral.spectrum_distribution(small, 16, gamma)[0]
        targets.plot(range(1, 17), target, "o-", ms=4, label=f"$\\gamma$ = {gamma:g}")
    targets.axhline(1 / 16, color="gray", ls=":", label="white noise")
    targets.set(title="4  ESM: the target is the image's spectrum, flattened by $\\gamma$",
                xlabel="ring (1 = low frequency)", xticks=range(1, 17, 3),
                ylabel="share of log(1 + power)")
    S = power / power.mean()                               # mean power 1, like a latent
    learnable.plot(frequency, S, "k--", label="all the power there is")
    for alpha_bar in (0.9, 0.5, 0.1):
        learnable.plot(frequency, spectral.learnable_power(S, alpha_bar),
                       label=f"learnable at $\\bar\\alpha_t$ = {alpha_bar}")
    learnable.set(title="5  Noise hides high frequencies first (Prop. 3.1)", ylim=(1e-4, 30))
    for ax in (law, learnable):
        ax.set(xlabel="frequency f (1 = highest)", ylabel="power per DCT coefficient")
        log_axes(ax, "xy")
    for ax in (law, targets, learnable):
        ax.legend()
    masks, dct, dog = bottom.subfigures(1, 3, width_ratios=(2.1, 0.9, 1.1))
    masks.suptitle("6  DSM (Fig. 10): cut the n last anti-diagonals of every 8x8\n"
                   "DCT block, in the image and in the latent (dark = kept)")
    for n, column in zip(DSM_MASKS, masks.subplots(2, 4, height_ratios=(1, 1.4)).T):
        mask = spectral.triangle_mask(n)
        show(column[0], mask, f"n = {n}: {mask.sum()} kept")
        show(column[1], crop_face(spectral.lowpass(image, n))[0])
    dct.suptitle("7  The DCT's top-left quarter\nis the half-size image (Fig. 9)")
    whole, half = dct.subplots(2, 1, height_ratios=(1.4, 1))
    power = spectral.dct2(image)[0].square().mean(0).log()                 # (H, W)
    whole.imshow(power, cmap="gray", vmin=power.quantile(0.02), vmax=power.quantile(0.998))
    whole.add_patch(Rectangle((0, 0), W / 2, H / 2, lw=3, ec=PURPLE, fc=PURPLE + "60"))
    whole.set(xticks=[], yticks=[])
    show(half, spectral.downsample_dct(image, 2)[0])
    half.spines[:].set(color=PURPLE, lw=3)
    dog.suptitle("8  DoG on a 16x16 token grid\nis a band-pass (Eq. 6)")
    plot_dog(dog.subplots())
    return figure


def pipeline(image, n=12):
    """Draw the --pipeline figure. image (1, 3, H, W) in [-1, 1], H and W multiples of 64."""
    image = crop_face(image)
    latent = spectral.downsample_dct(image, 4)             # stands in for an encoder's latent
    figure = Figure((13, 6.8), layout="constrained")
    figure.suptitle("Fig. 1: how an autoencoder is trained with ESM, DSM or both\n", fontsize=15)
    figure.supxlabel("Nothing was trained here: the latent is the image at a quarter of its size, "
                     "the reconstruction a low-pass.", fontsize=10, color="gray")
    ax = figure.subplot_mosaic([
        ["image", ".", "mask image", ".", ".", "masked image"],
        [".", "esm", "mask", ".", ".", "loss"],
        ["encoder", "latent", "mask latent", "masked latent", "decoder", "reconstruction"]],
        width_ratios=(1, 1.8, 0.7, 1, 0.7, 1), gridspec_kw=dict(wspace=0.2, hspace=0.15))
    show(ax["image"], image[0], "image $x$")
    show(ax["latent"], latent[0], "latent $z$")
    show(ax["masked image"], spectral.lowpass(image, n)[0], "masked image")
    show(ax["masked latent"], spectral.lowpass(latent, n)[0], "masked latent")
    show(ax["reconstruction"], spectral.lowpass(image, n + 1)[0], "reconstruction $\\hat{x}$")
    small = spectral.match_resolution(image, latent.shape[-2:])
    target = spectral.spectrum_distribution(small, gamma=1.0)[0]
    current = spectral.spectrum_distribution(latent)[0]
    ax["esm"].plot(target, "k--", lw=2, label="the image's, flattened")
    ax["esm"].plot(current, color=GREEN, lw=2, label="the latent's")
    ax["esm"].fill_between(range(16), target, current, color=GREEN, alpha=0.25,
                           label="their KL joins the loss")
    ax["esm"].set(xticks=[], yticks=[], ylabel="power by frequency", facecolor="#e8f5e9")
    ax["esm"].set_title("ESM (Alg. 1): match spectra", loc="right", color=GREEN, weight="bold",
                        fontsize=11)
    ax["esm"].legend(fontsize=10)
    show(ax["mask"], spectral.triangle_mask(n))
    ax["mask"].set_title("DSM (Alg. 2):\none mask for both", color=BLUE, weight="bold")
    ax["mask"].set_xlabel(f"DCT; n = {n}, drawn\nfrom {{{', '.join(map(str, DSM_MASKS))}}}")
    for words in (ax["latent"].title, ax["reconstruction"].title, ax["mask"].title,
                  ax["mask"].xaxis.label):
        words.set_bbox(dict(fc="white", ec="none", pad=1))         # arrows pass behind them
    ends = {name: axes.patch for name, axes in ax.items()}         # endpoints of arrows
    for name, words in {"mask image": r"$\odot$", "mask latent": r"$\odot$", "decoder": "Decoder",
                        "encoder": "Encoder,\nsample",
                        "loss": "loss: L1 + LPIPS\n+ GAN (+ ESM)"}.items():
        box = dict(boxstyle="round,pad=0.6", fc="#eeeeee")
        text = ax[name].text(0.5, 0.5, words, ha="center", va="center", fontsize=13, bbox=box)
        ax[name].set_axis_off()
        ends[name] = text.get_bbox_patch()
    for color, *path in (
            ("black", "image", "mask image", "masked image", "loss"),
            ("black", "image", "encoder", "latent", "mask latent", "masked latent", "decoder",
             "reconstruction", "loss"),
            (GREEN, "image", "esm", "loss"), (GREEN, "latent", "esm"),
            (BLUE, "mask", "mask image"), (BLUE, "mask", "mask latent")):
        for a, b in itertools.pairwise(path):
            figure.add_artist(ConnectionPatch(
                (0.5, 0.5), (0.5, 0.5), ax[a].transAxes, ax[b].transAxes, patchA=ends[a],
                patchB=ends[b], arrowstyle="-|>", mutation_scale=18, lw=2, color=color, zorder=-1))
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=run.Help,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--plot", metavar="OUT.png", help="where the figure of the ideas goes")
    add("--pipeline", metavar="OUT.png", help="where the figure of the training goes")
    add("--image", help="an image file (default: a photograph that comes with matplotlib)")
    add("--size", type=int, default=256, help="pixels a side after a centre crop, a multiple of 64")
    args = run.parse_args(parser, {})
    run.need(args.size > 0 and args.size % 64 == 0, f"--size {args.size}: no multiple of 64")
    file = args.image or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    image = image_file(file, args.size, "cpu")             # (1, 3, size, size) in [-1, 1]
    for path, draw in ((args.plot, plot), (args.pipeline, pipeline)):
        if path:
            save_figure(draw(image), path, dpi=100)


if __name__ == "__main__":
    with run.one_line_errors():
        main()
