"""weights.py: whatever layout and wrapping is read; else one line, and no code in a file runs."""
import argparse
import collections
import dataclasses
import json
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common import weights
from common.weights import diffusers_name, load_autoencoder, load_transformer
from dit import SiT, UViT
from test_dit import batch, tiny
from test_vae import SMALL, meta_shapes, small
from vae import CONFIGS, AutoencoderKL

DIFFUSERS_FILE = "diffusion_pytorch_model"
pytestmark = pytest.mark.filterwarnings("ignore:.*no config.json")


def little(**changes):
    """A quicker one than small, where only names and numbers matter."""
    return small(dataclasses.replace(SMALL, **dict(ch_mult=(1, 1), attn_levels=()) | changes))


NETS = pytest.mark.parametrize("net", [little(), tiny(SiT)], ids=["ae", "sit"])


def to_compvis(ae):
    """What a released file holds: no latent statistics, which are this code's own."""
    return {key: value for key, value in ae.state_dict().items() if "latent_" not in key}


def to_diffusers(ae, old=False):
    """Under diffusers' names, attention as linear layers; old = as in Stable Diffusion's first."""
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in to_compvis(ae).items():
        name = diffusers_name(key, len(ae.config.ch_mult))
        for part in former if old else ():
            name = name.replace(f".{part}.", f".{former[part]}.")
        state[name] = value[:, :, 0, 0] if "attentions" in name and value.ndim == 4 else value
    return state


def write(path, content):
    """A file: bytes, safetensors where its name says so, settings, or what torch.save writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        torch.save(content, path)
    return path


def load(net, path):
    """By the reader of its kind, into another network of the same size where that needs one."""
    if isinstance(net, AutoencoderKL):
        return load_autoencoder(path)
    return load_transformer(tiny(type(net), seed=5), path)


def same(a, b):
    """Both have the same architecture and weights."""
    found = b.state_dict()
    return getattr(a, "config", 0) == getattr(b, "config", 0) and all(
        torch.equal(value, found[key]) for key, value in a.state_dict().items())


def refused(path, *words, net=None, error=ValueError):
    """One line that names the file and the culprit."""
    with pytest.raises(error) as info:
        load(net or little(), path)
    message = str(info.value)
    assert str(path) in message and "\n" not in message, message
    assert all(word in message for word in words), message


# ---------------------------------------------------------------------------- names
def test_diffusers_names():
    """Where shapes cannot tell tensors apart: pairs written down for f8d4; all stay different."""
    parts = dict(q="to_q", k="to_k", v="to_v", proj_out="to_out.0", norm="group_norm")
    pairs = {f"encoder.mid.attn_1.{part}.weight": f"encoder.mid_block.attentions.0.{name}.weight"
             for part, name in parts.items()} | {
        "decoder.mid.block_2.norm2.bias": "decoder.mid_block.resnets.1.norm2.bias",
        "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
        "encoder.down.3.attn.1.q.weight": "encoder.down_blocks.3.attentions.1.to_q.weight",
        "decoder.up.2.block.1.nin_shortcut.x": "decoder.up_blocks.1.resnets.1.conv_shortcut.x",
        "decoder.up.3.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight"}
    assert {key: diffusers_name(key, 4) for key in pairs} == pairs
    assert len({diffusers_name(key, 4) for key in meta_shapes("f8d4")}) == 250


# ---------------------------------------------------------------------------- autoencoders
def test_our_checkpoint(tmp_path):
    """The same autoencoder and statistics, in eval mode, no random number drawn."""
    ae = small()
    ae.set_latent_stats(0.25, 3.0)
    content = dict(stage="ae", ae_config=dataclasses.asdict(ae.config), model=ae.state_dict(),
                   args=dict(seed=3), images="abc")
    path, state = write(tmp_path / "ckpt.pt", content), torch.get_rng_state()
    back = load_autoencoder(str(path))
    assert same(ae, back) and not back.training and torch.equal(state, torch.get_rng_state())
    assert back.trained == dict(seed=3, images="abc")


@pytest.mark.parametrize("name", ["f8d4", "f16d16", "f16d32"])
def test_architecture_is_inferred(tmp_path, name):
    config = dataclasses.replace(CONFIGS[name], ch=32)      # same outline, fewer weights
    path = write(tmp_path / "model.ckpt", {"state_dict": to_compvis(AutoencoderKL(config))})
    assert load_autoencoder(path).config == config


@pytest.mark.parametrize("file", [f"{DIFFUSERS_FILE}.bin", f"{DIFFUSERS_FILE}.fp16.safetensors"])
@pytest.mark.parametrize("old", [False, True])
def test_diffusers_folder(tmp_path, file, old):
    """The same weights, the latents' scale from config.json: by folder or by file."""
    ae = small(dataclasses.replace(SMALL, norm_groups=16))
    write(tmp_path / "vae" / file, to_diffusers(ae, old))
    write(tmp_path / "vae" / "config.json",
          dict(norm_num_groups=16, scaling_factor=0.3611, shift_factor=0.1159))
    ae.set_latent_stats(0.1159, 1 / 0.3611)                # diffusers: (z - shift) * scaling
    for given in (tmp_path, tmp_path / "vae", str(tmp_path / "vae" / file)):
        assert same(ae, load_autoencoder(given))


def test_diffusers_settings(tmp_path):
    """Statistics per channel; diffusers' default scale; none known, which a warning says."""
    file, config = tmp_path / f"{DIFFUSERS_FILE}.bin", tmp_path / "config.json"
    write(file, to_diffusers(little()))
    with pytest.warns(UserWarning, match="no config.json"):
        assert load_autoencoder(file).latent_std.tolist() == [1, 1, 1]
    write(config, {})
    assert load_autoencoder(file).latent_std.tolist() == pytest.approx([1 / 0.18215] * 3)
    write(config, dict(scaling_factor=0.5, latents_mean=[1, 2, 3], latents_std=[4, 5, 6]))
    back = load_autoencoder(file)
    assert back.latent_mean.tolist() == [1, 2, 3] and back.latent_std.tolist() == [8, 10, 12]
    # beside CompVis' layout, of 32 groups, it belongs to something else
    assert same(little(), load_autoencoder(write(tmp_path / "ae.ckpt", to_compvis(little()))))


@pytest.mark.parametrize("layout", [to_compvis, to_diffusers])
def test_no_quant_convolutions(tmp_path, layout):
    """As in SD3 and FLUX: the same as identities."""
    ae = small()
    for conv in (ae.quant_conv, ae.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    state = {key: value for key, value in layout(ae).items() if "quant_conv" not in key}
    assert same(ae, load_autoencoder(write(tmp_path / "ae.pt", state)))


def test_hash_covers_the_groups_of_the_norms():
    """Two that differ in norm_groups alone have the same weights and encode differently."""
    a, b, c = (weights.autoencoder_hash(little(norm_groups=groups)) for groups in (8, 32, 8))
    assert a == c != b


# ---------------------------------------------------------------------------- folders
@pytest.mark.parametrize("names", [         # what a folder holds, first the file to take
    [f"{DIFFUSERS_FILE}.bf16.bin"], ["vavae-imagenet256.pt"], ["ckpt.pt", "ckpt_100.pt"],
    [f"{DIFFUSERS_FILE}.fp16.bin", f"{DIFFUSERS_FILE}.non_ema.bin"],
    [f"{DIFFUSERS_FILE}.bin", f"{DIFFUSERS_FILE}.fp16.bin"],
    [f"vae/{DIFFUSERS_FILE}.fp16.bin", f"unet/{DIFFUSERS_FILE}.bin", "v1.ckpt"]])
def test_a_folder(tmp_path, names):
    """The plain file before variants; a pipeline's vae/; a run's last checkpoint; the only file."""
    for name in ("README.md", *names):
        write(tmp_path / name, to_compvis(little()) if name == names[0] else b"another")
    assert same(load_autoencoder(str(tmp_path)), little())


def test_a_snapshot_of_links_into_the_hubs_blobs(tmp_path):
    """Where no config.json lies: it is beside the link."""
    link = tmp_path / "aaa" / f"{DIFFUSERS_FILE}.bin"
    write(link.with_name("config.json"), dict(scaling_factor=0.25))
    link.symlink_to(write(tmp_path / "blobs" / "3f9a0c77", to_diffusers(little())))
    for given in (link.parent, link):
        assert load_autoencoder(given).latent_std.tolist() == [4, 4, 4]


def test_a_folder_without_a_clear_choice(tmp_path):
    for name, words in (("a.msgpack", "(0 are)"), ("a.ckpt", ""), ("b.bin", "(2 are)")):
        write(tmp_path / name, b"x")
        if words:
            refused(tmp_path, words, error=FileNotFoundError)


# ---------------------------------------------------------------------------- files
@NETS
def test_the_content_says_the_format(tmp_path, net):
    """No suffix, a wrong one: the first bytes tell. In safetensors, and torch.save now and then."""
    file = write(tmp_path / "x.safetensors", net.state_dict())
    assert same(load(net, file.rename(tmp_path / "3f9a0c77")), net)
    for zipped in (True, False):
        torch.save(net.state_dict(), file, _use_new_zipfile_serialization=zipped)
        assert same(load(net, file), net)


@NETS
def test_files_that_are_no_checkpoint(tmp_path, net):
    """A git-lfs pointer, a web page, cut short, a flipped bit; of another model."""
    path, whole = tmp_path / "model.pt", write(tmp_path / "whole", net.state_dict()).read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n" * 9,
                    b"<!DOCTYPE html><html>", whole[:len(whole) // 2], whole[:-100]):
        refused(write(path, content), "not a complete file of weights", net=net)
    largest = max(net.state_dict().values(), key=torch.numel)
    flipped = bytearray(whole)                             # torch.load compares no checksums
    flipped[whole.index(largest.numpy().tobytes()) + 1001] ^= 1
    refused(write(path, bytes(flipped)), "checksum", net=net)
    refused(write(path, {"stage0.fc.weight": torch.zeros(2)}), "stage0.fc.weight", net=net)


def test_safetensors_is_optional(tmp_path, monkeypatch):
    """Without the package only its files fail, and the message says what to install."""
    path = write(tmp_path / "model.safetensors", to_compvis(little()))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(path, "pip install safetensors")


def test_a_lightning_checkpoint(tmp_path, monkeypatch):
    """Harmless objects beside the weights, as keys and with state: read without their packages."""
    module = types.ModuleType("pytorch_lightning")
    module.Callback = type("Callback", (), {"__module__": module.__name__})
    module.Callback.__setstate__ = lambda self, state: pytest.fail("foreign code was run")
    callback = module.Callback()
    callback.best = 1.0
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        path = write(tmp_path / "last.ckpt", {
            "state_dict": to_compvis(little()), "hyper_parameters": {"x": callback, "kind": dict},
            "callbacks": {module.Callback: {"best": np.float64(1), "all": np.arange(3.0)}},
            "args": argparse.Namespace(path=pathlib.PosixPath("data"), seed=0),
            "log": collections.defaultdict(list, loss=[1.0, 2.0]), "other": (slice(3), ...)})
    assert same(load_autoencoder(path), little())
    assert "pytorch_lightning" not in sys.modules


# ---------------------------------------------------------------------------- state dicts
def renamed(before, after=""):
    """A change of names: `before` in front of each, `after` behind its first part."""
    return lambda net: {before + key.replace(".", f".{after}", 1): value
                        for key, value in net.state_dict().items()}


def other(net):
    """Another network of the same names."""
    return {key: value + 1 for key, value in net.state_dict().items()}


WRAPPED = {         # network -> what a file holds
    "compiled, then parallel": lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
    "compiled inside": renamed("", "_orig_mod."),
    "averaged": lambda net: AveragedModel(net).state_dict(),
    "FSDP": renamed("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    "Lightning": lambda net: {"state_dict": renamed("model.module._orig_mod.")(net)},
    "latent diffusion": lambda net: {
        "state_dict": renamed("first_stage_model.")(net) | dict.fromkeys(
            ("first_stage_model.loss.logvar", "model.diffusion_model.out.0.weight", "betas",
             "cond_stage_model.x", "model_ema.decay", "foundation_model.x"), torch.zeros(5))},
    "module": lambda net: {"module": net.state_dict(), "dp_world_size": 8},
    "REPA": lambda net: {
        "model": other(net), "args": argparse.Namespace(seed=0), "opt": {"state": {}}, "steps": 3,
        "ema": renamed("module.")(net) | {"module.projectors.0.0.weight": torch.zeros(9, 32)}},
    "inside state_dict": lambda net: {"state_dict": {"model": other(net), "ema": net.state_dict()}},
    "no ema yet": lambda net: {"model": net.state_dict(), "ema": None, "epoch": 3},
    "several networks": lambda net: {"vae": to_compvis(little()), "model": other(tiny(SiT)),
                                     "ema": tiny(SiT).state_dict()}}


@NETS
@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_state_dicts(tmp_path, how, net):
    """Around the weights or before their names, and nested: autoencoders and transformers alike."""
    assert same(load(net, write(tmp_path / "model.pt", WRAPPED[how](net))), net)


def test_of_two_networks_that_would_do_none_is_taken(tmp_path):
    ae = to_compvis(little())
    refused(write(tmp_path / "all.pt", {"vae": ae, "model": ae}), "2 networks", "vae.encoder")


@NETS
def test_every_floating_point_is_read_exactly(tmp_path, net):
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64):
        state = {key: value.to(dtype) for key, value in net.state_dict().items()}
        back = load(net, write(tmp_path / "model.pt", state)).state_dict()
        assert all(torch.equal(back[key], value.float()) for key, value in state.items())


@pytest.mark.parametrize("change, words", [
    (lambda x: x / 0, "not finite"), (lambda x: x.to(torch.int8), "torch.int8"),
    (lambda x: torch.zeros(7, 5, 2), "(7, 5, 2)"), (lambda x: None, "missing")])
@pytest.mark.parametrize("net, state, name", [
    (little(), to_compvis(little()), "encoder.mid.block_2.conv2.weight"),
    (little(), to_diffusers(little()), "encoder.mid_block.resnets.1.conv2.weight"),
    (tiny(SiT), tiny(SiT).state_dict(), "blocks.1.mlp.fc1.weight")], ids=["cv", "diffusers", "sit"])
def test_a_wrong_tensor_is_named(tmp_path, net, state, name, change, words):
    """Diverged, quantised, of another shape, missing, of no known use: named as in our networks."""
    path = write(tmp_path / "model.pt", state | {name: change(state[name])})
    refused(path, name.replace("mid_block.resnets.1", "mid.block_2"), words, net=net)
    refused(write(path, state | {"quantize.x": torch.zeros(2)}), "quantize.x is (2,)", net=net)


# ---------------------------------------------------------------------------- transformers
def save_learn_sigma(model, path):
    """What the original SiT writes: per pixel of a patch C velocity rows, then C variance rows."""
    state = model.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (4, 3))              # (p*p, C, ...)
        state[key] = torch.cat([rows, torch.full_like(rows, 9.0)], dim=1).flatten(0, 1)
    return write(path, state)


def test_time_of_the_original_sit_is_reversed(tmp_path):
    """Its x_t = t x + (1 - t) eps, velocity x - eps: loaded it is -SiT(x, 1 - t), saved as well."""
    original, (x, t, y) = tiny(SiT), batch()
    loaded = load(original, save_learn_sigma(original, tmp_path / "sit.pt"))
    torch.testing.assert_close(loaded(x, t, y), -original(x, 1 - t, y), rtol=1e-4, atol=1e-4)
    assert same(load(original, write(tmp_path / "ours.pt", {"ema": loaded.state_dict()})), loaded)


def test_uvit_files_with_and_without_the_final_convolution(tmp_path):
    """U-ViT-H was trained with conv=False, which equals an identity kernel."""
    source, (x, t, y) = tiny(UViT), batch()
    state = {key: w for key, w in source.state_dict().items() if "final_layer" not in key}
    loaded = load(source, write(tmp_path / "h.pth", state))
    source.final_layer = nn.Identity()
    torch.testing.assert_close(loaded(x, 1000 * t, y), source(x, 1000 * t, y))
