"""
Drawing helpers for all scripts, and five commands of evaluate.py: spectrum, bands, latents,
similarity, curves. A command is a generator that takes the flags and the device, yields (values,
settings) and writes args.out. Images are drawn in [0, 1]; networks take them in [-1, 1].
"""
import csv
import json
import math
import pathlib
import re
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import repa
import spectral
from common import run
from common.data import center_crop, open_image, to_rgb, val_batches
from common.metrics import psnr
from common.weights import checkpoint_files, load_autoencoder, open_run_data
from losses import esm_loss


def pca_rgb(latents):
    """Latents (B, C, h, w) as colours (B, 3, h, w) in [0, 1]: principal components (Fig. 3)."""
    B, C, h, w = latents.shape
    cells = latents.float().cpu().movedim(1, -1).reshape(-1, C)  # (B*h*w, C); mps has no eigh
    cells = cells - cells.mean(0)
    _, directions = torch.linalg.eigh(cells.T @ cells)                      # ascending eigenvalues
    directions = directions[:, -3:].flip(-1)
    directions = directions * torch.where(directions.sum(0) < 0, -1.0, 1.0)  # sign is arbitrary
    components = F.pad(cells @ directions, (0, 3 - min(C, 3)))              # (B*h*w, 3)
    # +-2 standard deviations of a component span half the range
    components = components / (2 * components.std(0, correction=0)).clamp_min(1e-12)
    return (components * 0.25 + 0.5).clamp(0, 1).view(B, h, w, 3).movedim(-1, 1)


def image_grid(images, path):
    """Images (N, 3, H, W) in [0, 1], clipped, side by side as one PNG, eight in a row."""
    from torchvision.utils import save_image
    images = images.float().cpu().clamp(0, 1)
    run.write_atomic(path, lambda file: save_image(images, file, "png", pad_value=1.0))


def subplots(rows, columns, inches, **options):
    """A figure of inches = (width, height) and its (rows, columns) axes; needs no display."""
    from matplotlib.figure import Figure  # imported only where something is drawn
    figure = Figure(inches, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure, path, dpi=90, **options):
    """Write a figure in the format of the path's suffix, PNG if it has none."""
    suffix = pathlib.Path(path).suffix[1:] or "png"
    run.write_atomic(path, lambda file: figure.savefig(file, format=suffix, dpi=dpi, **options))


def log_axes(ax, names):
    """Log scale on axes "x", "y" or "xy", ticks 1, 2, 5, 10 (1, 10 if it spans many decades)."""
    from matplotlib.ticker import LogLocator, NullFormatter
    for name in names:
        ax.set(**{f"{name}scale": "log"})
        axis = dict(x=ax.xaxis, y=ax.yaxis)[name]
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def figure_rows(rows, path):
    """A grid of images {label: (N, 3, h, w) in [0, 1]}, one row per label; all have the same N."""
    columns = len(next(iter(rows.values())))
    figure, axes = subplots(len(rows), columns, (1.3 * columns + 0.3, 1.3 * len(rows)))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for (label, images), row in zip(rows.items(), axes):
        row[0].set_ylabel(label)
        for image, ax in zip(images.float().cpu().clamp(0, 1), row):
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    save_figure(figure, path, dpi=100, bbox_inches="tight")


def image_file(path, size, device):
    """One image, cropped, as (1, 3, size, size) on device; ValueError if it cannot be read."""
    try:
        pixels = np.array(center_crop(to_rgb(open_image(path)), size))
    except Exception as error:                         # no such file, or any decoder error
        raise ValueError(f"--image {path}: {run.reason(error)}; give another file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1


# ------------------------------------------------------------------------- shared by the commands

def write_table(args, figure, columns, rows):
    """Save a command's figure, and the data of its curves as a CSV beside it."""
    table = pathlib.Path(args.out).with_suffix(".csv")
    save_figure(figure, args.out)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    print(f"wrote {args.out}, {table}")


def unique_names(files):
    """The run_name of each file, prefixed by as many parent folders as make all unique."""
    files = [pathlib.Path(file).resolve() for file in files]
    folders = [file.parent.parent if file.name == "ckpt.pt" else file.parent for file in files]
    paths = [(*folder.parts, run.run_name(file)) for folder, file in zip(folders, files)]
    for n in range(1, 1 + max(map(len, paths))):
        names = ["/".join(path[-n:]) for path in paths]
        # "image(s)" already label a row or curve; matplotlib's legend omits labels starting with _
        taken = any(name in ("image", "images") or name[0] == "_" for name in names)
        if len(set(names)) == len(set(paths)) and not taken:
            break
    return names


def named_checkpoints(args):
    """[(file, name)] of the diffusion checkpoints that a command reads."""
    files = checkpoint_files(args)
    return list(zip(files, unique_names(files)))


def held_out_images(args, trained, device, file=None):
    """
    The first --val_images held-out images (N, 3, H, W) in [-1, 1] of --data (default: the training
    data in `trained`, the flags of checkpoint `file`), labels (N,) and the number of classes.
    """
    data, size, _, val_set = open_run_data(
        file, trained, args.data, getattr(args, "image_size", None), args.val_images)
    run.need_outside(getattr(args, "out", None), data)
    args.read = dict(data=data or "built-in", size=size)   # for results.jsonl
    images, labels, _ = zip(*val_batches(val_set, args.batch_size, device=device))
    return torch.cat(images), torch.cat(labels), len(val_set.classes)


def autoencoders(args, device):
    """Yields (label, autoencoder, held-out images) for each --ae or every run of the preset."""
    files = args.ae or run.checkpoints("ae", args.preset, "--ae")
    loaded = [load_autoencoder(file) for file in files]
    for key in ("images", "image_size"):
        if len({ae.trained[key] for ae in loaded if ae.trained.get(key)}) > 1:
            print(f"these runs differ in {key}; compare them with care")
    for file, label, ae in zip(files, unique_names(files), loaded):
        images, _, _ = held_out_images(args, ae.trained, device, file)
        yield label, ae.to(device), images


@torch.no_grad()
def encode_all(ae, images, batch_size, seed=None):
    """Latents (N, C, h, w) of images: posterior samples if a seed is given, else modes."""
    latents, generator = [], torch.Generator().manual_seed(seed or 0)
    for x in images.split(batch_size):
        posterior = ae.encode(x)
        eps = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        latents.append(posterior.mode() if seed is None else posterior.sample(eps))
    return torch.cat(latents)


# ----------------------------------------------------------------------------------------- spectra

# {data set: {curve: 16 shares}}: the authors' numbers for Figs. 4, 5, 7, 8 (latent_analysis.py of
# forever208/SpectrumMatching, branch SM-DSM; 256 px), each ring's share of log(1 + power), lowest
# frequency first, DC kept as by spectrum_distribution(x, remove_dc=False)
CURVES, TARGET = {}, "flattened by 1.0"                # TARGET: ESM's target, gamma 1
for line in pathlib.Path(__file__).with_name("published.csv").read_text().splitlines():
    data, name, *shares = line.split(",")
    CURVES.setdefault(data, {})[name] = list(map(float, shares))


def divergence(target, curve):
    """KL(target || curve) in nats of two spectra (16,), each first normalised to sum to 1."""
    p, q = (torch.as_tensor(shares, dtype=torch.float64) for shares in (target, curve))
    p, q = p / p.sum(), q / q.sum()
    return (p * (p.log() - q.log())).sum().item()


# One colour per method in all figures; keys: values of --reg and names of published curves
COLORS = {"kl": "C0", "SD-VAE": "C0", "dsm": "C1", "DSM": "C1", "esm": "C2", "ESM": "C2",
          "se": "C3", "Scale Equivariance": "C3", "eq": "C4", "vf": "C5", "VA-VAE": "C5",
          "DINOv2-B features": "C6", "image": "black", TARGET: "gray"}


def run_colors(names):
    """A colour per run: its method's if in the name (quick-kl) and still free, else another."""
    colors = []
    for name in names:
        told = [COLORS[word] for word in re.split("[-_/]", name) if word in COLORS]
        free = ("C4", "C9", "C8", "C6", "C5", "C3", "C2", "C1", "C0")
        colors.append(next((color for color in (*told, *free) if color not in colors), "C7"))
    return colors


encoder_name = lambda args: args.encoder if args.encoder_source != "random" else "random encoder"


def psd_exponent(x, rings=16):
    """Exponent alpha (float) of the power law f^-alpha fitted to the mean PSD of x (B, C, H, W)."""
    power = spectral.radial_profile(spectral.power_spectrum(x), rings).mean(0)
    return spectral.fit_power_law(power).item()


def draw_curve(axes, rows, name, x, gamma=0.0, remove_dc=True, **style):
    """
    Draw images or latents (B, C, h, w) as a curve: radial power on axes[0], ESM's spectrum on
    axes[1]. Appends 16 rows; returns the mean spectrum (16,).
    """
    rings = range(1, 17)
    P = spectral.power_spectrum(x - x.mean((-2, -1), keepdim=True))
    power = spectral.radial_profile(P).mean(0).cpu() * torch.tensor(rings) ** gamma
    shares = spectral.spectrum_distribution(x, gamma=gamma, remove_dc=remove_dc).mean(0).cpu()
    relative = power / power.sum()
    rows.extend(zip(16 * [name], rings, power.tolist(), relative.tolist(), shares.tolist()))
    visible = lambda curve: curve.where(curve > 1e-6, float("nan"))    # ring 1 may hold only DC
    label = f"{name}: $f^{{-{spectral.fit_power_law(power):.2f}}}$"
    axes[0].loglog(rings, visible(relative), marker="o", ms=3, label=label, **style)
    axes[1].plot(rings, visible(shares), marker="o", ms=3, **style)
    return shares


def saved_latents(args, device):
    """Yields (label, images or None, latents (N, C, h, w)) for each file of --latents."""
    images = held_out_images(args, {}, device)[0] if args.data else None
    for file, label in zip(args.latents, unique_names(args.latents)):
        array = np.load(file, mmap_mode="r")
        run.need(array.ndim == 4, f"--latents {file}: shape {array.shape}, not (N, C, h, w)")
        yield label, images, torch.from_numpy(array[:args.val_images].astype(np.float32)).to(device)


@torch.no_grad()
def spectrum_figure(args, device):
    """
    Figs. 4, 5, 7, 8: radial power of the images (resized to the latents' size), of ESM's flattened
    target and of each autoencoder's latents, as a figure and a CSV. --encoder adds DINOv2 features.
    --published overlays the authors' curves and draws all as they do, with DC. Both work without an
    autoencoder. --latents reads the first --val_images latents of any autoencoder from .npy files
    (N, C, h, w); images and target are then drawn only if --data is given.
    """
    run.need(args.encoder or not args.encoder_source,
             f"--encoder_source {args.encoder_source}: needs --encoder NAME")
    run.need(not args.latents or not args.ae and (args.data or not args.encoder),
             "--latents: cannot be combined with --ae, and with --encoder only if --data is given")
    published, rows, sources, names = args.published, [], [], []
    if args.encoder:
        encoder = repa.load_encoder(args.encoder, args.encoder_source).to(device)
    if args.latents:
        sources = saved_latents(args, device)
    elif args.ae or not (args.encoder or published):
        sources = ((label, images, encode_all(ae, images, args.batch_size, args.seed))
                   for label, ae, images in autoencoders(args, device))
    elif args.encoder:                                 # features only, at the size of f16 latents
        sources = [("", held_out_images(args, {}, device)[0], None)]
    panels = 2 if sources else 1
    figure, (axes,) = subplots(1, panels, (5 * panels + 2.4, 4.6))
    draw = partial(draw_curve, axes, rows, remove_dc=not published)
    printed = CURVES.get(published, {})
    for name, shares in printed.items():
        curve = f"{name}, published"
        axes[-1].plot(range(1, 17), shares, ls=":", lw=2, color=COLORS[name], label=curve)
        rows += [(curve, ring, "", "", share) for ring, share in enumerate(shares, 1)]
        if name not in ("image", TARGET):
            kl = divergence(printed[TARGET], shares)
            print(f"published, {published}, {name}: KL(target || curve) {kl:.4f}")
    targets = {}                                       # shared by latents of the same size
    for label, images, latents in sources:
        grid = tuple(s // 16 for s in images.shape[2:]) if latents is None else latents.shape[2:]
        n = len(images if latents is None else latents)
        curves, at = {}, f", {grid[0]}x{grid[1]}" if targets else ""
        if images is not None:
            small = spectral.match_resolution(images, grid)
        if images is not None and grid not in targets:
            draw(f"images{at}", small, color="black", lw=2)
            target = f"target, gamma {args.gamma:g}{at}"
            targets[grid] = draw(target, small, args.gamma, color="gray", lw=2)
            if args.encoder:
                tokens = torch.cat([encoder(x, grid) for x in images.split(args.batch_size)])
                name, features = encoder_name(args) + at, tokens.mT.unflatten(2, grid)
                curves[name] = draw(name, features, color="C6")           # (N, D, h, w)
        if latents is not None:
            names.append(label)
            curves[label] = draw(label, latents, color=run_colors(names)[-1])
        settings = dict(gamma=args.gamma, n=n, seed=args.seed)
        if published and images is not None:
            for name, curve in curves.items():
                yield (dict(kl_from_target=divergence(targets[grid], curve)),
                       dict(curve=name, **settings, rings=16, dc="kept", published=published))
        elif latents is not None:
            values = dict(alpha=psd_exponent(latents))
            if images is not None:
                values["alpha_images"] = psd_exponent(small)
            if not args.latents:                       # --latents: their images are unknown
                values["esm"] = esm_loss(images, latents, args.gamma).item()
            values["rmsc"] = spectral.rmsc(latents.flatten(2).mT).mean().item()
            values["std"] = latents.std().item()
            shape = "x".join(map(str, latents.shape[1:]))
            yield values, dict(autoencoder=label, **settings, latent=shape)
    axes[0].set(title="Radial power and its power law $f^{-\\alpha}$", ylabel="share of power")
    axes[-1].set(title="In the paper's form, DC kept" if published else "What ESM compares",
                 ylabel="share of log(1 + power)", xticks=range(2, 17, 2), ylim=(0.002, None))
    for ax, logarithmic in zip(axes, ("xy", "y") if sources else ("y",)):
        ax.set_xlabel("ring (1 = low frequency)")
        log_axes(ax, logarithmic)
    figure.legend(loc="outside right upper")
    write_table(args, figure, ("curve", "ring", "power", "share", "descriptor"), rows)


# ----------------------------------------------------------------------- bands, latents, similarity

def decode_lowpassed(ae, latents, masks, batch_size):
    """{n: decode(lowpass(z, n))}, images (N, 3, H, W), for each n of masks."""
    return {n: torch.cat([ae.decode(spectral.lowpass(z, n)) for z in latents.split(batch_size)])
            for n in masks}


def band_matrix(decoded):
    """
    Shares of the image's bands (anti-diagonals of 8x8 DCT blocks) in what each latent band adds.
    decode_lowpassed with n = 0 .. 14 -> (14, 15): latent bands 1 .. 14 by image bands 0 .. 14.
    """
    diagonal = (torch.arange(8)[:, None] + torch.arange(8)).flatten()  # band of each coefficient
    matrix = torch.zeros(14, 15)
    for k in range(1, 15):                             # n = 15 - k removes band k, 14 - k keeps it
        added = spectral.block_dct2(decoded[14 - k] - decoded[15 - k])
        energy = added.square().mean((0, 1, 2, 3)).flatten().cpu()
        matrix[k - 1].index_add_(0, diagonal, energy)
    return matrix / matrix.sum(1, keepdim=True)


@torch.no_grad()
def bands_figure(args, device):
    """
    What DSM trains. Left: PSNR of decode(lowpass(z, n)) against lowpass(x, n) for every n. Right:
    which bands of the decoded image each latent band (anti-diagonal of 8x8 DCT blocks) affects.
    """
    found, bands = [], torch.arange(1, 15)
    for label, ae, images in autoencoders(args, device):
        latents = encode_all(ae, images, args.batch_size)
        decoded = decode_lowpassed(ae, latents, range(15), args.batch_size)
        scores = [psnr(decoded[n], spectral.lowpass(images, n)).mean().item() for n in decoded]
        matrix = band_matrix(decoded)
        found.append((label, scores, matrix, bands / ae.config.reduction))
        values = {f"psnr_n{n}": scores[n] for n in (0, 8, 10, 12)}
        values["mean_image_band"] = (matrix @ torch.arange(15.0)).mean().item()
        yield values, dict(autoencoder=label, n=len(images))
    figure, ((left, *others),) = subplots(1, 1 + len(found), (4.6 + 3.6 * len(found), 4))
    colors = run_colors(label for label, *_ in found)
    for ax, color, (label, scores, matrix, same) in zip(others, colors, found):
        left.plot(range(15), scores, "o-", ms=3, label=label, color=color)
        mesh = ax.imshow(matrix, cmap="magma", vmin=0, vmax=0.6, origin="lower",
                         extent=(-0.5, 14.5, 0.5, 14.5), aspect="auto")
        ax.plot(bands, bands, "w:", label="same band: DSM")
        ax.plot(same, bands, "w--", label="same wavelength")
        ax.set(title=f"{label}\nwhere each latent band lands", xticks=range(0, 15, 2),
               xlabel="band of the decoded image (0 = DC)", ylabel="band of the latent")
    left.set(title="Does a low-passed latent decode\nto the low-passed image?",
             xlabel="n, anti-diagonals cut", xticks=range(0, 15, 2), ylabel="PSNR, dB")
    left.legend()
    ax.legend(labelcolor="white", facecolor="gray")
    figure.colorbar(mesh, ax=others, label="share of the energy that a latent band adds")
    save_figure(figure, args.out)
    print(f"wrote {args.out}")


def latents_figure(args, device):
    """Fig. 3: a few held-out images and, below them, each autoencoder's latents as PCA-RGB."""
    rows = {}
    for label, ae, images in autoencoders(args, device):
        shown = rows.setdefault("image", images)       # the same for every autoencoder
        rows[label] = pca_rgb(encode_all(ae, shown, args.batch_size))
    figure_rows(rows | dict(image=rows["image"] * 0.5 + 0.5), args.out)
    print(f"wrote {args.out}")
    return ()                                          # nothing is measured


@torch.no_grad()
def similarity_figure(args, device):
    """Fig. 6: cosine similarity of one token to all others: raw, spnorm and DoG, each with RMSC."""
    size, side = args.image_size, args.image_size // 14
    grid = side, side
    run.need(size % 14 == 0, f"--image_size {size}: must be a multiple of 14, the encoder's patch")
    token = side // 2 * side + side // 2 if args.token is None else args.token
    run.need(0 <= token < side * side, f"--token {token}: must lie in 0..{side * side - 1}")
    if args.image:
        run.need_outside(args.out, args.image)
        images = image_file(args.image, size, device)
    else:
        images, _, _ = held_out_images(args, {}, device)
    encoder = repa.load_encoder(args.encoder, args.encoder_source).to(device)
    tokens = torch.cat([encoder(x, grid) for x in images.split(args.batch_size)])  # (N, T, D)
    marked, values = images * 0.5 + 0.5, {}
    y, x = 14 * (token // side), 14 * (token % side)
    marked[..., y:y + 14, x:x + 14] = torch.tensor([1.0, 0.2, 0.2], device=device)[:, None, None]
    rows = {"image, token in red": marked}
    for kind, label in dict(none="raw", spnorm="spnorm", dog="dog").items():
        target = F.normalize(repa.filter_target(tokens, kind, grid), dim=-1)
        cosine = (target @ target[:, token, :, None]).view(-1, 1, *grid)        # in [-1, 1]
        contrast = values[f"rmsc_{kind}"] = spectral.rmsc(target).mean().item()
        rows[f"{label}\nRMSC {contrast:.2f}"] = (cosine * 0.5 + 0.5).expand(-1, 3, -1, -1)
    yield values, dict(encoder=encoder_name(args), n=len(images), token=token)
    figure_rows(rows, args.out)
    print(f"wrote {args.out} (black = opposite, white = equal)")


# The values of log.jsonl that `curves` draws, one panel each, and the axis labels
PANELS = dict(
    loss="training loss", l1="mean |error|, in [-1, 1]", lpips="LPIPS", kl="nats per image",
    esm="nats", align="alignment loss", gan="hinge loss", disc="hinge loss", grad_norm="L2 norm",
    disc_grad_norm="L2 norm", val_psnr="dB", val_ssim="1 = equal images", val_esm="nats")


def curves_figure(args, device):
    """Plot the log.jsonl of training runs, one colour per run; works while they are training."""
    from matplotlib.ticker import EngFormatter, MaxNLocator
    paths = [pathlib.Path(path) for path in dict.fromkeys(args.runs)]
    paths = [path.parent if path.name == "log.jsonl" else path for path in paths]
    # drop the last line: empty, or still being written
    texts = [(path / "log.jsonl").read_text(errors="replace").split("\n")[:-1] for path in paths]
    logs = [[json.loads(line) for line in lines] for lines in texts]
    shown = [panel for panel in PANELS if any(panel in entry for log in logs for entry in log)]
    run.need(shown, f"{args.runs[0]}: no line of a log yet; try again later")
    columns, rows = min(3, len(shown)), math.ceil(len(shown) / 3)
    figure, axes = subplots(rows, columns, (4 * columns, 2.7 * rows + 0.5))
    names = unique_names(paths)
    for ax in axes.flat[len(shown):]:
        ax.set_axis_off()
    for panel, ax in zip(shown, axes.flat):
        for log, color in zip(logs, run_colors(names)):
            points = [(entry["step"], entry[panel]) for entry in log if panel in entry]
            ax.plot(*zip(*points or [(math.nan, math.nan)]), ".-", color=color)
        if panel != "val_ssim" and ax.dataLim.y1 > 10 * ax.dataLim.y0 > 0:
            log_axes(ax, "y")
        ax.set(title=panel, xlabel="step", ylabel=PANELS[panel])
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))             # 500, 100k
    figure.legend(axes[0, 0].lines, names, loc="outside lower center", ncols=4)
    save_figure(figure, args.out)
    print(f"wrote {args.out}")
    return ()                                          # nothing is measured
