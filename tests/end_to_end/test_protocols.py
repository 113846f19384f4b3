"""A paper's protocol on tiny weights: every set, every scorer, further models, kills, processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

import inversion_dpo
from inversion_dpo.cli.main import main
from inversion_dpo.evaluation import protocols
from inversion_dpo.evaluation.scorers.registry import PER_PROMPT
from inversion_dpo.run.config import load_config, to_yaml
from inversion_dpo.run.disk import atomic_json, read_json
from tests.chat_server import serving
from tests.prompt_files import place_set
from tools.tiny.scorers import WRITERS, write_tiny_scorer
from tools.tiny.vlm import write_tiny_vlm

PROMPTS = ["a small red star", "a large blue circle left of a small green square"]
ANY_PROMPT = [name for name in WRITERS if name not in PER_PROMPT]
ASSET = "evaluation.prompts=asset:prompts-test.txt"
QUICK = ["evaluation.scorer=scenes", "evaluation.preference=warmth", "evaluation.sample_steps=1"]


def command(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def run(tiny_run, tiny_config, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "config.yaml").write_text(to_yaml(tiny_config()))
    return folder


def test_every_protocol_names_known_sets_and_settings():
    from inversion_dpo.evaluation.named_sets import named_sets
    from inversion_dpo.run.config import load_config

    for protocol in protocols.protocols().values():
        assert set(protocol.prompts) <= set(named_sets()) and "https://" in protocol.source
        config = load_config(None, [*protocol.overrides(), f"model.path={protocol.model}"])
        resolution = f"model.resolution={config.model.resolution}"
        left = protocol.departures(config)
        assert [text for text in left if not text.startswith(resolution)] == []
        for row in protocol.published.get("rows", {}).values():
            assert len(row) == len(protocol.published["columns"])
        scores = tuple(config.evaluation.scorer)
        assert all(name.startswith(scores) for name in protocol.published.get("columns", ()))


@pytest.mark.slow
def test_a_protocol_compares_checkpoints_and_stands_in_the_report(capsys, run, tmp_path, hub_cache):
    place_set(hub_cache, tmp_path / "sets", "pickapic-test", PROMPTS)
    other = shutil.copytree(run / "adapter", tmp_path / "other")
    asked = ["evaluate", run, "--protocol", "sd15-dpo", *QUICK, "evaluation.prompts=pickapic-test"]
    code, out, err = command(capsys, *asked, "--against", other)
    assert code == 0, err
    assert "Do not compare with published numbers: evaluation.sample_steps=1, not 50" in out
    found = json.loads((run / "protocols" / "sd15-dpo.json").read_text())
    models = found["sets"]["pickapic-test"]["models"]
    assert list(models) == ["this run", str(other)]  # the same LoRA by another name
    assert models["this run"] == models[str(other)]
    assert {"win_rate_low", "gain_low"} <= set(models["this run"]["warmth"])
    assert json.loads((run / "metrics.json").read_text())["warmth"] == models["this run"]["warmth"]
    assert command(capsys, "report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "Protocol sd15-dpo: pickapic-test" in page and "InPO, published" in page
    before = {f: f.stat().st_mtime_ns for f in (run / "samples").glob("*.parquet")}
    assert command(capsys, *asked, "--against", other)[0] == 0
    assert {f: f.stat().st_mtime_ns for f in (run / "samples").glob("*.parquet")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "sdxl"], "one of sd15-dpo, sdxl-dpo"),
        (["--against", "a/b"], "--against needs --protocol"),
        (["--protocol", "sd15-dpo", *QUICK, ASSET, "--against", "no/such"], "no/such"),
        (["--protocol", "sd15-dpo", *QUICK], "inversion-dpo prompts pickapic-test"),
    ],
)
def test_a_wrong_name_is_one_line_before_anything_is_sampled(capsys, run, arguments, message):
    code, _, err = command(capsys, "evaluate", run, *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (run / "samples").exists() and not (run / "protocols").exists()


def test_a_run_of_another_size_is_refused(capsys, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    text = (other / "config.yaml").read_text().replace("resolution: 64", "resolution: 128")
    (other / "config.yaml").write_text(text)
    asked = ["evaluate", run, "--protocol", "sd15-dpo", *QUICK, ASSET, "--against", other]
    code, _, err = command(capsys, *asked)
    assert code == 2 and f"{other} draws 128 pixels" in err and f"Give {other}/adapter" in err


def test_a_protocol_takes_held_out_prompts_and_the_only_score(capsys, run):
    asked = ["evaluation.prompts=heldout", "evaluation.limit=1", "evaluation.sample_steps=1"]
    scores = ["evaluation.scorer=tests.end_to_end.test_protocols:brightness"]
    asked += [*scores, "evaluation.preference=auto"]
    code, out, err = command(capsys, "evaluate", run, "--protocol", "sd15-dpo", *asked)
    assert code == 0 and "brightness" in out, err
    found = json.loads((run / "protocols" / "sd15-dpo.json").read_text())
    assert found["preference"] == "brightness" and list(found["sets"]) == ["heldout"]
    settings = protocols.protocol_of("sd15-dpo").overrides(["evaluation.scorer=null"])
    assert not any("preference" in text for text in settings)  # which needs a scorer


def brightness(images, prompts):
    return [image.mean() for image in images]


def test_published_numbers_stand_in_their_columns_alone():
    row = {"reference": 1.0, "policy": 2.0, "gain": 1.0, "gain_low": 0.5, "gain_high": 1.5}
    row |= {"win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65}
    part = {"n_prompts": 500, "models": {"a/b": {"clip": row, "mine": row}}}
    found = {"protocol": "sdxl-dpo", "departures": [], "sets": {"pickapic-test": part}}
    rows = protocols.table_of(found, "pickapic-test")
    assert [(r["model"], r[""], r["clip"], r["mine"]) for r in rows][:4] == [
        ("the reference", "mean", "1", "1"),
        ("a/b", "mean", "2", "2"),
        ("a/b", "gain", "+1.0 [+0.5, +1.5]", "+1.0 [+0.5, +1.5]"),
        ("a/b", "win rate", "60.0% [55.0, 65.0]", "60.0% [55.0, 65.0]"),
    ]
    assert [(r["model"], r["clip"], r["mine"]) for r in rows][4:] == [
        ("base, published", "28.41", "–"),
        ("Diffusion-DPO, published", "29.02", "–"),
        ("InPO, published", "28.84", "–"),
    ]
    found["sets"]["hpdv2"] = part  # of which nothing was published
    assert len(protocols.table_of(found, "hpdv2")) == 4


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.lora=some/taste", "model.lora=some/taste, not null"),
        ("model.network=some/unet", "model.network=some/unet, not null"),
        ("model.quantize=nf4", "model.quantize=nf4, not null"),
        ("model.prompt_chunks=3", "model.prompt_chunks=3, not 1"),
    ],
)
def test_another_reference_than_the_protocols_is_a_departure(setting, told):
    protocol = protocols.protocol_of("sd15-dpo")
    base = [*protocol.overrides(), f"model.path={protocol.model}", "model.resolution=512"]
    assert protocol.departures(load_config(None, base)) == []
    assert protocol.departures(load_config(None, [*base, setting])) == [told]
    given = protocol.departures(load_config(None, base), "a/b")
    assert given == [f"--reference=a/b, not {protocol.model}"]


def test_every_model_has_a_folder_of_its_own():
    names = ["a/m", "../a/m", "a:m", "a m", "/a/m", "a/m/", ".a/m"]
    assert len({protocols.plain("set", name) for name in names}) == len(names)
    assert protocols.plain("geneval", "mhdang/dpo-v1.5") == Path("geneval/mhdang--dpo-v1.5")
    for name in ("..", "/", "../..", "C:\\m"):
        part = protocols.plain(name)
        assert len(part.parts) == 1 and part.name not in ("", ".", "..") and part.name == str(part)


def test_another_number_of_prompts_is_told_where_the_published_numbers_stand():
    found = {"protocol": "sd15-dpo", "departures": [], "sets": {}}
    for number, told in ((500, False), (499, True)):
        found["sets"] = {"pickapic-test": {"n_prompts": number, "models": {"a": {}}}}
        text = " ".join(protocols.notes(found, "pickapic-test"))
        assert ("published numbers: 499 prompts of pickapic-test, not 500." in text) == told


def test_a_table_of_an_earlier_policy_and_an_unfinished_one_say_so(capsys, run, caplog):
    asked = ["evaluate", run, "--protocol", "sd15-dpo", *QUICK, ASSET, "evaluation.limit=2"]
    assert command(capsys, *asked)[0] == 0
    file = run / "protocols" / "sd15-dpo.json"
    found = read_json(file)
    assert found["finished"] is True
    assert command(capsys, "report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "trained further" not in page and "Unfinished" not in page and not caplog.text
    atomic_json(found | {"finished": False}, file)
    weights = next((run / "adapter").glob("*.safetensors"))
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(tensors, weights)
    assert command(capsys, "report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "this run is as it was before it was trained further" in page and "Unfinished" in page
    assert "with the same noise and before it was trained further, the policy" in page
    assert f"of the policy before it was trained further: run `inversion-dpo evaluate {run}`" in (
        caplog.text
    )
    shutil.rmtree(run / "samples")
    code, _, err = command(capsys, "report", run)
    assert code == 2 and "samples behind metrics.json are gone, and the policy was trained" in err


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Settings that ask every scorer at once, on tiny random weights."""
    root = tmp_path_factory.mktemp("judges")
    places = {name: write_tiny_scorer(name, root / name) for name in ANY_PROMPT}
    vlm = write_tiny_vlm(root / "llava")
    asked = ("vqa", "unifiedreward", "unifiedreward-pair")
    places |= dict.fromkeys(asked, vlm)
    names = json.dumps([*ANY_PROMPT, *asked, "scenes"])
    at = [f"evaluation.checkpoints.{name}={place}" for name, place in places.items()]
    return [f"evaluation.scorer={names}", "evaluation.parser.max_tokens=8", *at]


def two(words, cache):
    """Start the command in two processes, as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": str(Path(inversion_dpo.__file__).parents[1])}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "inversion_dpo", *map(str, words)],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15-dpo", "sdxl-dpo", "sd35-grpo"])
def test_a_protocol_with_every_scorer_is_killed_and_goes_on(run, judges, hub_cache, tmp_path, name):
    """On two processes; the model's own family is in test_families.py."""
    protocol = protocols.protocols()[name]
    for one in protocol.prompts:
        place_set(hub_cache, tmp_path / "sets", one, PROMPTS)
    words = ["evaluate", run, "--protocol", name, *judges, "evaluation.sample_steps=1"]
    words += ["evaluation.batch_size=1", "--against", run / "adapter"]
    started = two(words, tmp_path / "hub")
    until = time.monotonic() + 200
    while not list((run / "samples").glob("policy-*")):
        assert time.monotonic() < until and started[0].poll() is None, started[0].communicate()[1]
        time.sleep(0.05)
    for process in started:
        process.kill()
        process.wait()
    assert not (run / "protocols" / f"{name}.json").exists()
    told = [process.communicate(timeout=500) for process in two(words, tmp_path / "hub")]
    found = json.loads((run / "protocols" / f"{name}.json").read_text())
    assert list(found["sets"]) == protocol.prompts, told
    for part in found["sets"].values():
        ours, same = part["models"].values()
        assert ours == same and {*ANY_PROMPT, "vqa", "unifiedreward", "exact"} <= set(ours)
    table = pq.read_table(run / "per_prompt.parquet").to_pydict()
    assert table["prompt"][:2] == PROMPTS and set(table["policy.unifiedreward_read"]) == {0.0}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["pairwise"] == {"n": 0, "unread": len(table["prompt"])}
    assert f"protocol {name}" in told[0][0] and "could not be read" in told[0][1]


@pytest.mark.slow
def test_genevals_table_has_each_task_and_their_mean(capsys, run, tmp_path):
    asked = {"single_object": "dog", "counting": "person"}
    rows = [
        {"tag": task, "include": [{"class": name, "count": 1}], "prompt": prompt}
        for (task, name), prompt in zip(asked.items(), PROMPTS, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", run, "--protocol", "sd15-geneval", "evaluation.sample_steps=1"]
    words += [f"evaluation.prompts={tmp_path / 'rows.jsonl'}", "evaluation.seeds=2"]
    for name in ("geneval", "clip"):
        place = write_tiny_scorer(name, tmp_path / name)
        words.append(f"evaluation.checkpoints.{name}={place}")
    code, out, err = command(capsys, *words)
    columns = ["geneval", "geneval_overall", "geneval_single_object", "geneval_counting"]
    assert code == 0 and out.splitlines()[1].split() == ["model", *columns], err
    assert command(capsys, "report", run)[0] == 0
    assert "geneval_overall" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_judge_that_fails_in_the_middle_loses_nothing_on_two_processes(run, tmp_path):
    """Each process asks for its images; one line is told, and only the rest is asked again."""
    seen, broken = [], [True]

    def answer(request):
        text = json.dumps(request)
        if "Is this image grey" in text:  # before the first image
            return "Yes"
        if broken[0] and len(seen) > 2:
            return 400, {}, b"out of memory", 0.0
        seen.append(text)
        return "Alignment Score: 2\nCoherence Score: 3\nStyle Score: 4"

    with serving(answer) as (url, _):
        words = ["evaluate", run, "evaluation.scorer=unifiedreward", "evaluation.batch_size=1"]
        words += [f"evaluation.checkpoints.unifiedreward={url}@m", "evaluation.limit=6"]
        words += ["evaluation.preference=unifiedreward", "evaluation.sample_steps=1"]
        words += ["evaluation.prompts=asset:prompts-test.txt", "evaluation.parser.parallel=1"]
        told = [process.communicate(timeout=300)[1] for process in two(words, tmp_path / "hub")]
        errors = [line for text in told for line in text.splitlines() if "out of memory" in line]
        assert errors and all("Earlier answers are kept" in line for line in errors), told
        broken[0] = False
        told = [process.communicate(timeout=300)[1] for process in two(words, tmp_path / "hub")]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n_prompts"] == 6 and metrics["unifiedreward"]["policy"] == 3.0, told
    assert len(seen) == len({*seen}) == 2 * 12  # two guidance scales, two models, six prompts
