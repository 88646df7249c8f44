"""
data.py and sources.py: the stream is a formula, the crop ADM's; what a set's names say of parts and
classes is understood or refused; bad files are counted, packing is lossless.
"""
import io
import json
import os
import zipfile
from itertools import islice
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from common import data
from common.builtin import BuiltInImages
from common.data import (
    center_crop,
    open_data,
    pack,
    spread,
    stream_entries,
    to_rgb,
    train_batches,
    val_batches,
)
from spectral import fit_power_law, power_spectrum, radial_profile


def picture(i, height=9, width=11):
    """(height, width, 3) uint8, different for every i and not its own mirror image."""
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_folder(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(root / name)
    return root


def make_zip(path, names, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for i, name in enumerate(names):
            file = io.BytesIO()
            Image.fromarray(picture(i)).save(file, "PNG")
            archive.writestr(name, file.getvalue())
    return path


def names_of(image_set):
    return [image_set.name(i) for i in range(len(image_set))]


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("flat"), [f"{i:03d}.png" for i in range(37)])


@pytest.fixture
def corrupted(tmp_path):
    """
    Function: a folder of 200 images, k of the training set cut off, the first of them its number
    10; (folder, their names).
    """
    def make(k):
        make_folder(tmp_path, [f"{i:03d}.png" for i in range(200)])
        names = np.roll(names_of(open_data(tmp_path, 8)[0]), -10)
        bad = names[::7 if k < 20 else 1][:k].tolist()  # apart from each other, or all 180
        for name in bad:
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
        return tmp_path, bad
    return make

# ---- built-in pictures ---------------------------------------------------------------------------

@pytest.mark.parametrize("size", [64, 97])
def test_dead_leaves_have_the_power_law_of_photographs(size):
    """The radial mean of DCT^2 falls like f^-alpha, alpha near 2, from 3 cycles to Nyquist/2."""
    leaves = BuiltInImages(size, 24)
    images = np.stack([leaves[i][0].numpy() for i in range(24)]) / 127.5 - 1  # (24, 3, S, S)
    power = (dctn(images, axes=(2, 3), norm="ortho") ** 2).mean((0, 1))  # (S, S)
    u, v = np.mgrid[:size, :size]
    ring = (np.hypot(u, v) / 2).astype(int)  # index 2 of a DCT is one cycle
    profile = np.bincount(ring.ravel(), power.ravel()) / np.bincount(ring.ravel())
    cycles = np.arange(3, size // 4)
    alpha = -np.polyfit(np.log(cycles + 0.5), np.log(profile[cycles]), 1)[0]
    assert 1.7 < alpha < 2.4


@pytest.mark.parametrize("size", [32, 64])
def test_discs_are_few_and_large_at_every_size(size):
    """A steeper spectrum than the leaves', a plain ground, and the same share of it at any side."""
    _, discs = open_data("discs", size, val_images=40)
    _, leaves = open_data("leaves", size, val_images=40)

    def alpha(pictures):
        images = torch.stack([pictures[i][0] for i in range(40)]) / 127.5 - 1
        return fit_power_law(radial_profile(power_spectrum(images)).mean(0)).item()
    assert 2.8 < alpha(discs) < 3.6 and alpha(leaves) < alpha(discs) - 0.5


def test_the_built_in_sets_have_names():
    """No name is leaves, as before; spread keeps the set; a set packs under its name."""
    first = [open_data(spec, 16)[0][0][0] for spec in (None, "leaves", "discs")]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert torch.equal(spread(open_data("discs", 16)[0], 3)[0][0], first[2])


def test_a_built_in_picture_depends_on_seed_and_index_only():
    """Picture i is the same in a longer set and a second call; other indices and seeds differ."""
    a, label, index, bad = BuiltInImages(33, 5, seed=1)[3]
    assert a.shape == (3, 33, 33) and a.dtype == torch.uint8
    assert (label, index, bad) == (0, 3, False)
    assert torch.equal(a, BuiltInImages(33, 500, seed=1)[3][0])
    for seed, i in ((1, 4), (2, 3), (2, 2), (0, 4)):
        assert not torch.equal(a, BuiltInImages(33, 5, seed=seed)[i][0])


def test_built_in_held_out_pictures_are_no_training_pictures():
    """The held-out indices lie beyond the training ones, whatever the sizes of the two sets."""
    train, held_out = open_data(None, 16, val_images=20, builtin_images=60)
    seen = {train[i][0].numpy().tobytes() for i in range(60)}
    assert (len(train), len(held_out), len(seen)) == (60, 20, 60)
    assert not seen & {held_out[i][0].numpy().tobytes() for i in range(20)}


@pytest.mark.parametrize("size", [8, 16, 512])
def test_every_pixel_of_a_built_in_picture_is_painted_at_every_size(size):
    """Leaves above and the background below leave no hole (0, 0, 0), and no picture is plain."""
    image = BuiltInImages(size, 1)[0][0].float()
    assert image.amax(0).min() > 0 and image.std() > 10

# ---- one picture ---------------------------------------------------------------------------------

def test_center_crop_is_adms():
    """42x20 to 10: halved once with a box, then columns 5..14 of 21; commutes with transposing."""
    blocks = np.random.default_rng(0).integers(1, 60, (10, 21)) * 4
    checker = np.tile([[-1, 1], [1, -1]], (10, 21))
    pixels = np.kron(blocks, np.ones((2, 2), int)) + checker  # (20, 42), means of 2x2 = blocks
    image = Image.fromarray(pixels.astype(np.uint8))
    expected = blocks[:, 5:15]
    np.testing.assert_array_equal(np.asarray(center_crop(image, 10)), expected)
    image = image.transpose(Image.TRANSPOSE)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 10)), expected.T)


@pytest.mark.parametrize("width, height, size",
                         [(19, 50, 20), (5, 3, 16), (31, 17, 9), (16, 16, 16)])
def test_center_crop_keeps_a_constant_and_the_centre(width, height, size):
    """Any shape becomes size x size; a half-turn symmetric picture stays so, a constant one too."""
    half = np.random.default_rng(0).integers(60, 200, (height, width)).astype(float)
    pixels = ((half + half[::-1, ::-1]) / 2).astype(np.uint8)
    out = np.asarray(center_crop(Image.fromarray(pixels), size)).astype(int)
    assert out.shape == (size, size)
    if (width - height) % 2 == 0 and width % 2 == 0:  # else the centre lies between pixels
        assert abs(out - out[::-1, ::-1]).max() <= 1
    assert (np.asarray(center_crop(Image.new("L", (width, height), 77), size)) == 77).all()


def test_every_mode_becomes_rgb():
    """Grey, palette, CMYK, 16-bit, bilevel pixels keep their value; transparency becomes white."""
    ramp = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
    rgb = np.stack([ramp, 255 - ramp, ramp // 2], 2)  # (4, 13, 3)
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
        out = to_rgb(image)
        assert out.mode == "RGB" and out.size == (13, 4), image.mode
        assert np.abs(np.asarray(out).astype(int) - expected).max() <= 1, image.mode
    with pytest.raises(ValueError, match="range"):
        to_rgb(Image.new("F", (4, 4)))


def test_16_bit_grey_survives_the_png_round_trip(tmp_path):
    """A 16-bit PNG is scaled by 255/65535, not clipped to white."""
    Image.fromarray(np.full((9, 11), 128 * 257, np.uint16)).save(tmp_path / "a.png")
    Image.new("L", (9, 9)).save(tmp_path / "b.png")
    train, held_out = open_data(tmp_path, 8)
    assert {train[0][0].max().item(), held_out[0][0].max().item()} == {0, 128}


def test_exif_orientation_is_applied():
    """Orientation 6 (camera turned): the stored 4x13 picture is shown clockwise by 90 degrees."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(0, 4, 13)).save(file, "PNG", exif=exif)
    out = np.asarray(to_rgb(Image.open(file)))
    np.testing.assert_array_equal(out, np.rot90(picture(0, 4, 13), -1))

# ---- what --data names ---------------------------------------------------------------------------

def test_held_out_pictures_are_never_trained_on(flat):
    """
    Train and held-out names are disjoint; fewer val_images is a prefix of more and moves nothing
    into the training set.
    """
    train, held_out = open_data(flat, 8)
    assert (len(train), len(held_out)) == (34, 3)
    assert sorted(names_of(train) + names_of(held_out)) == sorted(p.name for p in flat.iterdir())
    train2, held_out2 = open_data(flat, 8, val_images=1, seed=5)
    assert names_of(train2) == names_of(train) and names_of(held_out2) == names_of(held_out)[:1]
    assert len(open_data(flat, 8, val_images=0)[1]) == 0


def test_classes_are_the_sorted_folders(tmp_path):
    """
    label = index of the sorted first folder; deeper ones count with it; a zip of it, even with a
    wrapper, reads the same.
    """
    names = [f"{c}/{sub}{i}.png"
             for c in ("dog", "ant", "cat") for sub in ("", "deep/er/") for i in range(4)]
    folder = make_folder(tmp_path / "set", names)
    hidden = ["__MACOSX/wrapper/x.png", "wrapper/.hid.png"]
    archive = make_zip(tmp_path / "set.zip", ["wrapper/" + n for n in names] + hidden)
    for spec in (folder, archive):
        for image_set in open_data(spec, 8):
            assert image_set.classes == ["ant", "cat", "dog"]
            for i in range(len(image_set)):
                image, label, index, bad = image_set[i]
                name = image_set.name(i).removeprefix("wrapper/")
                assert image_set.classes[label] == name.split("/")[0] and index == i and not bad
                expected = np.asarray(center_crop(Image.fromarray(picture(names.index(name))), 8))
                np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


@pytest.mark.parametrize("tops, held_out_top", [
    (["train", "test"], "test"), (["train", "val"], "val"), (["train", "val", "test"], "val"),
])
@pytest.mark.parametrize("inside", ["", "a/", "b/c/"])
def test_train_and_val_folders_are_the_splits(tmp_path, tops, held_out_top, inside):
    """train plus test or val at the top are splits, not classes; of all three, test is not read."""
    names = [f"{top}/{inside}{i}.png" for top in tops for i in range(5)]
    if inside:
        names += [f"{top}/z/{i}.png" for top in tops for i in range(2)]
    archive = make_zip(tmp_path / "x.zip", names)
    train, held_out = open_data(archive, 8, val_images=4)
    assert {n.split("/")[0] for n in names_of(train)} == {"train"}
    assert len(train) == (7 if inside else 5)
    assert {n.split("/")[0] for n in names_of(held_out)} == {held_out_top} and len(held_out) == 4
    assert train.classes == held_out.classes == ([inside.split("/")[0], "z"] if inside else [])


@pytest.mark.parametrize("spec, size, words", [
    ("missing", 8, "no such folder"), ("empty", 8, "no images"), ("only_text", 8, "no images"),
    ("one", 8, "single image"), ("mixed", 8, "images beside class"), ("flat", 7, "size >= 8"),
    ("x.tar", 8, "neither a folder nor a .zip"), ("fake.zip", 8, "not a readable zip"),
    ("text.zip", 8, "no images"), ("up.zip", 8, "unsafe name '../a.png'"),
    ("absolute.zip", 8, "unsafe name '/a.png'"), ("bzip.zip", 8, "neither stored nor deflated"),
    ("cifar10", 8, "no route; unpack http://host/cifar.tar.gz into data/"),
])
def test_bad_input_gets_one_line(tmp_path, monkeypatch, spec, size, words):
    """Every user error is one line with the flag and its value first, and says what is wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_text").mkdir()
    (tmp_path / "only_text" / "labels.csv").write_text("a,b")
    make_folder(tmp_path / "mixed", ["a.png", "b.png", "c/d.png"])
    make_folder(tmp_path / "one", ["a.png"])
    make_folder(tmp_path / "flat", ["a.png", "b.png"])
    (tmp_path / "x.tar").write_bytes(b"")
    (tmp_path / "fake.zip").write_bytes(b"not a zip")
    make_zip(tmp_path / "text.zip", ["labels.csv", ".a.png", "__MACOSX/._b.png"])
    make_zip(tmp_path / "up.zip", ["../a.png", "b.png"])
    make_zip(tmp_path / "absolute.zip", ["/a.png", "b.png"])
    make_zip(tmp_path / "bzip.zip", ["a.png", "b.png"], zipfile.ZIP_BZIP2)

    class Unreachable:
        url = "http://host/cifar.tar.gz"

        def __init__(self, *args, **kwargs):
            raise URLError("no route")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Unreachable)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_data(spec, size)
    message = str(error.value).replace("<urlopen error no route>", "no route")
    assert message.startswith(f"--data {spec}:") and words in message and "\n" not in message


def test_cifar10_keeps_torchvisions_split_and_labels(monkeypatch):
    """
    train=True is the training set, train=False the held-out one; only the first construction may
    download.
    """
    asked = []

    class Fake:
        classes, url = ["cat", "airplane"], ""

        def __init__(self, root, train=True, download=False):
            asked.append((root, download))
            shades = np.arange(6, dtype=np.uint8)[:, None, None, None]
            self.data = np.full((6, 32, 32, 3), 100 * train, np.uint8) + shades
            self.targets = [0, 1, 0, 1, 1, 1]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    train, held_out = open_data("cifar10", 16)
    assert asked == [("data", True), ("data", False), ("data", False)]
    assert train.classes == ["airplane", "cat"]
    for image_set, offset in ((train, 100), (held_out, 0)):
        items = {int(image_set[i][0][0, 5, 7]) - offset: image_set[i][1] for i in range(6)}
        assert items == {0: 1, 1: 0, 2: 1, 3: 0, 4: 0, 5: 0}  # sorted names: airplane 0, cat 1

# ---- parts of a set, labels ----------------------------------------------------------------------

def labelled(image_set):
    """{name: class}, or label where there are no classes."""
    classes = image_set.classes or [0]
    return {image_set.name(i): classes[image_set.labels[i]] for i in range(len(image_set))}


def refusal(call, *arguments):
    """The single line with which a call is refused, begun by `--data SPEC: `, without that."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    head, _, message = str(error.value).partition(": ")
    assert head == f"--data {arguments[0]}" and "\n" not in message
    return message


@pytest.mark.parametrize("train_name, held_out_name", [
    ("train", "validation"), ("train", "valid"), ("train", "dev"), ("train", "Val"),
    ("train2017", "val2017"), ("training_set", "test_set"), ("Training", "Test"),
    ("train-images", "eval"), ("trainval", "test"), ("TRAIN 256", "Validation Set (1)"),
])
@pytest.mark.parametrize("deeper", ["", "training_set/"])
def test_parts_are_understood_by_their_usual_names(tmp_path, train_name, held_out_name, deeper):
    """Classes are those inside the training part, be it nested once more; the other is held out."""
    names = [f"{part}/{deeper}{c}/{i}.png"
             for part in (train_name, held_out_name) for c in ("b", "a") for i in range(2)]
    for image_set, part in zip(open_data(make_zip(tmp_path / "x.zip", names), 8),
                               (train_name, held_out_name)):
        assert image_set.classes == ["a", "b"] and len(image_set) == 4
        for name, label in labelled(image_set).items():
            assert name.split("/")[0] == part and name.split("/")[-2] == label


TINY_IMAGENET = [f"tiny-imagenet-200/train/{c}/images/{c}_{i}.JPEG"
                 for c in ("n02", "n01") for i in range(3)]
TINY_IMAGENET += [f"tiny-imagenet-200/{part}/images/{i}.JPEG"
                  for part in ("val", "test") for i in range(4)]
IMAGENET = [f"ILSVRC/Data/CLS-LOC/train/{c}/{c}_{i}.JPEG" for c in ("n02", "n01") for i in range(3)]
IMAGENET += [f"ILSVRC/Data/CLS-LOC/{part}/{i}.JPEG" for part in ("val", "test") for i in range(4)]
# a class more than in the training part
DEFECTS = [f"train/{c}/{i}.png" for c in ("n02", "n01") for i in range(3)]
DEFECTS += [f"test/{c}/{i}.png" for c in ("n01", "n03") for i in range(2)]


@pytest.mark.parametrize("names, part, beside", [
    (TINY_IMAGENET, "val", ["wnids.txt", "val/val_annotations.txt", "train/n01/boxes.txt"]),
    (IMAGENET, "val", ["../../Annotations/CLS-LOC/val/0.xml", "../../ImageSets/CLS-LOC/val.txt"]),
    (DEFECTS, "test", []),
], ids=["tiny-imagenet", "imagenet", "defects"])
def test_a_held_out_part_without_the_classes_has_no_labels(tmp_path, names, part, beside):
    """As ImageNet is downloaded: the training part gives the classes, labels outside it are 0."""
    folder = make_folder(tmp_path, names)
    for name in beside:
        path = folder / names[0].partition("train")[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    train, held_out = open_data(folder, 8)
    assert train.classes == ["n01", "n02"] and len(train) == 6
    assert all(f"train/{label}/" in name for name, label in labelled(train).items())
    assert all(f"{part}/" in name for name in names_of(held_out)) and len(held_out) == 4
    assert not held_out.labels.any()


REFUSED_TOPS = [                           # names of pictures, words of the refusal
    ("train/{} holdout/{}", "'holdout' is no known part"),
    ("train/{} val/{} unlabeled/{}", "with 'train' at the top, 'unlabeled' is no known part"),
    ("trainA/{} trainB/{} testA/{} testB/{}", "with 'trainA', 'trainB' at the top, 'testA'"),
    ("DIV2K_train_HR/{} DIV2K_valid_HR/{}", "with 'DIV2K_train_HR' at the top"),
    ("bus/{} car/{} train/{}", "'bus' is no known part"),
    ("train2014/{} train2017/{} val2014/{}", "'train2014' and 'train2017' are the same part"),
    ("train/{} val/{} dev/{}", "'dev' and 'val' are the same part"),
    ("train/{} test1/{} test2/{}", "'test1' and 'test2' are the same part"),
    ("test/{} val/{}", "with 'test', 'val' at the top, none of them is a training part"),
    ("images/training/{} images/validation/{} annotations/training/{}",
        "'images/validation' are parts of a set inside"),
    ("bottle/train/good/{} bottle/test/{} cable/train/good/{} cable/test/{}", "are parts of a set"),
    ("train/a/{} train/{} val/{}", "images beside class folders (train/0.png and train/a/0.png)"),
    ("train/{} val/{} {}", "images beside class folders"),
]


@pytest.mark.parametrize("names, words", REFUSED_TOPS)
def test_parts_that_are_not_understood_are_refused_by_name(tmp_path, names, words):
    """They become no classes; nor does `pack` write a set that no training script would open."""
    names = [name.format(f"{i}.png") for name in names.split() for i in range(2)]
    archive = make_zip(tmp_path / "x.zip", names)
    assert words in refusal(open_data, archive, 8)
    assert words in refusal(pack, archive, 8, tmp_path / "y.zip")
    assert os.listdir(tmp_path) == ["x.zip"]


@pytest.mark.parametrize("classes", [
    "sandals strainer trainers", "a b bullet_train c d e f g h i train_station", "a b test",
    "train airplane automobile bird cat deer dog frog horse ship truck",
])
def test_a_class_may_remind_of_a_train(tmp_path, classes):
    """Trainers are shoes; where there are many folders, a train is a vehicle."""
    classes = sorted(classes.split())
    names = [f"{c}/{i}.png" for c in classes for i in range(2)]
    assert open_data(make_zip(tmp_path / "x.zip", names), 8)[0].classes == classes


def with_labels(folder, names, labels, place="dataset.json"):
    """A folder of these pictures with a dataset.json; labels: its text, or {name: class}."""
    make_folder(folder, names)
    text = labels if isinstance(labels, str) else json.dumps(dict(labels=[*labels.items()]))
    (folder / place).write_text(text)
    return folder


def as_zip(folder):
    """The same files in a zip beside the folder."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


SHARDED = [f"{i // 5:05d}/img{i:08d}.png" for i in range(11)]
LABELS = {name: 3 * i % 7 for i, name in enumerate(SHARDED)}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("inside", ["", "images/"])
def test_labels_come_from_dataset_json(tmp_path, capsys, inside, kind):
    """As StyleGAN, EDM and, beside its latents, REPA prepare their sets: folders are shards."""
    names = [inside + name for name in SHARDED]
    folder = with_labels(tmp_path / "set", names, LABELS, f"{inside}dataset.json")
    if inside:
        (folder / "vae-sd" / "00000").mkdir(parents=True)
        (folder / "vae-sd" / "00000" / "img-mean-std-00000000.npy").touch()
        (folder / "vae-sd" / "dataset.json").write_text("{}")
    for image_set in open_data(as_zip(folder) if kind == "zip" else folder, 8):
        assert image_set.classes == ["0", "1", "2", "3", "4", "5", "6"]
        for i in range(len(image_set)):
            assert image_set[i][1] == LABELS[image_set.name(i).removeprefix(inside)]
    assert "shards" not in capsys.readouterr().err


@pytest.mark.parametrize("names, tables, classes, labels", [
    (SHARDED, {"": '{"labels": null}'}, [], [0]),
    (SHARDED[:4], {"": {name: 2 for name in SHARDED}}, ["0", "1", "2"], [2]),  # one shard; spare
    (SHARDED, {"": {name.replace("/", "\\"): 1 for name in SHARDED}}, ["0", "1"], [1]),
    (["a/0.png", "1.png"], {"": {"a/0.png": 1, "1.png": 1}}, ["0", "1"], [1]),
    (["train/0/a.png", "train/1/b.png", "val/0/c.png"], {"train/": {"0/a.png": 1, "1/b.png": 1},
        "val/": {"0/c.png": 0}}, ["0", "1"], [1]),
    (["train/a.png", "val/b.png"], {"": {"train/a.png": 1, "val/b.png": 9}}, ["0", "1"], [1]),
], ids=["null", "one-shard", "windows", "beside-folders", "parts", "above-parts"])
def test_where_and_how_dataset_json_is_found(tmp_path, names, tables, classes, labels):
    """Null is unlabelled; names count from its own folder, which lies around the pictures."""
    folder = make_folder(tmp_path / "set", names)
    for place, table in tables.items():
        with_labels(folder, [], table, f"{place}dataset.json")
    train, held_out = open_data(folder, 8)
    assert train.classes == held_out.classes == classes and set(train.labels) == set(labels)
    if "val/b.png" in names or "val/0/c.png" in names:
        assert held_out.labels.tolist() == [0]


@pytest.mark.parametrize("table, words", [
    ({name: 0 for name in SHARDED[1:]}, "no label for 1 of 11 images, beginning with "
        "'00000/img00000000.png'"),
    ('{"labels": [["00000/img', "neither"), ("{}", "neither"), ("[]", "neither"), ("", "neither"),
    ('{"labels": 3}', "neither"), ('{"labels": [[1, 2]]}', "neither"),
    ({name: -1 for name in SHARDED}, "-1 is no class number"),
    ({name: "cat" for name in SHARDED}, "'cat' is no class number"),
    ({name: [0.1, 0.2] for name in SHARDED}, "[0.1, 0.2] is no class number"),
    ({name: True for name in SHARDED}, "True is no class number"),
    ({name: 10 ** 9 for name in SHARDED}, "1000000000 is no class number"),
])
def test_a_dataset_json_that_does_not_fit_is_refused(tmp_path, table, words):
    """Nothing is guessed from the shards instead; pack says so, too, and writes nothing."""
    folder = with_labels(tmp_path / "set", SHARDED, table)
    message = refusal(open_data, folder, 8)
    assert message.startswith("dataset.json") and words in message
    assert refusal(pack, as_zip(folder), 8, tmp_path / "y.zip") == message
    assert not (tmp_path / "y.zip").exists()


@pytest.mark.parametrize("names, said", [
    ([f"{k:05d}/{i}.png" for k in range(3) for i in range(4)], "the folders 00000 .. 00002 have"),
    ([f"train/{k}/{i}.png" for k in (3, 7) for i in range(4)] + ["val/0.png"], "3 .. 7 have"),
    (["8/a.png", "9/b.png", "10/c.png"], ""),
    (["a/0.png", "b/1.png"], ""), (["0.png", "1.png"], ""),
])
def test_numbered_folders_are_said_to_be_classes(tmp_path, capsys, names, said):
    """For they may be shards whose dataset.json was lost. One line on stderr."""
    folder = make_folder(tmp_path / "set", names)
    open_data(folder, 8)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == bool(said)
    assert not said or error.startswith(f"--data {folder}: ") and "taken as classes" in error


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_is_left_out_is_counted_in_one_line(tmp_path, capsys, monkeypatch, kind):
    """Empty class folders and files that no picture's name ends like; hidden ones do not count."""
    folder = make_folder(tmp_path / "set", ["a/0.png", "b/1.png"])
    for name in ("a/2", "a/.DS_Store", "b/3.HEIC", "b/4.heic", "notes.txt"):
        (folder / name).write_bytes(b"")
    for name in ("c", "d/e", "__MACOSX/x", ".cache"):
        (folder / name).mkdir(parents=True)
    spec = folder
    if kind == "zip":
        spec = tmp_path / "set.zip"
        with zipfile.ZipFile(spec, "w") as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder).as_posix())
    assert open_data(spec, 8)[0].classes == ["a", "b"]
    line = capsys.readouterr().err
    assert line == (f"--data {spec}: left out: 4 file(s) that are no pictures by name (2 '.heic', "
                    "1 '.txt', 1 without a suffix) and 2 folder(s) without a picture ('c', 'd')\n")
    monkeypatch.setenv("RANK", "1")
    open_data(spec, 8)
    assert capsys.readouterr().err == ""   # once for all processes


def test_jpegs_of_any_suffix_are_pictures(tmp_path):
    """.jfif and .jpe, as browsers and old programs write them."""
    for i, suffix in enumerate((".jfif", ".JPE", ".jpg")):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}{suffix}", "JPEG")
    assert sum(map(len, open_data(tmp_path, 8))) == 3


# ---- zips that Windows made ----------------------------------------------------------------------

WINDOWS = [f"set\\{part}\\{c}\\{i}.png"
           for part in ("train", "val") for c in ("b", "a") for i in range(2)]


def test_backslashes_in_a_zip_separate_folders(tmp_path):
    """Split, classes and pictures are those of the same zip with slashes."""
    backward = make_zip(tmp_path / "b.zip", [*WINDOWS, "__MACOSX\\set\\x.png"])
    forward = make_zip(tmp_path / "f.zip", [name.replace("\\", "/") for name in WINDOWS])
    for a, b in zip(open_data(backward, 8), open_data(forward, 8)):
        assert names_of(a) == names_of(b) and len(a) == 4 and a.classes == ["a", "b"]
        assert a.labels.tolist() == b.labels.tolist()
        assert all(torch.equal(a[i][0], b[i][0]) for i in range(4))


def test_a_backslash_may_be_a_letter(tmp_path):
    """Elsewhere than on Windows it is one; by its own word a zip is from there, or from here."""
    names = ["a\\0.png", "b/1.png", "b/2.png"]
    path = make_zip(tmp_path / "x.zip", names)
    assert "images beside class folders" in refusal(open_data, path, 8)
    made_on_unix, made_on_windows = b"\x14\x03\x14\x00", b"\x14\x00\x14\x00"
    raw = path.read_bytes()
    assert raw.count(made_on_unix) == 3
    path.write_bytes(raw.replace(made_on_unix, made_on_windows))
    assert open_data(path, 8)[0].classes == ["a", "b"]


@pytest.mark.parametrize("name", ["..\\a.png", "\\a\\b.png", "C:\\a\\b.png", "a\\..\\..\\b.png"])
def test_unsafe_names_with_backslashes_are_refused(tmp_path, name):
    """Though nothing is ever extracted."""
    path = make_zip(tmp_path / "x.zip", [name, "c\\d.png"])
    assert f"unsafe name {name!r}" in refusal(open_data, path, 8)


def test_a_folder_of_names_with_backslashes_is_refused(tmp_path):
    """A tool that unpacks such a zip without understanding it leaves a flat folder."""
    assert "give the zip itself" in refusal(open_data, make_folder(tmp_path, WINDOWS), 8)

# ---- the stream ----------------------------------------------------------------------------------

def test_every_epoch_holds_every_index_once():
    """Positions [e*n, (e+1)*n) are a permutation, new in each epoch, however the stream is cut."""
    n = 23
    indices, mirrored = stream_entries(n, 0, 5 * n, seed=3)
    epochs = indices.reshape(5, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all() and len({tuple(e) for e in epochs}) == 5
    cut = [stream_entries(n, s, s + 7, seed=3) for s in range(0, 5 * n - 6, 7)]
    np.testing.assert_array_equal(np.concatenate([c[0] for c in cut]), indices[:len(cut) * 7])
    np.testing.assert_array_equal(np.concatenate([c[1] for c in cut]), mirrored[:len(cut) * 7])
    assert (stream_entries(n, 0, n, seed=4)[0] != epochs[0]).any()


def test_half_of_the_entries_are_mirrored():
    """
    The coin is fair, and thrown anew in each epoch: over 40 epochs an index is mirrored as often as
    40 coins fall.
    """
    n, epochs = 500, 40
    indices, mirrored = stream_entries(n, 0, n * epochs)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(n * epochs)
    per_index = np.bincount(indices, mirrored) / epochs
    assert abs(per_index.std() - 0.5 / np.sqrt(epochs)) < 0.02


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [12, 60])
def test_ranks_and_workers_share_one_stream(flat, batch_size, workers):
    """
    The ranks' slices put together are the single process's batch, in order; also where the batch is
    larger than the set.
    """
    train, _ = open_data(flat, 8)
    steps = 4
    whole = list(islice(train_batches(train, batch_size, seed=1), steps))
    for world in (2, 3):
        streams = [train_batches(train, batch_size, seed=1, rank=r, world=world, workers=workers)
                   for r in range(world)]
        shares = [list(islice(stream, steps)) for stream in streams]
        for step in range(steps):
            for k in range(3):                                         # images, labels, indices
                assert torch.equal(torch.cat([share[step][k] for share in shares]), whole[step][k])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_never_stopping(flat, workers):
    """The stream from step 5 is what the stream from step 0 gives from step 5 on."""
    train, _ = open_data(flat, 8)
    whole = list(islice(train_batches(train, 10), 9))
    for a, b in zip(whole[5:], islice(train_batches(train, 10, start_step=5, workers=workers), 4)):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_batches_are_the_pictures_mirrored_as_stream_entries_says(flat):
    """0..255 becomes -1..1; pictures are flipped left to right exactly where `mirrored` says so."""
    train, _ = open_data(flat, 8)
    batches = train_batches(train, 8, seed=2, rank=1, world=2)
    for step, (images, labels, indices) in enumerate(islice(batches, 12)):
        expected, mirrored = stream_entries(len(train), step * 8 + 4, step * 8 + 8, seed=2)
        assert indices.tolist() == expected.tolist()
        assert labels.dtype == indices.dtype == torch.int64
        assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32
        for k in range(4):
            picture = train[int(indices[k])][0].float() / 127.5 - 1
            torch.testing.assert_close(images[k], picture.flip(-1) if mirrored[k] else picture)


def test_loading_leaves_the_global_generator_alone(flat):
    """torch's generator, which draws the training noise, is the same after using both iterators."""
    before = torch.get_rng_state()
    train, held_out = open_data(flat, 8)
    next(train_batches(train, 4))
    list(val_batches(held_out, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world, workers", [(1, 2), (2, 0), (4, 0)])
def test_validation_shows_every_picture_once(flat, world, workers):
    """
    Over all ranks each index comes once and unmirrored, also where the last batch is short or a
    rank has none left.
    """
    train, _ = open_data(flat, 8)  # 34 pictures
    seen = []
    for rank in range(world):
        batches = val_batches(train, 16, rank=rank, world=world, workers=workers)
        for images, labels, indices in batches:
            assert len(images) == len(labels) == len(indices) <= 16 // world
            for image, i in zip(images, indices.tolist()):
                torch.testing.assert_close(image, train[i][0].float() / 127.5 - 1)
            seen += indices.tolist()
    assert sorted(seen) == list(range(34)) and (world > 1 or seen == list(range(34)))


@pytest.mark.parametrize("batches", [train_batches, val_batches])
def test_a_batch_that_does_not_divide_is_refused_at_once(batches):
    """The error comes at the call, not at the first batch."""
    with pytest.raises(ValueError, match="--batch_size 10: .* 4 processes"):
        batches(BuiltInImages(8, 20), 10, world=4)

# ---- unreadable files ----------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_file_of_200_is_named_once_and_replaced(corrupted, capfd, workers):
    """
    Its place goes to the next readable image, with that one's index; named at first, counted at the
    end of each epoch.
    """
    folder, (name,) = corrupted(1)
    train, _ = open_data(folder, 8)  # 180 pictures, number 10 is bad
    batches = train_batches(train, 20, workers=workers)
    for step, (images, _, indices) in enumerate(islice(batches, 18)):  # two epochs
        asked, _ = stream_entries(180, step * 20, step * 20 + 20)
        assert len(images) == 20 and indices.tolist() == [11 if i == 10 else i for i in asked]
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and name in lines[0]
    assert "1 of 200" in lines[1] and lines[1].endswith("epoch 1") and lines[2].endswith("epoch 2")
    seen = torch.cat([indices for _, _, indices in val_batches(train, 20)])
    assert seen.tolist() == [i for i in range(180) if i != 10]         # left out, not shown twice
    assert capfd.readouterr().err == ""                                # nor named again


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [5, 180])
def test_more_than_one_percent_of_bad_files_stops(corrupted, workers, bad):
    """5 of 200 end the run with a ValueError that names files; so does a set that is all bad."""
    folder, names = corrupted(bad)
    train, _ = open_data(folder, 8)
    for make_batches in (train_batches, val_batches):
        batches = make_batches(train, 20, workers=workers)
        with pytest.raises(ValueError, match="of 200 images so far cannot be read") as error:
            for _ in range(9):
                next(batches)
        assert any(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_a_held_out_set_that_is_all_bad_stops(tmp_path):
    """Two bad files are less than 1% of the whole set here, but all there is to validate on."""
    path = make_zip(tmp_path / "x.zip", [f"train/{i}.png" for i in range(400)])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("test/a.png", b"")
        archive.writestr("test/b.png", b"")
    with pytest.raises(ValueError, match="2 of 402 images"):
        list(val_batches(open_data(path, 8)[1], 4))


def test_a_decompression_bomb_is_a_bad_file(flat, monkeypatch):
    """PIL's guard stays on: a picture of more than twice its limit counts as unreadable."""
    train, _ = open_data(flat, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9 * 11 // 2 - 1)
    assert train[0][3]
    with pytest.raises(ValueError, match="so far cannot be read"):
        next(train_batches(train, 4))


def test_a_flipped_bit_in_a_zip_is_a_bad_file(tmp_path):
    """The checksum of the zip is checked, so stored pictures cannot change unseen."""
    path = make_zip(tmp_path / "x.zip", ["a.png", "b.png"], zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"IDAT") + 30] ^= 1
    path.write_bytes(raw)
    train, held_out = open_data(path, 8)
    reads = {s.name(0): s for s in (train, held_out)}
    assert reads["b.png"].read(0).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="checksum"):
        reads["a.png"].read(0)


def test_a_strip_is_a_bad_file():
    """A 1 x 5000 picture, which resized would fill the memory, is refused."""
    with pytest.raises(ValueError, match="elongated"):
        center_crop(Image.new("L", (5000, 1)), 256)

# ---- packing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 2])
def test_packing_changes_no_pixel_name_or_original(tmp_path, workers):
    """
    The packed set has the same splits, classes, labels and pixels; the folder is untouched and
    nothing else is left.
    """
    names = [f"{split}/{c}/{i}.png"
             for split in ("train", "test") for c in ("b", "a") for i in range(3)]
    folder = make_folder(tmp_path / "set", names)
    before = {p: p.read_bytes() for p in folder.rglob("*.png")}
    assert pack(folder, 8, tmp_path / "out" / "x.zip", workers=workers) == (12, 0)
    assert {p: p.read_bytes() for p in folder.rglob("*.png")} == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.zip"]
    with zipfile.ZipFile(tmp_path / "out" / "x.zip") as archive:
        assert archive.testzip() is None
        assert {e.compress_type for e in archive.infolist()} == {zipfile.ZIP_STORED}
    for a, b in zip(open_data(folder, 8), open_data(tmp_path / "out" / "x.zip", 8)):
        assert [n.replace(".png", ".bmp") for n in names_of(a)] == names_of(b)
        assert a.classes == b.classes == ["a", "b"]
        for i in range(len(a)):
            assert torch.equal(a[i][0], b[i][0]) and a[i][1:] == b[i][1:]


@pytest.mark.parametrize("table", [LABELS, '{"labels": null}'], ids=["labels", "null"])
def test_packing_keeps_a_dataset_json(tmp_path, table):
    """Or the shards would become classes."""
    folder = with_labels(tmp_path / "set", ["wrapper/" + name for name in SHARDED], table,
                         "wrapper/dataset.json")
    pack(folder, 8, tmp_path / "x.zip")
    for a, b in zip(open_data(folder, 8), open_data(tmp_path / "x.zip", 8)):
        assert [name.replace(".png", ".bmp") for name in names_of(a)] == names_of(b)
        assert a.classes == b.classes and a.labels.tolist() == b.labels.tolist()


def test_packed_built_in_pictures_are_the_built_in_pictures(tmp_path):
    """pack without --data stores images 0 .. count-1, and twice the same bytes."""
    assert pack("", 17, tmp_path / "x.zip", count=11) == (11, 0)
    pack("", 17, tmp_path / "y.zip", count=11)
    assert (tmp_path / "x.zip").read_bytes() == (tmp_path / "y.zip").read_bytes()
    pack("discs", 17, tmp_path / "discs.zip", count=11)
    assert (tmp_path / "x.zip").read_bytes() != (tmp_path / "discs.zip").read_bytes()
    train, _ = open_data(tmp_path / "x.zip", 17)
    for i in range(len(train)):
        assert torch.equal(train[i][0], BuiltInImages(17, 11)[int(train.name(i)[:6])][0])


def test_pack_leaves_bad_files_out_and_stops_past_one_percent(corrupted, tmp_path_factory, capfd):
    """
    1 of 200 is skipped and named; when two more go bad nothing is left behind, and an older zip
    stays as it was.
    """
    (folder, bad), out = corrupted(1), tmp_path_factory.mktemp("out")
    assert pack(folder, 8, out / "x.zip") == (199, 1)
    assert bad[0] in capfd.readouterr().err
    assert bad[0] not in zipfile.ZipFile(out / "x.zip").namelist()
    packed = (out / "x.zip").read_bytes()
    for name in ("000.png", "199.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 200"):
        pack(folder, 8, out / "x.zip", overwrite=True)
    assert [p.name for p in out.iterdir()] == ["x.zip"] and (out / "x.zip").read_bytes() == packed


@pytest.mark.parametrize("arguments, words", [
    (["--out", "x.tar"], "must end in .zip"), (["--out", "old.zip"], "--overwrite"),
    (["--out", "y.zip", "--size", "4"], "--size 4"),
    (["--out", "y.zip", "--data", "nowhere"], "no such"),
    (["--out", "old.zip", "--data", "old.zip", "--overwrite"], "is the set itself"),
    (["--out", "y.zip", "--data", "twins"], "2 images would become a.bmp"),
    (["--out", "y.zip", "--data", "one"], "a single image"),
])
def test_pack_refuses_with_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments,
                                                    words):
    """`data.py: ...` on stderr, code 2, and no file changes."""
    monkeypatch.chdir(tmp_path)
    make_zip(tmp_path / "old.zip", ["a.png", "b.png"])
    make_folder(tmp_path / "twins", ["a.png", "a.jpg"])
    make_folder(tmp_path / "one", ["a.png"])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    monkeypatch.setattr("sys.argv", ["data.py", "pack", "--workers", "0", *arguments])
    with pytest.raises(SystemExit) as stop:
        data.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("data.py: ")
    assert words in error and error.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before
