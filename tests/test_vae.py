"""The autoencoder: its arithmetic against formulas, its names against released models."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae import CONFIGS, AEConfig, AttnBlock, AutoencoderKL, Downsample, Posterior, Upsample

# every kind of block
SMALL = AEConfig((1, 2, 4), latent_channels=3, ch=32, num_res_blocks=1, attn_levels=(2,))


def small(config=SMALL):
    """A random autoencoder whose norms and biases are not at their trivial initial values."""
    torch.manual_seed(0)
    ae = AutoencoderKL(config).eval()
    for p in ae.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return ae


def meta_shapes(name):
    with torch.device("meta"):
        state = AutoencoderKL(CONFIGS[name]).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


# ---------------------------------------------------------------------------- the network
@pytest.mark.parametrize("name, count", [("f8d4", 83_653_863), ("f16d16", 64_352_723),
                                         ("f16d32", 69_836_067), ("f4d4-tiny", 242_327)])
def test_parameter_counts(name, count):
    """f8d4 and f16d16 are the paper's 83.7M and 64.4M; the latent statistics are not trained."""
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL(CONFIGS[name]).parameters()) == count


@pytest.mark.parametrize("config", [
    SMALL, CONFIGS["f4d4-tiny"],
    AEConfig(ch=32, ch_mult=(1, 1, 1, 2), latent_channels=5, num_res_blocks=1)])
def test_latents_are_f_times_smaller(config):
    """Images (B, 3, H, W) become d x H/f x W/f latents and come back; other sides are refused."""
    ae, f = small(config), config.reduction
    x = torch.rand(2, 3, 3 * f, 5 * f) * 2 - 1
    z = ae.encode(x).mode()
    assert f == 2 ** (len(config.ch_mult) - 1) and z.shape == (2, config.latent_channels, 3, 5)
    assert ae.decode(z).shape == x.shape
    with pytest.raises(ValueError, match=f"{3 * f}x{5 * f + 1}.*reduction {f}"):
        ae.encode(F.pad(x, (0, 1)))


def test_every_parameter_takes_part():
    """A loss on the reconstruction of a sampled latent has a gradient for every parameter."""
    ae = small()
    assert ae.last_layer is ae.decoder.conv_out.weight      # for the adaptive GAN weight
    assert ae.encoder_last_layer is ae.encoder.conv_out.weight
    x = torch.randn(1, 3, 8, 12)
    (ae.decode(ae.encode(x).sample()) - x).square().mean().backward()
    for key, p in ae.named_parameters():                    # softmax does not see a key's constant
        assert p.grad.abs().max() > 0 or key.endswith("k.bias"), key


def test_norms_are_compvis_s():
    """GroupNorms of eps 1e-6 (not PyTorch's 1e-5), in 32 groups for the published widths."""
    with torch.device("meta"):
        modules = AutoencoderKL(CONFIGS["f8d4"]).modules()
    norms = [m for m in modules if "Norm" in type(m).__name__]
    assert {(type(m), m.eps, m.num_groups) for m in norms} == {(nn.GroupNorm, 1e-6, 32)}


def test_attention_is_softmax_over_pixels():
    """Each pixel gets the average of all v, weighted by softmax(q.k / sqrt(C)), row-major order."""
    attn, x = AttnBlock(8, groups=4), torch.randn(2, 8, 3, 5)
    h = attn.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (attn.q, attn.k, attn.v))     # (B, C, HW)
    scores = torch.einsum("bci,bcj->bij", q, k) / 8 ** 0.5
    A = scores.softmax(-1)                                  # row i: whom pixel i listens to
    expected = x + attn.proj_out(torch.einsum("bij,bcj->bci", A, v).reshape(2, 8, 3, 5))
    torch.testing.assert_close(attn(x), expected)


def test_resampling_keeps_the_grid():
    """Down: output (i, j) is centred on (2i+1, 2j+1), zeros right and below. Up: nearest."""
    down, up, x = Downsample(1), Upsample(1), torch.randn(1, 1, 4, 6)
    for module in (down, up):
        nn.init.dirac_(module.conv.weight)                  # passes the centre of each window on
        nn.init.zeros_(module.conv.bias)
    torch.testing.assert_close(down(x), x[..., 1::2, 1::2])
    torch.testing.assert_close(up(x), x.repeat_interleave(2, -2).repeat_interleave(2, -1))


# ---------------------------------------------------------------------------- the posterior
def test_sample_is_mean_plus_scaled_noise():
    """z = mean + exp(logvar / 2) * noise, the noise given or drawn afresh; the mode is the mean."""
    mean, logvar, noise = torch.randn(3, 2, 4, 3, 5).unbind(0)
    q = Posterior(mean, logvar)
    torch.testing.assert_close(q.sample(noise), mean + logvar.exp().sqrt() * noise)
    assert torch.equal(q.mode(), mean) and not torch.equal(q.sample(), q.sample())
    # four standard errors and more
    drawn = Posterior(torch.full((100_000,), 3.0), torch.full((100_000,), 4.0).log()).sample()
    assert abs(drawn.mean() - 3) < 0.03 and abs(drawn.var() - 4) < 0.1


def test_logvar_is_clamped_and_float32():
    """logvar in [-30, 20], all in float32: bf16 or a wild encoder still give finite latents."""
    q = Posterior(torch.zeros(3).bfloat16(), torch.tensor([-1e4, 0.5, 1e4]).bfloat16())
    assert q.logvar.tolist() == [-30, 0.5, 20]
    assert q.mean.dtype == q.sample().dtype == torch.float32
    assert q.sample().isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert small().encode(torch.zeros(1, 3, 4, 8)).sample().dtype == torch.float32


def test_normalize_whitens_each_channel_and_back():
    """With the latents' own statistics: mean 0 and std 1 in every channel; denormalize inverts."""
    ae = small()
    scale, shift = torch.tensor([0.5, 2.0, 30.0]), torch.tensor([1.0, -2.0, 3.0])
    z = torch.randn(8, 3, 4, 5) * scale[:, None, None] + shift[:, None, None]
    assert torch.equal(ae.normalize(z), z)                  # until statistics are set
    ae.set_latent_stats(z.mean((0, 2, 3)), z.std((0, 2, 3)))
    n = ae.normalize(z)
    torch.testing.assert_close(n.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(n.std((0, 2, 3)), torch.ones(3))
    for mean, std in ((0.0, 0.0), (float("nan"), 1.0), ([0.0] * 3, [1.0, -1.0, 1.0])):
        with pytest.raises(ValueError, match="latent statistics"):
            ae.set_latent_stats(mean, std)
    torch.testing.assert_close(ae.denormalize(n), z)        # the buffers stayed


# ---------------------------------------------------------------------------- names and shapes
def test_compvis_names():
    """f8d4 is Stable Diffusion's first stage: 248 tensors (here some), and our two statistics."""
    shapes, some = meta_shapes("f8d4"), {
        "encoder.conv_in.weight": (128, 3, 3, 3), "encoder.conv_out.weight": (8, 512, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "encoder.norm_out.weight": (512,),
        "decoder.mid.block_2.norm2.weight": (512,), "decoder.conv_out.weight": (3, 128, 3, 3),
        "decoder.up.1.block.0.conv1.weight": (256, 512, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1), "post_quant_conv.weight": (4, 4, 1, 1)}
    assert {key: shapes.get(key) for key in some} == some and len(shapes) == 250
    none = {"decoder.up.0.upsample.conv.weight", "encoder.down.3.downsample.conv.weight"}
    assert not none & shapes.keys()


def test_vavae_attends_at_the_last_level():
    """VA-VAE's f16d32 has attention after the blocks of level 4 and in the middle, nowhere else."""
    found = {key.removesuffix(".q.weight") for key in meta_shapes("f16d32") if ".q.weight" in key}
    assert found == {
        "encoder.down.4.attn.0", "encoder.down.4.attn.1", "encoder.mid.attn_1",
        "decoder.up.4.attn.0", "decoder.up.4.attn.1", "decoder.up.4.attn.2", "decoder.mid.attn_1"}
