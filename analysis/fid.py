"""
The sets of images that evaluate.py compares: a diffusion run's samples with its training images
(gen), or any two sets that a user supplies (fid A B). Images are uint8: (N, H, W, 3) in files,
(B, 3, H, W) for Inception. `args` are the flags of evaluate.py.
"""
import contextlib
import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from analysis.figures import image_grid
from common import run
from common.data import ImageSet, images_hash, open_source, spread, val_batches
from common.latents import create_array
from common.metrics import Moments, frechet_distance, jpeg_round_trip, to_uint8
from common.weights import open_run_data
from dit import Interpolant, NoiseStream

# ------------------------------------------------- samples: sample i depends only on (--seed, i)

def sampled_classes(file, checkpoint):
    """Classes (sorted) with training images in a run; prints a note if some classes had none."""
    n = checkpoint["model_args"]["num_classes"]
    seen = sorted(set(checkpoint.get("classes_seen") or range(n)) & set(range(n)))
    if len(seen) < n:
        run.print0(f"{file}: {n - len(seen)} of its {n} classes had no training image; they are "
                   "not sampled")
    return seen


def sample_labels(indices, classes, seed=None):
    """Class of each sample (b,) int64: cycling through classes (k,), or random by (seed, index)."""
    if seed is not None:
        draws = (np.random.default_rng((seed, int(i))) for i in indices)
        indices = [int(draw.integers(len(classes))) for draw in draws]
    return torch.as_tensor(classes)[torch.as_tensor(indices) % len(classes)]


@torch.no_grad()
def sample_images(file, model, process, ae, classes, indices, args, device):
    """The samples `indices` of a run, (b, 3, H, W) uint8; independent of batch size and rank."""
    options = dict(steps=args.steps, noise=NoiseStream(args.seed, indices),
                   cfg_interval=tuple(args.cfg_interval))
    if isinstance(process, Interpolant):
        options["sampler"] = args.sampler
    if model.num_classes:
        seed = None if args.labels == "turn" else args.seed
        options["y"] = sample_labels(indices, classes, seed).to(device)
        options["cfg"] = args.cfg
    shape = (len(indices), model.in_channels, *model.input_size)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        z = process.sample(model, shape, **options)
    images = ae.decode(ae.denormalize(z))              # float32: bf16 steps exceed one grey level
    run.need(images.isfinite().all(), f"{file}: its samples are not finite; take an earlier "
             "checkpoint, --dtype fp32 or a smaller --cfg")
    images = to_uint8(images)
    return jpeg_round_trip(images) if args.jpeg else images


def rank_batches(n, batch_size):
    """This rank's row numbers (every world_size-th of n), in arrays of at most batch_size."""
    rows = np.arange(run.get_rank(), n, run.get_world_size())
    return np.array_split(rows, math.ceil(len(rows) / batch_size)) if len(rows) else []


def write_samples(draw, shape, out, args):
    """
    Call draw(indices) for N images of shape (N, H, W, 3). Returns a memory-mapped uint8 array that
    all ranks share, and the seconds taken. Writes grid.png, samples.npz for the ADM suite and, with
    --folder, images/NNNNNN.png to the folder out, replacing those of an earlier call.
    """
    path, folder, rank = out / "samples.npy", out / "images", run.get_rank()
    # one process at a time writes there, others wait
    with run.file_lock(out / ".lock") if rank == 0 else contextlib.nullcontext():
        if rank == 0:                                  # 50,000 images of 256 px are 10 GB
            create_array(f"{path} of {shape[0]:,} rows", path, np.uint8, shape)
        run.barrier()
        samples = np.load(path, mmap_mode="r+")
        run.barrier()
        if rank == 0:
            path.unlink()                              # unlinked: a killed run leaves no file
        start = time.perf_counter()
        batches = rank_batches(len(samples), args.batch_size)
        for indices in tqdm(batches, "sampling", disable=rank > 0 or None):
            samples[indices] = draw(indices).movedim(1, -1).cpu().numpy()
        run.barrier()
        seconds = time.perf_counter() - start
        if rank == 0:
            image_grid(torch.from_numpy(samples[:64]).movedim(-1, 1) / 255, out / "grid.png")
            run.write_atomic(out / "samples.npz", lambda file: np.savez(file, arr_0=samples))
            for old in folder.glob("[0-9]" * 6 + ".png"):      # keep other files
                old.unlink()
        run.barrier()
        if args.folder:
            folder.mkdir(exist_ok=True)
            for i in itertools.chain(*batches):
                Image.fromarray(samples[i]).save(folder / f"{i:06d}.png")
        run.barrier()                                  # other ranks may still be writing
    run.print0(f"wrote {out}/grid.png, {out}/samples.npz" + f", {folder}/" * args.folder)
    return samples, seconds


# --------------------------------------- Inception statistics of samples and of training images

def fid_at(n):
    """The name FID@n; prints a note if n is too small for a reliable FID."""
    if n < 10_000:
        run.print0(f"FID@{n}: with fewer than 10,000 images FID is biased upwards; compare it "
                   "only with FID at the same N")
    return f"FID@{n}"


def set_statistics(inception, images, keep, workers, args, device):
    """inception_statistics of a set (ImageSet or built-in); batches are split over the ranks."""
    rank, world = run.get_rank(), run.get_world_size()
    batches = val_batches(images, args.batch_size * world, rank, world, workers, device)
    uint8 = ((to_uint8(x), rows.numpy()) for x, _, rows in batches)
    return inception_statistics(inception, uint8, keep, device)


def inception_statistics(inception, batches, keep, device):
    """
    Run this rank's batches of (uint8 images, row numbers) through Inception. Returns n, mean and
    covariance over all ranks, and features (k, 2048) and logits (k, 1008) of the k rows in keep.
    """
    moments, kept = Moments(2048, device), []
    for images, rows in tqdm(batches, "Inception", disable=run.get_rank() > 0 or None):
        features, logits = inception(images)
        moments.add(features)
        wanted = np.isin(rows, keep)
        kept.append((rows[wanted], features.cpu().numpy()[wanted], logits.cpu().numpy()[wanted]))
    batches = itertools.chain(*run.all_gather(kept))   # 0.6 GB for 50,000 samples
    rows, *values = map(np.concatenate, zip(*batches))
    return *moments.mean_cov(), *(torch.from_numpy(x[np.argsort(rows)]) for x in values)


def training_images(file, checkpoint, args):
    """The training images to compare samples with; if missing, prints why and returns None."""
    try:
        _, _, images, _ = open_run_data(file, checkpoint, args.data)
    except (FileNotFoundError, ValueError) as error:
        if args.data:
            raise
        run.print0(f"{error}; compared with nothing unless --data names the training images")
        return None
    return spread(images, args.reference_images or len(images))


def reference_statistics(images, load_inception, args, device):
    """mu, sigma and features of a set, cached by its content; None without Inception's weights."""
    identity = run.broadcast_from_rank0(lambda: images_hash(images))
    file = Path("out/reference") / f"{identity}-{images.size}.npz"
    how = json.dumps(dict(images=identity, size=images.size, n=len(images),
                          crop="ADM centre crop, 8 bit", network="torch-fidelity"))
    if run.broadcast_from_rank0(file.exists):          # another run may be writing it
        stored = read_npz(file)
        run.need(str(stored.get("how")) == how,
                 f"{file}: statistics of {stored.get('how')}, wanted {how}; remove the file")
        return stored
    inception = load_inception()
    if not inception:
        return None
    keep = np.linspace(0, len(images) - 1, 10_000).astype(np.int64)     # spread evenly over classes
    n, mu, sigma, features, _ = set_statistics(inception, images, keep, args.workers, args, device)
    made = dict(mu=mu.numpy(), sigma=sigma.numpy(), features=features.numpy())
    if run.get_rank() == 0:
        run.write_atomic(file, lambda out: np.savez(out, **made, readable=n, how=how))
    return made


def inception_metrics(inception, samples, reference, args, device):
    """FID, IS, KID, precision and recall of samples (N, H, W, 3) on rank 0, else {}."""
    from torch_fidelity import metric_isc, metric_kid, metric_prc
    n, name = len(samples), fid_at(len(samples))
    batches = ((torch.from_numpy(samples[rows]).movedim(-1, 1), rows)
               for rows in rank_batches(n, args.batch_size))
    _, mean, cov, fake, logits = inception_statistics(inception, batches, np.arange(n), device)
    if run.get_rank() > 0:
        return {}
    score = metric_isc.isc_features_to_metric(logits, splits=min(10, n))
    fake, real = fake[:10_000], torch.from_numpy(reference["features"])
    size = min(1000, len(fake), len(real))
    kid = metric_kid.kid_features_to_metric(fake, real, kid_subset_size=size, verbose=False)
    values = {name: frechet_distance(mean, cov, reference["mu"], reference["sigma"]),
              "IS": score["inception_score_mean"],
              f"KID_x1e3_subset{size}": 1000 * kid["kernel_inception_distance_mean"]}
    if size > 3:                                       # needs 3 nearest neighbours
        found = metric_prc.prc_features_to_metric(fake, real, verbose=False)
        values |= {name: float(found[name]) for name in ("precision", "recall")}
    return values


# -------------------------------------------------------------------- sets that a user supplies

def read_npz(file):
    """{name: array} of a .npz, without unpickling; ValueError if it is damaged."""
    try:
        with np.load(file) as archive:
            return dict(archive)
    except Exception as error:                         # a damaged file can raise anything
        raise ValueError(f"{file}: no usable .npz ({run.reason(error)}); remove it, or make it "
                         "anew") from None


def common_size(sets):
    """Resolution to compare two open_set results at: an .npz's, else the images'; None: unknown."""
    sizes = {entry.size for entry in sets} - {None}
    for entry in sets if not sizes else ():
        for row in range(entry.n or 0):                    # statistics have no images
            with contextlib.suppress(Exception):           # unreadable ones are reported later
                sizes.add(min(entry.images.source.image(row).size))
    run.need(len(sizes) < 2, f"{sets[0].spec} and {sets[1].spec}: images of several sizes; "
             "--image_size says at which to compare them")
    return next(iter(sizes), None)


def open_set(spec):
    """
    Open a folder, a zip, 'cifar10', or an npz of images (arr_0) or statistics (mu, sigma). Returns
    spec; n; images (an ImageSet without a size) or moments (mu, sigma); an npz's size if known.
    """
    found = SimpleNamespace(spec=spec, n=None, images=None, moments=None, size=None)
    if spec.lower().endswith(".npz") and Path(spec).is_file():         # a pipe would block
        stored = read_npz(spec)
        if {"mu", "sigma"} <= stored.keys():
            found.moments = stored["mu"], stored["sigma"]
            run.need(all(np.isfinite(x).all() for x in found.moments), f"{spec}: is not finite")
            found.size = json.loads(str(stored.get("how", "{}"))).get("size")  # of out/reference
            return found
        pixels = stored.get("arr_0", np.empty(0))
        run.need(pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] == 3,
                 f"{spec}: holds neither mu and sigma nor arr_0 (N, H, W, 3) uint8")
        found.size = min(pixels.shape[1:3])
        source = SimpleNamespace(names=np.arange(len(pixels)),
                                 image=lambda row: Image.fromarray(pixels[row]))
    else:
        source = open_source(spec)
    found.n = n = len(source.names)
    run.need(n > 1, f"{spec}: needs two images or more, holds {n}")
    found.images = ImageSet(spec, source, np.arange(n), np.zeros(n, np.int64), [], None)
    return found
