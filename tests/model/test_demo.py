"""The frames that the demo shows: spread over the whole clip, the same for a seed."""

import itertools
import random
from types import SimpleNamespace

import pytest

from vidmem_model.demo import DemoConfig, _choose


@pytest.mark.parametrize("seed", range(40))
def test_one_frame_is_chosen_from_each_part(seed):
    draw = random.Random(seed)
    total = draw.choice([1, 2, 7, 8, 96, 480, draw.randint(1, 5000)])
    config = DemoConfig(frames=draw.randint(1, 12), seed=seed)
    clip = SimpleNamespace(frames=range(total))
    chosen = _choose(config, clip)
    count = min(config.frames, total)
    assert len(chosen) == count and chosen == _choose(config, clip)
    for part, frame in enumerate(chosen):
        assert part * total // count <= frame < (part + 1) * total // count
    for one, other in itertools.pairwise(chosen):
        assert other - one >= max(1, total // count // 2), "near duplicates"


def test_another_seed_chooses_others():
    clip = SimpleNamespace(frames=range(480))
    assert len({tuple(_choose(DemoConfig(seed=seed), clip)) for seed in range(5)}) == 5
