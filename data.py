"""
Images in, batches out: built-in dead leaves (leaves.py), folders, zips and CIFAR-10, in an order
that is a formula and not a state.

The training stream is endless: its position p belongs to epoch e = p // n and is entry p % n of a
permutation of the n images drawn from (seed, e); a coin drawn from (seed, e, index) says whether
the picture is mirrored. Step s takes positions [s*B, (s+1)*B), B the GLOBAL batch, and rank r of W
the r-th of W equal slices. So a run resumes exactly from its step alone, and neither the number of
processes nor of workers changes what is seen. No batch is short, even if n < B.

Images are uint8 (3, size, size) up to the device, then float32 in [-1, 1]; label = index of the
sorted class folder, 0 without classes. Dataset items are (image, label, index, bad); `bad`: the
asked image was unreadable, this is the next one in order.
Only `pack` writes files (and CIFAR-10's download); nothing is ever extracted from a zip.
"""
import argparse
import io
import itertools
import os
import signal
import stat
import struct
import sys
import threading
import zipfile
import zlib
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from tqdm import tqdm

from leaves import DeadLeaves
from runtime import first_of_node, one_line_errors, parse_args, write_atomic

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# whatever the name says; PIL would hand an EPS to Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
LARGEST_FILE, LARGEST_SIDE = 2 ** 30, 2 ** 14     # bytes of a picture file, pixels of a side
# one split for every stage and every --seed: what the autoencoder trained on is never held out
HELD_OUT_SEED = 2603
HELD_OUT_FIRST = 2 ** 40  # built-in images from here on are the held-out ones

# ---- one picture ---------------------------------------------------------------------------------

def open_picture(path):
    """A file as PIL image, no handle left open. OSError or ValueError, here or when it is used."""
    status = os.stat(path)
    # reading a named pipe would block for ever
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        raise ValueError(f"no file, or larger than {LARGEST_FILE:,} bytes")
    return Image.open(io.BytesIO(Path(path).read_bytes()), formats=FORMATS)


def reason(error):
    """Why a file could not be read, in one line, without the advice to unpickle it all the same."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if "allow_pickle" in str(error):
        return "holds Python objects"
    return " ".join(str(error).split())[:200] or type(error).__name__


def to_rgb(image):
    """
    Any PIL image as 8-bit RGB, upright (EXIF orientation applied).
    16-bit grey is scaled by 255/65535; transparency is laid over white: under it lies anything.
    raises   ValueError for pixels without a defined range (floats, 32-bit integers above 65535)
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("float pixels have no defined range")
    if image.mode.startswith("I"):  # I;16, I;16B, ..., and I, which older PIL gives for them
        grey = np.asarray(image).astype(np.int64)  # (H, W)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("grey values outside 0..65535")
        grey = (grey + 128) // 257  # nearest: 65535 = 255 * 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """
    ADM's crop (guided-diffusion, image_datasets.py): halve with a box filter while the shorter side
    is >= 2*size, bicubic until it is size, then the central square. The same pixels as the
    reference statistics of ADM, DiT and SiT.
    image    PIL image;  returns  PIL image, size x size
    raises   ValueError for a strip over 100 times longer than wide: resized, it fills the memory
    """
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width}x{image.height} is too elongated to crop a square")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        sides = round(image.width * scale), round(image.height * scale)
        image = image.resize(sides, Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

# ---- where pictures come from: .names (sorted, relative, posix) and .image(row) -> PIL -----------

def _is_picture(name):
    parts = PurePosixPath(name).parts
    hidden = "__MACOSX" in parts or any(p[0] == "." and p != ".." for p in parts)
    return name.lower().endswith(EXTENSIONS) and not hidden


class Folder:
    """Every image file under a folder, links followed. Hidden files are not looked at."""

    def __init__(self, spec):
        self.root = Path(spec)

        def refuse(error):  # os.walk would pass over a closed folder in silence
            raise ValueError(f"--data {spec}: cannot list {error.filename} ({error.strerror})")

        found, above = [], {}  # above: folder -> the real folders on the way to it
        for folder, _, files in os.walk(self.root, onerror=refuse, followlinks=True):
            real, way = os.path.realpath(folder), above.get(os.path.dirname(folder), ())
            if real in way:
                raise ValueError(f"--data {spec}: {folder!r} is a link back to a folder that it "
                                 "lies in; remove the link")
            above[folder] = (*way, real)
            names = (Path(folder, f).relative_to(self.root).as_posix() for f in files)
            found += filter(_is_picture, names)
        self.names = np.array(sorted(found))  # an array: workers share it, a list they would copy

    def image(self, row):
        return open_picture(self.root / self.names[row])


class Zip:
    """
    Every image in a zip, read where it lies. Five arrays replace zipfile's objects (1.28M of those
    hold 0.7 GB per process), and each read opens the file anew: no handle is shared over a fork.
    """

    def __init__(self, spec):
        self.path = Path(spec)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = {e.filename: e for e in archive.infolist() if _is_picture(e.filename)}
        except Exception as error:  # a damaged directory breaks zipfile in many ways
            raise ValueError(f"--data {spec}: not a readable zip ({reason(error)}); "
                             "pack it anew") from None
        entries = [entries[name] for name in sorted(entries)]
        for e in entries:
            if e.filename[0] in "/\\" or ".." in e.filename.replace("\\", "/").split("/"):
                raise ValueError(f"--data {spec}: unsafe name {e.filename!r} in the zip; "
                                 "pack it anew with relative names")
            known = e.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if e.flag_bits & 1 or not known:
                raise ValueError(f"--data {spec}: {e.filename} is encrypted or neither stored nor "
                                 "deflated; pack it anew")
        self.names = np.array([e.filename for e in entries])
        self.offset = np.array([e.header_offset for e in entries])
        self.length = np.array([e.compress_size for e in entries])
        self.size = np.array([e.file_size for e in entries])
        self.deflated = np.array([e.compress_type == zipfile.ZIP_DEFLATED for e in entries])
        self.crc = np.array([e.CRC for e in entries])

    def image(self, row):
        length, size = int(self.length[row]), int(self.size[row])
        if max(length, size) > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE:,} bytes")
        with open(self.path, "rb") as f:
            f.seek(self.offset[row])
            # local header: 30 bytes, then name and extra field
            f.seek(sum(struct.unpack("<26xHH", f.read(30))), os.SEEK_CUR)
            data = f.read(length)
        if self.deflated[row]:  # no further than was declared: no bomb
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        if zlib.crc32(data) != self.crc[row]:
            raise ValueError("wrong checksum in the zip")
        return Image.open(io.BytesIO(data), formats=FORMATS)


class Cifar10:
    """CIFAR-10 as train/CLASS/ and test/CLASS/, in ./data beside ./out: a run stays together."""

    def __init__(self, spec):
        from torchvision.datasets import CIFAR10

        try:
            with first_of_node():
                CIFAR10("data", download=True)  # fetches nothing that is there already
            parts = {"train": CIFAR10("data", train=True), "test": CIFAR10("data", train=False)}
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--data {spec}: {error}; unpack {CIFAR10.url} into data/, "
                             "or give a folder or zip") from None
        pictures = {}
        for part, d in parts.items():
            for i, (pixels, label) in enumerate(zip(d.data, d.targets)):
                pictures[f"{part}/{d.classes[label]}/{i:05d}.png"] = pixels
        self.names = sorted(pictures)
        self.pixels = [pictures[name] for name in self.names]

    def image(self, row):
        return Image.fromarray(self.pixels[row])


def open_source(spec):
    """The source that --data names; raises FileNotFoundError or ValueError as open_data does."""
    path = Path(spec)
    if spec == "cifar10":
        source = Cifar10(spec)
    elif not path.exists():
        raise FileNotFoundError(f"--data {spec}: no such folder or zip; give one, or 'cifar10', "
                                "or nothing for built-in images")
    elif path.is_dir():
        source = Folder(spec)
    elif path.suffix.lower() == ".zip":
        source = Zip(spec)
    else:
        raise ValueError(f"--data {spec}: neither a folder nor a .zip nor 'cifar10'")
    if len(source.names) == 0:
        raise ValueError(f"--data {spec}: no images in it (looked for {' '.join(EXTENSIONS)})")
    return source


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
    spec     "" or None: built-in; a folder or .zip, flat or with one folder per class (its
             subfolders count with it); 'cifar10'
    val_set  never overlaps train_set. `val` (else `test`) where the top level is exactly that and
             `train`; otherwise a tenth of the images, at most 5000, by a permutation that depends
             on nothing else. Its first val_images, in shuffled order.
    seed, builtin_images    of the built-in images only
    raises   FileNotFoundError or ValueError, one line that starts with `--data {spec}:`
    """
    if not 8 <= size <= LARGEST_SIDE or val_images < 0:
        shown = spec or "built-in"
        raise ValueError(f"--data {shown}: needs a size >= 8, at most {LARGEST_SIDE}, and "
                         f"val_images >= 0, got {size} and {val_images}")
    if not spec:
        return (DeadLeaves(size, builtin_images, seed),
                DeadLeaves(size, val_images, seed, first=HELD_OUT_FIRST))
    source = open_source(spec)
    parts = [name.split("/") for name in source.names]
    while all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]  # one folder around everything is a wrapper, not a class
    tops = np.array([p[0] for p in parts])
    known = {"train"} < set(tops) <= {"train", "val", "test"}
    split = known and min(map(len, parts)) > 1
    if split:
        parts = [p[1:] for p in parts]
    depth = np.array([len(p) > 1 for p in parts])
    if depth.any() and not depth.all():
        a, b = source.names[int(depth.argmin())], source.names[int(depth.argmax())]
        raise ValueError(f"--data {spec}: images beside class folders ({a} and {b}); "
                         "give every image a class folder, or none")
    classes = sorted({p[0] for p in parts}) if depth.all() else []
    label_of = {c: k for k, c in enumerate(classes)}
    labels = np.array([label_of.get(p[0], 0) for p in parts])

    rng = np.random.default_rng(HELD_OUT_SEED)
    if split:
        train = np.flatnonzero(tops == "train")
        held_out = np.flatnonzero(tops == ("val" if "val" in tops else "test"))
        held_out = rng.permutation(held_out)
    elif len(parts) > 1:
        order, k = rng.permutation(len(parts)), min(max(len(parts) // 10, 1), 5000)
        train, held_out = np.sort(order[k:]), order[:k]
    else:
        raise ValueError(f"--data {spec}: a single image; two are the least, for one is held out")
    return tuple(ImageSet(spec, source, rows, labels[rows], classes, size)
                 for rows in (train, held_out[:val_images]))


def take(dataset, chosen):
    """Pictures number `chosen` (ascending, (k,) int64) of a file set as a set; of all, itself."""
    if len(chosen) == len(dataset):
        return dataset
    return ImageSet(dataset.spec, dataset.source, dataset.rows[chosen], dataset.labels[chosen],
                    dataset.classes, dataset.size)


def spread(dataset, n):
    """n pictures evenly spread over a set (the first n would be one class); all if it has fewer."""
    n = min(n, len(dataset))
    if isinstance(dataset, DeadLeaves):
        return DeadLeaves(dataset.size, n, dataset.seed, dataset.first)
    return take(dataset, np.linspace(0, len(dataset) - 1, n).astype(np.int64))

# ---- batches -------------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def _epoch(n, seed, epoch):
    """(permutation (n,) int64, mirrored by index (n,) bool)."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n), rng.random(n) < 0.5


def stream_entries(n, start, stop, seed=0):
    """
    Positions start .. stop-1 of the endless training stream over n images, a pure function.
    returns  indices (stop-start,) int64, mirrored (stop-start,) bool
    """
    position = np.arange(start, stop)
    indices, mirrored = np.empty(len(position), np.int64), np.empty(len(position), bool)
    for epoch in range(start // n, (stop - 1) // n + 1):
        order, mirror = _epoch(n, seed, epoch)
        here = position // n == epoch
        indices[here] = order[position[here] % n]
        mirrored[here] = mirror[indices[here]]
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
                  device="cpu"):
    """
    The training stream from start_step on, without an end (so its workers persist).
    batch_size   the GLOBAL batch B; this rank receives b = B / world
    yields   images (b, 3, H, W) float32 in [-1, 1] and labels (b,) int64 on device, indices (b,)
             int64 on the CPU: they look things up in memory maps. Mirrored or not:
             stream_entries(n, s*B + rank*b, s*B + (rank+1)*b, seed)
    raises   ValueError at once if B does not divide; while running if this rank has met more than
             1% of unreadable images
    """
    b, n = _share(batch_size, world), len(dataset)

    def entries():
        starts = itertools.count(start_step * batch_size + rank * b, batch_size)
        return (stream_entries(n, start, start + b, seed) for start in starts)

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
    survive; same input, same bytes. BMP is lossless, a fifth to a half larger than PNG, and read
    some thirty times faster (tests/benchmark.py, section load).
    spec     as --data; "" packs `count` built-in images
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
    if spec:
        source = open_source(spec)
        names = [str(PurePosixPath(name).with_suffix(".bmp")) for name in source.names]
        for name in source.names:
            if name.encode(errors="ignore").decode() != name:
                raise ValueError(f"--data {spec}: the name {str(name)!r} is not UTF-8, which a zip "
                                 "needs; rename the file")
        rows, labels = np.arange(len(names)), np.zeros(len(names), np.int64)
        dataset = ImageSet(spec, source, rows, labels, [], size)
    else:
        names = [f"{i:06d}.bmp" for i in range(count)]
        dataset = DeadLeaves(size, count)
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"--data {spec}: {times} images would become {name}; rename all but one")
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_bmp)

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            progress = tqdm(loader, unit="image", disable=not sys.stderr.isatty())
            for i, (bmp, j, bad) in enumerate(progress):
                if bad:
                    _note(dataset, i, j)
                    continue
                entry = zipfile.ZipInfo(names[i])  # dated 1980
                entry.external_attr = 0o644 << 16  # else an extracted file is closed to everyone
                archive.writestr(entry, bmp)
    write_atomic(out, write)
    return len(dataset) - len(dataset.unreadable), len(dataset.unreadable)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="crop a set once into a zip of BMPs")
    add = command.add_argument
    add("--data", default="", help="folder, .zip or 'cifar10'; nothing: built-in images")
    add("--size", type=int, default=256, help="side in pixels")
    add("--out", required=True, help="the .zip to write")
    add("--count", type=int, default=10_000,
        help="number of built-in images, when --data is not given")
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
