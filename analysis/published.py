"""
The spectra that the paper's authors print for their figures (Figs. 4, 5, 7, 8), to compare with
one's own: shares of log(1 + power) in 16 rings, lowest frequency first, DC kept, as
spectral.spectrum_distribution(x, remove_dc=False) measures them. TARGET, what the latents are to
match, is the image's spectrum with gamma 1.

Source: latent_analysis.py of forever208/SpectrumMatching, branch SM-DSM.
"""
import torch

TARGET = "flattened by 1.0"

# in units of 1e-4, as printed; CelebA and ImageNet at 256 px
CELEBA = """
image:              4057 2333 1190 0835 0424 0317 0194 0142 0108 0091 0076 0060 0053 0044 0040 0035
flattened by 1.0:   1961 1560 1099 0977 0677 0617 0472 0404 0358 0340 0313 0278 0266 0238 0229 0212
SD-VAE:             1671 1312 0833 0710 0587 0538 0513 0476 0460 0455 0438 0419 0408 0398 0393 0389
Scale Equivariance: 1666 1385 1134 0955 0789 0685 0620 0493 0438 0393 0283 0494 0175 0163 0159 0170
DSM:                1638 1471 1202 1037 0774 0677 0529 0415 0377 0337 0290 0306 0258 0242 0230 0216
ESM:                1658 1483 1130 0985 0754 0652 0531 0446 0387 0363 0329 0295 0260 0249 0246 0233
"""
IMAGENET = """
image:              4636 1917 1005 0668 0391 0266 0218 0163 0133 0124 0103 0096 0076 0069 0067 0068
flattened by 1.0:   2158 1274 0928 0801 0607 0507 0486 0421 0391 0399 0371 0375 0322 0314 0320 0326
VA-VAE:             1893 1489 1356 1029 0707 0551 0508 0414 0336 0325 0331 0257 0219 0205 0198 0181
DINOv2-B features:  2288 1442 1042 0824 0629 0515 0458 0395 0353 0339 0335 0300 0281 0273 0268 0258
"""


def parse(table):
    """{name: 16 shares that sum to 1, up to their printed four digits}."""
    lines = [line.split(":") for line in table.strip().splitlines()]
    return {name: [int(number) / 1e4 for number in row.split()] for name, row in lines}


CURVES = dict(celeba=parse(CELEBA), imagenet=parse(IMAGENET))


def divergence(target, curve):
    """KL(target || curve), nats, of two spectra (16,), each scaled to sum 1 exactly."""
    p, q = (torch.as_tensor(shares, dtype=torch.float64) for shares in (target, curve))
    p, q = p / p.sum(), q / q.sum()
    return (p * (p.log() - q.log())).sum().item()
