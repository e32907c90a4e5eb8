"""Builds vidmem_model as pyproject.toml describes it, or says in one line what is missing or too old for that."""

import importlib
import re
import shutil
import sys


def version_of(package: str) -> str:
    try:
        return importlib.import_module(package).__version__
    except ModuleNotFoundError:
        return ""


def refuse(needs: str, version: str, install: str) -> None:
    why = f"{version} is installed" if version else "not installed"
    raise SystemExit(f"vidmem_model: {needs} ({why}); run: pip install {install}")


version = version_of("setuptools")
numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
if numbers < (64,):  # would not read pyproject.toml and install a package without a name
    refuse("building needs setuptools>=64", version, "'setuptools>=64'")
packs = {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv)
if packs and numbers < (70, 1) and not version_of("wheel"):
    refuse(f"with setuptools {version} building needs wheel", "", "wheel")

import setuptools  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402


class BuildPackage(build_py):
    def run(self):
        if not self.editable_mode:  # a file that an earlier build left there would be packed, too
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


# An SPDX expression, for which pyproject.toml has no form that setuptools reads both before and after 77.
LICENSE = {"license_expression" if numbers >= (77,) else "license": "Apache-2.0"}

setuptools.setup(cmdclass={"build_py": BuildPackage}, **LICENSE)
