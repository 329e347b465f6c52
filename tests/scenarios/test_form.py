"""The form of the scenarios: what is written is read, what is wrong in a file is named, one flag rewrites."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

words = st.text("abcdefgh/|*._-", min_size=1, max_size=6).filter(lambda word: word != "----")
lines = st.lists(words, min_size=1, max_size=4).map(" ".join).filter(lambda line: line != "----")
comments = st.lists(st.just("") | lines.map("# {}".format), max_size=3)
steps = st.lists(st.tuples(comments, lines, st.lists(lines, max_size=2), st.lists(lines, max_size=3)), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps)
def test_what_is_rendered_is_parsed(form, steps):
    text = form.render(
        [form.Step([*comment, command, *more], output=output) for comment, command, more, output in steps]
    )
    parsed = form.parse(text, "x.txt")
    assert form.render(parsed) == text
    assert [" ".join([step.name, *step.args]) for step in parsed] == [command for _, command, _, _ in steps]
    assert [(step.input, step.output) for step in parsed] == [(more, output) for _, _, more, output in steps]


def test_options_and_arguments(form):
    (step,) = form.parse("# A word.\nstart 5 seed=7 name=a=b x\nmore input\n----\nprinted\n", "x.txt")
    assert (step.name, step.args, step.options) == ("start", ["5", "x"], {"seed": "7", "name": "a=b"})
    assert (step.input, step.output, step.line) == (["more input"], ["printed"], 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n\ntwo\n----\n", "x.txt, line 2: 'one' has no ---- below it"),
        ("one\n----\n\ntwo", "x.txt, line 5: 'two' has no ---- below it"),
        ("----\n", "x.txt, line 1: ---- without a command before it"),
        ("# A comment.\n----\n", "x.txt, line 2: ---- without a command before it"),
        ("one\n----\nok\n\n# The end.\n", "x.txt, line 6: the file ends with a comment"),
    ],
)
def test_what_is_no_scenario_is_refused_by_line(form, text, message):
    with pytest.raises(ValueError, match=message):
        form.parse(text, "x.txt")


@pytest.fixture
def rewriting(request, monkeypatch):
    """Whether ``--rewrite`` was given, for the test alone."""

    def choose(value: bool) -> None:
        monkeypatch.setattr(request.config.option, "rewrite", value)

    return choose


def test_a_scenario_that_prints_something_else_fails_with_the_difference(transcript, rewriting, tmp_path):
    rewriting(False)
    file = tmp_path / "x.txt"
    file.write_text("add 1 2\n----\n3\n\nadd 2 2\n----\n5\n")
    with pytest.raises(AssertionError, match=r"(?s)x.txt differs; --rewrite if that is right.*\n-5\n\+4$"):
        transcript(file, lambda step: str(sum(map(int, step.args))))
    assert file.read_text().endswith("5\n")
    rewriting(True)
    transcript(file, lambda step: str(sum(map(int, step.args))))
    assert file.read_text() == "add 1 2\n----\n3\n\nadd 2 2\n----\n4\n"
    rewriting(False)
    transcript(file, lambda step: str(sum(map(int, step.args))))


def test_a_handler_that_fails_is_told_with_file_and_line(transcript, rewriting, tmp_path):
    rewriting(False)
    file = tmp_path / "x.txt"
    file.write_text("# Nobody knows this.\nnonsense\n----\n")

    def handler(step):
        raise KeyError(step.name)

    with pytest.raises(RuntimeError, match=r"x.txt, line 2: nonsense: KeyError\('nonsense'\)"):
        transcript(file, handler)
    with pytest.raises(AssertionError, match="x.txt, line 2: the output holds a blank line"):
        transcript(file, lambda step: "a\n\nb")
    rewriting(True)
    with pytest.raises(RuntimeError):
        transcript(file, handler)
    assert file.read_text() == "# Nobody knows this.\nnonsense\n----\n"  # a failure rewrites nothing


def test_a_folder_without_scenarios_is_an_error(form):
    with pytest.raises(AssertionError, match="there are no scenarios in"):
        form.scenarios("no-such-kind")
