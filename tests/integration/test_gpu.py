"""Whole runs on a GPU: losses as on the CPU, selective to the bit, resumed, never waited for."""

import pytest
import torch
from integration.runs import NO_DROPOUT, full_parameters, losses, make_trainer
from integration.selective import assert_selective, selective_run
from multiprocess import run_ranks
from tiny_corpus import write_tiny_corpus

pytestmark = pytest.mark.gpu

STEPS = 6
GPU, NCCL = torch.device("cuda", 0), "nccl"
EXACT = {key.replace(".", "__"): value for key, value in NO_DROPOUT.items()}
FORMS = {
    "preset": {},
    "in_backward": {"routing__form": "in_backward"},
    "random full": {"routing__form": "random", "routing__paths": "full"},
    "paper": {"method": "trelm-paper"},
    "dkplm": {"method": "dkplm"},
    "dkplm-encoder": {"method": "dkplm-encoder"},
    "truncated": {"routing__truncated_depth": 0.5, "routing__truncate_start": 0.5},
}
SELECTIVE = {
    f"{zero} {'bf16' if bf16 else 'fp32'} {form}": {
        "zero": zero,
        "train__bf16": bf16,
        "routing__form": form,
    }
    for zero in ("zero0", "zero1", "zero2", "zero3")
    for bf16 in (False, True)
    for form in ("block", "in_backward")
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


def run_forms(rank, world_size, data_dir, folder, device):
    """Losses and final weights of a run of each form."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {}
    for form, settings in FORMS.items():
        settings = EXACT | {"train__max_steps": STEPS, "device": device} | settings
        trainer = make_trainer(data_dir, folder / f"{form} {device.type}", **settings)
        trainer.train()
        found[form] = losses(trainer), full_parameters(trainer)
        trainer.engine.destroy()
    return found


def test_a_gpu_trains_as_the_cpu_does(data_dir, tmp_path, monkeypatch):
    (gpu,) = run_ranks(run_forms, 1, data_dir, tmp_path, GPU, backend=NCCL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # DeepSpeed takes a GPU where it sees one
    (cpu,) = run_ranks(run_forms, 1, data_dir, tmp_path, torch.device("cpu"))
    for form in FORMS:
        (wanted_rows, wanted_weights), (rows, weights) = cpu[form], gpu[form]
        assert len(wanted_rows) == STEPS
        for wanted, row in zip(wanted_rows, rows, strict=True):
            assert row[0] == wanted[0]
            for value, other in zip(row[1:], wanted[1:], strict=True):
                assert value == pytest.approx(other, rel=1e-3), form
        for name, weight in weights.items():
            # a learning rate of 1e-3 moves each entry by less than that a step
            torch.testing.assert_close(
                weight, wanted_weights[name], rtol=0, atol=5e-4, msg=f"{form} {name}"
            )


def selective(rank, world_size, data_dir, folder):
    return {
        name: selective_run(rank, world_size, data_dir, folder / name, {"device": GPU} | settings)
        for name, settings in SELECTIVE.items()
    }


def test_off_path_entries_keep_their_bits(data_dir, tmp_path):
    (reports,) = run_ranks(selective, 1, data_dir, tmp_path, backend=NCCL)
    for name in SELECTIVE:
        assert_selective(reports[name], name)


def watched(rank, world_size, data_dir, folder):
    """Steps in which torch raises wherever the host waits, from the batch to the backward."""
    found = {}
    for form, settings in FORMS.items():
        trainer = make_trainer(
            *(data_dir, folder / form),
            **({"device": GPU, "train__bf16": True, "zero": "zero1"} | settings),
        )
        forward, backward, step = trainer.model.forward, trainer.engine.backward, [0]

        def strictly(function, step=step):
            def call(*args, **kwargs):
                # the first steps load kernels and fill caches
                torch.cuda.set_sync_debug_mode("error" if step[0] > 2 else "default")
                try:
                    return function(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            return call

        take = trainer._step

        def counted(micro_batches, plan, take=take, step=step):
            step[0] += 1
            take(micro_batches, plan)

        trainer._step = counted
        trainer.model.forward = strictly(forward)
        trainer.engine.backward = strictly(backward)
        trainer.train()
        found[form] = step[0]
        trainer.engine.destroy()
    return found


def test_no_forward_or_backward_waits_for_the_device(data_dir, tmp_path):
    (found,) = run_ranks(watched, 1, data_dir, tmp_path, backend=NCCL)
    assert all(steps == STEPS for steps in found.values())


def resumed(rank, world_size, data_dir, folder):
    """Losses of a run, and of one stopped after half of it and resumed."""
    settings = {"device": GPU, "train__bf16": True, "train__max_steps": STEPS}
    whole = make_trainer(data_dir, folder / "whole", **settings)
    whole.train()
    result = losses(whole)
    whole.engine.destroy()
    trainer = make_trainer(data_dir, folder / "parts", **settings)
    plan, taken = trainer._plan, [0]

    def stop(micro_batches):
        taken[0] += 1
        trainer.stop.requested = taken[0] > STEPS // 2
        return plan(micro_batches)

    trainer._plan = stop
    assert trainer.train() is False
    trainer.engine.destroy()
    trainer = make_trainer(
        data_dir, folder / "parts", train__resume_from_checkpoint="latest", **settings
    )
    assert trainer.state.step == STEPS // 2
    trainer.train()
    parts = losses(trainer)
    trainer.engine.destroy()
    return result, parts


def test_a_resumed_run_goes_on_as_if_never_stopped(data_dir, tmp_path):
    """Dropout's generator included; sums of a GPU's atomics come in another order each time."""
    ((whole, parts),) = run_ranks(resumed, 1, data_dir, tmp_path, backend=NCCL)
    assert [row[0] for row in parts] == [row[0] for row in whole]
    for row, wanted in zip(parts, whole, strict=True):
        for value, other in zip(row[1:], wanted[1:], strict=True):
            assert value == pytest.approx(other, rel=2e-3)
