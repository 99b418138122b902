"""The batched checks of gradients against DeepSpeed's own, on real engines."""

import math

import pytest
import torch
from integration.runs import make_trainer
from multiprocess import run_ranks
from tiny_corpus import write_tiny_corpus

from trelm_ds.gradient_checks import any_not_finite, gradient_norms
from trelm_ds.trainer import MAX_SKIPPED_IN_A_ROW, TrainingError

CASES = {
    f"{zero} {'bf16' if bf16 else 'fp32'}": {"zero": zero, "train__bf16": bf16}
    for zero in ("zero1", "zero2")
    for bf16 in (False, True)
}
# Without ZeRO float32 updates are not skipped: the run ends before anything of them is saved.
FATAL = {
    f"zero0 fp32, clipped at {limit}": {"zero": "zero0", "train__max_grad_norm": limit}
    for limit in (1.0, 0.0)
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
    """Updates skipped in a run whose last rank has one NaN or infinity in the second backward, or
    how the run ends."""
    found = {}
    for name, settings in (SPOILT | FATAL).items():
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
            try:
                trainer.train()
                found[name, value] = trainer.state.step - trainer.state.applied_steps
            except TrainingError as error:
                found[name, value] = str(error), trainer.checkpoints.folder.exists()
            trainer.engine.destroy()
    return found


def skipping_run(data_dir, folder, bad_steps, rank, **settings):
    """A run whose rank 1 has no finite loss in some steps, and the memory bank after every step."""
    trainer = make_trainer(data_dir, folder, zero="zero1", train__max_steps=9, **settings)
    digests, step = [trainer.bank.digest()], trainer._step

    def spoil(module, inputs, output):
        if rank == 1 and module.training and trainer.state.step + 1 in bad_steps:
            return output._replace(loss=output.loss * math.nan)

    def noted(*args):
        step(*args)
        digests.append(trainer.bank.digest())

    trainer.model.register_forward_hook(spoil)
    trainer._step = noted
    message = ""
    try:
        trainer.train()
    except TrainingError as error:
        message = str(error)
    trainer.engine.destroy()
    changed = [a != b for a, b in zip(digests, digests[1:], strict=False)]
    return message, changed, trainer.state.applied_steps, trainer.checkpoints.find("latest")


def runs(rank, world_size, data_dir, folder):
    args = (rank, world_size, data_dir)
    skipping = {
        name: skipping_run(data_dir, folder / name, bad, rank)
        for name, bad in {"five": range(1, 10), "four": [1, 2, 3, 4, 6, 7, 8, 9]}.items()
    }
    return both_norms(*args, folder / "norms"), spoilt_runs(*args, folder / "spoilt"), skipping


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checks")
    write_tiny_corpus(folder / "data")
    return run_ranks(runs, 2, folder / "data", folder / "runs")


def test_norms_are_deepspeed_s(two_ranks):
    for norms, *_ in two_ranks:
        for name, pairs in norms.items():
            assert len(pairs) == 12, name  # four parameter groups
            for ours, theirs in pairs:
                assert 0 < ours == pytest.approx(theirs, rel=1e-6), name


def test_one_bad_entry_on_one_rank_skips_the_update_on_all(two_ranks):
    for _, found, _ in two_ranks:
        skipped = {key: value for key, value in found.items() if key[0] in SPOILT}
        assert skipped == dict.fromkeys(skipped, 1) and len(skipped) == 15


def test_where_nothing_is_skipped_one_bad_entry_ends_the_run_before_a_save(two_ranks):
    for _, found, _ in two_ranks:
        ended = [value for key, value in found.items() if key[0] in FATAL]
        assert len(ended) == 6
        for message, saved in ended:
            assert message.startswith("step 2: a gradient was not finite and the update was appl")
            assert not saved


def test_too_many_skipped_steps_in_a_row_end_the_run_and_name_the_rank(two_ranks):
    assert MAX_SKIPPED_IN_A_ROW == 5
    for *_, skipping in two_ranks:
        message, changed, applied, saved = skipping["five"]
        assert message == "step 5: the loss was not finite on rank(s) [1], 5 steps skipped in a row"
        assert changed == [False] * 5 and applied == 0 and saved is None


def test_a_skipped_step_writes_nothing_into_the_memory_bank(two_ranks):
    for *_, skipping in two_ranks:
        message, changed, applied, saved = skipping["four"]
        assert (message, applied, saved.name) == ("", 1, "step_00000009")
        assert changed == [step == 5 for step in range(1, 10)]


def test_finite_gradients_of_any_size_are_finite():
    huge = torch.full((1000,), torch.finfo(torch.float32).max)
    assert gradient_norms([huge, torch.zeros(0)]).isfinite().all()
    half = torch.full((9,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert not any_not_finite([huge, None, half], huge.device)
    assert not any_not_finite([None], huge.device)
    assert any_not_finite([huge, torch.tensor([0.0, -math.inf])], huge.device)
