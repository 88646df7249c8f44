"""
Where pictures come from, and what their place says of them: a file as PIL image and its crop; the
folders, zips and CIFAR-10 that hold many; which of them train, and the class of each.

A source has .names (sorted, relative, posix), .image(row) -> PIL and .fingerprint(rows), which
tells its pictures from others, whatever they are called. Nothing is ever extracted from a zip, and
nothing is written but CIFAR-10's download.
"""
import io
import itertools
import json
import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from common.run import local_rank_zero_first, reason

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif",
              ".ppm", ".pgm", ".pbm", ".pnm")
# whatever the name says; PIL would hand an EPS to Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# how the compressed ones begin: another picture is another stream of bits to its very end
COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8")
LARGEST_FILE = 2 ** 30                     # bytes of a picture file
LABELS_FILE = "dataset.json"               # of StyleGAN, EDM and REPA
# one split for every stage and every --seed: what the autoencoder trained on is never held out
HELD_OUT_SEED = 2603
PARTS = dict(                              # names of the parts of a set, see part_of
    train=("train", "training", "trainval"),
    val=("val", "valid", "validation", "dev", "development", "eval", "evaluation"),
    test=("test", "testing"))


def say(spec, text):
    """A line about a set on stderr, once for all processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"--data {spec}: {text}", file=sys.stderr, flush=True)

# ---- one picture ---------------------------------------------------------------------------------

def open_picture(path):
    """A file as PIL image, no handle left open. OSError or ValueError, here or when it is used."""
    status = os.stat(path)
    # reading a named pipe would block for ever
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        raise ValueError(f"no file, or larger than {LARGEST_FILE:,} bytes")
    return Image.open(io.BytesIO(Path(path).read_bytes()), formats=FORMATS)


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

# ---- folders, zips, CIFAR-10 ---------------------------------------------------------------------

class Listing:
    """
    What lies in a folder or zip, by its names; hidden files are not looked at.
    names     the pictures, sorted: an array, for workers share it, and a list they would copy
    tables    where a dataset.json lies
    others    {suffix: number of files that are no picture by their name}
    bare      the uppermost folders without a picture below them
    """

    def __init__(self, files, folders):
        names, full, self.others, self.tables = [], {""}, Counter(), set()
        for name in files:
            if name.lower().endswith(EXTENSIONS):
                names.append(name)
            elif name.rpartition("/")[2] == LABELS_FILE:
                self.tables.add(name)
            else:
                suffix = os.path.splitext(name)[1].lower()
                self.others[repr(suffix) if suffix else "without a suffix"] += 1
        for folder in {name.rpartition("/")[0] for name in names}:
            while folder not in full:
                full.add(folder)
                folder = folder.rpartition("/")[0]
        self.bare = sorted(folder for folder in set(folders) - full
                           if folder.rpartition("/")[0] in full)
        self.names = np.array(sorted(names))

    def tell_left_out(self, spec):
        """What is not looked at though it is not hidden, in one line on stderr, if anything."""
        left_out = []
        if self.others:
            most = sorted(self.others.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
            kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in most)
            count = sum(self.others.values())
            left_out.append(f"{count:,} file(s) that are no pictures by name ({kinds})")
        if self.bare:
            shown = ", ".join(map(repr, self.bare[:5]))
            left_out.append(f"{len(self.bare):,} folder(s) without a picture ({shown})")
        if left_out:
            say(spec, f"left out: {' and '.join(left_out)}")


def _hidden(part):
    return part == "__MACOSX" or part[:1] == "." and part not in (".", "..")


def _file_print(path):
    """
    (size, CRC-32) of a file's first and last 4 KB, or of all of it if it is not compressed: there
    another picture may differ in some bytes of the middle alone. (-1, 0) if it cannot be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a named pipe would block for ever
            return -1, 0
        with open(path, "rb", buffering=0) as file:
            block = file.read(4096)
            crc, whole = zlib.crc32(block), not block.startswith(COMPRESSED)
            if not whole or status.st_size > LARGEST_FILE:
                file.seek(max(status.st_size - 4096, 4096))
            while block := file.read(2 ** 20 if whole else 4096):
                crc = zlib.crc32(block, crc)
        return status.st_size, crc
    except OSError:
        return -1, 0


class Folder(Listing):
    """Every image file under a folder, links followed."""

    def __init__(self, spec):
        self.root = Path(spec)

        def refuse(error):  # os.walk would pass over a closed folder in silence
            raise ValueError(f"--data {spec}: cannot list {error.filename} ({error.strerror})")

        found, below, above = [], [], {}  # above: folder -> the real folders on the way to it
        for folder, folders, files in os.walk(self.root, onerror=refuse, followlinks=True):
            real, way = os.path.realpath(folder), above.get(os.path.dirname(folder), ())
            if real in way:
                raise ValueError(f"--data {spec}: {folder!r} is a link back to a folder that it "
                                 "lies in; remove the link")
            above[folder] = (*way, real)
            folders[:] = [f for f in folders if not _hidden(f)]
            here = Path(folder).relative_to(self.root).as_posix()
            below.append(here)
            start = "" if here == "." else here + "/"
            found += [start + f for f in files if not _hidden(f)]
        super().__init__(found, below[1:])
        if len(self.names) and all("\\" in name for name in self.names):
            raise ValueError(f"--data {spec}: every name holds a backslash ({self.names[0]!r}), as "
                             "after unpacking a zip that Windows made; give the zip itself")

    def read(self, name):
        """The bytes of a dataset.json."""
        return (self.root / name).read_bytes()

    def image(self, row):
        return open_picture(self.root / self.names[row])

    def fingerprint(self, rows):
        """
        (size, checksum) of the files in these rows, (k, 2) int64: see _file_print. A million
        pictures take half a minute if they are in memory, about one from a local disk.
        """
        root = str(self.root)

        def prints(chunk):
            return [_file_print(os.path.join(root, self.names[row])) for row in chunk]

        with ThreadPoolExecutor(16) as pool:  # they wait for the disk
            found = pool.map(prints, np.array_split(rows, len(rows) // 500 + 1))
            return np.array([*itertools.chain(*found)], np.int64).reshape(-1, 2)


class Zip(Listing):
    """
    Every image in a zip, read where it lies. Five arrays replace zipfile's objects (1.28M of those
    hold 0.7 GB per process), and each read opens the file anew: no handle is shared over a fork.
    """

    def __init__(self, spec):
        self.path = Path(spec)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
        except Exception as error:  # a damaged directory breaks zipfile in many ways
            raise ValueError(f"--data {spec}: not a readable zip ({reason(error)}); "
                             "pack it anew") from None
        entries = self._by_posix_name(entries)
        super().__init__([name for name, e in entries.items() if e.filename[-1] not in "/\\"],
                         [name for name, e in entries.items() if e.filename[-1] in "/\\"])
        self.entries = {name: entries[name].filename for name in self.tables}
        entries = [entries[name] for name in self.names]
        for e in entries:
            if re.match(r"[/\\]|\w:[/\\]", e.filename) or ".." in re.split(r"[/\\]", e.filename):
                raise ValueError(f"--data {spec}: unsafe name {e.filename!r} in the zip; "
                                 "pack it anew with relative names")
            known = e.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if e.flag_bits & 1 or not known:
                raise ValueError(f"--data {spec}: {e.filename} is encrypted or neither stored nor "
                                 "deflated; pack it anew")
        self.offset = np.array([e.header_offset for e in entries])
        self.length = np.array([e.compress_size for e in entries])
        self.size = np.array([e.file_size for e in entries])
        self.deflated = np.array([e.compress_type == zipfile.ZIP_DEFLATED for e in entries])
        self.crc = np.array([e.CRC for e in entries])

    @staticmethod
    def _by_posix_name(entries):
        """
        {name: entry} of what is not hidden. A backslash separates folders if the zip was made on
        Windows: by its own word, or because every picture has one. Elsewhere it is a letter.
        """
        pictures = [e for e in entries if e.filename.lower().endswith(EXTENSIONS)]
        windows = all("\\" in e.filename for e in pictures)
        named = {}
        for e in entries:
            name = e.filename
            if windows or e.create_system in (0, 10, 11):  # FAT, and two numbers for NTFS
                name = name.replace("\\", "/")
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if parts and not any(map(_hidden, parts)):
                named["/".join(parts)] = e
        return named

    def read(self, name):
        """The bytes of a dataset.json."""
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(self.entries[name])

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

    def fingerprint(self, rows):
        """(size, CRC-32) of the pictures in these rows, as the zip itself keeps them: (k, 2)."""
        return np.stack([self.size[rows], self.crc[rows]], 1)


class Cifar10(Listing):
    """CIFAR-10 as train/CLASS/ and test/CLASS/, in ./data beside ./out: a run stays together."""

    def __init__(self, spec):
        from torchvision.datasets import CIFAR10

        try:
            with local_rank_zero_first():
                CIFAR10("data", download=True)  # fetches nothing that is there already
            parts = {"train": CIFAR10("data", train=True), "test": CIFAR10("data", train=False)}
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--data {spec}: {error}; unpack {CIFAR10.url} into data/, "
                             "or give a folder or zip") from None
        pictures = {}
        for part, d in parts.items():
            for i, (pixels, label) in enumerate(zip(d.data, d.targets)):
                pictures[f"{part}/{d.classes[label]}/{i:05d}.png"] = pixels
        super().__init__(pictures, [])
        self.pixels = [pictures[name] for name in self.names]

    def image(self, row):
        return Image.fromarray(self.pixels[row])

    def fingerprint(self, rows):
        """(bytes, CRC-32) of the pixels in these rows, (k, 2) int64."""
        pixels = [self.pixels[row] for row in rows]
        return np.array([(p.nbytes, zlib.crc32(p)) for p in pixels], np.int64).reshape(-1, 2)


def open_source(spec):
    """The source that --data names; raises FileNotFoundError or ValueError as open_data does."""
    path = Path(spec)
    if spec == "cifar10":
        source = Cifar10(spec)
    elif not path.exists():
        raise FileNotFoundError(f"--data {spec}: no such folder or zip; give one, or 'cifar10', "
                                "or leaves or discs, which are built in")
    elif path.is_dir():
        source = Folder(spec)
    elif path.suffix.lower() == ".zip":
        source = Zip(spec)
    else:
        raise ValueError(f"--data {spec}: neither a folder nor a .zip nor 'cifar10'")
    if len(source.names) == 0:
        raise ValueError(f"--data {spec}: no images in it (looked for {' '.join(EXTENSIONS)})")
    return source

# ---- training part, held-out part, labels --------------------------------------------------------

class Division(NamedTuple):
    """The pictures of a source as a training script sees them."""
    train: np.ndarray                      # (n,) int64, rows of the source, ascending
    held_out: np.ndarray                   # (m,) int64, rows of the source, shuffled
    labels: np.ndarray                     # (N,) int64, of all rows
    classes: list                          # names; empty without, and then every label is 0
    from_file: bool                        # whether the labels come from a dataset.json


def part_of(folder):
    """The part of a set that a folder's name stands for, 'train', 'val' or 'test', or None."""
    word = re.sub(r"[\W\d_]", "", folder.lower())                   # Train-2017, val_256
    word = re.sub("(set|images?|imgs?|data|split)+$", "", word)     # test_images, dev set
    return next((part for part, words in PARTS.items() if word in words), None)


def _parts(spec, tops):
    """
    (training folder, held-out folder) of the folders at the top, or None if they are classes.
    raises   ValueError if they look like parts and are none: there is a trainA, my_train (but no
             strainer or trainers) among few, for a set has few parts, or beside a `val` or `test`
    """
    kinds = {top: part_of(top) for top in tops}
    alike = [top for top in tops if re.search("(?<!s)train(?!er|ee)", top.lower())]
    train, val, test = ([top for top in tops if kinds[top] == part] for part in PARTS)
    held_out = val or test
    if not all(kinds.values()) and not (alike and (held_out or len(tops) <= 10)):
        return None
    other = [top for top in tops if not kinds[top]]
    if len(train) == len(held_out) == 1 and not other:
        return train[0], held_out[0]
    if other:
        fault = f"{other[0]!r} is no known part of a set"
    elif not train:
        fault = "none of them is a training part"
    else:
        one, two = (train if len(train) > 1 else held_out)[:2]
        fault = f"{one!r} and {two!r} are the same part"
    shown = ", ".join(map(repr, (alike or tops)[:5]))
    raise ValueError(f"--data {spec}: with {shown} at the top, {fault}; name one folder 'train' "
                     "and one 'val' or 'test', move others away, and call a class otherwise")


def _refuse_parts_inside(spec, paths, depth):
    """ValueError if the parts lie below the top folders: masks beside images, a set in each."""
    inside = {p[depth + 1]: "/".join(p[:depth + 2]) for p in paths if len(p) > depth + 2}
    found = {part_of(folder): place for folder, place in inside.items()}
    held_out = found.get("val") or found.get("test")
    if "train" in found and held_out:
        raise ValueError(f"--data {spec}: {found['train']!r} and {held_out!r} are parts of a set "
                         "inside one of several folders; give that folder, or arrange all as "
                         "train/CLASS and val/CLASS")


def _around(paths, depth, least):
    """How many folders are around all of these paths, `depth` or more; `least` names remain."""
    while all(len(p) > depth + least and p[depth] == paths[0][depth] for p in paths):
        depth += 1
    return depth


def _read_labels(spec, source, paths, depth):
    """
    Labels (n,) int64 and classes by the nearest dataset.json around these paths: the numbers from 0
    to the largest label, zeros and [] where it says null. None if there is no such file.
    raises   ValueError if it is damaged or misses a picture
    """
    around = range(_around(paths, depth, 1) + 1)
    places = ["/".join([*paths[0][:k], LABELS_FILE]) for k in around]
    k = max((k for k in around if places[k] in source.tables), default=None)
    if k is None:
        return None
    try:
        table = json.loads(source.read(places[k]))["labels"]
        if table is None:
            return np.zeros(len(paths), np.int64), []
        table = {name.replace("\\", "/"): label for name, label in dict(table).items()}
        for label in table.values():
            if type(label) is not int or not 0 <= label < 1_000_000:
                raise ValueError(f"{label!r} is no class number")
    except Exception as error:  # a damaged file breaks this in any way
        raise ValueError(f"--data {spec}: {places[k]}: neither \"labels\": null nor \"labels\": "
                         f"[[name, class number], ...] ({reason(error)}); write it anew, or "
                         "remove it") from None
    names = ["/".join(p[k:]) for p in paths]
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"--data {spec}: {places[k]} has no label for {len(missing)} of "
                         f"{len(names)} images, beginning with {missing[0]!r}; write it anew, or "
                         "remove it")
    labels = np.array([table[name] for name in names])
    return labels, [str(k) for k in range(labels.max() + 1)]


def _read_classes(spec, paths, depth):
    """
    Labels (n,) int64 and classes of the pictures that train: the sorted folders at this depth, or
    below those that are around all. Zeros and [] without folders.
    raises   ValueError if only some pictures lie in one
    """
    depth = _around(paths, depth, 2)
    shallow = [len(p) == depth + 1 for p in paths]
    if all(shallow):
        return np.zeros(len(paths), np.int64), []
    if any(shallow):
        a, b = ("/".join(paths[shallow.index(flat)]) for flat in (True, False))
        raise ValueError(f"--data {spec}: images beside class folders ({a} and {b}); "
                         "give every image a class folder, or none")
    classes = sorted({p[depth] for p in paths})
    label_of = {c: k for k, c in enumerate(classes)}
    return np.array([label_of[p[depth]] for p in paths]), classes


def _held_out_labels(spec, source, paths, depth, classes):
    """Labels (m,) int64 in the classes of the training part; zeros unless all pictures have one."""
    from_file = _read_labels(spec, source, paths, depth)
    label_of = {c: k for k, c in enumerate(classes)}
    if from_file:
        labels, _ = from_file
    else:
        labels = np.array([next((label_of[f] for f in p[depth:-1] if f in label_of), -1)
                           for p in paths])
    return labels if 0 <= labels.min() and labels.max() < len(classes) else 0 * labels


def divide(spec, source):
    """
    The Division of a source: what its names and a dataset.json say, and never a guess.
    parts    top folders like `train` beside `val` or `test` (see PARTS; with both, test is left
             alone); otherwise a tenth of the images, at most 5000, by a permutation that depends on
             nothing else, is held out
    labels   of a dataset.json, as StyleGAN, EDM and REPA write it; otherwise the index of the
             sorted class folder. They come from the training part alone.
    raises   ValueError, one line that starts with `--data {spec}:`
    """
    paths = [name.split("/") for name in source.names]
    depth = _around(paths, 0, 1)  # one folder around everything is a wrapper, not a class
    tops = np.array([p[depth] for p in paths])
    in_folders = all(len(p) > depth + 1 for p in paths)
    parts = _parts(spec, sorted(set(tops.tolist()))) if in_folders else None
    rng = np.random.default_rng(HELD_OUT_SEED)
    if parts:
        depth += 1
        train, held_out = (np.flatnonzero(tops == part) for part in parts)
        held_out, seen = rng.permutation(held_out), train
    elif len(paths) > 1:
        _refuse_parts_inside(spec, paths, depth)
        order, k = rng.permutation(len(paths)), min(max(len(paths) // 10, 1), 5000)
        train, held_out, seen = np.sort(order[k:]), order[:k], np.arange(len(paths))
    else:
        raise ValueError(f"--data {spec}: a single image; two are the least, for one is held out")
    labels, known = np.zeros(len(paths), np.int64), [paths[row] for row in seen]
    from_file = _read_labels(spec, source, known, depth)
    labels[seen], classes = from_file or _read_classes(spec, known, depth)
    if parts:
        labels[held_out] = _held_out_labels(spec, source, [paths[row] for row in held_out], depth,
                                            classes)
    source.tell_left_out(spec)
    if not from_file and "".join(classes).isdecimal() and len(set(map(len, classes))) == 1:
        say(spec, f"the folders {classes[0]} .. {classes[-1]} have numbers for names and are taken "
            f"as classes; if they are only shards, put a {LABELS_FILE} beside them")
    return Division(train, held_out, labels, classes, bool(from_file))
