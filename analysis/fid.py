"""
Sets of images, most of them through the Inception network, as evaluate.py compares them.

    gen         sampled images with the training images: FID, IS, KID, precision, recall, and what
                needs no weights. Statistics of the training images are kept in out/reference
    fid A B     two sets that somebody brings, at one size

The formulas are in metrics.py or torch-fidelity's. Images are (N, H, W, 3) uint8 where they lie in
files, (B, 3, H, W) uint8 on their way into the network. `compute` is run.Compute.
"""
import contextlib
import json
import math
import pathlib
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import run
from common.data import ImageSet, images_hash, open_data, open_source, spread, val_batches
from common.latents import create_array
from common.metrics import Moments, frechet_distance, sliced_wasserstein, spectral_kl, to_uint8
from common.run import reason


def warn_small(n, compute):
    """Say once that FID needs many images."""
    if n < 10_000:
        compute.say(f"FID@{n}: with fewer than 10,000 images FID is biased upwards; compare it "
                    "only with FID at the same N")


@contextlib.contextmanager
def shared_array(path, dtype, shape, compute):
    """A memory-mapped .npy that all ranks write into, each its rows; it is gone after the block."""
    if compute.rank == 0:
        create_array(f"{path} of {shape[0]:,} rows", path, dtype, shape)
    run.barrier()
    try:
        yield np.load(path, mmap_mode="r+")
    finally:
        if compute.rank == 0:
            path.unlink(missing_ok=True)


def inception_statistics(inception, batches, keep, folder, compute):
    """
    Stream a set, spread over the ranks as batches of (uint8 images, row numbers), through the
    Inception network.
    keep     ascending row numbers whose features and logits are wanted, for the metrics that cannot
             be streamed
    folder   for files of the meantime
    returns  n, mean, covariance over all ranks; and on rank 0 the kept features (k, 2048) and
             logits (k, 1008), else None
    """
    moments, k = Moments(2048, compute.device), len(keep)
    with (shared_array(folder / ".features.npy", np.float32, (k, 2048), compute) as features,
          shared_array(folder / ".logits.npy", np.float32, (k, 1008), compute) as logits):
        for images, rows in batches:
            values = inception(images)
            moments.add(values[0])
            places = np.searchsorted(keep, rows)
            wanted = keep[np.minimum(places, k - 1)] == rows
            for array, value in zip((features, logits), values):
                array[places[wanted]] = value.cpu().numpy()[wanted]
        n, mean, cov = moments.mean_cov()
        run.barrier()
        if compute.rank > 0:
            return n, mean, cov, None, None
        features, logits = (torch.from_numpy(np.array(array)) for array in (features, logits))
    readable = logits.any(1)                           # rows of unreadable images stay 0
    return n, mean, cov, features[readable], logits[readable]


# --------------------------------------------------------------------------------------------------
# Samples and training images

def training_images(checkpoint, path, args, compute):
    """
    What the samples of a run are compared with: a set of data.py; None, and a line that says so,
    if the run's own data is not on this machine and no other was given.
    """
    data, size = args.data or checkpoint["data"], checkpoint["image_size"]
    try:
        train_set, _ = open_data(data, size, seed=checkpoint["data_seed"])
    except (FileNotFoundError, ValueError) as error:
        absent = isinstance(error, FileNotFoundError) or data == "cifar10"
        if args.data or not absent:
            raise
        compute.say(f"{path}: its training images, {data}, are not here, so the samples are "
                    "compared with nothing; --data names them")
        return None
    if len(train_set) < 2:
        raise ValueError(f"--data {data or 'built-in'}: has a single training image, and no "
                         "Frechet distance to it; give two or more")
    return spread(train_set, args.reference_images or len(train_set))


def stored_statistics(reference_set):
    """
    Where the Inception statistics of a set are kept, what they are of, and the arrays if they are
    there, else None; ValueError if they are of something else, or damaged.
    """
    identity = run.broadcast_from_rank0(lambda: images_hash(reference_set))
    file = pathlib.Path("out/reference") / f"{identity}-{reference_set.size}.npz"
    how = dict(images=identity, size=reference_set.size, n=len(reference_set),
               crop="ADM centre crop, 8 bit", network="torch-fidelity")
    stored = None
    if run.broadcast_from_rank0(file.exists):            # another run may be writing it just now
        stored = read_npz(file, "mu", "sigma", "features", "how")
    if stored is not None and (len(stored) < 4 or str(stored["how"]) != json.dumps(how)):
        raise ValueError(f"{file}: statistics of {stored.get('how')}, wanted {json.dumps(how)}; "
                         "remove the file")
    return file, how, stored


def reference_statistics(inception, reference_set, folder, args, compute):
    """
    mu, sigma and features of a set of data.py, from out/reference, or made now and kept there.
    folder   for files of the meantime; args: batch_size, workers
    """
    reference, how, stored = stored_statistics(reference_set)
    if stored:                                         # on all ranks: rank 0 writes it later
        return stored
    loader = val_batches(reference_set, args.batch_size * compute.world, rank=compute.rank,
                         world=compute.world, workers=args.workers, device=compute.device)
    batches = ((to_uint8(images), indices.numpy()) for images, _, indices in loader)
    # spread over the classes
    keep = np.unique(np.linspace(0, len(reference_set) - 1, 10_000).astype(np.int64))
    n, mu, sigma, features, _ = inception_statistics(inception, batches, keep, folder, compute)
    if compute.rank == 0:
        run.write_atomic(reference, lambda file: np.savez(
            file, mu=mu.numpy(), sigma=sigma.numpy(), features=features.numpy(), readable=n,
            how=json.dumps(how)))
    run.barrier()
    return stored_statistics(reference_set)[2]


def inception_metrics(inception, samples, reference, folder, args, compute):
    """
    FID, IS, KID, precision and recall of samples (N, H, W, 3) against reference_statistics; on
    ranks above 0 only FID.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    n, rank, world = len(samples), compute.rank, compute.world
    warn_small(n, compute)
    chunks = np.array_split(np.arange(rank, n, world),
                            max(1, math.ceil(n / world / args.batch_size)))
    batches = ((torch.from_numpy(samples[i]).movedim(-1, 1), i) for i in chunks if len(i))
    _, mean, cov, fake, logits = inception_statistics(inception, batches, np.arange(n), folder,
                                                      compute)
    values = {f"FID@{n}": frechet_distance(mean, cov, reference["mu"], reference["sigma"])}
    if rank == 0:
        values["IS"] = isc_features_to_metric(logits, splits=min(10, n))["inception_score_mean"]
        # the rest on at most 10,000 of each
        fake, real = fake[:10_000], torch.from_numpy(reference["features"])
        size = min(1000, len(fake), len(real))
        kid = kid_features_to_metric(fake, real, kid_subset_size=size, verbose=False)
        values[f"KID_x1e3_subset{size}"] = 1000 * kid["kernel_inception_distance_mean"]
        if min(len(fake), len(real)) > 3:
            found = prc_features_to_metric(fake, real, verbose=False)
            values |= {k: float(v) for k, v in found.items() if k in ("precision", "recall")}
    return values


def read_reference(reference_set, inception, out, args, compute):
    """
    What samples are compared with: the Inception network and the statistics of a set of data.py, or
    None; count, for the metrics that need no weights, and on rank 0 so many of the images (count,
    3, H, W) uint8. Without a set all are None, or 0.
    """
    found = SimpleNamespace(network=None, statistics=None, count=0, images=None)
    if reference_set is None:
        return found
    found.network = inception()
    if found.network:
        found.statistics = reference_statistics(found.network, reference_set, out, args, compute)
    found.count = min(args.num_samples, len(reference_set), 2048)  # in memory, unlike all else here
    if compute.rank == 0:
        batches = val_batches(spread(reference_set, found.count), args.batch_size)
        found.images = torch.cat([to_uint8(images) for images, _, _ in batches])
    return found


def compare(samples, reference, out, args, compute):
    """{name: number} of samples (N, H, W, 3) uint8 and read_reference; whole on rank 0 only."""
    values = {}
    if reference.network:
        values = inception_metrics(reference.network, samples, reference.statistics, out, args,
                                   compute)
    if reference.images is not None:
        fake = torch.from_numpy(samples[:reference.count].copy()).movedim(-1, 1)
        fake, real = (x / 127.5 - 1 for x in (fake, reference.images))
        for side, distance in sliced_wasserstein(fake, real).items():
            values[f"SWD_{side}px"] = distance
        values["spectral_KL"] = spectral_kl(fake, real)
    return values


# --------------------------------------------------------------------------------------------------
# Two sets that somebody brings

def read_npz(file, *names):
    """
    {name: array} of those names that a .npz holds, nothing unpickled; ValueError if it is damaged,
    or mu and sigma are no moments.
    """
    try:
        with np.load(file) as archive:
            found = {name: archive[name] for name in names if name in archive.files}
        if {"mu", "sigma"} <= found.keys():
            mu, sigma = found["mu"], found["sigma"]
            finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
            if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not finite:
                raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} are no finite mean and "
                                 "covariance")
    except Exception as error:                         # a damaged file breaks its reader in any way
        raise ValueError(f"{file}: no usable .npz ({reason(error)}); remove it, or make it "
                         "anew") from None
    return found


class Pixels:
    """Images (N, H, W, 3) uint8 as a source of data.py."""

    def __init__(self, images):
        self.images, self.names = images, np.arange(len(images)).astype(str)

    def image(self, row):
        return Image.fromarray(self.images[row])


class Brought(NamedTuple):
    """
    A set as it was brought: images as a source of data.py, or moments (mu, sigma); side: the pixels
    of an npz's images, None where that is not known yet.
    """
    spec: str
    source: object
    moments: tuple | None
    side: int | None


def open_set(spec):
    """
    A folder, a zip, 'cifar10', an npz of images (arr_0) or of statistics (mu, sigma) as Brought.
    raises   FileNotFoundError or ValueError in one line that begins with spec
    """
    known = ("a folder or .zip of images, an .npz of images (arr_0) or of statistics (mu, sigma), "
             "or 'cifar10'")
    path = pathlib.Path(spec)
    if not path.exists() and spec != "cifar10":
        raise FileNotFoundError(f"{spec}: no such folder, .zip or .npz; give {known}")
    if path.suffix.lower() != ".npz" or path.is_dir():
        if path.is_file() and path.suffix.lower() != ".zip":
            raise ValueError(f"{spec}: neither a folder nor a .zip nor an .npz; give {known}")
        with named_without_flag():
            source = open_source(spec)
    else:
        found = read_npz(spec, "mu", "sigma", "arr_0", "how")
        if {"mu", "sigma"} <= found.keys():
            side = None
            with contextlib.suppress(Exception):       # as reference_statistics writes it
                side = int(json.loads(str(found["how"]))["size"])
            return Brought(spec, None, (found["mu"], found["sigma"]), side)
        images = found.get("arr_0")
        if (images is None or images.dtype != np.uint8 or images.ndim != 4
                or images.shape[-1] != 3):
            raise ValueError(f"{spec}: holds neither mu and sigma nor arr_0 (N, H, W, 3) uint8")
        source = Pixels(images)
    n = len(source.names)
    if n < 2:
        raise ValueError(f"{spec}: needs two images or more, holds {n}")
    side = min(source.images.shape[1:3]) if isinstance(source, Pixels) else None
    return Brought(spec, source, None, side)


@contextlib.contextmanager
def named_without_flag():
    """What data.py says of --data is true of an argument without that flag."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if not str(error).startswith("--data "):
            raise
        raise type(error)(str(error).removeprefix("--data ")) from None


def common_side(source):
    """The shorter side that all readable images of a source share, else None."""
    sides = set()
    for row in range(len(source.names)):
        with contextlib.suppress(Exception):           # decoders raise anything; it is said later
            sides.add(min(source.image(row).size))
        if len(sides) > 1:
            return None
    return sides.pop() if sides else None


def meeting_side(sets, asked=None):
    """
    The pixels a side at which Brought sets are compared: those asked for, else those of the npz,
    else those of all pictures of the folders and zips; 256, with a line that says so, where these
    are several. None if there are only statistics that do not know theirs.
    raises   ValueError if statistics are of images of another size
    """
    side, sides = asked, {entry.side for entry in sets} - {None}
    if not side:
        sides = sides or {common_side(entry.source) for entry in sets if entry.source}
        if not sides:
            return None
        side = sides.pop() if len(sides) == 1 else None
    if not side:
        side = 256
        print("the images have no common size and are compared at 256 px; --image_size says "
              "another")
    for entry in sets:
        if entry.moments and entry.side not in (None, side):
            raise ValueError(f"{entry.spec}: statistics of images of {entry.side} px, not of "
                             f"{side}; --image_size {entry.side} compares at theirs")
    return side


def brought_moments(entry, side, inception, batch_size, device):
    """n, mean, covariance of the Inception features of a Brought set of images, cropped to side."""
    n, moments = len(entry.source.names), Moments(2048, device)
    dataset = ImageSet(entry.spec, entry.source, np.arange(n), np.zeros(n, np.int64), [], side)
    with named_without_flag():
        for images, _, _ in tqdm(val_batches(dataset, batch_size), unit="batch",
                                 total=math.ceil(n / batch_size),
                                 disable=not sys.stderr.isatty()):
            moments.add(inception(to_uint8(images))[0])
        return moments.mean_cov()
