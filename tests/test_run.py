"""common/run.py: seeds, checkpoints, the log, two processes, device choices, signals, locks."""
import argparse
import json
import os
import signal
import sys
import time
from unittest.mock import Mock

import pytest
import torch

from common import run
from conftest import SERVER, read_lines, run_ranks, same


def test_step_seeds_are_distinct_and_repeatable():
    """A function of (seed, step): equal again, different for every neighbour."""
    seeds = {run.step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000 and run.step_seed(3, 5) == run.step_seed(3, 5)


def test_open_run_protects_what_is_there(tmp_path):
    """Continued or replaced only when asked; what differs is named; a --resume clears nothing."""
    flags = dict(out=str(tmp_path), resume=False, overwrite=False, steps=10, lr=1.0, seed=0)
    open_run = lambda **other: run.open_run(argparse.Namespace(**flags | other), "ae", {})
    assert open_run(resume=True) == (None, 0)              # nothing yet: a fresh start
    run.save_checkpoint(tmp_path / "ckpt.pt", dict(stage="ae", step=5, args=flags))
    with pytest.raises(ValueError, match="--resume continues it"):
        open_run()
    assert open_run(overwrite=True) == (None, 0)
    assert open_run(resume=True, steps=20)[1] == 5
    with pytest.raises(ValueError, match=r"--lr 2.0 \(was 1.0\), --seed 1 \(was 0\)"):
        open_run(resume=True, lr=2.0, seed=1)
    with pytest.raises(ValueError, match="--steps 4: .* 5 steps behind"):
        open_run(resume=True, steps=4)
    (tmp_path / "ckpt.pt").rename(tmp_path / "ckpt_5.pt")
    with pytest.raises(ValueError, match="continues it from its ckpt.pt"):
        open_run(resume=True)


@pytest.mark.parametrize("line", ["\ufffd\0", "[1]", "{}", "7", '{"step": "x"}', '{"step": 1, "lo'])
def test_a_resumed_log_has_no_gaps_or_repeats(line, tmp_path):
    """On resume at step 3, later lines and a damaged one go; a log that is removed goes on."""
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n{{"step": 3}}\n{{"ste')
    log = run.Log(path, start_step=3)
    log.write(3, a=1)
    assert [line["step"] for line in read_lines(path)] == [0, 2, 3]
    path.unlink()
    log.write(4, a=2)
    assert read_lines(path) == [dict(step=4, a=2)]


@pytest.mark.parametrize("before, after", [
    (torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)])
def test_moments_follow_their_parameters_layout(before, after):
    """A checkpoint of one memory layout goes on in the other: fused kernels go by the strides."""
    def make(layout):
        network = torch.nn.Conv2d(8, 16, 3).to(memory_format=layout)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        return dict(model=network, optimizer=optimizer)
    old, new = make(before), make(after)
    old["model"](torch.randn(2, 8, 5, 7)).square().sum().backward()
    old["optimizer"].step()
    run.restore({name: part.state_dict() for name, part in old.items()}, new)
    for p, q in zip(old["model"].parameters(), new["model"].parameters()):
        first, second = old["optimizer"].state[p], new["optimizer"].state[q]
        assert torch.equal(p, q) and same(first, second)
        assert second["exp_avg"].stride() == second["exp_avg_sq"].stride() == q.stride()


def weights(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(2, 1))


def main():
    """What each of two processes sees of weights, gradients (local until the last), log, nodes."""
    network = weights(0)
    assert run.ddp(network) is network                     # no process group yet
    rank, world, _ = run.init_distributed("cpu")
    assert (run.get_rank(), world) == (rank, 2) and run.ddp(None) is None
    local, mean = torch.tensor([[1.0, 2.0]]) * (1 + rank), torch.tensor([[1.5, 3.0]])
    network = weights(rank)
    step = run.ddp(network)
    assert same(network.state_dict(), weights(0).state_dict())
    for i in range(3):
        step.require_backward_grad_sync = i == 2
        step(local).sum().backward()                       # d sum(x w + b) / dw = x
        expected = 3 * mean if i == 2 else (i + 1) * local
        assert torch.equal(network[0].weight.grad, expected)
    log = run.Log("log.jsonl")
    log.add(0, dict(a=torch.tensor(rank), b=torch.tensor(float("nan") if rank == 1 else 1.0)))
    assert not log.finite(0)
    log.add(1, dict(a=torch.tensor(rank + 2)))
    assert log.finite(1) and log.write(1) == dict(a=1.5, b=1.0)
    run.need_one_node("samples")
    assert run.same_on_all_nodes("set", run.get_rank) == 0         # of each node's first process
    with pytest.raises(ValueError, match="--ae: differs"):     # replaced between two ranks' reads
        run.same_on_all_ranks("--ae", rank)
    run.platform.node = lambda: f"node{rank}"              # which reads its own disk
    os.environ["LOCAL_RANK"] = "0"
    if rank == 0:
        run.save_checkpoint("run0/ckpt.pt", dict(stage="ae", step=5, args={}))
    args = argparse.Namespace(out=f"run{rank}", resume=True, overwrite=False, steps=9)
    for words, refused in (("samples: .*--nnodes=1", lambda: run.need_one_node("samples")),
                           ("set: differs", lambda: run.same_on_all_nodes("set", run.get_rank)),
                           ("the step of .* differs", lambda: run.open_run(args, "ae", {}))):
        with pytest.raises(ValueError, match=words):
            refused()


def test_two_processes(tmp_path):
    """They share first weights, mean gradients, means, skipped steps; two nodes write no file."""
    run_ranks(2, "test_run", cwd=tmp_path, output=tmp_path / "output")


def test_library_errors_keep_their_traceback():
    """A bug inside a library stays visible; this project's own errors are in test_bad_input.py."""
    with pytest.raises(ValueError), run.one_line_errors():
        json.loads("{")


def test_the_log_goes_on_with_its_counts(tmp_path):
    """Bad steps are reported before a checkpoint: a resumed log is byte for byte a straight one."""
    def steps(name, *range_, state=None):
        log = run.Log(tmp_path / name / "log.jsonl", range_[0], state)
        for step in range(*range_):
            for part in (0.1, 0.2):                        # micro-batches
                bad = step in (2, 3)
                log.add(step, dict(loss=torch.tensor(float("nan") if bad else part + step)))
            if step % 3 == 0:
                log.write(step)
        return log.state()
    whole, state = steps("straight", 0, 9), steps("stopped", 0, 5)
    assert state["skipped"] == 2 and state["bad"] == {"loss": 0}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert steps("stopped", 5, 9, state=state) == whole
    texts = [(tmp_path / name / "log.jsonl").read_text() for name in ("straight", "stopped")]
    assert texts[0] == texts[1] and texts[0].count("not_finite") == 2
    last = json.loads(texts[0].splitlines()[-1])           # the means since the line before
    assert last == dict(step=6, loss=pytest.approx((4 + 5 + 6) / 3 + 0.15))


def test_a_fresh_run_removes_the_old_runs_checkpoints_alone(tmp_path):
    """--overwrite: ckpt.pt and ckpt_<step>.pt go; a copy under another name is the user's."""
    for name in ("ckpt.pt", "ckpt_5.pt", "ckpt-old.pt", "ckpt.best.pt"):
        (tmp_path / name).touch()
    run.Log(tmp_path / "log.jsonl", 0, dict(sums={}, bad={}, skipped=0))   # resumed at step 0: none
    assert len([*tmp_path.glob("*.pt")]) == 4
    run.Log(tmp_path / "log.jsonl")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["ckpt-old.pt", "ckpt.best.pt"]


@pytest.mark.parametrize("clip, moved", [(0.5, 0.5), (0.0, 6.0), (9.0, 6.0)])     # 0 is off
def test_the_gradient_is_clipped_to_its_norm(clip, moved):
    w = torch.nn.Parameter(torch.zeros(4))
    w.grad = torch.full((4,), 3.0)
    optimizer = torch.optim.SGD([w], 1.0, fused=True)
    assert run.optimizer_step(optimizer, 1.0, clip, torch.tensor(True)) == 6
    assert w.detach().norm() == pytest.approx(moved, rel=1e-4)


def test_what_differs_between_cpu_and_gpu_is_decided_in_one_place(monkeypatch, capsys):
    """run.device_choices: both devices' defaults; flags win; a line where something compiles."""
    backend = torch.backends.cudnn
    for name in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(backend, name, getattr(backend, name))

    def choose(device, fixed_size=True, **flags):
        args = argparse.Namespace(**dict(dtype=None, compile=None) | flags)
        autocast = run.device_choices(args, torch.device(device), fixed_size)
        return args.dtype, args.compile, backend.benchmark, backend.allow_tf32, autocast._enabled
    assert choose("cpu") == ("fp32", "off", False, False, False)
    for ampere, dtype in ((True, "bf16"), (False, "fp32")):        # emulated bf16 does not count
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(return_value=ampere))
        assert choose("cuda", compile="off")[0] == dtype
    assert choose("cuda", dtype="fp32", compile="off") == ("fp32", "off", True, False, False)
    assert choose("cpu", dtype="bf16")[-1]
    assert "--compile off" not in capsys.readouterr().out
    assert choose("cuda", fixed_size=False, dtype="fp32")[1:3] == ("on", False)
    assert capsys.readouterr().out.count("--compile off") == 1
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    assert choose("cpu", compile="on")[1] == "off"
    assert "no C++ compiler" in capsys.readouterr().out


def test_processes_ask_one_another_at_every_tenth_step(monkeypatch, handlers):
    """One process learns of a signal at once; several exchange it where 10 divides the step."""
    interrupt = run.Interrupt()
    interrupt.name, exchanged = "SIGTERM", []
    assert interrupt.asked(3)
    monkeypatch.setattr(run.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(run, "print0", lambda text: None)
    monkeypatch.setattr(run, "all_gather", lambda name: exchanged.append(name) or [None, name])
    assert [interrupt.asked(step) for step in range(21)] == [i % 10 == 0 for i in range(21)]
    assert len(exchanged) == 3


def test_sighup_counts_unless_it_is_ignored(handlers):
    """A closed terminal saves like SIGTERM, nohup ignores it; a second Ctrl-C ends the process."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run.Interrupt()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)           # a job in the background ignores it
    interrupt = run.Interrupt()
    os.kill(os.getpid(), signal.SIGHUP)
    assert interrupt.asked(0) and interrupt.name == "SIGHUP"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# ---- nothing silently wrong
def hold(path):
    """Hold the lock until killed."""
    run.locks.enter_context(run.file_lock(path, wait=False))
    (path.parent / "held").touch()
    time.sleep(60)


def test_a_second_process_in_one_out_is_refused(tmp_path):
    """Until the first one has ended, however it did."""
    path = tmp_path / ".lock"
    holder = SERVER.Process(target=hold, args=(path,))
    holder.start()
    while holder.is_alive() and not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="--out .*another process is writing there"):
        run.locks.enter_context(run.file_lock(path, wait=False))
    holder.kill()
    holder.join()
    with run.file_lock(path, wait=False):
        pass
    assert not path.exists()


def test_what_is_not_finite_takes_no_checkpoints_place(tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    run.save_checkpoint(path, dict(stage="ae", step=1, model=dict(w=torch.ones(2))))
    for bad in (dict(model=dict(w=torch.tensor([1.0, float("inf")]))),
                dict(optimizer=dict(state={0: dict(exp_avg=torch.tensor(float("nan")))}))):
        run.save_checkpoint(path, dict(stage="ae", step=2) | bad, keep_every=2)
    assert os.listdir(tmp_path) == ["ckpt.pt"] and run.load_checkpoint(path, "ae")["step"] == 1
    assert capsys.readouterr().err.count("step 2: weights or moments are not finite") == 2


def test_the_reason_of_an_error():
    """Without torch's advice to unpickle; a folder named weights is no such advice."""
    assert "plain data" in run.reason(RuntimeError("re-running `torch.load` with `weights_only` "))
    error = PermissionError(13, "Permission denied", "/data/weights/ckpt.pt")
    assert "Permission denied" in run.reason(error)


def test_output_without_a_reader_ends_nothing(monkeypatch):
    """`python train_ae.py | head`, or a terminal that was closed."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w", buffering=1))
    for step in range(2):
        run.print0(f"step {step}")
