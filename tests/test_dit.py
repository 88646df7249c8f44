"""dit.py: the networks are the originals'; the samplers where the best prediction is known."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dit import DDPM, MODELS, Interpolant, NoiseStream, SiT, UViT, sincos_positions, sinusoid

TINY = dict(depth=3, dim=32, heads=2, patch_size=2)        # 6 x 10 latents give 3 x 5 tokens


def tiny(kind, num_classes=7, seed=0, input_size=(6, 10), in_channels=3, **changes):
    """A small network, all parameters random: a fresh SiT, the zero function, hides mistakes."""
    model = kind(input_size, in_channels, num_classes, **{**TINY, **changes})
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def batch():
    """Four latents, their times and labels."""
    return torch.randn(4, 3, 6, 10), torch.rand(4), torch.randint(7, (4,))


class Analytic(nn.Module):
    """A stand-in network from a formula f(x, t); remembers the times and sizes of its calls."""
    def __init__(self, f):
        super().__init__()
        self.f, self.calls = f, []
        self.device_of = nn.Parameter(torch.zeros(1))       # samplers run where the parameters are

    def forward(self, x, t, y=None, drop=None, return_hidden=None):
        self.calls.append((float(t[0]), len(x), drop))
        return self.f(x, t.view(-1, 1, 1, 1))


# ---------------------------------------------------------------------------- the networks
@pytest.mark.parametrize("name, num_classes, count", [
    ("SiT-B/2", 1000, 130_500_112), ("SiT-XL/2", 1000, 675_111_184), ("UViT-S/2", 0, 44_259_492),
    ("UViT-M/2", 0, 130_122_404), ("UViT-L/2", 0, 285_737_124), ("UViT-H/2", 0, 499_677_860)])
def test_parameter_counts_are_those_of_the_originals(name, num_classes, count):
    """On 4x32x32; SiT with 1000 classes, null label and fixed positions, U-ViT unconditional."""
    with torch.device("meta"):
        model = MODELS[name](input_size=32, in_channels=4, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == count


def by_hand(kind, W, x, t, y, heads=2):
    """The originals' forward pass in plain operations on their state dict W, which empties it."""
    def linear(name, z):
        return z @ W.pop(f"{name}.weight").T + W.pop(f"{name}.bias", 0)

    def norm(z, eps, name=None):
        z = F.layer_norm(z, z.shape[-1:], eps=eps)
        return z if name is None else z * W.pop(f"{name}.weight") + W.pop(f"{name}.bias")

    def attention(name, z):
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2)
                   for part in linear(f"{name}.qkv", z).chunk(3, dim=-1))
        out = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        return linear(f"{name}.proj", out.transpose(1, 2).flatten(2))

    def mlp(name, z):
        z = F.gelu(linear(f"{name}.fc1", z), approximate="tanh" if kind is SiT else "none")
        return linear(f"{name}.fc2", z)

    def modulation(name, c, parts):
        return linear(f"{name}.adaLN_modulation.1", F.silu(c))[:, None].chunk(parts, -1)

    embed = "x_embedder.proj" if kind is SiT else "patch_embed.proj"
    patches = F.unfold(x, 2, stride=2).mT                                   # (B, T, C*2*2)
    z = patches @ W.pop(f"{embed}.weight").flatten(1).T + W.pop(f"{embed}.bias")
    if kind is SiT:
        z = z + W.pop("pos_embed")
        c = linear("t_embedder.mlp.0", sinusoid(t, 256).double())
        c = linear("t_embedder.mlp.2", F.silu(c))
        c = c + W.pop("y_embedder.embedding_table.weight")[y]
        for b in (f"blocks.{i}" for i in range(5)):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(b, c, 6)
            z = z + gate1 * attention(f"{b}.attn", norm(z, 1e-6) * (1 + scale1) + shift1)
            z = z + gate2 * mlp(f"{b}.mlp", norm(z, 1e-6) * (1 + scale2) + shift2)
        shift, scale = modulation("final_layer", c, 2)
        z = linear("final_layer.linear", norm(z, 1e-6) * (1 + scale) + shift)
    else:
        label, time = W.pop("label_emb.weight")[y], sinusoid(t, 32).double()
        z = torch.cat([label[:, None], time[:, None], z], dim=1) + W.pop("pos_embed")
        skips = []
        for b in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"):
            if b.startswith("out"):                         # the last skip joins first
                z = linear(f"{b}.skip_linear", torch.cat([z, skips.pop()], dim=-1))
            z = z + attention(f"{b}.attn", norm(z, 1e-5, f"{b}.norm1"))
            z = z + mlp(f"{b}.mlp", norm(z, 1e-5, f"{b}.norm2"))
            if b.startswith("in"):
                skips.append(z)
        z = linear("decoder_pred", norm(z, 1e-5, "norm"))[:, 2:]
    out = torch.zeros_like(x)
    for i in range(3):
        for j in range(5):
            patch = z[:, 5 * i + j].view(-1, 2, 2, 3).permute(0, 3, 1, 2)
            out[:, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2] = patch
    if kind is SiT:
        return out
    return F.conv2d(out, W.pop("final_layer.weight"), W.pop("final_layer.bias"), padding=1)


@pytest.mark.parametrize("kind", [SiT, UViT])
def test_forward_is_that_of_the_originals(kind):
    """Order of q, k, v, of shift, scale, gate, of tokens; GELUs, epsilons; all names of weights."""
    model = tiny(kind, depth=5).double()                    # in float64, where 1e-5 is not 1e-6
    x, t, y = batch()
    W = model.state_dict()
    expected = by_hand(kind, W, x.double(), t, y)
    assert not W and expected.std() > 0.1
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-9, atol=1e-9)


def test_a_fresh_sit_is_the_zero_function_and_its_blocks_the_identity():
    """adaLN-Zero: gates and the last layer start at zero; positions are fixed."""
    x, t, y = batch()
    model = SiT((6, 10), 3, 7, **TINY)
    out, tokens = model(x, t, y, return_hidden=3)
    assert out.shape == x.shape and out.abs().max() == 0
    patches = model.x_embedder["proj"](x).flatten(2).transpose(1, 2)        # (B, T, D)
    assert torch.equal(tokens, patches + model.pos_embed)
    assert not model.pos_embed.requires_grad


def test_sincos_positions_column_first():
    """On a 2 x 3 grid: sin and cos of column w, then of row w; w = 10000^(-k / (dim/4))."""
    row, column = torch.arange(6) // 3, torch.arange(6) % 3
    parts = [f(position[:, None] * torch.tensor([1.0, 0.01]))
             for position in (column, row) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(sincos_positions((2, 3), 8)[0], torch.cat(parts, 1))     # (6, 8)


def test_time_enters_unscaled_as_cosines_then_sines():
    """REPA feeds t in [0, 1], U-ViT n = 1 .. 1000; bfloat16 must not merge n = 999 and 1000."""
    times = [0, 0.25, 999, 1000]
    s = sinusoid(torch.tensor(times), 4)                    # frequencies 1 and 0.01
    expected = [[math.cos(n), math.cos(n / 100), math.sin(n), math.sin(n / 100)] for n in times]
    torch.testing.assert_close(s, torch.tensor(expected), atol=1e-4, rtol=0)
    x = batch()[0].bfloat16()
    model = tiny(UViT, num_classes=0).bfloat16()
    early, late = (model(x, torch.full((4,), n)) for n in (999.0, 1000.0))
    assert not torch.equal(early, late)


@pytest.mark.parametrize("kind, blocks", [(SiT, ["blocks.0", "blocks.1", "blocks.2"]),
                                          (UViT, ["in_blocks.0", "mid_block", "out_blocks.0"])])
def test_hidden_tokens_are_what_a_hook_sees(kind, blocks):
    """return_hidden=k: the patch tokens after block k, counted from 1; the output stays."""
    model, (x, t, y) = tiny(kind), batch()
    for k, name in enumerate(blocks, 1):
        seen = []
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out))
        out, hidden = model(x, t, y, return_hidden=k)
        assert hidden.shape == (4, 15, 32)
        assert torch.equal(hidden, seen[0][:, -15:])        # 15 patches; U-ViT's extras come first
        assert torch.equal(out, model(x, t, y))


@pytest.mark.parametrize("name", ["SiT-tiny/2", "UViT-tiny/2"])
def test_models_are_built_by_name(name):
    """An int is a square; sampling runs in bfloat16 and under autocast alike."""
    model = MODELS[name](input_size=8, in_channels=4, num_classes=0)
    process = DDPM("sd") if name.startswith("UViT") else Interpolant()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(process.sample(model, (2, 4, 8, 8), steps=2)).all()
    out = process.sample(model.bfloat16(), (2, 4, 8, 8), steps=2)
    assert out.dtype == torch.float32 and out.shape == (2, 4, 8, 8) and torch.isfinite(out).all()


# ---------------------------------------------------------------------------- the losses
@pytest.mark.parametrize("process, options", [
    (Interpolant(), dict(sampler="ode")), (DDPM("sd"), {})])
def test_the_exact_prediction_has_no_loss_and_leads_to_the_data(process, options):
    """Velocity and eps of a single point x0; the path is straight: one step is enough."""
    x0, model = torch.randn(3, 6, 10), Analytic(lambda x, t: (x - x0) / t)
    if isinstance(process, DDPM):
        a = lambda n: process.alpha_bar[n.long()]
        model = Analytic(lambda x, n: (x - a(n).sqrt() * x0) / (1 - a(n)).sqrt())
    x, t, eps = x0.expand(64, 3, 6, 10), torch.rand(64), torch.randn(64, 3, 6, 10)
    assert process.loss(model, x, t, eps) < 1e-6
    assert process.loss(model, x + 0.5, t, eps) > 1e-3
    for steps in (1, 7):
        model.calls.clear()
        torch.testing.assert_close(process.sample(model, x.shape, steps, **options), x)
        assert len(model.calls) == steps


@pytest.mark.parametrize("kind, process, low, high", [
    (SiT, Interpolant(), 0, 0.75), (UViT, DDPM("sd"), 1, 751)])
def test_the_loss_is_a_function_of_its_draws(kind, process, low, high):
    """Timesteps from t, labels dropped as drawn: the null label; hidden tokens come along."""
    model, (x, t, y) = tiny(kind), batch()
    eps, drop = torch.randn_like(x), torch.tensor([True, False, True, False])
    loss, tokens = process.loss(model, x, t, eps, y, drop, return_hidden=2)
    assert tokens.shape == (4, 15, 32) and loss == process.loss(model, x, t, eps, y, drop)
    null = torch.where(drop, 7, y)
    assert loss == process.loss(model, x, t, eps, null) != process.loss(model, x, t, eps, y)
    spy = Analytic(lambda x, t: x)
    for t in (0.0, 0.75):
        process.loss(spy, x, torch.full((4,), t), eps, y, drop)
    assert [call[0] for call in spy.calls] == [low, high] and spy.calls[0][2] is drop


# ---------------------------------------------------------------------------- the samplers
SHAPE = (2, 1, 3)                                           # (C, h, w): six dimensions


MEAN, VARIANCE = (torch.linspace(*ends, 6).double().view(SHAPE) for ends in ((-1, 1), (0.3, 2)))


def exact(process):
    """The best prediction of eps - x0 or of eps, where the data is N(MEAN, VARIANCE)."""
    def f(x, t):
        ddpm, t = isinstance(process, DDPM), float(t[0])
        a, s = 1 - t, t
        if ddpm:
            a, s = process.alpha_bar[int(t)].sqrt(), (1 - process.alpha_bar[int(t)]).sqrt()
        r = (x - a * MEAN) / (a * a * VARIANCE + s * s)
        x0, eps = MEAN + a * VARIANCE * r, s * r           # E[x0 | x], E[eps | x]
        return eps if ddpm else eps - x0
    return Analytic(f)


def exact_samples(sampler, z, steps):
    """From z ~ N(0, I), with the exact predictions."""
    if sampler in ("em", "ode"):
        process, options = Interpolant(), dict(sampler=sampler)
    else:
        process, options = DDPM("sd"), {}
        a = process.alpha_bar[1000]                         # these betas leave 0.0047 of the data
        z = a.sqrt() * MEAN + (a * VARIANCE + 1 - a).sqrt() * z
    first = iter([z])
    return process.sample(exact(process), z.shape, steps, **options,
                          noise=lambda shape: next(first, torch.randn(shape)))


@pytest.mark.parametrize("sampler", ["em", "ode", "ddim"])
def test_exact_predictions_give_the_data_distribution(sampler):
    """4096 samples have the mean and covariance of Gaussian data within 4.5 standard errors."""
    N, mean, variance = 4096, MEAN.flatten(), VARIANCE.flatten()
    x = exact_samples(sampler, torch.randn(N, *SHAPE, dtype=torch.float64), 450)
    x = x.double().flatten(1)
    off = (x.mean(0) - mean) / (variance / N).sqrt()
    assert off.abs().max() < 4.5, off
    cov = variance.diag()
    off = (x.T.cov() - cov) / ((variance[:, None] * variance + cov ** 2) / N).sqrt()
    assert off.abs().max() < 4.5, off


@pytest.mark.parametrize("sampler", ["ode", "ddim"])
def test_deterministic_samplers_are_of_first_order(sampler):
    """The exact flow takes z to MEAN + VARIANCE^(1/2) z. Halving the step halves the error."""
    z = torch.randn(64, *SHAPE, dtype=torch.float64)
    flow = MEAN + VARIANCE.sqrt() * z
    errors = [(exact_samples(sampler, z, steps) - flow).square().mean().sqrt()
              for steps in (50, 100, 200)]
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.85 < math.log2(coarse / fine) < 1.15, errors


def test_euler_maruyama_is_repas():
    """Times 1 .. 0.04 in equal steps, a last step without noise; against REPA's score formula."""
    model, draws = Analytic(lambda x, t: 0.3 * x - t), torch.randn(25, 2, 3, 6, 10).double()
    left = iter(draws)
    end = Interpolant().sample(model, (2, 3, 6, 10), steps=25, noise=lambda shape: next(left))
    times = [call[0] for call in model.calls]
    assert times[-1] == 0.04 and not list(left)
    torch.testing.assert_close(torch.tensor(times), torch.linspace(1, 0.04, 25))
    x = draws[0]
    for t, t_next, z in zip(times, times[1:] + [0.0], [*draws[1:], 0.0]):
        v = 0.3 * x - t
        alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1, 1
        score = (alpha / d_alpha * v - x) / (sigma ** 2 - alpha / d_alpha * d_sigma * sigma)
        drift = v - 0.5 * (2 * t) * score
        x = x + drift * (t_next - t) + (2 * t) ** 0.5 * abs(t_next - t) ** 0.5 * z
    torch.testing.assert_close(end, x.float())


def test_ddpm_levels():
    """alpha_bar by its definition; 100 steps visit 1000, 990, .., 10."""
    alpha_bar = DDPM("sd").alpha_bar
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    assert alpha_bar[0] == 1
    torch.testing.assert_close(alpha_bar[1:], (1 - betas).cumprod(0))
    model = Analytic(lambda x, n: x)
    DDPM("sd").sample(model, (2, 3, 6, 10))
    assert [call[0] for call in model.calls] == list(range(1000, 0, -10))


@pytest.mark.parametrize("kind, process", [(SiT, Interpolant()), (UViT, DDPM("sd"))])
def test_guidance(kind, process):
    """cfg 1: the conditional model bit for bit; else null + cfg (class - null), in the interval."""
    model, (start, _, y) = tiny(kind, num_classes=7), batch()

    def sample(net, **options):
        return process.sample(net, start.shape, steps=5, noise=NoiseStream(0, range(4)), **options)

    plain = Analytic(lambda x, t: model(x, t.flatten(), y))
    assert torch.equal(sample(model, y=y, cfg=1.0), sample(plain))

    def formula(x, t):
        without = model(x, t.flatten(), torch.full((4,), 7)).double()
        return without + 3 * (model(x, t.flatten(), y).double() - without)

    expected = sample(Analytic(formula))
    torch.testing.assert_close(sample(model, y=y, cfg=3.0), expected, rtol=1e-3, atol=1e-3)
    spy = Analytic(lambda x, t: x)
    sample(spy, y=y, cfg=3.0, cfg_interval=(0.3, 0.7))
    for t, rows, drop in spy.calls:
        t = t / 1000 if kind is UViT else t
        assert rows == (8 if 0.3 <= t <= 0.7 else 4)        # twice the batch while guided
        assert drop is None or drop.tolist() == [False] * 4 + [True] * 4
    assert {rows for _, rows, _ in spy.calls} == {4, 8}


def test_noise_streams_are_independent_and_gaussian():
    """Row j is a function of (seed, index j) and of the calls before: 18 different streams."""
    rows, odd = NoiseStream(7, range(6)), NoiseStream(7, [1, 3, 5])
    first, second = rows((6, 3, 6, 10)), rows((6, 3, 6, 10))
    for draws in (first, second):
        assert torch.equal(odd((3, 3, 6, 10)), draws[1::2])
    flat = torch.cat([first, second, NoiseStream(8, range(6))(first.shape)]).flatten(1)
    assert (flat.corrcoef() - torch.eye(18)).abs().max() < 0.4
    many = NoiseStream(0, range(50))((50, 4, 16, 16))
    assert abs(many.mean()) < 4 / many.numel() ** 0.5
    assert abs(many.var() - 1) < 4 * (2 / many.numel()) ** 0.5
