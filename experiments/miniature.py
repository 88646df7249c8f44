"""
The paper's claims in miniature: Tables 2, 3, 4, 7 and 8 on CIFAR-10 at 32 px, small enough for
two CPU cores. README.md beside this file has the protocol, the results and what they say.

    python -m experiments.miniature run        train and sample what is not there yet, then collect
    python -m experiments.miniature collect    finished runs into experiments/results/*.json
    python -m experiments.miniature table      experiments/results/ into the README's tables
    python -m experiments.miniature figure     experiments/figures/samples.png: samples of each
                                               method from the same noise; reconstructions.png
    python -m experiments.miniature scatter    experiments/figures/scatter.png: which number of an
                                               autoencoder predicts dFD, from experiments/results/
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
from scipy.stats import spearmanr

import runs
import runtime
from data import open_data, take, train_batches, val_batches
from dit import NoiseStream
from figures import encode_all, figure_rows, save_figure, subplots
from metrics import Moments, frechet_distance, frechet_parts, to_uint8
from published import divergence
from repa import LabelNet, load_labelnet
from spectral import match_resolution, spectrum_distribution
from theory import diffusability
from weights import load_autoencoder

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent                                         # the scripts
RESULTS, LABELNET = HERE / "results", HERE / "labelnet.pt"
SEEDS, AE_STEPS, SIT_STEPS, LONG_STEPS = (0, 1, 2), 1200, 2000, 8000
REFERENCE = 5_000                                          # training images in FD, rFD and dFD
AE = (f"--model f2d2-tiny --steps {AE_STEPS} --batch_size 16 --lr 2e-3 "
      f"--eval_every {AE_STEPS} --val_images 1000")
SIT = (f"--model SiT-tiny/2 --steps {SIT_STEPS} --batch_size 32 --lr 1e-3 --ema 0.998 "
       "--eval_every 1000")
GEN = "--num_samples 2000 --steps 30 --batch_size 100 --reference_images 0"
REPA = ("--repa_depth 1 --dog_sigma1 0.5 --dog_sigma2 1.25 "
        "--encoder_source experiments/labelnet.pt")
AUTOENCODERS = {                                           # flags of train_ae.py
    "kl": "--reg kl --kl_weight 3e-5",
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
    "kl-1e-6": "--reg kl --kl_weight 1e-6",
    "esm-w1": "--reg esm --esm_weight 1",
    "eq": "--reg eq",
}
FIRST = ["kl", "dsm", "esm", "se"]         # Table 2; in figures/samples.png
LONG = [f"{name}-long" for name in FIRST]  # the same with more steps
VARIANTS = {                               # run: its autoencoder, flags of train_diffusion.py
    **{long: (name, f"--steps {LONG_STEPS}") for long, name in zip(LONG, FIRST)},
    "kl-repa": ("kl", f"--repa repa {REPA}"),
    "dsm-repa": ("dsm", f"--repa repa {REPA}"),
    "kl-irepa": ("kl", f"--repa irepa {REPA}"),
    "kl-dog": ("kl", f"--repa dog {REPA}"),
}
TABLES = {
    "Table 2": FIRST,
    "Table 2, four times the steps of diffusion": LONG,
    "Table 7": ["esm-gamma0.6", "esm", "esm-gamma1.4", "esm-w0.1", "esm-w0.001"],
    "Table 8": ["dsm-0-8-12", "dsm", "dsm-0-6-8-10-12", "dsm-0-8-10-12-13"],
    "Table 4": ["kl-repa", "kl-irepa", "kl-dog"],
    "Ours": ["kl", "kl-1e-6", "esm", "esm-w1", "eq", "dsm"],
    "Table 3": ["kl", "dsm", "kl-repa", "dsm-repa"],
}
COLUMNS = {                                                # number: its heading, its digits
    "psnr": ("PSNR, dB", 2), "alpha": ("exponent of the PSD", 2), "esm": ("ESM divergence", 3),
    "esm_shape": ("normalised, best scale", 3), "kl_from_target": ("KL from target, with DC", 4),
    "FD_cifar": ("FD", 2), "rFD_cifar": ("rFD", 2), "dFD_cifar": ("dFD", 2),
    "SWD_32px": ("SWD 32 px", 1), "spectral_KL": ("spectral KL", 4),
}
PREDICTORS = {                                             # known before diffusion, and in words
    "kl_from_target": "KL from target, with DC", "esm": "ESM divergence, as it is",
    "esm_shape": "ESM divergence, normalised", "alpha": "exponent of the PSD",
    "neighbours": "correlation of neighbouring cells", "high_band": "dB in the latent's high band",
    "dsm": "DSM consistency, dB", "psnr": "PSNR, dB",
}
GFID = ["FD_cifar", "dFD_cifar"]                           # what stands here for the paper's gFID
TABLE_2 = [                                                # claims: words, run, run
    ("DSM below Scale Equivariance, 4.44 < 5.87 (f8d4), 4.49 < 5.46 (f16d16)", "dsm", "se"),
    ("Scale Equivariance below SD-VAE, 5.87 < 6.63 (f8d4), 5.46 < 6.88 (f16d16)", "se", "kl"),
    ("DSM below SD-VAE, 4.44 < 6.63 (f8d4), 4.49 < 6.88 (f16d16)", "dsm", "kl"),
    ("ESM below SD-VAE, 5.91 < 6.63 (f8d4), 5.84 < 6.88 (f16d16)", "esm", "kl"),
    ("DSM below ESM, 4.44 < 5.91 (f8d4), 4.49 < 5.84 (f16d16)", "dsm", "esm"),
]
# Where it is claimed, the numbers here, the order of the runs, and the claims.
PAPER_CLAIMS = [
    ("Table 2, gFID", GFID, "below", TABLE_2),
    (f"Table 2, gFID, here with {LONG_STEPS:,} steps", GFID, "below",
     [(words, f"{a}-long", f"{b}-long") for words, a, b in TABLE_2]),
    ("Table 2, PSNR", ["psnr"], "above", [
        ("ESM above SD-VAE, 31.63 > 31.23 (f8d4), 31.30 > 30.08 (f16d16)", "esm", "kl")]),
    ("Table 3, gFID at 400k", GFID, "below", [
        ("DSM below SD-VAE without REPA, 12.20 < 14.58", "dsm", "kl"),
        ("DSM below SD-VAE with REPA, 6.48 < 7.60", "dsm-repa", "kl-repa"),
        ("SD-VAE with REPA below without, 7.60 < 14.58", "kl-repa", "kl")]),
    ("Table 4, gFID at 400k", GFID, "below", [
        ("REPA-DoG below iREPA, 4.98 < 5.07 (cfg 1.8; from 300k on only), 20.37 < 21.40 "
         "(no guidance, Sec. 4.2)", "kl-dog", "kl-irepa"),
        ("iREPA below REPA, 5.07 < 5.68 (cfg 1.8), 21.40 < 22.75 (no guidance, Sec. 4.2)",
         "kl-irepa", "kl-repa")]),
    ("Table 7, gFID", GFID, "below", [
        ("gamma 1.0 below 0.6 at weight 0.01, 5.84 < 5.90", "esm", "esm-gamma0.6"),
        ("gamma 1.0 below 1.4 at weight 0.01, 5.84 < 6.57", "esm", "esm-gamma1.4"),
        ("weight 0.01 below 0.1 at gamma 1, 5.84 < 6.82", "esm", "esm-w0.1"),
        ("weight 0.01 below 0.001 at gamma 1, 5.84 < 6.00", "esm", "esm-w0.001")]),
    ("Table 8, gFID", GFID, "below", [
        ("{0, 8, 10, 12} below {0, 6, 8, 10, 12}, 4.49 < 4.61", "dsm", "dsm-0-6-8-10-12"),
        ("{0, 8, 10, 12} below {0, 8, 12}, 4.49 < 5.02", "dsm", "dsm-0-8-12"),
        ("{0, 8, 10, 12} below {0, 8, 10, 12, 13}, 4.49 < 5.33", "dsm", "dsm-0-8-10-12-13")]),
    ("Fig. 3, smoothness of the latents", ["alpha"], "above", [
        ("DSM above SD-VAE", "dsm", "kl"),
        ("ESM above SD-VAE", "esm", "kl")]),
    ("Figs. 4 and 5, KL of the published curves from the flattened target", ["kl_from_target"],
     "below", [
        ("Scale Equivariance below SD-VAE, .020 < .038", "se", "kl"),
        ("DSM below SD-VAE, .0054 < .038", "dsm", "kl"),
        ("ESM below SD-VAE, .0044 < .038", "esm", "kl"),
        ("DSM below Scale Equivariance, .0054 < .020", "dsm", "se"),
        ("ESM below DSM, .0044 < .0054", "esm", "dsm")]),
]
OUR_CLAIMS = [
    ("KL's weight, generation", GFID, "below", [
        ("DSM below KL with weight 1e-6", "dsm", "kl-1e-6"),
        ("ESM below KL with weight 1e-6", "esm", "kl-1e-6")]),
    ("ESM's weight 1, generation", GFID, "below", [
        ("ESM with weight 1 below SD-VAE", "esm-w1", "kl"),
        ("ESM with weight 1 below ESM", "esm-w1", "esm")]),
    ("EQ-VAE's place, generation", GFID, "below", [
        ("DSM below EQ-VAE", "dsm", "eq"),
        ("EQ-VAE below SD-VAE", "eq", "kl")]),
    ("Downsampling makes latents smoother", ["alpha"], "above", [
        ("Scale Equivariance above SD-VAE", "se", "kl"),
        ("EQ-VAE above SD-VAE", "eq", "kl")]),
]
LOCKS = collections.defaultdict(threading.Lock)            # several runs share an autoencoder
MARKS = "<!-- miniature.py table -->", "<!-- end of miniature.py table -->"


# --------------------------------------------------------------------------------------------------
# Training and sampling

def plan():
    """The runs in order of importance, (name, seed): Table 2 with all seeds, the rest with two."""
    runs = [(name, seed) for names in (FIRST, LONG) for seed in SEEDS for name in names]
    every = [name for names in TABLES.values() for name in names]
    runs += [(name, seed) for seed in SEEDS[:2] for name in every]
    return list(dict.fromkeys(runs))


def sit_steps(name):
    """Steps of diffusion in a run of this name."""
    return LONG_STEPS if name in LONG else SIT_STEPS


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
            call(train_diffusion, sit, "diffusion", sit_steps(name))
    call(train_diffusion, sit, "diffusion", sit_steps(name))
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
def reconstruction(ae, images, indices):
    """
    Images (b, 3, H, W) through the autoencoder, rounded as a PNG would: the same shape, in [-1, 1].
    By a sample of the posterior, drawn from (0, index): latents like those that diffusion is
    trained on, so that one that draws them perfectly has dFD 0. The authors decode a sample, too.
    """
    posterior = ae.encode(images)
    noise = NoiseStream(0, indices)(posterior.mean.shape)
    return to_uint8(ae.decode(posterior.sample(noise))).float() / 127.5 - 1


def load_logs(ae, sit, steps):
    """
    {stage: lines of its log.jsonl}, and the last line of gen.jsonl.
    raises   ValueError if the autoencoder or the `steps` of diffusion were not finished
    """
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    logs = dict(ae=read(ae / "log.jsonl"), diffusion=read(sit / "log.jsonl"))
    gen = read(sit / "gen.jsonl")[-1]
    if logs["ae"][-1]["step"] != AE_STEPS or gen["step"] != steps:
        raise ValueError(f"{sit}: samples of a run that was not finished; remove its folder")
    return logs, gen


def loss_curve(lines):
    """[step, loss] of every tenth line of a log that has one."""
    return [[line["step"], round(line["loss"], 4)] for line in lines if "loss" in line][::10]


def measure(net, ae, sit, steps, held_out, train_set, moments):
    """
    The numbers, loss curves, commands and hardware of a run that finished its steps, as a dict.
    held_out   images (N, 3, 32, 32) in [-1, 1]
    train_set  images that it was trained on, and their pooled_moments
    """
    logs, gen = load_logs(ae, sit, steps)
    samples = np.load(sit / "samples" / "samples.npz")["arr_0"]             # (N, 32, 32, 3) uint8
    samples = torch.from_numpy(samples).movedim(-1, 1)                      # (N, 3, 32, 32)
    network = load_autoencoder(ae / "ckpt.pt")
    decoded = (reconstruction(network, images, indices.tolist())
               for images, _, indices in val_batches(train_set, 100))
    parts = frechet_parts(pooled_moments(net, (samples / 127.5 - 1).split(500)),
                          pooled_moments(net, decoded), moments)
    numbers = {key: gen[key] for key in gen if key.startswith(("SWD", "spectral"))}
    numbers |= dict(zip(("FD_cifar", "rFD_cifar", "dFD_cifar"), parts))
    numbers |= diffusability(network, held_out[:500])
    numbers["kl_from_target"] = kl_from_target(network, held_out[:1000])
    numbers["ssim"] = logs["ae"][-1]["val_ssim"]
    return dict(
        samples=len(samples), reference=len(train_set), numbers=numbers,
        loss_curve={stage: loss_curve(lines) for stage, lines in logs.items()},
        commands=(sit / "commands.txt").read_text().splitlines(),
        **{key: gen[key] for key in ("commit", "hardware", "torch", "time")})


@torch.no_grad()
def kl_from_target(ae, images):
    """
    The paper's form of a latent's spectrum (Figs. 4 and 5): KL(target || latents), nats, of mean
    shares of log(1 + P) with DC kept; target: images (N, 3, H, W) flattened by gamma 1.
    """
    latents = encode_all(ae, images, 100, seed=0)
    small = match_resolution(images, latents.shape[-2:])
    target = spectrum_distribution(small, gamma=1.0, remove_dc=False).mean(0)
    return divergence(target, spectrum_distribution(latents, remove_dc=False).mean(0))


def collect(out):
    """
    experiments/results/NAME-sSEED.json for every finished run that has none: its commands,
    hardware, commit, final numbers and loss curves.
    """
    net = load_labelnet(str(LABELNET)).eval()
    checkpoint = torch.load(LABELNET, weights_only=True)   # for its accuracy
    train_set = None
    for name, seed in plan():
        path = RESULTS / f"{name}-s{seed}.json"
        ae, _, sit = folders(name, seed, out)
        if path.exists() or not (sit / "samples" / "samples.npz").exists():
            continue
        if train_set is None:
            data = runs.checkpoint_args(ae / "ckpt.pt")["data"]
            every, val_set = open_data(data, 32, val_images=2000)
            train_set = take(every, np.arange(0, len(every), len(every) // REFERENCE))
            held_out = torch.cat([images for images, _, _ in val_batches(val_set, 500)])
            moments = pooled_moments(net, (images for images, _, _ in val_batches(train_set, 500)))
            unseen = frechet_distance(*pooled_moments(net, held_out.split(500)), *moments)
        result = dict(
            name=name, seed=seed, labelnet_accuracy=checkpoint["accuracy"],
            FD_cifar_of_held_out_images=unseen,
            **measure(net, ae, sit, sit_steps(name), held_out, train_set, moments))
        line = (json.dumps(result) + "\n").encode()
        runs.write_atomic(path, lambda file, line=line: file.write(line))
        shown = " ".join(f"{key} {result['numbers'][key]:.2f}" for key in GFID)
        print(f"wrote {path}: {shown}", flush=True)


# --------------------------------------------------------------------------------------------------
# Tables and samples

def load_results():
    """{(name, seed): what is in its file}, from experiments/results/."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-s?.json"))]
    return {(result["name"], result["seed"]): result for result in found}


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
    """PAPER_CLAIMS or OUR_CLAIMS as lines of a markdown table, with a verdict for each number."""
    lines = [table_row(heading, "here", "measured by"), "|---|---|---|"]
    for where, keys, order, group in claims:
        for words, a, b in group:
            cells = []
            for key in keys:
                name = f"{COLUMNS[key][0]}: " if len(keys) > 1 else ""
                cells.append(name + verdict(results, key, a, order, b, whose))
            columns = " and ".join(COLUMNS[key][0] for key in keys)
            lines.append(table_row(f"{where}: {words}", "<br>".join(cells),
                                   f"{columns}: `{a}` {order} `{b}`"))
    return lines


def table():
    """The tables of the README beside this file as markdown, from experiments/results/ alone."""
    results = load_results()
    if not results:
        raise FileNotFoundError(f"{RESULTS}: no results yet; `python -m experiments.miniature run` "
                                "makes them")
    one = next(iter(results.values()))
    hardware = sorted({result["hardware"] for result in results.values()})
    lines = textwrap.wrap(
        f"Each run has {one['samples']:,} samples, and the numbers of its seeds stand side by "
        f"side. FD, rFD and dFD are of {one['reference']:,} training images, in the features of a "
        f"network with {100 * one['labelnet_accuracy']:.1f}% accuracy on held-out images. 2,000 "
        f"held-out images themselves have an FD of {one['FD_cifar_of_held_out_images']:.2f}. "
        f"Hardware: {', '.join(hardware)}. Commands, logs and versions are in "
        "`experiments/results/`.",
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


def draw_pictures(out):
    """
    figures/samples.png, ten samples of Table 2's runs at both lengths, from the same noise, and
    figures/reconstructions.png, ten held-out images and what becomes of them; seed 0.
    """
    found = {name: folders(name, 0, out) for name in FIRST + LONG
             if (folders(name, 0, out)[-1] / "samples" / "samples.npz").exists()}
    if not found:
        raise FileNotFoundError(f"--out {out}: no samples of seed 0 here yet; "
                                "`python -m experiments.miniature run` makes them")
    samples, decoded, images = {}, {}, None
    for name, (ae, _, sit) in found.items():
        pixels = np.load(sit / "samples" / "samples.npz")["arr_0"][:10]
        samples[name] = torch.from_numpy(pixels).movedim(-1, 1) / 255
        autoencoder, _ = VARIANTS.get(name, (name, ""))
        if autoencoder in decoded:                         # both lengths share it
            continue
        if images is None:
            _, val_set = open_data(runs.checkpoint_args(ae / "ckpt.pt")["data"], 32, val_images=10)
            images, _, indices = next(iter(val_batches(val_set, 10)))
            decoded["image"] = images * 0.5 + 0.5
        network = load_autoencoder(ae / "ckpt.pt")
        decoded[autoencoder] = reconstruction(network, images, indices.tolist()) * 0.5 + 0.5
    figure_rows(dict(sorted(samples.items())), HERE / "figures" / "samples.png")
    figure_rows(decoded, HERE / "figures" / "reconstructions.png")


def scatter():
    """
    figures/scatter.png: dFD of every run without alignment against each number that is known of
    its autoencoder beforehand. Spearman's rank correlations, one a length, are printed.
    """
    every = load_results().values()
    lengths = {SIT_STEPS: [result for result in every if result["name"] in AUTOENCODERS],
               LONG_STEPS: [result for result in every if result["name"] in LONG]}
    lengths = {steps: found for steps, found in lengths.items() if len(found) >= 3}
    if not lengths:
        raise FileNotFoundError(f"{RESULTS}: a correlation needs three runs or more; "
                                "`python -m experiments.miniature run` makes them")
    figure, axes = subplots(2, 4, figsize=(15, 7), sharey=True, layout="constrained")
    for ax, (key, words) in zip(axes.flat, PREDICTORS.items()):
        correlations = []
        for steps, found in lengths.items():
            x, y = ([result["numbers"][k] for result in found] for k in (key, "dFD_cifar"))
            rho = spearmanr(x, y).statistic
            print(f"{key}: rank correlation {rho:+.2f} with dFD, {len(found)} runs of {steps:,} "
                  "steps")
            correlations.append(f"{rho:+.2f} ({steps:,} steps)")
            for i, name in enumerate(AUTOENCODERS):
                mine = [k for k, result in enumerate(found)
                        if result["name"].removesuffix("-long") == name]
                if mine:
                    ax.plot([x[k] for k in mine], [y[k] for k in mine], "o^"[i // 10], ms=6,
                            color=f"C{i % 10}", mfc=None if steps == SIT_STEPS else "none",
                            label=name if steps == SIT_STEPS else f"{name}, {steps:,} steps")
        ax.set(xlabel=words, title=", ".join(correlations))
    for ax in axes[:, 0]:
        ax.set_ylabel("dFD: what diffusion adds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=9, fontsize=8)
    figure.suptitle("Rank correlation of dFD with a number of the autoencoder")
    save_figure(figure, HERE / "figures" / "scatter.png", dpi=80)


def get_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("command", choices=("run", "collect", "table", "figure",
                                            "scatter"))
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
        train_set, _ = open_data(args.data, 32)            # what collect needs, before hours
        runtime.need(len(train_set.classes) == 10 and len(train_set) >= REFERENCE, f"--data "
                     f"{args.data}: needs ten classes and {REFERENCE:,} images, as CIFAR-10 has")
        train_labelnet(args.data)
        failed = run_all(args.data, out, args.jobs)
    if args.command in ("run", "collect"):
        collect(out)
    if args.command == "table":
        text = table()
        write_readme(text)
        print(text)
    if args.command == "figure":
        draw_pictures(out)
    if args.command == "scatter":
        scatter()
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    with runtime.one_line_errors():
        main()
