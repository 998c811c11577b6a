"""The replay mixture holds the share it was asked for, the same in every process, and wastes no auxiliary example."""

import numpy as np
import pytest
import torch

from hf_momentum import InputError
from hf_momentum.training.replay import ReplayMixture

MAIN = [("main", i) for i in range(20_000)]
AUXILIARY = [("auxiliary", i) for i in range(500)]


def auxiliary_at(share: float, seed: int = 0) -> list[int]:
    mixture = ReplayMixture(MAIN, AUXILIARY, share, seed)
    return [i for i in range(len(mixture)) if mixture[i][0] == "auxiliary"]


@pytest.mark.parametrize("lam", [0.01, 0.1, 1.0, 10.0])
def test_the_share_of_auxiliary_examples_is_the_one_asked_for(lam):
    share = lam / (1 + lam)
    found = len(auxiliary_at(share)) / len(MAIN)
    assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / len(MAIN))


def test_no_share_is_the_main_data_and_all_of_it_the_auxiliary_ones():
    assert auxiliary_at(0.0) == []
    nothing, everything = ReplayMixture(MAIN, AUXILIARY, 0.0, 0), ReplayMixture(MAIN, AUXILIARY, 1.0, 0)
    assert [nothing[i] for i in range(100)] == MAIN[:100]
    assert {everything[i] for i in range(500)} == set(AUXILIARY)


def test_main_examples_keep_their_places():
    mixture = ReplayMixture(MAIN, AUXILIARY, 0.3, 1)
    assert all(mixture[i] == MAIN[i] for i in range(len(mixture)) if mixture[i][0] == "main")
    assert mixture[-1] == mixture[len(MAIN) - 1]


def test_what_a_position_holds_follows_from_the_seed_and_the_position_alone():
    """More main data behind it, or another order of reading, changes nothing."""
    long, short = ReplayMixture(MAIN, AUXILIARY, 0.4, 7), ReplayMixture(MAIN[:300], AUXILIARY, 0.4, 7)
    backwards = {i: short[i] for i in reversed(range(300))}
    assert [long[i] for i in range(300)] == [backwards[i] for i in range(300)]
    assert auxiliary_at(0.4, seed=7) != auxiliary_at(0.4, seed=8)
    assert set(auxiliary_at(0.1)) < set(auxiliary_at(0.4)), "a larger share keeps the places of a smaller one"


def test_every_auxiliary_example_is_seen_before_one_comes_again():
    mixture = ReplayMixture(MAIN, AUXILIARY, 0.5, 3)
    seen = [mixture[i][1] for i in auxiliary_at(0.5, seed=3)]
    for start in range(0, len(seen) - 500, 500):
        assert sorted(seen[start : start + 500]) == list(range(500))
    assert seen[:500] != list(range(500)), "in a drawn order"


def test_workers_read_what_one_process_reads():
    main, auxiliary = torch.arange(64), torch.arange(1000, 1010)
    mixture = ReplayMixture(main, auxiliary, 0.4, 0)
    alone, shared = (
        torch.cat(list(torch.utils.data.DataLoader(mixture, batch_size=8, num_workers=workers))) for workers in (0, 2)
    )
    assert torch.equal(alone, shared) and (alone >= 1000).any()


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(InputError, match=r"share must be in \[0, 1\], got 1.5"):
        ReplayMixture(MAIN, AUXILIARY, 1.5, 0)
    with pytest.raises(InputError, match="share must be in"):
        ReplayMixture(MAIN, AUXILIARY, float("nan"), 0)
    with pytest.raises(InputError, match="the auxiliary data of a replay mixture hold no example"):
        ReplayMixture(MAIN, [], 0.5, 0)
    with pytest.raises(IndexError):
        ReplayMixture(MAIN, AUXILIARY, 0.5, 0)[len(MAIN)]
