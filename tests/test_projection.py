"""The projection's mask against brute force and its properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_update import brute_force_mask

from rnm_td3_continuous import nm_mask

SHAPES = [(1, 1), (256, 17), (8, 256), (1, 256), (256, 376), (5, 3)]
PATTERNS = [(1, 2), (2, 4), (1, 4), (1, 8), (1, 16), (3, 5), (4, 4), (4, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n, m", PATTERNS)
def test_equals_brute_force_over_all_subsets(shape, n, m):
    weight = np.random.default_rng(0).normal(size=shape)
    weight = weight[: max(1, 4000 // shape[1])]  # brute force is slow: a few rows are enough
    assert (nm_mask(torch.from_numpy(weight), n, m).numpy() == brute_force_mask(weight, n, m)).all()


@given(data=st.data(), rows=st.integers(1, 6), columns=st.integers(1, 40), m=st.integers(1, 17))
@settings(max_examples=300, deadline=None)
def test_properties(data, rows, columns, m):
    n = data.draw(st.integers(1, m))
    # Few different magnitudes, so that there are ties; zeros and both signs too.
    entries = data.draw(st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(entries, dtype=torch.float32).view(rows, columns)
    mask = nm_mask(weight, n, m)
    assert mask.shape == weight.shape and mask.dtype == torch.bool
    for start in range(0, columns, m):
        group, kept = weight[:, start : start + m].abs(), mask[:, start : start + m]
        width = group.shape[1]
        assert (kept.sum(1) == min(n, width)).all()
        for magnitudes, chosen in zip(group.tolist(), kept.tolist(), strict=True):
            # By magnitude, and the lowest column first among equal ones: this fixes the mask.
            best = sorted(range(width), key=lambda i: (-magnitudes[i], i))[:n]
            assert [i for i in range(width) if chosen[i]] == sorted(best)
    # Idempotent where magnitudes differ from zero: the projection of a projection keeps what it kept.
    distinct = weight.sign() * (weight.abs() + torch.arange(1, columns + 1) * 0.01)
    once = nm_mask(distinct, n, m)
    active = distinct * once
    assert torch.equal(nm_mask(active, n, m) & (active != 0), once & (active != 0))


def test_wrong_pattern_is_refused():
    for n, m in [(0, 4), (5, 4), (-1, 2), (1, 0)]:
        with pytest.raises(ValueError, match=f"{n}:{m}"):
            nm_mask(torch.ones(2, 8), n, m)
