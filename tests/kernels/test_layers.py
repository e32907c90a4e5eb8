"""Who knows whom: imports in vidmem_kernels without circles, families apart, and C++ that is what the schemas say."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

import vidmem_kernels
from vidmem_kernels._op import OPS

PACKAGE = Path(vidmem_kernels.__file__).parent
FAMILIES = {path.parent.name for path in PACKAGE.glob("*/ops.py")}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, for its types too, as "family.module" or "module"."""
    here = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.parse(path.read_text()).body:
        for each in ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef) else ():
            if isinstance(each, ast.ImportFrom) and each.level:
                base = [*here[: len(here) - each.level + 1], *(each.module or "").split(".")]
                names = [".".join(filter(None, [*base, name])) for name in ("", *(a.name for a in each.names))]
                found |= {name for name in names if (PACKAGE / name.replace(".", "/")).with_suffix(".py").is_file()}
    return found


def test_no_module_is_imported_by_what_it_imports():
    # A bank's pickle names the type that it makes.
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "memory_pickle.py")]
    graph = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): imported(path) for path in files}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("_op") < order.index("_dispatch") < order.index("_fast") < order.index("_registry")


def test_every_family_is_found():
    assert {op.family for op in OPS.values()} == {f"vidmem_kernels.{family}" for family in FAMILIES}


def test_families_do_not_import_each_other():
    for family in FAMILIES:
        for path in (PACKAGE / family).glob("*.py"):
            others = {name for name in imported(path) if name.split(".")[0] in FAMILIES - {family}}
            assert not others, f"{path.name} of {family} imports {', '.join(others)}"


def test_what_every_family_shares_knows_none():
    shared = [path for path in PACKAGE.glob("_*.py") if path.name != "__init__.py"]
    for path in shared:
        assert not {name for name in imported(path) if "." in name}, path.name


# Type in a schema -> in C++. torch's stable ABI compares neither names nor types.
CPP_TYPES = {
    "Tensor": "const Tensor&",
    "Tensor?": "const std::optional<Tensor>&",
    "Tensor[]": "std::vector<Tensor>",
    "SymInt": "int64_t",
    "int": "int64_t",
    "SymInt[]": "std::vector<int64_t>",
    "int[]": "std::vector<int64_t>",
    "SymInt[]?": "std::optional<std::vector<int64_t>>",
    "int[]?": "std::optional<std::vector<int64_t>>",
    "float": "double",
    "float[]?": "std::optional<std::vector<double>>",
    "Scalar": "double",
    "bool": "bool",
    "str": "std::string",
    "ScalarType": "ScalarType",
    "ScalarType?": "std::optional<ScalarType>",
}
IMPLEMENTED = [
    (str(path.relative_to(ROOT)), *found)
    for path in sorted((ROOT / "csrc").rglob("*.c*"))
    for found in re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&(?:\w+::)*(\w+)\)\)', path.read_text())
]


def test_all_implementations_are_seen():
    count = sum(path.read_text().count("m.impl(") for path in (ROOT / "csrc").rglob("*.c*"))
    assert len(IMPLEMENTED) == count >= len(OPS)


@pytest.mark.parametrize(("path", "name", "function"), IMPLEMENTED, ids=lambda value: Path(value).name)
def test_an_implementation_takes_what_its_schema_says(path, name, function):
    assert name in OPS, f"{path} implements {name}, which no ops.py registers"
    (given,) = re.findall(rf"^[\w:<>, ]*\b{function}\(([^{{;]*)\) {{", (ROOT / path).read_text(), re.MULTILINE)
    types = [re.sub(r"\s*\w+$", "", each.strip()) for each in re.split(r",(?![^<]*>)", " ".join(given.split()))]
    types = [each.replace("OptionalTensor", "std::optional<Tensor>") for each in types]
    schema = re.search(r"\((.*), str backend", str(OPS[name].overload._schema)).group(1)
    assert types == [CPP_TYPES[argument.split()[0]] for argument in re.split(r", (?![^\[]*\])", schema)], path
