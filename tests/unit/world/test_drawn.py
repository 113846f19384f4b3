"""The workshop of the drawn pictures, on tiny archives that the test makes; no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from inversion_dpo.data.images import decode_image
from inversion_dpo.run.config import load_config
from tools import stages
from tools.drawn import fetch, judges, pairs, pretrain, scorers
from tools.drawn.groups import SHARES, base_hands, judge_hands, of_group
from tools.drawn.pictures import seen_by_base, seen_by_judges

CODES = [f"1F{k:03X}" for k in range(0x300, 0x328)]


def entry(code: str, category: str = "Food & Drink") -> dict[str, object]:
    return {
        "name": f"DISH-{code}",
        "unified": code,
        "category": category,
        "image": f"{code.lower()}.png",
        "has_img_google": True,
        "has_img_twitter": True,
    }


def packed(word: str, codes: list[str], more: list[tarfile.TarInfo] | None = None) -> bytes:
    """An archive laid out as npm's: emoji.json and a picture of its own colour each."""
    rng, out = np.random.default_rng(len(word)), io.BytesIO()
    entries = [*map(entry, codes), entry("1F1E6", "Flags"), entry("1F408-200D-2B1B")]
    with tarfile.open(fileobj=out, mode="w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        add("package/emoji.json", json.dumps(entries).encode())
        for code in codes:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), tuple(rng.integers(256, size=3))).save(file, "PNG")
            add(f"package/img/{word}/64/{code.lower()}.png", file.getvalue())
            add(f"package/img/{word}/64/../../../../{code.lower()}.png", b"no picture")
        for info in more or ():
            tar.addfile(info)
    return out.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder with both archives, whose digests are pinned."""
    pinned = {}
    for hand, (word, _) in fetch.PACKAGES.items():
        link = tarfile.TarInfo(f"package/img/{word}/64/abc.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        data = packed(word, CODES, [link])
        path = tmp_path / f"emoji-datasource-{word}-{fetch.VERSION}.tgz"
        path.write_bytes(data)
        pinned[hand] = (word, base64.b64encode(hashlib.sha512(data).digest()).decode())
    monkeypatch.setattr(fetch, "PACKAGES", pinned)
    return tmp_path


def test_pictures_and_names_are_read_and_nothing_is_unpacked(archives):
    before = {*archives.iterdir()}
    images, emoji = fetch.load(fetch.fetch(archives))
    assert images.shape == (len(CODES), 2, 64, 64, 3)
    assert {e.name for e in emoji} == {f"dish {c.lower()}" for c in CODES}  # no flag, no joined one
    assert {e.category for e in emoji} == {"food and drink"}
    assert {*archives.iterdir()} - before == {archives / "pictures.safetensors"}
    assert not [p for p in archives.parent.rglob("1f300.png")]


def test_a_spoiled_archive_is_refused(archives):
    path = archives / f"emoji-datasource-google-{fetch.VERSION}.tgz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(fetch.FetchError, match=r"emoji-datasource-google.*sha512"):
        fetch.fetch(archives)
    assert not (archives / "pictures.safetensors").exists()


def test_no_archive_is_kept_that_was_spoiled_on_the_way(tmp_path, monkeypatch):
    answer = io.BytesIO(b"not the archive")
    monkeypatch.setenv("npm_config_registry", "http://registry.example/")
    asked = []
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda address, **_: asked.append(address) or answer
    )
    with pytest.raises(fetch.FetchError, match="sha512"):
        fetch.archive("noto", tmp_path)
    assert asked == [
        "http://registry.example/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
    ]
    assert not [*tmp_path.iterdir()]


def test_judges_never_see_what_the_base_saw():
    emoji = [fetch.Emoji(f"{k:X}", f"name {k}", "", k) for k in range(2000)]
    seen = {(e.code, hand) for e in emoji for hand in base_hands(e)}
    unseen = {(e.code, hand) for e in emoji for hand in judge_hands(e)}
    assert seen and unseen and not seen & unseen
    groups = {name: of_group(emoji, name) for name in SHARES}
    assert sum(map(len, groups.values())) == len(emoji)
    for name, share in SHARES.items():  # five standard deviations of a binomial
        p = share / sum(SHARES.values())
        assert abs(len(groups[name]) - 2000 * p) < 5 * (2000 * p * (1 - p)) ** 0.5
    evaluated, paired = pretrain.PROMPTS.values()
    assert not {*evaluated} & {*paired}
    for e in of_group(emoji, *evaluated):  # judged by the hand that the base does not know
        assert len(base_hands(e)) == len(judge_hands(e)) == 1
    assert all(not judge_hands(e) and base_hands(e) for e in of_group(emoji, *paired))


def test_pictures_are_those_of_their_hand(archives):
    images, emoji = fetch.load(fetch.fetch(archives))
    for pictures in (seen_by_base(images, emoji), seen_by_judges(images, emoji)):
        for pixels, e, hand in zip(pictures.pixels, pictures.emoji, pictures.hands, strict=True):
            back = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
            assert torch.equal(back, images[e.row, hand])


@pytest.mark.parametrize("train", [judges.train_hand, judges.train_reader])
def test_a_killed_training_goes_on_to_the_bit(train, archives, tmp_path, monkeypatch):
    images, emoji = fetch.load(fetch.fetch(archives))
    seen = seen_by_judges(images, emoji)

    def often(*given, **named):
        stages.loop(*given, **named | {"every": 2})

    def run(name: str) -> list[bytes]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train(folder, seen, 5, 4, 3, lambda line: None)
        return [
            p.read_bytes() for p in (folder / judges.HAND, folder / judges.READER) if p.exists()
        ]

    monkeypatch.setattr(judges, "loop", often)
    whole, update = run("whole"), stages.Checkpointed.update

    def killed(self, loss, lr):
        if self.step == 3:
            raise KeyboardInterrupt
        return update(self, loss, lr)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Checkpointed, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    assert run("killed") == whole


def test_pairs_of_originals_prefer_one_hand_and_no_name_is_evaluated(archives, tmp_path):
    pictures, file = fetch.fetch(archives), tmp_path / "originals.parquet"
    images, emoji = fetch.load(pictures)
    count = pairs.write_originals(pictures, file, "twemoji")
    rows, by_name = pq.read_table(file).to_pylist(), {e.name: e for e in emoji}
    assert count == len(rows) == len(of_group(emoji, "pairs", "both")) > 0
    assert {r["label_0"] for r in rows} == {0.0, 1.0}  # the place tells nothing
    for row in rows:
        e = by_name[row["caption"]]
        better, worse = ("jpg_0", "jpg_1")[:: 1 if row["label_0"] else -1]
        assert np.array_equal(decode_image(row[better], ""), images[e.row, 1])
        assert np.array_equal(decode_image(row[worse], ""), images[e.row, 0])


@pytest.mark.parametrize("name", pairs.PREFERENCE)
def test_the_configuration_of_every_set_is_read(name, tmp_path):
    config = load_config(str(pairs.write_config(tmp_path / "model", tmp_path, name)), [])
    assert config.evaluation.preference == pairs.PREFERENCE[name]
    assert config.evaluation.scorer == pairs.JUDGE != pairs.LABELLER


def test_a_reader_places_names_by_the_nearest_picture(tmp_path):
    network = judges.PictureEncoder(judges.WIDTH)
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        judges.write_reader(tmp_path, network, network(pixels)[[0, 1, 2, 0]], ["a", "b", "c", "a"])
    judges.atomic_save(judges.HandNetwork().state_dict(), tmp_path / judges.HAND)
    found = judges.Judges(tmp_path)
    assert found.names == ["a", "b", "c"]
    place, probability = found.read(pixels, ["a", "b", "c"])
    assert place.tolist() == [0, 0, 0]
    wrong, less = found.read(pixels, ["b", "c", "a"])
    assert (wrong > 0).all() and (less < probability).all()
    with pytest.raises(ValueError, match="'dragon'"):
        found.read(pixels, ["a", "b", "dragon"])


def test_both_pictures_of_an_emoji_are_partners():
    rows = torch.tensor([4, 5, 4, 6])
    assert judges.partners(rows).tolist() == [2, 1, 0, 3]


def test_new_channels_leave_the_embedded_weights_in_place():
    old = pretrain.load_file(
        pretrain.PACKAGE / "assets/pipeline/vae/diffusion_pytorch_model.safetensors"
    )
    new = pretrain.warm(pretrain.build_vae(pretrain.CHANNELS), "vae").state_dict()
    weight = "decoder.up_blocks.3.resnets.0.conv1.weight"
    assert torch.equal(new[weight], old[weight])
    mean_and_variance = [*range(8), *range(16, 24)]
    assert torch.equal(
        new["encoder.conv_out.weight"][mean_and_variance], old["encoder.conv_out.weight"]
    )


def test_the_model_that_ships_is_small_and_judged_as_its_page_says(monkeypatch):
    from diffusers import DiffusionPipeline

    monkeypatch.delenv("DRAWN_MODEL", raising=False)
    model = scorers.folder()
    assert sum(p.stat().st_size for p in model.rglob("*") if p.is_file()) < 30e6
    accuracy = json.loads((model / "accuracy.json").read_text())
    page = (Path(__file__).parents[3] / "docs/results/drawn.md").read_text()
    for role, found in accuracy.items():
        shares = [f"{found[name]:.0%}" for name in ("hand", "named", "recognised")]
        hand, named, among = shares
        row = f"| {role} | {found['pictures']} | {hand} | {found['names']} | {named} | {among} |"
        assert row in page
    pipe = DiffusionPipeline.from_pretrained(model / "pipeline", torch_dtype=torch.float32)
    names = (model / "prompts-pairs.txt").read_text().splitlines()[:2]
    for name in names:  # known to the labellers only
        image = pipe(name, num_inference_steps=2, output_type="np").images[0]
        scores = scorers.labeller([(image * 255).astype(np.uint8)], [name])
        assert all(0 <= values[0] <= 1 for values in scores.values())


@pytest.mark.slow
def test_the_whole_command_makes_a_pipeline_that_diffusers_loads(archives, monkeypatch):
    from diffusers import DiffusionPipeline

    few = ["--vae-steps", "1", "--names-steps", "1", "--steps", "1", "--judge-steps", "1"]
    command = ["pretrain", "--output", str(archives), "--batch", "4", *few]
    monkeypatch.setattr("sys.argv", command)
    pretrain.main()
    model = archives / "model"
    prompts = (model / "prompts-evaluation.txt").read_text().splitlines()
    pipe = DiffusionPipeline.from_pretrained(model / "pipeline")
    image = pipe(prompts[0], num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()
    monkeypatch.setenv("DRAWN_MODEL", str(model))
    for scorer in (scorers.judge, scorers.labeller):
        scores = scorer([(image * 255).astype(np.uint8)], [f"food and drink: {prompts[0]}"])
        assert set(scores) == {"twemoji", "recognised", "legible"}  # tuning counts what falls
    before = {p: os.stat(p).st_mtime_ns for p in archives.glob("*.safetensors")}
    pretrain.main()
    assert before == {p: os.stat(p).st_mtime_ns for p in archives.glob("*.safetensors")}
