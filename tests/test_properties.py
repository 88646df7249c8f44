"""
Properties of every public function of spectral.py and losses.py, on tensors that hypothesis draws:
odd and prime sides, one pixel, an empty batch; four dtypes; zeros, denormals, constants, outliers,
magnitudes up to what the contract allows; any memory layout.
HYPOTHESIS_PROFILE=long tries ten times as many examples. Each profile draws the same every time.
"""
import math
import os

import pytest
import torch

import spectral
from losses import (
    PatchDiscriminator,
    adaptive_weight,
    dsm_pair,
    eq_pair,
    esm_loss,
    hinge_d_loss,
    hinge_g_loss,
    kl_loss,
    low_freq_align_loss,
    scale_images,
    scale_pair,
    vf_loss,
)
from spectral import (
    block_dct2,
    block_idct2,
    dct2,
    dct_matrix,
    directional_energy,
    dog,
    downsample_dct,
    fit_power_law,
    gaussian_blur,
    idct2,
    learnable_power,
    lowpass,
    match_resolution,
    power_spectrum,
    radial_profile,
    rmsc,
    spatial_norm,
    spectrum_distribution,
    triangle_mask,
    wiener_gain,
)

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
assume, given, settings = hypothesis.assume, hypothesis.given, hypothesis.settings

settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=300, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# --------------------------------------------------------------------------------------------------
# What is drawn

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIDE = (torch.float32, torch.bfloat16, torch.float64)   # those with the range of float32
FULL = (torch.float32, torch.float64)                   # those with its precision
# inf: squares that sum to 1e36 an item
MAGNITUDES = (1.0, 0.0, 1e-45, 1e-30, 1e-3, 1e4, math.inf)
SIDES = dict(B=(2, 1, 3), H=(8, 1, 2, 3, 5, 7, 12, 16, 17), T=(6, 1, 2, 4, 7, 13),
             h=(2, 1, 3), b=(4, 1, 3, 8), C=(3, 1, 4))
SIDES |= dict(W=SIDES["H"], X=SIDES["H"], Y=SIDES["H"], w=SIDES["h"], D=SIDES["C"])
SIDES["3"] = (3,)


def outlier(x):
    """Each item a thousandth of itself, but for a 1 where it is largest."""
    largest = x.flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1))
    return x * 1e-3 + (x == largest)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def contiguous(x):
    return x.clone(memory_format=torch.contiguous_format)


FILLS = dict(noise=lambda x: x, constant=torch.ones_like, outlier=outlier)
LAYOUTS = dict(
    contiguous=lambda x: x,
    transposed=lambda x: x.mT.contiguous().mT,
    strided=lambda x: torch.stack([x, x + 1], -1)[..., 0],
    expanded=lambda x: x[:1].expand_as(x),
    channels_last=channels_last,
)


def noise(*shape, seed=0):
    """Uniform in [-1, 1), of a seed of its own: an example that fails must fail again."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@st.composite
def tensors(draw, dims, dtypes=DTYPES, magnitudes=MAGNITUDES, fills=tuple(FILLS), **sides):
    """
    A tensor with these dimensions, a letter each; a letter that comes twice is drawn once.
    sides: some of them given.
    """
    for letter in dims:
        if letter not in sides:
            sides[letter] = draw(st.sampled_from(SIDES[letter]))
    shape = [sides[letter] for letter in dims]
    x = noise(*shape, seed=draw(st.integers(0, 999)))
    fill = draw(st.sampled_from(fills))
    magnitude = draw(st.sampled_from(magnitudes))
    dtype = draw(st.sampled_from(dtypes))
    x = FILLS[fill](x) if x.numel() else x
    if magnitude == math.inf:
        magnitude = (1e36 / max(1, math.prod(shape[1:]))) ** 0.5
    limits = torch.finfo(dtype)
    x = (x.double() * magnitude).clamp(limits.min, limits.max).to(dtype)
    layout = draw(st.sampled_from(list(LAYOUTS)))
    hypothesis.note(f"{dims} {shape}, {fill} of {magnitude:.3g}, {dtype}, {layout}")
    return LAYOUTS[layout](x)


def tile(x):
    """A block that tiles x, from 1 to 17."""
    return math.gcd(*x.shape[-2:])


def tiles_shape(B, C, H, W):
    """Shape of block_dct2(x, tile(x))."""
    b = math.gcd(H, W)
    return B, C, H // b, W // b, b, b


def small_shape(B, C, H, W):
    """Shape of downsample_dct(x, tile(x))."""
    k = math.gcd(H, W)
    return B, C, H // k, W // k


# name: dimensions of x, the function, the shape of its result,
# degree (f(c x) = |c|^degree f(x); None: no such law)
same_shape = lambda *shape: shape
MAPS = {
    "dct2": ("BCHW", dct2, same_shape, 1),
    "idct2": ("BCHW", idct2, same_shape, 1),
    "block_dct2": ("BCHW", lambda x: block_dct2(x, tile(x)), tiles_shape, 1),
    "block_idct2": ("BChwbb", block_idct2, lambda B, C, h, w, b, _: (B, C, h * b, w * b), 1),
    "lowpass": ("BCHW", lambda x: lowpass(x, tile(x), tile(x)), same_shape, 1),
    "lowpass of n=0": ("BCHW", lambda x: lowpass(x, 0, tile(x)), same_shape, 1),
    "downsample_dct": ("BCHW", lambda x: downsample_dct(x, tile(x)), small_shape, 1),
    "power_spectrum": ("BCHW", power_spectrum, lambda B, C, H, W: (B, H, W), 2),
    "radial_profile": ("BHW", radial_profile, lambda B, H, W: (B, 16), 1),
    "spectrum_distribution": (
        "BCHW", lambda x: spectrum_distribution(x, 7, 1.0), lambda B, C, H, W: (B, 7), None),
    "spectrum_distribution with DC": (
        "BCHW", lambda x: spectrum_distribution(x, remove_dc=False),
        lambda B, C, H, W: (B, 16), None),
    "match_resolution": (
        "BCHW", lambda x: match_resolution(x, (1, 3)), lambda B, C, H, W: (B, C, 1, 3), 1),
    "fit_power_law": ("BT", lambda x: fit_power_law(x.abs()), lambda B, T: (B,), 0),
    "wiener_gain": ("BT", lambda x: wiener_gain(x.abs(), 0.3), same_shape, None),
    "learnable_power": ("BT", lambda x: learnable_power(x.abs(), 0.9), same_shape, None),
    "rmsc": ("BTD", rmsc, lambda B, T, D: (B,), 0),
    "directional_energy": ("BTD", directional_energy, lambda B, T, D: (B, T), 0),
    "gaussian_blur": ("BCHW", lambda x: gaussian_blur(x, 1.3), same_shape, 1),
    "dog": ("BCHW", lambda x: dog(x, 0, 2), same_shape, 1),
    "spatial_norm": ("BTD", spatial_norm, same_shape, None),
}
SCALING_MAPS = [name for name, (*_, degree) in MAPS.items() if degree is not None]
LINEAR_MAPS = [name for name, (*_, degree) in MAPS.items() if degree == 1]
# The others take tensors of any shape.
SHAPED_MAPS = [name for name in MAPS
               if name not in ("fit_power_law", "wiener_gain", "learnable_power")]
every_map = pytest.mark.parametrize("name", MAPS)
draws = given(st.data())


def align_on_a_grid(p, f):
    """low_freq_align_loss of any number of tokens: on two rows if it is even, else on one."""
    rows = math.gcd(p.shape[1], 2)
    return low_freq_align_loss(p, f, (rows, p.shape[1] // rows))


# name: dimensions of a and b, the loss as a function of both, whether b gets a gradient,
# smallest and largest value
LOSSES = {
    "kl_loss": ("BCHW", "BCHW", lambda mean, logvar: kl_loss(mean, logvar.clamp(-30, 20)),
                True, 0, math.inf),
    "esm_loss": ("BCHW", "B3XY", lambda z, x: esm_loss(x, z), False, 0, math.inf),
    "vf_loss": ("BTD", "BTD", vf_loss, False, 0, 1.5 + 1.75),
    "low_freq_align_loss": ("BTD", "BTD", align_on_a_grid, False, 0, math.inf),
    "hinge_d_loss": ("BCHW", "BXY", hinge_d_loss, True, 0, math.inf),
    "hinge_g_loss": ("BCHW", "BX", lambda fake, _: hinge_g_loss(fake), True, -math.inf, math.inf),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def close(a, b, scale, rtol=1e-5):
    """a equals b within the rounding of numbers as large as scale."""
    assert a.shape == b.shape
    if b.numel():
        assert (a.double() - b.double()).abs().max().item() <= rtol * float(scale) + 1e-37


def size(x, degree=1):
    """The length of the largest item, to that power: what a result of this degree may reach."""
    return max(1e-37, x.double().flatten(1).norm(dim=1).max().item()) ** degree


# --------------------------------------------------------------------------------------------------
# What holds for every map

@every_map
@draws
def test_map_is_finite_float32_of_the_stated_shape(name, data):
    """Finite in, finite out; float64 stays; autocast changes nothing, and nothing changes x."""
    dims, function, shape, _ = MAPS[name]
    x = data.draw(tensors(dims))
    before, y = x.clone(), function(x)
    assert torch.equal(x, before)
    assert y.shape == shape(*x.shape) and y.isfinite().all()
    assert y.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x), y)


@every_map
@draws
def test_map_gradient_is_finite(name, data):
    """A finite gradient of x's shape and dtype for finite x; float16 cannot hold all of them."""
    dims, function, _, _ = MAPS[name]
    x = data.draw(tensors(dims, dtypes=WIDE)).requires_grad_()
    y = function(x)
    if name == "fit_power_law":
        assert not y.requires_grad
        return
    along = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    gradient, = torch.autograd.grad(y, x, along)
    assert gradient.shape == x.shape and gradient.dtype == x.dtype and gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:std")  # torch's, over a batch of 0
@every_map
@draws
def test_map_sees_neither_layout_nor_batch(name, data):
    """Neither layout nor neighbours change an item's result; a batch of no item has none."""
    dims, function, shape, degree = MAPS[name]
    x = data.draw(tensors(dims, magnitudes=(1.0, 1e-3, 1e4, math.inf), fills=("noise", "outlier")))
    y = function(x)
    scale = max(size(x, degree or 0), y.abs().max())
    rtol = 1e-5 if degree else 1e-4  # logarithms and square roots near 0
    close(y, function(contiguous(x)), scale, rtol)
    close(y, torch.cat([function(x[i:i + 1]) for i in range(len(x))]), scale, rtol)
    assert function(x[:0]).shape == shape(0, *x.shape[1:])


@pytest.mark.parametrize("name", SCALING_MAPS)
@draws
def test_map_scale_law(name, data):
    """f(c x) = |c|^degree f(x), with the sign of c where f is linear."""
    dims, function, _, degree = MAPS[name]
    x = data.draw(tensors(dims, FULL, magnitudes=(1.0, 1e-5, 1e4), fills=("noise", "constant")))
    c = data.draw(st.sampled_from([-1.0, 0.5, 3.0, -1e3]))
    factor = {0: 1, 1: c, 2: c * c}[degree]
    close(function(c * x), factor * function(x), abs(factor) * size(x, degree))


@pytest.mark.parametrize("name", LINEAR_MAPS)
@draws
def test_linear_map_is_additive(name, data):
    """f(x + y) = f(x) + f(y)."""
    dims, function, _, _ = MAPS[name]
    x = data.draw(tensors(dims, dtypes=(torch.float32,), magnitudes=(1.0, 1e4)))
    y = noise(*x.shape) * data.draw(st.sampled_from([1.0, 1e4]))
    close(function(x + y), function(x) + function(y), size(x) + size(y))


@pytest.mark.parametrize("name", SHAPED_MAPS)
@draws
def test_map_refuses_a_wrong_shape(name, data):
    """Wrong rank, or an empty side that is not the batch: ValueError with name and shape."""
    dims, function, _, _ = MAPS[name]
    rank = data.draw(st.integers(1, 7))
    shape = [2] * rank
    if rank == len(dims):
        shape[data.draw(st.integers(1, rank - 1))] = 0
    # dct2 and idct2 take any number of dimensions before H and W.
    assume(not (name in ("dct2", "idct2") and rank > 1 and 0 not in shape[-2:]))
    function_name = "gaussian_blur" if name == "dog" else name.split()[0]
    sides = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"^{function_name}: .*\({sides},?\)"):
        function(torch.zeros(shape))


@every_map
def test_map_can_train_after_inference_mode(name):
    """What an evaluation in inference mode has cached serves a training step after it."""
    for function in vars(spectral).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    dims, function, _, _ = MAPS[name]
    x = torch.rand([{"B": 2, "b": 4}.get(letter, 8) for letter in dims])
    with torch.inference_mode():
        function(x)
    y = function(x.requires_grad_())
    if y.requires_grad:
        y.sum().backward()


# --------------------------------------------------------------------------------------------------
# Transforms and masks

@given(st.integers(1, 300), st.sampled_from(DTYPES))
def test_dct_matrix_is_orthogonal_for_every_length(n, dtype):
    """Its inverse is its transpose, and its first row is constant."""
    D = dct_matrix(n, dtype=dtype)
    assert D.shape == (n, n) and D.dtype == dtype
    rtol = n ** 0.5 * torch.finfo(dtype).eps + 1e-7
    close(D.double() @ D.double().T, torch.eye(n), 1, rtol)
    assert D[0].unique().numel() == 1


@draws
def test_dct2_is_an_isometry(data):
    """Inverse and Parseval, also block by block; and swapping the axes swaps u and v."""
    x = data.draw(tensors("BCHW"))
    X, tiles = dct2(x), block_dct2(x, tile(x))
    length = x.double().flatten(1).norm(dim=1)
    close(idct2(X), x, size(x))
    close(block_idct2(tiles), x, size(x))
    close(X.double().flatten(1).norm(dim=1), length, size(x))
    close(tiles.double().flatten(1).norm(dim=1), length, size(x))
    close(dct2(x.mT), X.mT, size(x))


@given(st.integers(1, 17), st.data())
def test_masks_are_nested_and_counted(block, data):
    """Each n removes one anti-diagonal more, from the far corner; the masks are symmetric."""
    n = data.draw(st.integers(0, 2 * block - 2))
    mask, next_mask = triangle_mask(n, block), triangle_mask(n + 1, block)
    removed = mask & ~next_mask
    assert torch.equal(mask, mask.T) and not (next_mask & ~mask).any()
    assert {u + v for u, v in removed.nonzero().tolist()} == {2 * block - 2 - n}
    assert removed.sum() == min(n, 2 * block - 2 - n) + 1
    assert triangle_mask(0, block).all() and not triangle_mask(2 * block - 1, block).any()


@draws
def test_lowpass_is_an_orthogonal_projection(data):
    """Idempotent, self-adjoint, never longer; of two the stronger counts; the last drops DC."""
    x = data.draw(tensors("BCHW"))
    n, m = (data.draw(st.integers(0, 2 * tile(x) - 1)) for _ in range(2))
    low = lambda x, n: lowpass(x, n, tile(x))
    y = low(x, n)
    close(low(y, n), y, size(x))
    close(low(y, m), low(x, max(n, m)), size(x))
    assert size(y) <= size(x) * (1 + 1e-5)
    other = noise(*x.shape).double()
    scale = len(x) * size(x) * size(other)
    close((y.double() * other).sum(), (x.double() * low(other, n)).sum(), scale)
    if n < 2 * tile(x) - 1:
        close(low(x.double() + size(x), n), y.double() + size(x), 2 * size(x))


@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_downsampling_composes_and_keeps_the_mean(data, a, b):
    """By a and then by b is by a * b; the mean stays; k = 1 is the identity."""
    x = data.draw(tensors("BChw"))
    x = x.double().repeat_interleave(a * b, -1).repeat_interleave(a * b, -2)
    x = x + torch.linspace(0, 1, x.shape[-1]) * x.abs().max()
    close(downsample_dct(downsample_dct(x, a), b), downsample_dct(x, a * b), size(x))
    close(downsample_dct(x, a).mean((-2, -1)), x.mean((-2, -1)), size(x))
    close(downsample_dct(x, 1), x, size(x))


@given(st.data(), *[st.integers(1, 40)] * 4)
def test_match_resolution_keeps_constants(data, H, W, h, w):
    """Weights sum to 1: constants stay, unless blurred (with a zero border); same size, same x."""
    x = data.draw(tensors("BCHW", H=H, W=W))
    y = match_resolution(x, (h, w))
    assert y.shape == (*x.shape[:2], h, w)
    if H < 16 * h:
        close(match_resolution(torch.ones_like(x), (h, w)), torch.ones(y.shape), 1)
    close(match_resolution(x, x.shape[-2:]), x, size(x))


# --------------------------------------------------------------------------------------------------
# Spectra

@draws
def test_power_is_energy(data):
    """Sums to a channel's mean energy; never negative; blind to the channels' order and signs."""
    x = data.draw(tensors("BCHW"))
    P = power_spectrum(x)
    assert (P >= 0).all()
    energy = x.double().square().sum((1, 2, 3))
    close(P.double().sum((1, 2)), energy / x.shape[1], size(x, 2))
    close(power_spectrum(-x.flip(1)), P, size(x, 2))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_rings_partition_the_plane(H, W, n_bins):
    """Every coefficient is in the ring of whole-number arithmetic; a ring's value is its mean."""
    P = noise(1, H, W).double()
    rings = [[] for _ in range(n_bins)]
    r2_max = max(1, (H - 1) ** 2 + (W - 1) ** 2)
    for u in range(H):
        for v in range(W):
            # floor(sqrt(q)) = isqrt(floor(q))
            ring = math.isqrt((u * u + v * v) * n_bins ** 2 // r2_max)
            rings[min(n_bins - 1, ring)].append(P[0, u, v].item())
    means = torch.tensor([sum(ring) / max(1, len(ring)) for ring in rings], dtype=torch.float64)
    close(radial_profile(P, n_bins)[0], means, 1)


@draws
def test_spectrum_distribution_is_a_distribution(data):
    """Positive masses that sum to 1; blind to an offset, the sign, and which axis is which."""
    x = data.draw(tensors("BCHW"))
    n_bins = data.draw(st.integers(1, 40))
    gamma = data.draw(st.sampled_from([0.0, 0.6, 1.0, -1.0]))
    p = spectrum_distribution(x, n_bins, gamma)
    assert (p > 0).all()
    close(p.sum(1), torch.ones(len(x)), 1)
    close(spectrum_distribution(-x.mT, n_bins, gamma), p, 1, rtol=1e-4)


@given(st.data(), st.sampled_from([0.0, 0.1, 1 / 3, -12.34, 1234.567, 1e4 + 0.1, 1e16]),
       st.integers(1, 40), st.integers(1, 40))
def test_spectrum_distribution_of_a_constant_is_uniform(data, value, H, W):
    """Whatever the value: what rounding leaves of a large mean is no power."""
    dtype = data.draw(st.sampled_from(DTYPES))
    x = torch.full((2, 3, H, W), min(value, torch.finfo(dtype).max), dtype=dtype)
    close(spectrum_distribution(x, 16, 1.0), torch.full((2, 16), 1 / 16), 1)


@given(st.floats(-3, 5), st.integers(3, 64),
       st.sampled_from([1e-40, 1e-30, 1e-10, 1.0, 1e20, 1e30]), st.booleans())
def test_fit_power_law_recovers_any_exponent(alpha, n_bins, scale, double):
    """At any scale, also where half the rings are empty; 0 where fewer than two have power."""
    f = torch.arange(n_bins, dtype=torch.float64) + 0.5
    profile = scale * (f / f[-1]) ** -alpha
    profile = profile if double else profile.float()
    tolerance = 1e-3 if scale > 1e-38 or double else 0.05  # denormals have few digits
    assume(double or scale > 1e-38 or alpha <= 0.5)
    assert abs(fit_power_law(profile).item() - alpha) < tolerance
    if n_bins >= 6:
        profile[1::2] = 0
        assert abs(fit_power_law(profile).item() - alpha) < tolerance
    profile[2:] = 0
    assert fit_power_law(profile) == 0 and fit_power_law(profile[:1]) == 0


between_0_and_1 = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.data(), between_0_and_1, between_0_and_1)
def test_wiener_gain_is_a_gain(data, alpha_bar, other):
    """In [0, 1], grows with power and alpha_bar (or a tensor of it); learnable is what is there."""
    S = data.draw(tensors("BT", magnitudes=(1.0, 0.0, 1e-45, 1e-30, 1e4, 1e18, 3e38))).abs()
    gain = wiener_gain(S, alpha_bar)
    assert ((0 <= gain) & (gain <= 1)).all()
    order = S.flatten().argsort()
    assert (gain.flatten()[order].diff() >= -1e-6).all()
    low, high = sorted([alpha_bar, other])
    assert (wiener_gain(S, high) >= wiener_gain(S, low) - 1e-6).all()
    assert (learnable_power(S, alpha_bar) <= S.to(gain.dtype)).all()
    if 1e-6 < alpha_bar < 1 - 1e-6:
        rtol = 1e-1 if alpha_bar > 0.999 else 1e-3
        close(wiener_gain(S, torch.tensor([alpha_bar])), gain, 1, rtol)
        exact = alpha_bar * S.double() / (1 - alpha_bar)
        close(gain, exact / (1 + exact), 1)


# --------------------------------------------------------------------------------------------------
# Tokens and filters

@draws
def test_prop_3_2_holds_for_any_tokens(data):
    """rmsc^2 = energy outside DC / T; energies sum to T; rotations and lengths do not count."""
    x = data.draw(tensors("BTD", magnitudes=(1.0, 1e-3, 1e4, math.inf), dtypes=WIDE))
    T, contrast, energy = x.shape[1], rmsc(x), directional_energy(x)
    assert (contrast >= 0).all() and (contrast <= 1 + 1e-6).all() and (energy >= 0).all()
    close(contrast.square(), energy[:, 1:].sum(1) / T, 1)
    close(energy.sum(1), torch.full((len(x),), T), T)
    lengths = noise(*x.shape[:2], 1).abs() + 0.5
    rotation, _ = torch.linalg.qr(noise(x.shape[2], x.shape[2]).double())
    turned = x.double() @ rotation * lengths
    close(rmsc(turned), contrast, 1, rtol=1e-3)  # rtol: a square root near 0


@given(st.data(), st.sampled_from([0.0, 1e-320, 1e-30, 0.1, 0.5, 1.0, 2.5, 30.0, 1000.0]))
def test_blur_is_an_average(data, sigma):
    """Within the range of x, constants unchanged, mirrored with x; any sigma on any side."""
    x = data.draw(tensors("BCHW"))
    y, exact = gaussian_blur(x, sigma), x.double()
    slack = 1e-5 * size(x)
    assert y.max() <= exact.max() + slack and y.min() >= exact.min() - slack
    close(gaussian_blur(x.flip(-1, -2).mT, sigma), y.flip(-1, -2).mT, size(x))
    close(gaussian_blur(torch.full_like(x, 7), sigma), torch.full(x.shape, 7.0), 7)
    if sigma >= 0.5:
        close(dog(torch.full_like(x, 7), sigma / 2, sigma), torch.zeros(x.shape), 7)
        close(dog(x, sigma / 2, sigma), gaussian_blur(x, sigma / 2) - y, size(x))


@given(st.data(), st.sampled_from([0.0, 0.6, 1.0]))
def test_spatial_norm_has_unit_spread(data, alpha):
    """Per channel std 1 and mean (1 - alpha) * mean / std; length and sign of x do not count."""
    x = data.draw(tensors("BTD", FULL, magnitudes=(1.0, 1e4), fills=("noise",), T=13))
    y = spatial_norm(x, alpha)
    std = y.std(1, correction=0)
    close(std, torch.ones(std.shape), 1, rtol=1e-3)
    close(y.mean(1), (1 - alpha) * x.mean(1) / x.std(1, correction=0), 10, rtol=1e-3)
    close(spatial_norm(-4 * x, alpha), -y, 10, rtol=1e-3)


# --------------------------------------------------------------------------------------------------
# What holds for every loss

def draw_two(data, name, **kwargs):
    """Arguments of a loss, of one batch size and, where a letter is shared, of the same sides."""
    dims_a, dims_b = LOSSES[name][:2]
    letters = dict.fromkeys(dims_a + dims_b)
    sides = {letter: data.draw(st.sampled_from(SIDES[letter])) for letter in letters}
    return tuple(data.draw(tensors(dims, **sides, **kwargs)) for dims in (dims_a, dims_b))


@every_loss
@draws
def test_loss_is_a_finite_float32_scalar_in_its_range(name, data):
    """Whatever the dtypes of its arguments; autocast changes nothing."""
    _, _, loss, _, least, most = LOSSES[name]
    a, b = draw_two(data, name)
    value = loss(a, b)
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    assert least - 1e-5 <= value <= most + 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(a, b), value)


@every_loss
@draws
def test_loss_gradient_is_finite_and_goes_where_it_should(name, data):
    """Finite for finite arguments; images and features get none."""
    _, _, loss, both, _, _ = LOSSES[name]
    a, b = (x.requires_grad_() for x in draw_two(data, name, dtypes=WIDE))
    loss(a, b).backward()
    assert a.grad.shape == a.shape and a.grad.isfinite().all()
    assert b.grad is None or both and b.grad.isfinite().all()


@every_loss
@draws
def test_loss_is_the_mean_over_items(name, data):
    """The mean of its items' losses, in any layout; of no item 0, with an empty gradient."""
    _, _, loss, _, _, _ = LOSSES[name]
    # ESM: zeros in a spectrum of 1e4 are rounding.
    magnitudes = (1.0, 0.0, 1e-30, 1e-3) if name == "esm_loss" else MAGNITUDES
    a, b = draw_two(data, name, magnitudes=magnitudes)
    value = loss(a, b)
    items = torch.stack([loss(a[i:i + 1], b[i:i + 1]) for i in range(len(a))])
    close(value, items.double().mean(), items.abs().max().clamp_min(1))
    close(loss(contiguous(a), contiguous(b)), value, value.abs().clamp_min(1))
    nothing = a[:0].clone().requires_grad_()
    value = loss(nothing, b[:0])
    value.backward()
    assert value == 0 and nothing.grad.shape == nothing.shape


# --------------------------------------------------------------------------------------------------
# What holds for one loss

@draws
def test_kl_is_zero_at_the_standard_normal_only(data):
    """As in float64, also near 0, where exp(logvar) - 1 - logvar cancels; never below 0."""
    small, float32 = (0.0, 1e-4, 1e-2, 1.0), (torch.float32,)
    mean = data.draw(tensors("BCHW", float32, small))
    sides = dict(zip("BCHW", mean.shape))
    logvar = data.draw(tensors("BCHW", float32, (*small, 20.0), **sides))
    m, lv = mean.double(), logvar.double()
    expected = 0.5 * (m.square() + lv.expm1() - lv).sum((1, 2, 3)).mean()
    close(kl_loss(mean, logvar), expected, expected, rtol=1e-2)
    assert kl_loss(mean, logvar) >= 0
    assert kl_loss(torch.zeros_like(mean), torch.zeros_like(mean)) == 0


@draws
def test_esm_vanishes_on_its_own_target(data):
    """z = x costs nothing at gamma 0; an offset of z, or a turn of both, changes nothing."""
    x = data.draw(tensors("B3HW", magnitudes=(1.0, 1e-3, 1e4)))
    z = data.draw(tensors("BChw", B=1, magnitudes=(1.0, 1e-3, 1e4)))
    assert esm_loss(x, x, gamma=0.0).abs() < 1e-5
    x = x[:1]
    value = esm_loss(x, z)
    close(esm_loss(x, z.double() + 10 * size(z)), value, 1, rtol=1e-3)
    # The blur goes by the height; of a flat 1e4 resizing leaves errors of 1e-3, which are power.
    same_blur = (x.shape[2] >= 16 * z.shape[2]) == (x.shape[3] >= 16 * z.shape[3])
    flat = x.amax((2, 3)).equal(x.amin((2, 3)))
    if same_blur and not (flat and x.abs().max() > 1):
        close(esm_loss(x.mT, z.mT), value, 1, rtol=1e-4)


@draws
def test_alignment_sees_directions_only(data):
    """
    Both alignments are 0 on the features themselves. Lengths do not count for vf_loss; for
    low_freq_align_loss they do, squared, and so do only the differences.
    """
    f = data.draw(tensors("BTD", FULL, magnitudes=(1.0, 1e4), fills=("noise", "constant")))
    p, grid = noise(*f.shape), (1, f.shape[1])
    assert vf_loss(f, f) == 0
    close(vf_loss(p * (noise(*p.shape[:2], 1).abs() + 0.5), 3 * f), vf_loss(p, f), 1)
    n = data.draw(st.sampled_from([1, 2, 64]))
    loss = low_freq_align_loss(p, f, grid, n)
    close(low_freq_align_loss(4 * p, 4 * f, grid, n), 16 * loss, 16, rtol=1e-4)
    close(low_freq_align_loss(f, p, grid, n), loss, 1, rtol=1e-4)
    assert low_freq_align_loss(f, f, grid, n) == 0


# --------------------------------------------------------------------------------------------------
# Pairs

@st.composite
def pairs(draw, k=1):
    """Images and latents, each side of the latents a multiple of k, the images f times as large."""
    h = k * draw(st.integers(1, 4))
    w = k * draw(st.integers(1, 4))
    f = draw(st.sampled_from([1, 2, 3, 8]))
    B = draw(st.sampled_from([1, 2, 0]))
    images = draw(tensors("B3HW", B=B, H=h * f, W=w * f))
    return images, draw(tensors("BChw", B=B, h=h, w=w)), f


def check_pair(pair, images, latents, f):
    """float32, finite, f : 1, nothing lost but pixels, within the range of what went in."""
    for result, source in zip(pair, (images, latents)):
        assert result.dtype == torch.float32 and result.isfinite().all()
        assert result.shape[:2] == source.shape[:2]
        if result.numel():
            slack = 1e-5 * source.double().abs().max() + 1e-37
            assert result.max() <= source.max() + slack
            assert result.min() >= source.min() - slack
    assert tuple(pair[0].shape[-2:]) == (f * pair[1].shape[-2], f * pair[1].shape[-1])


@pytest.mark.parametrize("pair", [
    lambda x, z: dsm_pair(x, z, 2, 2),
    lambda x, z: scale_pair(x, z, 2),
    lambda x, z: eq_pair(x, z, 0.6, 1),
])
@draws
def test_pair_sees_neither_autocast_nor_layout_nor_batch(pair, data):
    """One result, item by item too, whatever the dtypes; the gradient to the latents is finite."""
    images, latents, _ = data.draw(pairs(2))
    target, z = pair(images, latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(pair(images, latents), (target, z)))
    copies = pair(contiguous(images), contiguous(latents))
    items = [pair(images[i:i + 1], latents[i:i + 1]) for i in range(len(images))] or [(target, z)]
    for result, copy, item, source in zip((target, z), copies, zip(*items), (images, latents)):
        scale = size(source) if len(source) else 0
        close(copy, result, scale)
        close(torch.cat(item), result, scale)
    latents = latents.float().requires_grad_()
    pair(images, latents)[1].sum().backward()
    assert latents.grad.isfinite().all()


@given(st.data(), st.sampled_from([1, 2, 3, 4]))
def test_scale_pair_stays_a_pair(data, k):
    """Every k that divides; k = 1 changes nothing."""
    images, latents, f = data.draw(pairs(k))
    target, z = pair = scale_pair(images, latents, k)
    check_pair(pair, images, latents, f)
    assert tuple(k * side for side in z.shape[-2:]) == tuple(latents.shape[-2:])
    assert k > 1 or torch.equal(target, images.float()) and torch.equal(z, latents.float())


@given(st.data(), st.floats(0, 1, exclude_min=True), st.integers(0, 3))
def test_eq_pair_stays_a_pair(data, scale, rot):
    """Every scale and turn; the remaining turns bring it back."""
    images, latents, f = data.draw(pairs())
    pair = eq_pair(images, latents, scale, rot)
    check_pair(pair, images, latents, f)
    turned_back = eq_pair(*pair, 1.0, (4 - rot) % 4)
    for turned, straight in zip(turned_back, eq_pair(images, latents, scale, 0)):
        assert torch.equal(turned, straight)


@given(st.data(), st.integers(1, 8))
def test_dsm_pair_is_lowpass_of_both(data, block):
    """float32 from any dtype, and the same n for both."""
    images, latents, _ = data.draw(pairs(block))
    n = data.draw(st.integers(0, 2 * block - 1))
    target, z = dsm_pair(images, latents, n, block)
    assert target.dtype == z.dtype == torch.float32
    assert torch.equal(target, lowpass(images.float(), n, block))
    assert torch.equal(z, lowpass(latents.float(), n, block))


@given(st.data(), st.floats(0, 1, exclude_min=True))
def test_scale_images_gives_whole_cells(data, scale):
    """Sides are multiples of f, a cell or more, never more than before; scale 1 changes nothing."""
    images, _, f = data.draw(pairs())
    small = scale_images(images, scale, f)
    assert small.dtype == torch.float32 and small.isfinite().all()
    for side, before in zip(small.shape[-2:], images.shape[-2:]):
        assert side % f == 0 and f <= side <= before
    assert torch.equal(scale_images(images, 1.0, f), images.float())


# --------------------------------------------------------------------------------------------------
# GAN

gradient_scales = st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4, 1e15])


@given(gradient_scales, gradient_scales, st.sampled_from(DTYPES[::2]))
def test_adaptive_weight_is_a_finite_ratio(rec, gan, dtype):
    """In [0, 1e4] for any two gradients, also zero; average is asked once for each."""
    layer, asked = torch.ones(3, 5, dtype=dtype, requires_grad=True), []

    def average(gradient):
        asked.append(1)
        return gradient

    weight = adaptive_weight(rec * layer.sum(), gan * layer.sum(), layer, average=average)
    assert 0 <= weight <= 1e4 and not weight.requires_grad
    assert weight.dtype == torch.float32 and len(asked) == 2
    ratio = torch.tensor(min(1e4, rec * 15 ** 0.5 / (gan * 15 ** 0.5 + 1e-4)))
    close(weight, ratio, 1e4 if rec > 1e-3 else 1, rtol=1e-2)


@given(st.integers(24, 40), st.integers(24, 40), st.integers(0, 3))
@settings(max_examples=max(5, settings.default.max_examples // 5))
def test_discriminator_takes_every_side_from_24(H, W, B):
    """Odd sides too; the documented shape for multiples of 8; smaller images for fewer layers."""
    disc = PatchDiscriminator(channels=4).eval()
    images = noise(B, 3, H, W).requires_grad_()
    logits = disc(images)
    assert logits.shape[:2] == (B, 1) and logits.isfinite().all() and min(logits.shape[2:]) >= 1
    assert H % 8 or W % 8 or logits.shape[2:] == (H // 8 - 2, W // 8 - 2)
    hinge_g_loss(logits).backward()
    assert images.grad.isfinite().all()
    assert PatchDiscriminator(channels=4, n_layers=2)(noise(1, 3, 12, 12)).numel() == 1


# --------------------------------------------------------------------------------------------------
# What is refused

zeros = torch.zeros
one_of = st.one_of
among = lambda *values: st.sampled_from(values)
x = zeros(2, 3, 12, 20)
tokens = zeros(2, 6, 4)
parameter = torch.ones(3, requires_grad=True)
not_whole = one_of(st.integers(-9, 0), among(-math.inf, math.nan, 0.5))
not_positive = st.integers(max_value=0)
not_0_to_1 = one_of(st.floats(max_value=0.0), st.floats(min_value=1.0, exclude_min=True),
                    st.just(math.nan))
not_a_sigma = one_of(st.floats(max_value=-1e-9), among(math.nan, math.inf, 1e9))
not_a_mask = one_of(st.integers(max_value=-1), st.integers(min_value=8), among(0.5, math.nan))
REFUSED = {   # name: a bad value, what it is given to
    "dct_matrix": (one_of(not_whole, st.just(2.5)), dct_matrix),
    "block_dct2": (
        one_of(not_whole, among(3, 5, 8, 12, 24, 2.5)), lambda block: block_dct2(x, block)),
    "block_idct2": (
        st.integers(1, 9).filter(lambda b: b != 4),
        lambda b: block_idct2(zeros(1, 3, 2, 2, b, 4))),
    "triangle_mask": (not_a_mask, lambda n: triangle_mask(n, 4)),
    "triangle_mask of no block": (st.integers(-9, 0), lambda block: triangle_mask(0, block)),
    "triangle_mask by lowpass": (not_a_mask, lambda n: lowpass(x, n, 4)),
    "triangle_mask by dsm_pair": (not_a_mask, lambda n: dsm_pair(x, x, n, 4)),
    "lowpass": (one_of(not_whole, among(3, 8, 24)), lambda block: lowpass(x, 0, block)),
    "lowpass by dsm_pair": (
        among(1, 2, 3, 5, 7, 9), lambda side: dsm_pair(x, zeros(2, 3, 4, side), 1, 4)),
    "downsample_dct": (
        one_of(not_whole, among(3, 5, 24, -2, 2.5)), lambda k: downsample_dct(x, k)),
    "radial_profile": (not_positive, lambda n_bins: radial_profile(x[:, 0], n_bins)),
    "radial_profile by spectrum_distribution": (
        not_positive, lambda n_bins: spectrum_distribution(x, n_bins)),
    "radial_profile by esm_loss": (not_positive, lambda n_bins: esm_loss(x, x, n_bins=n_bins)),
    "spectrum_distribution": (
        among(math.nan, math.inf, -11, 50.0), lambda gamma: spectrum_distribution(x, gamma=gamma)),
    "spectrum_distribution by esm_loss": (
        among(math.nan, math.inf, 50.0), lambda gamma: esm_loss(x, x, gamma)),
    "match_resolution": (
        among((0, 4), (4, -1), (4,), (4, 4, 4), ()), lambda size: match_resolution(x, size)),
    "fit_power_law": (among((), (0,), (3, 0)), lambda shape: fit_power_law(zeros(shape))),
    "wiener_gain": (
        one_of(not_0_to_1, st.just(1.0)), lambda alpha_bar: wiener_gain(tokens, alpha_bar)),
    "wiener_gain of a tensor": (
        not_0_to_1,
        lambda alpha_bar: learnable_power(tokens, torch.tensor([0.5, alpha_bar, 0.1, 0.2]))),
    "wiener_gain of a power": (
        st.floats(-1e9, -1e-9), lambda S: wiener_gain(torch.tensor([1.0, S]), 0.5)),
    "gaussian_blur": (not_a_sigma, lambda sigma: gaussian_blur(x, sigma)),
    "dog": (among(-1.0, 2.0, 3.0, math.nan), lambda sigma: dog(x, sigma, 2.0)),
    "kl_loss": (
        among((1, 3), (2, 1), (2,), (), (2, 3, 1)),
        lambda shape: kl_loss(zeros(2, 3), zeros(shape))),
    "esm_loss": (among(0, 1, 3), lambda B: esm_loss(zeros(B, 3, 8, 8), x)),
    "match_resolution by esm_loss": (
        among((2,), (2, 3, 8), (2, 3, 0, 8)), lambda shape: esm_loss(zeros(shape), x)),
    "vf_loss": (
        among((1, 6, 4), (2, 1, 4), (2, 6, 1), (6, 4)),
        lambda shape: vf_loss(tokens, zeros(shape))),
    "vf_loss of a shape": (
        among((6, 4), (2, 0, 4), (2, 6, 4, 4)), lambda shape: vf_loss(zeros(shape), zeros(shape))),
    "low_freq_align_loss": (
        among((1, 6, 4), (2, 6, 1), (6, 4)),
        lambda shape: low_freq_align_loss(tokens, zeros(shape), (2, 3))),
    "low_freq_align_loss of a grid": (
        among((2, 2), (6, 0), (-2, -4)), lambda grid: low_freq_align_loss(tokens, tokens, grid)),
    "low_freq_align_loss of no coefficients": (
        among(0, -1), lambda n: low_freq_align_loss(tokens, tokens, (2, 3), n)),
    "scale_pair": (one_of(not_whole, among(3, 5, 24, 2.5)), lambda k: scale_pair(x, x, k)),
    "scale_pair of an image": (
        among((13, 20), (12, 21), (24, 20), (6, 10), (3, 5)),
        lambda sides: scale_pair(zeros(2, 3, *sides), x, 1)),
    "eq_pair of an image": (
        among((13, 20), (12, 40), (6, 10)), lambda sides: eq_pair(zeros(2, 3, *sides), x, 0.5, 0)),
    "eq_pair of a scale": (not_0_to_1, lambda scale: eq_pair(x, x, scale, 0)),
    "eq_pair of a turn": (among(-1, 4, 0.5, math.nan), lambda rot: eq_pair(x, x, 1.0, rot)),
    "scale_images": (not_0_to_1, lambda scale: scale_images(x, scale, 4)),
    "scale_images of f": (
        one_of(not_whole, among(3, 5, 24)), lambda f: scale_images(x, 0.5, f)),
    "PatchDiscriminator": (
        st.integers(1, 23), lambda side: PatchDiscriminator(channels=2)(zeros(1, 3, 24, side))),
    "PatchDiscriminator of channels": (
        among(1, 2, 4), lambda C: PatchDiscriminator(channels=2)(zeros(1, C, 24, 24))),
    "adaptive_weight": (
        st.integers(2, 5),
        lambda n: adaptive_weight(parameter.sum(), parameter.sum().expand(n), parameter)),
    "adaptive_weight of another graph": (
        st.booleans(),
        lambda grad: adaptive_weight(
            parameter.sum(), torch.ones((), requires_grad=grad), parameter)),
}


@pytest.mark.parametrize("name", REFUSED)
@draws
def test_bad_values_are_refused_by_name(name, data):
    """A ValueError that opens with the function that noticed and holds the value; nothing else."""
    bad, function = REFUSED[name]
    value = data.draw(bad)
    with pytest.raises(ValueError, match=rf"^{name.split()[0]}: ") as error:
        function(value)
    silent = name.endswith(("tensor", "power", "graph", "dsm_pair"))
    if isinstance(value, (int, float)) and not silent:
        assert str(value) in str(error.value)
