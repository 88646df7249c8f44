"""
Diffusion transformers, and the two diffusion processes that train and sample them.
A noisy latent is cut into patches (tokens), which a transformer maps to a prediction:

  SiT    adaLN-Zero: time and class modulate every block (Peebles & Xie 2022, Ma et al. 2024)
  UViT   time and class are tokens, long skips join shallow and deep blocks (Bao et al. 2022)

  Interpolant   x_t = (1 - t) x + t eps,                 the network predicts v = eps - x
  DDPM          x_n = sqrt(a_n) x + sqrt(1 - a_n) eps,   the network predicts eps
                a_n = prod_{i <= n} (1 - beta_i)

Latents x (B, C, h, w), normalised to std near 1; tokens (B, T, D), T = (h/p)*(w/p) in row-major
order; labels y (B,) int64, num_classes = the null label. Time runs from 0 (data) to 1 (noise), as
in REPA. The networks' time input is not rescaled, as in the original repositories: t in [0, 1] for
Interpolant (REPA), n = 1 .. 1000 as a float for DDPM (U-ViT, train_ldm_discrete.py).
Networks and losses draw no random numbers: times, noise and dropped labels are arguments.
State-dict names and shapes are those of willisma/SiT, sihyun-yu/REPA and baofff/U-ViT, whose
checkpoints common/weights.py loads.
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- building blocks of both networks
def sinusoid(t, dim):
    """
    Time embedding [cos(t f_k), sin(t f_k)], f_k = 10000^(-k / (dim/2)) radians per unit of t.
    t        (B,) any range
    returns  (B, dim), always float32: in bfloat16, n = 999 and n = 1000 are the same number
    """
    k = torch.arange(dim // 2, device=t.device)
    freqs = torch.exp(-math.log(10000) * k / (dim // 2))  # (dim/2,), 1 .. 1e-4
    phase = t.float()[:, None] * freqs                    # (B, dim/2)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def sincos_positions(grid, dim):
    """
    Fixed 2-D position embeddings (1, T, dim) of a (rows, columns) grid: the first half of dim
    encodes the column, the second the row, as in MAE.
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim/4,)
    sides = [torch.arange(n, dtype=torch.float64) for n in grid]
    row, column = torch.meshgrid(*sides, indexing="ij")
    phases = [position.reshape(-1, 1) * omega for position in (column, row)]      # (T, dim/4)
    return torch.cat([f(x) for x in phases for f in (torch.sin, torch.cos)], dim=1)[None].float()


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D)."""

    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)              # each (B, heads, T, D/heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """D -> 4D -> D with a GELU, token by token."""

    def __init__(self, dim, gelu):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU(approximate=gelu)              # "tanh" in SiT, "none" (exact) in U-ViT
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class LatentTransformer(nn.Module):
    """Base class of SiT and UViT: patch grid, input checks, tokens to latent."""

    def __init__(self, input_size, in_channels, num_classes, patch_size, depth):
        super().__init__()
        self.input_size = (input_size,) * 2 if isinstance(input_size, int) else tuple(input_size)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.depth = depth
        self.grid = tuple(side // patch_size for side in self.input_size)  # (h/p, w/p)
        if any(side % patch_size for side in self.input_size):
            raise ValueError(f"patch size {patch_size} does not divide latents of "
                             f"{self.input_size}; use a smaller one")

    def prepare(self, x, y, drop):
        """x cast to the network's dtype; labels, replaced by the null label where drop is True."""
        expected = (self.in_channels, *self.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"got latents {tuple(x.shape[1:])}, the model is built for {expected}")
        if (y is None) != (self.num_classes == 0):
            raise ValueError(f"labels y: needed if and only if num_classes={self.num_classes} > 0")
        if y is not None and drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return x.to(self.pos_embed.dtype), y

    def unpatchify(self, tokens):
        """(B, T, p*p*C), each token in the order row, column, channel -> (B, C, h, w)."""
        (rows, columns), p = self.grid, self.patch_size
        x = tokens.reshape(-1, rows, columns, p, p, self.in_channels)
        x = x.permute(0, 5, 1, 3, 2, 4)                   # (B, C, h/p, p, w/p, p)
        return x.reshape(-1, self.in_channels, rows * p, columns * p)


# ---------------------------------------------------------------------------------------------- SiT
class SiTBlock(nn.Module):
    """adaLN-Zero: the condition c (B, D) shifts, scales and gates attention and MLP (B, T, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):                              # (B, T, D), (B, D)
        modulation = self.adaLN_modulation(c)[:, None]    # (B, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """adaLN, then tokens (B, T, D) -> patches (B, T, p*p*C); initialised to zero."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)  # each (B, 1, D)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SiT(LatentTransformer):
    """
    The transformer of SiT and REPA (and of DiT). adaLN-Zero: every gate and the last layer start at
    zero, so at initialisation the network outputs zero and every block is the identity.
    input_size   int or (h, w); ValueError if patch_size does not divide it
    num_classes  0 = unconditional; else num_classes + 1 embeddings, the last for the null label
    """
    def __init__(self, input_size, in_channels, num_classes, patch_size, depth, dim, heads):
        super().__init__(input_size, in_channels, num_classes, patch_size, depth)
        # ModuleDicts instead of the original's classes keep its state-dict names
        patchify = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.x_embedder = nn.ModuleDict({"proj": patchify})
        time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.t_embedder = nn.ModuleDict({"mlp": time_mlp})
        if num_classes:
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})
        # (1, T, D), not trained
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, dim), requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(dim, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, patch_size ** 2 * in_channels)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(patchify.weight.flatten(1))  # a view: initialised like a Linear
        nn.init.zeros_(patchify.bias)
        for i in (0, 2):
            nn.init.normal_(time_mlp[i].weight, std=0.02)
        if num_classes:
            nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        modulations = [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        for linear in (*modulations, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, t, y=None, drop=None, return_hidden=None):
        """
        x              (B, C, h, w) noisy latent, any float dtype; computed in the weights'
                       dtype or under the caller's autocast
        t              (B,) float, not rescaled: in [0, 1] with Interpolant
        y              (B,) int64 labels 0 .. num_classes; None if and only if num_classes == 0
        drop           (B,) bool or None: where to replace the label by the null label
        return_hidden  k or None: also return the tokens (B, T, D) after block k, 1 .. depth
        returns        (B, C, h, w), or the pair (output, tokens)
        raises         ValueError for a wrong latent size, missing or unexpected labels
        """
        x, y = self.prepare(x, y, drop)
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, D)
        c = self.t_embedder["mlp"](sinusoid(t, 256).to(x.dtype))                         # (B, D)
        if y is not None:
            c = c + self.y_embedder["embedding_table"](y)
        for k, block in enumerate(self.blocks, 1):
            tokens = block(tokens, c)
            if k == return_hidden:
                hidden = tokens
        out = self.unpatchify(self.final_layer(tokens, c))
        return out if return_hidden is None else (out, hidden)


# -------------------------------------------------------------------------------------------- U-ViT
class UViTBlock(nn.Module):
    """Pre-norm block on tokens (B, T, D); with skip, first merges in a shallow block's tokens."""

    def __init__(self, dim, heads, skip):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, "none")
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None):                      # both (B, T, D)
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(LatentTransformer):
    """
    The transformer of U-ViT: depth//2 blocks, a middle block, and depth//2 blocks with a long skip
    each (depth 12: 6 + 1 + 6 blocks); learned position embeddings. Arguments as in SiT; unlike in
    the original, num_classes does not count the null label (1000, not 1001).
    """
    def __init__(self, input_size, in_channels, num_classes, patch_size, depth, dim, heads):
        half = depth // 2
        super().__init__(input_size, in_channels, num_classes, patch_size, half * 2 + 1)
        self.extras = 2 if num_classes else 1             # extra tokens: [label,] time
        patchify = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patchify})
        if num_classes:                                   # initial std 1, as in the original
            self.label_emb = nn.Embedding(num_classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + math.prod(self.grid), dim))
        self.in_blocks = nn.ModuleList([UViTBlock(dim, heads, skip=False) for _ in range(half)])
        self.mid_block = UViTBlock(dim, heads, skip=False)
        self.out_blocks = nn.ModuleList([UViTBlock(dim, heads, skip=True) for _ in range(half)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch_size ** 2 * in_channels)
        # smooths patch boundaries
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x, t, y=None, drop=None, return_hidden=None):
        """As SiT.forward, but t is n = 1 .. 1000 of DDPM; hidden tokens are the patch tokens."""
        x, y = self.prepare(x, y, drop)
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (B, T, D)
        extras = [sinusoid(t, patches.shape[-1]).to(x.dtype)[:, None]]    # (B, 1, D)
        if y is not None:                                 # label first, as in the original
            extras = [self.label_emb(y)[:, None], *extras]
        tokens = torch.cat([*extras, patches], dim=1) + self.pos_embed    # (B, extras + T, D)
        skips = []                                        # last in, first out
        for k, block in enumerate([*self.in_blocks, self.mid_block, *self.out_blocks], 1):
            tokens = block(tokens) if block.skip_linear is None else block(tokens, skips.pop())
            if k <= len(self.in_blocks):
                skips.append(tokens)
            if k == return_hidden:
                hidden = tokens[:, self.extras:]
        pixels = self.decoder_pred(self.norm(tokens))[:, self.extras:]    # (B, T, p*p*C)
        out = self.final_layer(self.unpatchify(pixels))
        return out if return_hidden is None else (out, hidden)


# -------------------------------------------------------------------------------------------- sizes
SIZES = [  # name, class, depth, dim, heads
    ("SiT-tiny", SiT, 2, 128, 4), ("SiT-mini", SiT, 4, 128, 4),
    ("SiT-S", SiT, 12, 384, 6), ("SiT-B", SiT, 12, 768, 12),
    ("SiT-L", SiT, 24, 1024, 16), ("SiT-XL", SiT, 28, 1152, 16),
    ("UViT-tiny", UViT, 2, 96, 3), ("UViT-S", UViT, 12, 512, 8), ("UViT-M", UViT, 16, 768, 12),
    ("UViT-L", UViT, 20, 1024, 16), ("UViT-H", UViT, 28, 1152, 16)]
MODELS = {}  # MODELS["SiT-B/2"](input_size=32, in_channels=4, num_classes=1000); /2: patch size
for p in (1, 2, 4):
    for name, kind, depth, dim, heads in SIZES:
        MODELS[f"{name}/{p}"] = partial(kind, patch_size=p, depth=depth, dim=dim, heads=heads)


# ---------------------------------------------------------------------------- training and sampling
class NoiseStream:
    """
    Gaussian noise whose row j depends only on (seed, indices[j]) and on earlier calls: sample i of
    a run is the same in any batch and on any number of processes (up to rounding in the network).
    NoiseStream(seed, indices)(shape) -> float32, shape[0] == len(indices); seed, indices >= 0
    """
    def __init__(self, seed, indices):
        # Philox is counter-based and has a 128-bit key per sample; torch's CPU generator uses only
        # 32 bits of its seed, too few for 50,000 distinct streams.
        philox = [np.random.Philox(key=[seed, int(i)]) for i in indices]
        self.streams = [np.random.Generator(bits) for bits in philox]

    def __call__(self, shape):
        rows = [s.standard_normal(shape[1:], dtype=np.float32) for s in self.streams]
        return torch.from_numpy(np.stack(rows))


def regress(model, x_t, t, target, y, drop, return_hidden):
    """MSE of the prediction, in float32, and the hidden tokens if requested."""
    out = model(x_t, t, y, drop=drop, return_hidden=return_hidden)
    if return_hidden is None:
        return F.mse_loss(out.float(), target)
    return F.mse_loss(out[0].float(), target), out[1]


def guided(model, shape, y, cfg, cfg_interval):
    """
    Classifier-free guidance: null + cfg * (class - null) while cfg_interval[0] <= t <=
    cfg_interval[1], t in [0, 1]; the conditional prediction otherwise. cfg == 1 is conditional,
    cfg == 0 unconditional sampling; U-ViT's configurations specify cfg - 1 (0.4 for cfg 1.4).
    returns  predict(x, t, timestep) -> (B, C, h, w) in x's dtype, and the model's device
    """
    B = shape[0]
    device = next(model.parameters()).device
    if cfg != 1 and y is None:
        raise ValueError(f"cfg={cfg}: guidance needs labels, but there are none; leave cfg at 1")
    if y is not None:
        y = y.to(device)
        twice = torch.cat([y, y])                         # (2B,): class, then null
        drop = torch.arange(2 * B, device=device) >= B

    def predict(x, t, timestep):
        if cfg == 1 or not cfg_interval[0] <= t <= cfg_interval[1]:
            return model(x, x.new_full((B,), timestep), y).to(x)
        # class and null in one call
        out = model(torch.cat([x, x]), x.new_full((2 * B,), timestep), twice, drop=drop)
        conditional, null = out.to(x).chunk(2)
        return null + cfg * (conditional - null)
    return predict, device


def to_state(noise, device):
    """Noise (B, C, h, w) as a sampler's state: float64, or float32 on Apple GPUs, which lack it."""
    return noise.to(device, torch.float32 if device.type == "mps" else torch.float64)


class Interpolant:
    """The straight path x_t = (1 - t) x + t eps, velocity v = eps - x (REPA's loss.py)."""

    def time(self, t):
        """The network's time input at time t in [0, 1], 0 = data."""
        return t

    def alpha_bar_at(self, t):
        """Fraction of x_t's variance that is data, for data of variance 1; t: float or tensor."""
        return (1 - t) ** 2 / ((1 - t) ** 2 + t ** 2)

    def noisy(self, x, eps, t):
        """x_t of latents x and noise eps (B, C, h, w); t in [0, 1], a float or (B, 1, 1, 1)."""
        return (1 - t) * x + t * eps

    def clean(self, x_t, output, t):
        """The predicted clean latent, x_t - t v, from the network's output v at x_t."""
        return x_t - t * output

    def loss(self, model, x, t, eps, y=None, drop=None, return_hidden=None):
        """
        Mean squared error of the predicted velocity.
        x        (B, C, h, w) float32 normalised latents
        t, eps   (B,) uniform in [0, 1); standard normal, shape of x
        y, drop  (B,) labels or None; (B,) bool, True = use the null label, or None
        returns  scalar, or (scalar, tokens (B, T, D)) with return_hidden=k
        """
        s = t.view(-1, 1, 1, 1)
        return regress(model, self.noisy(x, eps, s), t, eps - x, y, drop, return_hidden)

    @torch.no_grad()
    def sample(self, model, shape, steps=100, y=None, cfg=1.0, cfg_interval=(0.0, 1.0),
               sampler="em", noise=torch.randn, watch=None):
        """
        Latents from noise, one network call per step; the state is float64, the network runs in its
        own dtype or under the caller's autocast.
        sampler  "em": Euler-Maruyama on dx = (v - w/2 score) dt + sqrt(w) dW, w = 2t, from t = 1 to
                 0.04 in equal steps, then one noise-free step to 0 (REPA's samplers.py);
                 "ode": Euler on dx = v dt, equal steps from 1 to 0
        shape    (B, C, h, w); y (B,) labels or None; cfg and cfg_interval as in `guided`
        noise    noise(shape) -> (B, C, h, w), called for the initial state and every stochastic
                 step; a NoiseStream makes each sample reproducible
        watch    None, or a callback watch(t, predicted clean latent in float64) for every step
        returns  (B, C, h, w) float32 on the model's device
        raises   KeyError for an unknown sampler, ValueError for guidance without labels
        """
        predict, device = guided(model, shape, y, cfg, cfg_interval)
        times = {"em": [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0],
                 "ode": torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()}[sampler]
        sde = sampler == "em"
        x = to_state(noise(shape), device)
        for t, t_next in zip(times, times[1:]):
            drift = predict(x, t, t)
            if watch:
                watch(t, self.clean(x, drift, t))
            if sde:
                # E[eps | x_t] = (1 - t) v + x_t = -t * score
                score = -((1 - t) * drift + x) / t
                drift = drift - t * score                 # w/2 = t
            x = x + (t_next - t) * drift
            if sde and t_next > 0:
                z = to_state(noise(shape), device)
                x = x + math.sqrt(2 * t * (t - t_next)) * z
        return x.float()


class DDPM:
    """
    1000 noise levels and eps-prediction. alpha_bar (1001,) float64: n = 0 is data (1.0), n = 1000
    almost pure noise.
    schedule  "vp": beta linear from 1e-4 to 0.02, which discretises the VP-SDE with beta(t) from
              0.1 to 20 (the authors' U-ViT on CelebA); alpha_bar ends at 0.00004
              "sd": Stable Diffusion's, sqrt(beta) linear, beta 0.00085 to 0.012; ends at 0.0047
    """
    def __init__(self, schedule):
        low, high, power = {"vp": (1e-4, 0.02, 1), "sd": (0.00085, 0.012, 2)}[schedule]
        roots = torch.linspace(low ** (1 / power), high ** (1 / power), 1000, dtype=torch.float64)
        betas = roots ** power
        self.alpha_bar = torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])

    def time(self, t):
        """The noise level n = 0 .. 1000 at time t in [0, 1], which is the network's time input."""
        return round(1000 * t)

    def alpha_bar_at(self, t):
        """As Interpolant.alpha_bar_at, at level n = time(t)."""
        return self.alpha_bar[(1000 * torch.as_tensor(t, dtype=torch.float64)).round().long()]

    def noisy(self, x, eps, t):
        """As Interpolant.noisy, at level n = time(t)."""
        a = float(self.alpha_bar[self.time(t)])
        return math.sqrt(a) * x + math.sqrt(1 - a) * eps

    def clean(self, x_t, output, t):
        """As Interpolant.clean: (x_n - sqrt(1 - a_n) eps) / sqrt(a_n), n = time(t)."""
        a = float(self.alpha_bar[self.time(t)])
        return (x_t - math.sqrt(1 - a) * output) / math.sqrt(a)

    def loss(self, model, x, t, eps, y=None, drop=None, return_hidden=None):
        """Mean squared error of the predicted eps; arguments as in Interpolant.loss."""
        n = (1000 * t).long() + 1                         # (B,) uniform in 1 .. 1000
        roots = torch.stack([self.alpha_bar, 1 - self.alpha_bar]).sqrt().float()       # (2, 1001)
        signal, noise = roots.to(x.device, non_blocking=True)[:, n, None, None, None]
        x_n = signal * x + noise * eps
        return regress(model, x_n, n.float(), eps, y, drop, return_hidden)

    @torch.no_grad()
    def sample(self, model, shape, steps=100, y=None, cfg=1.0, cfg_interval=(0.0, 1.0),
               noise=torch.randn, watch=None):
        """
        DDIM (Song et al. 2021, Eq. 12, sigma = 0) in `steps` (1 .. 1000) equal steps from n = 1000
        to 0; cfg_interval is in t = n / 1000; other arguments as in Interpolant.sample.
        """
        if not 1 <= steps <= 1000:
            raise ValueError(f"steps={steps}: DDPM has 1000 noise levels; use 1 .. 1000")
        predict, device = guided(model, shape, y, cfg, cfg_interval)
        levels = torch.linspace(1000, 0, steps + 1, dtype=torch.float64).round()
        times = (levels / 1000).tolist()
        x = to_state(noise(shape), device)
        for t, t_next in zip(times, times[1:]):
            eps = predict(x, t, self.time(t))
            clean = self.clean(x, eps, t)
            if watch:
                watch(t, clean)
            x = self.noisy(clean, eps, t_next)
        return x.float()
