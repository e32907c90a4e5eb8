"""Storyboards: timed prompts, read from YAML (messages name line and column) or written by a language model.

title: a walk
seconds: 12
style: hand-drawn animation
shots:
  - {at: 0, prompt: "a fox leaves its den"}
  - {at: 0:06, prompt: "the fox crosses a frozen lake"}
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from .. import yaml_file
from ..checks import MOST_SECONDS, shorten, show
from ..errors import UserError

_KEYS = ("title", "seconds", "style", "shots")
_SHOT_KEYS = ("at", "prompt")
_LONGEST_TEXT = 10_000
_TIME = re.compile(r"(?:(\d+):)?(?:(\d+):)?(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Shot:
    """A shot of a storyboard.

    Attributes:
        at: Start time, in seconds.
        prompt: What the shot shows.
    """

    at: float
    prompt: str


@dataclass(frozen=True)
class Storyboard:
    """A list of shots for `generate`.

    Attributes:
        shots: Shots in order of time; the first is at 0.
        title: Title of the video; not used in generation.
        seconds: Length of the video, in seconds, or None.
        style: Text that is appended to every prompt.
    """

    shots: tuple[Shot, ...]
    title: str = ""
    seconds: float | None = None
    style: str = ""

    def prompt_at(self, seconds: float) -> str:
        """Return the prompt of the shot nearest in time, before or after, with the style appended.

        At equal distance the earlier shot is taken.

        Args:
            seconds: Time from the beginning of the video, in seconds.

        Returns:
            "prompt, style", or the prompt only if there is no style.
        """
        times = [shot.at for shot in self.shots]
        after = bisect.bisect_left(times, seconds)
        near = range(max(0, after - 1), min(len(times), after + 1))
        shot = self.shots[min(near, key=lambda i: abs(times[i] - seconds))]
        return f"{shot.prompt}, {self.style}" if self.style else shot.prompt


def read_storyboard(path: str | Path) -> Storyboard:
    """Read a storyboard from a YAML file.

    Args:
        path: The YAML file.

    Returns:
        The storyboard.

    Raises:
        UserError: The file cannot be read or is not a storyboard; the message is "file:line:column: …".
    """
    path = Path(path)
    try:
        text = yaml_file.read_text(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a storyboard") from error
    return parse_storyboard(text, str(path))


@yaml_file.collector_off()
def parse_storyboard(text: str, name: str = "storyboard") -> Storyboard:
    """Read a storyboard from YAML text.

    Args:
        text: YAML text.
        name: File name for messages.

    Returns:
        The storyboard.

    Raises:
        UserError: The text is not a storyboard; the message is "name:line:column: …".
    """
    root = yaml_file.compose(text, name)
    if root is None:
        raise UserError(f"{name}:1: is empty; write a list `shots` of {{at: seconds, prompt: text}}")
    return _Reader(name).storyboard(root)


def format_storyboard(storyboard: Storyboard) -> str:
    """Format a storyboard as YAML; `parse_storyboard` reads it back."""
    values: dict = {"title": storyboard.title, "seconds": storyboard.seconds, "style": storyboard.style}
    values = {key: value for key, value in values.items() if value not in ("", None)}
    values["shots"] = [{"at": shot.at, "prompt": shot.prompt} for shot in storyboard.shots]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


class _Reader:
    """Converts YAML nodes to a storyboard; messages name the line and column of a node."""

    def __init__(self, name: str) -> None:
        self.name = name

    def error(self, node: yaml.Node, what: str) -> UserError:
        return yaml_file.error_at(self.name, node, what)

    def storyboard(self, root: yaml.Node) -> Storyboard:
        entries = self.mapping(root, _KEYS, "a storyboard")
        if "shots" not in entries:
            raise self.error(root, "shots is missing; add a list of {at: seconds, prompt: text}")
        seconds = None
        if "seconds" in entries:
            seconds = self.time(entries["seconds"], "seconds")
            if seconds == 0:
                raise self.error(entries["seconds"], "seconds must be more than 0")
        title, style = (self.text(entries[key], key) if key in entries else "" for key in ("title", "style"))
        return Storyboard(tuple(self.shots(entries["shots"], seconds)), title, seconds, style)

    def shots(self, node: yaml.Node, seconds: float | None) -> Iterator[Shot]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.error(node, "shots must be a list of {at: seconds, prompt: text} with at least one entry")
        lines: dict[float, int] = {}
        before = None
        for each in node.value:
            entries = self.mapping(each, _SHOT_KEYS, "a shot")
            for key in _SHOT_KEYS:
                if key not in entries:
                    raise self.error(each, f"this shot has no {key}; add it")
            place = entries["at"]
            at = self.time(place, "at")
            if at in lines:
                raise self.error(place, f"line {lines[at]} already has a shot at {at:g} s")
            if before is None and at != 0:
                raise self.error(place, f"the first shot must be at 0, got {at:g}")
            if before is not None and at < before:
                raise self.error(place, f"shots must be in order of time, got {at:g} s after {before:g} s")
            if seconds is not None and at >= seconds:
                raise self.error(place, f"this shot starts at {at:g} s, after the end of the video at {seconds:g} s")
            lines[at] = place.start_mark.line + 1
            before = at
            yield Shot(at, self.text(entries["prompt"], "prompt"))

    def mapping(self, node: yaml.Node, keys: tuple[str, ...], what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what} must be a mapping with the keys {', '.join(keys)}")
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name not in keys:
                shown = show(name) if name is not None else "a list or mapping"
                raise self.error(key, f"the key {shown} is unknown; keys of {what} are {', '.join(keys)}")
            if name in entries:
                raise self.error(key, f"the key {name!r} is given twice")
            entries[name] = value
        return entries

    def text(self, node: yaml.Node, key: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, f"{key} must be text; put it in quotes")
        text = " ".join(node.value.split())
        if not text or node.tag == "tag:yaml.org,2002:null":
            raise self.error(node, f"{key} must not be empty")
        if len(text) > _LONGEST_TEXT:
            raise self.error(node, f"{key} must have at most {_LONGEST_TEXT:,} characters, got {len(text):,}")
        return text

    def time(self, node: yaml.Node, key: str) -> float:
        match = _TIME.fullmatch(node.value) if isinstance(node, yaml.ScalarNode) else None
        if match is None:
            got = f", got {show(node.value)}" if isinstance(node, yaml.ScalarNode) else ""
            raise self.error(node, f"{key} must be seconds or minutes:seconds{got}")
        first, second, seconds = match.groups()
        hours, minutes = (first, second) if second is not None else (None, first)
        if (minutes is not None and float(seconds) >= 60) or (hours is not None and float(minutes) >= 60):
            raise self.error(node, f"{key} must have minutes and seconds below 60, got {show(node.value)}")
        time = float(hours or 0) * 3600 + float(minutes or 0) * 60 + float(seconds)
        if time > MOST_SECONDS:
            raise self.error(node, f"{key} must be at most {MOST_SECONDS:,.0f} seconds, got {show(node.value)}")
        return time


def write_storyboard(
    idea: str,
    write: Callable[[str, int], str],
    seconds: float,
    shots: int,
    seed: int = 0,
    tries: int = 3,
) -> Storyboard:
    """Write a storyboard with a language model.

    Args:
        idea: What the video is about.
        write: The language model: a function (request, seed) -> answer, see `language_model`.
        seconds: Length of the video, in seconds.
        shots: Number of shots to ask for.
        seed: Random seed of the first try; every further try adds 1.
        tries: Maximum number of tries.

    Returns:
        The storyboard, with `seconds` set.

    Raises:
        UserError: No answer was a valid storyboard; the message gives the reason and quotes the last answer.
    """
    request = _REQUEST.format(idea=" ".join(idea.split()), seconds=f"{seconds:g}", shots=shots, step=seconds / shots)
    answer, reason = "", ""
    for attempt in range(tries):
        answer = write(request, seed + attempt)
        try:
            made = parse_storyboard(_yaml_part(answer), "answer")
        except UserError as error:
            reason = str(error)
            continue
        if made.shots[-1].at >= seconds:
            reason = f"answer: a shot at {made.shots[-1].at:g} s, beyond {seconds:g} s"
            continue
        return Storyboard(made.shots, made.title, seconds, made.style)
    raise UserError(
        f"the language model wrote no valid storyboard in {tries} tries ({reason}); give another --seed or --lm; "
        f"its last answer was {shorten(answer, 160)!r}"
    )


_REQUEST = """\
Write the storyboard of a video of {seconds} seconds about: {idea}

Answer with YAML only, in this form, with {shots} shots about {step:.1f} seconds apart, times in seconds from 0
on and below {seconds}, and every prompt one line in double quotes that describes what is seen in that shot
(who, where, doing what), so that it can be understood without the others:

title: "..."
style: "..."
shots:
  - at: 0
    prompt: "..."
"""


def _yaml_part(answer: str) -> str:
    """The YAML part of an answer: the text between code fences, else the text from the first key on."""
    fenced = re.search(r"```(?:ya?ml)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    if fenced:
        return fenced[1]
    start = re.search(r"^(?:title|style|seconds|shots):", answer, re.MULTILINE)
    return answer[start.start() :] if start else answer


def language_model(path: str | Path, max_tokens: int = 1024, device: str = "cpu") -> Callable[[str, int], str]:
    """Load a causal language model, such as Qwen, from a local folder.

    Args:
        path: Folder with the model and its tokenizer, as transformers' save_pretrained writes it.
        max_tokens: Maximum length of an answer, in tokens.
        device: Device to run on.

    Returns:
        A function (request, seed) -> answer, for `write_storyboard`.

    Raises:
        UserError: transformers is not installed, or the folder holds no such model.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a causal language model")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("a language model needs transformers: pip install 'vidmem-model[diffusers]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto").to(device).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{path}: holds no causal language model with its tokenizer ({shorten(error, 100)}); give the folder of one"
        ) from error
    if not tokenizer("a").input_ids:  # transformers makes an empty tokenizer if its files are missing
        raise UserError(f"{path}: holds no causal language model with its tokenizer (the tokenizer is empty)")

    def write(request: str, seed: int) -> str:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": request}]
            request = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # A chat template adds the special tokens itself.
        inputs = tokenizer(request, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(device)
        length = inputs["input_ids"].shape[1]
        room = getattr(model.config, "max_position_embeddings", None) or length + max_tokens
        if room <= length:
            raise UserError(
                f"{path}: the model reads at most {room} tokens, the request has {length}; choose another model"
            )
        # The sampler of transformers uses the global random generator.
        with torch.random.fork_rng(devices=[] if device == "cpu" else None), torch.inference_mode():
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=min(max_tokens, room - length),
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        return tokenizer.decode(output[0, length:], skip_special_tokens=True)

    return write
