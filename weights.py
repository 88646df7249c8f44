"""
Other people's weights: a file becomes a network of vae.py or dit.py, or is refused in one line.

    load_autoencoder   our ckpt.pt, and files in two layouts (SD-VAE, EQ-VAE, VA-VAE, SD3, FLUX):
                       CompVis' with our own names, also inside a whole latent diffusion model;
                       diffusers', a folder or its weights alone, with names of its own (DIFFUSERS)
    load_transformer   our ckpt.pt and REPA's; the original SiT's, whose time runs backwards;
                       U-ViT's, a bare state dict

What a file holds is read off the names and shapes of its tensors. No code in it is run: beside
tensors and plain values it may hold a few known classes, any other is refused by name. Tensors come
to the CPU, no random number is drawn. Errors name the file first: FileNotFoundError or ValueError.
"""
import argparse
import json
import math
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import nn

from dit import UViT
from vae import AEConfig, AutoencoderKL


# ---------------------------------------------------------------------------- files
def unpickle(path, classes):
    """What torch.save wrote, with no class in it but torch's own, plain data and these classes."""
    with torch.serialization.safe_globals(classes):
        return torch.load(path, map_location="cpu", weights_only=True)


def unwrap(data, *names):
    """The dictionary under the first of these names that has one, or data as it is."""
    for name in names:
        if isinstance(data, dict) and isinstance(data.get(name), dict):
            return data[name]
    return data


# What training frameworks leave in a .ckpt beside the weights (callbacks, hyperparameters): never
# imported or run, see Inert.
BAGGAGE = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy)\..+"
                     r"|builtins\.(dict|list|int|float|str|bool)|typing\.Any"
                     r"|collections\.defaultdict|argparse\.Namespace")


class Inert:
    """Stands in for a foreign class in a pickle: takes any arguments and state, does nothing."""
    __init__ = __setstate__ = lambda self, *args, **kwargs: None


def read_file(path):
    """
    A .json or .safetensors file, or anything torch.save wrote -> the object in it.
    raises   ValueError if it is unreadable, or holds a class that is neither torch's nor BAGGAGE
    """
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # optional: only these files need it
            return load_file(path)
        foreign = []
        if zipfile.is_zipfile(path):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = sorted(name for name in foreign if not BAGGAGE.fullmatch(name))
        if not refused:
            return unpickle(path, [(Inert, name) for name in foreign])
    except ImportError:
        raise ValueError(f"{path}: reading it needs `pip install safetensors`; or give the "
                         "model's .bin or .ckpt") from None
    except Exception as err:    # a damaged file breaks its reader in any way: quote the reader
        # files of before 2020: torch.load names the class
        refused = re.findall(r"GLOBAL (\S+)", str(err))
        if not refused:
            said = str(err).split("WeightsUnpickler error:")[-1].strip().split("\n")[0][:160]
            raise ValueError(f"{path}: cannot be read, perhaps cut short or of another format "
                             f"({type(err).__name__}: {said})") from err
    raise ValueError(f"{path}: holds {refused[0]}, which is not plain data and is not run; "
                     "give its state dict alone")


# ---------------------------------------------------------------------------- autoencoders
# Tensors that may be in a file and are not the autoencoder's.
EXTRA = ("loss.", "discriminator.", "foundation_model.", "linear_proj", "model_ema.")
DIFFUSERS = {   # parts of our names -> of diffusers', in this order
    ".down.": ".down_blocks.", ".up.": ".up_blocks.", ".block.": ".resnets.",
    ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.", ".mid.": ".mid_block.",
    ".block_1.": ".resnets.0.", ".block_2.": ".resnets.1.", ".nin_shortcut.": ".conv_shortcut.",
    ".norm_out.": ".conv_norm_out.", ".attn.": ".attentions.", ".attn_1.": ".attentions.0.",
    ".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.",
    ".proj_out.": ".to_out.0."}
DIFFUSERS_OLD = {   # Stable Diffusion's own, of 2022
    ".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def diffusers_name(key, levels, old=False):
    """Our state-dict key -> diffusers', whose decoder counts levels from the latent outwards."""
    key = re.sub(r"\.up\.(\d+)", lambda m: f".up.{levels - 1 - int(m[1])}", key)
    for table in (DIFFUSERS, DIFFUSERS_OLD) if old else (DIFFUSERS,):
        for ours, theirs in table.items():
            key = key.replace(ours, theirs)
    return key


def find_file(path):
    """An existing file, or a diffusers folder -> the file with the weights, config.json or {}."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; train an autoencoder with "
                                "train_ae.py or give a released one")
    if not path.is_dir():
        return path, {}
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    found = [path / name for name in names if (path / name).exists()]
    if not found:
        raise FileNotFoundError(f"{path}: no diffusion_pytorch_model.safetensors or .bin in this "
                                "folder; give a file")
    config_file = path / "config.json"
    settings = read_file(config_file) if config_file.exists() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config_file}: holds a {type(settings).__name__}, not a dictionary of "
                         "settings")
    if settings.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(f"{config_file}: describes {settings['_class_name']}; only an "
                         "AutoencoderKL can be read")
    return found[0], settings


def foreign_weights(file, data, settings):
    """
    What a CompVis or diffusers file says about its autoencoder.
    data      the dictionary in the file; settings: diffusers' config.json, or {}
    returns   AEConfig inferred from names and shapes (32 groups unless config.json says otherwise),
              {the file's names: tensors}
    raises    ValueError if the outline of an autoencoder is not there
    """
    data = unwrap(unwrap(data, "state_dict"), "model")
    weights = {key: value for key, value in data.items()
               if isinstance(key, str) and isinstance(value, torch.Tensor)}
    prefix = "first_stage_model."                       # inside a whole latent diffusion model
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()
                   if key.startswith(prefix)}
    if "latent_mean" in weights:
        raise ValueError(f"{file}: a state dict of this code without its ae_config; give the "
                         "whole ckpt.pt")
    level = r"encoder\.down(?:_blocks)?\.(\d+)\."       # both layouts number these alike
    widths = {}                                         # level -> widths of its blocks
    attn_levels = set()
    for key, tensor in weights.items():
        if m := re.fullmatch(level + r"(?:block|resnets)\.\d+\.conv1\.weight", key):
            widths.setdefault(int(m[1]), []).append(tensor.shape[0])
        elif m := re.match(level + r"(?:attn|attentions)\.", key):
            attn_levels.add(int(m[1]))
    ends = {"encoder.conv_in.weight", "decoder.conv_in.weight"}
    if 0 not in widths or not ends <= weights.keys():
        raise ValueError(f"{file}: no encoder.conv_in, encoder levels and decoder.conv_in; neither "
                         "a ckpt.pt of train_ae.py nor an autoencoder in CompVis' or diffusers' "
                         "layout")
    ch, in_channels = weights["encoder.conv_in.weight"].shape[:2]
    d = weights["decoder.conv_in.weight"].shape[1]
    config = AEConfig([widths[i][0] // ch for i in sorted(widths)], d, in_channels, ch,
                      num_res_blocks=len(widths[0]), attn_levels=sorted(attn_levels),
                      norm_groups=settings.get("norm_num_groups", 32))
    if not any("quant_conv." in key for key in weights):    # SD3, FLUX: the same as with identities
        for name, width in (("quant_conv", 2 * d), ("post_quant_conv", d)):
            weights[f"{name}.weight"] = torch.eye(width)[:, :, None, None]
            weights[f"{name}.bias"] = torch.zeros(width)
    return config, weights | {"latent_mean": torch.zeros(d), "latent_std": torch.ones(d)}


def fill(ae, weights, file):
    """
    Give an autoencoder that was built on the meta device the tensors of a file.
    weights  {the file's names: tensors} in either layout; what is used is taken out
    raises   ValueError naming the first tensor that is missing, mis-shaped, not finite or unknown
    """
    levels = len(ae.config.ch_mult)
    diffusers = any(str(key).startswith("encoder.down_blocks.") for key in weights)
    old = any(".query." in str(key) for key in weights)
    state = {}
    for key, wanted in ae.state_dict().items():
        name = diffusers_name(key, levels, old) if diffusers else key
        if not isinstance(weights.get(name), torch.Tensor):
            raise ValueError(f"{file}: {name} is missing; part of an autoencoder, or another "
                             "architecture")
        tensor = weights.pop(name)
        if ".attn" in key and tensor.ndim == 2 == wanted.ndim - 2:
            tensor = tensor[:, :, None, None]           # a linear layer is a 1x1 convolution
        if tensor.shape != wanted.shape:
            raise ValueError(f"{file}: {name} is {tuple(tensor.shape)}, this architecture needs "
                             f"{tuple(wanted.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} is not finite, so the training diverged; take an "
                             "earlier checkpoint")
        state[key] = tensor
    if unknown := [name for name in weights if not str(name).startswith(EXTRA)]:
        raise ValueError(f"{file}: {unknown[0]} is no part of this autoencoder; another "
                         "architecture")
    ae.to_empty(device="cpu").load_state_dict(state)    # copies, to float32


def load_autoencoder(path):
    """
    An autoencoder from disk: float32, in eval mode. The global random state is not touched.
    path     our ckpt.pt; a CompVis .ckpt/.pt/.pth/.safetensors; a diffusers AutoencoderKL, as its
             folder with config.json or as the weights file alone
    returns  AutoencoderKL. Latent statistics come from our checkpoint, or from the config.json in a
             diffusers folder (diffusers computes (z - shift_factor) * scaling_factor); any other
             file holds none and leaves mean 0, std 1
    raises   FileNotFoundError, or ValueError naming the file and the first tensor that does not fit
    """
    file, settings = find_file(Path(path))
    data = read_file(file)
    if not isinstance(data, dict):
        raise ValueError(f"{file}: holds a {type(data).__name__}, not a dictionary of tensors")
    if "stage" in data and data["stage"] != "ae":
        raise ValueError(f"{file}: a checkpoint of stage {data['stage']!r}, not of an autoencoder; "
                         "give one of train_ae.py")
    try:
        if "stage" in data:
            config = AEConfig(**data["ae_config"])
            weights = dict(data["model"])
        else:
            config, weights = foreign_weights(file, data, settings)
        with torch.device("meta"):                      # no memory yet, no random draws
            ae = AutoencoderKL(config)
    except Exception as err:                            # of a foreign shape, number or type
        if str(err).startswith(str(file)):
            raise
        raise ValueError(f"{file}: builds no autoencoder of this version ({err!r:.200}); give a "
                         "whole ckpt.pt of train_ae.py") from err
    fill(ae, weights, file)
    if settings:
        mean = settings.get("latents_mean") or settings.get("shift_factor") or 0.0
        std = torch.as_tensor(settings.get("latents_std") or 1.0)
        ae.set_latent_stats(mean, std / (settings.get("scaling_factor") or 1.0))
    return ae.eval()


# ---------------------------------------------------------------------------- transformers
def turn_round(state, C):
    """
    Rewrite a state dict of the original SiT for our time and sign, C latent channels.
    It runs from t=0 noise to t=1 data and predicts x - eps (transport/path.py, ICPlan), hence
    v(x, t) = -v_SiT(x, 1 - t). The variance channels go, the sign goes into the last layer and the
    reversal into the first time layer: cos and sin of (1 - t) f are linear in those of t f.
    """
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (-1, 2 * C))     # by (row, column) of the patch, channel
        state[key] = -rows[:, :C].flatten(0, 1)
    # the frequencies of sinusoid
    f = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    key = "t_embedder.mlp.0.weight"
    a, b = state[key].double().chunk(2, dim=1)          # act on cos and sin of (1 - t) f
    state[key] = torch.cat([a * f.cos() + b * f.sin(), a * f.sin() - b * f.cos()], dim=1)


def load_transformer(model, path):
    """
    Fill a model with the weights of a SiT, REPA or U-ViT file, or of one of ours, and return it.
    A dict with "ema" or "model" (ema wins) or a bare state dict; "module." is stripped, REPA's
    projectors are dropped. Two kinds of file are rewritten, so that the loaded network is an
    ordinary one and stays so when it is saved again:
      original SiT  known by twice the output channels (learn_sigma); see turn_round
      U-ViT-H       trained with conv=False: the missing final convolution becomes the identity
    What a file was trained on cannot be told from its keys: DiT files (eps-prediction) and
    U-ViT-L/2 on ImageNet-256 (continuous VP-SDE) load, but belong to neither process of dit.py.
    raises  FileNotFoundError; ValueError for a file that is no checkpoint, or does not fit the
            model's depth, width, size or classes
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; give a SiT, REPA or U-ViT checkpoint")
    try:
        data = unpickle(path, [argparse.Namespace])     # SiT and REPA keep their flags in the file
    except Exception as error:                          # what is no pickle fails in a dozen ways
        raise ValueError(f"{path}: not a checkpoint of tensors and plain values "
                         f"({error!r:.100})") from error
    data = unwrap(data, "ema", "model")
    if not isinstance(data, dict) or not all(torch.is_tensor(value) for value in data.values()):
        raise ValueError(f"{path}: neither a state dict nor a dict with one under 'ema' or 'model'")
    state = {key.removeprefix("module."): value for key, value in data.items()
             if "projectors." not in key}

    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    last = state.get("final_layer.linear.weight")
    if last is not None and last.shape[0] == 2 * want.get("final_layer.linear.weight", (0,))[0]:
        turn_round(state, model.in_channels)
    if isinstance(model, UViT) and not any(key.startswith("final_layer.") for key in state):
        state["final_layer.weight"] = nn.init.dirac_(torch.empty(model.final_layer.weight.shape))
        state["final_layer.bias"] = torch.zeros(model.in_channels)

    have = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [key for key in sorted(have.keys() | want.keys()) if have.get(key) != want.get(key)]
    if wrong:
        there = have.get(wrong[0], "missing")
        here = want.get(wrong[0], "unknown")
        raise ValueError(f"{path}: does not fit this {type(model).__name__} ({len(wrong)} of "
                         f"{len(want)} entries): {wrong[0]} is {there} in the file and {here} in "
                         "the model; build the model with the file's size, patch, input_size, "
                         "in_channels and num_classes")
    model.load_state_dict(state)
    return model
