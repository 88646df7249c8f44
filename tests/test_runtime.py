"""
The machinery: noise that does not depend on the number of processes, atomic files, the log,
one-line errors, presets.
"""
import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

from common import run
from conftest import ROOT


def test_step_seeds_are_distinct_and_repeatable():
    """A function of (seed, step): equal again, different for every neighbour."""
    seeds = {run.step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000 and run.step_seed(3, 5) == run.step_seed(3, 5)


def test_sharded_noise_is_the_same_on_any_number_of_processes():
    """The shares of 4 processes, put together, are the noise of one."""
    def draw(rank, world):
        generator = torch.Generator().manual_seed(7)
        return run.sharded_randn((8 // world, 4, 3, 5), generator, rank, world)
    assert torch.equal(torch.cat([draw(rank, 4) for rank in range(4)]), draw(0, 1))


def test_interrupted_write_keeps_the_old_file(tmp_path):
    """
    An error in the middle of a write leaves the previous checkpoint whole and no temporary file.
    """
    path = tmp_path / "ckpt.pt"
    run.save_checkpoint(path, dict(stage="ae", step=1, x=torch.ones(3)))

    def breaks(file):
        file.write(b"half of it")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run.write_atomic(path, breaks)
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert run.load_checkpoint(path, "ae")["step"] == 1


def test_load_checkpoint_names_the_culprit(tmp_path):
    """No file, not a checkpoint, another stage: one line each, with the path."""
    path = tmp_path / "ckpt.pt"
    with pytest.raises(FileNotFoundError, match="ckpt.pt: no such checkpoint"):
        run.load_checkpoint(path, "ae")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="ckpt.pt: not a readable checkpoint"):
        run.load_checkpoint(path, "ae")
    torch.save(dict(stage="diffusion"), path)
    with pytest.raises(ValueError, match="stage 'diffusion', expected stage 'ae'"):
        run.load_checkpoint(path, "ae")


def test_open_run_protects_what_is_there(tmp_path):
    """
    A run is continued or replaced only when asked, and contradicting flags are named one by one.
    """
    args = dict(lr=1.0, steps=10, seed=0)

    def open_run(flags, resume=False, overwrite=False, **free):
        return run.open_run(tmp_path, "ae", flags, resume=resume, overwrite=overwrite, **free)
    assert open_run(args, resume=True) is None               # nothing yet: a fresh start
    run.save_checkpoint(tmp_path / "ckpt.pt", dict(stage="ae", step=5, args=args))
    with pytest.raises(ValueError, match="--resume to continue"):
        open_run(args)
    assert open_run(args, overwrite=True) is None
    assert open_run(dict(args, steps=20), resume=True, free=("steps",))["step"] == 5
    with pytest.raises(ValueError, match=r"--lr 2.0 \(was 1.0\), --seed 1 \(was 0\)"):
        open_run(dict(args, lr=2.0, seed=1), resume=True)


def test_log_continues_without_gaps_or_repeats(tmp_path):
    """On resume at step 4, later lines and a half-written one go; earlier ones stay."""
    path = tmp_path / "log.jsonl"
    log = run.RunLog(path)
    for step in range(6):
        log.line(step, loss=step / 10)
    log.file.write('{"step": 6, "lo')
    log.file.close()
    log = run.RunLog(path, start_step=4)
    log.line(4, loss=0.4)
    log.file.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]


def test_only_a_fresh_start_removes_kept_checkpoints(tmp_path):
    """
    A resume from step 5, after a newer checkpoint could not be read, leaves that file alone; a run
    that replaces another clears them.
    """
    for step in (5, 10):
        run.save_checkpoint(tmp_path / f"ckpt_{step}.pt", dict(stage="ae", step=step))
    run.RunLog(tmp_path / "log.jsonl", start_step=5)
    assert {path.name for path in tmp_path.glob("ckpt_*")} == {"ckpt_5.pt", "ckpt_10.pt"}
    run.RunLog(tmp_path / "log.jsonl", start_step=0)
    assert not list(tmp_path.glob("ckpt_*"))


def test_ema_arithmetic():
    """
    decay_t = min(decay, (1 + t) / (10 + t)); integer buffers follow the first value; a scalar model
    by hand.
    """
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = run.EMA(model, decay=0.5)
    torch.nn.init.ones_(model.weight)
    expected = 0.0
    for step in range(20):
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * 1.0
        assert abs(ema.shadow["weight"].item() - expected) < 1e-6


def test_presets_set_defaults_and_flags_win(monkeypatch):
    """--preset replaces defaults, an explicit flag replaces the preset's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", choices=("a", "b"), default="a")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=1)
    monkeypatch.setattr(sys, "argv", ["x", "--preset", "b", "--steps", "7"])
    args = run.parse_args(parser, dict(a={}, b=dict(lr=2.0, steps=3)))
    assert (args.lr, args.steps) == (2.0, 7)


def test_data_parallel_over_two_processes(tmp_path):
    """
    Two gloo processes: rank 0's first weights are everybody's, under bare names; gradients are
    averaged, or kept local and added up until the average is asked for; None stays None. The log's
    means are over both, and what is not finite on one is skipped by both.
    """
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from common import run
network = torch.nn.Sequential(torch.nn.Linear(2, 1))
assert run.ddp(network) is network           # no process group yet
rank, world, device = run.init_distributed("cpu")
assert world == 2 and run.ddp(None) is None

def weights(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(2, 1))

local, mean = torch.tensor([[1.0, 2.0]]) * (1 + rank), torch.tensor([[1.5, 3.0]])
for static in (False, True):
    network = weights(rank)
    step = run.ddp(network, static)
    assert step is not network and not torch.equal(weights(0)[0].weight, weights(1)[0].weight)
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
    for name, value in weights(0).state_dict().items():
        assert torch.equal(network.state_dict()[name], value)
    with run.averaging(True, step, None):
        step(local).sum().backward()                       # d sum(x w + b) / dw = x
    assert torch.equal(network[0].weight.grad, mean)

network = weights(rank)
step = run.ddp(network)                      # a static graph averages every time
for part in (1, 2):
    with run.averaging(False, step, None):
        step(local).sum().backward()
    assert torch.equal(network[0].weight.grad, part * local)
with run.averaging(True, step, None):
    step(local).sum().backward()
assert torch.equal(network[0].weight.grad, 3 * mean)

log = run.RunLog({str(tmp_path / "log.jsonl")!r}, rank)
log.add(0, dict(a=torch.tensor(rank), b=torch.tensor(float("nan") if rank == 1 else 1.0)))
assert not log.finite(0)
log.add(1, dict(a=torch.tensor(rank + 2)))
assert log.finite(1) and log.write(1) == dict(a=1.5, b=1.0)
del step, network
run.stop_processes()
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_own_errors_are_one_line_and_library_errors_keep_their_traceback(tmp_path):
    """
    ValueErrors of this project end with exit code 2 and one line; a bug inside a library stays
    visible.
    """
    with pytest.raises(SystemExit) as exit, run.one_line_errors():
        run.load_checkpoint(tmp_path / "none.pt", "ae")
    assert exit.value.code == 2
    with pytest.raises(ValueError), run.one_line_errors():
        json.loads("{")


def test_the_log_goes_on_with_its_counts(tmp_path):
    """A bad step between two lines is reported before the checkpoint; counts continue after it."""
    def log_of(path, start_step=0, state=None):
        return run.RunLog(path / "log.jsonl", 0, start_step, state, bad_limit=3)

    def steps(log, *range_):
        for step in range(*range_):
            log.add(step, dict(loss=torch.tensor(float("nan") if step in (2, 3) else 0.0)))
            if step % 2 == 0:
                log.write(step)
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    log = log_of(tmp_path / "straight")
    steps(log, 0, 4)
    log.state()
    steps(log, 4, 9)
    log.state()
    first = log_of(tmp_path / "stopped")
    steps(first, 0, 4)
    state = first.state()
    assert state["skipped"] == 2 and state["in_a_row"] == {"loss": 2}
    torch.save(state, tmp_path / "state.pt")
    first.file.close()
    again = log_of(tmp_path / "stopped", 4, torch.load(tmp_path / "state.pt", weights_only=True))
    steps(again, 4, 9)
    assert again.state() == log.state()
    texts = [(tmp_path / name / "log.jsonl").read_text() for name in ("straight", "stopped")]
    assert texts[0] == texts[1] and texts[0].count("not_finite") == 2


def test_a_fresh_run_removes_the_old_runs_checkpoints_alone(tmp_path):
    """--overwrite: ckpt.pt and ckpt_<step>.pt go; a copy under another name is the user's."""
    for name in ("ckpt.pt", "ckpt_5.pt", "ckpt-old.pt", "ckpt.best.pt"):
        (tmp_path / name).write_bytes(b"x")
    run.RunLog(tmp_path / "log.jsonl")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["ckpt-old.pt", "ckpt.best.pt"]


def test_one_process_in_a_job_of_several_nodes_is_one_node(monkeypatch):
    """SLURM_NNODES=2 and no RANK: a plain python may write its files."""
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.delenv("RANK", raising=False)
    run.need_one_node("samples")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="samples: .*--nnodes=1"):
        run.need_one_node("samples")
