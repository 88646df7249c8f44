"""
Every figure but that of spectral.py. What the scripts share: latents as colours (Fig. 3), grids of samples, labelled rows; and the figures of
evaluate.py:

    spectrum_figure     radial PSD of images and of latents                                       Figs. 5, 7, 8
    bands_figure        does a low-passed latent decode to the low-passed image?                  Sec. 3.3, Fig. 10
    latents_figure      latents as pictures                                                       Fig. 3
    similarity_figure   which tokens a token of an image resembles, for each target of REPA       Fig. 6

Those four take evaluate.py's flags and the device, yield (values, settings) as they measure, and write their figure at the end.
Pictures are in [0, 1] here, images that go through a network in [-1, 1].
"""
import csv
import io
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from data import center_crop, open_data, open_picture, reason, to_rgb, val_batches
from losses import esm_loss
from metrics import psnr
from repa import filter_target, load_encoder
from spectral import block_dct2, fit_power_law, lowpass, match_resolution, power_spectrum, radial_profile, rmsc, spectrum_distribution
from weights import load_autoencoder


def pca_rgb(latents):
    """
    The first three principal components over all cells of all latents as colours (Fig. 3).
    latents  (B, C, h, w), any C >= 1
    returns  (B, 3, h, w) in [0, 1]; mid-grey is the mean, two standard deviations of each component span half the range
    """
    B, C, h, w = latents.shape
    cells = latents.float().movedim(1, -1).reshape(-1, C)                                  # (B*h*w, C)
    cells = cells - cells.mean(0)
    with torch.autocast(latents.device.type, enabled=False):
        _, directions = torch.linalg.eigh(cells.T @ cells)                                 # ascending eigenvalues
    directions = directions[:, -3:].flip(-1)
    directions = directions * directions.sum(0).sign().where(directions.sum(0) != 0, torch.ones(()).to(directions))  # one sign for all
    components = F.pad(cells @ directions, (0, 3 - min(C, 3)))                             # (B*h*w, 3)
    components = components / (2 * components.std(0, correction=0)).clamp_min(1e-12)
    return (components * 0.25 + 0.5).clamp(0, 1).view(B, h, w, 3).movedim(-1, 1)


def picture_grid(images, path, columns=8):
    """Images (N, 3, H, W) in [0, 1], clipped, side by side as one PNG."""
    from torchvision.utils import save_image
    runtime.write_atomic(path, lambda file: save_image(images.float().cpu().clamp(0, 1), file, "png", nrow=columns, padding=2, pad_value=1.0))


def figure_rows(rows, path):
    """
    A grid of pictures with a label before every row, as PNG, or what the path's suffix says.
    rows     {label: (N, 3, h, w) in [0, 1]}; the N of all rows are equal, their sizes may differ (small ones are shown in blocks)
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns + 0.3, 1.3 * len(rows)), squeeze=False,
                                gridspec_kw=dict(wspace=0.04, hspace=0.04))
    for (label, images), line in zip(rows.items(), axes):
        line[0].set_ylabel(label, fontsize=8)
        for image, ax in zip(images, line):
            ax.imshow(image.float().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    runtime.write_atomic(path, lambda file: figure.savefig(file, format=pathlib.Path(path).suffix[1:] or "png", dpi=100, bbox_inches="tight"))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------------------
# The figures of evaluate.py

def some_images(args, trained, device):
    """The first args.val_images held-out images of --data (or of what the autoencoder was trained on): (N, 3, H, W) on device."""
    size = args.image_size or trained.get("image_size", 256)
    _, val_set = open_data(args.data or trained.get("data"), size, val_images=args.val_images, seed=trained.get("seed", 0))
    return torch.cat([images for images, _, _ in val_batches(val_set, args.batch_size, device=device)])


def autoencoders(args, device):
    """Yields (label, autoencoder, its training flags) for the files of --ae; labels are the runs' folder names."""
    files = args.ae or [str(path) for path in sorted(pathlib.Path().glob(f"out/ae/{args.preset}-*/ckpt.pt"))]
    if not files:
        raise FileNotFoundError(f"no out/ae/{args.preset}-*/ckpt.pt here; --ae: train autoencoders with train_ae.py, or give files")
    for file in files:
        yield runtime.run_name(file), load_autoencoder(file).to(device), runtime.checkpoint_args(file)


@torch.no_grad()
def encode_all(ae, images, batch_size, seed=None):
    """Latents (N, C, h, w) of images: posterior samples with a seed, modes without."""
    posteriors = [ae.encode(x) for x in images.split(batch_size)]
    if seed is None:
        return torch.cat([posterior.mode() for posterior in posteriors])
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([p.sample(torch.randn(p.mean.shape, generator=generator).to(p.mean.device)) for p in posteriors])


@torch.no_grad()
def spectrum_figure(args, device):
    """
    Radial power of the images (at the latents' size), their flattened target, and the latents of every autoencoder: figure and CSV.
    With --encoder also the DINOv2 features of the images, unit length per token (Fig. 7); then autoencoders are not needed.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if args.encoder_source and not args.encoder:
        raise ValueError(f"--encoder_source {args.encoder_source}: needs --encoder, the name of the model")
    encoder = load_encoder(args.encoder, args.encoder_source).to(device) if args.encoder else None
    nothing = not args.ae and not list(pathlib.Path().glob(f"out/ae/{args.preset}-*/ckpt.pt"))
    models = [(None, None, {})] if encoder and nothing else autoencoders(args, device)
    rings = np.arange(1, 17)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    rows, drawn = [], set()

    def draw(name, batches, gamma=0.0, descriptor=True, **style):
        """One curve of a set that comes as tensors (b, C, h, w); a descriptor only where the scale means something."""
        n, profile, shares = 0, 0, 0
        for x in batches:
            n += len(x)
            profile = profile + radial_profile(power_spectrum(x - x.mean((-2, -1), keepdim=True))).sum(0).cpu()
            shares = shares + spectrum_distribution(x, gamma=gamma).sum(0).cpu()
        profile, shares = profile / n * torch.arange(1, 17) ** gamma, shares / n
        left.loglog(rings, profile / profile.sum(), marker="o", ms=3, label=f"{name}: $f^{{-{fit_power_law(profile):.2f}}}$", **style)
        if descriptor:
            right.plot(rings, shares, marker="o", ms=3, label=name, **style)
        rows.extend(dict(curve=name, ring=r, power=p.item(), share=(p / profile.sum()).item(), descriptor=d.item() if descriptor else "")
                    for r, p, d in zip(rings, profile, shares))

    for label, ae, trained in models:
        images = some_images(args, trained, device)
        latents = encode_all(ae, images, args.batch_size, args.seed) if ae else None
        grid = tuple(latents.shape[-2:] if ae else (side // 16 for side in images.shape[-2:]))
        small = match_resolution(images, grid)
        if grid not in drawn:
            draw("images", [small], color="black", lw=2)
            draw(f"target, gamma {args.gamma:g}", [small], args.gamma, color="black", ls="--")
            if encoder:
                features = (F.normalize(encoder(x, grid), dim=-1).transpose(1, 2).unflatten(2, grid) for x in images.split(args.batch_size))
                draw("random encoder" if args.encoder_source == "random" else args.encoder, features, descriptor=False, color="gray", ls="-.")
        drawn.add(grid)
        if ae:
            draw(label, [latents])
            values = dict(alpha=fit_power_law(radial_profile(power_spectrum(latents)).mean(0)).item(),
                          alpha_images=fit_power_law(radial_profile(power_spectrum(small)).mean(0)).item(),
                          esm=esm_loss(images, latents, args.gamma).item(), rmsc=rmsc(latents.flatten(2).transpose(1, 2)).mean().item(),
                          std=latents.std().item())
            yield values, dict(autoencoder=label, gamma=args.gamma, n=len(images), latent="x".join(map(str, latents.shape[1:])))
    left.set(title="Radial power, each curve scaled to sum 1", xlabel="ring (1 = low frequency)", ylabel="share of power")
    right.set(title="What ESM compares: log(1 + power), scaled to sum 1", xlabel="ring (1 = low frequency)", ylim=(0, None))
    for ax in (left, right):
        ax.legend(fontsize=8)
    out = pathlib.Path(args.out or "out/spectrum.png")
    runtime.write_atomic(out, lambda file: figure.savefig(file, format=out.suffix[1:] or "png", dpi=90))
    plt.close(figure)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    runtime.write_atomic(out.with_suffix(".csv"), lambda file: file.write(text.getvalue().encode()))
    print(f"wrote {out}, {out.with_suffix('.csv')}")


@torch.no_grad()
def bands_figure(args, device):
    """
    DSM made visible, for each autoencoder. Left: PSNR of decode(lowpass(z, n)) against lowpass(x, n) for every n. Right: the band matrix;
    row k is what the k-th anti-diagonal of the latent's 8x8 blocks adds to the decoded image, by anti-diagonal of the image's blocks.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    models = list(autoencoders(args, device))
    figure, axes = plt.subplots(1, 1 + len(models), figsize=(4.6 + 3.6 * len(models), 4), layout="constrained", squeeze=False)
    diagonal = (torch.arange(8)[:, None] + torch.arange(8)).flatten()                      # anti-diagonal of each coefficient
    for ax, (label, ae, trained) in zip(axes[0, 1:], models):
        images = some_images(args, trained, device)
        latents = encode_all(ae, images, args.batch_size)
        if any(side % 8 for side in latents.shape[-2:]):
            raise ValueError(f"bands: {label}'s latents of {latents.shape[-2]}x{latents.shape[-1]} do not tile into 8x8 blocks; "
                             f"--image_size must be a multiple of {8 * ae.config.reduction}")
        decoded = {n: torch.cat([ae.decode(lowpass(z, n)) for z in latents.split(args.batch_size)]) for n in range(15)}
        scores = [psnr(decoded[n], lowpass(images, n)).mean().item() for n in range(15)]
        matrix = []
        for k in range(1, 15):                                                             # band k appears between n = 15 - k and 14 - k
            energy = block_dct2(decoded[14 - k] - decoded[15 - k]).square().mean((0, 1, 2, 3)).flatten().cpu()
            matrix.append(torch.zeros(15).index_add(0, diagonal, energy))
        matrix = torch.stack(matrix)
        matrix = matrix / matrix.sum(1, keepdim=True)
        axes[0, 0].plot(range(15), scores, "o-", ms=3, label=label)
        ax.imshow(matrix.numpy(), cmap="magma", vmin=0, origin="lower", extent=(-0.5, 14.5, 0.5, 14.5), aspect="auto")
        ax.set(title=f"{label}\nwhere each latent band lands", xlabel="band of the decoded image (0 = DC)", ylabel="band of the latent")
        yield (dict({f"psnr_n{n}": scores[n] for n in (0, 8, 10, 12)}, mean_image_band=(matrix @ torch.arange(15.0)).mean().item()),
               dict(autoencoder=label, n=len(images)))
    axes[0, 0].set(title="Does a low-passed latent decode\nto the low-passed image?", xlabel="n, anti-diagonals cut", ylabel="PSNR, dB")
    axes[0, 0].legend(fontsize=8)
    out = pathlib.Path(args.out or "out/bands.png")
    runtime.write_atomic(out, lambda file: figure.savefig(file, format=out.suffix[1:] or "png", dpi=90))
    plt.close(figure)
    print(f"wrote {out}")


def latents_figure(args, device):
    """Fig. 3: a few held-out images, and under them the latents of every autoencoder as PCA-RGB."""
    rows = {}
    for label, ae, trained in autoencoders(args, device):
        images = some_images(args, trained, device)
        rows.setdefault("image", images * 0.5 + 0.5)
        rows[label] = pca_rgb(encode_all(ae, images, args.batch_size))
    out = pathlib.Path(args.out or "out/latents.png")
    figure_rows(rows, out)
    print(f"wrote {out}")
    return ()                                                                              # nothing is measured


@torch.no_grad()
def similarity_figure(args, device):
    """Fig. 6: cosine similarity of one token to all tokens of an image, for the raw, spnorm and DoG targets, with the RMSC of each."""
    if args.image_size % 14:
        raise ValueError(f"--image_size {args.image_size}: must be a multiple of 14, the encoder's patch")
    side = args.image_size // 14
    if args.image:
        try:
            pixels = np.array(center_crop(to_rgb(open_picture(args.image)), args.image_size))
        except Exception as error:                                                         # no such file, or what decoders raise
            raise ValueError(f"--image {args.image}: {getattr(error, 'strerror', None) or reason(error)}; give another file") from None
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1
    else:
        images = some_images(args, {}, device)
    token = side * side // 2 + side // 2 if args.token is None else args.token
    if not 0 <= token < side * side:
        raise ValueError(f"--token {token}: there are {side * side} tokens, numbered row by row from 0")
    encoder = load_encoder(args.encoder, args.encoder_source).to(device)
    tokens = torch.cat([encoder(x, (side, side)) for x in images.split(args.batch_size)])  # (N, T, D)
    marked = (images * 0.5 + 0.5).clone()
    row, column = 14 * (token // side), 14 * (token % side)
    marked[:, :, row:row + 14, column:column + 14] = torch.tensor([1.0, 0.2, 0.2], device=device)[:, None, None]
    rows, values = {"image, token in red": marked}, {}
    for kind in ("none", "spnorm", "dog"):
        target = F.normalize(filter_target(tokens, kind, (side, side)), dim=-1)
        cosine = (target @ target[:, token, :, None])[..., 0].view(-1, 1, side, side)      # (N, 1, h, w) in [-1, 1]
        contrast = rmsc(target).mean().item()
        values[f"rmsc_{kind}"] = contrast
        rows[f"{'raw' if kind == 'none' else kind}\nRMSC {contrast:.2f}"] = (cosine * 0.5 + 0.5).expand(-1, 3, -1, -1)
    out = pathlib.Path(args.out or "out/similarity.png")
    figure_rows(rows, out)
    yield values, dict(encoder=args.encoder_source if args.encoder_source == "random" else args.encoder, n=len(images), token=token)
    print(f"wrote {out} (black = opposite, white = equal)")
