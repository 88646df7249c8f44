"""
common/weights.py: released autoencoders and transformers, and our own, are read whatever the layout
and the wrapping; every other file is refused in one line, and no code in it runs.
"""
import argparse
import collections
import dataclasses
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

from common.weights import (
    autoencoder_hash,
    diffusers_name,
    load_autoencoder,
    load_transformer,
    named_tensors,
)
from dit import Interpolant, SiT, UViT
from test_dit import TINY, batch, tiny
from test_vae import SMALL, meta_shapes, small
from vae import CONFIGS, AutoencoderKL

LITTLE = dataclasses.replace(SMALL, ch_mult=(1, 1), attn_levels=())
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
DIFFUSERS_FILE = "diffusion_pytorch_model"


def little(**changes):
    """A quicker one than small, where only names and numbers matter."""
    return small(dataclasses.replace(LITTLE, **changes))


def to_compvis(ae):
    """What a released file holds: no latent statistics, which are this code's own."""
    return {key: value.clone() for key, value in ae.state_dict().items() if "latent_" not in key}


def to_diffusers(ae, old=False):
    """Under diffusers' names, attention as linear layers; old = as in Stable Diffusion's first."""
    state = {}
    for key, value in to_compvis(ae).items():
        name = diffusers_name(key, len(ae.config.ch_mult))
        if ".attentions." in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        for new, former in OLD_NAMES.items() if old and ".attentions." in name else ():
            name = name.replace(f".{new}.", f".{former}.")
        state[name] = value.contiguous()
    return state


def write(path, content):
    """A file, in safetensors' format where its name says so, text, bytes or a pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (str, bytes)):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif path.suffix in (".safetensors", ".sft"):
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return path


def settings(**changes):
    return json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 32} | changes)


def our_checkpoint(ae, **changes):
    return {"stage": "ae", "ae_config": dataclasses.asdict(ae.config), "model": ae.state_dict(),
            "step": 7} | changes


def load(net, path):
    """By the reader of its kind, into another network of the same size where that needs one."""
    if isinstance(net, AutoencoderKL):
        return load_autoencoder(path)
    return load_transformer(tiny(type(net), seed=5), path)


def same(a, b):
    """Both hold the same weights."""
    b = b.state_dict()
    return all(torch.equal(value, b[key]) for key, value in a.state_dict().items())


def assert_same(a, b):
    """Both have one architecture and compute the same, on an image that is not square."""
    assert a.config == b.config
    x, z = torch.randn(2, 3, 8, 12), torch.randn(2, a.config.latent_channels, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(a.encode(x).mean, b.encode(x).mean)
        torch.testing.assert_close(a.encode(x).logvar, b.encode(x).logvar)
        torch.testing.assert_close(a.decode(z), b.decode(z))


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
    pairs = {
        "encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
        "encoder.mid.attn_1.k.weight": "encoder.mid_block.attentions.0.to_k.weight",
        "encoder.mid.attn_1.v.weight": "encoder.mid_block.attentions.0.to_v.weight",
        "encoder.mid.attn_1.proj_out.bias": "encoder.mid_block.attentions.0.to_out.0.bias",
        "decoder.mid.block_1.norm1.bias": "decoder.mid_block.resnets.0.norm1.bias",
        "decoder.mid.block_2.norm2.bias": "decoder.mid_block.resnets.1.norm2.bias",
        "encoder.down.2.block.1.conv2.weight": "encoder.down_blocks.2.resnets.1.conv2.weight",
        "encoder.down.1.block.0.nin_shortcut.bias":
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
        "encoder.down.3.attn.1.norm.weight": "encoder.down_blocks.3.attentions.1.group_norm.weight",
        "decoder.up.2.block.1.conv1.weight": "decoder.up_blocks.1.resnets.1.conv1.weight",
        "decoder.up.3.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
        "post_quant_conv.bias": "post_quant_conv.bias"}
    assert {key: diffusers_name(key, 4) for key in pairs} == pairs
    assert len({diffusers_name(key, 4) for key in meta_shapes("f8d4")}) == 250


def test_no_name_of_ours_looks_prefixed():
    """Nothing is taken off a name of any model."""
    with torch.device("meta"):
        nets = [AutoencoderKL(config) for config in CONFIGS.values()]
    for net in (*nets, tiny(SiT), tiny(UViT)):
        found = [(prefixes, name) for prefixes, name, _ in named_tensors(net.state_dict())]
        assert found == [((), name) for name in net.state_dict()]


# ---------------------------------------------------------------------------- autoencoders
def test_our_checkpoint(tmp_path):
    """ckpt.pt -> the same autoencoder and statistics, in eval mode, no random number drawn."""
    ae = small()
    ae.set_latent_stats(0.25, 3.0)
    path = write(tmp_path / "ckpt.pt", our_checkpoint(ae))
    state = torch.get_rng_state()
    back = load_autoencoder(str(path))
    assert torch.equal(state, torch.get_rng_state()) and not back.training
    assert same(ae, back)
    assert_same(ae, back)
    refused(write(path, our_checkpoint(ae, stage="diffusion")), "stage 'diffusion'")
    refused(write(path, our_checkpoint(ae, ae_config={"depth": 3})), "depth")


@pytest.mark.parametrize("name", ["f8d4", "f16d16", "f16d32"])
def test_architecture_is_inferred(tmp_path, name):
    """Widths, depth, channels, attention levels of published models follow from names, shapes."""
    config = dataclasses.replace(CONFIGS[name], ch=32)      # same outline, fewer weights
    path = write(tmp_path / "model.ckpt", {"state_dict": to_compvis(AutoencoderKL(config))})
    assert load_autoencoder(path).config == config


@pytest.mark.parametrize("file", [f"{DIFFUSERS_FILE}.bin", f"{DIFFUSERS_FILE}.fp16.safetensors"])
@pytest.mark.parametrize("old", [False, True])
def test_diffusers_folder(tmp_path, file, old):
    """The same outputs, the latents' scale from config.json: by folder, by file, through a link."""
    ae = small(dataclasses.replace(SMALL, norm_groups=16))
    write(tmp_path / "vae" / file, to_diffusers(ae, old))
    write(tmp_path / "vae" / "config.json",
          settings(norm_num_groups=16, scaling_factor=0.3611, shift_factor=0.1159))
    (tmp_path / "link.pt").symlink_to(f"vae/{file}")
    z = torch.randn(1, 3, 2, 4)
    for given in (tmp_path, tmp_path / "vae", str(tmp_path / "vae" / file), tmp_path / "link.pt"):
        back = load_autoencoder(given)
        assert_same(ae, back)
        # diffusers' own formula
        torch.testing.assert_close(back.normalize(z), (z - 0.1159) * 0.3611)


def test_diffusers_settings(tmp_path):
    """Statistics per channel; diffusers' default scale; none known, which a warning says."""
    file = write(tmp_path / f"{DIFFUSERS_FILE}.bin", to_diffusers(little()))
    with pytest.warns(UserWarning, match=".bin: no config.json beside it: .*32 groups"):
        assert load_autoencoder(file).latent_std.tolist() == [1, 1, 1]
    write(tmp_path / "config.json", settings())
    std = load_autoencoder(file).latent_std
    torch.testing.assert_close(std, torch.full((3,), 1 / 0.18215))
    write(tmp_path / "config.json", settings(scaling_factor=0.5, shift_factor=None,
          latents_mean=[1.0, 2.0, 3.0], latents_std=[4.0, 5.0, 6.0]))
    back = load_autoencoder(file)
    assert back.latent_mean.tolist() == [1, 2, 3] and back.latent_std.tolist() == [8, 10, 12]
    for text in ("{", "[]", settings(norm_num_groups=7), settings(scaling_factor=0)):
        write(tmp_path / "config.json", text)
        refused(file, "config.json")
    # beside CompVis' layout, of 32 groups, it belongs to something else
    assert same(little(), load_autoencoder(write(tmp_path / "ae.ckpt", to_compvis(little()))))


@pytest.mark.parametrize("layout", [to_compvis, to_diffusers])
@pytest.mark.filterwarnings("ignore:.*no config.json")
def test_without_quant_convolutions(tmp_path, layout):
    """Without quant convolutions (SD3, FLUX): what ours computes with identities in their place."""
    ae = small()
    for conv in (ae.quant_conv, ae.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    state = {key: value for key, value in layout(ae).items() if "quant_conv" not in key}
    assert_same(ae, load_autoencoder(write(tmp_path / "ae.pt", state)))


@pytest.mark.parametrize("layout", [to_compvis, to_diffusers, our_checkpoint])
@pytest.mark.filterwarnings("ignore:.*no config.json")
def test_only_rgb_autoencoders(tmp_path, layout):
    """RGB with alpha would fail in the first convolution: refused before."""
    refused(write(tmp_path / "ae.pt", layout(little(in_channels=4))), "images of 4 channels", "RGB")


def test_hash_covers_the_groups_of_the_norms():
    """Two that differ in norm_groups alone have the same weights and encode differently."""
    a, b = (small(dataclasses.replace(LITTLE, norm_groups=groups)) for groups in (8, 32))
    b.load_state_dict(a.state_dict())
    assert autoencoder_hash(a) != autoencoder_hash(b)
    b.config = dataclasses.replace(a.config)
    assert autoencoder_hash(a) == autoencoder_hash(b)


# ---------------------------------------------------------------------------- folders
FOLDERS = {         # what a folder holds, {name: number or text}; number 1 is the one to take
    "a variant of no known name": {f"{DIFFUSERS_FILE}.bf16.bin": 1, "README.md": "# VAE"},
    "fp16 before non_ema": {f"{DIFFUSERS_FILE}.non_ema.bin": 2, f"{DIFFUSERS_FILE}.fp16.bin": 1},
    "plain before all": {f"{DIFFUSERS_FILE}.fp16.bin": 2, f"{DIFFUSERS_FILE}.bin": 1},
    "a pipeline": {"model_index.json": "{}", f"vae/{DIFFUSERS_FILE}.fp16.bin": 1,
                   f"unet/{DIFFUSERS_FILE}.bin": 2, "v1-5-pruned.ckpt": 3},
    "our run": {"ckpt.pt": 1, "ckpt_100.pt": 2, "log.jsonl": ""},
    "a single file": {"vavae-imagenet256.pt": 1, "README.md": "# VA-VAE"},
    "a model in the hub's cache": {"refs/main": "bbb\n", f"snapshots/aaa/{DIFFUSERS_FILE}.bin": 2,
                                   f"snapshots/bbb/vae/{DIFFUSERS_FILE}.fp16.bin": 1},
}


def numbered(number):
    ae = little()
    ae.decoder.conv_out.bias.data.fill_(number)
    return ae


@pytest.mark.filterwarnings("ignore:.*no config.json")
@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder(tmp_path, what):
    """The plain file before variants; a pipeline's vae/; a run's last checkpoint."""
    for name, content in FOLDERS[what].items():
        if not isinstance(content, str):
            ae = numbered(content)
            content = to_diffusers(ae) if DIFFUSERS_FILE in name else to_compvis(ae)
        write(tmp_path / name, content)
    assert load_autoencoder(str(tmp_path)).decoder.conv_out.bias.tolist() == [1, 1, 1]


def test_a_hub_snapshot_of_links(tmp_path):
    """Its files lead into blobs/, where no config.json lies."""
    vae, blobs = tmp_path / "snapshots" / "aaa" / "vae", tmp_path / "blobs"
    write(blobs / "3f9a0c77", to_diffusers(little()))
    write(blobs / "77c0a9f3", settings(scaling_factor=0.25))
    vae.mkdir(parents=True)
    (vae / f"{DIFFUSERS_FILE}.bin").symlink_to("../../../blobs/3f9a0c77")
    (vae / "config.json").symlink_to("../../../blobs/77c0a9f3")
    write(tmp_path / "refs" / "main", "aaa")
    for given in (tmp_path, vae.parent, vae, vae / f"{DIFFUSERS_FILE}.bin"):
        assert load_autoencoder(given).latent_std.tolist() == [4, 4, 4]


def test_a_folder_without_a_clear_choice(tmp_path):
    """Nothing there, no weights, several files: what is there is named."""
    refused(tmp_path / "none.pt", "no such file", "train_ae.py", error=FileNotFoundError)
    refused(write(tmp_path / "a.msgpack", "x").parent, "here: none", error=FileNotFoundError)
    for name in ("a.ckpt", "b.bin"):
        write(tmp_path / name, to_compvis(little()))
    refused(tmp_path, "a.ckpt, b.bin", error=FileNotFoundError)


# ---------------------------------------------------------------------------- files
@pytest.mark.parametrize("format", ["torch.save", "torch.save of 2020", "safetensors"])
@pytest.mark.parametrize("name", ["3f9a0c77", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("net", [little(), tiny(SiT)], ids=["ae", "sit"])
def test_the_content_says_the_format(tmp_path, name, format, net):
    """No suffix, a wrong one: the first bytes tell."""
    if format == "safetensors":
        state = {key: value.contiguous() for key, value in net.state_dict().items()}
        write(tmp_path / "x.sft", state).rename(tmp_path / name)
    else:
        torch.save(net.state_dict(), tmp_path / name,
                   _use_new_zipfile_serialization=format == "torch.save")
    assert same(load(net, tmp_path / name), net)


class Malice:
    """Pickles as a call of a function that makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return make_folder, (self.target,)


def make_folder(path):
    os.mkdir(path)


@pytest.mark.parametrize("net", [little(), tiny(SiT)], ids=["ae", "sit"])
def test_files_that_are_no_checkpoint(tmp_path, net):
    """A git-lfs pointer, a web page, cut short, another object or model: one line, nothing run."""
    path, whole = tmp_path / "model.pt", write(tmp_path / "whole.pt", net.state_dict()).read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n" * 9,
                    b"<!DOCTYPE html><html>", b'{"error": {}}', whole[:len(whole) // 2],
                    whole[:-100]):
        refused(write(path, content), "cannot be read", "git-lfs", net=net)
    refused(write(tmp_path / "x.safetensors", "Entry not found"), "cannot be read", net=net)
    for thing, word in [([torch.zeros(2)], "list"), (torch.zeros(2), "Tensor"), ({}, "dict"),
                        ({"stage0.fc.weight": torch.zeros(2)}, "stage0.fc.weight")]:
        refused(write(path, thing), word, net=net)
    for zipped in (True, False):
        state = {"state_dict": net.state_dict(), "x": Malice(str(tmp_path / "made"))}
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        refused(path, f"{__name__}.make_folder", net=net)
    assert not (tmp_path / "made").exists()


def test_safetensors_is_optional(tmp_path, monkeypatch):
    """Without the package only its files fail, and the message says what to install."""
    path = write(tmp_path / "model.safetensors", to_compvis(little()))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(path, "pip install safetensors")


def test_a_lightning_checkpoint(tmp_path, monkeypatch):
    """Harmless objects beside the weights, as keys and with state: read without their packages."""
    def setstate(self, state):
        raise AssertionError("foreign code was run")
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__,
                                                          "__setstate__": setstate})
    callback = module.ModelCheckpoint()
    callback.best = 1.0
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", module.__name__):
            patch.setitem(sys.modules, name, module)
        path = write(tmp_path / "last.ckpt", {
            "state_dict": to_compvis(little()), "hyper_parameters": {"x": callback, "kind": dict},
            "callbacks": {module.ModelCheckpoint: {"best": np.float64(1), "all": np.arange(3.0)}},
            "args": argparse.Namespace(path=pathlib.PosixPath("data"), seed=0),
            "log": collections.defaultdict(list, loss=[1.0, 2.0]), "version": torch.__version__,
            "other": (frozenset({1}), slice(3), ..., types.SimpleNamespace(depth=3))})
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


def latent_diffusion(net):
    """A first stage among other modules, with its loss."""
    state = renamed("first_stage_model.")(net)
    extra = ("first_stage_model.loss.logvar", "model.diffusion_model.out.0.weight", "betas",
             "cond_stage_model.x", "model_ema.decay", "foundation_model.cls_token")
    return {"state_dict": state | {key: torch.zeros(5) for key in extra}, "epoch": 3}


WRAPPED = {         # network -> what a file holds
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "compiled, then parallel": lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
    "parallel, then compiled": renamed("_orig_mod.module."),
    "compiled inside": renamed("", "_orig_mod."),
    "averaged": lambda net: AveragedModel(net).state_dict(),
    "FSDP": renamed("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    "vae.": renamed("vae."),
    "Lightning": lambda net: {"state_dict": renamed("model.module._orig_mod.")(net)},
    "latent diffusion": latent_diffusion,
    "module": lambda net: {"module": net.state_dict(), "dp_world_size": 8},
    "ema before model": lambda net: {"model": other(net), "ema": renamed("module.")(net)},
    "ema. before model.": lambda net: renamed("ema.")(net) | {
        f"model.{key}": value for key, value in other(net).items()},
    "inside state_dict": lambda net: {"state_dict": {"model": other(net), "ema": net.state_dict()}},
    "no ema yet": lambda net: {"model": net.state_dict(), "ema": None, "epoch": 3},
}


@pytest.mark.parametrize("net", [little(), tiny(SiT)], ids=["ae", "sit"])
@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_state_dicts(tmp_path, how, net):
    """Around the weights or before their names, and nested: autoencoders and transformers alike."""
    assert same(load(net, write(tmp_path / "model.pt", WRAPPED[how](net))), net)


def test_several_networks_in_a_file(tmp_path):
    """Each reader takes its own; of two that would do it takes none."""
    ae, sit = little(), tiny(SiT)
    path = write(tmp_path / "all.pt", {"vae": to_compvis(ae), "model": other(sit),
                                       "ema": sit.state_dict()})
    assert same(load(ae, path), ae) and same(load(sit, path), sit)
    write(path, {"vae": to_compvis(ae), "model": to_compvis(ae)})
    refused(path, "2 networks", "vae.decoder", "model.decoder")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16,
                                   torch.float64])
@pytest.mark.parametrize("net", [little(), tiny(SiT)], ids=["ae", "sit"])
def test_every_floating_point_is_read(tmp_path, dtype, net):
    """As float32, exactly the values in the file."""
    state = {key: value.to(dtype) for key, value in net.state_dict().items()}
    back = load(net, write(tmp_path / "model.pt", state)).state_dict()
    assert all(torch.equal(back[key], value.float()) for key, value in state.items())
    assert all(value.dtype == torch.float32 for value in back.values())


@pytest.mark.parametrize("change, words", [
    (lambda x: x * float("nan"), "not finite"), (lambda x: x / 0, "not finite"),
    (lambda x: x.to(torch.int8), "torch.int8"), (lambda x: torch.zeros(7, 5, 2), "(7, 5, 2)"),
    (lambda x: None, "missing")])
@pytest.mark.parametrize("net, state, name", [
    (little(), to_compvis(little()), "encoder.mid.block_2.conv2.weight"),
    (little(), to_diffusers(little()), "decoder.mid_block.resnets.0.conv2.weight"),
    (tiny(SiT), tiny(SiT).state_dict(), "x_embedder.proj.weight")], ids=["compvis", "diffusers", "sit"])
@pytest.mark.filterwarnings("ignore:.*no config.json")
def test_a_wrong_tensor_is_named(tmp_path, net, state, name, change, words):
    """Diverged, quantised, of another shape, missing, of no known use: named."""
    path = write(tmp_path / "model.pt", state | {name: change(state[name])})
    key = name.replace("mid_block.resnets.0", "mid.block_1")        # by our name
    refused(path, key, words, net=net)
    refused(write(path, state | {"quantize.x": torch.zeros(2)}), "quantize.x is (2,)", net=net)


# ---------------------------------------------------------------------------- transformers
def test_repa_files(tmp_path):
    """EMA before model, no DDP prefix, no projectors; the Namespace beside them is no obstacle."""
    source = tiny(SiT)
    ema = renamed("module.")(source) | {"module.projectors.0.0.weight": torch.zeros(9, 32)}
    path = write(tmp_path / "repa.pt", {"model": other(source), "ema": ema, "opt": {"state": {}},
                 "steps": 3, "args": argparse.Namespace(model="SiT-B/2", seed=0)})
    assert same(load(source, path), source)


def save_learn_sigma(model, path):
    """What the original SiT writes: per pixel of a patch C velocity rows, then C variance rows."""
    state = model.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (4, 3))              # (p*p, C, ...)
        state[key] = torch.cat([rows, torch.full_like(rows, 9.0)], dim=1).flatten(0, 1)
    return write(path, state)


def test_time_of_the_original_sit_is_reversed(tmp_path):
    """
    SiT: x_t = t x + (1 - t) eps and velocity x - eps. Loaded, it must be -SiT(x, 1 - t), and saving
    it keeps that.
    """
    original, (x, t, y) = tiny(SiT), batch()
    loaded = load(original, save_learn_sigma(original, tmp_path / "sit.pt"))
    want = -original(x, 1 - t, y)
    torch.testing.assert_close(loaded(x, t, y), want, rtol=1e-4, atol=1e-4)
    assert same(load(original, write(tmp_path / "ours.pt", {"ema": loaded.state_dict()})), loaded)
    small_one = tiny(SiT, depth=2)
    with pytest.raises(ValueError, match="sit.pt: does not fit this SiT: blocks.2.*unknown"):
        load_transformer(small_one, tmp_path / "sit.pt")


@pytest.mark.parametrize("sampler", ["ode", "em"])
def test_the_original_sit_samples_towards_the_data(tmp_path, sampler):
    """
    A SiT that predicts x - eps = c whatever it sees moves every noise by c; with the wrong sign it
    would end at -c.
    """
    original = SiT((6, 10), 3, 0, **TINY)
    c = torch.tensor([50.0, -30.0, 20.0])
    with torch.no_grad():
        original.final_layer.linear.bias.copy_(c.repeat(4))     # rows are (row, column, channel)
    path = save_learn_sigma(original, tmp_path / "sit.pt")
    loaded = load_transformer(SiT((6, 10), 3, 0, **TINY), path)
    start = torch.zeros(2, 3, 6, 10)                        # x_t = (1 - t) c solves the SDE's drift
    if sampler == "ode":
        start = torch.randn(2, 3, 6, 10)
    end = Interpolant().sample(loaded, start.shape, steps=7, sampler=sampler,
                               noise=lambda shape: start)
    torch.testing.assert_close(end, start + c.view(3, 1, 1), rtol=1e-5, atol=1e-4)


def test_uvit_files_with_and_without_the_final_convolution(tmp_path):
    """Bare state dicts; U-ViT-H was trained with conv=False, which equals an identity kernel."""
    source, (x, t, y) = tiny(UViT), batch()
    assert same(load(source, write(tmp_path / "full.pth", source.state_dict())), source)
    state = {key: w for key, w in source.state_dict().items() if not key.startswith("final_layer")}
    loaded = load(source, write(tmp_path / "h.pth", state))
    source.final_layer = nn.Identity()
    torch.testing.assert_close(loaded(x, 1000 * t, y), source(x, 1000 * t, y))


def test_a_transformer_of_another_kind_or_size(tmp_path):
    """One line with the file's name and a tensor."""
    path = write(tmp_path / "sit.pt", {"stage": "diffusion", "ema": tiny(SiT).state_dict()})
    for model, words in [(tiny(SiT, num_classes=9), "embedding_table"), (tiny(UViT), "does not fit"),
                         (tiny(SiT, input_size=8), "pos_embed")]:
        with pytest.raises(ValueError, match=f"sit.pt: .*{words}"):
            load_transformer(model, tmp_path)
    refused(path, "stage 'diffusion'")
