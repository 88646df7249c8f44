"""
All numbers and figures of the project, one command each:

    recon          PSNR, SSIM, LPIPS and rFID of reconstructions                   Tables 2, 3
    gen            samples, their FID, IS, KID, precision, recall, SWD             Tables 2, 3, 4
    fid A B        Frechet distance between two sets of images
    spectrum       radial PSD of images and of the latents of any autoencoders     Figs. 4, 5, 7, 8
    bands          does a low-passed latent decode to the low-passed image?        Alg. 2
    latents        latents as images, PCA to RGB                                   Fig. 3
    similarity     similarity of one token to all others, for each target of REPA  Fig. 6
    curves RUN...  training curves from log.jsonl, also while training runs
    denoise        how much of the learnable power a network has learned           Prop. 3.1
    trajectory     in which order the frequencies appear during sampling           Sec. 3.2
    diffusability  statistics of autoencoders, before any diffusion training       Table 1

`evaluate.py COMMAND --help` says more. Each command is a function of flags and device: the last
three are in analysis/theory.py, the five before them in analysis/figures.py. It yields (values,
settings), which are printed and appended to results.jsonl with command, commit and hardware.
Without the Inception weights, recon, gen and diffusability skip the metrics that need them.
"""
import argparse
import contextlib
import inspect
import json
import math
import os
import platform
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch

from analysis import fid, figures, theory
from common import metrics, run
from common.data import LARGEST_SIDE, spread, val_batches
from common.weights import load_autoencoder, load_diffusion, open_run_data
from dit import Interpolant, NoiseStream
from losses import PerceptualLoss

PRESETS = {
    "celeba-f16d16": {}, "celeba-f8d4": {},
    "imagenet-f16d16": dict(cfg=1.8), "imagenet-repa": dict(cfg=1.8),
    "one-gpu": dict(num_samples=10_000),
    "quick": dict(num_samples=128, steps=50, batch_size=64, val_images=128, reference_images=1000,
                  workers=0, networks="off"),
}


def report(values, settings, results, device):
    """On rank 0, print a result and its settings and append it to `results`; it must be finite."""
    bad = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    run.need(not bad, f"{next(iter(settings.values()), '')}: {', '.join(bad)} not finite, so "
             "no result is recorded; the run has diverged, use an earlier checkpoint")
    if run.get_rank() > 0:
        return
    number = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    run.print0("  ".join(f"{k} {number(v)}" for k, v in values.items()))
    run.print0("  with " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    commit, cpu = "", f"{platform.machine()}, {os.cpu_count()} cores"
    with contextlib.suppress(OSError):                 # git is not installed
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    line = dict(values, **settings, command=" ".join(["evaluate.py", *sys.argv[1:]]), commit=commit,
                hardware=torch.cuda.get_device_name() if device.type == "cuda" else cpu,
                processes=run.get_world_size(), torch=torch.__version__,
                time=time.strftime("%Y-%m-%d %H:%M:%S"))
    Path(results).parent.mkdir(parents=True, exist_ok=True)
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")


# --------------------------------------------------------------------------------------------------
# Numbers

@torch.no_grad()
def evaluate_recon(args, device):
    """
    Reconstruction metrics: PSNR, SSIM, L1, and LPIPS and rFID if their weights are available.

    --protocol plain: held-out images, decoded from the posterior's mode. --protocol authors, as in
    the authors' code: training images, decoded from a posterior sample; both sides are compressed
    as JPEG, quality 75, for rFID and PSNR, and SSIM clamps to [-1, 1]. The authors drew 50,000
    CelebA images with repetition and mirroring; here each image counts once, not mirrored.
    """
    authors, rank, world = args.protocol == "authors", run.get_rank(), run.get_world_size()
    args.ae = args.ae or run.newest("ae", args.preset, "--ae")
    ae = load_autoencoder(args.ae).to(device)
    data, size, train_set, images = open_run_data(args.ae, ae.trained, args.data, args.image_size,
                                                  args.val_images or 1000)
    f = ae.config.reduction
    run.need(size >= 16 and size % f == 0, f"--image_size {size}: must be at least 16, for LPIPS, "
             f"and a multiple of {f}, the reduction of {args.ae}")
    split = args.split or ("train" if authors else "val")
    if split == "train":
        images = spread(train_set, args.val_images or len(train_set))
    lpips = metrics.load_or_none(lambda: PerceptualLoss().to(device), args)
    inception = metrics.load_or_none(lambda: metrics.load_inception(device), args)
    names = ["psnr", "ssim", "l1"] + ["lpips"] * bool(lpips)
    sums = torch.zeros(1 + len(names), dtype=torch.float64)
    moments = [metrics.Moments(2048, device) for _ in range(2)] if inception else []
    for batch, _, indices in val_batches(images, args.batch_size * world, rank, world,
                                         args.workers, device):
        posterior = ae.encode(batch)
        z = posterior.mode()
        if authors:                                    # noise from (--seed, index in the set)
            noise = NoiseStream(args.seed, indices.tolist())(z.shape)
            z = posterior.sample(noise.to(device))
        recon = ae.decode(z).float()
        pair = [metrics.to_uint8(x) for x in (recon, batch)]           # as stored in files
        if authors:
            pair = [metrics.jpeg_round_trip(x) for x in pair]
        scores = [torch.ones(len(batch)), metrics.psnr(*(x / 127.5 - 1 for x in pair)),
                  metrics.ssim(recon.clamp(-1, 1) if authors else recon, batch),
                  (recon - batch).abs().flatten(1).mean(1)]
        if lpips:
            both = zip(recon.clamp(-1, 1), batch)
            scores.append(torch.stack([lpips(a[None], b[None]) for a, b in both]))
        sums += torch.stack([score.cpu().double() for score in scores]).sum(1)
        for moment, x in zip(moments, pair):
            moment.add(inception(x)[0])
    sums = run.all_sum(sums)
    values = dict(zip(names, (sums[1:] / sums[0]).tolist()))
    if moments and sums[0] > 1:
        (n, *a), (_, *b) = (moment.mean_cov() for moment in moments)
        values[f"r{fid.fid_at(n)}"] = metrics.frechet_distance(*a, *b)
    yield values, dict(
        ae=args.ae, protocol=args.protocol, split=split, data=data or "built-in", size=size,
        n=int(sums[0]), posterior="sample" if authors else "mode",
        seed=args.seed if authors else "none",
        jpeg="quality 75, both sides, for rFID and PSNR" if authors else "none",
        weights="torch-fidelity" if inception else "none")


def evaluate_gen(args, device):
    """
    Sample images, write them (grid.png, samples.npz for the ADM evaluation suite), and compare them
    with the training images.

    With several --ckpt, or --every, each checkpoint's samples go to a folder of their own, and the
    best checkpoint is printed at the end; the paper found the steps of Table 2 in this way.
    """
    run.need_one_node("gen: samples.npz")
    args.dtype = args.dtype or run.default_dtype(device)
    load = lambda: metrics.load_or_none(lambda: metrics.load_inception(device), args)
    inception = cache(load)                            # called once flags and checkpoint are valid
    checkpoints, results = figures.named_checkpoints(args), []
    for file, name in checkpoints:
        out = Path(args.out or Path(file).parent / "samples")
        if len(checkpoints) > 1:
            out = out / name if args.out else out.with_name(f"samples-{Path(file).stem}")
        model, process, ae, checkpoint = load_diffusion(file, args.ae, device)
        run.same_on_all_ranks("--ckpt", (file, checkpoint["step"]))
        null_class = model.num_classes and checkpoint["args"].get("label_dropout") != 0
        run.need(args.cfg == 1 or null_class, f"--cfg {args.cfg}: {file} was trained without "
                 "classes or with --label_dropout 0, so there is no null class; leave --cfg at 1")
        size, n, data = checkpoint["image_size"], args.num_samples, args.data or checkpoint["data"]
        classes = fid.sampled_classes(file, checkpoint)
        run.need_outside(out / "images", data)
        training_set = fid.training_images(file, checkpoint, args)
        network, count, values, described = None, 0, {}, "none"
        if training_set is not None:       # images may be unreadable: before hours of sampling
            reference = fid.reference_statistics(training_set, inception, args, device)
            network = inception()
            count = min(n, len(training_set), 2048)            # these are kept in memory
            batches = val_batches(spread(training_set, count), args.batch_size)
            real = [images for images, _, _ in batches] if run.get_rank() == 0 else []
            described = f"{len(training_set)} training images of {data or 'built-in'} at {size} px"
        draw = partial(fid.sample_images, file, model, process, ae, classes, args=args,
                       device=device)
        samples, seconds = fid.write_samples(draw, (n, size, size, 3), out, args)
        if network:
            values = fid.inception_metrics(network, samples, reference, args, device)
        if count and run.get_rank() == 0:
            real = torch.cat(real)
            fake = torch.from_numpy(samples[:count]).movedim(-1, 1) / 127.5 - 1
            distances = metrics.sliced_wasserstein(fake, real)
            values |= {f"SWD_{side}px": distance for side, distance in distances.items()}
            values["spectral_KL"] = metrics.spectral_kl(fake, real)
        settings = dict(
            ckpt=file, step=checkpoint["step"], model=checkpoint["model_name"], n=n,
            sampler=args.sampler if isinstance(process, Interpolant) else "ddim", steps=args.steps,
            cfg=args.cfg, cfg_interval=args.cfg_interval, seed=args.seed,
            labels=args.labels if model.num_classes else "none",
            jpeg="quality 75, samples only" if args.jpeg else "none", dtype=args.dtype,
            weights="torch-fidelity" if network else "none", reference=described, swd_images=count,
            seconds=round(seconds, 1))
        results.append((values, settings))
        yield values, settings
    if len(results) > 1 and values:                    # by FID, or else by SWD at the finest level
        key = next(key for key in values if key.startswith(("FID", "SWD")))
        values, settings = min(results, key=lambda result: result[0].get(key, math.inf))
        run.print0(f"best of {len(results)}: {key} {values[key]:.4g} at step {settings['step']}, "
                   f"{settings['ckpt']}")


def evaluate_fid(args, device):
    """
    Frechet distance between two sets, each a folder, a zip, an npz of images (arr_0) or an npz of
    statistics (mu, sigma).

    Images are compared at one size: --image_size, else the npz's, else the common size of all
    images in the folders and zips. Images of other sizes are cropped and resized as in ADM.
    """
    a, b = sets = [fid.open_set(spec) for spec in (args.a, args.b)]
    size = args.image_size or fid.common_size(sets)
    for entry in sets:                                 # statistics saved by gen record their size
        run.need(not entry.moments or entry.size in (None, size), f"{entry.spec}: statistics of "
                 f"images of {entry.size} px, not {size}; compare at --image_size {entry.size}")
    inception = metrics.load_inception(device) if a.images or b.images else None
    for entry in sets:
        if entry.images:
            entry.images.size = size
            found = fid.set_statistics(inception, entry.images, [], 0, args, device)
            entry.n, *entry.moments = found[:3]
    known = [entry.n for entry in sets if entry.n]     # number of images; statistics may lack it
    name = fid.fid_at(min(known)) if known else "FID"
    yield {name: metrics.frechet_distance(*a.moments, *b.moments)}, dict(
        a=a.spec, b=b.spec, n_a=a.n, n_b=b.n, size=size,
        weights="torch-fidelity" if inception else "of the statistics")


# --------------------------------------------------------------------------------------------------
# The command line

IMAGES = "data image_size batch_size val_images"
COMMANDS = {                                           # name: (function, its flags)
    "recon": (evaluate_recon, f"{IMAGES} ae workers seed protocol split networks"),
    "gen": (evaluate_gen, "ckpt every ae data out batch_size workers seed num_samples steps "
            "sampler cfg cfg_interval labels jpeg dtype reference_images folder networks"),
    "fid": (evaluate_fid, "a b image_size batch_size"),
    "spectrum": (figures.spectrum_figure,
                 f"{IMAGES} ae latents out seed gamma published encoder encoder_source"),
    "bands": (figures.bands_figure, f"{IMAGES} ae out"),
    "latents": (figures.latents_figure, f"{IMAGES} ae out"),
    "similarity": (figures.similarity_figure, f"{IMAGES} out image token encoder encoder_source"),
    "curves": (figures.curves_figure, "runs out"),     # only reads logs
    "denoise": (theory.denoise_figure, "ckpt every ae data out batch_size val_images seed"),
    "trajectory": (theory.trajectory_figure, "ckpt every ae out seed num_samples steps"),
    "diffusability": (theory.diffusability_rows, f"{IMAGES} ae networks"),
}
# defaults of single commands that differ from the flag's
DEFAULTS = {"similarity": dict(data="leaves", image_size=224, val_images=8,
                               encoder="dinov2_vitb14"),
            "bands": dict(val_images=200), "latents": dict(val_images=8),
            "recon": dict(val_images=None), "trajectory": dict(num_samples=64),
            "gen": dict(out=None)}


def get_args():
    """Parse a command and its flags; the parser refuses flags that the command does not take."""
    command = sys.argv[1] if sys.argv[1:] and sys.argv[1] in COMMANDS else None
    function, takes = COMMANDS.get(command, (None, ""))
    takes = takes.split() + ["preset", "device", "results"] * (command != "curves")
    parser = argparse.ArgumentParser(
        prog=f"evaluate.py {command or ''}".strip(), allow_abbrev=False,
        description=inspect.getdoc(function) if function else __doc__,
        formatter_class=run.Help)
    parser.add_argument("command", choices=COMMANDS, metavar=command or "COMMAND",
                        help=argparse.SUPPRESS if command else "one of the above")

    def add(flag, default=None, **options):
        name = flag.strip("-")
        if command and name in takes:
            if name != flag:
                options["default"] = DEFAULTS.get(command, {}).get(name, default)
            parser.add_argument(flag, **options)

    kinds = "folder or .zip of images, .npz of images or of mu and sigma, or cifar10"
    add("a", help=kinds)
    add("b", help=kinds)
    add("runs", nargs="+", metavar="RUN", help="a run's folder, or its log.jsonl")
    add("--preset", "celeba-f16d16", choices=PRESETS, help="named set of defaults")
    several = command in ("spectrum", "bands", "latents", "diffusability")
    add("--ae", nargs="+" if several else None, help="ckpt.pt or released weights (default: the "
        "one of --ckpt, else the newest out/ae/<preset>-*/ckpt.pt, or all if several are allowed)")
    add("--ckpt", nargs="+", help="run(s) of train_diffusion.py or their ckpt.pt (default: the "
        "newest out/diffusion/<preset>-*/ckpt.pt)")
    add("--every", False, action="store_true", help="all ckpt_<step>.pt of the run, in order")
    add("--data", help="folder, .zip, cifar10, leaves or discs (default: as in training)")
    add("--image_size", type=int, help="pixels per side (default: as in training; fid: see above)")
    add("--val_images", 1000, type=int, help="held-out images (default: 1000; train split: all)")
    add("--batch_size", 50, type=int, help="images per network call, per process")
    add("--workers", 4, type=int, help="loader processes")
    add("--seed", 0, type=int, help="seed of all random draws")
    add("--networks", "on", choices=("on", "off"), help="off: skip LPIPS, Inception (downloaded "
        "once) and all metrics that need them")
    add("--protocol", "plain", choices=("plain", "authors"), help="how to measure, see above")
    add("--split", choices=("train", "val"), help="(default: val, or train for --protocol authors)")
    # gen and trajectory
    add("--num_samples", 50_000, type=int, help="images to sample")
    add("--steps", 100, type=int, help="network calls per sample")
    add("--sampler", "em", choices=("em", "ode"), help="SiT: Euler-Maruyama or Euler ODE")
    add("--cfg", 1.0, type=float, help="guidance scale; 1 = off (Table 4: 1.8)")
    add("--cfg_interval", (0.0, 1.0), type=float, nargs=2, help="times with guidance, 0 = data")
    add("--labels", "turn", choices=("turn", "random"), help="classes in turn, or at random")
    add("--jpeg", False, action="store_true", help="compress the samples as JPEG, quality 75")
    add("--dtype", choices=("fp32", "bf16"), help="of the transformer (default: bf16 on GPUs "
        "that compute in it, else fp32)")
    add("--reference_images", 0, type=int, help="training images to compare with; 0 = all")
    add("--folder", False, action="store_true", help="also write every sample as a PNG")
    # spectrum and similarity
    add("--gamma", 1.0, type=float, help="flattening exponent of the target")
    add("--latents", nargs="+", metavar="FILE.npy", help="latents (N, C, h, w) of any autoencoder, "
        "instead of --ae; compared with images only if --data is given")
    add("--published", choices=figures.CURVES, help="add the authors' curves; yours in their form")
    add("--encoder", help="DINOv2 model")
    add("--encoder_source", help="a folder with hubconf.py, or random (for tests)")
    add("--image", help="image file (default: the first --val_images held-out images of --data)")
    add("--token", type=int, help="token index in row-major order, from 0 (default: the centre)")
    add("--out", f"out/{command}.png", help="figure; for gen a folder (default: next to --ckpt)")
    add("--device", choices=run.DEVICES, help="(default: cuda if there is one)")
    add("--results", "results.jsonl", help="file to which results are appended")
    own = DEFAULTS.get(command, {})                    # these are not set by presets
    return run.parse_args(parser, {
        name: {k: v for k, v in values.items() if k in takes and own.get(k) is None}
        for name, values in PRESETS.items()})


def check_flags(args):
    """ValueError for the first invalid flag, before anything is read."""
    for name, low, high in (
            ("val_images", 1, math.inf), ("batch_size", 1, math.inf), ("num_samples", 2, math.inf),
            ("steps", 2, math.inf), ("image_size", 8, LARGEST_SIDE), ("workers", 0, 1024),
            ("seed", 0, 2 ** 63), ("cfg", 0, math.inf), ("reference_images", 0, math.inf),
            ("gamma", 0, 10)):                         # 16^gamma must fit float32
        if getattr(args, name, None) is not None:
            run.need_range(args, low, high, name)
    start, end = getattr(args, "cfg_interval", (0, 1))
    run.need(0 <= start <= end <= 1, f"--cfg_interval {start} {end}: needs 0 <= start <= end <= 1")
    for flag in ("results", "out"):                    # fail now, not after hours
        if not getattr(args, flag, None):
            continue
        path = Path(getattr(args, flag)).absolute()
        existing = next(p for p in (path, *path.parents) if p.exists())
        folder = existing != path or (args.command, flag) == ("gen", "out")
        fits = existing.is_dir() if folder else existing.is_file()
        run.need(fits and os.access(existing, os.W_OK), f"--{flag} {path}: cannot be written")


def main():
    args = get_args()
    _, world, device = run.init_distributed(getattr(args, "device", "cpu"))
    run.need(world == 1 or args.command in ("recon", "gen"),
             f"{args.command}: runs in one process; start it without torchrun")
    check_flags(args)
    if getattr(args, "networks", "on") == "off":
        run.print0("--networks off: no metrics that need LPIPS or Inception, such as FID")
    function, _ = COMMANDS[args.command]
    for values, settings in function(args, device):
        report(values, settings | getattr(args, "read", {}), args.results, device)


if __name__ == "__main__":
    with run.one_line_errors():
        main()
