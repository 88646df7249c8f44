"""data.py and builtin.py: the stream, the crop, splits and classes, bad files, packing."""
import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from itertools import islice
from posixpath import splitext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

import train_ae
import train_diffusion
from common import data
from common.builtin import BuiltInImages
from common.data import open_data, pack, stream_entries, train_batches, val_batches
from conftest import pngs, run_main


def label(folder, tables):
    """Write dataset.json into folders below it, tables {place: {name: label} or None}."""
    for place, labels in tables.items():
        (folder / place).mkdir(exist_ok=True)
        text = json.dumps(dict(labels=labels and [*labels.items()]))
        (folder / place / "dataset.json").write_text(text)
    return folder


def names_of(image_set):
    return [image_set.name(i) for i in range(len(image_set))]


def sides(spec):
    """{name without suffix: 0 if it trains, 1 if it is held out}."""
    return {name[:-4]: k for k, part in enumerate(open_data(spec, 8)) for name in names_of(part)}


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """37 images, of which 2 are held out."""
    return pngs(tmp_path_factory.mktemp("flat"), [f"{i:03d}.png" for i in range(37)])


def make_corrupted(folder, k):
    """200 images, k of those that train cut off or HEIC; the indices of these."""
    train, _ = open_data(pngs(folder, [f"{i:03d}.png" for i in range(200)]), 8)
    bad = [10 + 7 * i for i in range(k)]
    for i in bad:
        path = folder / train.name(i)
        path.write_bytes(path.read_bytes()[:60] if i % 2 else b"\0\0\0 ftypheic")
    return bad


# ---- built-in images -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind, least, most", [("leaves", 1.7, 2.4), ("discs", 2.8, 4.2)])
def test_dead_leaves_have_the_power_law_of_photographs(kind, least, most, size=97):
    """The radial mean of DCT^2 falls like f^-alpha, from 3 cycles to Nyquist/2; of discs faster."""
    images = BuiltInImages(size, 24, kind=kind)
    images = np.stack([images[i][0].numpy() for i in range(24)]) / 127.5 - 1       # (24, 3, S, S)
    power = (dctn(images, axes=(2, 3), norm="ortho") ** 2).mean((0, 1))            # (S, S)
    u, v = np.mgrid[:size, :size]
    ring = (np.hypot(u, v) / 2).astype(int)                # index 2 of a DCT is one cycle
    profile = np.bincount(ring.ravel(), power.ravel()) / np.bincount(ring.ravel())
    cycles = np.arange(3, size // 4)
    alpha = -np.polyfit(np.log(cycles + 0.5), np.log(profile[cycles]), 1)[0]
    assert least < alpha < most


def test_a_built_in_image_depends_on_seed_and_index_only():
    """Image i is the same in a longer set and a second call; other indices and seeds differ."""
    a, label, index, faults = BuiltInImages(33, 5, seed=1)[3]
    assert a.shape == (3, 33, 33) and a.dtype == torch.uint8
    assert (label, index, faults) == (0, 3, "")
    assert torch.equal(a, BuiltInImages(33, 500, seed=1)[3][0])
    for seed, i in ((1, 4), (2, 3), (2, 2), (0, 4)):
        assert not torch.equal(a, BuiltInImages(33, 5, seed=seed)[i][0])
    none, leaves, discs = (open_data(spec, 16)[0] for spec in (None, "leaves", "discs"))
    assert torch.equal(none[0][0], leaves[0][0]) and not torch.equal(none[0][0], discs[0][0])
    assert torch.equal(data.spread(discs, 3)[0][0], discs[0][0])
    train, held_out = open_data(None, 16, val_images=20, builtin_images=60)
    images = {part[i][0].numpy().tobytes() for part in (train, held_out) for i in range(len(part))}
    assert len(images) == 80                               # none is in both


# ---- one image -----------------------------------------------------------------------------------
def test_center_crop_is_adms():
    """42x20 to 10: halved once with a box, then columns 5..14 of 21; commutes with transposing."""
    blocks = np.random.default_rng(0).integers(1, 60, (10, 21)) * 4
    checker = np.tile([[-1, 1], [1, -1]], (10, 21))
    pixels = np.kron(blocks, np.ones((2, 2), int)) + checker       # (20, 42), means of 2x2 = blocks
    image = Image.fromarray(pixels.astype(np.uint8))
    expected = blocks[:, 5:15]
    np.testing.assert_array_equal(np.asarray(data.center_crop(image, 10)), expected)
    image = image.transpose(Image.TRANSPOSE)
    np.testing.assert_array_equal(np.asarray(data.center_crop(image, 10)), expected.T)
    assert data.center_crop(Image.new("L", (31, 17)), 9).size == (9, 9)


def test_every_mode_becomes_rgb():
    """Grey, palette, CMYK, 16-bit, bilevel pixels keep their value; transparency becomes white."""
    ramp = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
    rgb = np.stack([ramp, 255 - ramp, ramp // 2], 2)       # (4, 13, 3)
    grey = np.stack([ramp] * 3, 2)
    cmyk = [Image.fromarray(p) for p in (255 - ramp, ramp, 255 - ramp // 2, 0 * ramp)]
    grey_alpha = np.dstack([ramp, np.full_like(ramp, 51)])
    for image, expected in [
        (Image.fromarray(rgb), rgb),
        (Image.fromarray(ramp), grey),
        (Image.fromarray(rgb).quantize(64), rgb),
        (Image.merge("CMYK", cmyk), rgb),
        (Image.fromarray(ramp.astype(np.uint16) * 257), grey),
        (Image.fromarray(ramp.astype(np.int32) * 257), grey),
        (Image.fromarray(ramp > 99), 255 * (grey > 99)),
        (Image.fromarray(np.dstack([rgb, np.full_like(ramp, 255)])), rgb),
        (Image.fromarray(np.dstack([rgb, np.zeros_like(ramp)])), np.full_like(rgb, 255)),
        (Image.fromarray(grey_alpha), 255 - (255 - grey.astype(int)) / 5),
    ]:
        out = data.to_rgb(image)
        assert out.mode == "RGB" and out.size == (13, 4), image.mode
        assert np.abs(np.asarray(out).astype(int) - expected).max() <= 1, image.mode
    with pytest.raises(ValueError, match="convert it"):
        data.to_rgb(Image.new("F", (4, 4)))


# ---- which images are held out -------------------------------------------------------------------
def test_one_image_less_moves_no_other(tmp_path):
    """Nor does a folder around the set, nor a smaller --val_images, nor a seed."""
    names = [f"{c}/{i}.png" for c in "ab" for i in range(100)]
    before = sides(pngs(tmp_path / "x.zip", names))
    assert 10 < sum(before.values()) < 32 and len(before) == 200
    names.remove("b/57.png")
    after = sides(pngs(tmp_path / "y.zip", [f"wrapper/{name}" for name in names]))
    assert len(after) == 199
    assert all(before[name.removeprefix("wrapper/")] == side for name, side in after.items())
    train, held_out = open_data(tmp_path / "x.zip", 8)
    train2, held_out2 = open_data(tmp_path / "x.zip", 8, val_images=3, seed=5)
    assert names_of(train2) == names_of(train) and names_of(held_out2) == names_of(held_out)[:3]


@pytest.mark.parametrize("n", [2, 11, 50_000, 65_000])
def test_how_many_images_are_held_out(n):
    """One at least; a tenth; of large sets some 5,000, and the same ones at 50,001 as at 90,000."""
    names = [f"{i:06d}.png" for i in range(n)]
    train, held_out = data._hold_out(names)
    assert sorted([*train, *held_out]) == [*range(n)] and len(train)
    expected = max(n / 10 if n <= 50_000 else 5000 * n / 2 ** 16, 1)
    assert abs(len(held_out) - expected) < 4 * expected ** 0.5
    if n > 50_000:
        more = data._hold_out([f"{i:06d}.png" for i in range(90_000)])[1]
        assert {*held_out} == {i for i in more if i < n}


@pytest.mark.parametrize("tops, held_out_top", [
    ("train test", "test"), ("train val test", "val"), ("Training Testing", "Testing"),
    ("TRAIN validation", "validation"), ("train2017 val2017", "val2017"), ("train valid", "valid"),
    ("training_set Test-Set(1)", "Test-Set(1)"), ("train dev others", "dev")])
@pytest.mark.parametrize("separator", "/\\")
def test_train_and_val_folders_are_the_splits(tmp_path, tops, held_out_top, separator):
    """In any case; of three, test is not read, nor what is neither. Windows' zips may hold \\."""
    names = [f"{top}/{c}/{i}.png" for top in tops.split() for c in "ab" for i in range(3)]
    path = pngs(tmp_path / "x.zip", [name.replace("/", separator) for name in names])
    train, held_out = open_data(path, 8, val_images=4)
    for part, top, count in (train, tops.split()[0], 6), (held_out, held_out_top, 4):
        assert {n.split("/")[0] for n in names_of(part)} == {top} and len(part) == count
        assert part.classes == ["a", "b"]


# ---- labels --------------------------------------------------------------------------------------
IMAGENET = [f"ILSVRC/Data/CLS-LOC/train/{c}/{c}_{i}.JPEG" for c in ("n02", "n01") for i in (0, 1)]
IMAGENET += [f"ILSVRC/Data/CLS-LOC/{split}/{i}.JPEG" for split in ("val", "test") for i in (0, 1)]
TRAIN = [f"train/{c}/{i}.png" for c in "cab" for i in (0, 1)]
SHARDS = [f"{i // 5:05d}/img{i:08d}.png" for i in range(11)]
LABELS = [3 * i % 7 for i in range(11)]
# classes are the folders below the one around all; hidden files are not looked at
WRAPPED = [f"set/{name}" for name in ("dog/0.png", "dog/deep/er/1.png", "ant/0.png", "ant/1.png")]
HIDDEN = ["__MACOSX/set/x.png", "set/.hidden.png", "set/.hidden/x.png"]


@pytest.mark.parametrize("names, tables, classes, labels", [
    (WRAPPED + HIDDEN, {}, ["ant", "dog"], [1, 1, 0, 0, None, None, None]),
    (IMAGENET, {}, ["n01", "n02"], [1, 1, 0, 0, -1, -1, None, None]),
    ([*TRAIN, "test/d/0.png", "test/c/0.png"], {}, [*"abc"], [2, 2, 0, 0, 1, 1, -1, -1]),
    ([*TRAIN, "test/b/0.png", "test/c/0.png"], {}, [*"abc"], [2, 2, 0, 0, 1, 1, 1, 2]),
    ([*TRAIN, "test/b/0.png", "test/b/1.png"], {}, [*"abc"], [2, 2, 0, 0, 1, 1, 1, 1]),
    (SHARDS, {"": dict(zip(SHARDS, LABELS))}, [*"0123456"], LABELS),
    ([f"images/{name}" for name in SHARDS],                # with a folder of latents beside them
     {"images": dict(zip(SHARDS, LABELS)), "vae-sd": None}, [*"0123456"], LABELS),
    (SHARDS, {"": None}, [], 11 * [0]),
    (["train/a.png", "val/b.png"], {}, [], [0, 0]),
    (SHARDS[:4], {"": {name: 2 for name in SHARDS}}, ["0", "1", "2"], 4 * [2]),  # one shard; spare
    (SHARDS, {"": {name.replace("/", "\\"): 1 for name in SHARDS}}, ["0", "1"], 11 * [1]),
    (["a/0.png", "1.png"], {"": {"a/0.png": 1, "1.png": 1}}, ["0", "1"], [1, 1]),
    (["train/0/a.png", "train/1/b.png", "val/0/c.png"],
     {"train": {"0/a.png": 1, "1/b.png": 1}, "val": {"0/c.png": 0}}, ["0", "1"], [1, 1, 0]),
    (["train/a.png", "val/b.png"], {"": {"train/a.png": 1, "val/b.png": 9}}, ["0", "1"], [1, -1]),
], ids=["wrapped", "imagenet", "unknown class", "fewer classes", "one class", "EDM", "REPA", "null",
        "no class", "one shard", "windows", "beside folders", "splits", "above splits"])
def test_where_labels_are_found(tmp_path, names, tables, classes, labels):
    """Held-out images have training classes, or all -1; of tables as EDM writes them; packed."""
    folder, packed = label(pngs(tmp_path / "set", names), tables), tmp_path / "x.zip"
    pack(folder, 8, packed)
    expected = {splitext(name)[0]: k for name, k in zip(names, labels) if k is not None}
    for sets in (open_data(folder, 8), open_data(packed, 8)):
        assert [part.classes for part in sets] == [classes, classes]
        found = [pair for part in sets for pair in zip(names_of(part), part.labels.tolist())]
        assert {splitext(name)[0]: k for name, k in found} == expected


# ---- what --data names ---------------------------------------------------------------------------
def test_cifar10_keeps_torchvisions_split_and_labels(monkeypatch):
    """train=True trains, train=False is held out; without a network one line says what to do."""
    class Fake:
        classes, url, targets = ["cat", "airplane"], "", [0, 1, 0, 1, 1, 1]

        def __init__(self, root, train=True, download=False):
            assert root == "data" and download == train
            shades = 100 * train + np.arange(6, dtype=np.uint8)
            self.data = np.tile(shades[:, None, None, None], (32, 32, 3))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    train, held_out = open_data("cifar10", 16)
    assert train.classes == ["airplane", "cat"]
    for part, shade in ((train, 100), (held_out, 0)):
        items = {int(part[i][0][0, 5, 7]) - shade: part[i][1] for i in range(6)}
        assert items == {0: 1, 1: 0, 2: 1, 3: 0, 4: 0, 5: 0}       # sorted: airplane 0, cat 1
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Mock(side_effect=OSError("no network")))
    with pytest.raises(ValueError, match="--data cifar10: no network; unpack .* into data/"):
        open_data("cifar10", 16)


@pytest.mark.parametrize("script, flags", [
    (train_ae, "--image_size 16 --val_images 4 --lpips_weight 0"),
    (train_diffusion, "--model SiT-tiny/4 --sample_steps 2 --encode_batch 8 --ae ae/ckpt.pt")])
def test_a_run_is_known_by_its_images(script, flags, material, tmp_path, monkeypatch):
    """It resumes on a moved copy of them, and refuses others under the old path."""
    flags = f"--preset quick --batch_size 4 --device cpu --out run {flags} --resume".split()
    train = lambda images, steps: run_main(script, *flags, "--data", images, "--steps", steps)
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    train("images", 1)
    shutil.copytree("images", "elsewhere")
    train("elsewhere/", 2)
    other = (tmp_path / "images/b/1.png").read_bytes()
    (tmp_path / "images/a/0.png").write_bytes(other + b"\0")               # both train
    with pytest.raises(ValueError, match="--resume: images"):
        train("images", 3)


# ---- the stream ----------------------------------------------------------------------------------
def test_every_epoch_holds_every_index_once():
    """Positions [e*n, (e+1)*n) are a permutation, new in each epoch, however the stream is cut."""
    n = 23
    indices, mirrored = stream_entries(n, 0, 5 * n, seed=3)
    epochs = indices.reshape(5, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all() and len({tuple(e) for e in epochs}) == 5
    for start_entry in range(0, 5 * n - 6, 7):
        part = slice(start_entry, start_entry + 7)
        found = stream_entries(n, part.start, part.stop, seed=3)
        np.testing.assert_array_equal(found, [indices[part], mirrored[part]])
    assert (stream_entries(n, 0, n, seed=4)[0] != epochs[0]).any()
    assert not stream_entries(n, 0, n, seed=3, mirror=False)[1].any()
    assert indices[:8].tolist() == [9, 17, 12, 18, 0, 15, 3, 20]           # as all published runs
    assert mirrored[:8].tolist() == [1, 1, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("batch_size, workers", [(12, 2), (60, 0)])
def test_ranks_and_workers_share_one_stream(flat, batch_size, workers):
    """Joined they are the images in -1..1, mirrored as stream_entries says, from any step on."""
    (train, _), before = open_data(flat, 8), torch.get_rng_state()
    for world in (1, 2, 3):
        streams = [train_batches(train, batch_size, start_step=2, seed=1, rank=r, world=world,
                                 workers=workers) for r in range(world)]
        for step, slices in enumerate(islice(zip(*streams), 3), 2):
            assert {len(part[0]) for part in slices} == {batch_size // world}
            images, labels, indices = (torch.cat(parts) for parts in zip(*slices))
            entries = stream_entries(len(train), step * batch_size, (step + 1) * batch_size, seed=1)
            assert indices.tolist() == entries[0].tolist()
            assert labels.dtype == indices.dtype == torch.int64 and images.dtype == torch.float32
            for image, i, mirrored in zip(images, *entries):
                expected = train[int(i)][0].float() / 127.5 - 1
                torch.testing.assert_close(image, expected.flip(-1) if mirrored else expected)
    assert torch.equal(torch.get_rng_state(), before)      # it draws the training noise


# ---- unreadable files ----------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_file_of_200_is_named_once_and_replaced(tmp_path, capfd, workers):
    """Its place goes to the next readable image, with that one's index; a validation omits it."""
    bad, = make_corrupted(tmp_path, 1)
    train, _ = open_data(tmp_path, 8)                      # 180 images
    batches = islice(train_batches(train, 20, workers=workers), 18)        # two epochs
    seen = torch.cat([indices for _, _, indices in batches])
    asked, _ = stream_entries(180, 0, 360)
    assert seen.tolist() == [bad + 1 if i == bad else i for i in asked]
    seen = torch.cat([indices for _, _, indices in val_batches(train, 20)])
    assert seen.tolist() == [i for i in range(180) if i != bad]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and f"{train.name(bad)!r}: not an image" in lines[0]


def test_more_than_one_percent_of_bad_files_stops(tmp_path):
    """5 of 200 end the run, files and the reason named."""
    bad = make_corrupted(tmp_path, 5)
    for make_batches in (train_batches, val_batches):
        train, _ = open_data(tmp_path, 8)
        with pytest.raises(ValueError, match="of 200 images") as error:
            list(islice(make_batches(train, 20), 9))
        message = str(error.value)
        assert any(f"{train.name(i)!r}: " in message for i in bad)
        assert "truncated" in message and "not an image" in message and "\n" not in message


def test_a_held_out_set_that_is_all_bad_stops(tmp_path):
    """Two bad files are less than 1% of the whole set here, but all there is to validate on."""
    pngs(tmp_path, [f"train/{i}.png" for i in range(400)])
    for path in pngs(tmp_path, ["test/a.png", "test/b.png"]).glob("test/*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 402 images"):
        list(val_batches(open_data(tmp_path, 8)[1], 4))


def test_a_killed_worker_is_one_line_where_the_next_batch_is_asked_for(flat):
    """And not in the middle of a step, from which nothing could be saved."""
    batches = train_batches(open_data(flat, 8)[0], 2, workers=1)
    next(batches)
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(1000):                                  # a signal's handler would raise here
        time.sleep(1e-4)
    with pytest.raises(ValueError, match="^--workers 1: "):
        [next(batches) for _ in range(20)]


# ---- packing -------------------------------------------------------------------------------------
def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*")}


def test_packing_changes_no_pixel_name_or_original(tmp_path):
    """Same splits, classes, labels, pixels; twice the same bytes; nothing else is left."""
    names = [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ba" for i in range(3)]
    folder, out = pngs(tmp_path / "set", names), tmp_path / "out" / "x.zip"
    before = contents(folder)
    assert pack(folder, 8, out, workers=2) == (12, 0)
    assert contents(folder) == before and [*contents(out.parent)] == [out]
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert {e.compress_type for e in archive.infolist()} == {zipfile.ZIP_STORED}
    for a, b in zip(open_data(folder, 8), open_data(out, 8)):
        assert [n.replace(".png", ".bmp") for n in names_of(a)] == names_of(b)
        assert a.classes == b.classes == ["a", "b"]
        for i in range(len(a)):
            assert torch.equal(a[i][0], b[i][0]) and a[i][1:] == b[i][1:]
    packed = contents(out.parent)
    pack(folder, 8, out, overwrite=True)
    assert contents(out.parent) == packed


@pytest.mark.parametrize("spec, kind", [("", "leaves"), ("leaves", "leaves"), ("discs", "discs")])
def test_packed_built_in_images_are_the_built_in_images(tmp_path, spec, kind):
    """Images 0 .. count-1."""
    assert pack(spec, 17, tmp_path / "x.zip", count=11) == (11, 0)
    train, _ = open_data(tmp_path / "x.zip", 17)
    for i in range(len(train)):
        expected = BuiltInImages(17, 11, kind=kind)[int(train.name(i)[:6])]
        assert torch.equal(train[i][0], expected[0])


def test_pack_leaves_bad_files_out_and_stops_past_one_percent(tmp_path, capfd):
    """1 of 200 is skipped and named; with two more nothing is written, an older zip stays."""
    folder, out = tmp_path / "set", tmp_path / "out"
    bad, = make_corrupted(folder, 1)
    name = open_data(folder, 8)[0].name(bad)
    assert pack(folder, 8, out / "x.zip") == (199, 1) and name in capfd.readouterr().err
    side = sides(folder)[name[:-4]]
    assert sides(out / "x.zip") | {name[:-4]: side} == sides(folder)
    packed = contents(out)
    for other in ("000.png", "199.png"):
        (folder / other).write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 200"):
        pack(folder, 8, out / "x.zip", overwrite=True)
    assert contents(out) == packed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_pack_that_is_stopped_leaves_nothing(flat, tmp_path, monkeypatch, handlers, number):
    """A cluster's signal, or a closed terminal's, removes what was written."""
    def stopped(dataset, *args, **options):
        yield next(val_batches(dataset, 8, device=None))
        assert list(tmp_path.glob(".x.zip.*"))
        os.kill(os.getpid(), number)
    monkeypatch.setattr(data, "val_batches", stopped)
    for default in (signal.SIGTERM, signal.SIGHUP):        # the suite may run under nohup
        signal.signal(default, signal.SIG_DFL)
    with pytest.raises(SystemExit, match=f"^{128 + number}$"):
        run_main(data, "pack", "--data", flat, "--out", tmp_path / "x.zip")
    assert not list(tmp_path.iterdir())
