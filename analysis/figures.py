"""
What the scripts draw with, and five commands of evaluate.py: spectrum, bands, latents, similarity,
curves. A command takes evaluate.py's flags and the device, yields (values, settings) as it
measures, and writes its figure to args.out at the end.

What is drawn is in [0, 1], images for a network are in [-1, 1].
"""
import contextlib
import csv
import io
import json
import pathlib
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import repa
import spectral
from common import run
from common.data import center_crop, open_data, open_image, to_rgb, val_batches
from common.metrics import psnr
from common.weights import compare_images, load_autoencoder
from losses import esm_loss


def pca_rgb(latents):
    """
    The first three principal components over all cells of all latents as colours (Fig. 3).
    latents  (B, C, h, w), any C >= 1
    returns  (B, 3, h, w) in [0, 1]; two standard deviations of a component span half the range
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


def image_grid(images, path, columns=8):
    """Images (N, 3, H, W) in [0, 1], clipped, side by side as one PNG."""
    from torchvision.utils import save_image
    images = images.float().cpu().clamp(0, 1)
    run.write_atomic(path, lambda file: save_image(
        images, file, "png", nrow=columns, padding=2, pad_value=1.0))


def subplots(rows, columns, inches, **options):
    """A figure (width, height) and its axes, an array (rows, columns). It needs no display."""
    from matplotlib.figure import Figure  # imported only where something is drawn
    figure = Figure(inches, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure, path, dpi=90, **options):
    """Write a figure as PNG, or what the path's suffix says."""
    suffix = pathlib.Path(path).suffix[1:] or "png"
    run.write_atomic(path, lambda file: figure.savefig(file, format=suffix, dpi=dpi, **options))


def figure_rows(rows, path):
    """A grid of images {label: (N, 3, h, w) in [0, 1]}, a row per label; one N, any h and w."""
    columns = len(next(iter(rows.values())))
    figure, axes = subplots(len(rows), columns, (1.3 * columns + 0.3, 1.3 * len(rows)),
                            gridspec_kw=dict(wspace=0.04, hspace=0.04))
    figure.set_layout_engine("none")                   # which would set its own distances
    for (label, images), row in zip(rows.items(), axes):
        row[0].set_ylabel(label, fontsize=8)
        for image, ax in zip(images.float().cpu().clamp(0, 1), row):
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    save_figure(figure, path, dpi=100, bbox_inches="tight")


# ------------------------------------------------------------------------- what the commands share

def write_table(args, figure, columns, rows):
    """A command's figure, and the numbers of its curves beside it as CSV."""
    table, text = pathlib.Path(args.out).with_suffix(".csv"), io.StringIO(newline="")
    save_figure(figure, args.out)
    csv.writer(text).writerows([columns, *rows])
    run.write_atomic(table, lambda file: file.write(text.getvalue().encode()))
    print(f"wrote {args.out}, {table}")


def need_outside(out, data):
    """ValueError if the file or folder out would replace images of --data, or join them."""
    place, images = pathlib.Path(out).resolve(), pathlib.Path(data or "leaves").resolve()
    run.need(not images.exists() or images not in (place, *place.parents), f"--out {out}: lies in "
             f"{data}, whose images are read; name another place")


def print_differences(files, names, *keys):
    """A line if the runs of one figure or table differ in what their checkpoints say of keys."""
    runs, found = {}, []
    for file, name in zip(map(pathlib.Path, files), names):
        with contextlib.suppress(Exception):               # released weights, a log alone
            saved = torch.load(file / "ckpt.pt" if file.is_dir() else file, map_location="cpu",
                               mmap=True, weights_only=True)       # the tensors stay on the disk
            runs[name] = saved["args"] | saved
    for key in keys:
        known = {name: saved[key] for name, saved in runs.items() if saved.get(key)}
        if len(set(map(str, known.values()))) > 1:
            shown = "data" if key == "images" else key     # a hash says nothing to a reader
            values = (f"{name}: {runs[name].get(shown) or 'built-in'}" for name in known)
            found.append(f"{shown} ({', '.join(values)})")
    if found:
        run.print0(f"these runs differ in {' and in '.join(found)}; compare them with care")


def held_out_images(args, trained, device, file=None):
    """
    The first --val_images held-out images of --data, or of the data in a run's flags `trained`:
    images (N, 3, H, W) in [-1, 1], labels (N,), both on device; the number of classes. A line if
    that data has changed since the checkpoint `file` was trained on it.
    """
    size = getattr(args, "image_size", None) or trained.get("image_size", 256)
    data = args.data or trained.get("data")
    if getattr(args, "out", None):
        need_outside(args.out, data)
    train_set, val_set = open_data(data, size, val_images=args.val_images,
                                   seed=trained.get("seed", 0))
    compare_images(file, trained, data, train_set)
    images, labels, _ = zip(*val_batches(val_set, args.batch_size, device=device))
    return torch.cat(images), torch.cat(labels), len(val_set.classes)


def unique_names(files, taken=()):
    """
    The run_name of each file, with as much of the path before it as tells them apart, as matplotlib
    may show it, which drops a label with _ at its front and takes $ for a formula.
    """
    paths, names = [pathlib.Path(file).resolve() for file in files], {}
    for path in paths:                                 # short ones first, x.pt with its suffix last
        folder = path.parent.parent if path.name == "ckpt.pt" else path.parent
        ways = (*folder.parts, run.run_name(path)), path.parts
        found = ["/".join(way[-n:]) for way in ways for n in range(1, len(way) + 1)]
        names[path] = [run.printable(name).replace("$", r"\$") for name in found]
    count = Counter(name for found in names.values() for name in set(found))
    fits = lambda name: count[name] == 1 and name not in taken and name[0] != "_"
    return [next(filter(fits, names[path])) for path in paths]


def autoencoder_files(args):
    """The files of --ae, or of every run of the preset."""
    found = pathlib.Path().glob(f"out/ae/{args.preset}-*/ckpt.pt")
    return args.ae or [str(path) for path in sorted(found)]


def autoencoders(args, device):
    """Yields (label, autoencoder, held-out images (N, 3, H, W)) of every autoencoder_files."""
    files = autoencoder_files(args)
    run.need(files, f"no out/ae/{args.preset}-*/ckpt.pt here; --ae: train autoencoders with "
             "train_ae.py, or give files")
    labels = unique_names(files, taken=("image", "images"))
    print_differences(files, labels, "images", "image_size")
    for file, label in zip(files, labels):
        ae = load_autoencoder(file).to(device)
        images, _, _ = held_out_images(args, run.checkpoint_args(file), device, file)
        yield label, ae, images


@torch.no_grad()
def encode_all(ae, images, batch_size, seed=None):
    """Latents (N, C, h, w) of images: posterior samples with a seed, modes without."""
    posteriors = [ae.encode(x) for x in images.split(batch_size)]
    if seed is None:
        return torch.cat([posterior.mode() for posterior in posteriors])
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(p.mean.shape, generator=generator).to(p.mean.device) for p in posteriors)
    return torch.cat([posterior.sample(eps) for posterior, eps in zip(posteriors, draws)])


# ----------------------------------------------------------------------------------------- spectra

def parse_curves(table):
    """{name: 16 shares that sum to 1, up to their printed four digits}."""
    lines = [line.split(":") for line in table.strip().splitlines()]
    return {name: [int(share) / 1e4 for share in row.split()] for name, row in lines}


# What the authors print for Figs. 4, 5, 7, 8 (latent_analysis.py of forever208/SpectrumMatching,
# branch SM-DSM; CelebA and ImageNet at 256 px): shares of log(1 + power) in 16 rings, lowest
# frequency first, in units of 1e-4, DC kept as by spectrum_distribution(x, remove_dc=False).
# TARGET, what the latents are to match, is the image's spectrum with gamma 1.
TARGET = "flattened by 1.0"
CURVES = dict(celeba=parse_curves("""
image:              4057 2333 1190 0835 0424 0317 0194 0142 0108 0091 0076 0060 0053 0044 0040 0035
flattened by 1.0:   1961 1560 1099 0977 0677 0617 0472 0404 0358 0340 0313 0278 0266 0238 0229 0212
SD-VAE:             1671 1312 0833 0710 0587 0538 0513 0476 0460 0455 0438 0419 0408 0398 0393 0389
Scale Equivariance: 1666 1385 1134 0955 0789 0685 0620 0493 0438 0393 0283 0494 0175 0163 0159 0170
DSM:                1638 1471 1202 1037 0774 0677 0529 0415 0377 0337 0290 0306 0258 0242 0230 0216
ESM:                1658 1483 1130 0985 0754 0652 0531 0446 0387 0363 0329 0295 0260 0249 0246 0233
"""), imagenet=parse_curves("""
image:              4636 1917 1005 0668 0391 0266 0218 0163 0133 0124 0103 0096 0076 0069 0067 0068
flattened by 1.0:   2158 1274 0928 0801 0607 0507 0486 0421 0391 0399 0371 0375 0322 0314 0320 0326
VA-VAE:             1893 1489 1356 1029 0707 0551 0508 0414 0336 0325 0331 0257 0219 0205 0198 0181
DINOv2-B features:  2288 1442 1042 0824 0629 0515 0458 0395 0353 0339 0335 0300 0281 0273 0268 0258
"""))


def divergence(target, curve):
    """KL(target || curve), nats, of two spectra (16,), each scaled to sum 1 exactly."""
    p, q = (torch.as_tensor(shares, dtype=torch.float64) for shares in (target, curve))
    p, q = p / p.sum(), q / q.sum()
    return (p * (p.log() - q.log())).sum().item()


def encoder_name(args):
    return "random encoder" if args.encoder_source == "random" else args.encoder


def psd_exponent(x, rings=16):
    """alpha of the mean PSD ~ f^-alpha of x (B, C, H, W), a float."""
    power = spectral.radial_profile(spectral.power_spectrum(x), rings).mean(0)
    return spectral.fit_power_law(power).item()


def draw_curve(axes, rows, name, batches, gamma=0.0, descriptor=True, remove_dc=True, **style):
    """
    One curve of batches (b, C, h, w) on axes[0], radial power scaled to sum 1, and on axes[1] what
    ESM compares, unless descriptor is False, for values of no meaningful scale. Appends 16 rows of
    the CSV, and returns the mean spectral.spectrum_distribution (16,).
    """
    n, power, shares = 0, 0, 0
    for x in batches:
        n += len(x)
        P = spectral.power_spectrum(x - x.mean((-2, -1), keepdim=True))
        power = power + spectral.radial_profile(P).sum(0).cpu()
        distribution = spectral.spectrum_distribution(x, gamma=gamma, remove_dc=remove_dc)
        shares = shares + distribution.sum(0).cpu()
    rings = torch.arange(1, 17)
    power, shares = power / n * rings ** gamma, shares / n
    relative = power / power.sum()
    label = f"{name}: $f^{{-{spectral.fit_power_law(power):.2f}}}$"
    axes[0].loglog(rings, relative, marker="o", ms=3, label=label, **style)
    if descriptor:
        axes[1].plot(rings, shares, marker="o", ms=3, label=name, **style)
    last = shares.tolist() if descriptor else 16 * [""]
    rows.extend(zip(16 * [name], rings.tolist(), power.tolist(), relative.tolist(), last))
    return shares


@torch.no_grad()
def spectrum_figure(args, device):
    """
    Figs. 4, 5, 7, 8: radial power of the images (at the latents' size), of their flattened target,
    and of the latents of every autoencoder: figure and CSV. With --encoder also DINOv2's features,
    unit length per token; then autoencoders are not needed. With --published the authors' printed
    curves lie over yours, all in the paper's own form: log(1 + power), DC kept, features as the
    encoder scales them; they may be drawn alone.
    """
    run.need(args.encoder or not args.encoder_source,
             f"--encoder_source {args.encoder_source}: needs --encoder, the name of the model")
    models, published, rows, sizes = (), bool(args.published), [], set()
    if args.encoder:
        encoder = repa.load_encoder(args.encoder, args.encoder_source).to(device)
    if autoencoder_files(args) or not (args.encoder or published):
        models = autoencoders(args, device)
    elif args.encoder:
        models = [("", None, held_out_images(args, {}, device)[0])]
    panels = 2 if models else 1
    figure, (axes,) = subplots(1, panels, (6 * panels, 4.8))
    draw = partial(draw_curve, axes, rows, remove_dc=not published)
    printed = CURVES.get(args.published, {})
    for i, (name, shares) in enumerate(printed.items()):
        curve = f"{name}, published"
        axes[-1].plot(range(1, 17), shares, ls=":", lw=2, color=f"C{9 - i}", label=curve)
        rows += [(curve, ring, "", "", share) for ring, share in enumerate(shares, 1)]
        if name not in ("image", TARGET):
            kl = divergence(printed[TARGET], shares)
            print(f"published, {args.published}, {name}: KL(target || curve) {kl:.4f}")
    for i, (label, ae, images) in enumerate(models):
        grid = tuple(ae.latent_shape(images)[-2:] if ae else (s // 16 for s in images.shape[-2:]))
        small, curves = spectral.match_resolution(images, grid), {}
        if grid not in sizes:
            at = f", {grid[0]}x{grid[1]}" if sizes else ""
            sizes.add(grid)
            draw(f"images{at}", [small], color="black", lw=2)
            draw(f"target, gamma {args.gamma:g}{at}", [small], args.gamma, color="black", ls="--")
            if args.encoder:
                tokens = (encoder(x, grid) for x in images.split(args.batch_size))
                features = (x.mT.unflatten(2, grid) for x in tokens)      # (b, D, h, w)
                if not published:
                    features = (F.normalize(x, dim=1) for x in features)
                name = encoder_name(args) + at
                curves[name] = draw(name, features, descriptor=published, color="gray", ls="-.")
        if ae:
            latents = encode_all(ae, images, args.batch_size, args.seed)
            curves[label] = draw(label, [latents], color=f"C{i}")
        settings = dict(gamma=args.gamma, n=len(images), seed=args.seed)
        if published:
            target = spectral.spectrum_distribution(small, gamma=args.gamma, remove_dc=False)
            for name, curve in curves.items():
                yield (dict(kl_from_target=divergence(target.mean(0).cpu(), curve)),
                       dict(curve=name, **settings, rings=16, dc="kept", published=args.published))
        elif ae:
            yield dict(alpha=psd_exponent(latents), alpha_images=psd_exponent(small),
                       esm=esm_loss(images, latents, args.gamma).item(),
                       rmsc=spectral.rmsc(latents.flatten(2).mT).mean().item(),
                       std=latents.std().item()), \
                dict(autoencoder=label, **settings, latent="x".join(map(str, latents.shape[1:])))
    form = "The paper's form, DC kept" if published else "What ESM compares"
    axes[0].set(title="Radial power, each curve scaled to sum 1", ylabel="share of power")
    axes[-1].set(title=f"{form}: log(1 + power), scaled to sum 1", ylabel="", ylim=(0, None))
    for ax in axes:
        ax.set_xlabel("ring (1 = low frequency)")
        ax.legend(fontsize=8)
    write_table(args, figure, ("curve", "ring", "power", "share", "descriptor"), rows)


# ----------------------------------------------------------------------- bands, latents, similarity

def decode_lowpassed(ae, latents, masks, batch_size):
    """{n: decode(lowpass(z, n))}, images (N, 3, H, W), for each n of masks."""
    h, w = latents.shape[-2:]
    run.need(h % 8 == w % 8 == 0, f"--image_size: latents of {h}x{w} do not tile into 8x8 blocks")
    return {n: torch.cat([ae.decode(spectral.lowpass(z, n)) for z in latents.split(batch_size)])
            for n in masks}


def band_matrix(decoded):
    """
    The share of each band (anti-diagonal of 8x8 blocks) of the image in what a latent's band adds:
    decode_lowpassed with all n = 0 .. 14 -> (14, 15), latent bands 1 .. 14 by image bands 0 .. 14.
    """
    diagonal = (torch.arange(8)[:, None] + torch.arange(8)).flatten()  # of each coefficient
    matrix = torch.zeros(14, 15)
    for k in range(1, 15):                             # what appears between n = 15 - k and 14 - k
        added = spectral.block_dct2(decoded[14 - k] - decoded[15 - k])
        energy = added.square().mean((0, 1, 2, 3)).flatten().cpu()
        matrix[k - 1].index_add_(0, diagonal, energy)
    return matrix / matrix.sum(1, keepdim=True)


@torch.no_grad()
def bands_figure(args, device):
    """
    DSM made visible, for each autoencoder. Left: PSNR of decode(lowpass(z, n)) against
    lowpass(x, n) for every n. Right: what the k-th anti-diagonal of the latent's 8x8 blocks adds to
    those of the decoded image's blocks.
    """
    columns = len(autoencoder_files(args))
    figure, ((left, *others),) = subplots(1, 1 + columns, (4.6 + 3.6 * columns, 4))
    for ax, (label, ae, images) in zip(others, autoencoders(args, device)):
        latents = encode_all(ae, images, args.batch_size)
        decoded = decode_lowpassed(ae, latents, range(15), args.batch_size)
        scores = [psnr(decoded[n], spectral.lowpass(images, n)).mean().item() for n in decoded]
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
    save_figure(figure, args.out)
    print(f"wrote {args.out}")


def latents_figure(args, device):
    """Fig. 3: a few held-out images, and under them the latents of every autoencoder as PCA-RGB."""
    rows, shown = {}, None
    for label, ae, images in autoencoders(args, device):
        shown = images if shown is None else shown     # the same ones for all
        rows["image"] = shown * 0.5 + 0.5
        rows[label] = pca_rgb(encode_all(ae, shown, args.batch_size))
    figure_rows(rows, args.out)
    print(f"wrote {args.out}")
    return ()                                          # nothing is measured


def image_file(path, size, device):
    """One image, cropped, as (1, 3, size, size) on device; ValueError if it cannot be read."""
    try:
        pixels = np.array(center_crop(to_rgb(open_image(path)), size))
    except Exception as error:                         # no such file, or what decoders raise
        why = getattr(error, "strerror", None) or run.reason(error)
        raise ValueError(f"--image {path}: {why}; give another file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1


@torch.no_grad()
def similarity_figure(args, device):
    """
    Fig. 6: cosine similarity of one token to all tokens of an image, for the raw, spnorm and DoG
    targets, with the RMSC of each.
    """
    size, side = args.image_size, args.image_size // 14
    run.need(size % 14 == 0, f"--image_size {size}: must be a multiple of 14, the encoder's patch")
    token = side * side // 2 + side // 2 if args.token is None else args.token
    run.need(0 <= token < side * side, f"--token {token}: there are {side * side} tokens, numbered "
             "row by row from 0")
    if args.image:
        images = image_file(args.image, size, device)
    else:
        images, _, _ = held_out_images(args, {}, device)
    encoder = repa.load_encoder(args.encoder, args.encoder_source).to(device)
    # (N, T, D)
    tokens = torch.cat([encoder(x, (side, side)) for x in images.split(args.batch_size)])
    rows, values = {"image, token in red": images * 0.5 + 0.5}, {}
    y, x = 14 * (token // side), 14 * (token % side)
    red = torch.tensor([1.0, 0.2, 0.2], device=device)
    rows["image, token in red"][:, :, y:y + 14, x:x + 14] = red[:, None, None]
    for kind, label in dict(none="raw", spnorm="spnorm", dog="dog").items():
        target = F.normalize(repa.filter_target(tokens, kind, (side, side)), dim=-1)
        # (N, 1, h, w) in [-1, 1]
        cosine = (target @ target[:, token, :, None])[..., 0].view(-1, 1, side, side)
        contrast = values[f"rmsc_{kind}"] = spectral.rmsc(target).mean().item()
        rows[f"{label}\nRMSC {contrast:.2f}"] = (cosine * 0.5 + 0.5).expand(-1, 3, -1, -1)
    yield values, dict(encoder=encoder_name(args), n=len(images), token=token)
    figure_rows(rows, args.out)
    print(f"wrote {args.out} (black = opposite, white = equal)")


# -------------------------------------------------------------------------- logs of training runs

# What is drawn of a line of log.jsonl
PANELS = ("loss", "l1", "lpips", "kl", "esm", "align", "gan", "disc", "grad_norm", "disc_grad_norm",
          "val_psnr", "val_ssim", "val_esm")


def read_log(path):
    """The lines of a run's log.jsonl as dicts; path is the run's folder or the log."""
    path = path / "log.jsonl" if path.is_dir() else path
    run.need(path.is_file(), f"{path}: no such log; give a run's folder or its log.jsonl")
    lines = path.read_text(errors="replace").split("\n")[:-1]     # the last is being written
    try:
        return [dict(entry, step=entry["step"]) for entry in map(json.loads, lines)]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: not the log of a training run; give log.jsonl") from None


def curves_figure(args, device):
    """
    The log.jsonl of training runs in one figure, one colour per run: losses, gradient norms, PSNR
    and ESM divergence of held-out images, over steps. Runs may be going on.
    """
    from matplotlib import colormaps
    paths = [pathlib.Path(path) for path in dict.fromkeys(args.runs)]
    paths = [path.parent if path.name == "log.jsonl" else path for path in paths]
    names = unique_names(paths)
    logs = {name: read_log(path) for name, path in zip(names, paths)}
    print_differences(paths, names, "stage", "images", "image_size", "batch_size")
    for name, log in logs.items():
        if not log:
            print(f"{name}: has nothing to draw yet")
    logged = {key for log in logs.values() for entry in log for key in entry}
    shown = [panel for panel in PANELS if panel in logged]
    run.need(shown, f"{args.runs[0]}: no line of a log yet; try again later")
    columns, lines = min(3, len(shown)), -(-len(shown) // 3)
    figure, axes = subplots(lines, columns, (4.4 * columns, 3 * lines + 0.5))
    colors = colormaps["tab10" if len(logs) <= 10 else "turbo"].resampled(max(10, len(logs)))
    for ax in axes.flat[len(shown):]:
        ax.set_axis_off()
    for panel, ax in zip(shown, axes.flat):
        positive = not panel.endswith(("psnr", "ssim"))
        for i, log in enumerate(logs.values()):
            points = [(entry["step"], entry[panel]) for entry in log if panel in entry]
            steps, values = zip(*points) if points else ((), ())
            ax.plot(steps, values, color=colors(i), lw=1)
            positive = positive and not any(value <= 0 for value in values)
        ax.set(title=panel, xlabel="step", yscale="log" if positive else "linear")
    figure.legend(axes[0, 0].lines, list(logs), loc="outside lower center", fontsize=8,
                  ncols=min(4, len(logs)))
    save_figure(figure, args.out)
    print(f"wrote {args.out}")
    return ()                                          # nothing is measured
