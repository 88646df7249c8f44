"""
Every figure but those of ideas.py. What the scripts share: latents as colours (Fig. 3), grids of
samples, labelled rows; and the figures of evaluate.py:

    spectrum_figure     radial PSD of images and of latents                        Figs. 4, 5, 7, 8
    bands_figure        does a low-passed latent decode to the low-passed image?   ours, to Alg. 2
    latents_figure      latents as pictures                                        Fig. 3
    similarity_figure   which tokens a token resembles, for each target of REPA    Fig. 6

Those four take evaluate.py's flags and the device, yield (values, settings) as they measure, and
write their figure at the end. Pictures are in [0, 1] here, images that go through a network in
[-1, 1].
"""
import csv
import io
import pathlib
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from data import center_crop, open_data, reason, to_rgb, val_batches
from losses import esm_loss
from metrics import psnr
from repa import filter_target, load_encoder
from sources import open_picture
from spectral import (
    block_dct2,
    fit_power_law,
    lowpass,
    match_resolution,
    power_spectrum,
    radial_profile,
    rmsc,
    spectrum_distribution,
)
from weights import load_autoencoder


def pca_rgb(latents):
    """
    The first three principal components over all cells of all latents as colours (Fig. 3).
    latents  (B, C, h, w), any C >= 1
    returns  (B, 3, h, w) in [0, 1]; mid-grey is the mean, two standard deviations of each
             component span half the range
    """
    B, C, h, w = latents.shape
    cells = latents.float().movedim(1, -1).reshape(-1, C)                   # (B*h*w, C)
    cells = cells - cells.mean(0)
    with torch.autocast(latents.device.type, enabled=False):
        _, directions = torch.linalg.eigh(cells.T @ cells)                  # ascending eigenvalues
    directions = directions[:, -3:].flip(-1)
    directions = directions * torch.where(directions.sum(0) < 0, -1.0, 1.0)  # one sign for all
    components = F.pad(cells @ directions, (0, 3 - min(C, 3)))              # (B*h*w, 3)
    components = components / (2 * components.std(0, correction=0)).clamp_min(1e-12)
    return (components * 0.25 + 0.5).clamp(0, 1).view(B, h, w, 3).movedim(-1, 1)


def picture_grid(images, path, columns=8):
    """Images (N, 3, H, W) in [0, 1], clipped, side by side as one PNG."""
    from torchvision.utils import save_image
    images = images.float().cpu().clamp(0, 1)
    runtime.write_atomic(path, lambda file: save_image(
        images, file, "png", nrow=columns, padding=2, pad_value=1.0))


def subplots(*shape, **options):
    """plt.subplots without a display. matplotlib is imported only where something is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(*shape, **options)


def save_figure(figure, path, **options):
    """Write a figure as PNG, or what the path's suffix says, and close it."""
    import matplotlib.pyplot as plt
    suffix = pathlib.Path(path).suffix[1:] or "png"
    runtime.write_atomic(path, lambda file: figure.savefig(file, format=suffix, **options))
    plt.close(figure)


def figure_rows(rows, path):
    """
    A grid of pictures with a label before every row, as PNG, or what the path's suffix says.
    rows     {label: (N, 3, h, w) in [0, 1]}; the N of all rows are equal, their sizes may differ
             (small ones are shown in blocks)
    """
    columns = len(next(iter(rows.values())))
    figure, axes = subplots(
        len(rows), columns, figsize=(1.3 * columns + 0.3, 1.3 * len(rows)), squeeze=False,
        gridspec_kw=dict(wspace=0.04, hspace=0.04))
    for (label, images), line in zip(rows.items(), axes):
        line[0].set_ylabel(label, fontsize=8)
        for image, ax in zip(images, line):
            picture = image.float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    save_figure(figure, path, dpi=100, bbox_inches="tight")


# --------------------------------------------------------------------------------------------------
# The figures of evaluate.py

def out_path(args):
    """Where a command's figure goes: --out, or out/<command>.png."""
    return pathlib.Path(args.out or f"out/{args.command}.png")


def write_out(args, write, note=""):
    """write(path) the figure of a command, and say so."""
    out = out_path(args)
    write(out)
    print(f"wrote {out}{note}")


def some_images(args, trained, device):
    """
    The first args.val_images held-out images of --data (or of what the autoencoder was trained
    on): (N, 3, H, W) on device.
    """
    size = args.image_size or trained.get("image_size", 256)
    _, val_set = open_data(args.data or trained.get("data"), size, val_images=args.val_images,
                           seed=trained.get("seed", 0))
    batches = val_batches(val_set, args.batch_size, device=device)
    return torch.cat([images for images, _, _ in batches])


def autoencoder_files(args):
    """The files of --ae, or of every run of the preset."""
    found = pathlib.Path().glob(f"out/ae/{args.preset}-*/ckpt.pt")
    return args.ae or [str(path) for path in sorted(found)]


def autoencoders(args, device):
    """Yields (label, autoencoder, its training flags); labels are the runs' folder names."""
    files = autoencoder_files(args)
    if not files:
        raise FileNotFoundError(f"no out/ae/{args.preset}-*/ckpt.pt here; --ae: train autoencoders "
                                "with train_ae.py, or give files")
    for file in files:
        ae = load_autoencoder(file).to(device)
        yield runtime.run_name(file), ae, runtime.checkpoint_args(file)


@torch.no_grad()
def encode_all(ae, images, batch_size, seed=None):
    """Latents (N, C, h, w) of images: posterior samples with a seed, modes without."""
    posteriors = [ae.encode(x) for x in images.split(batch_size)]
    if seed is None:
        return torch.cat([posterior.mode() for posterior in posteriors])
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(p.mean.shape, generator=generator).to(p.mean.device) for p in posteriors)
    return torch.cat([posterior.sample(eps) for posterior, eps in zip(posteriors, draws)])


def draw_curve(axes, rows, name, batches, gamma=0.0, descriptor=True, **style):
    """
    One curve of a set that comes as tensors (b, C, h, w), and its 16 rows of the CSV; a descriptor
    only where the scale means something.
    """
    n, profile, shares = 0, 0, 0
    for x in batches:
        n += len(x)
        power = power_spectrum(x - x.mean((-2, -1), keepdim=True))
        profile = profile + radial_profile(power).sum(0).cpu()
        shares = shares + spectrum_distribution(x, gamma=gamma).sum(0).cpu()
    rings = torch.arange(1, 17)
    profile = profile / n * rings ** gamma
    relative, shares = profile / profile.sum(), shares / n
    label = f"{name}: $f^{{-{fit_power_law(profile):.2f}}}$"
    axes[0].loglog(rings, relative, marker="o", ms=3, label=label, **style)
    if descriptor:
        axes[1].plot(rings, shares, marker="o", ms=3, label=name, **style)
    last = shares.tolist() if descriptor else 16 * [""]
    rows.extend(zip(16 * [name], rings.tolist(), profile.tolist(), relative.tolist(), last))


def spectrum_values(images, small, latents, gamma):
    """What spectrum measures; small: the images at the latents' size."""
    slope = lambda x: fit_power_law(radial_profile(power_spectrum(x)).mean(0)).item()
    return dict(alpha=slope(latents), alpha_images=slope(small),
                esm=esm_loss(images, latents, gamma).item(),
                rmsc=rmsc(latents.flatten(2).transpose(1, 2)).mean().item(),
                std=latents.std().item())


@torch.no_grad()
def spectrum_figure(args, device):
    """
    Radial power of the images (at the latents' size), their flattened target, and the latents of
    every autoencoder: figure and CSV.

    With --encoder also the DINOv2 features of the images, unit length per token (Fig. 7); then
    autoencoders are not needed.
    """
    if args.encoder_source and not args.encoder:
        raise ValueError(f"--encoder_source {args.encoder_source}: needs --encoder, the name of "
                         "the model")
    encoder = args.encoder and load_encoder(args.encoder, args.encoder_source).to(device)
    encoder_name = "random encoder" if args.encoder_source == "random" else args.encoder
    models = autoencoders(args, device)
    if encoder and not autoencoder_files(args):
        models = [(None, None, {})]
    figure, axes = subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    rows, drawn = [], set()
    draw = partial(draw_curve, axes, rows)
    for label, ae, trained in models:
        images = some_images(args, trained, device)
        latents = encode_all(ae, images, args.batch_size, args.seed) if ae else None
        grid = tuple(latents.shape[-2:] if ae else (side // 16 for side in images.shape[-2:]))
        small = match_resolution(images, grid)
        if grid not in drawn:
            draw("images", [small], color="black", lw=2)
            draw(f"target, gamma {args.gamma:g}", [small], args.gamma, color="black", ls="--")
            if encoder:
                tokens = (encoder(x, grid) for x in images.split(args.batch_size))
                features = (F.normalize(t, dim=-1).mT.unflatten(2, grid) for t in tokens)
                draw(encoder_name, features, descriptor=False, color="gray", ls="-.")
        drawn.add(grid)
        if ae:
            draw(label, [latents])
            yield (spectrum_values(images, small, latents, args.gamma),
                   dict(autoencoder=label, gamma=args.gamma, n=len(images),
                        latent="x".join(map(str, latents.shape[1:]))))
    xlabel = "ring (1 = low frequency)"
    axes[0].set(title="Radial power, each curve scaled to sum 1", xlabel=xlabel,
                ylabel="share of power")
    axes[1].set(title="What ESM compares: log(1 + power), scaled to sum 1", xlabel=xlabel,
                ylim=(0, None))
    for ax in axes:
        ax.legend(fontsize=8)
    table = out_path(args).with_suffix(".csv")
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("curve", "ring", "power", "share", "descriptor"), *rows])

    def write(out):
        save_figure(figure, out, dpi=90)
        runtime.write_atomic(table, lambda file: file.write(text.getvalue().encode()))
    write_out(args, write, f", {table}")


def band_matrix(decoded):
    """
    The share of each band of the image in what each band of the latent adds; a band is an
    anti-diagonal of the 8x8 blocks.
    decoded  {n: decode(lowpass(z, n))} for n = 0 .. 14, each (N, 3, H, W)
    returns  (14, 15): latent bands 1 .. 14 by image bands 0 .. 14; rows sum to 1
    """
    diagonal = (torch.arange(8)[:, None] + torch.arange(8)).flatten()  # of each coefficient
    matrix = []
    for k in range(1, 15):                             # what appears between n = 15 - k and 14 - k
        energy = block_dct2(decoded[14 - k] - decoded[15 - k]).square().mean((0, 1, 2, 3))
        matrix.append(torch.zeros(15).index_add(0, diagonal, energy.flatten().cpu()))
    matrix = torch.stack(matrix)
    return matrix / matrix.sum(1, keepdim=True)


@torch.no_grad()
def bands_figure(args, device):
    """
    DSM made visible, for each autoencoder.

    Left: PSNR of decode(lowpass(z, n)) against lowpass(x, n) for every n. Right: the band matrix;
    row k is what the k-th anti-diagonal of the latent's 8x8 blocks adds to the decoded image, by
    anti-diagonal of the image's blocks.
    """
    models = list(autoencoders(args, device))
    figure, axes = subplots(1, 1 + len(models), figsize=(4.6 + 3.6 * len(models), 4),
                            layout="constrained", squeeze=False)
    left = axes[0, 0]
    for ax, (label, ae, trained) in zip(axes[0, 1:], models):
        images = some_images(args, trained, device)
        latents = encode_all(ae, images, args.batch_size)
        h, w = latents.shape[-2:]
        if h % 8 or w % 8:
            raise ValueError(f"bands: {label}'s latents of {h}x{w} do not tile into 8x8 blocks; "
                             f"--image_size must be a multiple of {8 * ae.config.reduction}")
        decoded, scores = {}, []
        for n in range(15):
            parts = latents.split(args.batch_size)
            decoded[n] = torch.cat([ae.decode(lowpass(z, n)) for z in parts])
            scores.append(psnr(decoded[n], lowpass(images, n)).mean().item())
        matrix = band_matrix(decoded)
        left.plot(range(15), scores, "o-", ms=3, label=label)
        ax.imshow(matrix.numpy(), cmap="magma", vmin=0, origin="lower",
                  extent=(-0.5, 14.5, 0.5, 14.5), aspect="auto")
        ax.set(title=f"{label}\nwhere each latent band lands",
               xlabel="band of the decoded image (0 = DC)", ylabel="band of the latent")
        values = {f"psnr_n{n}": scores[n] for n in (0, 8, 10, 12)}
        values["mean_image_band"] = (matrix @ torch.arange(15.0)).mean().item()
        yield values, dict(autoencoder=label, n=len(images))
    left.set(title="Does a low-passed latent decode\nto the low-passed image?",
             xlabel="n, anti-diagonals cut", ylabel="PSNR, dB")
    left.legend(fontsize=8)
    write_out(args, lambda out: save_figure(figure, out, dpi=90))


def latents_figure(args, device):
    """Fig. 3: a few held-out images, and under them the latents of every autoencoder as PCA-RGB."""
    rows = {}
    for label, ae, trained in autoencoders(args, device):
        images = some_images(args, trained, device)
        rows.setdefault("image", images * 0.5 + 0.5)
        rows[label] = pca_rgb(encode_all(ae, images, args.batch_size))
    write_out(args, lambda out: figure_rows(rows, out))
    return ()                                          # nothing is measured


def image_file(path, size, device):
    """One picture, cropped, as (1, 3, size, size) on device; ValueError if it cannot be read."""
    try:
        pixels = np.array(center_crop(to_rgb(open_picture(path)), size))
    except Exception as error:                         # no such file, or what decoders raise
        why = getattr(error, "strerror", None) or reason(error)
        raise ValueError(f"--image {path}: {why}; give another file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1


@torch.no_grad()
def similarity_figure(args, device):
    """
    Fig. 6: cosine similarity of one token to all tokens of an image, for the raw, spnorm and DoG
    targets, with the RMSC of each.
    """
    if args.image_size % 14:
        raise ValueError(f"--image_size {args.image_size}: must be a multiple of 14, the encoder's "
                         "patch")
    side = args.image_size // 14
    if args.image:
        images = image_file(args.image, args.image_size, device)
    else:
        images = some_images(args, {}, device)
    token = side * side // 2 + side // 2 if args.token is None else args.token
    if not 0 <= token < side * side:
        raise ValueError(f"--token {token}: there are {side * side} tokens, numbered row by row "
                         "from 0")
    encoder = load_encoder(args.encoder, args.encoder_source).to(device)
    # (N, T, D)
    tokens = torch.cat([encoder(x, (side, side)) for x in images.split(args.batch_size)])
    marked = (images * 0.5 + 0.5).clone()
    row, column = 14 * (token // side), 14 * (token % side)
    red = torch.tensor([1.0, 0.2, 0.2], device=device)[:, None, None]
    marked[:, :, row:row + 14, column:column + 14] = red
    rows, values = {"image, token in red": marked}, {}
    for kind, label in dict(none="raw", spnorm="spnorm", dog="dog").items():
        target = F.normalize(filter_target(tokens, kind, (side, side)), dim=-1)
        # (N, 1, h, w) in [-1, 1]
        cosine = (target @ target[:, token, :, None])[..., 0].view(-1, 1, side, side)
        contrast = rmsc(target).mean().item()
        values[f"rmsc_{kind}"] = contrast
        rows[f"{label}\nRMSC {contrast:.2f}"] = (cosine * 0.5 + 0.5).expand(-1, 3, -1, -1)
    name = args.encoder_source if args.encoder_source == "random" else args.encoder
    yield values, dict(encoder=name, n=len(images), token=token)
    write_out(args, lambda out: figure_rows(rows, out), " (black = opposite, white = equal)")
