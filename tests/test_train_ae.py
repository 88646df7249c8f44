"""The training script end to end, on 16 to 64 pixel images: every method runs, resuming is invisible, processes agree, bad flags say so."""
import json
import subprocess
import sys

import pytest
import torch

import train_ae
from conftest import ROOT, same
from vae import load_autoencoder

TINY = ["--preset", "quick", "--image_size", "32", "--batch_size", "4", "--val_images", "6", "--workers", "0", "--device", "cpu",
        "--log_every", "1", "--eval_every", "100", "--warmup_steps", "2"]


def train(out, *flags, monkeypatch):
    """Run train_ae.main in this process; returns log.jsonl as a list of dicts."""
    monkeypatch.setattr(sys, "argv", ["train_ae.py", *TINY, "--out", str(out), *map(str, flags)])
    train_ae.main()
    return read_log(out)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def torchrun(out, processes, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train_ae.py", *TINY,
               "--out", str(out), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return read_log(out)


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("reg, term", [("none", None), ("kl", "kl"), ("esm", "esm"), ("dsm", None), ("se", None), ("eq", "kl"), ("esm dsm", "esm"),
                                       ("vf", "kl align align_weight"), ("uae", "align align_weight")])
def test_every_method_trains_and_computes_only_its_terms(reg, term, tmp_path, monkeypatch):
    """A few steps of each --reg: finite losses, the terms that belong to it and no others, a checkpoint that loads, a picture."""
    flags = ["--image_size", 64] if "dsm" in reg else []                                   # two 8x8 blocks a side
    log = train(tmp_path, "--reg", *reg.split(), "--steps", 6, "--encoder_source", "random", *flags, monkeypatch=monkeypatch)
    losses = [line for line in log if "loss" in line]
    assert len(losses) == 6
    assert all(set(line) == {"step", "l1", "loss", "grad_norm"} | set((term or "").split()) for line in losses)
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in log)
    ae = load_autoencoder(tmp_path / "ckpt.pt")
    assert ae.config.latent_channels == 4 and (ae.latent_std != 1).all()                   # statistics came along
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000


def test_esm_reaches_the_encoder(tmp_path, monkeypatch):
    """With a large weight the divergence on held-out images falls below that of a run without it, same seed."""
    flags = ["--steps", 40, "--lr", 2e-3]
    free = train(tmp_path / "none", "--reg", "none", *flags, monkeypatch=monkeypatch)[-1]["val_esm"]
    matched = train(tmp_path / "esm", "--reg", "esm", "--esm_weight", 1.0, *flags, monkeypatch=monkeypatch)[-1]["val_esm"]
    assert matched < 0.5 * free


@pytest.mark.parametrize("flags", [["--reg", "eq"], ["--reg", "dsm", "--image_size", "64", "--gan_weight", "0.5", "--gan_start", "2"]])
def test_resuming_equals_never_stopping(flags, tmp_path, monkeypatch):
    """7 steps straight, and 4 + 3 after a resume: the same weights, optimisers, discriminator and log, bit for bit."""
    straight = train(tmp_path / "a", *flags, "--steps", 7, "--eval_every", 4, monkeypatch=monkeypatch)
    train(tmp_path / "b", *flags, "--steps", 7, "--eval_every", 4, "--keep_every", 4, monkeypatch=monkeypatch)
    (tmp_path / "b" / "ckpt_4.pt").rename(tmp_path / "b" / "ckpt.pt")                       # as if killed after step 4's checkpoint
    resumed = train(tmp_path / "b", *flags, "--steps", 7, "--eval_every", 4, "--resume", monkeypatch=monkeypatch)
    assert resumed == straight
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in "ab")
    assert a.keys() == b.keys() and a["step"] == b["step"] == 7
    assert all(same(a[part], b[part]) for part in set(a) - {"args"})


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("reg", ["vf", "uae"])
def test_alignment_reaches_the_encoder_and_is_resumed(reg, tmp_path, monkeypatch):
    """Without reconstruction's help the encoder moves another way than under --reg none; the projection is in the checkpoint."""
    flags = ["--steps", 3, "--encoder_source", "random"]
    train(tmp_path / "none", "--reg", "none", *flags, monkeypatch=monkeypatch)
    train(tmp_path / reg, "--reg", reg, "--kl_weight", 0, "--align_weight", 1, *flags, monkeypatch=monkeypatch)
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("none", reg))
    assert not same(a["model"]["encoder.conv_in.weight"], b["model"]["encoder.conv_in.weight"])
    assert "projection" in b and "projection" not in a
    resumed = train(tmp_path / reg, "--reg", reg, "--kl_weight", 0, "--align_weight", 1, "--steps", 4, "--encoder_source", "random", "--resume",
                    monkeypatch=monkeypatch)
    assert resumed[-1]["step"] == 4


def test_gan_alternates_on_two_processes(tmp_path):
    """From gan_start on, even steps train the autoencoder and odd ones the discriminator, under torchrun on the CPU, without a hang."""
    log = torchrun(tmp_path, 2, "--reg", "kl", "--gan_weight", "0.5", "--gan_start", "2", "--steps", "7")
    by_step = {line["step"]: line for line in log if "val_psnr" not in line}
    assert "gan" not in by_step[1] and "disc" not in by_step[1]
    for step in (2, 4, 6):
        assert "gan" in by_step[step] and "gan_weight" in by_step[step] and "disc" not in by_step[step]
    for step in (3, 5):
        assert "disc" in by_step[step] and "l1" not in by_step[step]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in log)


def test_gan_every_step_trains_both(tmp_path, monkeypatch):
    """--gan_every_step: both terms in each step."""
    log = train(tmp_path, "--reg", "none", "--gan_weight", 0.5, "--gan_start", 1, "--gan_every_step", "--steps", 3, monkeypatch=monkeypatch)
    by_step = {line["step"]: line for line in log if "val_psnr" not in line}
    assert "disc" not in by_step[0] and all({"disc", "gan", "l1"} <= by_step[step].keys() for step in (1, 2))


def test_discriminator_step_keeps_no_graph_through_the_autoencoder(tmp_path, monkeypatch):
    """What a discriminator step decodes does not require a gradient, and the autoencoder's weights stay as they were."""
    seen = []
    forward = train_ae.AutoencoderKL.decode
    monkeypatch.setattr(train_ae.AutoencoderKL, "decode", lambda self, z: seen.append(forward(self, z)) or seen[-1])
    train(tmp_path, "--reg", "none", "--gan_weight", 0.5, "--gan_start", 0, "--steps", 2, monkeypatch=monkeypatch)
    training = [recon.requires_grad for recon in seen if len(recon) == 4 and recon.shape[-1] == 32]
    assert True in training and training.count(True) == 1                                  # step 0 alone; step 1 and validation not


@pytest.mark.parametrize("flag", [["--grad_checkpoint"], ["--compile", "on"]])
def test_what_saves_memory_or_time_changes_no_number(flag, tmp_path, monkeypatch, request):
    """Blocks computed twice, or compiled: the log of the plain run (bit for bit, or to float tolerance), validation included."""
    if flag[0] == "--compile" and not request.config.getoption("--long"):
        pytest.skip("--long compiles (a minute or two)")
    flags = ["--reg", "esm", "--steps", 5]
    plain = train(tmp_path / "plain", *flags, monkeypatch=monkeypatch)
    for a, b in zip(plain, train(tmp_path / "other", *flags, *flag, monkeypatch=monkeypatch)):
        assert a == pytest.approx(b, rel=0 if flag[0] == "--grad_checkpoint" else 1e-2)


@pytest.mark.parametrize("flags, culprit", [
    (["--image_size", "31"], "--image_size 31"), (["--image_size", "8"], "--image_size 8"), (["--reg", "dsm", "--image_size", "40"], "--reg dsm"), (["--reg", "dsm", "se"], "--reg dsm se"),
    (["--reg", "none", "kl"], "--reg none"), (["--reg", "vf", "uae"], "--reg vf uae"), (["--reg", "uae", "--uae_cutoff", "0"], "--uae_cutoff 0"),
    (["--reg", "vf", "--encoder", "resnet"], "resnet"), (["--dsm_masks", "0", "15"], "--dsm_masks"), (["--gamma", "nan"], "--gamma nan"),
    (["--gamma", "-1"], "--gamma -1"), (["--batch_size", "0"], "--batch_size 0"), (["--lr", "0"], "--lr 0"), (["--lr", "inf"], "--lr inf"),
    (["--eval_every", "0"], "--eval_every 0"), (["--seed", "-1"], "--seed -1"), (["--data", "nowhere"], "--data nowhere"),
    (["--gan_weight", "0.5", "--image_size", "64", "--reg", "se"], "--gan_weight 0.5"), (["--reg", "se", "--image_size", "28"], "--reg se"), (["--keep_every", "30"], "--keep_every 30"),
    (["--lpips_weight", "0.5", "--reg", "eq"], "--lpips_weight 0.5")])
def test_bad_flags_end_with_one_line(flags, culprit, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that begins with the culprit, and nothing is left behind."""
    monkeypatch.setattr(sys, "argv", ["train_ae.py", *TINY, "--out", str(tmp_path / "run"), *flags])
    with pytest.raises(SystemExit) as exit, train_ae.runtime.one_line_errors():
        train_ae.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("train_ae.py: ") and culprit in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_by_accident(tmp_path, monkeypatch):
    """The same command twice: refused; with --overwrite it starts anew; --resume refuses other flags by name."""
    train(tmp_path, "--reg", "none", "--steps", 1, monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match="--overwrite"):
        train(tmp_path, "--reg", "none", "--steps", 1, monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match=r"--reg \['kl'\] \(was \['none'\]\)"):
        train(tmp_path, "--reg", "kl", "--steps", 2, "--resume", monkeypatch=monkeypatch)
    assert train(tmp_path, "--reg", "kl", "--steps", 1, "--overwrite", monkeypatch=monkeypatch)[0]["step"] == 0
