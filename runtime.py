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
import functools
import io
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint


# ---------------------------------------------------------------------------------------------------------------------------------
# Processes

def start_processes(device=None):
    """
    Join torchrun's process group if there is one. device: "cpu", "cuda" or None (CUDA when there is a GPU).
    returns (rank, world, torch.device); tensors on CUDA travel by NCCL, those on the CPU by gloo
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None,
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


def all_sum(tensor):
    """Sum of a tensor over the processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class StopSignal:
    """
    `with StopSignal() as stop:` SIGTERM (what a cluster sends before it takes a machine away) and Ctrl-C no longer end the process. The
    loop asks stop.asked() once a step, saves and leaves; all processes get the same answer. A second Ctrl-C ends it at once.
    """

    def __enter__(self):
        self.name = None
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def asked(self):
        """True on all processes once one of them got a signal. The flag travels on the CPU: no GPU waits for it."""
        flag = torch.tensor(float(self.name is not None))
        return bool(all_sum(flag) > 0)

    def farewell(self, step, args):
        """What to say once the state before `step` is saved."""
        return (f"{self.name or 'a signal to another process'}: stopped before step {step} of {args.steps}, {args.out}/ckpt.pt is written; "
                "the same command with --resume continues")


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
    failures = []

    class Watched(io.FileIO):                                                              # torch.save and numpy hide why a write failed
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
        os.chmod(temporary, 0o666 & ~_umask())                                             # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException as error:
        pathlib.Path(temporary).unlink(missing_ok=True)
        if failures or isinstance(error, OSError):
            cause = failures[0] if failures else error
            kept = "what was there before is whole" if path.exists() else "nothing is left of it"
            raise OSError(f"{path}: cannot be written ({cause.strerror}); {kept}; make room or name another place, then run again") from None
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_checkpoint(path, state):
    """Write a dict of tensors and plain Python values, atomically; torch.load(path, weights_only=True) reads it."""
    write_atomic(path, lambda file: torch.save(state, file))


def save_run(out, state, keep_every):
    """Write a run's state into out/ckpt.pt, and into out/ckpt_<step>.pt as well where keep_every > 0 divides its step; only rank 0 calls it."""
    save_checkpoint(f"{out}/ckpt.pt", state)
    if keep_every > 0 and state["step"] % keep_every == 0:
        save_checkpoint(f"{out}/ckpt_{state['step']}.pt", state)


def load_checkpoint(path, stage):
    """A checkpoint of this project as a dict on the CPU; ValueError or FileNotFoundError in one line if path is not one of this stage."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        code = "Unsupported" in str(error) or "weights_only" in str(error)
        reason = "holds more than plain data, of which nothing is run" if code else (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from None
    found = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if found != stage:
        raise ValueError(f"{path}: holds {f'a run of stage {found!r}' if found else 'no run of this project'}, expected stage {stage!r}")
    return checkpoint


def open_run(out, stage, args, resume, overwrite, free=()):
    """
    Claim the folder of a run: nothing that an earlier run left there is lost without being asked for.
    args     dict of plain values; on resume they must equal the checkpoint's, but for those named in free
    returns  the newest complete checkpoint of the run to resume from, or None for a fresh start
    raises   ValueError naming every flag that contradicts the checkpoint, or when there are checkpoints but none can be read
    """
    folder = pathlib.Path(out)
    if not next(path for path in (folder, *folder.absolute().parents) if path.exists()).is_dir():
        raise ValueError(f"--out {out}: a file is in the way; name another folder")
    kept = sorted(folder.glob("ckpt_*.pt"), key=lambda path: (len(path.name), path.name), reverse=True)  # newest first
    found = [path for path in (folder / "ckpt.pt", *kept) if path.exists()]
    if found and not resume and not overwrite:
        raise ValueError(f"--out {out}: holds a run already; add --resume to continue it, --overwrite to replace it, or name another")
    if not resume or not found:
        return None
    for path in found:
        try:
            checkpoint = load_checkpoint(path, stage)
            if not (isinstance(checkpoint.get("step"), int) and isinstance(checkpoint.get("args"), dict)):
                raise ValueError(f"{path}: not a readable checkpoint of a run (no step, or no flags)")
            break
        except ValueError as error:
            if path == found[-1] or "not a readable" not in str(error):
                raise
            print(f"{error}; trying an older one", file=sys.stderr, flush=True)
    saved = checkpoint["args"]
    changed = [f"--{k} {args[k]} (was {saved[k]})" for k in args if k in saved and k not in free and args[k] != saved[k]]
    if changed:
        raise ValueError(f"--resume: {path} was made with other flags: {', '.join(changed)}; give the same ones or another --out")
    return checkpoint


def restore(out, checkpoint, parts):
    """
    Put checkpoint[name] back into each of parts, {name: module, optimiser or EMA}, by load_state_dict.
    raises   ValueError in one line if one is missing, of another shape, or holds weights that are not finite
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint[name])
            finite = not isinstance(part, torch.nn.Module) or all(tensor.isfinite().all() for tensor in part.state_dict().values())
        except Exception as error:                                                         # a foreign file breaks this in any way
            raise ValueError(f"--resume: {out}/ckpt.pt: its {name} does not fit this run ({' '.join(str(error).split())[:200]}); take an older "
                             "checkpoint of it, or begin another --out") from None
        if not finite:
            raise ValueError(f"--resume: {out}/ckpt.pt: its {name} is not finite, so the training diverged; take an older checkpoint")


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
        return load_checkpoint(path, "ae").get("args", {})
    return {}


class RunLog:
    """
    log.jsonl, written by rank 0: one JSON object a line, each with its step. `add` collects every step's terms on their device, `write`
    averages them over steps and processes, so that the loop waits for the GPU only when a line is due.
    Opening it for a resume at step s drops the lines of steps >= s, which will be written again, and a last line that a crash cut short;
    it also clears the folder of half-written files and, at step 0, of the kept checkpoints of a run that is replaced.
    state     what `state()` returned when the checkpoint was made: the terms collected but not yet written
    bad_limit so many steps in a row that are not finite end the run
    """

    def __init__(self, path, rank=0, start_step=0, state=None, bad_limit=10):
        self.path, self.rank, self.bad_limit = pathlib.Path(path), rank, bad_limit
        self.totals = {tuple(names.split()): total for names, total in (state or {}).items()}  # names: (sum, count) (2, k)
        self.not_finite, self.in_a_row, self.skipped, self.zeros = [], {}, 0, {}
        if rank > 0:
            return
        kept = []
        if start_step > 0 and self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["step"] < start_step:
                        kept.append(line + "\n")
        for stale in self.path.parent.glob("ckpt_*.pt") if start_step == 0 else ():
            stale.unlink()                                                                 # of the run that this one replaces; never on a resume
        for stale in self.path.parent.glob(".*.tmp"):
            stale.unlink()                                                                 # of a write that was killed
        write_atomic(self.path, lambda file: file.write("".join(kept).encode()))
        self.file = open(self.path, "a", buffering=1)                                      # a line at a time, so that a crash cuts one

    def line(self, step, **values):
        """Append one line now (rank 0)."""
        if self.rank == 0:
            try:
                self.file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                raise OSError(f"{self.path}: cannot be written ({error.strerror}); make room, then --resume") from None

    def add(self, step, terms):
        """terms: {name: scalar tensor}, the same names on all processes. What is not finite is kept apart from the means."""
        values = torch.stack([value.detach().float() for value in terms.values()])         # (k,)
        finite = values.isfinite()
        total = torch.stack([values.where(finite, values.new_zeros(())), finite.float()])  # (2, k)
        names = tuple(terms)
        self.totals[names] = self.totals[names].to(total.device) + total if names in self.totals else total
        self.not_finite.append((step, names, ~finite))

    def finite(self, step):
        """Whether all that was added for this step is finite on all processes, as a bool tensor on the device."""
        flags = torch.cat([flags for at, _, flags in self.not_finite if at == step])
        return mean_over_processes(flags.any().float()) == 0

    def state(self):
        """What is collected and not yet written, as the mean over the processes: goes into checkpoints. Call it on all of them."""
        return {" ".join(names): mean_over_processes(total).cpu() for names, total in self.totals.items()}

    def write(self, step):
        """
        One line with the means since the last one, one for each step that was skipped; call it on all processes. returns {name: mean}
        raises ValueError after bad_limit steps in a row that were not finite: nothing was learned from them, the checkpoint is good
        """
        flags = all_sum(torch.cat([flags for *_, flags in self.not_finite]).float()).tolist()  # the one wait for the device
        steps = {}
        for at, names, _ in self.not_finite:
            bad, flags = [name for name, flag in zip(names, flags) if flag], flags[len(names):]
            steps[at] = [a + b for a, b in zip(steps.get(at, ([], [])), (list(names), bad))]
        for at, (names, bad) in steps.items():
            kind = frozenset(names)                                                        # a GAN's two kinds of steps are counted apart
            self.in_a_row[kind] = self.in_a_row.get(kind, 0) + 1 if bad else 0
            if bad:
                self.skipped += 1
                self.line(at, not_finite=sorted(set(bad)), skipped=self.skipped)
            if self.in_a_row[kind] >= self.bad_limit:
                raise ValueError(f"step {at}: {', '.join(sorted(set(bad)))} not finite, {self.bad_limit} steps in a row; nothing was learned from "
                                 f"them, and {self.path.parent}/ckpt.pt is from before: --resume it with --dtype fp32, or look at the data "
                                 "of these steps, or begin another --out with a lower --lr")
        sums = {}
        for names, total in self.totals.items():
            for name, *pair in zip(names, *all_sum(total.clone()).tolist()):
                sums[name] = [a + b for a, b in zip(sums.get(name, (0, 0)), pair)]
        means = {name: total / count for name, (total, count) in sums.items() if count}
        self.totals, self.not_finite = {}, []
        for name, mean in means.items():
            self.zeros[name] = self.zeros.get(name, 0) + 1 if mean == 0 else 0
            if self.zeros[name] == 10 and self.rank == 0:
                print(f"step {step}: {name} was exactly 0 in the last 10 lines of {self.path}; is its weight 0, its margin reached, its gradient cut?",
                      file=sys.stderr, flush=True)
        self.line(step, **means)
        return means


def step_if(finite, optimizer):
    """
    optimizer.step() and zero_grad, but where `finite`, a bool tensor, is false weights, moments and step count stay as they were.
    Decided on the device, without waiting for it. optimizer: fused AdamW, whose kernels ask for the attribute found_inf
    """
    optimizer.found_inf = 1.0 - finite.float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def recompute(network, kinds):
    """Every block of these classes forgets what it computed, and computes it again in the backward pass (torch.utils.checkpoint)."""
    for block in network.modules():
        if isinstance(block, kinds):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


class EMA:
    """
    Exponential moving average of a model's parameters and buffers, float32. decay_t = min(decay, (1 + t) / (10 + t)) at the t-th
    update, so that the average forgets the initialisation early.
    """

    def __init__(self, model, decay=0.9999):
        self.decay = decay
        current = model.state_dict()                                                       # the model's own memory, now and later
        self.shadow = {k: v.detach().clone() for k, v in current.items()}
        floats = [k for k, v in current.items() if v.is_floating_point()]
        self.pairs = [self.shadow[k] for k in floats], [current[k] for k in floats]

    def load_state_dict(self, state):
        for name, value in self.shadow.items():
            value.copy_(state[name])

    @torch.no_grad()
    def update(self, step):
        """step: optimiser steps done before this one, 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self.pairs, 1 - decay)


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
    for p in {parser, subparser} - {None}:                                                 # one line, as for every other mistake
        p.error = lambda message, p=p: p.exit(2, f"{p.prog}: {message}; {p.prog} --help lists the flags\n")
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
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)                                                                  # rank 0 most often says the same, and torchrun then ends us
        print(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
        raise SystemExit(2)
