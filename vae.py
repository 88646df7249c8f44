"""
The autoencoder of latent diffusion (Fig. 1): SD-VAE's networks, posterior and configurations.

    encode   q(z|x) = N(mean, diag exp(logvar)),  [mean, logvar] = quant_conv(encoder(x))
    sample   z = mean + exp(logvar / 2) * noise,  noise ~ N(0, I),  logvar clamped to [-30, 20]
    decode   x^ = decoder(post_quant_conv(z))
Encoder: conv_in; per level num_res_blocks residual blocks and, except at the last, a downsampling;
block, attention, block; conv_out. The decoder mirrors it, deepest level first, with one more block
per level. Reduction f = 2^(levels - 1).

    name        widths                  f   d   parameters
    f8d4        128 x (1, 2, 4, 4)      8   4   83,653,863   Stable Diffusion's; 83.7M in Table 5
    f16d16      128 x (1, 1, 2, 2, 4)  16  16   64,352,723   64.4M in Table 5
    f16d32      128 x (1, 1, 2, 2, 4)  16  32   69,836,067   VA-VAE's; attention at the last level
    f4d4         64 x (1, 2, 2)         4   4    5,120,039   for 64x64 images on one GPU
    f4d4-tiny    16 x (1, 2, 2)         4   4      242,327   for 32x32 images on a laptop CPU
    f2d4-tiny    16 x (1, 2)            2   4      167,959   for 32x32 images on a laptop CPU
    f2d2-tiny    16 x (1, 2)            2   2      166,161   the same with twice the compression

Images (B, 3, H, W) in [-1, 1]; latents (B, C, h, w), h = H/f, w = W/f, not normalised:
only normalize() shifts and scales them. Module names are those of CompVis' latent-diffusion, so
released .ckpt files load unchanged (common/weights.py). Numbering as in arXiv:2603.14645 v1.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class AEConfig:
    """Architecture of an autoencoder; checkpoints store it as dataclasses.asdict(config)."""
    ch_mult: tuple            # width of each level in units of ch, full resolution first
    latent_channels: int      # d
    in_channels: int = 3
    ch: int = 128
    num_res_blocks: int = 2   # per level of the encoder; the decoder has one more
    attn_levels: tuple = ()   # levels with attention after each block, in addition to the middle
    norm_groups: int = 32     # groups of every GroupNorm; cannot be inferred from the weights

    def __post_init__(self):
        self.ch_mult = tuple(self.ch_mult)  # JSON turns tuples into lists
        self.attn_levels = tuple(self.attn_levels)

    @property
    def reduction(self):
        return 2 ** (len(self.ch_mult) - 1)


# The tiny ones have 4 channels per group, like 128 channels in 32 groups: normalising single
# channels would erase the mean and contrast of each.
CONFIGS = {
    "f8d4": AEConfig(ch_mult=(1, 2, 4, 4), latent_channels=4),
    "f16d16": AEConfig(ch_mult=(1, 1, 2, 2, 4), latent_channels=16),
    "f16d32": AEConfig(ch_mult=(1, 1, 2, 2, 4), latent_channels=32, attn_levels=(4,)),
    "f4d4": AEConfig(ch_mult=(1, 2, 2), latent_channels=4, ch=64),
    "f4d4-tiny": AEConfig((1, 2, 2), 4, ch=16, num_res_blocks=1, norm_groups=4),
    "f2d4-tiny": AEConfig((1, 2), 4, ch=16, num_res_blocks=1, norm_groups=4),
    "f2d2-tiny": AEConfig((1, 2), 2, ch=16, num_res_blocks=1, norm_groups=4),
}


def group_norm(c, groups):
    """GroupNorm with the eps of latent-diffusion, 1e-6."""
    return nn.GroupNorm(groups, c, eps=1e-6)


class ResnetBlock(nn.Module):
    """(norm, SiLU, 3x3 conv) twice, plus the input (through a 1x1 conv if the widths differ)."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Residual single-head self-attention over pixels; q, k, v are 1x1 convolutions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = group_norm(c, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x)
        # (B, 1, HW, C) each; contiguous, since fused kernels require a last stride of 1
        q, k, v = (conv(h).reshape(B, 1, C, H * W).transpose(2, 3).contiguous()
                   for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                # (B, 1, HW, C)
        return x + self.proj_out(h.transpose(2, 3).reshape(B, C, H, W))


class Downsample(nn.Module):
    """3x3 convolution with stride 2: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                   # zero-pad right and bottom only


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution; Encoder and Decoder add `downsample` or `upsample`."""

    def __init__(self, c_in, c_out, blocks, groups, attention):
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.block.append(ResnetBlock(c_in, c_out, groups))
            self.attn.append(AttnBlock(c_out, groups) if attention else nn.Identity())
            c_in = c_out

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return h


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.block_1 = ResnetBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)
        self.block_2 = ResnetBlock(c, c, groups)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, 2C, h, w), before quant_conv."""

    def __init__(self, cfg):
        super().__init__()
        c = cfg.ch
        self.conv_in = nn.Conv2d(cfg.in_channels, c, 3, padding=1)
        self.down = nn.ModuleList()
        for i, mult in enumerate(cfg.ch_mult):
            attention = i in cfg.attn_levels
            level = Level(c, cfg.ch * mult, cfg.num_res_blocks, cfg.norm_groups, attention)
            c = cfg.ch * mult
            level.downsample = Downsample(c) if i < len(cfg.ch_mult) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = Middle(c, cfg.norm_groups)
        self.norm_out = group_norm(c, cfg.norm_groups)
        self.conv_out = nn.Conv2d(c, 2 * cfg.latent_channels, 3, padding=1)

    def features(self, x):
        """All but the last convolution: (B, c, h, w). train_ae.py compiles this part."""
        h = self.conv_in(x)
        for level in self.down:
            h = level.downsample(level(h))
        return F.silu(self.norm_out(self.mid(h)))

    def forward(self, x):
        return self.conv_out(self.features(x))                     # (B, 2C, h, w)


class Decoder(nn.Module):
    """Output of post_quant_conv (B, C, h, w) -> images (B, 3, H, W), not clamped."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * mult for mult in cfg.ch_mult]
        deeper = widths[1:] + widths[-1:]                          # [i]: input width of level i
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], cfg.norm_groups)
        self.up = nn.ModuleList()                                  # up[i] mirrors down[i]
        for i, c in enumerate(widths):
            attention = i in cfg.attn_levels
            level = Level(deeper[i], c, cfg.num_res_blocks + 1, cfg.norm_groups, attention)
            level.upsample = Upsample(c) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = group_norm(widths[0], cfg.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], cfg.in_channels, 3, padding=1)

    def features(self, z):
        """All but the last convolution: (B, c, H, W). train_ae.py compiles this part."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level.upsample(level(h))
        return F.silu(self.norm_out(h))

    def forward(self, z):
        return self.conv_out(self.features(z))                     # (B, 3, H, W)


class Posterior:
    """q(z|x), a diagonal Gaussian; mean, logvar (B, C, h, w) float32, logvar in [-30, 20]."""

    def __init__(self, mean, logvar):
        self.mean = mean.float()
        self.logvar = logvar.float().clamp(-30.0, 20.0)

    def sample(self, noise=None):
        """A latent (B, C, h, w), float32. noise: standard normal, shape of mean; drawn if None."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.float()

    def mode(self):
        return self.mean


def init_weights(module):
    """
    Initial weights: every convolution preserves the variance of its input, every residual branch
    starts at zero. PyTorch's default shrinks the signal by sqrt(3) per layer and trains more
    slowly; the paper specifies none.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")   # std = 1 / sqrt(fan_in)
        nn.init.zeros_(module.bias)
    elif isinstance(module, ResnetBlock):                          # apply() visits children first
        nn.init.zeros_(module.conv2.weight)
    elif isinstance(module, AttnBlock):
        nn.init.zeros_(module.proj_out.weight)


class AutoencoderKL(nn.Module):
    """Encoder, posterior, decoder and latent statistics, built from an AEConfig."""

    def __init__(self, config):
        super().__init__()
        d = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * d, 2 * d, 1)
        self.post_quant_conv = nn.Conv2d(d, d, 1)
        self.register_buffer("latent_mean", torch.zeros(d))        # of sampled latents, per channel
        self.register_buffer("latent_std", torch.ones(d))
        self.apply(init_weights)
        with torch.no_grad():
            self.quant_conv.bias[d:] = -6.0                        # logvar: initial std e^-3 = 0.05

    def forward(self, images, noise, pair):
        """
        Fig. 1 in one call: encode, sample, transform image and latent alike (DSM, SE, EQ), decode.
        images   (B, 3, H, W) in [-1, 1]
        noise    (B, C, h, w) standard normal, to sample the posterior
        pair     (images, latents) -> (target, z): reconstruction target and decoder input (Alg. 2:
                 both low-passed by one mask); the identity for methods that only add a loss
        returns  recon = decode(z), target, latents (B, C, h, w) as sampled, the Posterior
        """
        posterior = self.encode(images)
        latents = posterior.sample(noise)                          # (B, C, h, w)
        target, z = pair(images, latents)
        return self.decode(z), target, latents, posterior

    def latent_shape(self, images):
        """Shape (B, C, h, w) of the latents of images (B, 3, H, W)."""
        B, _, H, W = images.shape
        f = self.config.reduction
        return B, self.config.latent_channels, H // f, W // f

    def encode(self, x):
        """Images (B, 3, H, W), H and W multiples of f -> Posterior over (B, C, H/f, W/f)."""
        (H, W), f = x.shape[-2:], self.config.reduction
        if H % f or W % f:
            raise ValueError(f"encode: {H}x{W} is not a multiple of this autoencoder's reduction "
                             f"{f}; crop or resize the images")
        return Posterior(*self.quant_conv(self.encoder(x)).chunk(2, dim=1))

    def decode(self, z):
        """z (B, C, h, w), not normalised -> images (B, 3, f*h, f*w), not clamped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def set_latent_stats(self, mean, std):
        """Set mean and std of the latents: numbers or (C,). ValueError unless finite, std > 0."""
        mean, std = (torch.as_tensor(s, dtype=torch.float32) for s in (mean, std))
        if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
            raise ValueError(f"latent statistics: must be finite, with std > 0; got mean "
                             f"{mean.tolist()}, std {std.tolist()}")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def normalize(self, z):
        """Latents (B, C, h, w) from encode() -> mean 0, variance 1 per channel, for diffusion."""
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, z):
        """Inverse of normalize: latents as decode() expects them."""
        return z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    @property
    def last_layer(self):
        """Weight (3, ch, 3, 3) at which the adaptive GAN weight compares gradient norms."""
        return self.decoder.conv_out.weight

    @property
    def encoder_last_layer(self):
        """The same for losses on the latents: (2C, c, 3, 3)."""
        return self.encoder.conv_out.weight
