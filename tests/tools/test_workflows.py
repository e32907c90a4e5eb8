"""The workflows call what exists, and what else a library keeps beside its code agrees with the rest."""

from __future__ import annotations

import re

import pytest
import yaml
from install_helpers import DISTRIBUTIONS, ROOT, declared, tomllib

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"]]
MAKEFILE = (ROOT / "Makefile").read_text()
VARIABLES = {"BIN": ".venv/bin", "VENV": ".venv"}
# What a step may start that is none of this repository's files.
PROGRAMS = {"apt-get", "awk", "gh", "python", "rm", "sudo", "test"}


def targets():
    text = re.sub(r"\$\((\w+)\)", lambda name: VARIABLES.get(name[1], name[0]), MAKEFILE)
    return set(re.findall(r"^([\w./-]+):(?!=)", text, re.MULTILINE))


def steps(workflow, job):
    return WORKFLOWS[workflow]["jobs"][job]["steps"]


def commands(workflow, job):
    """The commands of a job's steps; of an argument in quotes over several lines the first one."""
    for step in steps(workflow, job):
        script = re.sub(r'"\n(.*?)"', '"', step.get("run", ""), flags=re.DOTALL)
        for line in script.splitlines():
            for command in re.sub(r"\s#\s.*", "", line).split(" && "):
                yield command.split()


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_workflows_may_read_and_no_more(workflow):
    settings = WORKFLOWS[workflow]
    assert settings["permissions"] == {"contents": "read"}
    assert "github.ref" in settings["concurrency"]["group"]
    assert "pull_request_target" not in settings[True]  # YAML reads the key `on` so; that event has secrets


@pytest.mark.parametrize(("workflow", "job"), JOBS)
def test_jobs_end_and_their_actions_are_pinned(workflow, job):
    assert WORKFLOWS[workflow]["jobs"][job]["timeout-minutes"] <= 180
    for step in steps(workflow, job):
        action, _, version = step.get("uses", "actions/none@v1").partition("@")
        pinned = r"v\d+" if action.startswith("actions/") else "[0-9a-f]{40}"
        assert re.fullmatch(pinned, version), step
        if action == "actions/checkout":
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize(("workflow", "job"), JOBS)
def test_steps_run_what_is_there(workflow, job):
    known = targets()
    assert {"lint", "types", "test", "dist", ".venv/installed"} <= known
    for program, *arguments in commands(workflow, job):
        if program == "make":
            asked = [each for each in arguments if "=" not in each]
            assert asked and set(asked) <= known, asked
        elif program == ".venv/bin/python":
            script = arguments[2] if arguments[:2] == ["-m", "pytest"] else arguments[0]
            assert (ROOT / script).is_file(), script
        elif not program.startswith(('"$RUNNER_TEMP/new/', "new/")):  # the environment that the wheels go into
            assert program in PROGRAMS, program


def test_make_finds_what_it_calls():
    """Every name of a target in .PHONY is one, and help at the top of the file names those for people."""
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    assert phony <= targets()
    named = " ".join(line for line in MAKEFILE.splitlines()[:3])
    assert {"lint", "types", "test", "dist"} <= set(re.findall(r"[\w-]+", named))


def test_every_python_that_is_promised_is_tested():
    tested = WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == sorted(tested, key=lambda version: int(version.split(".")[1]))
    for package in DISTRIBUTIONS:
        project = declared(package)
        promised = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
        assert promised == tested
        assert project["requires-python"] == f">={tested[0]}"
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == "py" + tested[0].replace(".", "")


def test_pre_commit_has_the_ruff_of_dev():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (version,) = (each["rev"] for each in repositories if each["repo"].endswith("/ruff-pre-commit"))
    (least,) = (need for need in declared("vidmem_kernels")["optional-dependencies"]["dev"] if "ruff" in need)
    numbers = [tuple(map(int, re.findall(r"\d+", text))) for text in (least, version)]
    assert numbers[0] <= numbers[1]


def test_forms_ask_for_what_info_shows():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    del forms["config"]
    for name, form in forms.items():
        assert form["name"] and form["description"] and form["body"], name
    for name in ("bug", "kernel"):
        (info,) = (field for field in forms[name]["body"] if field["id"] == "info")
        assert "python -m vidmem_kernels.info" in info["attributes"]["description"]


def test_the_reproducer_in_the_form_runs(capsys):
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/kernel.yml").read_text())
    (program,) = (field["attributes"]["value"] for field in form["body"] if field["id"] == "reproduce")
    exec(compile(program, "kernel.yml", "exec"), {})
    assert re.fullmatch(r"tensor\(\S+\)\n", capsys.readouterr().out)


def test_license_and_paper_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert paper["url"].removeprefix("https://arxiv.org/abs/") in (ROOT / "README.md").read_text()
    assert declared("vidmem_model")["urls"]["Paper of the method"] == paper["url"]
    for place in DISTRIBUTIONS.values():
        assert f'"{citation["license"]}"' in (ROOT / place / "setup.py").read_text()
