"""
Speed and memory of the training steps, samplers and loaders; what the presets cost on paper.
Compare the rows of one run with one another: nothing is asserted about any machine.

    python tests/benchmark.py --quick            tiny models, under two minutes on two cores
    python tests/benchmark.py                    256 px: minutes on a GPU, an hour on two cores
    python tests/benchmark.py --section ae --model f8d4 --reg esm --batch_size 12 --grad_checkpoint

    ae, diffusion  steps of train_ae.py and train_diffusion.py, which run in this process, from one
                   optimizer update to the next; flags not listed below go to these scripts
    peers          ESM and DSM beside other ways to compute the same numbers
    costs          GUIDE.md's table, from FLOPs and an assumed FLOP/s

Medians. FLOPs: of matmuls and convolutions, 2 per multiply-add (se and eq: of one drawn size). MFU:
their rate over a large matmul's, timed right after. Peak memory: the CUDA allocator's, or the
resident set of the process. The last line is JSON.
"""
import argparse
import contextlib
import functools
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import lpips
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_ae
import train_diffusion
from common import run
from common.data import open_data, pack, train_batches
from common.latents import LatentCache, build_cache
from dit import DDPM, MODELS, Interpolant
from losses import dsm_pair, esm_loss
from repa import REPA_KINDS
from spectral import block_dct2, block_idct2, triangle_mask
from vae import CONFIGS, AEConfig, AutoencoderKL, Posterior

# GFLOP per image of 256 px, forward
GFLOP = {"f16d16": 387, "f8d4": 895, "UViT-S": 24.4, "SiT-B": 46.0, "LPIPS": 80, "PatchGAN": 6.3}


def now(device):
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_per_call(args, function):
    """The median of args.repeats calls, after one to burn in."""
    function()
    seconds = []
    for _ in range(args.repeats):
        start = now(args.device)
        function()
        seconds.append(now(args.device) - start)
    return statistics.median(seconds)


def matmul_rate(args):
    """FLOP/s of a large matmul in the networks' precision."""
    n = 8192 if args.device.type == "cuda" else 1024
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=args.device, dtype=dtype)
    return 2 * n ** 3 / seconds_per_call(args, lambda: a @ b)


def report(args, name, **values):
    """Print one row and keep it for the JSON."""
    args.rows.append(dict(name=name, **values))
    cells = "".join(f"{value:12,.4g} {key}" for key, value in values.items())
    print(f"{name:46}{cells}", flush=True)


def time_script(args, names, script, batch, **flags):
    """script.main() until args.repeats steps of each network are timed; names of their rows."""
    update, marks, untimed, cuda = run.optimizer_step, [], 5, args.device.type == "cuda"
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()         # its hooks refuse train_ae.py's graphs
    counter.mod_tracker.parents = {"Global"}

    def timed_update(optimizer, *values, **options):
        result = update(optimizer, *values, **options)
        marks.append((id(optimizer), now(args.device), counter.get_total_flops()))
        if len(marks) == 1:                                # two steps are counted, uncompiled
            counter.__enter__()
        if len(marks) == 3:                                # two burn in
            counter.__exit__(None, None, None)
            torch.compiler.set_stance("default")
        if len(marks) == untimed and cuda:
            torch.cuda.reset_peak_memory_stats()
        elif len(marks) == untimed and sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        if len(marks) == untimed + args.repeats * len(names):
            raise StopIteration                            # through script.main(), to below
        return result

    flags = dict(device=args.device.type, dtype=args.dtype, batch_size=batch, steps=10 ** 9,
                 eval_every=10 ** 9, keep_every=-1, encoder_source="random",
                 workers=0 if args.quick else 8) | flags
    random_lpips = functools.partial(lpips.LPIPS, pretrained=False, pnet_rand=True)
    with (tempfile.TemporaryDirectory() as out, contextlib.suppress(StopIteration),
          contextlib.redirect_stdout(io.StringIO()), mock.patch("lpips.LPIPS", random_lpips),
          mock.patch.object(run, "optimizer_step", timed_update),
          mock.patch.object(run, "save_checkpoint")):
        torch.compiler.reset()                             # else the ninth network stays eager
        torch.compiler.set_stance("force_eager")
        sys.argv = [script.__name__, *(f"--{name}={value}" for name, value in flags.items()),
                    f"--out={out}", *args.script_flags]
        script.main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 1e6
    steps = [(b[0], b[1] - a[1], b[2] - a[2]) for a, b in zip(marks, marks[1:])]
    for name, network in zip(names, dict.fromkeys(key for key, _, _ in steps[1:])):
        seconds = statistics.median(s for key, s, _ in steps[untimed - 1:] if key == network)
        flops = max(flops for key, _, flops in steps if key == network)
        report(args, name, ms=1e3 * seconds, images_per_s=batch / seconds, peak_mb=peak,
               gflop_per_image=flops / batch / 1e9, mfu=flops / seconds / matmul_rate(args))


def image_folder(args, size):
    """64 built-in images as JPEGs."""
    folder = args.folder / f"{size}px"
    if not folder.exists():
        folder.mkdir()
        images = open_data(None, size)[0]
        for i in range(64):
            pixels = images[i][0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def ae(args):
    """train_ae.py: every --reg by itself, then LPIPS and the GAN."""
    size = 32 if args.quick else 256
    batch = args.batch_size or (1 if args.device.type == "cpu" else 16)
    for model in filter(CONFIGS.get, args.model):
        flags = dict(model=model, image_size=size, val_images=1, data=image_folder(args, size))
        for reg in args.reg:
            time_script(args, [f"{model} --reg {reg}"], train_ae, batch, reg=reg, lpips_weight=0,
                        gan_weight=0, **flags)
        name = f"{model} --reg none, LPIPS, GAN"
        time_script(args, [name, f"{name}: discriminator"], train_ae, batch, reg="none",
                    gan_start=0, **flags)


def diffusion(args):
    """train_diffusion.py: every --repa. Latents of 16 x 16 patches come from a tiny autoencoder."""
    batch = args.batch_size or (4 if args.device.type == "cpu" else 256)
    path, config = args.folder / "ae.pt", AEConfig((1, 2), 4, ch=16, norm_groups=4)
    torch.save(dict(stage="ae", step=0, args={}, ae_config=vars(config),
                    model=AutoencoderKL(config).state_dict()), path)
    for model in filter(MODELS.get, args.model):
        size = 2 * 16 * int(model[-1])                     # f2, patches of 1, 2 or 4
        for repa in args.repa:
            time_script(args, [f"{model} --repa {repa}"], train_diffusion, batch, model=model,
                        ae=path, cache=args.folder / f"cache-{size}", image_size=size,
                        data=image_folder(args, size), repa=repa, repa_depth=1, num_classes=1000,
                        sample_steps=2)


def samplers(args):
    """Each sampler without and with guidance, which doubles the batch."""
    batch, calls = args.batch_size or (2 if args.device.type == "cpu" else 128), 4
    for name in filter(MODELS.get, args.model):
        side = 16 * int(name[-1])
        model = MODELS[name](input_size=side, in_channels=4, num_classes=1000)
        model.to(args.device).eval()
        ways = dict(DDIM=DDPM("vp").sample)
        if name.startswith("SiT"):
            ways = {way: functools.partial(Interpolant().sample, sampler=way)
                    for way in ("em", "ode")}
        for way, sample in ways.items():
            for cfg in (1.0, 1.8):
                call = functools.partial(sample, model, (batch, 4, side, side), calls,
                                         torch.arange(batch), cfg)
                with torch.autocast(args.device.type, torch.bfloat16, args.dtype == "bf16"):
                    seconds = seconds_per_call(args, call)
                report(args, f"{name} {way}, cfg {cfg}, batch {batch}",
                       ms_per_network_call=1e3 * seconds / calls)


def loader(args):
    """Batches of 256 px in one process."""
    batch = args.batch_size or (8 if args.quick else 64)
    folder, packed = image_folder(args, 512), args.folder / "packed.zip"
    pack(str(folder), 256, packed)
    streams = {}
    for name, path in (("folder of JPEGs, 512 px", folder), ("packed zip", packed)):
        images, _ = open_data(str(path), 256)
        streams[name] = train_batches(images, batch, device=args.device)
    encode = lambda x: Posterior(*x[:, :1, ::16, ::16].repeat(1, 32, 1, 1).chunk(2, dim=1))
    encoder = mock.Mock(config=CONFIGS["f16d16"], encode=encode)
    build_cache(args.folder / "cache", {}, encoder, images, batch)
    cache = LatentCache(args.folder / "cache", {})
    streams["latent cache, f16d16"] = cache.batches(batch, device=args.device)
    for name, stream in streams.items():
        seconds = seconds_per_call(args, functools.partial(next, stream))
        report(args, f"{name}, batch {batch}", images_per_s=batch / seconds)


def dct_by_fft(x):
    """DCT of the last axis: the spectrum of the signal and its mirror image."""
    n, k = x.shape[-1], torch.arange(x.shape[-1], device=x.device)
    phase = torch.polar(torch.ones_like(k, dtype=x.dtype), -torch.pi / (2 * n) * k)
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(-1)], -1))[..., :n]
    return (spectrum * phase).real / torch.where(k == 0, 4 * n, 2 * n).sqrt()


def esm_by_fft(images, latents, n_bins=16):
    """esm_loss for f8: resize, FFT, a mask per ring."""
    def distribution(x, gamma):
        P = dct_by_fft(dct_by_fft(x).mT).mT.square().mean(1)              # (B, h, w)
        u = torch.arange(P.shape[-1], device=x.device)                    # h = w here
        r = (u[:, None] ** 2 + u ** 2).sqrt()
        ring, P = (r / r.max() * n_bins).long().clamp_max(n_bins - 1), P * (r > 0)
        S = [P[:, ring == b].mean(1) * (b + 1) ** gamma for b in range(n_bins)]
        S = torch.stack(S, 1).log1p() + 1e-6
        return S / S.sum(1, keepdim=True)
    p = distribution(F.interpolate(images, latents.shape[-2:], mode="bicubic"), 1.0)
    q = distribution(latents, 0.0)
    return (p * (p.log() - q.log())).sum(1).mean()


def peers(args):
    """ESM with its gradient and DSM's low-pass of the images, in ways that agree."""
    x = torch.rand(8, 3, 256, 256, device=args.device) * 2 - 1
    z = torch.randn(8, 4, 32, 32, device=args.device, requires_grad=True)
    torch.testing.assert_close(esm_by_fft(x, z), esm_loss(x, z), atol=1e-5, rtol=1e-3)
    for name, loss in (("esm_loss", esm_loss), ("resize, FFT, a mask per ring", esm_by_fft)):
        gradient = lambda loss=loss: torch.autograd.grad(loss(x, z), z)
        report(args, f"ESM: {name}", ms=1e3 * seconds_per_call(args, gradient))
    mask = triangle_mask(10).to(args.device)
    for name, lowpass in (("dsm_pair", lambda: dsm_pair(x, x, 10)[0]),
                          ("8x8 matmuls", lambda: block_idct2(block_dct2(x) * mask))):
        torch.testing.assert_close(lowpass(), dsm_pair(x, x, 10)[0], atol=1e-5, rtol=0)
        report(args, f"DSM: {name}", ms=1e3 * seconds_per_call(args, lowpass))


def training_gflop(flags):
    """Per image. A backward pass costs two forward passes, through frozen weights one."""
    forward, disc = GFLOP[flags.model.split("/")[0]], GFLOP["PatchGAN"]
    if hasattr(flags, "repa"):                             # DINOv2 ViT-B/14 and the projector
        return 3 * forward + (46.3 + 3 * 2.7) * (flags.repa != "none")
    ae_step = 3 * forward + 1.5 * GFLOP["LPIPS"]           # of a pair, one of which is constant
    disc_step = forward + 6 * disc                         # on a real and a reconstructed image
    gan = 1 - flags.gan_start / flags.steps                # share of the steps, which alternate
    return (1 - gan) * ae_step + gan * (ae_step + 2 * disc + disc_step) / 2


def costs(args):
    """The paper's presets. That 40% of --tflops are reached is assumed."""
    hours = " | ".join(f"hours, 8 x {rate:g} TFLOP/s" for rate in args.tflops)
    print(f"| preset | TFLOP per image | total EFLOP | {hours} |")
    for script, options in ((train_ae, []), (train_diffusion, ["--ae=none"])):
        for preset in [name for name in script.PRESETS if name.startswith(("celeba", "imagenet"))]:
            sys.argv = [script.__name__, f"--preset={preset}", *options]
            flags = script.get_args()
            gflop, images = training_gflop(flags), flags.steps * flags.batch_size
            name = f"{script.__name__}, {preset}" + f" ({flags.model})" * bool(options)
            hours = [gflop * images / (8 * 0.4 * 1e3 * rate) / 3600 for rate in args.tflops]
            cells = [f"{gflop / 1e3:.2f}", *(f"{x:.1f}" for x in (gflop * images / 1e9, *hours))]
            print(f"| {name} | {' | '.join(cells)} |")
            args.rows.append(dict(name=name, gflop_per_image=gflop, images=images, hours=hours))


SECTIONS = {f.__name__: f for f in (ae, diffusion, samplers, loader, peers, costs)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="the smallest models, 32 px")
    add("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--model", nargs="+", choices=[*CONFIGS, *MODELS], metavar="NAME",
        help="autoencoders and transformers (default: f8d4 f16d16 SiT-B/2 UViT-S/2)")
    add("--reg", nargs="+", default="none kl esm dsm se eq vf uae".split())
    add("--repa", nargs="+", default=["none", *REPA_KINDS])
    add("--batch_size", type=int, help="default: by section and device")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on cuda, fp32 on cpu")
    add("--repeats", type=int, help="timed calls (default: 20 on cuda, 3 on cpu)")
    add("--tflops", type=float, nargs="+", default=[312, 790], help="(default: A100, H200 in bf16)")
    args, args.script_flags = parser.parse_known_args()
    args.device, args.rows = run.init_distributed(args.device)[2], []
    cuda = args.device.type == "cuda"
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    args.repeats = args.repeats or (20 if cuda else 3)
    tiny = ["f2d4-tiny", "SiT-mini/2", "UViT-tiny/2"]
    args.model = args.model or (tiny if args.quick else ["f8d4", "f16d16", "SiT-B/2", "UViT-S/2"])
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.section:
            print(f"\n{name}")
            SECTIONS[name](args)
    print(json.dumps(dict(torch=torch.__version__, device=args.device.type, dtype=args.dtype,
                          threads=torch.get_num_threads(), rows=args.rows)))


if __name__ == "__main__":
    with run.one_line_errors():
        main()
