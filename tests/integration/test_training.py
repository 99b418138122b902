"""Whole runs: every ZeRO configuration and method, two ranks as one, resume as no stop."""

import dataclasses
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from integration.runs import NO_DROPOUT, digest, full_parameters, losses, make_trainer
from integration.selective import assert_selective, selective_run
from multiprocess import run_ranks
from tiny_corpus import damage, write_tiny_corpus

from trelm_ds.distributed import barrier
from trelm_ds.errors import DataError
from trelm_ds.metrics import read_metrics

FP32_CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write_tiny_corpus(folder)
    return folder


def several(rank, world_size, jobs):
    """Starting ranks costs more than a small run: one start for all runs of a world size."""
    return {name: job(rank, world_size, *args) for name, (job, *args) in jobs.items()}


@pytest.fixture(scope="module")
def one_rank(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    jobs = {
        "methods": (all_methods, data_dir, folder / "methods"),
        "foreign": (refuse_foreign, data_dir, folder / "foreign"),
        "branch": (go_back, data_dir, folder / "branch"),
        "foreign branch": (go_on_from_another, data_dir, folder / "foreign branch"),
        "lost": (lose_checkpoints, data_dir, folder / "lost"),
        "died": (die_early, data_dir, folder / "died"),
        "slow start": (start_slowly, data_dir, folder / "slow start"),
        "full": (full_disk, data_dir, folder / "full"),
    }
    for form, settings in SPLIT_FORMS.items():
        jobs[f"split {form}"] = (split_run, data_dir, folder / form, settings)
    jobs["objectives"] = (objectives_run, data_dir, folder / "objectives")
    return run_ranks(several, 1, jobs)[0]


@pytest.fixture(scope="module")
def two_ranks(data_dir, tmp_path_factory):
    """The results of every rank."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        "zero": (zero_matrix, data_dir, folder / "zero"),
        "hours": (timed_run, data_dir, folder / "hours"),
        "objectives": (objectives_run, data_dir, folder / "objectives"),
        "one sided": (one_sided_run, data_dir, folder / "one sided"),
        "damage": (damaged_run, data_dir, folder / "damage"),
        "quarantine": (quarantine_run, data_dir, folder / "quarantine"),
    }
    for form, settings in SPLIT_FORMS.items():
        jobs[f"split {form}"] = (split_run, data_dir, folder / form, settings)
    for name, settings in RESUMED.items():
        jobs[f"resume {name}"] = (resumed_run, data_dir, folder / name, settings)
    for name, settings in SELECTIVE.items():
        jobs[f"selective {name}"] = (selective_run, data_dir, folder / f"s {name}", settings)
    return run_ranks(several, 2, jobs)


def run_once(data_dir, output_dir, **settings) -> dict:
    trainer = make_trainer(data_dir, output_dir, **settings)
    trainer.train()
    result = {"losses": losses(trainer), "parameters": full_parameters(trainer)}
    if trainer.bank is not None:
        result["bank"] = trainer.bank.digest()
    result["routing"] = trainer.routing.state_dict()
    if trainer.sampling is not None:
        result["sampling"] = trainer.sampling.state_dict()
    trainer.engine.destroy()
    return result


# The second half of these runs cuts the backward; a gradient norm that counted what an engine
# keeps of the last whole one would scale every update.
TRUNCATED = {
    "routing__truncated_depth": 0.5,
    "routing__truncate_start": 0.5,
    "train__max_grad_norm": 0.1,
}


def zero_matrix(rank, world_size, data_dir, output_dir):
    found = {}
    settings = {"train__max_steps": 4} | TRUNCATED | DOTTED_NO_DROPOUT
    for name in FP32_CONFIGS:
        found[name] = run_once(data_dir, output_dir / name, zero=name, **settings)["losses"]
    settings["routing__compact_gradients"] = True
    found["compact"] = run_once(data_dir, output_dir / "c", zero="zero0", **settings)["losses"]
    settings["routing__compact_gradients"] = False
    for name in ("zero1", "zero2", "zero3"):
        found[f"{name} bf16"] = run_once(
            data_dir,
            output_dir / f"{name}-bf16",
            zero=name,
            train__bf16=True,
            model__gradient_checkpointing=True,
            train__gradient_accumulation_steps=2,
            train__per_device_train_batch_size=2,
            **settings,
        )["losses"]
    return found


DOTTED_NO_DROPOUT = {key.replace(".", "__"): value for key, value in NO_DROPOUT.items()}


def test_every_zero_configuration_trains_alike(two_ranks):
    found = two_ranks[0]["zero"]
    reference = torch.tensor(found["zero0"])
    assert reference.shape == (4, 4) and reference.isfinite().all()
    assert found["compact"] == found["zero0"]  # to the bit
    for name, rows in found.items():
        tolerance = 2e-2 if "bf16" in name else 1e-4
        torch.testing.assert_close(torch.tensor(rows), reference, rtol=tolerance, atol=tolerance)


METHODS = ("trelm-paper", "trelm", "dkplm", "dkplm-encoder", "mlm", "trelm-no-injection")
METHODS += ("trelm-no-memory", "trelm-no-routing", "trelm-no-decoding")
ROUTINGS = ("in_backward", "quadrature", "random", "activation", "frozen")


def all_methods(rank, world_size, data_dir, output_dir):
    found = {}
    for method in METHODS:
        found[method] = run_once(data_dir, output_dir / method, method=method, train__max_steps=2)[
            "losses"
        ]
    for form in ROUTINGS:
        found[form] = run_once(
            data_dir, output_dir / form, method="trelm", routing__form=form, train__max_steps=2
        )["losses"]
    found["strict"] = run_once(
        data_dir, output_dir / "strict", routing__scope="strict", train__max_steps=2
    )["losses"]
    return found


def test_every_method_and_routing_form_runs_through_the_one_loop(one_rank):
    found = one_rank["methods"]
    for name, rows in found.items():
        assert len(rows) == 2, name
        assert all(row[1] == row[1] for row in rows), name
    first_mlm = {name: rows[0][2] for name, rows in found.items()}
    assert found["mlm"][0][3] is None and found["dkplm"][0][3] > 0
    # One initial model, one corpus: without injection the first MLM loss does not know the method.
    assert first_mlm["trelm-no-routing"] == pytest.approx(first_mlm["trelm"], rel=1e-6)
    assert first_mlm["random"] == pytest.approx(first_mlm["trelm"], rel=1e-6)


# A table of weights is made after step 2 and used from step 3 on.
WEIGHTED = {
    "sampling__form": "knowledge_state",
    "sampling__refresh_steps": 2,
    "sampling__knowledge_rows": 0.25,
}
SPLIT_FORMS = {
    "block": {"routing__form": "block"},
    "in_backward": {"routing__form": "in_backward"},
    "sampling": WEIGHTED | {"routing__form": "block"},
}


def split_run(rank, world_size, data_dir, output_dir, settings):
    # in_backward takes the paths from the step's first micro-batches: those of all ranks together
    # must be the same sequences. Everything else holds for any split of the global batch.
    one_split = settings["routing__form"] == "in_backward"
    micro, accumulation = (4 // world_size, 2) if one_split else (2, 4 // world_size)
    return run_once(
        data_dir,
        output_dir / f"w{world_size}",
        train__per_device_train_batch_size=micro,
        train__gradient_accumulation_steps=accumulation,
        train__max_steps=4,
        **TRUNCATED,
        **settings,
        **DOTTED_NO_DROPOUT,
    )


@pytest.mark.parametrize("form", SPLIT_FORMS)
def test_two_ranks_equal_one(one_rank, two_ranks, form):
    one = one_rank[f"split {form}"]
    two, other = (results[f"split {form}"] for results in two_ranks)
    torch.testing.assert_close(
        torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=2e-4, atol=2e-4
    )
    assert two["bank"] == other["bank"]
    if form == "sampling":
        for name, value in one["sampling"].items():
            if value.is_floating_point():  # K, and the weights made of it
                torch.testing.assert_close(two["sampling"][name], value, rtol=2e-4, atol=2e-4)
            assert torch.equal(other["sampling"][name], two["sampling"][name]), name
        assert torch.equal(one["sampling"]["count"], two["sampling"]["count"])
        assert one["sampling"]["count"].sum() > 10
    # Counts, blocks and paths; running score sums differ by rank and in the last bits.
    keep = [name for name, v in one["routing"].items() if not v.is_floating_point()]
    assert len(keep) >= 2
    for name in keep:
        assert torch.equal(one["routing"][name], two["routing"][name]), name
        assert torch.equal(other["routing"][name], two["routing"][name]), name


OBJECTIVES = {
    "decoding__entity_weight": 0.5,
    "decoding__entity_negatives": 5,
    "decoding__mentions": "all",
    "decoding__triple": "all",
    "train__object_loss_share": 0.3,
}
OBJECTIVE_KEYS = ("train/loss", "train/entity_loss", "train/entity_accuracy")
OBJECTIVE_KEYS += ("train/mlm_text_loss", "train/mlm_object_loss", "train/mlm_loss")


def logged(trainer) -> list[list[float]]:
    rows = read_metrics(trainer.output_dir / "metrics.jsonl")
    return [[row[key] for key in OBJECTIVE_KEYS] for row in rows if "train/loss" in row]


def objectives_run(rank, world_size, data_dir, output_dir):
    trainer = make_trainer(
        data_dir,
        output_dir / f"w{world_size}",
        train__per_device_train_batch_size=2,
        train__gradient_accumulation_steps=4 // world_size,
        train__max_steps=3,
        **OBJECTIVES,
        **DOTTED_NO_DROPOUT,
    )
    trainer.train()
    trainer.engine.destroy()
    return logged(trainer)


def test_objectives_on_two_ranks_equal_one(one_rank, two_ranks):
    one, two = torch.tensor(one_rank["objectives"]), torch.tensor(two_ranks[0]["objectives"])
    assert one.shape == (3, len(OBJECTIVE_KEYS)) and one[:, 1].min() > 0
    text, objects, mlm = one[:, 3:].T  # of one step each: the global means
    torch.testing.assert_close(mlm, 0.7 * text + 0.3 * objects)
    torch.testing.assert_close(two, one, rtol=2e-4, atol=2e-4)


def one_sided_run(rank, world_size, data_dir, output_dir):
    """Rank 1 has no object and nothing to decode: ZeRO-3 needs the same modules called on both."""
    found = {}
    for zero in ("zero0", "zero3"):
        trainer = make_trainer(
            data_dir,
            output_dir / zero,
            zero=zero,
            train__max_steps=2,
            **OBJECTIVES,
            **DOTTED_NO_DROPOUT,
        )
        plan, step = trainer._plan, trainer._step
        trainer._plan = lambda micro, plan=plan: plan(one_sided(micro, rank))
        trainer._step = lambda micro, p, step=step: step(one_sided(micro, rank), p)
        trainer.train()
        trainer.engine.destroy()
        found[zero] = logged(trainer)
    return found


def one_sided(micro_batches, rank) -> list:
    names = ("decode_mention", "decode_relation", "decode_other", "decode_tokens")
    names += ("decoded_positions", "entity_gold", "entity_hits")
    if not rank:
        return micro_batches
    return [
        dataclasses.replace(
            batch,
            mlm_mention=torch.full_like(batch.mlm_mention, -1),
            mlm_mention_group=torch.full_like(batch.mlm_mention_group, -1),
            mlm_mention_given=batch.mlm_mention_given[:0],
            **{name: getattr(batch, name)[:0] for name in names},
        )
        for batch in micro_batches
    ]


def test_a_rank_without_anything_to_decode_and_objects_trains_alike_under_zero_3(two_ranks):
    found = two_ranks[0]["one sided"]
    assert len(found["zero3"]) == 2 and torch.tensor(found["zero3"]).isfinite().all()
    torch.testing.assert_close(
        torch.tensor(found["zero3"]), torch.tensor(found["zero0"]), rtol=1e-4, atol=1e-4
    )


def resumed_run(rank, world_size, data_dir, output_dir, settings):
    settings = dict(settings)
    elsewhere = settings.pop("elsewhere", False)
    straight = run_once(data_dir, output_dir / "straight", **settings)
    stopped = make_trainer(data_dir, output_dir / "stopped", **settings)
    plan, taken = stopped._plan, [0]

    def stop_after_three(micro_batches):
        taken[0] += 1
        stopped.stop.requested = taken[0] > 3 and rank == 0  # one rank is asked, all stop
        return plan(micro_batches)

    stopped._plan = stop_after_three
    assert stopped.train() is False
    assert stopped.state.step == 3
    stopped.engine.destroy()
    torch.manual_seed(999)  # what the process did before must not matter
    name, which = "stopped", "latest"
    if elsewhere:  # nothing but the checkpoint is left of the run
        name, which = "elsewhere", output_dir / "stopped" / "checkpoints" / "step_00000003"
        straight["losses"] = straight["losses"][3:]
    resumed = run_once(
        data_dir, output_dir / name, train__resume_from_checkpoint=str(which), **settings
    )
    return {
        "losses": (straight["losses"], resumed["losses"]),
        "sampling": tuple(digest(run.get("sampling", {})) for run in (straight, resumed)),
        "parameters": (digest(straight["parameters"]), digest(resumed["parameters"])),
        "bank": (straight.get("bank"), resumed.get("bank")),
        "routing": (digest(straight["routing"]), digest(resumed["routing"])),
    }


ACCUMULATED = {"train__gradient_accumulation_steps": 2}
# Tables of steps 2 and 4 come into use at 3 and 5; the run stops at 3.
REFRESHED = {"decoding__hard_negative_refresh_steps": 2, "train__max_steps": 7}
REFRESHED |= {"decoding__entity_weight": 0.5}
# The backward is cut from step 4 of 6, or from 2; the runs stop at 3.
LATER = {"routing__truncated_depth": 0.5, "routing__truncate_start": 0.6}
EARLIER = LATER | {"routing__truncate_start": 0.3}
RESUMED = {
    "zero2 block": ACCUMULATED | LATER | {"zero": "zero2", "routing__form": "block"},
    "zero3 in_backward": ACCUMULATED | EARLIER | {"zero": "zero3", "routing__form": "in_backward"},
    "zero1 random": ACCUMULATED
    | WEIGHTED
    | {"zero": "zero1", "routing__form": "random", "elsewhere": True},
    "hard negatives": REFRESHED | {"decoding__hard_negatives": 4},
    "no hard negatives": REFRESHED,
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(two_ranks, name):
    for results in two_ranks:
        for what, (straight, resumed) in results[f"resume {name}"].items():
            assert straight == resumed, what


def test_hard_negatives_change_the_loss_from_the_step_they_come_into_use(two_ranks):
    hard, plain = (
        two_ranks[0][f"resume {name}"]["losses"][0]
        for name in ("hard negatives", "no hard negatives")
    )
    assert hard[:3] == plain[:3] and hard[3][3] != plain[3][3]


# Counts per element in flat partitions of fp32 masters; the optimizer offloaded. ZeRO 3 by default:
# test_zero_layout.py; the whole matrix: test_selective_update.py.
CUT = {"routing__truncated_depth": 0.5, "routing__truncate_start": 0.4}
SELECTIVE = {
    "zero2 bf16 in_backward full": {
        "zero": "zero2",
        "train__bf16": True,
        "routing__form": "in_backward",
        "routing__paths": "full",
    },
    "zero2_offload block": {"zero": "zero2_offload", "routing__form": "block"},
    "zero1 block truncated": {"zero": "zero1", "routing__form": "block", **CUT},
    "zero3 in_backward truncated": {"zero": "zero3", "routing__form": "in_backward", **CUT},
}


@pytest.mark.parametrize("name", SELECTIVE)
def test_the_path_follows_adamw_and_nothing_else_moves_by_a_bit(two_ranks, name):
    for results in two_ranks:
        report = results[f"selective {name}"]
        assert_selective(report, name)
        assert (report["frozen"] > 0) == ("truncated" in name)


def timed_run(rank, world_size, data_dir, output_dir):
    """A budget in hours, on ranks whose clocks disagree."""
    trainer = make_trainer(data_dir, output_dir, train__max_hours=1.0, train__max_steps=1000)
    step = trainer._step

    def slow_step(micro_batches, plan):
        step(micro_batches, plan)
        trainer.state.clock_s += 900 if rank else 100  # a quarter of the hour on rank 1

    trainer._step = slow_step
    assert trainer.train() is True
    return trainer.state.step, [r["step"] for r in read_metrics(output_dir / "metrics.jsonl")]


def test_a_budget_in_hours_ends_all_ranks_at_the_same_step(two_ranks):
    for steps, logged in (results["hours"] for results in two_ranks):
        assert steps == 4
        assert logged == [0, 1, 2, 3, 4, 4]  # evaluations at the start and the end


def damaged_run(rank, world_size, data_dir, output_dir):
    """A sample of rank 1 cannot be read at the fourth step; mended, the run goes on."""
    settings = {"train__max_steps": 6, **DOTTED_NO_DROPOUT}
    whole = run_once(data_dir, output_dir / "whole", **settings)
    trainer = make_trainer(data_dir, output_dir / "cut", **settings)

    def broken(step, iterate=trainer.loader.iterate):
        for number, micro_batches in enumerate(iterate(step)):
            if number == 3 and rank == 1:
                raise DataError("train-00000.tar: sample 00000007: crc32 does not match")
            yield micro_batches

    trainer.loader.iterate = broken
    with pytest.raises(DataError) as caught:
        trainer.train()
    trainer.engine.destroy()
    settings["train__resume_from_checkpoint"] = "latest"
    mended = run_once(data_dir, output_dir / "cut", **settings)
    same = digest(whole["parameters"]) == digest(mended["parameters"])
    return str(caught.value), trainer.state.step, same


def test_damage_in_the_midst_of_a_run_ends_it_with_a_checkpoint_on_all_ranks(two_ranks):
    for results in two_ranks:
        message, step, same = results["damage"]
        assert message.startswith("rank 1: train-00000.tar: sample 00000007") and step == 3
        assert message.endswith("step 3 is saved") and same


def quarantine_run(rank, world_size, data_dir, output_dir):
    """Of eight samples seven are damaged, so that whole micro-batches are: a run that may lose them
    all, one that stops on the way, and one that goes on with the folder mended."""
    folder = output_dir / "data"
    if rank == 0:
        shutil.copytree(data_dir, folder)
    barrier()
    run_once(folder, output_dir / "before", train__max_steps=1)  # it scores the mentions
    if rank == 0:
        damage(folder, (i for i in range(10**4) if i % 8))
    barrier()
    settings = {"train__max_steps": 6, "data__max_damaged_samples": 10**4, **DOTTED_NO_DROPOUT}
    whole = run_once(folder, output_dir / "whole", **settings)
    settings["data__max_damaged_samples"] = 20
    trainer = make_trainer(folder, output_dir / "cut", **settings)
    with pytest.raises(DataError) as caught:
        trainer.train()
    stopped = trainer.state.step, trainer.state.quarantined
    trainer.engine.destroy()
    if rank == 0:
        shutil.copytree(output_dir / "cut", output_dir / "later")
    barrier()
    settings |= {"data__max_damaged_samples": 10**4, "train__resume_from_checkpoint": "latest"}
    mended = run_once(folder, output_dir / "cut", **settings)
    same = digest(whole["parameters"]) == digest(mended["parameters"])
    if rank == 0:
        shutil.copytree(data_dir / "shards", folder / "shards", dirs_exist_ok=True)
    barrier()
    settings["data__max_damaged_samples"] = 0
    run_once(folder, output_dir / "later", **settings)
    logged = [
        {r["step"]: r["data/quarantined_total"] for r in rows if "data/quarantined_total" in r}
        for rows in (
            read_metrics(output_dir / name / "metrics.jsonl") for name in ("whole", "cut", "later")
        )
    ]
    return str(caught.value), stopped, same, logged


def test_damaged_samples_are_counted_and_one_too_many_ends_the_run(two_ranks):
    (message, (step, lost), same, logged), other = (r["quarantine"] for r in two_ranks)
    whole, cut, later = logged
    assert re.fullmatch(
        r"rank [01]: .*/train-0000\d.tar: sample \d{8}: crc32 .* \(data.max_damaged_samples\); "
        rf"step {step} is saved",
        message,
    )
    assert other == (message, (step, lost), same, logged) and same
    assert 0 < step < 6 and lost == whole[step] <= 20 < whole[step + 1]
    assert whole == cut and sorted(whole) == list(range(1, 7))
    assert later == {k: min(v, lost) for k, v in whole.items()}


def go_back(rank, world_size, data_dir, output_dir):
    """Resume from an older checkpoint: the newer one must not be found again."""
    settings = {"train__max_steps": 6, "train__save_steps": 2, "train__save_total_limit": 5}
    make_trainer(data_dir, output_dir, **settings).train()
    older = str(output_dir / "checkpoints" / "step_00000002")
    trainer = make_trainer(data_dir, output_dir, train__resume_from_checkpoint=older, **settings)
    assert trainer.state.step == 2
    named = (output_dir / "checkpoints" / "LATEST").read_text().strip()
    return trainer.checkpoints.find("latest").name, named


def test_the_branch_a_run_has_left_is_set_aside(one_rank):
    assert one_rank["branch"] == ("step_00000002", "step_00000002")


class Died(Exception):
    pass


def die_after(trainer, steps):
    """Ends the run without a word where the next step would begin."""
    step = trainer._step

    def dying(*args):
        if trainer.state.step == steps:
            raise Died
        step(*args)

    trainer._step = dying
    with pytest.raises(Died):
        trainer.train()
    trainer.engine.destroy()


def go_on_from_another(rank, world_size, data_dir, output_dir):
    """A run's folder goes on from another run's checkpoint, older than its own newest ones."""
    settings = {"train__max_steps": 6, "train__save_steps": 1}
    make_trainer(data_dir, output_dir / "a", train__save_total_limit=4, **settings).train()
    folder, other = output_dir / "a" / "checkpoints", output_dir / "b" / "checkpoints"
    shutil.copytree(folder / "step_00000004", other / "step_00000004")
    settings |= {"train__save_total_limit": 2}
    which = str(other / "step_00000004")
    found = []

    def note():
        names = sorted(p.name for p in folder.glob("*step_*"))
        found.append((names, (folder / "LATEST").read_text().strip()))

    trainer = make_trainer(
        data_dir, output_dir / "a", train__resume_from_checkpoint=which, **settings
    )
    note()
    die_after(trainer, 5)
    note()
    trainer = make_trainer(
        data_dir, output_dir / "a", train__resume_from_checkpoint="latest", **settings
    )
    found.append(trainer.state.step)
    trainer.train()
    note()
    for name in ("abandoned-metrics", "metrics"):  # two runs are not one history
        rows = read_metrics(output_dir / "a" / f"{name}.jsonl")
        found.append([r["step"] for r in rows if "train/loss" in r])
    return found


def test_checkpoints_later_than_another_run_s_are_set_aside(one_rank):
    resumed, died, went_on_from, ended, before, after = one_rank["foreign branch"]
    assert before == [1, 2, 3, 4, 5, 6] and after == [5, 6]
    aside = [f"abandoned-step_{step:08d}" for step in (4, 5, 6)]
    assert resumed == ([*aside, "step_00000003"], "step_00000003")
    assert died == ([*aside, "step_00000003", "step_00000005"], "step_00000005")
    assert went_on_from == 5
    assert ended == ([*aside, "step_00000005", "step_00000006"], "step_00000006")


def files_of(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def lose_checkpoints(rank, world_size, data_dir, output_dir):
    from trelm_ds.errors import CheckpointError

    settings = {"train__max_steps": 4, "train__save_steps": 2, **WEIGHTED}
    make_trainer(data_dir, output_dir, **settings).train()
    shutil.rmtree(output_dir / "checkpoints" / "step_00000002")
    shutil.rmtree(output_dir / "checkpoints" / "step_00000004")
    before = files_of(output_dir)
    with pytest.raises(CheckpointError, match="LATEST names 'step_00000004'"):
        make_trainer(data_dir, output_dir, train__resume_from_checkpoint="latest", **settings)
    return len(before), files_of(output_dir) == before


def test_a_run_whose_checkpoints_are_gone_is_left_as_it_is(one_rank):
    files, unchanged = one_rank["lost"]
    assert files > 3 and unchanged  # metrics, tables of weights, LATEST


def start_slowly(rank, world_size, data_dir, output_dir):
    """A second passes for each batch by the clock, and an hour until the first."""
    trainer = make_trainer(data_dir, output_dir, train__max_steps=4, train__logging_steps=2)
    now = [0.0]

    def slow(step, iterate=trainer.loader.iterate):
        now[0] += 3600
        for micro_batches in iterate(step):
            now[0] += 1
            yield micro_batches

    def tick():
        now[0] += 1e-6
        return now[0]

    trainer.loader.iterate = slow
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.perf_counter", tick)
        trainer.train()
    rows = read_metrics(output_dir / "metrics.jsonl")
    return trainer.state.clock_s, [r["data/wait_fraction"] for r in rows if "train/loss" in r]


def test_the_start_of_the_loader_is_not_on_the_clock(one_rank):
    clock, waits = one_rank["slow start"]
    assert clock == pytest.approx(3, abs=0.01)  # the first batch is part of the start
    assert waits == pytest.approx([1, 1], abs=0.01)


def die_early(rank, world_size, data_dir, output_dir):
    settings = {"train__max_steps": 3}
    die_after(make_trainer(data_dir, output_dir / "a", **settings), 2)
    settings["train__resume_from_checkpoint"] = "latest"
    return [run_once(data_dir, output_dir / name, **settings)["losses"] for name in ("a", "fresh")]


def test_a_run_that_died_before_its_first_checkpoint_starts_again(one_rank):
    again, fresh = one_rank["died"]
    assert again == fresh and len(fresh) == 3


def full_disk(rank, world_size, data_dir, output_dir):
    """No file can grow beyond 30 kB while the second of four checkpoints is written."""
    trainer = make_trainer(
        data_dir, output_dir / "a", train__max_steps=4, train__save_steps=1, **WEIGHTED
    )
    step, free = trainer._step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        step(*args)
        if trainer.state.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, free[1]))

    trainer._step = limited
    assert trainer.train()
    found = losses(trainer), digest(full_parameters(trainer))
    rows = read_metrics(output_dir / "a" / "metrics.jsonl")
    counts = [r["checkpoint/failed_saves"] for r in rows if "train/loss" in r]
    straight = run_once(data_dir, output_dir / "b", train__max_steps=4, **WEIGHTED)
    return found == (straight["losses"], digest(straight["parameters"])), counts


def test_a_run_goes_on_as_it_would_have_after_a_save_on_a_full_disk(one_rank):
    same, counts = one_rank["full"]
    assert same and counts == [0, 0, 1, 1]


def refuse_foreign(rank, world_size, data_dir, output_dir):
    from trelm_ds.errors import CheckpointError

    run_once(data_dir, output_dir / "a", train__max_steps=1)
    messages = []
    for settings in ({"train__seed": 7}, {"zero": "zero1"}, {"method": "dkplm"}):
        shutil.rmtree(output_dir / "b", ignore_errors=True)
        shutil.copytree(output_dir / "a", output_dir / "b")
        try:
            make_trainer(
                data_dir,
                output_dir / "b",
                train__max_steps=1,
                train__resume_from_checkpoint="latest",
                **settings,
            )
        except CheckpointError as error:
            messages.append(str(error))
    # Mentions scored anew in between: others would be injected from here on.
    shutil.copytree(data_dir, output_dir / "data")
    table = output_dir / "data" / "tables" / "importance.npy"
    np.save(table, np.load(table)[::-1])
    try:
        make_trainer(
            output_dir / "data",
            output_dir / "a",
            train__max_steps=1,
            train__resume_from_checkpoint="latest",
        )
    except CheckpointError as error:
        messages.append(str(error))
    return messages


def test_a_checkpoint_of_another_run_is_refused_with_each_difference(one_rank):
    seed, zero, method, tables = one_rank["foreign"]
    assert "tables was" in tables and "train.seed" not in tables
    assert "train.seed was 42 and is 7" in seed
    assert "zero_stage was 2 and is 1" in zero
    assert "memory.enabled was True and is False" in method and "routing.form was" in method
