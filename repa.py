"""
Representation alignment: the tokens of an early block of the diffusion transformer, projected, are
turned towards the features that a frozen DINOv2 has of the clean image. What the three methods
change is the target's spectrum (Sec. 3.5): raw DINOv2 tokens share a large common direction, their
DC, and a cosine spends itself on it; less DC is more contrast between places.

    loss      -mean_t cos(projector(hidden_t), target_t), coefficient 0.5, hidden tokens after
              block 4 (Table 6)
    REPA      target = features, projector: 3-layer MLP, SiLU, width 2048 (Yu et al. 2025)
    iREPA     target = (features - 0.6 mean) / std over the tokens, projector: 3x3 convolution
              (Singh et al. 2025)
    REPA-DoG  target = DoG * features / std over the tokens, Eq. 6, projector: 3x3 convolution
    RMSC      contrast of the target's directions = its energy outside DC, Prop. 3.2
              (spectral.rmsc)

Images (B, 3, H, W) in [-1, 1]; tokens (B, T, D), row-major on a grid (h, w), T = h*w: the
transformer's grid and the target's are the same, so the image is resized to 14 px a token
(256 px -> 224 px -> 16x16). Numbering: arXiv:2603.14645 v1.
"""
import os
import pickle
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from spectral import dog, full_precision, spatial_norm

ENCODERS = {f"dinov2_vit{size}14{suffix}": width
            for suffix in ("", "_reg")                     # _reg: with 4 register tokens
            for size, width in dict(s=384, b=768, l=1024, g=1536).items()}
# its hubconf.py has all of ENCODERS
REPOSITORY = "facebookresearch/dinov2:12592a9bdfea0a6e4ee4767cd5a8d3195c0e3509"
WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"
# --repa: target filter, projector
REPA_KINDS = {"repa": ("none", "mlp"), "irepa": ("spnorm", "conv"), "dog": ("dog", "conv")}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of its images in [0, 1]
DOG_SIGMAS = (1.0, 2.5)                                    # tokens; our choice, see filter_target


# --------------------------------------------------------------------------------------------------
# The target encoder

class Encoder(nn.Module):
    """
    A frozen network that gives one feature vector per token; always in evaluation mode, no
    parameter asks for a gradient.
    network  module whose forward_features(x)["x_norm_patchtokens"] is (B, T, width) for
             x (B, 3, patch*h, patch*w), ImageNet-normalised
    forward(images, grid): images (B, 3, H, W) in [-1, 1], grid (h, w) with H/h = W/w -> tokens
             (B, h*w, width), float32, no graph. The network computes in bf16 on CUDA and in float32
             elsewhere; normalisation and resize are float32
    resize   "bicubic" (REPA) or "bilinear" (VA-VAE), neither with antialiasing
    imagenet  whether the network is shown images with ImageNet's mean and std taken off, as DINOv2
             was trained (REPA), or as they are, in [-1, 1] (VA-VAE)
    raises   ValueError if the grid does not fit the image or the network answers with another token
             count or width
    """

    def __init__(self, network, width, patch=14, resize="bicubic", imagenet=True):
        super().__init__()
        self.network, self.width, self.patch = network, width, patch
        self.resize, self.imagenet = resize, imagenet
        for name, values in zip(("mean", "std"), IMAGENET):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stays in evaluation mode: a target that moves by dropout is no target."""
        return super().train(False)

    @torch.no_grad()             # not inference_mode: a loss may save the target for its backward
    def forward(self, images, grid):
        (H, W), (h, w) = images.shape[-2:], grid
        if H * w != W * h:
            raise ValueError(f"Encoder: an image of {H}x{W} does not fit a token grid of {h}x{w}; "
                             "H/h must equal W/w")
        device = images.device.type
        size = self.patch * h, self.patch * w
        with torch.autocast(device, enabled=False):
            x = images.float()
            if self.imagenet:
                x = (x * 0.5 + 0.5 - self.mean) / self.std
            x = F.interpolate(x, size, mode=self.resize, align_corners=False)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            tokens = self.network.forward_features(x)["x_norm_patchtokens"].float()
        if tokens.shape[1:] != (h * w, self.width):
            raise ValueError(f"Encoder: expected {h}x{w} = {h * w} tokens of width {self.width}, "
                             f"the network gave {tokens.shape[1]} of width {tokens.shape[2]}; give "
                             "the name and the patch size that belong to it")
        return tokens


class RandomViT(nn.Module):
    """
    A small untrained ViT with DINOv2's interface, for tests and demonstrations: patches of 14 px,
    width 64, two pre-norm blocks.
    """

    def __init__(self, width=64, patch=14):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.5 * torch.randn(1, width, 16, 16))
        block = lambda: nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(block(), block())
        self.norm = nn.LayerNorm(width)

    def forward_features(self, x):
        x = self.patches(x)                                                 # (B, D, h, w)
        x = x + F.interpolate(self.position, x.shape[-2:], mode="bicubic", align_corners=False)
        tokens = self.blocks(x.flatten(2).transpose(1, 2))                  # (B, h*w, D)
        return {"x_norm_patchtokens": self.norm(tokens)}


class LabelNet(nn.Module):
    """
    A small residual network that experiments/miniature.py trains on class labels: a target encoder
    for 32 px images where DINOv2 is out of reach, and the features of FD-cifar.
    forward: (B, 3, H, W) in [-1, 1] -> logits; pooled: -> (B, 192); forward_features: DINOv2's
    interface with one token per 4x4 pixels, width 96.
    """
    width, patch, token_width = 192, 4, 96

    def __init__(self, num_classes):
        super().__init__()
        layer = lambda i, o, stride=1: nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.stages = nn.ModuleList()
        for i, o in ((3, 48), (48, self.token_width), (self.token_width, self.width)):
            down = layer(i, o, 2)
            residual = nn.Sequential(layer(o, o), layer(o, o))
            self.stages.append(nn.ModuleList([down, residual]))
        self.head = nn.Linear(self.width, num_classes)

    def stage(self, x, stages):
        for down, residual in stages:                                       # each halves the sides
            x = down(x)
            x = x + residual(x)
        return x

    def pooled(self, images):
        return self.stage(images, self.stages).mean((2, 3))

    def forward(self, images):
        return self.head(self.pooled(images))

    def forward_features(self, x):
        mean, std = (torch.tensor(s, device=x.device).view(1, 3, 1, 1) for s in IMAGENET)
        x = 2 * (x * std + mean) - 1                       # Encoder normalised it for DINOv2
        tokens = self.stage(x, self.stages[:2]).flatten(2).transpose(1, 2)  # (B, H/4 * W/4, 96)
        return {"x_norm_patchtokens": F.layer_norm(tokens, tokens.shape[-1:])}


def load_encoder(name="dinov2_vitb14", source=None, resize="bicubic", imagenet=True):
    """
    DINOv2 (Oquab et al. 2023) as a frozen Encoder on the CPU.
    name     a key of ENCODERS
    source   None: the code by torch.hub, one pinned commit; a folder: a clone of that repository;
             "random": a small untrained ViT of width 64, the same in every run and on every rank,
             whatever the name; a .pt file: the LabelNet that experiments/miniature.py trained. The
             weights of the first two come from the official URL, once: torch.hub keeps them below
             TORCH_HOME, and a file that lies there already is taken
    resize, imagenet  as Encoder takes them; a LabelNet is always shown its own input
    raises   ValueError for an unknown name or a file without a LabelNet; FileNotFoundError without
             code, weights or network, with the places where they belong
    """
    if name not in ENCODERS:
        raise ValueError(f"--encoder {name}: unknown, take one of {', '.join(ENCODERS)}")
    if source == "random":
        warnings.warn("--encoder_source random: the target is an UNTRAINED network; it exercises "
                      "the code and teaches the model NOTHING", stacklevel=2)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)         # torch.manual_seed reaches the GPUs too
            return Encoder(RandomViT(), 64, resize=resize, imagenet=imagenet)
    if source is not None and source.endswith(".pt"):
        return Encoder(load_labelnet(source), LabelNet.token_width, LabelNet.patch)
    if source is not None and not os.path.isfile(os.path.join(source, "hubconf.py")):
        repository = f"https://github.com/{REPOSITORY.split(':')[0]}"
        raise FileNotFoundError(f"--encoder_source {source}: no hubconf.py in there; give the "
                                f"folder of a clone of {repository}, or random")
    network = load_dinov2(name, source)
    return Encoder(network, ENCODERS[name], resize=resize, imagenet=imagenet)


def load_labelnet(path):
    """The LabelNet in a file of experiments/miniature.py; the errors of load_encoder."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        network = LabelNet(checkpoint["num_classes"])
        network.load_state_dict(checkpoint["model"])
        finite = all(tensor.isfinite().all() for tensor in network.state_dict().values())
    except FileNotFoundError:
        raise FileNotFoundError(f"--encoder_source {path}: no such file; "
                                "experiments/miniature.py trains one") from None
    except Exception:                                      # a damaged file fails in any way
        raise ValueError(f"--encoder_source {path}: not a LabelNet of "
                         "experiments/miniature.py") from None
    if not finite:
        raise ValueError(f"--encoder_source {path}: holds weights that are not finite; train it "
                         "anew with experiments/miniature.py")
    return network


def load_dinov2(name, source):
    """DINOv2 by torch.hub: its code from a clone or the pinned commit, its official weights."""
    file = name.replace("_reg", "_reg4") + "_pretrain.pth"
    url = f"{WEIGHTS}/{name.removesuffix('_reg')}/{file}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "xFormers")  # DINOv2 says that it does without
            network = torch.hub.load(               # validation knows heads of branches only
                source or REPOSITORY, name, source="local" if source else "github",
                pretrained=False, verbose=False, trust_repo=True, skip_validation=True)
        network.load_state_dict(torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, weights_only=True))
    except OSError as error:                               # no network, or it broke off
        reason = getattr(error, "reason", error)
        place = os.path.join(torch.hub.get_dir(), "checkpoints", file)
        clone = f"https://github.com/{REPOSITORY.replace(':', '/tree/')}"
        raise FileNotFoundError(f"{name}: fetching it failed ({reason}): put {url} at {place} and "
                                f"give a clone of {clone} as --encoder_source DIR") from None
    except (RuntimeError, TypeError, pickle.UnpicklingError, EOFError, ImportError,
            SyntaxError) as error:                         # code without this name, other weights
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} from {source or REPOSITORY} with {file}: {reason}") from None
    return network


# --------------------------------------------------------------------------------------------------
# The target's filter (Sec. 3.5)

@full_precision
def filter_target(tokens, kind, grid, sigma1=DOG_SIGMAS[0], sigma2=DOG_SIGMAS[1], norm_std=0.6):
    """
    What of the features the transformer is to match.
    tokens   (B, T, D) on the grid (h, w), T = h*w
    kind     "none"; "spnorm": spectral.spatial_norm; "dog": Eq. 6 on the grid, then every channel
             divided by its std over the tokens
    sigma1, sigma2  of the DoG, in tokens, 0 <= sigma1 < sigma2
    norm_std  share of the mean over the tokens that is taken off, as Table 6's "normalization std"
             reads: iREPA's 0.6 is the factor on the mean in its code (zscore_alpha), so DoG's 1.0
             is full subtraction. A DoG has no DC, so there the factor changes nothing
    returns  (B, T, D), float32
    raises   ValueError for an unknown kind, a grid that does not hold T tokens, sigmas out of order

    The default sigmas are our choice, the paper's text names none. On a 16x16 grid DCT index u is
    u / 2 cycles per image. Where objects and their parts lie is said by u = 2 .. 8, one to four
    cycles; u = 0 is the common offset, u = 1 a slope across the image, and beyond 8 neighbours
    differ: edges of single tokens, and noise. Gain of the sampled kernels, G(sigma1) - G(sigma2):
        (1.0, 2.5)   0 at DC, peak 0.59 at u = 4.3, half of it at u = 1.9 and 7.9: that band
        (1.0, 2.0)   peak 0.47 at u = 4.9, half at 2.3 and 8.6: weak at the lowest of the layout
        (0.5, 2.0)   peak at u = 6.5, above half of it from 2.7 to the end: nearly a high-pass
        (1.0, 4.0)   peak at u = 3.1, half at 1.3 and 7.0: lets slopes through
    """
    T, (h, w) = tokens.shape[1], grid
    if T != h * w:
        raise ValueError(f"filter_target: {T} tokens do not fill a grid of {h}x{w}")
    if kind == "none":
        return tokens
    if kind == "spnorm":
        return spatial_norm(tokens, norm_std)
    if kind == "dog":
        x = dog(tokens.transpose(1, 2).unflatten(2, (h, w)), sigma1, sigma2)  # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)                                      # (B, T, D)
        return x / (x.std(dim=1, keepdim=True, correction=0) + 1e-6)
    raise ValueError(f"filter_target: kind {kind!r} is none of none, spnorm, dog")


# --------------------------------------------------------------------------------------------------
# The transformer's side

class Projector(nn.Module):
    """
    From the transformer's width to the encoder's; trained with the model, not needed to sample.
    kind     "mlp": three linear layers with SiLU, token by token (REPA); "conv": one 3x3
             convolution on the grid (iREPA, REPA-DoG)
    dim, out_dim    widths; hidden: of the mlp, whose weights start as REPA's: xavier, bias 0
    forward(tokens, grid): (B, T, dim) on the grid (h, w) -> (B, T, out_dim)
    raises   ValueError for an unknown kind, or tokens of another width or count
    """

    def __init__(self, kind, dim, out_dim, hidden=2048):
        super().__init__()
        if kind not in ("mlp", "conv"):
            raise ValueError(f"Projector: kind {kind!r} is none of mlp, conv")
        self.kind, self.dim = kind, dim
        if kind == "conv":
            self.layers = nn.Conv2d(dim, out_dim, 3, padding=1)
        else:
            self.layers = nn.Sequential(
                nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, out_dim))
            for linear in self.layers[::2]:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, tokens, grid):
        if tokens.shape[1:] != (grid[0] * grid[1], self.dim):
            raise ValueError(f"Projector: got {tokens.shape[1]} tokens of width {tokens.shape[2]}, "
                             f"expected {grid[0]}x{grid[1]} of width {self.dim}")
        if self.kind == "mlp":
            return self.layers(tokens)
        return self.layers(tokens.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


@full_precision
def alignment_loss(projected, target):
    """
    -mean over tokens and batch of the cosine between projected and target, both (B, T, D); the
    gradient goes to projected only.
    returns  float32 scalar in [-1, 1], -1 when every token points as its target
    raises   ValueError if the shapes differ (they would broadcast)
    """
    if projected.shape != target.shape:
        raise ValueError(f"alignment_loss: projected tokens {tuple(projected.shape)} and target "
                         f"{tuple(target.shape)} differ in shape")
    target = target.detach().to(projected.dtype)
    return -F.cosine_similarity(projected, target, dim=-1).mean()
