"""
Stage 2: train a diffusion transformer on an autoencoder's latents.

    python train_diffusion.py --preset quick            a laptop, after train_ae.py --preset quick
    torchrun --nproc_per_node=8 train_diffusion.py --preset imagenet-f16d16 --data DIR \\
        --ae out/ae/imagenet-f16d16-dsm/ckpt.pt

Every image is encoded once, plain and mirrored, into a cache on disk (common/latents.py). The loop
reads posterior moments from it, samples, and normalises by the latents' mean and std. SiT predicts
the interpolant's velocity, U-ViT the noise of DDPM (dit.py). With --repa, the tokens after one
block are also aligned with filtered DINOv2 features of the same image, cropped and mirrored alike.
The defaults train U-ViT on CelebA 256. A run writes ckpt.pt, log.jsonl and samples.png to --out.
Numbering as in arXiv:2603.14645 v1.
"""
import argparse
import copy
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from analysis.fid import sample_labels
from analysis.figures import image_grid
from common import run
from common.data import images_hash, take, train_batches
from common.latents import LatentCache, build_cache
from common.weights import autoencoder_hash, load_autoencoder, open_run_data
from dit import DDPM, MODELS, Interpolant, NoiseStream, SiTBlock, UViTBlock
from repa import DOG_SIGMAS, REPA_KINDS, Projector, alignment_loss, filter_target, load_encoder

SIT = dict(lr=1e-4, beta2=0.999, weight_decay=0.0, warmup_steps=0, clip_grad=1.0)  # Table 6
# as REPA and iREPA: no mirrored images, constant EMA decay
IMAGENET = dict(steps=400_000, eval_every=10_000, keep_every=100_000, mirror="off",
                ema_warmup="off", **SIT)
PRESETS = {
    "celeba-f16d16": {},                                   # the argparse defaults: U-ViT
    "celeba-f8d4": dict(model="UViT-S/2", steps=500_000),
    "imagenet-f16d16": dict(model="SiT-B/1", cfg=1.8, **IMAGENET),
    "imagenet-repa": dict(model="SiT-B/2", cfg=1.8, repa="dog", **IMAGENET),
    "one-gpu": dict(model="SiT-S/2", steps=20_000, ema=0.9995, eval_every=2500,
                    keep_every=-1, **SIT),
    "quick": dict(model="SiT-mini/1", steps=3000, batch_size=8, log_every=10, eval_every=1000,
                  sample_steps=50, ema=0.998, workers=0, repa_depth=1, keep_every=-1, schedule="sd",
                  **SIT | dict(lr=2e-3, warmup_steps=50)),
}


def get_args():
    """Parse the flags; the preset supplies defaults; --ae defaults to its newest autoencoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=run.Help,
                                     allow_abbrev=False)
    add = parser.add_argument
    # run
    add("--preset", choices=PRESETS, default="celeba-f16d16", help="named set of defaults")
    add("--out", help="output folder (default: out/diffusion/<name of the autoencoder's run>"
        "[-<repa>])")
    run.add_run_flags(parser)
    # data and latents
    add("--ae", help="ckpt.pt of train_ae.py, or released weights that common/weights.py reads "
        "(default: the newest out/ae/<preset>-*/ckpt.pt)")
    add("--data", help="folder, .zip, cifar10, or built-in leaves or discs (default: the "
        "autoencoder's training data)")
    add("--image_size", type=int, help="pixels per side (default: as for the autoencoder, or 256)")
    add("--cache", help="folder of the latent cache (default: "
        "out/latents/<autoencoder>-<images>-<size>)")
    add("--encode_batch", type=int, default=64, help="images per encoder call, over all processes")
    # model
    add("--model", choices=MODELS, default="UViT-S/1",
        help="SiT-* predicts velocity, UViT-* the noise of DDPM")
    add("--schedule", choices=("vp", "sd"), default="vp", help="noise schedule of UViT-*: VP, as "
        "in the authors' U-ViT, or Stable Diffusion's")
    add("--mirror", choices=("on", "off"), default="on", help="mirror half of the images")
    add("--num_classes", type=int, default=-1, help="-1: one per class folder; 0: unconditional")
    add("--label_dropout", type=float, default=0.1, help="fraction of null labels, for guidance")
    # representation alignment
    add("--repa", choices=("none", *REPA_KINDS), default="none",
        help="REPA, iREPA, or the paper's DoG band-pass target")
    add("--encoder", default="dinov2_vitb14", help="network whose features are the target")
    add("--repa_weight", type=float, default=0.5, help="weight of the alignment loss")
    add("--repa_until", type=int, default=-1, metavar="STEP",
        help="first step without alignment; -1 = align to the end")
    add("--repa_depth", type=int, default=4, help="block whose output is aligned, from 1")
    add("--dog_sigma1", type=float, default=DOG_SIGMAS[0], help="dog: narrow Gaussian, in tokens")
    add("--dog_sigma2", type=float, default=DOG_SIGMAS[1], help="dog: wide Gaussian, in tokens")
    add("--norm_std", type=float, default=0.6, help="irepa: fraction of the target's mean that is "
        "subtracted (Table 6)")
    # optimisation
    add("--steps", type=int, default=300_000, help="optimiser steps")
    add("--batch_size", type=int, default=256, help="latents per step, over all processes")
    add("--lr", type=float, default=2e-4, help="constant after the warm-up, never rescaled")
    add("--beta2", type=float, default=0.99, help="for AdamW; beta1 is 0.99 for UViT, 0.9 for SiT")
    add("--weight_decay", type=float, default=0.03, help="for AdamW")
    add("--warmup_steps", type=int, default=5000, help="steps until the learning rate is --lr")
    add("--clip_grad", type=float, default=0.0, help="maximum gradient norm; 0 = off")
    add("--ema", type=float, default=0.9999, help="decay of the EMA of the weights, for sampling")
    add("--ema_warmup", choices=("on", "off"), default="on", help="smaller decay at the start")
    # reporting
    add("--eval_every", type=int, default=25_000, help="steps between sample grids and checkpoints")
    add("--keep_every", type=int, default=25_000, help="steps between kept ckpt_<step>.pt; -1: off")
    add("--sample_steps", type=int, default=100, help="network calls per sample in the grid")
    add("--cfg", type=float, default=1.0, help="guidance scale of the grid; 1 = off")
    args = run.parse_args(parser, PRESETS)
    if not args.ae:
        several = len(run.checkpoints("ae", args.preset, "--ae")) > 1
        run.need(not (several and args.resume and not args.out), "--resume: there are several "
                 f"autoencoders of --preset {args.preset}; name the run's --ae")
        args.ae = run.newest("ae", args.preset, "--ae")
    repa = "" if args.repa == "none" else f"-{args.repa}"
    name = run.run_name(args.ae)
    if name.startswith("ckpt_"):                           # one of several of a run
        name = f"{Path(args.ae).parent.name}-{name}"
    args.out = args.out or f"out/diffusion/{name}{repa}"
    return args


def check(args, world):
    """ValueError for the first invalid flag, before anything is loaded or written."""
    need, need_range = run.need, run.need_range
    run.check_run_flags(args, world)
    need(args.encode_batch > 0 and args.encode_batch % world == 0,
         f"--encode_batch {args.encode_batch}: must be a positive multiple of {world} processes")
    need(args.cfg == 1 or args.label_dropout > 0, f"--cfg {args.cfg}: --label_dropout 0 never "
         "trains the null label that guidance needs; leave --cfg at 1")
    need_range(args, 0, 1, "label_dropout", "ema", "norm_std")
    need_range(args, 0, float("inf"), "cfg", "repa_weight", "dog_sigma1", "dog_sigma2")
    need_range(args, 2, 1000, "sample_steps")
    need_range(args, -1, 1_000_000, "num_classes")
    need(args.dog_sigma1 < args.dog_sigma2, f"--dog_sigma1 {args.dog_sigma1}: must be below "
         f"--dog_sigma2 {args.dog_sigma2}")


# --------------------------------------------------------------------------------------------------
# The latents and the networks of a run

def open_latents(args, ae, train_set, identity, rank, world, device):
    """The latent cache of this autoencoder and these images; encodes them if it does not exist."""
    key = dict(identity, size=train_set.size)
    folder = Path(args.cache or f"out/latents/{'-'.join(map(str, key.values()))}")
    exists = run.broadcast_from_rank0(folder.exists)       # rank 0 creates it
    if not exists:
        run.need_one_node(f"--cache {folder}")
        build_cache(folder, key, ae, train_set, args.encode_batch, rank, world, args.workers,
                    device)
    cache = LatentCache(folder, key)
    ae.set_latent_stats(cache.mean, cache.std)
    run.print0(f"{'read' if exists else 'wrote'} {folder}: {len(cache):,} latents and mirrors, "
               f"moments {list(cache.moments.shape[2:])}, normalised per channel from std "
               f"{cache.std.square().mean().sqrt():.3f} to 1")
    return cache


def alignment_networks(args, model, size, device):
    """The frozen target encoder and the projector (repa.py); size: pixels per image side."""
    grid = model.grid
    run.need(1 <= args.repa_depth <= model.depth,
             f"--repa_depth {args.repa_depth}: {args.model} has {model.depth} blocks")
    with run.local_rank_zero_first():                      # one download per node
        encoder = load_encoder(args.encoder, args.encoder_source).to(device)
    projector = Projector(REPA_KINDS[args.repa][1], model.pos_embed.shape[-1], encoder.width)
    encoder(torch.zeros(1, 3, size, size, device=device), grid)    # raises now if it does not fit
    return encoder, projector.to(device)


@torch.no_grad()
def sample_grid(args, model, classes, process, ae, autocast, device, count=16):
    """The first samples of --seed, decoded: (count, 3, H, W) in [0, 1], cycling through classes."""
    y = sample_labels(range(count), classes).to(device) if model.num_classes else None
    with autocast:
        z = process.sample(model, (count, model.in_channels, *model.input_size), y=y, cfg=args.cfg,
                           steps=args.sample_steps, noise=NoiseStream(args.seed, range(count)))
    return ae.decode(ae.denormalize(z)) * 0.5 + 0.5


# --------------------------------------------------------------------------------------------------

def main():
    args = get_args()
    rank, world, device = run.init_distributed(args.device)
    check(args, world)
    autocast = run.device_choices(args, device, fixed_size=False)
    ae = load_autoencoder(args.ae).to(device).requires_grad_(False)
    data, size, train_set, _ = open_run_data(args.ae, ae.trained, args.data, args.image_size)
    f = ae.config.reduction
    run.need(size > 0 and size % f == 0, f"--image_size {size}: must be a multiple of {f}, the "
             f"reduction of {args.ae}")
    origin = dict(data=data, data_seed=ae.trained.get("seed", 0), image_size=size)
    run.need_outside(args.out, data)
    identity = dict(autoencoder=run.same_on_all_ranks("--ae", autoencoder_hash(ae)),
                    images=run.same_on_all_nodes("--data", lambda: images_hash(train_set)))
    checkpoint, start_step = run.open_run(args, "diffusion", identity)

    classes = len(train_set.classes) if args.num_classes == -1 else args.num_classes
    run.need(args.cfg == 1 or classes, f"--cfg {args.cfg}: an unconditional model has no null "
             "class, which guidance needs; leave --cfg at 1")
    model_args = dict(input_size=size // f, in_channels=ae.config.latent_channels,
                      num_classes=classes)
    torch.manual_seed(args.seed)                           # for the initial weights only
    model, uvit = MODELS[args.model](**model_args).to(device), args.model.startswith("UViT")
    encoder = projector = None
    process = DDPM(args.schedule) if uvit else Interpolant()
    if args.repa != "none":
        encoder, projector = alignment_networks(args, model, size, device)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *(projector.parameters() if projector else ())], lr=args.lr,
        betas=(0.99 if uvit else 0.9, args.beta2), weight_decay=args.weight_decay, fused=True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)        # EMA of the weights, to sample
    cache = open_latents(args, ae, train_set, identity, rank, world, device)
    run.need(not classes or cache.labels.max() < classes,
             f"--num_classes {classes}: the data has labels up to {cache.labels.max()}")
    seen = np.unique(cache.labels[cache.rows]).tolist()    # classes that have an image
    parts = dict(model=model, optimizer=optimizer, ema=ema)        # saved in every checkpoint
    parts |= dict(projector=projector) if projector else {}
    if checkpoint:
        run.restore(checkpoint, parts)
    track = run.open_tracker(args, start_step)             # can fail, so before Log deletes a run
    log = run.Log(f"{args.out}/log.jsonl", start_step, checkpoint and checkpoint["means"], track)
    del checkpoint                                         # gigabytes at paper scale
    run.print0(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, "
               f"{classes or 'no'} classes; images: {data or 'built-in'} at {size} px")
    run.print_run(args, world, device)

    if args.grad_checkpoint:
        run.checkpoint_activations(model, (SiTBlock, UViTBlock))
    if args.compile == "on":
        model.compile()
    n = args.grad_accum
    static = n == 1 and args.repa_until < 0                # every step runs the same graph
    model_ddp, projector_ddp = (run.ddp(net, static) for net in (model, projector))
    trained = [network for network in (model_ddp, projector_ddp) if network]
    stream = (args.batch_size, start_step, args.seed, rank, world)
    latent_batches = cache.batches(*stream, device, args.mirror == "on")
    progress = run.progress_bar(args, start_step)

    def save(step):
        """Networks, optimiser, flags: one dict, from which --resume continues bit for bit."""
        state = dict(origin, stage="diffusion", step=step, args=vars(args), model_name=args.model,
                     model_args=model_args, projector=None, means=log.state(),
                     ae=os.path.abspath(args.ae), ae_from_run=os.path.relpath(args.ae, args.out),
                     latent_mean=cache.mean, latent_std=cache.std, classes_seen=seen, **identity)
        state |= {name: part.state_dict() for name, part in parts.items()}
        if rank == 0:
            run.save_checkpoint(f"{args.out}/ckpt.pt", state, args.keep_every)

    if encoder:                                            # images in the order of the latents
        image_batches = train_batches(take(train_set, cache.rows), *stream, args.workers, device,
                                      args.mirror == "on", strict=True)
        image_batches = run.save_on_error(image_batches, start_step, save)
    interrupt, start_time = run.Interrupt(), time.perf_counter()
    for step in range(start_step, args.steps + 1):
        if interrupt.asked(step):
            save(step)
            break
        if step == args.steps or step % args.eval_every == 0:
            save(step)
            if rank == 0:
                image_grid(sample_grid(args, ema, seen, process, ae, autocast, device),
                             f"{args.out}/samples.png")
                log.track(step, dict(samples=f"{args.out}/samples.png"))
        if step == args.steps:
            run.print0(f"wrote {args.out}/ckpt.pt, log.jsonl, samples.png")
            break

        # random draws depend on (seed, step), not on the number of processes or restarts
        generator = torch.Generator(device).manual_seed(run.step_seed(args.seed, step))
        draw = partial(run.sharded, generator=generator, rank=rank, world=world)
        posterior, labels, _, _ = next(latent_batches)
        aligned = encoder and not 0 <= args.repa_until <= step
        images = next(image_batches)[0] if aligned else None       # (b, 3, H, W)
        latents = ae.normalize(posterior.sample(draw(torch.randn, posterior.mean.shape)))   # std 1
        b = len(latents)                                   # global batch / world
        t = draw(torch.rand, (b,))                         # 0 = data, 1 = noise
        eps = draw(torch.randn, latents.shape)             # (b, C, h, w)
        drop = draw(torch.rand, (b,)) < args.label_dropout     # True: null label

        for i in range(n):                                 # micro-batches
            part = slice(i * b // n, (i + 1) * b // n)
            y = labels[part] if classes else None
            for network in trained:
                network.require_backward_grad_sync = i == n - 1
            with autocast:                                 # MSE of velocity or noise
                loss = process.loss(model_ddp, latents[part], t[part], eps[part], y, drop[part],
                                    args.repa_depth if aligned else None)
            terms = dict(loss=loss)
            if aligned:                                    # Sec. 3.5: tokens (b, T, D) of one block
                terms["loss"], tokens = loss
                features = encoder(images[part], model.grid)
                target = filter_target(features, REPA_KINDS[args.repa][0], model.grid,
                                       args.dog_sigma1, args.dog_sigma2, args.norm_std)    # Eq. 6
                with autocast:
                    projected = projector_ddp(tokens, model.grid)
                terms["align"] = alignment_loss(projected, target)
                loss = terms["loss"] + args.repa_weight * terms["align"]
            (loss / n).backward()
            log.add(step, terms)
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        norm = run.optimizer_step(optimizer, lr, args.clip_grad, log.finite(step))
        log.add(step, dict(grad_norm=norm))
        decay = min(args.ema, (1 + step) / (10 + step)) if args.ema_warmup == "on" else args.ema
        run.update_ema(ema, model, decay)
        progress.update(1)
        if step % args.log_every == 0:
            means = log.write(step)
            progress.set_postfix(means)
            usage = run.usage((step + 1 - start_step) * args.batch_size, start_time, device)
            log.track(step, usage)
            if step % (10 * args.log_every) == 0:
                run.print0(f"step {step}: loss {means.get('loss', float('nan')):.4f}, "
                           f"{usage['images_per_s']:.1f} images/s, {usage['memory_GB']:.1f} GB")
    progress.close()


if __name__ == "__main__":
    with run.one_line_errors():
        main()
