"""
The machinery around a training loop, so that the loop itself reads like the paper: processes,
device choices, random numbers, an optimiser's step, command lines. What a run writes is in run.py.

Processes: one per GPU under torchrun (NCCL), or per CPU worker (gloo), or a single plain `python`.
Gradients are averaged by torch's DistributedDataParallel.

Random numbers: every draw of a step is a function of (seed, step), never of a generator's history,
and batch-shaped draws are made for the GLOBAL batch and then sliced. So a resumed run, or one on
another number of processes, continues with the very same numbers.
"""
import argparse
import contextlib
import datetime
import functools
import gc
import io
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel

# --------------------------------------------------------------------------------------------------
# Processes

def init_distributed(device=None):
    """
    Join torchrun's process group if there is one.
    device   "cpu", "cuda" or None (CUDA when there is a GPU)
    returns  (rank, world, torch.device); tensors on CUDA travel by NCCL, those on the CPU by gloo
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False            # float32 is meant where float32 is said
    if "RANK" not in os.environ:
        return 0, 1, torch.device(kind)
    if "SLURM_LOCALID" in os.environ:                  # srun, with RANK and WORLD_SIZE given
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
    words = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    missing = [name for name in words[:4] if not os.environ.get(name, "").isdigit()]
    missing += [name for name in words[4:] if not os.environ.get(name)]
    need(not missing, f"RANK is set, which means several processes, but {', '.join(missing)} is "
         "missing or no number; start the script with torchrun, or unset RANK for one process")
    two_hours = datetime.timedelta(hours=2)            # rank 0 alone downloads, saves and draws
    if kind == "cpu":
        dist.init_process_group("gloo", timeout=two_hours)
        return dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(f"--nproc_per_node: process {local_rank} has no GPU, there are {gpus}; "
                         "start one a GPU")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=two_hours)
    return dist.get_rank(), dist.get_world_size(), device


def stop_processes():
    """Leave the process group, if any, all together."""
    if dist.is_initialized():
        gc.collect()                                   # DistributedDataParallel holds itself, and
        barrier()                                      # may not outlive its group
        dist.destroy_process_group()


def get_rank():
    """Of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(text):
    """Print on rank 0."""
    if get_rank() == 0:
        print(text, flush=True)


def barrier():
    """Wait for all processes. A script ends with one: the first to leave would end the others."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def local_rank_zero_first():
    """A node's first process runs the block before its neighbours: one download, many readers."""
    first = not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:                                      # also when it failed: the others wait
            barrier()


def nodes():
    """How many machines take part, by torchrun's word or srun's; 1 for a single process."""
    if "RANK" not in os.environ:
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", 1))


def need_one_node(what):
    """ValueError if several nodes would write `what` into one memory map: NFS may lose bytes."""
    need(nodes() == 1, f"{what}: is written by all processes into one file, which only one node "
         "can do safely; make it with torchrun --nnodes=1 first, then start this again")


def need_steps_left(args, start_step):
    """ValueError if a resumed run is past --steps already: its log would only lose lines."""
    need(start_step <= args.steps, f"--steps {args.steps}: {args.out} has {start_step} steps "
         "behind it; give more steps, or another --out")


def need_same_step(out, step):
    """ValueError unless all processes resume at the same step (each reads its own disk)."""
    if dist.is_initialized():
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, step)
        need(len(set(steps)) == 1, f"--resume: processes find {out} at steps {steps}, rank by "
             "rank; give every node the same checkpoint, or --out on a disk that all can read")


def broadcast_from_rank0(function):
    """function() on rank 0, its plain value on all: each node's copy of the data may lie apart."""
    if not dist.is_initialized():
        return function()
    value = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(value, src=0)
    return value[0]


def all_sum(tensor):
    """Sum of a tensor over the processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """The mean of a tensor over the processes; the tensor itself if there is one."""
    if not dist.is_initialized():
        return tensor
    return all_sum(tensor.clone()) / dist.get_world_size()


def all_agree(ok, device):
    """True if ok holds on every process: what one cannot load, none may use."""
    return all_sum(torch.tensor(float(not ok), device=device)).item() == 0


def ddp(network, static_graph=False):
    """
    The network as a training step calls it: under torchrun its backward averages the gradients over
    the processes, and rank 0's weights are everybody's from now on; else the network itself.
    None stays None. Buffers are each process's own. What is saved is the network, not the wrapper.
    static_graph  every step runs the same graph, once a backward, without `averaging(False)` and
                  without torch.autograd.grad through the outputs
    """
    if network is None or not dist.is_initialized():
        return network
    with warnings.catch_warnings():                    # torch 2.14 renames broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(network, broadcast_buffers=False, static_graph=static_graph,
                                       gradient_as_bucket_view=True)


@contextlib.contextmanager
def averaging(now, *networks):
    """Around a forward and its backward: the ddp networks exchange gradients if now."""
    with contextlib.ExitStack() as stack:
        for network in networks:
            if isinstance(network, DistributedDataParallel) and not now:
                stack.enter_context(network.no_sync())
        yield


class StopSignal:
    """
    `with StopSignal() as stop:` SIGTERM (what a cluster sends before it takes a machine away) and
    Ctrl-C no longer end the process. The loop asks stop.asked() once a step, saves and leaves; all
    processes get the same answer. A second Ctrl-C ends it at once.
    """

    def __enter__(self):
        self.name, self.previous = None, {}
        self.calls = self.last = self.ask_at = 0       # of asked(), see there
        self.clock = time.perf_counter()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def asked(self):
        """
        True on all processes once one of them got a signal. Several ask one another at every tenth
        call, sooner if that takes more than two seconds, for the answer costs them a round trip;
        it travels by CPU, no GPU waits.
        """
        if not dist.is_initialized():
            return self.name is not None
        self.calls += 1
        if self.calls < self.ask_at:
            return False
        now = time.perf_counter()
        seconds = (now - self.clock) / max(1, self.calls - self.last)   # of a call, here
        said = all_sum(torch.tensor([float(self.name is not None), seconds]))
        seconds = said[1].item() / dist.get_world_size()                # the same everywhere
        self.clock, self.last = now, self.calls
        self.ask_at = self.calls + max(1, min(10, int(2 / max(seconds, 1e-3))))
        return bool(said[0] > 0)

    def farewell(self, step, args):
        """What to say once the state before `step` is saved."""
        return (f"{self.name or 'a signal to another process'}: stopped before step {step} of "
                f"{args.steps}, {args.out}/ckpt.pt is written; the same command with --resume "
                "continues")


# --------------------------------------------------------------------------------------------------
# Device choices

class Compute:
    """
    Where a script computes, and what differs there between a CPU and a GPU, decided once:
    precision, memory layout, compilation.
    rank, world, device  from init_distributed
    dtype    of the networks: "fp32", "bf16", or None: bf16 on CUDA, fp32 on a CPU
    compile  "on", "off", or None: on on CUDA, off on a CPU
    tf32     with bf16, what stays out of autocast (LPIPS, encoding) may use TF32 convolutions
    fixed_size  the networks see one image size: cuDNN may try its algorithms for each layer
    """

    def __init__(self, rank, world, device, dtype=None, compile=None, tf32=True,
                 fixed_size=False):
        self.rank, self.world, self.device = rank, world, device
        self.cuda = device.type == "cuda"
        self.dtype = dtype or ("bf16" if self.cuda else "fp32")
        self.compiling = (compile or ("on" if self.cuda else "off")) == "on"
        torch.backends.cudnn.allow_tf32 = tf32 and self.dtype == "bf16"
        torch.backends.cudnn.benchmark = self.cuda and fixed_size

    def say(self, text):
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self):
        """Around the networks; losses and metrics are float32 and stay outside."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def channels_last(self, *networks):
        """
        Convolutional networks in the layout that is fast here. On a CPU NHWC is slower, and eager
        CUDA pays for copies: its GroupNorm answers in NCHW.
        """
        for network in networks:
            if network is not None and self.cuda and self.compiling:
                network.to(memory_format=torch.channels_last)

    def compile(self, *networks):
        """torch.compile in place, if it is on: names of weights stay; None is passed over."""
        for network in networks:
            if network is not None and self.compiling:
                network.compile()

    def compiled(self, function):
        """The function compiled, if compilation is on."""
        return torch.compile(function) if self.compiling else function

    def warn_of_compilation(self):
        """Why nothing seems to happen before the first step."""
        if self.compiling:
            self.say("compiling the networks at the first step, which takes minutes on few cores "
                     "(--compile off does without)")

    def eager(self):
        """Around what runs rarely in shapes of its own: not worth a compilation each."""
        if not self.compiling:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")


# --------------------------------------------------------------------------------------------------
# Random numbers: functions of (seed, step)

def step_seed(seed, step):
    """A well-mixed 63-bit seed for one step of one run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sharded_randn(shape, generator, rank, world):
    """
    Standard normal noise for this rank's share of the global batch: the same numbers whatever the
    number of processes.
    shape      (b, ...), b = global batch / world
    generator  seeded alike on every rank; the noise is drawn on its device
    returns    (b, ...) float32
    """
    b = shape[0]
    noise = torch.randn(world * b, *shape[1:], generator=generator, device=generator.device)
    return noise[rank * b:(rank + 1) * b]


# --------------------------------------------------------------------------------------------------
# An optimiser's step

def step_if(finite, optimizer):
    """
    optimizer.step() and zero_grad, but where `finite`, a bool tensor, is false weights, moments and
    step count stay as they were. Decided on the device, without waiting for it.
    optimizer  fused AdamW, whose kernels ask for the attribute found_inf
    """
    optimizer.found_inf = 1.0 - finite.float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def update(optimizer, args, updates, log, step, name="grad_norm"):
    """
    Clip the gradients to the norm args.clip_grad (0: do not), warm up linearly to args.lr over
    args.warmup_steps updates, and step unless something that was logged for it is not finite.
    updates  steps of its warm-up that are over; name: of the gradient norm in the log
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, (updates + 1) / max(1, args.warmup_steps))
    log.add(step, {name: norm})
    step_if(log.finite(step), optimizer)


def recompute(network, kinds):
    """Blocks of these classes keep nothing and compute twice (torch.utils.checkpoint)."""
    for block in network.modules():
        if isinstance(block, kinds):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                              use_reentrant=False)


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

    def load_state_dict(self, state):
        for name, value in self.shadow.items():
            value.copy_(state[name])

    @torch.no_grad()
    def update(self, step):
        """step: optimiser steps done before this one, 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(*self.pairs, 1 - decay)


# --------------------------------------------------------------------------------------------------
# What a run writes
def write_atomic(path, write):
    """
    Call write(binary file) on a temporary neighbour of path, then rename it: path is the old
    content or the new, never half of it. An interrupted write leaves path alone and removes the
    neighbour (unless the process is killed outright). OSError in one line if it cannot be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    failures = []

    class Watched(io.FileIO):                          # torch.save and numpy hide why it failed
        def write(self, data):
            try:
                return super().write(data)
            except OSError as error:
                failures.append(error)
                raise
    try:
        with io.BufferedWriter(Watched(handle, "wb")) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)                             # asking for it means setting it
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)             # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException as error:
        pathlib.Path(temporary).unlink(missing_ok=True)
        if not failures and not isinstance(error, OSError):
            raise
        cause = failures[0] if failures else error
        kept = "what was there before is whole" if path.exists() else "nothing is left of it"
        raise OSError(f"{path}: cannot be written ({cause.strerror}); {kept}; make room or name "
                      "another place, then run again") from None


def save_checkpoint(path, state):
    """Write a dict of tensors and plain Python values; torch.load(weights_only=True) reads it."""
    write_atomic(path, lambda file: torch.save(state, file))


def save_run(out, state, keep_every):
    """A run's state into out/ckpt.pt, and out/ckpt_<step>.pt where keep_every > 0 divides step."""
    save_checkpoint(f"{out}/ckpt.pt", state)
    if keep_every > 0 and state["step"] % keep_every == 0:
        save_checkpoint(f"{out}/ckpt_{state['step']}.pt", state)


def load_checkpoint(path, stage):
    """
    A checkpoint of this project as a dict on the CPU.
    raises   ValueError or FileNotFoundError in one line if path is not one of this stage
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "Unsupported" in str(error) or "weights_only" in str(error):
            reason = "holds more than plain data, of which nothing is run"
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from None
    found = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if found != stage:
        holds = f"a run of stage {found!r}" if found else "no run of this project"
        raise ValueError(f"{path}: holds {holds}, expected stage {stage!r}")
    return checkpoint


# Flags that may differ between the parts of a resumed run: where and how fast it runs, how often it
# reports, how long it lasts.
FREE = ("out", "resume", "overwrite", "preset", "device", "dtype", "compile", "grad_checkpoint",
        "grad_accum", "workers", "steps", "log_every", "eval_every", "keep_every", "encoder_source",
        "data")


def open_run(out, stage, args, resume, overwrite, free=(), older=None):
    """
    Claim the folder of a run: nothing that an earlier run left there is lost unasked.
    args     dict of plain values; on resume they must equal the checkpoint's, but for those in free
    older    what flags were that a checkpoint does not know, for it is older than they are
    returns  the newest complete checkpoint of the run to resume from, or None for a fresh start
    raises   ValueError naming every flag that contradicts the checkpoint, or when there are
             checkpoints but none can be read
    """
    folder = pathlib.Path(out)
    if not next(path for path in (folder, *folder.absolute().parents) if path.exists()).is_dir():
        raise ValueError(f"--out {out}: a file is in the way; name another folder")
    kept = sorted(folder.glob("ckpt_*.pt"), key=lambda path: (len(path.name), path.name))
    newest_first = (folder / "ckpt.pt", *reversed(kept))
    found = [path for path in newest_first if path.exists()]
    if found and not resume and not overwrite:
        raise ValueError(f"--out {out}: holds a run already; add --resume to continue it, "
                         "--overwrite to replace it, or name another")
    if not resume or not found:
        return None
    for path in found:
        try:
            checkpoint = load_checkpoint(path, stage)
            if not isinstance(checkpoint.get("step"), int) \
                    or not isinstance(checkpoint.get("args"), dict):
                raise ValueError(f"{path}: not a readable checkpoint of a run (no step or flags)")
            break
        except ValueError as error:
            if path == found[-1] or "not a readable" not in str(error):
                raise
            print(f"{error}; trying an older one", file=sys.stderr, flush=True)
    saved = (older or {}) | checkpoint["args"]
    changed = [f"--{k} {args[k]} (was {saved[k]})" for k in args
               if k in saved and k not in free and args[k] != saved[k]]
    if changed:
        raise ValueError(f"--resume: {path} was made with other flags: {', '.join(changed)}; "
                         "give the same ones or another --out")
    checkpoint["path"] = str(path)
    return checkpoint


def need_same_images(out, checkpoint, identity, data):
    """
    ValueError unless the checkpoint's run saw these pictures. Where they lie may change; of
    checkpoints from before pictures were known by their content, only that can be compared.
    identity  latents.images_hash of the training set; data: --data as given now
    """
    if "pictures" in checkpoint:
        need(checkpoint["pictures"] == identity, f"--resume: --data {data} holds other pictures "
             f"than {out}/ckpt.pt was trained on; restore them, or name another --out")
    else:
        before = checkpoint["args"].get("data") or "leaves"    # a set had no name then
        need((data or "leaves") == before, f"--resume: {out}/ckpt.pt was made with other flags: "
             f"--data {data} (was {before}); give the same ones or another --out")


def restore(out, checkpoint, parts):
    """
    Put checkpoint[name] back into each of parts, {name: module, optimiser or EMA}, whose memory
    layout is final already.
    raises   ValueError in one line if one is missing, of another shape, or holds weights that are
             not finite
    """
    path = checkpoint.get("path", f"{out}/ckpt.pt")
    for name, part in parts.items():
        finite = True
        try:
            part.load_state_dict(checkpoint[name])
            if isinstance(part, torch.optim.Optimizer):
                _match_layout(part)
            if isinstance(part, torch.nn.Module):
                finite = all(tensor.isfinite().all() for tensor in part.state_dict().values())
        except Exception as error:                     # a foreign file breaks this in any way
            raise ValueError(f"--resume: {path}: its {name} does not fit this run "
                             f"({' '.join(str(error).split())[:200]}); take an older checkpoint of "
                             "it, or begin another --out") from None
        if not finite:
            raise ValueError(f"--resume: {path}: its {name} is not finite, so the training "
                             "diverged; take an older checkpoint")


def _match_layout(optimizer):
    """
    Moments in the memory layout of their parameters. A file keeps its strides, and a run may go on
    where channels_last is another choice: fused kernels would pair the wrong numbers, unseen.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def newest(pattern, hint):
    """The file matching the glob pattern written last; FileNotFoundError with the hint if none."""
    found = sorted(pathlib.Path().glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no {pattern} here; {hint}")
    return str(found[-1])


def run_name(path):
    """A checkpoint's name in folders and legends: its run's folder for ckpt.pt, else its own."""
    path = pathlib.Path(path).resolve()
    if path.name == "ckpt.pt":
        return path.parent.name
    known = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".sft")   # and not the 5 of v1.5
    return path.stem if path.suffix in known and not path.is_dir() else path.name


def checkpoint_args(path):
    """
    The flags with which train_ae.py made the checkpoint at path, a file or the run's folder; {} for
    other people's.
    """
    if os.path.isdir(path):                            # of a run, or of one kept checkpoint
        kept = sorted(pathlib.Path(path).glob("*.pt"))
        path = kept[0] if len(kept) == 1 else f"{path}/ckpt.pt"
    with contextlib.suppress(ValueError, OSError):
        return load_checkpoint(path, "ae").get("args", {})
    return {}


class RunLog:
    """
    log.jsonl, written by rank 0: one JSON object a line, each with its step. `add` collects every
    step's terms on their device, `write` averages them over steps and processes, so that the loop
    waits for the GPU only when a line is due.
    Opening it for a resume at step s drops the lines of steps >= s, which will be written again,
    and a last line that a crash cut short; it also clears the folder of half-written files and, at
    step 0, of the checkpoints of a run that is replaced.
    state      what `state()` returned when the checkpoint was made: collected but not yet written
    bad_limit  so many steps in a row that are not finite end the run
    """

    def __init__(self, path, rank=0, start_step=0, state=None, bad_limit=10):
        self.path, self.rank, self.bad_limit = pathlib.Path(path), rank, bad_limit
        # names of terms that come together: (sum, count) (2, k)
        state = state or {}
        totals = state.get("totals", state)            # older checkpoints hold them alone
        self.totals = {tuple(names.split()): total for names, total in totals.items()}
        self.not_finite = []                           # (step, names, flags (k,)) not reported yet
        self.skipped, self.zeros = state.get("skipped", 0), dict(state.get("zeros", {}))
        self.in_a_row = dict(state.get("in_a_row", {}))    # names of a kind of step: bad ones
        if rank > 0:
            return
        kept = []
        if start_step > 0 and self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["step"] < start_step:
                        kept.append(line + "\n")
        stale = [*self.path.parent.glob(".*.tmp")]     # of a write that was killed
        if start_step == 0:                            # of the run that this one replaces
            stale += [self.path.with_name("ckpt.pt"), *self.path.parent.glob("ckpt_*.pt")]
        for path in stale:
            path.unlink(missing_ok=True)
        write_atomic(self.path, lambda file: file.write("".join(kept).encode()))
        self.file = open(self.path, "a", buffering=1)  # a line at a time: a crash cuts only one

    def line(self, step, **values):
        """Append one line now (rank 0)."""
        if self.rank == 0:
            try:
                self.file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                raise OSError(f"{self.path}: cannot be written ({error.strerror}); make room, then "
                              "--resume") from None

    def add(self, step, terms):
        """terms: {name: scalar tensor}, the same names on all processes; NaN enters no mean."""
        values = torch.stack([value.detach().float() for value in terms.values()])      # (k,)
        finite = values.isfinite()
        total = torch.stack([values.where(finite, values.new_zeros(())), finite.float()])
        names = tuple(terms)
        if names in self.totals:
            total = self.totals[names].to(total.device) + total                         # (2, k)
        self.totals[names] = total
        self.not_finite.append((step, names, ~finite))

    def finite(self, step):
        """Whether all that was added for this step is finite on all processes, a bool tensor."""
        flags = torch.cat([flags for at, _, flags in self.not_finite if at == step])
        return all_mean(flags.any().float()) == 0

    def state(self):
        """
        What is collected and not yet written, and what is counted, for checkpoints. Call it on all
        processes; bad steps are reported first, so that a resumed run need not know of them.
        """
        self.report_skipped()
        totals = {" ".join(names): all_mean(total).cpu()
                  for names, total in self.totals.items()}
        return dict(totals=totals, skipped=self.skipped, zeros=dict(self.zeros),
                    in_a_row=dict(self.in_a_row))

    def write(self, step):
        """
        One line with the means since the last one, and one for each step that was skipped; call it
        on all processes.
        returns  {name: mean}
        raises   ValueError after bad_limit steps in a row that were not finite: nothing was learned
                 from them, the checkpoint is good
        """
        self.report_skipped()
        sums = {}
        for names, total in self.totals.items():
            for name, value, count in zip(names, *all_sum(total.clone()).tolist()):
                before = sums.get(name, (0, 0))
                sums[name] = before[0] + value, before[1] + count
        means = {name: value / count for name, (value, count) in sums.items() if count}
        self.totals = {}
        for name, mean in means.items():
            self.zeros[name] = self.zeros.get(name, 0) + 1 if mean == 0 else 0
            if self.zeros[name] == 10 and self.rank == 0:
                print(f"step {step}: {name} was exactly 0 in the last 10 lines of {self.path}; is "
                      "its weight 0, its margin reached, its gradient cut?",
                      file=sys.stderr, flush=True)
        self.line(step, **means)
        return means

    def report_skipped(self):
        """Lines for the steps since the last report that were not finite; as `write`."""
        if not self.not_finite:
            return
        flags = torch.cat([flags for *_, flags in self.not_finite]).float()
        flags = all_sum(flags).tolist()                # the one wait for the device
        steps = {}                                     # step: (all its names, those not finite)
        for at, names, _ in self.not_finite:
            mine, flags = flags[:len(names)], flags[len(names):]
            everything, bad = steps.setdefault(at, ([], []))
            everything += names
            bad += [name for name, flag in zip(names, mine) if flag]
        self.not_finite = []
        for at, (everything, bad) in steps.items():
            kind = " ".join(sorted(set(everything)))   # a GAN's two kinds of steps count apart
            self.in_a_row[kind] = self.in_a_row.get(kind, 0) + 1 if bad else 0
            if bad:
                self.skipped += 1
                self.line(at, not_finite=sorted(set(bad)), skipped=self.skipped)
            if self.in_a_row[kind] >= self.bad_limit:
                raise ValueError(
                    f"step {at}: {', '.join(sorted(set(bad)))} not finite, {self.bad_limit} steps "
                    f"in a row; nothing was learned from them, and {self.path.parent}/ckpt.pt is "
                    "from before: --resume it with --dtype fp32, or look at the data of these "
                    "steps, or begin another --out with a lower --lr")


# --------------------------------------------------------------------------------------------------
# Command lines

def parse_args(parser, presets, subparser=None):
    """
    parser.parse_args() in two passes: --preset NAME replaces defaults by presets[NAME], explicit
    flags win over both.
    presets    {name: {flag: value}}; a flag unknown to the parser is a programming error
    subparser  the one whose defaults are meant, where the parser has commands
    """
    name = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    name.add_argument("--preset")
    preset = name.parse_known_args()[0].preset
    if preset in presets:
        target = subparser or parser
        unknown = presets[preset].keys() - {action.dest for action in target._actions}
        assert not unknown, f"preset {preset} sets {unknown}"
        target.set_defaults(**presets[preset])
    for p in {parser, subparser} - {None}:             # one line, as for every other mistake
        p.error = functools.partial(_usage_error, p)
    return parser.parse_args()


def _usage_error(parser, message):
    parser.exit(2, f"{parser.prog}: {message}; {parser.prog} --help lists the flags\n")


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


def need_positive(args, *names):
    """ValueError naming the first of these flags that is not finite or not above 0."""
    for name in names:
        value = getattr(args, name)
        need(0 < value < float("inf"), f"--{name} {value}: must be above 0 and finite")


def need_run_flags(args):
    """What holds for the flags of every run."""
    need(not (args.resume and args.overwrite), "--resume --overwrite: one continues the run in "
         "--out, the other replaces it; choose one of them")
    need(args.keep_every < 1 or args.keep_every % args.eval_every == 0,
         f"--keep_every {args.keep_every}: must be a multiple of --eval_every {args.eval_every}, "
         "when checkpoints are made")


def reason(error):
    """Why a file could not be read, in one line, without the advice to unpickle it all the same."""
    if type(error).__name__ == "UnidentifiedImageError":      # PIL's own words are an address
        return "not an image"
    if "allow_pickle" in str(error):
        return "holds Python objects"
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def one_line_errors():
    """
    Around a script's main: a ValueError raised by this project's own code, or an OSError about a
    file, is a message to the user, so it ends the run with that one line and exit code 2. A
    ValueError from inside a library is a bug and keeps its traceback.
    """
    here = pathlib.Path(__file__).resolve().parent.parent
    for stream in (sys.stdout, sys.stderr):            # a terminal that is ASCII only ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        stop_processes()                               # not after an error: it would wait
    except (ValueError, OSError) as error:
        raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        rooms = ("common", "analysis", "experiments")
        ours = raised_in.parent in (here, *(here / room for room in rooms))
        if not ours and not getattr(error, "filename", None):
            raise
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)                              # rank 0 most often says the same, and
        script = pathlib.Path(sys.argv[0]).name        # torchrun then ends us
        message = " ".join(str(error).splitlines())
        print(f"{script}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
