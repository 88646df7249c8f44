"""The first training script end to end: the loss is the sum of its terms, resuming is invisible."""
import collections
import contextlib
import functools
import random
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import losses
import train_ae
import train_diffusion
from common import run
from common.metrics import psnr, ssim
from common.weights import load_autoencoder
from conftest import args_of, copy_at, equal_runs, long_but, plant_vgg, read_lines, run_main
from dit import NoiseStream
from spectral import fit_power_law, match_resolution, power_spectrum, radial_profile
from vae import CONFIGS, AutoencoderKL

TINY = ("--preset quick --image_size 32 --batch_size 4 --val_images 6 --workers 0 --device cpu "
        "--model f2d4-tiny --log_every 1 --eval_every 100 --warmup_steps 2 "
        "--encoder_source random").split()
pytestmark = pytest.mark.filterwarnings("ignore:.*UNTRAINED")


def train(out, *flags):
    """Run train_ae.main in this process; returns log.jsonl as a list of dicts."""
    run_main(train_ae, *TINY, "--out", out, *flags)
    return read_lines(out / "log.jsonl")


def test_forward_is_fig_1():
    """Encode, sample with the given noise, let the method change both sides, decode; H != W."""
    torch.manual_seed(1)
    ae = AutoencoderKL(CONFIGS["f2d4-tiny"])
    images, noise = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 16, 24)
    moments = ae.quant_conv(ae.encoder(images))
    mean, logvar = moments.chunk(2, dim=1)
    z = mean + (0.5 * logvar).exp() * noise
    target, masked = losses.dsm_pair(images, z, n=10)
    expected = ae.decoder(ae.post_quant_conv(masked)), target, z, mean, logvar
    recon, target, latents, posterior = ae(images, noise, functools.partial(losses.dsm_pair, n=10))
    found = recon, target, latents, posterior.mean, posterior.logvar
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(target, images) and not torch.equal(masked, z)


@pytest.fixture
def small_networks(monkeypatch):
    """A list of the networks that main builds, all of them small: [ae, disc if any, lpips]."""
    built = []

    def spy(name, make):
        def build(*args):
            built.append(make(*args))
            return built[-1]
        monkeypatch.setattr(train_ae, name, build)
    spy("PerceptualLoss", torch.nn.MSELoss)                # LPIPS' weights are a download
    spy("PatchDiscriminator", functools.partial(losses.PatchDiscriminator, channels=8))
    spy("AutoencoderKL", AutoencoderKL)
    return built


# Every term of the loss with a weight of its own; step 0 has no discriminator yet.
WEIGHTS = dict(lpips=0.3, esm=0.5, kl=0.02, vf=0.4, uae=0.6, gan=0.7)
EVERYTHING = ["--gan_start", 1, "--gan_every_step", "--steps", 3]
for term, weight in WEIGHTS.items():
    EVERYTHING += [f"--{term}_weight", weight]


@pytest.mark.parametrize("align", ["vf", "uae"])
def test_a_terms_weight_and_value_are_stated_once(align, small_networks, tmp_path):
    """The logged loss is the sum of the logged terms, times their flags' and logged weights."""
    log = train(tmp_path, *EVERYTHING, "--reg", "esm", "kl", "dsm", align)
    lines = [line for line in log if "loss" in line]
    weights = dict(l1=1.0, align=WEIGHTS[align], **{k: WEIGHTS[k] for k in ("lpips", "esm", "kl")})
    ratios = {"align_weight"} if align == "vf" else set()
    for step, line in enumerate(lines):
        if step == 1:                                      # the discriminator begins
            weights["gan"] = WEIGHTS["gan"]
            ratios.add("gan_weight")
        logged = line.keys() - {"step", "loss", "grad_norm", "disc", "disc_grad_norm"}
        assert logged == weights.keys() | ratios and ("disc" in line) == ("gan" in weights)
        loss = 0.0
        for name, weight in weights.items():
            assert line[name] != 0
            loss += weight * line.get(f"{name}_weight", 1.0) * line[name]
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert len(lines) == 3


FORWARD = AutoencoderKL.forward                            # one test wraps it


def plain_loss(ae, disc, perceptual, encoder, projection, images, noise, pair, reg):
    """The autoencoder's loss by hand, in one graph; disc None: no GAN yet."""
    recon, target, latents, posterior = FORWARD(ae, images, noise, pair)
    rec = F.l1_loss(recon, target) + WEIGHTS["lpips"] * perceptual(recon, target)
    norm = lambda loss, layer: torch.autograd.grad(loss, layer, retain_graph=True)[0].norm()
    loss = rec + WEIGHTS["esm"] * losses.esm_loss(images, latents, 1.0)
    loss = loss + WEIGHTS["kl"] * losses.kl_loss(posterior.mean, posterior.logvar)
    sent_back = rec
    if disc:
        value, layer = losses.hinge_g_loss(disc(recon)), ae.decoder.conv_out.weight
        ratio = norm(rec, layer) / (norm(value, layer) + 1e-4)
        loss = loss + WEIGHTS["gan"] * ratio * value
        sent_back = rec + WEIGHTS["gan"] * ratio * value
    grid = latents.shape[-2:]
    cells, features = projection(latents.flatten(2).transpose(1, 2)), encoder(images, grid)
    if "uae" in reg:
        return loss + WEIGHTS["uae"] * losses.low_freq_align_loss(cells, features, grid)
    align, layer = losses.vf_loss(cells, features), ae.encoder.conv_out.weight
    ratio = norm(sent_back, layer) / (norm(align, layer) + 1e-4)
    return loss + WEIGHTS["vf"] * ratio * align


@pytest.mark.parametrize("flags", [
    ["--reg", "esm", "kl", "dsm", "vf"],
    ["--reg", "esm", "kl", "eq", "uae", "--gan_weight", 0, "--image_size", 64]])
def test_gradients_are_those_of_the_plain_loss(flags, small_networks, tmp_path, monkeypatch):
    """Of the sum of all terms, each ratio held constant; micro-batches add up to their mean."""
    calls, aligned, checked = collections.deque(maxlen=2), [], []      # of two micro-batches
    step, build = run.optimizer_step, train_ae.alignment_networks

    def recording(self, *inputs):
        calls.append((inputs, FORWARD(self, *inputs)))
        return calls[-1][1]

    def compared(optimizer, lr, clip_grad, finite):
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        (ae, *disc, lpips), loss = small_networks, 0
        for inputs, (recon, target, *_) in calls:
            if len(learned) > len(list(ae.parameters())):  # its own, and the projection's
                gan = disc[0] if disc and checked else None            # step 0 has none
                loss = loss + plain_loss(ae, gan, lpips, *aligned[0], *inputs, flags) / 2
            else:
                loss = loss + losses.hinge_d_loss(disc[0](target), disc[0](recon.detach())) / 2
        for p, slope in zip(learned, torch.autograd.grad(loss, learned)):
            room = 1e-4 * float(slope.norm()) + 1e-7       # of rounding, in each entry
            torch.testing.assert_close(p.grad, slope, rtol=1e-3, atol=room)
        checked.append(len(learned))
        return step(optimizer, lr, clip_grad, finite)
    monkeypatch.setattr(AutoencoderKL, "forward", recording)
    monkeypatch.setattr(train_ae, "alignment_networks",
                        lambda *a: aligned.append(build(*a)) or aligned[0])
    monkeypatch.setattr(run, "optimizer_step", compared)
    train(tmp_path, *EVERYTHING, *flags, "--grad_accum", 2)
    assert len(checked) == (3 if "--gan_weight" in flags else 5)


@torch.no_grad()
def test_validation_by_hand():
    """Reconstructions of the mode, spectra and statistics of samples, seeded by image; H != W."""
    ae, args = AutoencoderKL(CONFIGS["f2d4-tiny"]), SimpleNamespace(seed=3, gamma=0.6)
    ae.quant_conv.bias[4:] += 5                            # else the noise hardly counts
    images = torch.rand(3, 3, 32, 48) * 2 - 1
    batches = [(images[:2], None, torch.tensor([5, 6])), (images[2:], None, torch.tensor([7]))]
    found = train_ae.validate(ae, batches, args, contextlib.nullcontext())
    q, eps = ae.encode(images), NoiseStream(3, (5, 6, 7))((3, 4, 16, 24))
    z, recon = q.mean + (q.logvar / 2).exp() * eps, ae.decode(q.mean)
    alpha = lambda x: fit_power_law(radial_profile(power_spectrum(x)).mean(0))
    std = z.movedim(1, 0).flatten(1).std(1, correction=0)
    expected = dict(
        val_psnr=psnr(recon, images).mean(), val_ssim=ssim(recon, images).mean(),
        val_l1=(recon - images).abs().mean(), val_esm=losses.esm_loss(images, z, 0.6),
        val_alpha=alpha(z), val_alpha_image=alpha(match_resolution(images, (16, 24))),
        val_latent_std=std.square().mean().sqrt())
    assert found == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-3)
    torch.testing.assert_close(ae.latent_mean, z.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ae.latent_std, std, rtol=1e-3, atol=1e-4)


def test_what_a_step_draws():
    """The distributions of Alg. 2, of Scale Equivariance and of EQ-VAE, over 4,000 steps."""
    rng, drawn = random.Random(0), {}
    for reg in ("dsm", "se", "eq"):
        args = args_of(train_ae, "--reg", reg)
        drawn[reg] = [train_ae.draw_pair(args, rng) for _ in range(4000)]
    for reg, name, values in (("dsm", "n", losses.DSM_MASKS), ("se", "k", losses.SCALES)):
        found = collections.Counter(pair.keywords[name] for _, pair in drawn[reg])
        assert found.keys() == {*values}
        assert min(found.values()) > 0.9 * 4000 / len(values)
    pairs = [p.keywords for _, p in drawn["eq"] if getattr(p, "func", None) is losses.eq_pair]
    small = [scale for scale, _ in drawn["eq"] if scale < 1]
    assert len(pairs) == pytest.approx(2000, abs=100) and len(small) == pytest.approx(500, abs=60)
    assert {pair["rot"] for pair in pairs} == {1, 2, 3}
    for scales in ([pair["scale"] for pair in pairs], small):
        assert {32 * scale for scale in scales} == {*range(8, 32)}


@pytest.mark.parametrize("reg, resize, imagenet", [("vf", "bilinear", False),
                                                   ("uae", "bicubic", True)])
def test_the_teacher_sees_images_as_in_the_methods_code(reg, resize, imagenet):
    args = args_of(train_ae, "--reg", reg, "--encoder_source", "random")
    teacher, projection = train_ae.alignment_networks(args, 4, "cpu")
    assert (teacher.resize, teacher.imagenet) == (resize, imagenet) and projection.bias is None


@pytest.mark.parametrize("reg, term", [
    ("none", None), ("kl", "kl"), ("dsm", None), ("se", None), ("eq", "kl"), ("esm dsm", "esm"),
    ("vf", "kl align align_weight"), ("uae", "align")])
def test_every_method_trains_and_computes_only_its_terms(reg, term, tmp_path):
    """Finite losses, the terms that belong to a --reg and no others, a checkpoint, a figure."""
    log = train(tmp_path, "--reg", *reg.split(), "--steps", 2)
    lines = [line for line in log if "loss" in line]
    assert len(lines) == 2
    names = {"step", "l1", "loss", "grad_norm"} | set((term or "").split())
    assert all(set(line) == names for line in lines)
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in log)
    ae = load_autoencoder(tmp_path / "ckpt.pt")
    assert ae.config.latent_channels == 4 and (ae.latent_std != 1).all()   # statistics came along
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000


def test_resuming_equals_never_stopping(tmp_path):
    """5 steps straight, and 3 + 2 after a resume: networks, optimisers and log are equal."""
    flags = ["--reg", "dsm", "vf", "--gan_weight", 0.5, "--gan_start", 1, "--steps", 5,
             "--weight_decay", 0.03, "--eval_every", 3, "--keep_every", 3, "--log_every", 4]
    train(tmp_path / "a", *flags)
    copy_at(3, tmp_path / "a", tmp_path / "b")
    train(tmp_path / "b", *flags, "--resume")
    checkpoint = equal_runs(tmp_path / "a", tmp_path / "b")
    assert checkpoint.keys() >= {"projection", "disc", "disc_optimizer"} and checkpoint["step"] == 5
    for name in ("optimizer", "disc_optimizer"):
        group, = checkpoint[name]["param_groups"]
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), 0.03)


@pytest.mark.parametrize("flags, expected", [
    ([], dict(ae=[0, 1, 2, None, 3, None], disc=[None, None, None, 0, None, 1])),
    (["--gan_every_step"], dict(ae=[0, 1, 2, 3, 4, 5], disc=[None, None, 0, 1, 2, 3]))])
def test_the_warm_up_counts_the_updates_of_a_network(flags, expected, tmp_path, monkeypatch):
    """--gan_start 2: each network's rate after k of its own updates is lr (k + 1) / warm-up."""
    rates, step = [], run.optimizer_step

    def spy(optimizer, lr, *rest):
        width = optimizer.param_groups[0]["params"][0].shape[0]
        rates.append(("disc" if width == 64 else "ae", lr))
        return step(optimizer, lr, *rest)
    monkeypatch.setattr(run, "optimizer_step", spy)
    train(tmp_path, "--reg", "none", "--gan_weight", 0.5, "--gan_start", 2, "--steps", 6,
          "--warmup_steps", 4, "--lr", 0.004, *flags)
    for name, updates in expected.items():
        found = [lr for network, lr in rates if network == name]
        assert found == pytest.approx([0.001 * min(4, k + 1) for k in updates if k is not None])


def test_what_saves_memory_changes_no_number(tmp_path, monkeypatch):
    """Blocks computed twice: the log of the plain run; bf16: finite, its first loss to 2 digits."""
    flags = ["--reg", "esm", "--gan_weight", 0.5, "--gan_start", 1, "--steps", 3]
    recomputed = Mock(side_effect=torch.utils.checkpoint.checkpoint)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", recomputed)
    plain = train(tmp_path / "a", *flags)
    assert not recomputed.called
    assert train(tmp_path / "b", *flags, "--grad_checkpoint") == plain and recomputed.called
    half = train(tmp_path / "c", *flags, "--dtype", "bf16")
    first = [next(line["loss"] for line in log if "loss" in line) for log in (plain, half)]
    assert first[1] == pytest.approx(first[0], rel=2e-2) and first[0] != first[1]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in half)


@pytest.mark.parametrize("reg", long_but(["kl", "uae"]))
def test_compiled_training_is_eager_training(reg, tmp_path, monkeypatch):
    """GAN from step 2, LPIPS, alignment; from a cold and a warm Inductor cache: eager's losses."""
    plant_vgg(tmp_path, monkeypatch)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    logs = {}
    for name, compile in (("eager", "off"), ("cold", "on"), ("warm", "on")):
        torch.compiler.reset()
        logs[name] = train(tmp_path / name, "--reg", reg, "--gan_weight", 0.5, "--gan_start", 2,
                           "--lpips_weight", 0.5, "--lr", 1e-6, "--steps", 6, "--eval_every", 3,
                           "--compile", compile)
    assert logs["cold"] == logs["warm"]
    for eager, cold in zip(logs["eager"], logs["cold"], strict=True):
        assert eager == pytest.approx(cold, rel=5e-4, abs=1e-5)    # of the ratios, too


def test_what_would_compile_again_and_again_is_not_compiled_by_default():
    """eq and se use many sizes, vf runs backward twice; --compile on wins."""
    for reg, compiled in dict(esm=None, eq="off", se="off", vf="off").items():
        assert args_of(train_ae, "--reg", reg).compile == compiled
    assert args_of(train_ae, "--reg", "eq", "--compile", "on").compile == "on"


@pytest.mark.parametrize("script", [train_ae, train_diffusion])
def test_help_shows_every_default(script, capsys):
    """Each flag has a sentence and its default; --preset NAME --help shows that preset's."""
    def shown(*flags):
        with pytest.raises(SystemExit):
            run_main(script, *flags, "--help")
        options = capsys.readouterr().out.split("options:")[1]
        return [" ".join(entry.split()) for entry in options.split("\n  --")[1:]]
    for entry in shown():
        switch = "(default" not in entry and " " in entry and not entry.split()[1].isupper()
        assert switch or "(default: " in entry, entry
        assert "(default: None)" not in entry and len(entry.split()) > 3, entry
    steps = {flags[-1]: next(e for e in shown(*flags) if e.startswith("steps "))
             for flags in (["--preset", "quick"], ["--preset", "one-gpu"])}
    assert "1800)" in steps["quick"] or "3000)" in steps["quick"]
    assert "20000)" in steps["one-gpu"]
    if script is train_ae:                                 # in the words of the flag, or the preset
        data = [e for e in (*shown(), *shown("--preset", "quick")) if e.startswith("data ")]
        assert [e.split("default: ")[1] for e in data] == ["leaves)", "discs)"]
