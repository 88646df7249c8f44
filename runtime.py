"""
The machinery around a training loop, so that the loop itself reads like the paper: processes,
device choices, random numbers, an optimiser's step, command lines. What a run writes is in runs.py.

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
import os
import pathlib
import signal
import sys
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

def start_processes(device=None):
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


def barrier():
    """Wait for all processes. A script ends with one: the first to leave would end the others."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_of_node():
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


def from_rank_zero(function):
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


def mean_over_processes(tensor):
    """The mean of a tensor over the processes; the tensor itself if there is one."""
    if not dist.is_initialized():
        return tensor
    return all_sum(tensor.clone()) / dist.get_world_size()


def everywhere(ok, device):
    """True if ok holds on every process: what one cannot load, none may use."""
    return all_sum(torch.tensor(float(not ok), device=device)).item() == 0


def data_parallel(network, static_graph=False):
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
    """Around a forward and its backward: the data_parallel networks exchange gradients if now."""
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
    rank, world, device  from start_processes
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


@contextlib.contextmanager
def one_line_errors():
    """
    Around a script's main: a ValueError raised by this project's own code, or an OSError about a
    file, is a message to the user, so it ends the run with that one line and exit code 2. A
    ValueError from inside a library is a bug and keeps its traceback.
    """
    here = pathlib.Path(__file__).resolve().parent
    for stream in (sys.stdout, sys.stderr):            # a terminal that is ASCII only ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        stop_processes()                               # not after an error: it would wait
    except (ValueError, OSError) as error:
        raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        ours = raised_in.parent in (here, here / "experiments")
        if not ours and not getattr(error, "filename", None):
            raise
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)                              # rank 0 most often says the same, and
        script = pathlib.Path(sys.argv[0]).name        # torchrun then ends us
        message = " ".join(str(error).splitlines())
        print(f"{script}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
