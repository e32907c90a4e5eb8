"""The recipe that docs/model.md shows can be read, and means what its comments say."""

import re

from paths import ROOT

from vidmem_model.model.config import PRESETS
from vidmem_model.train.recipe import read_pretrain


def test_the_recipe_on_the_page(tmp_path):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/model.md").read_text(), re.DOTALL)
    (tmp_path / "my.yaml").write_text(recipe)
    config = read_pretrain(tmp_path / "my.yaml")
    assert config.model == PRESETS["demo"]
    assert [name.rpartition("/")[2] for name in config.data.videos] == ["a.mp4", "b.mp4"]
    assert config.data.test_every == 6 and config.optimisation.steps == 600
