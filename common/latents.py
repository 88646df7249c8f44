"""
The latent cache: every image is encoded once, as it is and mirrored, and diffusion then trains from
disk by memory map.

    folder/moments.npy   (N, 2, 2C, h, w) float16: image i, its mirror; mean and logvar of q(z|x)
    folder/labels.npy    (N,) int64
    folder/rows.npy      (M,) int64, the readable images among the N, ascending
    folder/cache.json    autoencoder, images, size it was made from; the latents' mean and std (C,)

A cache is written beside its final name and renamed when complete, so a folder that is there is
whole. It is opened only for the autoencoder and the images that it was made from. Size:
4 * C * h * w bytes per image and mirror, 42 GB for ImageNet at f16d16. RAM stays bounded: a batch
at a time goes in, and pages of the map come and go.
"""
import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common.data import stream_entries, val_batches
from common.run import all_sum, barrier, reason
from vae import Posterior


@lru_cache(maxsize=4)  # a million files take a minute
def images_hash(dataset):
    """
    16 hex digits that stand for the pictures of a set of data.py: what its source says of their
    content, labels, and names without the folders around all; of built-in ones seed and numbers.
    Where the set lies, and how that was spelled, does not count.
    """
    if hasattr(dataset, "rows"):
        names = [dataset.name(i) for i in range(len(dataset))]
        start = os.path.commonprefix(names).rfind("/") + 1
        prints = dataset.source.fingerprint(dataset.rows).tolist()
        lines = zip((name[start:] for name in names), dataset.labels.tolist(), prints)
        text = "\n".join(map(repr, lines))
    else:
        name = {"leaves": "dead leaves"}.get(dataset.kind, dataset.kind)  # as it was always called
        text = f"{name}, seed {dataset.seed}, {len(dataset)} from {dataset.first}"
    # names on disk need not be UTF-8
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def create_array(what, path, dtype, shape):
    """
    An empty .npy at path for memory maps to write into, its room on the disk taken at once: a
    memory map on a full disk dies by signal.
    raises   OSError in one line that begins with `what`, and no file, if there is no room, or the
             folder cannot be written to
    """
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    room = shutil.disk_usage(existing).free
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        if needed > room:  # not even a folder is left
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):  # where it can be done
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(f"{what}: needs {needed / 1e9:.3g} GB, {room / 1e9:.3g} GB are free "
                      f"({error.strerror}); name a folder on another disk") from None


def _sums(q):
    """(3, C) float64: count, sum z and sum z^2 over the cells of samples z of q."""
    C = q.mean.shape[1]
    mean, logvar = (m.double().movedim(1, -1).reshape(-1, C) for m in (q.mean, q.logvar))
    second = (mean.square() + logvar.exp()).sum(0)  # E z^2 = mean^2 + var
    return torch.stack([torch.ones_like(mean).sum(0), mean.sum(0), second]).cpu()


def _encode(folder, ae, batches, moments, labels, readable, progress):
    """
    Fill the three arrays from batches of val_batches, each image as it is and mirrored.
    returns  _sums over everything, (3, C) float64
    raises   ValueError, beginning with --cache, if a moment does not fit float16
    """
    total = torch.zeros(3, ae.config.latent_channels, dtype=torch.float64)
    for images, classes, indices in batches:
        rows = indices.numpy()
        for mirror, x in enumerate((images, images.flip(-1))):
            q = ae.encode(x)
            both = torch.cat([q.mean, q.logvar], dim=1)  # (b, 2C, h, w)
            largest = both.abs().max()
            if not largest <= 65504:  # NaN included
                raise ValueError(f"--cache {folder}: a latent of {largest:.3g} does not fit "
                                 "the cache's float16; the autoencoder has diverged, or its "
                                 "latents need rescaling")
            moments[rows, mirror] = both.half().cpu().numpy()
            total += _sums(q)
        labels[rows] = classes.cpu().numpy()
        readable[rows] = True
        progress(len(images))
    return total


@torch.no_grad()
def build_cache(folder, identity, ae, dataset, batch_size, rank=0, world=1, workers=0,
                device="cpu", progress=lambda n: None):
    """
    Encode every image of dataset in float32 and write the cache. Call it on all ranks: they share.
    folder      must not exist yet; it appears when everything is in it
    identity    dict of plain values that LatentCache will ask for
    batch_size  images per encoder call over all ranks
    progress    called with the number of images done, on every rank
    raises      OSError before anything is encoded if the disk has no room, ValueError if a moment
                does not fit float16
    """
    folder, n = Path(folder), len(dataset)
    partial = folder.with_name(f".{folder.name}.tmp")
    side = dataset.size // ae.config.reduction
    shape = (n, 2, 2 * ae.config.latent_channels, side, side)
    layout = dict(moments=(np.float16, shape), labels=(np.int64, (n,)), readable=(bool, (n,)))
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            for name, (dtype, size) in layout.items():
                create_array(f"--cache {folder}", partial / f"{name}.npy", dtype, size)
        barrier()
        arrays = {name: np.load(partial / f"{name}.npy", mmap_mode="r+") for name in layout}
        batches = val_batches(dataset, batch_size, rank, world, workers, device)
        total = _encode(folder, ae, batches, **arrays, progress=progress)
        count, first, second = all_sum(total.to(device)).cpu()
        for array in arrays.values():
            array.flush()
        barrier()
        if rank == 0:
            mean = first / count
            std = (second / count - mean ** 2).clamp_min(1e-12).sqrt()
            meta = dict(identity, count=n, shape=shape, mean=mean.tolist(), std=std.tolist())
            np.save(partial / "rows.npy", np.flatnonzero(arrays["readable"]))
            (partial / "readable.npy").unlink()
            (partial / "cache.json").write_text(json.dumps(meta, indent=1))
            os.rename(partial, folder)
        barrier()
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


class LatentCache:
    """
    A finished cache. mean and std, (C,) tensors of the sampled latents; `labels` of all images.
    raises   ValueError, naming what differs, when the cache was made from something else than
             `identity` says, or is damaged
    """

    def __init__(self, folder, identity):
        folder = Path(folder)
        try:
            self.meta = json.loads((folder / "cache.json").read_text())
            self.moments = np.load(folder / "moments.npy", mmap_mode="r")  # (N, 2, 2C, h, w)
            self.labels, self.rows = np.load(folder / "labels.npy"), np.load(folder / "rows.npy")
            differs = [f"{key} {self.meta.get(key)!r}, not {value!r}"
                       for key, value in identity.items() if self.meta.get(key) != value]
            self.mean, self.std = torch.tensor(self.meta["mean"]), torch.tensor(self.meta["std"])
            whole = self._is_whole()
        except Exception as error:  # a damaged file breaks its reader in any way
            raise ValueError(f"--cache {folder}: not a readable latent cache ({reason(error)}); "
                             "remove it, or name another folder") from None
        if differs:
            raise ValueError(f"--cache {folder}: was made from {'; '.join(differs)}; "
                             "name another folder")
        if not whole:
            raise ValueError(f"--cache {folder}: its files do not fit one another; "
                             "remove it, or name another folder")

    def _is_whole(self):
        """Whether shapes, types and ranges are those that build_cache writes."""
        n, _, channels, _, _ = shape = self.moments.shape
        return (list(shape) == self.meta["shape"] and self.moments.dtype == np.float16
                and self.labels.shape == (n,) and self.labels.dtype == self.rows.dtype == np.int64
                and 0 <= self.rows.min() <= self.rows.max() < n and self.labels.min() >= 0
                and self.mean.shape == self.std.shape == (channels // 2,)
                and self.mean.isfinite().all() and 0 < self.std.min() < math.inf)

    def __len__(self):
        return len(self.rows)

    def posterior(self, indices, mirrored, device="cpu"):
        """Posterior (b, C, h, w); numpy arrays indices (b,) among the N and mirrored (b,) bool."""
        moments = torch.from_numpy(self.moments[indices, mirrored.astype(np.int64)])
        return Posterior(*moments.to(device).float().chunk(2, dim=1))  # from (b, 2C, h, w) float16

    def batches(self, batch_size, start_step=0, seed=0, rank=0, world=1, device="cpu",
                mirror=True):
        """
        The endless stream of data.py over the cache from start_step; a thread reads a batch ahead.
        batch_size  the GLOBAL batch; this rank receives b = batch_size / world
        yields      Posterior over (b, C, h, w) on device, labels (b,) int64 on device,
                    indices (b,), mirrored (b,)
        """
        b, pinned = batch_size // world, torch.device(device).type == "cuda"

        def read(step):
            start = step * batch_size + rank * b
            positions, mirrored = stream_entries(len(self), start, start + b, seed, mirror)
            indices = self.rows[positions]
            moments = torch.from_numpy(self.moments[indices, mirrored.astype(np.int64)])
            tensors = moments, torch.from_numpy(self.labels[indices])
            return [t.pin_memory() if pinned else t for t in tensors], indices, mirrored

        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read, start_step)
            for step in itertools.count(start_step + 1):
                tensors, indices, mirrored = ahead.result()
                ahead = reader.submit(read, step)
                moments, labels = (t.to(device, non_blocking=True) for t in tensors)
                yield Posterior(*moments.float().chunk(2, dim=1)), labels, indices, mirrored
