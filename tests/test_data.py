"""data.py: the stream is a formula, the crop ADM's; bad files are counted, packing is lossless."""
import io
import zipfile
from itertools import islice
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

import data
from data import center_crop, open_data, pack, stream_entries, to_rgb, train_batches, val_batches
from leaves import DeadLeaves


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
    leaves = DeadLeaves(size, 24)
    images = np.stack([leaves[i][0].numpy() for i in range(24)]) / 127.5 - 1  # (24, 3, S, S)
    power = (dctn(images, axes=(2, 3), norm="ortho") ** 2).mean((0, 1))  # (S, S)
    u, v = np.mgrid[:size, :size]
    ring = (np.hypot(u, v) / 2).astype(int)  # index 2 of a DCT is one cycle
    profile = np.bincount(ring.ravel(), power.ravel()) / np.bincount(ring.ravel())
    cycles = np.arange(3, size // 4)
    alpha = -np.polyfit(np.log(cycles + 0.5), np.log(profile[cycles]), 1)[0]
    assert 1.7 < alpha < 2.4


def test_a_built_in_picture_depends_on_seed_and_index_only():
    """Picture i is the same in a longer set and a second call; other indices and seeds differ."""
    a, label, index, bad = DeadLeaves(33, 5, seed=1)[3]
    assert a.shape == (3, 33, 33) and a.dtype == torch.uint8
    assert (label, index, bad) == (0, 3, False)
    assert torch.equal(a, DeadLeaves(33, 500, seed=1)[3][0])
    for seed, i in ((1, 4), (2, 3), (2, 2), (0, 4)):
        assert not torch.equal(a, DeadLeaves(33, 5, seed=seed)[i][0])


def test_built_in_held_out_pictures_are_no_training_pictures():
    """The held-out indices lie beyond the training ones, whatever the sizes of the two sets."""
    train, held_out = open_data(None, 16, val_images=20, builtin_images=60)
    seen = {train[i][0].numpy().tobytes() for i in range(60)}
    assert (len(train), len(held_out), len(seen)) == (60, 20, 60)
    assert not seen & {held_out[i][0].numpy().tobytes() for i in range(20)}


@pytest.mark.parametrize("size", [8, 16, 512])
def test_every_pixel_of_a_built_in_picture_is_painted_at_every_size(size):
    """Leaves above and the background below leave no hole (0, 0, 0), and no picture is plain."""
    image = DeadLeaves(size, 1)[0][0].float()
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
        batches(DeadLeaves(8, 20), 10, world=4)

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


def test_packed_built_in_pictures_are_the_built_in_pictures(tmp_path):
    """pack without --data stores images 0 .. count-1, and twice the same bytes."""
    assert pack("", 17, tmp_path / "x.zip", count=11) == (11, 0)
    pack("", 17, tmp_path / "y.zip", count=11)
    assert (tmp_path / "x.zip").read_bytes() == (tmp_path / "y.zip").read_bytes()
    train, _ = open_data(tmp_path / "x.zip", 17)
    for i in range(len(train)):
        assert torch.equal(train[i][0], DeadLeaves(17, 11)[int(train.name(i)[:6])][0])


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
])
def test_pack_refuses_with_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments,
                                                    words):
    """`data.py: ...` on stderr, code 2, and no file changes."""
    monkeypatch.chdir(tmp_path)
    make_zip(tmp_path / "old.zip", ["a.png", "b.png"])
    make_folder(tmp_path / "twins", ["a.png", "a.jpg"])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    monkeypatch.setattr("sys.argv", ["data.py", "pack", "--workers", "0", *arguments])
    with pytest.raises(SystemExit) as stop:
        data.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("data.py: ")
    assert words in error and error.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before
