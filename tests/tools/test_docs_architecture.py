"""docs/architecture.svg is what its command draws from the code now."""

import re
import sys
from xml.etree import ElementTree

from paths import ROOT

from vidmem_kernels.testing import public_functions

sys.path.insert(0, str(ROOT / "docs" / "site"))
import draw_architecture  # noqa: E402


def test_the_picture_is_up_to_date():
    drawn = draw_architecture.PICTURE.read_text(encoding="utf-8")
    assert drawn == draw_architecture.picture(), "run: python docs/site/draw_architecture.py"


def test_the_picture_has_every_op_and_room_and_nothing_outside():
    root = ElementTree.fromstring(draw_architecture.picture())
    width, height = (float(each) for each in root.get("viewBox").split()[2:])
    texts = [node for node in root.iter() if node.tag.endswith("}text")]
    words = {word for node in texts for word in re.findall(r"\w+", node.text)}
    assert public_functions() <= words
    assert {room for row in draw_architecture.rooms() for room in row} <= words
    for node in texts:
        x, y = float(node.get("x")), float(node.get("y"))
        is_middle = "middle" in node.get("class")
        length = len(node.text) * (7.9 if "name" in node.get("class") else 6.6)  # of a letter, at most, on average
        assert (x - length / 2 if is_middle else x) > 0, node.text
        assert (x + length / 2 if is_middle else x + length) < width and 0 < y < height, node.text
