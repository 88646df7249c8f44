"""What each loss of losses.py promises: zeros, gradients, invariances, and the pairs' shapes."""
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
from conftest import plant_vgg
from losses import PatchDiscriminator, PerceptualLoss, adaptive_weight, eq_pair, esm_loss, kl_loss
from spectral import dct2, idct2, lowpass, spectrum_distribution

close = torch.testing.assert_close


def test_kl_loss_equals_torch_distributions():
    """Summed over dimensions, averaged over the batch; precise near the standard normal."""
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    close(kl_loss(mean, logvar), kl.sum((1, 2, 3)).mean(), rtol=1e-4, atol=1e-4)
    assert kl_loss(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    small = torch.full((2, 3), 1e-4)       # exp(1e-4) - 1 - 1e-4 would cancel in float32
    close(kl_loss(0 * small, small), torch.tensor(3 * 0.25e-8), rtol=1e-2, atol=0)


# ---- ESM
def test_esm_by_its_definition():
    """KL(target || latent) summed over rings, averaged over samples; 0 on its own target."""
    images = torch.randn(3, 3, 16, 24).cumsum(2).cumsum(3) / 50            # smooth
    assert esm_loss(images, images + 3, gamma=0.0).abs() < 1e-6            # whatever the mean
    assert esm_loss(images, images, gamma=1.0) > 1e-2
    images, latents = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 16, 24)
    small = F.interpolate(images, (16, 24), mode="bicubic")
    p = torch.distributions.Categorical(spectrum_distribution(small, 16, 0.6))
    q = torch.distributions.Categorical(spectrum_distribution(latents, 16))
    expected = torch.distributions.kl_divergence(p, q).mean()
    close(esm_loss(images, latents, gamma=0.6), expected, rtol=1e-4, atol=1e-6)
    # because of log(1 + P) the loss moves with the scale of z: the authors' definition
    scaled = [esm_loss(images, scale * latents.cumsum(3)) for scale in (0.1, 1.0, 10.0)]
    assert max(scaled) > 1.2 * min(scaled)


def test_esm_pulls_a_spectrum_to_its_target():
    """White latents, forty steps of Adam: the divergence falls to a tenth."""
    images = torch.randn(4, 3, 32, 48).cumsum(2).cumsum(3) / 50
    latents, values = torch.randn(4, 4, 16, 24).requires_grad_(), []
    optimizer = torch.optim.Adam([latents], lr=0.05)
    for _ in range(40):
        values.append(esm_loss(images, latents))
        latents.grad, = torch.autograd.grad(values[-1], latents)
        optimizer.step()
    assert values[-1] < 0.1 * values[0]


# ---- VA-VAE and UAE
def test_vf_loss_by_its_definition():
    """Both hinges written out with loops; 0 within the margins; gradient to the projection only."""
    p, f = (torch.randn(2, 5, 7, requires_grad=True) for _ in range(2))
    cos = lambda a, b: F.cosine_similarity(a, b, dim=0)
    points, pairs = [], []
    for b in range(2):
        for t in range(5):
            points.append((1 - 0.5 - cos(p[b, t], f[b, t])).clamp_min(0))
            for s in range(5):
                gap = cos(p[b, s], p[b, t]) - cos(f[b, s], f[b, t])
                pairs.append((gap.abs() - 0.25).clamp_min(0))
    loss = losses.vf_loss(p, f)
    close(loss, torch.stack(points).mean() + torch.stack(pairs).mean())
    loss.backward()
    assert p.grad.abs().sum() > 0 and f.grad is None
    assert losses.vf_loss(3 * f, f) == 0


def test_low_freq_align_loss_is_the_error_of_the_first_zigzag_coefficients():
    """On 6 x 10 the first ten: u + v <= 3. A changed one counts by its square, others do not."""
    f = torch.randn(2, 60, 7)

    def change(u, v):  # one DCT coefficient of every channel
        X = dct2(f.transpose(1, 2).unflatten(2, (6, 10)))
        X[:, :, u, v] += 5
        return idct2(X).flatten(2).transpose(1, 2)
    loss = lambda tokens: losses.low_freq_align_loss(tokens, f, (6, 10), coefficients=10)
    assert loss(f) == 0
    for u in range(6):
        for v in range(10):
            expected = 25 / 10 if u + v <= 3 else 0.0
            close(loss(change(u, v)), torch.tensor(expected), atol=1e-5, rtol=1e-4)
    changed = change(5, 9)  # the last of all 60, which are what 64 of them mean on this grid
    expected = (changed - f).square().mean()
    close(losses.low_freq_align_loss(changed, f, (6, 10)), expected, rtol=1e-3, atol=1e-6)


# ---- every loss
EVERY = {   # name: the loss of a and b, their shapes on a grid of h x w, whether b gets a gradient
    "kl": (lambda a, b: kl_loss(a, b.clamp(-30, 20)), (4, "h", "w"), (4, "h", "w"), True),
    "esm": (lambda z, x: esm_loss(x, z), (4, "h", "w"), (3, "H", "W"), False),
    "vf": (losses.vf_loss, ("T", 6), ("T", 6), False),
    "uae": (lambda p, f: losses.low_freq_align_loss(p, f, (1, p.shape[1])), ("T", 6), ("T", 6),
            False),
    "hinge_d": (losses.hinge_d_loss, (1, "h", "w"), ("T",), True),
    "hinge_g": (lambda fake, _: losses.hinge_g_loss(fake), (1, "h", "w"), (), False)}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("h, w", [(5, 7), (1, 1)])
def test_every_loss_is_a_finite_float32_mean_over_items(name, h, w):
    """Of zeros, denormals and large numbers, in bf16, under autocast."""
    loss, *shapes, both = EVERY[name]
    sides = dict(h=h, w=w, H=8 * h, W=8 * w, T=h * w)
    shapes = [[sides.get(side, side) for side in shape] for shape in shapes]
    dtypes = torch.float32, torch.bfloat16
    for magnitude, dtype in itertools.product((0.0, 1e-45, 1e-30, 1.0, 1e4), dtypes):
        a, b = (magnitude * torch.randn(3, *shape, dtype=dtype) for shape in shapes)
        a, b = a.requires_grad_(), b.requires_grad_()
        value = loss(a, b)
        assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(a, b), value)
        value.backward()
        assert a.grad.isfinite().all()
        assert b.grad.isfinite().all() if both else b.grad is None
        if magnitude <= 1:                                 # zeros in a spectrum of 1e4 are rounding
            items = torch.stack([loss(a[i:i + 1], b[i:i + 1]) for i in range(3)])
            close(items.mean(), value, rtol=1e-4, atol=1e-5)


# ---- pairs
def test_pairs_treat_both_sides_alike():
    """Alg. 2: the same mask on image and latent; related methods halve both. In float32."""
    both = torch.randn(2, 3, 32, 64), torch.randn(2, 4, 8, 16)
    close(losses.dsm_pair(*both, 10), tuple(lowpass(x, 10) for x in both))
    close(losses.scale_pair(*both, 2), tuple(F.avg_pool2d(x, 2) for x in both))
    for pair in (losses.dsm_pair(*both, 0), losses.scale_pair(*both, 1)):
        assert all(map(torch.equal, pair, both))
    for pair in (losses.dsm_pair, losses.scale_pair, lambda x, z, n: eq_pair(x, z, 0.6, 1)):
        assert [len(x) for x in pair(*(x[:0] for x in both), 2)] == [0, 0]
        half = [x.bfloat16() for x in both]
        with torch.autocast("cpu", torch.bfloat16):        # float32 all the same
            found = pair(*half, 2)
        close(found, pair(*(x.float() for x in half), 2), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*lru_cache")
def test_dsm_pair_inside_a_compiled_step():
    """n becomes symbolic from its second value on; the same numbers as without."""
    compiled = torch.compile(losses.dsm_pair, backend="eager")
    x, z = torch.randn(2, 3, 32, 64), torch.randn(2, 4, 8, 16)
    for n in (0, 8, 10, 12, 8):
        close(compiled(x, z, n), losses.dsm_pair(x, z, n))


def test_eq_pair_scales_and_rotates_both_sides():
    """Whole latent cells, the image f times as large; a turn moves the same corner on both."""
    images, latents = torch.zeros(1, 3, 64, 96), torch.zeros(1, 4, 8, 12)
    images[..., :32, :32] = 1  # the top-left corner, f = 8
    latents[..., :4, :4] = 1
    target, z = eq_pair(images, latents, 1.0, rot=1)
    assert target.shape[-2:] == (96, 64) and z.shape[-2:] == (12, 8)
    assert target[0, 0, -32:, :32].min() == 1 and z[0, 0, -4:, :4].min() == 1  # bottom left
    assert target.sum() == images.sum() and z.sum() == latents.sum()
    target, z = eq_pair(images, latents, 11 / 32, rot=2)
    assert z.shape[-2:] == (3, 4) and target.shape[-2:] == (24, 32)
    assert target[0, 0, -1, -1] == 1 and z[0, 0, -1, -1] == 1  # bottom right
    assert target[0, 0, 0, 0] == 0 and z[0, 0, 0, 0] == 0
    assert torch.equal(losses.scale_images(images, 0.3, 8), eq_pair(images, latents, 0.3, 0)[0])
    assert eq_pair(images, latents, 0.01, 0)[1].shape[-2:] == (1, 1)


# ---- GAN
def test_discriminator_architecture():
    """Parameters counted by layer, a 70 x 70 receptive field, logits of H/8 - 2; 24 px suffice."""
    disc = PatchDiscriminator()
    convs = [(3, 64, True), (64, 128, False), (128, 256, False), (256, 512, False), (512, 1, True)]
    expected = sum(i * o * 16 + o * bias for i, o, bias in convs) + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in disc.parameters()) == expected
    disc(torch.full((1, 3, 32, 32), math.nan))             # of a step that is skipped: no trace
    assert all(value.isfinite().all() for value in disc.state_dict().values())
    for i in (3, 6, 9):
        disc.main[i] = nn.Identity()                       # BatchNorm sees the whole image
    x = torch.randn(1, 3, 96, 128, requires_grad=True)
    logits = disc(x)
    assert logits.shape == (1, 1, 10, 14)
    logits[0, 0, 5, 7].backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen.any(1).sum() == 70 and seen.any(0).sum() == 70
    assert disc(x[..., :24, :31]).shape[:3] == (1, 1, 1)


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    close(losses.hinge_d_loss(real, fake), torch.tensor(0.25 + 1.0))
    close(losses.hinge_g_loss(fake), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive_weight_balances_the_gradients(dtype):
    """weight * |grad gan| = |grad rec| at the last layer, of gradients averaged over processes."""
    layer, x, averaged = nn.Parameter(torch.randn(5, 7)), torch.randn(7, 3), []
    recon = (layer @ x).to(dtype)
    image = recon.detach().float().requires_grad_()
    rec, gan = image.square().sum(), 0.01 * image.sin().sum()
    grads = [torch.autograd.grad(loss, image)[0] for loss in (rec, gan)]
    average = lambda grad: averaged.append(grad) or 2 * grad
    weight = adaptive_weight(recon, *grads, layer, average)
    expected = [torch.autograd.grad((recon.float() * grad).sum(), layer, retain_graph=True)[0]
                for grad in grads]
    close(averaged, expected, rtol=0, atol=0)
    close(weight, 2 * expected[0].norm() / (2 * expected[1].norm() + 1e-4))
    assert not weight.requires_grad and weight.dtype == torch.float32
    recon, large, zero = 1 * layer, 100 * torch.randn(5, 7), torch.zeros(5, 7)
    assert adaptive_weight(recon, large, zero, layer) == 1e4
    assert adaptive_weight(recon, large, zero, layer, limit=1e8) > 1e5
    assert adaptive_weight(recon, zero, large, layer) == 0
    assert adaptive_weight(recon, zero, zero, layer) == 0


# ---- LPIPS
def test_lpips_real_path_with_a_planted_file(tmp_path, monkeypatch):
    """A VGG-16 in TORCH_HOME: 0 for equal images, a gradient to the image alone."""
    plant_vgg(tmp_path, monkeypatch)
    perceptual = PerceptualLoss().train()
    a, b = torch.randn(2, 1, 3, 32, 48).clamp(-1, 1)
    b.requires_grad_()
    assert perceptual(a, a) == 0
    with torch.autocast("cpu", torch.bfloat16):
        loss = perceptual(b, a)
    loss.backward()
    assert loss > 0 and loss.dtype == torch.float32 and b.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())
    close(perceptual(b, a), loss.detach(), rtol=0, atol=0)  # no dropout: the same twice
