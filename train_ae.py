"""
Stage 1: train an autoencoder whose latent spectrum is shaped.

    python train_ae.py --preset quick --reg dsm             a laptop, minutes, nothing downloaded
    torchrun --nproc_per_node=8 train_ae.py --reg esm --gamma 1.0 --data DIR    the paper's scale

The argparse defaults are Table 5 for CelebA 256 (f16d16). A run lives in --out: ckpt.pt, log.jsonl,
reconstructions.png. The batch size is the GLOBAL batch over all processes, and the learning rate is
never rescaled.
"""
import argparse
import dataclasses
import random
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import losses
from analysis.figures import figure_rows, pca_rgb
from common import run
from common.data import images_hash, open_data, train_batches, val_batches
from common.metrics import psnr, ssim
from common.weights import autoencoder_hash, load_autoencoder
from losses import DSM_MASKS, SCALES, PatchDiscriminator, PerceptualLoss
from repa import load_encoder
from spectral import fit_power_law, lowpass, match_resolution, power_spectrum, radial_profile
from vae import CONFIGS, AttnBlock, AutoencoderKL, ResnetBlock

PRESETS = {
    "celeba-f16d16": {},                                   # the argparse defaults
    "celeba-f8d4": dict(model="f8d4"),
    "imagenet-f16d16": dict(batch_size=128, steps=600_000),
    # 64 px, an hour for both stages on one GPU of 24 GB: estimated from FLOPs, see GUIDE.md
    "one-gpu": dict(model="f4d4", image_size=64, steps=20_000, batch_size=32, lr=1e-4,
                    warmup_steps=500, gan_start=5000, eval_every=2500, val_images=500),
    "quick": dict(data="discs", image_size=32, model="f2d4-tiny", steps=600, batch_size=8, lr=4e-3,
                  warmup_steps=40, lpips_weight=0.0, gan_weight=0.0, eval_every=200, log_every=10,
                  val_images=256, workers=0),
}
PAIRS = ("dsm", "se", "eq")                                # methods that change what is decoded


def get_args():
    """The flags; presets fill in what is not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    # what is run
    add("--preset", choices=PRESETS, default="celeba-f16d16",
        help="a named group of defaults; explicit flags win")
    add("--out", default=None, help="folder of the run (default: out/ae/<preset>-<reg>[-tuned])")
    add("--resume", action="store_true", help="continue the run in --out, or start it")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--seed", type=int, default=0, help="of weights, data order and every draw, >= 0")
    add("--device", choices=("cpu", "cuda"), default=None, help="default: cuda if there is a GPU")
    add("--dtype", choices=("fp32", "bf16"), default=None,
        help="of the networks (default: bf16 on cuda, fp32 on cpu)")
    add("--compile", choices=("on", "off"), default=None,
        help="torch.compile the networks (default: on on cuda, but for eq and se; off on cpu)")
    add("--grad_checkpoint", action="store_true",
        help="compute every block twice to keep less in memory")
    # data
    add("--data", default=None,
        help="folder, .zip, or cifar10; built in: leaves (default) or discs; a "
        "folder of such a name is ./leaves")
    add("--image_size", type=int, default=256, help="pixels a side")
    add("--val_images", type=int, default=1000, help="held-out images")
    add("--workers", type=int, default=8, help="loader processes per training process")
    # model and regulariser
    add("--model", choices=CONFIGS, default="f16d16",
        help="autoencoder: f = reduction, d = latent channels")
    add("--init", default=None, metavar="FILE", help="start from these weights: our ckpt.pt, or "
        "released ones that weights.py reads; the model follows from the file")
    add("--reg", nargs="+", choices=("none", "kl", "esm", "dsm", "se", "eq", "vf", "uae"),
        default=["kl"],
        help="one or several: SD-VAE's KL, ESM, DSM, Scale Equivariance, EQ-VAE, VA-VAE, UAE; "
        "none = reconstruction only")
    add("--gamma", type=float, default=1.0, help="ESM: flattening exponent of the target, >= 0")
    add("--esm_weight", type=float, default=0.01)
    add("--dsm_masks", type=int, nargs="+", default=list(DSM_MASKS),
        help="DSM: anti-diagonals cut, 0..14 each (Table 8)")
    add("--kl_weight", type=float, default=None, help="--reg kl: 1e-6; eq and vf: 1e-6 over the "
        "numbers of an image, for their authors weigh it against a sum over them")
    add("--vf_weight", type=float, default=0.1, help="VA-VAE: times the adaptive ratio")
    add("--uae_weight", type=float, default=0.5, help="UAE: of the low frequencies' squared error")
    add("--encoder", default=None, help="whose features the latents are aligned with (default: "
        "dinov2_vitl14 for vf, dinov2_vitb14_reg for uae, as their authors)")
    add("--encoder_source", default=None,
        help="a local clone of facebookresearch/dinov2, a LabelNet's .pt, or random (for tests)")
    # reconstruction
    add("--lpips_weight", type=float, default=0.5, help="0 = off (needs no VGG weights)")
    add("--gan_weight", type=float, default=0.5, help="0 = off")
    add("--gan_start", type=int, default=50_000, help="first step with the discriminator")
    add("--gan_every_step", action="store_true",
        help="train both networks in each step (default: even steps the autoencoder, odd steps "
        "the discriminator)")
    # optimisation
    add("--steps", type=int, default=500_000)
    add("--batch_size", type=int, default=48, help="images per step over all processes")
    add("--grad_accum", type=int, default=1,
        help="parts in which a process works through its share of the batch, to save memory")
    add("--lr", type=float, default=5e-5, help="of both networks; constant after the warm-up")
    add("--warmup_steps", type=int, default=2000)
    add("--weight_decay", type=float, default=0.005)
    add("--clip_grad", type=float, default=1.0, help="largest gradient norm")
    # reporting
    add("--log_every", type=int, default=100, help="steps between lines of log.jsonl")
    add("--eval_every", type=int, default=5000,
        help="steps between validations, each with a checkpoint")
    add("--keep_every", type=int, default=-1,
        help="also keep ckpt_<step>.pt at these steps; -1 = off")
    args = run.parse_args(parser, PRESETS)
    if args.kl_weight is None:
        summed = {"eq", "vf"} & set(args.reg) and "kl" not in args.reg
        args.kl_weight = 1e-6 / max(3 * args.image_size ** 2, 1) if summed else 1e-6
    if args.encoder is None:
        theirs = dict(vf="dinov2_vitl14", uae="dinov2_vitb14_reg")
        args.encoder = next((theirs[reg] for reg in args.reg if reg in theirs), "dinov2_vitb14")
    tuned = "-tuned" if args.init else ""
    args.out = args.out or f"out/ae/{args.preset}-{'-'.join(args.reg)}{tuned}"
    return args


def open_model(args):
    """
    The configuration of --model, or with --init that of its file. args.init becomes the weights'
    hash, so that --resume takes the same weights from anywhere; args.model their configuration.
    returns  AEConfig, and the autoencoder to start from or None
    raises   ValueError if --model is given and contradicts the file
    """
    if not args.init:
        return CONFIGS[args.model], None
    ae = load_autoencoder(args.init)
    names = [name for name, config in CONFIGS.items() if config == ae.config]
    default = PRESETS[args.preset].get("model", "f16d16")
    run.need(args.model in (default, *names), f"--model {args.model}: --init {args.init} is "
                 f"{names[0] if names else ae.config}; leave --model out")
    args.model, args.init = names[0] if names else "of --init", autoencoder_hash(ae)
    return ae.config, ae


def check(args, config, world):
    """ValueError on the first flag that cannot work, before data is read or anything written."""
    need, f = run.need, config.reduction
    side, remainder = divmod(args.image_size, f)
    need(16 <= args.image_size <= 16384, f"--image_size {args.image_size}: must lie in 16..16384")
    need(remainder == 0, f"--image_size {args.image_size}: must be a multiple of {f}, the "
         f"reduction of --model {args.model}")
    need(args.grad_accum > 0, f"--grad_accum {args.grad_accum}: must be at least 1")
    need(args.batch_size > 0 and args.batch_size % (world * args.grad_accum) == 0,
         f"--batch_size {args.batch_size}: must be above 0 and divide by {world} processes times "
         f"--grad_accum {args.grad_accum}")
    need("none" not in args.reg or args.reg == ["none"],
         "--reg none: stands alone, or leave it out")
    need(not {"vf", "uae"} <= set(args.reg),
         "--reg vf uae: both align the latent with the same features; choose one of them")
    pairs = [reg for reg in PAIRS if reg in args.reg]
    need(len(pairs) <= 1, f"--reg {' '.join(pairs)}: each changes what the decoder sees; choose "
         "one of them")
    need("dsm" not in args.reg or side % 8 == 0,
         f"--reg dsm: a latent of {side}x{side} does not tile into 8x8 blocks; --image_size must "
         f"be a multiple of {8 * f}")
    need(all(0 <= n <= 14 for n in args.dsm_masks),
         f"--dsm_masks {args.dsm_masks}: each must lie in 0..14")
    need("se" not in args.reg or side % max(SCALES) == 0,
         f"--reg se: a latent of {side}x{side} does not divide by {max(SCALES)}")
    smallest = args.image_size // (4 if {"se", "eq"} & set(args.reg) else 1)
    need(args.gan_weight == 0 or smallest >= 24,
         f"--gan_weight {args.gan_weight}: the discriminator needs images of at least 24 pixels a "
         f"side, and here they may be {smallest}; --gan_weight 0 switches it off")
    need(args.lpips_weight == 0 or smallest >= 16,
         f"--lpips_weight {args.lpips_weight}: LPIPS needs images of at least 16 pixels a side, "
         f"and here they may be {smallest}; --lpips_weight 0 switches it off")
    run.need_range(args, 0, 10, "gamma")               # 16^gamma is to fit float32
    run.need_range(args, 0, 2 ** 63, "seed")
    run.need_range(args, 0, 1024, "workers")
    run.need_range(args, 0, float("inf"), "esm_weight", "kl_weight", "vf_weight", "uae_weight",
                       "lpips_weight", "gan_weight", "weight_decay", "gan_start", "warmup_steps",
                       "steps")
    run.need_positive(args, "lr", "clip_grad", "log_every", "eval_every", "val_images")
    run.need_run_flags(args)


# --------------------------------------------------------------------------------------------------
# The networks of a run

def build(args, config, start, compute):
    """
    Networks and optimisers, on the device; what a run does without is None. start: an
    autoencoder whose weights are taken, or None for init_weights.
    ae, disc, perceptual (LPIPS), encoder (DINOv2), projection (latent cells -> its feature width)
    """
    device = compute.device
    torch.manual_seed(args.seed)                           # the initial weights; nothing else
    nets = SimpleNamespace(ae=AutoencoderKL(config).to(device), disc=None, disc_optimizer=None,
                           perceptual=None, encoder=None, projection=None)

    if start:
        nets.ae.load_state_dict(start.state_dict())

    def adamw(network):
        return torch.optim.AdamW(network.parameters(), lr=args.lr, betas=(0.9, 0.999),
                                 weight_decay=args.weight_decay, fused=True)

    compute.channels_last(nets.ae)                         # before the optimiser's state comes in
    nets.optimizer = adamw(nets.ae)
    if args.gan_weight > 0 and args.gan_start < args.steps:
        nets.disc = PatchDiscriminator().to(device)
        nets.disc_optimizer = adamw(nets.disc)
    if args.lpips_weight > 0:
        with run.local_rank_zero_first():
            nets.perceptual = PerceptualLoss().to(device)
        compute.channels_last(nets.perceptual)
    if {"vf", "uae"} & set(args.reg):
        with run.local_rank_zero_first():
            # VA-VAE shows DINOv2 images as they are, resized bilinearly
            theirs = dict(resize="bilinear", imagenet=False) if "vf" in args.reg else {}
            nets.encoder = load_encoder(args.encoder, args.encoder_source, **theirs).to(device)
        # without a bias, which could match the features' common part alone
        width = nets.encoder.width
        nets.projection = torch.nn.Linear(config.latent_channels, width, bias=False).to(device)
        nets.optimizer.add_param_group(dict(params=nets.projection.parameters()))
    return nets


def saved_parts(nets):
    """{name in the checkpoint: network or optimiser} of what a run carries on."""
    named = dict(model=nets.ae, optimizer=nets.optimizer, projection=nets.projection,
                 disc=nets.disc, disc_optimizer=nets.disc_optimizer)
    return {name: part for name, part in named.items() if part is not None}


def resume(args, nets, images_id, checkpoint):
    """
    Put a checkpoint's state into the networks, if it is of these images (latents.images_hash).
    returns  start step, state of the log
    """
    run.need_same_step(args.out, checkpoint["step"] if checkpoint else 0)
    if not checkpoint:
        return 0, {}
    run.need_same_images(args.out, checkpoint, images_id, args.data)
    # the discriminator's part is missing if --steps was below --gan_start
    parts = {name: part for name, part in saved_parts(nets).items()
             if "disc" not in name or "disc" in checkpoint}
    run.restore(args.out, checkpoint, parts)
    return checkpoint["step"], checkpoint.get("means", {})


def place(args, nets, compute):
    """Compilation and DistributedDataParallel: the networks as a training step calls them."""
    if args.grad_checkpoint:
        run.recompute(nets.ae, (ResnetBlock, AttnBlock))
    compute.compile(nets.disc, nets.perceptual)
    for network in (nets.ae.encoder, nets.ae.decoder):     # the last convolution stays eager, where
        network.features = compute.compiled(network.features)   # the adaptive ratios are measured
    nets.ae_step = run.ddp(nets.ae)
    nets.disc_step = run.ddp(nets.disc)
    nets.projection_step = run.ddp(nets.projection)
    nets.parallel = nets.ae_step, nets.disc_step, nets.projection_step


# --------------------------------------------------------------------------------------------------
# One step

def draw_pair(args, rng):
    """
    One step's draw of the pair method, the same on every rank.
    returns  scale of the images before encoding, 1.0 = none;
             function (images, latents) -> (target, z)
    """
    if "dsm" in args.reg:                                  # Alg. 2: one mask for the batch
        n = rng.choice(args.dsm_masks)
        return 1.0, lambda images, latents: losses.dsm_pair(images, latents, n)
    if "se" in args.reg:
        k = rng.choice(SCALES)
        return 1.0, lambda images, latents: losses.scale_pair(images, latents, k)
    if "eq" in args.reg:
        scale, rot = rng.randint(8, 31) / 32, rng.randint(1, 3)
        if rng.random() < 0.5:
            return 1.0, lambda images, latents: losses.eq_pair(images, latents, scale, rot)
        if rng.random() < 0.25:                            # EQ-VAE also encodes small images
            return scale, lambda images, latents: (images, latents)
    return 1.0, lambda images, latents: (images, latents)


def whose_turn(args, nets, step):
    """Whom this step trains, the autoencoder (ae), the discriminator (disc); is the GAN on?"""
    gan = nets.disc is not None and step >= args.gan_start
    if not gan or args.gan_every_step:
        return SimpleNamespace(ae=True, disc=gan, gan=gan)
    return SimpleNamespace(ae=step % 2 == 0, disc=step % 2 == 1, gan=gan)


def total(terms):
    """The sum of weight * adaptive ratio * value over the terms of a step."""
    loss = 0
    for weight, ratio, value in terms.values():
        loss = loss + (weight if ratio is None else weight * ratio) * value
    return loss


def directed(output, gradient):
    """Their inner product: walked back, it goes on from output with this gradient."""
    return (output.float() * gradient).sum()


def image_terms(args, nets, compute, recon, target, gan):
    """
    The terms on the decoded image (b, 3, H, W): L1, LPIPS, and with gan the generator's.
    returns  {name: (weight, adaptive ratio or None, value)},
             and the gradient of their sum at the image, (b, 3, H, W) float32
    """
    image = recon.detach().float().requires_grad_()        # a cut: the decoder is walked later
    terms = {"l1": (1.0, None, F.l1_loss(image, target))}
    if nets.perceptual:
        terms["lpips"] = args.lpips_weight, None, nets.perceptual(image, target)
    gradient, = torch.autograd.grad(total(terms), image)
    if gan:
        nets.disc.requires_grad_(False)
        with compute.autocast():
            value = losses.hinge_g_loss(nets.disc(image))
        nets.disc.requires_grad_(True)
        of_gan, = torch.autograd.grad(value, image)
        ratio = losses.adaptive_weight(directed(recon, gradient), directed(recon, of_gan),
                                       nets.ae.last_layer, run.all_mean)
        terms["gan"] = args.gan_weight, ratio, value
        gradient = gradient + args.gan_weight * ratio * of_gan
    return terms, gradient


def latent_terms(args, nets, images, latents, posterior, of_decoder):
    """
    The terms on the latents (b, C, h, w): ESM (Alg. 1), KL, alignment with features of images.
    of_decoder  gradient of the image's terms at the latents, (b, C, h, w): vf is to pull alike
    returns  {name: (weight, adaptive ratio or None, value)}
    """
    terms = {}
    if "esm" in args.reg:                                  # sees the images before any mask
        terms["esm"] = args.esm_weight, None, losses.esm_loss(images, latents, args.gamma)
    if {"kl", "eq", "vf"} & set(args.reg):
        terms["kl"] = args.kl_weight, None, losses.kl_loss(posterior.mean, posterior.logvar)
    if nets.encoder:
        grid = latents.shape[-2:]
        features = nets.encoder(images, grid)              # (b, h*w, D)
        cells = nets.projection_step(latents.flatten(2).transpose(1, 2))
        if "uae" in args.reg:
            align = losses.low_freq_align_loss(cells, features, grid)
            return terms | dict(align=(args.uae_weight, None, align))
        align = losses.vf_loss(cells, features)
        ratio = losses.adaptive_weight(directed(latents, of_decoder), align,
                                       nets.ae.encoder_last_layer, run.all_mean,
                                       limit=1e8)
        terms["align"] = args.vf_weight, ratio, align
    return terms


def forward_backward(args, nets, compute, images, noise, pair, turn):
    """
    One part of a step: Fig. 1 forward, then the gradients of whose turn it is. The graph is cut
    twice, at the latents (z below) and at the image (in image_terms): terms of the image and the
    GAN's ratio first, then back through the decoder; terms of the latents and vf's ratio, then back
    through the encoder. So each is walked once, as compiled code wants it, with all weights known.
    images, noise, pair  as AutoencoderKL.forward takes them
    returns  {name: scalar} for the log: every term, its adaptive ratio, the sum
    """
    n, z = args.grad_accum, []

    def cut_pair(images, latents):                         # what the decoder sees starts a graph
        z.append(latents.detach().requires_grad_(turn.ae))
        return pair(images, z[0])

    with torch.set_grad_enabled(turn.ae), compute.autocast():   # no graph if the turn is disc's
        recon, target, latents, posterior = nets.ae_step(images, noise, cut_pair)
    target, values = target.detach(), {}
    if turn.ae:
        terms, gradient = image_terms(args, nets, compute, recon, target, turn.gan)
        directed(recon, gradient / n).backward()           # through the decoder
        gradient = z[0].grad                               # (b, C, h, w), of this part
        of_latents = latent_terms(args, nets, images, latents, posterior, gradient * n)
        (directed(latents, gradient) + total(of_latents) / n).backward()    # through the encoder
        terms |= of_latents
        for name, (_, ratio, value) in terms.items():
            values[name] = value
            if ratio is not None:
                values[f"{name}_weight"] = ratio
        values["loss"] = total(terms)
    if turn.disc:                                          # real is walked back before fake is made
        with run.averaging(False, nets.disc_step):
            with compute.autocast():
                real = losses.hinge_d_loss(real=nets.disc_step(target))
            (real / n).backward()
        with compute.autocast():
            fake = losses.hinge_d_loss(fake=nets.disc_step(recon.detach()))
        (fake / n).backward()
        values["disc"] = real + fake
    return values


# --------------------------------------------------------------------------------------------------
# What is evaluated and saved

@torch.no_grad()
def validate(ae, batches, args, compute):
    """
    Held-out images, each counted once over all ranks. Reconstructions decode the posterior's mode,
    spectra see its samples. Also stores the samples' mean and standard deviation per channel in the
    autoencoder (normalize, denormalize).
    returns  {psnr dB, ssim, l1, esm: divergence from the flattened target (nats), alpha: exponent
             of the latents' PSD, alpha_image, latent_std: over all channels}
    """
    ae.eval()
    C = ae.config.latent_channels
    scores = torch.zeros(5, dtype=torch.float64)           # count, psnr, ssim, l1, esm
    profiles = torch.zeros(2, 16, dtype=torch.float64)     # image, latent
    moments = torch.zeros(3, C, dtype=torch.float64)       # count, sum, sum of squares
    for images, _, indices in batches:
        with compute.autocast():                           # the networks; metrics are float32
            posterior = ae.encode(images)
            recon = ae.decode(posterior.mode())
        recon = recon.float()
        noise = []
        for i in indices.tolist():                         # image i has its noise on any rank
            generator = torch.Generator().manual_seed(run.step_seed(args.seed, i))
            noise.append(torch.randn(posterior.mean.shape[1:], generator=generator))
        latents = posterior.sample(torch.stack(noise).to(images.device))
        small = match_resolution(images, latents.shape[-2:])
        l1 = (recon - images).abs().flatten(1).mean(1)
        # one at a time, for a loss is the mean of its batch
        esm = torch.stack([losses.esm_loss(x[None], z[None], args.gamma)
                           for x, z in zip(images, latents)])
        each = [torch.ones_like(l1), psnr(recon, images), ssim(recon, images), l1, esm]
        scores += torch.stack(each).double().sum(1).cpu()
        for row, x in zip(profiles, (small, latents)):
            row += radial_profile(power_spectrum(x)).double().sum(0).cpu()
        cells = latents.double().movedim(1, -1).reshape(-1, C)
        count = torch.full_like(cells[0], len(cells))
        moments += torch.stack([count, cells.sum(0), cells.square().sum(0)]).cpu()
    totals = torch.cat([scores, profiles.flatten(), moments.flatten()])
    totals = run.all_sum(totals.to(ae.latent_mean.device)).cpu()
    scores, profiles = totals[:5], totals[5:37].view(2, 16)
    count, first, second = totals[37:].view(3, C)
    mean = first / count
    ae.set_latent_stats(mean, (second / count - mean ** 2).clamp_min(1e-12).sqrt())
    ae.train()
    names = ("psnr", "ssim", "l1", "esm")
    return dict(zip(names, (scores[1:] / scores[0]).tolist()),
                alpha=fit_power_law(profiles[1]).item(),
                alpha_image=fit_power_law(profiles[0]).item(),
                latent_std=ae.latent_std.square().mean().sqrt().item())


@torch.no_grad()
def picture(ae, images, path, compute):
    """
    reconstructions.png: held-out images, their reconstructions and latents, and DSM's question:
    does a low-passed latent decode to the low-passed image?
    """
    with compute.autocast():
        latents = ae.encode(images).mode()
        rows = {"image": images, "reconstruction": ae.decode(latents),
                "latent (PCA)": pca_rgb(latents) * 2 - 1}
        if latents.shape[-2] % 8 == 0 and latents.shape[-1] % 8 == 0:
            rows["low-pass n=10"] = lowpass(images, 10)
            rows["decoded from\nlow-pass latent"] = ae.decode(lowpass(latents, 10))
    figure_rows({label: row.float() * 0.5 + 0.5 for label, row in rows.items()}, path)


def save(args, nets, images_id, compute, log, step):
    """All of the run at this step into ckpt.pt; called on all processes."""
    state = dict(stage="ae", step=step, args=vars(args), pictures=images_id,
                 ae_config=dataclasses.asdict(nets.ae.config), means=log.state())
    for name, part in saved_parts(nets).items():
        state[name] = part.state_dict()
    if compute.rank == 0:
        run.save_run(args.out, state, args.keep_every)


def evaluate_and_save(args, nets, images_id, compute, val_set, log, progress, step, speed):
    """Held-out numbers, checkpoint, reconstructions.png; speed in images/s. Returns the numbers."""
    batches = val_batches(val_set, args.batch_size, compute.rank, compute.world,
                          device=compute.device)
    with compute.eager():
        log.report_skipped()
        report = validate(nets.ae, batches, args, compute)
        log.line(step, **{f"val_{k}": v for k, v in report.items()})
        save(args, nets, images_id, compute, log, step)
        if compute.rank > 0:
            return report
        line = (f"step {step}: PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f}, "
                f"L1 {report['l1']:.4f}, ESM divergence {report['esm']:.4f}, "
                f"latent PSD ~ f^-{report['alpha']:.2f}")
        if speed > 0:
            line += f", {speed:.1f} images/s"
        progress.write(line, file=sys.stdout)
        first = torch.stack([val_set[i][0] for i in range(min(8, len(val_set)))])
        first = first.to(compute.device) / 127.5 - 1       # (8, 3, H, W) in [-1, 1]
        picture(nets.ae, first, f"{args.out}/reconstructions.png", compute)
    return report


def announce(args, nets, compute, train_set, val_set):
    """What is about to be trained, in two lines."""
    parameters = sum(p.numel() for p in nets.ae.parameters())
    d, side = nets.ae.config.latent_channels, args.image_size // nets.ae.config.reduction
    compute.say(f"{args.model}: {parameters:,} parameters, {args.image_size} px -> {d} x {side} x "
                f"{side}; reg {' '.join(args.reg)}; {len(train_set):,} training and "
                f"{len(val_set):,} held-out images ({args.data or 'built-in'})")
    compute.say(f"global batch {args.batch_size} = {compute.world} x "
                f"{args.batch_size // compute.world} on {compute.device.type} in {args.dtype}; "
                f"learning rate {args.lr:g}, not rescaled; {args.steps:,} steps -> {args.out}")


def farewell(args, compute, report):
    """What was reached, in two lines."""
    compute.say(f"latents: std {report['latent_std']:.3f}, PSD ~ f^-{report['alpha']:.2f} (images "
                f"at that size: f^-{report['alpha_image']:.2f}), divergence from the target "
                f"flattened by gamma {args.gamma:g}: {report['esm']:.4f}")
    compute.say(f"wrote {args.out}/ckpt.pt, log.jsonl, reconstructions.png")


def main():
    args = get_args()
    processes = run.init_distributed(args.device)
    rank, world, device = processes
    # eq shows 24 sizes; se three, but the discriminator compiles nine kinds of calls for them
    sizes = [reg for reg in ("eq", "se") if reg in args.reg]
    off = bool(sizes) and args.compile is None
    compute = run.Compute(*processes, args.dtype, "off" if off else args.compile,
                              fixed_size=not sizes)
    if off and compute.cuda:
        compute.say(f"--reg {sizes[0]}: not compiled, for it shows the networks many image sizes, "
                    "each of them a compilation of its own (--compile on does so all the same)")
    config, start = open_model(args)
    check(args, config, world)
    args.dtype = compute.dtype
    # what older checkpoints say nothing of: no --init, and other losses under vf and uae
    older = {f"{reg}_weight": "an older loss" for reg in args.reg if reg in ("vf", "uae")}
    checkpoint = run.open_run(args.out, "ae", vars(args), args.resume, args.overwrite, run.FREE,
                               dict(init=None, **older))
    train_set, val_set = open_data(args.data, args.image_size, args.val_images, args.seed)
    nets = build(args, config, start, compute)
    images_id = run.broadcast_from_rank0(lambda: images_hash(train_set))
    start_step, means = resume(args, nets, images_id, checkpoint)
    if checkpoint:
        compute.say(f"resuming {args.out} at step {start_step}")
    del checkpoint                                         # gigabytes at paper scale
    place(args, nets, compute)
    announce(args, nets, compute, train_set, val_set)
    compute.warn_of_compilation()
    run.need_steps_left(args, start_step)
    log = run.RunLog(f"{args.out}/log.jsonl", rank, start_step, means)
    batches = train_batches(train_set, args.batch_size, start_step, args.seed, rank, world,
                            args.workers, device)
    progress = tqdm(total=args.steps, initial=start_step, unit="img", unit_scale=args.batch_size,
                    disable=rank > 0 or not sys.stderr.isatty())
    timed_step, clock = start_step, time.perf_counter()

    with run.StopSignal() as stop:
        for step in range(start_step, args.steps + 1):
            last_step = step == args.steps
            if stop.asked():
                save(args, nets, images_id, compute, log, step)
                compute.say(stop.farewell(step, args))
                break
            if last_step or step % args.eval_every == 0:
                speed = (step - timed_step) * args.batch_size / (time.perf_counter() - clock)
                report = evaluate_and_save(args, nets, images_id, compute, val_set, log, progress,
                                           step, speed)
                timed_step, clock = step, time.perf_counter()
            if last_step:
                farewell(args, compute, report)
                break

            # Everything random below is a function of (seed, step): see run.py
            seed = run.step_seed(args.seed, step)
            rng, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
            turn = whose_turn(args, nets, step)
            scale, pair = draw_pair(args, rng)             # Alg. 2: a mask for image and latent
            batch, _, _ = next(batches)                    # (share, 3, H, W) in [-1, 1]
            if scale < 1:
                batch = losses.scale_images(batch, scale, nets.ae.config.reduction)
            noise = run.sharded_randn(nets.ae.latent_shape(batch), generator, rank, world)
            for part in range(args.grad_accum):            # (b, ...) each: what fits the memory
                mine = (x.chunk(args.grad_accum)[part] for x in (batch, noise))
                with run.averaging(part == args.grad_accum - 1, *nets.parallel):
                    values = forward_backward(args, nets, compute, *mine, pair, turn)
                log.add(step, values)
            if turn.ae:
                run.update(nets.optimizer, args, step, log, step)
            if turn.disc:
                updates = (step - args.gan_start) // (1 if args.gan_every_step else 2)
                run.update(nets.disc_optimizer, args, updates, log, step, "disc_grad_norm")

            progress.update(1)
            if step % args.log_every == 0:
                averages = log.write(step)
                progress.set_postfix({k: f"{v:.4g}" for k, v in averages.items()
                                      if k in ("l1", "esm", "kl")})
    progress.close()
    run.barrier()


if __name__ == "__main__":
    with run.one_line_errors():
        main()
