"""
From a checkpoint of train_diffusion.py to images: its transformer and autoencoder, sampled into
files by all processes of a node.

    out/grid.png       the first 64
    out/samples.npz    arr_0 (N, H, W, 3) uint8, what the ADM evaluation suite takes
    out/images/        NNNNNN.png, if asked for

A folder holds one sampling: the files appear when all samples are drawn, in the place of those of
an earlier one. Sample i depends on (--seed, i) alone. `args` are the flags of evaluate.py gen,
`compute` is run.Compute.
"""
import math
import re
import shutil
import sys
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from analysis.figures import image_grid
from common import run
from common.metrics import jpeg_round_trip, to_uint8
from dit import Interpolant, NoiseStream


def sample_labels(indices, num_classes, args):
    """Class of each sample (b,) int64: in turn, or at random from (--seed, index)."""
    if args.labels == "turn":
        return torch.as_tensor(indices) % num_classes
    return torch.tensor([int(np.random.default_rng((args.seed, i)).integers(num_classes))
                         for i in map(int, indices)])


@torch.no_grad()
def sample_images(model, process, ae, indices, args, compute):
    """Samples number `indices` of --seed, whatever the batch or rank: (b, 3, H, W) uint8."""
    options = dict(steps=args.steps, noise=NoiseStream(args.seed, indices),
                   cfg_interval=tuple(args.cfg_interval))
    if isinstance(process, Interpolant):
        options["sampler"] = args.sampler
    if model.num_classes:
        labels = sample_labels(indices, model.num_classes, args).to(compute.device)
        options |= dict(y=labels, cfg=args.cfg)
    shape = (len(indices), model.in_channels, *model.input_size)
    with compute.autocast():
        z = process.sample(model, shape, **options)
    images = to_uint8(ae.decode(ae.denormalize(z)))    # float32: bf16 is coarser than a grey level
    return jpeg_round_trip(images) if args.jpeg else images


def write_samples(draw, samples, out, args, compute):
    """
    All samples of draw(indices) into samples (N, H, W, 3) uint8, and the seconds they took; with
    --folder also into out/.images, until `publish` moves them.
    """
    rank, world, n = compute.rank, compute.world, len(samples)
    pictures = out / ".images"
    if rank == 0:
        shutil.rmtree(pictures, ignore_errors=True)    # of a sampling that was killed
        if args.folder:
            pictures.mkdir()
    run.barrier()
    start = time.perf_counter()
    mine = np.arange(rank, n, world)
    with tqdm(total=n, unit="img", desc="sampling",
              disable=rank > 0 or not sys.stderr.isatty()) as progress:
        for indices in np.array_split(mine, max(1, math.ceil(len(mine) / args.batch_size))):
            if not len(indices):
                continue
            samples[indices] = draw(indices).movedim(1, -1).cpu().numpy()
            for i in indices if args.folder else ():
                Image.fromarray(samples[i]).save(pictures / f"{i:06d}.png")
            progress.update(len(indices) * world)
    run.barrier()
    return time.perf_counter() - start


def publish(samples, out, folder):
    """
    grid.png, samples.npz and, if folder, images/ of this sampling in the place of an earlier one's.
    Files of other names stay.
    """
    first = torch.from_numpy(samples[:64].copy()).movedim(-1, 1) / 255
    image_grid(first, out / "grid.png")
    run.write_atomic(out / "samples.npz", lambda file: np.savez(file, arr_0=samples))
    images = out / "images"
    for path in list(images.glob("*.png")):
        if re.fullmatch(r"\d{6,}", path.stem):
            path.unlink()
    if folder:
        images.mkdir(exist_ok=True)
        for path in (out / ".images").iterdir():
            path.rename(images / path.name)
        (out / ".images").rmdir()
    elif images.is_dir() and not any(images.iterdir()):
        images.rmdir()
    print(f"wrote {out}/grid.png, {out}/samples.npz" + f", {out}/images/" * folder)
