"""Functions of spectral.py: finite float32 of all that is finite, in any layout; and refusals."""
import itertools
import math

import pytest
import torch

import losses
import spectral

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# inf: squares that sum to 1e36 an item
MAGNITUDES = (1.0, 0.0, 1e-45, 1e-30, 1e-3, 1e4, math.inf)
GRIDS = (dict(B=2, C=3, H=16, W=12, T=6, D=4, h=2, w=3, b=4),
         dict(B=3, C=1, H=34, W=17, T=13, D=3, h=1, w=3, b=3),
         dict(B=2, C=4, H=7, W=5, T=2, D=1, h=3, w=1, b=8), dict.fromkeys("BCHWTDhwb", 1))


def outlier(x):
    """Each item a thousandth of itself, but for a 1 where it is largest."""
    largest = x.flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1))
    return x * 1e-3 + (x == largest)


FILLS = (lambda x: x, outlier, torch.ones_like)
LAYOUTS = (
    lambda x: x.mT.contiguous().mT,
    lambda x: torch.stack([x, x + 1], -1)[..., 0],
    lambda x: x[:1].expand_as(x),
    lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
)


def tensors(dims, request, magnitudes=MAGNITUDES, fills=FILLS):
    """Tensors with these dimensions, a letter each; without --long float32 alone on most grids."""
    for grid, fill, magnitude, dtype in itertools.product(GRIDS, fills, magnitudes, DTYPES):
        every = grid is GRIDS[0] or request.config.getoption("--long")
        if not every and dtype != torch.float32:
            continue
        shape = [grid[letter] for letter in dims]
        if magnitude == math.inf:
            magnitude = (1e36 / math.prod(shape[1:])) ** 0.5
        x = fill(torch.rand(shape) * 2 - 1).double() * magnitude
        limits = torch.finfo(dtype)
        yield x.clamp(limits.min, limits.max).to(dtype)


def tile(x):
    """A block that tiles x, from 1 to 17."""
    return math.gcd(*x.shape[-2:])


def tiles_shape(B, C, H, W):
    """Shape of block_dct2(x, tile(x))."""
    b = math.gcd(H, W)
    return B, C, H // b, W // b, b, b


# name: dimensions of x, the function, the shape of its result
same_shape = lambda *shape: shape
MAPS = {
    "dct2": ("BCHW", spectral.dct2, same_shape),
    "idct2": ("BCHW", spectral.idct2, same_shape),
    "block_dct2": ("BCHW", lambda x: spectral.block_dct2(x, tile(x)), tiles_shape),
    "block_idct2": ("BChwbb", spectral.block_idct2, lambda B, C, h, w, b, _: (B, C, h * b, w * b)),
    "lowpass": ("BCHW", lambda x: spectral.lowpass(x, tile(x), tile(x)), same_shape),
    "downsample_dct": ("BCHW", lambda x: spectral.downsample_dct(x, tile(x)),
                       lambda *shape: tiles_shape(*shape)[:4]),
    "power_spectrum": ("BCHW", spectral.power_spectrum, lambda B, C, H, W: (B, H, W)),
    "radial_profile": ("BHW", spectral.radial_profile, lambda B, H, W: (B, 16)),
    "spectrum_distribution": ("BCHW", lambda x: spectral.spectrum_distribution(x, 7, 1),
                              lambda B, C, H, W: (B, 7)),
    "match_resolution": ("BCHW", lambda x: spectral.match_resolution(x, (1, 3)),
                         lambda B, C, H, W: (B, C, 1, 3)),
    "fit_power_law": ("BT", lambda x: spectral.fit_power_law(x.abs()), lambda B, T: (B,)),
    "wiener_gain": ("BT", lambda x: spectral.wiener_gain(x.abs(), 0.3), same_shape),
    "learnable_power": ("BT", lambda x: spectral.learnable_power(x.abs(), 0.9), same_shape),
    "rmsc": ("BTD", spectral.rmsc, lambda B, T, D: (B,)),
    "directional_energy": ("BTD", spectral.directional_energy, lambda B, T, D: (B, T)),
    "gaussian_blur": ("BCHW", lambda x: spectral.gaussian_blur(x, 1.3), same_shape),
    "dog": ("BCHW", lambda x: spectral.dog(x, 0, 2), same_shape),
    "spatial_norm": ("BTD", spectral.spatial_norm, same_shape),
}
every_map = pytest.mark.parametrize("name", MAPS)


def close(a, b, scale):
    """a equals b within the rounding of numbers as large as scale."""
    assert a.shape == b.shape
    assert ((a.double() - b.double()).abs() <= 1e-5 * float(scale) + 1e-37).all()


@every_map
def test_map_is_finite_float32_of_the_stated_shape(name, request):
    """Finite in, finite out, float64 stays; autocast changes nothing, nothing changes x."""
    dims, function, shape = MAPS[name]
    for x in tensors(dims, request):
        before, y = x.clone(), function(x)
        assert torch.equal(x, before)
        assert y.shape == shape(*x.shape) and y.isfinite().all()
        assert y.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(x), y)
        if name == "fit_power_law" or x.dtype == torch.float16:    # cannot hold every gradient
            continue
        y = function(x.requires_grad_())
        along = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        gradient, = torch.autograd.grad(y, x, along)
        assert gradient.dtype == x.dtype and gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:std")  # torch's, over a batch of 0
@every_map
def test_map_sees_neither_layout_nor_batch(name, request):
    """Neither layout nor neighbours change an item's result; a batch of no item has none."""
    dims, function, shape = MAPS[name]
    for x in tensors(dims, request, magnitudes=(1.0, 1e-3, 1e4, math.inf), fills=FILLS[:2]):
        y = function(x)
        scale = max(1, x.double().flatten(1).norm(dim=1).max(), y.abs().max())
        close(y, torch.cat([function(x[i:i + 1]) for i in range(len(x))]), scale)
        assert function(x[:0]).shape == shape(0, *x.shape[1:])
        for layout in LAYOUTS:
            x = layout(x)
            close(function(x), function(x.contiguous()), scale)


@every_map
def test_map_can_train_after_inference_mode(name):
    """What an evaluation in inference mode has cached serves a training step after it."""
    for function in vars(spectral).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    dims, function, _ = MAPS[name]
    x = torch.rand([GRIDS[0][letter] for letter in dims])
    with torch.inference_mode():
        function(x)
    y = function(x.requires_grad_())
    if y.requires_grad:
        y.sum().backward()


def test_rings_partition_the_plane():
    """Every coefficient is in the ring of whole-number arithmetic; a ring's value is its mean."""
    for H, W, n_bins in itertools.product((1, 2, 7, 16, 33), (1, 3, 16, 40), (1, 5, 16, 37)):
        P, rings = torch.rand(1, H, W).double(), [[] for _ in range(n_bins)]
        r2_max = max(1, (H - 1) ** 2 + (W - 1) ** 2)
        for u, v in itertools.product(range(H), range(W)):
            # floor(sqrt(q)) = isqrt(floor(q))
            ring = math.isqrt((u * u + v * v) * n_bins ** 2 // r2_max)
            rings[min(n_bins - 1, ring)].append(P[0, u, v].item())
        means = [sum(ring) / max(1, len(ring)) for ring in rings]
        close(spectral.radial_profile(P, n_bins)[0], torch.tensor(means), 1)


def test_spectrum_distribution_of_a_constant_is_uniform():
    """Whatever the value: what rounding leaves of a large mean is no power."""
    values = 0.0, 0.1, 1 / 3, -12.34, 1234.567, 1e4 + 0.1, 1e16
    for dtype, value, side in itertools.product(DTYPES, values, (1, 7, 16, 33)):
        x = torch.full((2, 3, side, side + 3), min(value, torch.finfo(dtype).max), dtype=dtype)
        close(spectral.spectrum_distribution(x, 16, 1.0), torch.full((2, 16), 1 / 16), 1)


@pytest.mark.parametrize("call, culprit", [
    (lambda x: spectral.lowpass(x, 8, 4), "n=8"),
    (lambda x: losses.dsm_pair(x, x[..., :6], 1, 4), "12x6"),
    (lambda x: spectral.downsample_dct(x, 3), "12x20"),
    (lambda x: spectral.dct2(x[..., :0]), r"\(2, 3, 12, 0\)"),
    (lambda x: losses.esm_loss(x, x, math.nan), "gamma=nan"),
    (lambda x: losses.esm_loss(x[:1], x), "1 images and 2 latents"),
    (lambda x: losses.esm_loss(x[:, 0], x), "match_resolution"),
    (lambda x: spectral.dog(x, 2.0, 1.0), "sigma1=2.0"),
    (lambda x: losses.kl_loss(x, x[:1]), "kl_loss"),
    (lambda x: losses.scale_pair(x, x, 8), "12x20"),
    (lambda x: losses.eq_pair(x[..., :18], x, 0.5, 0), "12x18")])
def test_bad_input_names_the_culprit(call, culprit):
    """What would broadcast, crop or give nonsense in silence is a ValueError with the value."""
    with pytest.raises(ValueError, match=culprit):
        call(torch.zeros(2, 3, 12, 20))
