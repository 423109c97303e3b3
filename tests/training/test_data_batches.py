"""The plan is a pure function in which every sample has its turn."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vsparse.training.data.batches import BatchPlan, _shuffled

PLANS = st.builds(
    BatchPlan,
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    seed=st.integers(0, 5),
)


def _slots(plan: BatchPlan, count: int) -> list[tuple[int, int, int]]:
    """(step, micro, rank) of the first batches, in the order in which they are dealt."""
    slots = []
    for number in range(count):
        step, rest = divmod(number, plan.accumulate * plan.world_size)
        slots.append((step, *divmod(rest, plan.world_size)))
    return slots


@given(PLANS)
def test_each_epoch_covers_every_sample_and_repeats_only_to_fill_up(plan: BatchPlan) -> None:
    slots = _slots(plan, 3 * plan.batches)
    for epoch in range(3):
        dealt: Counter[int] = Counter()
        for slot in slots[epoch * plan.batches : (epoch + 1) * plan.batches]:
            indices = plan.indices(*slot)
            assert plan.place(*slot).epoch == epoch
            assert len(indices) == plan.batch_size
            assert len({plan.groups[i] for i in indices}) == 1
            dealt.update(indices)
        assert set(dealt) == set(range(len(plan.groups)))
        for group, size in Counter(plan.groups).items():
            assert size == plan.size(group)
            filled = sum(dealt[i] for i in range(len(plan.groups)) if plan.groups[i] == group) - size
            assert filled == -size % plan.batch_size
            counts = [dealt[i] for i in range(len(plan.groups)) if plan.groups[i] == group]
            assert max(counts) - min(counts) <= 1


@given(PLANS)
def test_ranks_and_micro_batches_take_what_one_process_would_take_in_turn(plan: BatchPlan) -> None:
    alone = BatchPlan(groups=plan.groups, batch_size=plan.batch_size, seed=plan.seed)
    slots = _slots(plan, 2 * plan.batches)
    assert [plan.indices(*slot) for slot in slots] == [alone.indices(i, 0, 0) for i in range(len(slots))]
    for epoch in range(2):  # batches of one epoch share nothing but what fills them up
        places = [plan.place(*slot) for slot in slots[epoch * plan.batches : (epoch + 1) * plan.batches]]
        assert len(set(places)) == plan.batches


@given(PLANS, st.randoms(use_true_random=False))
def test_the_plan_remembers_nothing(plan: BatchPlan, random: object) -> None:
    slots = _slots(plan, 2 * plan.batches)
    forwards = {slot: plan.indices(*slot) for slot in slots}
    random.shuffle(slots)  # type: ignore[attr-defined]
    _shuffled.cache_clear()
    fresh = BatchPlan(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})
    assert {slot: fresh.indices(*slot) for slot in slots} == forwards


def test_epochs_groups_and_seeds_are_shuffled_apart() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        plan = BatchPlan(groups=[0] * 20 + [1] * 20, batch_size=20, seed=seed)
        found = {plan.place(i, 0, 0): plan.indices(i, 0, 0) for i in range(4)}
        return [tuple(i % 20 for i in found[place]) for place in sorted(found, key=lambda p: (p.epoch, p.group))]

    every = orders(0) + orders(1)
    assert len(set(every)) == len(every)
    turns = [BatchPlan(groups=range(12), batch_size=1, seed=0).indices(i, 0, 0) for i in range(24)]
    assert turns[:12] != turns[12:]
    assert turns[:12] != sorted(turns[:12])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": []}, "no samples"),
        ({"groups": [0, -1]}, "groups must be integers >= 0, got -1"),
        ({"groups": ["a"]}, "groups must be integers"),
        ({"batch_size": 0}, "batch_size must be integers >= 1"),
        ({"world_size": True}, "world_size must be"),
        ({"accumulate": 1.5}, "accumulate must be"),
        ({"seed": -1}, "seed must be integers >= 0"),
    ],
)
def test_a_plan_of_odd_values_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BatchPlan(**{"groups": [0], "batch_size": 1} | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("slot", [(-1, 0, 0), (0, 2, 0), (0, 0, 3), (0, -1, 0), (0, 0, -1)])
def test_a_place_outside_is_refused(slot: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"step must be >= 0, micro in \[0, 2\), rank in \[0, 3\)"):
        BatchPlan(groups=[0], batch_size=1, world_size=3, accumulate=2).indices(*slot)
