"""
Speed and memory of the training steps, samplers and loaders; what the presets cost on paper.
Compare the rows of one run with one another: nothing is asserted about any machine.

    python tests/benchmark.py --quick            tiny models, under two minutes on two cores
    python tests/benchmark.py                    256 px: minutes on a GPU, an hour on two cores
    python tests/benchmark.py --section ae --model f8d4 --reg esm --batch_size 12 --grad_checkpoint

The sections ae and diffusion run the training scripts in this process, and time from one optimizer
update to the next; flags not listed below go to these scripts. Medians. FLOPs: of matmuls and
convolutions, 2 per multiply-add (se and eq: of one drawn size); MFU: their rate over a large
matmul's. Peak memory: the CUDA allocator's, or the process's. The last line is JSON.
"""
import argparse
import contextlib
import functools
import io
import json
import statistics
import sys
import tempfile
import time
import timeit
from pathlib import Path
from unittest import mock

import lpips
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_ae
import train_diffusion
from common import run
from common.data import open_data, pack, train_batches
from dit import DDPM, MODELS, Interpolant
from losses import PatchDiscriminator, esm_loss
from repa import REPA_KINDS
from spectral import lowpass, radial_profile
from vae import CONFIGS, AEConfig, AutoencoderKL


def now(device):
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_per_call(args, function):
    """The median of args.repeats calls, after one to burn in."""
    call = lambda: (function(), now(args.device))
    call()
    return statistics.median(timeit.repeat(call, number=1, repeat=args.repeats))


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
    counter.mod_tracker = mock.MagicMock(parents={"Global"})   # its hooks refuse train_ae's graphs

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
    peak = 1e3 * run.usage(0, 0.0, args.device)["memory_GB"]
    steps = [(b[0], b[1] - a[1], b[2] - a[2]) for a, b in zip(marks, marks[1:])]
    for name, network in zip(names, dict.fromkeys(key for key, _, _ in steps[1:])):
        seconds = statistics.median(s for key, s, _ in steps[untimed - 1:] if key == network)
        flops = max(flops for key, _, flops in steps if key == network)
        report(args, name, ms=1e3 * seconds, images_per_s=batch / seconds, peak_mb=peak,
               gflop_per_image=flops / batch / 1e9, mfu=flops / seconds / matmul_rate(args))


def image_set(args, size):
    """A zip of 64 built-in images."""
    path = args.folder / f"{size}px.zip"
    pack(None, size, path, count=64, overwrite=True)       # the same bytes each time
    return path


def ae(args):
    """train_ae.py: every --reg by itself, then LPIPS and the GAN."""
    size = 32 if args.quick else 256
    batch = args.batch_size or (1 if args.device.type == "cpu" else 16)
    for model in filter(CONFIGS.get, args.model):
        flags = dict(model=model, image_size=size, val_images=1, data=image_set(args, size))
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
                        data=image_set(args, size), repa=repa, repa_depth=1, num_classes=1000,
                        sample_steps=2)


def samplers(args):
    """Each sampler, without guidance, which would double the batch."""
    batch, calls = args.batch_size or (2 if args.device.type == "cpu" else 128), 4
    for name in filter(MODELS.get, args.model):
        side = 16 * int(name[-1])
        model = MODELS[name](input_size=side, in_channels=4, num_classes=1000)
        model.to(args.device).eval()
        process, ways = DDPM("vp"), {"ddim": {}}
        if name.startswith("SiT"):
            process, ways = Interpolant(), {way: {"sampler": way} for way in ("em", "ode")}
        for way, options in ways.items():
            call = functools.partial(process.sample, model, (batch, 4, side, side), calls,
                                     torch.arange(batch), **options)
            with torch.autocast(args.device.type, torch.bfloat16, args.dtype == "bf16"):
                seconds = seconds_per_call(args, call)
            report(args, f"{name} {way}, batch {batch}", ms_per_network_call=1e3 * seconds / calls)


def loader(args):
    """Batches of 256 px in one process."""
    batch = args.batch_size or (8 if args.quick else 64)
    for size in (512, 256):
        images, _ = open_data(image_set(args, size), 256)
        batches = train_batches(images, batch, device=args.device)
        seconds = seconds_per_call(args, functools.partial(next, batches))
        report(args, f"zip of {size} px, batch {batch}", images_per_s=batch / seconds)


def esm_by_fft(images, latents):
    """esm_loss for f8 and h = w, from resized images and the FFT of mirrored ones."""
    def distribution(x, gamma):
        n = x.shape[-1]
        x = torch.cat([x, x.flip(-1)], -1)
        x = torch.cat([x, x.flip(-2)], -2)                 # the FFT of this is x's DCT
        P = torch.fft.rfft2(x)[..., :n, :n].abs().square().mean(1) / (2 * n) ** 2     # (B, h, w)
        P[:, 0] /= 2
        P[:, :, 0] /= 2
        P[:, 0, 0] = 0
        ring = torch.arange(1, 17, device=x.device)
        S = torch.log1p(radial_profile(P) * ring ** gamma) + 1e-6
        return S / S.sum(1, keepdim=True)
    p = distribution(F.interpolate(images, latents.shape[-2:], mode="bicubic"), 1.0)
    q = distribution(latents, 0.0)
    return (p * (p / q).log()).sum(1).mean()


def peers(args):
    """ESM's gradient in two ways that agree, and DSM's low-pass of images."""
    x = torch.rand(8, 3, 256, 256, device=args.device) * 2 - 1
    z = torch.randn(8, 4, 32, 32, device=args.device, requires_grad=True)
    ways = {"ESM: esm_loss": lambda: torch.autograd.grad(esm_loss(x, z), z)[0],
            "ESM: resize, FFT": lambda: torch.autograd.grad(esm_by_fft(x, z), z)[0]}
    torch.testing.assert_close(*[way() for way in ways.values()], atol=1e-5, rtol=1e-3)
    for name, way in {**ways, "DSM: lowpass": lambda: lowpass(x, 10)}.items():
        report(args, name, ms=1e3 * seconds_per_call(args, way))


def gflop(build, *shape, call=lambda network, x: network(x)):
    """Of one forward pass, counted by torch on a device without memory."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        call(build(), torch.empty(1, *shape))
    return counter.get_total_flops() / 1e9


def training_gflop(flags):
    """Per image. A backward pass costs two forward passes, through frozen weights one."""
    size = 64 if flags.preset == "one-gpu" else 256
    if hasattr(flags, "repa"):                             # DINOv2 ViT-B/14 and the projector
        of_preset = train_ae.PRESETS.get(flags.preset, dict(model="f8d4"))     # imagenet-repa
        config = CONFIGS[of_preset.get("model", "f16d16")]
        side, d = size // config.reduction, config.latent_channels
        forward = gflop(lambda: MODELS[flags.model](side, d, 0), d, side, side,
                        call=lambda model, z: model(z, torch.zeros(1), None))
        return 3 * forward + (46.3 + 3 * 2.7) * (flags.repa != "none")
    forward = gflop(lambda: AutoencoderKL(CONFIGS[flags.model]), 3, size, size,
                    call=lambda ae, x: ae.decode(ae.encode(x).mean))
    disc = gflop(PatchDiscriminator, 3, size, size)
    vgg = gflop(lambda: torchvision.models.vgg16().features, 3, size, size)
    passes = 4 if flags.grad_checkpoint else 3             # it computes blocks twice
    ae_step = passes * forward + 1.5 * 2 * vgg             # LPIPS of a pair, one of them constant
    disc_step = forward + 6 * disc                         # on a real and a reconstructed image
    gan = 1 - flags.gan_start / flags.steps                # share of the steps, which alternate
    return (1 - gan) * ae_step + gan * (ae_step + 2 * disc + disc_step) / 2


RECIPES = [(script, preset, f"--preset {preset} {more}")
           for script, more in ((train_ae, ""), (train_diffusion, "--ae none"))
           for preset in script.PRESETS if preset != "quick"]
RECIPES.append((train_ae, "fine-tuning (GUIDE)", "--preset celeba-f8d4 --reg dsm --steps 10000 "
                "--batch_size 8 --gan_start 0 --grad_checkpoint"))


def costs(args):
    """The recipes of GUIDE.md. That 40% of --tflops are reached is assumed."""
    hours = " | ".join(f"hours, 8 x {rate:g} TFLOP/s" for rate in args.tflops)
    print(f"| recipe | TFLOP per image | total EFLOP | {hours} |")
    for script, recipe, flags in RECIPES:
        sys.argv = [script.__name__, *flags.split()]
        flags = script.get_args()
        each, images = training_gflop(flags), flags.steps * flags.batch_size
        name = f"{script.__name__}, {recipe}" + f" ({flags.model})" * (script is train_diffusion)
        hours = [each * images / (8 * 0.4 * 1e3 * rate) / 3600 for rate in args.tflops]
        cells = [f"{each / 1e3:.3g}", f"{each * images / 1e9:.3g}", *(f"{x:.2g}" for x in hours)]
        print(f"| {name} | {' | '.join(cells)} |")
        args.rows.append(dict(name=name, gflop_per_image=each, images=images, hours=hours))


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
    dtype, repeats = ("bf16", 20) if args.device.type == "cuda" else ("fp32", 3)
    args.dtype, args.repeats = args.dtype or dtype, args.repeats or repeats
    quick = "f2d4-tiny SiT-mini/2 UViT-tiny/2"
    args.model = args.model or (quick if args.quick else "f8d4 f16d16 SiT-B/2 UViT-S/2").split()
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
