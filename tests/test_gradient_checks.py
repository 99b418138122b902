"""The batched checks of gradients against DeepSpeed's own, on real engines."""

import math

import pytest
import torch
from integration.runs import make_trainer
from multiprocess import run_ranks
from tiny_corpus import write_tiny_corpus

from trelm_ds.gradient_checks import any_not_finite, gradient_norms

CASES = {
    f"{zero} {'bf16' if bf16 else 'fp32'}": {"zero": zero, "train__bf16": bf16}
    for zero in ("zero1", "zero2")
    for bf16 in (False, True)
}
SPOILT = {"zero0 bf16": {"zero": "zero0", "train__bf16": True}} | CASES


def both_norms(rank, world_size, data_dir, folder):
    """(ours, DeepSpeed's) of every parameter group at the first steps."""
    found = {}
    for name, settings in CASES.items():
        trainer = make_trainer(data_dir, folder / name, train__max_steps=3, **settings)
        optimizer, pairs = trainer.engine.optimizer, []
        ours = optimizer.get_grad_norm_direct
        theirs = type(optimizer).get_grad_norm_direct

        def compared(grads, params, ours=ours, theirs=theirs, optimizer=optimizer, pairs=pairs):
            norm = ours(grads, params)
            pairs.append((float(norm), float(theirs(optimizer, grads, params))))
            return norm

        optimizer.get_grad_norm_direct = compared
        trainer.train()
        trainer.engine.destroy()
        found[name] = pairs
    return found


def spoilt_runs(rank, world_size, data_dir, folder):
    """Updates skipped in a run whose last rank has one NaN or infinity in the second backward."""
    found = {}
    for name, settings in SPOILT.items():
        for value in (math.inf, -math.inf, math.nan):
            trainer = make_trainer(
                data_dir, folder / f"{name} {value}", train__max_steps=3, **settings
            )
            spoilt = trainer.model.backbone.base_model.embeddings.LayerNorm.bias
            calls = [0]

            def spoil(grad, calls=calls, value=value):
                calls[0] += 1
                if calls[0] == 2 and rank == world_size - 1:
                    grad = grad.clone()
                    grad[-1] = value
                return grad

            spoilt.register_hook(spoil)
            trainer.train()
            found[name, value] = trainer.state.step - trainer.state.applied_steps
            trainer.engine.destroy()
    return found


def runs(rank, world_size, data_dir, folder):
    args = (rank, world_size, data_dir)
    return both_norms(*args, folder / "norms"), spoilt_runs(*args, folder / "spoilt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checks")
    write_tiny_corpus(folder / "data")
    return run_ranks(runs, 2, folder / "data", folder / "runs")


def test_norms_are_deepspeed_s(two_ranks):
    for norms, _ in two_ranks:
        for name, pairs in norms.items():
            assert len(pairs) == 12, name  # four parameter groups
            for ours, theirs in pairs:
                assert 0 < ours == pytest.approx(theirs, rel=1e-6), name


def test_one_bad_entry_on_one_rank_skips_the_update_on_all(two_ranks):
    for _, skipped in two_ranks:
        assert skipped == dict.fromkeys(skipped, 1) and len(skipped) == 15


def test_finite_gradients_of_any_size_are_finite():
    huge = torch.full((1000,), torch.finfo(torch.float32).max)
    assert gradient_norms([huge, torch.zeros(0)]).isfinite().all()
    half = torch.full((9,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert not any_not_finite([huge, None, half], huge.device)
    assert not any_not_finite([None], huge.device)
    assert any_not_finite([huge, torch.tensor([0.0, -math.inf])], huge.device)
