"""
Stage 2: train a diffusion transformer on an autoencoder's latents.

    python train_diffusion.py --preset quick            a laptop, after train_ae.py --preset quick
    torchrun --nproc_per_node=8 train_diffusion.py --preset imagenet-f16d16 --data DIR \\
        --ae out/ae/imagenet-f16d16-dsm/ckpt.pt

Every image is encoded once, as it is and mirrored, into a cache on disk (latents.py); the loop
reads moments from there, samples the posterior and normalises by the latents' mean and std. SiT
learns the interpolant's velocity, U-ViT the DDPM's noise (dit.py). With --repa the tokens after one
block are also aligned with filtered DINOv2 features of the same image, same crop, same mirror.
The argparse defaults train U-ViT on CelebA 256. A run lives in --out: ckpt.pt, log.jsonl,
samples.png.
"""
import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from analysis.figures import picture_grid
from common import run
from common.data import images_hash, open_data, take, train_batches
from common.latents import LatentCache, build_cache
from common.weights import autoencoder_hash, load_autoencoder
from dit import DDPM, MODELS, Interpolant, NoiseStream, SiTBlock, UViTBlock
from repa import DOG_SIGMAS, REPA_KINDS, Projector, alignment_loss, filter_target, load_encoder

SIT = dict(lr=1e-4, beta2=0.999, weight_decay=0.0, warmup_steps=0, clip_grad=1.0)  # Table 6
# REPA and iREPA: no mirrored images, a constant decay of the average
IMAGENET = dict(steps=400_000, eval_every=10_000, keep_every=100_000, mirror="off",
                ema_warmup="off", **SIT)
PRESETS = {
    "celeba-f16d16": {},                                   # the argparse defaults: U-ViT
    "celeba-f8d4": dict(model="UViT-S/2", steps=500_000),
    "imagenet-f16d16": dict(model="SiT-B/1", cfg=1.8, **IMAGENET),
    "imagenet-repa": dict(model="SiT-B/2", cfg=1.8, repa="dog", **IMAGENET),
    "one-gpu": dict(model="SiT-S/2", steps=20_000, ema=0.9995, eval_every=2500,
                    keep_every=-1, **SIT),
    "quick": dict(model="SiT-mini/2", steps=3000, batch_size=8, log_every=10, eval_every=1000,
                  sample_steps=50, ema=0.998, workers=0, repa_depth=1, keep_every=-1, schedule="sd",
                  **SIT | dict(lr=2e-3, warmup_steps=50)),
}


def get_args():
    """The flags; presets fill in what is not given. --ae: the newest autoencoder of the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    # what is run
    add("--preset", choices=PRESETS, default="celeba-f16d16",
        help="a named group of defaults; explicit flags win")
    add("--out", default=None, help="folder of the run (default: out/diffusion/<name of the "
        "autoencoder's run>[-<repa>])")
    add("--resume", action="store_true", help="continue the run in --out, or start it")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--seed", type=int, default=0, help="of weights, data order and every draw, >= 0")
    add("--device", choices=("cpu", "cuda"), default=None, help="default: cuda if there is a GPU")
    add("--dtype", choices=("fp32", "bf16"), default=None,
        help="of the transformer (default: bf16 on cuda, fp32 on cpu)")
    add("--compile", choices=("on", "off"), default=None,
        help="torch.compile the transformer (default: on on cuda, off on cpu)")
    add("--grad_checkpoint", action="store_true",
        help="compute every block twice to keep less in memory")
    # data and latents
    add("--ae", default=None, help="ckpt.pt of train_ae.py, or released weights that weights.py "
        "reads (default: the newest out/ae/<preset>-*/ckpt.pt)")
    add("--data", default=None,
        help="folder, .zip, or cifar10 (default: what the autoencoder was trained on)")
    add("--image_size", type=int, default=None,
        help="pixels a side (default: what the autoencoder was trained on, or 256)")
    add("--cache", default=None, help="folder of the latent cache (default: "
        "out/latents/<autoencoder>-<images>-<size>)")
    add("--encode_batch", type=int, default=64, help="images per encoder call over all processes")
    add("--workers", type=int, default=8,
        help="loader processes per training process, for encoding and for --repa")
    # model
    add("--model", choices=MODELS, default="UViT-S/1",
        help="SiT-* learns velocities, UViT-* the noise of DDPM")
    add("--schedule", choices=("vp", "sd"), default="vp", help="noise levels of UViT-*: the VP "
        "schedule of the authors' U-ViT, or Stable Diffusion's")
    add("--mirror", choices=("on", "off"), default="on", help="show half of the images mirrored")
    add("--num_classes", type=int, default=-1,
        help="-1: as many as the data has class folders; 0: unconditional")
    add("--label_dropout", type=float, default=0.1,
        help="share of labels replaced by the null label, for guidance")
    # representation alignment
    add("--repa", choices=("none", *REPA_KINDS), default="none",
        help="REPA, iREPA, or the paper's DoG band-pass target")
    add("--encoder", default="dinov2_vitb14", help="whose features are the target")
    add("--encoder_source", default=None,
        help="a local clone of facebookresearch/dinov2, a LabelNet's .pt, or random (for tests)")
    add("--repa_weight", type=float, default=0.5,
        help="of the alignment loss, beside the diffusion loss")
    add("--repa_depth", type=int, default=4, help="the block, from 1, whose output is aligned")
    add("--dog_sigma1", type=float, default=DOG_SIGMAS[0],
        help="dog: the narrow Gaussian, in tokens")
    add("--dog_sigma2", type=float, default=DOG_SIGMAS[1], help="dog: the wide Gaussian, in tokens")
    add("--norm_std", type=float, default=None, help="share of the mean that is taken off the "
        "target (Table 6; default: irepa 0.6, dog 1.0, which has no mean left)")
    # optimisation
    add("--steps", type=int, default=300_000)
    add("--batch_size", type=int, default=256, help="latents per step over all processes")
    add("--grad_accum", type=int, default=1,
        help="parts in which a process works through its share of the batch, to save memory")
    add("--lr", type=float, default=2e-4, help="constant after the warm-up, never rescaled")
    add("--beta2", type=float, default=0.99,
        help="AdamW's second beta; the first is 0.99 for UViT, 0.9 for SiT")
    add("--weight_decay", type=float, default=0.03)
    add("--warmup_steps", type=int, default=5000)
    add("--clip_grad", type=float, default=0.0, help="largest gradient norm; 0 = off")
    add("--ema", type=float, default=0.9999,
        help="decay of the weights' moving average, which is what is sampled")
    add("--ema_warmup", choices=("on", "off"), default="on",
        help="a smaller decay at the start, which forgets the initial weights sooner")
    # reporting
    add("--log_every", type=int, default=100, help="steps between lines of log.jsonl")
    add("--eval_every", type=int, default=25_000,
        help="steps between sample grids, each with a checkpoint")
    add("--keep_every", type=int, default=25_000,
        help="also keep ckpt_<step>.pt at these steps; -1 = off")
    add("--sample_steps", type=int, default=100, help="network calls per sample of the grid")
    add("--cfg", type=float, default=1.0, help="guidance scale of the grid; 1 = off")
    args = run.parse_args(parser, PRESETS)
    args.ae = args.ae or run.newest(f"out/ae/{args.preset}-*/ckpt.pt",
                                        "--ae: train one with train_ae.py, or give a file")
    if args.norm_std is None:
        args.norm_std = 0.6 if args.repa == "irepa" else 1.0
    repa = "" if args.repa == "none" else f"-{args.repa}"
    args.out = args.out or f"out/diffusion/{run.run_name(args.ae)}{repa}"
    return args


def check(args, world):
    """ValueError on the first flag that cannot work, before anything is loaded or written."""
    need, parts = run.need, args.grad_accum
    need(parts > 0, f"--grad_accum {parts}: must be at least 1")
    times = f" times --grad_accum {parts}" if parts > 1 else ""
    need(args.batch_size > 0 and args.batch_size % (world * parts) == 0,
         f"--batch_size {args.batch_size}: must be above 0 and divide by {world} processes{times}")
    need(args.encode_batch > 0 and args.encode_batch % world == 0,
         f"--encode_batch {args.encode_batch}: must be above 0 and divide by {world} processes")
    run.need_range(args, 0, 1, "label_dropout", "beta2", "ema", "norm_std")
    run.need_range(args, 0, float("inf"), "weight_decay", "warmup_steps", "steps", "cfg",
                       "repa_weight", "clip_grad")
    run.need_range(args, 0, 2 ** 63, "seed")
    run.need_range(args, 0, 1024, "workers")
    run.need_range(args, 2, 1000, "sample_steps")
    run.need_range(args, 1, 999, "repa_depth")
    run.need_positive(args, "lr", "log_every", "eval_every", "dog_sigma2")
    run.need_range(args, 0, 1000, "dog_sigma2")
    run.need_run_flags(args)
    need(args.beta2 < 1, f"--beta2 {args.beta2}: must be below 1")
    need(0 <= args.dog_sigma1 < args.dog_sigma2, f"--dog_sigma1 {args.dog_sigma1}: must be at "
         f"least 0 and below --dog_sigma2 {args.dog_sigma2}")
    need(-1 <= args.num_classes <= 1_000_000, f"--num_classes {args.num_classes}: must be -1, 0 "
         "or the number of classes, at most a million")
    need(args.cfg == 1 or args.num_classes != 0, f"--cfg {args.cfg}: --num_classes 0 leaves no "
         "null class to guide away from; leave --cfg at 1")
    need(args.image_size is None or args.image_size > 0,
         f"--image_size {args.image_size}: must be above 0")


# --------------------------------------------------------------------------------------------------
# The latents and the networks of a run

def open_images(args, ae):
    """
    The training images: of --data at --image_size, or what the autoencoder was trained on.
    returns  the set of data.py, {what of it a checkpoint records}
    """
    trained = run.checkpoint_args(args.ae)             # the autoencoder's flags, if it is ours
    size, f = args.image_size or trained.get("image_size", 256), ae.config.reduction
    data, seed = args.data or trained.get("data"), trained.get("seed", 0)
    run.need(size > 0 and size % f == 0, f"--image_size {size}: must be a multiple of {f}, the "
                 f"reduction of {args.ae}")
    train_set, _ = open_data(data, size, seed=seed)
    return train_set, dict(data=data, image_size=size, data_seed=seed)


def open_latents(args, ae, train_set, compute):
    """The latent cache of this autoencoder and these images, encoded now if it is not there yet."""
    pictures = run.broadcast_from_rank0(lambda: images_hash(train_set))
    identity = dict(autoencoder=autoencoder_hash(ae), images=pictures, size=train_set.size)
    folder = Path(args.cache or "out/latents/" + "-".join(map(str, identity.values())))
    there = run.broadcast_from_rank0(folder.exists)          # it is rank 0 that creates it
    if not there:
        run.need_one_node(f"--cache {folder}")
        quiet = compute.rank > 0 or not sys.stderr.isatty()
        with tqdm(total=len(train_set), unit="img", desc="encoding", disable=quiet) as progress:
            build_cache(folder, identity, ae, train_set, args.encode_batch, compute.rank,
                        compute.world, args.workers, compute.device,
                        progress=lambda n: progress.update(n * compute.world))
    cache = LatentCache(folder, identity)
    ae.set_latent_stats(cache.mean, cache.std)
    rows = cache.rows[:: max(1, len(cache) // 1024)]
    posterior = cache.posterior(rows, np.zeros(len(rows), bool), compute.device)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    std = ae.normalize(posterior.sample(noise.to(compute.device))).std().item()
    if not 0.8 < std < 1.25:
        raise ValueError(f"--cache {folder}: normalised latents have std {std:.3f}, not 1; the "
                         "cache is damaged, remove it")
    verb, before = "read" if there else "wrote", cache.std.square().mean().sqrt()
    compute.say(f"{verb} {folder}: {len(cache):,} latents and mirrors of "
                f"{list(cache.moments.shape[2:])} moments; std {before:.3f}, normalised per "
                f"channel to std {std:.3f}")
    return cache


def build(args, ae, train_set, compute):
    """
    On the device: model and the process it learns, averaged (the EMA's weights, for sampling),
    optimizer, ema; with --repa the target's encoder and the projector, else None.
    """
    side, classes = train_set.size // ae.config.reduction, args.num_classes
    classes = len(train_set.classes) if classes == -1 else classes
    run.need(args.cfg == 1 or classes, f"--cfg {args.cfg}: an unconditional model has no null "
                 "class to guide away from; leave --cfg at 1")
    model_args = dict(input_size=side, in_channels=ae.config.latent_channels, num_classes=classes)
    torch.manual_seed(args.seed)                           # the initial weights; nothing else
    uvit = args.model.startswith("UViT")
    nets = SimpleNamespace(model=MODELS[args.model](**model_args).to(compute.device),
                           process=DDPM(args.schedule) if uvit else Interpolant(),
                           model_args=model_args, encoder=None, projector=None)
    trained = list(nets.model.parameters())
    if args.repa != "none":
        add_alignment(args, nets, train_set.size, compute)
        trained += nets.projector.parameters()
    nets.optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay,
                                       betas=(0.99 if uvit else 0.9, args.beta2), fused=True)
    nets.ema = run.EMA(nets.model, args.ema, args.ema_warmup == "on")
    nets.averaged = MODELS[args.model](**model_args).to(compute.device).eval()
    nets.averaged.requires_grad_(False)
    return nets


def add_alignment(args, nets, size, compute):
    """The target's encoder and the projector (repa.py) into nets; size: pixels of an image."""
    model, grid = nets.model, nets.model.grid
    run.need(args.repa_depth <= model.depth,
                 f"--repa_depth {args.repa_depth}: {args.model} has {model.depth} blocks")
    with run.local_rank_zero_first():
        nets.encoder = load_encoder(args.encoder, args.encoder_source).to(compute.device)
    kind = REPA_KINDS[args.repa][1]
    nets.projector = Projector(kind, model.pos_embed.shape[-1], nets.encoder.width)
    nets.projector.to(compute.device)
    # what does not fit says so now, not in hours
    nets.encoder(torch.zeros(1, 3, size, size, device=compute.device), grid)
    if grid != (16, 16):
        p = nets.encoder.patch
        compute.say(f"--repa: a grid of {grid[0]}x{grid[1]} tokens, so the encoder sees "
                    f"{p * grid[0]} x {p * grid[1]} pixels; the DoG's sigmas are in tokens, and "
                    "their defaults are meant for 16x16")


def saved_parts(nets):
    """{name in the checkpoint: network, optimiser or average} of what a run carries on."""
    parts = dict(model=nets.model, optimizer=nets.optimizer, ema=nets.ema)
    return parts | (dict(projector=nets.projector) if nets.projector else {})


def resume(args, nets, cache, checkpoint):
    """Put a checkpoint's state into the networks; returns (start step, state of the log)."""
    run.need_same_step(args.out, checkpoint["step"] if checkpoint else 0)
    if not checkpoint:
        return 0, {}
    run.need(checkpoint.get("autoencoder") == cache.meta["autoencoder"], f"--resume: --ae "
                 f"{args.ae} is not the autoencoder of {args.out}/ckpt.pt; restore it, or name "
                 "another --out")
    run.need_same_images(args.out, checkpoint, cache.meta["images"], args.data)
    run.restore(args.out, checkpoint, saved_parts(nets))
    return checkpoint["step"], checkpoint.get("means", {})


def place(args, nets, compute):
    """Compilation and DistributedDataParallel: the networks as a training step calls them."""
    if args.grad_checkpoint:
        run.recompute(nets.model, (SiTBlock, UViTBlock))
    compute.compile(nets.model)
    static = args.grad_accum == 1                          # else no_sync, which excludes it
    nets.model_step = run.ddp(nets.model, static)
    nets.projector_step = run.ddp(nets.projector, static)
    nets.parallel = nets.model_step, nets.projector_step


# --------------------------------------------------------------------------------------------------
# One step

def training_stream(args, nets, cache, train_set, start_step, compute):
    """
    Endless batches of this process: posterior over (b, C, h, w); labels (b,), None without
    classes; with --repa the images (b, 3, H, W) of the same pictures and mirrors, else None.
    """
    where = (args.batch_size, start_step, args.seed, compute.rank, compute.world)
    mirror = args.mirror == "on"
    aligned = None
    if nets.encoder:                                       # the same stream of positions
        aligned = train_batches(take(train_set, cache.rows), *where, args.workers, compute.device,
                                 mirror)
    for posterior, labels, indices, _ in cache.batches(*where, compute.device, mirror):
        images = None
        if aligned:
            images, _, positions = next(aligned)
            moved = cache.rows[positions] != indices       # another one came in its place
            if moved.any():
                raise ValueError(f"--data {train_set.spec}: {train_set.name(indices[moved][0])} is "
                                 "in the latent cache, but can no longer be read; restore it and "
                                 "--resume")
        yield posterior, labels if nets.model.num_classes else None, images


def loss_terms(args, nets, compute, latents, labels, images, generator, share):
    """
    The diffusion loss, and beside it the alignment of one block's tokens (Sec. 3.5).
    latents  (b, C, h, w) normalised; labels (b,) or None; images (b, 3, H, W) with --repa
    share    (part, parts) of the global batch that this is: see dit.draw
    returns  {name: (weight, value)}; the loss is the sum of the products
    """
    depth = args.repa_depth if nets.encoder else None
    with compute.autocast():
        result = nets.process.loss(nets.model_step, latents, labels, generator, args.label_dropout,
                                   depth, share)
    if not nets.encoder:
        return {"loss": (1.0, result)}
    loss, tokens = result                                  # scalar, (b, T, D) after block depth
    grid = nets.model.grid
    target = filter_target(nets.encoder(images, grid), REPA_KINDS[args.repa][0], grid,
                           args.dog_sigma1, args.dog_sigma2, args.norm_std)
    with compute.autocast():
        projected = nets.projector_step(tokens, grid)
    return {"loss": (1.0, loss), "align": (args.repa_weight, alignment_loss(projected, target))}


# --------------------------------------------------------------------------------------------------
# What is evaluated and saved

@torch.no_grad()
def sample_grid(args, nets, ae, compute, count=16):
    """The first samples of --seed, decoded: (count, 3, H, W) in [0, 1]; classes in turn."""
    model = nets.averaged
    model.load_state_dict(nets.ema.shadow)
    y = None
    if model.num_classes:
        y = torch.arange(count, device=compute.device) % model.num_classes
    shape = (count, model.in_channels, *model.input_size)
    with compute.autocast():
        z = nets.process.sample(model, shape, steps=args.sample_steps, y=y, cfg=args.cfg,
                                noise=NoiseStream(args.seed, range(count)))
    return ae.decode(ae.denormalize(z)) * 0.5 + 0.5


def save(args, nets, compute, cache, origin, log, step):
    """All of the run at this step into ckpt.pt; called on all processes."""
    state = dict(origin, stage="diffusion", step=step, args=vars(args), model_name=args.model,
                 model_args=nets.model_args, projector=None, means=log.state(), ae=str(args.ae),
                 autoencoder=cache.meta["autoencoder"], pictures=cache.meta["images"],
                 latent_mean=cache.mean, latent_std=cache.std)
    for name, part in saved_parts(nets).items():
        state[name] = part.shadow if part is nets.ema else part.state_dict()
    if compute.rank == 0:
        run.save_run(args.out, state, args.keep_every)


def announce(args, nets, compute, origin):
    """What is about to be trained, in two lines."""
    parameters = sum(p.numel() for p in nets.model.parameters())
    C, side = nets.model_args["in_channels"], nets.model_args["input_size"]
    compute.say(f"{args.model}: {parameters:,} parameters on latents of {C} x {side} x {side}, "
                f"{nets.model.num_classes or 'no'} classes; images: {origin['data'] or 'built-in'} "
                f"at {origin['image_size']} px")
    compute.say(f"global batch {args.batch_size} = {compute.world} x "
                f"{args.batch_size // compute.world} on {compute.device.type} in {args.dtype}; "
                f"learning rate {args.lr:g}, not rescaled; {args.steps:,} steps -> {args.out}")


def main():
    args = get_args()
    processes = run.init_distributed(args.device)
    check(args, processes[1])
    compute = run.Compute(*processes, args.dtype, args.compile)
    rank, world, device = processes
    args.dtype = compute.dtype
    ae = load_autoencoder(args.ae).to(device).requires_grad_(False)
    train_set, origin = open_images(args, ae)
    checkpoint = run.open_run(
        args.out, "diffusion", vars(args), args.resume, args.overwrite,
        (*run.FREE, "ae", "cache", "encode_batch", "sample_steps", "cfg"),
        older=dict(schedule="sd", mirror="on", ema_warmup="on"))
    run.need(not checkpoint or args.repa != "irepa" or "mirror" in checkpoint["args"],
                 f"--resume: {args.out}/ckpt.pt aligns as an older version did, where --norm_std "
                 "meant something else; begin another --out")
    nets = build(args, ae, train_set, compute)
    cache = open_latents(args, ae, train_set, compute)
    num_classes = nets.model.num_classes
    run.need(not num_classes or cache.labels.max() < num_classes, f"--num_classes "
                 f"{num_classes}: the data has labels up to {cache.labels.max()}")
    start_step, means = resume(args, nets, cache, checkpoint)
    if checkpoint:
        compute.say(f"resuming {args.out} at step {start_step}")
    del checkpoint                                         # gigabytes at paper scale
    place(args, nets, compute)
    announce(args, nets, compute, origin)
    compute.warn_of_compilation()
    run.need_steps_left(args, start_step)
    log = run.RunLog(f"{args.out}/log.jsonl", rank, start_step, means)
    stream = training_stream(args, nets, cache, train_set, start_step, compute)
    progress = tqdm(total=args.steps, initial=start_step, unit="img", unit_scale=args.batch_size,
                    disable=rank > 0 or not sys.stderr.isatty())

    with run.StopSignal() as stop:
        for step in range(start_step, args.steps + 1):
            last_step = step == args.steps
            stopping = stop.asked()
            evaluating = last_step or step % args.eval_every == 0
            if stopping or evaluating:
                save(args, nets, compute, cache, origin, log, step)
            if stopping:
                compute.say(stop.farewell(step, args))
                break
            if evaluating and rank == 0:
                picture_grid(sample_grid(args, nets, ae, compute), f"{args.out}/samples.png")
            if last_step:
                compute.say(f"wrote {args.out}/ckpt.pt, log.jsonl, samples.png")
                break

            # Everything random below is a function of (seed, step): see run.py
            seed = run.step_seed(args.seed, step)
            generator = torch.Generator(device).manual_seed(seed)
            posterior, labels, images = next(stream)
            noise = run.sharded_randn(posterior.mean.shape, generator, rank, world)
            latents = ae.normalize(posterior.sample(noise))    # (share, C, h, w), std 1
            state, n = generator.get_state(), args.grad_accum
            for part in range(n):                          # (b, ...) each: what fits the memory
                mine = [x if x is None else x.chunk(n)[part] for x in (latents, labels, images)]
                generator.set_state(state)                 # each part draws for the global batch
                share = rank * n + part, world * n
                with run.averaging(part == n - 1, *nets.parallel):
                    terms = loss_terms(args, nets, compute, *mine, generator, share)
                    (sum(w * value for w, value in terms.values()) / n).backward()
                log.add(step, {name: value for name, (_, value) in terms.items()})
            run.update(nets.optimizer, args, step, log, step)
            nets.ema.update(step)

            progress.update(1)
            if step % args.log_every == 0:
                averages = log.write(step)
                progress.set_postfix({name: f"{mean:.4f}" for name, mean in averages.items()})
                if rank == 0 and step % (10 * args.log_every) == 0:
                    loss = averages.get("loss", math.nan)
                    progress.write(f"step {step}: loss {loss:.4f}", file=sys.stdout)
    progress.close()
    run.barrier()


if __name__ == "__main__":
    with run.one_line_errors():
        main()
