"""The selective update under every ZeRO stage, precision and routing form: the full matrix."""

import itertools

import pytest
from integration.selective import assert_selective, selective_run
from multiprocess import run_ranks
from tiny_corpus import write_tiny_corpus

ZERO = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
FORMS = (
    ("block", "mid"),
    ("in_backward", "mid"),
    ("in_backward", "full"),
    ("random", "mid"),
    ("random", "full"),
)


def matrix(rank, world_size, data_dir, folder, cases):
    reports = {}
    for name, settings in cases.items():
        reports[name] = selective_run(rank, world_size, data_dir, folder / name, settings)
    return reports


def cases(zero=ZERO, forms=FORMS) -> dict[str, dict]:
    return {
        f"{stage} {'bf16' if bf16 else 'fp32'} {form} {paths}": {
            "zero": stage,
            "train__bf16": bf16,
            "routing__form": form,
            "routing__paths": paths,
        }
        for stage, bf16, (form, paths) in itertools.product(zero, (False, True), forms)
    }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_configuration_updates_the_path_and_nothing_else(world_size, tmp_path):
    write_tiny_corpus(tmp_path / "data")
    wanted = cases()
    reports = run_ranks(matrix, world_size, tmp_path / "data", tmp_path / "runs", wanted)
    assert all(set(report) == set(wanted) for report in reports)
    for rank, report in enumerate(reports):
        for name, found in report.items():
            assert_selective(found, f"{name}, rank {rank} of {world_size}")
