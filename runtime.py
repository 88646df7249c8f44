"""
The machinery around a training loop, so that the loop itself reads like the paper: processes, random numbers, checkpoints, the log.

Processes: one per GPU under torchrun (NCCL), or per CPU worker (gloo), or a single plain `python`. Data-parallel training here is two
calls: `broadcast_parameters` once and `average_gradients` after backward. No wrapper module stands between the loop and the model, so
encode and decode can be called apart, two networks can alternate (GAN), and BatchNorm buffers are never touched behind the loop's back.

Random numbers: every draw of a step is a function of (seed, step), never of a generator's history, and batch-shaped draws are made
for the GLOBAL batch and then sliced. So a resumed run, or one on another number of processes, continues with the very same numbers.
"""
import argparse
import contextlib
import datetime
import json
import os
import pathlib
import sys
import tempfile
import traceback

import numpy as np
import torch
import torch.distributed as dist


# ---------------------------------------------------------------------------------------------------------------------------------
# Processes

def start_processes(device=None):
    """
    Join torchrun's process group if there is one. device: "cpu", "cuda" or None (CUDA when there is a GPU).
    returns (rank, world, torch.device); NCCL on CUDA, gloo on the CPU
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False                                                # float32 is meant where float32 is said
    if "RANK" not in os.environ:
        return 0, 1, torch.device(kind)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: process {local_rank} has no GPU, there are {torch.cuda.device_count()}; start one a GPU")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None,
                            timeout=datetime.timedelta(hours=2))                           # rank 0 alone downloads, saves and draws
    return dist.get_rank(), dist.get_world_size(), device


def stop_processes():
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait for all processes. A script ends with one: a process that leaves while another still works would end the run."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block before the others do: one download, then everybody reads the file."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:                                                                          # also when it failed: the others wait
            barrier()


def mean_over_processes(tensor):
    """The mean of a tensor over the processes; the tensor itself if there is one."""
    return all_sum(tensor.clone()) / dist.get_world_size() if dist.is_initialized() else tensor


def everywhere(ok, device):
    """True if ok holds on every process: what one cannot load, none may use."""
    return all_sum(torch.tensor(float(not ok), device=device)).item() == 0


def broadcast_parameters(module):
    """Rank 0's parameters and buffers to everybody, in place."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_gradients(parameters):
    """Replace each gradient by its mean over the processes, in buckets of at least 32 MB; parameters without one are left out."""
    if not dist.is_initialized():
        return
    world, bucket, size = dist.get_world_size(), [], 0
    gradients = [p.grad for p in parameters if p.grad is not None]
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
        if size >= 32 * 2 ** 20 or i == len(gradients) - 1:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, mean in zip(bucket, (flat / world).split([g.numel() for g in bucket])):
                g.copy_(mean.view_as(g))
            bucket, size = [], 0


def all_mean(values):
    """{name: scalar} -> {name: float}, averaged over the processes; names must be the same everywhere. One transfer, one host sync."""
    flat = torch.stack([torch.as_tensor(v).detach().float() for v in values.values()])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat = flat / dist.get_world_size()
    return dict(zip(values, flat.tolist()))


def all_sum(tensor):
    """Sum of a tensor over the processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------------------------------------------------------------------
# Random numbers: functions of (seed, step)

def step_seed(seed, step):
    """A well-mixed 63-bit seed for one step of one run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sharded_randn(shape, generator, rank, world):
    """
    Standard normal noise for this rank's share of the global batch: the same numbers whatever the number of processes.
    shape      (b, ...), b = global batch / world
    generator  seeded alike on every rank; the noise is drawn on its device
    returns    (b, ...) float32
    """
    noise = torch.randn(world * shape[0], *shape[1:], generator=generator, device=generator.device)
    return noise[rank * shape[0]:(rank + 1) * shape[0]]


# ---------------------------------------------------------------------------------------------------------------------------------
# What a run leaves behind: --out DIR with ckpt.pt and log.jsonl

def write_atomic(path, write):
    """
    Call write(binary file) on a temporary neighbour of path, then rename it: path is the old content or the new, never half of it.
    An interrupted write leaves path alone and removes the neighbour (unless the process is killed outright).
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())                                             # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_checkpoint(path, state):
    """Write a dict of tensors and plain Python values, atomically; torch.load(path, weights_only=True) reads it."""
    write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path, stage):
    """A checkpoint of this project as a dict on the CPU; ValueError or FileNotFoundError in one line if path is not one of this stage."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from None
    found = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if found != stage:
        raise ValueError(f"{path}: holds {f'a run of stage {found!r}' if found else 'no run of this project'}, expected stage {stage!r}")
    return checkpoint


def open_run(out, stage, args, resume, overwrite, free=()):
    """
    Claim the folder of a run: nothing that an earlier run left there is lost without being asked for.
    args     dict of plain values; on resume they must equal the checkpoint's, but for those named in free
    returns  the checkpoint to resume from, or None for a fresh start. ValueError names every flag that contradicts the checkpoint
    """
    path = pathlib.Path(out) / "ckpt.pt"
    if path.exists() and not resume and not overwrite:
        raise ValueError(f"--out {out}: holds a run already; add --resume to continue it, --overwrite to replace it, or name another")
    if not resume or not path.exists():
        return None
    checkpoint = load_checkpoint(path, stage)
    saved = checkpoint["args"]
    changed = [f"--{k} {args[k]} (was {saved[k]})" for k in args if k in saved and k not in free and args[k] != saved[k]]
    if changed:
        raise ValueError(f"--resume: {path} was made with other flags: {', '.join(changed)}; give the same ones or another --out")
    return checkpoint


def newest(pattern, hint):
    """The file matching the glob pattern that was written last; FileNotFoundError with the hint if there is none."""
    found = sorted(pathlib.Path().glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no {pattern} here; {hint}")
    return str(found[-1])


def run_name(path):
    """What a checkpoint file is called in folders and legends: its run's folder for ckpt.pt, else its own name without suffix."""
    path = pathlib.Path(path)
    return path.resolve().parent.name if path.stem == "ckpt" else path.stem


def checkpoint_args(path):
    """The flags with which a run of this project made the checkpoint at path; {} for other people's files."""
    with contextlib.suppress(ValueError, OSError):
        return load_checkpoint(path, "ae")["args"]
    return {}


class RunLog:
    """
    log.jsonl: one JSON object a line, each with its step. Opening it for a resume at step s drops the lines of steps >= s, which will
    be written again, and a last line that a crash cut short.
    """

    def __init__(self, path, start_step=0):
        path = pathlib.Path(path)
        kept = []
        if start_step > 0 and path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["step"] < start_step:
                        kept.append(line + "\n")
        write_atomic(path, lambda file: file.write("".join(kept).encode()))
        self.file = open(path, "a", buffering=1)                                           # a line at a time, so that a crash cuts one

    def write(self, step, **values):
        self.file.write(json.dumps({"step": step, **values}) + "\n")


class EMA:
    """
    Exponential moving average of a model's parameters and buffers, float32. decay_t = min(decay, (1 + t) / (10 + t)) at the t-th
    update, so that the average forgets the initialisation early.
    """

    def __init__(self, model, decay=0.9999):
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model, step):
        """step: optimiser steps done before this one, 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        floats = [k for k, v in self.shadow.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.shadow[k] for k in floats], [current[k] for k in floats], 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------------------
# Command lines

def parse_args(parser, presets, subparser=None):
    """
    parser.parse_args() in two passes: --preset NAME replaces defaults by presets[NAME], explicit flags win over both.
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
    return parser.parse_args()


@contextlib.contextmanager
def one_line_errors():
    """
    Around a script's main: a ValueError raised by this project's own code, or an OSError about a file, is a message to the user, so
    it ends the run with that one line and exit code 2. A ValueError from inside a library is a bug and keeps its traceback.
    """
    here = pathlib.Path(__file__).resolve().parent
    try:
        yield
        stop_processes()                                                                   # not after an error: it would wait for the others
    except (ValueError, OSError) as error:
        ours = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent == here
        if not ours and not getattr(error, "filename", None):
            raise
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2)
