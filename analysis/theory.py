"""
The paper's argument, measured on trained models; commands as in figures.py. Prop. 3.1: for Gaussian
data with independent frequencies, the best denoiser reduces the squared error at a frequency of
power S, compared with predicting 0, by S * SNR / (1 + SNR); the rest, S / (1 + SNR), is the bound.
A network can beat it, since it also knows means, the class and dependences between frequencies.
Latents (N, C, h, w) normalised to std 1; t from 0 = data to 1 = noise; R rings, at most 16.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import spectral
from analysis import fid, figures
from common import metrics, run
from common.metrics import frechet_distance, psnr, to_uint8
from common.weights import load_diffusion
from dit import Interpolant, NoiseStream
from losses import DSM_MASKS, esm_loss

TIMES = [(i + 0.5) / 20 for i in range(20)]                # uniform, as training draws them
SHOWN = (3, 7, 11, 15)                                     # TIMES[i]: t = .175, .375, .575, .775
FAINT = 1e-3                                               # fraction of the largest ring's power


def ring_profile(P):
    """Means over at most 16 non-empty rings of frequencies: (N, h, w) -> (N, R)."""
    return spectral.radial_profile(P, min(16, *P.shape[-2:]))


@torch.no_grad()
def denoised_power(model, process, latents, labels=None, times=TIMES, seed=0, batch_size=64):
    """
    A network against Prop. 3.1, as float64 means per coefficient by ring and time: power (R,) of
    latents; learnable (T, R) by Prop. 3.1; squared error (T, R) of the predicted clean latent;
    fraction, over all times and frequencies, of the learnable that was learned. labels (N,) or None
    """
    S = spectral.dct2(latents.cpu().double()).square().mean(0)     # (C, h, w); no float64 on mps
    learnable, errors = [], []
    for t in times:
        learnable.append(spectral.learnable_power(S, float(process.alpha_bar_at(t))))
        error = torch.zeros_like(S)
        for rows in torch.arange(len(latents), device=latents.device).split(batch_size):
            z = latents[rows]                              # noise depends only on (seed, row)
            z_t = process.noisy(z, NoiseStream(seed, rows.tolist())(z.shape).to(z), t)
            time = z.new_full((len(z),), process.time(t))
            output = model(z_t, time, None if labels is None else labels[rows])
            clean = process.clean(z_t.cpu().double(), output.cpu().double(), t)
            error += spectral.dct2(clean - z.cpu()).square().sum(0)
        errors.append(error / len(latents))
    learnable, error = torch.stack(learnable), torch.stack(errors)         # (T, C, h, w)
    return SimpleNamespace(power=ring_profile(S[None].mean(1))[0],
                           learnable=ring_profile(learnable.mean(1)),
                           error=ring_profile(error.mean(1)),
                           fraction=float((S - error).sum() / learnable.sum()))


def fraction_learned(found):
    """Error reduction / learnable power per ring (R,); < 0: worse than predicting 0."""
    return (found.power - found.error).sum(0) / found.learnable.sum(0)


def held_out_latents(file, args, device):
    """Model, process, latents (N, C, h, w) of held-out images, labels or None, and the settings."""
    model, process, ae, checkpoint = load_diffusion(file, args.ae, device)
    classes = model.num_classes
    images, labels, found = figures.held_out_images(args, checkpoint, device, file)
    # an explicit --num_classes may exceed the number of classes in the data
    explicit = checkpoint["args"]["num_classes"] > 0 and labels.max() < classes
    run.need(not args.data or explicit or classes in (0, found),
             f"--data: has {found} classes, and {file} was trained with {classes}")
    if classes:
        known = torch.isin(labels.cpu(), torch.tensor(fid.sampled_classes(file, checkpoint)))
        run.need(known.any(), f"{file}: no held-out image has a class that it was trained on; "
                 "name --data with the same class folders")
        images, labels = images[known], labels[known]
    latents = ae.normalize(figures.encode_all(ae, images, args.batch_size, seed=args.seed))
    settings = dict(ckpt=file, step=checkpoint["step"], n=len(latents),
                    model=checkpoint["model_name"], seed=args.seed)
    return model, process, latents, labels if classes else None, settings


def denoise_figure(args, device):
    """
    Prop. 3.1 on trained networks, one row per network: power of held-out latents, the network's
    denoising error and the minimum error for Gaussian latents, by radial frequency at four times.
    Printed: the fraction of the learnable power that was learned, over twenty evenly spaced times,
    for all frequencies and per ring ("-" for almost no power). Above 1: better than the bound.
    """
    runs, table = figures.named_checkpoints(args), []
    figure, axes = figures.subplots(len(runs), len(SHOWN), (12, 2.5 * len(runs) + 0.9),
                                    sharex="row", sharey=True)
    for row, (file, name) in zip(axes, runs):
        model, process, latents, labels, settings = held_out_latents(file, args, device)
        found = denoised_power(model, process, latents, labels, seed=args.seed,
                               batch_size=args.batch_size)
        rings = range(1, len(found.power) + 1)
        for ax, k in zip(row, SHOWN):
            alpha_bar = float(process.alpha_bar_at(TIMES[k]))
            ax.plot(rings, found.power, color="lightgray", lw=6, label="power of the latent")
            ax.plot(rings, found.power - found.learnable[k], "k--", label="bound of Prop. 3.1")
            ax.plot(rings, found.error[k], "o-", color="C3", ms=4,
                    label="denoising error of the network")
            ax.axhline((1 - alpha_bar) / alpha_bar, color="C0", ls=":", label="noise")
            ax.set(title=f"{name}, t = {TIMES[k]:.3g}", xlabel="ring (1 = low frequency)")
        row[0].set(ylabel="power per coefficient", xticks=rings[::1 + len(rings) // 10])
        for t, *lines in zip(TIMES, found.learnable.tolist(), found.error.tolist()):
            table += [(name, t, *line) for line in zip(rings, found.power.tolist(), *lines)]
        fractions, faint = fraction_learned(found), found.power < FAINT * found.power.max()
        by_ring = " ".join("-" if hidden else f"{x:.2f}" for x, hidden in zip(fractions, faint))
        yield dict(fraction_learned=found.fraction, by_ring=by_ring), settings
    figures.log_axes(axes[0, 0], "y")                      # shared by all panels
    figure.legend(handles=axes[0, 0].lines, loc="outside lower center", ncols=4)
    columns = ("run", "t", "ring", "power", "learnable", "denoising_error")
    figures.write_table(args, figure, columns, table)


# ---------------------------------------------------- the order in which sampling forms frequencies

def follow_sampling(model, process, shape, steps, seed=0, labels=None, keep=1):
    """
    Draw samples of shape (N, C, h, w) without guidance: times (T,), falling to 0; power (T, R) of
    the predicted clean latents (last row: the samples); a list of T predictions (keep, C, h, w).
    """
    times, power, kept = [], [], []

    def watch(t, clean):
        times.append(t)
        power.append(ring_profile(spectral.power_spectrum(clean)).cpu().double().mean(0))
        kept.append(clean[:keep].float())
    noise = NoiseStream(seed, range(shape[0]))
    watch(0.0, process.sample(model, shape, steps, labels, noise=noise, watch=watch))
    return torch.tensor(times), torch.stack(power), kept


def half_times(times, power):
    """t (R,), interpolated, where each ring of power (T, R) last rises to half its final value."""
    half = []
    for share in (power / power[-1]).T:                    # (T,), one ring
        below = (share < 0.5).nonzero().flatten().tolist()             # use the last such step
        k = below[-1] if below else 0
        part = (0.5 - share[k]) / (share[k + 1] - share[k]) if below else 0
        half.append(times[k] + part * (times[k + 1] - times[k]))
    return torch.stack(half)


def wiener_half_times(power, process):
    """half_times of the best denoiser for Gaussian latents of power (R,): t where SNR = 1."""
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    alpha_bar = process.alpha_bar_at(t).double()
    noise = (1 - alpha_bar) / alpha_bar                    # (999,), increases with t
    return t[torch.searchsorted(noise, power).clamp_max(998)]


def slope_per_octave(half, power):
    """How much later, in t, a ring of twice the frequency reaches half its power; both (R,)."""
    # neither ring 0, which holds DC, nor rings with almost no power, whose half times mean nothing
    strong = power[1:] >= FAINT * power.max()
    octave = (torch.arange(1, len(half), dtype=half.dtype) + 0.5).log2()[strong]
    octave = octave - octave.mean()                        # least-squares slope
    return -float((octave * half[1:][strong]).sum() / octave.square().sum())


@torch.no_grad()
def trajectory_figure(args, device):
    """
    Coarse to fine: during sampling, each ring's power in the predicted clean latent as a share of
    its final power. White dots: half of it is reached; dashed: the same for the best denoiser of
    Gaussian latents (SNR = 1). Below: one sample's predictions, decoded. Printed: both slopes in t
    per octave. Rings with almost no power are grey and left out of the slopes.
    """
    runs, table = figures.named_checkpoints(args), []
    figure, axes = figures.subplots(2, len(runs), (3.1 * len(runs) + 0.8, 4.5),
                                    height_ratios=(6, 1))
    for (top, bottom), (file, name) in zip(axes.T, runs):
        model, process, ae, checkpoint = load_diffusion(file, args.ae, device)
        shape, labels = (args.num_samples, model.in_channels, *model.input_size), None
        if model.num_classes:
            classes = fid.sampled_classes(file, checkpoint)
            labels = fid.sample_labels(range(args.num_samples), classes).to(device)
        times, power, kept = follow_sampling(model, process, shape, args.steps, args.seed, labels)
        half, ideal = half_times(times, power), wiener_half_times(power[-1], process)
        slope, rings = slope_per_octave(half, power[-1]), range(1, power.shape[1] + 1)
        share = (power / power[-1]).clamp(0, 1)            # (T, R)
        faint = power[-1] < FAINT * power[-1].max()
        share[:, faint] = half[faint] = float("nan")
        top.set_facecolor("lightgray")
        mesh = top.pcolormesh(times, rings, share.T, cmap="magma", vmin=0, vmax=1,
                              shading="nearest")
        top.plot(half, rings, "o", color="white", mec="gray", ms=4, label="half of the final power")
        top.plot(ideal, rings, "--", color="cyan", lw=1.5, label="SNR = 1: half by Prop. 3.1")
        top.set(title=f"{name}: {slope:.2f} in t per octave", xlabel="t (1 = noise)", xlim=(1, 0))
        shown = [int((times - t).abs().argmin()) for t in torch.linspace(times[0], 0, 8)]
        frames = [ae.decode(ae.denormalize(kept[k]))[0] for k in shown]  # each (3, H, W)
        strip = (torch.cat(frames, dim=2).cpu() * 0.5 + 0.5).clamp(0, 1)         # side by side
        bottom.imshow(strip.movedim(0, -1))
        bottom.set(xticks=[], yticks=[], xlabel="a sample's prediction, from t = 1 to 0")
        table += [(name, t, ring, value) for t, line in zip(times.tolist(), power.tolist())
                  for ring, value in zip(rings, line)]
        sampler = "em" if isinstance(process, Interpolant) else "ddim"
        yield (dict(slope=slope, slope_where_snr_is_1=slope_per_octave(ideal, power[-1])),
               dict(ckpt=file, step=checkpoint["step"], n=args.num_samples, steps=args.steps,
                    sampler=sampler, cfg=1, seed=args.seed))
    axes[0, 0].set_ylabel("ring (1 = low frequency)")
    figure.legend(handles=axes[0, 0].lines, loc="outside lower center", ncols=2)
    figure.colorbar(mesh, ax=axes[0], label="share of the ring's final power")
    figures.write_table(args, figure, ("run", "t", "ring", "power"), table)


# -------------------------------------------------- predictors of an autoencoder's diffusability

def halfway_to_neighbours(latents):
    """
    Each latent (N, C, h, w) interpolated (slerp, 1/2) with its nearest neighbour by cosine (iFID,
    arXiv 2603.05630, which takes the neighbours from a second set of images).
    """
    direction = F.normalize(latents.flatten(1), dim=1)
    cosine, nearest = (direction @ direction.T).fill_diagonal_(-2).max(1)   # (N,), excluding itself
    # slerp at 1/2: both weights are sin(a / 2) / sin(a) = 1 / (2 cos(a / 2))
    return (latents + latents[nearest]) / (2 + 2 * cosine).sqrt()[:, None, None, None]


@torch.no_grad()
def interpolation_distance(ae, images, latents, features, batch_size=100):
    """
    iFID in any feature space: the Frechet distance between images (N, 3, H, W) and decoded
    interpolations of their latents. features: (b, 3, H, W) uint8 -> (b, D).
    """
    latents, moments = halfway_to_neighbours(latents), []
    for batches in (images.split(batch_size), map(ae.decode, latents.split(batch_size))):
        rows = torch.cat([features(to_uint8(x)) for x in batches]).cpu().double()      # (N, D)
        moments += [rows.mean(0), rows.T.cov()]
    return frechet_distance(*moments)


@torch.no_grad()
def diffusability(ae, images, batch_size=100, features=None):
    """
    Metrics of an autoencoder that need no diffusion model (Table 1's observations as numbers), on
    images (N, 3, H, W) in [-1, 1] on its device: a dict of floats. If features is given, also iFD
    (interpolation_distance).
    """
    latents = figures.encode_all(ae, images, batch_size, seed=0)
    channels = dict(dim=(0, 2, 3), keepdim=True)
    z = (latents - latents.mean(**channels)) / latents.std(**channels)
    products = [z[..., 1:, :] * z[..., :-1, :], z[..., 1:] * z[..., :-1]]  # adjacent cells
    modes = figures.encode_all(ae, images, batch_size)
    decoded = figures.decode_lowpassed(ae, modes, DSM_MASKS, batch_size)
    plain = psnr(decoded[0], images).mean().item()
    dsm = [psnr(decoded[n], spectral.lowpass(images, n)).mean().item() for n in DSM_MASKS if n > 0]
    scales = 2 ** torch.arange(-3, 6, 0.25)                # 1/8 to 54
    small = spectral.match_resolution(images, latents.shape[2:])
    target = spectral.spectrum_distribution(small, gamma=1.0, remove_dc=False).mean(0).cpu()
    with_dc = spectral.spectrum_distribution(latents, remove_dc=False).mean(0).cpu()
    values = dict(
        esm=esm_loss(images, latents).item(),              # to the gamma = 1 target, nats
        # the same for normalised latents at the best scale: log(1 + P) depends on the scale of the
        # latents, but diffusion normalises them
        esm_shape=min(esm_loss(images, scale * z).item() for scale in scales),
        kl_from_target=figures.divergence(target, with_dc),        # in the form of Figs. 4 and 5
        alpha=figures.psd_exponent(latents),               # Scale Equivariance: small for SD-VAE
        # correlation of adjacent cells; near 1 for over-smoothed latents (REPA-E)
        neighbours=float(sum(x.mean() for x in products) / 2 / z.square().mean()),
        # dB of PSNR lost by removing the upper half of the latent's band, n = 8 (FreqWarm)
        high_band=plain - psnr(decoded[8], images).mean().item(),
        dsm=sum(dsm) / len(dsm),       # mean over n: PSNR of decode(lowpass(z, n)) to lowpass(x, n)
        psnr=plain)                                        # of the reconstruction, dB
    if features:                                           # correlation .85 with gFID reported
        values["iFD"] = interpolation_distance(ae, images, latents, features, batch_size)
    return values


def diffusability_rows(args, device):
    """
    Metrics that need no diffusion model, one row per autoencoder: divergence from the flattened
    target, raw and normalised; spectral exponent; correlation of adjacent cells; PSNR (dB) lost
    without the latent's high band; DSM's consistency; PSNR; with Inception's weights also iFD, the
    Frechet distance between the images and decoded interpolations of their latents.
    """
    inception = metrics.load_or_none(lambda: metrics.load_inception(device), args)
    features = inception and (lambda images: inception(images)[0])
    for label, ae, images in figures.autoencoders(args, device):
        yield (diffusability(ae, images, args.batch_size, features),
               dict(autoencoder=label, n=len(images),
                    weights="torch-fidelity" if features else "none"))
