"""
What a user can get wrong, as tables: flags, pictures, zips, folders, checkpoints, caches,
statistics.

A refusal is exit code 2, one line on stderr that names the culprit, and a working folder that is as
it was: nothing half-written, no code of a file executed. A row of flags is (flags, words of that
line), or the flags alone where the last of them is those words; other rows say what is wrong with a
file and hold it, or what makes it. Commands run inside this process on tiny material, whose paths
stand in braces.
"""
import ast
import contextlib
import importlib
import io
import json
import os
import pathlib
import pickle
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tracemalloc
import urllib.error
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common import data, run
from common.data import images_hash, open_data
from conftest import ROOT, run_main

TINY = "--preset quick --batch_size 4 --device cpu --steps 0"
BASE = {                                   # flags before those of a row, which win
    "train_ae": f"{TINY} --image_size 16 --data {{images}} --reg kl --out out",
    "train_diffusion": f"{TINY} --model SiT-tiny/4 --encode_batch 4 --sample_steps 2 --ae {{ae}} "
        "--data {images} --cache {cache} --out out",
    "data pack": "--workers 0 --size 16 --out x.zip",
    "ideas": "--plot x.png",
    "evaluate recon": "--ae {ae} --workers 0 --device cpu",
    "evaluate gen": "--ckpt {run}/ckpt.pt --num_samples 2 --steps 2 --workers 0 --device cpu "
        "--out out",
    "evaluate fid": "--device cpu",
    "evaluate spectrum": "--ae {ae} --val_images 1 --device cpu --out x.png",
    "evaluate bands": "--ae {ae} --val_images 1 --device cpu --out x.png",
    "evaluate latents": "--ae {ae} --val_images 1 --device cpu --out x.png",
    "evaluate similarity": "--encoder_source random --image_size 28 --val_images 1 --device cpu "
        "--out x.png",
}


@pytest.fixture(scope="session")
def made(material, tmp_path_factory):
    """
    The paths that commands name: an autoencoder, a conditional and an unconditional diffusion run
    of 0 steps, their latent cache.
    """
    import train_diffusion
    folder = tmp_path_factory.mktemp("made")
    paths = {name: folder / name for name in ("cache", "run", "plain", "uvit")}
    paths |= dict(images=material / "images", ae=folder / "ckpt.pt")
    trained = torch.load(material / "ae" / "ckpt.pt", weights_only=True)
    kept = ("stage", "step", "args", "ae_config", "model")  # without its optimiser it loads faster
    torch.save({key: trained[key] for key in kept}, paths["ae"])
    flags = BASE["train_diffusion"].format(**paths).split()
    runs = dict(run=[], plain=["--num_classes", 0], uvit=["--model", "UViT-tiny/4"])
    with pytest.MonkeyPatch.context() as patch:
        for name, more in runs.items():
            run_main(train_diffusion, *flags, *more, "--out", paths[name], monkeypatch=patch)
    return paths


@pytest.fixture
def here(tmp_path, monkeypatch):
    """
    The working folder of one row; the network is out of reach, and the weights that one would have
    downloaded are not there.
    """
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    return tmp_path / "here"


def tree(folder):
    """{path: size and time of every file, link and folder}."""
    found = {}
    for at, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(at, name)
            status = os.lstat(path)
            found[path] = stat.S_ISDIR(status.st_mode) or (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def start(made, here, monkeypatch):
    """start(command) runs a command line in this process as its script would."""
    def start(command):
        matching = (name for name in BASE if f"{command} ".startswith(f"{name} "))
        name = next(matching, command.split()[0])
        script, *words = name.split()
        flags = BASE.get(name, "").format(**made).split()
        flags += shlex.split(command[len(name):].format(**made))
        rooms = {"data": "common.data", "ideas": "analysis.ideas"}
        module = importlib.import_module(rooms.get(script, script))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, *flags])
        errors = contextlib.nullcontext()
        if script.startswith(("train", "evaluate", "ideas")):
            errors = run.one_line_errors()
        with errors:
            module.main()
    return start


@pytest.fixture
def refused(start, capsys):
    """refused(command, words) holds if the command is refused as the head of this file says."""
    def refused(command, words):
        before = tree(".")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            start(command)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and words in error, error
        assert error.count("\n") == 1, error
        assert tree(".") == before
    return refused


# ---- flags ---------------------------------------------------------------------------------------

AE_FLAGS = [
    "--image_size 17", "--image_size 8", "--image_size -32", "--image_size 1000000",
    ("--image_size x", "--image_size"),
    ("--reg dsm --image_size 24", "--reg dsm: a latent of 12x12"),
    ("--reg se --image_size 20", "--reg se"), ("--reg none kl", "--reg none"), "--reg dsm se",
    "--reg vf uae", ("--reg fft", "--reg"), ("--reg dsm --dsm_masks 0 15", "--dsm_masks"),
    ("--reg dsm --dsm_masks -1", "--dsm_masks"), "--reg esm --gamma nan", "--reg esm --gamma inf",
    "--reg esm --gamma -0.5", "--reg esm --gamma 1000", "--esm_weight nan", "--uae_weight -1",
    "--lr nan", "--lr -1", "--clip_grad 0", "--weight_decay inf", "--steps -1", "--warmup_steps -1",
    "--batch_size 0", "--grad_accum 0", "--grad_accum 3", "--val_images 0", "--log_every 0",
    "--keep_every 7", "--seed -1", ("--seed 99999999999999999999", "--seed 9999"),
    (f"--seed 1{400 * '0'}", "--seed 1000"), "--workers -1", "--workers 100000",
    ("--model f3d3", "--model"), ("--preset laptop", "--preset"), "--gan_weight 0.5",
    ("--lpips_weight 0.5 --reg eq", "--lpips_weight 0.5"), ("--dtype fp8", "--dtype"),
    "--resume --overwrite", "--reg vf --encoder resnet", ("--stepz 3", "--stepz"),
    ("--out {ae}", "ckpt.pt"), ("--out {ae}/deeper", "ckpt.pt"), "--data nowhere",
    ("--data {ae}", "--data"), (f"--out {300 * 'x'}", "xxx"),
]
DIFFUSION_FLAGS = [
    "--beta2 1", "--beta2 nan", "--ema 1.5", "--ema -0.1", "--ema nan", "--steps -1", "--lr nan",
    "--label_dropout -0.1", "--seed -1", ("--seed 99999999999999999999", "--seed 9999"),
    (f"--seed 1{400 * '0'}", "--seed 1000"), "--workers 100000", "--batch_size 0",
    "--grad_accum -1", "--encode_batch -4", "--image_size 17", "--image_size 0", "--image_size -16",
    ("--model SiT-tiny/3", "--model"),
    ("--model SiT-tiny/4 --image_size 18 --cache c", "patch size 4"), "--num_classes 1",
    "--num_classes -2", "--num_classes 1000000000", "--num_classes 0 --cfg 2", "--cfg nan",
    "--cfg -1", "--sample_steps 1", "--sample_steps 1001",
    "--repa dog --encoder_source random --repa_depth 9", "--repa_depth 0",
    ("--repa gabor", "--repa"), "--repa dog --encoder resnet",
    "--repa dog --encoder_source nowhere", ("--repa dog", "--encoder_source"), "--dog_sigma1 3",
    "--dog_sigma1 nan", "--dog_sigma2 inf", "--norm_std 1.5", ("--ae nowhere.pt", "nowhere.pt"),
    ("--ae {run}/ckpt.pt", "stage"), "--resume --overwrite", ("--out {ae}", "ckpt.pt"),
    "--data nowhere", ("--cache {ae}", "--cache"), ("--cache {ae}/deeper", "Not a directory"),
]
EVALUATE_FLAGS = [
    "recon --val_images 0", "recon --batch_size 0", "recon --image_size 15", "recon --image_size 0",
    "recon --image_size -16", "recon --image_size 8", "recon --workers -1",
    "recon --workers 100000", ("recon --ae nowhere.pt", "nowhere.pt"), "recon --data nowhere",
    "recon --results .", ("recon --results {ae}/r.jsonl", "--results"), "gen --num_samples 0",
    ("gen --num_samples 1000000000000000", "1,000,000,000,000,000 rows"), "gen --steps 0",
    "gen --steps 1", "gen --ckpt {uvit}/ckpt.pt --steps 1001", "gen --cfg nan", "gen --cfg -1",
    "gen --ckpt {plain}/ckpt.pt --cfg 2", "gen --cfg_interval 0.8 0.2",
    ("gen --cfg_interval nan 1", "--cfg_interval nan"),
    ("gen --cfg_interval 0 2", "--cfg_interval 0.0 2.0"), "gen --seed -1",
    ("gen --seed 99999999999999999999", "--seed 9999"), "gen --reference_images -1",
    "gen --reference_images 1", ("gen --sampler heun", "--sampler"),
    ("gen --ckpt nowhere.pt", "nowhere.pt"), ("gen --ckpt {ae}", "stage"),
    ("gen --out {ae}", "--out"), ("gen --out {ae}/deeper", "--out"), "gen --data nowhere",
    ("fid nowhere {images}", "nowhere"), ("fid {images}", "required"), ("fid {ae} {ae}", "neither"),
    "fid {images} {images} --image_size -1", "fid {images} {images} --image_size 1000000",
    "spectrum --gamma nan", "spectrum --gamma -1", "spectrum --gamma 1000",
    "spectrum --encoder_source random", "spectrum --out x.txt", "spectrum --out .",
    ("spectrum --out {ae}/x.png", "--out"), "spectrum --seed -1",
    ("bands --image_size 24", "--image_size must be a multiple"), "bands --out x.jpeg2000",
    ("latents --ae {ae} {run}/ckpt.pt", "stage"), "latents --val_images 0",
    "similarity --image_size 225", "similarity --image_size 0", "similarity --image_size -14",
    "similarity --token 4", "similarity --token -1", "similarity --image nowhere.png",
    ("similarity --image {images}", "--image"), ("similarity --image {ae}", "--image"),
    "similarity --encoder resnet", ("cluster", "invalid choice"),
]
OTHER_FLAGS = [
    "data pack --size 4", "data pack --size 1000000", "data pack --count 0", "data pack --count -5",
    "data pack --count 10000000", "data pack --count 3 --workers -1",
    "data pack --count 3 --workers 100000", "data pack --out x.tar",
    ("data pack --out {ae}/x.zip", "ckpt.pt"), ("data pack --data {ae}", "--data"),
    "data pack --data nowhere", ("data unpack", "invalid choice"),
    (f"data pack --data {300 * 'x'}", "xxx"), "ideas --size 60", "ideas --size 0",
    ("ideas --image nowhere.png", "nowhere.png"), ("ideas --image {ae}", "--image"),
    ("ideas --image {images}", "no file"), ("ideas --plot nowhere/x.png", "--plot"),
    "ideas --plot x.txt", "ideas --plot .", "ideas --size 1000000",
    "ideas --pipeline x.png --size 72", ("ideas --plot ''", "--pipeline"),
]
TABLES = {"train_ae ": AE_FLAGS, "train_diffusion ": DIFFUSION_FLAGS, "evaluate ": EVALUATE_FLAGS,
    "": OTHER_FLAGS}


def flag_rows():
    """(command, words) of every row of the tables."""
    for script, rows in TABLES.items():
        for row in rows:
            if isinstance(row, str):
                row = row, "--" + row.rpartition("--")[2]
            flags, words = row
            yield script + flags, words


FLAGS = list(flag_rows())


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("command, words", FLAGS, ids=[command[:60] for command, _ in FLAGS])
def test_a_bad_flag_is_refused(command, words, refused):
    """Before anything is written, and by its name."""
    refused(command, words)


@pytest.mark.parametrize("command, words", [
    ("train_ae", "--batch_size 4"), ("train_diffusion", "--batch_size 4"),
    ("train_diffusion --batch_size 6", "--encode_batch 4"),
    ("evaluate spectrum", "without torchrun")])
def test_three_processes_refuse_what_does_not_divide(command, words, refused, monkeypatch):
    """The global batch is shared evenly; figures are drawn by one process."""
    monkeypatch.setattr(run, "init_distributed", lambda device: (0, 3, torch.device("cpu")))
    refused(command, words)


# ---- pictures ------------------------------------------------------------------------------------

def smooth(seed=0, height=16, width=16):
    """
    (height, width, 3) uint8, a slope of colours that JPEG keeps and no turn or mirror leaves alone.
    """
    y, x = np.mgrid[:height, :width]
    a, b, c = np.random.default_rng(seed).integers(20, 60, 3)
    return np.stack([a + 8 * x, b + 9 * y, c + 4 * x + 5 * y], 2).clip(0, 255).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


RGB = smooth()                             # (16, 16, 3)
PICTURE = Image.fromarray(RGB)
PNG = encoded(PICTURE)
GREY = RGB[..., :1]
GREY_PICTURE = Image.fromarray(GREY[..., 0])
GREY_16 = GREY[..., 0].astype(np.uint16) * 257
MORE = dict(save_all=True, append_images=[Image.fromarray(255 - RGB)])
FRAMES = dict(**MORE, duration=50)
UPPER = np.arange(16)[:, None, None] < 8   # (16, 1, 1)
HALF = np.where(UPPER, RGB, 255)           # the lower half transparent, so white
ALPHA = Image.fromarray(np.dstack([RGB, np.repeat(UPPER, 16, 1) * np.uint8(255)]))
KEY = (9, 8, 7)
KEYED = Image.fromarray(np.where(HALF == 255, np.uint8(KEY), RGB).astype(np.uint8))
PICTURES = {                               # name: (file, its 16 x 16 crop, tolerance)
    "grey.png": (encoded(GREY_PICTURE), GREY, 0),
    "grey.jpg": (encoded(GREY_PICTURE, "JPEG", quality=98), GREY, 4),
    "grey-alpha.png": (encoded(GREY_PICTURE.convert("LA")), GREY, 0),
    "bilevel.png": (encoded(Image.fromarray(GREY[..., 0] > 90)), 255 * (GREY > 90), 0),
    "16-bit.png": (encoded(Image.fromarray(GREY_16)), GREY, 0),
    "16-bit.tif": (encoded(Image.fromarray(GREY_16), "TIFF"), GREY, 0),
    "16-bit.pgm": (b"P5 16 16 65535 " + GREY_16.astype(">u2").tobytes(), GREY, 0),
    "cmyk.jpg": (encoded(PICTURE.convert("CMYK"), "JPEG", quality=98), RGB, 8),
    "cmyk.tiff": (encoded(PICTURE.convert("CMYK"), "TIFF"), RGB, 1),
    "progressive.jpeg":
        (encoded(PICTURE, "JPEG", quality=98, progressive=True, subsampling=0), RGB, 6),
    "palette.png": (encoded(PICTURE.quantize(256)), RGB, 4),
    "palette.gif": (encoded(PICTURE.quantize(256), "GIF"), RGB, 4),
    "alpha.png": (encoded(ALPHA), HALF, 0),
    "alpha.webp": (encoded(ALPHA, "WEBP", lossless=True), HALF, 0),
    "colour-key.png": (encoded(KEYED, transparency=KEY), HALF, 0),
    "animated.gif": (encoded(PICTURE.quantize(256), "GIF", **FRAMES), RGB, 4),
    "animated.webp": (encoded(PICTURE, "WEBP", lossless=True, **FRAMES), RGB, 0),
    "animated.png": (encoded(PICTURE, **FRAMES), RGB, 0),
    "pages.tiff": (encoded(PICTURE, "TIFF", compression="tiff_lzw", **MORE), RGB, 0),
    "turned.png": (encoded(PICTURE, exif=exif(6)), np.rot90(RGB, -1), 0),
    "turned.jpg":
        (encoded(PICTURE, "JPEG", quality=98, subsampling=0, exif=exif(3)), np.rot90(RGB, 2), 6),
    "mirrored.tif": (encoded(PICTURE, "TIFF", exif=exif(2)), RGB[:, ::-1], 0),
    "1x1.png":
        (encoded(Image.new("RGB", (1, 1), (9, 99, 199))), np.full((16, 16, 3), (9, 99, 199)), 0),
    "strip.bmp": (encoded(Image.fromarray(smooth(3, 16, 1600)), "BMP"),
        smooth(3, 16, 1600)[:, 792:808], 0),
    "column.ppm": (encoded(Image.fromarray(smooth(4, 1600, 16)), "PPM"),
        smooth(4, 1600, 16)[792:808], 0),
    "webp-called.jpg": (encoded(PICTURE, "WEBP", lossless=True), RGB, 0),
    "UPPER CASE.PNG": (PNG, RGB, 0),
    "new\nline.png": (PNG, RGB, 0),
    "caf\u00e9 \U0001f600 'quoted' {0} %s.png": (PNG, RGB, 0),
    f"{251 * 'n'}.png": (PNG, RGB, 0),
}
ON_DISK = {"caf\udce9.png": (PNG, RGB, 0)}  # Latin-1 bytes, which are not UTF-8
IN_A_ZIP = {f"{60_000 * 'n'}.png": (PNG, RGB, 0)}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_every_kind_of_picture_loads(kind, tmp_path):
    """
    The right crop of the right frame the right way up, in 8-bit RGB, whatever the file's mode,
    depth, name or length.
    """
    if kind == "folder":
        files = PICTURES | ON_DISK
        spec = tmp_path / "set"
        spec.mkdir()
        for name, (content, _, _) in files.items():
            (spec / name).write_bytes(content)
    else:
        files = PICTURES | IN_A_ZIP
        spec = tmp_path / "set.zip"
        spec.write_bytes(zipped({name: content for name, (content, _, _) in files.items()}))
    seen = set()
    for images in open_data(spec, 16):
        for i in range(len(images)):
            name, (picture, _, index, bad) = images.name(i), images[i]
            _, expected, tolerance = files[name]
            assert index == i and not bad and picture.dtype == torch.uint8, name
            picture = picture.permute(1, 2, 0).numpy().astype(int)
            assert np.abs(picture - expected).max() <= tolerance, name
            seen.add(name)
        assert re.fullmatch("[0-9a-f]{16}", images_hash(images))
    assert seen == files.keys()


def zipped(files, change=lambda entry, raw: raw, compression=zipfile.ZIP_DEFLATED):
    """
    The bytes of a zip of {name: bytes}; change(its last entry, those bytes) -> bytes damages it.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return change(archive.infolist()[-1], file.getvalue())


def put(path, content):
    """Write the content to the path, or let it make there what is no plain file."""
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)


def png_that_claims(width, height):
    """A PNG whose header alone is as large as it says."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + checksum + PNG[33:]


def half(content):
    return content[:len(content) // 2]


def flipped(content, at, bit):
    """The content with one bit of its byte `at` flipped."""
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1:]


def cut(kind):
    content = encoded(Image.fromarray(smooth(1, 64, 64)), kind)
    return content[:len(content) * 2 // 3]


def sparse(path):
    path.touch()
    os.truncate(path, 2 ** 40)


def closed(path):
    path.write_bytes(PNG)
    path.chmod(0)


NO_PICTURES = {                            # name: content, or what makes it at a path
    "empty.png": b"",
    "text.png": b"not a picture",
    "page.jpg": b"<!doctype html><title>404</title>",
    "drawing.png": b"<svg></svg>",
    "cut.png": cut("PNG"),
    "cut.jpg": cut("JPEG"),
    "cut.webp": cut("WEBP"),
    "cut.bmp": cut("BMP"),
    "cut.gif": cut("GIF"),
    "cut.tif": cut("TIFF"),
    "cut.ppm": cut("PPM"),
    "header.png": PNG[:60],
    "bomb.png": png_that_claims(50_000, 50_000),
    "zero-wide.png": png_that_claims(0, 16),
    "strip-20000x10.png": encoded(Image.new("L", (20_000, 10))),
    "floats.tif": encoded(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"),
    "32-bit.tif": encoded(Image.fromarray(np.full((16, 16), 70_000, np.int32)), "TIFF"),
    "flipped-bit.png": flipped(PNG, 60, 1),
    "broken-link.png": lambda path: path.symlink_to("nowhere.png"),
    "link-to-itself.png": lambda path: path.symlink_to(path.name),
    "pipe.png": os.mkfifo,
    "device.png": lambda path: path.symlink_to("/dev/zero"),
    "sparse.png": sparse,
    "new\nline.png": b"not a picture",
    "zipped.png": zipped({"a.png": PNG}),
    "closed.png": closed,
}


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """99 small pictures in a folder, {name: bytes}: with a bad one beside them, 1% is bad."""
    folder = tmp_path_factory.mktemp("good")
    for i in range(99):
        (folder / f"{i}.png").write_bytes(encoded(Image.fromarray(smooth(i))))
    return folder


@pytest.fixture
def beside_bad(good, here):
    """set/bad, an empty folder for a bad picture, beside the good ones."""
    (here / "set" / "bad").mkdir(parents=True)
    (here / "set" / "good").symlink_to(good)
    return here / "set" / "bad"


@pytest.fixture
def skipped(start, capsys):
    """
    skipped(name, source) holds if packing the source leaves out that file, by name, and keeps the
    other 99.
    """
    def skipped(name, source):
        start(f"data pack --data {source}")
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and len(output.err) < 500
        assert f"skipping {name!r}: " in output.err
        assert "99 images" in output.out and "1 unreadable" in output.out
        assert len(zipfile.ZipFile("x.zip").namelist()) == 99
    return skipped


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_skipped_and_counted(name, beside_bad, skipped, refused, recwarn):
    """One line with the name and the reason; no wait, no gigabytes."""
    if name == "closed.png" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    put(beside_bad / name, NO_PICTURES[name])
    skipped(f"bad/{name}", "set")
    assert not recwarn.list, [str(w.message) for w in recwarn.list]
    if name.isprintable():
        flag = f"--image set/bad/{name}"
        refused(f"evaluate similarity {flag}", f"{flag}: ")


def test_postscript_is_not_run(here, beside_bad, skipped, refused, monkeypatch):
    """PIL hands an EPS to Ghostscript, whatever the file's name; here it is no picture."""
    (here / "bin").mkdir()
    (here / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {here}/executed\n")
    (here / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(here / "bin"), prepend=":")
    eps = beside_bad / "eps.png"
    eps.write_bytes(encoded(PICTURE, "EPS"))
    with contextlib.suppress(Exception):
        Image.open(eps).load()
    assert (here / "executed").exists()    # so it would have been
    (here / "executed").unlink()
    skipped("bad/eps.png", "set")
    flag = "--image set/bad/eps.png"
    refused(f"evaluate similarity {flag}", f"{flag}: not an image")
    assert not (here / "executed").exists()


# ---- zips and folders ----------------------------------------------------------------------------

def central(offset, form, value):
    """A change of the last entry's line in the central directory, which begins at offset."""
    def change(entry, raw):
        at = raw.rindex(b"PK\x01\x02") + offset
        return raw[:at] + struct.pack(form, value) + raw[at + struct.calcsize(form):]
    return change


MEMBERS = {                                # what is wrong with the last of a zip's files
    "a wrong checksum": central(16, "<I", 1),
    "a flipped bit": lambda entry, raw: flipped(raw, entry.header_offset + 60, 4),
    "a stream cut short": central(20, "<I", 40),
    "fewer bytes than it unpacks to": central(24, "<I", 40),
    "two gigabytes": central(24, "<I", 2 ** 31),
    "a place behind the end": central(42, "<I", 10 ** 6),
}


@pytest.mark.parametrize("fault", MEMBERS)
def test_a_damaged_member_of_a_zip_is_skipped_and_counted(fault, good, here, skipped):
    """As a file of a folder would be."""
    files = {path.name: path.read_bytes() for path in sorted(good.iterdir())}
    files["bad.png"] = encoded(Image.fromarray(smooth(99, 40, 40)))
    (here / "set.zip").write_bytes(zipped(files, MEMBERS[fault]))
    skipped("bad.png", "set.zip")


def test_a_zip_bomb_is_unpacked_no_further_than_it_declares(tmp_path):
    """200 MB of zeros that declare themselves as 100 bytes take none of the memory."""
    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"a.png": PNG, "b.png": bytes(200 * 2 ** 20)}, central(24, "<I", 100)))
    source = data.open_source(path)
    tracemalloc.start()
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        source.image(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 ** 20


def folder_of(*files):
    """A function that makes a folder with these files in it, empty ones."""
    def make(path):
        path.mkdir()
        for name in files:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).touch()
    return make


def single_picture(path):
    path.mkdir()
    (path / "a.png").write_bytes(PNG)


def folder_in_itself(path):
    path.mkdir()
    (path / "in").symlink_to(path)


def folders_in_each_other(path):
    for a, b in ("ab", "ba"):
        (path / a).mkdir(parents=True)
        (path / a / b).symlink_to(path / b)


TWO = {"a.png": PNG, "b.png": PNG}
NOT_UTF8 = zipped({"\u00e9\u00e9.png": b"", "b.png": b""},
    lambda entry, raw: raw.replace("\u00e9\u00e9".encode(), b"\xff\xff\xff\xff"))
NO_ENTRIES = b"PK\x05\x06" + bytes(18)
SOURCES = [                                # what it is, its name, content or maker, words
    ("a text", "x.zip", b"PK, or not", "not a readable zip"),
    ("nothing", "x.zip", b"", "not a readable zip"),
    ("a zip cut short", "x.zip", half(zipped(TWO)), "not a readable zip"),
    ("a zip of a later version", "x.zip", zipped(TWO, central(6, "<H", 99)), "not a readable zip"),
    ("a zip with a name that is no UTF-8", "x.zip", NOT_UTF8, "not a readable zip"),
    ("an encrypted zip", "x.zip", zipped(TWO, central(8, "<H", 1)), "encrypted"),
    ("a zip in a zip", "x.zip", zipped({"inner.zip": zipped(TWO)}), "no images"),
    ("a zip of folders", "x.zip", zipped({"a/": b"", "b.png/": b""}), "no images"),
    ("a zip of nothing", "x.zip", NO_ENTRIES, "no images"),
    ("a zip of bad pictures", "x.zip", zipped({"a.png": b"", "b.png": b""}),
        "beginning with 'a.png'"),
    ("an empty folder", "set", folder_of(), "no images"),
    ("a folder of other files", "set", folder_of("a.txt", ".b.png"), "no images"),
    ("a broken link", "set", lambda path: path.symlink_to("nowhere"), "no such folder"),
    ("a link to itself", "set", lambda path: path.symlink_to("set"), "set"),
    ("a folder in itself", "set", folder_in_itself, "is a link back"),
    ("two folders in each other", "set", folders_in_each_other, "is a link back"),
    ("a closed folder", "set", lambda path: path.mkdir(0), "cannot list"),
    ("a tar", "x.tar", b"", "neither a folder nor a .zip"),
    ("pictures beside classes", "set", folder_of("c/b.png", "a.png"), "beside class folders"),
    ("a single picture", "set", single_picture, "single image"),
]


@pytest.mark.parametrize("what, name, content, words", SOURCES, ids=[row[0] for row in SOURCES])
def test_a_set_that_cannot_be_read_is_refused(what, name, content, words, here, refused):
    """By pack, and by the training scripts."""
    if what == "a closed folder" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    put(here / name, content)
    command = "data pack"
    if what in ("a single picture", "pictures beside classes"):  # which pack takes as they are
        command = "train_ae"
    refused(f"{command} --data {name} --out y.zip", words)


# ---- checkpoints ---------------------------------------------------------------------------------

class Touch:
    """An object whose unpickling creates the file `executed` in the working folder."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("executed"),)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def weights(change):
    """A change of every part of a checkpoint that holds weights."""
    def changed(state):
        new = {key: change(dict(state[key])) for key in ("model", "ema") if key in state}
        return saved(state | new)
    return changed


def first(change):
    """A change of the first weight of more than one dimension."""
    def changed(part):
        name = next(name for name, tensor in part.items() if tensor.ndim > 1)
        return part | {name: change(part[name])}
    return weights(changed)


def without_weights(state):
    return saved({key: part for key, part in state.items() if key not in ("model", "ema")})


CHECKPOINTS = {                            # what is wrong: the state of a good one -> bytes
    "empty": lambda state: b"",
    "a text": lambda state: b"epoch 3, loss 0.1\n",
    "cut short": lambda state: half(saved(state)),
    "without its end": lambda state: saved(state)[:-100],
    "code": lambda state: saved(state | {"model": Touch(), "ema": Touch()}),
    "code beside the weights": lambda state: saved(state | {"note": Touch()}),
    "code in a plain pickle": lambda state: pickle.dumps(Touch()),
    "a tensor": lambda state: saved(torch.zeros(3)),
    "a list": lambda state: saved([state]),
    "an empty dictionary": lambda state: saved({}),
    "another stage": lambda state: saved(state | {"stage": "painting"}),
    "without weights": without_weights,
    "nothing but its stage": lambda state: saved({"stage": state["stage"]}),
    "weights that are a list": lambda state: saved(state | {"model": [1], "ema": [1]}),
    "a weight that is a string": first(lambda tensor: "0.5"),
    "a weight missing": weights(lambda part: dict(list(part.items())[1:])),
    "a weight of another shape": first(lambda tensor: torch.cat([tensor, tensor])),
    "another architecture":
        weights(lambda part: {f"layers.{name}": tensor for name, tensor in part.items()}),
    "a weight that is NaN": first(lambda tensor: tensor * float("nan")),
    "a weight that is infinite": first(lambda tensor: tensor / 0),
}
READERS = {                                # who reads bad.pt, a copy of what, words
    "train_diffusion --ae bad.pt": ("ae", "bad.pt"),
    "evaluate gen --ckpt bad.pt": ("run", "bad.pt"),
    "train_ae --reg vf --encoder_source bad.pt": ("labelnet", "--encoder_source bad.pt"),
    "train_ae --resume --steps 9 --out bad": ("ae", "bad/ckpt.pt"),
    "train_diffusion --resume --steps 9 --out bad": ("run", "bad/ckpt.pt"),
}


@pytest.fixture(scope="session")
def states(made, material):
    """Good checkpoints of each kind, as dictionaries."""
    from repa import LabelNet
    return dict(
        ae=torch.load(material / "ae" / "ckpt.pt", weights_only=True),
        run=torch.load(made["run"] / "ckpt.pt", weights_only=True),
        labelnet=dict(stage="labelnet", model=LabelNet(2).state_dict(), num_classes=2))


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(fault, command, states, here, refused):
    """Nothing in it is run, no network computes with it, and the line names the file."""
    kind, words = READERS[command]
    if kind == "labelnet" and fault == "another stage":
        pytest.skip("its stage is not looked at")
    path = here / "bad.pt"
    if "--resume" in command:
        path = here / "bad" / "ckpt.pt"
        path.parent.mkdir()
    path.write_bytes(CHECKPOINTS[fault](states[kind]))
    refused(command, words)
    assert not (here / "executed").exists()


def test_the_good_checkpoints_are_accepted(states, here, start, refused):
    """
    What the table spoils is accepted whole, so each row is refused for its own fault alone; and its
    code would have run.
    """
    pickle.loads(pickle.dumps(Touch()))
    assert (here / "executed").exists()
    torch.save(states["labelnet"], here / "net.pt")
    start("evaluate similarity --encoder_source net.pt")
    start("evaluate gen")
    doubled = {name: 2 * tensor for name, tensor in states["ae"]["model"].items()}
    torch.save(states["ae"] | dict(model=doubled), here / "other.pt")
    refused("evaluate gen --ae other.pt --out again", "--ae other.pt: not the autoencoder")


@pytest.mark.parametrize("settings, words", [
    ("[1, 2]", "holds a list"), ("{", "cannot be read"), ('{"_class_name": "VQModel"}', "VQModel"),
    ("{}", "builds no autoencoder"), ('{"norm_num_groups": 7}', "builds no autoencoder"),
    ('{"norm_num_groups": "many"}', "builds no autoencoder")])
def test_a_bad_foreign_autoencoder_is_refused(settings, words, states, here, refused):
    """
    A folder with weights and settings in other people's layout; 16 channels do not divide into the
    usual 32 groups.
    """
    (here / "ae").mkdir()
    (here / "ae" / "config.json").write_text(settings)
    weights = {name: tensor for name, tensor in states["ae"]["model"].items()
        if "latent_" not in name}
    torch.save(weights, here / "ae" / "diffusion_pytorch_model.bin")
    refused("train_diffusion --ae ae", words)


def test_bad_inception_weights_are_refused(here, refused):
    """Cut short on the way: the line says which file to remove."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    folder = here.parent / "torch_home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    weights = folder / os.path.basename(URL_INCEPTION_V3)
    for content in (b"", saved({})[:50], saved([1]), saved({"a": torch.zeros(1)})):
        weights.write_bytes(content)
        refused("evaluate fid {images} {images}", str(weights))


# ---- caches and statistics -----------------------------------------------------------------------

def edit_json(**changes):
    """A change of cache.json; a value that is a function is applied to what is there."""
    def change(cache):
        meta = json.loads((cache / "cache.json").read_text())
        for key, value in changes.items():
            meta[key] = value(meta[key]) if callable(value) else value
        (cache / "cache.json").write_text(json.dumps(meta))
    return change


def edit(name, function):
    """A change of an array of the cache."""
    return lambda cache: np.save(cache / name, function(np.load(cache / name)))


def write(name, content):
    return lambda cache: (cache / name).write_bytes(content)


def truncate(name, size):
    return lambda cache: os.truncate(cache / name, size)


def npy_of_code():
    """The bytes of a .npy with an array of objects: a pickle."""
    file = io.BytesIO()
    np.save(file, np.array([Touch()], dtype=object), allow_pickle=True)
    return file.getvalue()


CODE = npy_of_code()
UNREADABLE = "not a readable latent cache"
MISFIT = "its files do not fit"
OTHER = "0123456789abcdef"
CACHES = {                                 # what is wrong: (change of a copy, words)
    "of another autoencoder":
        (edit_json(autoencoder=OTHER), f"was made from autoencoder '{OTHER}'"),
    "of other images": (edit_json(images=OTHER), f"was made from images '{OTHER}'"),
    "of another size": (edit_json(size=32), "was made from size 32"),
    "moments cut short": (truncate("moments.npy", 1000), UNREADABLE),
    "no moments": (write("moments.npy", b""), UNREADABLE),
    "moments that are code": (write("moments.npy", CODE), UNREADABLE),
    "labels that are code": (write("labels.npy", CODE), UNREADABLE),
    "rows that are code": (write("rows.npy", CODE), UNREADABLE),
    "labels that are a pickle": (write("labels.npy", pickle.dumps(Touch())), UNREADABLE),
    "moments of fewer images": (edit("moments.npy", lambda moments: moments[:5]), MISFIT),
    "moments of another precision":
        (edit("moments.npy", lambda moments: moments.astype(np.float32)), MISFIT),
    "moments that are NaN": (edit("moments.npy", lambda moments: moments * np.float16("nan")),
        "normalised latents have std nan"),
    "labels of fewer images": (edit("labels.npy", lambda labels: labels[:5]), MISFIT),
    "negative labels": (edit("labels.npy", lambda labels: labels - 1), MISFIT),
    "rows behind the end": (edit("rows.npy", lambda rows: rows + 5), MISFIT),
    "no rows": (edit("rows.npy", lambda rows: rows[:0]), UNREADABLE),
    "fractional rows": (edit("rows.npy", lambda rows: rows + 0.5), MISFIT),
    "cache.json cut short": (truncate("cache.json", 100), UNREADABLE),
    "no cache.json": (lambda cache: (cache / "cache.json").unlink(), UNREADABLE),
    "cache.json that is a list": (write("cache.json", b"[1, 2]"), UNREADABLE),
    "cache.json that is binary": (write("cache.json", bytes(range(256))), UNREADABLE),
    "cache.json without a mean": (edit_json(mean=None), UNREADABLE),
    "a mean of other channels": (edit_json(mean=[0.0]), MISFIT),
    "a std of zero": (edit_json(std=lambda std: [0.0] * len(std)), MISFIT),
    "a std that is NaN": (edit_json(std=lambda std: [float("nan")] * len(std)), MISFIT),
    "a std of words": (edit_json(std=["wide"] * 4), UNREADABLE),
    # of one sample of the latents: 0.099 or 0.100
    "a std ten times too wide": (edit_json(std=lambda std: [10 * s for s in std]),
        "normalised latents have std 0."),
}


@pytest.mark.parametrize("fault", CACHES)
def test_a_bad_latent_cache_is_refused(fault, made, here, refused):
    """With its folder, before the run's folder is made; no array is unpickled."""
    change, words = CACHES[fault]
    shutil.copytree(made["cache"], here / "bad")
    change(here / "bad")
    refused("train_diffusion --cache bad", f"--cache bad: {words}")


def npz(**arrays):
    """The bytes of an .npz of them, with pickles where they hold objects."""
    file = io.BytesIO()
    np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})
    return file.getvalue()


def huge():
    """A .npy whose header announces a terabyte."""
    file = io.BytesIO()
    header = dict(descr="<f8", fortran_order=False, shape=(2 ** 37,))
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


MOMENTS = dict(mu=np.zeros(3), sigma=np.eye(3))
STATISTICS = {                             # what is wrong: b.npz
    "empty": b"",
    "a text": b"mu, sigma",
    "a pickle": pickle.dumps(Touch()),
    "cut short": half(npz(**MOMENTS)),
    "a flipped bit": npz(**MOMENTS).replace(np.float64(1).tobytes(), bytes(8), 1),
    "a single array": CODE,
    "objects": npz(mu=np.array([Touch()] * 3, object), sigma=np.eye(3)),
    "images that are objects": npz(arr_0=np.array([Touch()] * 3, object)),
    "an array that declares a terabyte": zipped({"mu.npy": huge(), "sigma.npy": huge()}),
    "other names": npz(mean=np.zeros(3), cov=np.eye(3)),
    "no covariance": npz(mu=np.zeros(3)),
    "a covariance that is not square": npz(mu=np.zeros(3), sigma=np.eye(3)[:2]),
    "a covariance of variances": npz(mu=np.zeros(3), sigma=np.ones(3)),
    "a mean in two dimensions": npz(mu=np.zeros((1, 3)), sigma=np.eye(3)),
    "a mean of other dimensions": npz(mu=np.zeros(4), sigma=np.eye(3)),
    "a mean that is NaN": npz(mu=np.full(3, np.nan), sigma=np.eye(3)),
    "an infinite covariance": npz(mu=np.zeros(3), sigma=np.diag([np.inf] * 3)),
    "words": npz(mu=["a", "b", "c"], sigma=np.eye(3)),
    "other dimensions than the first": npz(mu=np.zeros(4), sigma=np.eye(4)),
    "images in floats": npz(arr_0=np.zeros((4, 16, 16, 3))),
    "images with the channels first": npz(arr_0=np.zeros((4, 3, 16, 16), np.uint8)),
    "images that are flat": npz(arr_0=np.zeros((4, 768), np.uint8)),
    "one image": npz(arr_0=np.zeros((1, 16, 16, 3), np.uint8)),
    "no image": npz(arr_0=np.zeros((0, 16, 16, 3), np.uint8)),
}


@pytest.mark.filterwarnings("ignore:overflow", "ignore:divide by zero")
@pytest.mark.parametrize("fault", STATISTICS)
def test_bad_statistics_are_refused(fault, here, refused):
    """By evaluate fid, before a network is loaded."""
    (here / "a.npz").write_bytes(npz(**MOMENTS))
    (here / "b.npz").write_bytes(STATISTICS[fault])
    refused("evaluate fid a.npz b.npz", "b.npz")
    assert not (here / "executed").exists()


FEATURES = np.zeros((4, 3))
REFERENCES = {                             # what is wrong: the statistics that gen keeps
    "of another set": npz(**MOMENTS, features=FEATURES, how=json.dumps(dict(images="others"))),
    "without what they are of": npz(**MOMENTS, features=FEATURES),
    "cut short": npz(**MOMENTS)[:300],
    "empty": b"",
    "objects": npz(**MOMENTS, features=np.array([Touch()], object), how="{}"),
    "a pickle": pickle.dumps(Touch()),
    "NaN": npz(mu=np.full(3, np.nan), sigma=np.eye(3)),
}


@pytest.mark.parametrize("fault", REFERENCES)
def test_bad_reference_statistics_are_refused(fault, made, here, refused):
    """By evaluate gen, before it samples."""
    train_set, _ = open_data(made["images"], 16)
    path = here / "out" / "reference" / f"{images_hash(train_set)}-16.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(REFERENCES[fault])
    refused("evaluate gen --out samples", str(path.relative_to(here)))
    assert not (here / "executed").exists()


# ---- as a user would meet it ---------------------------------------------------------------------

def test_scripts_of_their_own_refuse_too(here):
    """New processes, whose stderr is all there is: one line."""
    (here / "a.npz").write_bytes(npz(**MOMENTS))
    (here / "b.npz").write_bytes(STATISTICS["objects"])
    before, running = tree("."), {}
    for command, words in (
            ("-m common.data pack --data nowhere --out x.zip",
             "data.py: --data nowhere: no such folder"),
            (f"{ROOT / 'evaluate.py'} fid a.npz b.npz", "evaluate.py: b.npz: ")):
        running[words] = subprocess.Popen([sys.executable, *command.split()], text=True,
            stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for words, process in running.items():
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 2, error
        assert error.startswith(words) and error.count("\n") == 1, error
    assert tree(".") == before


def test_nothing_is_unpickled():
    """
    In every source of the project torch.load reads weights only, and no array or object is
    unpickled.
    """
    unpickling = r"allow_pickle\s*=|pickle\.loads?\(|Unpickler\(|[^.]\b(eval|exec)\("
    calls = 0
    for path in (*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("analysis/*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func).endswith(("torch.load", "load_state_dict_from_url")):
                call = ast.unparse(node)
                assert "weights_only=True" in call, f"{path.name}: {call}"
                calls += 1
        assert not re.search(unpickling, source), path.name
    assert calls >= 4
