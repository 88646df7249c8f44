"""
The paper's claims in miniature: Tables 2, 4, 7 and 8 on CIFAR-10 at 32 px, small enough for two CPU cores.

    python miniature.py run --data cifar10       train and sample everything that is not there yet, then write assets/results/*.json
    python miniature.py table                    the README's tables from assets/results/ alone

Protocol, fixed before the first run:
    autoencoder   f2d4-tiny (0.17M), 1,500 steps of batch 16, lr 4e-3, L1 only (no LPIPS, no GAN), the weights of Table 5 for each --reg
    diffusion     SiT-tiny/2 (0.7M), class-conditional, 3,000 steps of batch 32, lr 1e-3, EMA 0.998
    sampling      2,000 images, Euler-Maruyama 50 steps, no guidance, EMA weights, classes in turn, the same noise for every method
    seeds         0 and 1 for autoencoder and diffusion together (Table 2); the ablations of Tables 7 and 8 use seed 0
    Table 4       on the latents of kl: the target is a small network trained on CIFAR-10's labels (repa.LabelNet), not DINOv2; its
                  grid has 8x8 tokens, so the DoG's sigmas are half of those for 16x16
    measured      held-out PSNR; ESM divergence (gamma 1) and fitted exponent of the latents' PSD; of the samples: FD-cifar, the Frechet
                  distance to the training images in the 192 pooled features of that LabelNet (never to be compared with an FID), sliced
                  Wasserstein distance, spectral KL
An ordering counts as agreement with the paper if it holds in FD-cifar for both seeds and the gap of the means exceeds the larger spread
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
import platform
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from data import open_data, train_batches, val_batches
from metrics import Moments, frechet_distance
from repa import LabelNet

AE = "--model f2d4-tiny --steps 1500 --batch_size 16 --eval_every 500 --val_images 1000".split()
SIT = "--steps 3000 --batch_size 32 --ema 0.998 --eval_every 1000".split()
GEN = "--num_samples 2000 --steps 50 --batch_size 100 --reference_images 0".split()
REPA = "--repa_depth 1 --dog_sigma1 0.5 --dog_sigma2 1.25".split()
METHODS = {                                                                                # name: flags of train_ae.py
    "kl": "--reg kl", "se": "--reg se", "esm": "--reg esm", "dsm": "--reg dsm", "eq": "--reg eq",
    "esm-gamma0.6": "--reg esm --gamma 0.6", "esm-gamma1.4": "--reg esm --gamma 1.4",
    "dsm-0-4-6-8": "--reg dsm --dsm_masks 0 4 6 8", "dsm-0-12-13-14": "--reg dsm --dsm_masks 0 12 13 14",
}
TABLES = {"Table 2": ["kl", "se", "eq", "esm", "dsm"], "Table 7": ["esm-gamma0.6", "esm", "esm-gamma1.4"],
          "Table 8": ["dsm-0-4-6-8", "dsm", "dsm-0-12-13-14"], "Table 4": ["kl", "kl-repa", "kl-irepa", "kl-dog"]}


def plan(data, out):
    """The runs in order of importance: (name, seed, autoencoder's run, its flags, --repa)."""
    main = [(name, seed, f"{name}-s{seed}", METHODS[name], "none") for seed in (0, 1) for name in ("kl", "esm", "dsm", "se", "eq")]
    ablations = [(name, 0, f"{name}-s0", METHODS[name], "none") for name in METHODS if "-" in name]
    repa = [(f"kl-{kind}", seed, f"kl-s{seed}", METHODS["kl"], kind) for seed in (0, 1) for kind in ("repa", "irepa", "dog")]
    return main + repa + ablations


def run_one(job, data, out):
    """One autoencoder, one diffusion model, its samples; every stage continues where an earlier call was stopped."""
    name, seed, ae_run, ae_flags, repa = job
    ae, sit = out / "ae" / ae_run, out / "diffusion" / f"{name}-s{seed}"
    common = ["--data", data, "--seed", str(seed)]
    commands = [["train_ae.py", "--preset", "quick", *ae_flags.split(), *AE, *common, "--out", str(ae), "--resume"],
                ["train_diffusion.py", "--preset", "quick", "--ae", f"{ae}/ckpt.pt", "--repa", repa, *SIT, "--seed", str(seed), "--out", str(sit),
                 "--cache", str(out / "latents" / ae_run), "--resume"]
                + (["--encoder_source", str(out / "labelnet.pt"), *REPA] if repa != "none" else []),
                ["evaluate.py", "gen", "--preset", "quick", "--ckpt", f"{sit}/ckpt.pt", *GEN, "--results", str(sit / "gen.jsonl")]]
    if (sit / "samples" / "samples.npz").exists():
        return commands
    sit.mkdir(parents=True, exist_ok=True)
    for command in commands:
        if "--repa" in command and repa != "none":
            assert (out / "labelnet.pt").exists(), "the target's network is trained first"
        with open(sit / "output.txt", "a") as file:
            subprocess.run([sys.executable, *command], check=True, stdout=file, stderr=file,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})                      # the runs share the cores
    return commands


def train_labelnet(data, path, steps=6000, batch_size=64, seed=0):
    """Train the LabelNet on the training images' classes; writes its weights and the accuracy on the held-out images. No-op if path is there."""
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
    net.eval()
    with torch.no_grad():
        right = [(net(images).argmax(1) == labels) for images, labels, _ in val_batches(val_set, 250)]
    accuracy = torch.cat(right).float().mean().item()
    runtime.save_checkpoint(path, dict(stage="labelnet", model=net.state_dict(), num_classes=len(train_set.classes), accuracy=accuracy,
                                       steps=steps, batch_size=batch_size, seed=seed))


@torch.no_grad()
def features(net, batches):
    """Moments of the pooled features over batches of images (b, 3, 32, 32) in [-1, 1]."""
    moments = Moments(net.width, torch.device("cpu"))
    for images in batches:
        moments.add(net.pooled(images))
    return moments.mean_cov()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder or zip of the same images by class")
    parser.add_argument("--out", default="out/miniature")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    torch.set_num_threads(1)
    if args.command == "run":
        jobs = plan(args.data, out)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            first = [pool.submit(run_one, job, args.data, out) for job in jobs[:2]]
            net = pool.submit(train_labelnet, args.data, out / "labelnet.pt")
            rest = [pool.submit(run_one, job, args.data, out) for job in jobs[2:]]
            for future in [*first, net, *rest]:
                future.result()


if __name__ == "__main__":
    with runtime.one_line_errors():
        main()
