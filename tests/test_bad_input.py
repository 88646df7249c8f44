"""
Rows of bad input, one per flag and per kind of file that people bring wrong: exit code 2, one line
on stderr that names it, all files as they were, no code in a file was run. A row is `command ->
words of that line`; without words, the command's last flag and its value. {Paths} are in `made`.
"""
import io
import json
import os
import pathlib
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchvision.models import VGG16_Weights

import train_diffusion
from common import run
from common.data import open_data
from conftest import ROOT, run_main

pytestmark = pytest.mark.filterwarnings("ignore:.*untrained", "ignore:.*found in sys.modules")
TINY = "--preset quick --batch_size 4 --device cpu --steps 0 --data {images}"
BASE = {                                                   # flags before those of a row, which win
    "train_ae": f"{TINY} --model f2d4-tiny --image_size 16 --reg kl --out out",
    "train_diffusion": f"{TINY} --model SiT-tiny/4 --encode_batch 4 --sample_steps 2 --ae {{ae}} "
        "--cache {cache} --out out",
    "evaluate recon": "--ae {ae} --workers 0 --device cpu",
    "evaluate gen": "--ckpt {run} --num_samples 2 --steps 2 --workers 0 --device cpu",
    "evaluate fid": "--device cpu",
    "evaluate spectrum": "--device cpu --out x.png",
    "evaluate similarity": "--encoder_source random --image_size 28 --device cpu --out x.png",
    "common.data pack": "--workers 0 --size 16 --out x.zip",
}

# ---- flags ---------------------------------------------------------------------------------------
FLAGS = {
    "train_ae": [
        "--reg se --image_size 36 -> --reg se", "--reg eq --image_size 64 --gan_weight 1 -> gan",
        "--image_size 17", "--reg dsm --image_size 24 -> --reg dsm", "--reg dsm se", "--reg vf uae",
        "--reg none kl -> --reg none", "--uae_weight -1", "--dsm_block 4 --dsm_masks 7 -> masks",
        "--gamma nan", "--lr 0", "--steps -1", "--batch_size 0", "--grad_accum 3", "--val_images 0",
        "--keep_every 7", "--seed -1", "--model f3d3", "--resume --overwrite", "--data nowhere",
        "--model f8d4 --init {ae} -> --model", "--reg vf --encoder resnet", "--data {ae}",
        "--out {ae} -> File exists ckpt.pt", "--stepz 3", "--out {images}/run -> --out",
        "--reg vf --compile on -> --reg vf --compile on"],
    "train_diffusion": [
        "--overwrite --out {ae}/.. -> holds --ae", "--label_dropout -0.1", "--encode_batch -4",
        "--cfg 1.8 --label_dropout 0 -> --label_dropout 0 never", "--image_size 17", "--cache {ae}",
        "--image_size 18 --cache c -> patch", "--num_classes 1", "--num_classes 0 --cfg 2",
        "--sample_steps 1", "--dog_sigma1 3", "--norm_std 1.5", "--repa dog -> dinov2",
        "--repa dog --encoder_source nowhere", "--repa dog --encoder_source random --repa_depth 9",
        "--ae {run}/ckpt.pt -> stage", "--ae {bad}/other.pt -> --cache autoencoder",
        "--data {bad}/set -> --cache images"],
    "evaluate": [
        "recon --image_size 15", "recon --ae nowhere.pt -> nowhere.pt", "recon --data nowhere",
        "recon --results {ae}/r.jsonl", "gen --num_samples 0", "gen --cfg nan", "gen --out {ae}",
        "gen --steps 1", "gen --cfg_interval 0.8 0.2", "gen --ckpt nowhere.pt -> nowhere.pt",
        "gen --ckpt {ae} -> stage", "gen --ae {bad}/other.pt -> other.pt not the autoencoder",
        "denoise -> --ckpt", "fid nowhere {images} -> nowhere", "spectrum --gamma 1000",
        "spectrum --encoder_source random", "gen --out {images}", "gen --out {images}/.. -> images",
        "gen --data {bad}/set --out {bad}/set/new", "similarity --image_size 225", "gen --token 3",
        "denoise --ckpt {run} --out {images}/a/0.png -> --out", "similarity --token 4",
        "similarity --image {bad}/good.png --out {bad}/good.png -> --out good.png",
        "curves nowhere -> nowhere", "curves x --seed 1", "fid x y --cfg 2", "fid x -> required: b",
        "gen --ckpt {bad} --every -> {bad} --keep_every",
        "spectrum --latents {bad}/flat.npy -> flat.npy: shape"],
    "common.data": [
        "pack --size 4", "pack --count 0", "pack --out x.tar", "pack --out {ae}/x.zip -> ckpt.pt",
        "pack --out {bad}/cut.zip -> cut.zip --overwrite", "pack --data nowhere",
        "pack --data {bad}/good.zip --out {bad}/good.zip --overwrite -> set itself"],
    "common.weights": ["export --ae {ae} --out {images} -> not empty"],
    "analysis.ideas": ["--plot x.png --size 60", "--plot x.png --image nowhere.png -> nowhere.png"],
}
ROWS = [f"{script} {row}" for script, rows in FLAGS.items() for row in rows]

# ---- files: {name: content, or what makes it at a path} ------------------------------------------
class Code:
    """An object whose unpickling creates the file `executed` in the working folder."""
    def __reduce__(self):
        return open, ("executed", "w")


def written(write):
    """The bytes that write(file) writes."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


encoded = lambda pixels, kind="PNG", **options: written(
    lambda file: Image.fromarray(pixels).save(file, kind, **options))
npz = lambda **arrays: written(lambda file: np.savez(file, **arrays))
saved = lambda state, **options: written(lambda file: torch.save(state, file, **options))
half = lambda content: content[:len(content) // 2]


def zipped(files, offset=0, form="", *values):
    """The bytes of a zip; its last central directory entry gets these values at this offset."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    raw = bytearray(file.getvalue())
    struct.pack_into(form, raw, raw.rfind(b"PK\x01\x02") + offset, *values)
    return bytes(raw)


Y, X = np.mgrid[:16, :16]
RGB = np.stack([40 + 8 * X, 30 + 9 * Y, 20 + 4 * X + 5 * Y], 2).astype(np.uint8)   # (16, 16, 3)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
PNG, BMP, EPS = encoded(RGB), encoded(RGB, "BMP"), encoded(RGB, "EPS")
IMAGES = {
    "empty.png": b"", "page.jpg": b"<!doctype html><title>404</title>",
    "cut.png": half(encoded(NOISE)), "cut.jpg": half(encoded(NOISE, "JPEG")),
    "bomb.bmp": BMP[:18] + struct.pack("<ii", 50_000, 50_000) + BMP[26:],
    "strip.png": encoded(np.zeros((10, 20_000), np.uint8)),
    "broken-link.png": lambda path: path.symlink_to("nowhere.png"),
    "pipe.png": os.mkfifo,                                 # reading one would block for ever
    "huge.png": lambda path: open(path, "wb").truncate(2 ** 40),
    "eps.png": EPS,                                        # PIL would hand it to Ghostscript
}
ROWS += [f"evaluate similarity --image {{bad}}/{name}" for name in IMAGES]

TWO = {"a.png": PNG, "b.png": PNG}
SETS = {
    "checksum.zip": zipped(TWO, 16, "<I", 1), "cut.zip": half(zipped(TWO)), "pipe.zip": os.mkfifo,
    "outside.zip": zipped({"../a.png": PNG, "b.png": PNG}), "empty.zip": b"PK\5\6" + bytes(18),
    "encrypted.zip": zipped(TWO, 8, "<HHHHI", 1, 8, 0, 0, 1),
    "deflate64.zip": zipped(TWO, 10, "<H", 9), "eps.zip": zipped({"a.png": EPS, "b.png": EPS}),
    "empty": pathlib.Path.mkdir, "texts/a.txt": b"", "x.tar": b"", "single/a.png": PNG,
    "beside/c/b.png": PNG, "beside/a.png": PNG, "pipes/a.png": os.mkfifo, "pipes/b.png": PNG,
    "twins/a.png": PNG, "twins/a.jpg": PNG,                # only their suffix differs
    "loop/a.png": PNG, "loop/b.png": PNG, "loop/in": lambda path: path.symlink_to(path.parent),
    "table/0/a.png": PNG, "table/1/b.png": PNG, "table/dataset.json": b'{"labels": [["0/a',
    "labels/0/a.png": PNG, "labels/1/b.png": PNG,
    "labels/dataset.json": b'{"labels": [["0/a.png", 1]]}',
    "deep/0/a.png": PNG, "deep/1/b.png": PNG, "deep/dataset.json": b"[" * 200_000,
    "piped/0/a.png": PNG, "piped/1/b.png": PNG, "piped/dataset.json": os.mkfifo,
    "bomb.zip": zipped(TWO | {"dataset.json": bytes(70 * 2 ** 20)}),
}
for name in dict.fromkeys(name.split("/")[0] for name in SETS):
    # pack takes a single image, and images beside folders, as they are
    command = "train_ae" if name in ("single", "beside") else "common.data pack"
    ROWS.append(f"{command} --data {{bad}}/{name}")

MOMENTS = dict(mu=np.zeros(3), sigma=np.eye(3))
STATISTICS = {
    "cut.npz": half(npz(**MOMENTS)), "names.npz": npz(mean=np.zeros(3), cov=np.eye(3)),
    "objects.npz": npz(mu=np.array([Code()] * 3), sigma=np.eye(3)),
    "nan.npz": npz(mu=np.full(3, np.nan), sigma=np.eye(3)),
    "channels-first.npz": npz(arr_0=np.zeros((4, 3, 16, 16), np.uint8)), "pipe.npz": os.mkfifo,
}
ROWS += [f"evaluate fid {{bad}}/good.npz {{bad}}/{name} -> {name}" for name in STATISTICS]
VGG = os.path.basename(VGG16_Weights.IMAGENET1K_V1.url)
INCEPTION = os.path.basename(URL_INCEPTION_V3)


def multiplied(state, factor):
    """A checkpoint with other weights."""
    return saved(state | {part: {name: factor * tensor for name, tensor in state[part].items()}
                          for part in state.keys() & {"model", "ema"}})


CHECKPOINTS = {                                            # fault: a good one's state -> bytes
    "empty": lambda state: b"", "cut": lambda state: half(saved(state)),
    "code": lambda state: saved(state | {"x": Code()}),
    "legacy": lambda state: saved(state | {"x": Code()}, _use_new_zipfile_serialization=False),
    "pickle": lambda state: pickle.dumps(Code(), protocol=2),
    "stage": lambda state: saved(state | {"stage": "painting"}),
    "nan": lambda state: multiplied(state, float("nan")),
}
ROWS += [f"train_diffusion --ae {{bad}}/ae-{fault} -> {fault}/ckpt.pt" for fault in CHECKPOINTS]
ROWS += [f"{command}-{fault} -> {fault}/ckpt.pt" for fault in ("code", "stage") for command in (
    "evaluate gen --ckpt {bad}/run", "train_ae --resume --steps 3 --out {bad}/ae",
    "train_diffusion --resume --steps 1 --out {bad}/run")]


CACHES = {                                                 # fault: change of a copy
    "cut": lambda cache: os.truncate(cache / "moments.npy", 1000),
    "cut-json": lambda cache: os.truncate(cache / "cache.json", 100),
    "deep": lambda cache: (cache / "cache.json").write_text("[" * 200_000),
    "piped": lambda cache: ((cache / "labels.npy").unlink(), os.mkfifo(cache / "labels.npy")),
    "code": lambda cache: np.save(cache / "labels.npy", np.array([Code()]), allow_pickle=True),
    "nan": lambda cache: np.save(cache / "moments.npy", np.nan * np.load(cache / "moments.npy")),
}
ROWS += [f"train_diffusion --cache {{bad}}/{name}-cache" for name in CACHES]

WEIGHTS = {                                                # as --ae
    "folder/ckpt.pt": os.mkfifo, "hub/refs/main": b"\xff\xfe",
    "bomb.pt": zipped({"a/data.pkl": bytes(70 * 2 ** 20)}, 24, "<I", 2 ** 32 - 2),
}
ROWS += [f"train_diffusion --ae {{bad}}/{name} -> {name}"
         for name in ("folder", "folder/ckpt.pt", "hub", "bomb.pt")]


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content(path) if callable(content) else path.write_bytes(content)


@pytest.fixture(scope="session")
def made(material, tmp_path_factory):
    """The paths in braces: images, a run of each stage, and bad, the folder of these files."""
    folder = tmp_path_factory.mktemp("made")
    paths = {name: folder / name for name in ("cache", "run", "bad")}
    paths |= dict(images=material / "images", ae=folder / "ckpt.pt")
    trained = torch.load(material / "ae" / "ckpt.pt", weights_only=True)
    torch.save({key: part for key, part in trained.items() if key != "optimizer"}, paths["ae"])
    run_main(train_diffusion, *f"{BASE['train_diffusion']} --out {{run}}".format(**paths).split())
    states = dict(ae=trained, run=torch.load(paths["run"] / "ckpt.pt", weights_only=True))
    files = {"good.npz": npz(**MOMENTS), "good.png": PNG, "set/a.png": PNG, "set/b.png": PNG,
        "good.zip": zipped(TWO), "flat.npy": written(lambda file: np.save(file, np.zeros((2, 3)))),
        "bin/gs": b"#!/bin/sh\ntouch executed\n", "other.pt": multiplied(trained, 2)}
    for name, content in (files | IMAGES | SETS | STATISTICS | WEIGHTS).items():
        put(paths["bad"] / name, content)
    (paths["bad"] / "bin" / "gs").chmod(0o755)
    for fault, change in CHECKPOINTS.items():
        for kind, state in states.items():
            put(paths["bad"] / f"{kind}-{fault}" / "ckpt.pt", change(state))
    for name, change in CACHES.items():
        change(shutil.copytree(paths["cache"], paths["bad"] / f"{name}-cache"))
    return paths


@pytest.fixture
def start(made, tmp_path, monkeypatch, offline):
    """start(command) runs it in an empty folder, offline; Ghostscript would leave a trace there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", str(made["bad"] / "bin"), prepend=":")

    def start(command):
        matching = (name for name in BASE if f"{command} ".startswith(f"{name} "))
        name = next(matching, command.split()[0])
        flags = f"{BASE.get(name, '').format(**made)} {command[len(name):]}".split()
        script, *words = name.split()
        monkeypatch.setattr(sys, "argv", [script, *words, *flags])
        runpy.run_module(script, run_name="__main__")
    return start


@pytest.fixture
def refused(start, made, capsys):
    """refused(row) holds if the command is refused as the head of this file says."""
    def times():
        paths = [*pathlib.Path().rglob("*"), *made["bad"].rglob("*")]
        return {path: path.lstat().st_mtime_ns for path in paths if not path.is_dir()}

    def refused(row):
        command, _, words = row.format(**made).partition(" -> ")
        words = words or "--" + command.rpartition("--")[2]
        before = times()
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            start(command)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count("\n") == 1, error
        assert [word for word in words.split() if word not in error] == [], error
        assert times() == before
    return refused


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_refused(row, refused):
    refused(row)


@pytest.mark.parametrize("row", [
    "train_ae --batch_size 4", "train_diffusion --batch_size 4",
    "train_diffusion --batch_size 6 -> --encode_batch 4", "evaluate spectrum -> torchrun"])
def test_three_processes_refuse_what_does_not_divide(row, refused, monkeypatch):
    """The global batch is shared evenly; figures are drawn by one process."""
    monkeypatch.setattr(run, "init_distributed", lambda device: (0, 3, torch.device("cpu")))
    monkeypatch.setattr(run, "get_world_size", lambda: 3, raising=False)
    refused(row)


@pytest.mark.parametrize("content", [
    b"<!doctype html><title>404</title>", half(saved({"a": torch.zeros(99)})),
    saved({"a": torch.zeros(99)})])
def test_downloaded_weights_that_are_none(content, refused, tmp_path):
    """In the place of VGG-16's and Inception's: the file's name, and the way out."""
    for name, command in ((VGG, "recon"), (INCEPTION, "fid {images} {images}")):
        put(tmp_path / "hub" / "checkpoints" / name, content)
        refused(f"evaluate {command} -> {name} remove the file")


def test_damaged_reference_statistics_are_refused(made, refused):
    """Those that evaluate gen keeps, before it samples."""
    identity = json.loads((made["cache"] / "cache.json").read_text())["images"]
    path = f"out/reference/{identity}-16.npz"
    put(pathlib.Path(path), half(npz(**MOMENTS)))
    refused(f"evaluate gen --out samples -> {path}")


def test_the_good_files_are_accepted(material, made, start):
    """So each row is refused for its own fault alone; and the code in them would have run."""
    shutil.copytree(material / "ae", "ae")
    shutil.copytree(made["run"], "run")
    for command in ("train_ae --resume --steps 3 --out ae", "common.data pack --data {bad}/set",
            "train_diffusion --resume --steps 1 --out run", "evaluate gen --out samples",
            "evaluate similarity --image {bad}/good.png"):
        start(command.format(**made))
    pickle.loads(pickle.dumps(Code()))
    os.remove("executed")
    with pytest.raises(OSError):                           # this Ghostscript draws nothing
        Image.open(io.BytesIO(EPS)).load()
    os.remove("executed")


def test_one_line_is_all_that_a_process_prints(made):
    """No warning and no traceback on the stderr of a real process either."""
    command = sys.executable, ROOT / "evaluate.py", "fid", "good.npz", "objects.npz"
    done = subprocess.run(command, cwd=made["bad"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("evaluate.py: objects.npz: ")
    assert done.stderr.count("\n") == 1 and not (made["bad"] / "executed").exists()


def test_a_zip_bomb_is_unpacked_no_further_than_it_declares(tmp_path):
    """20 MB of zeros that declare themselves as 100 bytes take none of the memory."""
    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"a.png": PNG, "b.png": bytes(20 * 2 ** 20)}, 24, "<I", 100))
    tracemalloc.start()
    bad = [bool(images[0][3]) for images in open_data(path, 16)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(bad) == [False, True] and peak < 2 ** 20


def test_nothing_is_unpickled():
    """torch.load reads weights only, and no array or object is unpickled, in any source."""
    paths = (*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("analysis/*.py"))
    source = "".join(path.read_text() for path in paths)
    assert not re.search(r"allow_pickle\s*=|pickle\.loads?\(|Unpickler\(", source)
    loads = re.findall(r"(?:torch\.load|load_state_dict_from_url)\([^#]*?\)\n", source)
    assert len(loads) >= 2 and all("weights_only=True" in load for load in loads)


def test_odd_image_files_load(tmp_path):
    """The first frame, white where it is transparent, whatever the file is called."""
    keyed = np.where(Y[..., None] < 8, RGB, np.uint8((9, 8, 7)))
    white_below = np.where(Y[..., None] < 8, RGB, 255)
    frames = dict(save_all=True, append_images=[Image.fromarray(255 - RGB)])
    files = {                                              # name: (content, 16 x 16 crop)
        "pages.tiff": (encoded(RGB, "TIFF", **frames), RGB),
        "colour-key.png": (encoded(keyed, transparency=(9, 8, 7)), white_below),
        "webp-called.jpg": (encoded(RGB, "WEBP", lossless=True), RGB),
        "1x1.png": (encoded(RGB[:1, :1]), RGB[:1, :1]),
        "new\nline {0} %s.PNG": (PNG, RGB),
        "caf\udce9.png": (PNG, RGB),                       # Latin-1 bytes, which are not UTF-8
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    for images in open_data(tmp_path, 16):
        for i in range(len(images)):
            pixels, _, _, bad = images[i]                  # (3, 16, 16)
            _, expected = files.pop(images.name(i))
            assert not bad and (pixels.permute(1, 2, 0).numpy() == expected).all()
    assert not files
