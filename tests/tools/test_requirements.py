"""Where something is missing or of another version, imports and commands say so in one line, with what to install."""

from __future__ import annotations

import random
import re
import shlex
import sys

import pytest
from install_helpers import DISTRIBUTIONS, ROOT, declared, environment, fresh_environment, run, stated_version

MODULES = {"vidmem-kernels": "vidmem_kernels", "pyyaml": "yaml"}  # where it is not the distribution's name
VERSION = stated_version("vidmem_model")
KERNELS = f"vidmem-kernels=={VERSION}"
NEEDS = {package: declared(package)["dependencies"] for package in DISTRIBUTIONS}
PATH = f"{ROOT}:{ROOT}/python"


def name_of(requirement):
    return re.match(r"[\w-]+", requirement).group()


def module_of(requirement):
    return MODULES.get(name_of(requirement), name_of(requirement))


# --- what is declared ---


def test_versions_agree():
    assert stated_version("vidmem_kernels") == VERSION
    assert KERNELS in NEEDS["vidmem_model"]
    assert re.search(r"^## ([\d.]+\w*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == VERSION
    for package in DISTRIBUTIONS:
        assert "version" in declared(package)["dynamic"]  # it stands in the package alone


def test_what_is_looked_at_is_what_is_declared():
    from vidmem_kernels._requirements import MINIMUM
    from vidmem_model._requirements import NEEDED

    assert {f"{name}>={least}" if least else name for name, least in MINIMUM.items()} == set(NEEDS["vidmem_kernels"])
    assert {module_of(need): need for need in NEEDS["vidmem_model"] if need != KERNELS} == NEEDED


def test_extras_that_are_named_exist():
    extras = {package: declared(package)["optional-dependencies"] for package in DISTRIBUTIONS}
    named = {"vidmem-kernels": "vidmem_kernels", "vidmem-model": "vidmem_model", "./python": "vidmem_model"}
    texts = [ROOT / "pyproject.toml", ROOT / "Makefile", *ROOT.glob("*.md"), *(ROOT / "vidmem_kernels").rglob("*.py")]
    texts += [path for kind in ("py", "md", "toml") for path in (ROOT / "python").rglob(f"*.{kind}")]
    found = [match for text in texts for match in re.findall(r"(vidmem-\w+|\./python)\[([\w,]+)\]", text.read_text())]
    assert len(found) >= 5
    for name, wanted in found:
        assert set(wanted.split(",")) <= extras[named[name]].keys(), name


def test_the_license_comes_along():
    assert (ROOT / "python/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


# --- what is said ---


def gone(folder, modules):
    """No finder refuses it, yet it cannot be imported."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n")
    return {"PYTHONPATH": str(folder)}


def hidden(folder, modules):
    """No finder finds it, but for a folder of its name that holds nothing."""
    folder.mkdir()
    for module in modules:
        (folder / "empty" / module).mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(f"""
import sys
from importlib.machinery import PathFinder
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name in {modules!r}:
            return PathFinder.find_spec(name, [{str(folder / "empty")!r}])
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
""")
    return {"PYTHONPATH": str(folder)}


def refused(folder, modules):
    return environment(folder, missing=modules)


HIDDEN = [gone, hidden, refused]


def entries(folder, package):
    """Ways into a package: as another program imports it, and its commands."""
    if package == "vidmem_kernels":
        return {"import": ["-c", "import vidmem_kernels"], "-m": ["-m", "vidmem_kernels.info"]}
    module, function = declared(package)["scripts"]["vidmem"].split(":")
    script = folder / "vidmem"  # as pip writes it
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    commands = {"script": [script, "info"], "-m": ["-m", "vidmem_model", "info"]}
    return {"import": ["-c", "from vidmem_model.memory import read_memory"], **commands}


def check(tmp_path, package, faults, env):
    """Every way in says in one line what is at fault and what to run, and no more."""
    for name, arguments in entries(tmp_path, package).items():
        path = f"{env['PYTHONPATH']}:{PATH}"
        done = run(sys.executable, *arguments, cwd=tmp_path, **{**env, "PYTHONPATH": path})
        assert done.returncode == (1 if name == "import" or package == "vidmem_kernels" else 2), done.stderr
        assert done.stdout == ""
        *above, line = done.stderr.splitlines()
        assert above == [] or (name == "import" and "Traceback" in above[0]), done.stderr
        says = re.search(
            rf"{package}(?: {re.escape(VERSION)})? needs (.*?); run: (pip install [^;]*?)(?:; or .*)?\)?$", line
        )
        assert says, line
        assert set(says[1].split(", ")) == {f"{need} ({why})" for need, why in faults.items()}
        assert set(shlex.split(says[2])) == {"pip", "install", *faults}
        assert line.endswith("pip install --no-build-isolation . ./python") == (KERNELS in faults)
        if name == "import":
            assert line.startswith("ImportError: ")


CASES = [(package, need, hide) for package in NEEDS for need in NEEDS[package] for hide in HIDDEN]


@pytest.mark.sample(10)
@pytest.mark.parametrize(
    ("package", "need", "hide"), CASES, ids=[f"{p}-{name_of(need)}-{hide.__name__}" for p, need, hide in CASES]
)
def test_one_thing_missing(package, need, hide, tmp_path):
    check(tmp_path, package, {need: "not installed"}, hide(tmp_path / "site", [module_of(need)]))


def installed_as(folder, versions):
    """What an installer notes of a distribution; Python finds these before the true ones."""
    for name, version in versions.items():
        note = folder / f"{name}-{version}.dist-info"
        note.mkdir()
        (note / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.sample(3)
@pytest.mark.parametrize("seed", range(12))
def test_several_things_missing_and_old(seed, tmp_path):
    draw = random.Random(seed)
    needs = [need for need in NEEDS["vidmem_model"] if need != KERNELS]
    chosen = draw.sample(needs, draw.randint(1, len(needs)))
    split = draw.randint(0, len(chosen))
    faults = {need: "not installed" for need in chosen[:split]}
    env = draw.choice(HIDDEN)(tmp_path / "site", [module_of(need) for need in faults])
    versions = {}
    for need in chosen[split:]:
        name, _, least = need.partition(">=")
        if least:
            first, *rest = least.split(".")
            lower = f"{int(first) - 1}.99" if int(first) else f"0.{int(rest[0]) - 1}.9"
            versions[name] = lower + draw.choice(["", "+cpu", ".post1", "rc1"])
            faults[need] = f"{versions[name]} is installed"
    installed_as(tmp_path / "site", versions)
    if faults:
        check(tmp_path, "vidmem_model", faults, env)


def test_what_is_new_enough_is_taken(tmp_path):
    """Also before its release, from its own build, and where a version cannot be told."""
    for number, add in enumerate([".0", "a0+git1234", ".dev20260101", "+cpu", ".1.post2"]):
        site = tmp_path / str(number)
        site.mkdir()
        needs = [need.split(">=") for need in NEEDS["vidmem_model"] if ">=" in need]
        installed_as(site, {name: least + add for name, least in needs})
        path = f"{site}:{PATH}"
        done = run(sys.executable, "-c", "import vidmem_model", cwd=tmp_path, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr


def test_old_torch_under_the_kernels(tmp_path):
    env = environment(tmp_path / "site", old={"torch": "2.9.1+cpu"})
    check(tmp_path, "vidmem_kernels", {"torch>=2.11": "2.9.1+cpu is installed"}, env)


OTHER_KERNELS = {
    "older": ('__version__ = "0.0.9"\n', "0.0.9 is installed"),
    "newer, never run": ("__version__ = '9.1'\nraise RuntimeError\n", "9.1 is installed"),
    "not a release": (
        f'"""Kernels."""\nimport torch\n__version__ = "{VERSION}.dev1"\n',
        f"{VERSION}.dev1 is installed",
    ),
}


@pytest.mark.parametrize("kernels", OTHER_KERNELS)
def test_kernels_of_another_version(kernels, tmp_path):
    source, why = OTHER_KERNELS[kernels]
    (tmp_path / "site/vidmem_kernels").mkdir(parents=True)
    (tmp_path / "site/vidmem_kernels/__init__.py").write_text(source)
    check(tmp_path, "vidmem_model", {KERNELS: why}, {"PYTHONPATH": str(tmp_path / "site")})


def test_looking_imports_nothing(tmp_path):
    heavy = {"torch", "numpy", "vidmem_kernels", "av", "yaml"}
    code = f"import sys, vidmem_model; print({heavy} & set(sys.modules))"
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=PATH)
    assert (done.stdout, done.stderr) == ("set()\n", "")


BROKEN = {
    "torch": ["info"],
    "numpy": ["info"],
    "av": ["compress", "film.mkv", "-o", "memory.safetensors"],
    "safetensors": ["export", "runs/demo", "-o", "model.safetensors"],
    "yaml": ["pretrain", "recipe.yaml"],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("module", BROKEN)
def test_what_does_not_load_is_no_bug_of_ours(module, tmp_path):
    env = environment(tmp_path / "site", broken=[module])
    path = f"{env['PYTHONPATH']}:{PATH}"
    (tmp_path / "recipe.yaml").write_text("stage: 1\n")
    (tmp_path / "film.mkv").write_text("")
    done = run(sys.executable, "-m", "vidmem_model", *BROKEN[module], cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("vidmem: error: ") and "does not load" in line and f"lib{module}.so.1" in line


# --- the kernels alone ---

USE = """
import importlib, pkgutil, runpy, sys, torch, vidmem_kernels as vk
for module in pkgutil.walk_packages(vk.__path__, "vidmem_kernels."):
    if "triton" not in module.name and ".diffusers." not in module.name:  # which need diffusers
        importlib.import_module(module.name)
bank = vk.MemoryBank(8)
bank.append(torch.arange(24.0).view(3, 8), torch.zeros(3, 3))
bank.save("bank.safetensors")
assert vk.MemoryBank.load("bank.safetensors").gather(torch.tensor([1])).tolist() == [list(range(8, 16))]
assert vk.gather_tokens(torch.arange(12.0).view(1, 4, 3), torch.tensor([[2]])).tolist() == [[[6, 7, 8]]]
sys.argv[1:] = []
runpy.run_module("vidmem_kernels.info", run_name="__main__")
"""


def test_kernels_need_torch_and_numpy_alone(tmp_path):
    """In an environment with these two and what they need themselves."""
    python, _ = fresh_environment(tmp_path / "venv", only=("torch", "numpy"))
    names = ["av", "typer", "rich", "yaml", "safetensors"]
    look = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert run(python, "-c", look, cwd=tmp_path).stdout == "[]\n"
    done = run(python, "-c", USE, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +vidmem_model +not installed$", done.stdout, re.MULTILINE)
