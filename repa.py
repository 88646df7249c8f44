"""
Representation alignment: tokens from an early block of the diffusion transformer are projected and
aligned with a frozen DINOv2's features of the clean image. The three methods differ in the spectrum
of the target (Sec. 3.5): raw DINOv2 tokens share a large common component, their DC, which
dominates the cosine; removing it raises the contrast between positions.

    loss      -mean_t cos(projector(hidden_t), target_t), coefficient 0.5, hidden tokens after
              block 4 (Table 6)
    REPA      target = features, projector: 3-layer MLP, SiLU, width 2048 (Yu et al. 2025)
    iREPA     target = (features - 0.6 mean) / std over the tokens, projector: 3x3 convolution
              (Singh et al. 2025)
    REPA-DoG  target = DoG * features / std over the tokens, Eq. 6, projector: 3x3 convolution
    RMSC      spatial contrast of the target's directions = their energy outside DC, Prop. 3.2
              (spectral.rmsc)

Images (B, 3, H, W) in [-1, 1]; tokens (B, T, D), row-major on a grid (h, w), T = h*w. Transformer
and target use the same grid, so images are resized to 14 px per token (256 px -> 224 px -> 16x16).
Equations are numbered as in arXiv:2603.14645 v1.
"""
import os
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from spectral import dog, full_precision, spatial_norm

ENCODERS = [f"dinov2_vit{size}14{suffix}" for suffix in ("", "_reg") for size in "sblg"]
REPOSITORY = "facebookresearch/dinov2:12592a9bdfea0a6e4ee4767cd5a8d3195c0e3509"
WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"
# --repa: target filter, projector
REPA_KINDS = {"repa": ("none", "mlp"), "irepa": ("spnorm", "conv"), "dog": ("dog", "conv")}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std; images in [0, 1]
DOG_SIGMAS = (1.0, 2.5)                                    # in tokens; our choice: filter_target


# --------------------------------------------------------------------------------------------------
# The target encoder

class Encoder(nn.Module):
    """
    A frozen feature extractor, one feature vector per token; always in evaluation mode.
    network  module with patch_size, embed_dim and forward_features(x)["x_norm_patchtokens"]
             (B, T, embed_dim) for x (B, 3, patch_size*h, patch_size*w)
    forward(images, grid): images (B, 3, H, W) in [-1, 1], grid (h, w) with H/h = W/w -> tokens
             (B, h*w, embed_dim), float32, no gradient
    resize   "bicubic" (REPA) or "bilinear" (VA-VAE), both without antialiasing
    imagenet  True: images are normalised by ImageNet's mean and std, as DINOv2 was trained (REPA);
             False: the network gets them in [-1, 1] (VA-VAE)
    raises   ValueError if the grid does not fit the image or the tokens have the wrong shape
    """

    def __init__(self, network, resize="bicubic", imagenet=True):
        super().__init__()
        self.network, self.width, self.patch = network, network.embed_dim, network.patch_size
        self.resize, self.imagenet = resize, imagenet
        for name, values in zip(("mean", "std"), IMAGENET):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stays in evaluation mode: dropout would change the target at every step."""
        return super().train(False)

    @torch.no_grad()             # not inference_mode: a loss may save the target for backward
    def forward(self, images, grid):
        (H, W), (h, w) = images.shape[-2:], grid
        if H * w != W * h:
            raise ValueError(f"an image of {H}x{W} does not fit a token grid of {h}x{w}")
        device = images.device.type
        with torch.autocast(device, enabled=False):
            x = images.float()
            if self.imagenet:
                x = (x * 0.5 + 0.5 - self.mean) / self.std
            x = F.interpolate(x, (self.patch * h, self.patch * w), mode=self.resize,
                              align_corners=False)
        # bf16 on a GPU that supports it (Ampere or newer), else float32
        bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            tokens = self.network.forward_features(x)["x_norm_patchtokens"].float()
        if tokens.shape[1:] != (h * w, self.width):
            raise ValueError(f"the encoder returned tokens of shape {tuple(tokens.shape[1:])}; its "
                             f"patch_size and embed_dim imply {(h * w, self.width)}")
        return tokens


class RandomEncoder(nn.Module):
    """One untrained convolution over patches, with DINOv2's interface; for tests."""
    patch_size, embed_dim = 14, 64

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, self.embed_dim, self.patch_size, stride=self.patch_size)

    def forward_features(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)                 # (B, h*w, D)
        return {"x_norm_patchtokens": F.layer_norm(tokens, tokens.shape[-1:])}


def load_encoder(name="dinov2_vitb14", source=None, resize="bicubic", imagenet=True):
    """
    A frozen Encoder on the CPU.
    name     one of ENCODERS (DINOv2, Oquab et al. 2023), or a function of source/hubconf.py
    source   None: DINOv2's code from torch.hub at a pinned commit; a folder: a clone of DINOv2's
             repository, or any folder whose hubconf.py has a function `name` that returns a network
             with weights and DINOv2's interface (see Encoder); "random": a small untrained network,
             always the same. DINOv2's weights are downloaded once, to TORCH_HOME
    resize, imagenet  see Encoder; ignored if `name` is a function of source/hubconf.py
    raises   ValueError for an unknown name or weights that do not fit; FileNotFoundError if code or
             weights are missing and cannot be downloaded
    """
    if name not in ENCODERS and source in (None, "random"):
        raise ValueError(f"--encoder {name}: unknown; choose one of {', '.join(ENCODERS)}, or give "
                         "the folder of its hubconf.py as --encoder_source")
    if source == "random":
        warnings.warn("--encoder_source random: the target is an UNTRAINED network; it exercises "
                      "the code and teaches the model NOTHING", stacklevel=2)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)         # torch.manual_seed would seed GPUs too
            return Encoder(RandomEncoder(), resize, imagenet)
    if source is not None and not os.path.isfile(os.path.join(source, "hubconf.py")):
        raise FileNotFoundError(f"--encoder_source {source}: contains no hubconf.py; give a clone "
                                "of https://github.com/facebookresearch/dinov2, or random")
    if name in ENCODERS:
        return Encoder(load_dinov2(name, source), resize, imagenet)
    return Encoder(torch.hub.load(source, name, source="local"))


def load_dinov2(name, source):
    """DINOv2 via torch.hub: code from a clone or the pinned commit, official weights."""
    file = name.replace("_reg", "_reg4") + "_pretrain.pth"
    url = f"{WEIGHTS}/{name.removesuffix('_reg')}/{file}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "xFormers")  # DINOv2 warns if xFormers is missing
            network = torch.hub.load(              # skip_validation: it expects a branch or tag
                source or REPOSITORY, name, source="local" if source else "github",
                pretrained=False, verbose=False, trust_repo=True, skip_validation=True)
        network.load_state_dict(torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, weights_only=True))
    except OSError as error:                               # no network, or an interrupted download
        path = os.path.join(torch.hub.get_dir(), "checkpoints", file)
        clone = f"https://github.com/{REPOSITORY.replace(':', '/tree/')}"
        reason = getattr(error, "reason", error)
        raise FileNotFoundError(f"{name}: downloading it failed ({reason}): put {url} at {path} "
                                f"and give a clone of {clone} as --encoder_source DIR") from None
    except Exception as error:                             # name not in the code, wrong weights
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} from {source or REPOSITORY} with {file}: {reason}") from None
    return network


# --------------------------------------------------------------------------------------------------
# The target's filter (Sec. 3.5)

@full_precision
def filter_target(tokens, kind, grid, sigma1=DOG_SIGMAS[0], sigma2=DOG_SIGMAS[1], norm_std=0.6):
    """
    The alignment target: the encoder's features, filtered.
    tokens   (B, T, D) on the grid (h, w), T = h*w
    kind     "none"; "spnorm": spectral.spatial_norm; "dog": Eq. 6 on the grid, then every channel
             divided by its std over the tokens
    sigma1, sigma2  of the DoG, in tokens, 0 <= sigma1 < sigma2
    norm_std  fraction of the mean that spnorm subtracts: Table 6's "normalization std", whose 0.6
             is this factor in iREPA's code (zscore_alpha). "dog" ignores it: it removes constants
    returns  (B, T, D), float32
    raises   ValueError for an unknown kind or sigmas out of order

    The default sigmas are our choice: the paper gives none. On a 16x16 grid, DCT index u is u / 2
    cycles per image: u = 0 is the common offset and u = 1 a slope across the image; u = 2 .. 8, one
    to four cycles, is the layout of objects and their parts; above 8 are edges of single tokens,
    and noise. Gain of the sampled kernels, G(sigma1) - G(sigma2):
        (1.0, 2.5)   0 at DC, peak 0.59 at u = 4.3, half the peak at u = 1.9 and 7.9: u = 2 .. 8
        (1.0, 2.0)   peak 0.47 at u = 4.9, half at 2.3 and 8.6: weak on the coarsest layout
        (0.5, 2.0)   peak at u = 6.5, above half from 2.7 up to the end: nearly a high-pass
        (1.0, 4.0)   peak at u = 3.1, half at 1.3 and 7.0: passes slopes
    """
    if kind == "none":
        return tokens
    if kind == "spnorm":
        return spatial_norm(tokens, norm_std)
    if kind == "dog":
        x = dog(tokens.transpose(1, 2).unflatten(2, grid), sigma1, sigma2)    # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)                                      # (B, T, D)
        return x / (x.std(dim=1, keepdim=True, correction=0) + 1e-6)
    raise ValueError(f"filter_target: kind {kind!r} is not one of none, spnorm, dog")


# --------------------------------------------------------------------------------------------------
# The transformer's side

class Projector(nn.Module):
    """
    Maps the transformer's width to the encoder's; trained with the model, not used in sampling.
    kind     "mlp": three linear layers with SiLU, token by token (REPA); "conv": one 3x3
             convolution on the grid (iREPA, REPA-DoG)
    hidden   hidden width of the MLP
    forward(tokens, grid): (B, T, dim) on the grid (h, w) -> (B, T, out_dim)
    """

    def __init__(self, kind, dim, out_dim, hidden=2048):
        super().__init__()
        self.kind = kind
        if kind == "conv":
            self.layers = nn.Conv2d(dim, out_dim, 3, padding=1)
        else:
            self.layers = nn.Sequential(
                nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, out_dim))
            for linear in self.layers[::2]:                # REPA's initial weights
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, tokens, grid):
        if self.kind == "mlp":
            return self.layers(tokens)
        return self.layers(tokens.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


@full_precision
def alignment_loss(projected, target):
    """
    Negative cosine between projected and target, both (B, T, D), averaged over tokens and batch;
    float32 scalar in [-1, 1]. Only projected gets a gradient. ValueError if the shapes differ.
    """
    if projected.shape != target.shape:  # otherwise they might broadcast
        raise ValueError(f"alignment_loss: projected tokens {tuple(projected.shape)} and target "
                         f"{tuple(target.shape)} differ in shape")
    target = target.detach().to(projected.dtype)
    return -F.cosine_similarity(projected, target, dim=-1).mean()
