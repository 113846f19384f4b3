"""The table and the list of ``tools/mutate.py`` speak of what is there."""

from collections import Counter
from pathlib import Path

from tools.mutants import PACKAGE, mutants_of
from tools.mutate import TESTS, equivalent

UNIT = Path(__file__).parents[1] / "unit"


def test_every_file_and_its_tests_are_there():
    for file, tests in TESTS.items():
        assert (PACKAGE / file).is_file()
        assert all((UNIT / test).is_file() for test in tests), file


def test_every_mutant_of_the_list_is_still_one():
    files = {name.split()[0] for name in equivalent()}
    known = {mutant.name for file in files for mutant in mutants_of(file)}
    assert set(equivalent()) <= known
    assert all(len(reason) > 10 for reason in equivalent().values())


def test_small_faults_by_hand(tmp_path, monkeypatch):
    """The operator, the comparison, three constants, the swap and the return of one function."""
    lines = ["def f(winner, x: int = 0):", "    if x < 1:", "        return winner + 2"]
    (tmp_path / "a.py").write_text("\n".join([*lines, "    raise ValueError(3)"]))
    monkeypatch.setattr("tools.mutants.PACKAGE", tmp_path)
    found = Counter((m.before, m.after) for m in mutants_of("a.py"))
    assert found == Counter(
        [
            ("0", "1"),
            ("if x < 1:", "if not x < 1:"),
            ("x < 1", "x <= 1"),
            ("1", "2"),
            ("1", "0"),
            ("return winner + 2", "return None"),
            ("winner + 2", "winner - 2"),
            ("winner", "loser"),
            ("2", "3"),
        ]
    )
    changed = {}
    exec(next(m.code for m in mutants_of("a.py") if m.after == "winner - 2"), changed)
    assert changed["f"](7) == 5
