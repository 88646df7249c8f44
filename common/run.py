"""
The machinery around a training loop: processes, random numbers, one optimiser step, what a run
writes, command lines.

Every draw of a step is a function of (seed, step), never of a generator's history, and is made for
the GLOBAL batch and then sliced: a resumed run, or one on another number of processes, continues
with the very same numbers. Checkpoints are plain dicts of tensors and plain values, which
torch.load(weights_only=True) reads on any device.
"""
import argparse
import contextlib
import datetime
import functools
import gc
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from filelock import FileLock, Timeout
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]             # of this project
DEVICES = "cpu", "cuda", "mps"

# --------------------------------------------------------------------------------------------------
# Processes: one per GPU under torchrun (NCCL), per CPU worker (gloo), or a single plain `python`

def init_distributed(kind=None):
    """
    Join torchrun's process group, if any, for one of DEVICES or None (CUDA when there is a GPU).
    returns  (rank, world, torch.device); tensors on CUDA travel by NCCL, those on the CPU by gloo
    """
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    need(there[kind or "cpu"], f"--device {kind}: PyTorch sees no such device here")
    torch.backends.cudnn.allow_tf32 = False            # where float32 is written, float32 is meant
    device = torch.device(kind or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "RANK" not in os.environ:
        return 0, 1, device
    if "SLURM_LOCALID" in os.environ:                  # srun, with RANK and WORLD_SIZE given
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    need(not missing, f"RANK is set, which means several processes, but not {', '.join(missing)}; "
         "start the script with torchrun, or unset RANK for one process")
    group = dict(backend="gloo", timeout=datetime.timedelta(hours=2))  # rank 0 may download alone
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        group |= dict(backend="cpu:gloo,cuda:nccl", device_id=device)
    dist.init_process_group(**group)
    return dist.get_rank(), dist.get_world_size(), device


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def printable(text):
    """Control characters, which a terminal would obey, as \\x1b, \\n."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print0(text):
    """Print a line on rank 0."""
    if get_rank() == 0:
        print(printable(text), flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def local_rank_zero_first():
    """The first process of a node runs the block before the others: one download, many readers."""
    first = not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:                                      # also when it failed: the others wait
            barrier()


def all_gather(value):
    """The plain values of all processes, by rank."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(function):
    """function() on rank 0, its plain value on all: each node may hold the data elsewhere."""
    return all_gather(function() if get_rank() == 0 else None)[0]


def all_sum(tensor):
    """Sum of a tensor over the processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """The mean of a tensor over the processes; the tensor itself if there is one."""
    return all_sum(tensor.clone()) / get_world_size() if dist.is_initialized() else tensor


def need_one_node(what):
    """ValueError if several nodes would write `what` into one memory map: NFS may lose bytes."""
    need(len(set(all_gather(platform.node()))) == 1, f"{what}: only the processes of one node can "
         "write it; make it with torchrun --nnodes=1 first, then start this again")


def ddp(network, static_graph=False):
    """
    Wrap a network in DistributedDataParallel; without torchrun, or for None, return it unchanged.
    static_graph: promise DDP that every step runs the same graph and backward only once.
    """
    if network is None or not dist.is_initialized():
        return network
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated")    # since torch 2.14
    return DistributedDataParallel(network, broadcast_buffers=False, static_graph=static_graph,
                                   gradient_as_bucket_view=True)


class Interrupt:
    """
    SIGTERM (which clusters send before they take a machine away), Ctrl-C and a closed terminal no
    longer kill the process: the loop asks, saves and leaves. A second Ctrl-C ends it at once.
    """

    def __init__(self):
        self.name = None
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, signal.SIGTERM)         # Windows has no SIGHUP
            if signal.getsignal(number) != signal.SIG_IGN:         # nohup ignores it: so be it
                signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def asked(self, step):
        """True on all processes once one got a signal; several ask each other every tenth step."""
        if dist.is_initialized() and step % 10:
            return False
        found = [name for name in all_gather(self.name) if name]       # by CPU: no GPU waits
        if found:
            print0(f"{found[0]}: stopped before step {step}; the same command with --resume "
                   "continues")
        return bool(found)


# --------------------------------------------------------------------------------------------------
# Device choices, random numbers, one optimiser step

def device_choices(args, device, fixed_size=True):
    """
    What differs between a CPU and a GPU: --dtype and --compile where not given, cuDNN's modes.
    Fills in args; returns the autocast context. fixed_size: images of one size, so that cuDNN may
    try out its algorithms once.
    """
    cuda = device.type == "cuda"
    need(device.type != "mps" or args.dtype != "bf16" and args.compile != "on",
         "--device mps: takes neither --dtype bf16 nor --compile on")
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    args.compile = args.compile or ("on" if cuda else "off")
    if args.compile == "on" and not shutil.which(os.environ.get("CXX", "g++")):
        args.compile = "off"
        print0("--compile on: no C++ compiler (g++ or CXX) here, so nothing is compiled")
    torch.backends.cudnn.allow_tf32 = args.dtype == "bf16"     # LPIPS, encoding: outside autocast
    torch.backends.cudnn.benchmark = cuda and fixed_size
    if args.compile == "on":
        print0("compiling the networks at the first step takes minutes; not with --compile off")
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")


def print_run(args, world, device):
    """What is trained how, in a line: that no learning rate was rescaled, above all."""
    print0(f"global batch {args.batch_size} = {world} x {args.batch_size // world} on "
           f"{device.type} in {args.dtype}; learning rate {args.lr:g}, not rescaled; "
           f"{args.steps:,} steps -> {args.out}")


def progress_bar(args, start_step):
    """Of the steps of a run, on rank 0 of a terminal."""
    return tqdm(total=args.steps, initial=start_step, unit="img", unit_scale=args.batch_size,
                disable=get_rank() > 0 or not (sys.stderr and sys.stderr.isatty()))


def step_seed(seed, step):
    """A well-mixed 63-bit seed for one step of one run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sharded(draw, shape, generator, rank, world):
    """torch.randn or torch.rand for the global batch, world * b; returns this rank's (b, ...)."""
    b = shape[0]
    values = draw(world * b, *shape[1:], generator=generator, device=generator.device)
    return values[rank * b:(rank + 1) * b]


def checkpoint_activations(network, kinds):
    """Blocks of these classes recompute their activations in the backward pass, to save memory."""
    for block in network.modules():
        if isinstance(block, kinds):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                              use_reentrant=False)


def optimizer_step(optimizer, lr, clip_grad, finite):
    """
    Clip the gradients to the norm clip_grad (0 = off), step, zero. Returns the norm. A step whose
    loss (`finite`, a bool tensor, is false) or norm is not finite is skipped: weights, moments and
    step count stay as they were. Fused AdamW decides that on the device, by the found_inf flag that
    GradScaler uses, so the host does not wait.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = lr
    good = finite & norm.isfinite()
    optimizer.found_inf = 1.0 - good.float()
    if norm.device.type != "mps" or good:              # the mps kernel does not read found_inf
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class EMA:
    """
    Exponential moving average of a model's parameters and buffers, float32.
    warmup   at update t the decay is min(decay, (1 + t) / (10 + t)): it forgets the start early
    """

    def __init__(self, model, decay=0.9999, warmup=True):
        self.decay, self.warmup = decay, warmup
        current = model.state_dict()                   # the model's own memory, now and later
        self.shadow = {k: v.detach().clone() for k, v in current.items()}
        floats = [k for k, v in current.items() if v.is_floating_point()]
        self.pairs = [self.shadow[k] for k in floats], [current[k] for k in floats]

    def state_dict(self):
        return self.shadow

    def load_state_dict(self, state):
        for name, value in self.shadow.items():
            value.copy_(state[name])

    @torch.no_grad()
    def update(self, step):
        """step: optimiser steps done before this one, 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(*self.pairs, 1 - decay)


# --------------------------------------------------------------------------------------------------
# What a run writes into --out: ckpt.pt, kept checkpoints, log.jsonl

def write_atomic(path, write):
    """write(binary file) beside path, renamed to path once it is whole; OSError in one line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:           # RuntimeError: torch.save, after an OSError
        raise OSError(f"{path}: cannot be written ({reason(error.__context__ or error)}); what was "
                      "there before is whole; make room or name another place") from None
    finally:
        temporary.unlink(missing_ok=True)


def finite(state):
    """Whether all tensors in nested dicts are finite."""
    if isinstance(state, dict):
        return all(map(finite, state.values()))
    return not torch.is_tensor(state) or bool(state.isfinite().all())


def save_checkpoint(path, state, keep_every=-1):
    """A dict of tensors and plain values to path; every so many steps also to <name>_<step>.pt."""
    if not finite(state):                              # takes no good checkpoint's place
        print(f"step {state['step']}: weights or moments are not finite, so {path} stays as it was",
              file=sys.stderr, flush=True)
        return
    write_atomic(path, lambda file: torch.save(state, file))
    if keep_every > 0 and state["step"] % keep_every == 0:
        kept = Path(path).with_stem(f"{Path(path).stem}_{state['step']}")
        write_atomic(kept, lambda file: torch.save(state, file))


def check_archive(path):
    """ValueError if a file of torch.save is damaged: torch.load compares no checksums."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        need(damaged is None, f"damaged on the disk, wrong checksum of {damaged!r}")


def load_checkpoint(path, stage):
    """A checkpoint of this project as a dict on the CPU. stage: "ae" or "diffusion"."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint.get("stage")
    except Exception as error:                         # a foreign file breaks this in any way
        raise ValueError(f"{path}: not a readable checkpoint ({reason(error)})") from None
    need(found == stage, f"{path}: holds stage {found!r}, expected stage {stage!r}")
    return checkpoint


@contextlib.contextmanager
def file_lock(path, wait=True):
    """Hold the lock file at path. wait for a process that holds it, or ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        need(wait, f"--out {path.parent}: another process is writing there; wait for it, or name "
             "another folder")
        print(f"{path}: another process holds this lock; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):             # Windows removes no open file
            path.unlink()                              # before the release: who waits looks again
        lock.release()


locks = contextlib.ExitStack()         # of this process' run, until it ends

# Flags that may change when a run is resumed: where and how fast it runs, how long it lasts, what
# it reports. Whether images and autoencoder are the same is decided by their content.
FREE = ("out resume overwrite preset device dtype compile grad_checkpoint grad_accum workers steps "
        "log_every eval_every keep_every track encoder_source data ae cache encode_batch "
        "sample_steps cfg").split()


def open_run(args, stage, identity):
    """
    The checkpoint from which --resume continues the run in --out, or None for a fresh start.
    identity  {"images": hash, ...}: what the run depends on, known by its content
    raises    ValueError if a run there would be lost, or naming every flag that contradicts it
    """
    path = Path(args.out, "ckpt.pt")
    kept = [*path.parent.glob("ckpt_*.pt")]
    need(args.overwrite or (args.resume if path.exists() else not kept), f"--out {args.out}: holds "
         "a run already; --resume continues it from its ckpt.pt, --overwrite replaces it")
    if get_rank() == 0:
        locks.close()                                  # of an earlier run of the same process
        locks.enter_context(file_lock(path.with_name(".lock"), wait=False))
    checkpoint, step = None, 0
    if args.resume and path.exists():
        checkpoint = load_checkpoint(path, stage)
        saved, step = checkpoint["args"], checkpoint["step"]
        changed = [f"--{k} {v} (was {saved[k]})" for k, v in vars(args).items()
                   if k in saved and k not in FREE and saved[k] != v]
        need(not changed, f"--resume: {path} was made with other flags: {', '.join(changed)}; give "
             "the same ones or another --out")
        other = [name for name, value in identity.items() if checkpoint.get(name) != value]
        need(not other, f"--resume: {' and '.join(other)}: not what {path} was trained on")
        need(step <= args.steps, f"--steps {args.steps}: {args.out} has {step} steps behind it")
        print0(f"resuming {args.out} at step {step}")
    steps = all_gather(step)                           # each node reads its own disk
    need(len(set(steps)) == 1, f"--resume: processes find {args.out} at steps {steps}, rank by "
         "rank; give every node the same checkpoint, or --out on a disk that all can read")
    return checkpoint


def restore(checkpoint, parts):
    """
    Load checkpoint[name] into each of parts, {name: module, optimiser or EMA}. Call it after
    channels_last is applied to the modules.
    """
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
        # Moments get the memory layout of their parameters. A file keeps the strides that it was
        # saved with, and a run may be resumed with another choice of channels_last: fused kernels
        # would then silently pair moments with the wrong weights.
        for parameter, state in getattr(part, "state", {}).items():
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter).copy_(value)


def save_on_error(batches, start_step, save):
    """The batches; if the next one fails (a loader was killed, images are gone), save first."""
    for step in itertools.count(start_step):
        try:
            batch = next(batches)
        except (ValueError, OSError):
            if get_world_size() == 1:                  # others would have to join in
                save(step)
            raise
        yield batch


def checkpoints(place, preset, flag):
    """The ckpt.pt of every run of a preset in out/`place`; FileNotFoundError, naming the others."""
    found = sorted(map(str, Path().glob(f"out/{place}/{preset}-*/ckpt.pt")))
    if not found:
        others = sorted(map(str, Path().glob(f"out/{place}/*/ckpt.pt"))) or ["another file"]
        raise FileNotFoundError(f"{flag}: no out/{place}/{preset}-*/ckpt.pt here; train one, name "
                                f"its --preset, or give {flag} {' or '.join(others)}")
    return found


def newest(place, preset, flag):
    """The one of `checkpoints` that was written last, with a line that names it."""
    found = sorted(checkpoints(place, preset, flag), key=os.path.getmtime)
    if os.environ.get("RANK", "0") == "0":
        print(f"{flag} {found[-1]}, the newest of {len(found)}", flush=True)
    return found[-1]


def run_name(path):
    """A checkpoint's name in folders and legends: its run's folder for ckpt.pt, else its own."""
    path = Path(path).resolve()
    if path.name == "ckpt.pt":
        return path.parent.name
    # not the .5 of v1.5
    return path.stem if re.match(r"\.(ckpt|bin|safetensors|sft|pth?)$", path.suffix) else path.name


def checkpoint_args(path):
    """Flags and hash of the images of train_ae.py's run at path, a file or folder; else {}."""
    kept = sorted(Path(path).glob("*.pt"))             # of a folder: ckpt.pt, or the only one
    path = kept[0] if len(kept) == 1 else Path(path, "ckpt.pt") if os.path.isdir(path) else path
    with contextlib.suppress(ValueError, OSError):
        checkpoint = load_checkpoint(path, "ae")
        return checkpoint["args"] | dict(images=checkpoint.get("images"))
    return {}


class Log:
    """
    log.jsonl, written by rank 0: one JSON object per line, each with its step. `add` keeps every
    micro-batch's terms on their device; they are averaged over steps and processes when a line is
    due, so that the host waits for the GPU only then. Call every method on all ranks.
    state   of the checkpoint: the sums that had not been written. Lines from start_step on are
            dropped, since the resumed run writes them again; a fresh start removes the old run's
            checkpoints
    track   also called with every line's step and values, see open_tracker
    """

    def __init__(self, path, start_step=0, state=None, track=lambda step, values: None):
        self.path, self.track = Path(path), track
        self.pending = []                              # (step, name, value), values on the device
        # by name [sum, count] since the last line, and for how many steps it was not finite
        self.counts = state or dict(sums={}, bad={}, skipped=0)
        if get_rank() > 0:
            return
        kept = []
        if start_step and self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):     # cut by a crash
                    if json.loads(line)["step"] < start_step:
                        kept.append(line + "\n")
        stale = [".*.tmp"] if start_step else [".*.tmp", "ckpt.pt", "ckpt_*.pt"]
        for left in itertools.chain(*map(self.path.parent.glob, stale)):
            left.unlink()
        write_atomic(self.path, lambda file: file.write("".join(kept).encode()))

    def add(self, step, terms):
        """terms: {name: scalar tensor}, the same names on all processes."""
        self.pending += [(step, name, value.detach().float()) for name, value in terms.items()]

    def finite(self, step):
        """A bool tensor: is everything added for this step finite, on all processes?"""
        values = torch.stack([value for at, _, value in self.pending if at == step])
        return all_mean(values.isfinite().all().float()) == 1

    def write(self, step, **values):
        """Write a line with these values, by default the means since the last such line."""
        sums = self.state()["sums"]
        if not values:
            values = {name: total / count for name, (total, count) in sums.items() if count}
            sums.clear()
        if get_rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self.track(step, values)
        return values

    def state(self):
        """
        Reduce what was added over the processes. Returns the sums since the last line of means, for
        `write` and for checkpoints. Steps with NaN or Inf get a line of their own.
        """
        if not self.pending:
            return self.counts
        values = torch.stack([value for *_, value in self.pending])                     # (n,)
        finite = values.isfinite()
        totals = torch.stack([values.where(finite, values.new_zeros(())), finite.float()])
        totals = all_sum(totals).T.tolist()            # the one wait for the device
        steps, sums, streaks = {}, self.counts["sums"], self.counts["bad"]
        for (step, name, _), (total, count) in zip(self.pending, totals):
            before = sums.get(name, (0.0, 0.0))
            sums[name] = [before[0] + total, before[1] + count]
            bad = steps.setdefault(step, {})           # {name: in any of the step's micro-batches}
            bad[name] = bad.get(name, False) or count < get_world_size()
        self.pending = []
        for step, bad in steps.items():
            names = sorted(filter(bad.get, bad))
            for name in bad:                           # a GAN's two kinds of steps have their own
                streaks[name] = streaks.get(name, 0) + 1 if bad[name] else 0
            if names:
                self.counts["skipped"] += 1
                self.write(step, not_finite=names, skipped=self.counts["skipped"])
            need(max(streaks.values()) < 10, f"step {step}: {', '.join(names)} not finite, 10 "
                 f"steps in a row; nothing was learned from them, {self.path.parent}/ckpt.pt is "
                 "older: --resume with --dtype fp32, or begin another --out with a lower --lr")
        return self.counts


def open_tracker(args, start_step):
    """
    --track: a function of (step, {name: number or path of an image}), which on ranks above 0 and
    without --track does nothing. A run that is resumed at start_step continues its curves.
    """
    if not args.track or get_rank() > 0:
        return lambda step, values: None
    try:
        if args.track == "wandb":
            import wandb
            file = Path(args.out, "wandb_id.txt")
            known = file.read_text() if start_step and file.exists() else None
            tracked = wandb.init(project="spectrum-matching", dir=args.out, config=vars(args),
                                 id=known, resume="allow")
            file.write_text(tracked.id)
        else:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(args.out, purge_step=start_step)
            writer.add_text("flags", json.dumps(vars(args), indent=4), start_step)
    except ImportError:
        raise ValueError(f"--track {args.track}: needs `pip install {args.track}`") from None

    def track(step, values):
        images = {name: value for name, value in values.items() if isinstance(value, str)}
        values = {name: value for name, value in values.items() if isinstance(value, float)}
        if args.track == "wandb":
            tracked.log(values | {name: wandb.Image(path) for name, path in images.items()}, step)
            return
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        for name, path in images.items():
            writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")
    return track


def usage(images, start_time, device):
    """Images per second since start_time (time.perf_counter); peak memory of GPU or else host."""
    memory = float("nan")
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    elif os.name == "posix":
        import resource  # not on Windows
        unit = 1 if sys.platform == "darwin" else 1024                 # macOS counts bytes
        memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(images_per_s=images / (time.perf_counter() - start_time), memory_GB=memory / 1e9)


# --------------------------------------------------------------------------------------------------
# Command lines

class Help(argparse.RawDescriptionHelpFormatter):
    """--help with every default; a flag without one says in its own words what happens."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        return action.help.partition(" (default")[0] + " (default: %(default)s)"


def add_run_flags(parser):
    """The flags that both training scripts share."""
    add = parser.add_argument
    add("--resume", action="store_true", help="continue the run in --out, or start it")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--seed", type=int, default=0, help="of weights, data order and every draw, >= 0")
    add("--device", choices=DEVICES, help="mps: an Apple GPU (default: cuda if there is one)")
    add("--dtype", choices=("fp32", "bf16"), help="(default: bf16 on cuda, fp32 on cpu)")
    add("--compile", choices=("on", "off"), help="torch.compile the networks (default: on on cuda, "
        "but for --reg eq, se and vf; off on cpu)")
    add("--grad_checkpoint", action="store_true", help="compute blocks twice to save memory")
    add("--grad_accum", type=int, default=1, help="micro-batches per step, to save memory")
    add("--workers", type=int, default=8, help="loader processes per training process")
    add("--log_every", type=int, default=100, help="steps between lines of log.jsonl")
    add("--track", choices=("tensorboard", "wandb"), help="also show log.jsonl, figures, memory "
        "and speed there (default: log.jsonl alone)")
    add("--encoder_source", help="a folder with hubconf.py, such as a clone of "
        "facebookresearch/dinov2, or random (for tests) (default: torch.hub)")


def parse_args(parser, presets):
    """The flags; --preset NAME sets defaults, presets = {NAME: {flag: value}}."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    parser.set_defaults(**presets.get(first.parse_known_args()[0].preset, {}))
    parser.error = lambda message: parser.exit(        # one line, as for every other mistake
        2, f"{parser.prog}: {message}; {parser.prog} --help lists the flags\n")
    return parser.parse_args()


def need(condition, message):
    """ValueError(message) unless condition: how a script checks its flags."""
    if not condition:
        raise ValueError(message)


def need_range(args, low, high, *names):
    """ValueError naming the first of these flags that is not finite or outside [low, high]."""
    for name in names:
        value = getattr(args, name)
        need(low <= value <= high and value < float("inf"),
             f"--{name} {value}: must be finite and lie in {low}..{high}")


def check_run_flags(args, world):
    """ValueError on the first flag of both training scripts that cannot work."""
    need_range(args, 1, 2 ** 31, "grad_accum", "batch_size", "log_every", "eval_every")
    need_range(args, 0, 2 ** 63 - 1, "seed", "workers", "steps", "warmup_steps")
    need_range(args, 0, float("inf"), "weight_decay", "clip_grad")
    need(0 < args.lr < float("inf"), f"--lr {args.lr}: must be above 0 and finite")
    need(args.batch_size % (world * args.grad_accum) == 0, f"--batch_size {args.batch_size}: must "
         f"divide by {world} processes times --grad_accum {args.grad_accum}")
    need(not (args.resume and args.overwrite), "--resume --overwrite: choose one of them")
    need(args.keep_every < 1 or args.keep_every % args.eval_every == 0,
         f"--keep_every {args.keep_every}: must be a multiple of --eval_every {args.eval_every}")
    for name in ("ae", "init", "data"):                # --overwrite would destroy an input
        place = Path(getattr(args, name, None) or "/").resolve()
        need(Path(args.out).resolve() not in (place, place.parent),
             f"--out {args.out}: holds --{name} {place}; name another folder")


def reason(error):
    """Why a file could not be read, in one line, without the advice to unpickle it all the same."""
    if type(error).__name__ == "UnidentifiedImageError":   # PIL's own words are an address
        return "not an image"
    if "allow_pickle" in str(error) or "weights_only" in str(error).lower():
        return "holds more than plain data, of which nothing is run"
    return " ".join(str(error).split())[:200] or type(error).__name__


class Output(io.TextIOWrapper):
    """A standard stream whose reader may go away, which ends no run: log.jsonl has it all."""

    def write(self, text):
        with contextlib.suppress(OSError):
            super().write(text)
            super().flush()

    def flush(self):
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def one_line_errors():
    """
    Around main: a ValueError of this project's own code, or an OSError about a file, is a message
    to the user: one line, exit code 2. A library's is a bug and keeps its traceback.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and stream is getattr(sys, f"__{name}__"):       # not a notebook's
            wrapped = Output(stream.detach(), stream.encoding, "backslashreplace")
            setattr(sys, name, wrapped)
    try:
        yield
        if dist.is_initialized():                      # not after an error: it would wait
            gc.collect()                               # DistributedDataParallel holds itself, and
            barrier()                                  # may not outlive its group
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        library = "site-packages" in place.parts or ROOT not in place.parents
        if library and not getattr(error, "filename", None):
            raise
        if get_rank() > 0:
            time.sleep(5)                              # rank 0 most often says the same, and
        message = printable(" ".join(str(error).splitlines()))     # torchrun then ends us
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        locks.close()
