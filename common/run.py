"""
The machinery around a training loop, so that the loop itself reads like the paper: processes,
random numbers, one optimiser step, what a run writes, command lines.

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
import itertools
import json
import os
import platform
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
from torch.nn.parallel import DistributedDataParallel

if sys.version_info < (3, 10):         # noqa: UP036
    raise SystemExit(f"Python 3.10 or newer is required; this is {sys.version.split()[0]}")

# --------------------------------------------------------------------------------------------------
# Processes: one per GPU under torchrun (NCCL), per CPU worker (gloo), or a single plain `python`

def init_distributed(kind=None):
    """
    Join torchrun's process group if there is one.
    kind     "cpu", "cuda" or None (CUDA when there is a GPU)
    returns  (rank, world, torch.device); tensors on CUDA travel by NCCL, those on the CPU by gloo
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    need(kind != "cuda" or gpus, "--device cuda: PyTorch sees no GPU here; use --device cpu")
    torch.backends.cudnn.allow_tf32 = False            # where float32 is written, float32 is meant
    device = torch.device(kind or ("cuda" if gpus else "cpu"))
    if "RANK" not in os.environ:
        return 0, 1, device
    if "SLURM_LOCALID" in os.environ:                  # srun, with RANK and WORLD_SIZE given
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
    bad = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
           if not os.environ.get(name, "").isdigit()]
    bad += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    need(not bad, f"RANK is set, which means several processes, but {', '.join(bad)} is missing or "
         "no number; start the script with torchrun, or unset RANK for one process")
    group = dict(backend="gloo", timeout=datetime.timedelta(hours=2))  # rank 0 may download alone
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        need(device.index < gpus, f"--nproc_per_node: process {device.index} has no GPU, there are "
             f"{gpus}; start one per GPU")
        torch.cuda.set_device(device)
        group |= dict(backend="cpu:gloo,cuda:nccl", device_id=device)
    dist.init_process_group(**group)
    return dist.get_rank(), dist.get_world_size(), device


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def printable(text):
    """A text as a terminal may show it: control characters, which it would obey, as \\x1b, \\n."""
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


def need_one_node(what):
    """ValueError if several nodes would write `what` into one memory map: NFS may lose bytes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))     # by torchrun; srun counts nodes
    nodes = int(os.environ["WORLD_SIZE"]) / local if local else os.environ.get("SLURM_NNODES", 1)
    need("RANK" not in os.environ or float(nodes) <= 1, f"{what}: is written by all processes into "
         "one file, which only one node can do safely; make it with torchrun --nnodes=1 first, "
         "then start this again")


def broadcast_from_rank0(function):
    """function() on rank 0, its plain value on all: each node may hold the data elsewhere."""
    value = [function() if get_rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(value, src=0)
    return value[0]


def all_sum(tensor):
    """Sum of a tensor over the processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """The mean of a tensor over the processes; the tensor itself if there is one."""
    return all_sum(tensor.clone()) / get_world_size() if dist.is_initialized() else tensor


def all_agree(ok, device):
    """True if ok holds on every process: what one cannot load, none may use."""
    return all_sum(torch.tensor(float(not ok), device=device)).item() == 0


def ddp(network, static_graph=False):
    """
    The network in DistributedDataParallel under torchrun, else itself; None stays None.
    static_graph  every step runs the same graph with one backward pass, all of them synchronised
    """
    if network is None or not dist.is_initialized():
        return network
    with warnings.catch_warnings():                    # torch 2.14 renames broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(network, broadcast_buffers=False, static_graph=static_graph,
                                       gradient_as_bucket_view=True)


def sync_gradients(networks, now):
    """Whether the next backward pass averages gradients: only a step's last micro-batch does."""
    for network in networks:
        network.require_backward_grad_sync = now       # DistributedDataParallel's


class Interrupt:
    """
    SIGTERM (what a cluster sends before it takes a machine away), Ctrl-C and a closed terminal no
    longer end the process: the loop asks, saves and leaves. A second Ctrl-C ends it at once.
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
        """
        True on all processes once one of them got a signal. Several ask one another every tenth
        step: the answer costs a round trip, by CPU, so that no GPU waits.
        """
        if dist.is_initialized() and step % 10:
            return False
        return all_sum(torch.tensor(float(self.name is not None))).item() > 0

    def message(self, step, args):
        return (f"{self.name or 'a signal to another process'}: stopped before step {step} of "
                f"{args.steps}; the same command with --resume continues from {args.out}/ckpt.pt")


# --------------------------------------------------------------------------------------------------
# Device choices, random numbers, one optimiser step

def device_choices(args, device, fixed_size=True):
    """
    What differs between a CPU and a GPU, decided once: --dtype and --compile where not given, and
    cuDNN's modes.
    fixed_size  the networks see one image size: cuDNN may try its algorithms for each layer
    returns     the autocast context for the networks
    """
    cuda = device.type == "cuda"
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    args.compile = args.compile or ("on" if cuda else "off")
    compilers = os.environ.get("CXX", "g++"), "clang++"
    if args.compile == "on" and not any(map(shutil.which, compilers)):
        args.compile = "off"
        print0("--compile on: no C++ compiler (g++, clang++ or CXX) here, so nothing is compiled")
    torch.backends.cudnn.allow_tf32 = args.dtype == "bf16"     # LPIPS, encoding: outside autocast
    torch.backends.cudnn.benchmark = cuda and fixed_size
    if args.compile == "on":
        print0("compiling the networks at the first step, which takes minutes on few cores "
               "(--compile off does without)")
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")


def print_run(args, world, device):
    """What is trained how, in a line: that no learning rate was rescaled, above all."""
    print0(f"global batch {args.batch_size} = {world} x {args.batch_size // world} on "
           f"{device.type} in {args.dtype}; learning rate {args.lr:g}, not rescaled; "
           f"{args.steps:,} steps -> {args.out}")


def uncompiled(args):
    """Around what runs rarely, in shapes of its own: not worth a compilation each."""
    on = args.compile == "on"
    return torch.compiler.set_stance("force_eager") if on else contextlib.nullcontext()


def step_seed(seed, step):
    """A well-mixed 63-bit seed for one step of one run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sharded(draw, shape, generator, rank, world):
    """
    This rank's slice (b, ...) of random numbers drawn for the global batch of world * b.
    draw       torch.randn or torch.rand
    generator  seeded alike on every rank; the numbers are drawn on its device
    """
    b = shape[0]
    values = draw(world * b, *shape[1:], generator=generator, device=generator.device)
    return values[rank * b:(rank + 1) * b]


def checkpoint_activations(network, kinds):
    """Blocks of these classes keep no activations and compute twice (torch.utils.checkpoint)."""
    for block in network.modules():
        if isinstance(block, kinds):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                              use_reentrant=False)


def optimizer_step(optimizer, lr, clip_grad, finite):
    """
    Clip the gradients to the norm clip_grad (0 = off), step, zero. Where `finite`, a bool tensor,
    is false, or the norm is not finite, weights, moments and step count stay as they were: decided
    on the device by fused AdamW's found_inf, without waiting for it. Returns the norm.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = 1.0 - (finite & norm.isfinite()).float()
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
    """
    Call write(binary file) on a temporary file beside path, then rename it: path is the old content
    or the new, never half of it. OSError in one line if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error
        while cause and not isinstance(cause, OSError):    # torch.save fails twice on a full disk
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(f"{path}: cannot be written ({cause.strerror}); what was there before is "
                      "whole; make room or name another place, then run again") from None


def finite(state):
    """Whether all tensors in nested dicts, as of networks and optimisers, are finite."""
    if isinstance(state, dict):
        return all(map(finite, state.values()))
    return not torch.is_tensor(state) or bool(state.isfinite().all())


def save_checkpoint(path, state, keep_every=-1):
    """
    A dict of tensors and plain values to path; every so many steps also to <name>_<step>.pt. What
    is not finite takes no good checkpoint's place.
    """
    if not finite(state):
        print(f"step {state['step']}: weights or moments are not finite, so {path} stays as it was",
              file=sys.stderr, flush=True)
        return
    write_atomic(path, lambda file: torch.save(state, file))
    if keep_every > 0 and state["step"] % keep_every == 0:
        kept = Path(path).with_stem(f"{Path(path).stem}_{state['step']}")
        write_atomic(kept, lambda file: torch.save(state, file))


def load_checkpoint(path, stage):
    """
    A checkpoint of this project as a dict on the CPU; ValueError or FileNotFoundError in one line
    if path is not one of this stage, "ae" or "diffusion".
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:         # torch.load does not compare checksums
            need(archive.testzip() is None, "damaged on the disk; an older ckpt_<step>.pt may be "
                 "whole and can take its place")
        found = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
        step, args = (checkpoint.get("step", 0), checkpoint.get("args", {})) if found else (0, {})
        need(isinstance(found, str | None) and isinstance(step, int) and step >= 0
             and isinstance(args, dict), "its fields are not those of a run")
    except Exception as error:
        why = reason(error)
        if "weights" in why.lower() or "Unsupported" in why:
            why = "holds more than plain data, of which nothing is run"
        raise ValueError(f"{path}: not a readable checkpoint ({why})") from None
    holds = f"a run of stage {found!r}" if found else "no run of this project"
    need(found == stage, f"{path}: holds {holds}, expected stage {stage!r}")
    return checkpoint


# Flags that may change when a run is resumed: where and how fast it runs, how long it lasts, what
# it reports. Whether images and autoencoder are the same is decided by their content.
FREE = ("out resume overwrite preset device dtype compile grad_checkpoint grad_accum workers steps "
        "log_every eval_every keep_every encoder_source data ae cache encode_batch sample_steps "
        "cfg").split()


@contextlib.contextmanager
def file_lock(path, wait=True):
    """
    Hold the lock file at path once no other process does; it ends with its process. Yields whether
    it is held: where there are no locks, a line says so and the block runs all the same.
    wait     for the process that holds it; False: ValueError that names it
    """
    made = [folder for folder in path.parents if not folder.exists()]
    with contextlib.suppress(FileExistsError):         # a file: open() says it better
        path.parent.mkdir(parents=True, exist_ok=True)
    held = False
    while not held:
        file = open(path, "a+")
        try:
            import fcntl  # not on Windows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = f"process {file.read() or 'of another machine'}"
                need(wait, f"--out {path.parent}: {holder} is writing there; wait for it, or name "
                     "another folder")
                print(f"{path}: {holder} holds this lock; waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            print(f"{path}: no file locks here ({reason(error)}); start no second run that writes "
                  "the same", file=sys.stderr, flush=True)
            break
        # whoever held it has removed the file, and a third process may hold a new one
        with contextlib.suppress(FileNotFoundError):
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
    if held:
        file.truncate(0)
        print(os.getpid(), "on", platform.node(), end="", file=file, flush=True)
    try:
        yield held
    finally:
        path.unlink(missing_ok=True)
        file.close()
        for folder in made:
            with contextlib.suppress(OSError):         # not empty: something was written
                folder.rmdir()


locks = contextlib.ExitStack()         # of this process' run, until it ends


def open_run(args, stage, identity):
    """
    The checkpoint from which --resume continues the run in --out, or None for a fresh start.
    identity  {"images": hash, ...}: what the run depends on, known by its content
    raises    ValueError if a run there would be lost, or naming every flag that contradicts it
    """
    folder = Path(args.out)
    path, kept = folder / "ckpt.pt", [*folder.glob("ckpt_*.pt")]
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    need(nearest.is_dir(), f"--out {args.out}: a file is in the way; name another folder")
    need(args.resume or args.overwrite or not (path.exists() or kept), f"--out {args.out}: holds a "
         "run already; --resume continues it, --overwrite replaces it")
    if get_rank() == 0:
        locks.close()                                  # of an earlier run of the same process
        locks.enter_context(file_lock(folder / ".lock", wait=False))
    need(not args.resume or path.exists() or not kept, f"--resume: {path} is not there, but "
         f"{len(kept)} kept ones are; copy one of them to ckpt.pt")
    checkpoint, step = None, 0
    if args.resume and path.exists():
        checkpoint = load_checkpoint(path, stage)
        saved, step = checkpoint["args"], checkpoint["step"]
        changed = [f"--{k} {v} (was {saved[k]})" for k, v in vars(args).items()
                   if k in saved and k not in FREE and saved[k] != v]
        need(not changed, f"--resume: {path} was made with other flags: {', '.join(changed)}; give "
             "the same ones or another --out")
        other = [name for name, value in identity.items() if checkpoint.get(name) != value]
        need(not other, f"--resume: {' and '.join(other)}: not what {path} was trained on; restore "
             "it, or name another --out")
        print0(f"resuming {args.out} at step {step}")
    steps = [step] * get_world_size()
    if dist.is_initialized():                          # each node reads its own disk
        dist.all_gather_object(steps, step)
    need(len(set(steps)) == 1, f"--resume: processes find {args.out} at steps {steps}, rank by "
         "rank; give every node the same checkpoint, or --out on a disk that all can read")
    need(step <= args.steps, f"--steps {args.steps}: {args.out} has {step} steps behind it; give "
         "more steps, or another --out")
    return checkpoint


def restore(out, checkpoint, parts):
    """
    Put checkpoint[name] back into each of parts, {name: module, optimiser or EMA}, whose memory
    layout is final already. ValueError in one line if one does not fit or is not finite.
    """
    for name, part in parts.items():
        where = f"--resume: {out}/ckpt.pt: its {name}"
        try:
            part.load_state_dict(checkpoint[name])
        except Exception as error:                     # a foreign file breaks this in any way
            raise ValueError(f"{where} does not fit this run ({reason(error)}); take an older "
                             "checkpoint, or another --out") from None
        if not isinstance(part, torch.optim.Optimizer):
            need(finite(part.state_dict()),
                 f"{where} is not finite, so the training diverged; take an older checkpoint")
            continue
        # Moments in the memory layout of their parameters: a file keeps its strides, and where
        # channels_last is another choice fused kernels would pair the wrong numbers, unseen.
        for parameter, state in part.state.items():
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter).copy_(value)


def save_on_error(batches, start_step, save):
    """The batches; where one cannot be had, as its loader was killed, save before its step."""
    for step in itertools.count(start_step):
        try:
            batch = next(batches)
        except (ValueError, OSError):
            if get_world_size() == 1:                  # others would have to join in
                save(step)
            raise
        yield batch


def newest(pattern, hint):
    """The file matching the glob pattern written last; FileNotFoundError with the hint if none."""
    found = sorted(Path().glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no {pattern} here; {hint}")
    return str(found[-1])


def run_name(path):
    """A checkpoint's name in folders and legends: its run's folder for ckpt.pt, else its own."""
    path = Path(path).resolve()
    if path.name == "ckpt.pt":
        return path.parent.name
    known = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".sft")   # and not the 5 of v1.5
    return path.stem if path.suffix in known and not path.is_dir() else path.name


def checkpoint_args(path):
    """
    The flags with which train_ae.py made the checkpoint at path (file or run folder), and what its
    images are known by; {} if it is of another kind.
    """
    if os.path.isdir(path):                            # of a run, or of one kept checkpoint
        kept = sorted(Path(path).glob("*.pt"))
        path = kept[0] if len(kept) == 1 else f"{path}/ckpt.pt"
    with contextlib.suppress(ValueError, OSError):
        checkpoint = load_checkpoint(path, "ae")
        return checkpoint.get("args", {}) | dict(images=checkpoint.get("images"))
    return {}


class Log:
    """
    log.jsonl, written by rank 0: one JSON object per line, each with its step. `add` keeps every
    micro-batch's terms on their device; they are averaged over steps and processes when a line is
    due, so that the host waits for the GPU only then. Call every method on all ranks.
    Opening it for a resume at start_step drops later lines, which will be written again, a last
    line that a crash cut short, and half-written files; at step 0 the checkpoints of a run that is
    replaced. state: what `state()` returned when the checkpoint was made.
    """

    def __init__(self, path, start_step=0, state=None, bad_limit=10):
        self.path, self.bad_limit = Path(path), bad_limit
        self.pending = []                              # (step, names, values (k,)) on the device
        # per name [sum, count] over all processes, and lines of zeros in a row; per kind of step
        # those in a row that were not finite, and how many were skipped in all
        self.counts = state or dict(sums={}, zeros={}, bad={}, skipped=0)
        if get_rank() > 0:
            return
        kept, old = [], []
        if start_step and self.path.exists():
            old = self.path.read_text(errors="replace").splitlines()
        for number, line in enumerate(old, 1):
            try:
                if json.loads(line)["step"] < start_step:
                    kept.append(line + "\n")
            except Exception:                          # damaged; a crash may cut the last one
                if number < len(old):
                    print(f"{self.path}: line {number} cannot be read and is dropped",
                          file=sys.stderr, flush=True)
        stale = [*self.path.parent.glob(".*.tmp")]     # of a write that was killed
        if start_step == 0:
            stale += [self.path.with_name("ckpt.pt"), *self.path.parent.glob("ckpt_*.pt")]
        for path in stale:
            path.unlink(missing_ok=True)
        write_atomic(self.path, lambda file: file.write("".join(kept).encode()))
        self.file = open(self.path, "a", buffering=1)  # line by line: a crash cuts only one

    def add(self, step, terms):
        """terms: {name: scalar tensor}, the same names on all processes."""
        values = torch.stack([value.detach().float() for value in terms.values()])      # (k,)
        self.pending.append((step, tuple(terms), values))

    def finite(self, step):
        """Whether all that was added for this step is finite on all processes, a bool tensor."""
        values = torch.cat([values for at, _, values in self.pending if at == step])
        return all_mean(values.isfinite().all().float()) == 1

    def line(self, step, **values):
        """Write one line now, after those of skipped steps."""
        self.state()
        self._append(step, values)

    def write(self, step):
        """One line with the means since the last one, which are also returned, {name: mean}."""
        sums, zeros = self.state()["sums"], self.counts["zeros"]
        means = {name: total / count for name, (total, count) in sums.items() if count}
        self.counts["sums"] = {}
        for name, mean in means.items():
            zeros[name] = zeros.get(name, 0) + 1 if mean == 0 else 0
            if zeros[name] == 10 and get_rank() == 0:
                print(f"step {step}: {name} was exactly 0 in the last 10 lines of {self.path}; is "
                      "its weight 0, its margin reached, its gradient detached?",
                      file=sys.stderr, flush=True)
        self._append(step, means)
        return means

    def _append(self, step, values):
        if get_rank() == 0:
            try:
                if not self.path.exists():             # somebody removed it
                    print(f"{self.path}: is gone; a new one begins at step {step}",
                          file=sys.stderr, flush=True)
                    self.file = open(self.path, "a", buffering=1)
                self.file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                raise OSError(f"{self.path}: cannot be written ({error.strerror}); make room, then "
                              "--resume") from None

    def state(self):
        """
        Add up what is pending, NaN and Inf left out, with a line for each step that has some.
        returns  all that is not yet written, plain values for a checkpoint
        raises   ValueError after bad_limit steps in a row that were not finite: nothing was learned
                 from them, the checkpoint is good
        """
        if not self.pending:
            return self.counts
        values = torch.cat([values for *_, values in self.pending])                     # (n,)
        finite = values.isfinite()
        totals = torch.stack([values.where(finite, values.new_zeros(())), finite.float()])
        pairs = iter(all_sum(totals).T.tolist())       # the one wait for the device
        steps, sums = {}, self.counts["sums"]          # step: its first name, names not finite
        for step, names, _ in self.pending:
            _, bad = steps.setdefault(step, (names[0], set()))
            for name, (total, count) in zip(names, pairs):
                before = sums.get(name, (0.0, 0.0))
                sums[name] = [before[0] + total, before[1] + count]
                if count < get_world_size():
                    bad.add(name)
        self.pending = []
        for step, (kind, bad) in steps.items():        # a GAN's two kinds of steps count apart
            streak = self.counts["bad"][kind] = self.counts["bad"].get(kind, 0) + 1 if bad else 0
            if bad:
                self.counts["skipped"] += 1
                self._append(step, dict(not_finite=sorted(bad), skipped=self.counts["skipped"]))
            need(streak < self.bad_limit, f"step {step}: {', '.join(sorted(bad))} not finite, "
                 f"{streak} steps in a row; nothing was learned from them, and "
                 f"{self.path.parent}/ckpt.pt is from before: --resume it with --dtype fp32, or "
                 "look at the data of these steps, or begin another --out with a lower --lr")
        return self.counts


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
    add("--device", choices=("cpu", "cuda"), help="where to compute (default: cuda if there "
        "is a GPU)")
    add("--dtype", choices=("fp32", "bf16"), help="of the trained networks (default: bf16 on cuda, "
        "fp32 on cpu)")
    add("--compile", choices=("on", "off"), help="torch.compile the networks (default: on on cuda, "
        "but for --reg eq, se and vf; off on cpu)")
    add("--grad_checkpoint", action="store_true",
        help="compute every block twice to keep less in memory")
    add("--grad_accum", type=int, default=1,
        help="micro-batches into which a process splits its batch, to save memory")
    add("--workers", type=int, default=8, help="loader processes per training process")
    add("--log_every", type=int, default=100, help="steps between lines of log.jsonl")


def parse_args(parser, presets, subparser=None):
    """
    parser.parse_args() in two passes: --preset NAME replaces defaults by presets[NAME], a dict
    {flag: value}; explicit flags win. subparser: whose defaults are meant, if there are commands.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    preset = presets.get(first.parse_known_args()[0].preset, {})
    (subparser or parser).set_defaults(**preset)
    for p in {parser, subparser} - {None}:             # one line, as for every other mistake
        p.error = lambda message, p=p: p.exit(
            2, f"{p.prog}: {message}; {p.prog} --help lists the flags\n")
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
    need(args.batch_size % (world * args.grad_accum) == 0, f"--batch_size {args.batch_size}: must "
         f"divide by {world} processes times --grad_accum {args.grad_accum}")
    need(not (args.resume and args.overwrite), "--resume --overwrite: one continues the run in "
         "--out, the other replaces it; choose one of them")
    need(args.keep_every < 1 or args.keep_every % args.eval_every == 0,
         f"--keep_every {args.keep_every}: must be a multiple of --eval_every {args.eval_every}, "
         "when checkpoints are made")
    for name in ("ae", "init", "data"):                # --overwrite would destroy an input
        place = Path(getattr(args, name, None) or "/").resolve()
        need(Path(args.out).resolve() not in (place, place.parent),
             f"--out {args.out}: holds --{name} {place}; name another folder")
    need_range(args, 0, 2 ** 63 - 1, "seed")
    need_range(args, 0, 1024, "workers")
    need_range(args, 0, float("inf"), "weight_decay", "warmup_steps", "steps", "clip_grad")
    need(0 < args.lr < float("inf"), f"--lr {args.lr}: must be above 0 and finite")


def reason(error):
    """Why a file could not be read, in one line, without the advice to unpickle it all the same."""
    if type(error).__name__ == "UnidentifiedImageError":   # PIL's own words are an address
        return "not an image"
    if "allow_pickle" in str(error):
        return "holds Python objects"
    return " ".join(str(error).split())[:200] or type(error).__name__


class Unbreakable:
    """A standard stream whose reader may go away, which ends no run: the log file has it all."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:                                # from now on into nothing
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def flush(self):
        """Every write does."""


@contextlib.contextmanager
def one_line_errors():
    """
    Around a script's main: a ValueError raised by this project's own code, or an OSError about a
    file, is a message to the user, so it ends the run with that one line and exit code 2. A
    ValueError from inside a library is a bug and keeps its traceback.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")       # None if closed at the start
        if hasattr(stream, "reconfigure"):             # a terminal that is ASCII only ends no run
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Unbreakable(stream))
    try:
        yield
        if dist.is_initialized():                      # not after an error: it would wait
            gc.collect()                               # DistributedDataParallel holds itself, and
            barrier()                                  # may not outlive its group
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        root = Path(__file__).resolve().parents[1]
        of_project = place.is_relative_to(root) and "site-packages" not in place.parts
        if not of_project and not getattr(error, "filename", None):
            raise
        if get_rank() > 0:
            time.sleep(5)                              # rank 0 most often says the same, and
        message = printable(" ".join(str(error).splitlines()))     # torchrun then ends us
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        locks.close()
