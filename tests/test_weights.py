"""
weights.py: released autoencoders and transformers, and our own, are read as what they are, whatever
the layout and the wrapping; every other file is refused in one line, and no code in it runs.
"""
import argparse
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common.weights import diffusers_name, load_autoencoder, load_transformer, named_tensors
from dit import Interpolant, SiT, UViT
from test_dit import TINY, batch, tiny
from test_vae import SMALL, meta_shapes, small
from vae import CONFIGS, AutoencoderKL


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
    alone = load_autoencoder(tmp_path / file)               # its config.json lies beside it
    assert_same(ae, alone)
    assert torch.equal(alone.normalize(z), back.normalize(z))


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


# ---------------------------------------------------------------------------- config.json
LITTLE = dataclasses.replace(SMALL, ch_mult=(1, 1), attn_levels=())


def little(**changes):
    """A quicker one than small, where only names and numbers matter."""
    return small(dataclasses.replace(LITTLE, **changes))


def same(a, b):
    """Both hold the same weights."""
    b = b.state_dict()
    return all(torch.equal(value, b[key]) for key, value in a.state_dict().items())


def write(path, content):
    """A file, in safetensors' format where its name says so, text or a state dict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif path.suffix in (".safetensors", ".sft"):
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return path


def settings(**changes):
    return json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 16} | changes)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors",
                                  "diffusion_pytorch_model.fp16.bin", "model.pt"])
def test_config_beside_a_weights_file(tmp_path, name):
    """A file in diffusers' layout keeps its 16 groups, scale and shift, also through a link."""
    ae = little(norm_groups=16)
    file = write(tmp_path / "vae" / name, to_diffusers(ae))
    write(tmp_path / "vae" / "config.json", settings(scaling_factor=0.18215, shift_factor=0.5))
    link = tmp_path / "elsewhere" / "vae.pt"
    link.parent.mkdir()
    link.symlink_to(f"../vae/{name}")
    for given in (file, link, str(file)):
        back = load_autoencoder(given)
        assert_same(ae, back, ae.config)
        torch.testing.assert_close(back.latent_std, torch.full((3,), 1 / 0.18215))
        assert torch.equal(back.latent_mean, torch.full((3,), 0.5))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "clip"}',
                                  '{"_class_name": "UNet2DConditionModel"}', settings()])
def test_config_beside_a_compvis_file_is_not_its(tmp_path, text):
    """CompVis' layout has 32 groups and knows no config.json: whatever lies there, it loads."""
    ae = little()
    write(tmp_path / "config.json", text)
    assert_same(ae, load_autoencoder(write(tmp_path / "model.ckpt", to_compvis(ae))), LITTLE)


def test_without_a_scale_diffusers_takes_its_own(tmp_path):
    """AutoencoderKL's default scaling_factor, which SD-VAE's config.json leaves out."""
    write(tmp_path / "config.json", settings(norm_num_groups=32))
    back = load_autoencoder(write(tmp_path / "vae.bin", to_diffusers(little())))
    torch.testing.assert_close(back.latent_std, torch.full((3,), 1 / 0.18215))


def test_without_a_config_the_guess_is_said(tmp_path):
    """Groups and scale leave no trace in the tensors; CompVis' layout has but one."""
    path = tmp_path / "model.pt"
    torch.save(to_diffusers(little()), path)
    with pytest.warns(UserWarning, match="model.pt: no config.json beside it: .*32 groups"):
        load_autoencoder(path)


@pytest.mark.parametrize("changes, words", [
    (dict(scaling_factor="big"), "'big'"), (dict(scaling_factor=0), "std above 0"),
    (dict(scaling_factor=-0.2), "std above 0"), (dict(shift_factor=[1.0, 2.0]), "[1.0, 2.0]"),
    (dict(shift_factor=float("nan")), "nan"), (dict(latents_std=[1.0, 0.0, 1.0]), "std above 0"),
    (dict(latents_mean={"a": 1}), "latents_mean"), (dict(latents_std=[[1.0] * 3]), "latents_std"),
    (dict(norm_num_groups=16.0), "norm_num_groups 16.0"), (dict(norm_num_groups=-16), "-16"),
    (dict(norm_num_groups=True), "norm_num_groups True"), (dict(act_fn="relu"), "'relu'"),
    (dict(_class_name="VQModel"), "config.json: describes VQModel"),
    (dict(_class_name=None, model_type="clip"), "config.json: describes clip")])
def test_bad_settings_beside_a_file(tmp_path, changes, words):
    """Each names the setting and the folder's file, whether file or folder is given."""
    ae = little(norm_groups=16)
    file = write(tmp_path / "diffusion_pytorch_model.bin", to_diffusers(ae))
    write(tmp_path / "config.json", settings(**changes))
    for given in (file, tmp_path):
        with pytest.raises(ValueError) as info:
            load_autoencoder(given)
        message = str(info.value)
        assert words in message and str(tmp_path) in message and "\n" not in message, message


# ---------------------------------------------------------------------------- folders
DIFFUSERS_FILE = "diffusion_pytorch_model"
PLACES = {          # what a folder holds, {name: number or text}; number 1 is the one to take
    "fp16 alone": {f"{DIFFUSERS_FILE}.fp16.safetensors": 1},
    "fp16 in a .bin": {f"{DIFFUSERS_FILE}.fp16.bin": 1},
    "non_ema alone": {f"{DIFFUSERS_FILE}.non_ema.safetensors": 1},
    "a variant of no known name": {f"{DIFFUSERS_FILE}.bf16.bin": 1, "README.md": "# VAE"},
    "fp16 before non_ema": {f"{DIFFUSERS_FILE}.non_ema.bin": 2, f"{DIFFUSERS_FILE}.fp16.bin": 1},
    "plain before all": {f"{DIFFUSERS_FILE}.fp16.safetensors": 2, f"{DIFFUSERS_FILE}.bin": 1,
                         f"{DIFFUSERS_FILE}.non_ema.bin": 3},
    "a pipeline": {"model_index.json": "{}", f"vae/{DIFFUSERS_FILE}.fp16.bin": 1,
                   f"unet/{DIFFUSERS_FILE}.bin": 2, "v1-5-pruned.ckpt": 3},
    "our run": {"ckpt.pt": 1, "ckpt_100.pt": 2, "log.jsonl": ""},
    "a single file": {"vavae-imagenet256.pt": 1, "README.md": "# VA-VAE"},
}


def fill_folder(folder, content):
    """Each number is an autoencoder that is known by its last bias."""
    for name, number in content.items():
        if not isinstance(number, str):
            ae = little()
            ae.decoder.conv_out.bias.data.fill_(number)
            if name.startswith("ckpt"):
                save_ours(ae, folder / name)
                continue
            number = to_diffusers(ae) if DIFFUSERS_FILE in name else to_compvis(ae)
        write(folder / name, number)


@pytest.mark.filterwarnings("ignore:.*no config.json")
@pytest.mark.parametrize("what", PLACES)
def test_a_folder_is_gone_into(tmp_path, what):
    """The plain file before fp16 before non_ema; a pipeline's vae/; a run's last checkpoint."""
    fill_folder(tmp_path, PLACES[what])
    ae = load_autoencoder(str(tmp_path))
    assert ae.decoder.conv_out.bias.tolist() == [1, 1, 1]


@pytest.mark.parametrize("content, words", [
    ({"a.ckpt": 1, "b.safetensors": "x"}, ["a.ckpt, b.safetensors"]),
    ({f"{DIFFUSERS_FILE}-00001-of-2.bin": 1, f"{DIFFUSERS_FILE}-00002-of-2.bin": 2}, ["00002-of"]),
    ({"vae/config.json": "{}", "model_index.json": "{}"}, ["vae/config.json", "model_index.json"]),
    ({"flax_model.msgpack": "x"}, ["flax_model.msgpack"])])
def test_a_folder_that_leaves_a_choice_is_named(tmp_path, content, words):
    """Several files or none: what is there, and that one of them is to be given."""
    fill_folder(tmp_path, content)
    refused(tmp_path, "give a file", *words, error=FileNotFoundError)


def hub_entry(folder, snapshots):
    """An entry of the hub's cache: snapshots {hash: number}, all files links into blobs/."""
    for name, number in snapshots.items():
        fill_folder(folder, {f"blobs/{DIFFUSERS_FILE}": number})
        write(folder / "blobs" / "settings", settings(norm_num_groups=32, scaling_factor=0.25))
        (folder / "blobs" / DIFFUSERS_FILE).rename(folder / "blobs" / f"{name}")
        vae = folder / "snapshots" / name / "vae"
        vae.mkdir(parents=True)
        (vae / f"{DIFFUSERS_FILE}.fp16.bin").symlink_to(f"../../../blobs/{name}")
        (vae / "config.json").symlink_to("../../../blobs/settings")
    return folder


def test_an_entry_of_the_hubs_cache(tmp_path):
    """Its only snapshot, else the one that refs/main names, else none; the scale comes along."""
    folder = hub_entry(tmp_path / "models--org--name", {"aaa": 2})
    assert load_autoencoder(folder).last_layer is not None
    hub_entry(folder, {"bbb": 1})
    refused(folder, "snapshots/aaa, snapshots/bbb", error=FileNotFoundError)
    write(folder / "refs" / "main", "bbb\n")
    for given in (folder, folder / "snapshots" / "bbb", folder / "snapshots" / "bbb" / "vae"):
        ae = load_autoencoder(given)
        assert ae.decoder.conv_out.bias.tolist() == [1, 1, 1]
        assert ae.latent_std.tolist() == [4, 4, 4]
    (folder / "blobs" / "bbb").unlink()
    refused(folder, "a link to ../../../blobs/bbb, which is not there", error=FileNotFoundError)


def test_a_transformers_folder(tmp_path):
    """Our run's folder and a hub entry with one file; a pipeline's vae/ is no transformer."""
    source = tiny(SiT)
    write(tmp_path / "run" / "ckpt.pt", {"stage": "diffusion", "ema": source.state_dict()})
    write(tmp_path / "hub" / "snapshots" / "aaa" / "sit.pth", source.state_dict())
    for folder in ("run", "hub"):
        loaded = load_transformer(tiny(SiT, seed=5), tmp_path / folder)
        assert torch.equal(loaded.x_embedder.proj.weight, source.x_embedder.proj.weight)
    fill_folder(tmp_path / "pipe", {f"vae/{DIFFUSERS_FILE}.bin": 1})
    with pytest.raises(FileNotFoundError, match="pipe: .*it holds vae"):
        load_transformer(tiny(SiT), tmp_path / "pipe")


# ---------------------------------------------------------------------------- formats
@pytest.mark.parametrize("format", ["torch.save", "torch.save of 2020", "safetensors"])
@pytest.mark.parametrize("name", ["ae.sft", "3f9a0c77", "model.ckpt", "model.safetensors",
                                  "model.json"])
def test_the_content_says_the_format(tmp_path, name, format):
    """No suffix, a wrong one, another one: the first bytes tell; for both kinds of networks."""
    ae, sit, path = little(), tiny(SiT), tmp_path / name

    def save(state):
        state = {key: value.contiguous() for key, value in state.items()}
        if format == "safetensors":
            pytest.importorskip("safetensors.torch").save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=format == "torch.save")
    save(to_compvis(ae))
    assert same(load_autoencoder(path), ae)
    save(sit.state_dict())
    assert same(load_transformer(tiny(SiT, seed=5), path), sit)


@pytest.mark.parametrize("content, words", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 334643\n", "git lfs pull"),
    ("<!DOCTYPE html><html><head>", "a web page"), ("<html lang=en>", "a web page"),
    ("\ufeff \n<HTML>", "a web page"),
    ("<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an error message"),
    ('{"error": "Repository not found"}', "JSON"), ("Entry not found", "'Entry not found'")])
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "blob"])
def test_what_came_instead_of_the_weights_is_named(tmp_path, name, content, words):
    """A git-lfs pointer, a login page, a bucket's or the hub's error: as what it is."""
    path = write(tmp_path / name, content)
    refused(path, words, "cannot be read")
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        load_transformer(tiny(SiT), path)


# ---------------------------------------------------------------------------- wrappings
def renamed(before, after=""):
    """A change of names: `before` in front of each, `after` behind its first part."""
    return lambda net: {before + key.replace(".", f".{after}", 1): value
                        for key, value in net.state_dict().items()}


def other(net):
    """Another network of the same names."""
    return {key: value + 1 for key, value in net.state_dict().items()}


WRAPPED = {         # network -> what a file holds
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "compiled, then parallel": lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
    "parallel, then compiled": renamed("_orig_mod.module."),
    "compiled inside": renamed("", "_orig_mod."),
    "averaged": lambda net: AveragedModel(net).state_dict(),
    "FSDP": renamed("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    "vae.": renamed("vae."),
    "model.": renamed("model."),
    "first_stage_model.": renamed("first_stage_model."),
    "Lightning, parallel, compiled": lambda net: {
        "state_dict": renamed("model.module._orig_mod.")(net)},
    "vae": lambda net: {"vae": net.state_dict(), "step": 3},
    "state_dict": lambda net: {"state_dict": net.state_dict(),
                               "optimizer": {"state": {0: torch.ones(1)}}},
    "model": lambda net: {"model": net.state_dict()},
    "module": lambda net: {"module": net.state_dict(), "dp_world_size": 8},
    "ema": lambda net: {"ema": net.state_dict()},
    "ema before model": lambda net: {"model": other(net), "ema": renamed("module.")(net)},
    "ema. before model.": lambda net: renamed("ema.")(net) | {
        f"model.{key}": value for key, value in other(net).items()},
    "inside state_dict": lambda net: {"state_dict": {"model": other(net), "ema": net.state_dict()}},
    "an epoch beside": lambda net: net.state_dict() | {"epoch": 3},
    "no ema yet": lambda net: {"model": net.state_dict(), "ema": None},
}


@pytest.mark.parametrize("kind", [AutoencoderKL, SiT, UViT])
@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_state_dicts(tmp_path, how, kind):
    """Around the weights or before their names, and nested: autoencoders and transformers alike."""
    path = tmp_path / "model.pt"
    if kind is AutoencoderKL:
        net = little()
        del net.latent_mean, net.latent_std             # CompVis' names only
        torch.save(WRAPPED[how](net), path)
        assert same(load_autoencoder(path), little())
        return
    net = tiny(kind)
    torch.save(WRAPPED[how](net), path)
    assert same(load_transformer(tiny(kind, seed=5), path), net)


def test_each_reader_takes_its_own_network(tmp_path):
    """An autoencoder and a transformer in one file, each with what else the other has."""
    ae, sit = little(), tiny(SiT)
    torch.save({"vae": to_compvis(ae), "model": other(sit), "ema": sit.state_dict()},
               tmp_path / "all.pt")
    assert same(load_autoencoder(tmp_path / "all.pt"), ae)
    assert same(load_transformer(tiny(SiT, seed=5), tmp_path / "all.pt"), sit)


def test_no_name_of_ours_looks_wrapped():
    """Nothing is taken off a name of any model."""
    with torch.device("meta"):
        nets = [AutoencoderKL(config) for config in CONFIGS.values()]
    for net in (*nets, tiny(SiT), tiny(UViT)):
        for name in net.state_dict():
            assert named_tensors(name) == ((), name)


@pytest.mark.parametrize("change, words", [
    (lambda w: {"model": w, "vae": w}, "under model and vae"),
    (lambda w: {"vae": w} | w, "under vae and no name"),
    (lambda w: w | {f"module.{key}": value for key, value in w.items()}, "is there twice"),
    (lambda w: w | {7: torch.zeros(2)}, "7 is no name"),
    (lambda w: {"model": {b"x": torch.zeros(2)}}, "b'x' is no name"),
    (lambda w: {"model": {key: value.numpy() for key, value in w.items()}}, "neither a state dict"),
    (lambda w: {}, "neither a state dict"), (lambda w: {"model": [1]}, "neither a state dict")])
def test_a_file_that_leaves_a_choice(tmp_path, change, words):
    """Several networks, twice the same name, names that are none: one line, in both readers."""
    path = tmp_path / "model.pt"
    torch.save(change(to_compvis(little())), path)
    refused(path, words)
    torch.save(change(tiny(SiT).state_dict()), path)
    with pytest.raises(ValueError, match=f"model.pt: .*{words}"):
        load_transformer(tiny(SiT), path)


def test_an_unknown_prefix_is_shown(tmp_path):
    """The refusal shows how the names begin."""
    torch.save({f"stage0.{key}": value for key, value in to_compvis(little()).items()},
               tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "encoder.conv_in", "such as stage0.decoder.")


# ---------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16,
                                   torch.bfloat16, torch.float64])
def test_every_floating_point_is_read(tmp_path, dtype):
    """As float32, exactly the values in the file."""
    ae, sit = little(), tiny(SiT)
    for net in (ae, sit):
        for value in net.state_dict().values():
            value.copy_(value.to(dtype).float())
    ae.set_latent_stats(0.0, 1.0)
    torch.save({key: value.to(dtype) for key, value in to_compvis(ae).items()}, tmp_path / "ae.pt")
    torch.save({key: value.to(dtype) for key, value in sit.state_dict().items()},
               tmp_path / "sit.pt")
    for back, net in ((load_autoencoder(tmp_path / "ae.pt"), ae),
                      (load_transformer(tiny(SiT, seed=5), tmp_path / "sit.pt"), sit)):
        assert same(back, net)
        assert all(value.dtype == torch.float32 for value in back.state_dict().values())


@pytest.mark.parametrize("change, words", [
    (lambda x: x * float("nan"), "not finite"), (lambda x: x / 0, "not finite"),
    (lambda x: x.double() * 1e300, "not finite"), (lambda x: x.to(torch.int8), "torch.int8"),
    (lambda x: x.to(torch.complex64), "torch.complex64"), (lambda x: x.to_sparse(), "sparse"),
    (lambda x: x.to("meta"), "meta")])
def test_weights_that_are_no_plain_numbers(tmp_path, change, words):
    """Diverged, quantised or not there: named with its tensor, by both readers."""
    for net, name, load in (
            (little(), "decoder.conv_in.weight", load_autoencoder),
            (tiny(SiT), "x_embedder.proj.weight", lambda path: load_transformer(tiny(SiT), path))):
        state = {key: value for key, value in net.state_dict().items() if "latent_" not in key}
        torch.save(state | {name: change(state[name])}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=f"model.pt: {name} is .*{words}"):
            load(tmp_path / "model.pt")


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("translate", [to_compvis, to_diffusers, None])
@pytest.mark.filterwarnings("ignore:.*no config.json")
def test_only_rgb_autoencoders(tmp_path, channels, translate):
    """Grey images, or RGB with alpha, fail in the first convolution: refused before."""
    ae = little(in_channels=channels)
    path = tmp_path / "model.pt"
    if translate:
        torch.save(translate(ae), path)
    else:
        save_ours(ae, path)
    refused(path, f"images of {channels} channels", "RGB")


# ---------------------------------------------------------------------------- what lies beside
BESIDE = {
    "a numpy number": np.float64(0.3),
    "a path in flags": argparse.Namespace(path=pathlib.PosixPath("data"), lr=1e-4),
    "a numpy array": np.arange(3.0),
    "a default dictionary": collections.defaultdict(list, loss=[1.0, 2.0]),
    "a namespace": types.SimpleNamespace(depth=3),
    "a date": datetime.datetime(2026, 3, 14),
    "torch's version": torch.__version__,
    "a set and a slice": (frozenset({1}), slice(3), ...),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", BESIDE)
def test_harmless_things_beside_the_weights(tmp_path, what, zipped):
    """Both readers take the file, in both of torch's formats."""
    ae, sit, path = little(), tiny(SiT), tmp_path / "model.pt"
    for state in (to_compvis(ae), sit.state_dict()):
        torch.save({"model": state, "x": BESIDE[what]}, path, _use_new_zipfile_serialization=zipped)
        if "x_embedder.proj.weight" in state:
            assert same(load_transformer(tiny(SiT, seed=5), path), sit)
        else:
            assert same(load_autoencoder(path), ae)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_readers_name_the_class_they_refuse(tmp_path, zipped):
    """The whole name and the way out, nothing runs."""
    path, target = tmp_path / "model.pt", tmp_path / "made"
    torch.save({"model": tiny(SiT).state_dict(), "x": Malice(str(target)), "y": np.float64(1)},
               path, _use_new_zipfile_serialization=zipped)
    for load in (load_autoencoder, lambda path: load_transformer(tiny(SiT), path)):
        with pytest.raises(ValueError, match=f"model.pt: .*{__name__}.make_folder.*state dict"):
            load(path)
    assert not target.exists()


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


@pytest.mark.parametrize("tensors, word", [
    ({"t_embedder.mlp.0.weight": None}, "t_embedder.mlp.0.weight is missing"),
    ({"t_embedder.mlp.0.weight": torch.zeros(32, 64)}, "t_embedder.mlp.0.weight is (32, 64)"),
    ({"final_layer.linear.bias": torch.zeros(13)}, "final_layer.linear.bias is (13,)"),
    ({"final_layer.linear.bias": None}, "final_layer.linear.bias is missing"),
    ({"final_layer.linear.weight": torch.zeros(())}, "final_layer.linear.bias is (24,)"),
    ({"final_layer.linear.weight": torch.zeros(24, 7)}, "final_layer.linear.weight is (24, 7)"),
    ({"x_embedder.proj.bias": torch.zeros(3)}, "x_embedder.proj.bias is (3,)")])
def test_an_original_sit_that_does_not_fit(tmp_path, tensors, word):
    """Before it is turned round, what would break that is named."""
    path = tmp_path / "sit.pt"
    save_learn_sigma(tiny(SiT), path)
    state = torch.load(path, weights_only=True) | tensors
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    with pytest.raises(ValueError) as info:
        load_transformer(tiny(SiT), path)
    assert str(info.value).startswith(f"{path}: does not fit this SiT") and word in str(info.value)
