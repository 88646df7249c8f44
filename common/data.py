"""
Image data sets and their batches, in an order that is a pure function of the step.

The training stream is endless: position p belongs to epoch e = p // n and is entry p % n of a
permutation of the n images, seeded with (seed, e); each image is mirrored with probability 1/2,
fixed by (seed, e, index). Step s covers positions [s*B, (s+1)*B), where B is the GLOBAL batch size;
rank r of W takes the r-th of W equal slices. A run therefore resumes from its step number alone,
and the order does not depend on the number of processes or workers.

--data is a folder or zip of images (flat or one folder per class, optionally with train/ and val/
or test/), cifar10, or the built-in leaves or discs. Images stay uint8 (3, size, size) until on the
device, then float32 in [-1, 1]; without classes all labels are 0. Only `pack` writes image files.
"""
import argparse
import hashlib
import io
import itertools
import json
import os
import re
import signal
import struct
import sys
import threading
import zipfile
import zlib
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from posixpath import normpath, splitext

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import run
from common.builtin import SETS, BuiltInImages
from common.run import need, reason

IMAGE = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|bmp|tiff?|gif|p[pgbn]m)\Z", re.IGNORECASE)
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/)")                     # also ../a.png, outside the folder
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # no EPS: PIL runs Ghostscript on it
COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8")     # first bytes of compressed formats
LARGEST_FILE, LARGEST_SIDE = 2 ** 30, 2 ** 14                   # bytes, pixels
SPLITS = dict(train="train", training="train", test="test", testing="test", val="val", valid="val",
              validation="val", dev="val")
TABLE = "dataset.json"


# ---- One image -----------------------------------------------------------------------------------
def read_bytes(path):
    """All bytes of a file. ValueError if over 1 GB or not a regular file (a pipe would block)."""
    need(path.stat().st_size <= LARGEST_FILE and path.is_file(), "no file, or larger than 1 GB")
    return path.read_bytes()


def open_image(path):
    """A file as a PIL image, no handle left open. OSError or ValueError, now or when decoded."""
    return Image.open(io.BytesIO(read_bytes(Path(path))), formats=FORMATS)


def to_rgb(image):
    """Any PIL image as upright 8-bit RGB, composited on white. ValueError for float images."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":              # I;16, I;16B, I for 16-bit grey; F for floats
        grey = np.asarray(image).astype(np.int64)                              # (H, W)
        need(image.mode != "F" and 0 <= grey.min() and grey.max() <= 65535, "convert it to 8 bits")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))        # 65535 = 255 * 257
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """
    Exactly the crop of ADM, DiT and SiT (guided-diffusion, image_datasets.py): halve with a box
    filter while the shorter side is >= 2*size, resize it to size (bicubic), crop the centre square.
    """
    need(max(image.size) <= 100 * min(image.size), "too elongated to crop a square")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- Sources -------------------------------------------------------------------------------------
class Files:
    """
    The images in a folder (symlinks followed) or in a zip, which is read without extracting it.
    names   (N,) bytes: sorted relative paths with "/"; tables: the dataset.json files
    image(row) -> PIL image; fingerprint(row) -> two ints: size, CRC-32 of (part of) the content
    """

    def __init__(self, spec):
        self.path, found = Path(spec), {}
        if self.path.is_dir():             # {name: ()}
            closed = []                    # errors of unlistable folders, which os.walk skips
            for top, folders, files in os.walk(spec, onerror=closed.append, followlinks=True):
                inside = Path(top).relative_to(spec).as_posix()
                need(inside.count("/") < 30, f"--data {spec}: {inside!r}: a link leads back up")
                folders[:] = [name for name in folders if name[0] != "."]
                found |= {normpath(f"{inside}/{name}"): () for name in files}
            need(not closed, f"--data {spec}: cannot be listed: {closed}")
        else:                              # {name: (offset, compressed, full size, CRC, method)}
            try:
                entries = zipfile.ZipFile(spec).infolist()
            except Exception as error:     # a damaged zip can raise any exception
                raise ValueError(f"--data {spec}: not a readable zip ({reason(error)})") from None
            for e in entries:              # Windows may write \ instead of /
                name = normpath(e.filename.replace("\\", "/")).lstrip("/")
                found[name] = e.header_offset, e.compress_size, e.file_size, e.CRC, e.compress_type
        images = sorted(k for k in found if IMAGE.search(k) and not HIDDEN.search(k))
        need(images, f"--data {spec}: no images in it ({', '.join(FORMATS)})")
        # arrays, shared with workers; zipfile's objects would take 0.6 GB per million images
        self.names = np.array([os.fsencode(name) for name in images])
        self.places = np.array([found[name] for name in images], np.int64)
        self.tables = {k: v for k, v in found.items() if f"/{k}".endswith(f"/{TABLE}")}

    def read(self, name, place):
        """The bytes of one file; a damaged one can raise any exception."""
        if len(place) == 0:
            return read_bytes(self.path / name)
        e = zipfile.ZipInfo(name)
        offset, e.compress_size, e.file_size, e.CRC, e.compress_type = map(int, place)
        need(e.file_size <= LARGEST_FILE, "larger than 1 GB")
        with open(self.path, "rb") as file:                # own handle: workers may be forks
            file.seek(offset)
            # skip the local header: 30 bytes, then name and extra field
            file.seek(sum(struct.unpack("<26xHH", file.read(30))), os.SEEK_CUR)
            return zipfile.ZipExtFile(file, "r", e).read(e.file_size)  # bounded; checks CRC

    def image(self, row):
        content = self.read(os.fsdecode(self.names[row]), self.places[row])
        return Image.open(io.BytesIO(content), formats=FORMATS)

    def fingerprint(self, row):
        path = self.path / os.fsdecode(self.names[row])
        if self.places.size:
            return self.places[row, 2:4].tolist()          # size and CRC-32
        if not path.is_file() or not os.access(path, os.R_OK):
            return [-1, 0]
        with open(path, "rb", buffering=0) as file:
            size, head = path.stat().st_size, file.read(4096)
            # head and tail identify a compressed file; others may differ only in the middle
            if head.startswith(COMPRESSED) or size > LARGEST_FILE:
                file.seek(max(size - 4096, 4096))
            return [size, zlib.crc32(file.read(), zlib.crc32(head))]


class Cifar10:
    """torchvision's CIFAR-10 as train/CLASS/ and test/CLASS/, downloaded into ./data."""
    tables = {}

    def __init__(self):
        from torchvision.datasets import CIFAR10
        images = {}
        try:
            with run.local_rank_zero_first():              # downloads only what is missing
                parts = dict(train=CIFAR10("data", download=True), test=CIFAR10("data", False))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--data cifar10: {error}; unpack {CIFAR10.url} into data/") from None
        for split, d in parts.items():
            names = (f"{split}/{d.classes[k]}/{i:05d}.png" for i, k in enumerate(d.targets))
            images |= zip(names, d.data)                   # (32, 32, 3) uint8
        self.names = np.array(sorted(images), bytes)
        self.pixels = [images[name] for name in sorted(images)]

    def image(self, row):
        return Image.fromarray(self.pixels[row])

    def fingerprint(self, row):
        return [self.pixels[row].nbytes, zlib.crc32(self.pixels[row])]


def open_source(spec):
    if spec == "cifar10":
        return Cifar10()
    need(Path(spec).is_dir() or Path(spec).is_file() and Path(spec).suffix.lower() == ".zip",
         f"--data {spec}: neither a folder nor a .zip nor 'cifar10'; leaves and discs are built in")
    return Files(spec)


# ---- Which images are held out, and the class of each --------------------------------------------
def _common_folder(names):
    """The common parent folder of these names: "" or ending in "/"."""
    prefix = os.path.commonprefix(names)
    return prefix[:prefix.rfind("/") + 1]


def _hold_out(names):
    """Rows of training images (ascending) and of held-out ones, by a hash of each path alone."""
    n, start = len(names), len(_common_folder(names))
    stems = (os.fsencode(splitext(name[start:])[0]) for name in names)         # as for packed sets
    hashes = (int(hashlib.sha256(stem).hexdigest()[:12], 16) for stem in stems)
    hashes = np.fromiter(hashes, np.int64, n) / 2 ** 48    # (n,) in [0, 1)
    # n rounded to a power of two, so that a few more images do not move the threshold
    threshold = 0.1 if n <= 50_000 else 5000 / 2 ** round(np.log2(n))
    order, k = hashes.argsort(kind="stable"), np.count_nonzero(hashes < threshold)
    k = min(max(k, 1), n - 1)
    return np.sort(order[k:]), order[:k]


def _read_labels(spec, source, names, depth=None):
    """
    (labels (n,) int64, class names) from the nearest dataset.json in a common parent folder (format
    of StyleGAN, EDM, REPA), else from the sorted class folders below it, else zeros and []. depth:
    at most so many parent folders, so that a single class is not taken for one.
    """
    folder = "".join(re.findall("[^/]*/", _common_folder(names))[:depth])
    tables = [name for name in source.tables if folder.startswith(name.removesuffix(TABLE))]
    if not tables:
        folders = [name[len(folder):].rpartition("/")[0].partition("/")[0] for name in names]
        classes = sorted(set(folders))
        need("" not in classes or len(classes) == 1, f"--data {spec}: images beside class folders "
             f"({names[0]!r} and {names[-1]!r}); give every image a class folder, or none")
        return np.searchsorted(classes, folders), classes if classes[0] else []
    place = max(tables, key=len)
    # match names without suffix, as packing changes it; "labels": null means no classes
    stem, start = lambda name: splitext(name.replace("\\", "/"))[0], len(place) - len(TABLE)
    try:
        pairs = json.loads(source.read(place, source.tables[place]))["labels"] or []
        table = {stem(name): label for name, label in pairs}
        labels = np.array([table[stem(name[start:])] if pairs else 0 for name in names])
        need(labels.dtype == np.int64 and 0 <= labels.min() <= labels.max() < 1e6, "no number")
    except Exception as error:             # a malformed file can raise any exception
        raise ValueError(f"--data {spec}: {place!r}: needs \"labels\": null or [[name, number], "
                         f"...] of all images ({reason(error)})") from None
    return labels, [str(k) for k in range(labels.max() + 1)] if pairs else []


def divide(spec, source):
    """
    Split a source by its paths and dataset.json: rows of the training images (ascending), rows of
    the held-out images (shuffled), labels (N,) int64, class names (only train/'s if it has one).
    Held-out images are labelled -1 if some of them are in no training class.
    """
    names = [os.fsdecode(name) for name in source.names]
    need(len(names) > 1, f"--data {spec}: a single image; two are the least, for one is held out")
    start = len(_common_folder(names))     # one folder around everything is a wrapper, not a class
    tops = [name[start:].partition("/")[0] for name in names]
    words = {top: re.sub(r"[\W\d_]|set|images", "", top.lower()) for top in set(tops)}
    split = np.array([SPLITS.get(words[top], "") for top in tops])     # also train2017, Test_Set
    second = "val" if "val" in split else "test"           # if there are three, test is not used
    train, held_out = np.flatnonzero(split == "train"), np.flatnonzero(split == second)
    if len(train) == 0 or len(held_out) == 0:
        return *_hold_out(names), *_read_labels(spec, source, names)
    labels = np.full(len(names), -1)
    labels[train], classes = _read_labels(spec, source, [names[row] for row in train])
    depth = _common_folder([names[row] for row in train]).count("/")
    own, own_classes = _read_labels(spec, source, [names[row] for row in held_out], depth)
    if not classes:
        labels[held_out] = 0
    elif own_classes and set(own_classes) <= set(classes):  # ImageNet's val has no class folders
        labels[held_out] = np.array([classes.index(name) for name in own_classes])[own]
    # shuffled by a fixed seed, since only the first val_images of them are used
    return train, np.random.default_rng(2603).permutation(held_out), labels, classes


class ImageSet:
    """
    Rows of a source, cropped to size. Items: (uint8 (3, size, size), label, index, faults). An
    unreadable image is replaced by the next readable one; faults has one line per image skipped.
    """

    def __init__(self, spec, source, rows, labels, classes, size):
        self.spec, self.source, self.size, self.classes = spec, source, size, classes
        self.rows, self.labels = rows, labels              # (n,), (n,) int64
        self.unreadable = set()                            # fault lines seen by this process

    def __len__(self):
        return len(self.rows)

    def name(self, i):
        return os.fsdecode(self.source.names[self.rows[i]])

    def __getitem__(self, i):
        n, faults = len(self), []
        for j in range(i, i + min(len(self.source.names) // 100 + 1, n)):
            j %= n
            try:
                image = center_crop(to_rgb(self.source.image(self.rows[j])), self.size)
                image = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
                return image, int(self.labels[j]), j, "\n".join(faults)
            except Exception as error:     # decoders can raise any exception
                faults.append(f"{self.name(j)!r}: {reason(error)}")
        # over 1% unreadable in a row: report() will end the run
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, i, "\n".join(faults)

    def report(self, faults):
        """Print faults not yet seen; ValueError if over 1% of images, or all, are unreadable."""
        new = set(faults.splitlines()) - self.unreadable
        self.unreadable |= new
        bad, total = len(self.unreadable), len(self.source.names)
        need(bad <= total / 100 and bad < len(self), f"--data {self.spec}: {bad} of {total} images "
             f"cannot be read, more than 1%; the first: {'; '.join(sorted(self.unreadable)[:3])}")
        for line in sorted(new):
            print(f"--data {self.spec}: skipping {line}", file=sys.stderr, flush=True)


def open_data(spec, size, val_images=500, seed=0, builtin_images=4_000):
    """
    --data as (train_set, val_set); val_set is the first val_images of the held-out images. seed and
    builtin_images apply to the built-in sets only. ValueError with a one-line message.
    """
    if not spec or spec in SETS:
        kind, far = spec or "leaves", 2 ** 40              # beyond any training set
        return (BuiltInImages(size, builtin_images, seed, 0, kind),
                BuiltInImages(size, val_images, seed, far, kind))
    source = open_source(spec)
    train, held_out, labels, classes = divide(spec, source)
    return tuple(ImageSet(spec, source, rows, labels[rows], classes, size)
                 for rows in (train, held_out[:val_images]))


def take(dataset, chosen):
    """Subset of an ImageSet by indices (k,) int64, ascending; the set itself if all are chosen."""
    if len(chosen) == len(dataset):
        return dataset
    return ImageSet(dataset.spec, dataset.source, dataset.rows[chosen], dataset.labels[chosen],
                    dataset.classes, dataset.size)


def spread(dataset, n):
    """n evenly spaced images of a set (the first n could be one class); all if it has fewer."""
    n = min(n, len(dataset))
    if isinstance(dataset, BuiltInImages):
        return BuiltInImages(dataset.size, n, dataset.seed, dataset.first, dataset.kind)
    return take(dataset, np.linspace(0, len(dataset) - 1, n).astype(np.int64))


@lru_cache(maxsize=4)                      # a million files take a minute
def images_hash(dataset):
    """16 hex digits hashing a set's content, labels, and names relative to their common folder."""
    if isinstance(dataset, BuiltInImages):
        kind = dataset.kind.replace("leaves", "dead leaves")     # the name in existing hashes
        text = f"{kind}, seed {dataset.seed}, {len(dataset)} from {dataset.first}"
    else:
        names = [dataset.name(i) for i in range(len(dataset))]
        start = len(_common_folder(names))
        with ThreadPool(16) as pool:       # threads: this is I/O-bound
            content = pool.map(dataset.source.fingerprint, dataset.rows, 500)
        lines = zip((name[start:] for name in names), dataset.labels.tolist(), content)
        text = "\n".join(map(repr, lines))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- Batches -------------------------------------------------------------------------------------
@lru_cache(maxsize=4)
def _epoch(n, seed, epoch):
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n), rng.random(n) < 0.5         # the coin: by index, not position


def stream_entries(n, start, stop, seed=0, mirror=True):
    """
    Positions start .. stop-1 of the endless training stream over n images (a pure function):
    indices (stop-start,) int64 and mirrored (stop-start,) bool, all False if not `mirror`.
    """
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order, coin = _epoch(n, seed, epoch)
        indices = order[max(start - epoch * n, 0):stop - epoch * n]
        parts.append((indices, coin[indices] & mirror))
    indices, mirrored = zip(*parts)
    return np.concatenate(indices), np.concatenate(mirrored)


def _leave_signals_to(trainer, _):
    # Runs in a worker. Ctrl-C, a closed terminal and a cluster's SIGTERM reach every process of a
    # job, but only the trainer (a process id) should react: it saves a checkpoint first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):     # not on Windows or macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})

        def wait():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
                pass
            os._exit(0)                    # the trainer's own SIGTERM ends the worker
        threading.Thread(target=wait, daemon=True).start()


def _load(dataset, entries, workers, device, train, strict=False):
    """Batches for entries: pairs (indices (b,), mirrored (b,)). uint8 if device is None."""
    cuda = torch.device(device or "cpu").type == "cuda"
    ahead, entries = itertools.tee(entries)                # workers prefetch batches
    # not forkserver, Linux's default from Python 3.14: a job-wide SIGTERM ends the fork server, and
    # with it the run
    fork = "fork" if workers and sys.platform == "linux" else None
    loader = DataLoader(
        dataset, batch_sampler=(indices.tolist() for indices, _ in ahead), num_workers=workers,
        pin_memory=cuda, worker_init_fn=partial(_leave_signals_to, os.getpid()),
        multiprocessing_context=fork,
        generator=torch.Generator())       # else it would advance the global generator
    items = iter(loader)
    # torch's handler could raise in the middle of a training step
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for _, mirrored in entries:
        try:
            images, labels, indices, faults = next(items)
        except (RuntimeError, OSError) as error:
            need(not workers, f"--workers {workers}: {reason(error)}; a process that reads images "
                 "was killed, or found no memory or room in /dev/shm: use fewer workers, or 0")
            raise
        for lines in filter(None, faults):
            dataset.report(lines)
            if strict:
                raise ValueError(f"--data {dataset.spec}: {lines} could be read before; restore it")
        batch = images, labels, indices, torch.from_numpy(mirrored)
        if not train:                      # drop the replacements of unreadable images
            batch = [tensor[[not lines for lines in faults]] for tensor in batch]
        # a copy from pageable memory would block the host
        images, labels, indices, mirrored = (t.pin_memory() if cuda else t for t in batch)
        if device is not None:
            images, labels, mirrored = (
                t.to(device, non_blocking=True) for t in (images, labels, mirrored))
            mirrored = mirrored[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images).float().div_(127.5).sub_(1)
        if len(images):
            yield images, labels, indices


def train_batches(dataset, batch_size, start_step=0, seed=0, rank=0, world=1, workers=0,
                  device="cpu", mirror=True, strict=False):
    """
    The endless training stream from start_step on (endless, so that workers persist).
    batch_size   the GLOBAL batch B, a multiple of world; this rank receives b = B / world
    strict       ValueError if an image cannot be read, instead of the next one in its place
    yields   images (b, 3, H, W) float32 in [-1, 1] and labels (b,) int64 on device, indices (b,)
             int64 on the CPU: stream_entries(n, s*B + rank*b, s*B + (rank+1)*b, seed, mirror)
    """
    b, n = batch_size // world, len(dataset)
    starts = itertools.count(start_step * batch_size + rank * b, batch_size)
    entries = (stream_entries(n, start, start + b, seed, mirror) for start in starts)
    return _load(dataset, entries, workers, device, train=True, strict=strict)


def val_batches(dataset, batch_size, rank=0, world=1, workers=0, device="cpu"):
    """
    One pass in order, without mirroring: each readable image once across all ranks. Yields the same
    tuples as train_batches. The last batch may be short and ranks may get different numbers of
    batches, so reduce over ranks after the loop, not inside it.
    """
    b, n = batch_size // world, len(dataset)
    rows = (np.arange(start, min(start + b, n)) for start in range(rank * b, n, batch_size))
    entries = ((indices, np.zeros(len(indices), bool)) for indices in rows)
    return _load(dataset, entries, workers, device, train=False)


# ---- Packing -------------------------------------------------------------------------------------
def pack(spec, size, out, count=10_000, workers=0, overwrite=False):
    """
    Crop a set (or `count` built-in images) into a zip of BMPs, keeping names and dataset.json. The
    same input gives the same bytes. Returns the numbers of images written and left out.
    """
    out, tables = Path(out), {}
    need(out.suffix.lower() == ".zip" and (overwrite or not out.exists()),
         f"--out {out}: must end in .zip, and not exist unless with --overwrite")
    if not spec or spec in SETS:
        dataset = BuiltInImages(size, count, kind=spec or "leaves")
        names = [f"{i:06d}.bmp" for i in range(count)]
    else:
        source = open_source(spec)
        need(not (out.exists() and Path(spec).exists() and out.samefile(spec)),
             f"--out {out}: is the set itself; the original is never written to")
        divide(spec, source)               # rejects what training would reject
        rows = np.arange(len(source.names))
        dataset = ImageSet(spec, source, rows, 0 * rows, [], size)
        # names in a zip must be UTF-8, unlike those on disk
        names = [f"{splitext(dataset.name(i))[0]}.bmp".encode(errors="replace").decode()
                 for i in rows]
        tables = {name: source.read(name, place) for name, place in source.tables.items()}
    need(len({*names}) == len(names), f"--data {spec}: names differ in their suffix alone; rename")

    def contents():
        yield from tables.items()
        for images, _, indices in val_batches(dataset, 16, workers=workers, device=None):
            for i, pixels in zip(indices.tolist(), images.movedim(1, -1).numpy()):
                bmp = io.BytesIO()         # lossless, and decodes 30 times faster than PNG
                Image.fromarray(pixels).save(bmp, "BMP")
                yield names[i], bmp.getvalue()

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in tqdm(contents(), total=len(names) + len(tables), disable=None):
                entry = zipfile.ZipInfo(name)              # fixed date: 1980
                entry.external_attr = 0o644 << 16          # else extracted files are unreadable
                archive.writestr(entry, content)
    run.write_atomic(out, write)
    return len(dataset) - len(dataset.unreadable), len(dataset.unreadable)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m common.data", formatter_class=run.Help,
        description="Crop a set into a zip of BMPs, keeping names and dataset.json.")
    add = parser.add_argument
    add("command", choices=["pack"])
    add("--data", default="leaves", help="folder, .zip, cifar10, or built-in leaves or discs")
    add("--size", type=int, default=256, help="image side in pixels")
    add("--out", required=True, help="the .zip to write")
    add("--count", type=int, default=10_000, help="number of built-in images")
    add("--workers", type=int, default=os.cpu_count(), help="decoding processes; 0: only this one")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    args = run.parse_args(parser, {})
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):     # not on Windows
        if signal.getsignal(number) != signal.SIG_IGN:     # exit: removes partial output
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    with run.one_line_errors():
        run.need_range(args, 8, LARGEST_SIDE, "size")
        run.need_range(args, 1, 1_000_000, "count")        # names have six digits
        n, bad = pack(args.data, args.size, args.out, args.count, args.workers, args.overwrite)
    print(f"{args.out}: {n} images of {args.size} px; {bad} unreadable ones left out")


if __name__ == "__main__":
    main()
