"""Storyboards: reading, line and column of every mistake, and writing by a language model."""

import pytest
from paths import ROOT

from vidmem_model.errors import UserError
from vidmem_model.generation.storyboard import (
    Shot,
    Storyboard,
    format_storyboard,
    language_model,
    parse_storyboard,
    read_storyboard,
    write_storyboard,
)

GOOD = """\
title: a walk
seconds: 1:10
style: "  hand-drawn:
  ink "
shots:
  - {at: 0, prompt: a fox}
  - at: 2.5
    prompt: 42
  - at: 1:05
    prompt: "a lake: frozen"
"""


def test_reads_what_is_written():
    made = parse_storyboard(GOOD)
    assert made == Storyboard(
        (Shot(0.0, "a fox"), Shot(2.5, "42"), Shot(65.0, "a lake: frozen")), "a walk", 70.0, "hand-drawn: ink"
    )
    assert parse_storyboard(format_storyboard(made)) == made
    bare = parse_storyboard("shots: [{at: 0, prompt: x}]")
    assert bare == Storyboard((Shot(0.0, "x"),))
    assert parse_storyboard(format_storyboard(bare)) == bare
    assert parse_storyboard("shots:\n- {at: 0, prompt: x}\n- {at: 1:00:02, prompt: y}").shots[1].at == 3602.0


def test_the_example_is_a_storyboard():
    example = read_storyboard(ROOT / "examples" / "storyboard.yaml")
    assert [shot.at for shot in example.shots] == [0, 3, 6, 8.5]
    assert example.seconds == 10


def test_prompt_at_takes_the_nearest_in_time():
    board = Storyboard((Shot(0, "a"), Shot(2, "b"), Shot(10, "c")))
    for seconds, prompt in [
        (0, "a"),
        (0.99, "a"),
        (1, "a"),
        (1.01, "b"),
        (5.99, "b"),
        (6, "b"),
        (6.01, "c"),
        (99, "c"),
    ]:
        assert board.prompt_at(seconds) == prompt, seconds
    assert Storyboard((Shot(0, "a"),), style="ink").prompt_at(3) == "a, ink"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1: is empty"),
        ("# nothing\n", "f.yaml:1: is empty"),
        ("- a\n", "f.yaml:1:1: a storyboard must be a mapping"),
        ("title: x\n", "f.yaml:1:1: shots is missing"),
        ("shots: []\n", "f.yaml:1:8: shots must be a list"),
        ("shots: {at: 0}\n", "f.yaml:1:8: shots must be a list"),
        ("shots:\n  - fox\n", "f.yaml:2:5: a shot must be a mapping"),
        ("shots:\n  - at: 0\n", "f.yaml:2:5: this shot has no prompt"),
        ("shots:\n  - prompt: x\n", "f.yaml:2:5: this shot has no at"),
        ("shots:\n  - at: 0\n    prompt: ''\n", "f.yaml:3:13: prompt must not be empty"),
        ("shots:\n  - at: 0\n    prompt:\n", "f.yaml:3:12: prompt must not be empty"),
        ("shots:\n  - at: 0\n    prompt: [a]\n", "f.yaml:3:13: prompt must be text"),
        ("shots:\n  - at: 1\n    prompt: x\n", "f.yaml:2:9: the first shot must be at 0, got 1"),
        ("shots:\n  - {at: 0, prompt: x}\n  - {at: 0.0, prompt: y}\n", "f.yaml:3:10: line 2 already has a shot at 0 s"),
        (
            "shots:\n  - {at: 0, prompt: x}\n  - {at: 5, prompt: x}\n  - {at: 3, prompt: y}\n",
            "f.yaml:4:10: shots must be in order of time, got 3 s after 5 s",
        ),
        ("shots:\n  - {at: -1, prompt: x}\n", "f.yaml:2:10: at must be seconds or minutes:seconds, got '-1'"),
        ("shots:\n  - {at: nan, prompt: x}\n", "f.yaml:2:10: at must be seconds or minutes:seconds, got 'nan'"),
        ("shots:\n  - {at: [0], prompt: x}\n", "f.yaml:2:10: at must be seconds or minutes:seconds"),
        ("shots:\n  - {at: 1:75, prompt: x}\n", "f.yaml:2:10: at must have minutes and seconds below 60"),
        ("shots:\n  - {at: 1:75:02, prompt: x}\n", "f.yaml:2:10: at must have minutes and seconds below 60"),
        (
            "shots:\n  - {at: 0, prompt: x, camera: y}\n",
            "f.yaml:2:24: the key 'camera' is unknown; keys of a shot are at, prompt",
        ),
        ("shots:\n  - {at: 0, prompt: x, [a]: y}\n", "f.yaml:2:24: the key a list or mapping is unknown"),
        ("tilte: x\nshots: []\n", "f.yaml:1:1: the key 'tilte' is unknown"),
        ("title: x\ntitle: y\n", "f.yaml:2:1: the key 'title' is given twice"),
        ("seconds: 0\nshots: [{at: 0, prompt: x}]\n", "f.yaml:1:10: seconds must be more than 0"),
        ("seconds: ten\nshots: [{at: 0, prompt: x}]\n", "f.yaml:1:10: seconds must be seconds or"),
        (
            "seconds: 4\nshots:\n  - {at: 0, prompt: x}\n  - {at: 4, prompt: y}\n",
            "f.yaml:4:10: this shot starts at 4 s, after the end of the video at 4 s",
        ),
        ("shots:\n\t- {at: 0, prompt: x}\n", "f.yaml:2:1: has a tab; indent YAML with spaces"),
        ("shots:\n  - at: 0\n    prompt: a: b\n", "f.yaml:3:14: not YAML: mapping values are not allowed here"),
        ("shots: [\n", "f.yaml:2:1: not YAML: "),
        ("shots: [{at: 0, prompt: x}]\n---\nshots: []\n", "f.yaml:2:1: not YAML: but found another document"),
        ("shots:\n  - {at: 0, prompt: \x07}\n", "f.yaml:2: contains a character that YAML does not allow"),
        ("[" * 1200, "f.yaml: is nested too deeply"),
    ],
)
def test_mistakes_are_found_where_they_are(text, message):
    with pytest.raises(UserError) as caught:
        parse_storyboard(text, "f.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no.yaml: cannot be read"):
        read_storyboard(tmp_path / "no.yaml")
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"shots:\n- {at: 0, prompt: caf\xe9}\n")
    with pytest.raises(UserError, match=r"latin.yaml:2: is not UTF-8"):
        read_storyboard(file)
    file.write_bytes(b"\xef\xbb\xbfshots: [{at: 0, prompt: x}]\r\n")
    assert read_storyboard(file).shots == (Shot(0.0, "x"),)


ANSWER = 'title: "t"\nshots:\n  - at: 0\n    prompt: "a: b"\n  - at: 5\n    prompt: "c"\n'


@pytest.mark.parametrize(
    "answer", [ANSWER, f"Here you are:\n{ANSWER}", f"Sure!\n```yaml\n{ANSWER}```\nEnjoy.", f"```\n{ANSWER}"]
)
def test_a_written_storyboard_is_taken_from_the_answer(answer):
    made = write_storyboard("a fox", lambda request, seed: answer, 10, 2)
    assert made == Storyboard((Shot(0.0, "a: b"), Shot(5.0, "c")), "t", 10)


def test_a_bad_answer_is_asked_for_again_with_another_seed():
    asked = []

    def write(request, seed):
        asked.append((request, seed))
        return ANSWER if len(asked) == 3 else "shots: [{at: 0, prompt: x}, {at: 12, prompt: y}]"

    assert len(write_storyboard("a  fox", write, 10, 2, seed=7).shots) == 2
    assert [seed for _, seed in asked] == [7, 8, 9]
    assert "about: a fox\n" in asked[0][0] and "video of 10 seconds" in asked[0][0]
    with pytest.raises(
        UserError,
        match=r"no valid storyboard in 2 tries \(answer: a shot at 12 s, beyond 10 s\); .* its last answer was 'sh",
    ):
        write_storyboard("a fox", lambda *_: "shots: [{at: 0, prompt: x}, {at: 12, prompt: y}]", 10, 2, tries=2)


def test_a_language_model_in_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(i): i - 31 for i in range(32, 127)} | {"<end>": 0}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<end>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<end>")
    sizes = {"vocab_size": 96, "n_positions": 1500, "n_embd": 8, "n_layer": 1, "n_head": 1}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    folder = tmp_path / "lm"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    with pytest.raises(UserError, match="holds no causal language model with its tokenizer .*empty"):
        language_model(folder)
    tokenizer.save_pretrained(folder)

    write = language_model(folder, max_tokens=24)
    assert write("a fox", 1) == write("a fox", 1) != write("a fox", 2)
    assert 0 < len(write("a fox", 1).replace(" ", "")) <= 24
    with pytest.raises(UserError, match=r"no valid storyboard in 3 tries \(answer:1"):
        write_storyboard("a fox", write, 4, 2)
    with pytest.raises(UserError, match="reads at most 1500 tokens, the request has 2000"):
        write("x" * 2000, 0)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    assert language_model(folder, max_tokens=24)("a fox", 1) != write("a fox", 1)
    with pytest.raises(UserError, match="no such folder"):
        language_model(tmp_path / "none")
    with pytest.raises(UserError, match="holds no causal language model with its tokenizer"):
        language_model(tmp_path)
