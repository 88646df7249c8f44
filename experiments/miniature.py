"""
The paper's claims in miniature: Tables 2, 3, 4, 7 and 8 on CIFAR-10 at 32 px, small enough for
two CPU cores. README.md beside this file has the protocol, the results and what they say; the runs
are those of protocol.py, and report.py compares them.

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
import threading

import numpy as np
import torch
import torch.nn.functional as F

from analysis.figures import divergence, encode_all, figure_rows
from analysis.theory import diffusability
from common import run
from common.data import open_data, take, train_batches, val_batches
from common.metrics import Moments, frechet_distance, frechet_parts, to_uint8
from common.weights import load_autoencoder
from dit import NoiseStream
from experiments import protocol, report
from experiments.labelnet import PATH as LABELNET
from experiments.labelnet import LabelNet, load_labelnet
from experiments.protocol import (
    AE,
    AE_STEPS,
    AUTOENCODERS,
    FIRST,
    GEN,
    GFID,
    HELD_OUT,
    LONG,
    REFERENCE,
    SIT,
    VARIANTS,
    plan,
    sit_steps,
)
from spectral import match_resolution, spectrum_distribution

ROOT = protocol.HERE.parent                                # the folder of the scripts
LOCKS = collections.defaultdict(threading.Lock)            # several runs share an autoencoder

# --------------------------------------------------------------------------------------------------
# Training and sampling

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
    """A word of a command; a script or the folder experiments by its full path."""
    return str(ROOT / word) if word.endswith(".py") or word == "experiments" else word


def trained(folder, stage):
    """Steps that the run in a folder has behind it; 0 if there is none."""
    path = folder / "ckpt.pt"
    return run.load_checkpoint(path, stage)["step"] if path.exists() else 0


def sign(folder, asked):
    """Note in the folder of a run which commands make it; ValueError if it was made by others."""
    note = folder / "commands.txt"
    made = note.read_text() if note.exists() else ""
    if made != asked and (made or (folder / "ckpt.pt").exists()):
        raise ValueError(f"{folder}: was made by other commands, see commands.txt there; name "
                         "another --out")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(asked)


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
    with LOCKS[ae.name]:
        sign(ae, f"python {shlex.join(words[0])}\n")
    sign(sit, asked)

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
    run.save_checkpoint(path, dict(
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
    net = load_labelnet().eval()
    checkpoint = torch.load(LABELNET, weights_only=True)   # for its accuracy
    train_set = None
    for name, seed in plan():
        path = protocol.RESULTS / f"{name}-s{seed}.json"
        ae, _, sit = folders(name, seed, out)
        if path.exists() or not (sit / "samples" / "samples.npz").exists():
            continue
        if train_set is None:
            data = run.checkpoint_args(ae / "ckpt.pt")["data"]
            every, val_set = open_data(data, 32, val_images=HELD_OUT)
            train_set = take(every, np.arange(0, len(every), len(every) // REFERENCE))
            held_out = torch.cat([images for images, _, _ in val_batches(val_set, 500)])
            moments = pooled_moments(net, (images for images, _, _ in val_batches(train_set, 500)))
            unseen = frechet_distance(*pooled_moments(net, held_out.split(500)), *moments)
        result = dict(
            name=name, seed=seed, labelnet_accuracy=checkpoint["accuracy"],
            FD_cifar_of_held_out_images=unseen,
            **measure(net, ae, sit, sit_steps(name), held_out, train_set, moments))
        line = (json.dumps(result) + "\n").encode()
        run.write_atomic(path, lambda file, line=line: file.write(line))
        shown = " ".join(f"{key} {result['numbers'][key]:.2f}" for key in GFID)
        print(f"wrote {path}: {shown}", flush=True)


# --------------------------------------------------------------------------------------------------
# Pictures, and the command line

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
            _, val_set = open_data(run.checkpoint_args(ae / "ckpt.pt")["data"], 32, val_images=10)
            images, _, indices = next(iter(val_batches(val_set, 10)))
            decoded["image"] = images * 0.5 + 0.5
        network = load_autoencoder(ae / "ckpt.pt")
        decoded[autoencoder] = reconstruction(network, images, indices.tolist()) * 0.5 + 0.5
    both = [name for pair in zip(FIRST, LONG) for name in pair if name in samples]
    figure_rows({name: samples[name] for name in both}, protocol.HERE / "figures" / "samples.png")
    figure_rows(decoded, protocol.HERE / "figures" / "reconstructions.png")


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
    args = run.parse_args(parser, {})
    run.need(args.jobs >= 1, f"--jobs {args.jobs}: must be at least 1")
    return args


def main():
    args = get_args()
    out, failed = pathlib.Path(args.out), []
    if args.command == "run":
        train_set, _ = open_data(args.data, 32)            # what collect needs, before hours
        run.need(len(train_set.classes) == 10 and len(train_set) >= REFERENCE, f"--data "
                     f"{args.data}: needs ten classes and {REFERENCE:,} images, as CIFAR-10 has")
        train_labelnet(args.data)
        failed = run_all(args.data, out, args.jobs)
    if args.command in ("run", "collect"):
        collect(out)
    if args.command == "table":
        text = report.table()
        report.write_readme(text)
        print(text)
    if args.command == "figure":
        draw_pictures(out)
    if args.command == "scatter":
        report.scatter()
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    with run.one_line_errors():
        main()
