"""The errors that docs/troubleshooting.md explains are those that are raised."""

import re

import pytest
import torch
from paths import ROOT

import vidmem_kernels as vk

SECTION = (ROOT / "docs/troubleshooting.md").read_text().split("## It raises an error\n")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| `([^`]+)` \|", SECTION, re.MULTILINE)

X = torch.randn(1, 10, 4)
Q = torch.randn(1, 6, 4, 8)
CALLS = {
    "a backend that cannot": lambda: vk.match_tokens(X, 2, backend="cuda"),
    "an index that is not there": lambda: vk.gather_tokens(X, torch.tensor([[3, 11]])),
    "8-bit rows without a scale": lambda: vk.gather_tokens(X.to(torch.int8), torch.tensor([[3]])),
    "float rows with a scale": lambda: vk.gather_tokens(X, torch.tensor([[3]]), scale=torch.ones(1, 10)),
    "too many merges": lambda: vk.match_tokens(X, 9),
    "another grid": lambda: vk.match_tokens(X, 2, grid=(2, 2, 2)),
    "a plan of other tokens": lambda: vk.merge_tokens(X[:, :3], vk.match_tokens(X, 2)),
    "mixed dtypes": lambda: vk.cross_attention(Q, Q.half(), Q.half()),
    "a window without times": lambda: vk.cross_attention(Q, Q, Q, window=(1, 1)),
    "heads that do not divide": lambda: vk.cross_attention(Q, Q[:, :, :3], Q[:, :, :3]),
}


def explained(error: Exception) -> set[str]:
    """Rows of the page whose error it is."""
    said = f"{type(error).__name__}: {error}"
    return {row for row in ROWS if re.search(re.escape(row).replace("…", ".*"), said)}


@pytest.mark.parametrize("what", CALLS)
def test_the_page_explains(what):
    with pytest.raises((ValueError, TypeError, IndexError, vk.BackendError)) as caught:
        CALLS[what]()
    assert len(explained(caught.value)) == 1, caught.value


def test_every_error_of_the_page_is_raised():
    found = set()
    for call in CALLS.values():
        try:
            call()
        except (ValueError, TypeError, IndexError, vk.BackendError) as error:
            found |= explained(error)
    assert found == set(ROWS)
