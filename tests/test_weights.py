"""
weights.py: released autoencoders and transformers, and our own, are read as what they are, whatever
the layout and the wrapping; every other file is refused in one line, and no code in it runs.
"""
import argparse
import dataclasses
import json
import os
import sys
import types

import numpy as np
import pytest
import torch
from test_dit import TINY, batch, tiny
from test_vae import SMALL, meta_shapes, small
from torch import nn

from dit import Interpolant, SiT, UViT
from vae import CONFIGS, AutoencoderKL
from weights import diffusers_name, load_autoencoder, load_transformer


# ---------------------------------------------------------------------------- names
def to_compvis(ae):
    """What a released file holds: no latent statistics, which are this code's own."""
    return {key: value.clone() for key, value in ae.state_dict().items()
            if not key.startswith("latent_")}


def to_diffusers(ae, old=False):
    """Under diffusers' names, attention as linear layers; old = as in Stable Diffusion's first."""
    before = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in to_compvis(ae).items():
        name = diffusers_name(key, len(ae.config.ch_mult))
        if ".attentions." in name and old:
            for new in before:
                name = name.replace(f".{new}.", f".{before[new]}.")
        if ".attentions." in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        state[name] = value.contiguous()
    return state


DIFFUSERS_F8D4 = {  # Stable Diffusion's first stage as AutoencoderKL of diffusers
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down_blocks.0.resnets.0.norm1.weight": (128,),
    "encoder.down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
    "encoder.down_blocks.2.resnets.0.conv1.weight": (512, 256, 3, 3),
    "encoder.down_blocks.3.resnets.1.conv2.bias": (512,),
    "encoder.mid_block.resnets.0.conv1.weight": (512, 512, 3, 3),
    "encoder.mid_block.attentions.0.to_q.bias": (512,),
    "encoder.mid_block.attentions.0.group_norm.weight": (512,),
    "encoder.conv_norm_out.weight": (512,),
    "encoder.conv_out.weight": (8, 512, 3, 3),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.mid_block.attentions.0.to_out.0.bias": (512,),
    "decoder.mid_block.attentions.0.to_k.bias": (512,),
    "decoder.mid_block.attentions.0.to_v.bias": (512,),
    "decoder.mid_block.resnets.1.norm2.weight": (512,),
    "decoder.up_blocks.0.resnets.0.conv1.weight": (512, 512, 3, 3),
    "decoder.up_blocks.0.upsamplers.0.conv.weight": (512, 512, 3, 3),
    "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (256, 512, 1, 1),
    "decoder.up_blocks.2.upsamplers.0.conv.weight": (256, 256, 3, 3),
    "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
    "decoder.up_blocks.3.resnets.2.conv2.weight": (128, 128, 3, 3),
    "decoder.conv_norm_out.bias": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.bias": (4,)}


def test_diffusers_names():
    """Translated, the 248 names stay different and are those of diffusers, two statistics aside."""
    shapes = {diffusers_name(key, 4): shape for key, shape in meta_shapes("f8d4").items()}
    assert {key: shapes.get(key) for key in DIFFUSERS_F8D4} == DIFFUSERS_F8D4
    assert len(shapes) == 250


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
    """Where shapes cannot tell two tensors apart: the pairs written down for f8d4's four levels."""
    assert diffusers_name(ours, 4) == theirs


# ---------------------------------------------------------------------------- autoencoders
def assert_same(a, b, config=SMALL):
    """Both have this architecture and compute the same, on an image that is not square."""
    assert a.config == b.config == config
    x, z = torch.randn(2, 3, 8, 12), torch.randn(2, config.latent_channels, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(a.encode(x).mean, b.encode(x).mean)
        torch.testing.assert_close(a.encode(x).logvar, b.encode(x).logvar)
        torch.testing.assert_close(a.decode(z), b.decode(z))


def save_ours(ae, path, **changes):
    state = {"stage": "ae", "ae_config": dataclasses.asdict(ae.config), "model": ae.state_dict(),
             "step": 7}
    torch.save(state | changes, path)
    return path


@pytest.mark.parametrize("config", [SMALL, CONFIGS["f4d4-tiny"]])
def test_our_checkpoint(tmp_path, config):
    """ckpt.pt -> the same autoencoder and statistics, in eval mode, no random number drawn."""
    ae = small(config)
    ae.set_latent_stats(0.25, 3.0)
    path = save_ours(ae, tmp_path / "ckpt.pt")
    state = torch.get_rng_state()
    back = load_autoencoder(str(path))
    assert torch.equal(state, torch.get_rng_state()) and not back.training
    found = back.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in ae.state_dict().items())
    assert_same(ae, back, config)


def test_our_other_checkpoints_are_refused(tmp_path):
    """A diffusion checkpoint, an unknown configuration, a state dict without one: named as such."""
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


EXTRA = {key: torch.zeros(5) for key in (
    "loss.logvar", "loss.discriminator.main.0.weight", "discriminator.bias",
    "foundation_model.cls_token", "linear_proj.weight", "model_ema.decay")}


def whole_ldm(w):
    state = {"first_stage_model." + key: value for key, value in (w | EXTRA).items()}
    return {"state_dict": state | {"model.diffusion_model.out.0.weight": torch.zeros(3),
                                   "cond_stage_model.x": torch.zeros(1), "betas": torch.zeros(5)}}


COMPVIS_FILES = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "global_step": 9},
    "model": lambda w: {"model": w, "optimizer": {}},
    "extra keys": lambda w: {"state_dict": w | EXTRA},
    "whole LDM": whole_ldm,
    "other precision": lambda w: {k: v.double() for k, v in w.items()},
}


@pytest.mark.parametrize("form", COMPVIS_FILES)
def test_compvis_files(tmp_path, form):
    """However wrapped, whatever came along: the architecture is read off the tensors, std is 1."""
    ae = small()
    torch.save(COMPVIS_FILES[form](to_compvis(ae)), tmp_path / "model.ckpt")
    back = load_autoencoder(tmp_path / "model.ckpt")
    assert_same(ae, back)
    assert back.last_layer.dtype == torch.float32 and torch.equal(back.latent_std, torch.ones(3))


@pytest.mark.parametrize("name", ["f8d4", "f16d16", "f16d32"])
def test_architecture_is_inferred(tmp_path, name):
    """Widths, depth, channels, attention levels of published models follow from names, shapes."""
    config = dataclasses.replace(CONFIGS[name], ch=32)      # same outline, fewer weights
    torch.save(to_compvis(AutoencoderKL(config)), tmp_path / "model.pt")
    assert load_autoencoder(tmp_path / "model.pt").config == config


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin",
                                  "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("old", [False, True])
def test_diffusers_folder(tmp_path, file, old):
    """A folder under diffusers' names -> the same outputs, the latents' scale from config.json."""
    ae = small()
    if file.endswith(".bin"):
        torch.save(to_diffusers(ae, old), tmp_path / file)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(to_diffusers(ae, old), tmp_path / file)
    settings = {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    back, z = load_autoencoder(tmp_path), torch.randn(1, 3, 2, 4)
    assert_same(ae, back)
    # diffusers' own formula
    torch.testing.assert_close(back.normalize(z), (z - 0.1159) * 0.3611)
    alone = load_autoencoder(tmp_path / file)               # the same weights, no scale
    assert_same(ae, alone)
    assert torch.equal(alone.latent_std, torch.ones(3))


def test_diffusers_per_channel_statistics_and_groups(tmp_path):
    """config.json may give statistics per channel, and the groups, which no tensor shows."""
    ae = small(dataclasses.replace(SMALL, norm_groups=8))
    torch.save(to_diffusers(ae), tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({
        "norm_num_groups": 8, "scaling_factor": 0.5, "shift_factor": None,
        "latents_mean": [1.0, 2.0, 3.0], "latents_std": [4.0, 5.0, 6.0]}))
    back = load_autoencoder(tmp_path)
    assert_same(ae, back, ae.config)
    assert back.latent_mean.tolist() == [1, 2, 3] and back.latent_std.tolist() == [8, 10, 12]


def test_without_quant_convolutions(tmp_path):
    """Without quant convolutions (SD3, FLUX): what ours computes with identities in their place."""
    ae = small()
    for conv in (ae.quant_conv, ae.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    for name, state in (("compvis.pt", to_compvis(ae)), ("diffusers.pt", to_diffusers(ae))):
        state = {key: value for key, value in state.items() if "quant_conv" not in key}
        torch.save(state, tmp_path / name)
        assert_same(ae, load_autoencoder(tmp_path / name))


# ---------------------------------------------------------------------------- refusals
def refused(path, *words, error=ValueError):
    """One line that names the file and the culprit."""
    with pytest.raises(error) as info:
        load_autoencoder(path)
    message = str(info.value)
    assert str(path) in message and "\n" not in message, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("translate", [to_compvis, to_diffusers])
def test_wrong_tensors_are_named(tmp_path, translate):
    """A tensor missing, of another shape or of no known use is named as it is in the file."""
    state, path = translate(small()), tmp_path / "model.pt"
    middle = [key for key in state if "mid" in key and key.endswith("conv2.weight")]
    for key in ("post_quant_conv.bias", middle[0], list(state)[-9]):
        torch.save({k: v for k, v in state.items() if k != key}, path)
        refused(path, key, "missing")
        torch.save(state | {key: torch.zeros(7, 5)}, path)
        refused(path, key, "(7, 5)")
    torch.save(state | {"quantize.embedding.weight": torch.zeros(9, 3)}, path)
    refused(path, "quantize.embedding.weight")


def test_files_that_are_no_checkpoint(tmp_path):
    """Missing, empty, cut, text, another object or model, a bare folder: which file, and what."""
    path = tmp_path / "model.pt"
    refused(path, "no such file", error=FileNotFoundError)
    refused(tmp_path, "diffusion_pytorch_model", error=FileNotFoundError)
    path.write_bytes(b"")
    refused(path, "cannot be read")
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    refused(path, "cannot be read")
    torch.save(to_compvis(small()), path)
    for part in (0.5, 0.999):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(path.read_bytes()[:int(path.stat().st_size * part)])
        refused(cut, "cannot be read")
    for thing, word in [([torch.zeros(2)], "list"), (torch.zeros(2), "Tensor"),
                        ({"fc.weight": torch.zeros(2)}, "encoder.conv_in")]:
        torch.save(thing, path)
        refused(path, word)


def test_diffusers_folder_of_another_kind(tmp_path):
    """A broken config.json and another class are refused before any tensor is looked at."""
    torch.save(to_diffusers(small()), tmp_path / "diffusion_pytorch_model.bin")
    for text, words in [('{"_class_name": "AutoencoderTiny"}', ["AutoencoderTiny"]),
                        ("{", ["config.json", "cannot be read"])]:
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, *words)


def test_safetensors_is_optional(tmp_path, monkeypatch):
    """Without the package only .safetensors files fail, and the message says what to install."""
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
    """A .ckpt with Lightning objects, as keys and as values with state, loads without Lightning."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (Callback,), {"__module__": name})
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, part, module)
        ae = small()
        torch.save({"state_dict": to_compvis(ae),
                    "callbacks": {module.ModelCheckpoint: {"best": np.float64(1)}},
                    "hyper_parameters": {"callback": module.ModelCheckpoint(), "kind": dict}},
                   tmp_path / "last.ckpt")
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
    """A pickle that would call a function is refused by its name, in both of torch's formats."""
    path, target = tmp_path / "model.ckpt", tmp_path / "made"
    torch.save({"state_dict": to_compvis(small()), "x": Malice(str(target))}, path,
               _use_new_zipfile_serialization=zipped)
    refused(path, f"{__name__}.make_folder")
    assert not target.exists()                              # nothing ran


# ---------------------------------------------------------------------------- transformers
def test_repa_files_load(tmp_path):
    """EMA before model, no DDP prefix, no projectors; the Namespace beside them is no obstacle."""
    source, other, (x, t, y) = tiny(SiT), tiny(SiT, seed=5), batch()
    ema = {f"module.{key}": value for key, value in source.state_dict().items()}
    ema["module.projectors.0.0.weight"] = torch.zeros(9, 32)
    torch.save({"model": other.state_dict(), "ema": ema, "opt": {"state": {}}, "steps": 3,
                "args": argparse.Namespace(model="SiT-B/2", seed=0)}, tmp_path / "repa.pt")
    loaded = load_transformer(SiT((6, 10), 3, 7, **TINY), tmp_path / "repa.pt")
    assert torch.equal(loaded(x, t, y), source(x, t, y))


def save_learn_sigma(model, path):
    """What the original SiT writes: per pixel of a patch C velocity rows, then C variance rows."""
    state = model.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (4, 3))              # (p*p, C, ...)
        state[key] = torch.cat([rows, torch.full_like(rows, 9.0)], dim=1).flatten(0, 1)
    torch.save(state, path)


def test_original_sit_runs_backwards_and_is_turned_round(tmp_path):
    """
    SiT: x_t = t x + (1 - t) eps and velocity x - eps. Loaded, it must be -SiT(x, 1 - t), and saving
    it keeps that.
    """
    original, (x, t, y) = tiny(SiT), batch()
    save_learn_sigma(original, tmp_path / "sit.pt")
    loaded = load_transformer(SiT((6, 10), 3, 7, **TINY), tmp_path / "sit.pt")
    want = -original(x, 1 - t, y)
    torch.testing.assert_close(loaded(x, t, y), want, rtol=1e-4, atol=1e-4)
    torch.save({"ema": loaded.state_dict()}, tmp_path / "ours.pt")
    again = load_transformer(SiT((6, 10), 3, 7, **TINY), tmp_path / "ours.pt")
    assert torch.equal(again(x, t, y), loaded(x, t, y))


@pytest.mark.parametrize("sampler", ["ode", "em"])
def test_a_turned_sit_samples_towards_the_data(tmp_path, sampler):
    """
    A SiT that predicts x - eps = c whatever it sees moves every noise by c; pushed the wrong way it
    would end at -c.
    """
    original = SiT((6, 10), 3, 0, **TINY)
    c = torch.tensor([50.0, -30.0, 20.0])
    with torch.no_grad():
        original.final_layer.linear.bias.copy_(c.repeat(4))     # rows are (row, column, channel)
    save_learn_sigma(original, tmp_path / "sit.pt")
    loaded = load_transformer(SiT((6, 10), 3, 0, **TINY), tmp_path / "sit.pt")
    start = torch.zeros(2, 3, 6, 10)                        # x_t = (1 - t) c solves the SDE's drift
    if sampler == "ode":
        start = torch.randn(2, 3, 6, 10)
    end = Interpolant().sample(loaded, start.shape, steps=7, sampler=sampler,
                               noise=lambda shape: start)
    torch.testing.assert_close(end, start + c.view(3, 1, 1), rtol=1e-5, atol=1e-4)


def without_final_layer(model):
    return {key: value for key, value in model.state_dict().items()
            if not key.startswith("final_layer")}


def test_uvit_files_load_with_and_without_the_final_convolution(tmp_path):
    """Bare state dicts; U-ViT-H was trained with conv=False, which equals an identity kernel."""
    source, (x, t, y) = tiny(UViT), batch()
    torch.save(source.state_dict(), tmp_path / "full.pth")
    full = load_transformer(UViT((6, 10), 3, 7, **TINY), tmp_path / "full.pth")
    assert torch.equal(full(x, 1000 * t, y), source(x, 1000 * t, y))
    torch.save(without_final_layer(source), tmp_path / "h.pth")
    loaded = load_transformer(UViT((6, 10), 3, 7, **TINY), tmp_path / "h.pth")
    source.final_layer = nn.Identity()
    torch.testing.assert_close(loaded(x, 1000 * t, y), source(x, 1000 * t, y))


def test_files_that_do_not_fit_are_refused(tmp_path):
    """Missing, no checkpoint, unsafe, another size or family: one line with the file's name."""
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": print}, tmp_path / "unsafe.pt")
    torch.save(tiny(SiT).state_dict(), tmp_path / "sit.pt")
    torch.save(without_final_layer(tiny(UViT)), tmp_path / "h.pt")
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_transformer(tiny(SiT), tmp_path / "none.pt")
    for name, model, words in [("text", tiny(SiT), "not a checkpoint"),
                               ("list", tiny(SiT), "neither"),
                               ("unsafe", tiny(SiT), "not a checkpoint"),
                               ("h", tiny(SiT), "does not fit"),
                               ("sit", tiny(SiT, num_classes=9), "embedding_table"),
                               ("sit", tiny(UViT), "does not fit"),
                               ("sit", tiny(SiT, input_size=8), "pos_embed")]:
        with pytest.raises(ValueError, match=words) as error:
            load_transformer(model, tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(error.value) and "\n" not in str(error.value)
