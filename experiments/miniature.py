"""
The paper's Tables 2, 3, 4, 7 and 8 at small scale: the built-in discs at 32 px, feasible on two CPU
cores. README.md beside this file has the protocol, the results and their discussion; protocol.py
defines the runs and report.py compares them.

    python -m experiments.miniature run        train, sample and measure every missing run, one file
                                               each: experiments/results/NAME-sSEED.json
    python -m experiments.miniature table      write experiments/results/ as tables in the pages
    python -m experiments.miniature figure     figures/samples.png: samples of each method from the
                                               same noise; figures/reconstructions.png
    python -m experiments.miniature scatter    from experiments/results/: figures/pairs.png, Table
                                               2's claims seed by seed; figures/scatter.png, which
                                               numbers of an autoencoder predict FD
    python -m experiments.miniature labelnet --data cifar10    train the network of FD again
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

from analysis.figures import figure_rows
from analysis.theory import diffusability
from common import run
from common.data import open_data, train_batches, val_batches
from common.metrics import Moments, frechet_distance, to_uint8
from common.weights import load_autoencoder
from dit import NoiseStream
from experiments import protocol, report
from experiments.labelnet import PATH as LABELNET
from experiments.labelnet import LabelNet, load_labelnet
from experiments.protocol import AUTOENCODERS, SEEDS, TABLES, VARIANTS

LOCKS = collections.defaultdict(threading.Lock)            # several runs share an autoencoder

# --------------------------------------------------------------------------------------------------
# Training and sampling

def run_name(name, ae_seed, sit_seed):
    """A run's name in files and folders; shows the diffusion seed if not the autoencoder's."""
    return f"{name}-s{ae_seed}" + (f"-d{sit_seed}" if sit_seed != ae_seed else "")


def folders(name, ae_seed, sit_seed, out):
    """A run's folders (autoencoder, latent cache, diffusion model); the first two are shared."""
    autoencoder, _ = VARIANTS.get(name, (name, ""))
    shared = run_name(autoencoder, ae_seed, ae_seed)
    return (out / "ae" / shared, out / "latents" / shared,
            out / "diffusion" / run_name(name, ae_seed, sit_seed))


def commands(name, ae_seed, sit_seed, out):
    """The three commands of a run, as argument lists; each resumes an interrupted call."""
    autoencoder, flags = VARIANTS.get(name, (name, ""))
    ae, cache, sit = map(str, folders(name, ae_seed, sit_seed, out))
    train_ae = ["train_ae.py", "--preset", "quick", *protocol.AE.split(),
                *AUTOENCODERS[autoencoder].split(), "--seed", str(ae_seed), "--out", ae, "--resume"]
    train_diffusion = ["train_diffusion.py", "--preset", "quick", "--ae", f"{ae}/ckpt.pt",
                       *protocol.SIT.split(), *flags.split(), "--seed", str(sit_seed),
                       "--out", sit, "--cache", cache, "--resume"]
    gen = ["evaluate.py", "gen", "--preset", "quick", "--ckpt", f"{sit}/ckpt.pt",
           *protocol.GEN.split(), "--results", f"{sit}/gen.jsonl"]
    return train_ae, train_diffusion, gen


def trained(folder, stage):
    """Number of steps that the run in a folder has completed; 0 if there is no run."""
    path = folder / "ckpt.pt"
    return run.load_checkpoint(path, stage)["step"] if path.exists() else 0


def sign(folder, asked):
    """Record a run's commands in its folder; ValueError if it was made by other commands."""
    note = folder / "commands.txt"
    made = note.read_text() if note.exists() else ""
    if made != asked and (made or (folder / "ckpt.pt").exists()):
        raise ValueError(f"{folder}: was made by other commands, see commands.txt there; name "
                         "another --out")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(asked)


def run_one(name, ae_seed, sit_seed, out):
    """
    Train an autoencoder and a diffusion model and draw samples, skipping finished stages. The
    scripts' output goes to output.txt in the run's folder.
    raises   ValueError if the folder's run has other flags, or a script failed or was stopped by a
             signal before its last step
    """
    words = commands(name, ae_seed, sit_seed, out)
    ae, _, sit = folders(name, ae_seed, sit_seed, out)
    asked = "".join(f"python {shlex.join(command)}\n" for command in words)
    with LOCKS[ae.name]:
        sign(ae, f"python {shlex.join(words[0])}\n")
    sign(sit, asked)

    def call(command, folder=None, stage=None, steps=0):
        if folder and trained(folder, stage) == steps:
            return
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}                  # runs share the cores
        with open(sit / "output.txt", "a") as file:
            done = subprocess.run([sys.executable, *command], stdout=file, stderr=file,
                                  env=one_thread)
        if done.returncode or folder and trained(folder, stage) < steps:
            raise ValueError(f"{sit.name}: {command[0]} did not reach its end, see "
                             f"{sit}/output.txt; the same command continues")

    train_ae, train_diffusion, gen = words
    with LOCKS[ae.name]:
        call(train_ae, ae, "ae", protocol.AE_STEPS)
    call(train_diffusion, sit, "diffusion", protocol.SIT_STEPS)
    if not (sit / "gen.jsonl").exists():
        call(gen)


def run_all(plan, out, jobs):
    """
    Run the whole plan, `jobs` runs at a time, and write each result to experiments/results/ when
    the run ends. A failed run does not stop the others; Ctrl-C does.
    returns  error messages, one per line
    """
    failed, pool, measure = [], concurrent.futures.ThreadPoolExecutor(jobs), None
    paths = {each: protocol.RESULTS / f"{run_name(*each)}.json" for each in plan}
    todo = [each for each in plan if not paths[each].exists()]
    print(f"{len(plan) - len(todo)} of {len(plan)} runs have a file in {protocol.RESULTS}; to "
          "repeat one, remove its file", flush=True)
    try:
        futures = {pool.submit(run_one, *each, out): each for each in todo}
        for future in concurrent.futures.as_completed(futures):
            try:
                future.result()
                measure = measure or Measure()
                result = measure(*futures[future], out)
            except Exception as error:
                failed.append(str(error))
                continue
            path, line = paths[futures[future]], (json.dumps(result) + "\n").encode()
            run.write_atomic(path, lambda file, line=line: file.write(line))
            numbers = result["numbers"]
            print(f"{path.stem}: PSNR {numbers['psnr']:.2f} dB, FD {numbers['FD']:.3f}, "
                  f"dFD {numbers['dFD']:.3f}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


# --------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def pooled_moments(net, batches):
    """Mean and covariance of pooled features over batches of images (b, 3, 32, 32) in [-1, 1]."""
    moments = Moments(net.width)
    for images in batches:
        moments.add(net.pooled(images))
    return moments.mean_cov()[1:]


@torch.no_grad()
def reconstruction(ae, images, indices):
    """
    Reconstruct images (b, 3, H, W), rounded to 8 bits as in a PNG; same shape, in [-1, 1]. Decodes
    a posterior sample with seed (0, index), as the authors do: diffusion is trained on such
    latents, so that a diffusion model that samples them perfectly has dFD 0.
    """
    posterior = ae.encode(images)
    noise = NoiseStream(0, indices)(posterior.mean.shape)
    return to_uint8(ae.decode(posterior.sample(noise))).float() / 127.5 - 1


def loss_curve(lines):
    """[step, loss] of every fourth log line that has a loss."""
    return [[line["step"], round(line["loss"], 4)] for line in lines if "loss" in line][::4]


class Measure:
    """What all runs are measured with: the network, images, and moments of their features."""

    def __init__(self):
        self.net = load_labelnet().eval()
        self.train_set, val_set = open_data("discs", 32, val_images=protocol.HELD_OUT)
        self.held_out = torch.cat([images for images, _, _ in val_batches(val_set, 500)])
        batches = val_batches(self.train_set, 500)
        self.moments = pooled_moments(self.net, (images for images, _, _ in batches))
        held_out = pooled_moments(self.net, self.held_out.split(500))
        self.unseen = frechet_distance(*held_out, *self.moments)

    def __call__(self, name, ae_seed, sit_seed, out):
        """The numbers, loss curves, commands and hardware of a finished run, as a dict."""
        ae, _, sit = folders(name, ae_seed, sit_seed, out)
        read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
        logs = dict(ae=read(ae / "log.jsonl"), diffusion=read(sit / "log.jsonl"))
        gen = read(sit / "gen.jsonl")[-1]
        samples = np.load(sit / "samples" / "samples.npz")["arr_0"]         # (N, 32, 32, 3) uint8
        samples = torch.from_numpy(samples).movedim(-1, 1)                  # (N, 3, 32, 32)
        network = load_autoencoder(ae / "ckpt.pt")
        decoded = (reconstruction(network, images, indices.tolist())
                   for images, _, indices in val_batches(self.train_set, 100))
        sampled = pooled_moments(self.net, (samples / 127.5 - 1).split(500))
        decoded = pooled_moments(self.net, decoded)
        numbers = {key: gen[key] for key in gen if key.startswith(("SWD", "spectral"))}
        numbers |= dict(FD=frechet_distance(*sampled, *self.moments),
                        rFD=frechet_distance(*decoded, *self.moments),
                        dFD=frechet_distance(*sampled, *decoded))
        pooled = lambda images: self.net.pooled(images / 127.5 - 1)
        with torch.no_grad():
            numbers |= diffusability(network, self.held_out, features=pooled)
        numbers["ssim"] = logs["ae"][-1]["val_ssim"]
        return dict(
            name=name, ae_seed=ae_seed, sit_seed=sit_seed, samples=len(samples),
            reference=len(self.train_set), FD_of_held_out_images=self.unseen, numbers=numbers,
            loss_curve={stage: loss_curve(lines) for stage, lines in logs.items()},
            commands=(sit / "commands.txt").read_text().splitlines(),
            **{key: gen[key] for key in ("commit", "hardware", "torch", "time")})


def train_labelnet(data, path=LABELNET, steps=6000, batch_size=64, seed=0):
    """
    Train the LabelNet to classify the training images; writes its weights (float16) and held-out
    accuracy. The file is part of the repository because another network, even one trained the same
    way, gives different distances.
    raises   ValueError if the file exists
    """
    run.need(not path.exists(), f"{path}: is there; remove it to train another network")
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
# Figures, and the command line

def draw_samples(out):
    """
    Draw figures/samples.png (ten samples of each of Table 2's runs from the same noise, and FD) and
    figures/reconstructions.png (ten held-out images and their reconstructions); seed 0.
    """
    results = report.load_results()
    names = [name for name in TABLES["Table 2"] if (name, 0, 0) in results]
    _, val_set = open_data("discs", 32, val_images=10)
    images, _, indices = next(iter(val_batches(val_set, 10)))
    samples, decoded = {}, {"image": images * 0.5 + 0.5}
    for name in names:
        ae, _, sit = folders(name, 0, 0, out)
        pixels = np.load(sit / "samples" / "samples.npz")["arr_0"][:10]
        label = f"{name}, FD {results[name, 0, 0]['numbers']['FD']:.2f}"
        samples[label] = torch.from_numpy(pixels).movedim(-1, 1) / 255
        network = load_autoencoder(ae / "ckpt.pt")
        decoded[name] = reconstruction(network, images, indices.tolist()) * 0.5 + 0.5
    figure_rows(samples, protocol.HERE / "figures" / "samples.png")
    figure_rows(decoded, protocol.HERE / "figures" / "reconstructions.png")


def get_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=("run", "table", "figure", "scatter", "labelnet"))
    every = [*AUTOENCODERS, *VARIANTS]
    add("--only", nargs="+", choices=every, default=[], metavar="NAME",
        help=f"run: these alone, of {', '.join(every)}")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS), metavar="SEED",
        help="run: these alone")
    add("--out", default="out/miniature", help="folder of the runs")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--data", default="cifar10", help="labelnet: images by class")
    args = run.parse_args(parser, {})
    run.need(args.jobs >= 1, f"--jobs {args.jobs}: must be at least 1")
    return args


def main():
    args = get_args()
    out = pathlib.Path(args.out)
    if args.command == "run":
        torch.set_num_threads(1)
        failed = run_all(protocol.plan(args.only, args.seeds), out, args.jobs)
        run.need(not failed, "; ".join(failed))
    if args.command == "table":
        report.write_pages()
    if args.command == "figure":
        draw_samples(out)
    if args.command == "scatter":
        report.plot_pairs()
        report.scatter()
    if args.command == "labelnet":
        train_labelnet(args.data)


if __name__ == "__main__":
    with run.one_line_errors():
        main()
