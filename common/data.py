"""
Images in, batches out: built-in dead leaves (leaves.py), folders, zips and CIFAR-10 (sources.py),
in an order that is a formula and not a state.

The training stream is endless: its position p belongs to epoch e = p // n and is entry p % n of a
permutation of the n images drawn from (seed, e); a coin drawn from (seed, e, index) says whether
the picture is mirrored. Step s takes positions [s*B, (s+1)*B), B the GLOBAL batch, and rank r of W
the r-th of W equal slices. So a run resumes exactly from its step alone, and neither the number of
processes nor of workers changes what is seen. No batch is short, even if n < B.

Images are uint8 (3, size, size) up to the device, then float32 in [-1, 1]; label 0 without classes.
Dataset items are (image, label, index, bad); `bad`: the asked image was unreadable, this is the
next one in order. Only `pack` writes files.
"""
import argparse
import io
import itertools
import json
import os
import signal
import sys
import threading
import zipfile
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.builtin import SETS, BuiltInImages
from common.run import one_line_errors, parse_args, reason, write_atomic
from common.sources import LABELS_FILE, center_crop, divide, open_source, to_rgb

LARGEST_SIDE = 2 ** 14    # pixels
HELD_OUT_FIRST = 2 ** 40  # built-in images from here on are the held-out ones


class ImageSet:
    """
    Chosen rows of a source, cropped to size.
    items    (uint8 (3, size, size), label, index, bad); after an unreadable image comes the next
             readable one with ITS index and label. When more than 1% of the source fail in a row,
             an empty picture comes instead: `_load` stops the run at it.
    """

    def __init__(self, spec, source, rows, labels, classes, size):
        self.spec, self.source, self.size, self.classes = spec, source, size, classes
        self.rows, self.labels = rows, labels  # (n,), (n,) int64
        self.total = len(source.names)
        self.unreadable = set()  # met so far by this process, see _note

    def __len__(self):
        return len(self.rows)

    def name(self, i):
        return str(self.source.names[self.rows[i]])

    def read(self, i):
        """Picture i, (3, size, size) uint8; raises whatever its decoder raises."""
        image = center_crop(to_rgb(self.source.image(self.rows[i])), self.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def __getitem__(self, i):
        n = len(self)
        if not 0 <= i < n:
            raise IndexError(i)
        tries = min(self.total // 100 + 1, n)
        for j in range(i, i + tries):
            try:
                return self.read(j % n), int(self.labels[j % n]), j % n, j > i
            except Exception:  # decoders raise anything; the main process says which
                continue
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, (i + tries) % n, True


def open_data(spec, size, val_images=500, seed=0, builtin_images=4_000):
    """
    What --data names, as (train_set, val_set).
    spec     a built-in set: a name of leaves.SETS, "" or None for leaves; or a folder or .zip,
             flat, with one folder per class (its subfolders count with it), or with a dataset.json;
             or 'cifar10'. sources.divide says what is held out and where labels come from
    val_set  never overlaps train_set: the first val_images of what is held out, in shuffled order
    seed, builtin_images    of the built-in images only
    raises   FileNotFoundError or ValueError, one line that starts with `--data {spec}:`
    """
    if not 8 <= size <= LARGEST_SIDE or val_images < 0:
        shown = spec or "built-in"
        raise ValueError(f"--data {shown}: needs a size >= 8, at most {LARGEST_SIDE}, and "
                         f"val_images >= 0, got {size} and {val_images}")
    if not spec or spec in SETS:
        kind = spec or "leaves"
        return (BuiltInImages(size, builtin_images, seed, 0, kind),
                BuiltInImages(size, val_images, seed, HELD_OUT_FIRST, kind))
    source = open_source(spec)
    parts = divide(spec, source)
    return tuple(ImageSet(spec, source, rows, parts.labels[rows], parts.classes, size)
                 for rows in (parts.train, parts.held_out[:val_images]))


def take(dataset, chosen):
    """Pictures number `chosen` (ascending, (k,) int64) of a file set as a set; of all, itself."""
    if len(chosen) == len(dataset):
        return dataset
    return ImageSet(dataset.spec, dataset.source, dataset.rows[chosen], dataset.labels[chosen],
                    dataset.classes, dataset.size)


def spread(dataset, n):
    """n pictures evenly spread over a set (the first n would be one class); all if it has fewer."""
    n = min(n, len(dataset))
    if isinstance(dataset, BuiltInImages):
        return BuiltInImages(dataset.size, n, dataset.seed, dataset.first, dataset.kind)
    return take(dataset, np.linspace(0, len(dataset) - 1, n).astype(np.int64))

# ---- batches -------------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def _epoch(n, seed, epoch):
    """(permutation (n,) int64, mirrored by index (n,) bool)."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n), rng.random(n) < 0.5


def stream_entries(n, start, stop, seed=0, mirror=True):
    """
    Positions start .. stop-1 of the endless training stream over n images, a pure function.
    mirror   False: the same indices, and nothing is mirrored
    returns  indices (stop-start,) int64, mirrored (stop-start,) bool
    """
    position = np.arange(start, stop)
    indices, mirrored = np.empty(len(position), np.int64), np.empty(len(position), bool)
    for epoch in range(start // n, (stop - 1) // n + 1):
        order, coin = _epoch(n, seed, epoch)
        here = position // n == epoch
        indices[here] = order[position[here] % n]
        mirrored[here] = coin[indices[here]] & mirror
    return indices, mirrored


def _note(dataset, i, j):
    """
    Picture j came where i was asked: i .. j-1 are unreadable. Note them, name each once on stderr.
    raises   ValueError when they pass 1% of the source, or are all there is
    """
    n, unreadable = len(dataset), dataset.unreadable
    new = {k % n for k in range(i, i + (j - i - 1) % n + 1)} - unreadable
    unreadable |= new
    if len(unreadable) > dataset.total / 100 or len(unreadable) == n:
        first = ", ".join(repr(dataset.name(k)) for k in sorted(unreadable)[:5])
        raise ValueError(f"--data {dataset.spec}: {len(unreadable)} of {dataset.total} images so "
                         "far cannot be read, more than 1%; repair or remove them, "
                         f"beginning with {first}")
    for k in sorted(new):
        try:
            dataset.read(k)
            why = "readable on second try"
        except Exception as error:
            why = reason(error)
        name = repr(dataset.name(k))  # it may hold a newline
        print(f"--data {dataset.spec}: skipping {name}: {why}", file=sys.stderr, flush=True)


def _leave_signals_to(trainer, _):
    """
    In a loader's worker: Ctrl-C and a cluster's SIGTERM reach every process of a job, but only the
    training process may answer them. A worker that died of one would take the step with it. SIGTERM
    from the trainer, a process id, still ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

        def wait():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
                pass
            os._exit(0)
        threading.Thread(target=wait, daemon=True).start()


def _load(dataset, entries, workers, device):
    """Images, labels, indices, bad of entries(): indices (b,), mirrored (b,), each call alike."""
    device = torch.device(device)
    loader = DataLoader(
        dataset, batch_sampler=(indices.tolist() for indices, _ in entries()), num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=partial(_leave_signals_to, os.getpid()),
        generator=torch.Generator())  # or it would draw from, and move, the global generator
    for (asked, mirrored), (images, labels, indices, bad) in zip(entries(), loader):
        for k in torch.nonzero(bad).flatten().tolist():
            _note(dataset, int(asked[k]), int(indices[k]))
        mirrored = torch.from_numpy(mirrored)
        if device.type == "cuda":          # from pageable memory the host would wait for the device
            mirrored = mirrored.pin_memory()
        mirrored = mirrored.to(device, non_blocking=True)[:, None, None, None]
        images = images.to(device, non_blocking=True)  # (b, 3, H, W) uint8
        images = torch.where(mirrored, images.flip(-1), images).float().div_(127.5).sub_(1)
        yield images, labels.to(device, non_blocking=True), indices, bad


def _share(batch_size, world):
    if batch_size < world or batch_size % world:
        raise ValueError(f"--batch_size {batch_size}: the global batch does not divide into "
                         f"{world} processes")
    return batch_size // world


def train_batches(dataset, batch_size, start_step=0, seed=0, rank=0, world=1, workers=0,
                  device="cpu", mirror=True):
    """
    The training stream from start_step on, without an end (so its workers persist).
    batch_size   the GLOBAL batch B; this rank receives b = B / world
    mirror   whether half of the images come mirrored
    yields   images (b, 3, H, W) float32 in [-1, 1] and labels (b,) int64 on device, indices (b,)
             int64 on the CPU: they look things up in memory maps. Mirrored or not:
             stream_entries(n, s*B + rank*b, s*B + (rank+1)*b, seed, mirror)
    raises   ValueError at once if B does not divide; while running if this rank has met more than
             1% of unreadable images
    """
    b, n = _share(batch_size, world), len(dataset)

    def entries():
        starts = itertools.count(start_step * batch_size + rank * b, batch_size)
        return (stream_entries(n, start, start + b, seed, mirror) for start in starts)

    def batches():
        loaded = _load(dataset, entries, workers, device)
        for step, (images, labels, indices, _) in enumerate(loaded, start_step):
            epochs = (step + 1) * batch_size // n
            if dataset.unreadable and epochs > step * batch_size // n:
                print(f"--data {dataset.spec}: {len(dataset.unreadable)} of {dataset.total} images "
                      f"unreadable after epoch {epochs}", file=sys.stderr, flush=True)
            yield images, labels, indices

    return batches()


def val_batches(dataset, batch_size, rank=0, world=1, workers=0, device="cpu"):
    """
    One pass in order, nothing mirrored, every readable image exactly once over all ranks; yields
    what train_batches yields. The last batch may be short and ranks may get different numbers of
    batches: reduce over ranks after the loop, not in it. An unreadable image is left out here, not
    replaced.
    """
    b, n = _share(batch_size, world), len(dataset)

    def entries():
        shares = (np.arange(start, min(start + b, n)) for start in range(rank * b, n, batch_size))
        return ((indices, np.zeros(len(indices), bool)) for indices in shares)

    def batches():
        for images, labels, indices, bad in _load(dataset, entries, workers, device):
            if bad.any():
                images, labels, indices = images[~bad], labels[~bad], indices[~bad]
            if len(indices):
                yield images, labels, indices

    return batches()

# ---- packing -------------------------------------------------------------------------------------

def _bmp(item):
    """Dataset item -> (BMP bytes, index, bad): runs in the workers."""
    file = io.BytesIO()
    Image.fromarray(item[0].permute(1, 2, 0).numpy()).save(file, "BMP")
    return file.getvalue(), item[2], item[3]


def pack(spec, size, out, count=10_000, workers=0, overwrite=False):
    """
    Crop a set once into a zip of BMPs under the old relative names, so that classes and splits
    survive, with a dataset.json if it had one; same input, same bytes. BMP is lossless, a
    fifth to a half larger than PNG, and read some thirty times faster (tests/benchmark.py, section
    load). What open_data would refuse is refused before anything is written.
    spec     as --data; of built-in ones `count` images
    returns  (number of images written, number left out)
    raises   FileNotFoundError or ValueError, one line; no partial file is left, an older zip stays
    """
    out = Path(out)
    if out.suffix.lower() != ".zip":
        raise ValueError(f"--out {out}: must end in .zip")
    if out.exists() and spec and Path(spec).exists() and out.samefile(spec):
        raise ValueError(f"--out {out}: is the set itself; the original is never written to")
    if out.is_dir() or out.exists() and not overwrite:
        other = " or pass --overwrite" if out.is_file() else ""
        raise ValueError(f"--out {out}: exists already; choose another name{other}")
    limits = (("size", size, 8, LARGEST_SIDE),
              ("count", count, 1, 1_000_000),  # one more would need a longer name
              ("workers", workers, 0, 1024))
    for flag, value, low, high in limits:
        if not low <= value <= high:
            raise ValueError(f"--{flag} {value}: must lie in {low}..{high}")
    built_in = not spec or spec in SETS
    if not built_in:
        source = open_source(spec)
        names = [str(PurePosixPath(name).with_suffix(".bmp")) for name in source.names]
        for name in source.names:
            if name.encode(errors="ignore").decode() != name:
                raise ValueError(f"--data {spec}: the name {str(name)!r} is not UTF-8, which a zip "
                                 "needs; rename the file")
        rows = np.arange(len(names))
        dataset = ImageSet(spec, source, rows, np.zeros_like(rows), [], size)
    else:
        names = [f"{i:06d}.bmp" for i in range(count)]
        dataset = BuiltInImages(size, count, kind=spec or "leaves")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"--data {spec}: {times} images would become {name}; rename all but one")
    parts = None if built_in else divide(spec, source)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_bmp)

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            def add(name, content):
                entry = zipfile.ZipInfo(name)  # dated 1980
                entry.external_attr = 0o644 << 16  # else an extracted file is closed to everyone
                archive.writestr(entry, content)
            if parts and parts.from_file:
                pairs = [*zip(names, parts.labels.tolist())] if parts.classes else None
                add(LABELS_FILE, json.dumps(dict(labels=pairs)))
            progress = tqdm(loader, unit="image", disable=not sys.stderr.isatty())
            for i, (bmp, j, bad) in enumerate(progress):
                if bad:
                    _note(dataset, i, j)
                    continue
                add(names[i], bmp)
    write_atomic(out, write)
    return len(dataset) - len(dataset.unreadable), len(dataset.unreadable)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="crop a set once into a zip of BMPs")
    add = command.add_argument
    add("--data", default="leaves",
        help="folder, .zip or 'cifar10'; leaves or discs: built-in images")
    add("--size", type=int, default=256, help="side in pixels")
    add("--out", required=True, help="the .zip to write")
    add("--count", type=int, default=10_000,
        help="number of built-in images")
    add("--workers", type=int, default=os.cpu_count(), help="processes that decode; 0 = this one")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    args = parse_args(parser, {}, command)
    with one_line_errors():
        written, skipped = pack(args.data, args.size, args.out, args.count, args.workers,
                                args.overwrite)
    megabytes = Path(args.out).stat().st_size / 1e6
    print(f"{args.out}: {written} images of {args.size}x{args.size}, {megabytes:.1f} MB; "
          f"{skipped} unreadable ones left out")


if __name__ == "__main__":
    main()
