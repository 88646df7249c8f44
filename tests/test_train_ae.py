"""
The training script end to end, on 16 to 64 pixel images: every method runs, resuming is invisible,
processes agree, bad flags say so.
"""
import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import losses
import train_ae
from common.weights import load_autoencoder
from conftest import ROOT, run_main, same
from vae import CONFIGS, AutoencoderKL

TINY = ("--preset quick --image_size 32 --batch_size 4 --val_images 6 --workers 0 --device cpu "
        "--log_every 1 --eval_every 100 --warmup_steps 2").split()


def train(out, *flags, monkeypatch):
    """Run train_ae.main in this process; returns log.jsonl as a list of dicts."""
    run_main(train_ae, *TINY, "--out", out, *flags, monkeypatch=monkeypatch)
    return read_log(out)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def torchrun(out, processes, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", "train_ae.py", *TINY, "--out", str(out), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return read_log(out)


def test_forward_is_fig_1():
    """Encode, sample with the given noise, let the method change both sides, decode; H != W."""
    torch.manual_seed(1)
    ae = AutoencoderKL(CONFIGS["f2d4-tiny"])
    images, noise = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 16, 24)
    moments = ae.quant_conv(ae.encoder(images))
    mean, logvar = moments.chunk(2, dim=1)
    z = mean + (0.5 * logvar).exp() * noise
    target, shown = losses.dsm_pair(images, z, n=10)
    expected = ae.decoder(ae.post_quant_conv(shown)), target, z, mean, logvar
    recon, target, latents, posterior = ae(images, noise, functools.partial(losses.dsm_pair, n=10))
    found = recon, target, latents, posterior.mean, posterior.logvar
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(target, images) and not torch.equal(shown, z)


class SmallPerceptual(torch.nn.Module):
    """In place of LPIPS, whose weights are a download."""

    def forward(self, a, b):
        return (a.float() - b).square().mean()


def small_networks(monkeypatch):
    monkeypatch.setattr(train_ae, "PerceptualLoss", SmallPerceptual)
    small = functools.partial(train_ae.PatchDiscriminator, channels=8)
    monkeypatch.setattr(train_ae, "PatchDiscriminator", small)


# Every term of the loss with a weight of its own; step 0 has no discriminator yet. EQ-VAE decodes
# to as little as a quarter of the size, and the discriminator needs 24 pixels.
WEIGHTS = dict(lpips=0.3, esm=0.5, kl=0.02, vf=0.4, uae=0.6, gan=0.7)
EVERYTHING = ["--gan_start", 1, "--gan_every_step", "--encoder_source", "random", "--steps", 3]
for term, weight in WEIGHTS.items():
    EVERYTHING += [f"--{term}_weight", weight]


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("flags", [
    ["--reg", "esm", "--esm_weight", WEIGHTS["esm"], "--steps", 3],
    [*EVERYTHING, "--reg", "esm", "kl", "dsm", "vf"],
    [*EVERYTHING, "--reg", "esm", "kl", "eq", "uae", "--image_size", 96]])
def test_a_terms_weight_and_value_are_stated_once(flags, tmp_path, monkeypatch):
    """
    The logged loss is the sum of the logged terms, times their flags' weights and, for VA-VAE and
    GAN, the logged adaptive ratios: nothing is in it that is not in the log, nor another way.
    """
    small_networks(monkeypatch)
    log = train(tmp_path, *flags, monkeypatch=monkeypatch)
    lines = [line for line in log if "loss" in line]
    assert len(lines) == 3
    weights = {"l1": 1.0, "esm": WEIGHTS["esm"]}
    ratios = {"align"} if "vf" in flags else set()
    everything = "kl" in flags
    if everything:
        align = "vf" if "vf" in flags else "uae"
        weights |= dict(lpips=WEIGHTS["lpips"], kl=WEIGHTS["kl"], align=WEIGHTS[align])
    for line in lines:
        if everything and line["step"] == 1:               # the discriminator begins
            weights["gan"] = WEIGHTS["gan"]
            ratios.add("gan")
        logged = line.keys() - {"step", "loss", "grad_norm", "disc", "disc_grad_norm"}
        assert logged == weights.keys() | {f"{name}_weight" for name in ratios}
        loss = 0.0
        for name, weight in weights.items():
            assert line[name] != 0
            loss += weight * line.get(f"{name}_weight", 1.0) * line[name]
        assert line["loss"] == pytest.approx(loss, rel=1e-5)


def plain_loss(nets, images, noise, pair, reg, gan):
    """The autoencoder's loss by hand, in one graph, with nothing of train_ae.py but its nets."""
    recon, target, latents, posterior = nets.ae(images, noise, pair)
    rec = F.l1_loss(recon, target) + WEIGHTS["lpips"] * nets.perceptual(recon, target)
    loss = rec + WEIGHTS["esm"] * losses.esm_loss(images, latents, 1.0)
    loss = loss + WEIGHTS["kl"] * losses.kl_loss(posterior.mean, posterior.logvar)
    if nets.encoder:
        grid = latents.shape[-2:]
        cells = nets.projection(latents.flatten(2).transpose(1, 2))
        features = nets.encoder(images, grid)
        if "uae" in reg:
            align = losses.low_freq_align_loss(cells, features, grid)
            loss = loss + WEIGHTS["uae"] * align
        else:
            align = losses.vf_loss(cells, features)
            ratio = losses.adaptive_weight(rec, align, nets.ae.encoder.conv_out.weight)
            loss = loss + WEIGHTS["vf"] * ratio * align
    if gan:
        value = losses.hinge_g_loss(nets.disc(recon))
        ratio = losses.adaptive_weight(rec, value, nets.ae.decoder.conv_out.weight)
        loss = loss + WEIGHTS["gan"] * ratio * value
    return loss


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("flags", [
    ["--reg", "esm", "kl", "dsm", "vf", "--gan_weight", 0],
    ["--reg", "esm", "kl", "eq", "uae", "--gan_weight", 0, "--image_size", 64],
    ["--reg", "esm", "kl", "dsm"]])
def test_gradients_are_those_of_the_plain_loss(flags, tmp_path, monkeypatch):
    """
    However a step arranges its backward passes, autoencoder and projection get the gradient of the
    sum of all terms, each ratio held constant, and the two parts of a batch add up to their mean.
    """
    small_networks(monkeypatch)
    forward_backward = train_ae.forward_backward
    turns = []

    def compared(args, nets, compute, images, noise, pair, turn):
        learned = [p for group in nets.optimizer.param_groups for p in group["params"]]
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learned]
        loss = plain_loss(nets, images, noise, pair, args.reg, turn.gan)
        slopes = torch.autograd.grad(loss / 2, learned)
        values = forward_backward(args, nets, compute, images, noise, pair, turn)
        torch.testing.assert_close(values["loss"], loss)
        for p, old, slope in zip(learned, before, slopes):
            room = 1e-4 * float(slope.norm()) + 1e-7       # of rounding, in each entry
            torch.testing.assert_close(p.grad - old, slope, rtol=1e-3, atol=room)
        turns.append(turn.gan)
        return values

    monkeypatch.setattr(train_ae, "forward_backward", compared)
    train(tmp_path, *EVERYTHING, *flags, "--grad_accum", 2, monkeypatch=monkeypatch)
    gan = "--gan_weight" not in flags
    assert turns == [False, False, gan, gan, gan, gan]     # from step 1 on


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("reg, term", [
    ("none", None), ("kl", "kl"), ("esm", "esm"), ("dsm", None), ("se", None), ("eq", "kl"),
    ("esm dsm", "esm"), ("vf", "kl align align_weight"), ("uae", "align")])
def test_every_method_trains_and_computes_only_its_terms(reg, term, tmp_path, monkeypatch):
    """
    A few steps of each --reg: finite losses, the terms that belong to it and no others, a
    checkpoint that loads, a picture.
    """
    flags = ["--image_size", 64] if "dsm" in reg else []   # two 8x8 blocks a side
    log = train(tmp_path, "--reg", *reg.split(), "--steps", 6, "--encoder_source", "random",
                *flags, monkeypatch=monkeypatch)
    lines = [line for line in log if "loss" in line]
    assert len(lines) == 6
    names = {"step", "l1", "loss", "grad_norm"} | set((term or "").split())
    assert all(set(line) == names for line in lines)
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in log)
    ae = load_autoencoder(tmp_path / "ckpt.pt")
    assert ae.config.latent_channels == 4
    assert (ae.latent_std != 1).all()                      # statistics came along
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000


def test_esm_reaches_the_encoder(tmp_path, monkeypatch):
    """
    With a large weight the divergence on held-out images falls below that of a run without it, same
    seed.
    """
    def divergence(reg, *flags):
        log = train(tmp_path / reg, "--reg", reg, *flags, "--steps", 40, "--lr", 2e-3,
                    monkeypatch=monkeypatch)
        return log[-1]["val_esm"]
    free = divergence("none")
    matched = divergence("esm", "--esm_weight", 1.0)
    assert matched < 0.5 * free


@pytest.mark.parametrize("flags", [
    ["--reg", "eq"],
    ["--reg", "dsm", "--image_size", "64", "--gan_weight", "0.5", "--gan_start", "2"]])
def test_resuming_equals_never_stopping(flags, tmp_path, monkeypatch):
    """
    7 steps straight, and 4 + 3 after a resume: the same weights, optimisers, discriminator and log,
    bit for bit.
    """
    flags = [*flags, "--steps", 7, "--eval_every", 4]
    straight = train(tmp_path / "a", *flags, monkeypatch=monkeypatch)
    train(tmp_path / "b", *flags, "--keep_every", 4, monkeypatch=monkeypatch)
    # as if killed after step 4's checkpoint
    (tmp_path / "b" / "ckpt_4.pt").rename(tmp_path / "b" / "ckpt.pt")
    resumed = train(tmp_path / "b", *flags, "--resume", monkeypatch=monkeypatch)
    assert resumed == straight
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in "ab")
    assert a.keys() == b.keys() and a["step"] == b["step"] == 7
    assert all(same(a[part], b[part]) for part in set(a) - {"args"})


def test_a_checkpoint_of_before_the_rewrite_resumes(tmp_path, monkeypatch):
    """
    The fixture is step 3 of a run that the code of commit b96e215 made, with the first line of
    flags below; resumed today it goes on as it did then, to what other machines round.
    """
    flags = ("--preset quick --data leaves --reg esm --image_size 16 --batch_size 4 "
             "--warmup_steps 2 --log_every 1 --eval_every 3 --val_images 4 --device cpu").split()
    shutil.copy(ROOT / "tests" / "fixtures" / "ckpt_b96e215.pt", tmp_path / "ckpt.pt")
    run_main(train_ae, *flags, "--resume", "--steps", 6, "--out", tmp_path, monkeypatch=monkeypatch)
    expected = [                                           # what commit b96e215 logged
        dict(step=3, loss=0.43008601665496826, grad_norm=1.5333690643310547),
        dict(step=4, loss=0.3677155375480652, grad_norm=0.9413576126098633),
        dict(step=5, loss=0.42079150676727295, grad_norm=1.017196774482727),
        dict(step=6, val_psnr=12.6144700050354)]
    lines = [line for line in read_log(tmp_path) if "loss" in line or line["step"] == 6]
    for line, then in zip(lines, expected, strict=True):
        assert {name: line[name] for name in then} == pytest.approx(then, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*untrained")
@pytest.mark.parametrize("reg", ["vf", "uae"])
def test_alignment_reaches_the_encoder_and_is_resumed(reg, tmp_path, monkeypatch):
    """
    Without reconstruction's help the encoder moves another way than under --reg none; the
    projection is in the checkpoint.
    """
    random = ["--encoder_source", "random"]
    aligned = ["--reg", reg, "--kl_weight", 0, f"--{reg}_weight", 1, *random]
    train(tmp_path / "none", "--reg", "none", "--steps", 3, *random, monkeypatch=monkeypatch)
    train(tmp_path / reg, *aligned, "--steps", 3, monkeypatch=monkeypatch)
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("none", reg))
    assert not same(a["model"]["encoder.conv_in.weight"], b["model"]["encoder.conv_in.weight"])
    assert "projection" in b and "projection" not in a
    resumed = train(tmp_path / reg, *aligned, "--steps", 4, "--resume", monkeypatch=monkeypatch)
    assert resumed[-1]["step"] == 4


def test_gan_alternates_on_two_processes(tmp_path):
    """
    From gan_start on, even steps train the autoencoder and odd ones the discriminator, under
    torchrun on the CPU, without a hang.
    """
    log = torchrun(tmp_path, 2, "--reg", "kl", "--gan_weight", "0.5", "--gan_start", "2",
                   "--steps", "7")
    by_step = {line["step"]: line for line in log if "val_psnr" not in line}
    assert "gan" not in by_step[1] and "disc" not in by_step[1]
    for step in (2, 4, 6):
        assert {"gan", "gan_weight"} <= by_step[step].keys() and "disc" not in by_step[step]
    for step in (3, 5):
        assert "disc" in by_step[step] and "l1" not in by_step[step]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in log)


def test_gan_every_step_trains_both(tmp_path, monkeypatch):
    """--gan_every_step: both terms in each step."""
    log = train(tmp_path, "--reg", "none", "--gan_weight", 0.5, "--gan_start", 1,
                "--gan_every_step", "--steps", 3, monkeypatch=monkeypatch)
    by_step = {line["step"]: line for line in log if "val_psnr" not in line}
    assert "disc" not in by_step[0]
    assert all({"disc", "gan", "l1"} <= by_step[step].keys() for step in (1, 2))


def test_discriminator_step_keeps_no_graph_through_the_autoencoder(tmp_path, monkeypatch):
    """
    What a discriminator step decodes does not require a gradient, and the autoencoder's weights
    stay as they were.
    """
    seen = []
    forward = train_ae.AutoencoderKL.decode
    monkeypatch.setattr(train_ae.AutoencoderKL, "decode",
                        lambda self, z: seen.append(forward(self, z)) or seen[-1])
    train(tmp_path, "--reg", "none", "--gan_weight", 0.5, "--gan_start", 0, "--steps", 2,
          monkeypatch=monkeypatch)
    training = [recon.requires_grad for recon in seen if len(recon) == 4 and recon.shape[-1] == 32]
    # step 0 alone; step 1 and validation not
    assert True in training and training.count(True) == 1


@pytest.mark.parametrize("flag", [["--grad_checkpoint"], ["--compile", "on"]])
def test_what_saves_memory_or_time_changes_no_number(flag, tmp_path, monkeypatch, request):
    """
    Blocks computed twice, or compiled: the log of the plain run (bit for bit, or to float
    tolerance), validation included.
    """
    if flag[0] == "--compile" and not request.config.getoption("--long"):
        pytest.skip("--long compiles (a minute or two)")
    flags = ["--reg", "esm", "--steps", 5]
    plain = train(tmp_path / "plain", *flags, monkeypatch=monkeypatch)
    other = train(tmp_path / "other", *flags, *flag, monkeypatch=monkeypatch)
    for a, b in zip(plain, other):
        assert a == pytest.approx(b, rel=0 if flag[0] == "--grad_checkpoint" else 1e-2)


@pytest.mark.parametrize("flags, culprit", [
    (["--image_size", "31"], "--image_size 31"), (["--image_size", "8"], "--image_size 8"),
    (["--reg", "dsm", "--image_size", "40"], "--reg dsm"), (["--reg", "dsm", "se"], "--reg dsm se"),
    (["--reg", "none", "kl"], "--reg none"), (["--reg", "vf", "uae"], "--reg vf uae"),
    (["--reg", "uae", "--uae_weight", "-1"], "--uae_weight -1"),
    (["--reg", "vf", "--encoder", "resnet"], "resnet"), (["--dsm_masks", "0", "15"], "--dsm_masks"),
    (["--gamma", "nan"], "--gamma nan"), (["--gamma", "-1"], "--gamma -1"),
    (["--batch_size", "0"], "--batch_size 0"), (["--lr", "0"], "--lr 0"),
    (["--lr", "inf"], "--lr inf"), (["--eval_every", "0"], "--eval_every 0"),
    (["--seed", "-1"], "--seed -1"), (["--data", "nowhere"], "--data nowhere"),
    (["--gan_weight", "0.5", "--image_size", "64", "--reg", "se"], "--gan_weight 0.5"),
    (["--reg", "se", "--image_size", "28"], "--reg se"),
    (["--keep_every", "30"], "--keep_every 30"),
    (["--lpips_weight", "0.5", "--reg", "eq"], "--lpips_weight 0.5")])
def test_bad_flags_end_with_one_line(flags, culprit, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that begins with the culprit, and nothing is left behind."""
    with pytest.raises(SystemExit) as exit, train_ae.run.one_line_errors():
        train(tmp_path / "run", *flags, monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("train_ae.py: ") and culprit in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_by_accident(tmp_path, monkeypatch):
    """
    The same command twice: refused; with --overwrite it starts anew; --resume refuses other flags
    by name.
    """
    def again(reg, steps, *flags):
        return train(tmp_path, "--reg", reg, "--steps", steps, *flags, monkeypatch=monkeypatch)
    again("none", 1)
    with pytest.raises(ValueError, match="--overwrite"):
        again("none", 1)
    with pytest.raises(ValueError, match=r"--reg \['kl'\] \(was \['none'\]\)"):
        again("kl", 2, "--resume")
    assert again("kl", 1, "--overwrite")[0]["step"] == 0
