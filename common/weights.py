"""
Load weights: released autoencoders and transformers, and the checkpoints of our own runs.

    load_autoencoder   our ckpt.pt; CompVis layout, same names as ours (SD-VAE, VA-VAE), alone or
                       inside a latent diffusion model; diffusers (SD-VAE, EQ-VAE, SD3, FLUX)
    load_transformer   our ckpt.pt; REPA; the original SiT, whose time is reversed; U-ViT
    load_diffusion     a run of train_diffusion.py with its autoencoder, ready to sample
    export_diffusers   an autoencoder as a folder for diffusers' AutoencoderKL.from_pretrained:
                       python -m common.weights export --ae FILE --out DIR

The file format is detected from the first bytes, the network from tensor names and shapes. Code in
a file is never run. Tensors are loaded to the CPU, and no random numbers are drawn.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from common import run
from common.data import images_hash, open_data
from dit import DDPM, MODELS, Interpolant, SiT, UViT
from vae import AEConfig, AutoencoderKL


# ---------------------------------------------------------------------------- files
def find_file(path, hint):
    """A file itself; in a folder or its vae/, ckpt.pt, diffusers' weights or the only file."""
    path, suffixes = Path(path), (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth")
    if path.is_file():
        return path
    files = [file for file in (*path.glob("*"), *path.glob("vae/*"))
             if file.suffix in suffixes and file.is_file()]
    known = [file for file in files if file.name.startswith(("ckpt.pt", "diffusion_pytorch_model"))]
    if not known and len(files) != 1:
        raise FileNotFoundError(f"{path}: no such file, nor a folder with ckpt.pt, diffusion_pyt"
                                f"orch_model.* or one file of weights ({len(files)} are); {hint}")
    # prefer the plain file to variants such as .fp16
    return min(known or files, key=lambda file: (len(file.parts), file.name.count("."), file.name))


# ---------------------------------------------------------------------------- state dicts
# Name parts inserted by torch's wrappers (compile, DDP, FSDP, activation checkpointing).
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
EMA = {"ema", "ema_model", "model_ema", "ema_state_dict", "shadow"}
# Tensors saved with the network but not part of it.
EXTRA = ("loss.", "discriminator.", "foundation_model.", "linear_proj", "projectors.", "n_averaged",
         "model_ema.")


def named_tensors(data, prefix=""):
    """Yields (name, tensor) for all tensors in nested dictionaries, keys joined by dots."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from named_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            parts = f"{prefix}{key}".split(".")
            yield ".".join(part for part in parts if part not in WRAPPERS), value


def find_network(file, data, anchor):
    """
    The state dict {name: tensor} of the one network in a file that has a tensor named `anchor`; EMA
    weights are preferred. Anything before the anchor, a prefix or enclosing dictionaries, is
    removed: {"ema": {"module.x": tensor}} and {"ema.x": tensor} both give {"x": tensor}.
    """
    tensors = dict(named_tensors(data if isinstance(data, dict) else {}))
    found = [name[:-len(anchor)] for name in tensors if f".{name}".endswith(f".{anchor}")]
    found = [prefix for prefix in found if EMA & set(prefix.split("."))] or found
    run.need(len(found) == 1, f"{file}: {len(found)} networks in it have a tensor {anchor}; give "
             f"one's state dict; it is a {type(data).__name__} with tensors {[*tensors][:5]}")
    network = {name[len(found[0]):]: tensor for name, tensor in tensors.items()
               if name.startswith(found[0])}
    return {name: tensor for name, tensor in network.items() if not name.startswith(EXTRA)}


def fill(network, file, weights):
    """Load {name: tensor} as float32; ValueError naming the first tensor that does not fit."""
    own = network.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        found = tuple(weights[name].shape) if name in weights else "missing"
        wanted = tuple(own[name].shape) if name in own else "unknown"
        run.need(found == wanted, f"{file}: does not fit this {type(network).__name__}: {name} is "
                 f"{found} in the file and {wanted} in the model")
        values = weights[name].float()                  # float8 supports few other operations
        as_trained = weights[name].is_floating_point() or not own[name].is_floating_point()
        run.need(as_trained and values.isfinite().all(), f"{file}: {name}, {weights[name].dtype}, "
                 "is quantised or not finite; give other weights")
        weights[name] = values
    network.load_state_dict(weights)


# ---------------------------------------------------------------------------- autoencoders
DIFFUSERS = {   # our name parts -> diffusers', applied in this order
    ".down.": ".down_blocks.", ".up.": ".up_blocks.", ".mid.": ".mid_block.",
    ".block.": ".resnets.", ".block_1.": ".resnets.0.", ".block_2.": ".resnets.1.",
    ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.",
    ".nin_shortcut.": ".conv_shortcut.", ".norm_out.": ".conv_norm_out.",
    ".attn.": ".attentions.", ".attn_1.": ".attentions.0.", ".norm.": ".group_norm.",
    ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
DIFFUSERS_2022 = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
                  ".proj_attn.": ".to_out.0."}


def diffusers_name(key, levels):
    """Our state-dict key -> diffusers', whose decoder numbers levels from the latent outwards."""
    key = re.sub(r"\.up\.(\d+)", lambda m: f".up.{levels - 1 - int(m[1])}", key)
    for part, diffusers_part in DIFFUSERS.items():
        key = key.replace(part, diffusers_part)
    return key


def read_settings(file):
    """(norm groups, latent mean, latent std) from the config.json beside diffusers' weights."""
    path = file.parent / "config.json"
    if not path.exists():
        warnings.warn(f"{file}: no config.json beside it: norms are taken to have 32 groups, "
                      "latents mean 0 and std 1", stacklevel=3)
        return 32, 0.0, 1.0
    given = {k: v for k, v in json.loads(path.read_text()).items() if v is not None}
    # diffusers: (z - latents_mean or shift_factor) / latents_std * scaling_factor
    mean = given.get("latents_mean", given.get("shift_factor", 0.0))
    std = torch.tensor(given.get("latents_std", 1.0)) / given.get("scaling_factor", 0.18215)
    return given.get("norm_num_groups", 32), mean, std          # diffusers' defaults


def infer_config(weights, groups):
    """AEConfig inferred from names and shapes of weights in CompVis or diffusers layout."""
    level = r"encoder\.down(?:_blocks)?\.(\d+)\."       # both layouts number encoder levels alike
    blocks = [re.match(level + r".*conv1\.weight", name) for name in weights]
    widths = [(int(m[1]), len(weights[m[0]])) for m in blocks if m]     # per residual block
    attention = [re.match(level + "att", name) for name in weights]
    attn_levels = {int(m[1]) for m in attention if m}
    ch, in_channels = weights["encoder.conv_in.weight"].shape[:2]
    d = weights["decoder.conv_in.weight"].shape[1]
    mult = [width // ch for _, width in sorted(dict(widths).items())]
    return AEConfig(mult, d, in_channels, ch, len(widths) // len(mult), sorted(attn_levels), groups)


def load_autoencoder(path):
    """
    An AutoencoderKL in float32 and eval mode, from a file or the folder that holds it. Latent
    statistics come from our ckpt.pt or diffusers' config.json; otherwise mean 0, std 1. Its
    attribute `trained` holds our ckpt.pt's flags and the hash of its images; {} for other files.
    raises   FileNotFoundError, or ValueError naming the file and the first tensor that does not fit
    """
    file = find_file(path, "--ae names an autoencoder, of train_ae.py or a released one")
    data = run.read_weights(file)
    stage = data.get("stage") if isinstance(data, dict) else None
    run.need(stage in (None, "ae"), f"{file}: is of stage {stage!r}, not from train_ae.py")
    weights = data["model"] if stage else find_network(file, data, "encoder.conv_in.weight")
    diffusers = any(name.startswith("encoder.down_blocks.") for name in weights)
    groups, mean, std = read_settings(file) if diffusers else (32, 0.0, 1.0)
    config = AEConfig(**data["ae_config"]) if stage else infer_config(weights, groups)
    with torch.device("meta"):                          # no random draws
        ae = AutoencoderKL(config).to_empty(device="cpu")
    ae.set_latent_stats(mean, std)
    if diffusers:
        for part, later_part in DIFFUSERS_2022.items():
            weights = {name.replace(part, later_part): w for name, w in weights.items()}
        our_keys = {diffusers_name(key, len(config.ch_mult)): key for key in ae.state_dict()}
        # diffusers' linear layers in attention are 1x1 convolutions here
        weights = {our_keys.get(name, name): w[:, :, None, None] if w.ndim == 2 else w
                   for name, w in weights.items()}
    for conv in (ae.quant_conv, ae.post_quant_conv):    # SD3, FLUX: none, so use identities
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    optional = ("latent_", "quant_conv.", "post_quant_conv.")
    weights = {k: w for k, w in ae.state_dict().items() if k.startswith(optional)} | weights
    fill(ae, file, weights)
    ae.trained = data["args"] | dict(images=data.get("images")) if stage else {}
    return ae.eval()


def export_diffusers(ae, out):
    """
    Write an autoencoder to the folder `out` in diffusers' layout: config.json and weights (as
    safetensors if installed). load_autoencoder restores the weights bit for bit.
    raises   ValueError if the folder is not empty
    """
    out, config, levels = Path(out), ae.config, len(ae.config.ch_mult)
    run.need(not out.exists() or not any(out.iterdir()), f"--out {out}: is not empty")
    attention = ["Attn" * (level in config.attn_levels) for level in range(levels)]
    settings = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": config.in_channels,
        "out_channels": config.in_channels, "latent_channels": config.latent_channels,
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "layers_per_block": config.num_res_blocks, "norm_num_groups": config.norm_groups,
        "down_block_types": [f"{attn}DownEncoderBlock2D" for attn in attention],
        "up_block_types": [f"{attn}UpDecoderBlock2D" for attn in reversed(attention)],
        # per channel, unlike Stable Diffusion's single scaling factor
        "latents_mean": ae.latent_mean.flatten().tolist(),
        "latents_std": ae.latent_std.flatten().tolist(), "scaling_factor": 1.0}
    weights = {}
    for key, tensor in ae.state_dict().items():
        if not key.startswith("latent_"):
            linear = ".attn" in key and tensor.ndim == 4   # 1x1 convolution here
            weights[diffusers_name(key, levels)] = tensor[:, :, 0, 0] if linear else tensor
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    try:
        from safetensors.torch import save_file
        save_file(weights, out / "diffusion_pytorch_model.safetensors")
    except ImportError:
        torch.save(weights, out / "diffusion_pytorch_model.bin")


# ---------------------------------------------------------------------------- transformers
def reverse_time(weights, C):
    """
    Convert weights of the original SiT (C latent channels) in place to our time and sign.
    Its t runs from noise to data and it predicts x - eps (transport/path.py, ICPlan), so
    v(x, t) = -v_SiT(x, 1 - t).
    """
    # last layer: drop the variance channels and flip the sign
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = weights[key].unflatten(0, (-1, 2 * C))   # (row and column in patch, channel, ...)
        weights[key] = -rows[:, :C].flatten(0, 1)
    # first time layer: reverse t; cos and sin of (1 - t) f are linear in cos and sin of t f
    f = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    key = "t_embedder.mlp.0.weight"
    a, b = weights[key].double().chunk(2, dim=1)        # act on cos and sin of (1 - t) f
    weights[key] = torch.cat([a * f.cos() + b * f.sin(), a * f.sin() - b * f.cos()], dim=1)


def load_transformer(model, path):
    """
    Load a SiT, REPA, U-ViT or own checkpoint into a model and return the model.
    path  a file, or a folder with one. The original SiT (recognised by its variance channels) is
          converted to our time; U-ViT-H, which has no final convolution, gets an identity.
    Tensor names do not reveal the training objective: sample U-ViT-H with DDPM("sd"), U-ViT-L on
    ImageNet 256 with DDPM("vp"). DiT (eps-prediction) loads, but no process in dit.py fits it.
    raises  FileNotFoundError; ValueError naming the file and the first tensor that does not fit
    """
    file, state = find_file(path, "give a SiT, REPA or U-ViT checkpoint"), model.state_dict()
    anchor = "patch_embed.proj.weight" if isinstance(model, UViT) else "x_embedder.proj.weight"
    weights = find_network(file, run.read_weights(file), anchor)
    if isinstance(model, UViT) and "final_layer.weight" not in weights:
        weights["final_layer.weight"] = nn.init.dirac_(torch.empty_like(model.final_layer.weight))
        weights["final_layer.bias"] = torch.zeros_like(model.final_layer.bias)
    bias = "final_layer.linear.bias"
    if isinstance(model, SiT) and len(weights.get(bias, ())) == 2 * len(state[bias]):
        reverse_time(weights, model.in_channels)
    fill(model, file, weights)
    return model


# ---------------------------------------------------------------------------- runs
def autoencoder_hash(ae):
    """16 hex digits hashing configuration and weights, without the latent statistics."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(ae.config)).encode())
    for name, tensor in sorted(ae.state_dict().items()):
        if not name.startswith("latent_"):              # they depend on the images
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_files(args):
    """The checkpoints a command reads: --ckpt; with --every, all ckpt_<step>.pt of those runs."""
    places = args.ckpt or [run.newest("diffusion", args.preset, "--ckpt")]
    files = []
    for place in map(Path, places):
        found = [place / "ckpt.pt" if place.is_dir() else place]
        if args.every:                                  # except step 0, the untrained network
            kept = found[0].parent.glob("ckpt_[1-9]*.pt")
            found = sorted(kept, key=lambda file: int(file.stem.removeprefix("ckpt_")))
        run.need(found and found[0].is_file(), f"--ckpt {place}: no checkpoint there, or for "
                 "--every none of train_diffusion.py --keep_every")
        files += map(str, found)
    return list(dict.fromkeys(files))


def open_run_data(path, trained, data=None, size=None, val_images=500):
    """
    The images of a run: (--data, pixels per side, training set, held-out set). Where data or size
    is not given, they are those in `trained`, the flags of checkpoint `path`. Prints a warning if
    the images have changed since.
    """
    data, size = data or trained.get("data"), size or trained.get("image_size", 256)
    sets = open_data(data, size, val_images, trained.get("seed", 0))
    known, same = trained.get("images"), Path(str(trained.get("data"))) == Path(str(data))
    if run.get_rank() == 0 and known and same and images_hash(sets[0]) != known:
        run.print0(f"{data or 'built-in images'}: has changed since {path} was trained on it: "
                   "held-out images may have been trained on")
    return data, size, *sets


def load_diffusion(path, ae_path, device):
    """A train_diffusion.py run as (EMA model, process, autoencoder, checkpoint), to sample from."""
    checkpoint = run.load_checkpoint(path, "diffusion")
    model = MODELS[checkpoint["model_name"]](**checkpoint["model_args"])
    fill(model, path, checkpoint["ema"])
    process = DDPM(checkpoint["args"]["schedule"]) if isinstance(model, UViT) else Interpolant()
    stored = checkpoint["ae"]                           # or, if the whole project was moved:
    moved = Path(path).parent / checkpoint.get("ae_from_run", stored)
    ae_path = ae_path or next(filter(os.path.exists, (stored, moved)), stored)
    ae = load_autoencoder(ae_path)
    run.need(autoencoder_hash(ae) == checkpoint["autoencoder"],
             f"--ae {ae_path}: not the autoencoder on whose latents {path} was trained")
    ae.set_latent_stats(checkpoint["latent_mean"], checkpoint["latent_std"])
    checkpoint["seed"] = checkpoint["data_seed"]            # as in the flags of its autoencoder
    model = model.to(device).eval().requires_grad_(False)
    return model, process, ae.to(device).requires_grad_(False), checkpoint


def main():
    parser = argparse.ArgumentParser(
        prog="python -m common.weights", formatter_class=run.Help,
        description="Write an autoencoder to a folder in diffusers' layout.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("--ae", required=True, help="ckpt.pt of train_ae.py, or released weights")
    parser.add_argument("--out", required=True, help="the folder to write")
    args = run.parse_args(parser, {})
    with run.one_line_errors():
        export_diffusers(load_autoencoder(args.ae), args.out)
        print(f'wrote {args.out}: diffusers.AutoencoderKL.from_pretrained("{args.out}") opens it')


if __name__ == "__main__":
    main()
