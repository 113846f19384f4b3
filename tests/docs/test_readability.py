"""Pages keep to short sentences, and the measure cannot be passed by a trick."""

import pytest

from tools.readability import main, measure, pages, words

WORD = "word "
LONG = "Here are " + WORD * 28 + "done."  # 31 words
HUGE = "Here are " + WORD * 40 + "done."  # 43 words
SHORT = "This is a short sentence. " * 19


def test_every_page_keeps_the_limits(capsys):
    assert len(pages()) > 20
    assert main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (SHORT + LONG, 0.05),
        ("- " + LONG, 1.0),
        ("> " + LONG, 1.0),
        ("1. " + LONG, 1.0),
        ("!!! note\n    " + LONG, 1.0),
        ("<p>" + LONG + "</p>", 1.0),
        ("```\n" + LONG + "\n```", 1.0),
        ("```text\n" + LONG + "\n```", 1.0),
        ("```bash\n" + LONG + "\n```", 0.0),
        ("No. Yes. Never. So it is. " + LONG, 1.0),  # what is no sentence does not count
        ("Words with e.g. Paris " + WORD * 25 + "end.", 1.0),
        ("One two; three " + WORD * 25 + "end.", 1.0),
        ("`one " + WORD * 25 + "end.`", 1.0),
        ("See [a link](https://example.org/a/b) and " + WORD * 25, 1.0),
        ("A line\nthat goes " + WORD * 25 + "\non and on.", 1.0),
    ],
)
def test_long_sentences_are_counted_wherever_they_stand(text, share):
    assert measure("page", text).share == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HUGE, "43 words"),
        ("- " + HUGE, "43 words"),
        ("| a |\n|---|\n| " + WORD * 41 + "|", "cell of 41 words"),
        ("# " + WORD * 16, "heading of 16 words"),
        ("Of all pairs it takes one.", 'begins with "Of"'),
        ("It has six pairs, of which two are ties.", '", of which"'),
    ],
)
def test_what_fails_whatever_its_share(text, told):
    assert any(told in fault for fault in measure("page", SHORT * 10 + "\n\n" + text).faults)


def test_check_alone_turns_a_fault_into_the_exit_code(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(HUGE)
    assert main([str(page)]) == 0
    assert main(["--check", str(page)]) == 1
    page.write_text(SHORT)
    assert main(["--check", str(page)]) == 0
    assert "longest   5" in capsys.readouterr().out


def test_marks_are_no_words():
    assert words("a − b = c — 0.5 [+0.1, +0.2]") == 6
