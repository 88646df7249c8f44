"""
Every number and figure of the project. Reconstruction: PSNR, SSIM, L1 (Table 2, left half), and what the latent spectrum looks like
(Figs. 3, 5). Images (B, 3, H, W) in [-1, 1]; metrics are per image, (B,) float32, so that any split over batches and processes
averages to the same number.
"""
import torch
import torch.nn.functional as F


def to_uint8(images):
    """[-1, 1] -> 0..255, rounded: what a PNG would hold. (B, 3, H, W) uint8."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(a, b):
    """
    Peak signal-to-noise ratio, dB, on 8-bit rounded images: 10 log10(255^2 / MSE).
    a, b     (B, 3, H, W) in [-1, 1]
    returns  (B,) float32; identical images count 100 dB
    """
    mse = (to_uint8(a).float() - to_uint8(b).float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255 ** 2 / mse.clamp_min(255 ** 2 * 1e-10))


def ssim(a, b, data_range=2.0):
    """
    Structural similarity (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, K = (0.01, 0.03), only windows that fit inside,
    per channel, then the mean over channels and windows.
    a, b     (B, C, H, W), sides of at least 11 (else ValueError); data_range 2 for images in [-1, 1]
    returns  (B,) float32, 1 for identical images
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"ssim: images of {a.shape[-2]}x{a.shape[-1]} are smaller than its 11x11 window")
    a, b = a.float(), b.float()
    C = a.shape[1]
    taps = torch.exp(-0.5 * ((torch.arange(11, device=a.device) - 5) / 1.5) ** 2)
    taps = (taps / taps.sum()).expand(C, 1, 11)

    def window(x):                                                                         # Gaussian mean over every 11x11 window
        return F.conv2d(F.conv2d(x, taps[..., None], groups=C), taps[..., None, :], groups=C)

    mean_a, mean_b = window(a), window(b)
    var_a, var_b = window(a * a) - mean_a ** 2, window(b * b) - mean_b ** 2
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(1)


def pca_rgb(latents):
    """
    The first three principal components over all cells of all latents as colours (Fig. 3).
    latents  (B, C, h, w), any C >= 1
    returns  (B, 3, h, w) in [0, 1]; mid-grey is the mean, two standard deviations of each component span half the range
    """
    B, C, h, w = latents.shape
    cells = latents.float().movedim(1, -1).reshape(-1, C)                                  # (B*h*w, C)
    cells = cells - cells.mean(0)
    _, directions = torch.linalg.eigh(cells.T @ cells)                                     # ascending eigenvalues
    directions = directions[:, -3:].flip(-1)
    directions = directions * directions.sum(0).sign().where(directions.sum(0) != 0, torch.ones(()).to(directions))  # one sign for all
    components = F.pad(cells @ directions, (0, 3 - min(C, 3)))                             # (B*h*w, 3)
    components = components / (2 * components.std(0, correction=0)).clamp_min(1e-12)
    return (components * 0.25 + 0.5).clamp(0, 1).view(B, h, w, 3).movedim(-1, 1)


def picture_grid(images, path, columns=8):
    """Images (N, 3, H, W) in [0, 1], clipped, side by side as one PNG."""
    from torchvision.utils import save_image
    save_image(images.float().cpu().clamp(0, 1), path, nrow=columns, padding=2, pad_value=1.0)


def figure_rows(rows, path):
    """
    A grid of pictures with a label before every row, as PNG.
    rows     {label: (N, 3, h, w) in [0, 1]}; the N of all rows are equal, their sizes may differ (small ones are shown in blocks)
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns + 0.3, 1.3 * len(rows)), squeeze=False,
                                gridspec_kw=dict(wspace=0.04, hspace=0.04))
    for (label, images), line in zip(rows.items(), axes):
        line[0].set_ylabel(label, fontsize=8)
        for image, ax in zip(images, line):
            ax.imshow(image.float().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
