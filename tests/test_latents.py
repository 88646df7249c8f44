"""
The latent cache: what goes in comes out, mirrored and normalised; what does not match is refused;
what is interrupted leaves nothing.
"""
import json
import os

import numpy as np
import pytest
import torch

import latents
from data import stream_entries
from latents import LatentCache, autoencoder_hash, build_cache, images_hash
from leaves import DeadLeaves
from vae import AEConfig, AutoencoderKL

AE = AEConfig(ch=8, ch_mult=(1, 1), latent_channels=3, num_res_blocks=1, norm_groups=2)


def build(tmp_path, count=7, seed=0, **options):
    torch.manual_seed(0)
    ae, images = AutoencoderKL(AE).eval(), DeadLeaves(16, count, seed=seed)
    identity = dict(autoencoder=autoencoder_hash(ae), images=images_hash(images), size=16)
    build_cache(tmp_path / "cache", identity, ae, images, batch_size=3, **options)
    return ae, images, identity


def test_cache_holds_the_moments_of_both_mirrors(tmp_path):
    """Row i is the posterior of image i and of its mirror, to float16."""
    ae, images, identity = build(tmp_path)
    cache = LatentCache(tmp_path / "cache", identity)
    assert len(cache) == 7
    assert cache.moments.shape == (7, 2, 6, 8, 8) and cache.moments.dtype == np.float16
    x = torch.stack([images[i][0] for i in (5, 2)]).float() / 127.5 - 1
    for mirrored, batch in ((False, x), (True, x.flip(-1))):
        expected = ae.encode(batch)
        found = cache.posterior(np.array([5, 2]), np.array([mirrored] * 2))
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.logvar, expected.logvar, rtol=1e-3, atol=1e-3)
    assert not np.array_equal(cache.moments[0, 0], cache.moments[0, 1])


def test_statistics_are_those_of_sampled_latents(tmp_path):
    """mean and std per channel by Monte Carlo; normalised latents have mean 0 and std 1."""
    ae, _, identity = build(tmp_path, count=40)
    cache = LatentCache(tmp_path / "cache", identity)
    ae.set_latent_stats(cache.mean, cache.std)
    rows, mirrored = np.arange(40).repeat(2), np.arange(80) % 2 == 1
    q = cache.posterior(rows, mirrored)
    z = torch.cat([ae.normalize(q.sample()) for _ in range(5)])
    assert z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_batches_follow_the_stream_of_data_py(tmp_path):
    """
    Index and mirror of step s are stream_entries'; two ranks share the batch; starting at step 3
    equals skipping three.
    """
    _, _, identity = build(tmp_path)
    cache = LatentCache(tmp_path / "cache", identity)
    whole = cache.batches(4, seed=1)
    halves = [cache.batches(4, seed=1, rank=rank, world=2) for rank in range(2)]
    for step in range(5):
        posterior, _, indices, mirrored = next(whole)
        expected = stream_entries(7, 4 * step, 4 * step + 4, seed=1)
        assert np.array_equal(indices, expected[0]) and np.array_equal(mirrored, expected[1])
        assert torch.equal(posterior.mean, torch.cat([next(half)[0].mean for half in halves]))
    again = cache.batches(4, start_step=3, seed=1)
    assert np.array_equal(next(again)[2], stream_entries(7, 12, 16, seed=1)[0])


def test_a_cache_of_something_else_is_refused(tmp_path):
    """Another autoencoder, other images or another size: the difference is named."""
    _, _, identity = build(tmp_path)
    for key, value in (("autoencoder", "0" * 16), ("images", "1" * 16), ("size", 32)):
        with pytest.raises(ValueError, match=f"--cache .*{key}"):
            LatentCache(tmp_path / "cache", dict(identity, **{key: value}))
    (tmp_path / "cache" / "moments.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a readable latent cache"):
        LatentCache(tmp_path / "cache", identity)


def test_hashes_see_weights_and_images_but_not_statistics():
    """One weight, one seed or one image more changes a hash; the latent statistics do not."""
    torch.manual_seed(0)
    ae = AutoencoderKL(AE)
    before = autoencoder_hash(ae)
    ae.set_latent_stats(1.0, 2.0)
    assert autoencoder_hash(ae) == before
    with torch.no_grad():
        ae.quant_conv.bias[0] += 1e-3
    assert autoencoder_hash(ae) != before
    sets = ((4, 0, 0), (5, 0, 0), (4, 1, 0), (4, 0, 9))
    assert len({images_hash(DeadLeaves(16, n, seed=s, first=f)) for n, s, f in sets}) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_encoding_leaves_nothing_behind(tmp_path, monkeypatch, error):
    """An exception in the middle: neither the cache nor its temporary folder is there."""
    calls = []

    def stop(n):
        calls.append(n)
        if len(calls) == 2:
            raise error
    with pytest.raises(error):
        build(tmp_path, progress=stop)
    assert os.listdir(tmp_path) == []


def test_no_room_is_an_error_before_encoding(tmp_path, monkeypatch):
    """On a full disk: one line with what is needed, nothing left, no image encoded."""
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: type("", (), dict(free=100)))
    words = r"--cache .* needs 1.08e-05 GB, 1e-07 GB are free \(No space left"
    with pytest.raises(OSError, match=words):
        build(tmp_path, progress=lambda n: pytest.fail("encoded"))
    assert os.listdir(tmp_path) == []


def test_diverged_latents_do_not_become_infinite(tmp_path, monkeypatch):
    """A mean beyond float16 stops the encoding and says why."""
    encode = AutoencoderKL.encode

    def huge(self, x):
        posterior = encode(self, x)
        posterior.mean = posterior.mean + 1e6
        return posterior
    monkeypatch.setattr(AutoencoderKL, "encode", huge)
    with pytest.raises(ValueError, match="does not fit the cache's float16"):
        build(tmp_path)


def test_description_is_plain_json(tmp_path):
    """cache.json says what the cache was made from."""
    _, _, identity = build(tmp_path)
    meta = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert identity.items() <= meta.items() and meta["count"] == 7 and len(meta["mean"]) == 3
