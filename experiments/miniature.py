"""
The paper's claims in miniature: Tables 2, 4, 7 and 8 on CIFAR-10 at 32 px, small enough for two CPU cores.

    python -m experiments.miniature run --data cifar10       train and sample everything that is not there yet, then write experiments/results/*.json
    python -m experiments.miniature collect                  experiments/results/ alone, from the runs that are finished
    python -m experiments.miniature table                    the README's tables from experiments/results/ alone
    python -m experiments.miniature figure                   experiments/figures/samples.png: samples of each method from the same noise

Protocol, fixed before its runs, but for what is marked as added.
    autoencoder   f2d4-tiny (0.17M), 1,000 steps of batch 16, lr 2e-3, L1 only (no LPIPS, no GAN), the weights of Table 5 for each --reg
    diffusion     SiT-tiny/2 (0.7M), class-conditional, 3,000 steps of batch 32, lr 1e-3, EMA 0.998
    sampling      2,000 images, Euler-Maruyama 30 steps, no guidance, EMA weights, classes in turn, the same noise for every method
    seeds         0 and 1, for autoencoder and diffusion together
    Table 4       on the latents of kl: the target is a small network trained on CIFAR-10's labels (repa.LabelNet), not DINOv2; its
                  grid has 8x8 tokens, so the DoG's sigmas are half of those for 16x16
    f = 4         kl and esm once more with f4d4-tiny and SiT-tiny/1, 8x8 latents of 12-fold compression: at f = 2 (3-fold) the latents of kl
                  are near the flattened target by themselves (ESM divergence 0.06 in earlier runs), so little is left for ESM to mend
    weight 1      added when seed 0 had shown ESM and KL level in FD-cifar and in the shape of their spectra: esm with --esm_weight 1. At 0.01
                  and over 1,000 steps instead of 500,000 the term moves the latent's scale and little else. For the same reason Table 7 is run
                  at weight 1, which was decided before its first run. 9,000 diffusion steps for kl and esm were planned then, and not run
    measured      PSNR of held-out images; exponent of the latents' PSD; ESM divergence (gamma 1) of the latents, and (added with weight 1) of
                  the normalised latents at their best scale; rFD-cifar, of 2,000 held-out images reconstructed; and of the samples FD-cifar,
                  sliced Wasserstein distance, spectral KL. FD-cifar is the Frechet distance to the training images in the 192 pooled features
                  of that LabelNet, never to be compared with an FID; rFD-cifar is about what the decoder alone adds to it
A claim "a below b" counts as agreement with the paper if the means over the seeds are in that order and their gap exceeds the larger spread
between the seeds of the two; as a contradiction if the reverse does; else as undecided. The claims are CLAIMS below.

Before this protocol there was one with 1,500 autoencoder steps at lr 4e-3, which let the PSNR of a method differ by 2.3 dB between two seeds,
and a classifier that was not kept. Its seven runs are in the history, at commit 21319f3, and not mixed with these.
"""
import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from data import open_data, train_batches, val_batches
from figures import encode_all, figure_rows
from losses import esm_loss
from metrics import Moments, frechet_distance, to_uint8
from repa import LabelNet
from weights import load_autoencoder

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS, LABELNET = ROOT / "results", ROOT / "labelnet.pt"
SEEDS, AE_STEPS, SIT_STEPS = (0, 1), 1000, 3000
AE = f"--model f2d4-tiny --steps {AE_STEPS} --batch_size 16 --lr 2e-3 --eval_every 1000 --val_images 1000"
SIT = f"--steps {SIT_STEPS} --batch_size 32 --ema 0.998 --eval_every 1000"
GEN = "--num_samples 2000 --steps 30 --batch_size 100 --reference_images 0"
REPA = "--repa_depth 1 --dog_sigma1 0.5 --dog_sigma2 1.25 --encoder_source experiments/labelnet.pt"
AUTOENCODERS = {                                                                           # flags of train_ae.py
    "kl": "--reg kl", "se": "--reg se", "esm": "--reg esm", "dsm": "--reg dsm", "eq": "--reg eq",
    "kl-f4": "--reg kl --model f4d4-tiny", "esm-f4": "--reg esm --model f4d4-tiny", "esm-w1": "--reg esm --esm_weight 1",
    "esm-w1-gamma0.6": "--reg esm --esm_weight 1 --gamma 0.6", "esm-w1-gamma1.4": "--reg esm --esm_weight 1 --gamma 1.4",
    "dsm-0-4-6-8": "--reg dsm --dsm_masks 0 4 6 8", "dsm-0-12-13-14": "--reg dsm --dsm_masks 0 12 13 14",
}
VARIANTS = {                                                                               # run: its autoencoder, flags of train_diffusion.py
    "kl-f4": ("kl-f4", "--model SiT-tiny/1"), "esm-f4": ("esm-f4", "--model SiT-tiny/1"),
    **{f"kl-{kind}": ("kl", f"--repa {kind} {REPA}") for kind in ("repa", "irepa", "dog")},
}
TABLES = {"Table 2": ["kl", "se", "eq", "esm", "esm-w1", "dsm"], "Table 2 at f = 4": ["kl-f4", "esm-f4"],
          "Table 7": ["kl", "esm-w1-gamma0.6", "esm-w1", "esm-w1-gamma1.4"],
          "Table 8": ["dsm-0-4-6-8", "dsm", "dsm-0-12-13-14"], "Table 4": ["kl", "kl-repa", "kl-irepa", "kl-dog"]}
COLUMNS = {"psnr": ("PSNR, dB", 2), "rFD_cifar": ("rFD-cifar", 2), "esm": ("ESM divergence", 3), "esm_shape": ("normalised, best scale", 3),
           "alpha": ("exponent of the PSD", 2), "FD_cifar": ("FD-cifar", 2), "SWD_32px": ("SWD 32 px", 1), "spectral_KL": ("spectral KL", 4)}
CLAIMS = [                                                                                 # (number, the run with the smaller one, the other)
    ("esm", "esm", "kl"), ("alpha", "kl", "se"), ("alpha", "kl", "eq"), ("alpha", "kl", "dsm"),   # spectra; smoother latents are steeper
    ("FD_cifar", "dsm", "se"), ("FD_cifar", "dsm", "kl"), ("FD_cifar", "se", "kl"), ("FD_cifar", "esm", "kl"),  # Table 2
    ("FD_cifar", "esm-w1", "kl"), ("FD_cifar", "esm-f4", "kl-f4"),
    ("FD_cifar", "esm-w1", "esm-w1-gamma0.6"), ("FD_cifar", "esm-w1", "esm-w1-gamma1.4"),  # Table 7
    ("FD_cifar", "dsm", "dsm-0-4-6-8"), ("FD_cifar", "dsm", "dsm-0-12-13-14"),             # Table 8
    ("FD_cifar", "kl-repa", "kl"), ("FD_cifar", "kl-irepa", "kl-repa"), ("FD_cifar", "kl-dog", "kl-irepa")]  # Table 4
LOCKS = collections.defaultdict(threading.Lock)                                            # several runs share an autoencoder and its cache
MARKS = "<!-- miniature.py table -->", "<!-- end of miniature.py table -->"


def plan():
    """The runs in order of importance, (name, seed): Table 2 with all seeds, then the rest."""
    rest = [name for names in TABLES.values() for name in names if name not in TABLES["Table 2"]]
    return [(name, seed) for names in (TABLES["Table 2"], rest) for seed in SEEDS for name in names]


def commands(name, seed, data, out):
    """The three commands of a run, each a list of words; each continues where an earlier call was stopped."""
    autoencoder, flags = VARIANTS.get(name, (name, ""))
    ae, sit = out / "ae" / f"{autoencoder}-s{seed}", out / "diffusion" / f"{name}-s{seed}"
    return [f"train_ae.py --preset quick {AE} {AUTOENCODERS[autoencoder]} --data {data} --seed {seed} --out {ae} --resume".split(),
            f"train_diffusion.py --preset quick --ae {ae}/ckpt.pt {SIT} {flags} --seed {seed} --out {sit} --cache {out}/latents/{ae.name} "
            "--resume".split(),
            f"evaluate.py gen --preset quick --ckpt {sit}/ckpt.pt {GEN} --results {sit}/gen.jsonl".split()]


def trained(folder, stage):
    """Steps that the run in a folder has behind it; 0 if there is none."""
    return runtime.load_checkpoint(folder / "ckpt.pt", stage)["step"] if (folder / "ckpt.pt").exists() else 0


def run_one(name, seed, data, out):
    """
    One autoencoder, one diffusion model, its samples, as far as they are not there; what the scripts print goes to output.txt of the run.
    raises   ValueError for a run of other flags, a script that failed, or one that was stopped by a signal before its last step
    """
    words = commands(name, seed, data, out)
    ae, sit, cache = (pathlib.Path(words[i][words[i].index(flag) + 1]) for i, flag in ((0, "--out"), (1, "--out"), (1, "--cache")))
    asked = "\n".join(" ".join(["python", *command]) for command in words) + "\n"
    note = sit / "commands.txt"
    if note.exists() and note.read_text() != asked:
        raise ValueError(f"{sit}: was made by other commands, see commands.txt there; name another --out")
    sit.mkdir(parents=True, exist_ok=True)
    note.write_text(asked)

    def call(command, folder=None, stage=None, steps=0):
        if folder and trained(folder, stage) == steps:
            return
        with open(sit / "output.txt", "a") as file:                                        # one thread each: the runs share the cores
            done = subprocess.run([sys.executable, *command], stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode or folder and trained(folder, stage) < steps:
            raise ValueError(f"{name}-s{seed}: {command[0]} did not reach its end, see {sit}/output.txt; the same command continues")

    train_ae, train_diffusion, gen = words
    with LOCKS[ae.name]:
        call(train_ae, ae, "ae", AE_STEPS)
        if not cache.exists():
            call(train_diffusion, sit, "diffusion", SIT_STEPS)
    call(train_diffusion, sit, "diffusion", SIT_STEPS)
    if not (sit / "samples" / "samples.npz").exists():
        call(gen)


def run_all(data, out, jobs):
    """Every run of the plan, `jobs` at a time. One that fails does not stop the others; Ctrl-C does. returns what went wrong, as lines."""
    failed, pool = [], concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for future in concurrent.futures.as_completed([pool.submit(run_one, *job, data, out) for job in plan()]):
            if error := future.exception():
                failed.append(str(error))
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def train_labelnet(data, path=LABELNET, steps=6000, batch_size=64, seed=0):
    """
    Train the LabelNet on the training images' classes; writes its weights (float16) and the accuracy on the held-out images. The file is
    part of the project, since distances in the features of another network, even one trained alike, are other numbers. No-op if it is there.
    """
    if path.exists():
        return
    train_set, val_set = open_data(data, 32, val_images=5000)
    torch.manual_seed(seed)
    net = LabelNet(num_classes=len(train_set.classes)).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _, (images, labels, _) in zip(range(steps), train_batches(train_set, batch_size, seed=seed)):
        loss = F.cross_entropy(net(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    net.load_state_dict(weights)
    net.eval()
    with torch.no_grad():
        right = [(net(images).argmax(1) == labels) for images, labels, _ in val_batches(val_set, 250)]
    accuracy = torch.cat(right).float().mean().item()
    runtime.save_checkpoint(path, dict(stage="labelnet", model=weights, num_classes=len(train_set.classes), accuracy=accuracy,
                                       steps=steps, batch_size=batch_size, seed=seed))


@torch.no_grad()
def pooled_moments(net, batches):
    """Mean and covariance of the pooled features over batches of images (b, 3, 32, 32) in [-1, 1]."""
    moments = Moments(net.width)
    for images in batches:
        moments.add(net.pooled(images))
    return moments.mean_cov()[1:]


@torch.no_grad()
def reconstructions(ae, images, batch_size=100):
    """Images (N, 3, H, W) through the autoencoder, by the posterior's mode, rounded as a PNG would: batches (b, 3, H, W) in [-1, 1]."""
    for x in images.split(batch_size):
        yield to_uint8(ae.decode(ae.encode(x).mode())).float() / 127.5 - 1


@torch.no_grad()
def divergences(ae, images):
    """
    ESM divergence (gamma 1, nats) of the latents of images (N, 3, H, W), and of the normalised latents at the best of scales from 1/8 to 54.
    log(1 + P) sees the latent's scale and the diffusion model does not, for it normalises: the second is what is left for the latter.
    """
    latents = encode_all(ae, images, 100, seed=0)
    best = min(esm_loss(images, scale * ae.normalize(latents)).item() for scale in 2 ** torch.arange(-3, 6, 0.25))
    return esm_loss(images, latents).item(), best


def collect(out):
    """experiments/results/NAME-sSEED.json for every finished run: its commands, hardware, commit, final numbers and loss curves."""
    checkpoint = torch.load(LABELNET, weights_only=True)
    net = LabelNet(checkpoint["num_classes"]).eval()
    net.load_state_dict(checkpoint["model"])
    reference = None
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, seed in plan():
        autoencoder, _ = VARIANTS.get(name, (name, ""))
        ae, sit, path = out / "ae" / f"{autoencoder}-s{seed}", out / "diffusion" / f"{name}-s{seed}", RESULTS / f"{name}-s{seed}.json"
        if path.exists() or not (sit / "samples" / "samples.npz").exists():
            continue
        if reference is None:
            train_set, val_set = open_data(runtime.checkpoint_args(ae / "ckpt.pt")["data"], 32, val_images=2000)
            held_out = torch.cat([images for images, _, _ in val_batches(val_set, 500)])
            reference = pooled_moments(net, (images for images, _, _ in val_batches(train_set, 500)))
            unseen = frechet_distance(*pooled_moments(net, held_out.split(500)), *reference)
        samples = torch.from_numpy(np.load(sit / "samples" / "samples.npz")["arr_0"]).movedim(-1, 1)  # (N, 3, 32, 32) uint8
        gen = json.loads((sit / "gen.jsonl").read_text().splitlines()[-1])
        logs = {stage: [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for stage, folder in (("ae", ae), ("diffusion", sit))}
        if logs["ae"][-1]["step"] != AE_STEPS or gen["step"] != SIT_STEPS:
            raise ValueError(f"{sit}: samples of a run that was not finished; remove its folder")
        numbers = {k.removeprefix("val_"): v for k, v in logs["ae"][-1].items() if k != "step"}
        numbers |= {k: v for k, v in gen.items() if k.startswith(("SWD", "spectral"))}
        network = load_autoencoder(ae / "ckpt.pt")
        numbers["esm"], numbers["esm_shape"] = divergences(network, held_out[::4])         # the log's is for the gamma of the run
        numbers["rFD_cifar"] = frechet_distance(*pooled_moments(net, reconstructions(network, held_out)), *reference)
        numbers["FD_cifar"] = frechet_distance(*pooled_moments(net, (samples / 127.5 - 1).split(500)), *reference)
        curve = {stage: [[line["step"], round(line["loss"], 4)] for line in lines if "loss" in line][::10] for stage, lines in logs.items()}
        result = dict(name=name, seed=seed, samples=len(samples), labelnet_accuracy=checkpoint["accuracy"], FD_cifar_of_held_out_images=unseen,
                      numbers=numbers, loss_curve=curve, commands=(sit / "commands.txt").read_text().splitlines(),
                      **{k: gen[k] for k in ("commit", "hardware", "torch", "time")})
        runtime.write_atomic(path, lambda file: file.write((json.dumps(result) + "\n").encode()))
        print(f"wrote {path}: FD-cifar {numbers['FD_cifar']:.2f}")


def verdict(results, key, low, high):
    """The protocol's rule for `low` below `high` in the number `key`, over the seeds that both have."""
    pairs = [(results[low, seed], results[high, seed]) for seed in SEEDS if (low, seed) in results and (high, seed) in results]
    if not pairs:
        return "not run"
    a, b = ([pair[i]["numbers"][key] for pair in pairs] for i in (0, 1))
    digits, gap, between_seeds = COLUMNS[key][1], np.mean(b) - np.mean(a), max(np.ptp(a), np.ptp(b))
    if len(pairs) < 2:
        return f"one seed, {'as' if gap > 0 else 'against'} the paper (gap {abs(gap):.{digits}f}): undecided"
    word = "agreement" if gap > between_seeds else "**contradiction**" if gap < -between_seeds else "undecided"
    return f"{word}: gap {gap:+.{digits}f}, spread between seeds {between_seeds:.{digits}f}"


def table():
    """The README's tables as markdown, from experiments/results/ alone."""
    results = {(r["name"], r["seed"]): r for r in (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-s?.json")))}
    if not results:
        raise FileNotFoundError(f"{RESULTS}: no results yet; `python -m experiments.miniature run` makes them")
    one = next(iter(results.values()))
    lines = [f"{one['samples']:,} samples each; seeds side by side. FD-cifar, rFD-cifar: features of a network with {100 * one['labelnet_accuracy']:.1f}% accuracy "
             f"on held-out images; 2,000 held-out images themselves have {one['FD_cifar_of_held_out_images']:.2f}. \"Normalised, best scale\": the ESM divergence "
             f"of the latents as diffusion sees them. Hardware: {', '.join(sorted({r['hardware'] for r in results.values()}))}; commands, logs and versions in `experiments/results/`."]
    for title, names in TABLES.items():
        lines += ["", f"**{title}** in miniature", "", "| run | " + " | ".join(head for head, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name in names:
            runs = [results[name, seed]["numbers"] for seed in SEEDS if (name, seed) in results]
            cells = [" / ".join(f"{run[key]:.{digits}f}" for run in runs) for key, (_, digits) in COLUMNS.items()]
            lines.append(f"| `{name}` | " + " | ".join(cells if runs else ["not run"] + [""] * (len(COLUMNS) - 1)) + " |")
    lines += ["", "| the paper says | here, by the protocol's rule |", "|---|---|"]
    return "\n".join(lines + [f"| {COLUMNS[key][0]}: `{low}` below `{high}` | {verdict(results, key, low, high)} |" for key, low, high in CLAIMS])


def write_readme(text):
    """Put the tables between their two marks in README.md."""
    path = ROOT / "README.md"
    readme = path.read_text()
    begin, end = (readme.index(mark) for mark in MARKS)
    runtime.write_atomic(path, lambda file: file.write((readme[:begin + len(MARKS[0])] + "\n" + text + "\n" + readme[end:]).encode()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("command", choices=("run", "collect", "table", "figure"))
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder or zip of the same images by class; used by run")
    parser.add_argument("--out", default="out/miniature", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each, > 0")
    args = runtime.parse_args(parser, {})
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: must be at least 1")
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
        files = {name: out / "diffusion" / f"{name}-s0" / "samples" / "samples.npz" for name in TABLES["Table 2"]}
        rows = {name: torch.from_numpy(np.load(path)["arr_0"][:10]).movedim(-1, 1) / 255 for name, path in files.items() if path.exists()}
        if not rows:
            raise FileNotFoundError(f"--out {out}: no samples of seed 0 here yet; `python -m experiments.miniature run` makes them")
        figure_rows(rows, ROOT / "figures" / "samples.png")
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    with runtime.one_line_errors():
        main()
