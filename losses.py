"""
All training losses of the autoencoder. ESM, DSM and the methods of Table 1 either add a loss on the
latent, or apply the same transform to latent and image, so that the decoder learns to map one to
the other.

    kl_loss              SD-VAE: KL(q(z|x) || N(0, 1)), weight 1e-6 (Eq. 2)
    esm_loss             ESM: KL(f^gamma P_image || P_latent), weight 0.01 (Sec. 3.3, Alg. 1, Eq. 3)
    dsm_pair             DSM: x, z -> both DCT-masked, n from {0, 8, 10, 12} (Alg. 2, Fig. 10)
    scale_pair           Scale Equivariance: x, z -> both downsampled by 1, 2 or 4 (low-pass: A.4)
    eq_pair              EQ-VAE: x, z -> both scaled and rotated
    vf_loss              VA-VAE: align projected z with DINOv2 features, tokenwise and pairwise
    low_freq_align_loss  UAE: match low DCT frequencies of projected z and of DINOv2 features
    reconstruction       L1 + 0.5 LPIPS(decode(z), x) + 0.5 * adaptive weight * PatchGAN (Table 5)

Images (B, 3, H, W) in [-1, 1]; latents (B, C, h, w), sampled from the posterior, not normalised.
Losses are float32 scalars, batch means. Numbering as in arXiv:2603.14645 v1.
"""
import os
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from spectral import dct2, lowpass, match_resolution, spectrum_distribution, zigzag

DSM_MASKS = (0, 8, 10, 12)  # anti-diagonals removed (the best set of Table 8)
SCALES = (1, 2, 4)          # downsampling factors of Scale Equivariance


def _check_same_shape(function, a, b):
    if a.shape != b.shape:  # otherwise they might broadcast
        raise ValueError(f"{function}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ")


# --------------------------------------------------------------------------------------------------
# Losses on the latent

def kl_loss(mean, logvar):
    """
    KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over the latent's dimensions, batch mean.
    mean     (B, C, h, w), or any (B, ...)
    logvar   same shape, below 88, where exp overflows float32 (vae.Posterior clamps it to 20)
    """
    _check_same_shape("kl_loss", mean, logvar)
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean.square() + logvar.expm1() - logvar)  # expm1: no cancellation near 0
    return kl.flatten(1).sum(1).mean()


def esm_loss(images, latents, gamma=1.0, n_bins=16):
    """
    Encoding Spectrum Matching (Alg. 1): match the latent's power spectrum to the image's, flattened
    by gamma. Ring b = 1 .. n_bins: P_b ~ log(1 + b^gamma mean_b |DCT|^2), without DC, sum 1.
    images   (B, 3, H, W), resized to the latent's size by match_resolution; no gradient
    latents  (B, C, h, w), sampled, not normalised; the only input that gets a gradient.
             ValueError if B differs
    gamma    0 copies the image's power law, larger is flatter (`delta` in the authors' code)
    returns  KL(f^gamma P_image || P_latent), nats, batch mean, >= 0. Depends on the latent's scale
             because of log(1 + P) in spectrum_distribution
    """
    if len(images) != len(latents):
        raise ValueError(f"esm_loss: {len(images)} images and {len(latents)} latents")
    P = spectrum_distribution(latents.float(), n_bins)  # (B, n_bins)
    with torch.no_grad():
        small = match_resolution(images.float(), latents.shape[-2:])
        target = spectrum_distribution(small, n_bins, gamma)  # (B, n_bins)
    return (target * (target.log() - P.log())).sum(1).mean()


def vf_loss(projected, features, cos_margin=0.5, dist_margin=0.25):
    """
    VA-VAE's alignment loss (Yao et al. 2025). A partial ESM: foundation-model features are smooth
    over space, and a latent with the same directions and pairwise similarities inherits the
    frequencies at which they vary, though not their power.
    projected  (B, T, D) latent cells after a 1x1 projection to the feature width
    features   (B, T, D) on the same grid, no gradient; ValueError if the shapes differ
    returns    mean relu(1 - cos_margin - cos(p_t, f_t))
               + mean relu(|cos(p_s, p_t) - cos(f_s, f_t)| - dist_margin); 0 within both margins
    """
    _check_same_shape("vf_loss", projected, features)
    with torch.autocast(projected.device.type, enabled=False):
        p = F.normalize(projected.float(), dim=-1)
        f = F.normalize(features.detach().float(), dim=-1)
        point = F.relu(1 - cos_margin - (p * f).sum(-1))
        gap = (p @ p.transpose(1, 2) - f @ f.transpose(1, 2)).abs()
        return point.mean() + F.relu(gap - dist_margin).mean()


def low_freq_align_loss(projected, features, grid, coefficients=64):
    """
    UAE's semantic loss (Fan et al. 2025; weight 0.5): match the first DCT coefficients, in zigzag
    order, of the latent and of the frozen features. A partial ESM: low frequencies follow the
    features, high ones are unconstrained. In UAE itself the encoder is a trainable DINOv2, and the
    decoder is trained with noise and random band masks; neither is implemented.
    projected, features  (B, T, D), T = h*w in row-major order; no gradient into the features
    grid     (h, w)
    coefficients  how many; all if the grid has fewer
    returns  mean squared difference over coefficients, channels and batch
    """
    _check_same_shape("low_freq_align_loss", projected, features)
    difference = projected.float() - features.detach().float()      # the DCT is linear
    spectrum = dct2(difference.transpose(1, 2).unflatten(2, grid))  # (B, D, h, w)
    low = spectrum.flatten(2)[..., zigzag(*grid, spectrum.device)[:coefficients]]
    return low.square().mean()


# --------------------------------------------------------------------------------------------------
# Pairs: reconstruction target and decoder input.
# Each returns (target images, decoder input), float32; image sides stay f times the latent's.

def dsm_pair(images, latents, n, block=8):
    """
    Decoding Spectrum Matching (Alg. 2): image and latent low-passed by the same triangular mask.
    n        anti-diagonals removed, one n for the whole batch, from DSM_MASKS; 0 changes nothing
    returns  the pair, shapes unchanged
    raises   ValueError if n is out of range, or n > 0 and a side is not a multiple of block
    """
    return lowpass(images.float(), n, block), lowpass(latents.float(), n, block)


def scale_pair(images, latents, k):
    """
    Scale Equivariance: image and latent downsampled by a factor k, bilinear.
    k        one for the whole batch, from SCALES; 1 changes nothing
    returns  (B, 3, H/k, W/k), (B, C, h/k, w/k)
    raises   ValueError if k does not divide the latent's sides
    """
    h, w = latents.shape[-2:]
    if h % k or w % k:
        raise ValueError(f"scale_pair: a latent of {h}x{w} cannot be downsampled by {k}")
    return _scale_both(images, latents, 1 / k)


def eq_pair(images, latents, scale, rot):
    """
    EQ-VAE: image and latent scaled (bilinear) and rotated alike.
    scale    in (0, 1]; EQ-VAE draws k/32 with k in 8..31. Latent sides are rounded to whole cells,
             image sides are f times that
    rot      number of counter-clockwise quarter turns, 0..3
    returns  the pair; height and width swap when rot is odd
    """
    both = _scale_both(images, latents, scale)
    # contiguous: the strides of a rotated tensor would trigger a recompilation
    images, latents = (torch.rot90(x, rot, (2, 3)).contiguous() for x in both)
    return images, latents


def _scale_both(images, latents, scale):
    (H, W), (h, w) = images.shape[-2:], latents.shape[-2:]
    f = H // h
    if (H, W) != (f * h, f * w):
        raise ValueError(f"an image of {H}x{W} is not f times a latent of {h}x{w}")
    return scale_images(images, scale, f), scale_images(latents, scale, 1)


def scale_images(images, scale, f):
    """
    Images (B, 3, H, W) scaled by scale in (0, 1], bilinear, to whole latent cells, float32:
    H -> f * round(H / f * scale), W likewise. EQ-VAE encodes some batches at reduced size.
    """
    size = [f * max(1, round(side // f * scale)) for side in images.shape[-2:]]
    if size == [*images.shape[-2:]]:
        return images.float()
    return F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)


# --------------------------------------------------------------------------------------------------
# Perceptual and adversarial losses: LPIPS and PatchGAN

class PerceptualLoss(nn.Module):
    """
    LPIPS (VGG, v0.1; Zhang et al. 2018), frozen, in float32 even under autocast. forward(a, b):
    images (B, 3, H, W) in [-1, 1] with sides of at least 16 -> scalar, batch mean. Torchvision's
    VGG-16 weights are downloaded once; FileNotFoundError if that fails, ValueError if the file is
    damaged.
    """

    def __init__(self):
        super().__init__()
        import lpips
        from torchvision.models import VGG16_Weights
        url = VGG16_Weights.IMAGENET1K_V1.url
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lpips uses a deprecated torchvision interface
                self.lpips = lpips.LPIPS(net="vgg", version="0.1", verbose=False)
        except OSError as error:  # no network, or an interrupted download
            reason = getattr(error, "reason", error)
            raise FileNotFoundError(
                f"LPIPS needs torchvision's VGG-16, and downloading it failed ({reason}): "
                f"put {url} at {path}, or train without it: --lpips_weight 0") from None
        except Exception as error:  # reading a damaged file can raise anything
            raise ValueError(f"{path}: not torchvision's VGG-16 ({type(error).__name__}); remove "
                             f"the file to download it again from {url}") from None
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stays in evaluation mode: LPIPS has dropout, and the loss must be deterministic."""
        return super().train(False)

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            return self.lpips(a.float(), b.float()).mean()


class PatchDiscriminator(nn.Module):
    """
    PatchGAN (Isola et al. 2017; 64 channels, 3 layers, k = 4): one logit per overlapping 70 x 70
    patch. forward: (B, 3, H, W) in [-1, 1] -> (B, 1, H/8 - 2, W/8 - 2); sides of at least 24.
    Module names and initial weights, N(0, 0.02), follow CompVis' `NLayerDiscriminator`; the paper's
    authors' code draws N(0, 0.2).
    """

    def __init__(self, channels=64):
        super().__init__()
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for inner, stride in ((channels, 2), (2 * channels, 2), (4 * channels, 1)):
            outer = 2 * inner
            layers += [nn.Conv2d(inner, outer, 4, stride=stride, padding=1, bias=False),
                       # no running statistics: never used, and one NaN would stay in them
                       nn.BatchNorm2d(outer, track_running_stats=False), nn.LeakyReLU(0.2, True)]
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
    """Discriminator: mean relu(1 - real) + mean relu(1 + fake) of logits; about 2 at the start."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_g_loss(fake):
    """Generator: -mean(fake logits)."""
    return -fake.float().mean()


def adaptive_weight(recon, rec_grad, gan_grad, last_layer, average=lambda gradient: gradient,
                    limit=1e4):
    """
    VQGAN's lambda (Esser et al. 2021): |d rec / d last_layer| / |d gan / d last_layer|, which gives
    both losses equal gradient norms there. Both losses are passed as gradients at recon, so only
    the few operations between last_layer and recon are backpropagated through.
    recon    for the GAN: the reconstruction, with decoder.conv_out as last_layer; for an alignment
             loss: the latents, with encoder.conv_out. Its graph is retained
    rec_grad, gan_grad  gradients of the two losses at recon, of its shape
    average  mean of a tensor over all processes, so that they use the same weight
    limit    upper limit of the weight: 1e4 in VQGAN, 1e8 in VA-VAE
    returns  float32 scalar in [0, limit], no gradient
    """
    def norm(grad):
        weight_grad, = torch.autograd.grad(recon, last_layer, grad.to(recon.dtype),
                                           retain_graph=True)
        return average(weight_grad).float().norm()

    ratio = norm(rec_grad) / (norm(gan_grad) + 1e-4)  # 1e-4: finite if the GAN gradient is 0
    return ratio.clamp(0, limit).detach()
