"""Model card and upload: what they say, and that they say no secret and no path."""

import hashlib
import json
import logging
from itertools import pairwise

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from safetensors.numpy import save

from inversion_dpo.evaluation import publish as publishing
from inversion_dpo.evaluation.page import Table
from inversion_dpo.evaluation.publish import PublishError, card, export, hub_id, push
from inversion_dpo.models.kohya import NAMERS
from inversion_dpo.run.config import load_config
from inversion_dpo.run.disk import digest_of
from inversion_dpo.run.folder import BusyError, alone_at, claim, read_config

ROW = {"reference": 0.5, "policy": 0.6, "gain": 0.1, "gain_low": 0.05, "gain_high": 0.15}
WORSE = {"reference": 0.5, "policy": 0.4, "gain": -0.1, "gain_low": -0.15, "gain_high": -0.05}
METRICS = {
    "warmth": ROW,
    "sg_iou": WORSE,
    "preference": ROW,
    "win_rate": 0.75,
    "win_rate_low": 0.7,
    "win_rate_high": 0.8,
    "n_prompts": 50,
    "pairs": 1800,
    "steps": 80,
    "seeds": 1,
}
WEIGHTS = save({"weights": np.zeros(9, np.float32)})
TOKEN = "hf_" + "secret" * 6


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my-run"
    claim(folder, load_config("sd15", ["data.pairs=hf:yuvalkirstain/pickapic_v2"]))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(WEIGHTS)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    return folder


def parts(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_second_export_of_one_run_is_refused(run, tmp_path):
    with alone_at(run / "export"):
        with pytest.raises(BusyError, match="my-run/export is being written already: wait"):
            export(run)
        export(run, to=tmp_path / "trial")  # what --dry-run does
    assert not (run / "export").exists()


def test_a_policy_that_draws_nothing_is_not_exported(run):
    file = run / "adapter" / "pytorch_lora_weights.safetensors"
    file.write_bytes(save({"weights": np.array([1, np.nan], np.float32)}))
    with pytest.raises(PublishError, match="lora_weights.safetensors: weights is not finite"):
        export(run)
    file.unlink()
    with pytest.raises(PublishError, match="adapter holds no .safetensors file: run its training"):
        export(run)
    assert not (run / "export").exists()


@pytest.mark.parametrize("change", ["reference", "policy", "trained", "before"])
def test_the_card_states_no_score_of_other_models(run, caplog, change):
    own = {"models": None, "policy_weights": digest_of([run / "adapter"])}
    (run / "grid.png").write_bytes(b"picture")
    for models in (None, [None, "this/run"]):  # the second as later rounds have it
        (run / "metrics.json").write_text(json.dumps(METRICS | own | {"models": models}))
        export(run)
        assert "0.750 [0.700, 0.800]" in (run / "export/README.md").read_text() and not caplog.text
    changes = {
        "reference": {"models": ["some/other", "this/run"]},
        "policy": {"models": [None, "some/other"], "policy_weights": "0" * 16},
        "trained": {},
        "before": {"models": [None, "some/other"], "policy_weights": None},
    }
    (run / "metrics.json").write_text(json.dumps(METRICS | own | changes[change]))
    if change == "trained":
        weights = save({"weights": np.ones(9, np.float32)})
        (run / "adapter/pytorch_lora_weights.safetensors").write_bytes(weights)
    export(run)
    text = (run / "export/README.md").read_text()
    assert "It was not scored" in text and "0.750" not in text and "grid.png" not in text
    assert not (run / "export/grid.png").exists()
    assert "the card states no score. Run `inversion-dpo evaluate" in caplog.text


def test_a_training_that_goes_on_is_not_exported(run):
    """Its adapter is that of fewer steps than the card would say."""
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 49, "loss": 1}\n')
    with pytest.raises(
        PublishError, match="trained to step 50 of .* before it was continued: finish"
    ):
        export(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": read_config(run).training.steps, "pairs": 9}) + "\n")
    assert export(run).is_dir()


def test_the_card_has_the_hubs_metadata_and_the_numbers(run):
    export(run)
    head, body = parts((run / "export" / "README.md").read_text())
    assert head["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert head["library_name"] == "diffusers" and "lora" in head["tags"]
    assert head["datasets"] == ["yuvalkirstain/pickapic_v2"]
    assert head["pipeline_tag"] == "text-to-image"
    assert "| `warmth` | 0.5000 | 0.6000 | +0.1000 [+0.0500, +0.1500] |" in body
    assert "0.750 [0.700, 0.800]" in body and "1,800 pairs" in body
    assert "measurably worse than the base model by `sg_iou`" in body
    assert "50 prompts are few" in body
    assert "`objective.beta` | `2000.0`" in body and 'load_lora_weights("' in body


def test_the_card_lists_no_setting_without_effect(run):
    """All weights have no rank, and KTO inverts nothing."""
    text = card(run, load_config("sd15", ["objective.name=kto", "policy.kind=full"]))
    listed = [row[0].strip("`") for row in tables(parts(text)[1])[0][1:]]
    assert not [key for key in listed if key.startswith(("policy.", "inversion."))]
    assert {"objective.target", "objective.beta", "training.steps"} <= {*listed}


def test_the_card_names_the_loss_and_path_that_replace_the_methods_own(run):
    """A run of objective.loss=kto had a card that said inversion_dpo, and neither path nor rho."""
    given = ["objective.loss=kto", "objective.path=line", "objective.coupling=0.5"]
    config = load_config(
        "sd15", [*given, "data.prompt_dropout=0.1", "policy.target_modules=[to_q]"]
    )
    text = card(run, config)
    assert "loss `kto`, path `line`" in text and "inversion_dpo" not in text
    listed = {key.strip("`"): value for key, value in tables(parts(text)[1])[0][1:]}
    assert listed["objective.loss"] == "`kto`" and listed["objective.coupling"] == "`0.5`"
    assert listed["data.prompt_dropout"] == "`0.1`"
    assert listed["policy.target_modules"] == "`[to_q]`"
    assert "objective.link" not in listed and "data.pairs" not in listed


def test_the_card_of_edits_names_their_task_and_the_networks_guidance(run):
    assert "guidance_embed" not in card(run, load_config("sd15", []))
    (run / "images").mkdir()
    (run / "images/000-source.png").write_bytes(b"")
    head, body = parts(card(run, load_config("flux", ["model.guidance_embed=2.5"])))
    assert head["pipeline_tag"] == head["tags"][0] == "image-to-image"
    assert "| `model.guidance_embed` | `2.5` |" in body


def test_the_card_of_single_images_speaks_of_no_pairs(run):
    """Thumbs, which kto and nft take one by one."""
    told = ("aligned to preference pairs with", "pairs prefer, with their biases")
    assert all(text in card(run, read_config(run)) for text in told)
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 8, "heldout_liked": 3.0, "pairs": 24}) + "\n")
    written = card(run, read_config(run))
    assert "aligned to labelled images with" in written and "labels prefer, with" in written
    assert "\n1,800 images of `" in written
    assert not any(text in written for text in told)


def test_the_card_of_a_run_that_was_not_judged_claims_nothing(run):
    """The method's own target and beta are named; no sample and no score is spoken of."""
    kto = load_config("sd15", ["objective.name=kto", "objective.beta=null"])
    (run / "metrics.json").write_text(json.dumps({"n_prompts": 2, "seeds": 1, "pairs": 9}))
    body = card(run, kto)
    assert "`objective.target` | `x0`" in body and "`objective.beta` | `1000.0`" in body
    assert "None" not in body and "not scored" in body and "few" not in body
    (run / "metrics.json").unlink()
    assert "It was sampled" not in card(run, kto)


def tables(text):
    """The cells of every table that a Markdown parser sees, row by row."""
    tokens = MarkdownIt().enable("table").parse(text)
    found = []
    for before, token in pairwise(tokens):
        found += [[]] if token.type == "table_open" else []
        if token.type == "tr_open":
            found[-1].append([])
        elif before.type in ("th_open", "td_open"):
            found[-1][-1].append(token.content)
    return found


def test_the_card_is_whole_as_markdown(run):
    config = load_config(str(run / "config.yaml"), ["model.guidance_embed=2.5"])
    settings, scores = tables(parts(card(run, config))[1])
    always = [f"`{key}`" for key in publishing.CARD_SETTINGS]
    assert [row[0] for row in settings[1:]][: len(always)] == always
    assert [row[0] for row in scores] == ["score", "`warmth`", "`sg_iou`"]
    assert {len(row) for row in scores} == {4}


def test_the_card_counts_samples_of_one_colour(run):
    found = METRICS | {"one_colour": {"reference": [], "policy": ["'a star', seed 3"]}}
    (run / "metrics.json").write_text(json.dumps(found))
    text = card(run, load_config(str(run / "config.yaml"), []))
    assert "\n- 1 of its samples are of one colour and show nothing, 0 of the base" in text


def test_the_comparisons_tables_are_whole_as_markdown():
    table = Table(["method", "gain"], [["a|b", "1"], ["c", "2"]])
    assert tables(f"words\n\n{table.markdown()}\nmore") == [
        [["method", "gain"], ["a|b", "1"], ["c", "2"]]
    ]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_lora_that_a_run_started_from_is_named_with_its_hash(run, tmp_path, kind):
    start = tmp_path / "secret-place" / "style"
    start.mkdir(parents=True)
    (start / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    config = load_config("sd15", [f"model.lora={start}", f"policy.kind={kind}"])
    text = card(run, config)
    assert f"the LoRA `style` (SHA-256 `{hashlib.sha256(b'weights').hexdigest()}`)" in text
    assert "secret-place" not in text
    assert ("merged into the base model first" in text) is (kind == "lora")
    assert text.count("pipe.load_lora_weights") == (2 if kind == "lora" else 0)
    of_hub = card(run, load_config("sd15", ["model.lora=owner/style"]))
    assert "the LoRA `owner/style`, which" in of_hub


def test_the_card_names_another_network_and_what_diffusers_does_not_load(run, tmp_path):
    """A LoRA fits the network that it was trained on, which may not be the base's own."""
    unet = tmp_path / "secret-place" / "unet"
    unet.mkdir(parents=True)
    (unet / "x.safetensors").write_bytes(b"weights")
    loha = tmp_path / "loha.safetensors"
    loha.write_bytes(save({"a.hada_w1_a": np.zeros(1)}))
    given = [f"model.network={unet.parent}", "model.vae=owner/vae", f"model.lora={loha}"]
    head, body = parts(card(run, load_config("sd15", given)))
    assert f"not the base's own, but `secret-place` (SHA-256 `{hash_of(b'weights')}`)" in body
    assert "The autoencoder was `owner/vae`." in body and str(tmp_path) not in body
    assert "in the place of pipe.unet" in body and "diffusers loses some of it" in body
    assert "fuse_lora" not in body and body.count("pipe.load_lora_weights") == 1
    head, _ = parts(card(run, load_config("sd15", ["model.network=owner/dpo"])))
    assert head["base_model"] == ["owner/dpo", "stable-diffusion-v1-5/stable-diffusion-v1-5"]


@pytest.mark.parametrize(
    ("key", "whole"),
    [
        ("unet.a.lora_A.weight", True),
        ("transformer.a.lora.down.weight", True),
        ("unet.a.lora_magnitude_vector", True),
        ("lora_unet_mid_block_a.alpha", True),
        ("transformer.a.alpha", False),
        ("base_model.model.a.lora_A.weight", False),
        ("diffusion_model.a.lora_A.weight", False),
        ("lora_unet_joint_blocks_0_a.lora_down.weight", False),
        ("lora_unet_mid_block_a.dora_scale", False),
        ("lora_te1_text_model_a.alpha", False),
        ("text_encoder.a.lora_A.weight", False),
    ],
)
def test_the_cards_code_adds_only_a_lora_that_diffusers_takes_whole(run, tmp_path, key, whole):
    """Of others it lost a part or the scale, mostly without an error."""
    start = tmp_path / "start.safetensors"
    start.write_bytes(save({key: np.zeros(1)}))
    text = card(run, load_config("sd15", [f"model.lora={start}"]))
    assert ("pipe.fuse_lora()" in text) == whole != ("diffusers loses some of it" in text)


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def test_huggingface_hub_accepts_the_card(run):
    from huggingface_hub import ModelCard

    loaded = ModelCard(card(run, load_config(str(run / "config.yaml"), [])))
    assert loaded.data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_no_path_of_this_machine_is_told(tmp_path):
    folder = tmp_path / "run"
    secret = f"{tmp_path}/secret-place"
    places = [
        f"model.path={secret}/model",
        f"data.pairs={secret}/p.csv",
        f"evaluation.prompts={secret}/prompts.txt",
    ]
    claim(folder, load_config(None, places))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    text = card(folder, load_config(None, places))
    assert str(tmp_path) not in text and "secret-place" not in text
    assert "`model` (local)" in text and "`p.csv`" in text and "base_model" not in text


def test_without_scores_no_claim_is_made(run):
    (run / "metrics.json").unlink()
    text = card(run, load_config(str(run / "config.yaml"), []))
    assert "no claim is made" in text and "| score |" not in text


@pytest.mark.parametrize(
    "path, expected",
    [
        ("owner/name", "owner/name"),
        ("owner/name:conf", "owner/name"),
        ("/a/b", None),
        ("./a/b", None),
        ("pairs.parquet", None),
        ("a/b/c", None),
        ("asset:pipeline", None),
    ],
)
def test_hub_ids(path, expected):
    assert hub_id(path) == expected


def test_export_needs_a_policy(run):
    with pytest.raises(PublishError, match="kohya"):
        export(run, "ckpt")
    (run / "adapter" / "pytorch_lora_weights.safetensors").unlink()
    (run / "adapter").rmdir()
    with pytest.raises(PublishError, match="finish its training"):
        export(run)


def test_offline_is_one_line_without_the_token(run, monkeypatch, caplog, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    folder = export(run)
    with pytest.raises(PublishError, match="was not uploaded") as error:
        push(folder, "me/mine")
    told = str(error.value) + caplog.text + "".join(capsys.readouterr())
    assert "\n" not in str(error.value) and TOKEN not in told and "Offline" in str(error.value)


def test_an_error_that_repeats_the_token_is_masked(run, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def refuse(self, *_, **__):
        raise RuntimeError(f"401 for Bearer {self.token}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(PublishError, match=r"Bearer \*\*\*") as error:
        push(export(run), "me/mine")
    assert TOKEN not in str(error.value) and error.value.__suppress_context__


def test_what_is_uploaded(run, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    api = huggingface_hub.HfApi
    monkeypatch.setattr(
        api, "create_repo", lambda self, *a, **k: calls.append((a, k)) or "https://hub/me/mine"
    )
    monkeypatch.setattr(api, "upload_folder", lambda self, **k: calls.append(k))
    folder = export(run)
    assert push(folder, "me/mine") == "https://hub/me/mine"
    assert calls[0] == (("me/mine",), {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == folder and calls[1]["repo_id"] == "me/mine"
    assert {p.name for p in folder.iterdir()} == {"README.md", "pytorch_lora_weights.safetensors"}


def test_without_a_token_the_login_is_named(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PublishError, match="hf auth login"):
        push(export(run), "me/mine")
    with pytest.raises(PublishError, match="OWNER/NAME"):
        push(run, "mine")
    assert {"diffusers", *NAMERS} == set(publishing.FORMATS)


def test_a_damaged_policy_is_not_given_away(run):
    """It was copied, with exit code 0."""
    file = run / "adapter" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PublishError, match="safetensors is damaged .*: run its training again"):
        export(run)
    assert not (run / "export").exists()
