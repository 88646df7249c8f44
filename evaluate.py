"""
Every number and figure of the project, by one command each:

    recon          PSNR, SSIM, LPIPS and rFID of reconstructions                   Tables 2, 3
    gen            samples, their FID, IS, KID, precision, recall, SWD             Tables 2, 3, 4
    fid A B        Frechet distance of two sets of images
    spectrum       radial PSD of images and of the latents of any autoencoders     Figs. 4, 5, 7, 8
    bands          does a low-passed latent decode to the low-passed image?        Alg. 2
    latents        latents as images, PCA to RGB                                   Fig. 3
    similarity     which tokens a token resembles, for each target of REPA         Fig. 6
    curves RUN...  the logs of training runs, also while they run
    denoise        how much of the learnable power a network has learned           Prop. 3.1
    trajectory     in which order sampling brings the frequencies in               Sec. 3.2
    diffusability  what can be known of autoencoders before any diffusion          Table 1

`evaluate.py COMMAND --help` says more. A command is a function of the flags and the device: in
analysis/theory.py the last three, in analysis/figures.py the five before them. It yields (values,
settings), which are printed, and appended to results.jsonl with command, commit and hardware.
Without the Inception weights there is no FID, only the metrics that need none.
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
from common.data import LARGEST_SIDE, open_data, spread, val_batches
from common.weights import checkpoint_files, compare_images, load_autoencoder, load_diffusion
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


def report(values, settings, results):
    """Print a result, all finite, with its settings, and append it to `results`; on rank 0."""
    bad = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    run.need(not bad, f"{next(iter(settings.values()), '')}: {', '.join(bad)} not finite, so "
             "there is no result; the run has diverged, take an earlier checkpoint")
    if run.get_rank() > 0:
        return
    number = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    run.print0("  ".join(f"{k} {number(v)}" for k, v in values.items()))
    run.print0("  with " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    commit, hardware = "", f"{platform.machine()}, {os.cpu_count()} cores"
    with contextlib.suppress(OSError):                 # no git here
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
            capture_output=True, text=True).stdout.strip()
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    line = dict(values, **settings, command=" ".join(["evaluate.py", *sys.argv[1:]]),
                commit=commit, hardware=hardware, torch=torch.__version__,
                time=time.strftime("%Y-%m-%d %H:%M:%S"))
    with fid.naming(results):
        Path(results).parent.mkdir(parents=True, exist_ok=True)
        with open(results, "a") as file:
            file.write(json.dumps(line) + "\n")


def load_or_none(load, device):
    """load() on every rank; None, with a line that says why, if one lacks the weights."""
    network = None
    try:
        with run.local_rank_zero_first():
            network = load()
    except FileNotFoundError as error:                 # without its advice for train_ae.py
        run.print0(str(error).partition(", or train without it")[0])
    return network if all(run.all_gather(network is not None)) else None


# --------------------------------------------------------------------------------------------------
# Numbers

@torch.no_grad()
def evaluate_recon(args, device):
    """
    Images through the autoencoder: PSNR, SSIM, L1, LPIPS and rFID, as far as weights can be had.

    --protocol plain: held-out images, decoded from the posterior's mode. --protocol authors, as the
    paper's authors measured: the training images, decoded from a posterior sample; for rFID and
    PSNR both sides go through JPEG first, as PIL and torchvision save it (quality 75), and SSIM is
    of images clamped to [-1, 1]. They drew 50,000 of CelebA's training images with repetition and
    mirrors; here each counts once, as it is.
    """
    authors, rank, world = args.protocol == "authors", run.get_rank(), run.get_world_size()
    args.ae = args.ae or run.newest(f"out/ae/{args.preset}-*/ckpt.pt",
                                    "--ae: train one with train_ae.py, or give a file")
    ae = load_autoencoder(args.ae).to(device)
    trained = run.checkpoint_args(args.ae)
    data = args.data or trained.get("data")
    size = args.image_size or trained.get("image_size", 256)
    run.need(size >= 11 and size % ae.config.reduction == 0,
             f"--image_size {size}: must be at least 11, SSIM's window, and a multiple of "
             f"{ae.config.reduction}, the reduction of {args.ae}")
    split = args.split or ("train" if authors else "val")
    train_set, images = open_data(data, size, val_images=args.val_images or 1000,
                                  seed=trained.get("seed", 0))
    compare_images(args.ae, trained, data, train_set)
    if split == "train":
        images = spread(train_set, args.val_images or len(train_set))
    lpips = load_or_none(lambda: PerceptualLoss().to(device), device)
    inception = load_or_none(lambda: metrics.load_inception(device), device)
    names = ["psnr", "ssim", "l1"] + ["lpips"] * bool(lpips)
    sums = torch.zeros(1 + len(names), dtype=torch.float64)
    moments = [metrics.Moments(2048, device) for _ in range(2)] if inception else []
    for batch, _, indices in val_batches(images, args.batch_size * world, rank, world,
                                         args.workers, device):
        posterior = ae.encode(batch)
        z = posterior.mode()
        if authors:                                    # noise of (--seed, index in the set)
            noise = NoiseStream(args.seed, indices.tolist())(z.shape)
            z = posterior.sample(noise.to(device))
        recon = ae.decode(z).float()
        pair = [metrics.to_uint8(x) for x in (recon, batch)]           # as files hold them
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
    sums = run.all_sum(sums.to(device)).cpu()
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

    Several --ckpt, or --every, are sampled one after the other, each into a folder of its own; the
    best is printed at the end. That is how the steps of Table 2 were found.
    """
    run.need_one_node("gen: the file of samples")
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    load = lambda: load_or_none(lambda: metrics.load_inception(device), device)
    inception = cache(load)                            # when flags and checkpoint are known to fit
    files, results = checkpoint_files(args), []
    names = figures.unique_names(files)
    figures.print_differences(files, names, "images", "image_size")
    for file, name in zip(files, names):
        out = Path(args.out or Path(file).parent / "samples")
        if len(files) > 1:
            out = out / name if args.out else out.with_name(f"samples-{Path(file).stem}")
        results.append(evaluate_checkpoint(file, out, inception, args, device))
        yield results[-1]
    if len(files) > 1:
        run.print0(best_line(results))


def best_line(results):
    """Which of [(values, settings)] has the smallest FID, or SWD of the finest level without it."""
    if any(values.keys() != results[0][0].keys() for values, _ in results):
        return "no best of these: they are not measured alike"
    key = next((key for key in results[0][0] if key.startswith(("FID", "SWD"))), None)
    if not key:
        return "no FID or SWD to compare"
    value, step, file = min((values[key], settings["step"], settings["ckpt"])
                            for values, settings in results)
    return f"best of {len(results)}: {key} {value:.4g} at step {step}, {file}"


def evaluate_checkpoint(file, out, inception, args, device):
    """
    Sample one checkpoint into the folder out, and compare.
    inception  returns the Inception network, or None where its weights cannot be had
    returns    values (all of them on rank 0 only), settings
    """
    model, process, ae, checkpoint = load_diffusion(file, args.ae, device)
    run.need(args.cfg == 1 or model.num_classes, f"--cfg {args.cfg}: {file} is unconditional, it "
             "has no null class to guide away from; leave --cfg at 1")
    run.need(args.steps <= 1000 or not isinstance(process, DDPM), f"--steps {args.steps}: {file} "
             "has 1000 noise levels, so take at most 1000")
    run.need(args.cfg == 1 or checkpoint["args"].get("label_dropout") != 0, f"--cfg {args.cfg}: "
             f"{file} was trained with --label_dropout 0, so never without its label, which "
             "guidance needs; leave --cfg at 1")
    size, n = checkpoint["image_size"], args.num_samples
    classes = fid.sampled_classes(file, checkpoint)
    figures.need_outside(out / "images", args.data or checkpoint["data"])
    training_set = fid.training_images(file, checkpoint, args)
    if training_set is not None:
        fid.reference_statistics(training_set, None, args, device)     # if damaged, say it now
    network, count, values, described = None, 0, {}, "none"
    draw = partial(fid.sample_images, file, model, process, ae, classes, args=args, device=device)
    with fid.folder_lock(out):
        samples = fid.shared_array(out / "samples.npy", (n, size, size, 3))
        if training_set is not None:   # before hours of sampling: images may prove unreadable
            network = inception()
            if network:
                reference = fid.reference_statistics(training_set, network, args, device)
            count = min(n, len(training_set), 2048)    # in memory, unlike all else here
            batches = val_batches(spread(training_set, count), args.batch_size)
            real = [images for images, _, _ in batches] if run.get_rank() == 0 else []
            data = args.data or checkpoint["data"] or "built-in"
            described = f"{len(training_set)} training images of {data} at {size} px"
        with fid.naming(out):
            seconds = fid.write_samples(draw, samples, out, args)
    if network:
        values = fid.inception_metrics(network, samples, reference, args, device)
    if count and run.get_rank() == 0:
        fake, real = torch.from_numpy(samples[:count]).movedim(-1, 1) / 127.5 - 1, torch.cat(real)
        distances = metrics.sliced_wasserstein(fake, real)
        values |= {f"SWD_{side}px": distance for side, distance in distances.items()}
        values["spectral_KL"] = metrics.spectral_kl(fake, real)
    return values, dict(
        ckpt=file, step=checkpoint["step"], model=checkpoint["model_name"], n=n,
        sampler=args.sampler if isinstance(process, Interpolant) else "ddim", steps=args.steps,
        cfg=args.cfg, cfg_interval=args.cfg_interval, seed=args.seed,
        labels=args.labels if model.num_classes else "none",
        jpeg="quality 75" if args.jpeg else "none", dtype=args.dtype,
        weights="torch-fidelity" if network else "none", reference=described, swd_images=count,
        seconds=round(seconds, 1))


def evaluate_fid(args, device):
    """
    Frechet distance of two sets, each a folder, a zip, an npz of images (arr_0) or an npz of
    statistics (mu, sigma).

    Images are compared at one size: --image_size, else that of the npz, else that of all images of
    the folders and zips, else 256. Larger and smaller ones are cropped and resized as ADM does.
    """
    try:
        a, b = sets = [fid.open_set(spec) for spec in (args.a, args.b)]
        dims = [len(entry.moments[0]) if entry.moments else 2048 for entry in sets]
        run.need(dims[0] == dims[1], f"{a.spec} and {b.spec}: features of {dims[0]} and {dims[1]} "
                 "dimensions cannot be compared; make both with one network")
        size = fid.common_resolution(sets, args.image_size)
        inception = metrics.load_inception(device) if a.images or b.images else None
        for entry in sets:
            if entry.images:
                entry.images.size = size
                found = fid.set_statistics(inception, entry.images, [], 0, args, device)
                entry.n, *entry.moments = found[:3]
    except (ValueError, FileNotFoundError) as error:   # common.data names a flag that nobody gave
        raise type(error)(str(error).removeprefix("--data ")) from None
    known = [entry.n for entry in sets if entry.n]
    name = fid.fid_at(min(known)) if known else "FID"
    yield {name: metrics.frechet_distance(*a.moments, *b.moments)}, dict(
        a=a.spec, b=b.spec, n_a=a.n, n_b=b.n, size=size,
        weights="torch-fidelity" if inception else "of the statistics")


# --------------------------------------------------------------------------------------------------
# The command line

IMAGES = "data image_size batch_size val_images"
COMMANDS = {                                           # name: (function, flags that it takes)
    "recon": (evaluate_recon, f"{IMAGES} ae workers seed protocol split"),
    "gen": (evaluate_gen, "ckpt every ae data out batch_size workers seed num_samples steps "
            "sampler cfg cfg_interval labels jpeg dtype reference_images folder"),
    "fid": (evaluate_fid, "image_size batch_size"),
    "spectrum": (figures.spectrum_figure,
                 f"{IMAGES} ae out seed gamma published encoder encoder_source"),
    "bands": (figures.bands_figure, f"{IMAGES} ae out"),
    "latents": (figures.latents_figure, f"{IMAGES} ae out"),
    "similarity": (figures.similarity_figure, f"{IMAGES} out image token encoder encoder_source"),
    "curves": (figures.curves_figure, "out"),
    "denoise": (theory.denoise_figure, "ckpt every ae data out batch_size val_images seed"),
    "trajectory": (theory.trajectory_figure, "ckpt every ae out seed num_samples steps"),
    "diffusability": (theory.diffusability_rows, f"{IMAGES} ae"),
}


def get_args():
    """A command, then its flags: the parser gets those that it takes, and refuses all others."""
    command = sys.argv[1] if len(sys.argv) > 1 else None
    function, takes = COMMANDS.get(command, (None, ""))
    takes = takes.split()
    parser = argparse.ArgumentParser(
        prog=f"evaluate.py {command}" if function else "evaluate.py", allow_abbrev=False,
        description=inspect.getdoc(function) if function else __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, metavar=command if function else "COMMAND",
                        help=argparse.SUPPRESS)
    if command == "fid":
        kinds = "folder or .zip of images, .npz of images or of mu and sigma, or cifar10"
        parser.add_argument("a", help=kinds)
        parser.add_argument("b", help=kinds)
    if command == "curves":
        parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its log")
    elif function:                                     # curves reads logs and measures nothing
        takes += ["preset", "device", "results"]

    def add(name, default, help, **options):
        if default is False:
            options["action"] = "store_true"
        elif default is not None:
            options.setdefault("type", type(default))
            help += f" (default: {default})"
        if name in takes:
            parser.add_argument(f"--{name}", default=default, help=help, **options)

    similarity, few = command == "similarity", command in ("latents", "similarity")
    several = command in ("spectrum", "bands", "latents", "diffusability")
    # what is measured
    add("preset", "celeba-f16d16", "named group of defaults; explicit flags win", choices=PRESETS)
    add("ae", None, "ckpt.pt or released weights (default: what --ckpt was trained on, or the "
        "newest of out/ae/<preset>-*/ckpt.pt; where several can be given, all of them)",
        nargs="+" if several else None)
    add("ckpt", None, "run(s) of train_diffusion.py or their ckpt.pt (default: the newest "
        "out/diffusion/<preset>-*/ckpt.pt)", nargs="+")
    add("every", False, "all ckpt_<step>.pt that the run kept, in order")
    add("data", "leaves" if similarity else None, "folder, .zip, cifar10, leaves or discs; "
        "without it what was trained on")
    add("image_size", 224 if similarity else None, "pixels a side; without it as in training, for "
        "fid as above", type=int)
    add("val_images", 8 if few else None if command == "recon" else 1000, "held-out images to use; "
        "of recon without it 1000 or all training images", type=int)
    add("batch_size", 50, "images per network call and process")
    add("workers", 4, "loader processes")
    add("seed", 0, "of every draw")
    # recon
    add("protocol", "plain", "how to measure, see above", choices=("plain", "authors"))
    add("split", None, "training or held-out images (default: val; with --protocol authors: train)",
        choices=("train", "val"))
    # gen and trajectory
    add("num_samples", 64 if command == "trajectory" else 50_000, "images to sample")
    add("steps", 100, "network calls per sample")
    add("sampler", "em", "SiT: Euler-Maruyama or Euler ODE; U-ViT: always DDIM",
        choices=("em", "ode"))
    add("cfg", 1.0, "guidance scale; 1 = off (paper: 1.8 on ImageNet)")
    add("cfg_interval", (0.0, 1.0), "times between which guidance acts, 0 = data", type=float,
        nargs=2)
    add("labels", "turn", "of a conditional model: classes in turn, or at random",
        choices=("turn", "random"))
    add("jpeg", False, "store and score samples after a JPEG round trip, quality 75")
    add("dtype", None, "of the transformer (default: bf16 on cuda, fp32 on cpu)",
        choices=("fp32", "bf16"))
    add("reference_images", 0, "training images to compare with; 0 = all")
    add("folder", False, "also write every sample as a PNG")
    # spectrum and similarity
    add("gamma", 1.0, "flattening exponent of the target")
    add("published", None, "the authors' curves beside yours, in their form",
        choices=figures.CURVES)
    add("encoder", "dinov2_vitb14" if similarity else None, "DINOv2 model")
    add("encoder_source", None, "a local clone of facebookresearch/dinov2, or random (for tests)")
    add("image", None, "an image file (default: the first --val_images held-out ones of --data)")
    add("token", None, "number of the token, row by row from 0 (default: the middle)", type=int)
    # where
    add("out", None if command == "gen" else f"out/{command}.png", "the figure to write; of gen: a "
        "folder (default: beside the checkpoint)")
    add("device", None, "default: cuda when there is a GPU", choices=("cpu", "cuda"))
    add("results", "results.jsonl", "every result is appended here")
    applies = [] if few else takes                     # few images are for the eye
    return run.parse_args(parser, {name: {k: v for k, v in values.items() if k in applies}
                                   for name, values in PRESETS.items()})


def check_path(flag, path, kind):
    """ValueError now, not after hours, unless a "file", "folder" or "figure" can be written."""
    path = Path(path)
    # what exists of it; the rest is made when it is needed
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    fits = existing.is_dir() if kind == "folder" or existing != path else existing.is_file()
    if kind == "figure":
        from matplotlib.backend_bases import FigureCanvasBase
        fits = fits and path.suffix[1:] in {"", *FigureCanvasBase.filetypes}
        kind = "file .png, .pdf or .svg"
    run.need(fits and os.access(existing, os.W_OK),
             f"{flag} {path}: cannot be written there; name a {kind}")


def check_flags(args):
    """ValueError naming the first flag whose value makes no sense, before anything is read."""
    for name, low, high in (
            ("val_images", 1, math.inf), ("batch_size", 1, math.inf), ("num_samples", 2, math.inf),
            ("steps", 2, math.inf), ("image_size", 8, LARGEST_SIDE), ("workers", 0, 1024),
            ("seed", 0, 2 ** 63), ("cfg", 0, math.inf), ("reference_images", 0, math.inf),
            ("gamma", 0, 10)):                         # 16^gamma is to fit float32
        if getattr(args, name, None) is not None:
            run.need_range(args, low, high, name)
    run.need(getattr(args, "reference_images", 0) != 1,
             "--reference_images 1: must be 0 for all, or at least 2")
    start, end = getattr(args, "cfg_interval", (0, 1))
    run.need(0 <= start <= end <= 1, f"--cfg_interval {start} {end}: must be two times in order, "
             "from 0 = data to 1 = noise")
    if hasattr(args, "results"):
        check_path("--results", args.results, "file")
        held = Path(args.results).open("rb").read(1) if Path(args.results).exists() else b""
        run.need(held in (b"", b"{"), f"--results {args.results}: holds something else, to which "
                 "results would be appended; name another file")
    if getattr(args, "out", None):
        check_path("--out", args.out, "folder" if args.command == "gen" else "figure")
        given = [getattr(args, name, None) or [] for name in ("ckpt", "ae", "image", "runs")]
        given = (path for some in given for path in ([some] if type(some) is str else some))
        run.need(Path(args.out).resolve() not in {Path(path).resolve() for path in given},
                 f"--out {args.out}: is what is read; name another place")


def main():
    args = get_args()
    _, world, device = run.init_distributed(getattr(args, "device", "cpu"))
    run.need(world == 1 or args.command in ("recon", "gen"),
             f"{args.command}: runs in one process; start it without torchrun")
    check_flags(args)
    function, _ = COMMANDS[args.command]
    for values, settings in function(args, device):
        report(values, settings, args.results)
    run.barrier()


if __name__ == "__main__":
    with run.one_line_errors():
        main()
