"""theory.py against closed forms: Gaussian latents, whose best denoiser is the Wiener filter."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_diffusion
from analysis import figures, theory
from common.data import open_data
from common.weights import load_diffusion
from conftest import run_main, table
from dit import DDPM, Interpolant, NoiseStream
from spectral import dct2, idct2, match_resolution, radial_profile, wiener_gain
from test_train_diffusion import flags_of
from vae import AEConfig, AutoencoderKL, Posterior

C, H, W = 2, 8, 12
PROCESSES = dict(interpolant=Interpolant(), vp=DDPM("vp"), sd=DDPM("sd"))


def spectrum():
    """Power (C, H, W): a power law that differs by channel and by axis."""
    u, v = torch.arange(H, dtype=torch.float64), torch.arange(W, dtype=torch.float64)
    r2 = 1 + u[:, None] ** 2 + 0.5 * v[None, :] ** 2
    return torch.stack([8 / r2, 3 / r2.sqrt()])


def gaussian_latents(n, seed=0):
    white = NoiseStream(seed, range(n))((n, C, H, W)).double()
    return idct2(white * spectrum().sqrt())


class Denoiser(torch.nn.Module):
    """The exact denoiser of gaussian_latents as a network of the process; gain(alpha_bar)."""
    num_classes, in_channels, input_size = 0, C, (H, W)

    def __init__(self, process, gain):
        super().__init__()
        self.process, self.gain = process, gain
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t, time, y=None):
        ddpm = isinstance(self.process, DDPM)
        t = float(time[0]) / (1000 if ddpm else 1)
        alpha_bar = float(self.process.alpha_bar_at(t))
        a = math.sqrt(alpha_bar) if ddpm else 1 - t            # x_t = a x + s eps
        s = math.sqrt(1 - alpha_bar) if ddpm else t
        if a == 0:                                             # pure noise says nothing
            clean = torch.zeros_like(x_t, dtype=torch.float64)
        else:
            clean = idct2(dct2(x_t.double()) * self.gain(alpha_bar)) / a
        eps = (x_t - a * clean) / s
        return eps if ddpm else eps - clean


def wiener(process):
    return Denoiser(process, lambda alpha_bar: wiener_gain(spectrum(), alpha_bar))


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def test_noisy_and_clean_are_inverse(process):
    """The true answer at x_t gives the clean latent again; alpha_bar is its share of variance."""
    x, eps = torch.randn(2, 4, C, H, W, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        x_t = process.noisy(x, eps, t)
        truth = eps if isinstance(process, DDPM) else eps - x
        torch.testing.assert_close(process.clean(x_t, truth, t), x)
        data, noise = process.noisy(x, 0 * x, t), process.noisy(0 * x, eps, t)
        share = (data / x).mean() ** 2 / ((data / x).mean() ** 2 + (noise / eps).mean() ** 2)
        assert float(process.alpha_bar_at(t)) == pytest.approx(float(share))


def test_the_exact_denoiser_meets_the_bound(process):
    """Prop. 3.1: the Wiener filter leaves S / (1 + SNR) in every ring; predicting 0 leaves all."""
    latents = gaussian_latents(600)
    found = theory.denoised_power(wiener(process), process, latents, times=(0.15, 0.4, 0.7))
    torch.testing.assert_close(found.error, found.power - found.learnable, rtol=0.12, atol=0)
    fractions = theory.fraction_learned(found)
    assert found.fraction == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(fractions, torch.ones_like(fractions), rtol=0.08, atol=0)
    zero = Denoiser(process, lambda alpha_bar: 0.0)
    found = theory.denoised_power(zero, process, latents[:40], times=(0.2, 0.8), batch_size=7)
    torch.testing.assert_close(found.error, found.power.expand(2, -1))
    assert found.fraction == pytest.approx(0, abs=1e-9)


def test_power_and_bound_are_those_of_the_spectrum():
    """power: the mean of a ring; learnable: Eq. 1 per channel and coefficient, then the mean."""
    latents, process = gaussian_latents(50), Interpolant()
    found = theory.denoised_power(wiener(process), process, latents, times=(0.4,))
    S, alpha_bar = dct2(latents).square().mean(0), 0.36 / 0.52
    torch.testing.assert_close(found.power, theory.ring_profile(S).mean(0))
    eq1 = S * (alpha_bar * S / (1 - alpha_bar)) / (1 + alpha_bar * S / (1 - alpha_bar))
    torch.testing.assert_close(found.learnable[0], radial_profile(eq1.mean(0)[None], 8)[0])
    for h, w in ((8, 12), (2, 3), (4, 40), (16, 16), (5, 3)):      # no ring is empty
        assert (theory.ring_profile(torch.ones(1, h, w)) > 0).all()


@pytest.mark.parametrize("process", ["interpolant", "vp"], indirect=True)
def test_sampling_with_the_exact_denoiser_is_coarse_to_fine(process):
    """Each ring comes in where the theory says; the samples have the spectrum."""
    times, power, kept = theory.follow_sampling(wiener(process), process, (400, C, H, W), 100)
    assert times[-1] == 0 and (times.diff() < 0).all() and kept[-1].shape == (1, C, H, W)
    exact = theory.ring_profile(spectrum().mean(0)[None])[0]
    torch.testing.assert_close(power[-1], exact, rtol=0.2, atol=0)
    half = theory.half_times(times, power)
    assert (half.diff() < 0.02).all() and theory.slope_per_octave(half, power[-1]) > 0.03
    gains = [wiener_gain(spectrum(), float(process.alpha_bar_at(t))) for t in times[1:-1].tolist()]
    predicted = theory.ring_profile(torch.stack([(spectrum() * gain).mean(0) for gain in gains]))
    ideal = theory.half_times(times[1:], torch.cat([predicted, exact[None]]))
    torch.testing.assert_close(half.double(), ideal.double(), rtol=0, atol=0.04)


def test_half_times_by_hand():
    """Linear between two steps; the last crossing counts."""
    times = torch.tensor([1.0, 0.6, 0.2, 0.0])
    power = torch.tensor([[0.0, 4.0, 3.0], [1.0, 1.0, 3.0], [3.0, 3.0, 4.0], [4.0, 4.0, 4.0]])
    assert theory.half_times(times, power).tolist() == pytest.approx([0.4, 0.4, 1.0])
    for process in PROCESSES.values():                     # SNR = 1 is alpha_bar S = 1 - alpha_bar
        t = float(theory.wiener_half_times(torch.tensor([2.5]).double(), process))
        alpha_bar = float(process.alpha_bar_at(t))
        assert alpha_bar * 2.5 / (1 - alpha_bar) == pytest.approx(1, rel=0.01)
    half = 0.8 - 0.1 * torch.tensor([9.0, 1.5, 2.5, 3.5, 4.5, 5.5]).log2()  # ring 0 does not count
    power = torch.tensor([100.0, 10, 5, 2, 1, 1])
    assert theory.slope_per_octave(half, power) == pytest.approx(0.1)
    half[3], power[3] = 0.9, 0.05                          # nor does a ring that has no power
    assert theory.slope_per_octave(half, power) == pytest.approx(0.1)


def test_watching_changes_no_sample(process):
    plain = process.sample(wiener(process), (2, C, H, W), 6, noise=NoiseStream(0, range(2)))
    _, _, kept = theory.follow_sampling(wiener(process), process, (2, C, H, W), 6, keep=2)
    assert torch.equal(kept[-1], plain)


def test_diffusability_with_and_without_the_scale():
    """
    KL from the target in the form of Figs. 4 and 5, DC kept. Latents three times as large have
    other divergences, and the same everything else.
    """
    ae = AutoencoderKL(AEConfig((1, 2), C, ch=8, num_res_blocks=1, norm_groups=2)).eval()
    images = F.interpolate(torch.randn(4, 3, 8, 8), size=(32, 48), mode="bilinear")
    before = theory.diffusability(ae, images)
    share = lambda x, factor: torch.log1p(radial_profile(dct2(x).square().mean(1)) * factor)
    target = share(match_resolution(images, (16, 24)), torch.arange(1.0, 17))
    found = share(figures.encode_all(ae, images, 100, seed=0), 1)
    target, found = ((x / x.sum(1, keepdim=True)).mean(0) for x in (target, found))
    expected = (target * (target / found).log()).sum()
    assert before["kl_from_target"] == pytest.approx(float(expected), rel=1e-3)
    with torch.no_grad():
        for parameter in (ae.quant_conv.weight, ae.quant_conv.bias):
            parameter[:C] *= 3
        ae.quant_conv.bias[C:] += 2 * math.log(3)          # the posterior's noise, too
        ae.post_quant_conv.weight /= 3
    after = theory.diffusability(ae, images)
    for name in ("esm", "kl_from_target"):
        assert abs(after.pop(name) - before.pop(name)) > 1e-3
    assert after == pytest.approx(before, rel=1e-3)


def test_diffusability_of_a_perfect_pair():
    """
    The latent is the image: no distance of midpoints if each image is there twice. Cells correlate
    by 0 in noise, 1 in constants, -1 in a board.
    """
    ae = SimpleNamespace(encode=lambda x: Posterior(x, torch.full_like(x, -30.0)),
                         decode=lambda z: z)
    found = theory.diffusability(ae, torch.rand(50, 3, 16, 24) * 2 - 1)
    assert found["psnr"] == 100 and found["dsm"] > 50 and found["high_band"] > 60
    assert abs(found["neighbours"]) < 0.02
    features = lambda x: torch.stack([x.float().mean((1, 2, 3)), x.float().std((1, 2, 3))], 1)
    images = torch.rand(6, 3, 8, 16) * 2 - 1
    once, twice = (theory.diffusability(ae, x, 5, features)["iFD"] for x in (
        images, images.repeat(2, 1, 1, 1)))
    assert once > 1 and twice == pytest.approx(0, abs=1e-3)
    constant = torch.randn(500, 3, 1, 1).expand(-1, -1, 8, 16)
    assert theory.diffusability(ae, constant)["neighbours"] == pytest.approx(1, abs=1e-4)
    board = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(16))
    assert theory.diffusability(ae, board.expand(3, 3, 8, 16))["neighbours"] == pytest.approx(-1)


@pytest.fixture(scope="module")
def runs(material, tmp_path_factory):
    """Folders of two short runs: SiT with classes, U-ViT."""
    out = tmp_path_factory.mktemp("diffusion")
    for name, model in (("sit", "SiT-tiny/4"), ("uvit", "UViT-tiny/2")):
        run_main(train_diffusion, *flags_of(material, out / name, "--steps", 2, "--model", model))
    return [out / "sit", out / "uvit"]


def test_commands_write_figure_and_table(material, runs, main, monkeypatch):
    """One result per run, one row per run, time and ring; of trajectory the samples, too."""
    drawn, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda *args: (drawn.append(args[0]), save(*args)))
    results = main("denoise", "--ckpt", *runs, "--val_images", 3)
    rows = table("out/denoise.csv")
    assert [line["model"] for line in results] == ["SiT-tiny/4", "UViT-tiny/2"]
    assert len(rows) == 2 * len(theory.TIMES) * len(results[0]["by_ring"].split())
    assert [len(ax.lines) for ax in drawn[0].axes] == [4] * 8              # and each has a name
    assert len(drawn[0].legends[0].get_texts()) == 4
    lines = main("trajectory", "--ckpt", *runs, "--num_samples", 3, "--steps", 5)
    rows = table("out/trajectory.csv")
    assert [line["sampler"] for line in lines] == ["em", "ddim"]
    assert all(math.isfinite(line["slope"]) for line in lines)
    assert len(rows) == 8 * (6 + 6)                        # rings; steps and the sample itself
    assert {float(row["t"]) for row in rows} >= {0.0, 1.0}
    line, = main("diffusability", "--ae", material / "ae" / "ckpt.pt", "--image_size", 32)
    assert line["n"] == 1                                  # one of twelve is held out
    assert {"esm", "esm_shape", "alpha", "neighbours", "high_band", "dsm"} <= line.keys()


def test_held_out_latents_are_normalised_and_have_their_labels(runs):
    """Sampled with --seed, by the run's own statistics; other data's classes are refused."""
    file = str(runs[0] / "ckpt.pt")

    def held_out(**values):
        flags = dict(ae=None, data=None, val_images=3, batch_size=2, seed=0)
        return theory.held_out_latents(file, SimpleNamespace(**flags | values), "cpu")
    _, _, latents, labels, _ = held_out()
    _, _, ae, checkpoint = load_diffusion(file, None, "cpu")
    _, val_set = open_data(checkpoint["data"], 16, val_images=3)
    images = torch.stack([val_set[i][0] for i in range(len(val_set))]) / 127.5 - 1
    assert labels.tolist() == val_set.labels.tolist()
    posterior = ae.encode(images)
    noise = (ae.denormalize(latents) - posterior.mode()) / (0.5 * posterior.logvar).exp()
    assert abs(noise.mean()) < 0.2 and 0.8 < noise.std() < 1.2
    assert not torch.equal(held_out(seed=1)[2], latents)
    with pytest.raises(ValueError, match="--data: has 0 classes"):
        held_out(data="discs")


def test_halfway_to_the_nearest_neighbour():
    """On the sphere of their common length, the same angle from both; nobody is his neighbour."""
    z = F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    z[1] = F.normalize(z[0] + 0.1 * z[1], dim=0)           # 0 and 1 are each other's
    halfway = theory.halfway_to_neighbours(3 * z.view(5, 2, 3, 4)).flatten(1)
    torch.testing.assert_close(halfway.norm(dim=1), torch.full((5,), 3.0))
    torch.testing.assert_close(halfway[0], 3 * F.normalize(z[0] + z[1], dim=0))
    torch.testing.assert_close(halfway[1], halfway[0])
