"""
Pictures that the scripts share: latents as colours (Fig. 3), grids of samples, labelled rows. PNG files; images in [0, 1] here.
"""
import torch
import torch.nn.functional as F

from runtime import write_atomic


def pca_rgb(latents):
    """
    The first three principal components over all cells of all latents as colours (Fig. 3).
    latents  (B, C, h, w), any C >= 1
    returns  (B, 3, h, w) in [0, 1]; mid-grey is the mean, two standard deviations of each component span half the range
    """
    B, C, h, w = latents.shape
    cells = latents.float().movedim(1, -1).reshape(-1, C)                                  # (B*h*w, C)
    cells = cells - cells.mean(0)
    with torch.autocast(latents.device.type, enabled=False):
        _, directions = torch.linalg.eigh(cells.T @ cells)                                 # ascending eigenvalues
    directions = directions[:, -3:].flip(-1)
    directions = directions * directions.sum(0).sign().where(directions.sum(0) != 0, torch.ones(()).to(directions))  # one sign for all
    components = F.pad(cells @ directions, (0, 3 - min(C, 3)))                             # (B*h*w, 3)
    components = components / (2 * components.std(0, correction=0)).clamp_min(1e-12)
    return (components * 0.25 + 0.5).clamp(0, 1).view(B, h, w, 3).movedim(-1, 1)


def picture_grid(images, path, columns=8):
    """Images (N, 3, H, W) in [0, 1], clipped, side by side as one PNG."""
    from torchvision.utils import save_image
    write_atomic(path, lambda file: save_image(images.float().cpu().clamp(0, 1), file, "png", nrow=columns, padding=2, pad_value=1.0))


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
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=100, bbox_inches="tight"))
    plt.close(figure)
