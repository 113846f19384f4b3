"""A vision-language model on a local server scores a run and labels pairs, as a user types it."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from inversion_dpo.cli.main import main
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.config import to_yaml

path = Path(__file__).parents[1] / "chat_server.py"
spec = importlib.util.spec_from_file_location("chat_server", path)
chat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat)

GRAPH = {
    "items": [
        {"item_id": 3, "label": "cat", "attributes": ["red"]},
        {"item_id": 7, "label": "dog", "attributes": []},
    ],
    "relations": [{"item1": 3, "relation": "left of", "item2": 7}],
}
PROMPTS = [
    {"prompt": "a red cat left of a dog", "scene_graph": GRAPH},
    {"prompt": "a small red star above a large blue cross"},  # its caption says its graph
]
ANSWERS = [
    json.dumps(GRAPH),
    json.dumps({"items": [], "relations": []}),
    "no JSON at all",
]


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def reply(request):
    """By the image: the right cat and dog, nothing, or nonsense."""
    if "response_format" not in request:  # asked before the first image: does it answer?
        return "yes"
    picture = request["messages"][1]["content"][1]["image_url"]["url"]
    words = request["response_format"]["json_schema"]["schema"]["properties"]["items"]
    known = words["items"]["properties"]["label"]["enum"]
    assert {"cat", "dog", "star", "cross"} <= set(known)
    return ANSWERS[sum(picture.encode()) % 3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config, tiny_run):
    root = tmp_path_factory.mktemp("scene-graph")
    prompts = root / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in PROMPTS))
    shutil.copytree(tiny_run, root / "run")
    given = ("evaluation.sample_steps=2", "evaluation.preference=auto")
    config = tiny_config(*given, f"evaluation.prompts={prompts}")
    (root / "run" / "config.yaml").write_text(to_yaml(config))
    return root


def test_evaluate_and_report(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("INVERSION_DPO_API_KEY", "sk-s3cr3t")
    run = shutil.copytree(trained / "run", tmp_path / "run")
    with chat.serving(reply) as (url, script):
        settings = [
            "evaluation.scorer=scene-graph",
            "evaluation.preference=sg_iou",
            f"evaluation.parser.url={url}",
            "evaluation.parser.model=seer",
            "evaluation.parser.prompt_price=1",
            "evaluation.parser.completion_price=2",
            "evaluation.seeds=3",
            "evaluation.guidance_scale=1",
        ]
        code, text, err = command(capsys, "evaluate", run, *settings)
        assert code == 0 and "sg_iou" in text and "parsed" in text, err
        asked = len(script.seen)
        assert command(capsys, "evaluate", run, *settings)[0] == 0 and len(script.seen) == asked
    metrics = json.loads((run / "metrics.json").read_text())
    total = metrics["scoring"]["scene-graph"]
    assert total["requests"] == asked - 1  # one asked whether the server answers
    assert total["answers"] <= 12
    assert total["cost"] == pytest.approx((asked - 1) * (100 + 2 * 20) / 1e6)
    table = pq.read_table(run / "per_prompt.parquet").to_pydict()
    unread = sum(k == 0 for side in ("reference", "policy") for k in table[f"{side}.parsed"])
    assert set(total["faults"]) <= {"not_json"} and (unread > 0) == bool(total["faults"])
    structure = metrics.get("structure", {"left_out": 2})
    assert structure["left_out"] <= 2
    assert command(capsys, "report", run)[0] == 0
    files = [p for p in run.rglob("*") if p.is_file()]
    assert not [p for p in files if b"sk-s3cr3t" in p.read_bytes()]


@pytest.mark.slow
def test_scores_and_breakdown_of_the_embedded_world(capsys, trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red star\na large blue cross above a small red star\n")
    settings = f"evaluation.prompts={prompts}", "evaluation.preference=composition"
    code, _, err = command(capsys, "evaluate", run, *settings)
    assert code == 0, err
    found = json.loads((run / "metrics.json").read_text())
    for name in ("sg_iou", "exact"):  # which have a win rate as well
        assert found["structure"]["all"][name].items() <= found[name].items()
    assert list(found["structure"]["objects"]) == ["1", "2"]
    assert list(found["structure"]["relations"]) == ["above"] and "scoring" not in found
    assert command(capsys, "report", run)[0] == 0
    page = (run / "report.html").read_text()
    for words in ("By objects, relations and kinds of error", "2 objects", "wrong relations"):
        assert words in page


def test_pairs_are_labelled(capsys, trained, tmp_path):
    arguments = [
        "pairs",
        "build",
        "-c",
        trained / "run" / "config.yaml",
        "-o",
        tmp_path / "ai",
        "--prompts",
        trained / "prompts.jsonl",
        "--scorer",
        "scene-graph",
        "--samples",
        "8",
        "--by",
        "sg_iou",
    ]
    code, _, err = command(capsys, *arguments)
    assert code == 2 and "evaluation.parser.url" in err and err.strip().count("\n") <= 1
    with chat.serving(reply) as (url, _):
        code, text, err = command(
            capsys, *arguments, f"evaluation.parser.url={url}", "evaluation.parser.model=seer"
        )
    assert code == 0 and "pairs.parquet" in text, err
    rows = pq.read_table(tmp_path / "ai" / "pairs.parquet").to_pylist()
    for row in rows:
        winner = "0" if row["label_0"] == 1 else "1"
        scores = json.loads(row[f"scores_{winner}"])
        assert scores["parsed"] == json.loads(row["scores_0"])["parsed"] == 1
        assert scores["sg_iou"] == 1 and row["caption"] == PROMPTS[0]["prompt"]
        graph = SceneGraph.from_json(row["scene_graph"])
        assert graph == replace(SceneGraph.from_dict(GRAPH), caption=row["caption"])
    assert command(capsys, "pairs", "check", tmp_path / "ai" / "pairs.parquet")[0] == 0
