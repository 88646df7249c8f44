"""The latent cache: what goes in comes out; only a whole one is read. What a hash sees."""
import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train_diffusion
from common import latents
from common.builtin import BuiltInImages
from common.data import images_hash, open_data, stream_entries, take, val_batches
from common.latents import LatentCache, build_cache
from common.weights import autoencoder_hash
from conftest import pngs, run_main, start
from test_train_diffusion import flags_of
from vae import AEConfig, AutoencoderKL, Posterior

AE = AEConfig(ch=8, ch_mult=(1, 1), latent_channels=3, num_res_blocks=1, norm_groups=2)


def build(tmp_path, count=7, images=None, **options):
    """The autoencoder, the images, what the cache is known by, the cache."""
    torch.manual_seed(0)
    ae, images = AutoencoderKL(AE).eval().requires_grad_(False), images or BuiltInImages(16, count)
    ae.quant_conv.bias[3:] += 5                            # else the variance is .003
    identity = dict(autoencoder=autoencoder_hash(ae), images=images_hash(images), size=16)
    build_cache(tmp_path / "cache", identity, ae, images, batch_size=3, **options)
    return ae, images, identity, LatentCache(tmp_path / "cache", identity)


def test_cache_holds_the_moments_of_both_mirrors(tmp_path):
    """Row i is the posterior of image i and of its mirror, to float16."""
    ae, images, _, cache = build(tmp_path)
    assert cache.moments.shape == (7, 2, 6, 8, 8) and cache.moments.dtype == np.float16
    x = torch.stack([images[i][0] for i in (5, 2)]).float() / 127.5 - 1
    for mirror, batch in enumerate((x, x.flip(-1))):
        q, found = ae.encode(batch), torch.tensor(cache.moments[[5, 2], mirror]).float()
        torch.testing.assert_close(found, torch.cat([q.mean, q.logvar], 1), rtol=1e-3, atol=1e-3)
    assert not np.array_equal(cache.moments[0, 0], cache.moments[0, 1])


def test_statistics_are_those_of_sampled_latents(tmp_path):
    """mean and std per channel by Monte Carlo; normalised latents have mean 0 and std 1."""
    ae, _, _, cache = build(tmp_path, count=40)
    ae.set_latent_stats(cache.mean, cache.std)
    q = Posterior(*torch.tensor(cache.moments).float().flatten(0, 1).chunk(2, 1))
    z = torch.cat([ae.normalize(q.sample()) for _ in range(5)])
    assert z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_an_image_that_cannot_be_read_is_left_out(tmp_path):
    """Each of the others keeps its own posterior and label, for more than an epoch."""
    names = [f"{'ab'[i % 2]}/{i:03}.png" for i in range(120)]
    images, _ = open_data(pngs(tmp_path / "set", names, 20, 20), 16)
    (tmp_path / "set" / images.name(4)).write_bytes(b"")
    ae, _, _, cache = build(tmp_path, images=images)
    assert cache.rows.tolist() == [i for i in range(len(images)) if i != 4]
    batches = cache.batches(16, mirror=False)
    for _ in range(8):
        q, labels, rows, _ = next(batches)
        assert labels.tolist() == [images[i][1] for i in rows]
        x = torch.stack([images[i][0] for i in rows]) / 127.5 - 1
        torch.testing.assert_close(q.mean, ae.encode(x).mean, rtol=1e-2, atol=1e-2)


def test_batches_follow_the_stream_of_data_py(tmp_path):
    """Two ranks share the batch; starting at step 3 equals skipping three."""
    cache = build(tmp_path)[-1]
    whole = cache.batches(4, seed=1)
    halves = [cache.batches(4, seed=1, rank=rank, world=2) for rank in range(2)]
    for step in range(5):
        posterior, _, *entries = next(whole)
        np.testing.assert_array_equal(entries, stream_entries(7, 4 * step, 4 * step + 4, seed=1))
        assert torch.equal(posterior.mean, torch.cat([next(half)[0].mean for half in halves]))
    again = cache.batches(4, start_step=3, seed=1)
    assert np.array_equal(next(again)[2], stream_entries(7, 12, 16, seed=1)[0])


@pytest.mark.parametrize("name", ["cache.json", "labels.npy", "rows.npy", "moments.npy"])
def test_one_flipped_bit_in_any_file_is_refused(tmp_path, name, monkeypatch):
    """Wherever it lies, also in the last block and in the array's header."""
    monkeypatch.setattr(latents, "BLOCK", 3)
    identity = build(tmp_path)[2]
    path = tmp_path / "cache" / name
    content = path.read_bytes()
    for place in [*range(0, len(content), 1 + len(content) // 40), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="--cache .*not this run's"):
            LatentCache(tmp_path / "cache", identity)
    path.write_bytes(content)
    assert len(LatentCache(tmp_path / "cache", identity)) == 7


def encode_slowly(script):
    """In another process: half a second per batch, so that two of them must overlap."""
    def slow(*args):
        for batch in val_batches(*args):
            time.sleep(0.5)
            yield batch
    latents.val_batches = slow


def test_two_processes_that_need_one_cache_read_the_same(material, tmp_path):
    """train_diffusion.py twice at once: one encodes, the other waits; the cache of one alone."""
    def flags(out, cache):
        return flags_of(material, out, "--cache", cache, "--steps", 0, "--encode_batch", 4)
    output = tmp_path / "output.txt"
    processes = [start("train_diffusion", *flags(name, "cache"), cwd=tmp_path, output=output,
                       patch=encode_slowly) for name in ("one", "two")]
    run_main(train_diffusion, *flags(tmp_path / "alone", tmp_path / "alone_cache"))
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0], output.read_text()
    assert output.read_text().count("holds this lock") == 1
    for path in (tmp_path / "cache").iterdir():
        assert path.read_bytes() == (tmp_path / "alone_cache" / path.name).read_bytes()


def test_interrupted_encoding_leaves_nothing_behind(tmp_path, monkeypatch):
    """Nothing is there after an error in the middle; what a killed run left goes with the next."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(latents, "_encode", lambda *_, **arrays: 1 / 0)
        build(tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / ".cache.tmp").mkdir()
    build(tmp_path)
    assert os.listdir(tmp_path) == ["cache"]


def test_more_than_one_percent_lost_ends_the_encoding(tmp_path, monkeypatch):
    """Counted over all processes: none of several has seen the whole set."""
    item = torch.zeros(3, 16, 16, dtype=torch.uint8), 0
    monkeypatch.setattr(BuiltInImages, "__getitem__", lambda _, i: (*item, i, "bad" * (i == 3)))
    monkeypatch.setattr(BuiltInImages, "report", lambda *_: None, raising=False)
    with pytest.raises(ValueError, match="--cache .*: 1 of 7 images cannot be read"):
        build(tmp_path)
    assert os.listdir(tmp_path) == []


def test_diverged_latents_do_not_become_infinite(tmp_path, monkeypatch):
    """A mean beyond float16 stops the encoding and says why."""
    huge = torch.full((3, 3, 8, 8), 1e6)
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: Posterior(huge, huge))
    with pytest.raises(ValueError, match="^--cache .*float16"):
        build(tmp_path)


# ---- which images a set holds --------------------------------------------------------------------
def write_images(folder, seed=0, suffix=".png", spot=0):
    """Noise, a/0 .. a/2 and b/3 .. b/5, with one grey pixel in the middle; nothing deflated."""
    rng = np.random.default_rng(seed)
    for i in range(6):
        path = folder / "ab"[i // 3] / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        pixels[64, 64] = spot
        Image.fromarray(pixels).save(path, compress_level=0)       # read by PNG alone
    return folder


def zipped(folder):
    """The same files in a zip, below a folder around everything."""
    return pathlib.Path(shutil.make_archive(folder, "zip", folder.parent, folder.name))


def hash_of(spec):
    return images_hash(open_data(spec, 16)[0])


def test_the_hash_of_built_in_images_sees_kind_seed_and_numbers():
    """And is what it always was: checkpoints and caches know their images by it."""
    sets = [((16, 4), {}), ((16, 5), {}), ((16, 4), dict(seed=1)), ((16, 4), dict(first=9)),
            ((16, 4), dict(kind="discs"))]
    assert len({images_hash(BuiltInImages(*sizes, **more)) for sizes, more in sets}) == 5
    assert images_hash(BuiltInImages(32, 20)) == "33cf04c316480e05"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_an_image_replaced_in_place_is_seen(tmp_path, suffix):
    """By one of the same size and time; uncompressed files differ here in three bytes alone."""
    old = write_images(tmp_path / "old", suffix=suffix)
    new = write_images(tmp_path / "new", seed=int(suffix == ".jpg"), suffix=suffix, spot=255)
    train, _ = open_data(old, 16)
    before, name = images_hash(train), train.name(2)
    content, status = (new / name).read_bytes(), (old / name).stat()
    (old / name).write_bytes(content[:status.st_size].ljust(status.st_size, b"\0"))
    os.utime(old / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hash_of(old) != before


@pytest.mark.parametrize("form", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_a_set_stays_the_same_wherever_it_lies(tmp_path, monkeypatch, form):
    """A copy, a link, a time, another spelling change no hash; other images of these names do."""
    spec = form(write_images(tmp_path / "set"))
    before = hash_of(spec)
    assert hash_of(form(write_images(tmp_path / "other", seed=1))) != before
    copy, link = tmp_path / "x" / "y" / f"copy{spec.suffix}", tmp_path / f"link{spec.suffix}"
    copy.parent.mkdir(parents=True)
    (shutil.copytree if spec.is_dir() else shutil.copy)(spec, copy)
    link.symlink_to(spec)
    monkeypatch.chdir(tmp_path / "x")
    spellings = [str(spec), copy, link, f"../{spec.name}", f"y/./copy{spec.suffix}"]
    if spec.is_dir():
        spellings += [tmp_path / "x", f"{tmp_path}/x/y//copy/"]            # folders around it
    assert {hash_of(spelling) for spelling in spellings} == {before}


def test_the_hash_of_images_sees_labels_and_choice(tmp_path):
    """The same images under the same names with other labels, or fewer of them."""
    folder, hashes = write_images(tmp_path / "set"), set()
    for label in (0, 1):
        table = [[f"{'ab'[i // 3]}/{i}.png", label] for i in range(6)]
        (folder / "dataset.json").write_text(json.dumps(dict(labels=table)))
        train, held_out = open_data(folder, 16)
        hashes |= {images_hash(train), images_hash(held_out), images_hash(take(train, [0, 2, 3]))}
    assert len(hashes) == 6
