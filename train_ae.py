"""
Stage 1: train an autoencoder whose latent spectrum is shaped.

    python train_ae.py --preset quick --reg dsm                               a laptop, minutes, nothing downloaded
    torchrun --nproc_per_node=8 train_ae.py --reg esm --gamma 1.0 --data DIR  the paper's scale

The argparse defaults are Table 5 for CelebA 256 (f16d16). A run lives in --out: ckpt.pt, log.jsonl, reconstructions.png.
The batch size is the GLOBAL batch over all processes, and the learning rate is never rescaled.
"""
import argparse
import contextlib
import dataclasses
import math
import random
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import runtime
from data import open_data, train_batches, val_batches
from figures import figure_rows, pca_rgb
from losses import (DSM_MASKS, SCALES, PatchDiscriminator, PerceptualLoss, adaptive_weight, dsm_pair, eq_pair, esm_loss, hinge_d_loss,
                    hinge_g_loss, kl_loss, low_freq_align_loss, scale_images, scale_pair, vf_loss)
from metrics import psnr, ssim
from repa import load_encoder
from spectral import fit_power_law, lowpass, match_resolution, power_spectrum, radial_profile
from vae import CONFIGS, AttnBlock, AutoencoderKL, ResnetBlock

PRESETS = {
    "celeba-f16d16": {},                                                                   # the argparse defaults
    "celeba-f8d4": dict(model="f8d4"),
    "imagenet-f16d16": dict(batch_size=128, steps=600_000),
    "quick": dict(model="f2d4-tiny", image_size=32, steps=1200, batch_size=8, lr=4e-3, warmup_steps=40, lpips_weight=0.0, gan_weight=0.0,
                  eval_every=300, log_every=10, val_images=256, workers=0),
}
PAIRS = ("dsm", "se", "eq")                                                                # methods that change what is decoded


def get_args():
    """The flags; presets fill in what is not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # what is run
    parser.add_argument("--preset", choices=PRESETS, default="celeba-f16d16", help="a named group of defaults; explicit flags win")
    parser.add_argument("--out", default=None, help="folder of the run (default: out/ae/<preset>-<reg>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and every draw, >= 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda when there is a GPU")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default=None, help="of the networks (default: bf16 on cuda, fp32 on cpu)")
    parser.add_argument("--compile", choices=("on", "off"), default=None, help="torch.compile the networks (default: on on cuda, off on cpu)")
    parser.add_argument("--grad_checkpoint", action="store_true", help="compute every block twice to keep less in memory")
    # data
    parser.add_argument("--data", default=None, help="folder, .zip, or cifar10 (default: built-in dead-leaves images)")
    parser.add_argument("--image_size", type=int, default=256, help="pixels a side")
    parser.add_argument("--val_images", type=int, default=1000, help="held-out images")
    parser.add_argument("--workers", type=int, default=8, help="loader processes per training process")
    # model and regulariser
    parser.add_argument("--model", choices=CONFIGS, default="f16d16", help="autoencoder: f = reduction, d = latent channels")
    parser.add_argument("--reg", nargs="+", choices=("none", "kl", "esm", "dsm", "se", "eq", "vf", "uae"), default=["kl"],
                        help="one or several: SD-VAE's KL, ESM, DSM, Scale Equivariance, EQ-VAE, VA-VAE, UAE; none = reconstruction only")
    parser.add_argument("--gamma", type=float, default=1.0, help="ESM: flattening exponent of the target, >= 0")
    parser.add_argument("--esm_weight", type=float, default=0.01)
    parser.add_argument("--dsm_masks", type=int, nargs="+", default=list(DSM_MASKS), help="DSM: anti-diagonals cut, 0..14 each (Table 8)")
    parser.add_argument("--kl_weight", type=float, default=1e-6, help="used by --reg kl, eq and vf only")
    parser.add_argument("--align_weight", type=float, default=0.1, help="VA-VAE, UAE: times the adaptive ratio of gradients")
    parser.add_argument("--uae_cutoff", type=float, default=0.25, help="UAE: share of the frequencies aligned, in (0, 1]")
    parser.add_argument("--encoder", default="dinov2_vitb14", help="VA-VAE, UAE: whose features the latents are aligned with")
    parser.add_argument("--encoder_source", default=None, help="a local clone of facebookresearch/dinov2, or random (for tests)")
    # reconstruction
    parser.add_argument("--lpips_weight", type=float, default=0.5, help="0 = off (needs no VGG weights)")
    parser.add_argument("--gan_weight", type=float, default=0.5, help="0 = off")
    parser.add_argument("--gan_start", type=int, default=50_000, help="first step with the discriminator")
    parser.add_argument("--gan_every_step", action="store_true", help="train both networks in each step (default: even steps the "
                        "autoencoder, odd steps the discriminator)")
    # optimisation
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--batch_size", type=int, default=48, help="images per step over all processes")
    parser.add_argument("--grad_accum", type=int, default=1, help="parts in which a process works through its share of the batch, to save memory")
    parser.add_argument("--lr", type=float, default=5e-5, help="of both networks; constant after the warm-up")
    parser.add_argument("--warmup_steps", type=int, default=2000)
    parser.add_argument("--weight_decay", type=float, default=0.005)
    parser.add_argument("--clip_grad", type=float, default=1.0, help="largest gradient norm")
    # reporting
    parser.add_argument("--log_every", type=int, default=100, help="steps between lines of log.jsonl")
    parser.add_argument("--eval_every", type=int, default=5000, help="steps between validations, each with a checkpoint")
    parser.add_argument("--keep_every", type=int, default=-1, help="also keep ckpt_<step>.pt at these steps; -1 = off")
    args = runtime.parse_args(parser, PRESETS)
    args.out = args.out or f"out/ae/{args.preset}-{'-'.join(args.reg)}"
    return args


def check(args, config, world):
    """ValueError on the first flag that cannot work, before anything is loaded or written."""
    def need(condition, message):
        if not condition:
            raise ValueError(message)

    side, remainder = divmod(args.image_size, config.reduction)
    need(16 <= args.image_size <= 16384, f"--image_size {args.image_size}: must lie in 16..16384")
    need(remainder == 0,
         f"--image_size {args.image_size}: must be a multiple of {config.reduction}, the reduction of --model {args.model}")
    need(args.grad_accum > 0, f"--grad_accum {args.grad_accum}: must be at least 1")
    need(args.batch_size > 0 and args.batch_size % (world * args.grad_accum) == 0,
         f"--batch_size {args.batch_size}: must be above 0 and divide by {world} processes times --grad_accum {args.grad_accum}")
    need("none" not in args.reg or args.reg == ["none"], "--reg none: stands alone, or leave it out")
    need(not {"vf", "uae"} <= set(args.reg), "--reg vf uae: both align the latent with the same features; choose one of them")
    pairs = [reg for reg in PAIRS if reg in args.reg]
    need(len(pairs) <= 1, f"--reg {' '.join(pairs)}: each changes what the decoder sees; choose one of them")
    need("dsm" not in args.reg or side % 8 == 0,
         f"--reg dsm: a latent of {side}x{side} does not tile into 8x8 blocks; --image_size must be a multiple of {8 * config.reduction}")
    need(all(0 <= n <= 14 for n in args.dsm_masks), f"--dsm_masks {args.dsm_masks}: each must lie in 0..14")
    need("se" not in args.reg or side % max(SCALES) == 0, f"--reg se: a latent of {side}x{side} does not divide by {max(SCALES)}")
    smallest = args.image_size // (4 if {"se", "eq"} & set(args.reg) else 1)
    need(args.gan_weight == 0 or smallest >= 24, f"--gan_weight {args.gan_weight}: the discriminator needs images of at least 24 pixels a "
         f"side, and here they may be {smallest}; --gan_weight 0 switches it off")
    need(args.lpips_weight == 0 or smallest >= 16, f"--lpips_weight {args.lpips_weight}: LPIPS needs images of at least 16 pixels a side, "
         f"and here they may be {smallest}; --lpips_weight 0 switches it off")
    need(0 < args.uae_cutoff <= 1, f"--uae_cutoff {args.uae_cutoff}: must lie in (0, 1]")
    for name, high in (("gamma", 10), ("seed", 2 ** 63), ("workers", 1024), *((name, math.inf) for name in (
            "esm_weight", "kl_weight", "align_weight", "lpips_weight", "gan_weight", "weight_decay", "gan_start", "warmup_steps", "steps"))):
        value = getattr(args, name)                                                        # gamma: 16^gamma is to fit float32
        need(0 <= value <= high and value < math.inf, f"--{name} {value}: must be finite and lie in 0..{high}")
    for name in ("lr", "clip_grad", "log_every", "eval_every", "val_images"):
        value = getattr(args, name)
        need(0 < value < math.inf, f"--{name} {value}: must be above 0 and finite")
    need(not (args.resume and args.overwrite), "--resume --overwrite: one continues the run in --out, the other replaces it; choose one of them")
    need(args.keep_every < 1 or args.keep_every % args.eval_every == 0,
         f"--keep_every {args.keep_every}: must be a multiple of --eval_every {args.eval_every}, when checkpoints are made")


def draw_pair(args, rng):
    """
    One step's draw of the pair method, the same on every rank.
    returns (scale of the images before encoding, 1.0 = none; function (images, latents) -> (target, z))
    """
    if "dsm" in args.reg:                                                                  # Alg. 2: one mask for the batch
        n = rng.choice(args.dsm_masks)
        return 1.0, lambda images, latents: dsm_pair(images, latents, n)
    if "se" in args.reg:
        k = rng.choice(SCALES)
        return 1.0, lambda images, latents: scale_pair(images, latents, k)
    if "eq" in args.reg:
        scale, rot = rng.randint(8, 31) / 32, rng.randint(1, 3)
        if rng.random() < 0.5:
            return 1.0, lambda images, latents: eq_pair(images, latents, scale, rot)
        if rng.random() < 0.25:                                                            # EQ-VAE also shows the encoder small images
            return scale, lambda images, latents: (images, latents)
    return 1.0, lambda images, latents: (images, latents)


@torch.no_grad()
def validate(ae, batches, args, autocast):
    """
    Held-out images, each counted once over all ranks. Reconstructions decode the posterior's mode, spectra see its samples.
    Also stores the samples' mean and standard deviation per channel in the autoencoder (normalize, denormalize).
    returns {psnr dB, ssim, l1, esm: divergence from the flattened target (nats), alpha: exponent of the latents' PSD, alpha_image}
    """
    ae.eval()
    C = ae.config.latent_channels
    scores, profiles, moments = torch.zeros(5, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.float64), torch.zeros(3, C, dtype=torch.float64)
    for images, _, indices in batches:
        with autocast():                                                                   # the networks; metrics are float32
            posterior = ae.encode(images)
            recon = ae.decode(posterior.mode())
        recon = recon.float()
        noise = [torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(runtime.step_seed(args.seed, i)))
                 for i in indices.tolist()]                                                # image i has its noise on any rank
        latents = posterior.sample(torch.stack(noise).to(images.device))
        small = match_resolution(images, latents.shape[-2:])
        l1 = (recon - images).abs().flatten(1).mean(1)
        esm = torch.stack([esm_loss(x[None], z[None], args.gamma) for x, z in zip(images, latents)])
        scores += torch.stack([torch.ones_like(l1), psnr(recon, images), ssim(recon, images), l1, esm]).double().sum(1).cpu()
        profiles += torch.stack([radial_profile(power_spectrum(x)).double().sum(0) for x in (small, latents)]).cpu()
        cells = latents.double().movedim(1, -1).reshape(-1, C)
        moments += torch.stack([torch.ones_like(cells[0]) * len(cells), cells.sum(0), cells.square().sum(0)]).cpu()
    totals = runtime.all_sum(torch.cat([scores, profiles.flatten(), moments.flatten()]).to(ae.latent_mean.device)).cpu()
    scores, profiles, (count, total, squares) = totals[:5], totals[5:37].view(2, 16), totals[37:].view(3, C)
    mean = total / count
    ae.set_latent_stats(mean, (squares / count - mean ** 2).clamp_min(1e-12).sqrt())
    ae.train()
    names = ("psnr", "ssim", "l1", "esm")
    return dict(zip(names, (scores[1:] / scores[0]).tolist()), alpha=fit_power_law(profiles[1]).item(),
                alpha_image=fit_power_law(profiles[0]).item(), latent_std=ae.latent_std.square().mean().sqrt().item())


@torch.no_grad()
def picture(ae, images, path, autocast):
    """reconstructions.png: held-out images, their reconstructions and latents, and DSM's question: does a low-passed latent decode to
    the low-passed image?"""
    with autocast():
        latents = ae.encode(images).mode()
        rows = {"image": images, "reconstruction": ae.decode(latents), "latent (PCA)": pca_rgb(latents) * 2 - 1}
        if latents.shape[-2] % 8 == 0 and latents.shape[-1] % 8 == 0:
            rows |= {"low-pass n=10": lowpass(images, 10), "decoded from\nlow-pass latent": ae.decode(lowpass(latents, 10))}
    figure_rows({label: row.float() * 0.5 + 0.5 for label, row in rows.items()}, path)


def main():
    args = get_args()
    rank, world, device = runtime.start_processes(args.device)
    config = CONFIGS[args.model]
    check(args, config, world)
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    # what may differ between the parts of a resumed run: where and how fast it runs, how often it reports, how long it lasts
    checkpoint = runtime.open_run(args.out, "ae", vars(args), args.resume, args.overwrite, free=(
        "out", "resume", "overwrite", "preset", "device", "dtype", "compile", "grad_checkpoint", "grad_accum", "workers", "steps", "log_every",
        "eval_every", "keep_every", "encoder_source"))
    say = print if rank == 0 else lambda *args, **kwargs: None

    train_set, val_set = open_data(args.data, args.image_size, val_images=args.val_images, seed=args.seed)
    torch.manual_seed(args.seed)                                                           # the initial weights; nothing else uses it
    ae = AutoencoderKL(config).to(device)
    adamw = lambda network: torch.optim.AdamW(network.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    optimizer = adamw(ae)
    gan_on, lpips_on = args.gan_weight > 0 and args.gan_start < args.steps, args.lpips_weight > 0
    if gan_on:
        disc = PatchDiscriminator().to(device)
        disc_optimizer = adamw(disc)
    if lpips_on:
        with runtime.rank_zero_first():
            perceptual = PerceptualLoss().to(device)
    aligned = bool({"vf", "uae"} & set(args.reg))
    if aligned:                                                                            # latent cells -> the encoder's feature width
        with runtime.rank_zero_first():
            encoder = load_encoder(args.encoder, args.encoder_source).to(device)
        projection = torch.nn.Linear(config.latent_channels, encoder.width, bias=False).to(device)  # a bias could match the common part alone
        optimizer.add_param_group(dict(params=projection.parameters()))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    start_step, means = 0, {}
    if checkpoint:
        parts = dict(model=ae, optimizer=optimizer) | (dict(projection=projection) if aligned else {})
        if gan_on and "disc" in checkpoint:                                                # it is not there when --steps was below --gan_start
            parts |= dict(disc=disc, disc_optimizer=disc_optimizer)
        runtime.restore(args.out, checkpoint, parts)
        start_step = checkpoint["step"]
        means = checkpoint.get("means", {})
        say(f"resuming {args.out} at step {start_step}")
        del checkpoint                                                                     # gigabytes at paper scale
    networks = [ae] + ([disc] if gan_on else []) + ([projection] if aligned else [])
    for network in networks:
        runtime.broadcast_parameters(network)
    if args.grad_checkpoint:
        runtime.recompute(ae, (ResnetBlock, AttnBlock))
    if device.type == "cuda":                                                              # slower on a CPU: tests/benchmark.py
        for network in (ae, *([perceptual] if lpips_on else [])):
            network.to(memory_format=torch.channels_last)
        torch.backends.cudnn.allow_tf32 = args.dtype == "bf16"                             # LPIPS, which stays out of autocast
    compiled = (args.compile or ("on" if device.type == "cuda" else "off")) == "on"
    if compiled:
        for network in (ae.encoder, ae.decoder, *([disc] if gan_on else []), *([perceptual] if lpips_on else [])):
            network.compile()

    say(f"{args.model}: {sum(p.numel() for p in ae.parameters()):,} parameters, {args.image_size} px -> {config.latent_channels} x "
        f"{args.image_size // config.reduction} x {args.image_size // config.reduction}; reg {' '.join(args.reg)}; {len(train_set):,} "
        f"training and {len(val_set):,} held-out images ({args.data or 'built-in'})")
    say(f"global batch {args.batch_size} = {world} x {args.batch_size // world} on {device.type} in {args.dtype}; learning rate {args.lr:g}, "
        f"not rescaled; {args.steps:,} steps -> {args.out}")
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    log = runtime.RunLog(f"{args.out}/log.jsonl", rank, start_step, means)
    batches = train_batches(train_set, args.batch_size, start_step=start_step, seed=args.seed, rank=rank, world=world,
                            workers=args.workers, device=device)
    share = args.batch_size // world                                                       # images of this process per step
    timed_step, clock = start_step, time.perf_counter()
    progress = tqdm(total=args.steps, initial=start_step, unit="img", unit_scale=args.batch_size, disable=rank > 0 or not sys.stderr.isatty())

    def save(step):
        """All of the run at this step into ckpt.pt; called on all processes."""
        state = dict(stage="ae", step=step, args=vars(args), ae_config=dataclasses.asdict(config), model=ae.state_dict(),
                     optimizer=optimizer.state_dict(), means=log.state())
        if aligned:
            state["projection"] = projection.state_dict()
        if gan_on:
            state |= dict(disc=disc.state_dict(), disc_optimizer=disc_optimizer.state_dict())
        if rank == 0:
            runtime.save_run(args.out, state, args.keep_every)

    with runtime.StopSignal() as stop:
        for step in range(start_step, args.steps + 1):
            last_step = step == args.steps
            if stop.asked():
                save(step)
                say(stop.farewell(step, args))
                break
            if last_step or step % args.eval_every == 0:
                speed = (step - timed_step) * args.batch_size / (time.perf_counter() - clock)  # since the last validation
                with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():  # not worth a compilation each size
                    report = validate(ae, val_batches(val_set, args.batch_size, rank=rank, world=world, device=device), args, autocast)
                log.line(step, **{f"val_{k}": v for k, v in report.items()})
                save(step)
                if rank == 0:
                    progress.write(f"step {step}: PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f}, L1 {report['l1']:.4f}, "
                                   f"ESM divergence {report['esm']:.4f}, latent PSD ~ f^-{report['alpha']:.2f}"
                                   + (f", {speed:.1f} images/s" if step > start_step else ""), file=sys.stdout)
                    first = torch.stack([val_set[i][0] for i in range(min(8, len(val_set)))]).to(device)
                    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
                        picture(ae, first / 127.5 - 1, f"{args.out}/reconstructions.png", autocast)
                timed_step, clock = step, time.perf_counter()
            if last_step:
                say(f"latents: std {report['latent_std']:.3f}, PSD ~ f^-{report['alpha']:.2f} (images at that size: f^-{report['alpha_image']:.2f}), "
                    f"divergence from the target flattened by gamma {args.gamma:g}: {report['esm']:.4f}")
                say(f"wrote {args.out}/ckpt.pt, log.jsonl, reconstructions.png")
                break

            # Everything random below is a function of (seed, step): see runtime.py
            seed = runtime.step_seed(args.seed, step)
            rng, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
            gan_now = gan_on and step >= args.gan_start
            train_ae = not gan_now or args.gan_every_step or step % 2 == 0
            train_disc = gan_now and (args.gan_every_step or step % 2 == 1)

            batch, _, _ = next(batches)                                                    # (share, 3, H, W) in [-1, 1]
            image_scale, pair = draw_pair(args, rng)
            if image_scale < 1:
                batch = scale_images(batch, image_scale, config.reduction)
            h, w = (side // config.reduction for side in batch.shape[-2:])
            draws = runtime.sharded_randn((share, config.latent_channels, h, w), generator, rank, world)
            for images, noise in zip(batch.chunk(args.grad_accum), draws.chunk(args.grad_accum)):  # (b, ...) each: what fits the memory
                losses = {}
                with torch.set_grad_enabled(train_ae), autocast():                         # a discriminator step keeps no graph here
                    posterior = ae.encode(images)
                    latents = posterior.sample(noise)                                      # (b, C, h, w)
                    target, z = pair(images, latents)                                      # images and latents unless dsm, se or eq
                    recon = ae.decode(z)

                if train_ae:
                    losses["l1"] = F.l1_loss(recon.float(), target)
                    rec_loss = losses["l1"]
                    if lpips_on:
                        losses["lpips"] = perceptual(recon, target)
                        rec_loss = rec_loss + args.lpips_weight * losses["lpips"]
                    loss = rec_loss
                    if "esm" in args.reg:
                        losses["esm"] = esm_loss(images, latents, args.gamma)
                        loss = loss + args.esm_weight * losses["esm"]
                    if {"kl", "eq", "vf"} & set(args.reg):
                        losses["kl"] = kl_loss(posterior.mean, posterior.logvar)
                        loss = loss + args.kl_weight * losses["kl"]
                    if aligned:
                        grid = latents.shape[-2:]
                        features, cells = encoder(images, grid), projection(latents.flatten(2).transpose(1, 2))  # (b, h*w, D) both
                        losses["align"] = vf_loss(cells, features) if "vf" in args.reg else low_freq_align_loss(cells, features, grid, args.uae_cutoff)
                        losses["align_weight"] = adaptive_weight(rec_loss, losses["align"], ae.encoder_last_layer, runtime.mean_over_processes)
                        loss = loss + args.align_weight * losses["align_weight"] * losses["align"]
                    if gan_now:
                        disc.requires_grad_(False)
                        with autocast():
                            losses["gan"] = hinge_g_loss(disc(recon))
                        losses["gan_weight"] = adaptive_weight(rec_loss, losses["gan"], ae.last_layer, runtime.mean_over_processes)
                        loss = loss + args.gan_weight * losses["gan_weight"] * losses["gan"]
                        disc.requires_grad_(True)
                    (loss / args.grad_accum).backward()
                    losses["loss"] = loss
                if train_disc:
                    with autocast():
                        losses["disc"] = hinge_d_loss(disc(target), disc(recon.detach()))
                    (losses["disc"] / args.grad_accum).backward()
                log.add(step, losses)

            if train_ae:
                runtime.average_gradients(trained)
                grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_grad)
                warm_up(optimizer, args, step)
                log.add(step, dict(grad_norm=grad_norm))
                runtime.step_if(log.finite(step), optimizer)
            if train_disc:
                runtime.average_gradients(disc.parameters())
                grad_norm = torch.nn.utils.clip_grad_norm_(disc.parameters(), args.clip_grad)
                warm_up(disc_optimizer, args, (step - args.gan_start) // (1 if args.gan_every_step else 2))
                log.add(step, dict(disc_grad_norm=grad_norm))
                runtime.step_if(log.finite(step), disc_optimizer)

            progress.update(1)
            if step % args.log_every == 0:
                means = log.write(step)
                progress.set_postfix({k: f"{v:.4g}" for k, v in means.items() if k in ("l1", "esm", "kl")})
    progress.close()
    runtime.barrier()


def warm_up(optimizer, args, updates):
    """Linear warm-up to args.lr over args.warmup_steps updates, then constant."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, (updates + 1) / max(1, args.warmup_steps))


if __name__ == "__main__":
    with runtime.one_line_errors():
        main()
