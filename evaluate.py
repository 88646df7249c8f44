"""
Every number and figure of the project, by one command each.

    recon       PSNR, SSIM, LPIPS, rFID on held-out images; or as the authors       Tables 2, 3
                measured them
    gen         sample; FID, IS, KID, precision and recall, SWD, spectral KL;       Tables 2, 3, 4
                npz, grid; --every: of all checkpoints that a run kept
    fid A B     Frechet distance of two sets: folder, zip, npz of images or of statistics
    spectrum    radial PSD of images and of the latents of any autoencoders         Figs. 4, 5, 7, 8
                --published: beside the authors' own curves
    bands       does a low-passed latent decode to the low-passed image?            Alg. 2;
                which band feeds which?                                             our figure
    latents     latents as pictures, PCA to RGB                                     Fig. 3
    similarity  which tokens a token resembles, for each target of REPA             Fig. 6
    curves      what the logs of training runs say, also while they run             our figure
    denoise     how much of the learnable power a network has learnt                Prop. 3.1
    trajectory  in which order sampling brings the frequencies in                   Sec. 3.2
    diffusability   what can be known of autoencoders before any diffusion          Table 1

The formulas are in metrics.py, sets of images in fid.py, the last three commands in theory.py, the
five before them in figures.py.
Every result is printed with its settings and appended to results.jsonl with command, commit and
hardware. Without the Inception weights there is no FID, only the metrics that need none, under
their own names.
"""
import argparse
import contextlib
import functools
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

from analysis.fid import (
    brought_moments,
    compare,
    meeting_side,
    open_set,
    read_reference,
    shared_array,
    stored_statistics,
    training_images,
    warn_small,
)
from analysis.figures import (
    bands_figure,
    curves_figure,
    latents_figure,
    similarity_figure,
    spectrum_figure,
    unique_names,
)
from analysis.published import CURVES
from analysis.samples import publish, sample_images, write_samples
from analysis.theory import denoise_figure, diffusability_rows, trajectory_figure
from common import run
from common.data import LARGEST_SIDE, open_data, spread, val_batches
from common.metrics import (
    Moments,
    frechet_distance,
    jpeg_round_trip,
    load_inception,
    psnr,
    ssim,
    to_uint8,
)
from common.weights import checkpoint_files, load_autoencoder, load_diffusion
from dit import DDPM, Interpolant, NoiseStream
from losses import PerceptualLoss

PRESETS = {
    "celeba-f16d16": {},
    "celeba-f8d4": {},
    "imagenet-f16d16": dict(cfg=1.8),
    "imagenet-repa": dict(cfg=1.8),
    "one-gpu": dict(num_samples=10_000),
    "quick": dict(num_samples=128, steps=50, batch_size=64, val_images=128, reference_images=1000,
                  workers=0),
}


def report(values, settings, args, compute):
    """Print a result with its settings; append it to results.jsonl, with what finds it again."""
    if compute.rank > 0:
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


def load_everywhere(load, compute, instead=""):
    """
    load() on every rank; None on all, and rank 0's reason printed, if it failed on any.
    instead  what goes on without it, in the place of what a training script could do
    """
    network = None
    try:
        with run.local_rank_zero_first():
            network = load()
    except FileNotFoundError as error:
        why, _, other = str(error).partition(", or train without it")
        compute.say(why + (f"; {instead}" if instead and other else other))
    there = run.all_agree(network is not None, compute.device)
    return network if there else None


# --------------------------------------------------------------------------------------------------
# Reconstructions

@torch.no_grad()
def reconstruct(ae, images, indices, args):
    """
    Images (b, 3, H, W) in [-1, 1] decoded again, as --protocol says: from the posterior's mode, or
    from its sample, drawn from (--seed, index in the set).
    """
    posterior = ae.encode(images)
    if args.protocol == "plain":
        return ae.decode(posterior.mode()).float()
    noise = NoiseStream(args.seed, indices.tolist())(posterior.mean.shape)
    return ae.decode(posterior.sample(noise.to(images.device))).float()


def evaluate_recon(args, compute):
    """
    Images through the autoencoder: PSNR, SSIM, L1, LPIPS and rFID, as far as weights can be had.

    --protocol plain: held-out images, decoded from the posterior's mode. --protocol authors, as the
    paper's authors measured: the training images, decoded from a posterior sample; for rFID and
    PSNR both sides go through JPEG first, as PIL and torchvision save it (quality 75), and SSIM is
    of images clamped to [-1, 1]. They drew 50,000 of CelebA's training images with repetition and
    mirrors; here each counts once, as it is.
    """
    device, authors = compute.device, args.protocol == "authors"
    args.ae = args.ae or run.newest(f"out/ae/{args.preset}-*/ckpt.pt",
                                        "--ae: train one with train_ae.py, or give a file")
    ae = load_autoencoder(args.ae).to(device)
    trained = run.checkpoint_args(args.ae)
    data = args.data or trained.get("data")
    size = args.image_size or trained.get("image_size", 256)
    if size < 11 or size % ae.config.reduction:
        raise ValueError(f"--image_size {size}: must be at least 11, SSIM's window, and a multiple "
                         f"of {ae.config.reduction}, the reduction of {args.ae}")
    split = args.split or ("train" if authors else "val")
    train_set, images = open_data(data, size, val_images=args.val_images or 1000,
                                  seed=trained.get("seed", 0))
    if split == "train":
        images = spread(train_set, args.val_images or len(train_set))
    lpips = load_everywhere(lambda: PerceptualLoss().to(device), compute,
                            "recon goes on without LPIPS")
    inception = load_everywhere(lambda: load_inception(device), compute)
    names = ["psnr", "ssim", "l1"] + ["lpips"] * bool(lpips)
    sums = torch.zeros(1 + len(names), dtype=torch.float64)
    moments = [Moments(2048, device) for _ in range(2)] if inception else []
    for batch, _, indices in val_batches(images, args.batch_size * compute.world,
                                         rank=compute.rank, world=compute.world,
                                         workers=args.workers, device=device):
        recon = reconstruct(ae, batch, indices, args)
        pair = [to_uint8(recon), to_uint8(batch)]          # as files hold them
        if authors:
            pair = [jpeg_round_trip(x) for x in pair]
        scores = [torch.ones(len(batch)), psnr(*(x / 127.5 - 1 for x in pair)),
                  ssim(recon.clamp(-1, 1) if authors else recon, batch),
                  (recon - batch).abs().flatten(1).mean(1)]
        if lpips:
            sides = zip(recon.clamp(-1, 1), batch)
            scores.append(torch.stack([lpips(a[None], b[None]) for a, b in sides]))
        sums += torch.stack([score.cpu().double() for score in scores]).sum(1)
        for moment, x in zip(moments, pair):
            moment.add(inception(x)[0])
    sums = run.all_sum(sums.to(device)).cpu()
    values = dict(zip(names, (sums[1:] / sums[0]).tolist()))
    if moments and sums[0] > 1:
        (n, *a), (_, *b) = (moment.mean_cov() for moment in moments)
        warn_small(n, compute)
        values[f"rFID@{n}"] = frechet_distance(*a, *b)
    report(values, dict(
        ae=args.ae, protocol=args.protocol, split=split, data=data or "built-in", size=size,
        n=int(sums[0]), posterior="sample" if authors else "mode",
        seed=args.seed if authors else "none",
        jpeg="quality 75, both sides, for rFID and PSNR" if authors else "none",
        weights="torch-fidelity" if inception else "none"), args, compute)


# --------------------------------------------------------------------------------------------------
# Samples

def evaluate_gen(args, compute):
    """
    Sample images, write them (grid.png, samples.npz for the ADM evaluation suite), and compare them
    with the training images.

    Several --ckpt, or --every, are sampled one after the other, each into a folder of its own, with
    a line of results each; the best is printed at the end. That is how the steps of Table 2 were
    found.
    """
    run.need_one_node("gen: the file of samples")
    files = checkpoint_files(args)
    inception = functools.cache(
        lambda: load_everywhere(lambda: load_inception(compute.device), compute))
    results = []
    for file, name in zip(files, unique_names(files)):
        parent = pathlib.Path(file).parent
        out = pathlib.Path(args.out or parent / "samples")
        if len(files) > 1:
            out = out / name if args.out else parent / f"samples-{pathlib.Path(file).stem}"
        results.append((file, *evaluate_checkpoint(file, out, inception, args, compute)))
    if len(files) > 1:
        compute.say(best_line(results))


def best_line(results):
    """Which of [(file, step, values)] has the smallest FID, or SWD where there is no FID."""
    for metric, said in (("FID", ""), ("SWD", "no FID to compare; ")):
        keys = [key for *_, values in results for key in values if key.startswith(metric)]
        if keys:                                       # SWD: the finest level, which comes first
            value, step, file = min((values[keys[0]], step, file) for file, step, values in results
                                    if keys[0] in values)
            return f"{said}best of {len(results)}: {keys[0]} {value:.4g} at step {step}, {file}"
    return "no FID or SWD to compare"


def evaluate_checkpoint(file, out, inception, args, compute):
    """
    Sample one checkpoint into the folder out, compare, report.
    inception  returns the Inception network, or None where its weights cannot be had
    returns    step, values
    """
    model, process, ae, checkpoint = load_diffusion(file, args.ae, compute.device)
    if args.cfg != 1 and not model.num_classes:
        raise ValueError(f"--cfg {args.cfg}: {file} is unconditional, it has no null class to "
                         "guide away from; leave --cfg at 1")
    if args.steps > 1000 and isinstance(process, DDPM):
        raise ValueError(f"--steps {args.steps}: {file} has 1000 noise levels, so take at most "
                         "1000")
    reference_set = training_images(checkpoint, file, args, compute)
    if reference_set is not None:
        stored_statistics(reference_set)               # what is wrong with them, now
    size, n = checkpoint["image_size"], args.num_samples
    with shared_array(out / "samples.npy", np.uint8, (n, size, size, 3), compute) as samples:
        # before hours of sampling, for some of the images may prove unreadable
        reference = read_reference(reference_set, inception, out, args, compute)
        draw = lambda indices: sample_images(model, process, ae, indices, args, compute)
        seconds = write_samples(draw, samples, out, args, compute)
        if compute.rank == 0:
            publish(samples, out, args.folder)
        values = compare(samples, reference, out, args, compute)
    data = args.data or checkpoint["data"] or "built-in"
    report(values, dict(
        ckpt=file, step=checkpoint["step"], model=checkpoint["model_name"], n=n,
        sampler=args.sampler if isinstance(process, Interpolant) else "ddim", steps=args.steps,
        cfg=args.cfg, cfg_interval=args.cfg_interval, seed=args.seed,
        labels=args.labels if model.num_classes else "none",
        jpeg="quality 75" if args.jpeg else "none", dtype=compute.dtype,
        weights="torch-fidelity" if reference.network else "none",
        reference="none" if reference_set is None else
        f"{len(reference_set)} training images of {data} at {size} px",
        swd_images=reference.count, seconds=round(seconds, 1)), args, compute)
    return checkpoint["step"], values


# --------------------------------------------------------------------------------------------------
# Two sets

def evaluate_fid(args, compute):
    """
    Frechet distance of two sets, each a folder, a zip, an npz of images (arr_0) or an npz of
    statistics (mu, sigma).

    Images meet at one size: --image_size, else that of the npz, else that of all pictures of the
    folders and zips, else 256. Larger and smaller ones are cropped and resized as ADM does.
    """
    sets = [open_set(spec) for spec in (args.a, args.b)]
    a, b = (len(entry.moments[0]) if entry.moments else 2048 for entry in sets)
    if a != b:
        raise ValueError(f"{args.a} and {args.b}: features of {a} and {b} dimensions cannot be "
                         "compared; make both with one network")
    side = meeting_side(sets, args.image_size)
    inception, statistics, counts = None, [], []
    for entry in sets:
        n, moments = None, entry.moments
        if entry.source:
            inception = inception or load_inception(compute.device)
            n, *moments = brought_moments(entry, side, inception, args.batch_size, compute.device)
        statistics += moments
        counts.append(n)
    name, known = "FID", [n for n in counts if n]
    if known:
        name = f"FID@{min(known)}"
        warn_small(min(known), compute)
    report({name: frechet_distance(*statistics)}, dict(
        a=args.a, b=args.b, n_a=counts[0], n_b=counts[1], size=side,
        weights="torch-fidelity" if inception else "of the statistics"), args, compute)


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
        if name not in ("recon", "fid", "diffusability"):  # which write no more than a result
            add("--out", help="file or folder to write (default: under out/)")
        if name == "curves":                           # reads logs, measures nothing
            p.set_defaults(device="cpu", results=None)
            return add
        add("--preset", choices=PRESETS, default="celeba-f16d16",
            help="a named group of defaults; explicit flags win")
        if ae:
            which = "all" if many else "the newest"
            add("--ae", nargs="+" if many else None, help="autoencoder(s): ckpt.pt or released "
                f"weights (default: {which} of out/ae/<preset>-*/ckpt.pt)")
        if name not in ("fid", "trajectory"):
            add("--data", help="folder, .zip, cifar10, leaves or discs (default: what was trained "
                "on; similarity: leaves)")
        if name not in ("gen", "denoise", "trajectory"):
            add("--image_size", type=int, default=224 if name == "similarity" else None,
                help="pixels a side (default: as in training; similarity: 224; fid: see above)")
        if name != "trajectory":                       # one batch of --num_samples
            add("--batch_size", type=int, default=50, help="images per network call and process")
        if name == "recon":
            add("--val_images", type=int,
                help="images to use (default: 1000 held-out ones, all of the training images)")
        elif name not in ("gen", "fid", "trajectory"):
            few = name in ("latents", "similarity")
            add("--val_images", type=int, default=8 if few else 1000, help="held-out images to use")
        if name in ("recon", "gen"):
            add("--workers", type=int, default=4, help="loader processes")
        if name in ("recon", "gen", "spectrum", "denoise", "trajectory"):
            add("--seed", type=int, default=0, help="of every draw, >= 0")
        add("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
        add("--results", default="results.jsonl", help="every result is appended here")
        return add

    add = command("recon", evaluate_recon)
    add("--protocol", choices=("plain", "authors"), default="plain",
        help="how to measure, see above")
    add("--split", choices=("train", "val"),
        help="training or held-out images (default: val; with --protocol authors: train)")
    def of_runs(name, function):
        """A command on runs of train_diffusion.py."""
        add = command(name, function)
        add("--ckpt", nargs="+", help="run(s) of train_diffusion.py or their ckpt.pt (default: the "
            "newest out/diffusion/<preset>-*/ckpt.pt)")
        add("--every", action="store_true", help="all ckpt_<step>.pt that the run kept, in order")
        return add

    add = of_runs("gen", evaluate_gen)
    add("--num_samples", type=int, default=50_000, help="how many images to sample")
    add("--steps", type=int, default=100, help="network calls per sample")
    add("--sampler", choices=("em", "ode"), default="em",
        help="of SiT: Euler-Maruyama or Euler ODE (U-ViT: always DDIM)")
    add("--cfg", type=float, default=1.0, help="guidance scale; 1 = off (paper: 1.8 on ImageNet)")
    add("--cfg_interval", type=float, nargs=2, default=(0.0, 1.0),
        help="times between which guidance acts, 0 = data")
    add("--labels", choices=("turn", "random"), default="turn",
        help="of a conditional model: classes in turn, or at random")
    add("--jpeg", action="store_true", help="store and score samples after a JPEG round trip, "
        "quality 75")
    add("--dtype", choices=("fp32", "bf16"), default=None,
        help="of the transformer (default: bf16 on cuda, fp32 on cpu)")
    add("--reference_images", type=int, default=0, help="training images to compare with; 0 = all")
    add("--folder", action="store_true", help="also write every sample as a PNG")
    add = command("fid", evaluate_fid, ae=False)
    add("a", help="a folder or .zip of images, an .npz of images (arr_0) or of statistics (mu, "
        "sigma), or cifar10")
    add("b", help="another one")
    spectrum = command("spectrum", spectrum_figure, many=True)
    spectrum("--gamma", type=float, default=1.0, help="flattening exponent of the target")
    spectrum("--published", choices=CURVES, help="draw the authors' printed curves beside yours, "
             "in their form")
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

    of_runs("denoise", denoise_figure)
    add = of_runs("trajectory", trajectory_figure)
    add("--num_samples", type=int, default=64, help="samples to follow, as one batch")
    add("--steps", type=int, default=100, help="network calls per sample")
    command("diffusability", diffusability_rows, many=True)
    add = command("curves", curves_figure)
    add("runs", nargs="+", metavar="RUN", help="a training run's folder, or its log.jsonl")

    chosen = next((word for word in sys.argv[1:] if word in commands.choices), None)
    subparser, known = commands.choices.get(chosen), set()
    if subparser and chosen not in ("latents", "similarity"):  # their few images are for the eye
        known = {action.dest for action in subparser._actions}
    presets = {}
    for name, values in PRESETS.items():
        presets[name] = {flag: value for flag, value in values.items() if flag in known}
    return run.parse_args(parser, presets, subparser)


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
    if args.results:
        check_place("--results", args.results)
    if getattr(args, "out", None):
        gen = args.command == "gen"
        check_place("--out", args.out, folder=gen, figure=not gen)


def main():
    args = get_args()
    where = run.init_distributed(args.device)
    if where[1] > 1 and args.command not in ("recon", "gen"):
        raise ValueError(f"{args.command}: runs in one process; start it without torchrun")
    check_flags(args)
    # of the transformer: everything else computes in float32
    dtype = args.dtype if args.command == "gen" else "fp32"
    compute = run.Compute(*where, dtype, "off", tf32=False)
    if args.command in ("recon", "gen", "fid"):
        args.function(args, compute)
    else:
        for values, settings in args.function(args, compute.device):  # a figure, and what it
            report(values, settings, args, compute)                   # measures
    run.barrier()


if __name__ == "__main__":
    with run.one_line_errors():
        main()
