"""
The paper's claims in miniature: Tables 2, 4, 7 and 8 on CIFAR-10 at 32 px, small enough for two CPU cores.

    python miniature.py run --data cifar10       train and sample everything that is not there yet, then write assets/results/*.json
    python miniature.py collect --data cifar10   assets/results/ alone, from the runs that are finished
    python miniature.py table                    the README's tables from assets/results/ alone
    python miniature.py figure                   assets/miniature_samples.png: samples of each method from the same noise

Protocol, fixed before its runs. (An earlier one had 1,500 autoencoder steps at lr 4e-3, which let the PSNR of one method differ by 2.3 dB
between two seeds, and a classifier that was not kept; its seven runs are in the history, at commit 21319f3, and not mixed with these.)
    autoencoder   f2d4-tiny (0.17M), 1,000 steps of batch 16, lr 2e-3, L1 only (no LPIPS, no GAN), the weights of Table 5 for each --reg
    diffusion     SiT-tiny/2 (0.7M), class-conditional, 3,000 steps of batch 32, lr 1e-3, EMA 0.998
    sampling      2,000 images, Euler-Maruyama 30 steps, no guidance, EMA weights, classes in turn, the same noise for every method
    seeds         0 and 1, for autoencoder and diffusion together
    Table 4       on the latents of kl: the target is a small network trained on CIFAR-10's labels (repa.LabelNet), not DINOv2; its
                  grid has 8x8 tokens, so the DoG's sigmas are half of those for 16x16
    f = 4         kl and esm once more with f4d4-tiny and SiT-tiny/1, 8x8 latents of 12-fold compression: at f = 2 (3-fold) the latents of kl
                  are near the flattened target by themselves (ESM divergence 0.06 in the earlier runs), so little is left for ESM to mend
    weight 1      esm once more with --esm_weight 1. Added when seed 0 had shown ESM and KL level in FD-cifar and in the shape of their spectra:
                  with weight 0.01 over 1,000 steps instead of 500,000 the term moves the latent's scale and little else. Table 7 is run
                  at weight 1 for the same reason; decided before its first run
    measured      held-out PSNR; ESM divergence (gamma 1) and fitted exponent of the latents' PSD; of the samples: FD-cifar, the Frechet
                  distance to the training images in the 192 pooled features of that LabelNet (never to be compared with an FID), sliced
                  Wasserstein distance, spectral KL; rFD-cifar, the same distance for reconstructions of 2,000 held-out images: what the
                  decoder alone costs, so what a perfect diffusion model would still have
An ordering counts as agreement with the paper if the gap of the means of FD-cifar has the paper's sign and exceeds the larger spread
between the seeds of the two methods; as a contradiction if the reverse does; else as undecided.
    generation    DSM < Scale Equivariance, ESM < KL (Table 2); gamma 1.0 < 0.6 and 1.4 (Table 7); masks {0,8,10,12} < others (Table 8);
                  DoG < iREPA < REPA < none (Table 4)
    spectra       ESM divergence of esm < kl; exponent of se, eq and dsm > kl (smoother latents, Figs. 3 and 5)
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from data import open_data, spread, train_batches, val_batches
from figures import encode_all, figure_rows
from losses import esm_loss
from metrics import Moments, frechet_distance, to_uint8
from repa import LabelNet
from vae import load_autoencoder

AE = "--model f2d4-tiny --steps 1000 --batch_size 16 --lr 2e-3 --eval_every 1000 --val_images 1000".split()
SIT = "--steps 3000 --batch_size 32 --ema 0.998 --eval_every 1000".split()
GEN = "--num_samples 2000 --steps 30 --batch_size 100 --reference_images 0".split()
REPA = "--repa_depth 1 --dog_sigma1 0.5 --dog_sigma2 1.25"
METHODS = {                                                                                # autoencoder: flags of train_ae.py
    "kl": "--reg kl", "se": "--reg se", "esm": "--reg esm", "dsm": "--reg dsm", "eq": "--reg eq",
    "kl-f4": "--reg kl --model f4d4-tiny", "esm-f4": "--reg esm --model f4d4-tiny",
    "esm-w1": "--reg esm --esm_weight 1", "esm-w1-gamma0.6": "--reg esm --esm_weight 1 --gamma 0.6",
    "esm-w1-gamma1.4": "--reg esm --esm_weight 1 --gamma 1.4",
    "dsm-0-4-6-8": "--reg dsm --dsm_masks 0 4 6 8", "dsm-0-12-13-14": "--reg dsm --dsm_masks 0 12 13 14",
}
VARIANTS = {                                                                               # run: its autoencoder, flags of train_diffusion.py
    "kl-f4": ("kl-f4", "--model SiT-tiny/1"), "esm-f4": ("esm-f4", "--model SiT-tiny/1"),
    **{f"kl-{kind}": ("kl", f"--repa {kind} {REPA} --encoder_source assets/labelnet.pt") for kind in ("repa", "irepa", "dog")},
}
TABLES = {"Table 2": ["kl", "se", "eq", "esm", "dsm"], "Table 2 at f = 4": ["kl-f4", "esm-f4"],
          "Table 7": ["kl", "esm-w1-gamma0.6", "esm-w1", "esm-w1-gamma1.4"],
          "Table 8": ["dsm-0-4-6-8", "dsm", "dsm-0-12-13-14"], "Table 4": ["kl", "kl-repa", "kl-irepa", "kl-dog"]}
CLAIMS = (("dsm", "se"), ("dsm", "kl"), ("se", "kl"), ("esm", "kl"), ("esm-w1", "kl"), ("esm-f4", "kl-f4"), ("esm-w1", "esm-w1-gamma0.6"),
          ("esm-w1", "esm-w1-gamma1.4"), ("dsm", "dsm-0-4-6-8"), ("dsm", "dsm-0-12-13-14"), ("kl-repa", "kl"), ("kl-irepa", "kl-repa"), ("kl-dog", "kl-irepa"))
ASSETS = pathlib.Path(__file__).parent / "assets"
RESULTS, LABELNET = ASSETS / "results", ASSETS / "labelnet.pt"
MARKS = "<!-- miniature.py table -->", "<!-- end of miniature.py table -->"


def plan():
    """The runs in order of importance: (name, seed)."""
    seeds = lambda names, seeds=(0, 1): [(name, seed) for seed in seeds for name in names]
    ablations = [name for title, names in TABLES.items() for name in names if title != "Table 2" and name not in TABLES["Table 2"]]
    return seeds(TABLES["Table 2"]) + seeds(ablations)


def commands(name, seed, data, out):
    """The three commands of a run, each a list of words; each continues where an earlier call was stopped."""
    autoencoder, flags = VARIANTS.get(name, (name, ""))
    ae, sit = out / "ae" / f"{autoencoder}-s{seed}", out / "diffusion" / f"{name}-s{seed}"
    return [["train_ae.py", "--preset", "quick", *AE, *METHODS[autoencoder].split(), "--data", data, "--seed", str(seed), "--out", str(ae), "--resume"],
            ["train_diffusion.py", "--preset", "quick", "--ae", f"{ae}/ckpt.pt", *SIT, *flags.split(), "--seed", str(seed), "--out", str(sit),
             "--cache", str(out / "latents" / ae.name), "--resume"],
            ["evaluate.py", "gen", "--preset", "quick", "--ckpt", f"{sit}/ckpt.pt", *GEN, "--results", str(sit / "gen.jsonl")]]


def run_one(name, seed, data, out):
    """One autoencoder, one diffusion model, its samples, unless they are there; what the scripts print goes to output.txt of the run."""
    sit = out / "diffusion" / f"{name}-s{seed}"
    if (sit / "samples" / "samples.npz").exists():
        return
    sit.mkdir(parents=True, exist_ok=True)
    for command in commands(name, seed, data, out):
        with open(sit / "output.txt", "a") as file:
            subprocess.run([sys.executable, *command], check=True, stdout=file, stderr=file,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})                      # the runs share the cores


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
def reconstructions(ae, dataset, batch_size=100):
    """The images of dataset through the autoencoder, by the posterior's mode, rounded as a PNG would: batches (b, 3, H, W) in [-1, 1]."""
    for images, _, _ in val_batches(dataset, batch_size):
        yield to_uint8(ae.decode(ae.encode(images).mode())).float() / 127.5 - 1


@torch.no_grad()
def shape_divergence(ae, dataset, count=300):
    """
    ESM divergence (gamma 1, nats) of the normalised latents of `count` images, at the scale that makes it smallest. log(1 + P)
    sees the latent's scale and the diffusion model does not, for it normalises: this is what remains of the divergence for the latter.
    """
    images = torch.cat([images for images, _, _ in val_batches(spread(dataset, count), 100)])
    latents = ae.normalize(encode_all(ae, images, 100, seed=0))
    return min(esm_loss(images, scale * latents).item() for scale in 2 ** torch.arange(-2, 5, 0.25))


def collect(data, out):
    """assets/results/NAME-sSEED.json for every finished run: its commands, hardware, commit, final numbers and loss curves."""
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
            train_set, val_set = open_data(data, 32, val_images=2000)
            reference = pooled_moments(net, (images for images, _, _ in val_batches(train_set, 500)))
            unseen = frechet_distance(*pooled_moments(net, (images for images, _, _ in val_batches(val_set, 500))), *reference)
        samples = torch.from_numpy(np.load(sit / "samples" / "samples.npz")["arr_0"]).movedim(-1, 1)  # (N, 3, 32, 32) uint8
        gen = json.loads((sit / "gen.jsonl").read_text().splitlines()[-1])
        logs = {stage: [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for stage, folder in (("ae", ae), ("diffusion", sit))}
        numbers = {k.removeprefix("val_"): v for k, v in logs["ae"][-1].items() if k != "step"}
        numbers |= {k: v for k, v in gen.items() if k.startswith(("SWD", "spectral"))}
        network = load_autoencoder(ae / "ckpt.pt")
        numbers["esm_shape"] = shape_divergence(network, val_set)
        numbers["rFD_cifar"] = frechet_distance(*pooled_moments(net, reconstructions(network, val_set)), *reference)
        numbers["FD_cifar"] = frechet_distance(*pooled_moments(net, (samples / 127.5 - 1).split(500)), *reference)
        curve = {stage: [[line["step"], round(line["loss"], 4)] for line in lines if "loss" in line][::10] for stage, lines in logs.items()}
        result = dict(name=name, seed=seed, samples=len(samples), labelnet_accuracy=checkpoint["accuracy"], FD_cifar_of_held_out_images=unseen,
                      numbers=numbers, loss_curve=curve, commands=[" ".join(["python", *command]) for command in commands(name, seed, data, out)],
                      **{k: gen[k] for k in ("commit", "hardware", "torch", "time")})
        runtime.write_atomic(path, lambda file: file.write((json.dumps(result) + "\n").encode()))
        print(f"wrote {path}: FD-cifar {numbers['FD_cifar']:.2f}")


def verdict(results, better, worse):
    """The protocol's rule for `better < worse` in FD-cifar, over the seeds that both have."""
    pairs = [(results[better, seed], results[worse, seed]) for seed in (0, 1) if (better, seed) in results and (worse, seed) in results]
    if not pairs:
        return "not run"
    a, b = ([pair[i]["numbers"]["FD_cifar"] for pair in pairs] for i in (0, 1))
    gap, spread = np.mean(b) - np.mean(a), max(np.ptp(a), np.ptp(b))
    if len(pairs) < 2:
        return f"one seed, {'as' if gap > 0 else 'against'} the paper (gap {abs(gap):.2f}), undecided"
    word = "agreement" if gap > spread else "contradiction" if gap < -spread else "undecided"
    return f"{word}: gap {gap:+.2f}, spread between seeds {spread:.2f}"


def table():
    """The README's tables as markdown, from assets/results/ alone."""
    results = {(r["name"], r["seed"]): r for r in (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-s?.json")))}
    if not results:
        raise FileNotFoundError(f"{RESULTS}: no results yet; `python miniature.py run` makes them")
    one = next(iter(results.values()))
    lines = [f"{one['samples']:,} samples each; seeds side by side. FD-cifar: features of a network with {100 * one['labelnet_accuracy']:.1f}% accuracy on "
             f"held-out images; 2,000 held-out images themselves have {one['FD_cifar_of_held_out_images']:.2f}. Hardware: {one['hardware']}."]
    columns = (("PSNR, dB", "psnr", 2), ("rFD-cifar", "rFD_cifar", 2), ("ESM divergence", "esm", 3), ("at its best scale", "esm_shape", 3),
               ("latent PSD exponent", "alpha", 2), ("FD-cifar", "FD_cifar", 2), ("SWD 32 px", "SWD_32px", 1), ("spectral KL", "spectral_KL", 4))
    for title, names in TABLES.items():
        lines += ["", f"**{title}** in miniature", "", "| run | seeds | " + " | ".join(head for head, *_ in columns) + " |", "|---" * (len(columns) + 2) + "|"]
        for name in names:
            runs = [results[name, seed]["numbers"] for seed in (0, 1) if (name, seed) in results]
            cells = [" / ".join(f"{run[key]:.{digits}f}" for run in runs) for _, key, digits in columns]
            lines.append(f"| `{name}` | {len(runs)} | " + " | ".join(cells) + " |" if runs else f"| `{name}` | not run |" + " |" * len(columns))
    lines += ["", "| the paper's ordering in generation | here, by the protocol's rule |", "|---|---|"]
    return "\n".join(lines + [f"| `{better}` better than `{worse}` | {verdict(results, better, worse)} |" for better, worse in CLAIMS])


def write_readme(text):
    """Put the tables between their two marks in README.md."""
    path = pathlib.Path(__file__).parent / "README.md"
    readme = path.read_text()
    begin, end = (readme.index(mark) for mark in MARKS)
    runtime.write_atomic(path, lambda file: file.write((readme[:begin + len(MARKS[0])] + "\n" + text + "\n" + readme[end:]).encode()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("command", choices=("run", "collect", "table", "figure"))
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder or zip of the same images by class")
    parser.add_argument("--out", default="out/miniature")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    torch.set_num_threads(1 if args.command == "run" else torch.get_num_threads())
    if args.command == "run":
        train_labelnet(args.data)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for future in [pool.submit(run_one, *job, args.data, out) for job in plan()]:
                future.result()
    if args.command in ("run", "collect"):
        collect(args.data, out)
    if args.command == "table":
        write_readme(table())
        print(table())
    if args.command == "figure":
        rows = {name: out / "diffusion" / f"{name}-s0" / "samples" / "samples.npz" for name in TABLES["Table 2"]}
        rows = {name: torch.from_numpy(np.load(path)["arr_0"][:10]).movedim(-1, 1) / 255 for name, path in rows.items() if path.exists()}
        figure_rows(rows, ASSETS / "miniature_samples.png")


if __name__ == "__main__":
    with runtime.one_line_errors():
        main()
