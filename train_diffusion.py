"""
Stage 2: train a diffusion transformer on an autoencoder's latents.

    python train_diffusion.py --preset quick                                     a laptop, after train_ae.py --preset quick
    torchrun --nproc_per_node=8 train_diffusion.py --preset imagenet-f16d16 --ae out/ae/imagenet-f16d16-dsm/ckpt.pt --data DIR

With --repa the tokens after one block are also aligned with filtered DINOv2 features of the same image, same crop, same mirror
(repa.py). Every image is encoded once, as it is and mirrored, into a cache on disk (latents.py); the loop reads moments from there, samples the
posterior and normalises by the latents' mean and std. SiT learns the interpolant's velocity, U-ViT the DDPM's noise (dit.py).
The argparse defaults train U-ViT on CelebA 256. A run lives in --out: ckpt.pt, log.jsonl, samples.png.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import runtime
from data import open_data, take, train_batches
from dit import DDPM, MODELS, Interpolant, NoiseStream, SiTBlock, UViTBlock
from figures import picture_grid
from latents import LatentCache, autoencoder_hash, build_cache, images_hash
from repa import DOG_SIGMAS, REPA_KINDS, Projector, alignment_loss, filter_target, load_encoder
from weights import load_autoencoder

SIT = dict(lr=1e-4, beta2=0.999, weight_decay=0.0, warmup_steps=0)                         # Table 6; the defaults are U-ViT's
PRESETS = {
    "celeba-f16d16": {},                                                                   # the argparse defaults
    "celeba-f8d4": dict(model="UViT-S/2"),
    "imagenet-f16d16": dict(model="SiT-B/1", steps=400_000, cfg=1.8, **SIT),
    "imagenet-repa": dict(model="SiT-B/2", steps=400_000, cfg=1.8, repa="dog", **SIT),         # Table 6
    "quick": dict(model="SiT-tiny/2", steps=1500, batch_size=32, log_every=10, eval_every=500, sample_steps=50, ema=0.99, workers=0, repa_depth=1,
                  **SIT | dict(lr=1e-3, warmup_steps=50)),
}


def get_args():
    """The flags; presets fill in what is not given. Without --ae, the newest autoencoder of the preset is taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # what is run
    parser.add_argument("--preset", choices=PRESETS, default="celeba-f16d16", help="a named group of defaults; explicit flags win")
    parser.add_argument("--out", default=None, help="folder of the run (default: out/diffusion/<name of the autoencoder's run>[-<repa>])")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and every draw, >= 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda when there is a GPU")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default=None, help="of the transformer (default: bf16 on cuda, fp32 on cpu)")
    parser.add_argument("--compile", choices=("on", "off"), default=None, help="torch.compile the transformer (default: on on cuda, off on cpu)")
    parser.add_argument("--grad_checkpoint", action="store_true", help="compute every block twice to keep less in memory")
    # data and latents
    parser.add_argument("--ae", default=None, help="ckpt.pt of train_ae.py, or released weights that vae.py reads (default: the newest "
                        "out/ae/<preset>-*/ckpt.pt)")
    parser.add_argument("--data", default=None, help="folder, .zip, or cifar10 (default: what the autoencoder was trained on)")
    parser.add_argument("--image_size", type=int, default=None, help="pixels a side (default: what the autoencoder was trained on, or 256)")
    parser.add_argument("--cache", default=None, help="folder of the latent cache (default: out/latents/<autoencoder>-<images>-<size>)")
    parser.add_argument("--encode_batch", type=int, default=64, help="images per encoder call over all processes")
    parser.add_argument("--workers", type=int, default=8, help="loader processes per training process, for encoding and for --repa")
    # model
    parser.add_argument("--model", choices=MODELS, default="UViT-S/1", help="SiT-* learns velocities, UViT-* the noise of DDPM")
    parser.add_argument("--num_classes", type=int, default=-1, help="-1: as many as the data has class folders; 0: unconditional")
    parser.add_argument("--label_dropout", type=float, default=0.1, help="share of labels replaced by the null label, for guidance")
    # representation alignment
    parser.add_argument("--repa", choices=("none", *REPA_KINDS), default="none", help="REPA, iREPA, or the paper's DoG band-pass target")
    parser.add_argument("--encoder", default="dinov2_vitb14", help="whose features are the target")
    parser.add_argument("--encoder_source", default=None, help="a local clone of facebookresearch/dinov2, or random (for tests)")
    parser.add_argument("--repa_weight", type=float, default=0.5, help="of the alignment loss, beside the diffusion loss")
    parser.add_argument("--repa_depth", type=int, default=4, help="the block, from 1, whose output is aligned")
    parser.add_argument("--dog_sigma1", type=float, default=DOG_SIGMAS[0], help="dog: the narrow Gaussian, in tokens")
    parser.add_argument("--dog_sigma2", type=float, default=DOG_SIGMAS[1], help="dog: the wide Gaussian, in tokens")
    parser.add_argument("--norm_std", type=float, default=1.0, help="dog: the target's standard deviation over space")
    # optimisation
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--batch_size", type=int, default=256, help="latents per step over all processes")
    parser.add_argument("--grad_accum", type=int, default=1, help="parts in which a process works through its share of the batch, to save memory")
    parser.add_argument("--lr", type=float, default=2e-4, help="constant after the warm-up, never rescaled")
    parser.add_argument("--beta2", type=float, default=0.99, help="AdamW's second beta; the first is 0.99 for UViT, 0.9 for SiT")
    parser.add_argument("--weight_decay", type=float, default=0.03)
    parser.add_argument("--warmup_steps", type=int, default=5000)
    parser.add_argument("--clip_grad", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--ema", type=float, default=0.9999, help="decay of the weights' moving average, which is what is sampled")
    # reporting
    parser.add_argument("--log_every", type=int, default=100, help="steps between lines of log.jsonl")
    parser.add_argument("--eval_every", type=int, default=10_000, help="steps between sample grids, each with a checkpoint")
    parser.add_argument("--keep_every", type=int, default=-1, help="also keep ckpt_<step>.pt at these steps; -1 = off")
    parser.add_argument("--sample_steps", type=int, default=100, help="network calls per sample of the grid")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale of the grid; 1 = off")
    args = runtime.parse_args(parser, PRESETS)
    args.ae = args.ae or runtime.newest(f"out/ae/{args.preset}-*/ckpt.pt", "--ae: train one with train_ae.py, or give a file")
    args.out = args.out or f"out/diffusion/{runtime.run_name(args.ae)}" + (f"-{args.repa}" if args.repa != "none" else "")
    return args


def check(args, world):
    """ValueError on the first flag that cannot work, before anything is loaded or written."""
    def need(condition, message):
        if not condition:
            raise ValueError(message)

    for name, parts in (("batch_size", args.grad_accum), ("encode_batch", 1)):
        value = getattr(args, name)
        need(parts > 0, f"--grad_accum {parts}: must be at least 1")
        need(value > 0 and value % (world * parts) == 0, f"--{name} {value}: must be above 0 and divide by {world} processes"
             + f" times --grad_accum {parts}" * (parts > 1))
    for name, low, high in (("label_dropout", 0, 1), ("beta2", 0, 1), ("ema", 0, 1), ("weight_decay", 0, math.inf), ("seed", 0, 2 ** 63),
                            ("workers", 0, 1024), ("warmup_steps", 0, math.inf), ("steps", 0, math.inf), ("cfg", 0, math.inf),
                            ("sample_steps", 2, 1000), ("repa_weight", 0, math.inf), ("repa_depth", 1, 999)):
        value = getattr(args, name)
        need(low <= value <= high and value < math.inf, f"--{name} {value}: must be finite and lie in {low}..{high}")
    need(args.beta2 < 1, f"--beta2 {args.beta2}: must be below 1")
    for name in ("lr", "clip_grad", "log_every", "eval_every", "norm_std", "dog_sigma2"):
        value = getattr(args, name)
        need(0 < value < math.inf, f"--{name} {value}: must be above 0 and finite")
    need(args.keep_every < 1 or args.keep_every % args.eval_every == 0,
         f"--keep_every {args.keep_every}: must be a multiple of --eval_every {args.eval_every}, when checkpoints are made")
    need(0 <= args.dog_sigma1 < args.dog_sigma2, f"--dog_sigma1 {args.dog_sigma1}: must be at least 0 and below --dog_sigma2 {args.dog_sigma2}")
    need(-1 <= args.num_classes <= 1_000_000, f"--num_classes {args.num_classes}: must be -1, 0 or the number of classes, at most a million")
    need(args.cfg == 1 or args.num_classes != 0, f"--cfg {args.cfg}: --num_classes 0 leaves no null class to guide away from; leave --cfg at 1")
    need(args.image_size is None or args.image_size > 0, f"--image_size {args.image_size}: must be above 0")
    need(not (args.resume and args.overwrite), "--resume --overwrite: one continues the run in --out, the other replaces it; choose one of them")


def open_latents(args, ae, train_set, rank, world, device):
    """The latent cache of this autoencoder and these images, encoded now if it is not there yet; sets the autoencoder's statistics."""
    identity = dict(autoencoder=autoencoder_hash(ae), images=images_hash(train_set), size=train_set.size)
    folder = Path(args.cache or "out/latents/" + "-".join(map(str, identity.values())))
    there = torch.tensor(float(folder.exists()))                                           # rank 0's answer counts: it will create it
    if dist.is_initialized():
        there = there.to(device)
        dist.broadcast(there, src=0)
    if not there:
        with tqdm(total=len(train_set), unit="img", desc="encoding", disable=rank > 0 or not sys.stderr.isatty()) as progress:
            build_cache(folder, identity, ae, train_set, args.encode_batch, rank, world, args.workers, device,
                        progress=lambda n: progress.update(n * world))
    cache = LatentCache(folder, identity)
    ae.set_latent_stats(cache.mean, cache.std)
    rows = cache.rows[:: max(1, len(cache) // 1024)]
    std = ae.normalize(cache.posterior(rows, rows < 0, device).sample()).std().item()
    if not 0.8 < std < 1.25:
        raise ValueError(f"--cache {folder}: normalised latents have std {std:.3f}, not 1; the cache is damaged, remove it")
    if rank == 0:
        print(f"{'read' if there else 'wrote'} {folder}: {len(cache):,} latents and mirrors of {list(cache.moments.shape[2:])} moments; "
              f"std {cache.std.square().mean().sqrt():.3f}, normalised per channel to std {std:.3f}")
    return cache


@torch.no_grad()
def sample_grid(model, process, ae, args, device, shape, autocast, count=16):
    """The first samples of --seed, decoded: (count, 3, H, W) in [0, 1]; conditional models show the classes in turn."""
    y = torch.arange(count, device=device) % model.num_classes if model.num_classes else None
    with autocast():
        z = process.sample(model, (count, *shape), steps=args.sample_steps, y=y, cfg=args.cfg, noise=NoiseStream(args.seed, range(count)))
    return ae.decode(ae.denormalize(z)) * 0.5 + 0.5


def main():
    args = get_args()
    rank, world, device = runtime.start_processes(args.device)
    check(args, world)
    say = print if rank == 0 else lambda *args, **kwargs: None
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    ae = load_autoencoder(args.ae).to(device).requires_grad_(False)
    trained = runtime.checkpoint_args(args.ae)                                             # the autoencoder's own flags, if it is ours
    image_size, data = args.image_size or trained.get("image_size", 256), args.data or trained.get("data")
    if image_size <= 0 or image_size % ae.config.reduction:
        raise ValueError(f"--image_size {image_size}: must be a multiple of {ae.config.reduction}, the reduction of {args.ae}")
    checkpoint = runtime.open_run(args.out, "diffusion", vars(args), args.resume, args.overwrite, free=(
        "out", "resume", "overwrite", "preset", "device", "dtype", "compile", "grad_checkpoint", "grad_accum", "workers", "steps", "log_every",
        "eval_every", "keep_every", "encoder_source", "cache", "encode_batch", "sample_steps", "cfg"))
    train_set, _ = open_data(data, image_size, seed=trained.get("seed", 0))
    num_classes = len(train_set.classes) if args.num_classes == -1 else args.num_classes
    if args.cfg != 1 and not num_classes:
        raise ValueError(f"--cfg {args.cfg}: an unconditional model has no null class to guide away from; leave --cfg at 1")

    side = image_size // ae.config.reduction
    shape = (ae.config.latent_channels, side, side)
    model_args = dict(input_size=side, in_channels=shape[0], num_classes=num_classes)
    torch.manual_seed(args.seed)                                                           # the initial weights; nothing else uses it
    model = MODELS[args.model](**model_args).to(device)
    aligned, trained_parameters = args.repa != "none", list(model.parameters())
    if aligned:
        target_kind, projector_kind = REPA_KINDS[args.repa]
        if args.repa_depth > model.depth:
            raise ValueError(f"--repa_depth {args.repa_depth}: {args.model} has {model.depth} blocks")
        with runtime.rank_zero_first():
            encoder = load_encoder(args.encoder, args.encoder_source).to(device)
        projector = Projector(projector_kind, model.pos_embed.shape[-1], encoder.width).to(device)
        encoder(torch.zeros(1, 3, image_size, image_size, device=device), model.grid)      # what does not fit says so now, not in hours
        trained_parameters += projector.parameters()
        if model.grid != (16, 16):
            say(f"--repa: a grid of {model.grid[0]}x{model.grid[1]} tokens, so the encoder sees {14 * model.grid[0]} x {14 * model.grid[1]} pixels; "
                "the DoG's sigmas are in tokens, and their defaults are meant for 16x16")
    torch.backends.cudnn.allow_tf32 = args.dtype == "bf16"                                 # the cache keeps float16: no more bits than TF32
    cache = open_latents(args, ae, train_set, rank, world, device)
    if num_classes and cache.labels.max() >= num_classes:
        raise ValueError(f"--num_classes {num_classes}: the data has labels up to {cache.labels.max()}")
    uvit = args.model.startswith("UViT")
    process = DDPM() if uvit else Interpolant()
    optimizer = torch.optim.AdamW(trained_parameters, lr=args.lr, betas=(0.99 if uvit else 0.9, args.beta2), weight_decay=args.weight_decay,
                                  fused=True)
    ema, start_step, means = runtime.EMA(model, args.ema), 0, {}
    if checkpoint:
        start_step, means = checkpoint["step"], checkpoint.get("means", {})
        for name in ("autoencoder", "images"):
            if checkpoint.get(name) != cache.meta[name]:
                raise ValueError(f"--resume: the {name} changed since {args.out}/ckpt.pt was written; restore it, or name another --out")
        runtime.restore(args.out, checkpoint, dict(model=model, optimizer=optimizer, ema=ema) | (dict(projector=projector) if aligned else {}))
        say(f"resuming {args.out} at step {start_step}")
    for network in (model, projector) if aligned else (model,):
        runtime.broadcast_parameters(network)
    del checkpoint                                                                         # gigabytes at paper scale
    averaged = MODELS[args.model](**model_args).to(device).eval().requires_grad_(False)    # carries the EMA weights for sampling
    if args.grad_checkpoint:
        runtime.recompute(model, (SiTBlock, UViTBlock))
    if (args.compile or ("on" if device.type == "cuda" else "off")) == "on":
        model.compile()

    say(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters on latents of {shape[0]} x {side} x {side}, "
        f"{num_classes or 'no'} classes; images: {data or 'built-in'} at {image_size} px")
    say(f"global batch {args.batch_size} = {world} x {args.batch_size // world} on {device.type} in {args.dtype}; learning rate {args.lr:g}, "
        f"not rescaled; {args.steps:,} steps -> {args.out}")
    log = runtime.RunLog(f"{args.out}/log.jsonl", rank, start_step, means)
    batches = cache.batches(args.batch_size, start_step, args.seed, rank, world, device)
    if aligned:                                                                            # the same stream, so the same images and mirrors
        image_batches = train_batches(take(train_set, cache.rows), args.batch_size, start_step, args.seed, rank, world, args.workers, device)
    progress = tqdm(total=args.steps, initial=start_step, unit="img", unit_scale=args.batch_size, disable=rank > 0 or not sys.stderr.isatty())

    def save(step):
        """All of the run at this step into ckpt.pt; called on all processes."""
        state = dict(stage="diffusion", step=step, args=vars(args), model_name=args.model, model_args=model_args, model=model.state_dict(),
                     projector=projector.state_dict() if aligned else None, ema=ema.shadow, optimizer=optimizer.state_dict(),
                     means=log.state(), ae=str(args.ae), data=data, image_size=image_size, data_seed=trained.get("seed", 0),
                     autoencoder=cache.meta["autoencoder"], images=cache.meta["images"], latent_mean=cache.mean, latent_std=cache.std)
        if rank == 0:
            runtime.save_run(args.out, state, args.keep_every)

    with runtime.StopSignal() as stop:
        for step in range(start_step, args.steps + 1):
            last_step = step == args.steps
            stopping = stop.asked()
            if stopping or last_step or step % args.eval_every == 0:
                save(step)
            if stopping:
                say(stop.farewell(step, args))
                break
            if rank == 0 and (last_step or step % args.eval_every == 0):
                averaged.load_state_dict(ema.shadow)
                picture_grid(sample_grid(averaged, process, ae, args, device, shape, autocast), f"{args.out}/samples.png")
            if last_step:
                say(f"wrote {args.out}/ckpt.pt, log.jsonl, samples.png")
                break

            # Everything random below is a function of (seed, step): see runtime.py
            generator = torch.Generator(device).manual_seed(runtime.step_seed(args.seed, step))
            posterior, labels, indices, _ = next(batches)
            noise = runtime.sharded_randn(posterior.mean.shape, generator, rank, world)
            latents, state = ae.normalize(posterior.sample(noise)), generator.get_state()      # (share, C, h, w), std 1
            if aligned:
                images, _, positions = next(image_batches)
                if (cache.rows[positions] != indices).any():                               # another one came in its place
                    lost = train_set.name(indices[cache.rows[positions] != indices][0])
                    raise ValueError(f"--data {data}: {lost} is in the latent cache, but can no longer be read; restore it and --resume")
            for part in range(args.grad_accum):                                            # (b, ...) each: what fits the memory
                mine = slice(part * len(latents) // args.grad_accum, (part + 1) * len(latents) // args.grad_accum)
                generator.set_state(state)                                                 # each part draws for the global batch, takes its own
                with autocast():
                    loss = process.loss(model, latents[mine], labels[mine] if num_classes else None, generator, args.label_dropout,
                                        args.repa_depth if aligned else None, (rank * args.grad_accum + part, world * args.grad_accum))
                losses = dict(loss=loss)
                if aligned:
                    losses["loss"], tokens = loss                                          # scalar, (b, T, D) after block repa_depth
                    target = filter_target(encoder(images[mine], model.grid), target_kind, model.grid, args.dog_sigma1, args.dog_sigma2, args.norm_std)
                    with autocast():
                        projected = projector(tokens, model.grid)
                    losses["align"] = alignment_loss(projected, target)
                total = losses["loss"] + args.repa_weight * losses["align"] if aligned else losses["loss"]
                (total / args.grad_accum).backward()
                log.add(step, losses)
            runtime.average_gradients(trained_parameters)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained_parameters, args.clip_grad)
            log.add(step, dict(grad_norm=grad_norm))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
            runtime.step_if(log.finite(step), optimizer)
            ema.update(step)

            progress.update(1)
            if step % args.log_every == 0:
                means = log.write(step)
                progress.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
                if rank == 0 and step % (10 * args.log_every) == 0:
                    progress.write(f"step {step}: loss {means.get('loss', math.nan):.4f}", file=sys.stdout)
    progress.close()
    runtime.barrier()


if __name__ == "__main__":
    with runtime.one_line_errors():
        main()
