"""
Stage 2 end to end on tiny material: train_ae -> train_diffusion -> evaluate, resuming, alignment,
labels.
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit
import evaluate
import train_diffusion
from common import run, weights
from common.builtin import BuiltInImages
from common.data import open_data, stream_entries
from common.latents import LatentCache
from common.weights import load_autoencoder
from conftest import args_of, copy_at, equal_runs, run_main, same

pytestmark = pytest.mark.filterwarnings("ignore:.*UNTRAINED")
ALIGNED = "--encoder_source", "random", "--repa"
TINY = ("--preset quick --model SiT-tiny/4 --batch_size 4 --device cpu --log_every 1 "
        "--eval_every 100 --warmup_steps 2 --sample_steps 2 --encode_batch 8").split()


def flags_of(material, out, *flags):
    return [*TINY, "--ae", str(material / "ae" / "ckpt.pt"), "--data", str(material / "images"),
            "--cache", str(material / "cache"), "--out", str(out), *map(str, flags)]


def train(material, out, *flags):
    """train_diffusion.main in this process; returns log.jsonl and the checkpoint."""
    run_main(train_diffusion, *flags_of(material, out, *flags))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return log, run.load_checkpoint(out / "ckpt.pt", "diffusion")


def fresh_weights(checkpoint):
    """The weights with which a run of --seed 0 began."""
    torch.manual_seed(0)
    return train_diffusion.MODELS["SiT-tiny/4"](**checkpoint["model_args"]).state_dict()


@pytest.mark.parametrize("model", ["SiT-tiny/4", "UViT-tiny/4"])
def test_trains_samples_and_evaluates(model, material, offline, tmp_path, monkeypatch, capsys):
    """Class-conditional from the class folders; guidance works; gen writes grid, npz and folder."""
    monkeypatch.chdir(material)
    log, checkpoint = train(material, tmp_path, "--model", model, "--steps", 3, "--ae",
                            "ae/ckpt.pt")
    monkeypatch.chdir(tmp_path)                            # the autoencoder is still found
    assert [line["step"] for line in log] == [0, 1, 2]
    assert all(np.isfinite(line["loss"]) for line in log)
    assert checkpoint["model_args"]["num_classes"] == 2
    assert (tmp_path / "samples.png").stat().st_size > 500
    run_main(evaluate, "gen", "--ckpt", tmp_path / "ckpt.pt", "--num_samples", 5, "--steps", 3,
             "--cfg", 1.5, "--batch_size", 2, "--folder", "--workers", 0, "--device", "cpu",
             "--results", tmp_path / "results.jsonl")
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert result["n"] == 5 and result["cfg"] == 1.5 and "SWD_16px" in result
    assert not any(key.startswith("FID") for key in result)
    assert "no FID" in capsys.readouterr().out
    images = np.load(tmp_path / "samples" / "samples.npz")["arr_0"]
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert (tmp_path / "samples" / "images" / "000004.png").exists()


def test_a_training_step_by_hand(material, tmp_path, monkeypatch):
    """What the loss is given, rate, clipping, average, and whose samples are drawn."""
    seen, steps, drawn = [], [], []
    loss, step, sample = dit.Interpolant.loss, run.optimizer_step, dit.Interpolant.sample

    def spy_loss(self, model, *inputs):
        seen.append(inputs[:5])
        return loss(self, model, *inputs)

    def spy_step(optimizer, lr, clip_grad, finite):
        norm = step(optimizer, lr, clip_grad, finite)
        bias = optimizer.param_groups[0]["params"][-3]     # of final_layer.linear
        steps.append((lr, clip_grad, bias.detach().clone()))
        return norm

    def spy_sample(self, model, *args, **options):
        drawn.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return sample(self, model, *args, **options)
    monkeypatch.setattr(dit.Interpolant, "loss", spy_loss)
    monkeypatch.setattr(dit.Interpolant, "sample", spy_sample)
    monkeypatch.setattr(run, "optimizer_step", spy_step)
    _, checkpoint = train(
        material, tmp_path, "--steps", 4, "--mirror", "off", "--lr", 0.01, "--warmup_steps", 3,
        "--clip_grad", 0.5, "--ema", 0.7, "--ema_warmup", "off", "--label_dropout", 0.5,
        "--beta2", 0.97)
    ae, (images, _) = load_autoencoder(material / "ae"), open_data(material / "images", 16)
    cache = LatentCache(material / "cache", {})
    for k, (x, t, eps, y, drop) in enumerate(seen):
        rng = torch.Generator().manual_seed(run.step_seed(0, k))
        rows, _ = stream_entries(len(images), 4 * k, 4 * k + 4)
        q = ae.encode(torch.stack([images[i][0] for i in rows]) / 127.5 - 1)
        z = q.sample(torch.randn(q.mean.shape, generator=rng))
        z = (z - cache.mean[:, None, None]) / cache.std[:, None, None]
        torch.testing.assert_close(x, z.detach(), rtol=2e-2, atol=2e-2)    # the cache is float16
        assert torch.equal(t, torch.rand(4, generator=rng))
        assert torch.equal(eps, torch.randn(x.shape, generator=rng))
        assert torch.equal(drop, torch.rand(4, generator=rng) < 0.5)
        assert y.tolist() == [images[i][1] for i in rows]
    assert [lr for lr, *_ in steps] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    assert {clip for _, clip, _ in steps} == {0.5}
    name = "final_layer.linear.bias"
    average = fresh_weights(checkpoint)[name]
    for *_, weight in steps:
        average = 0.7 * average + 0.3 * weight
    torch.testing.assert_close(checkpoint["ema"][name], average)
    assert same(drawn[-1], checkpoint["ema"])              # samples.png is the average's
    assert checkpoint["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.97)


@pytest.mark.parametrize("model", ["SiT-tiny/4", "UViT-tiny/4"])
def test_flags_of_alignment_and_of_noise_levels(model, material, tmp_path, monkeypatch):
    """They reach target and process; weight 0 is no alignment; --grad_checkpoint, no change."""
    targets, levels = [], []
    filter_target, ddpm = train_diffusion.filter_target, train_diffusion.DDPM
    monkeypatch.setattr(train_diffusion, "filter_target",
                        lambda *args: targets.append(args[1:]) or filter_target(*args))
    monkeypatch.setattr(train_diffusion, "DDPM",
                        lambda schedule: levels.append(schedule) or ddpm(schedule))
    flags = ["--model", model, "--steps", 3, "--schedule", "vp", "--lr", 0.01]
    aligned = [*flags, *ALIGNED, "dog", "--dog_sigma1", 0.5, "--dog_sigma2", 1.5, "--norm_std", 0.8]
    runs = [train(material, tmp_path / name, *more)[1]["model"] for name, more in dict(
        plain=flags, zero=[*aligned, "--repa_weight", 0], half=[*aligned, "--repa_weight", 0.5],
        memory=[*aligned, "--repa_weight", 0.5, "--grad_checkpoint"]).items()]
    assert {*targets} == {("dog", (2, 2), 0.5, 1.5, 0.8)}
    assert levels == ["vp"] * 4 * model.startswith("UViT")
    plain, zero, half, memory = runs
    assert same(half, memory)
    difference = lambda other: max((plain[name] - other[name]).abs().max() for name in plain)
    assert difference(zero) < 1e-4 < 1e-3 < difference(half)           # by rounding alone


def test_resuming_equals_never_stopping(material, tmp_path):
    """6 steps straight, and 3 + 3 after a resume: model, average, optimiser and log are equal."""
    flags = ["--steps", 6, "--eval_every", 3, "--keep_every", 3, "--log_every", 4]
    train(material, tmp_path / "a", *flags)
    copy_at(3, tmp_path / "a", tmp_path / "b")
    train(material, tmp_path / "b", *flags, "--resume")
    assert equal_runs(tmp_path / "a", tmp_path / "b").keys() >= {"model", "ema", "optimizer"}


@pytest.mark.parametrize("kind", ["repa", "irepa", "dog"])
def test_alignment_trains_the_blocks_below_it_and_no_others(kind, material, tmp_path, monkeypatch):
    """With the diffusion loss switched off, alignment moves block 0, and leaves block 1 alone."""
    diffusion_loss = dit.Interpolant.loss

    def alignment_only(*args):
        loss, tokens = diffusion_loss(*args)
        return loss * 0, tokens
    monkeypatch.setattr(dit.Interpolant, "loss", alignment_only)
    log, checkpoint = train(material, tmp_path, "--steps", 3, "--lr", 0.01, *ALIGNED, kind)
    fresh = fresh_weights(checkpoint)
    moved = lambda name: not torch.equal(fresh[name], checkpoint["model"][name])
    assert moved("blocks.0.mlp.fc1.weight") or moved("blocks.0.adaLN_modulation.1.weight")
    assert moved("x_embedder.proj.weight")
    assert not moved("blocks.1.mlp.fc1.weight") and not moved("final_layer.linear.weight")
    assert all(-1 <= line["align"] <= 1 for line in log)
    assert log[-1]["align"] < log[0]["align"]


def test_images_and_latents_share_crop_and_mirror(material, tmp_path, monkeypatch):
    """What the target encoder is shown, encoded again, is the transformer's cached posterior."""
    shown, cached = [], []
    load, batches = train_diffusion.load_encoder, train_diffusion.LatentCache.batches

    def spy_encoder(*args):
        encoder = load(*args)
        encoder.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0].clone()))
        return encoder

    def spy_batches(self, *args):
        for item in batches(self, *args):
            cached.append((item[0].mean.clone(), item[3]))
            yield item
    monkeypatch.setattr(train_diffusion, "load_encoder", spy_encoder)
    monkeypatch.setattr(train_diffusion.LatentCache, "batches", spy_batches)
    train(material, tmp_path, "--steps", 4, *ALIGNED, "dog")
    ae = load_autoencoder(material / "ae" / "ckpt.pt")
    shown = shown[1:]                                      # the first call is the check of the grid
    assert len(shown) == 4 and np.concatenate([mirrored for _, mirrored in cached]).any()
    for images, (mean, _) in zip(shown, cached):
        torch.testing.assert_close(ae.encode(images).mean, mean, rtol=2e-2, atol=2e-2)
        # the other mirror would not do
        assert (ae.encode(images.flip(-1)).mean - mean).abs().amax((1, 2, 3)).min() > 0.1


def test_an_image_lost_since_it_was_encoded_saves_first(material, tmp_path, monkeypatch):
    """One of 128, in step 2 of an aligned run: no other image in its place, a checkpoint."""
    (tmp_path / "set").mkdir()
    for i in range(128):
        Image.new("RGB", (16, 16), (i, 9, 9)).save(tmp_path / "set" / f"{i}.png")
    batches = train_diffusion.train_batches

    def spoilt(dataset, *args, **options):
        (index,), _ = stream_entries(len(dataset), 9, 10)
        (tmp_path / "set" / dataset.name(index)).write_bytes(b"")
        return batches(dataset, *args, **options)
    monkeypatch.setattr(train_diffusion, "train_batches", spoilt)
    with pytest.raises(ValueError, match="could be read before"):
        train(material, tmp_path / "run", "--data", tmp_path / "set", "--steps", 9, *ALIGNED, "dog",
              "--cache", tmp_path / "cache")
    assert run.load_checkpoint(tmp_path / "run" / "ckpt.pt", "diffusion")["step"] == 2


def test_nothing_is_chosen_or_written_in_silence(material, tmp_path, monkeypatch):
    """A --resume without --ae where there are several; images that are the autoencoder's."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"out/ae/quick-{name}").mkdir(parents=True)
        Path(f"out/ae/quick-{name}/ckpt.pt").touch()
    assert args_of(train_diffusion, "--preset", "quick").ae == "out/ae/quick-b/ckpt.pt"
    with pytest.raises(ValueError, match="several autoencoders of --preset quick; name"):
        args_of(train_diffusion, "--preset", "quick", "--resume")
    with pytest.raises(ValueError, match="--out .*run: lies in"):
        run_main(train_diffusion, *TINY, "--ae", material / "ae" / "ckpt.pt", "--out",
                 material / "images" / "run")


def test_labels_are_dropped(material, tmp_path):
    """--label_dropout 1 trains the null label's row alone."""
    _, checkpoint = train(material, tmp_path, "--steps", 3, "--label_dropout", 1,
                          "--weight_decay", 0, "--lr", 0.01)
    table = "y_embedder.embedding_table.weight"
    moved = (checkpoint["model"][table] - fresh_weights(checkpoint)[table]).abs().amax(1)
    assert moved[2] > 0 and moved[:2].max() == 0


def test_the_checkpoint_knows_which_classes_had_an_image(material, tmp_path, capsys):
    """--num_classes 5 with two class folders; a set that changed since is said in one line."""
    flags = ["--steps", 1, "--num_classes", 5]
    _, checkpoint = train(material, tmp_path / "run", *flags)
    assert checkpoint["classes_seen"] == [0, 1]
    assert "has changed since" not in capsys.readouterr().out
    trained = torch.load(material / "ae" / "ckpt.pt", weights_only=True)
    torch.save(trained | dict(images="others"), tmp_path / "ckpt.pt")
    train(material, tmp_path / "run", *flags, "--ae", tmp_path / "ckpt.pt", "--overwrite")
    assert "has changed since" in capsys.readouterr().out


def test_alignment_on_built_in_images(material, tmp_path, monkeypatch):
    """Images of no file and no class: aligned, and there is nothing to guide away from."""
    monkeypatch.setattr(weights, "open_data", lambda *args, **options: (
        BuiltInImages(16, 6, kind="discs"), None))
    run_main(train_diffusion, *TINY, "--ae", material / "ae" / "ckpt.pt", "--image_size", 16,
             "--steps", 1, *ALIGNED, "dog", "--cache", tmp_path / "cache", "--out", tmp_path)
    assert '"align"' in (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="--cfg 2.0: .* no null class"):
        run_main(evaluate, "gen", "--ckpt", tmp_path / "ckpt.pt", "--cfg", 2, "--device", "cpu")
