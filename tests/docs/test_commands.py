"""Every command in the README and the docs is run, on tiny stand-ins for what has to be downloaded.

Commands are taken from fenced bash blocks and from blocks indented by four spaces. What a command
names (a preset's model, the reader's own files) is replaced by the table here, each by something of
the same kind; a command that nothing here treats fails.
"""

import importlib.util
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import typer

from inversion_dpo.cli.main import app, main
from inversion_dpo.run.config import resolve, to_yaml
from inversion_dpo.run.settings import every_setting
from inversion_dpo.training.effects import GROUPS
from tools.tiny.scorers import WRITERS, write_tiny_scorer

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(
        p
        for p in (ROOT / "docs").rglob("*.md")
        if p.parent.name != "results" and p.name != "diary.md"
    ),
]
TRAINED = ("inversion.steps=4", "training.steps=2", "training.snapshot_every=null")
SAMPLED = ("evaluation.sample_steps=2", "evaluation.limit=3", "evaluation.batch_size=3")
SERVED = "http://localhost:8000/v1"  # in its place stands a server of the tests
SLOW = ("--config taste --output runs/first", "--run runs/first", "runs/first ")
LONG = "train --config sdxl"  # a minute, for the settings of a large model
NOT_HERE = {  # command -> why it is not run
    "make": "a target of the Makefile, looked for there",
    ".venv/bin/python -m pytest": "the tests themselves",
    "pip install": "needs a network",
    "git clone": "needs a network",
    "python3 -m venv": "needs a network",
    "python examples/journeys.py": "test_journeys.py",
    "python benchmarks/": "minutes, hours: tests/unit has their parts",
    "python examples/warm_labels.py": "drives a browser: tests/browser",
    "accelerate launch": "needs eight GPUs; two processes on CPUs: test_processes.py",
    "inversion-dpo web": "waits for a browser: tests/browser",
    "inversion-dpo pairs sample": "test_labelling_commands.py",
    "inversion-dpo pairs build --config scenes-pairs": "test_building.py; what it made: "
    "test_scenes_pairs.py",
    "inversion-dpo train -o runs/labelled": "of such labels: tests/browser",
    "inversion-dpo evaluate runs/labelled": "the same",
    "inversion-dpo train -o runs/round": "of such labels, too",
    "inversion-dpo demo -o runs/both --rounds 2 --people": "waits for people: test_rounds.py",
    "inversion-dpo compare": "minutes, hours: tests/unit/compare",
    "python -m tools.mutate": "minutes, hours: test_mutants.py",
    "python -m tools.embedded.renders": "test_scene_graph_condition.py",
    "python -m tools.drawn": "minutes, a network: test_drawn.py",
    "DRAWN_MODEL=": "the same",
    "inversion-dpo train --config scene-graph": "on tiny stand-ins: test_scene_graph_condition.py",
    "inversion-dpo train --config composition --output runs/on-graph": "the same",
    "inversion-dpo evaluate runs/on-graph": "the same",
    "inversion-dpo evaluate runs/graph": "the same",
    "inversion-dpo sample --run runs/on-graph": "the same",
    "inversion-dpo evaluate runs/mine --protocol": "test_protocols.py",
    "inversion-dpo evaluate runs/mine evaluation.scorer=pickscore,lpips": "test_diversity.py",
    "inversion-dpo evaluate runs/mine evaluation.scorer=vqa": "tests/unit: test_asking.py",
    "inversion-dpo train --config flux --output runs/edits": "test_edits.py",
    "inversion-dpo evaluate runs/edits": "the same",
    "inversion-dpo report runs/edits": "the same",
    'inversion-dpo sample "make it night" --source': "the same",
    "inversion-dpo pairs export": "of labels that a person gave: test_labelling_commands.py",
}


def commands(text):
    """Commands of a page, continued lines joined and comments dropped."""
    fenced = re.findall(r"```bash\n(.*?)```", text, re.S)
    plain = re.sub(r"```.*?```", "", text, flags=re.S)
    indented = re.findall(r"^    (?=inversion-dpo |python -m )(.*)$", plain, re.M)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    return [c for line in lines if (c := " ".join(re.sub(r"\s#.*", "", line).split()))]


EVERY = [(p.name, c) for p in PAGES for c in commands(p.read_text(encoding="utf-8"))]


def treatment(command):
    """slow, run, or why it is not run; None for what nobody thought of."""
    if command.startswith(tuple(NOT_HERE)):
        return "elsewhere"
    if command.startswith(("inversion-dpo ", "python -m tools.tiny ")):
        return "slow" if any(part in command + " " for part in SLOW) else "run"
    return None


def test_commands_are_found_and_all_are_treated():
    assert len(EVERY) > 30
    assert [c for c in EVERY if treatment(c[1]) is None] == []


def test_targets_of_make_exist():
    text = (ROOT / "Makefile").read_text()
    targets = {c.split()[1] for _, c in EVERY if c.startswith("make ")}
    assert targets and all(re.search(rf"^{t}:", text, re.M) for t in targets)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_config, tiny_run, pair_file):
    """A folder in which a reader has what the pages speak of; copy it before writing to it."""
    from tests.pair_files import read_pairs

    folder = tmp_path_factory.mktemp("reader")
    pairs = read_pairs(pair_file).pairs
    for name in ("pairs.parquet", "my_pairs.parquet"):
        shutil.copy(pair_file, folder / name)
    (folder / "my_prompts.txt").write_text("\n".join(p.caption for p in pairs[:3]))
    graph = {"items": [{"item_id": 0, "label": "star"}]}
    row = {"prompt": "a star", "scene_graph": graph}
    (folder / "my_graphs.jsonl").write_text(json.dumps(row))
    (folder / "pictures").mkdir()
    for k, pair in enumerate(pairs[:16]):
        (folder / "pictures" / f"w{k}.png").write_bytes(pair.winner)
        (folder / "pictures" / f"l{k}.png").write_bytes(pair.loser)
    lines = [f"pictures/w{k}.png,pictures/l{k}.png,{p.caption}" for k, p in enumerate(pairs[:16])]
    (folder / "my_pairs.csv").write_text("\n".join(["winner,loser,caption", *lines]))
    lines = [f"pictures/w{k}.png,pictures/l{k}.png,pictures/w0.png,edit {k}" for k in (1, 2)]
    (folder / "my_edits.csv").write_text("\n".join(["winner,loser,input_image,prompt", *lines]))
    (folder / "real_images").mkdir()
    for k, pair in enumerate(pairs[:4]):
        (folder / f"{k}.png").write_bytes(pair.winner)
        (folder / "real_images" / f"{k}.png").write_bytes(pair.loser)
    (folder / "votes.csv").write_text("prompt,left,right,choice\na star,0.png,1.png,left\n")
    (folder / "my_folder").mkdir()
    for name in ("annotations.jsonl", "my_folder/annotations.jsonl"):
        (folder / name).write_text('{"name": "a.png", "items": [{"item_id": 0, "label": "cat"}]}')
    (folder / "my_folder" / "a.png").write_bytes(pairs[0].winner)
    row = {"prompt": "a star", "path_a": "0.png", "path_b": "1.png", "vote": "b"}
    (folder / "votes.jsonl").write_text(json.dumps(row))
    few = (f"evaluation.prompts={folder}/my_prompts.txt", "training.snapshot_every=4", *SAMPLED)
    for name in ("mine", "other"):
        run = shutil.copytree(tiny_run, folder / "runs" / name)
        (run / "config.yaml").write_text(to_yaml(tiny_config(*few)))
    (folder / "tiny.yaml").write_text(to_yaml(tiny_config(*few, *TRAINED)))
    return folder


def prepared(command, tiny):
    """The command's arguments, with stand-ins for what has to be downloaded."""
    words = shlex.split(command)
    known = {
        "DATA": "my_pairs.parquet",
        "data.pairs=DATA": "data.pairs=my_pairs.parquet",
        "MODEL_FOLDER": str(tiny("sd15")),
        "OWNER/NAME": "me/mine",
        "src/inversion_dpo/assets/taste.parquet": resolve("asset:taste.parquet"),
        "data.columns.caption=text": "data.columns.caption=caption",
        "data.pairs=datasets/scenes-pairs/train": "data.pairs=my_pairs.parquet",
    }
    words = [known.get(w, w) for w in words]
    words = words[: words.index(">")] if ">" in words else words
    if "--config" in words:
        at = words.index("--config") + 1
        small = words[at] in ("sd15", "taste", "composition", "mine.yaml")
        if small and words[1] in ("evaluate", "train", "invert", "pairs"):
            words[at] = "tiny.yaml"
    asked = " ".join(w for w in words if w.startswith("evaluation.scorer="))
    asked += words[words.index("--scorer") + 1] if "--scorer" in words else ""
    asked += "clip" if words[1] == "fid" else ""
    for name in WRITERS.keys() & set(re.findall(r"[\w-]+", asked)):  # the scorers that it names
        write_tiny_scorer(name, Path(f"my_{name}"))
        place = f"evaluation.checkpoints.{name}="
        if not any(w.startswith(place) for w in words):
            words.append(f"{place}my_{name}")
    if words[:2] in (["inversion-dpo", "train"], ["inversion-dpo", "invert"]):
        words = [w.replace("training.steps=5", "training.steps=2") for w in words]
        fresh = f"runs/fresh-{words[1]}"
        words = [fresh if w == "runs/mine" else w for w in words]
    return words


def run(words, capsys):
    """Exit code and what was printed, of a command of ours."""
    if words[0] == "python":
        from tools.tiny.__main__ import main as write_tiny

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", words[2:])
            write_tiny()
        return 0, capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words[1:])
    return int(stop.value.code or 0), capsys.readouterr()


def name_of(command):
    """Which of our commands it is, as ``pairs build``."""
    words = command.split()[1:]
    return " ".join(words[: 1 + (words[0] == "pairs")])


def cases():
    """Each command once, under the first page that has it; fast is the first of each name.

    test_cli.py has those of a run, with one training and one evaluation for all.
    """
    first = {command: page for page, command in reversed(EVERY) if treatment(command) == "run"}
    names = {"train", "invert", "evaluate", "report", "fid"}
    for command, page in reversed(first.items()):
        slow, name = LONG in command, name_of(command)
        marks = [pytest.mark.slow] if slow or name in names else []
        names |= set() if slow else {name}
        yield pytest.param(command, id=f"{page}: {command[:60]}", marks=marks)


@pytest.fixture
def served():
    """The address of a server whose answers say that nothing is there."""
    path = ROOT / "tests" / "chat_server.py"
    spec = importlib.util.spec_from_file_location("chat_server", path)
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    said = iter(range(10**6))

    def answer(request):  # now the star of the prompt, now nothing, so that there is a winner
        star = {"item_id": 0, "label": "star", "attributes": []}
        return json.dumps({"items": [star] if next(said) % 2 else [], "relations": []})

    with chat.serving(answer) as (url, _):
        yield url


@pytest.fixture
def reader(place, tmp_path, monkeypatch):
    """The test stands in a copy of the reader's folder."""
    folder = shutil.copytree(place, tmp_path / "reader")
    monkeypatch.chdir(folder)
    return folder


def needed_first(words, capsys, tiny, reader):
    """What an earlier line of the same page would have left."""
    if words[1] in ("report", "fid"):
        assert run(["inversion-dpo", "evaluate", words[2]], capsys)[0] == 0
    if any(w == "model.path=tiny-sdxl" for w in words):
        shutil.copytree(tiny("sdxl"), reader / "tiny-sdxl")


def test_every_command_has_its_options_and_settings():
    known = every_setting()
    tables = tuple(f"{key}." for key, s in known.items() if isinstance(s.default, dict))
    every = typer.main.get_command(app).commands
    every = every | {f"pairs {n}": c for n, c in every["pairs"].commands.items()}
    for page, command in EVERY:
        words = shlex.split(command)
        if words[0] != "inversion-dpo" or words[1] == "--version":
            continue
        words = words[: words.index(">")] if ">" in words else words
        name = name_of(command)
        every[name].make_context(name, words[1 + len(name.split()) :])
        for word in words:
            key, equals, _ = word.partition("=")
            if equals and key.partition(".")[0] in GROUPS:
                assert key in known or key.startswith(tables), f"{page}: {command}"


@pytest.mark.parametrize("command", cases())
def test_a_command_does_what_it_says(command, reader, capsys, tiny, served):
    words = [w.replace(SERVED, served) for w in prepared(command, tiny)]
    needed_first(words, capsys, tiny, reader)
    code, printed = run(words, capsys)
    upload = "--push-to-hub" in words and "--dry-run" not in words
    if upload:  # there is no network in the tests: one clear line, and nothing else
        assert code == 2 and "error: " in printed.err and printed.err.count("\n") == 1
    else:
        assert code == 0, printed.err
        assert printed.out


@pytest.mark.slow
def test_the_first_hour_line_by_line(tmp_path, monkeypatch, capsys, tiny):
    """The first hour's commands in their order, as they stand, on the embedded model."""
    monkeypatch.chdir(tmp_path)
    steps = [c for page, c in EVERY if page == "first-hour.md" and treatment(c) == "slow"]
    assert len(steps) == 4
    for command in steps:
        code, printed = run(shlex.split(command), capsys)
        assert code == 0, printed.err
    assert (tmp_path / "runs/first/report.html").exists()
    assert (tmp_path / "runs/first-png/000000.png").exists()


PYTHON = re.compile(r"```python\n(.*?)```", re.S)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial/first-hour.md"])
def test_the_five_lines_of_python(page, tmp_path, monkeypatch, capsys):
    block = next(b for b in PYTHON.findall((ROOT / page).read_text()) if "inversion_dpo.api" in b)
    assert len([line for line in block.splitlines() if line.strip()]) <= 5
    (tmp_path / "five.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("five.py")
    out = capsys.readouterr().out
    assert re.search(r"^[01]\.\d+$", out, re.M) and "report.html" in out
