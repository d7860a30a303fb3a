"""The lines that people read while a run goes on."""

from types import SimpleNamespace

from flexlora.experiment.summary import round_line


def line(*ranks: list[int]) -> str:
    clients = {f"c{n}": {"ranks": r} for n, r in enumerate(ranks)}
    record = SimpleNamespace(
        round=2, empty=False, clients=clients, metrics={"loss": 1.0}, bytes_up=2e6, bytes_down=3e6,
        refused={},
    )  # fmt: skip
    return round_line(record, 6, 16.2)


def test_a_small_cohort_is_told_by_name():
    told = "   16 s  round 2/6: c0 r4, c1 r32; training loss 1.000, 2.0 MB up, 3.0 MB down"
    assert line([4], [32]) == told


def test_a_large_one_by_clients_per_rank():
    ranks = [[8], [4], [32], [4], [4], [8], [4], [4]]
    assert "round 2/6: 5 r4, 2 r8, 1 r32; training loss" in line(*ranks)


def test_ranks_that_differ_between_modules_are_their_range():
    assert ": 6 r8, 1 r30-200;" in line(*[[8]] * 6, [30, 200])
