"""
The paper's claims in miniature: Tables 2, 3, 4, 7 and 8 on CIFAR-10 at 32 px, small enough for
two CPU cores. README.md beside this file has the protocol, the results and what they say.

    python -m experiments.miniature run        train and sample what is not there yet, then collect
    python -m experiments.miniature collect    finished runs into experiments/results/*.json
    python -m experiments.miniature table      experiments/results/ into the README's tables
    python -m experiments.miniature figure     experiments/figures/samples.png: samples of each
                                               method from the same noise
"""
import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess
import sys
import textwrap
import threading

import numpy as np
import torch
import torch.nn.functional as F

import runs
import runtime
from data import open_data, train_batches, val_batches
from figures import encode_all, figure_rows
from losses import esm_loss
from metrics import Moments, frechet_distance, to_uint8
from repa import LabelNet, load_labelnet
from weights import load_autoencoder

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent                                         # the scripts
RESULTS, LABELNET = HERE / "results", HERE / "labelnet.pt"
SEEDS, AE_STEPS, SIT_STEPS = (0, 1), 1000, 3000
AE = (f"--model f2d4-tiny --steps {AE_STEPS} --batch_size 16 --lr 2e-3 --eval_every 1000 "
      "--val_images 1000")
SIT = f"--steps {SIT_STEPS} --batch_size 32 --ema 0.998 --eval_every 1000"
GEN = "--num_samples 2000 --steps 30 --batch_size 100 --reference_images 0"
REPA = ("--repa_depth 1 --dog_sigma1 0.5 --dog_sigma2 1.25 "
        "--encoder_source experiments/labelnet.pt")
AUTOENCODERS = {                                           # flags of train_ae.py
    "kl": "--reg kl",
    "se": "--reg se",
    "esm": "--reg esm",
    "dsm": "--reg dsm",
    "esm-gamma0.6": "--reg esm --gamma 0.6",
    "esm-gamma1.4": "--reg esm --gamma 1.4",
    "esm-w0.1": "--reg esm --esm_weight 0.1",
    "esm-w0.001": "--reg esm --esm_weight 0.001",
    "dsm-0-8-12": "--reg dsm --dsm_masks 0 8 12",
    "dsm-0-6-8-10-12": "--reg dsm --dsm_masks 0 6 8 10 12",
    "dsm-0-8-10-12-13": "--reg dsm --dsm_masks 0 8 10 12 13",
    # not in the paper
    "eq": "--reg eq --kl_weight 1e-6",                     # the default when it was run
    "kl-f4": "--reg kl --model f4d4-tiny",
    "esm-f4": "--reg esm --model f4d4-tiny",
    "esm-w1": "--reg esm --esm_weight 1",
    "esm-w1-gamma0.6": "--reg esm --esm_weight 1 --gamma 0.6",
    "esm-w1-gamma1.4": "--reg esm --esm_weight 1 --gamma 1.4",
    "dsm-0-4-6-8": "--reg dsm --dsm_masks 0 4 6 8",
    "dsm-0-12-13-14": "--reg dsm --dsm_masks 0 12 13 14",
}
VARIANTS = {                               # run: its autoencoder, flags of train_diffusion.py
    "kl-f4": ("kl-f4", "--model SiT-tiny/1"),
    "esm-f4": ("esm-f4", "--model SiT-tiny/1"),
    "kl-repa": ("kl", f"--repa repa {REPA}"),
    "dsm-repa": ("dsm", f"--repa repa {REPA}"),
    "kl-irepa": ("kl", f"--repa irepa {REPA}"),
    "kl-dog": ("kl", f"--repa dog {REPA}"),
}
FIRST = ["kl", "se", "eq", "esm", "esm-w1", "dsm"]         # run first; in figures/samples.png
TABLES = {
    "Table 2, and with it `eq` and `esm-w1`, which are ours": FIRST,
    "Table 3": ["kl", "dsm", "kl-repa", "dsm-repa"],
    "Table 4": ["kl-repa", "kl-irepa", "kl-dog"],
    "Table 7": ["esm-gamma0.6", "esm", "esm-gamma1.4", "esm-w0.1", "esm-w0.001"],
    "Table 8": ["dsm-0-8-12", "dsm", "dsm-0-6-8-10-12", "dsm-0-8-10-12-13"],
    "Ours: f = 4": ["kl-f4", "esm-f4"],
    "Ours: gamma at weight 1": ["kl", "esm-w1-gamma0.6", "esm-w1", "esm-w1-gamma1.4"],
    "Ours: masks that cut less, or more": ["dsm-0-4-6-8", "dsm", "dsm-0-12-13-14"],
}
COLUMNS = {                                                # number: its heading, its digits
    "psnr": ("PSNR, dB", 2), "rFD_cifar": ("rFD-cifar", 2), "esm": ("ESM divergence", 3),
    "esm_shape": ("normalised, best scale", 3), "alpha": ("exponent of the PSD", 2),
    "FD_cifar": ("FD-cifar", 2), "SWD_32px": ("SWD 32 px", 1), "spectral_KL": ("spectral KL", 4),
}
# Where it is claimed, the number here, the order of the runs, and the claims: words, run, run.
PAPER_CLAIMS = [
    ("Table 2, gFID", "FD_cifar", "below", [
        ("DSM below Scale Equivariance, 4.44 < 5.87 (f8d4), 4.49 < 5.46 (f16d16)", "dsm", "se"),
        ("Scale Equivariance below SD-VAE, 5.87 < 6.63 (f8d4), 5.46 < 6.88 (f16d16)", "se", "kl"),
        ("DSM below SD-VAE, 4.44 < 6.63 (f8d4), 4.49 < 6.88 (f16d16)", "dsm", "kl"),
        ("ESM below SD-VAE, 5.91 < 6.63 (f8d4), 5.84 < 6.88 (f16d16)", "esm", "kl"),
        ("DSM below ESM, 4.44 < 5.91 (f8d4), 4.49 < 5.84 (f16d16)", "dsm", "esm")]),
    ("Table 2, PSNR", "psnr", "above", [
        ("ESM above SD-VAE, 31.63 > 31.23 (f8d4), 31.30 > 30.08 (f16d16)", "esm", "kl")]),
    ("Table 3, gFID at 400k", "FD_cifar", "below", [
        ("DSM below SD-VAE without REPA, 12.20 < 14.58", "dsm", "kl"),
        ("DSM below SD-VAE with REPA, 6.48 < 7.60", "dsm-repa", "kl-repa"),
        ("SD-VAE with REPA below without, 7.60 < 14.58", "kl-repa", "kl")]),
    ("Table 4, gFID at 400k", "FD_cifar", "below", [
        ("REPA-DoG below iREPA, 4.98 < 5.07 (cfg 1.8; from 300k on only), 20.37 < 21.40 "
         "(no guidance, Sec. 4.2)", "kl-dog", "kl-irepa"),
        ("iREPA below REPA, 5.07 < 5.68 (cfg 1.8), 21.40 < 22.75 (no guidance, Sec. 4.2)",
         "kl-irepa", "kl-repa")]),
    ("Table 7, gFID", "FD_cifar", "below", [
        ("gamma 1.0 below 0.6 at weight 0.01, 5.84 < 5.90", "esm", "esm-gamma0.6"),
        ("gamma 1.0 below 1.4 at weight 0.01, 5.84 < 6.57", "esm", "esm-gamma1.4"),
        ("weight 0.01 below 0.1 at gamma 1, 5.84 < 6.82", "esm", "esm-w0.1"),
        ("weight 0.01 below 0.001 at gamma 1, 5.84 < 6.00", "esm", "esm-w0.001")]),
    ("Table 8, gFID", "FD_cifar", "below", [
        ("{0, 8, 10, 12} below {0, 6, 8, 10, 12}, 4.49 < 4.61", "dsm", "dsm-0-6-8-10-12"),
        ("{0, 8, 10, 12} below {0, 8, 12}, 4.49 < 5.02", "dsm", "dsm-0-8-12"),
        ("{0, 8, 10, 12} below {0, 8, 10, 12, 13}, 4.49 < 5.33", "dsm", "dsm-0-8-10-12-13")]),
    ("Fig. 3, smoothness of the latents", "alpha", "above", [
        ("DSM above SD-VAE", "dsm", "kl"),
        ("ESM above SD-VAE", "esm", "kl")]),
    ("Figs. 4 and 5, KL of the published curves from the flattened target", "esm", "below", [
        ("Scale Equivariance below SD-VAE, .020 < .038", "se", "kl"),
        ("DSM below SD-VAE, .0054 < .038", "dsm", "kl"),
        ("ESM below SD-VAE, .0044 < .038", "esm", "kl"),
        ("DSM below Scale Equivariance, .0054 < .020", "dsm", "se"),
        ("ESM below DSM, .0044 < .0054", "esm", "dsm")]),
]
OUR_CLAIMS = [
    ("EQ-VAE's place, generation", "FD_cifar", "below", [
        ("DSM below EQ-VAE", "dsm", "eq"),
        ("EQ-VAE below SD-VAE", "eq", "kl")]),
    ("Downsampling makes latents smoother", "alpha", "above", [
        ("Scale Equivariance above SD-VAE", "se", "kl"),
        ("EQ-VAE above SD-VAE", "eq", "kl")]),
    ("f = 4, generation", "FD_cifar", "below", [("ESM below SD-VAE", "esm-f4", "kl-f4")]),
    ("Weight 1, generation", "FD_cifar", "below", [
        ("ESM below SD-VAE", "esm-w1", "kl"),
        ("gamma 1.0 below 0.6", "esm-w1", "esm-w1-gamma0.6"),
        ("gamma 1.0 below 1.4", "esm-w1", "esm-w1-gamma1.4")]),
    ("Masks, generation", "FD_cifar", "below", [
        ("{0, 8, 10, 12} below {0, 4, 6, 8}", "dsm", "dsm-0-4-6-8"),
        ("{0, 8, 10, 12} below {0, 12, 13, 14}", "dsm", "dsm-0-12-13-14")]),
]
LOCKS = collections.defaultdict(threading.Lock)            # several runs share an autoencoder
MARKS = "<!-- miniature.py table -->", "<!-- end of miniature.py table -->"


# --------------------------------------------------------------------------------------------------
# Training and sampling

def plan():
    """The runs in order of importance, (name, seed): FIRST with all seeds, then the rest."""
    every = dict.fromkeys(name for names in TABLES.values() for name in names)
    rest = [name for name in every if name not in FIRST]
    return [(name, seed) for names in (FIRST, rest) for seed in SEEDS for name in names]


def folders(name, seed, out):
    """Where a run lies: (autoencoder, latent cache, diffusion model); runs share the first two."""
    autoencoder, _ = VARIANTS.get(name, (name, ""))
    shared = f"{autoencoder}-s{seed}"
    return out / "ae" / shared, out / "latents" / shared, out / "diffusion" / f"{name}-s{seed}"


def commands(name, seed, data, out):
    """
    The three commands of a run, each a list of words (a folder's name may hold spaces); each
    continues where an earlier call was stopped.
    """
    autoencoder, flags = VARIANTS.get(name, (name, ""))
    ae, cache, sit = map(str, folders(name, seed, out))
    train_ae = ["train_ae.py", "--preset", "quick", *AE.split(), *AUTOENCODERS[autoencoder].split(),
                "--data", str(data), "--seed", str(seed), "--out", ae, "--resume"]
    train_diffusion = ["train_diffusion.py", "--preset", "quick", "--ae", f"{ae}/ckpt.pt",
                       *SIT.split(), *flags.split(), "--seed", str(seed),
                       "--out", sit, "--cache", cache, "--resume"]
    gen = ["evaluate.py", "gen", "--preset", "quick", "--ckpt", f"{sit}/ckpt.pt", *GEN.split(),
           "--results", f"{sit}/gen.jsonl"]
    return train_ae, train_diffusion, gen


def from_anywhere(word):
    """A word of a command; if it names a file of the project, by its full path."""
    ours = word.endswith(".py") or word == "experiments/labelnet.pt"
    return str(ROOT / word) if ours else word


def trained(folder, stage):
    """Steps that the run in a folder has behind it; 0 if there is none."""
    path = folder / "ckpt.pt"
    return runs.load_checkpoint(path, stage)["step"] if path.exists() else 0


def run_one(name, seed, data, out):
    """
    One autoencoder, one diffusion model, its samples, as far as they are not there; what the
    scripts print goes to output.txt of the run.
    raises   ValueError for a run of other flags, a script that failed, or one that was stopped by a
             signal before its last step
    """
    words = commands(name, seed, data, out)
    ae, cache, sit = folders(name, seed, out)
    asked = "".join(f"python {shlex.join(command)}\n" for command in words)
    note = sit / "commands.txt"
    if note.exists() and note.read_text() != asked:
        raise ValueError(f"{sit}: was made by other commands, see commands.txt there; name "
                         "another --out")
    sit.mkdir(parents=True, exist_ok=True)
    note.write_text(asked)

    def call(command, folder=None, stage=None, steps=0):
        if folder and trained(folder, stage) == steps:
            return
        found = [from_anywhere(word) for word in command]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}                  # runs share the cores
        with open(sit / "output.txt", "a") as file:
            done = subprocess.run([sys.executable, *found], stdout=file, stderr=file,
                                  env=one_thread)
        if done.returncode or folder and trained(folder, stage) < steps:
            raise ValueError(f"{name}-s{seed}: {command[0]} did not reach its end, see "
                             f"{sit}/output.txt; the same command continues")

    train_ae, train_diffusion, gen = words
    with LOCKS[ae.name]:
        call(train_ae, ae, "ae", AE_STEPS)
        if not cache.exists():
            call(train_diffusion, sit, "diffusion", SIT_STEPS)
    call(train_diffusion, sit, "diffusion", SIT_STEPS)
    if not (sit / "samples" / "samples.npz").exists():
        call(gen)


def run_all(data, out, jobs):
    """
    Every run of the plan, `jobs` at a time. One that fails does not stop the others; Ctrl-C does.
    returns  what went wrong, as lines
    """
    failed, pool = [], concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(run_one, name, seed, data, out) for name, seed in plan()]
        for future in concurrent.futures.as_completed(futures):
            if error := future.exception():
                failed.append(str(error))
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


# --------------------------------------------------------------------------------------------------
# The network of FD-cifar

def train_labelnet(data, path=LABELNET, steps=6000, batch_size=64, seed=0):
    """
    Train the LabelNet on the training images' classes; writes its weights (float16) and the
    accuracy on the held-out images. The file is part of the project, since distances in the
    features of another network, even one trained alike, are other numbers. No-op if it is there.
    """
    if path.exists():
        return
    train_set, val_set = open_data(data, 32, val_images=5000)
    num_classes = len(train_set.classes)
    torch.manual_seed(seed)
    net = LabelNet(num_classes).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    batches = train_batches(train_set, batch_size, seed=seed)
    for _, (images, labels, _) in zip(range(steps), batches):
        loss = F.cross_entropy(net(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in net.state_dict().items()}
    net.load_state_dict(weights)
    net.eval()
    with torch.no_grad():
        right = [net(images).argmax(1) == labels for images, labels, _ in val_batches(val_set, 250)]
    runs.save_checkpoint(path, dict(
        stage="labelnet", model=weights, num_classes=num_classes,
        accuracy=torch.cat(right).float().mean().item(), steps=steps, batch_size=batch_size,
        seed=seed))


# --------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def pooled_moments(net, batches):
    """Mean, covariance of the pooled features over batches of images (b, 3, 32, 32) in [-1, 1]."""
    moments = Moments(net.width)
    for images in batches:
        moments.add(net.pooled(images))
    return moments.mean_cov()[1:]


@torch.no_grad()
def reconstructions(ae, images, batch_size=100):
    """
    Images (N, 3, H, W) through the autoencoder, by the posterior's mode, rounded as a PNG would:
    batches (b, 3, H, W) in [-1, 1].
    """
    for x in images.split(batch_size):
        yield to_uint8(ae.decode(ae.encode(x).mode())).float() / 127.5 - 1


@torch.no_grad()
def divergences(ae, images):
    """
    ESM divergence (gamma 1, nats) of the latents of images (N, 3, H, W), and of the normalised
    latents at the best of scales from 1/8 to 54. log(1 + P) sees the latent's scale and the
    diffusion model does not, for it normalises: the second is what is left for the latter.
    """
    latents = encode_all(ae, images, 100, seed=0)
    scales = 2 ** torch.arange(-3, 6, 0.25)
    best = min(esm_loss(images, scale * ae.normalize(latents)).item() for scale in scales)
    return esm_loss(images, latents).item(), best


def load_logs(ae, sit):
    """{stage: lines of its log.jsonl}, and the last line of gen.jsonl; ValueError if unfinished."""
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    logs = dict(ae=read(ae / "log.jsonl"), diffusion=read(sit / "log.jsonl"))
    gen = read(sit / "gen.jsonl")[-1]
    if logs["ae"][-1]["step"] != AE_STEPS or gen["step"] != SIT_STEPS:
        raise ValueError(f"{sit}: samples of a run that was not finished; remove its folder")
    return logs, gen


def loss_curve(lines):
    """[step, loss] of every tenth line of a log that has one."""
    return [[line["step"], round(line["loss"], 4)] for line in lines if "loss" in line][::10]


def measure(net, ae, sit, held_out, reference):
    """
    A finished run's numbers, loss curves, commands and hardware, as a dict.
    held_out   images (N, 3, 32, 32) in [-1, 1]
    reference  pooled_moments of the training images
    """
    logs, gen = load_logs(ae, sit)
    samples = np.load(sit / "samples" / "samples.npz")["arr_0"]             # (N, 32, 32, 3) uint8
    samples = torch.from_numpy(samples).movedim(-1, 1)                      # (N, 3, 32, 32)
    distance = lambda batches: frechet_distance(*pooled_moments(net, batches), *reference)
    last = logs["ae"][-1]
    numbers = {key.removeprefix("val_"): last[key] for key in last if key != "step"}
    numbers |= {key: gen[key] for key in gen if key.startswith(("SWD", "spectral"))}
    network = load_autoencoder(ae / "ckpt.pt")
    # anew: the log's "esm" is for the gamma of the run
    numbers["esm"], numbers["esm_shape"] = divergences(network, held_out[::4])
    numbers["rFD_cifar"] = distance(reconstructions(network, held_out))
    numbers["FD_cifar"] = distance((samples / 127.5 - 1).split(500))
    return dict(
        samples=len(samples), numbers=numbers,
        loss_curve={stage: loss_curve(lines) for stage, lines in logs.items()},
        commands=(sit / "commands.txt").read_text().splitlines(),
        **{key: gen[key] for key in ("commit", "hardware", "torch", "time")})


def collect(out):
    """
    experiments/results/NAME-sSEED.json for every finished run that has none: its commands,
    hardware, commit, final numbers and loss curves.
    """
    net = load_labelnet(str(LABELNET)).eval()
    checkpoint = torch.load(LABELNET, weights_only=True)   # for its accuracy
    reference = None
    for name, seed in plan():
        path = RESULTS / f"{name}-s{seed}.json"
        ae, _, sit = folders(name, seed, out)
        if path.exists() or not (sit / "samples" / "samples.npz").exists():
            continue
        if reference is None:
            data = runs.checkpoint_args(ae / "ckpt.pt")["data"]
            train_set, val_set = open_data(data, 32, val_images=2000)
            held_out = torch.cat([images for images, _, _ in val_batches(val_set, 500)])
            reference = pooled_moments(net, (x for x, _, _ in val_batches(train_set, 500)))
            unseen = frechet_distance(*pooled_moments(net, held_out.split(500)), *reference)
        result = dict(
            name=name, seed=seed, labelnet_accuracy=checkpoint["accuracy"],
            FD_cifar_of_held_out_images=unseen, **measure(net, ae, sit, held_out, reference))
        line = (json.dumps(result) + "\n").encode()
        runs.write_atomic(path, lambda file, line=line: file.write(line))
        print(f"wrote {path}: FD-cifar {result['numbers']['FD_cifar']:.2f}")


# --------------------------------------------------------------------------------------------------
# Tables and samples

def verdict(results, key, a, order, b, whose="the paper"):
    """
    The protocol's rule, over the seeds that both runs have, for the claim that run `a` is "below"
    or "above" run `b` in the number `key`. A positive gap is as claimed.
    """
    seeds = [seed for seed in SEEDS if (a, seed) in results and (b, seed) in results]
    if not seeds:
        return "not run"
    of_a, of_b = ([results[name, seed]["numbers"][key] for seed in seeds] for name in (a, b))
    sign = {"below": 1, "above": -1}[order]
    gap = sign * (np.mean(of_b) - np.mean(of_a))
    between_seeds = max(np.ptp(of_a), np.ptp(of_b))
    _, digits = COLUMNS[key]
    if len(seeds) < 2:
        side = "as" if gap > 0 else "against"
        return f"one seed, {side} {whose} (gap {abs(gap):.{digits}f}): undecided"
    word = "undecided"
    if gap > between_seeds:
        word = "agreement"
    elif gap < -between_seeds:
        word = "**contradiction**"
    return f"{word}: gap {gap:+.{digits}f}, spread between seeds {between_seeds:.{digits}f}"


def table_row(*cells):
    """One row of a markdown table."""
    return f"| {' | '.join(cells)} |"


def run_row(name, results):
    """The row of a run: the numbers of its seeds side by side."""
    runs = [results[name, seed]["numbers"] for seed in SEEDS if (name, seed) in results]
    if not runs:
        return table_row(f"`{name}`", "not run", *[""] * (len(COLUMNS) - 1))
    cells = []
    for key, (_, digits) in COLUMNS.items():
        cells.append(" / ".join(f"{run[key]:.{digits}f}" for run in runs))
    return table_row(f"`{name}`", *cells)


def claims_table(heading, claims, results, whose):
    """PAPER_CLAIMS or OUR_CLAIMS as lines of a markdown table, each with its verdict."""
    lines = [table_row(heading, "here", "measured by"), "|---|---|---|"]
    for where, key, order, group in claims:
        column, _ = COLUMNS[key]
        for words, a, b in group:
            lines.append(table_row(f"{where}: {words}", verdict(results, key, a, order, b, whose),
                                   f"{column}: `{a}` {order} `{b}`"))
    return lines


def table():
    """The tables of the README beside this file as markdown, from experiments/results/ alone."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-s?.json"))]
    if not found:
        raise FileNotFoundError(f"{RESULTS}: no results yet; `python -m experiments.miniature run` "
                                "makes them")
    results = {(result["name"], result["seed"]): result for result in found}
    one, hardware = found[0], sorted({result["hardware"] for result in found})
    lines = textwrap.wrap(
        f"Each run has {one['samples']:,} samples, and the numbers of its seeds stand side by "
        "side. FD-cifar and rFD-cifar use the features of a network with "
        f"{100 * one['labelnet_accuracy']:.1f}% accuracy on held-out images. 2,000 held-out images "
        f"themselves have an FD-cifar of {one['FD_cifar_of_held_out_images']:.2f}. Hardware: "
        f"{', '.join(hardware)}. Commands, logs and versions are in `experiments/results/`.",
        110, break_on_hyphens=False)
    for title, names in TABLES.items():
        lines += ["", f"**{title}**", ""]
        lines.append(table_row("run", *[heading for heading, _ in COLUMNS.values()]))
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        lines += [run_row(name, results) for name in names]
    lines += ["", *claims_table("the paper says", PAPER_CLAIMS, results, "the paper")]
    lines += ["", *claims_table("ours", OUR_CLAIMS, results, "our guess")]
    return "\n".join(lines)


def write_readme(text):
    """Put the tables between their two marks in the README beside this file."""
    path = HERE / "README.md"
    before, rest = path.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    page = f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"
    runs.write_atomic(path, lambda file: file.write(page.encode()))


def draw_samples(out):
    """figures/samples.png: ten samples of each run of FIRST, seed 0."""
    rows = {}
    for name in FIRST:
        path = folders(name, 0, out)[-1] / "samples" / "samples.npz"
        if path.exists():
            rows[name] = torch.from_numpy(np.load(path)["arr_0"][:10]).movedim(-1, 1) / 255
    if not rows:
        raise FileNotFoundError(f"--out {out}: no samples of seed 0 here yet; "
                                "`python -m experiments.miniature run` makes them")
    figure_rows(rows, HERE / "figures" / "samples.png")


def get_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("command", choices=("run", "collect", "table", "figure"))
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder or zip of the same "
                        "images by class; used by run")
    parser.add_argument("--out", default="out/miniature", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2,
                        help="runs at a time, one thread each, > 0")
    args = runtime.parse_args(parser, {})
    runtime.need(args.jobs >= 1, f"--jobs {args.jobs}: must be at least 1")
    return args


def main():
    args = get_args()
    out, failed = pathlib.Path(args.out), []
    if args.command == "run":
        train_labelnet(args.data)
        failed = run_all(args.data, out, args.jobs)
    if args.command in ("run", "collect"):
        collect(out)
    if args.command == "table":
        text = table()
        write_readme(text)
        print(text)
    if args.command == "figure":
        draw_samples(out)
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    with runtime.one_line_errors():
        main()
