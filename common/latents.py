"""
The latent cache: every image is encoded once plain and once mirrored; diffusion then trains from a
memory-mapped file.

    folder/moments.npy   (N, 2, 2C, h, w) float16: axis 1 plain, mirrored; axis 2 mean, logvar of q
    folder/labels.npy    (N,) int64
    folder/rows.npy      (M,) int64, indices of the readable images, ascending
    folder/cache.json    autoencoder, images and size it was made from; mean and std of the latents,
                         (C,); checksums of itself, the small arrays, and each 1,024 rows of moments

A cache is written under a temporary name and renamed when complete. It opens only for the
autoencoder and images that it was made from. 42 GB for ImageNet at f16d16.
"""
import concurrent.futures
import contextlib
import io
import itertools
import json
import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.data import read_bytes, stream_entries, val_batches
from common.run import all_sum, barrier, broadcast_from_rank0, file_lock, need, reason
from vae import Posterior

BLOCK, CHECKED = 1024, 2 ** 30             # images per checksum; bytes verified on opening


def _checksums(moments, blocks):
    return [zlib.crc32(moments[k * BLOCK:(k + 1) * BLOCK]) for k in blocks]


def create_array(what, path, dtype, shape):
    """Create a .npy of zeros to memory-map. On failure, OSError starting with `what`; no file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):                 # not on Windows or macOS
            with open(path, "r+b") as file:                # a mapped write to a full disk kills
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        needed = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
        raise OSError(f"{what}: needs {needed:.3g} GB ({error.strerror}); name a folder on another "
                      "disk") from None


def _encode(folder, ae, batches, moments, labels, readable):
    """Fill the arrays; return (3, C) float64: count, sum of z and of z^2 over all positions."""
    C = ae.config.latent_channels
    total = torch.zeros(3, C, dtype=torch.float64)
    for images, classes, indices in batches:
        rows = indices.numpy()
        for mirror, x in enumerate((images, images.flip(-1))):
            q = ae.encode(x)
            both = torch.cat([q.mean, q.logvar], dim=1)                        # (b, 2C, h, w)
            largest = both.abs().max().item()
            need(largest <= 65504, f"--cache {folder}: a latent of {largest:.3g} does not fit the "
                 "cache's float16; the autoencoder has diverged, or its latents need rescaling")
            moments[rows, mirror] = both.half().cpu().numpy()
            # on the CPU: Apple GPUs have no float64
            mean, logvar = (m.cpu().double().movedim(1, -1).reshape(-1, C)
                            for m in (q.mean, q.logvar))
            second = (mean.square() + logvar.exp()).sum(0)                     # E[z^2] for z ~ q
            total += torch.stack([torch.ones_like(mean).sum(0), mean.sum(0), second])
        labels[rows] = classes.cpu().numpy()
        readable[rows] = True
    return total


@torch.no_grad()
def build_cache(folder, identity, ae, dataset, batch_size, rank=0, world=1, workers=0,
                device="cpu"):
    """
    Encode a dataset outside autocast and write the cache, all ranks together. If another run is
    already writing it, wait for that one instead.
    identity    dict of plain values that LatentCache will compare
    batch_size  images per encoder call, summed over ranks
    """
    folder, n, side = Path(folder), len(dataset), dataset.size // ae.config.reduction
    shape = (n, 2, 2 * ae.config.latent_channels, side, side)
    layout = dict(moments=(np.float16, shape), labels=(np.int64, (n,)), readable=(bool, (n,)))
    partial = folder.with_name(f".{folder.name}.tmp")      # only the holder of the lock writes it
    with contextlib.ExitStack() as cleanup:
        if rank == 0:
            cleanup.enter_context(file_lock(folder.with_name(f".{folder.name}.lock")))
            cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
        if broadcast_from_rank0(folder.exists):
            return
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)     # left by a killed process
            for name, (dtype, size) in layout.items():
                create_array(f"--cache {folder}", partial / f"{name}.npy", dtype, size)
        barrier()
        arrays = {name: np.load(partial / f"{name}.npy", mmap_mode="r+") for name in layout}
        batches = val_batches(dataset, batch_size, rank, world, workers, device)
        batches = tqdm(batches, "encoding", math.ceil(n / batch_size), disable=rank > 0 or None)
        total = _encode(folder, ae, batches, **arrays)
        count, first, second = all_sum(total)
        for array in arrays.values():
            array.flush()
        barrier()
        lost = n - np.count_nonzero(arrays["readable"])    # each rank has seen a part of them only
        need(lost <= n / 100, f"--cache {folder}: {lost} of {n} images cannot be read, more than "
             "1%; they are named above")
        if rank == 0:
            mean = first / count
            std = (second / count - mean ** 2).clamp_min(1e-12).sqrt()
            np.save(partial / "rows.npy", np.flatnonzero(arrays["readable"]))
            (partial / "readable.npy").unlink()
            meta = dict(identity, count=n, shape=shape, mean=mean.tolist(), std=std.tolist(),
                        moments=_checksums(arrays["moments"], range(-(-n // BLOCK))))
            for name in ("labels", "rows"):
                meta[name] = zlib.crc32(read_bytes(partial / f"{name}.npy"))
            meta["checksum"] = zlib.crc32(json.dumps(meta).encode())
            (partial / "cache.json").write_text(json.dumps(meta, indent=1))
            os.rename(partial, folder)
        barrier()


class LatentCache:
    """
    A finished cache: mean and std of the sampled latents, (C,) each; `labels` of all N images.
    ValueError if it is damaged or does not match `identity`.
    """

    def __init__(self, folder, identity):
        try:
            self._open(Path(folder), identity)
        except Exception as error:         # a damaged file can raise any exception
            raise ValueError(f"--cache {folder}: not this run's latent cache ({reason(error)}); "
                             "name another folder, or remove it") from None

    def _open(self, folder, identity):
        meta = json.loads(read_bytes(folder / "cache.json"))
        differs = [f"{key} {meta.get(key)!r}, not {value!r}"
                   for key, value in identity.items() if meta.get(key) != value]
        need(not differs, f"it was made from {'; '.join(differs)}")
        self.mean, self.std = torch.tensor(meta["mean"]), torch.tensor(meta["std"])
        small = {name: read_bytes(folder / f"{name}.npy") for name in ("labels", "rows")}
        self.labels, self.rows = (np.load(io.BytesIO(content)) for content in small.values())
        self.moments = np.load(folder / "moments.npy", mmap_mode="r")          # (N, 2, 2C, h, w)
        # a large cache has random blocks verified at each opening, so damage is found eventually
        count = max(1, CHECKED // self.moments[:BLOCK].nbytes)
        blocks = np.random.default_rng().permutation(len(meta["moments"]))[:count]
        whole = meta.pop("checksum") == zlib.crc32(json.dumps(meta).encode())
        whole &= all(zlib.crc32(small[name]) == meta[name] for name in small)
        whole &= _checksums(self.moments, blocks) == [meta["moments"][k] for k in blocks]
        whole &= self.moments.dtype == np.float16 and [*self.moments.shape] == meta["shape"]
        need(whole, "damaged: a checksum differs")

    def __len__(self):
        return len(self.rows)

    def batches(self, batch_size, start_step=0, seed=0, rank=0, world=1, device="cpu",
                mirror=True):
        """
        The endless stream of data.py from start_step on; a thread reads one batch ahead. batch_size
        is GLOBAL; this rank receives b = batch_size / world.
        yields   Posterior over (b, C, h, w) and labels (b,) on device, indices (b,), mirrored (b,)
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
