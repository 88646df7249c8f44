"""
What a run leaves behind in --out DIR: ckpt.pt, kept checkpoints, log.jsonl. A file is written
beside its place and renamed, so that a kill or a full disk leaves the old one whole; only the log
grows, a line at a time. A run goes on only with the flags, pictures and weights it began with.

Checkpoints are plain dicts of tensors and plain Python values: torch.load(weights_only=True) reads
them, on any device.
"""
import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile

import torch

from runtime import all_sum, mean_over_processes, need


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
        return mean_over_processes(flags.any().float()) == 0

    def state(self):
        """
        What is collected and not yet written, and what is counted, for checkpoints. Call it on all
        processes; bad steps are reported first, so that a resumed run need not know of them.
        """
        self.report_skipped()
        totals = {" ".join(names): mean_over_processes(total).cpu()
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
