"""
Weights from disk: released autoencoders and transformers, and the checkpoints of our own runs.

    load_autoencoder   our ckpt.pt; CompVis' layout, whose names are ours (SD-VAE, VA-VAE), alone or
                       in a whole latent diffusion model; diffusers' (SD-VAE, EQ-VAE, SD3, FLUX)
    load_transformer   our ckpt.pt and REPA's; the original SiT's, whose time is reversed; U-ViT's
    load_diffusion     a run of train_diffusion.py with its autoencoder, ready to sample

The first bytes of a file tell its format, the names and shapes of its tensors the network. No code
in a file is run. Tensors are loaded to the CPU, no random number is drawn.
"""
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from common import run
from common.data import images_hash, read_bytes
from dit import DDPM, MODELS, Interpolant, SiT, UViT
from vae import AEConfig, AutoencoderKL

# ---------------------------------------------------------------------------- files
SUFFIXES = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth")


def find_file(path, hint):
    """path, or in a folder our ckpt.pt, diffusers' weights, also in vae/, or the only file."""
    path = folder = Path(path)
    if path.is_file():
        return path
    if (path / "refs" / "main").exists():               # a model in the hub's cache
        folder = path / "snapshots" / read_bytes(path / "refs" / "main").decode().strip()
    files = [file for file in (*folder.glob("*"), *folder.glob("vae/*"))
             if file.suffix in SUFFIXES and file.is_file()]                    # no pipe, it blocks
    known = [file for file in files if file.name.startswith(("ckpt.pt", "diffusion_pytorch_model"))]
    if not known and len(files) != 1:
        names = ", ".join(sorted(file.name for file in files)) or "none"
        raise FileNotFoundError(f"{path}: no such file, nor a folder with ckpt.pt, diffusion_pyt"
                                f"orch_model.* or one file of weights (here: {names}); {hint}")
    # the plain file before variants such as .fp16
    return min(known or files, key=lambda file: (len(file.parts), file.name.count("."), file.name))


@contextlib.contextmanager
def reading(path, hint):
    """Yields find_file(path, hint); whatever fails with it is one line that names it."""
    file = Path(path)
    try:
        file = find_file(file, hint)
        yield file
    except Exception as error:
        if str(error).startswith(f"{file}:"):
            raise
        raise ValueError(f"{file}: it and its config.json or ae_config build no network "
                         f"({error!r:.200})") from None


# Classes that training scripts pickle beside the weights (callbacks, hyperparameters, paths).
# They are neither imported nor run: a stub takes their place.
ALLOWED_GLOBALS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|ml_collections|easydict|numpy"
    r"|datetime|pathlib|torch\.optim)\..+|collections\.defaultdict|argparse\.Namespace"
    r"|types\.SimpleNamespace|typing\.Any|torch\.torch_version\.TorchVersion"
    r"|builtins\.(dict|list|tuple|set|frozenset|slice|Ellipsis|int|float|str|bool)")


class Stub:
    """Takes any arguments and state and does nothing with them."""
    __init__ = __setstate__ = lambda self, *args: None


class DictStub:
    """Stands for a subclass of dict, because the unpickler fills plain dictionaries only."""
    __new__ = lambda cls, *args: OrderedDict()


def read_file(path):
    """What a file in safetensors' format or of torch.save holds. ValueError if it is neither."""
    try:
        with open(path, "rb") as file:
            if file.read(9)[8:] == b"{":                # 8 bytes of length, then JSON
                from safetensors.torch import load_file  # optional: only these files need it
                return load_file(path)
            names = []
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    size, declared = path.stat().st_size, sum(e.file_size for e in archive.filelist)
                    run.need(declared <= max(2 ** 30, 100 * size),
                             f"{size:,} bytes that unpack to {declared:,}")
                    damaged = archive.testzip()         # torch.load compares no checksums
                    run.need(damaged is None, f"damaged: wrong checksum of {damaged!r}")
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stubs = [(DictStub if name.lower().endswith("dict") else Stub, name)
                     for name in names if ALLOWED_GLOBALS.fullmatch(name)]
            file.seek(0)                    # not the path, which torch.load would judge by suffix
            with torch.serialization.safe_globals(stubs):
                return torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path}: reading it needs `pip install safetensors`") from None
    except Exception as error:              # a damaged file breaks its reader in any way
        # the reader's reason, without torch's advice to run the file's code
        detail = re.split(r"\n|\. ", str(error).split("WeightsUnpickler error: ")[-1].strip())[0]
        raise ValueError(f"{path}: cannot be read as a checkpoint ({detail}); give a complete file "
                         "of weights alone, no web page or git-lfs pointer") from error


# ---------------------------------------------------------------------------- state dicts
# What may stand before a tensor's name, as a prefix or as a dictionary around it: in
# {"ema.x": tensor} and in {"ema": {"module.x": tensor}} it is x under ema.
EMA = {"ema", "ema_model", "model_ema", "ema_state_dict", "shadow"}
PREFIXES = EMA | {"model", "vae", "ae", "autoencoder", "first_stage_model", "diffusion_model",
                  "net", "state_dict", "model_state_dict"}
# What torch's wrappers (compile, DDP, FSDP, checkpointing) put anywhere into a name.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Tensors trained along that are no part of the network.
EXTRA = ("loss.", "discriminator.", "foundation_model.", "linear_proj", "projectors.", "n_averaged")


def named_tensors(data, outer=()):
    """Yields (prefixes, name, tensor) of the tensors in nested dictionaries."""
    for key, value in data.items():
        parts = [part for part in str(key).split(".") if part not in WRAPPERS]
        prefixes = tuple(itertools.takewhile(PREFIXES.__contains__, parts))
        name = ".".join(parts[len(prefixes):])
        if isinstance(value, dict) and not name and len(outer) < 8:            # may hold itself
            yield from named_tensors(value, outer + prefixes)
        elif isinstance(value, torch.Tensor) and not name.startswith(EXTRA):
            yield outer + prefixes, name, value


def find_network(file, data, known, kind):
    """The {name: tensor} with a known name in what a file holds, rather averaged weights (EMA)."""
    networks = {}                                       # prefixes -> {name: tensor}
    for prefixes, name, tensor in named_tensors(data if isinstance(data, dict) else {}):
        networks.setdefault(prefixes, {})[name] = tensor
    found = [prefixes for prefixes in networks if known & networks[prefixes].keys()]
    found = [prefixes for prefixes in found if EMA & set(prefixes)] or found
    if len(found) != 1:
        names = [".".join((*prefixes, min(networks[prefixes]))) for prefixes in found or networks]
        raise ValueError(f"{file}: {len(found)} networks in it could be this {kind}; give one's "
                         f"state dict; it is a {type(data).__name__} with tensors {names[:5]}")
    return networks[found[0]]


def fill(network, file, weights):
    """Load {name: tensor} in float32; ValueError naming the first that does not fit the network."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(weights.keys() | shapes.keys()):
        found = tuple(weights[name].shape) if name in weights else "missing"
        wanted = shapes.get(name, "unknown")
        if found != wanted:
            raise ValueError(f"{file}: does not fit this {type(network).__name__}: {name} is "
                             f"{found} in the file and {wanted} in the model")
        values = weights[name].float()                  # float8 can do little else
        if not weights[name].is_floating_point() or not values.isfinite().all():
            raise ValueError(f"{file}: {name}, {weights[name].dtype}, is quantised or not finite; "
                             "give unquantised weights, or an earlier checkpoint")
        weights[name] = values
    network.load_state_dict(weights)


# ---------------------------------------------------------------------------- autoencoders
DIFFUSERS = {   # parts of our names -> of diffusers', in this order
    ".down.": ".down_blocks.", ".up.": ".up_blocks.", ".mid.": ".mid_block.",
    ".block.": ".resnets.", ".block_1.": ".resnets.0.", ".block_2.": ".resnets.1.",
    ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.",
    ".nin_shortcut.": ".conv_shortcut.", ".norm_out.": ".conv_norm_out.",
    ".attn.": ".attentions.", ".attn_1.": ".attentions.0.", ".norm.": ".group_norm.",
    ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
DIFFUSERS_2022 = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
                  ".proj_attn.": ".to_out.0."}


def diffusers_name(key, levels):
    """Our state-dict key -> diffusers', whose decoder counts levels from the latent outwards."""
    key = re.sub(r"\.up\.(\d+)", lambda m: f".up.{levels - 1 - int(m[1])}", key)
    for part, diffusers_part in DIFFUSERS.items():
        key = key.replace(part, diffusers_part)
    return key


def read_settings(file):
    """
    By the config.json beside diffusers' weights: groups of the norms, mean and std of the latents.
    diffusers calls (z - latents_mean or shift_factor) / latents_std * scaling_factor a latent.
    """
    # beside the file, or beside what a link leads to
    paths = [place.parent / "config.json" for place in (file, file.resolve())]
    found = [path for path in paths if path.exists()]
    if not found:
        warnings.warn(f"{file}: no config.json beside it: norms are taken to have 32 groups, "
                      "latents mean 0 and std 1", stacklevel=3)
        return 32, 0.0, 1.0
    settings = json.loads(read_bytes(found[0]))
    given = {name: value for name, value in settings.items() if value is not None}
    mean = given.get("latents_mean", given.get("shift_factor", 0.0))
    std = torch.tensor(given.get("latents_std", 1.0)) / given.get("scaling_factor", 0.18215)
    return given.get("norm_num_groups", 32), mean, std          # the defaults are diffusers'


def infer_config(weights, groups):
    """The AEConfig of weights in CompVis' or diffusers' layout, by their names and shapes."""
    widths = {}                                         # level -> output channels of its blocks
    attn_levels = set()
    for name, tensor in weights.items():                # both layouts count encoder levels alike
        m = re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.(att|.*\.conv1\.weight)", name)
        if m and m[2] == "att":
            attn_levels.add(int(m[1]))
        elif m:
            widths.setdefault(int(m[1]), []).append(len(tensor))
    ch, in_channels = weights["encoder.conv_in.weight"].shape[:2]
    d = weights["decoder.conv_in.weight"].shape[1]
    return AEConfig([widths[i][0] // ch for i in sorted(widths)], d, in_channels, ch,
                    len(widths[0]), sorted(attn_levels), groups)


def load_autoencoder(path):
    """
    An autoencoder from disk: float32, in eval mode.
    path     our ckpt.pt, CompVis' weights or those of a diffusers AutoencoderKL; or a folder of our
             run, of diffusers' model or pipeline, or of the hub's cache
    returns  AutoencoderKL. Its latent statistics come from our ckpt.pt or diffusers' config.json;
             other files hold none: mean 0, std 1
    raises   FileNotFoundError, or ValueError naming the file and the first tensor that does not fit
    """
    with reading(path, "train an autoencoder with train_ae.py or give a released one") as file:
        data = read_file(file)
        stage = data.get("stage") if isinstance(data, dict) else None
        is_checkpoint = stage is not None
        if is_checkpoint and stage != "ae":
            raise ValueError(f"{file}: a checkpoint of stage {repr(stage).split()[0]:.20}, not of "
                             "train_ae.py")
        weights = find_network(file, data, {"encoder.conv_in.weight"}, "autoencoder")
        diffusers = any(name.startswith("encoder.down_blocks.") for name in weights)
        groups, mean, std = read_settings(file) if diffusers else (32, 0.0, 1.0)
        config = AEConfig(**data["ae_config"]) if is_checkpoint else infer_config(weights, groups)
        if config.in_channels != 3:
            raise ValueError(f"{file}: for images of {config.in_channels} channels, not RGB")
        with torch.device("meta"):                      # no random draws
            ae = AutoencoderKL(config).to_empty(device="cpu")
        ae.set_latent_stats(mean, std)
        if diffusers:
            for part, later_part in DIFFUSERS_2022.items():
                weights = {name.replace(part, later_part): w for name, w in weights.items()}
            our_keys = {diffusers_name(key, len(config.ch_mult)): key for key in ae.state_dict()}
            # attention's linear layers are 1x1 convolutions here
            weights = {our_keys.get(name, name): w[:, :, None, None] if w.ndim == 2 else w
                       for name, w in weights.items()}
        if not is_checkpoint:   # no statistics; in SD3 and FLUX no quant convolutions: identities
            for conv in (ae.quant_conv, ae.post_quant_conv):
                nn.init.dirac_(conv.weight)
                nn.init.zeros_(conv.bias)
            optional = ("latent_", "quant_conv.", "post_quant_conv.")
            weights = {k: w for k, w in ae.state_dict().items() if k.startswith(optional)} | weights
        fill(ae, file, weights)
        return ae.eval()


# ---------------------------------------------------------------------------- transformers
def reverse_time(weights, C):
    """
    Rewrite the weights of the original SiT, of C latent channels, for our time and sign.
    Its t runs from noise to data and it predicts x - eps (transport/path.py, ICPlan), hence
    v(x, t) = -v_SiT(x, 1 - t).
    """
    # the last layer loses the variance and takes the sign
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = weights[key].unflatten(0, (-1, 2 * C))   # by (row, column) of the patch, channel
        weights[key] = -rows[:, :C].flatten(0, 1)
    # the first time layer takes the reversal: cos and sin of (1 - t) f are linear in those of t f
    f = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    key = "t_embedder.mlp.0.weight"
    a, b = weights[key].double().chunk(2, dim=1)        # act on cos and sin of (1 - t) f
    weights[key] = torch.cat([a * f.cos() + b * f.sin(), a * f.sin() - b * f.cos()], dim=1)


def load_transformer(model, path):
    """
    Fill a model with the weights of a SiT, REPA or U-ViT file, or of one of ours, and return it.
    path  a file, or a folder with one. The original SiT, known by its variance channels, becomes a
          network of our time, and U-ViT-H gets the final convolution that it was trained without.
    What a file was trained on cannot be told from its names: DiT files (eps-prediction) and
    U-ViT-L/2 on ImageNet-256 (continuous VP-SDE) load, but belong to neither process of dit.py.
    raises  FileNotFoundError; ValueError naming the file and the first tensor that does not fit
    """
    with reading(path, "give a SiT, REPA or U-ViT checkpoint") as file:
        state = model.state_dict()
        weights = find_network(file, read_file(file), state.keys(), type(model).__name__)
        if isinstance(model, UViT) and not any(name.startswith("final_layer.") for name in weights):
            conv = model.final_layer
            weights["final_layer.weight"] = nn.init.dirac_(torch.empty_like(conv.weight))
            weights["final_layer.bias"] = torch.zeros_like(conv.bias)
        bias = "final_layer.linear.bias"
        if isinstance(model, SiT) and len(weights.get(bias, ())) == 2 * len(state[bias]):
            reverse_time(weights, model.in_channels)
        fill(model, file, weights)
        return model


# ---------------------------------------------------------------------------- runs
def autoencoder_hash(ae):
    """16 hex digits over configuration and weights, without the statistics of the latents."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(ae.config)).encode())
    for name, tensor in sorted(ae.state_dict().items()):
        if not name.startswith("latent_"):              # these follow from the images
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_files(args):
    """What a command reads: --ckpt; with --every all ckpt_<step>.pt of these runs."""
    places = args.ckpt or [run.newest(f"out/diffusion/{args.preset}-*/ckpt.pt",
                                      "--ckpt: train one with train_diffusion.py")]
    files = []
    for place in map(Path, places):
        found = [place / "ckpt.pt" if place.is_dir() else place]
        if args.every:                                  # but for step 0, the untrained network
            kept = found[0].parent.glob("ckpt_[1-9]*.pt")
            found = sorted(kept, key=lambda file: int(file.stem.removeprefix("ckpt_")))
        if not found or not found[0].is_file():
            raise FileNotFoundError(f"--ckpt {place}: no such checkpoint, or for --every no ckpt_"
                                    "<step>.pt there; train_diffusion.py has --keep_every")
        files += map(str, found)
    return list(dict.fromkeys(files))


def compare_images(path, trained, spec, train_set):
    """A line if the set spec is the one in trained, of a run, and its images have changed since."""
    known, same = trained.get("images"), Path(str(trained.get("data"))) == Path(str(spec))
    if run.get_rank() == 0 and known and same and images_hash(train_set) != known:
        run.print0(f"{spec or 'built-in images'}: has changed since {path} was trained on it: "
                   "held-out images may have been trained on")


def load_diffusion(path, ae_path, device):
    """A run of train_diffusion.py -> (EMA model, process, autoencoder, checkpoint), to sample."""
    checkpoint = run.load_checkpoint(path, "diffusion")
    try:
        model = MODELS[checkpoint["model_name"]](**checkpoint["model_args"])
        fill(model, path, checkpoint["ema"])
        process = DDPM(checkpoint["args"]["schedule"]) if isinstance(model, UViT) else Interpolant()
        ae_path = Path(ae_path or checkpoint["ae"])
        mean, std = checkpoint["latent_mean"], checkpoint["latent_std"]
        kinds = dict(autoencoder=str, data=str | None, images=str | None, data_seed=int,
                     image_size=int, classes_seen=list | None)
        run.need(len(mean) == len(std) == model.in_channels and (0 < std).all() and all(
            isinstance(checkpoint.get(key), kind) for key, kind in kinds.items()), "wrong fields")
    except Exception as error:                          # a foreign file breaks this in any way
        raise ValueError(f"--ckpt {path}: not what this version of train_diffusion.py writes "
                         f"({run.reason(error)})") from None
    if not ae_path.exists():
        raise FileNotFoundError(f"--ckpt {path}: its autoencoder, {ae_path}, is not here; "
                                "--ae names it")
    ae = load_autoencoder(ae_path)
    if autoencoder_hash(ae) != checkpoint["autoencoder"]:
        raise ValueError(f"--ae {ae_path}: not the autoencoder on whose latents {path} was trained")
    ae.set_latent_stats(mean, std)
    model = model.to(device).eval().requires_grad_(False)
    return model, process, ae.to(device).requires_grad_(False), checkpoint
