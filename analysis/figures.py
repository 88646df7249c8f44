"""
Every figure but those of ideas.py. What the scripts share: latents as colours (Fig. 3), grids of
samples, labelled rows; and the figures of evaluate.py:

    spectrum_figure     radial PSD of images and of latents                        Figs. 4, 5, 7, 8
    bands_figure        does a low-passed latent decode to the low-passed image?   ours, to Alg. 2
    latents_figure      latents as pictures                                        Fig. 3
    similarity_figure   which tokens a token resembles, for each target of REPA    Fig. 6
    curves_figure       the logs of training runs                                  ours

Those five take evaluate.py's flags and the device, yield (values, settings) as they measure, and
write their figure at the end. Pictures are in [0, 1] here, images that go through a network in
[-1, 1].
"""
import csv
import io
import json
import pathlib
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from analysis.published import CURVES, TARGET, divergence
from common import run
from common.data import center_crop, open_data, open_image, to_rgb, val_batches
from common.metrics import psnr
from common.run import reason
from common.weights import load_autoencoder
from losses import esm_loss
from repa import filter_target, load_encoder
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
    run.write_atomic(path, lambda file: save_image(
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
    run.write_atomic(path, lambda file: figure.savefig(file, format=suffix, **options))
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


def unique_names(files, taken=()):
    """
    The run_name of each file, for legends and rows, with as much of the path before it as tells
    different files apart and is not taken. The same file twice has one name.
    """
    paths = [pathlib.Path(file).resolve() for file in files]
    parts = {}
    for path in paths:
        folder = path.parent.parent if path.name == "ckpt.pt" else path.parent
        parts[path] = (*folder.parts, run.run_name(path))
    alike = Counter(parts.values())                    # x.pt and x.ckpt: these keep their endings
    parts = {path: path.parts if alike[own] > 1 else own for path, own in parts.items()}
    depth = dict.fromkeys(parts, 1)
    while True:
        names = {path: "/".join(own[-depth[path]:]) for path, own in parts.items()}
        count = Counter([*names.values(), *taken])
        short = [path for path, own in parts.items()
                 if count[names[path]] > 1 and depth[path] < len(own)]
        if not short:
            return [names[path] for path in paths]
        for path in short:
            depth[path] += 1


def autoencoders(args, device):
    """Yields (label, autoencoder, its training flags); labels are unique_names."""
    files = autoencoder_files(args)
    if not files:
        raise FileNotFoundError(f"no out/ae/{args.preset}-*/ckpt.pt here; --ae: train autoencoders "
                                "with train_ae.py, or give files")
    for file, label in zip(files, unique_names(files, taken=("image", "images"))):
        ae = load_autoencoder(file).to(device)
        yield label, ae, run.checkpoint_args(file)


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


def spectrum_sets(args, device):
    """
    Yields what spectrum measures of each autoencoder: label; images (N, 3, H, W); small, these at
    the latents' size; latents (N, C, h, w); `at`, which names this size unless it is the first; and
    if it is new (`new`) features, those of --encoder as batches (b, D, h, w). With --encoder and no
    autoencoder label and latents are None.
    """
    if args.encoder_source and not args.encoder:
        raise ValueError(f"--encoder_source {args.encoder_source}: needs --encoder, the name of "
                         "the model")
    encoder = args.encoder and load_encoder(args.encoder, args.encoder_source).to(device)
    models, seen = autoencoders(args, device), {}
    if (encoder or args.published) and not autoencoder_files(args):
        models = [(None, None, {})] if encoder else []
    for label, ae, trained in models:
        images = some_images(args, trained, device)
        latents = encode_all(ae, images, args.batch_size, args.seed) if ae else None
        grid = tuple(latents.shape[-2:] if ae else (side // 16 for side in images.shape[-2:]))
        features, new = (), grid not in seen
        if encoder and new:
            tokens = (encoder(x, grid) for x in images.split(args.batch_size))
            features = (t.mT.unflatten(2, grid) for t in tokens)
        at = seen.setdefault(grid, f", {grid[0]}x{grid[1]}" if seen else "")
        yield SimpleNamespace(label=label, images=images, small=match_resolution(images, grid),
                              latents=latents, at=at, new=new, features=features)


def encoder_label(args):
    """Whose features they are: the network's name, of a LabelNet that of its file."""
    source = args.encoder_source or ""
    if source == "random":
        return "random encoder"
    return pathlib.Path(source).stem if source.endswith(".pt") else args.encoder


def spectrum_settings(args, found):
    """What a line of results.jsonl says of how a spectrum was measured."""
    return dict(autoencoder=found.label, gamma=args.gamma, n=len(found.images), seed=args.seed,
                latent="x".join(map(str, found.latents.shape[1:])))


def write_with_table(args, figure, columns, rows):
    """The figure, and the numbers of its curves beside it as CSV."""
    table = out_path(args).with_suffix(".csv")
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])

    def write(out):
        save_figure(figure, out, dpi=90)
        run.write_atomic(table, lambda file: file.write(text.getvalue().encode()))
    write_out(args, write, f", {table}")


@torch.no_grad()
def spectrum_figure(args, device):
    """
    Radial power of the images (at the latents' size), their flattened target, and the latents of
    every autoencoder: figure and CSV.

    With --encoder also the DINOv2 features of the images, unit length per token (Fig. 7); then
    autoencoders are not needed. With --published the authors' printed curves and yours in the
    paper's own form: log(1 + power), DC kept, linear axes; without autoencoders theirs alone.
    """
    if args.published:
        yield from published_figure(args, device)
        return
    figure, axes = subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    rows = []
    draw = partial(draw_curve, axes, rows)
    for found in spectrum_sets(args, device):
        if found.new:
            target = f"target, gamma {args.gamma:g}{found.at}"
            draw(f"images{found.at}", [found.small], color="black", lw=2)
            draw(target, [found.small], args.gamma, color="black", ls="--")
        if found.features:
            unit = (F.normalize(x, dim=1) for x in found.features)
            draw(encoder_label(args) + found.at, unit, descriptor=False, color="gray", ls="-.")
        if found.label:
            draw(found.label, [found.latents])
            yield (spectrum_values(found.images, found.small, found.latents, args.gamma),
                   spectrum_settings(args, found))
    xlabel = "ring (1 = low frequency)"
    axes[0].set(title="Radial power, each curve scaled to sum 1", xlabel=xlabel,
                ylabel="share of power")
    axes[1].set(title="What ESM compares: log(1 + power), scaled to sum 1", xlabel=xlabel,
                ylim=(0, None))
    for ax in axes:
        ax.legend(fontsize=8)
    write_with_table(args, figure, ("curve", "ring", "power", "share", "descriptor"), rows)


def published_figure(args, device):
    """
    Left the authors' printed spectra, right in their form those of the images, the target, the
    latents and the features of --encoder, these as the encoder scales them: KL(target || curve).
    """
    ours = args.encoder or autoencoder_files(args)
    figure, axes = subplots(1, 2 if ours else 1, figsize=(12 if ours else 6.5, 4.8), sharey=True,
                            squeeze=False, layout="constrained")
    rows, rings = [], range(1, 17)

    def draw(ax, name, shares, where="", **style):
        ax.plot(rings, shares, marker="o", ms=3, label=name, **style)
        rows.extend(zip(16 * [name + where], rings, shares))

    def measure(batches, gamma=0.0):
        shares = [spectrum_distribution(x, gamma=gamma, remove_dc=False) for x in batches]
        return torch.cat(shares).mean(0).tolist()
    image, dotted = dict(color="black", lw=2), dict(color="black", ls=":")
    styles, left, right = {"image": image, TARGET: dotted}, axes[0, 0], axes[0, -1]
    printed = CURVES[args.published]
    for name, shares in printed.items():
        draw(left, name, shares, ", published", **styles.get(name, {}))
        if name not in styles:
            kl = divergence(printed[TARGET], shares)
            print(f"published, {args.published}, {name}: KL(target || curve) {kl:.4f}")
    for found in spectrum_sets(args, device):
        target = measure([found.small], args.gamma)
        if found.new:
            draw(right, f"images{found.at}", measure([found.small]), **image)
            draw(right, f"target, gamma {args.gamma:g}{found.at}", target, **dotted)
        curves = {}
        if found.features:
            curves[encoder_label(args) + found.at] = measure(found.features)
        if found.label:
            curves[found.label] = measure([found.latents])
        for name, shares in curves.items():
            draw(right, name, shares)
            settings = dict(curve=name, gamma=args.gamma, n=len(found.images), seed=args.seed,
                            rings=16, dc="kept", published=args.published)
            yield dict(kl_from_target=divergence(target, shares)), settings
    for ax, title in ((right, "yours"), (left, f"published, {args.published}")):
        ax.set(title=f"log(1 + power) with DC, scaled to sum 1; {title}", ylim=(0, None),
               xlabel="ring (1 = low frequency)")
        ax.legend(fontsize=8)
    write_with_table(args, figure, ("curve", "ring", "descriptor"), rows)


def need_blocks(args, label, ae, images):
    """ValueError unless the latents of images (N, 3, H, W) tile into DSM's 8x8 blocks."""
    h, w = ae.latent_shape(images)[-2:]
    if h % 8 or w % 8:
        raise ValueError(f"{args.command}: {label}'s latents of {h}x{w} do not tile into 8x8 "
                         f"blocks; --image_size must be a multiple of {8 * ae.config.reduction}")


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
        need_blocks(args, label, ae, images)
        latents = encode_all(ae, images, args.batch_size)
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
    rows, images = {}, None
    for label, ae, trained in autoencoders(args, device):
        if images is None:                             # the same ones for all
            images = some_images(args, trained, device)
            rows["image"] = images * 0.5 + 0.5
        rows[label] = pca_rgb(encode_all(ae, images, args.batch_size))
    write_out(args, lambda out: figure_rows(rows, out))
    return ()                                          # nothing is measured


def image_file(path, size, device):
    """One picture, cropped, as (1, 3, size, size) on device; ValueError if it cannot be read."""
    try:
        pixels = np.array(center_crop(to_rgb(open_image(path)), size))
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
    yield values, dict(encoder=encoder_label(args), n=len(images), token=token)
    write_out(args, lambda out: figure_rows(rows, out), " (black = opposite, white = equal)")


# What a log's line may hold, and the title of its panel
PANELS = dict(
    loss="loss", l1="L1", lpips="LPIPS", kl="KL", esm="ESM divergence",
    align="alignment", gan="GAN", disc="discriminator", grad_norm="gradient norm",
    disc_grad_norm="gradient norm, discriminator", val_psnr="validation PSNR, dB",
    val_ssim="validation SSIM", val_esm="validation ESM divergence")


def read_log(path):
    """
    {name: ([step, ...], [value, ...])} of a log.jsonl, of the names in PANELS. Lines that are no
    JSON are passed over, such as the last one of a run that is writing it.
    raises   FileNotFoundError, or ValueError if there is text and none of it is a log
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such log; give a run's folder or its log.jsonl")
    series, lines, understood = {}, path.read_text(errors="replace").splitlines(), 0
    for line in lines:
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, TypeError, KeyError):
            continue
        understood += 1
        for name in PANELS.keys() & entry.keys():
            if isinstance(entry[name], (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(entry[name])
    if len(lines) > 1 and not understood:
        raise ValueError(f"{path}: not the log of a training run; give log.jsonl")
    return series


def curves_figure(args, device):
    """
    The log.jsonl of training runs in one picture, a colour a run: losses, gradient norms, PSNR and
    ESM divergence of held-out images, over steps. Runs may be going on.
    """
    runs = [pathlib.Path(run) for run in dict.fromkeys(args.runs)]
    runs = [path.parent if path.name == "log.jsonl" else path for path in runs]
    logs = {}
    for log, name in zip(runs, unique_names(runs)):
        logs[name] = read_log(log / "log.jsonl" if log.is_dir() else log)
        if not logs[name]:
            print(f"{run}: has nothing to draw yet")
    shown = [name for name in PANELS if any(name in series for series in logs.values())]
    if not shown:
        raise ValueError(f"{args.runs[0]}: no line of a log yet; try again later")
    columns = min(3, len(shown))
    figure, axes = subplots(-(-len(shown) // columns), columns, squeeze=False, layout="constrained",
                            figsize=(4.4 * columns, 3 * -(-len(shown) // columns) + 0.5))
    import matplotlib
    colours = matplotlib.colormaps["tab10" if len(logs) <= 10 else "turbo"]
    for ax in axes.flat[len(shown):]:
        ax.set_axis_off()
    for panel, ax in zip(shown, axes.flat):
        for i, series in enumerate(logs.values()):
            colour = colours(i if len(logs) <= 10 else i / (len(logs) - 1))
            ax.plot(*series.get(panel, ([], [])), color=colour, lw=1)
        values = [v for series in logs.values() for v in series.get(panel, ([], []))[1]]
        positive = not any(v <= 0 for v in values) and not panel.endswith(("psnr", "ssim"))
        ax.set(title=PANELS[panel], xlabel="step", yscale="log" if positive else "linear")
    figure.legend(axes[0, 0].lines, list(logs), loc="outside lower center", fontsize=8,
                  ncols=min(4, len(logs)))
    write_out(args, lambda out: save_figure(figure, out, dpi=90))
    return ()                                          # nothing is measured
