"""
Other people's weights: a file becomes a network of vae.py or dit.py, or is refused in one line.

    load_autoencoder   our ckpt.pt, and files in two layouts (SD-VAE, EQ-VAE, VA-VAE, SD3, FLUX):
                       CompVis' with our own names, also inside a whole latent diffusion model;
                       diffusers', with names of its own (DIFFUSERS) and a config.json beside them
    load_transformer   our ckpt.pt and REPA's; the original SiT's, whose time runs backwards;
                       U-ViT's, a bare state dict

What a file is shows in its first bytes, what it holds in the names and shapes of its tensors;
neither its own name nor how deep the weights are wrapped matters. No code in it is run: beside
tensors and plain values it may hold a few known classes, any other is refused by name. Tensors come
to the CPU, no random number is drawn. Errors name the file first: FileNotFoundError or ValueError.
"""
import hashlib
import itertools
import json
import math
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from common import run
from dit import DDPM, MODELS, Interpolant, UViT
from vae import AEConfig, AutoencoderKL

# ---------------------------------------------------------------------------- files
# What a folder may hold, the one to take first: our run, then diffusers' variants.
NAMES = ("ckpt.pt", *(f"diffusion_pytorch_model{variant}.{kind}" for variant in
                      ("", ".fp16", ".non_ema") for kind in ("safetensors", "bin")))
ENDINGS = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth")


def find_file(path, hint, *subfolders):
    """
    The file with the weights: path itself, or what its folder, these subfolders of it or an entry
    of the hub's cache holds: the first of NAMES, else the only file with one of ENDINGS.
    raises   FileNotFoundError that ends with the hint, or names what is there
    """
    path = Path(path)
    if path.is_dir():
        main = path / "refs" / "main"                   # the hub's cache: snapshots/HASH/...
        current = main.read_text().strip() if main.is_file() else "*"
        places = there = sorted(path.glob(f"snapshots/{current}")) or [path]
        if len(places) == 1:                            # of several snapshots none is ours to take
            places = [places[0], *(places[0] / name for name in subfolders)]
            there = [file for place in places for file in sorted(place.glob("*"))]
        found = sorted((file for file in there if file.name in NAMES),
                       key=lambda file: (places.index(file.parent), NAMES.index(file.name)))
        weights = [file for file in there if file.suffix in ENDINGS]
        if not found and len(weights) != 1:
            names = ", ".join(str(file.relative_to(path)) for file in there[:9]) or "nothing"
            raise FileNotFoundError(f"{path}: no ckpt.pt, diffusion_pytorch_model.safetensors or "
                                    f".bin, nor one file of weights; it holds {names}; give a file")
        path = (found or weights)[0]
    if not path.exists():
        fault = f"a link to {os.readlink(path)}, which is not there" if path.is_symlink() else \
            "no such file or folder"
        raise FileNotFoundError(f"{path}: {fault}; {hint}")
    return path


# What training scripts leave in a file beside the weights (callbacks, hyperparameters, a path, a
# mean loss): never imported or run, see Inert. Functions that run code are not among them.
BAGGAGE = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|datetime"
                     r"|easydict|addict|ml_collections|yacs|torch\.optim)\..+"
                     r"|builtins\.(dict|list|int|float|str|bool|bytes|tuple|set|frozenset|complex"
                     r"|range|slice|Ellipsis)|typing\.Any|collections\.defaultdict"
                     r"|argparse\.Namespace|types\.SimpleNamespace|pathlib\.(_local\.)?\w*Path"
                     r"|torch\.torch_version\.TorchVersion")


class Inert:
    """Stands in for a foreign class in a pickle: takes any arguments and state, does nothing."""
    __init__ = __setstate__ = lambda self, *args, **kwargs: None


class InertDict:
    """Stands in for a foreign dictionary: a plain one, which may be filled."""
    __new__ = lambda cls, *args, **kwargs: OrderedDict()


def unpickle(path):
    """What torch.save wrote. ValueError if it holds a class neither torch's nor in BAGGAGE."""
    foreign = set()
    if zipfile.is_zipfile(path):
        foreign.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    while True:
        refused = sorted(name for name in foreign if not BAGGAGE.fullmatch(name))
        if refused:
            raise ValueError(f"{path}: not a checkpoint of plain data: holds {refused[0]}, which "
                             "is not run; give its state dict alone")
        classes = [(InertDict if name.endswith(("dict", "Dict", "CfgNode")) else Inert, name)
                   for name in foreign]
        try:
            # given a path, torch.load would go by its ending
            with torch.serialization.safe_globals(classes), open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as err:    # files of before 2020 tell their classes one by one
            met = re.search(r"GLOBAL (\S+)", str(err))
            name = met and (met[1] if "." in met[1] else f"builtins.{met[1]}")
            if name is None or name in foreign:
                raise
            foreign.add(name)


NO_WEIGHTS = {      # how a file begins -> what it is, and the way out
    b"version https://git-lfs": "a git-lfs pointer; run `git lfs pull` or download the file itself",
    b"<": "a web page or an error message; download the file itself",
    b"{": "JSON; give the file with the weights, or the folder"}


def read_file(path):
    """
    A file in safetensors' format, or anything torch.save wrote -> the object in it.
    raises   ValueError if it is neither or damaged, or holds a class that unpickle refuses
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        # 8 bytes that tell how long the JSON behind them is
        safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2 ** 27
        what = next((NO_WEIGHTS[mark] for mark in NO_WEIGHTS if begin.startswith(mark)), None)
        if what is None and re.fullmatch(rb"[\t\n\r -~]+", head):
            what = f"a text that begins with {begin[:40].decode()!r}; give a file of weights"
        if what and not safetensors:
            raise ValueError(f"{path}: not a checkpoint, cannot be read: it is {what}")
        torchs = head.startswith((b"PK", b"\x80"))
        if safetensors or (path.suffix == ".safetensors" and not torchs):
            from safetensors.torch import load_file  # optional: only these files need it
            return load_file(path)
        return unpickle(path)
    except ImportError:
        raise ValueError(f"{path}: reading it needs `pip install safetensors`; or give the "
                         "model's .bin or .ckpt") from None
    except Exception as err:    # a damaged file breaks its reader in any way: quote the reader
        if str(err).startswith(f"{path}: "):
            raise
        said = str(err).split("WeightsUnpickler error:")[-1].strip().split("\n")[0][:160]
        raise ValueError(f"{path}: not a checkpoint, or cut short: cannot be read "
                         f"({type(err).__name__}: {said}); download or save it again") from err


# ---------------------------------------------------------------------------- state dicts
# Dictionaries around a state dict, and what stands before its names, are treated alike: of
# {"ema": {"module.x": tensor}} and {"ema.x": tensor} it is x under ema. No name of ours begins so.
EMA = ("ema", "ema_model", "model_ema", "ema_state_dict", "shadow")
AROUND = (*EMA, "model", "vae", "ae", "autoencoder", "first_stage_model", "diffusion_model", "net",
          "state_dict", "model_state_dict")
# Tensors that were trained along and are no part of the network.
EXTRA = ("loss.", "discriminator.", "foundation_model.", "linear_proj", "projectors.", "n_averaged")
# What torch's wrappers (compile, DDP, FSDP, checkpointing) put anywhere into a name.
BETWEEN = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def split_name(name):
    """What stands around, and the name itself: "model._orig_mod.x.y" -> ("model",), "x.y"."""
    parts = [part for part in name.split(".") if part not in BETWEEN]
    around = tuple(itertools.takewhile(lambda part: part in AROUND, parts))
    return around, ".".join(parts[len(around):])


def named_tensors(data, before=""):
    """Yields (name, tensor) of a dictionary and of those in it that stand around a state dict."""
    for key, value in data.items():
        if isinstance(value, torch.Tensor):
            yield before + key if isinstance(key, str) else key, value
        elif isinstance(value, dict) and key in AROUND + BETWEEN:
            yield from named_tensors(value, f"{before}{key}.")


def state_dict(file, data, known):
    """
    The state dict in what a file holds, however wrapped. Of several networks it is the one with
    some of the known names, averaged weights (EMA) before others; other tensors are left behind.
    returns  {name: tensor}
    raises   ValueError if there is none or it is not clear which
    """
    networks = {}                                       # what stands around -> {name: tensor}
    for key, tensor in named_tensors(data) if isinstance(data, dict) else ():
        if not isinstance(key, str):
            raise ValueError(f"{file}: {key!r} is no name of a tensor; give a state dict")
        around, name = split_name(key)
        network = networks.setdefault(around, {})
        if name in network:
            raise ValueError(f"{file}: {name} is there twice, once as {key}; give one state dict")
        if not name.startswith(EXTRA):
            network[name] = tensor
    if not networks:
        raise ValueError(f"{file}: holds a {type(data).__name__}, neither a state dict nor a "
                         "dictionary with one under 'ema', 'model', 'vae' or 'state_dict'")
    found = [around for around in networks if known & networks[around].keys()]
    found = [around for around in found if set(EMA) & set(around)] or found
    if len(found) > 1:
        names = " and ".join(".".join(around) or "no name" for around in found)
        raise ValueError(f"{file}: holds several networks, under {names}; give one of them alone")
    return networks[found[0]] if found else max(networks.values(), key=len)


def as_float32(file, name, tensor):
    """A weight in float32. ValueError if it is no plain floating-point tensor, or not finite."""
    try:
        if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
            raise TypeError
        tensor = tensor.float()                         # float8 can do nothing but this
    except (TypeError, RuntimeError):                   # 4 bits, two in a byte, not even this
        raise ValueError(f"{file}: {name} is {tensor.dtype}, {tensor.layout}, {tensor.device}, no "
                         "plain floating point of 8 bits or more; give such weights") from None
    if not tensor.isfinite().all():
        raise ValueError(f"{file}: {name} is not finite, so the training diverged; take an "
                         "earlier checkpoint")
    return tensor


# ---------------------------------------------------------------------------- autoencoders
ENDS = {"encoder.conv_in.weight", "decoder.conv_in.weight"}     # both layouts name these alike
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


def read_settings(file):
    """
    diffusers' config.json beside a file of its weights, or beside what a link leads to.
    returns  (its path, the settings); (None, {}) with a warning if there is none
    raises   ValueError if it is unreadable or describes something else
    """
    place = file
    while not (place.parent / "config.json").exists() and place.is_symlink():
        place = place.parent / os.readlink(place)
    path = place.parent / "config.json"
    if not path.exists():
        warnings.warn(f"{file}: no config.json beside it: norms are taken to have 32 groups, "
                      "latents mean 0 and std 1", stacklevel=3)
        return None, {}
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise ValueError(f"{path}: cannot be read as JSON ({err})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds a {type(settings).__name__}, not a dictionary of settings")
    kind = settings.get("_class_name") or settings.get("model_type") or "AutoencoderKL"
    if kind != "AutoencoderKL":
        raise ValueError(f"{path}: describes {kind}; only an AutoencoderKL can be read; if "
                         f"{file.name} is one, keep it in a folder of its own")
    return path, settings


def set_latent_stats(ae, path, settings):
    """
    The latents' statistics by diffusers' config.json at path: diffusers' latents are
    (z - shift_factor) * scaling_factor, or (z - latents_mean) / latents_std * scaling_factor.
    """
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    settings = {"scaling_factor": 0.18215} | settings   # diffusers' own default
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    try:
        mean = given.get("latents_mean", given.get("shift_factor", 0.0))
        std = torch.as_tensor(given.get("latents_std", 1.0))
        ae.set_latent_stats(mean, std / torch.as_tensor(given.get("scaling_factor", 1.0)))
    except Exception as err:                            # of a foreign shape, number or type
        raise ValueError(f"{path}: cannot scale latents by {given} ({err!s:.200}); give numbers, "
                         "or one for each channel") from None


def foreign_config(file, weights, settings):
    """
    What a CompVis or diffusers file says about its autoencoder.
    weights   {the file's names: tensors}; gets what the layout leaves out: identities in the place
              of missing quant convolutions, mean 0 and std 1
    settings  diffusers' config.json, or {}
    returns   AEConfig inferred from names and shapes (32 groups unless the settings say otherwise)
    raises    ValueError if the outline of an autoencoder is not there
    """
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
    if 0 not in widths or not ENDS <= weights.keys():
        raise ValueError(f"{file}: no encoder.conv_in, encoder levels and decoder.conv_in; neither "
                         "a ckpt.pt of train_ae.py nor an autoencoder in CompVis' or diffusers' "
                         f"layout; its names are such as {min(weights, default='')}")
    groups, activation = settings.get("norm_num_groups", 32), settings.get("act_fn", "silu")
    if type(groups) is not int or groups < 1 or activation not in ("silu", "swish"):
        raise ValueError(f"norm_num_groups {groups!r}, act_fn {activation!r}")
    ch, in_channels = weights["encoder.conv_in.weight"].shape[:2]
    d = weights["decoder.conv_in.weight"].shape[1]
    if not any("quant_conv." in key for key in weights):    # SD3, FLUX: the same as with identities
        for name, width in (("quant_conv", 2 * d), ("post_quant_conv", d)):
            weights[f"{name}.weight"] = torch.eye(width)[:, :, None, None]
            weights[f"{name}.bias"] = torch.zeros(width)
    weights |= {"latent_mean": torch.zeros(d), "latent_std": torch.ones(d)}
    return AEConfig([widths[i][0] // ch for i in sorted(widths)], d, in_channels, ch,
                    len(widths[0]), sorted(attn_levels), groups)


def fill(ae, weights, file, theirs):
    """
    Give an autoencoder that was built on the meta device the tensors of a file.
    weights  {the file's names: tensors}, theirs: in diffusers' layout; what is used is taken out
    raises   ValueError naming the first tensor that is missing, mis-shaped, not finite or unknown
    """
    levels = len(ae.config.ch_mult)
    old = any(".query." in key for key in weights)
    state = {}
    for key, wanted in ae.state_dict().items():
        name = diffusers_name(key, levels, old) if theirs else key
        if name not in weights:
            raise ValueError(f"{file}: {name} is missing; part of an autoencoder, or another "
                             "architecture")
        tensor = weights.pop(name)
        if ".attn" in key and tensor.ndim == 2 == wanted.ndim - 2:
            tensor = tensor[:, :, None, None]           # a linear layer is a 1x1 convolution
        if tensor.shape != wanted.shape:
            raise ValueError(f"{file}: {name} is {tuple(tensor.shape)}, this architecture needs "
                             f"{tuple(wanted.shape)}")
        state[key] = as_float32(file, name, tensor)
    if weights:
        raise ValueError(f"{file}: {next(iter(weights))} is no part of this autoencoder; another "
                         "architecture")
    ae.to_empty(device="cpu").load_state_dict(state)


def load_autoencoder(path):
    """
    An autoencoder from disk: float32, in eval mode. The global random state is not touched.
    path     our ckpt.pt, CompVis' weights, or those of a diffusers AutoencoderKL; or a folder with
             one of them: of our run, of diffusers' model or whole pipeline, of the hub's cache
    returns  AutoencoderKL. Latent statistics come from our checkpoint, or from the config.json
             beside diffusers' weights; any other file holds none and leaves mean 0, std 1
    raises   FileNotFoundError, or ValueError naming the file and the first tensor that does not fit
    """
    file = find_file(path, "train an autoencoder with train_ae.py or give a released one", "vae")
    data = read_file(file)
    ours = isinstance(data, dict) and "stage" in data
    if ours and data["stage"] != "ae":
        raise ValueError(f"{file}: a checkpoint of stage {data['stage']!r}, not of an autoencoder; "
                         "give one of train_ae.py")
    weights = state_dict(file, {"model": data.get("model")} if ours else data, ENDS)
    theirs = any(name.startswith("encoder.down_blocks.") for name in weights)
    config_file, settings = None, {}
    # beside any other file a config.json is not about it
    if theirs or (not ours and file.name.startswith("diffusion_pytorch_model")):
        config_file, settings = read_settings(file)
    try:
        config = AEConfig(**data["ae_config"]) if ours else foreign_config(file, weights, settings)
        with torch.device("meta"):                      # no memory yet, no random draws
            ae = AutoencoderKL(config)
    except Exception as err:                            # of a foreign shape, number or type
        if str(err).startswith(f"{file}: "):
            raise
        raise ValueError(f"{file}: builds no autoencoder of this version ({err!r:.200}); give a "
                         "whole ckpt.pt of train_ae.py") from err
    if config.in_channels != 3:
        raise ValueError(f"{file}: an autoencoder of images of {config.in_channels} channels; this "
                         "code works on RGB images, of 3")
    fill(ae, weights, file, theirs)
    if config_file:
        set_latent_stats(ae, config_file, settings)
    return ae.eval()


# ---------------------------------------------------------------------------- transformers
LAST = ("final_layer.linear.weight", "final_layer.linear.bias")     # of a SiT


def turn_round(state, C):
    """
    Rewrite a state dict of the original SiT for our time and sign, C latent channels.
    It runs from t=0 noise to t=1 data and predicts x - eps (transport/path.py, ICPlan), hence
    v(x, t) = -v_SiT(x, 1 - t). The variance channels go, the sign goes into the last layer and the
    reversal into the first time layer: cos and sin of (1 - t) f are linear in those of t f.
    """
    for key in LAST:
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
    path  a file, or a folder with one. Two kinds of file are rewritten, so that the loaded network
          is an ordinary one and stays so when it is saved again:
      original SiT  known by twice the output channels (learn_sigma); see turn_round
      U-ViT-H       trained with conv=False: the missing final convolution becomes the identity
    What a file was trained on cannot be told from its keys: DiT files (eps-prediction) and
    U-ViT-L/2 on ImageNet-256 (continuous VP-SDE) load, but belong to neither process of dit.py.
    raises  FileNotFoundError; ValueError for a file that is no checkpoint, does not fit the model's
            depth, width, size or classes, or is not finite
    """
    file = find_file(path, "give a SiT, REPA or U-ViT checkpoint")
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = state_dict(file, read_file(file), want.keys())
    if isinstance(model, UViT) and not any(key.startswith("final_layer.") for key in state):
        state["final_layer.weight"] = nn.init.dirac_(torch.empty(model.final_layer.weight.shape))
        state["final_layer.bias"] = torch.zeros(model.in_channels)

    have = {key: tuple(value.shape) for key, value in state.items()}
    rows = want.get(LAST[0], (0,))[0]
    backwards = rows > 0 and have.get(LAST[0], ())[:1] == (2 * rows,)
    if backwards:
        want |= {key: (2 * rows, *want[key][1:]) for key in LAST}
    wrong = [key for key in sorted(have.keys() | want.keys()) if have.get(key) != want.get(key)]
    if wrong:
        there = have.get(wrong[0], "missing")
        here = want.get(wrong[0], "unknown")
        raise ValueError(f"{file}: does not fit this {type(model).__name__} ({len(wrong)} of "
                         f"{len(want)} entries): {wrong[0]} is {there} in the file and {here} in "
                         "the model; build the model with the file's size, patch, input_size, "
                         "in_channels and num_classes")
    state = {key: as_float32(file, key, value) for key, value in state.items()}
    if backwards:
        turn_round(state, model.in_channels)
    model.load_state_dict(state)
    return model


# ---------------------------------------------------------------------------- runs
def autoencoder_hash(ae):
    """16 hex digits over the weights' names and values, without the statistics of the latents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(ae.state_dict().items()):
        if not name.startswith("latent_"):  # these follow from the images
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_files(args):
    """What a command reads: --ckpt; with --every all ckpt_<step>.pt of these runs."""
    places = args.ckpt or [run.newest(f"out/diffusion/{args.preset}-*/ckpt.pt",
                                          "--ckpt: train one with train_diffusion.py")]
    files = []
    for place in map(Path, places):
        folder = place if place.is_dir() else place.parent
        if not args.every:
            files.append(place / "ckpt.pt" if place.is_dir() else place)
            continue
        steps = [path.stem.removeprefix("ckpt_") for path in folder.glob("ckpt_*.pt")]
        # not the untrained network's
        steps = sorted(int(step) for step in steps if step.isdecimal() and int(step) > 0)
        if not steps:
            raise FileNotFoundError(f"--ckpt {place}: no ckpt_<step>.pt there; train_diffusion.py "
                                    "keeps them with --keep_every")
        files += [folder / f"ckpt_{step}.pt" for step in steps]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"--ckpt {file}: no such checkpoint")
    return list(dict.fromkeys(map(str, files)))


def load_diffusion(path, ae_path, device):
    """
    A run of train_diffusion.py, ready to sample: (EMA model, process, autoencoder with the run's
    statistics, checkpoint).
    """
    checkpoint = run.load_checkpoint(path, "diffusion")
    try:
        model = MODELS[checkpoint["model_name"]](**checkpoint["model_args"])
        model.load_state_dict(checkpoint["ema"])
        missing = {"ae", "autoencoder", "latent_mean", "latent_std", "image_size", "data",
                   "data_seed", "step", "args"} - checkpoint.keys()
        finite = not missing and all(tensor.isfinite().all() for tensor in (
            *checkpoint["ema"].values(), checkpoint["latent_std"]))
        process = Interpolant()
        if checkpoint["model_name"].startswith("UViT"):    # older runs had no choice
            process = DDPM(checkpoint["args"].get("schedule", "sd"))
    except Exception as error:                         # a foreign file breaks this in any way
        raise ValueError(f"--ckpt {path}: not what this version of train_diffusion.py writes "
                         f"({run.reason(error)})") from None
    if not finite:
        fault = f"has no {min(missing)}" if missing else "its weights are not finite"
        raise ValueError(f"--ckpt {path}: {fault}; take an earlier checkpoint")
    if not ae_path and not Path(checkpoint["ae"]).exists():
        raise FileNotFoundError(f"--ckpt {path}: its autoencoder, {checkpoint['ae']}, is not here; "
                                "--ae names it")
    ae_path = ae_path or checkpoint["ae"]
    ae = load_autoencoder(ae_path)
    if autoencoder_hash(ae) != checkpoint["autoencoder"]:
        raise ValueError(f"--ae {ae_path}: not the autoencoder on whose latents {path} was trained")
    ae.set_latent_stats(checkpoint["latent_mean"], checkpoint["latent_std"])
    model = model.to(device).eval().requires_grad_(False)
    return model, process, ae.to(device).requires_grad_(False), checkpoint
