"""
Speed and memory, side by side in one run: a number behind every default, and beside every target.

    python tests/benchmark.py --quick          two cores, three minutes: small batches and images
    python tests/benchmark.py                  256 px, the paper's sizes: minutes on a GPU, about an
                                               hour on two cores
    python tests/benchmark.py --section theory off         some of it

    costs         the GUIDE's table: hours, bytes and disk of every preset, from FLOPs and sizes
    theory        FLOPs of each network against known figures, the machine's measured rates, and
                  what these allow
    off           ASSERTED: a term that is off runs no operator. All else is reported, not asserted
    ae            the autoencoder's step: every --reg, with and without LPIPS and GAN; what share of
                  it ESM and DSM take
    diffusion     the transformer's step: each model, each --repa
    encode, sample, load, eval     the latent cache; samplers with and without guidance; folder,
                  zip, cache; features and Frechet distance
    processes     two gloo processes: gradients averaged by DistributedDataParallel, beside a flat
                  all-reduce after the backward pass
    alternatives  what we chose against what we did not: layout, precision, compilation, optimiser,
                  low-pass, ESM, start of training

Steps are those of train_ae.py and train_diffusion.py, built from the same parts, on noise. In a
table every case burns in (the first call counts its FLOPs, uncompiled), then all take turns;
medians. FLOPs: matmuls and convolutions, 2 per multiply-add. MFU: their rate as a share of the
fastest matmul of that precision here. MB: what a row holds between calls (weights, moments,
averages) plus what a call adds at its peak, by the allocator on CUDA, by the resident set on Linux.
The last line is JSON.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import lpips
import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_ae
import train_diffusion
import vae
from common import metrics, run
from common.data import open_data, pack, train_batches
from common.latents import LatentCache, build_cache
from dit import DDPM, MODELS, Interpolant, NoiseStream, SiTBlock, UViTBlock
from losses import (
    PatchDiscriminator,
    PerceptualLoss,
    dsm_pair,
    eq_pair,
    esm_loss,
    scale_pair,
)
from repa import (
    REPA_KINDS,
    Encoder,
    Projector,
    RandomViT,
    load_encoder,
)
from spectral import block_dct2, block_idct2, lowpass, triangle_mask
from vae import CONFIGS, AttnBlock, AutoencoderKL, Posterior, ResnetBlock

# GFLOP an image of 256 px, forward
KNOWN = {
    "f8d4 encoder": 273, "f8d4 decoder": 622, "f16d16 encoder": 137, "f16d16 decoder": 250,
    "LPIPS, a pair": 80, "PatchGAN": 6.3, "SiT-B/2": 46.0, "UViT-S/2": 24.4, "UViT-M/2": 70.2,
    "UViT-L/2": 152, "ViT-B/14": 46.3,
}
# --reg and the draw that is timed
REGS = {"none": "", "kl": "", "esm": "", "dsm": ", n = 10", "se": ", k = 2", "eq": ", scale 1/2",
        "vf": "", "uae": ""}
PAIRS = {
    "dsm": lambda x, z: dsm_pair(x, z, 10),
    "se": lambda x, z: scale_pair(x, z, 2),
    "eq": lambda x, z: eq_pair(x, z, 0.5, 1),
}


# --------------------------------------------------------------------------------------------------
# How it is measured

@dataclasses.dataclass
class Case:
    """One row of a table."""
    name: str
    fn: object                    # does the work once
    images: float = 1             # per call
    dtype: str = "fp32"           # fp32, tf32, bf16: of which matmul its MFU is a share
    holds: tuple = ()             # modules, optimisers, averages that stay in memory between calls
    compiled: bool = False


def tensors_of(thing):
    """Of a module, an optimiser or an average."""
    if isinstance(thing, nn.Module):
        return itertools.chain(thing.parameters(), thing.buffers())
    if isinstance(thing, run.EMA):
        return thing.shadow.values()
    return itertools.chain(*(state.values() for state in thing.state.values()))


def held_bytes(things):
    """Memory of the tensors of modules, optimisers and averages; shared ones count once."""
    sizes = {id(t): t.numel() * t.element_size() for thing in things for t in tensors_of(thing)}
    return sum(sizes.values())


def memory(device, reset=False):
    """
    Peak bytes in use since the last reset, which makes it the bytes in use now. 0 where neither
    CUDA nor Linux can tell.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        if reset:
            ctypes.CDLL(None).malloc_trim(0)           # or what is free hides what a call takes
            Path("/proc/self/clear_refs").write_text("5")      # the resident set's peak starts anew
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in status if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return 0


def clock(fn, calls, device):
    """Seconds per call of fn."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    wait()
    return (time.perf_counter() - start) / calls


def allow_tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


class NoModules(contextlib.nullcontext):
    """
    In place of FlopCounterMode's record of modules: its hooks refuse a graph that begins at a
    module's input and is asked for by autograd.grad, as train_ae.py's does.
    """
    parents = frozenset({"Global"})


def burn_in(case, device):
    """Returns how many calls make a measurement, and the FLOPs of one."""
    allow_tf32(case.dtype == "tf32")
    eager = contextlib.nullcontext()
    if case.compiled:
        eager = torch.compiler.set_stance("force_eager")
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with eager, counter:
        seconds = clock(case.fn, 1, device)
    if case.compiled or device.type == "cuda":
        clock(case.fn, 2, device)
    if case.compiled or seconds < 0.5:
        seconds = clock(case.fn, 1, device)
    return math.ceil(min(0.05 / seconds, 1000)), counter.get_total_flops()


def interleave(cases, repeats, device):
    """
    Burn-in, then `repeats` rounds in which every case has its turn: a slow minute of the machine
    hits them all.
    returns  per case: seconds per call, one a round; FLOPs per call; peak bytes
    """
    plans = [(*burn_in(case, device), [], []) for case in cases]
    for _ in range(repeats):
        for case, (calls, _, times, peaks) in zip(cases, plans):
            allow_tf32(case.dtype == "tf32")
            before = memory(device, reset=True)
            times.append(clock(case.fn, calls, device))
            peaks.append(memory(device) - before + held_bytes(case.holds))
    return [(times, flops, max(peaks)) for _, flops, times, peaks in plans]


def print_row(row, first):
    """One line of a table; first: the row that its speed is compared with."""
    speed, digits = row["images_per_s"], 4
    if speed > 1:
        digits = 2
    work = rate = mfu = "-"
    if row["gflop_per_s"]:
        work = f"{row['gflop_per_image']:,.1f}"
        rate = f"{row['gflop_per_s']:,.0f}"
        mfu = f"{row['mfu']:.0%}"
    print(f"{row['name']:46}{speed:>10,.{digits}f}{row['ms']:>10,.2f}{row['spread']:>6.0%}"
          f"{row['peak_mb']:>9,.0f}{work:>11}{rate:>10}{mfu:>6}"
          f"{speed / first['images_per_s']:>9.3g}", flush=True)


def table(args, title, cases, repeats=None):
    """Measure the cases and print them; returns {name: row} and keeps the rows for the JSON."""
    print(f"\n{title}\n{'':46}{'images/s':>10}{'ms':>10}{'+-':>6}{'MB':>9}{'GFLOP/img':>11}"
          f"{'GFLOP/s':>10}{'MFU':>6}{'x first':>9}", flush=True)
    rows = {}
    measured = interleave(cases, repeats or args.repeats, args.device)
    for case, (times, flops, peak) in zip(cases, measured):
        seconds = statistics.median(times)
        rows[case.name] = row = dict(
            table=title, name=case.name, dtype=case.dtype, images_per_s=case.images / seconds,
            ms=1e3 * seconds, spread=(max(times) - min(times)) / 2 / seconds, peak_mb=peak / 1e6,
            gflop_per_image=flops / case.images / 1e9, gflop_per_s=flops / seconds / 1e9,
            mfu=flops / seconds / matmul_rate(args.device, case.dtype))
        print_row(row, next(iter(rows.values())))
    args.rows += rows.values()
    return rows


def target(args, what, value, bound, least=True):
    """Measured beside wanted; a miss is printed, never raised."""
    met = value >= bound if least else value <= bound
    verdict = "ok" if met else "MISSED"
    side = "at least" if least else "at most "
    args.targets.append(
        dict(target=what, measured=value, bound=bound, least=least, verdict=verdict))
    print(f"  {what:84}{value:10,.4g}   target: {side} {bound:<7,.4g} {verdict}", flush=True)


def pick(args, quick, cpu, cuda):
    """The sizes of this run."""
    return quick if args.quick else cuda if args.device.type == "cuda" else cpu


def precisions(device):
    return ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16")


def autocast(device, dtype):
    """As in the training loops."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


@functools.cache
def matmul_rate(device, dtype):
    """
    FLOP/s of a large square matmul: the fastest of ten, for it is a ceiling (of matmuls: a CPU's
    convolutions may pass it).
    """
    n = 8192 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=kind)
    allow_tf32(dtype == "tf32")
    seconds = min(clock(lambda: a @ b, 1, device) for _ in range(10))
    allow_tf32(False)
    return 2 * n ** 3 / seconds


def layers_of(kind, run):
    """
    A network's linear layers or 3x3 convolutions, by what they do.
    run      builds the network and calls it once; happens on the meta device
    returns  by (name, shape of the input): multiply-adds; list of (layer, shape of the output)
    """
    work, found = Counter(), {}

    def note(module, inputs, out):
        if not isinstance(module, kind) or getattr(module, "kernel_size", (3, 3)) != (3, 3):
            return
        shape, (width_out, width_in) = inputs[0].shape, module.weight.shape[:2]
        stride = ", stride 2" if getattr(module, "stride", (1, 1)) == (2, 2) else ""
        name = f"  {type(module).__name__} {width_in} -> {width_out}{stride} on "
        key = name + "x".join(map(str, shape)), shape
        work[key] += module.weight[0].numel() * out.numel()
        found.setdefault(key, []).append((module, out.shape))
    hook = nn.modules.module.register_module_forward_hook(note)
    with torch.device("meta"), torch.no_grad():
        run()
    hook.remove()
    return work, found


def layer_case(args, name, layer, shape, out_shape):
    """A layer from the meta device, forward and backward."""
    layer = copy.deepcopy(layer).to_empty(device=args.device)
    layer.reset_parameters()
    layout = torch.contiguous_format
    if args.device.type == "cuda" and len(shape) == 4:
        layout = torch.channels_last
    x = torch.randn(shape, device=args.device).contiguous(memory_format=layout).requires_grad_()
    g = torch.randn(out_shape, device=args.device).contiguous(memory_format=layout)
    layer.to(memory_format=layout)

    def fn():
        with autocast(args.device, args.dtype):
            y = layer(x)
        y.backward(g.to(y.dtype))
        layer.zero_grad()
        x.grad = None
    return Case(name, fn, len(x), args.dtype)


def layer_cases(args, kind, share, run):
    """
    A network's linear layers or 3x3 convolutions one by one: what the machine can do on the
    network's own shapes.
    run      builds the network and calls it once
    share    of their FLOPs that is covered, heaviest shapes first
    returns  cases, and how often each occurs in the network
    """
    work, found = layers_of(kind, run)
    cases, counts, total = [], [], work.total()
    while work.total() > (1 - share) * total:
        key = name, shape = max(work, key=work.get)
        layer, out_shape = found[key][0]
        cases.append(layer_case(args, name, layer, shape, out_shape))
        counts.append(len(found[key]))
        del work[key]
    return cases, counts


def layer_rate(rows, cases, counts):
    """FLOP/s of such layers, each as often as the network has it."""
    gflop, ms = 0, 0
    for case, count in zip(cases, counts):
        row = rows[case.name]
        gflop += row["gflop_per_image"] * case.images * count
        ms += row["ms"] * count
    rate = gflop / ms * 1e12
    print(f"  these layers, each as often as the network has it: {rate / 1e9:,.0f} GFLOP/s")
    return rate


# --------------------------------------------------------------------------------------------------
# The two training steps

def random_lpips():
    """LPIPS with random weights: needs no file, runs as fast."""
    untrained = functools.partial(lpips.LPIPS, pretrained=False, pnet_rand=True)
    with mock.patch("lpips.LPIPS", untrained):
        return PerceptualLoss()


def target_encoder(small):
    """
    A network of the shape of DINOv2 ViT-B/14 without its class token; small: the one for tests.
    """
    if small:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")            # that it is untrained
            return load_encoder(source="random")
    network = RandomViT(768)
    # pre-norm, exact GELU: the same block
    network.blocks = nn.Sequential(*[UViTBlock(768, 12, skip=False) for _ in range(12)])
    return Encoder(network, 768)


def adamw(*networks, **options):
    parameters = [p for network in networks for p in network.parameters()]
    return torch.optim.AdamW(parameters, lr=1e-5, **(options or dict(fused=True)))


# Flags of the two scripts, as far as their steps read them.
AE_FLAGS = dict(gamma=1.0, esm_weight=0.01, kl_weight=1e-6, vf_weight=0.1, uae_weight=0.5,
                lpips_weight=0.5, gan_weight=0.5, grad_accum=1, grad_checkpoint=False)
SIT_FLAGS = dict(label_dropout=0.1, repa_depth=4, repa_weight=0.5, dog_sigma1=1.0, dog_sigma2=2.5,
                 norm_std=1.0, grad_accum=1, grad_checkpoint=False)


def compute_of(device, dtype="fp32", compiled=False):
    """runtime.Compute for one process; what it sets of TF32 each case sets for itself."""
    return run.Compute(0, 1, device, dtype, "on" if compiled else "off", tf32=False)


def ae_nets(name, device, extras=True, compiled=False, channels_last=None, small_encoder=False):
    """What an autoencoder's step needs, as train_ae.py's build and place leave it."""
    torch.manual_seed(0)
    nets = SimpleNamespace(ae=AutoencoderKL(CONFIGS[name]).to(device), disc=None, perceptual=None,
                           encoder=None, projection=None,
                           generator=torch.Generator(device).manual_seed(0))
    if channels_last or (channels_last is None and compiled and device.type == "cuda"):
        nets.ae.to(memory_format=torch.channels_last)
    nets.trained = [nets.ae]
    if extras:
        nets.disc = PatchDiscriminator().to(device)
        nets.perceptual = random_lpips().to(device)
        nets.encoder = target_encoder(small_encoder).to(device)
        nets.projection = nn.Linear(nets.ae.config.latent_channels, nets.encoder.width, bias=False)
        nets.projection.to(device)
        nets.disc_optimizer, nets.trained = adamw(nets.disc), [nets.ae, nets.projection]
    nets.optimizer = adamw(*nets.trained)
    train_ae.place(SimpleNamespace(**AE_FLAGS), nets, compute_of(device, compiled=compiled))
    return nets


def step(trained, optimizer, values):
    """As run.update: clip, and step where nothing is not finite."""
    parameters = [p for network in trained for p in network.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    finite = torch.stack([value.detach() for value in (norm, *values)]).isfinite().all()
    run.step_if(finite, optimizer)


def ae_step(nets, images, reg="none", lpips=False, gan=False, train_disc=False, dtype="fp32"):
    """
    One pass of train_ae.py's loop: a step of the autoencoder, or with train_disc one of the
    discriminator. images (B, 3, H, W).
    """
    args = SimpleNamespace(reg=[reg], **AE_FLAGS)
    used = SimpleNamespace(**vars(nets))
    used.perceptual = nets.perceptual if lpips else None
    used.encoder = nets.encoder if reg in ("vf", "uae") else None
    shape = nets.ae.latent_shape(images)
    noise = torch.randn(shape, generator=nets.generator, device=images.device)
    pair = PAIRS.get(reg, lambda x, z: (x, z))
    turn = SimpleNamespace(ae=not train_disc, disc=train_disc, gan=gan)
    values = train_ae.forward_backward(args, used, compute_of(images.device, dtype), images, noise,
                                       pair, turn)
    if train_disc:
        step([nets.disc], nets.disc_optimizer, values.values())
    else:
        step(nets.trained, nets.optimizer, values.values())


def diffusion_nets(name, device, repa="none", compiled=False, encoder=None):
    """
    What a transformer's step needs, as train_diffusion.py builds it; 256 tokens: latents of f8d4
    for patch 2, of f16d16 for patch 1.
    """
    torch.manual_seed(0)
    side, C = (32, 4) if name.endswith("/2") else (16, 16)
    model = MODELS[name](input_size=side, in_channels=C, num_classes=1000).to(device)
    encoder = None if repa == "none" else encoder
    nets = SimpleNamespace(model=model, repa=repa, encoder=encoder, projector=None,
                           process=DDPM("sd") if name.startswith("UViT") else Interpolant(),
                           generator=torch.Generator(device).manual_seed(0))
    nets.trained = [nets.model]
    if repa != "none":
        width = nets.model.pos_embed.shape[-1]
        nets.projector = Projector(REPA_KINDS[repa][1], width, encoder.width).to(device)
        nets.trained.append(nets.projector)
    nets.optimizer, nets.ema = adamw(*nets.trained), run.EMA(nets.model)
    compute = compute_of(device, compiled=compiled)
    train_diffusion.place(SimpleNamespace(**SIT_FLAGS), nets, compute)
    return nets


def diffusion_step(nets, moments, labels, images, dtype):
    """
    One pass of train_diffusion.py's loop. moments (B, 2C, h, w) float16, as the cache holds them;
    images (B, 3, 256, 256) for --repa.
    """
    device, args = moments.device, SimpleNamespace(repa=nets.repa, **SIT_FLAGS)
    posterior = Posterior(*moments.float().chunk(2, dim=1))
    noise = torch.randn(posterior.mean.shape, generator=nets.generator, device=device)
    latents = posterior.sample(noise)                  # (B, C, h, w)
    terms = train_diffusion.loss_terms(args, nets, compute_of(device, dtype), latents, labels,
                                       images, nets.generator, (0, 1))
    loss = sum(weight * value for weight, value in terms.values())
    loss.backward()
    step(nets.trained, nets.optimizer, [loss])
    nets.ema.update(1000)


def diffusion_case(args, label, nets, batch, dtype=None, compiled=False):
    """A Case of diffusion_step on random moments, labels and, for --repa, images."""
    device, dtype, aligned = args.device, dtype or args.dtype, nets.repa != "none"
    shape = batch, 2 * nets.model.in_channels, *nets.model.input_size
    moments = torch.randn(shape, device=device).half()
    labels = torch.arange(batch, device=device)
    images = torch.rand(batch * aligned, 3, 256, 256, device=device) * 2 - 1
    encoder = [nets.encoder] if aligned else []
    return Case(label, lambda: diffusion_step(nets, moments, labels, images, dtype), batch, dtype,
                (*nets.trained, nets.optimizer, nets.ema, *encoder), compiled)


# --------------------------------------------------------------------------------------------------
# The sections

def count_gflop(call, *shapes):
    """Of one forward pass on empty tensors of these shapes."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*(torch.empty(shape) for shape in shapes))
    return counter.get_total_flops() / 1e9


def networks_in_theory():
    """{name: (GFLOP, network)}, counted on the meta device, where nothing is computed."""
    found, image = {}, (1, 3, 256, 256)
    with torch.device("meta"):
        for name in ("f8d4", "f16d16", "f16d32"):
            ae = AutoencoderKL(CONFIGS[name])
            side = 256 // ae.config.reduction
            latent = 1, ae.config.latent_channels, side, side
            found[f"{name} encoder"] = count_gflop(ae.encode, image), ae.encoder
            found[f"{name} decoder"] = count_gflop(ae.decode, latent), ae.decoder
        trunk = random_lpips().to("meta").lpips
        found["LPIPS, a pair"] = count_gflop(trunk, image, image), trunk
        disc = PatchDiscriminator()
        found["PatchGAN"] = count_gflop(disc, image), disc
        vit = target_encoder(small=False).network
        found["ViT-B/14"] = count_gflop(vit.forward_features, (1, 3, 224, 224)), vit
        label = torch.zeros(1, dtype=torch.int64)
        for name in (name for name in MODELS if name.endswith("/2")):
            model = MODELS[name](input_size=32, in_channels=4, num_classes=1000)
            call = functools.partial(model, y=label)
            found[name] = count_gflop(call, (1, 4, 32, 32), (1,)), model
    return found


def memory_bound(args, sit, bandwidth):
    """What memory binds: its bytes, and their time at that rate. sit: parameters of SiT-B/2."""
    for name, size in (
        ("AdamW, SiT-B/2: weight, gradient, 2 moments, read and written: 28 bytes a parameter",
         28 * sit),
        ("gradient norm and clip, SiT-B/2: 12 bytes a parameter", 12 * sit),
        ("EMA, SiT-B/2: 12 bytes a parameter", 12 * sit),
        ("DSM, an image of 256 px: read, write", 8 * 3 * 256 ** 2),
        ("ESM, an image of 256 px: read once", 4 * 3 * 256 ** 2),
        ("a cached f16d16 latent: its moments in float16", 4 * 16 ** 3),
    ):
        ms = 1e3 * size / bandwidth
        print(f"  {name:84}{size / 1e6:>10,.2f} MB{ms:>10,.3f} ms")
        args.rows.append(dict(table="theory", name=name, bytes=size, ms=ms))


def theory(args):
    """FLOPs of each network; measured rates; their quotients."""
    found = networks_in_theory()
    best = matmul_rate(args.device, args.dtype)
    print("\ntheory: an image of 256 px, 256 tokens\n"
          f"{'':24}{'M params':>9}{'GFLOP':>9}{'known':>7}{'':9}"
          "at the matmul rate, images/s: forward, training")
    for name, (gflop, network) in found.items():
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        known, verdict = KNOWN.get(name), ""
        if known is not None:
            verdict = "ok" if abs(gflop / known - 1) < 0.02 else "DIFFERS"
        print(f"{name:24}{parameters:>9.1f}{gflop:>9.1f}{known or '':>7} {verdict:8}"
              f"{best / gflop / 1e9:>12,.2f}{best / gflop / 3e9:>12,.2f}")
        args.rows.append(dict(table="theory", name=name, parameters=parameters * 1e6, gflop=gflop,
                              known=known, verdict=verdict))
    # many times the cache
    a = torch.ones(2 ** (25 if args.device.type == "cpu" else 29), device=args.device)
    b = torch.empty_like(a)
    bandwidth = 8 * len(a) / min(clock(lambda: b.copy_(a), 1, args.device) for _ in range(5))
    rates = {dtype: matmul_rate(args.device, dtype) / 1e9 for dtype in precisions(args.device)}
    matmuls = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in rates.items())
    print(f"measured: matmul {matmuls} GFLOP/s; copying {bandwidth / 1e9:,.1f} GB/s. "
          "Where memory binds, bytes and their time at that rate:")
    args.rows.append(dict(table="theory", name="rates", matmul_gflop_per_s=rates,
                          copy_gb_per_s=bandwidth / 1e9))
    memory_bound(args, sum(p.numel() for p in found["SiT-B/2"][1].parameters()), bandwidth)


class Census(TorchDispatchMode):
    """
    Counts operators by the project's function that asked for them; backward convolutions by the
    network whose weight they hold.
    """

    def __init__(self, **networks):
        super().__init__()
        self.calls, self.backward, self.owner = Counter(), Counter(), {}
        for name, network in networks.items():
            self.owner.update((p.data_ptr(), name) for p in network.parameters())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        frame, asked = sys._getframe(1), {}
        while frame:                                   # the outermost caller in each file stays
            code = frame.f_code
            file = os.path.basename(code.co_filename)
            if file in ("losses.py", "repa.py"):
                asked[file] = code.co_name
                if code.co_varnames[:1] == ("self",):
                    asked[file] = type(frame.f_locals["self"]).__name__
            elif file in ("spectral.py", "vae.py"):
                asked[file] = file
            frame = frame.f_back
        self.calls.update(asked.values())
        if func is torch.ops.aten.convolution_backward.default:
            self.backward[self.owner[args[2].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


def off(args):
    """
    What a step enters, and through whose convolutions it goes back, is what its flags name:
    nothing of a term that is off.
    """
    nets = ae_nets("f2d4-tiny", torch.device("cpu"), small_encoder=True)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    align = "adaptive_weight Encoder"
    regs = dict(none="", kl="kl_loss", esm="esm_loss spectral.py", dsm="dsm_pair spectral.py",
                se="scale_pair", eq="eq_pair kl_loss", vf=f"vf_loss kl_loss {align}",
                uae="low_freq_align_loss spectral.py Encoder")
    steps = [(f"--reg {reg}", dict(reg=reg), enters, "ae") for reg, enters in regs.items()]
    steps += [
        ("LPIPS", dict(lpips=True), "PerceptualLoss", "ae lpips"),
        ("GAN, the autoencoder's step", dict(gan=True),
         "PatchDiscriminator hinge_g_loss adaptive_weight", "ae disc"),
        ("GAN, the discriminator's step", dict(train_disc=True),
         "PatchDiscriminator hinge_d_loss", "disc"),
    ]
    print("\noff: operators of one step by the function that asked for them | backward "
          "convolutions by network; asserted")
    for name, options, enters, back in steps:
        with Census(ae=nets.ae, disc=nets.disc, lpips=nets.perceptual) as census:
            ae_step(nets, images, **options)
        entered, went_back = dict(census.calls), dict(census.backward)
        words = ["  ".join(f"{k} {v}" for k, v in found.items()) for found in (entered, went_back)]
        print(f"{name:32}{' | '.join(words)}")
        assert set(entered) == {"vae.py", *enters.split()}, (
            f"{name}: enters {sorted(entered)}, should vae.py {enters}")
        assert set(went_back) == set(back.split()), (
            f"{name}: goes back through {sorted(went_back)}, should {back}")
        args.rows.append(dict(table="off", name=name, operators=entered,
                              backward_convolutions=went_back))


def ae_cases(args, nets, images):
    """Every --reg, then with LPIPS and the GAN."""
    def case(label, *more, **options):
        step = functools.partial(ae_step, nets, images, dtype=args.dtype, **options)
        holds = nets.ae, nets.optimizer, *more
        return Case(label, step, len(images), args.dtype, holds, args.compile)
    cases, gan = [], (nets.disc, nets.disc_optimizer)
    for reg, draw in REGS.items():
        encoder = [nets.encoder] if reg in ("vf", "uae") else []
        cases.append(case(f"--reg {reg}{draw}", *encoder, reg=reg))
    return [
        *cases, case("none, LPIPS", nets.perceptual, lpips=True), case("none, GAN", *gan, gan=True),
        case("none, LPIPS, GAN", nets.perceptual, *gan, lpips=True, gan=True),
        case("none, LPIPS, GAN: discriminator's step", nets.perceptual, *gan, train_disc=True)]


def ae(args):
    """The autoencoder's step."""
    device = args.device
    for name, size, batch in pick(args, [("f8d4", 64, 1), ("f16d16", 64, 1)],
                                  [("f8d4", 256, 1), ("f16d16", 256, 1)],
                                  [("f8d4", 256, 16), ("f16d16", 256, 48)]):
        if name not in args.model:
            continue
        nets = ae_nets(name, device, compiled=args.compile, small_encoder=args.quick)
        cases = ae_cases(args, nets, torch.rand(batch, 3, size, size, device=device) * 2 - 1)
        if args.quick and name == "f16d16":
            cases = [cases[0], *cases[-2:]]            # a latent of 4x4 is too small for DSM
        rows = table(args, f"ae: {name}, {size} px, batch {batch}, {args.dtype}", cases)
        disc = rows["none, LPIPS, GAN: discriminator's step"]["ms"]
        target(args, f"{name}: a discriminator's step, as a share of an autoencoder's",
               disc / rows["none, LPIPS, GAN"]["ms"], 0.35, least=False)
        if args.h200:
            target(args, f"{name}, LPIPS: images/s", rows["none, LPIPS"]["images_per_s"],
                   dict(f8d4=130, f16d16=300)[name])
    if "f16d16" in args.model:
        ae_shares(args, pick(args, 1, 1, 48))


def ae_shares(args, batch):
    """What ESM and DSM take of a step, and the step of what its convolutions allow; 256 px."""
    device, dtype = args.device, args.dtype
    images = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1
    nets = ae_nets("f16d16", device, extras=False, compiled=args.compile)
    latents = torch.randn(batch, 16, 16, 16, device=device, requires_grad=True)
    esm = lambda: torch.autograd.grad(esm_loss(images, latents), latents)
    dsm = lambda: torch.autograd.grad(dsm_pair(images, latents, 10)[1].sum(), latents)

    def network():
        ae = AutoencoderKL(CONFIGS["f16d16"])
        ae.decode(ae.encode(torch.empty(batch, 3, 256, 256)).mode())
    convolutions, counts = layer_cases(args, nn.Conv2d, 0.8 if args.quick else 0.95, network)
    title = (f"ae: f16d16, 256 px, batch {batch}, {dtype}: terms alone, and its 3x3 convolutions, "
             "forward and backward")
    rows = table(args, title, [
        Case("--reg none", lambda: ae_step(nets, images, dtype=dtype), batch, dtype,
             (nets.ae, nets.optimizer), args.compile),
        Case("ESM", esm, batch), Case("DSM, n = 10", dsm, batch), *convolutions])
    step = rows["--reg none"]
    for term, name in (("ESM", "ESM"), ("DSM", "DSM, n = 10")):
        target(args, f"{term} at 256 px, as a share of the step", rows[name]["ms"] / step["ms"],
               0.01, least=False)
    rate = layer_rate(rows, convolutions, counts) / 1e9
    if device.type == "cpu":
        target(args, "f16d16: the step's FLOP/s, as a share of its convolutions'",
               step["gflop_per_s"] / rate, 0.75)


def diffusion(args):
    """The transformer's step."""
    sit, uvit = ("SiT-S/2", "SiT-B/2", "SiT-B/1"), ("UViT-S/1", "UViT-S/2", "UViT-M/2")
    # the last two hold 10 GB and more: GPU only
    large = ("SiT-L/2", "UViT-L/2", "SiT-XL/2", "UViT-H/2")
    for names, batch in pick(args, [(("SiT-B/2",), 4), (("UViT-S/2",), 2)],
                             [(sit, 8), (uvit, 8), (large[:1], 2), (large[1:2], 2)],
                             [(sit + uvit, 256), (large, 64)]):
        names = [name for name in names if name in args.model]
        if names:
            each_model(args, names, batch)
    name, batch = pick(args, ("SiT-S/2", 2), ("SiT-B/2", 8), ("SiT-B/2", 256))
    if name in args.model:
        each_repa(args, name, batch)


def each_model(args, names, batch):
    """Models side by side; for SiT-B/2 also what its linear layers allow."""
    cases, linears, title = [], [], f"diffusion: each model, batch {batch}, {args.dtype}"
    for name in names:
        nets = diffusion_nets(name, args.device, compiled=args.compile)
        cases.append(diffusion_case(args, name, nets, batch, compiled=args.compile))

    if "SiT-B/2" in names:
        block = lambda: SiTBlock(768, 12)(torch.empty(batch, 256, 768), torch.empty(batch, 768))
        linears, counts = layer_cases(args, nn.Linear, 0.95, block)
        title += ", and the linear layers of SiT-B/2"
    rows = table(args, title, cases + linears)
    if not linears:
        return
    rate = layer_rate(rows, linears, counts) / 1e9
    if args.device.type == "cpu":
        target(args, "SiT-B/2: the step's FLOP/s, as a share of its matmuls'",
               rows["SiT-B/2"]["gflop_per_s"] / rate, 0.70)
    if args.h200:
        target(args, "SiT-B/2: training images/s", rows["SiT-B/2"]["images_per_s"], 2860)


def each_repa(args, name, batch):
    encoder = target_encoder(small=args.quick).to(args.device)
    title = f"diffusion: {name}, batch {batch}, {args.dtype}, each --repa, its encoder included"
    if args.quick:
        title += " (the small one)"
    cases = []
    for repa in ("none", *REPA_KINDS):
        nets = diffusion_nets(name, args.device, repa, args.compile, encoder)
        label = f"--repa {repa}"
        cases.append(diffusion_case(args, label, nets, batch, compiled=args.compile))
    rows = table(args, title, cases)
    if args.h200:
        target(args, "SiT-B/2 with --repa repa, encoder included: training images/s",
               rows["--repa repa"]["images_per_s"], 2000)


def encode(args):
    """Images to the latent cache: both mirrors, float32."""
    device = args.device
    size, count = pick(args, (64, 2), (256, 2), (256, 64))
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    data_set = type("Pictures", (list,), dict(size=size))
    pictures = data_set((image, 0, i, False) for i, image in enumerate(pixels))
    images, cases = torch.rand(count, 3, size, size, device=device) * 2 - 1, []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        fresh = (Path(folder, str(i)) for i in itertools.count())
        for name in ("f8d4", "f16d16"):
            ae = ae_nets(name, device, extras=False, channels_last=False).ae
            alone = lambda ae=ae: [ae.encode(images) for _ in range(2)]
            cached = lambda ae=ae: build_cache(next(fresh), {}, ae, pictures, count, device=device)
            cases += [Case(f"{name}: the encoder alone, both mirrors", alone, count, holds=(ae,)),
                      Case(f"{name}: build_cache", cached, count, holds=(ae,))]
        table(args, f"encode: {size} px, batch {count}, fp32", cases)


def sample(args):
    """Samplers; images/s are for 100 steps whatever number was run."""
    steps, batch = pick(args, (2, 1), (10, 4), (100, 128))
    for name in ("SiT-S/2" if args.quick else "SiT-B/2", "UViT-S/2"):
        samplers(args, name, steps, batch)


def samplers(args, name, steps, batch):
    """The network alone, then each sampler of its process."""
    device, dtype = args.device, args.dtype
    nets = diffusion_nets(name, device, compiled=args.compile)
    model, y = nets.model.eval().requires_grad_(False), torch.arange(batch, device=device)
    x = torch.randn(2 * batch, model.in_channels, *model.input_size, device=device)
    t = torch.rand(2 * batch, device=device)

    def network(n):
        with autocast(device, dtype):
            model(x[:n], t[:n], y.repeat(2)[:n])

    def sampler(cfg, **options):
        with autocast(device, dtype):
            nets.process.sample(model, (batch, *x.shape[1:]), steps, y, cfg,
                                noise=NoiseStream(0, range(batch)), **options)

    def case(label, images, fn, *values, **options):
        call = functools.partial(fn, *values, **options)
        return Case(label, call, images, dtype, (model,), args.compile)
    cases = [case("the network alone", batch / 100, network, batch),
             case("the network alone, with guidance", batch / 100, network, 2 * batch)]
    kinds = {"DDIM": {}}
    if name.startswith("SiT"):
        kinds = {"Euler-Maruyama": dict(sampler="em"), "Euler ODE": dict(sampler="ode")}
    for label, options in kinds.items():
        for cfg, guidance in ((1.0, ""), (1.8, ", CFG 1.8")):
            cases.append(case(label + guidance, batch * steps / 100, sampler, cfg, **options))
    title = f"sample: {name}, {steps} steps, batch {batch}, {dtype}"
    rows = list(table(args, f"{title}; images/s and GFLOP for 100 steps", cases).values())
    share = rows[3]["images_per_s"] / rows[1]["images_per_s"]
    print(f"  with CFG {share:.0%} of what the network alone allows")
    if args.h200 and name == "SiT-B/2":
        target(args, "SiT-B/2, 100 steps, CFG: share of the network alone", share, 0.60)
        target(args, "SiT-B/2, 100 steps, CFG: share of the matmul rate", rows[3]["mfu"], 0.60)


def draw_photos(folder, count):
    """JPEGs of 500x375: noise at five scales, the finest the weakest."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        picture = 0
        for s, weight in ((2, 0.35), (5, 0.22), (12, 0.17), (30, 0.14), (90, 0.12)):
            noise = Image.fromarray(rng.integers(0, 256, (3 * s, 4 * s, 3), dtype=np.uint8))
            octave = np.asarray(noise.resize((500, 375), Image.BICUBIC), np.float32)
            picture = picture + weight * octave
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=92)


def latent_cache(folder, images):
    """Of the shape of f16d16's, by an encoder that takes no time."""
    def encode(x):
        moments = x[:, :1, ::16, ::16].repeat(1, 32, 1, 1)
        return Posterior(*moments.chunk(2, dim=1))
    build_cache(folder, {}, SimpleNamespace(config=CONFIGS["f16d16"], encode=encode), images, 8)
    return LatentCache(folder, {})


def load(args):
    """Images from disk: photographs larger than needed, the same packed, the same as latents."""
    device = args.device
    count, batch = pick(args, (24, 8), (96, 16), (480, 64))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw_photos(folder / "photos", count)
        with contextlib.redirect_stderr(io.StringIO()):
            pack(str(folder / "photos"), 256, folder / "packed.zip")
        specs = {"folder": str(folder / "photos"), "packed zip": str(folder / "packed.zip"),
                 "built-in": None}
        sets = {name: open_data(spec, 256)[0] for name, spec in specs.items()}
        cache = latent_cache(folder / "cache", sets["packed zip"])
        streams = {name: train_batches(images, batch, device=device)
                   for name, images in sets.items()}
        streams["latent cache, f16d16"] = cache.batches(batch, device=device)
        title = f"load: {count} JPEGs of 500x375 to 256 px, batch {batch}, in one process"
        rows = table(args, title, [Case(name, functools.partial(next, stream), batch)
                                   for name, stream in streams.items()])
        speed = {name: row["images_per_s"] / rows["folder"]["images_per_s"]
                 for name, row in rows.items()}
        target(args, "packed zip, as a multiple of the folder", speed["packed zip"], 2)
        target(args, "latent cache, as a multiple of the folder", speed["latent cache, f16d16"], 9)
        if args.quick:
            return
        workers = min(8, os.cpu_count())
        # one after the other: workers go on while others have their turn
        for name in ("folder", "packed zip"):
            stream = train_batches(sets[name], batch, workers=workers, device=device)
            fn = lambda stream=stream: [next(stream) for _ in range(8 * workers)]
            table(args, f"load: the {name} with {workers} workers",
                  [Case(name, fn, 8 * workers * batch)])


def evaluation(args):
    """What evaluate.py spends its time on."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    device = args.device
    batch, D, size = pick(args, (2, 512, 128), (8, 2048, 256), (128, 2048, 256))
    network = fidelity.FeatureExtractorInceptionV3     # random weights run as fast
    with (mock.patch.object(fidelity, "load_state_dict_from_url"),
          mock.patch.object(network, "load_state_dict")):
        inception = metrics.load_inception(device)
    moments = metrics.Moments(2048, device)
    a, b = torch.rand(2, max(batch, 8), 3, size, size, device=device) * 2 - 1
    features = lambda: moments.add(inception(metrics.to_uint8(a[:batch]))[0])
    cases = [Case(f"Inception features and moments, batch {batch}", features, batch)]
    for label, fn in (("PSNR", metrics.psnr), ("SSIM", metrics.ssim),
                      ("spectral KL", metrics.spectral_kl)):
        cases.append(Case(label, functools.partial(fn, a, b), len(a)))
    wasserstein = functools.partial(metrics.sliced_wasserstein, a.cpu(), b.cpu())
    cases.append(Case("sliced Wasserstein distance", wasserstein, len(a)))
    table(args, f"eval: {size} px, fp32", cases)

    mean1, mean2 = torch.randn(2, D, dtype=torch.float64)
    cov1, cov2 = (torch.cov(torch.randn(D, 2 * D, dtype=torch.float64)) for _ in range(2))
    ours = lambda: metrics.frechet_distance(mean1, cov1, mean2, cov2)

    def root():
        trace = scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real.trace()
        return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace
    table(args, f"eval: Frechet distance, {D} dimensions, float64",
          [Case("ours: two eigendecompositions", ours), Case("scipy sqrtm", root)],
          repeats=min(3, args.repeats))


# --------------------------------------------------------------------------------------------------
# What we did not choose

def dct_by_fft(x):
    """DCT of the last dimension: the spectrum of the signal and its mirror, turned to be real."""
    n, k = x.shape[-1], torch.arange(x.shape[-1], device=x.device)
    phase = torch.polar(torch.ones_like(k, dtype=x.dtype), -math.pi / (2 * n) * k)
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(-1)], -1))[..., :n]
    return (spectrum * phase).real / torch.where(k == 0, 4 * n, 2 * n).sqrt()


def naive_esm(images, latents, n_bins=16):
    """esm_loss as one writes it down first: blur, resize, DCT by FFT, a mask per ring."""
    def describe(x, gamma):
        rows = dct_by_fft(x).transpose(-1, -2)
        P = dct_by_fft(rows).transpose(-1, -2).square().mean(1)        # (B, h, w)
        u, v = (torch.arange(side, device=x.device) for side in P.shape[1:])
        r = (u[:, None] ** 2 + v ** 2).sqrt()
        ring, P = (r / r.max() * n_bins).long().clamp_max(n_bins - 1), P * (r > 0)
        S = [P[:, ring == b].mean(1) * (b + 1) ** gamma for b in range(n_bins)]
        S = torch.stack(S, 1).log1p() + 1e-6
        return S / S.sum(1, keepdim=True)
    if images.shape[-2] >= 16 * latents.shape[-2]:
        taps = torch.exp(-0.5 * ((torch.arange(7, device=images.device) - 3) / 1.2) ** 2)
        kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 7, 7)
        images = F.conv2d(images, kernel, padding=3, groups=3)
    p = describe(F.interpolate(images, latents.shape[-2:], mode="bicubic"), 1.0)
    q = describe(latents, 0.0)
    return (p * (p.log() - q.log())).sum(1).mean()


def alternatives(args):
    """The defaults and what they were chosen over."""
    ae_alternatives(args, *pick(args, (64, 1), (256, 1), (256, 16)))
    diffusion_alternatives(args, *pick(args, ("SiT-tiny/2", 8), ("SiT-B/2", 8), ("SiT-B/2", 256)))
    optimizers(args)
    spectra(args)
    if not args.quick:
        starts(args)


def ae_alternatives(args, size, batch):
    """Layout, precision, recomputation, compilation of the autoencoder's step."""
    device, cuda = args.device, args.device.type == "cuda"
    images = torch.rand(batch, 3, size, size, device=device) * 2 - 1

    def variant(layout, dtype, how="eager"):
        nets = ae_nets("f16d16", device, extras=False, channels_last=layout == "channels_last",
                       compiled=how == "compiled")
        if how == "recomputed":
            run.recompute(nets.ae, (ResnetBlock, AttnBlock))
        return Case(f"{layout}, {dtype}, {how}", lambda: ae_step(nets, images, dtype=dtype), batch,
                    dtype, (nets.ae, nets.optimizer), how == "compiled")
    cases = [variant(layout, dtype) for dtype in precisions(device)
             for layout in ("contiguous", "channels_last")]
    best = ("channels_last", "bf16") if cuda else ("contiguous", "fp32")
    cases.append(variant(*best, "recomputed"))
    if not args.quick:                                 # compiling takes minutes
        cases.append(variant(*best, "compiled"))
    table(args, f"alternatives: the step of f16d16, {size} px, batch {batch}; recomputed: "
          "--grad_checkpoint", cases)


def diffusion_alternatives(args, name, batch):
    """Precision, compilation, recomputation of the transformer's step."""
    hows, cases = {"eager": False, "compiled": True}, []
    if args.quick:
        del hows["compiled"]
    for dtype, how in itertools.product(precisions(args.device), hows):
        nets = diffusion_nets(name, args.device, compiled=hows[how])
        cases.append(diffusion_case(args, f"{dtype}, {how}", nets, batch, dtype, hows[how]))
    again = diffusion_nets(name, args.device)
    run.recompute(again.model, SiTBlock)
    cases.append(diffusion_case(args, f"{args.dtype}, eager, recomputed", again, batch))
    table(args, f"alternatives: the step of {name}, batch {batch}", cases)


def optimizers(args):
    """A step of each implementation of AdamW."""
    model = diffusion_nets("SiT-S/2" if args.quick else "SiT-B/2", args.device).model
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.randn_like(p)
    cases = []
    for label, options in (("fused", dict(fused=True)), ("foreach", dict(foreach=True)),
                           ("a loop over the parameters", dict(foreach=False))):
        optimizer = adamw(model, **options)
        cases.append(Case(f"AdamW, {label}", optimizer.step, holds=(model, optimizer)))
    title = f"alternatives: the optimiser, {len(trained)} tensors; a call is a step"
    rows = table(args, title, cases).values()
    size = 28 * sum(p.numel() for p in trained)
    rates = ", ".join(f"{size / row['ms'] / 1e6:,.1f} GB/s" for row in rows)
    print(f"  at 28 bytes a parameter: {rates}")


def spectra(args):
    """The low-pass and ESM, ours beside other ways to the same numbers."""
    device = args.device
    x = torch.rand(8, 3, 256, 256, device=device) * 2 - 1
    ours = lambda: lowpass(x, 10)
    there_and_back = lambda: block_idct2(block_dct2(x) * triangle_mask(10).to(device))
    torch.testing.assert_close(there_and_back(), ours(), atol=1e-5, rtol=0)
    table(args, "alternatives: low-pass of 8x3x256x256 in 8x8 tiles, n = 10",
          [Case("ours: one 64x64 operator a tile", ours, len(x)),
           Case("two 8x8 matmuls, mask, two more", there_and_back, len(x))])
    for f, C in ((8, 4), (16, 16)):
        z = torch.randn(8, C, 256 // f, 256 // f, device=device, requires_grad=True)
        torch.testing.assert_close(esm_loss(x, z), naive_esm(x, z), atol=1e-5, rtol=1e-3)
        ours = lambda z=z: torch.autograd.grad(esm_loss(x, z), z)
        naive = lambda z=z: torch.autograd.grad(naive_esm(x, z), z)
        table(args, f"alternatives: ESM on 8 images of 256 px, f{f}d{C}, forward and backward",
              [Case("ours: matrices", ours, len(x)),
               Case("blur, resize, FFT, a mask per ring", naive, len(x))])


def starts(args, steps=600):
    """
    PSNR on held-out built-in images after a short training of f2d4-tiny: same seed and batches,
    another start or other groups.
    """
    train, held_out = open_data(None, 32, val_images=128)
    images = torch.stack([held_out[i][0] for i in range(128)]).to(args.device) / 127.5 - 1
    print(f"\nalternatives: f2d4-tiny after {steps} steps on 8 built-in images each, --reg kl, "
          "seed 0")
    for name, groups, start in (
        ("ours: init_weights, 4 groups", 4, vae.init_weights),
        ("PyTorch's initialisation, 4 groups", 4, lambda module: None),
        # 32 do not divide its 16 channels
        ("init_weights, 16 groups of one channel", 16, vae.init_weights),
    ):
        config = dataclasses.replace(CONFIGS["f2d4-tiny"], norm_groups=groups)
        with (mock.patch.object(vae, "init_weights", start),
              mock.patch.dict(CONFIGS, {"f2d4-tiny": config})):
            nets = ae_nets("f2d4-tiny", args.device, extras=False)
        nets.optimizer.param_groups[0]["lr"] = 4e-3
        batches = train_batches(train, 8, device=args.device)
        for batch, _, _ in itertools.islice(batches, steps):
            ae_step(nets, batch, reg="kl")
        with torch.no_grad():
            recon = nets.ae.decode(nets.ae.encode(images).mode())
            value = metrics.psnr(recon, images).mean().item()
        print(f"{name:46}{value:>8.2f} dB", flush=True)
        args.rows.append(dict(table="alternatives: start", name=name, steps=steps, psnr=value))


# --------------------------------------------------------------------------------------------------
# Scaling on paper

def ae_gflop(name, steps):
    """Of training on one image, LPIPS throughout, the GAN from step 50,000: its steps alternate."""
    forward, disc = KNOWN[f"{name} encoder"] + KNOWN[f"{name} decoder"], KNOWN["PatchGAN"]
    ae_step = 3 * forward + 1.5 * KNOWN["LPIPS, a pair"]
    disc_step = forward + 6 * disc                     # no backward through the autoencoder
    late = (ae_step + 2 * disc + disc_step) / 2
    return (50_000 * ae_step + (steps - 50_000) * late) / steps


def costs(args, mfu=0.4):
    """
    The GUIDE's table: training FLOPs of each preset (forward KNOWN x 3, frozen networks x 1 and
    their gradient), hours at an ASSUMED share of the bf16 matmul rate, for no GPU was at hand;
    gradients, data and disk follow from sizes alone.
    """
    uvit, sit = 3 * KNOWN["UViT-S/2"], 3 * KNOWN["SiT-B/2"]
    packed, latent = 0.197, 0.0164                     # MB an image of 256 px
    print("\n| preset | TFLOP per image | total EFLOP | hours, 8 A100 | hours, 8 H200 | gradients "
          "per step | of them by NVLink / 100 Gb/s | data on 8 H200 |\n" + 8 * "|---" + "|")
    for name, gflop, steps, batch, parameters, megabytes in (
        ("train_ae, celeba-f16d16", ae_gflop("f16d16", 500_000), 500_000, 48, 64.4, packed),
        ("train_ae, celeba-f8d4", ae_gflop("f8d4", 500_000), 500_000, 48, 83.7, packed),
        ("train_ae, imagenet-f16d16", ae_gflop("f16d16", 600_000), 600_000, 128, 64.4, packed),
        ("train_diffusion, celeba-f16d16 (UViT-S/1)", uvit, 300_000, 256, 44.8, latent),
        ("train_diffusion, celeba-f8d4 (UViT-S/2)", uvit, 500_000, 256, 44.8, latent),
        ("train_diffusion, imagenet-f16d16 (SiT-B/1)", sit, 400_000, 256, 130.5, latent),
        ("train_diffusion, imagenet-repa (SiT-B/2)", sit + KNOWN["ViT-B/14"] + 3, 400_000, 256,
         130.5, packed),
    ):
        total = gflop * steps * batch / 1e9
        # seconds an image
        a100, h200 = (gflop * 1e9 / (8 * rate * mfu) for rate in (312e12, 790e12))
        hours = [seconds * steps * batch / 3600 for seconds in (a100, h200)]
        # bytes that a ring all-reduce sends per process
        ring = 2 * 7 / 8 * 4 * parameters * 1e6
        print(f"| {name} | {gflop / 1e3:.2f} | {total:.1f} | {hours[0]:.1f} | {hours[1]:.1f} | "
              f"{4 * parameters:.0f} MB | "
              f"{ring / 300e9 * 1e3:.1f} / {ring / 12.5e9 * 1e3:.0f} ms | "
              f"{1 / h200:,.0f} images/s, {megabytes / h200:,.0f} MB/s |")
    print(f"at an assumed {mfu:.0%} of 312 (A100) and 790 (H200) TFLOP/s in bf16. Disk: a packed "
          "set takes 0.197 MB an image of 256 px (ImageNet 252 GB, CelebA-HQ 5.9 GB), a latent "
          "cache 32.8 KB an image and its mirror at f16d16 or f8d4 (ImageNet 42 GB, CelebA-HQ 1 "
          "GB).")


def flat_average(parameters):
    """Gradients averaged after the backward pass, in one flat tensor."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    parts = (flat / torch.distributed.get_world_size()).split([g.numel() for g in gradients])
    for gradient, mean in zip(gradients, parts):
        gradient.copy_(mean.view_as(gradient))


def one_of_two(rank, port, repeats, out):
    """One process of section processes: both ways take turns; rank 0 sends its times to out."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run.init_distributed("cpu")
    ways = {}
    for name in ("flat all-reduce", "DistributedDataParallel"):
        torch.manual_seed(0)
        model = MODELS["SiT-S/2"](input_size=16, in_channels=4, num_classes=0)
        ddp = name.startswith("D")
        ways[name] = model, run.ddp(model, True) if ddp else model, ddp, []
    x = torch.randn(4, 4, 16, 16)
    for _ in range(repeats + 2):                       # two burn in
        for model, step_model, ddp, times in ways.values():
            torch.distributed.barrier()
            start = time.perf_counter()
            Interpolant().loss(step_model, x).backward()
            if not ddp:
                flat_average(list(model.parameters()))
            times.append(time.perf_counter() - start)
            model.zero_grad()
    if rank == 0:
        out.put({name: statistics.median(times[2:]) for name, (*_, times) in ways.items()})
    run.stop_processes()


def processes(args):
    """Forward and backward of SiT-S/2 with its gradients averaged, on two processes."""
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = context.SimpleQueue()
    pair = [context.Process(target=one_of_two, args=(rank, port, pick(args, 5, 15, 15), out))
            for rank in range(2)]
    for process in pair:
        process.start()
    seconds = out.get()
    for process in pair:
        process.join()
    print("\nprocesses: two of gloo, one thread each, SiT-S/2, 4 latents each")
    first = seconds["flat all-reduce"]
    for name, value in seconds.items():
        print(f"{name:46}{1e3 * value:>10,.1f} ms{value / first:>9.3g} of the first")
        args.rows.append(dict(table="processes", name=name, ms=1e3 * value))


SECTIONS = dict(theory=theory, costs=costs, off=off, ae=ae, diffusion=diffusion, encode=encode,
                sample=sample, load=load, eval=evaluation, processes=processes,
                alternatives=alternatives)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [*CONFIGS, *MODELS]
    parser.add_argument("--quick", action="store_true",
                        help="small batches and images, few repeats: three minutes on two cores")
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS),
                        metavar="NAME", help="default: all; those named above")
    parser.add_argument("--model", nargs="+", choices=models, default=models, metavar="NAME",
                        help="of sections ae and diffusion; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None,
                        help="default: cuda when there is a GPU")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default=None,
                        help="of the networks (default: bf16 on cuda, fp32 on cpu)")
    parser.add_argument("--compile", choices=("on", "off"), default=None,
                        help="torch.compile as the scripts do (default: on on cuda, off on cpu)")
    parser.add_argument("--repeats", type=int, default=None,
                        help="rounds a table (default: 2 if --quick, 3 on a CPU, 7 on cuda)")
    return parser.parse_args()


def hardware_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads"


def main():
    args = parse_args()
    start = time.perf_counter()
    args.device = run.init_distributed(args.device)[2]
    cuda = args.device.type == "cuda"
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    args.compile = (args.compile or ("on" if cuda else "off")) == "on"
    args.repeats = args.repeats or pick(args, 2, 3, 7)
    args.rows, args.targets = [], []
    hardware = hardware_name(args.device)
    args.h200 = "H200" in hardware and not args.quick  # whose targets these are
    how = "compiled" if args.compile else "eager"
    print(f"{hardware}; torch {torch.__version__}; {args.dtype}; {how}; medians of {args.repeats}",
          flush=True)
    for name in args.section:
        SECTIONS[name](args)
        if cuda:
            torch.cuda.empty_cache()
    missed = [t["target"] for t in args.targets if t["verdict"] != "ok"]
    which = f"; missed: {'; '.join(missed)}" if missed else ""
    seconds, count = time.perf_counter() - start, len(args.targets)
    print(f"\n{count - len(missed)} of {count} targets met{which}. {seconds:.0f} s")
    print(json.dumps(dict(
        hardware=hardware, torch=torch.__version__, device=args.device.type,
        threads=torch.get_num_threads(), dtype=args.dtype, compiled=args.compile, quick=args.quick,
        repeats=args.repeats, seconds=seconds, targets=args.targets, rows=args.rows)))


if __name__ == "__main__":
    main()
