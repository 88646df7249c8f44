"""The autoencoder: its arithmetic against formulas, its names against released models, every way a file is read or refused."""
import dataclasses
import json
import os
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from vae import CONFIGS, AEConfig, AttnBlock, AutoencoderKL, Downsample, Posterior, Upsample, diffusers_name, load_autoencoder

SMALL = AEConfig(ch=32, ch_mult=(1, 2, 4), latent_channels=3, num_res_blocks=1, attn_levels=(2,))   # every kind of block


def small(config=SMALL):
    """A random autoencoder whose norms and biases are not at their trivial initial values."""
    torch.manual_seed(0)
    ae = AutoencoderKL(config).eval()
    for p in ae.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return ae


def meta_shapes(name):
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in AutoencoderKL(CONFIGS[name]).state_dict().items()}


def weights(ae):
    """What a released file holds: no latent statistics, which are this code's own."""
    return {key: value.clone() for key, value in ae.state_dict().items() if not key.startswith("latent_")}


def to_diffusers(ae, old=False):
    """Our weights under diffusers' names, attention as linear layers; old = named as in Stable Diffusion's first releases."""
    state = {}
    for key, value in weights(ae).items():
        name = diffusers_name(key, len(ae.config.ch_mult))
        if ".attentions." in name and old:
            for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(f".{new}.", f".{before}.")
        if ".attentions." in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        state[name] = value.contiguous()
    return state


def assert_same(a, b, config=SMALL):
    """Both autoencoders have this architecture and compute the same, on an image that is not square."""
    assert a.config == b.config == config
    x, z = torch.randn(2, 3, 8, 12), torch.randn(2, config.latent_channels, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(a.encode(x).mean, b.encode(x).mean)
        torch.testing.assert_close(a.encode(x).logvar, b.encode(x).logvar)
        torch.testing.assert_close(a.decode(z), b.decode(z))


# The network.
@pytest.mark.parametrize("name, count", [("f8d4", 83_653_863), ("f16d16", 64_352_723), ("f16d32", 69_836_067),
                                         ("f4d4-tiny", 242_327)])
def test_parameter_counts(name, count):
    """f8d4 and f16d16 are the paper's 83.7M and 64.4M, to the parameter; the latent statistics are not trained."""
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL(CONFIGS[name]).parameters()) == count


@pytest.mark.parametrize("config", [SMALL, CONFIGS["f4d4-tiny"],
                                    AEConfig(ch=32, ch_mult=(1, 1, 1, 2), latent_channels=5, num_res_blocks=1)])
def test_latents_are_f_times_smaller(config):
    """Images (B, 3, H, W) become d x H/f x W/f latents and come back to their own size, H != W."""
    ae, f = small(config), config.reduction
    x = torch.rand(2, 3, 3 * f, 5 * f) * 2 - 1
    z = ae.encode(x).mode()
    assert f == 2 ** (len(config.ch_mult) - 1) and z.shape == (2, config.latent_channels, 3, 5)
    assert ae.decode(z).shape == x.shape


def test_f_of_the_named_configurations():
    """The name of a configuration says its reduction and its latent channels."""
    for name, config in CONFIGS.items():
        assert name.startswith(f"f{config.reduction}d{config.latent_channels}")


@pytest.mark.parametrize("H, W", [(8, 10), (10, 8), (9, 9)])
def test_sides_that_do_not_divide_are_refused(H, W):
    """A side that the reduction does not divide is named, not silently rounded."""
    with pytest.raises(ValueError, match=f"{H}x{W}.*reduction 4"):
        small().encode(torch.zeros(1, 3, H, W))


def test_every_parameter_takes_part():
    """A loss on the reconstruction of a sampled latent sends a gradient to every parameter, the quant convolutions included."""
    ae = small()
    x = torch.randn(1, 3, 8, 12)
    (ae.decode(ae.encode(x).sample()) - x).square().mean().backward()
    for key, p in ae.named_parameters():
        if not key.endswith("k.bias"):             # softmax does not see a constant added to every key's score
            assert p.grad.abs().max() > 0, key


def test_last_layers():
    """The adaptive GAN weight looks at the decoder's last convolution; the encoder's makes mean and logvar."""
    ae = small()
    assert ae.last_layer is dict(ae.named_parameters())["decoder.conv_out.weight"] and ae.last_layer.shape == (3, 32, 3, 3)
    assert ae.encoder_last_layer is dict(ae.named_parameters())["encoder.conv_out.weight"] and ae.encoder_last_layer.shape[0] == 6


def test_norms_are_compvis_s():
    """Every norm is a GroupNorm of eps 1e-6 (not PyTorch's 1e-5), in 32 groups for the published widths."""
    with torch.device("meta"):
        norms = [m for m in AutoencoderKL(CONFIGS["f8d4"]).modules() if "Norm" in type(m).__name__]
    assert norms and all(type(m) is nn.GroupNorm and m.eps == 1e-6 and m.num_groups == 32 for m in norms)


def test_attention_is_softmax_over_pixels():
    """Each output pixel is the average of all v, weighted by softmax(q.k / sqrt(C)), one head, pixels in row-major order."""
    torch.manual_seed(0)
    attn, x = AttnBlock(8, groups=4), torch.randn(2, 8, 3, 5)
    h = attn.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (attn.q, attn.k, attn.v))                   # (B, C, HW)
    A = (torch.einsum("bci,bcj->bij", q, k) / 8 ** 0.5).softmax(-1)                       # row i: whom pixel i listens to
    expected = x + attn.proj_out(torch.einsum("bij,bcj->bci", A, v).reshape(2, 8, 3, 5))
    torch.testing.assert_close(attn(x), expected)


def test_downsampling_pads_right_and_below():
    """Output (i, j) is centred on input (2i+1, 2j+1): zeros are added right and below, never left and above."""
    down, x = Downsample(1), torch.randn(1, 1, 4, 6)
    nn.init.dirac_(down.conv.weight), nn.init.zeros_(down.conv.bias)                       # passes the centre of each window on
    torch.testing.assert_close(down(x), x[..., 1::2, 1::2])


def test_upsampling_repeats_pixels():
    """Upsampling is nearest-neighbour, then a convolution."""
    up, x = Upsample(1), torch.randn(1, 1, 3, 5)
    nn.init.dirac_(up.conv.weight), nn.init.zeros_(up.conv.bias)
    torch.testing.assert_close(up(x), x.repeat_interleave(2, -2).repeat_interleave(2, -1))


# The posterior and the latent statistics.
def test_sample_is_mean_plus_scaled_noise():
    """z = mean + exp(logvar / 2) * noise, the noise given or drawn afresh; the mode is the mean."""
    torch.manual_seed(0)
    mean, logvar, noise = torch.randn(3, 2, 4, 3, 5).unbind(0)
    q = Posterior(mean, logvar)
    torch.testing.assert_close(q.sample(noise), mean + logvar.exp().sqrt() * noise)
    assert torch.equal(q.mode(), mean) and not torch.equal(q.sample(), q.sample())
    drawn = Posterior(torch.full((100_000,), 3.0), torch.full((100_000,), 4.0).log()).sample()
    assert abs(drawn.mean() - 3) < 0.03 and abs(drawn.var() - 4) < 0.1                     # four standard errors and more


def test_sample_refuses_noise_of_another_shape():
    """Noise that would broadcast would be shared between latents: it is refused."""
    with pytest.raises(ValueError, match="noise"):
        Posterior(torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 3, 5)).sample(torch.zeros(1, 4, 3, 5))


def test_logvar_is_clamped_and_float32():
    """logvar stays within [-30, 20] and everything is float32, so that bf16 or a wild encoder gives finite latents."""
    q = Posterior(torch.zeros(3).bfloat16(), torch.tensor([-1e4, 0.5, 1e4]).bfloat16())
    assert q.logvar.tolist() == [-30, 0.5, 20] and q.mean.dtype == q.sample().dtype == torch.float32
    assert q.sample().isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert small().encode(torch.zeros(1, 3, 4, 8)).sample().dtype == torch.float32


def test_quant_conv_makes_the_moments():
    """The first d channels after quant_conv are the mean, the last d the logvar."""
    ae = small()
    nn.init.zeros_(ae.quant_conv.weight)
    ae.quant_conv.bias.data = torch.arange(6.0)
    q = ae.encode(torch.randn(1, 3, 4, 8))
    assert q.mean[0, :, 0, 1].tolist() == [0, 1, 2] and q.logvar[0, :, 0, 1].tolist() == [3, 4, 5]


def test_normalize_whitens_each_channel_and_back():
    """With the latents' own statistics, normalised latents have mean 0 and std 1 in every channel; denormalize inverts."""
    ae = small()
    z = torch.randn(8, 3, 4, 5) * torch.tensor([0.5, 2.0, 30.0])[:, None, None] + torch.tensor([1.0, -2.0, 3.0])[:, None, None]
    assert torch.equal(ae.normalize(z), z)                                                # until statistics are set
    ae.set_latent_stats(z.mean((0, 2, 3)), z.std((0, 2, 3)))
    n = ae.normalize(z)
    torch.testing.assert_close(n.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(n.std((0, 2, 3)), torch.ones(3))
    torch.testing.assert_close(ae.denormalize(n), z)
    assert {"latent_mean", "latent_std"} <= ae.state_dict().keys()


@pytest.mark.parametrize("mean, std", [(0.0, 0.0), (0.0, [1.0, 1.0]), (float("nan"), 1.0), ([0.0] * 3, [1.0, -1.0, 1.0])])
def test_impossible_statistics_are_refused(mean, std):
    """A std of zero, a NaN or the wrong number of channels never reaches the buffers."""
    ae = small()
    with pytest.raises(ValueError, match="latent statistics"):
        ae.set_latent_stats(mean, std)
    assert torch.equal(ae.latent_mean, torch.zeros(3)) and torch.equal(ae.latent_std, torch.ones(3))


# Names and shapes of released models.
COMPVIS_F8D4 = {                                   # Stable Diffusion's first stage
    "encoder.conv_in.weight": (128, 3, 3, 3), "encoder.down.0.block.0.norm1.weight": (128,),
    "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3), "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.2.block.0.conv1.weight": (512, 256, 3, 3), "encoder.down.3.block.1.conv2.bias": (512,),
    "encoder.mid.block_1.conv1.weight": (512, 512, 3, 3), "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.mid.attn_1.norm.bias": (512,), "encoder.norm_out.weight": (512,), "encoder.conv_out.weight": (8, 512, 3, 3),
    "decoder.conv_in.weight": (512, 4, 3, 3), "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "decoder.mid.block_2.norm2.weight": (512,), "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3), "decoder.up.1.block.0.conv1.weight": (256, 512, 3, 3),
    "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3), "decoder.up.3.block.0.conv1.weight": (512, 512, 3, 3),
    "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3), "decoder.norm_out.weight": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3), "decoder.conv_out.bias": (3,), "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.weight": (4, 4, 1, 1)}
DIFFUSERS_F8D4 = {                                 # the same model as AutoencoderKL of diffusers
    "encoder.conv_in.weight": (128, 3, 3, 3), "encoder.down_blocks.0.resnets.0.norm1.weight": (128,),
    "encoder.down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
    "encoder.down_blocks.2.resnets.0.conv1.weight": (512, 256, 3, 3), "encoder.down_blocks.3.resnets.1.conv2.bias": (512,),
    "encoder.mid_block.resnets.0.conv1.weight": (512, 512, 3, 3), "encoder.mid_block.attentions.0.to_q.bias": (512,),
    "encoder.mid_block.attentions.0.group_norm.weight": (512,), "encoder.conv_norm_out.weight": (512,),
    "encoder.conv_out.weight": (8, 512, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.mid_block.attentions.0.to_out.0.bias": (512,), "decoder.mid_block.attentions.0.to_k.bias": (512,),
    "decoder.mid_block.attentions.0.to_v.bias": (512,), "decoder.mid_block.resnets.1.norm2.weight": (512,),
    "decoder.up_blocks.0.resnets.0.conv1.weight": (512, 512, 3, 3),
    "decoder.up_blocks.0.upsamplers.0.conv.weight": (512, 512, 3, 3),
    "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (256, 512, 1, 1),
    "decoder.up_blocks.2.upsamplers.0.conv.weight": (256, 256, 3, 3),
    "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
    "decoder.up_blocks.3.resnets.2.conv2.weight": (128, 128, 3, 3), "decoder.conv_norm_out.bias": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3), "quant_conv.weight": (8, 8, 1, 1), "post_quant_conv.bias": (4,)}


def test_compvis_names():
    """f8d4's state dict is that of Stable Diffusion's first stage: 248 tensors (here some of them), and our two statistics."""
    shapes = meta_shapes("f8d4")
    assert {key: shapes.get(key) for key in COMPVIS_F8D4} == COMPVIS_F8D4
    assert len(shapes) == 250
    assert not {"decoder.up.0.upsample.conv.weight", "encoder.down.3.downsample.conv.weight"} & shapes.keys()


def test_diffusers_names():
    """Translated, they are those of diffusers' AutoencoderKL, whose up_blocks count from the latent: 248 different names."""
    shapes = {diffusers_name(key, 4): shape for key, shape in meta_shapes("f8d4").items()}
    assert {key: shapes.get(key) for key in DIFFUSERS_F8D4} == DIFFUSERS_F8D4 and len(shapes) == 250


@pytest.mark.parametrize("ours, theirs", [
    ("encoder.mid.attn_1.q.weight", "encoder.mid_block.attentions.0.to_q.weight"),
    ("encoder.mid.attn_1.k.weight", "encoder.mid_block.attentions.0.to_k.weight"),
    ("encoder.mid.attn_1.v.weight", "encoder.mid_block.attentions.0.to_v.weight"),
    ("encoder.mid.attn_1.proj_out.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
    ("decoder.mid.block_1.norm1.bias", "decoder.mid_block.resnets.0.norm1.bias"),
    ("decoder.mid.block_2.norm2.bias", "decoder.mid_block.resnets.1.norm2.bias"),
    ("encoder.down.2.block.1.conv2.weight", "encoder.down_blocks.2.resnets.1.conv2.weight"),
    ("encoder.down.3.attn.1.norm.weight", "encoder.down_blocks.3.attentions.1.group_norm.weight"),
    ("decoder.up.2.block.1.conv1.weight", "decoder.up_blocks.1.resnets.1.conv1.weight"),
    ("decoder.up.3.attn.2.q.bias", "decoder.up_blocks.0.attentions.2.to_q.bias")])
def test_which_tensor_is_which(ours, theirs):
    """Where shapes cannot tell two tensors apart, the pairs are written down: four levels, as in f8d4."""
    assert diffusers_name(ours, 4) == theirs


def test_vavae_attends_at_the_last_level():
    """VA-VAE's f16d32 has attention after the blocks of level 4: two in the encoder, three in the decoder, and nowhere else."""
    found = {key.removesuffix(".q.weight") for key in meta_shapes("f16d32") if key.endswith(".q.weight")}
    assert found == {"encoder.down.4.attn.0", "encoder.down.4.attn.1", "decoder.up.4.attn.0", "decoder.up.4.attn.1",
                     "decoder.up.4.attn.2", "encoder.mid.attn_1", "decoder.mid.attn_1"}


def test_config_survives_a_checkpoint():
    """asdict and back, through torch.save or through JSON (which turns tuples into lists), is the same configuration."""
    for config in [SMALL, *CONFIGS.values()]:
        assert AEConfig(**dataclasses.asdict(config)) == config == AEConfig(**json.loads(json.dumps(dataclasses.asdict(config))))


# Reading files.
def save_ours(ae, path, **changes):
    torch.save({"stage": "ae", "ae_config": dataclasses.asdict(ae.config), "model": ae.state_dict(), "step": 7} | changes, path)
    return path


@pytest.mark.parametrize("config", [SMALL, CONFIGS["f4d4-tiny"]])
def test_our_checkpoint(tmp_path, config):
    """ckpt.pt -> the same autoencoder with its latent statistics, in eval mode, without a random number being drawn."""
    ae = small(config)
    ae.set_latent_stats(0.25, 3.0)
    path = save_ours(ae, tmp_path / "ckpt.pt")
    state = torch.get_rng_state()
    back = load_autoencoder(str(path))
    assert torch.equal(state, torch.get_rng_state()) and not back.training
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in ae.state_dict().items())
    assert_same(ae, back, config)


def test_our_other_checkpoints_are_refused(tmp_path):
    """A diffusion checkpoint, an unknown configuration and a state dict that lost its configuration are named as such."""
    ae, path = small(), tmp_path / "ckpt.pt"
    save_ours(ae, path, stage="diffusion")
    with pytest.raises(ValueError, match="ckpt.pt: a checkpoint of stage 'diffusion'"):
        load_autoencoder(path)
    save_ours(ae, path, ae_config={"depth": 3})
    with pytest.raises(ValueError, match="ckpt.pt: .*depth"):
        load_autoencoder(path)
    torch.save(ae.state_dict(), path)
    with pytest.raises(ValueError, match="ckpt.pt: .*without its ae_config"):
        load_autoencoder(path)


BAGGAGE = {key: torch.zeros(5) for key in ("loss.logvar", "loss.discriminator.main.0.weight", "discriminator.bias",
                                           "foundation_model.cls_token", "linear_proj.weight", "model_ema.decay")}
COMPVIS_FILES = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "global_step": 9},
    "model": lambda w: {"model": w, "optimizer": {}},
    "extra keys": lambda w: {"state_dict": w | BAGGAGE},
    "whole LDM": lambda w: {"state_dict": {"first_stage_model." + k: v for k, v in (w | BAGGAGE).items()} | {
        "model.diffusion_model.out.0.weight": torch.zeros(3), "cond_stage_model.x": torch.zeros(1), "betas": torch.zeros(5)}},
    "other precision": lambda w: {k: v.double() for k, v in w.items()},
}


@pytest.mark.parametrize("form", COMPVIS_FILES)
def test_compvis_files(tmp_path, form):
    """However wrapped and whatever came along, the architecture is read off the tensors; such files hold no latent statistics."""
    ae = small()
    torch.save(COMPVIS_FILES[form](weights(ae)), tmp_path / "model.ckpt")
    back = load_autoencoder(tmp_path / "model.ckpt")
    assert_same(ae, back)
    assert back.last_layer.dtype == torch.float32 and torch.equal(back.latent_std, torch.ones(3))


@pytest.mark.parametrize("name", ["f8d4", "f16d16", "f16d32"])
def test_architecture_is_inferred(tmp_path, name):
    """Widths, depth, latent channels and attention levels of the published models follow from names and shapes alone."""
    config = dataclasses.replace(CONFIGS[name], ch=32)                                    # same outline, fewer weights
    torch.save(weights(AutoencoderKL(config)), tmp_path / "model.pt")
    assert load_autoencoder(tmp_path / "model.pt").config == config


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("old", [False, True])
def test_diffusers_folder(tmp_path, file, old):
    """Ours -> diffusers' names -> a folder on disk -> load: the same outputs, and the scale of the latents from config.json."""
    ae = small()
    if file.endswith(".bin"):
        torch.save(to_diffusers(ae, old), tmp_path / file)
    else:
        pytest.importorskip("safetensors.torch").save_file(to_diffusers(ae, old), tmp_path / file)
    settings = {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    back, z = load_autoencoder(tmp_path), torch.randn(1, 3, 2, 4)
    assert_same(ae, back)
    torch.testing.assert_close(back.normalize(z), (z - 0.1159) * 0.3611)                  # diffusers' own formula
    assert_same(ae, load_autoencoder(tmp_path / file))                                    # the file alone: same weights, no scale
    assert torch.equal(load_autoencoder(tmp_path / file).latent_std, torch.ones(3))


def test_diffusers_per_channel_statistics_and_groups(tmp_path):
    """config.json may give latents_mean and latents_std per channel, and the number of groups, which no tensor shows."""
    ae = small(dataclasses.replace(SMALL, norm_groups=8))
    torch.save(to_diffusers(ae), tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 8, "scaling_factor": 0.5, "shift_factor": None,
                                                      "latents_mean": [1.0, 2.0, 3.0], "latents_std": [4.0, 5.0, 6.0]}))
    back = load_autoencoder(tmp_path)
    assert_same(ae, back, ae.config)
    assert back.latent_mean.tolist() == [1, 2, 3] and back.latent_std.tolist() == [8, 10, 12]


def test_without_quant_convolutions(tmp_path):
    """Models without quant convolutions (SD3, FLUX) compute what ours does with identities in their place."""
    ae = small()
    for conv in (ae.quant_conv, ae.post_quant_conv):
        nn.init.dirac_(conv.weight), nn.init.zeros_(conv.bias)
    for name, state in (("compvis.pt", weights(ae)), ("diffusers.pt", to_diffusers(ae))):
        torch.save({key: value for key, value in state.items() if "quant_conv" not in key}, tmp_path / name)
        assert_same(ae, load_autoencoder(tmp_path / name))


# Refusals: one line that names the culprit.
def refused(path, *words, error=ValueError):
    with pytest.raises(error) as info:
        load_autoencoder(path)
    message = str(info.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("translate", [weights, to_diffusers])
def test_wrong_tensors_are_named(tmp_path, translate):
    """A tensor that is missing, has another shape or is of no known use stops the loading, by the name it has in the file."""
    state, path = translate(small()), tmp_path / "model.pt"
    for key in ("post_quant_conv.bias", [k for k in state if "mid" in k and k.endswith("conv2.weight")][0], list(state)[-9]):
        torch.save({k: v for k, v in state.items() if k != key}, path)
        refused(path, key, "missing")
        torch.save(state | {key: torch.zeros(7, 5)}, path)
        refused(path, key, "(7, 5)")
    torch.save(state | {"quantize.embedding.weight": torch.zeros(9, 3)}, path)
    refused(path, "quantize.embedding.weight")


def test_files_that_are_no_checkpoint(tmp_path):
    """Missing, empty, cut, text, another object, another model, a bare folder: each says which file and what it is."""
    path = tmp_path / "model.pt"
    refused(path, "no such file", error=FileNotFoundError)
    refused(tmp_path, "diffusion_pytorch_model", error=FileNotFoundError)
    path.write_bytes(b"")
    refused(path, "cannot be read")
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    refused(path, "cannot be read")
    torch.save(weights(small()), path)
    for part in (0.5, 0.999):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(path.read_bytes()[:int(path.stat().st_size * part)])
        refused(cut, "cannot be read")
    for thing, word in ([torch.zeros(2)], "list"), (torch.zeros(2), "Tensor"), ({"fc.weight": torch.zeros(2)}, "encoder.conv_in"):
        torch.save(thing, path)
        refused(path, word)


def test_diffusers_folder_of_another_kind(tmp_path):
    """A broken config.json and another class of autoencoder are refused before any tensor is looked at."""
    torch.save(to_diffusers(small()), tmp_path / "diffusion_pytorch_model.bin")
    for text, words in ('{"_class_name": "AutoencoderTiny"}', ["AutoencoderTiny"]), ("{", ["config.json", "cannot be read"]):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, *words)


def test_safetensors_is_optional(tmp_path, monkeypatch):
    """Without the safetensors package only .safetensors files fail, and the message says what to install."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    refused(path, "pip install safetensors")


class Callback:
    """Plays a Lightning callback: its code must not run when a file that holds one is read."""

    def __init__(self):
        self.best = 1.0

    def __setstate__(self, state):
        raise AssertionError("foreign code was run")


def test_lightning_checkpoint_runs_no_foreign_code(tmp_path, monkeypatch):
    """A .ckpt with pickled Lightning objects (as keys, as values with state) loads without Lightning and without importing it."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (Callback,), {"__module__": name})
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, part, module)
        ae = small()
        torch.save({"state_dict": weights(ae), "callbacks": {module.ModelCheckpoint: {"best": np.float64(1)}},
                    "hyper_parameters": {"callback": module.ModelCheckpoint(), "kind": dict}}, tmp_path / "last.ckpt")
    before = set(sys.modules)
    assert_same(ae, load_autoencoder(tmp_path / "last.ckpt"))
    assert not any(m.startswith("pytorch_lightning") for m in set(sys.modules) - before)


class Malice:
    """Pickles as a call of os.mkdir through a function that torch has never heard of."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return make_folder, (self.target,)


def make_folder(path):
    os.mkdir(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_any_other_object_is_refused_by_name(tmp_path, zipped):
    """A pickle that would call a function is refused by its name, in today's and in the old file format; nothing runs."""
    path, target = tmp_path / "model.ckpt", tmp_path / "made"
    torch.save({"state_dict": weights(small()), "x": Malice(str(target))}, path, _use_new_zipfile_serialization=zipped)
    refused(path, f"{__name__}.make_folder")
    assert not target.exists()
