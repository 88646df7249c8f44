"""
Stage 2 end to end on tiny material: train_ae -> train_diffusion -> evaluate, resuming, processes,
bad flags.
"""
import json
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

import dit
import evaluate
import train_diffusion
from common import run
from common.weights import load_autoencoder
from conftest import ROOT, run_main, same

TINY = ("--preset quick --model SiT-tiny/4 --batch_size 4 --device cpu --log_every 1 "
        "--eval_every 100 --warmup_steps 2 --sample_steps 2 --encode_batch 8").split()


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def flags_of(material, out, *flags):
    return [*TINY, "--ae", str(material / "ae" / "ckpt.pt"), "--data", str(material / "images"),
            "--cache", str(material / "cache"), "--out", str(out), *map(str, flags)]


def fresh_weights(checkpoint):
    """The weights with which a run of --seed 0 began."""
    torch.manual_seed(0)
    return train_diffusion.MODELS["SiT-tiny/4"](**checkpoint["model_args"]).state_dict()


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize("model", ["SiT-tiny/4", "UViT-tiny/4"])
def test_trains_samples_and_evaluates(model, material, tmp_path, monkeypatch, capsys):
    """
    Class-conditional from the class folders; guidance works; gen writes grid, npz, folder and one
    line of results.jsonl.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    run_main(train_diffusion, *flags_of(material, tmp_path, "--model", model, "--steps", 3),
        monkeypatch=monkeypatch)
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == [0, 1, 2]
    assert all(np.isfinite(line["loss"]) for line in log)
    checkpoint = run.load_checkpoint(tmp_path / "ckpt.pt", "diffusion")
    assert checkpoint["model_args"]["num_classes"] == 2
    assert (tmp_path / "samples.png").stat().st_size > 500
    run_main(evaluate, "gen", "--ckpt", tmp_path / "ckpt.pt", "--num_samples", 5, "--steps", 3,
        "--cfg", 1.5, "--batch_size", 2, "--folder", "--workers", 0, "--device", "cpu",
        "--results", tmp_path / "results.jsonl", monkeypatch=monkeypatch)
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert result["n"] == 5 and result["cfg"] == 1.5 and "SWD_16px" in result
    assert not any(key.startswith("FID") for key in result)
    assert "no FID" in capsys.readouterr().out
    images = np.load(tmp_path / "samples" / "samples.npz")["arr_0"]
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    first = np.asarray(Image.open(tmp_path / "samples" / "images" / "000000.png"))
    assert np.array_equal(first, images[0])
    assert not (tmp_path / "samples" / "samples.npy").exists()


def test_resuming_equals_never_stopping(material, tmp_path, monkeypatch):
    """
    6 steps straight, and 3 + 3 after a resume: the same model, average, optimiser and log, bit for
    bit.
    """
    def train(name, *flags):
        flags = ["--steps", 6, "--eval_every", 3, *flags]
        run_main(train_diffusion, *flags_of(material, tmp_path / name, *flags), monkeypatch=monkeypatch)
    train("a")
    train("b", "--keep_every", 3)
    # as if killed after step 3's checkpoint
    (tmp_path / "b" / "ckpt_3.pt").rename(tmp_path / "b" / "ckpt.pt")
    train("b", "--resume")
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    a, b = (run.load_checkpoint(tmp_path / name / "ckpt.pt", "diffusion") for name in "ab")
    assert a.keys() == b.keys() and all(same(a[part], b[part]) for part in set(a) - {"args"})


def torchrun(script, *flags):
    """A script on two gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", script, *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_two_processes_equal_one(material, tmp_path, monkeypatch, request):
    """
    Encoding, training and sampling on 2 gloo processes: the cache, the losses and the samples of
    one process, to float tolerance.
    """
    if not request.config.getoption("--long"):
        pytest.skip("--long; test_processes.py has each of them")
    one, two = tmp_path / "one", tmp_path / "two"

    def on_one_and_two(module, flags_in):
        run_main(module, *flags_in(one), monkeypatch=monkeypatch)
        torchrun(f"{module.__name__}.py", *flags_in(two))

    on_one_and_two(train_diffusion, lambda out: flags_of(
        material, out, "--steps", 3, "--cache", out / "cache"))
    caches = [np.load(out / "cache" / "moments.npy").astype(np.float32) for out in (one, two)]
    np.testing.assert_allclose(*caches, rtol=2e-3, atol=2e-3)
    for a, b in zip(read_log(one), read_log(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))        # no Inception weights there
    on_one_and_two(evaluate, lambda out: [                 # 5 samples do not divide by 2
        "gen", "--ckpt", one / "ckpt.pt", "--num_samples", 5, "--steps", 3, "--workers", 0,
        "--device", "cpu", "--out", out / "gen", "--results", out / "results.jsonl"])
    a, b = (np.load(out / "gen" / "samples.npz")["arr_0"].astype(int) for out in (one, two))
    assert abs(a - b).max() <= 1 and len((two / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("kind", ["repa", "irepa", "dog"])
def test_alignment_trains_the_blocks_below_it_and_no_others(kind, material, tmp_path, monkeypatch):
    """
    With the diffusion loss switched off, the alignment term alone moves block 0 and the projector,
    and leaves block 1 alone.
    """
    regress = dit.regress

    def alignment_only(*args):
        loss, tokens = regress(*args)
        return loss * 0, tokens
    monkeypatch.setattr(dit, "regress", alignment_only)
    flags = ["--steps", 3, "--repa", kind, "--encoder_source", "random", "--lr", 0.01]
    run_main(train_diffusion, *flags_of(material, tmp_path, *flags), monkeypatch=monkeypatch)
    checkpoint = run.load_checkpoint(tmp_path / "ckpt.pt", "diffusion")
    fresh = fresh_weights(checkpoint)
    moved = lambda name: not torch.equal(fresh[name], checkpoint["model"][name])
    assert moved("blocks.0.mlp.fc1.weight") or moved("blocks.0.adaLN_modulation.1.weight")
    assert moved("x_embedder.proj.weight")
    assert not moved("blocks.1.mlp.fc1.weight") and not moved("final_layer.linear.weight")
    log = read_log(tmp_path)
    assert all(-1 <= line["align"] <= 1 for line in log)
    assert log[-1]["align"] < log[0]["align"]


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_images_and_latents_share_crop_and_mirror(material, tmp_path, monkeypatch):
    """
    What the target encoder is shown, encoded again, is the cached posterior that the transformer
    got, mirror included.
    """
    shown, cached = [], []
    load = train_diffusion.load_encoder

    def spy_encoder(*args):
        encoder = load(*args)
        note = lambda module, inputs: shown.append(inputs[0].clone())
        encoder.register_forward_pre_hook(note)
        return encoder

    monkeypatch.setattr(train_diffusion, "load_encoder", spy_encoder)
    batches = train_diffusion.LatentCache.batches

    def spy_batches(self, *args):
        for item in batches(self, *args):
            cached.append((item[0].mean.clone(), item[3]))
            yield item

    monkeypatch.setattr(train_diffusion.LatentCache, "batches", spy_batches)
    flags = ["--steps", 4, "--repa", "dog", "--encoder_source", "random"]
    run_main(train_diffusion, *flags_of(material, tmp_path, *flags), monkeypatch=monkeypatch)
    ae = load_autoencoder(material / "ae" / "ckpt.pt")
    shown = shown[1:]                                      # the first call is the check of the grid
    assert len(shown) == 4 and np.concatenate([mirrored for _, mirrored in cached]).any()
    for images, (mean, _) in zip(shown, cached):
        torch.testing.assert_close(ae.encode(images).mean, mean, rtol=2e-2, atol=2e-2)
        # the other mirror would not do
        assert (ae.encode(images.flip(-1)).mean - mean).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_two_processes_equal_one_with_alignment(material, tmp_path, monkeypatch, request):
    """--repa dog on 2 gloo processes: the losses of one; and resuming equals never stopping."""
    if not request.config.getoption("--long"):
        pytest.skip("--long; test_processes.py has the losses")
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--steps", 4, "--repa", "dog", "--encoder_source", "random", "--eval_every", 2]
    kept = flags_of(material, one, *flags, "--keep_every", 2)
    run_main(train_diffusion, *kept, monkeypatch=monkeypatch)
    torchrun("train_diffusion.py", *flags_of(material, two, *flags))
    for a, b in zip(read_log(one), read_log(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["align"] == pytest.approx(b["align"], rel=1e-2, abs=1e-3)
    straight, log = run.load_checkpoint(one / "ckpt.pt", "diffusion"), read_log(one)
    (one / "ckpt_2.pt").rename(one / "ckpt.pt")
    run_main(train_diffusion, *kept, "--resume", monkeypatch=monkeypatch)
    resumed = run.load_checkpoint(one / "ckpt.pt", "diffusion")
    assert log == read_log(one)
    assert all(same(straight[part], resumed[part]) for part in set(straight) - {"args"})


def test_labels_are_dropped_and_average_is_sampled(material, tmp_path, monkeypatch):
    """
    --label_dropout 1 trains on the null label alone: only its embedding row gets a gradient. The
    checkpoint carries the average.
    """
    flags = ["--steps", 3, "--label_dropout", 1, "--weight_decay", 0, "--lr", 0.01]
    run_main(train_diffusion, *flags_of(material, tmp_path, *flags), monkeypatch=monkeypatch)
    checkpoint = run.load_checkpoint(tmp_path / "ckpt.pt", "diffusion")
    table = "y_embedder.embedding_table.weight"
    moved = (checkpoint["model"][table] - fresh_weights(checkpoint)[table]).abs().amax(1)
    assert moved[2] > 0 and moved[:2].max() == 0
    assert not same(checkpoint["model"], checkpoint["ema"])


@pytest.mark.parametrize("flags, culprit", [
    (["--image_size", "17"], "--image_size 17"), (["--batch_size", "0"], "--batch_size 0"),
    (["--label_dropout", "1.5"], "--label_dropout 1.5"), (["--lr", "nan"], "--lr nan"),
    (["--model", "SiT-tiny/2", "--image_size", "18"], "patch"),
    (["--num_classes", "1"], "--num_classes 1"), (["--num_classes", "-2"], "--num_classes -2"),
    (["--ae", "nowhere.pt"], "nowhere.pt"), (["--data", "nowhere"], "--data nowhere"),
    (["--ae", "README.md"], "README.md"),
    (["--repa", "dog", "--encoder_source", "random", "--repa_depth", "3"], "--repa_depth 3"),
    (["--dog_sigma1", "3"], "--dog_sigma1 3"), (["--norm_std", "1.5"], "--norm_std 1.5"),
    (["--repa", "dog", "--encoder", "resnet"], "resnet")])
def test_bad_flags_end_with_one_line(flags, culprit, material, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line with the culprit, no run folder."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit, run.one_line_errors():
        run_main(train_diffusion, *flags_of(material, tmp_path / "run", *flags), monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "Warning" not in line and "warn(" not in line]
    assert exit.value.code == 2 and culprit in error and len(lines) == 1
    assert not (tmp_path / "run").exists()


def test_guidance_without_a_null_class_is_refused(material, tmp_path, monkeypatch):
    """An unconditional model has nothing to guide away from."""
    run_main(train_diffusion, *flags_of(material, tmp_path, "--steps", 1, "--num_classes", 0),
        monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match="--cfg 2.0: .* unconditional"):
        run_main(evaluate, "gen", "--ckpt", tmp_path / "ckpt.pt", "--cfg", 2, "--device", "cpu",
            monkeypatch=monkeypatch)
