"""
Every training loss of an autoencoder. What the methods of Table 1 have in common: a term on the spectrum of the latent, or a pair
(target, latent) that went through the same operation, so that the decoder learns to map one to the other.

    SD-VAE              KL(q(z|x) || N(0, 1)), weight 1e-6                                               kl_loss
    ESM                 KL(P_image^gamma || P_latent), weight 0.01                                       esm_loss   (Sec. 3.2, Alg. 1)
    DSM                 x, z -> DCT-masked x, z by one mask n drawn from {0, 8, 10, 12}                  dsm_pair   (Alg. 2, Fig. 10)
    Scale Equivariance  x, z -> both downsampled by k drawn from {1, 2, 4}                               scale_pair (a low-pass: A.4)
    EQ-VAE              x, z -> both scaled and rotated                                                  eq_pair
    VA-VAE              projected z close to DINOv2 features, in cosine and in pairwise cosines          vf_loss
    UAE                 the low frequencies of projected z close to those of DINOv2 features             low_freq_align_loss
    reconstruction      L1 + 0.5 LPIPS(decode(z), x) + 0.5 * adaptive weight * PatchGAN                  (Table 5)

Images (B, 3, H, W) in [-1, 1]; latents (B, C, h, w), sampled from the posterior, not normalised. Losses are float32 scalars.
Numbering: arXiv:2603.14645 v1.
"""
import os
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from spectral import dct2, idct2, lowpass, match_resolution, spectrum_distribution

DSM_MASKS = (0, 8, 10, 12)                                                                 # anti-diagonals cut (Table 8, the best set)
SCALES = (1, 2, 4)                                                                         # Scale Equivariance's reductions


# ---------------------------------------------------------------------------------------------------------------------------------
# Terms on the latent

def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over a latent's dimensions, averaged over the batch; (B, C, h, w) each."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def esm_loss(images, latents, gamma=1.0, n_bins=16):
    """
    Encoding Spectrum Matching: the latent's power is distributed over frequency as the image's, flattened by gamma.
    images   (B, 3, H, W), brought to the latent's size by match_resolution; no gradient
    latents  (B, C, h, w), the sampled ones, before any normalisation; the gradient goes here only
    gamma    0 copies the image's power law, larger is flatter (`delta` in the authors' code)
    returns  KL(P_image^gamma || P_latent), nats, averaged over the batch, >= 0. It sees the latent's scale: by the log(1 + P) in the
             descriptor, rescaling z changes the loss (see spectrum_distribution), so it also nudges the scale until the shapes agree
    """
    with torch.no_grad():
        target = spectrum_distribution(match_resolution(images, latents.shape[-2:]), n_bins, gamma)  # (B, n_bins)
    P = spectrum_distribution(latents, n_bins)                                             # (B, n_bins)
    return (target * (target.log() - P.log())).sum(1).mean()


def vf_loss(projected, features, cos_margin=0.5, dist_margin=0.25):
    """
    VA-VAE's alignment (Yao et al. 2025): a partial ESM, for features of a foundation model are smooth over space, and a latent that
    shares their directions and their pairwise similarities inherits where in frequency they differ, though not its own power.
    projected  (B, T, D) latent cells after a 1x1 projection to the feature width; features (B, T, D) of the same grid, no gradient
    returns    mean relu(1 - cos_margin - cos(p_t, f_t)) + mean relu(|cos(p_s, p_t) - cos(f_s, f_t)| - dist_margin); 0 once both
               are within their margins
    """
    with torch.autocast(projected.device.type, enabled=False):
        p, f = F.normalize(projected.float(), dim=-1), F.normalize(features.detach().float(), dim=-1)
        cosine = F.relu(1 - cos_margin - (p * f).sum(-1)).mean()
        return cosine + F.relu((p @ p.transpose(1, 2) - f @ f.transpose(1, 2)).abs() - dist_margin).mean()


def low_freq_align_loss(projected, features, grid, cutoff=0.25):
    """
    UAE as Table 1 describes it: only the low frequencies of the latent are aligned with those of the features. A partial ESM: the
    low end of the spectrum takes its layout from the features, the high end is free.
    projected, features  (B, T, D) on a grid (h, w), T = h*w in row-major order; no gradient into the features
    cutoff   in (0, 1]: coefficients with u < cutoff * h and v < cutoff * w are kept (our choice of low-pass; the paper names none)
    returns  1 - mean cosine of the low-passed tokens, in [0, 2]
    """
    h, w = grid

    def low(tokens):                                                                       # (B, T, D) -> (B, T, D)
        coefficients = dct2(tokens.transpose(1, 2).unflatten(2, grid))                     # (B, D, h, w)
        keep = (torch.arange(h, device=tokens.device) < cutoff * h)[:, None] & (torch.arange(w, device=tokens.device) < cutoff * w)
        return idct2(coefficients * keep).flatten(2).transpose(1, 2)
    return 1 - F.cosine_similarity(low(projected), low(features.detach()), dim=-1).mean()


# ---------------------------------------------------------------------------------------------------------------------------------
# Pairs: what the decoder is shown, and what it shall answer. Each returns (target images, latents), spatially f : 1 as before.

def dsm_pair(images, latents, n, block=8):
    """
    Decoding Spectrum Matching (Alg. 2): image and latent low-passed by the same triangular DCT mask.
    n        anti-diagonals cut, one for the whole batch, drawn from DSM_MASKS; 0 changes nothing
    returns  float32 pair of unchanged shapes; ValueError if a side of either does not tile into block x block
    """
    return lowpass(images, n, block), lowpass(latents, n, block)


def scale_pair(images, latents, k):
    """
    Scale Equivariance: image and latent downsampled k times, bilinear.
    k        1, 2 or 4, one for the batch; 1 changes nothing. ValueError if the latent's sides do not divide by k
    returns  (B, 3, H/k, W/k), (B, C, h/k, w/k), float32
    """
    h, w = latents.shape[-2:]
    if h % k or w % k:
        raise ValueError(f"scale_pair: a latent of {h}x{w} cannot be downsampled {k} times")
    return _resize_pair(images, latents, (h // k, w // k))


def eq_pair(images, latents, scale, rot):
    """
    EQ-VAE: image and latent scaled (bilinear) and rotated alike.
    scale    in (0, 1], EQ-VAE draws k/32 with k in 8..31; the latent's side is rounded to whole cells, the image's is f times that
    rot      quarter turns, counter-clockwise, 0..3
    returns  the pair, float32; height and width swap when rot is odd
    """
    h, w = latents.shape[-2:]
    images, latents = _resize_pair(images, latents, (max(1, round(h * scale)), max(1, round(w * scale))))
    return torch.rot90(images, rot, (2, 3)), torch.rot90(latents, rot, (2, 3))


def scale_images(images, scale, f):
    """Images (B, 3, H, W) scaled, bilinear, to whole latent cells: H -> f * round(H / f * scale), likewise W; EQ-VAE encodes some such."""
    size = [f * max(1, round(side // f * scale)) for side in images.shape[-2:]]
    return F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)


def _resize_pair(images, latents, size):
    """Latents to size, images to f times that; f = H / h = W / w."""
    f = images.shape[-1] // latents.shape[-1]
    if latents.shape[-2:] == size:
        return images.float(), latents.float()
    return (F.interpolate(images.float(), size=(size[0] * f, size[1] * f), mode="bilinear", align_corners=False),
            F.interpolate(latents.float(), size=size, mode="bilinear", align_corners=False))


# ---------------------------------------------------------------------------------------------------------------------------------
# Perception: LPIPS and PatchGAN

class PerceptualLoss(nn.Module):
    """
    LPIPS (VGG, v0.1; Zhang et al. 2018), frozen, float32 also under autocast. forward(a, b), images (B, 3, H, W) in [-1, 1] with sides
    of at least 16, -> scalar, batch mean. The calibration comes with the lpips package; the VGG-16 trunk is torchvision's file, which
    is downloaded once; FileNotFoundError says where it belongs when there is no network.
    """

    def __init__(self):
        super().__init__()
        import lpips
        from torchvision.models import VGG16_Weights
        url = VGG16_Weights.IMAGENET1K_V1.url
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                                            # lpips calls torchvision's older interface
                self.lpips = lpips.LPIPS(net="vgg", version="0.1", verbose=False)
        except OSError as error:                                                           # no network, or it broke off
            place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
            raise FileNotFoundError(f"LPIPS needs torchvision's VGG-16, and downloading it failed ({getattr(error, 'reason', error)}): fetch {url} yourself "
                                    f"and put it at {place}, or train without it: --lpips_weight 0") from None
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stays in evaluation mode: LPIPS has dropout, and its frozen network must answer the same every time."""
        return super().train(False)

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            return self.lpips(a.float(), b.float()).mean()


class PatchDiscriminator(nn.Module):
    """
    PatchGAN (Isola et al. 2017; 64 channels, 3 layers, k = 4): one logit per overlapping 70 x 70 patch. forward: (B, 3, H, W) in
    [-1, 1] -> (B, 1, H/8 - 2, W/8 - 2) for sides that divide by 8, at least 24. Names and initialisation as in CompVis' `NLayerDiscriminator`.
    """

    def __init__(self, in_channels=3, channels=64, n_layers=3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for i in range(1, n_layers + 1):                                                   # the last one keeps the resolution
            inner, outer = channels * min(2 ** (i - 1), 8), channels * min(2 ** i, 8)
            layers += [nn.Conv2d(inner, outer, 4, stride=2 if i < n_layers else 1, padding=1, bias=False),
                       nn.BatchNorm2d(outer), nn.LeakyReLU(0.2, True)]
        layers += [nn.Conv2d(outer, 1, 4, stride=1, padding=1)]
        self.main = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images):
        return self.main(images)


def hinge_d_loss(real, fake):
    """Discriminator: mean relu(1 - real) + mean relu(1 + fake), logits of any shape; 2 for a fresh discriminator."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_g_loss(fake):
    """Generator: -mean(fake logits)."""
    return -fake.float().mean()


def adaptive_weight(rec, gan, last_layer, average=lambda gradient: gradient):
    """
    VQGAN's balance (Esser et al. 2021): |grad of rec| / |grad of gan| at one layer, so that both pull alike: the decoder's last
    convolution for the GAN, the encoder's for an alignment of the latents.
    rec, gan     scalars that share a graph with last_layer (a parameter); the graph is kept
    average      mean of a tensor over the processes, so that all use one weight
    returns      detached scalar in [0, 1e4]; the 1e-4 below the line keeps it finite when gan has no gradient
    """
    rec_grad, = torch.autograd.grad(rec, last_layer, retain_graph=True)
    gan_grad, = torch.autograd.grad(gan, last_layer, retain_graph=True)
    rec_grad, gan_grad = average(rec_grad), average(gan_grad)
    return (rec_grad.float().norm() / (gan_grad.float().norm() + 1e-4)).clamp(0, 1e4).detach()
