"""
Every number and figure of the project, by one command each.

    recon       PSNR, SSIM, LPIPS, rFID on held-out images                          Tables 2, 3
    gen         sample; FID, IS, KID, precision and recall, SWD, spectral KL;       Tables 2, 3, 4
                npz, grid
    fid A B     Frechet distance of two sets: folder, zip, npz of images or of statistics
    spectrum    radial PSD of images and of the latents of any autoencoders         Figs. 4, 5, 7, 8
    bands       does a low-passed latent decode to the low-passed image?            Alg. 2;
                which band feeds which?                                             our figure
    latents     latents as pictures, PCA to RGB                                     Fig. 3
    similarity  which tokens a token resembles, for each target of REPA             Fig. 6

The formulas are in metrics.py, the last four commands in figures.py. Every result is printed with
its settings and appended to results.jsonl with command, commit and hardware. Without the Inception
weights there is no FID, only the metrics that need none, under their own names.
"""
import argparse
import contextlib
import inspect
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import runtime
from data import LARGEST_SIDE, ImageSet, open_data, open_source, reason, spread, val_batches
from dit import DDPM, MODELS, Interpolant, NoiseStream
from figures import bands_figure, latents_figure, picture_grid, similarity_figure, spectrum_figure
from latents import autoencoder_hash, create_array, images_hash
from losses import PerceptualLoss
from metrics import (
    Moments,
    frechet_distance,
    load_inception,
    psnr,
    sliced_wasserstein,
    spectral_kl,
    ssim,
    to_uint8,
)
from weights import load_autoencoder

PRESETS = {
    "celeba-f16d16": {},
    "celeba-f8d4": {},
    "imagenet-f16d16": dict(cfg=1.8),
    "imagenet-repa": dict(cfg=1.8),
    "quick": dict(num_samples=128, steps=50, batch_size=64, val_images=128, reference_images=1000,
                  workers=0),
}


def report(values, settings, args, rank):
    """Print a result with its settings; append it to results.jsonl, with what finds it again."""
    if rank > 0:
        return
    number = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    print("  ".join(f"{k} {number(v)}" for k, v in values.items()))
    print("  with " + ", ".join(f"{k} {v}" for k, v in settings.items()), flush=True)
    commit = ""
    with contextlib.suppress(OSError):                 # no git here
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=pathlib.Path(__file__).parent,
            capture_output=True, text=True).stdout.strip()
    cuda = torch.cuda.is_available()
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    line = dict(values, **settings, command=" ".join(["evaluate.py", *sys.argv[1:]]),
                commit=commit, hardware=torch.cuda.get_device_name() if cuda else cores,
                torch=torch.__version__, time=time.strftime("%Y-%m-%d %H:%M:%S"))
    pathlib.Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    with open(args.results, "a") as file:
        file.write(json.dumps(line) + "\n")


def warn_small(n, rank=0):
    """Say once that FID needs many images."""
    if n < 10_000 and rank == 0:
        print(f"FID@{n}: with fewer than 10,000 images FID is biased upwards; compare it only "
              "with FID at the same N")


def load_everywhere(load, rank, device):
    """load() on every rank; None on all, and rank 0's reason printed, if it failed on any."""
    network = None
    try:
        with runtime.first_of_node():
            network = load()
    except FileNotFoundError as error:
        if rank == 0:
            print(error)
    return network if runtime.everywhere(network is not None, device) else None


def shared_array(path, dtype, shape, rank):
    """A memory-mapped .npy that all ranks write into, each its rows."""
    if rank == 0:
        create_array(f"{path} of {shape[0]:,} rows", path, dtype, shape)
    runtime.barrier()
    return np.load(path, mmap_mode="r+")


def inception_statistics(inception, batches, keep, folder, rank, device):
    """
    Stream a set, spread over the ranks as batches of (uint8 images, row numbers), through the
    Inception network.
    keep     ascending row numbers whose features and logits are wanted, for the metrics that cannot
             be streamed
    returns  n, mean, covariance over all ranks; and on rank 0 the kept features (k, 2048) and
             logits (k, 1008), else None
    """
    moments = Moments(2048, device)
    files = [folder / ".features.npy", folder / ".logits.npy"]
    arrays = [shared_array(file, np.float32, (len(keep), width), rank)
              for file, width in zip(files, (2048, 1008))]
    for images, rows in batches:
        values = inception(images)
        moments.add(values[0])
        places = np.searchsorted(keep, rows)
        wanted = keep[np.minimum(places, len(keep) - 1)] == rows
        for array, value in zip(arrays, values):
            array[places[wanted]] = value.cpu().numpy()[wanted]
    for array in arrays:
        array.flush()
    n, mean, cov = moments.mean_cov()
    runtime.barrier()
    if rank > 0:
        return n, mean, cov, None, None
    features, logits = (torch.from_numpy(np.load(file)) for file in files)
    for file in files:
        file.unlink()
    readable = logits.any(1)                           # rows of unreadable images stay 0
    return n, mean, cov, features[readable], logits[readable]


def evaluate_recon(args, rank, world, device):
    """
    Held-out images through the autoencoder: PSNR, SSIM, L1, LPIPS and rFID, as far as weights can
    be had.
    """
    args.ae = args.ae or runtime.newest(f"out/ae/{args.preset}-*/ckpt.pt",
                                        "--ae: train one with train_ae.py, or give a file")
    ae = load_autoencoder(args.ae).to(device)
    trained = runtime.checkpoint_args(args.ae)
    data = args.data or trained.get("data")
    size = args.image_size or trained.get("image_size", 256)
    if size < 11 or size % ae.config.reduction:
        raise ValueError(f"--image_size {size}: must be at least 11, SSIM's window, and a multiple "
                         f"of {ae.config.reduction}, the reduction of {args.ae}")
    _, val_set = open_data(data, size, val_images=args.val_images, seed=trained.get("seed", 0))
    lpips = load_everywhere(lambda: PerceptualLoss().to(device), rank, device)
    inception = load_everywhere(lambda: load_inception(device), rank, device)
    names = ["psnr", "ssim", "l1"] + ["lpips"] * bool(lpips)
    sums = torch.zeros(1 + len(names), dtype=torch.float64)
    moments = [Moments(2048, device) for _ in range(2)] if inception else []
    with torch.no_grad():
        for images, _, _ in val_batches(val_set, args.batch_size * world, rank=rank, world=world,
                                        workers=args.workers, device=device):
            recon = ae.decode(ae.encode(images).mode()).float()
            scores = [torch.ones(len(images)), psnr(recon, images), ssim(recon, images),
                      (recon - images).abs().flatten(1).mean(1)]
            if lpips:
                pairs = zip(recon.clamp(-1, 1), images)
                scores.append(torch.stack([lpips(a[None], b[None]) for a, b in pairs]))
            sums += torch.stack([score.cpu().double() for score in scores]).sum(1)
            for moment, x in zip(moments, (recon, images)):
                moment.add(inception(to_uint8(x))[0])
    sums = runtime.all_sum(sums.to(device)).cpu()
    values = dict(zip(names, (sums[1:] / sums[0]).tolist()))
    if moments and sums[0] > 1:
        (n, *a), (_, *b) = (moment.mean_cov() for moment in moments)
        warn_small(n, rank)
        values[f"rFID@{n}"] = frechet_distance(*a, *b)
    settings = dict(ae=args.ae, data=data or "built-in", size=size, n=int(sums[0]))
    report(values, settings, args, rank)


def load_diffusion(path, ae_path, device):
    """
    A run of train_diffusion.py, ready to sample: (EMA model, process, autoencoder with the run's
    statistics, checkpoint).
    """
    checkpoint = runtime.load_checkpoint(path, "diffusion")
    try:
        model = MODELS[checkpoint["model_name"]](**checkpoint["model_args"])
        model.load_state_dict(checkpoint["ema"])
        missing = {"ae", "autoencoder", "latent_mean", "latent_std", "image_size", "data",
                   "data_seed", "step"} - checkpoint.keys()
        finite = not missing and all(tensor.isfinite().all() for tensor in (
            *checkpoint["ema"].values(), checkpoint["latent_std"]))
    except Exception as error:                         # a foreign file breaks this in any way
        raise ValueError(f"--ckpt {path}: not what this version of train_diffusion.py writes "
                         f"({reason(error)})") from None
    if not finite:
        fault = f"has no {min(missing)}" if missing else "its weights are not finite"
        raise ValueError(f"--ckpt {path}: {fault}; take an earlier checkpoint")
    ae_path = ae_path or checkpoint["ae"]
    ae = load_autoencoder(ae_path)
    if autoencoder_hash(ae) != checkpoint["autoencoder"]:
        raise ValueError(f"--ae {ae_path}: not the autoencoder on whose latents {path} was trained")
    ae.set_latent_stats(checkpoint["latent_mean"], checkpoint["latent_std"])
    process = DDPM() if checkpoint["model_name"].startswith("UViT") else Interpolant()
    model = model.to(device).eval().requires_grad_(False)
    return model, process, ae.to(device).requires_grad_(False), checkpoint


@torch.no_grad()
def sample_images(model, process, ae, indices, args, device, dtype):
    """Samples number `indices` of --seed, whatever the batch or rank: (b, 3, H, W) uint8."""
    options = dict(steps=args.steps, noise=NoiseStream(args.seed, indices),
                   cfg_interval=tuple(args.cfg_interval))
    if isinstance(process, Interpolant):
        options["sampler"] = args.sampler
    if model.num_classes:
        labels = torch.as_tensor(indices, device=device) % model.num_classes
        options |= dict(y=labels, cfg=args.cfg)
    shape = (len(indices), model.in_channels, *model.input_size)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        z = process.sample(model, shape, **options)
    return to_uint8(ae.decode(ae.denormalize(z)))      # float32: bf16 is coarser than a grey level


def write_samples(draw, size, out, args, rank, world):
    """All samples of draw(indices), a file of (N, H, W, 3) uint8, and the seconds they took."""
    file = out / "samples.npy"
    samples = shared_array(file, np.uint8, (args.num_samples, size, size, 3), rank)
    start = time.perf_counter()
    mine = np.arange(rank, args.num_samples, world)
    with tqdm(total=args.num_samples, unit="img", desc="sampling",
              disable=rank > 0 or not sys.stderr.isatty()) as progress:
        for indices in np.array_split(mine, max(1, math.ceil(len(mine) / args.batch_size))):
            if not len(indices):
                continue
            samples[indices] = draw(indices).movedim(1, -1).cpu().numpy()
            if args.folder:
                (out / "images").mkdir(exist_ok=True)
                for i in indices:
                    Image.fromarray(samples[i]).save(out / "images" / f"{i:06d}.png")
            progress.update(len(indices) * world)
    samples.flush()
    runtime.barrier()
    return np.load(file, mmap_mode="r"), time.perf_counter() - start


def evaluate_gen(args, rank, world, device):
    """
    Sample images, write them (grid.png, samples.npz for the ADM evaluation suite), and compare them
    with the training images.
    """
    args.ckpt = args.ckpt or runtime.newest(f"out/diffusion/{args.preset}-*/ckpt.pt",
                                            "--ckpt: train one with train_diffusion.py")
    model, process, ae, checkpoint = load_diffusion(args.ckpt, args.ae, device)
    if args.cfg != 1 and not model.num_classes:
        raise ValueError(f"--cfg {args.cfg}: {args.ckpt} is unconditional, it has no null class to "
                         "guide away from; leave --cfg at 1")
    if args.steps > 1000 and isinstance(process, DDPM):
        raise ValueError(f"--steps {args.steps}: {args.ckpt} has 1000 noise levels, so take at "
                         "most 1000")
    size, data = checkpoint["image_size"], args.data or checkpoint["data"]
    out = pathlib.Path(args.out or pathlib.Path(args.ckpt).parent / "samples")
    train_set, _ = open_data(data, size, seed=checkpoint["data_seed"])
    reference_set = spread(train_set, args.reference_images or len(train_set))
    stored_statistics(reference_set)                   # what is wrong with them, before sampling
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")

    draw = lambda indices: sample_images(model, process, ae, indices, args, device, dtype)
    samples, seconds = write_samples(draw, size, out, args, rank, world)
    values = {}
    inception = load_everywhere(lambda: load_inception(device), rank, device)
    if inception:
        values = inception_metrics(inception, samples, reference_set, out, args, rank, world,
                                   device)
    count = min(args.num_samples, len(reference_set), 2048)  # in memory, unlike all else here
    if rank == 0:
        fake = torch.from_numpy(samples[:count].copy()).movedim(-1, 1).float() / 127.5 - 1
        batches = val_batches(spread(reference_set, count), args.batch_size)
        real = torch.cat([images for images, _, _ in batches])
        for side, distance in sliced_wasserstein(fake, real).items():
            values[f"SWD_{side}px"] = distance
        values["spectral_KL"] = spectral_kl(fake, real)
        picture_grid(fake[:64] * 0.5 + 0.5, out / "grid.png")
        runtime.write_atomic(out / "samples.npz", lambda file: np.savez(file, arr_0=samples))
    report(values, dict(
        ckpt=args.ckpt, step=checkpoint["step"], model=checkpoint["model_name"],
        n=args.num_samples, sampler=args.sampler if isinstance(process, Interpolant) else "ddim",
        steps=args.steps, cfg=args.cfg, cfg_interval=args.cfg_interval, seed=args.seed,
        dtype=dtype, weights="torch-fidelity" if inception else "none",
        reference=f"{len(reference_set)} training images of {data or 'built-in'} at {size} px",
        swd_images=count, seconds=round(seconds, 1)), args, rank)
    if rank == 0:
        (out / "samples.npy").unlink()
        print(f"wrote {out}/grid.png, {out}/samples.npz" + f", {out}/images/" * args.folder)


def stored_statistics(reference_set):
    """
    Where the Inception statistics of a set are kept, what they are of, and the arrays if they are
    there, else None; ValueError if they are of something else, or damaged.
    """
    identity = images_hash(reference_set)
    file = pathlib.Path("out/reference") / f"{identity}-{reference_set.size}.npz"
    how = dict(images=identity, size=reference_set.size, n=len(reference_set),
               crop="ADM centre crop, 8 bit", network="torch-fidelity")
    stored = read_npz(file, "mu", "sigma", "features", "how") if file.exists() else None
    if stored is not None and (len(stored) < 4 or str(stored["how"]) != json.dumps(how)):
        raise ValueError(f"{file}: statistics of {stored.get('how')}, wanted {json.dumps(how)}; "
                         "remove the file")
    return file, how, stored


def read_npz(file, *names):
    """
    {name: array} of those names that a .npz holds, nothing unpickled; ValueError if it is damaged,
    or mu and sigma are no moments.
    """
    try:
        with np.load(file) as archive:
            found = {name: archive[name] for name in names if name in archive.files}
        if {"mu", "sigma"} <= found.keys():
            mu, sigma = found["mu"], found["sigma"]
            finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
            if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not finite:
                raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} are no finite mean and "
                                 "covariance")
    except Exception as error:                         # a damaged file breaks its reader in any way
        raise ValueError(f"{file}: no usable .npz ({reason(error)}); remove it, or make it "
                         "anew") from None
    return found


def inception_metrics(inception, samples, reference_set, out, args, rank, world, device):
    """
    FID, IS, KID, precision and recall of samples (N, H, W, 3) against a set of data.py, whose
    statistics are kept in out/reference.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    n = len(samples)
    warn_small(n, rank)
    chunks = np.array_split(np.arange(rank, n, world),
                            max(1, math.ceil(n / world / args.batch_size)))
    batches = ((torch.from_numpy(samples[i]).movedim(-1, 1), i) for i in chunks if len(i))
    _, mean, cov, fake, logits = inception_statistics(inception, batches, np.arange(n), out, rank,
                                                      device)
    reference, how, stored = stored_statistics(reference_set)
    if not stored:                                     # on all ranks: rank 0 writes it later
        loader = val_batches(reference_set, args.batch_size * world, rank=rank, world=world,
                             workers=args.workers, device=device)
        batches = ((to_uint8(images), indices.numpy()) for images, _, indices in loader)
        # spread over the classes
        keep = np.unique(np.linspace(0, len(reference_set) - 1, 10_000).astype(np.int64))
        m, mu, sigma, features, _ = inception_statistics(inception, batches, keep, out, rank,
                                                         device)
        if rank == 0:
            runtime.write_atomic(reference, lambda file: np.savez(
                file, mu=mu.numpy(), sigma=sigma.numpy(), features=features.numpy(), readable=m,
                how=json.dumps(how)))
        runtime.barrier()
        _, _, stored = stored_statistics(reference_set)
    values = {f"FID@{n}": frechet_distance(mean, cov, stored["mu"], stored["sigma"])}
    if rank == 0:
        values["IS"] = isc_features_to_metric(logits, splits=min(10, n))["inception_score_mean"]
        # the rest on at most 10,000 of each
        fake, real = fake[:10_000], torch.from_numpy(stored["features"])
        size = min(1000, len(fake), len(real))
        kid = kid_features_to_metric(fake, real, kid_subset_size=size, verbose=False)
        values[f"KID_x1e3_subset{size}"] = 1000 * kid["kernel_inception_distance_mean"]
        if min(len(fake), len(real)) > 3:
            found = prc_features_to_metric(fake, real, verbose=False)
            values |= {k: float(v) for k, v in found.items() if k in ("precision", "recall")}
    return values


def image_set(spec, size, batch_size):
    """
    A folder, zip, 'cifar10', or an npz's images (N, H, W, 3) uint8, as batches of uint8
    (b, 3, H, W), and its length.
    """
    if isinstance(spec, np.ndarray):
        starts = range(0, len(spec), batch_size)
        return (torch.from_numpy(spec[i:i + batch_size]).movedim(-1, 1) for i in starts), len(spec)
    source = open_source(spec)
    n = len(source.names)
    dataset = ImageSet(spec, source, np.arange(n), np.zeros(n, np.int64), [], size)
    return (to_uint8(images) for images, _, _ in val_batches(dataset, batch_size)), n


def evaluate_fid(args, rank, world, device):
    """
    Frechet distance of two sets, each a folder, a zip, an npz of images (arr_0, as it is) or an npz
    of statistics (mu, sigma).
    """
    inception, statistics, counts = None, [], []
    size = args.image_size or 256
    for spec in (args.a, args.b):
        if not (os.path.exists(spec) or spec == "cifar10"):
            raise FileNotFoundError(f"{spec}: no such folder, .zip or .npz")
        images = spec
        if spec.endswith(".npz"):
            found = read_npz(spec, "mu", "sigma", "arr_0")
            if {"mu", "sigma"} <= found.keys():
                statistics.append((found["mu"], found["sigma"]))
                continue
            images = found.get("arr_0")
            if (images is None or images.dtype != np.uint8 or images.ndim != 4
                    or images.shape[-1] != 3):
                raise ValueError(f"{spec}: holds neither mu and sigma nor arr_0 (N, H, W, 3) uint8")
        batches, n = image_set(images, size, args.batch_size)
        if n < 2:
            raise ValueError(f"{spec}: needs two images or more, holds {n}")
        inception = inception or load_inception(device)
        moments = Moments(2048, device)
        for x in tqdm(batches, total=math.ceil(n / args.batch_size),
                      disable=not sys.stderr.isatty()):
            moments.add(inception(x)[0])
        n, *moments = moments.mean_cov()
        statistics.append(moments)
        counts.append(n)
    (a, _), (b, _) = statistics
    if len(a) != len(b):
        raise ValueError(f"{args.a} and {args.b}: features of {len(a)} and {len(b)} dimensions "
                         "cannot be compared; make both with one network")
    name = f"FID@{min(counts)}" if counts else "FID"
    if counts:
        warn_small(min(counts))
    distance = frechet_distance(*statistics[0], *statistics[1])
    report({name: distance}, dict(a=args.a, b=args.b, size=size), args, rank)


# --------------------------------------------------------------------------------------------------
# The command line

def check_place(flag, path, folder=False, figure=False):
    """ValueError now, not after hours, unless a folder or file can be written at path."""
    path = pathlib.Path(path)
    # what exists of it; the rest is made when it is needed
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    fits = there.is_dir() if folder or there != path else there.is_file()
    wanted = "folder" if folder else "file"
    if figure:
        from matplotlib.backend_bases import FigureCanvasBase
        fits = fits and path.suffix[1:] in {"", *FigureCanvasBase.filetypes}
        wanted = "file .png, .pdf or .svg"
    if not fits or not os.access(there, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot be written there; name a {wanted}")


def get_args():
    """The command line: a command, and its flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function, many=False, ae=True):
        """A command with the flags that it shares with others; returns its add_argument."""
        text = inspect.getdoc(function)
        p = commands.add_parser(name, help=text.split("\n\n")[0], description=text,
                                allow_abbrev=False, formatter_class=raw)
        p.set_defaults(function=function)
        add = p.add_argument
        add("--preset", choices=PRESETS, default="celeba-f16d16",
            help="a named group of defaults; explicit flags win")
        if ae:
            which = "all" if many else "the newest"
            add("--ae", nargs="+" if many else None, help="autoencoder(s): ckpt.pt or released "
                f"weights (default: {which} of out/ae/<preset>-*/ckpt.pt)")
        add("--data", help="folder, .zip or cifar10 (default: what was trained on; similarity: "
            "built-in)")
        add("--image_size", type=int, default=224 if name == "similarity" else None,
            help="pixels a side (default: as in training; similarity: 224)")
        add("--batch_size", type=int, default=50, help="images per network call and process")
        if name not in ("gen", "fid"):
            few = name in ("latents", "similarity")
            add("--val_images", type=int, default=8 if few else 1000, help="held-out images to use")
        if name in ("recon", "gen"):
            add("--workers", type=int, default=4, help="loader processes")
        if name in ("gen", "spectrum"):
            add("--seed", type=int, default=0, help="of every draw, >= 0")
        add("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
        add("--out", help="file or folder to write (default: under out/)")
        add("--results", default="results.jsonl", help="every result is appended here")
        return add

    command("recon", evaluate_recon)
    add = command("gen", evaluate_gen)
    add("--ckpt", help="ckpt.pt of train_diffusion.py (default: the newest "
        "out/diffusion/<preset>-*/ckpt.pt)")
    add("--num_samples", type=int, default=50_000, help="how many images to sample")
    add("--steps", type=int, default=100, help="network calls per sample")
    add("--sampler", choices=("em", "ode"), default="em",
        help="of SiT: Euler-Maruyama or Euler ODE (U-ViT: always DDIM)")
    add("--cfg", type=float, default=1.0, help="guidance scale; 1 = off (paper: 1.8 on ImageNet)")
    add("--cfg_interval", type=float, nargs=2, default=(0.0, 1.0),
        help="times between which guidance acts, 0 = data")
    add("--dtype", choices=("fp32", "bf16"), default=None,
        help="of the transformer (default: bf16 on cuda, fp32 on cpu)")
    add("--reference_images", type=int, default=0, help="training images to compare with; 0 = all")
    add("--folder", action="store_true", help="also write every sample as a PNG")
    add = command("fid", evaluate_fid, ae=False)
    add("a")
    add("b")
    spectrum = command("spectrum", spectrum_figure, many=True)
    spectrum("--gamma", type=float, default=1.0, help="flattening exponent of the target")
    command("bands", bands_figure, many=True)
    command("latents", latents_figure, many=True)
    similarity = command("similarity", similarity_figure, ae=False)
    similarity("--image", help="an image file (default: the first --val_images held-out images of "
               "--data)")
    similarity("--token", type=int,
               help="number of the token, row by row from 0 (default: the middle)")
    spectrum("--encoder", help="DINOv2 model, whose features are drawn beside the latents (Fig. 7)")
    similarity("--encoder", default="dinov2_vitb14", help="DINOv2 model")
    for add in (spectrum, similarity):
        add("--encoder_source",
            help="a local clone of facebookresearch/dinov2, or random (for tests)")

    chosen = next((word for word in sys.argv[1:] if word in commands.choices), None)
    subparser, known = commands.choices.get(chosen), set()
    if subparser and chosen not in ("latents", "similarity"):  # their few images are for the eye
        known = {action.dest for action in subparser._actions}
    presets = {}
    for name, values in PRESETS.items():
        presets[name] = {flag: value for flag, value in values.items() if flag in known}
    return runtime.parse_args(parser, presets, subparser)


def check_flags(args):
    """ValueError naming the first flag whose value makes no sense, before anything is read."""
    for name, low, high in (
            ("val_images", 1, math.inf), ("batch_size", 1, math.inf), ("num_samples", 2, math.inf),
            ("steps", 2, math.inf), ("image_size", 8, LARGEST_SIDE), ("workers", 0, 1024),
            ("seed", 0, 2 ** 63), ("cfg", 0, math.inf),
            ("gamma", 0, 10)):                         # 16^gamma is to fit float32
        value = getattr(args, name, None)
        if value is not None and not (low <= value <= high and value < math.inf):
            raise ValueError(f"--{name} {value}: must lie in {low}..{high}")
    n = getattr(args, "reference_images", 0)
    if n < 0 or n == 1:
        raise ValueError(f"--reference_images {n}: must be 0 for all, or at least 2")
    start, end = getattr(args, "cfg_interval", (0, 1))
    if not 0 <= start <= end <= 1:
        raise ValueError(f"--cfg_interval {start} {end}: must be two times in order, from 0 = data "
                         "to 1 = noise")
    check_place("--results", args.results)
    if args.out and args.command not in ("recon", "fid"):  # which write no more than a result
        gen = args.command == "gen"
        check_place("--out", args.out, folder=gen, figure=not gen)


def main():
    args = get_args()
    rank, world, device = runtime.start_processes(args.device)
    if world > 1 and args.command not in ("recon", "gen"):
        raise ValueError(f"{args.command}: runs in one process; start it without torchrun")
    check_flags(args)
    if args.command in ("recon", "gen", "fid"):
        args.function(args, rank, world, device)
    else:
        for values, settings in args.function(args, device):  # a figure, and what it measures
            report(values, settings, args, rank)
    runtime.barrier()


if __name__ == "__main__":
    with runtime.one_line_errors():
        main()
