"""
Stage 1: train an autoencoder with a shaped latent spectrum.

    python train_ae.py --preset quick --reg dsm             a laptop, minutes, nothing downloaded
    torchrun --nproc_per_node=8 train_ae.py --reg esm --gamma 1.0 --data DIR    the paper's scale

The loop in main() is the method: the forward pass of Fig. 1, the losses of Eqs. 2 to 4 term by
term, one backward pass. The defaults are those of Table 5 for CelebA 256 (f16d16) and the masks of
Table 8; warm-up, clipping and betas are not in the paper. A run writes ckpt.pt, log.jsonl and
reconstructions.png to --out. The batch size is the GLOBAL batch over all processes; the learning
rate is never rescaled. Numbering as in arXiv:2603.14645 v1.
"""
import argparse
import dataclasses
import random
import time
from functools import partial

import torch
import torch.nn.functional as F

import losses
from analysis.figures import figure_rows, pca_rgb
from common import run
from common.builtin import SETS
from common.data import images_hash, open_data, train_batches, val_batches
from common.metrics import Moments, psnr, ssim
from common.weights import autoencoder_hash, load_autoencoder
from dit import NoiseStream
from losses import DSM_MASKS, SCALES, PatchDiscriminator, PerceptualLoss
from repa import load_encoder
from spectral import fit_power_law, lowpass, match_resolution, power_spectrum, radial_profile
from vae import CONFIGS, AttnBlock, AutoencoderKL, ResnetBlock

PRESETS = {
    "celeba-f16d16": {},                                   # the argparse defaults
    "celeba-f8d4": dict(model="f8d4"),
    "imagenet-f16d16": dict(batch_size=128, steps=600_000),
    # 64 px, about an hour for both stages on one 24 GB GPU, estimated from FLOPs (GUIDE.md)
    "one-gpu": dict(model="f4d4", image_size=64, steps=20_000, batch_size=32, lr=1e-4,
                    warmup_steps=500, gan_start=5000, eval_every=2500, val_images=500),
    "quick": dict(data="discs", image_size=32, model="f4d4-tiny", steps=1800, batch_size=8, lr=4e-3,
                  warmup_steps=40, lpips_weight=0.0, gan_weight=0.0, eval_every=600, log_every=10,
                  val_images=256, workers=0),
}
# not compiled by default: eq and se use many image sizes, vf runs the decoder's backward twice
UNCOMPILED = {"eq", "se", "vf"}


def get_args():
    """Parse the flags; the preset supplies defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=run.Help,
                                     allow_abbrev=False)
    add = parser.add_argument
    # run
    add("--preset", choices=PRESETS, default="celeba-f16d16", help="named set of defaults")
    add("--out", help="output folder (default: out/ae/<preset>-<reg>[-<data>][-tuned])")
    run.add_run_flags(parser)
    # data
    add("--data", help="folder, .zip, cifar10, or built-in leaves or discs (default: leaves)")
    add("--image_size", type=int, default=256, help="pixels per side")
    add("--val_images", type=int, default=1000, help="number of held-out images")
    # model and regulariser
    add("--model", choices=CONFIGS, default="f16d16", help="f = reduction, d = latent channels")
    add("--init", metavar="FILE", help="fine-tune these weights; sets the model: a ckpt.pt, or "
        "released weights that common/weights.py reads (default: none)")
    add("--reg", nargs="+", choices=("none", "kl", "esm", "dsm", "se", "eq", "vf", "uae"),
        default=["kl"], help="one or several: SD-VAE's KL, ESM, DSM, Scale Equivariance, EQ-VAE, "
        "VA-VAE, UAE; none = reconstruction only")
    add("--gamma", type=float, default=1.0, help="ESM: flattening exponent of the target, 0..10")
    add("--esm_weight", type=float, default=0.01, help="ESM: weight of the divergence (Table 5)")
    add("--dsm_masks", type=int, nargs="+", default=list(DSM_MASKS), metavar="N",
        help="DSM: numbers of anti-diagonals to remove, up to 2 * --dsm_block - 2 (Table 8)")
    add("--dsm_block", type=int, default=8,
        help="DSM: side of the DCT blocks, for image and latent alike")
    add("--kl_weight", type=float, help="KL: weight (default: 1e-6; for eq and vf divided by "
        "3 * image_size^2, since their authors sum the reconstruction loss over pixels)")
    add("--vf_weight", type=float, default=0.1, help="VA-VAE: weight, times the adaptive weight")
    add("--uae_weight", type=float, default=0.5, help="UAE: weight of the low-frequency MSE")
    add("--encoder", help="foundation model to align latents with, as in the original papers "
        "(default: dinov2_vitl14 for vf, dinov2_vitb14_reg for uae)")
    # reconstruction
    add("--lpips_weight", type=float, default=0.5, help="0 = off, no VGG weights needed")
    add("--gan_weight", type=float, default=0.5, help="0 = off")
    add("--gan_start", type=int, default=50_000, help="first step with the discriminator")
    add("--gan_every_step", action="store_true", help="train both networks at every step (default: "
        "the autoencoder at even steps, the discriminator at odd steps)")
    # optimisation
    add("--steps", type=int, default=500_000, help="training steps, discriminator steps included")
    add("--batch_size", type=int, default=48, help="images per step, over all processes")
    add("--lr", type=float, default=5e-5, help="for both networks; constant after the warm-up")
    add("--warmup_steps", type=int, default=2000, help="updates until a network's lr reaches --lr")
    add("--weight_decay", type=float, default=0.005, help="for AdamW; betas are .9 and .999")
    add("--clip_grad", type=float, default=1.0, help="maximum gradient norm; 0 = off")
    # reporting
    add("--eval_every", type=int, default=5000, help="steps between validations and checkpoints")
    add("--keep_every", type=int, default=-1, help="steps between kept ckpt_<step>.pt; -1 = off")
    args = run.parse_args(parser, PRESETS)
    if args.kl_weight is None:
        rec_is_summed = {"eq", "vf"} & set(args.reg) and "kl" not in args.reg
        args.kl_weight = 1e-6 / max(3 * args.image_size ** 2, 1) if rec_is_summed else 1e-6
    if args.encoder is None:
        args.encoder = "dinov2_vitl14" if "vf" in args.reg else "dinov2_vitb14_reg"
    if args.compile is None and UNCOMPILED & set(args.reg):
        args.compile = "off"
    # a built-in set other than the preset's gets its own folder
    other = args.data in SETS and args.data != PRESETS[args.preset].get("data")
    names = [args.preset, *args.reg, *[args.data] * other, *["tuned"] * bool(args.init)]
    args.out = args.out or f"out/ae/{'-'.join(names)}"
    return args


def check(args, config):
    """ValueError for the first invalid flag, before data is read or anything is written."""
    need, f = run.need, config.reduction
    need(args.image_size >= 16 and args.image_size % f == 0, f"--image_size {args.image_size}: "
         f"must be at least 16 and a multiple of {f}, the reduction of --model {args.model}")
    need("none" not in args.reg or args.reg == ["none"], "--reg none: cannot be combined")
    for group, why in ((("dsm", "se", "eq"), "each changes the decoder's input"),
                       (("vf", "uae"), "both align the latent with the same features")):
        both = [reg for reg in group if reg in args.reg]
        need(len(both) <= 1, f"--reg {' '.join(both)}: {why}; choose one of them")
    side = args.image_size // f
    smallest = args.image_size // (4 if {"se", "eq"} & set(args.reg) else 1)
    need("se" not in args.reg or side % max(SCALES) == 0,
         f"--reg se: a latent of {side}x{side} is not divisible by {max(SCALES)}")
    for flag, least in (("gan_weight", 24), ("lpips_weight", 16)):
        need(getattr(args, flag) == 0 or smallest >= least, f"--{flag}: needs images of at least "
             f"{least} pixels, but they can be as small as {smallest}; 0 turns it off")
    run.need_range(args, 2, 4096, "dsm_block")
    need("dsm" not in args.reg or args.image_size % (args.dsm_block * f) == 0, f"--image_size "
         f"{args.image_size}: must be a multiple of {args.dsm_block * f}, since --reg dsm uses "
         f"{args.dsm_block}x{args.dsm_block} blocks of latents; or change --dsm_block")
    need(all(0 <= n <= 2 * args.dsm_block - 2 for n in args.dsm_masks),
         f"--dsm_masks {args.dsm_masks}: each must lie in 0..{2 * args.dsm_block - 2}")
    need("vf" not in args.reg or args.compile != "on", "--reg vf --compile on: its adaptive ratio "
         "runs the decoder's backward pass twice, which compiled code does not allow")
    run.need_range(args, 0, 10, "gamma")                   # 16^gamma stays well within float32
    run.need_range(args, 0, float("inf"), "esm_weight", "kl_weight", "vf_weight", "uae_weight",
                   "lpips_weight", "gan_weight", "gan_start")
    run.need_range(args, 1, 2 ** 31, "val_images")


def open_model(args):
    """The autoencoder to train: of the --init file, or a new one of --model."""
    if not args.init:
        return AutoencoderKL(CONFIGS[args.model])
    ae = load_autoencoder(args.init)
    names = [name for name, config in CONFIGS.items() if config == ae.config]
    default = PRESETS[args.preset].get("model", "f16d16")
    run.need(args.model in (default, *names), f"--model {args.model}: --init {args.init} is "
             f"{names[0] if names else ae.config}; leave --model out")
    args.model = names[0] if names else "of --init"
    args.init = autoencoder_hash(ae)                       # --resume accepts the file at any path
    return ae.train()


# --------------------------------------------------------------------------------------------------
# One step

def draw_pair(args, rng):
    """
    Draw this step's transform of image and latent; rng: a random.Random, equal on all ranks.
    returns  scale of the images before encoding (EQ-VAE; 1.0 = unchanged), and
             pair(images, latents) -> (reconstruction target, decoder input)
    """
    unchanged = lambda images, latents: (images, latents)
    if "dsm" in args.reg:                                  # Alg. 2: one mask m_n for both
        return 1.0, partial(losses.dsm_pair, n=rng.choice(args.dsm_masks), block=args.dsm_block)
    if "se" in args.reg:
        return 1.0, partial(losses.scale_pair, k=rng.choice(SCALES))
    if "eq" in args.reg:
        scale, rot = rng.randint(8, 31) / 32, rng.randint(1, 3)
        if rng.random() < 0.5:
            return 1.0, partial(losses.eq_pair, scale=scale, rot=rot)
        if rng.random() < 0.25:                            # EQ-VAE also encodes small images
            return scale, unchanged
    return 1.0, unchanged


def learning_rates(args, step, gan):
    """Rates of autoencoder and discriminator, warmed up separately. gan: has the GAN started?"""
    disc_updates = step - args.gan_start if gan else 0
    if gan and not args.gan_every_step:
        disc_updates = step // 2 - args.gan_start // 2     # odd steps in [gan_start, step)
    ae_updates = step if args.gan_every_step else step - disc_updates
    return [args.lr * min(1.0, (updates + 1) / max(1, args.warmup_steps))
            for updates in (ae_updates, disc_updates)]


def alignment_networks(args, latent_channels, device):
    """Frozen teacher of VA-VAE or UAE, and the projection of latent cells to its width."""
    # VA-VAE resizes bilinearly and leaves images in [-1, 1]
    options = dict(resize="bilinear", imagenet=False) if "vf" in args.reg else {}
    teacher = load_encoder(args.encoder, args.encoder_source, **options).to(device)
    # no bias: it could fit the mean of the features by itself
    return teacher, torch.nn.Linear(latent_channels, teacher.width, bias=False).to(device)


def alignment(args, teacher, projection, ae, images, latents, recon, image_grad, terms):
    """
    Weighted alignment loss of VA-VAE or UAE between projected latents (b, C, h, w) and the images'
    features. Its value and adaptive weight are added to terms, for the log. VA-VAE's weight is
    relative to image_grad, the other losses' gradient at recon, backpropagated to the latents.
    """
    grid = latents.shape[-2:]
    features = teacher(images, grid)                       # (b, h*w, D)
    projected = projection(latents.flatten(2).transpose(1, 2))
    if "uae" in args.reg:
        terms["align"] = losses.low_freq_align_loss(projected, features, grid)
        return args.uae_weight * terms["align"]
    terms["align"] = align = losses.vf_loss(projected, features)
    latent_grad, = torch.autograd.grad(recon, latents, image_grad.to(recon.dtype),
                                       retain_graph=True)
    align_grad, = torch.autograd.grad(align, latents, retain_graph=True)
    terms["align_weight"] = ratio = losses.adaptive_weight(
        latents, latent_grad, align_grad, ae.encoder_last_layer, run.all_mean, limit=1e8)
    return args.vf_weight * ratio * align


def make_fast(args, ae, disc, lpips, device):
    """Activation checkpointing, memory layout and compilation, in place."""
    if args.grad_checkpoint:
        run.checkpoint_activations(ae, (ResnetBlock, AttnBlock))
    if args.compile == "off":
        return
    # all but the last convolutions, where the adaptive weight is measured
    for half in (ae.encoder, ae.decoder):
        half.features = torch.compile(half.features)
    for network in filter(None, (disc, lpips)):
        network.compile()
    # not in eager mode, where GroupNorm returns NCHW and every convolution would copy
    if device.type == "cuda":
        for network in filter(None, (ae, lpips)):
            network.to(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------------
# Validation, figures, printed lines

@torch.no_grad()
def validate(ae, batches, args, autocast):
    """
    Metrics on held-out images, each counted once over all ranks. Reconstructions decode the
    posterior's mode, spectra use samples. Also stores the samples' mean and standard deviation per
    channel in the autoencoder, for normalize and denormalize.
    returns  {psnr dB, ssim, l1, esm: divergence from the flattened target (nats), alpha: exponent
             of the latents' PSD, alpha_image, latent_std: RMS over channels}, prefixed with val_
    """
    ae.eval()
    totals = torch.zeros(5 + 16 + 16, dtype=torch.float64)
    moments = Moments(ae.config.latent_channels)           # mean and covariance of the channels
    for images, _, indices in batches:
        with autocast:                                     # networks only; metrics in float32
            posterior = ae.encode(images)
            recon = ae.decode(posterior.mode())
        recon = recon.float()
        noise = NoiseStream(args.seed, indices.tolist())(posterior.mean.shape)
        latents = posterior.sample(noise.to(images.device))        # the same on any rank
        l1 = (recon - images).abs().flatten(1).mean(1)
        # per image, since esm_loss averages over its batch
        esm = torch.stack([losses.esm_loss(x[None], z[None], args.gamma)
                           for x, z in zip(images, latents)])
        scores = [torch.ones_like(l1), psnr(recon, images), ssim(recon, images), l1, esm]
        profiles = [radial_profile(power_spectrum(x)).cpu().double().sum(0)          # (16,) each
                    for x in (match_resolution(images, latents.shape[-2:]), latents)]
        totals += torch.cat([torch.stack(scores).cpu().double().sum(1), *profiles])
        moments.add(latents.movedim(1, -1).flatten(0, 2))          # (b*h*w, C)
    scores, image_psd, latent_psd = run.all_sum(totals).split([5, 16, 16])
    _, mean, covariance = moments.mean_cov()
    ae.set_latent_stats(mean, covariance.diag().clamp_min(1e-12).sqrt())
    ae.train()
    report = dict(zip(("val_psnr", "val_ssim", "val_l1", "val_esm"),
                      (scores[1:] / scores[0]).tolist()))
    return report | dict(val_alpha=fit_power_law(latent_psd).item(),
                         val_alpha_image=fit_power_law(image_psd).item(),
                         val_latent_std=ae.latent_std.square().mean().sqrt().item())


@torch.no_grad()
def draw_reconstructions(ae, val_set, path, device):
    """Plot held-out images and DSM's claim: a low-passed latent decodes to the low-passed image."""
    images, _, _ = next(val_batches(val_set, 8, device=device))    # (8, 3, H, W) in [-1, 1]
    latents = ae.encode(images).mode()
    rows = {"image": images, "reconstruction": ae.decode(latents),
            "latent (PCA)": pca_rgb(latents) * 2 - 1}
    if latents.shape[-2] % 8 == 0 and latents.shape[-1] % 8 == 0:
        rows["low-pass n=10"] = lowpass(images, 10)
        rows["decoded from\nlow-pass latent"] = ae.decode(lowpass(latents, 10))
    figure_rows({label: row.float() * 0.5 + 0.5 for label, row in rows.items()}, path)


def summary(step, report, usage):
    """Validation metrics in one line; usage: images/s since the start, peak memory in GB."""
    return (f"step {step}: PSNR {report['val_psnr']:.2f} dB, SSIM {report['val_ssim']:.4f}, L1 "
            f"{report['val_l1']:.4f}, ESM divergence {report['val_esm']:.4f}, latents: std "
            f"{report['val_latent_std']:.2f}, PSD ~ f^-{report['val_alpha']:.2f} (images at latent "
            f"size: f^-{report['val_alpha_image']:.2f}), {usage['images_per_s']:.1f} images/s, "
            f"{usage['memory_GB']:.1f} GB")


# --------------------------------------------------------------------------------------------------

def main():
    args = get_args()
    rank, world, device = run.init_distributed(args.device)
    run.check_run_flags(args, world)
    torch.manual_seed(args.seed)                           # for the initial weights only
    ae = open_model(args).to(device)
    config = ae.config
    check(args, config)
    autocast = run.device_choices(args, device, fixed_size=not {"eq", "se"} & set(args.reg))
    train_set, val_set = open_data(args.data, args.image_size, args.val_images, args.seed)
    identity = dict(images=run.same_on_all_nodes("--data", lambda: images_hash(train_set)))
    checkpoint, start_step = run.open_run(args, "ae", identity)
    disc = PatchDiscriminator().to(device) if args.gan_weight > 0 else None
    teacher = projection = None
    with run.local_rank_zero_first():                      # one download per node
        lpips = PerceptualLoss().to(device) if args.lpips_weight > 0 else None
        if {"vf", "uae"} & set(args.reg):
            teacher, projection = alignment_networks(args, config.latent_channels, device)
    make_fast(args, ae, disc, lpips, device)
    adamw = partial(torch.optim.AdamW, lr=args.lr, betas=(0.9, 0.999),
                    weight_decay=args.weight_decay, fused=True)
    optimizer = adamw([*ae.parameters(), *(projection.parameters() if projection else ())])
    disc_optimizer = adamw(disc.parameters()) if disc else None
    parts = dict(model=ae, optimizer=optimizer, projection=projection, disc=disc,
                 disc_optimizer=disc_optimizer)            # saved in every checkpoint
    parts = {name: part for name, part in parts.items() if part is not None}
    if checkpoint:
        run.restore(checkpoint, parts)
    track = run.open_tracker(args, start_step)             # can fail, so before Log deletes a run
    log = run.Log(f"{args.out}/log.jsonl", start_step, checkpoint and checkpoint["means"], track)
    del checkpoint                                         # gigabytes at paper scale
    run.print0(f"{args.model}: {sum(p.numel() for p in ae.parameters()):,} parameters; reg "
               f"{' '.join(args.reg)}; {len(train_set):,} training and {len(val_set):,} held-out "
               f"images of {args.image_size} px ({args.data or 'built-in'})")
    run.print_run(args, world, device)
    ae_ddp, disc_ddp, projection_ddp = run.ddp(ae), run.ddp(disc), run.ddp(projection)
    trained = [network for network in (ae_ddp, disc_ddp, projection_ddp) if network]
    progress = run.progress_bar(args, start_step)

    def save(step):
        """Networks, optimisers, flags: one dict, from which --resume continues bit for bit."""
        state = dict(stage="ae", step=step, args=vars(args), ae_config=dataclasses.asdict(config),
                     means=log.state(), **identity)
        state |= {name: part.state_dict() for name, part in parts.items()}
        if rank == 0:
            run.save_checkpoint(f"{args.out}/ckpt.pt", state, args.keep_every)

    def evaluate(step):
        """Validate, save a checkpoint, draw the figure."""
        usage = run.usage((step - start_step) * args.batch_size, start_time, device)
        # rare and with its own shapes: not worth compiling
        with torch.compiler.set_stance("force_eager" if args.compile == "on" else "default"):
            report = validate(ae, val_batches(val_set, args.batch_size, rank, world,
                                              device=device), args, autocast)
            log.write(step, **report)
            save(step)
            run.print0(summary(step, report, usage))
            if rank == 0:
                draw_reconstructions(ae, val_set, f"{args.out}/reconstructions.png", device)
                log.track(step, usage | dict(figure=f"{args.out}/reconstructions.png"))
        if step == args.steps:
            run.print0(f"wrote {args.out}/ckpt.pt, log.jsonl, reconstructions.png")

    batches = run.save_on_error(
        train_batches(train_set, args.batch_size, start_step, args.seed, rank, world, args.workers,
                      device), start_step, save)
    start_time, accum, interrupt = time.perf_counter(), args.grad_accum, run.Interrupt()
    for step in range(start_step, args.steps + 1):
        if interrupt.asked(step):                          # save and stop, without validating
            save(step)
            break
        if step == args.steps or step % args.eval_every == 0:
            evaluate(step)
        if step == args.steps:
            break
        # random draws depend on (seed, step), not on the number of processes or restarts
        seed = run.step_seed(args.seed, step)
        scale, pair = draw_pair(args, random.Random(seed))     # Alg. 2's mask, SE's or EQ's resize
        batch = losses.scale_images(next(batches)[0], scale, config.reduction)  # (b, 3, H, W)
        generator = torch.Generator(device).manual_seed(seed)
        noise = run.sharded(torch.randn, ae.latent_shape(batch), generator, rank, world)
        gan = disc is not None and step >= args.gan_start
        train_ae = not gan or args.gan_every_step or step % 2 == 0
        train_disc = gan and (args.gan_every_step or step % 2 == 1)
        for i, (images, eps) in enumerate(zip(batch.chunk(accum), noise.chunk(accum))):
            for network in trained:                        # DDP averages gradients once per step
                network.require_backward_grad_sync = i == accum - 1
            with autocast, torch.set_grad_enabled(train_ae):       # Fig. 1; `pair` makes it Eq. 4
                recon, target, latents, posterior = ae_ddp(images, eps, pair)
            terms = {}
            if train_ae:                                   # Eq. 2, 3 or 4, term by term
                # L1, LPIPS and GAN depend on the image only: their gradients are summed at a
                # detached copy, so each network runs backward once (the decoder twice with vf)
                image = recon.detach().float().requires_grad_()
                terms["l1"] = rec = F.l1_loss(image, target)           # L1
                if lpips:
                    terms["lpips"] = lpips(image, target)              # + LPIPS
                    rec = rec + args.lpips_weight * terms["lpips"]
                image_grad, = torch.autograd.grad(rec, image)
                loss = rec.detach()                        # its gradient is image_grad
                if gan:                                                # + GAN, times VQGAN's lambda
                    disc.requires_grad_(False)
                    with autocast:
                        terms["gan"] = losses.hinge_g_loss(disc(image))
                    gan_grad, = torch.autograd.grad(terms["gan"], image)
                    terms["gan_weight"] = ratio = losses.adaptive_weight(
                        recon, image_grad, gan_grad, ae.last_layer, run.all_mean)
                    image_grad = image_grad + args.gan_weight * ratio * gan_grad
                    loss = loss + args.gan_weight * ratio * terms["gan"].detach()
                if "esm" in args.reg:                      # Eq. 3, + ESM of the unmasked images
                    terms["esm"] = losses.esm_loss(images, latents, args.gamma)
                    loss = loss + args.esm_weight * terms["esm"]
                if {"kl", "eq", "vf"} & set(args.reg):                 # Eq. 2, + KL
                    terms["kl"] = losses.kl_loss(posterior.mean, posterior.logvar)
                    loss = loss + args.kl_weight * terms["kl"]
                if teacher:                                            # + VA-VAE's or UAE's term
                    loss = loss + alignment(args, teacher, projection_ddp, ae, images, latents,
                                            recon, image_grad, terms)
                terms["loss"] = loss
                # the first summand has gradient image_grad at recon; in loss its terms are detached
                (((recon.float() * image_grad).sum() + loss) / accum).backward()
            if train_disc:
                disc.requires_grad_(True)
                with autocast:
                    terms["disc"] = losses.hinge_d_loss(disc_ddp(target), disc_ddp(recon.detach()))
                (terms["disc"] / accum).backward()
            log.add(step, terms)
        ae_lr, disc_lr = learning_rates(args, step, gan)
        if train_ae:
            norm = run.optimizer_step(optimizer, ae_lr, args.clip_grad, log.finite(step))
            log.add(step, dict(grad_norm=norm))
        if train_disc:
            norm = run.optimizer_step(disc_optimizer, disc_lr, args.clip_grad, log.finite(step))
            log.add(step, dict(disc_grad_norm=norm))
        progress.update(1)
        if step % args.log_every == 0:
            progress.set_postfix(log.write(step))
    progress.close()


if __name__ == "__main__":
    with run.one_line_errors():
        main()
