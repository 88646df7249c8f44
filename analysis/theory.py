"""
The paper's argument, measured on trained models. evaluate.py's commands:

    denoise         how much of what Prop. 3.1 calls learnable has the network learnt, by frequency
    trajectory      in which order does sampling bring the frequencies in: coarse to fine?
    diffusability   what can be known of an autoencoder before any diffusion is trained

Prop. 3.1: of a frequency of power S, seen in noise at alpha_bar, a denoiser can save at most
S * SNR / (1 + SNR) of the squared error over predicting 0, if the data are Gaussian and the
frequencies independent. The rest, S / (1 + SNR), is the bound. A network also sees how frequencies,
channels and places hang together, their means and the class, so that it may get below the bound; it
gets above it where it is too small or trained too briefly.

Latents (N, C, h, w) normalised to std 1; t from 0 = data to 1 = noise; rings as in
spectral.radial_profile, up to 16. The functions take evaluate.py's flags and the device, yield
(values, settings), and write their figure at the end.
"""
from types import SimpleNamespace

import torch

from analysis.figures import (
    autoencoders,
    encode_all,
    need_blocks,
    some_images,
    subplots,
    unique_names,
    write_with_table,
)
from common.data import open_data, val_batches
from common.metrics import psnr
from common.weights import checkpoint_files, load_diffusion
from dit import Interpolant, NoiseStream
from losses import DSM_MASKS, esm_loss
from spectral import (
    dct2,
    fit_power_law,
    learnable_power,
    lowpass,
    power_spectrum,
    radial_profile,
)

TIMES = [(i + 0.5) / 20 for i in range(20)]                # uniform, as training draws them
SHOWN = (3, 7, 11, 15)                                     # of TIMES: t = .175, .375, .575, .775


def rings_of(latents):
    """How many rings a latent's spectrum is cut into, none of them empty: at most 16."""
    return min(16, *latents.shape[-2:])


def ring_power(latents, rings):
    """Mean power of each ring over latents (N, C, h, w) -> (rings,), float64 on the CPU."""
    return radial_profile(power_spectrum(latents), rings).double().mean(0).cpu()


# --------------------------------------------------------------------------------------------------
# What diffusion learns of each frequency

@torch.no_grad()
def denoised_power(model, process, latents, labels=None, times=TIMES, seed=0, batch_size=64):
    """
    Prop. 3.1 and a network, by ring and time.
    latents  (N, C, h, w) normalised, on the model's device; labels (N,) or None
    times    t in (0, 1) each; the noise of a latent follows from (seed, its number), at all times
    returns  power (R,): of the latents; learnable (T, R): Prop. 3.1 on every channel and
             coefficient, then the mean of a ring; left (T, R): the squared error of the predicted
             clean latent; all float64, per coefficient
    """
    rings, N = rings_of(latents), len(latents)
    S = dct2(latents.double()).square().mean(0)            # (C, h, w)
    of_ring = lambda P: radial_profile(P.mean(0)[None], rings)[0].cpu()
    learnable, left = [], []
    for t in times:
        alpha_bar = float(process.alpha_bar_at(t))
        learnable.append(of_ring(learnable_power(S, alpha_bar)))
        error = torch.zeros_like(S)
        for rows in torch.arange(N, device=latents.device).split(batch_size):
            z = latents[rows]
            eps = NoiseStream(seed, rows.tolist())(z.shape).to(z)
            z_t = process.noisy(z, eps, t)
            time = z.new_full((len(z),), process.time(t))
            output = model(z_t, time, labels[rows] if labels is not None else None)
            clean = process.clean(z_t.double(), output.double(), t)
            error += dct2(clean - z).square().sum(0)
        left.append(of_ring(error / N))
    return SimpleNamespace(power=of_ring(S), learnable=torch.stack(learnable),
                           left=torch.stack(left))


def share_learnt(found, weights):
    """
    Of the power that Prop. 3.1 calls learnable, the share that the network saves, over all times:
    above 1 where it beats the bound, below 0 where it is worse than predicting 0.
    weights  (R,) coefficients of each ring
    returns  of each ring (R,); of all of them, a float
    """
    saved, learnable = (found.power - found.left).sum(0), found.learnable.sum(0)
    return saved / learnable, float((weights * saved).sum() / (weights * learnable).sum())


def ring_sizes(h, w, rings):
    """How many coefficients of an (h, w) latent lie in each ring: (rings,) float64."""
    inside = radial_profile(torch.eye(h * w, dtype=torch.float64).view(-1, h, w), rings) > 0
    return inside.double().sum(0)


def held_out(file, args, device):
    """
    A run of train_diffusion.py with held-out images of its data: model, process, ae, normalised
    latents (N, C, h, w), and labels (N,) or None, all on the device.
    """
    model, process, ae, checkpoint = load_diffusion(file, args.ae, device)
    data, classes = args.data or checkpoint["data"], model.num_classes
    _, val_set = open_data(data, checkpoint["image_size"], val_images=args.val_images,
                           seed=checkpoint["data_seed"])
    if classes and len(val_set.classes) != classes:
        raise ValueError(f"--data {data}: has {len(val_set.classes)} classes, and {file} was "
                         f"trained with {classes}; give images of these classes")
    batches = [(images, labels) for images, labels, _ in val_batches(val_set, args.batch_size,
                                                                     device=device)]
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches]) if classes else None
    latents = ae.normalize(encode_all(ae, images, args.batch_size, seed=args.seed))
    return SimpleNamespace(model=model, process=process, ae=ae, latents=latents, labels=labels,
                           settings=dict(ckpt=file, step=checkpoint["step"], n=len(latents),
                                         model=checkpoint["model_name"], seed=args.seed))


def denoise_figure(args, device):
    """
    Prop. 3.1 on trained networks: by radial frequency the power of held-out latents, the part of it
    that the network fails to predict, and the part that the best denoiser of Gaussian latents must
    leave; a panel for each of four times, a colour for each run. Above the noise there is
    something to learn, below it nearly nothing.

    Printed: the share of the learnable power that was learnt, over twenty times spread evenly, as
    training draws them; of all frequencies, and ring by ring. Above 1: better than the bound, by
    what frequencies, channels and places tell about each other.
    """
    figure, axes = subplots(1, len(SHOWN), figsize=(4 * len(SHOWN), 4.4), sharey=True,
                            layout="constrained")
    rows, levels = [], set()
    files = checkpoint_files(args)
    for i, (file, name) in enumerate(zip(files, unique_names(files))):
        run = held_out(file, args, device)
        found = denoised_power(run.model, run.process, run.latents, run.labels, seed=args.seed,
                               batch_size=args.batch_size)
        rings = len(found.power)
        shares, total = share_learnt(found, ring_sizes(*run.latents.shape[-2:], rings))
        ring = torch.arange(1, rings + 1)
        for ax, k in zip(axes, SHOWN):
            alpha_bar = float(run.process.alpha_bar_at(TIMES[k]))
            bound = found.power - found.learnable[k]
            ax.semilogy(ring, found.power, color=f"C{i}", lw=5, alpha=0.25)
            ax.semilogy(ring, bound, color=f"C{i}", ls="--", lw=1)
            ax.semilogy(ring, found.left[k], color=f"C{i}", marker="o", ms=3, label=name)
            if i == 0 or alpha_bar not in levels:          # other processes, other levels
                levels.add(alpha_bar)
                colour = f"C{i}" if i else "gray"
                ax.axhline((1 - alpha_bar) / alpha_bar, color=colour, lw=1)
                ax.set(title=f"t = {TIMES[k]:.3g}", xlabel="ring (1 = low frequency)",
                       xticks=(1, 4, 8, 12, 16))
        for k, t in enumerate(TIMES):
            columns = (ring, found.power, found.learnable[k], found.left[k])
            rows += [(name, t, *line) for line in zip(*(column.tolist() for column in columns))]
        by_ring = " ".join(f"{share:.2f}" for share in shares.tolist())
        yield dict(share_learnt=total, by_ring=by_ring), run.settings
    styles = [dict(lw=5, alpha=0.25), dict(ls="--", lw=1), dict(marker="o", ms=3), dict(lw=1)]
    words = ["power of the latent", "left by the bound of Prop. 3.1", "left by the network",
             "noise"]
    colours = ["black", "black", "black", "gray"]
    lines = [axes[0].plot([], [], color=c, label=word, **style)[0]
             for word, style, c in zip(words, styles, colours)]
    axes[0].set_ylabel("power per coefficient, normalised latents")
    axes[0].legend(handles=lines, fontsize=8)
    axes[-1].legend(fontsize=8)
    write_with_table(args, figure, ("run", "t", "ring", "power", "learnable", "left"), rows)


# --------------------------------------------------------------------------------------------------
# In which order sampling brings the frequencies in

def follow_sampling(model, process, shape, steps, seed=0, labels=None, keep=1):
    """
    The predicted clean latents of one sampling run.
    shape    (N, C, h, w): N samples, as `evaluate.py gen` draws them by default: Euler-Maruyama for
             SiT, DDIM for U-ViT, no guidance
    returns  times (T,), falling to 0; power (T, R) of the predictions by ring, the last row that of
             the samples; predictions, T tensors (keep, C, h, w), float32
    """
    rings, times, power, kept = rings_of(torch.empty(shape)), [], [], []

    def watch(t, clean):
        times.append(t)
        power.append(ring_power(clean, rings))
        kept.append(clean[:keep].float())
    samples = process.sample(model, shape, steps, labels, noise=NoiseStream(seed, range(shape[0])),
                             watch=watch)
    watch(0.0, samples)
    return torch.tensor(times), torch.stack(power), kept


def half_times(times, power):
    """
    When each ring has reached half of its final power for good: (R,) t, between two steps by the
    straight line.
    times    (T,) falling; power (T, R), the last row the final one
    """
    half = []
    for share in (power / power[-1]).T:                    # (T,) of a ring
        below = (share < 0.5).nonzero().flatten()
        if not len(below):
            half.append(times[0])
            continue
        k = int(below[-1])                                 # the last step below half
        part = (0.5 - share[k]) / (share[k + 1] - share[k])
        half.append(times[k] + part * (times[k + 1] - times[k]))
    return torch.stack(half)


def half_times_of(power, process):
    """
    The same for the best denoiser of Gaussian latents: what it predicts has the power S * SNR /
    (1 + SNR), so half of S where SNR = 1, on a grid of 1000 times.
    power    (R,) -> (R,) t
    """
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    alpha_bar = process.alpha_bar_at(t).double()
    noise = (1 - alpha_bar) / alpha_bar                    # (999,), rises with t
    return t[torch.searchsorted(noise, power).clamp_max(998)]


def diagonal(half):
    """
    Slope of the diagonal, in t an octave: by how much later (closer to t = 0) a ring of twice the
    frequency comes in, by least squares on log2 of a ring's middle; ring 0 holds DC and is left
    out. half (R,) t.
    """
    octave = (torch.arange(1, len(half), dtype=half.dtype) + 0.5).log2()
    octave = octave - octave.mean()
    return -float((octave * half[1:]).sum() / octave.square().sum())


@torch.no_grad()
def trajectory_figure(args, device):
    """
    Coarse to fine: along a sampling run, the power of the predicted clean latent in each radial
    ring as a share of its final power. A ring comes in when it reaches half (white dots); the
    dashed line is when the best denoiser of Gaussian latents would bring it in, where SNR = 1.
    Power counts here whether it is right or wrong. Under the map what one sample's prediction
    decodes to, by time.

    Printed: the slope of the diagonal, in t an octave, of the run and of that denoiser.
    """
    files, strip = checkpoint_files(args), 8
    figure, axes = subplots(2, len(files), figsize=(5.6 * len(files), 5), squeeze=False,
                            layout="constrained", height_ratios=(5, 1))
    rows = []
    for (top, bottom), file, name in zip(axes.T, files, unique_names(files)):
        model, process, ae, checkpoint = load_diffusion(file, args.ae, device)
        labels = None
        if model.num_classes:
            labels = torch.arange(args.num_samples, device=device) % model.num_classes
        shape = (args.num_samples, model.in_channels, *model.input_size)
        times, power, kept = follow_sampling(model, process, shape, args.steps, args.seed, labels)
        half, ideal = half_times(times, power), half_times_of(power[-1], process)
        rings = range(1, power.shape[1] + 1)
        at = torch.linspace(1, 0, 200)                     # steps may be uneven: redraw on a grid
        nearest = (times[None] - at[:, None]).abs().argmin(1)
        share = (power / power[-1])[nearest].clamp(0, 1)
        top.imshow(share.T.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=1,
                   extent=(1, 0, 0.5, len(rings) + 0.5))
        top.plot(half.tolist(), rings, "o", color="white", ms=4, label="half of the final power")
        top.plot(ideal.tolist(), rings, "--", color="cyan", lw=1.5, label="SNR = 1")
        top.set(title=f"{name}: {diagonal(half):.2f} in t an octave", xlabel="t (1 = noise)",
                ylabel="ring (1 = low frequency)", xlim=(1, 0))
        top.legend(fontsize=8, loc="upper left")
        shown = [int((times - t).abs().argmin()) for t in torch.linspace(times[0], 0, strip)]
        frames = torch.cat([ae.decode(ae.denormalize(kept[k])) for k in shown])  # (8, 3, H, W)
        wide = torch.cat(list(frames.cpu() * 0.5 + 0.5), dim=2).clamp(0, 1)      # side by side
        bottom.imshow(wide.movedim(0, -1).numpy())
        bottom.set_axis_off()
        for t, line in zip(times.tolist(), power.tolist()):
            rows += [(name, t, r + 1, value) for r, value in enumerate(line)]
        yield (dict(slope=diagonal(half), slope_where_snr_is_1=diagonal(ideal)),
               dict(ckpt=file, step=checkpoint["step"], n=args.num_samples, steps=args.steps,
                    sampler="em" if isinstance(process, Interpolant) else "ddim", cfg=1,
                    seed=args.seed))
    write_with_table(args, figure, ("run", "t", "ring", "power"), rows)


# --------------------------------------------------------------------------------------------------
# What an autoencoder's latents tell beforehand

def neighbour_correlation(latents):
    """
    How alike neighbouring cells are: correlation of cells one step apart, rows and columns, over
    all channels of latents (N, C, h, w) normalised; 1 for constant pictures, 0 for white ones.
    """
    z = latents - latents.mean((0, 2, 3), keepdim=True)
    products = [(z[..., 1:, :] * z[..., :-1, :]).mean(), (z[..., 1:] * z[..., :-1]).mean()]
    return float(sum(products) / 2 / z.square().mean())


@torch.no_grad()
def diffusability(ae, images, batch_size=100):
    """
    What is known of an autoencoder before any diffusion (Table 1's observations as numbers).
    images   (N, 3, H, W) in [-1, 1], on the autoencoder's device
    returns  a dict:
      esm         divergence of the latents from the flattened target, gamma 1 (Alg. 1), nats
      esm_shape   the same of normalised latents at the best of scales from 1/8 to 54: log(1 + P)
                  sees the latent's scale, and diffusion, which normalises, does not
      alpha       exponent of the latents' PSD; Scale Equivariance finds SD-VAE's too small
      neighbours  neighbour_correlation: over-smoothed latents (REPA-E) are near 1
      high_band   dB of PSNR that are lost with the upper half of the latent's band (n = 8): how
                  much of the image sits there (FreqWarm)
      dsm         PSNR of decode(low-passed latent) against the low-passed image, dB, mean over the
                  masks of DSM_MASKS that cut: DSM's own aim
      psnr        of the reconstruction, dB
    raises   ValueError if the latents do not tile into 8x8 blocks
    """
    latents = encode_all(ae, images, batch_size, seed=0)
    C = latents.shape[1]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    normal = (latents - mean.view(C, 1, 1)) / std.view(C, 1, 1)
    best = min(esm_loss(images, scale * normal).item() for scale in 2 ** torch.arange(-3, 6, 0.25))
    mode = encode_all(ae, images, batch_size)
    decoded = lambda n: torch.cat([ae.decode(lowpass(z, n)) for z in mode.split(batch_size)])
    answers = {n: decoded(n) for n in DSM_MASKS}
    plain = psnr(answers[0], images).mean().item()
    dsm = [psnr(answers[n], lowpass(images, n)).mean().item() for n in DSM_MASKS if n > 0]
    return dict(
        esm=esm_loss(images, latents).item(), esm_shape=best,
        alpha=fit_power_law(radial_profile(power_spectrum(latents)).mean(0)).item(),
        neighbours=neighbour_correlation(normal),
        high_band=plain - psnr(answers[8], images).mean().item(),
        dsm=sum(dsm) / len(dsm), psnr=plain)


def diffusability_rows(args, device):
    """
    One row an autoencoder of what can be known before any diffusion is trained: divergence from the
    flattened target, as it is and normalised; exponent of the spectrum; correlation of neighbouring
    cells; dB in the latent's high band; agreement of low-passed latents with low-passed images;
    PSNR. `python -m experiments.miniature scatter` sets them against what diffusion then does.
    """
    for label, ae, trained in autoencoders(args, device):
        images = some_images(args, trained, device)
        need_blocks(args, label, ae, images)
        yield (diffusability(ae, images, args.batch_size),
               dict(autoencoder=label, n=len(images)))
