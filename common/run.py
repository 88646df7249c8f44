"""
Everything around the training loop: processes, random numbers, the optimiser step, checkpoints and
logs, command lines.

Every random draw is a function of (seed, step), not of a generator's history, and is made for the
GLOBAL batch and then sliced: a resumed run, or one on another number of processes, uses exactly the
same numbers. Checkpoints are dicts of tensors and plain Python values, which
torch.load(weights_only=True) reads on any device.
"""
import argparse
import contextlib
import datetime
import functools
import gc
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
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from filelock import FileLock, Timeout
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]             # the project's folder
DEVICES = "cpu", "cuda", "mps"

# --------------------------------------------------------------------------------------------------
# Processes: under torchrun one per GPU (NCCL) or several on CPUs (gloo); otherwise a single one

def init_distributed(kind=None):
    """Join torchrun's process group, if any; returns (rank, world, device). kind: --device."""
    usable = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    need(usable[kind or "cpu"], f"--device {kind}: PyTorch sees no such device")
    torch.backends.cudnn.allow_tf32 = False            # float32 means float32
    device = torch.device(kind or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "RANK" not in os.environ:
        return 0, 1, device
    if "SLURM_LOCALID" in os.environ:                  # srun instead of torchrun
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    need(not missing, "RANK is set for several processes, but these variables are missing: "
         f"{', '.join(missing)}; start the script with torchrun, or unset RANK to run one process")
    group = dict(backend="gloo", timeout=datetime.timedelta(hours=2))  # rank 0 may be downloading
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
    """Escape control characters, which a terminal would interpret: \\x1b, \\n."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print0(text):
    """Print a line on rank 0, above progress bars."""
    if get_rank() == 0:
        try:
            tqdm.write(printable(text))
            sys.stdout.flush()
        except OSError:                                # a closed pipe or terminal ends no run
            sys.stdout = open(os.devnull, "w")


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def local_rank_zero_first():
    """Each node's first process runs the block before the others: one download per node."""
    first = not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:                                      # also on failure: the others are waiting
            barrier()


def all_gather(value):
    """List of every process's value, a plain Python object, by rank."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(function):
    """function() called on rank 0 only, its value on all ranks: files may differ between nodes."""
    return all_gather(function() if get_rank() == 0 else None)[0]


def same_on_all_ranks(what, value):
    """The value that all processes have; those with None get it. ValueError if they differ."""
    values = set(all_gather(value)) - {None}
    need(len(values) == 1, f"{what}: differs between the processes; give each node the same files, "
         "and replace none while they are read")
    return values.pop()


def same_on_all_nodes(what, function):
    """function() called once per node, its value on all processes; ValueError if nodes differ."""
    first = not dist.is_initialized() or int(os.environ["LOCAL_RANK"]) == 0
    return same_on_all_ranks(what, function() if first else None)


def all_sum(tensor):
    """Sum of a tensor over the processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """Mean of a tensor over the processes; the tensor itself if there is only one."""
    return all_sum(tensor.clone()) / get_world_size() if dist.is_initialized() else tensor


def need_one_node(what):
    """ValueError if several nodes would write `what` through a memory map: NFS may lose bytes."""
    need(len(set(all_gather(platform.node()))) == 1, f"{what}: can only be written by processes of "
         "one node; create it with torchrun --nnodes=1 first, then run this command again")


def ddp(network, static_graph=False):
    """
    Wrap a network in DistributedDataParallel; without torchrun, or for None, return it as is.
    static_graph: every step runs the same graph, and backward only once.
    """
    if network is None or not dist.is_initialized():
        return network
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated")    # since torch 2.14
    return DistributedDataParallel(network, broadcast_buffers=False, static_graph=static_graph,
                                   gradient_as_bucket_view=True)


class Interrupt:
    """
    SIGTERM (which clusters send before they pre-empt a job), Ctrl-C and a closed terminal no longer
    kill the process: the loop calls asked(), saves and exits. A second Ctrl-C ends it at once.
    """

    def __init__(self):
        self.name = None
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, signal.SIGTERM)         # Windows has no SIGHUP
            if signal.getsignal(number) != signal.SIG_IGN:         # nohup: SIGHUP stays ignored
                signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def asked(self, step):
        """True on all ranks once one got a signal; under torchrun, checked every tenth step."""
        if dist.is_initialized() and step % 10:
            return False
        found = [name for name in all_gather(self.name) if name]       # by gloo: no wait for a GPU
        if found:
            print0(f"{found[0]}: stopped before step {step}; the same command with --resume "
                   "continues")
        return bool(found)


# --------------------------------------------------------------------------------------------------
# Device choices, random numbers, one optimiser step

def default_dtype(device):
    """bf16 on GPUs that compute in it (NVIDIA: Ampere or newer), else fp32."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp32"


def device_choices(args, device, fixed_size=True):
    """Fill in --dtype and --compile, set cuDNN's modes; returns the autocast context."""
    cuda = device.type == "cuda"
    need(device.type != "mps" or args.dtype != "bf16" and args.compile != "on",
         "--device mps: supports neither --dtype bf16 nor --compile on")
    args.dtype = args.dtype or default_dtype(device)
    args.compile = args.compile or ("on" if cuda else "off")
    if args.compile == "on" and not shutil.which(os.environ.get("CXX", "g++")):
        args.compile = "off"
        print0("--compile on: found no C++ compiler (g++ or CXX), so nothing is compiled")
    torch.backends.cudnn.allow_tf32 = args.dtype == "bf16"     # LPIPS, encoding: outside autocast
    torch.backends.cudnn.benchmark = cuda and fixed_size       # it compares algorithms per size
    if args.compile == "on":
        print0("compiling the networks in the first step takes minutes; --compile off avoids it")
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")


def print_run(args, world, device):
    """Print batch size, device, learning rate (not rescaled) and steps in one line."""
    print0(f"global batch {args.batch_size} = {world} x {args.batch_size // world} on "
           f"{device.type} in {args.dtype}; learning rate {args.lr:g}, not rescaled; "
           f"{args.steps:,} steps -> {args.out}")


def progress_bar(args, start_step):
    """Progress bar over the steps of a run, on rank 0, if stderr is a terminal."""
    return tqdm(total=args.steps, initial=start_step, unit="img", unit_scale=args.batch_size,
                disable=get_rank() > 0 or None)        # None: only in a terminal


def step_seed(seed, step):
    """A well-mixed 63-bit seed for one step of one run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sharded(draw, shape, generator, rank, world):
    """Call draw, torch.randn or torch.rand, for the global batch; return this rank's (b, ...)."""
    b = shape[0]
    values = draw(world * b, *shape[1:], generator=generator, device=generator.device)
    return values[rank * b:(rank + 1) * b]


def checkpoint_activations(network, kinds):
    """Make blocks of these classes recompute activations in the backward pass, to save memory."""
    for block in network.modules():
        if isinstance(block, kinds):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                              use_reentrant=False)


def optimizer_step(optimizer, lr, clip_grad, finite):
    """Clip gradients to norm clip_grad (0 = off), step if finite, zero them; returns the norm."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = lr
    good = finite & norm.isfinite()                    # else weights, moments, step count stay
    optimizer.found_inf = 1.0 - good.float()           # read on the device: the host never waits
    if norm.device.type != "mps" or good:              # the mps kernel does not read found_inf
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, in place: two networks of one architecture."""
    torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - decay)


# --------------------------------------------------------------------------------------------------
# The files of a run in --out: ckpt.pt, kept checkpoints, log.jsonl

def write_atomic(path, write):
    """Call write(file) on a temporary binary file, then rename it to path; OSError if it fails."""
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
        raise OSError(f"{path}: cannot be written ({reason(error.__context__ or error)}); an older "
                      "version is intact; free disk space or choose another path") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, state, keep_every=-1):
    """Save a dict of tensors and plain values to path; keep_every: also to <name>_<step>.pt."""
    tensors = filter(torch.is_tensor, torch.utils._pytree.tree_leaves(state))
    if not all(tensor.isfinite().all() for tensor in tensors):     # must not replace a good one
        print(f"step {state['step']}: weights or moments are not finite, so {path} is not replaced",
              file=sys.stderr, flush=True)
        return
    write_atomic(path, lambda file: torch.save(state, file))
    if keep_every > 0 and state["step"] % keep_every == 0:
        kept = Path(path).with_stem(f"{Path(path).stem}_{state['step']}")
        write_atomic(kept, lambda file: torch.save(state, file))


# Classes that training scripts pickle along with weights: replaced by stubs, never run.
ALLOWED_GLOBALS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|ml_collections|easydict|numpy"
    r"|datetime|pathlib|torch\.optim)\..+|collections\.defaultdict|argparse\.Namespace"
    r"|types\.SimpleNamespace|typing\.Any|torch\.torch_version\.TorchVersion"
    r"|builtins\.(dict|list|tuple|set|frozenset|slice|Ellipsis|int|float|str|bool)")


class Stub:
    __init__ = __setstate__ = lambda self, *args: None


class DictStub:             # the unpickler only fills plain dictionaries
    __new__ = lambda cls, *args: OrderedDict()


def read_weights(path):
    """
    The contents of a safetensors or torch.save file, on the CPU; code in it is never run.
    ValueError if it is neither, or damaged: torch.load does not verify checksums.
    """
    try:
        with open(path, "rb") as file:                 # not the path: torch.load uses its suffix
            if file.read(9)[8:] == b"{":               # 8-byte length, then JSON
                from safetensors.torch import load_file  # optional: only these files need it
                return load_file(path)
            stubs = []
            if zipfile.is_zipfile(file):
                damaged = zipfile.ZipFile(file).testzip()
                need(damaged is None, f"damaged on disk, wrong checksum of {damaged!r}")
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                stubs = [(DictStub if name.lower().endswith("dict") else Stub, name)
                         for name in names if ALLOWED_GLOBALS.fullmatch(name)]
            file.seek(0)
            with torch.serialization.safe_globals(stubs):
                return torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path}: reading it needs `pip install safetensors`") from None
    except Exception as error:                         # a damaged file can raise any exception
        raise ValueError(f"{path}: not a complete file of weights ({reason(error)})") from None


def load_checkpoint(path, stage):
    """Load a checkpoint of this project to the CPU, as a dict. stage: "ae" or "diffusion"."""
    checkpoint = read_weights(path)
    found = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    need(found == stage, f"{path}: holds stage {found!r}, expected stage {stage!r}")
    return checkpoint


@contextlib.contextmanager
def file_lock(path, wait=True):
    """Hold the lock file at path. If another process holds it: wait, or ValueError if not wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        need(wait, f"--out {path.parent}: another process is writing there; wait for it, or choose "
             "another folder")
        print(f"{path}: another process holds this lock; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):             # Windows cannot remove an open file
            path.unlink()                              # before release: waiting processes reopen it
        lock.release()


locks = contextlib.ExitStack()         # holds the lock of this process's run until it ends

# Flags that may change when a run is resumed: where and how fast it runs, how long it lasts, what
# it reports. Images and autoencoder may move: they are compared by content.
MAY_CHANGE = ("out resume overwrite preset device dtype compile grad_checkpoint grad_accum workers "
              "steps log_every eval_every keep_every track encoder_source data ae cache "
              "encode_batch sample_steps cfg").split()


def open_run(args, stage, identity):
    """
    The checkpoint from which --resume continues the run in --out and its step; or None and 0.
    identity  {"images": hash, ...}: content hashes of the inputs that the run depends on
    raises    ValueError if it would replace a run, or if flags contradict it, naming all of them
    """
    path = Path(args.out, "ckpt.pt")
    kept = [*path.parent.glob("ckpt_*.pt")]
    need(args.overwrite or (args.resume if path.exists() else not kept), f"--out {args.out}: holds "
         "a run already; --resume continues it from its ckpt.pt, --overwrite replaces it")
    if get_rank() == 0:
        locks.close()                                  # of an earlier run in the same process
        locks.enter_context(file_lock(path.with_name(".lock"), wait=False))
    checkpoint, step = None, 0
    if args.resume and path.exists():
        checkpoint = load_checkpoint(path, stage)
        saved, step = checkpoint["args"], checkpoint["step"]
        changed = [f"--{k} {v} (was {saved[k]})" for k, v in vars(args).items()
                   if k in saved and k not in MAY_CHANGE and saved[k] != v]
        need(not changed, f"--resume: {path} was made with other flags: {', '.join(changed)}; use "
             "the same ones or another --out")
        other = [name for name, value in identity.items() if checkpoint.get(name) != value]
        need(not other, f"--resume: {' and '.join(other)}: not what {path} was trained on")
        need(step <= args.steps, f"--steps {args.steps}: {args.out} has {step} steps behind it")
        print0(f"resuming {args.out} at step {step}")
    same_on_all_ranks(f"--resume: the step of {path}", step)           # each reads its own disk
    return checkpoint, step


def restore(checkpoint, parts):
    """Load checkpoint[name] into each of parts, {name: module or optimiser}."""
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
        # Give the moments the memory layout of their parameters. A file keeps the strides it was
        # saved with, but a resumed run may differ in channels_last: fused kernels would then
        # silently pair moments with the wrong weights.
        for parameter, state in getattr(part, "state", {}).items():
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter).copy_(value)


def save_on_error(batches, start_step, save):
    """Yield the batches; if one fails (a loader was killed, images are gone), save first."""
    for step in itertools.count(start_step):
        try:
            batch = next(batches)
        except (ValueError, OSError):
            if get_world_size() == 1:                  # saving takes all ranks
                save(step)
            raise
        yield batch


def checkpoints(stage, preset, flag):
    """The ckpt.pt of all runs of a preset in out/<stage>; FileNotFoundError, naming other runs."""
    found = sorted(map(str, Path().glob(f"out/{stage}/{preset}-*/ckpt.pt")))
    if not found:
        others = sorted(map(str, Path().glob(f"out/{stage}/*/ckpt.pt"))) or ["another file"]
        raise FileNotFoundError(f"{flag}: no out/{stage}/{preset}-*/ckpt.pt here; train one, name "
                                f"its --preset, or give {flag} {' or '.join(others)}")
    return found


def newest(stage, preset, flag):
    """The most recently written of these checkpoints; prints which."""
    found = sorted(checkpoints(stage, preset, flag), key=os.path.getmtime)
    if os.environ.get("RANK", "0") == "0":
        print(f"{flag} {found[-1]}, the newest of {len(found)}", flush=True)
    return found[-1]


def run_name(path):
    """A checkpoint's name in folders and legends: for ckpt.pt its run's folder, else its own."""
    path = Path(path).resolve()
    if path.name == "ckpt.pt":
        return path.parent.name
    # does not strip the .5 of v1.5
    return path.stem if re.match(r"\.(ckpt|bin|safetensors|sft|pth?)$", path.suffix) else path.name


class Log:
    """
    log.jsonl, written by rank 0: one JSON object per line, each with its step. `add` keeps every
    micro-batch's terms on the device; they are averaged over steps and processes when a line is
    due, so that the host waits for the GPU only then. Call every method on all ranks.
    state   from the checkpoint: the sums not yet written. Lines from start_step on are dropped,
            since the resumed run writes them again; a fresh start, without a state, removes the
            old run's checkpoints
    track   is also called with every line's step and values, see open_tracker
    """

    def __init__(self, path, start_step=0, state=None, track=lambda step, values: None):
        self.path, self.track = Path(path), track
        self.pending = []                              # (step, name, value), values on the device
        # by name: [sum, count] since the last line; for how many steps in a row it was not finite
        self.counts = state or dict(sums={}, bad={}, skipped=0)
        if get_rank() > 0:
            return
        kept = []
        if start_step and self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # truncated by a crash
                    if json.loads(line)["step"] < start_step:
                        kept.append(line + "\n")
        stale = [".*.tmp"] if state else [".*.tmp", "ckpt.pt", "ckpt_*.pt"]
        for leftover in itertools.chain(*map(self.path.parent.glob, stale)):
            leftover.unlink()
        write_atomic(self.path, lambda file: file.write("".join(kept).encode()))

    def add(self, step, terms):
        """terms: {name: scalar tensor}, the same names on all processes."""
        self.pending += [(step, name, value.detach().float()) for name, value in terms.items()]

    def finite(self, step):
        """Bool tensor: whether all terms added for this step are finite, on all processes."""
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
        """Sum the added terms over the processes; the counts, for `write` and for checkpoints."""
        if not self.pending:
            return self.counts
        values = torch.stack([value for *_, value in self.pending])                     # (n,)
        finite = values.isfinite()
        totals = torch.stack([values.where(finite, values.new_zeros(())), finite.float()])
        totals = all_sum(totals).T.tolist()            # the only wait for the device
        steps, sums, streaks = {}, self.counts["sums"], self.counts["bad"]
        for (step, name, _), (total, count) in zip(self.pending, totals):
            before = sums.get(name, (0.0, 0.0))
            sums[name] = [before[0] + total, before[1] + count]
            bad = steps.setdefault(step, {})           # {name: not finite in any micro-batch}
            bad[name] = bad.get(name, False) or count < get_world_size()
        self.pending = []
        for step, bad in steps.items():
            names = sorted(filter(bad.get, bad))
            for name in bad:                           # discriminator steps have their own terms
                streaks[name] = streaks.get(name, 0) + 1 if bad[name] else 0
            if names:                                  # a line of its own
                self.counts["skipped"] += 1
                self.write(step, not_finite=names, skipped=self.counts["skipped"])
            need(max(streaks.values()) < 10, f"step {step}: {', '.join(names)} not finite, 10 "
                 f"steps in a row; they were skipped and {self.path.parent}/ckpt.pt is unaffected: "
                 "--resume with --dtype fp32, or start a new --out with a lower --lr")
        return self.counts


def open_tracker(args, start_step):
    """--track as a function of (step, {name: number or image path}), which may do nothing."""
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
    """Images per second since start_time (time.perf_counter); peak memory of the GPU, else host."""
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
    """--help that shows every default; flags whose default is None describe it themselves."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        return action.help.partition(" (default")[0] + " (default: %(default)s)"


def add_run_flags(parser):
    """Add the flags that both training scripts share."""
    add = parser.add_argument
    add("--resume", action="store_true", help="continue the run in --out, or start one")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--seed", type=int, default=0, help="seed of initial weights and all random draws, >= 0")
    add("--device", choices=DEVICES, help="mps: an Apple GPU (default: cuda if there is one)")
    add("--dtype", choices=("fp32", "bf16"), help="(default: bf16 on GPUs that compute "
        "in it, else fp32)")
    add("--compile", choices=("on", "off"), help="torch.compile the networks (default: on for "
        "cuda, except in train_ae.py with --reg eq, se or vf; else off)")
    add("--grad_checkpoint", action="store_true", help="recompute activations to save memory")
    add("--grad_accum", type=int, default=1, help="micro-batches per step, to save memory")
    add("--workers", type=int, default=8, help="loader processes per training process")
    add("--log_every", type=int, default=100, help="steps between lines of log.jsonl")
    add("--track", choices=("tensorboard", "wandb"), help="also log metrics, figures, memory and "
        "speed there (default: log.jsonl only)")
    add("--encoder_source", help="a folder with hubconf.py, such as a clone of "
        "facebookresearch/dinov2, or random (for tests) (default: torch.hub)")


def parse_args(parser, presets):
    """Parse the flags; --preset NAME sets defaults, presets = {NAME: {flag: value}}."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    parser.set_defaults(**presets.get(first.parse_known_args()[0].preset, {}))
    parser.error = lambda message: parser.exit(        # one line, like all other errors
        2, f"{parser.prog}: {message}; {parser.prog} --help lists the flags\n")
    return parser.parse_args()


def need(condition, message):
    """ValueError(message) unless condition holds: checks flags and input files."""
    if not condition:
        raise ValueError(message)


def need_range(args, low, high, *names):
    """ValueError for the first of these flags that is not finite or outside [low, high]."""
    for name in names:
        value = getattr(args, name)
        need(low <= value <= high and value < float("inf"),
             f"--{name} {value}: must be finite and lie in {low}..{high}")


def check_run_flags(args, world):
    """ValueError for the first invalid flag of those that both training scripts share."""
    need_range(args, 1, 2 ** 31, "grad_accum", "batch_size", "log_every", "eval_every")
    need_range(args, 0, 2 ** 63 - 1, "seed", "workers", "steps", "warmup_steps")
    need_range(args, 0, float("inf"), "weight_decay", "clip_grad")
    need(0 < args.lr < float("inf"), f"--lr {args.lr}: must be above 0 and finite")
    need(args.batch_size % (world * args.grad_accum) == 0, f"--batch_size {args.batch_size}: must "
         f"be a multiple of {world} processes times --grad_accum {args.grad_accum}")
    need(not (args.resume and args.overwrite), "--resume --overwrite: choose one of them")
    need(args.keep_every < 1 or args.keep_every % args.eval_every == 0,
         f"--keep_every {args.keep_every}: must be a multiple of --eval_every {args.eval_every}")
    need_outside(args.out, args.data)
    for name in ("ae", "init"):                        # --overwrite would destroy an input
        path = Path(getattr(args, name, None) or "/").resolve()
        need(Path(args.out).resolve() not in (path, path.parent),
             f"--out {args.out}: holds --{name} {path}; choose another folder")


def need_outside(out, data):
    """ValueError if writing to out would overwrite images of --data or add to them."""
    place, images = Path(out or "/").resolve(), Path(data or os.devnull).resolve()
    need(images not in (place, *place.parents) or not images.exists(),
         f"--out {out}: lies in {data}, whose images are read; name another place")


def reason(error):
    """Why a file could not be read, in one line, without the advice to unpickle it anyway."""
    if type(error).__name__ == "UnidentifiedImageError":   # PIL's message is an object's address
        return "not an image"
    if "allow_pickle" in str(error) or "weights_only" in str(error).lower():
        return "contains more than plain data; no code in it was run"
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def one_line_errors():
    """Wraps main: a user's error is one line, exit code 2; a bug keeps its traceback."""
    try:
        yield
        if dist.is_initialized():                      # not after an error: barrier would hang
            gc.collect()                               # DDP is a reference cycle and must not
            barrier()                                  # outlive its process group
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        source = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        library = "site-packages" in source.parts or ROOT not in source.parents
        if library and not getattr(error, "filename", None):       # a bug, and not about a file
            raise
        if get_rank() > 0:
            time.sleep(5)                              # rank 0 usually prints the same error,
        message = printable(" ".join(str(error).splitlines()))     # then torchrun stops this rank
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        locks.close()
