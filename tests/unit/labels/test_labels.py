"""Labels: recorded once, undone once, counted, exported, agreed on."""

import io
import json
import shutil
import sqlite3
import threading
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.cli.label import fill, rest_text
from inversion_dpo.data.columns import OPTIONAL
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import open_pairs as opened
from inversion_dpo.labels.choices import import_choices
from inversion_dpo.labels.export import export, summary
from inversion_dpo.labels.questions import Question, WebError, questions
from inversion_dpo.labels.store import SHARED, Conflict, LabelStore, swapped
from inversion_dpo.labels.votes import agreement, outcome, share
from inversion_dpo.run.config import load_config
from inversion_dpo.run.fields import ConfigError, DataConfig
from inversion_dpo.run.folder import sole_writer
from tests.pair_files import open_pairs, write_edits


def asked(path, limit=None, on_bad_row="error"):
    counts = Counter()
    return list(
        questions(DataConfig(pairs=str(path), on_bad_row=on_bad_row), limit, counts)
    ), counts


@pytest.fixture
def store(pair_file, tmp_path):
    store = LabelStore(tmp_path / "labels.sqlite")
    store.add(asked(pair_file)[0])
    yield store
    store.close()


def test_no_label_goes_into_a_file_that_was_moved_or_deleted(store, tmp_path):
    """SQLite would take it, and it would be lost."""
    pair, moved = store.ahead("me")[0].pair, tmp_path / "moved"
    store.path.rename(moved)
    with pytest.raises(sqlite3.OperationalError, match="moved or deleted; put it back"):
        store.label("1", "me", pair, "tie")
    moved.rename(store.path)
    store.label("1", "me", pair, "tie")
    assert store.done("me") == 1


SIDES = ("left", "right")


def side_of(store, labeller, image):
    """The side on which the next pair shows its first (0) or second (1) image."""
    pair = store.ahead(labeller)[0]
    return ("left", "right")[image != swapped(labeller, pair.pair)]


def rewritten(pair_file, path, change):
    rows = pq.read_table(pair_file).to_pylist()
    pq.write_table(pa.Table.from_pylist([change(dict(row)) for row in rows]), path)
    return path


# ---------------------------------------------------------------- what is asked


def test_labels_in_the_data_are_not_looked_at(pair_file, tmp_path):
    def tie(row):
        return row | {"label_0": 0.5}

    def bare(row):
        del row["label_0"]
        return row

    expected = asked(pair_file)[0]
    assert len(expected) == 16
    for change in (tie, bare):
        assert asked(rewritten(pair_file, tmp_path / "x.parquet", change))[0] == expected


@pytest.mark.parametrize(
    "said",
    [{"preference_0": 0.2}, {"choice_dist": [1, 4]}, {"label_1": 1.0}, {"has_label": False}],
)
def test_what_the_data_say_of_a_pair_is_not_asked(said, pair_file, tmp_path):
    path = rewritten(pair_file, tmp_path / "x.parquet", lambda r: r | {"label_0": 0.0} | said)
    count = pq.read_metadata(path).num_rows
    assert len(list(questions(DataConfig(str(path)), None, Counter()))) == count


def test_unlabelled_pairs_do_not_train_and_the_error_says_what_to_do(pair_file, tmp_path):
    path = rewritten(pair_file, tmp_path / "x.parquet", lambda r: r | {"label_0": None})
    with pytest.raises(DataError, match=r"x.parquet, row 0: label_0 is null.*inversion-dpo web"):
        list(open_pairs(path))


def test_a_bad_row_is_named_or_skipped(pair_file, tmp_path):
    spoiled = iter([b"\x89PNG broken", *[None] * 15])

    def spoil(row):
        return row | {"jpg_0": next(spoiled) or row["jpg_0"]}

    path = rewritten(pair_file, tmp_path / "x.parquet", spoil)
    with pytest.raises(DataError, match="row 0, jpg_0.*data.on_bad_row=skip"):
        asked(path)
    found, counts = asked(path, on_bad_row="skip")
    assert len(found) == 15 and counts["skipped"] == 1


def test_adding_the_same_pairs_again_changes_nothing(store, pair_file):
    before = [a.pair for a in store.ahead("me", 99)]
    assert store.add(asked(pair_file)[0]) == 16
    assert [a.pair for a in store.ahead("me", 99)] == before


def test_sides_are_balanced_differ_between_labellers_and_are_kept():
    pairs = [f"{k:016x}" for k in range(2000)]
    anna, ben = ([swapped(name, p) for p in pairs] for name in ("anna", "ben"))
    assert 900 < sum(anna) < 1100 and 900 < sum(ben) < 1100
    assert 900 < sum(a == b for a, b in zip(anna, ben, strict=True)) < 1100
    assert anna == [swapped("anna", p) for p in pairs]


def test_labellers_get_different_pairs_first_and_a_share_in_common(tmp_path):
    """Two people, 40 labels each of 80 pairs in turn."""
    store = LabelStore(tmp_path / "labels.sqlite")
    store.add(Question(f"{k:016x}", "a hat", (b"a", b"b"), None) for k in range(80))
    asked = {"anna": [], "ben": []}
    for k in range(40):
        for name, seen in asked.items():
            pair = store.ahead(name)[0].pair
            store.label(f"{name}{k}", name, pair, "tie")
            seen.append(pair)
    both = [f"{k:016x}" for k in range(0, 80, SHARED)][:8]  # every fifth question, in data's order
    for seen in asked.values():
        assert seen[SHARED - 1 :: SHARED] == both
    assert set(asked["anna"]) & set(asked["ben"]) == set(both)
    assert asked["anna"] != sorted(asked["anna"]) and store.covered() == 72
    for k in range(40):
        store.label(f"more{k}", "anna", store.ahead("anna")[0].pair, "tie")
    assert store.ahead("anna") == [] and store.done("anna") == 80
    store.close()


# ---------------------------------------------------------------- labels


def test_a_choice_is_recorded_for_the_image_not_for_the_side(store):
    for k in range(16):
        pair = store.ahead("me")[0].pair
        store.label(f"r{k}", "me", pair, side_of(store, "me", 0))
    votes = store.votes()
    assert len(votes) == 16 and all(v == {"me": "first"} for v in votes.values())
    assert store.ahead("me") == [] and store.done("me") == 16
    shown = sqlite3.connect(store.path).execute(
        "SELECT shown_left = image_1, pairs.pair FROM events JOIN pairs USING (pair)"
    )
    assert all(bool(second) == swapped("me", pair) for second, pair in shown)


def test_a_request_counts_once(store):
    pair = store.ahead("me")[0].pair
    for _ in range(3):
        store.label("same", "me", pair, "tie")
    rows = sqlite3.connect(store.path).execute("SELECT count(*) FROM events").fetchone()
    assert rows == (1,)
    with pytest.raises(Conflict):
        store.label("same", "me", pair, "bad")
    with pytest.raises(Conflict):
        store.undo("same", "me")
    assert store.votes() == {pair: {"me": "tie"}}


def test_undo_goes_back_one_pair_at_a_time_and_once_per_request(store):
    first, second = (a.pair for a in store.ahead("me"))
    store.label("a", "me", first, "tie")
    store.label("b", "me", second, "bad")
    store.label("c", "you", first, "bad")
    store.undo("u", "me")
    store.undo("u", "me")
    assert store.votes() == {first: {"me": "tie", "you": "bad"}}
    assert store.ahead("me")[0].pair == second
    store.undo("v", "me")
    store.undo("w", "me")
    assert store.votes() == {first: {"you": "bad"}}
    store.label("d", "me", first, "bad")
    assert store.votes()[first]["me"] == "bad"


def test_an_unknown_pair_is_refused(store):
    with pytest.raises(Conflict, match="no such pair"):
        store.label("r", "me", "0" * 16, "tie")
    assert store.votes() == {}


def test_another_label_of_a_pair_replaces_the_first(store):
    pair = store.ahead("me")[0].pair
    store.label("a", "me", pair, "tie")
    store.label("b", "me", pair, "bad")
    assert store.votes() == {pair: {"me": "bad"}} and store.done("me") == 1


def test_threads_and_connections_do_not_lose_labels(store):
    other = LabelStore(store.path)
    pairs = [a.pair for a in store.ahead("x", 16)]

    def work(name, through):
        for k, pair in enumerate(pairs):
            through.label(f"{name}-{k}", name, pair, "tie")

    both = (store, other)
    threads = [threading.Thread(target=work, args=(f"w{k}", both[k % 2])) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(by) for by in store.votes().values()) == 6 * 16
    other.close()


def test_a_copy_of_the_file_alone_has_every_label(store, tmp_path):
    """SQLite's log beside it is left behind by whoever copies the file while the page is open."""
    for number, question in enumerate(store.pairs()):
        store.label(f"r{number}", "ann", question.pair, "left")
    copied = LabelStore(shutil.copy(store.path, tmp_path / "copy.sqlite"))
    assert copied.total() == copied.done("ann") == store.total() > 0


def test_every_commit_waits_for_the_disk(store):
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("content", ["text", "sqlite"])
def test_a_file_of_other_data_is_refused_and_untouched(tmp_path, content):
    path = tmp_path / "mine.sqlite"
    if content == "text":
        path.write_text("precious " * 100)
    else:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE precious (x)")
        db.close()
    before = path.read_bytes()
    with pytest.raises(WebError, match=r"mine.sqlite.*--labels"):
        LabelStore(path)
    assert path.read_bytes() == before


# ---------------------------------------------------------------- export


def test_exported_pairs_are_read_by_train(store, tmp_path):
    for choice, asked in zip(["first", "second", "tie", "bad"], store.pairs(), strict=False):
        pair = asked.pair
        sides = ("first", "second")[:: -1 if swapped("me", pair) else 1]
        store.label(pair, "me", pair, dict(zip(sides, SIDES, strict=True)).get(choice, choice))
    path = tmp_path / "out" / "labelled.parquet"
    counts = export(store, path)
    with sole_writer(path, "pairs export"):  # again, after more labels
        pass
    assert counts == {"first": 1, "second": 1, "tie": 1, "bad": 1, "unlabelled": 12}
    assert summary(counts) == (
        "3 pairs: 2 preferences, 1 tie, 0 contradicted without a majority (written as ties; "
        "training leaves ties out); left out: 1 both bad, 12 not labelled"
    )
    originals = list(store.pairs())
    source = open_pairs(path)
    first, second = list(source)
    assert (first.winner, first.loser) == originals[0].images
    assert (second.loser, second.winner) == originals[1].images
    assert first.caption == originals[0].caption and first.scene_graph == originals[0].scene_graph
    assert source.counts["ties"] == 1
    assert pq.read_table(path)["votes_tie"].to_pylist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (["first", "first", "second", "tie"], 0.625),  # (2 + 1/2) / 4
        (["second", "bad", "bad"], 0.0),
        (["tie"], 0.5),
        (["bad"], None),
    ],
)
def test_the_share_of_votes_by_hand(choices, expected):
    assert share(choices) == expected


def test_export_takes_the_majority_or_one_labeller(store, tmp_path):
    one, two, *_ = (q.pair for q in store.pairs())
    said = {
        one: {"a": "first", "b": "first", "c": "second"},
        two: {"a": "first", "b": "second"},
    }
    for pair, by in said.items():
        for name, choice in by.items():
            side = ("left", "right")[(choice == "second") != swapped(name, pair)]
            store.label(f"{pair}{name}", name, pair, side)
    assert export(store, tmp_path / "all.parquet")["split"] == 1
    written = pq.read_table(tmp_path / "all.parquet")
    assert written["label_0"].to_pylist() == [1.0, 0.5]
    assert written["preference_0"].to_pylist() == [2 / 3, 0.5]
    (soft,) = open_pairs(tmp_path / "all.parquet")  # the other one is a tie
    assert soft.preference == 2 / 3
    export(store, tmp_path / "b.parquet", "b")
    assert pq.read_table(tmp_path / "b.parquet")["label_0"].to_pylist() == [1.0, 0.0]
    with pytest.raises(WebError, match="no label is of 'nobody'; they are of a, b, c"):
        export(store, tmp_path / "nobody.parquet", "nobody")
    assert not (tmp_path / "nobody.parquet").exists() and not list(tmp_path.glob("*.partial"))


def test_seeds_come_back_with_their_images(pair_file, tmp_path):
    """Of 63 bits, in a file of before there were any, and in the other order of the images."""
    seeds = [(2**53 + 1, 2**63 - 1), (None, 3), (4.0, "5"), (-1, 2**63)]
    rows = [
        row | {"seed_0": str(a), "seed_1": str(b)}
        for row, (a, b) in zip(pq.read_table(pair_file).to_pylist(), seeds, strict=False)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "seeded.parquet")
    store = LabelStore(tmp_path / "labels.sqlite")
    store._db.execute("DROP TABLE seeds")
    store.close()
    store = LabelStore(tmp_path / "labels.sqlite")
    found, _ = asked(tmp_path / "seeded.parquet")
    turned = replace(found[0], images=found[0].images[::-1], seeds=())
    store.add([turned, *asked(pair_file, 4)[0]])  # labelled before seeds were recorded
    store.add(found)
    for k, pair in enumerate(store.pairs()):
        store.label(f"r{k}", "me", pair.pair, "left" if not swapped("me", pair.pair) else "right")
    export(store, tmp_path / "labelled.parquet")
    read = [pair.seeds for pair in open_pairs(tmp_path / "labelled.parquet")]
    assert read == [(2**63 - 1, 2**53 + 1), (3,), (4, 5), ()]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([], "unlabelled"),
        (["bad"], "bad"),
        (["first", "second"], "split"),
        (["first", "tie"], "split"),
        (["first", "bad", "bad"], "bad"),
        (["first", "first", "second", "tie"], "first"),
        (["tie", "tie", "bad", "bad"], "split"),
    ],
)
def test_outcome(choices, expected):
    assert outcome(choices) == expected


def test_agreement_is_krippendorffs_own_example():
    """Krippendorff 2011, example A: two observers, ten units, alpha .095."""
    a, b = "0100000010", "1110010000"
    votes = {
        str(k): {"a": ("first", "second")[int(x)], "b": ("first", "second")[int(y)]}
        for k, (x, y) in enumerate(zip(a, b, strict=True))
    }
    found = agreement(votes | {"alone": {"a": "tie"}})
    assert found.pairs == 10 and found.same == pytest.approx(0.6)
    assert found.alpha == pytest.approx(0.095, abs=5e-4)


def test_agreement_where_it_is_not_defined():
    assert agreement({}).same is None and agreement({"p": {"a": "tie"}}).pairs == 0
    same = agreement({"p": {"a": "tie", "b": "tie"}})
    assert same.same == 1.0 and same.alpha is None


# ---------------------------------------------------------------- edits


OPINIONS = {"preference_0", "votes", "label_1", "has_label", "share_1"}  # which people replace
KEPT = {"source": "source_image", "group": "prompt_id"}  # ours -> as it is written


@pytest.fixture
def whole(tmp_path):
    """Three pairs with everything that a row may have, in Parquet; and their rows."""
    rows = pq.read_table(write_edits(tmp_path / "edits.parquet", 3)).to_pylist()
    for k, row in enumerate(rows):
        buffer = io.BytesIO()
        Image.new("L", (64, 64), 200 + k).save(buffer, "PNG")
        graph = {"items": [{"item_id": 0, "label": f"star {k}"}], "relations": []}
        row |= {"mask": buffer.getvalue(), "scene_graph": json.dumps(graph), "prompt_id": f"p{k}"}
        row |= {"seed_0": 2 * k, "seed_1": 2 * k + 1}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "whole.parquet")
    return tmp_path / "whole.parquet", rows


def kept(path, rows, columns):
    """The columns of a file are those of the rows, found by caption."""
    written = pq.read_table(path).to_pylist()
    for name in (KEPT.get(column, column) for column in columns):
        said = {r["caption"]: r[name] for r in rows}
        assert all(r[name] == said[r["caption"]] for r in written), name
    assert {r["caption"] for r in written} == {r["caption"] for r in rows}


@pytest.mark.parametrize("kind", ["pairs", "thumbs", "ratings"])
def test_every_column_but_opinions_survives_labelling(tmp_path, kind, whole):
    """Also in a file of labels that an older version made."""
    config = DataConfig(pairs=str(whole[0]))
    for table in ("sources", "masks", "prompts"):
        store = LabelStore(tmp_path / "x.sqlite", kind)
        store._db.execute(f"DROP TABLE {table}")
        store.close()
    store = LabelStore(tmp_path / "x.sqlite", kind)
    assert not store.has("sources")
    store.add(questions(config, None, Counter(), alone=kind != "pairs"))
    said = {"pairs": ("left",), "thumbs": ("up", "down"), "ratings": ("5", "2")}[kind]
    seen = Counter()
    for k, asked in enumerate(store.ahead("me", 9)):
        assert store.image(asked.source)
        store.label(f"{k}", "me", asked.pair, said[seen[asked.caption]])
        seen.update([asked.caption])
    export(store, tmp_path / "out.parquet")
    columns = set(OPTIONAL) - OPINIONS - ({"seed_0", "seed_1"} if kind != "pairs" else set())
    kept(tmp_path / "out.parquet", whole[1], columns)
    again = opened(DataConfig(pairs=str(tmp_path / "out.parquet")), alone=kind == "thumbs")
    assert all(pair.mask and pair.source and pair.scene_graph for pair in again) and again.edits


def test_every_column_but_opinions_survives_an_import(tmp_path, whole):
    rows = []
    for k, row in enumerate(whole[1]):
        names = {n: f"{n}-{k}.png" for n in ("jpg_0", "jpg_1", "source_image", "mask")}
        for name, file in names.items():
            (tmp_path / file).write_bytes(row[name])
        rows.append({**row, **names, "choice": "left", "label_0": None})
    (tmp_path / "votes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import_choices(tmp_path / "votes.jsonl", tmp_path / "out.parquet")
    kept(tmp_path / "out.parquet", whole[1], set(OPTIONAL) - OPINIONS)
    with sole_writer(tmp_path / "out.parquet", "pairs import"):  # of choices that were corrected
        pass
    with pytest.raises(ConfigError, match="`pairs export` did not write it"):
        with sole_writer(tmp_path / "out.parquet", "pairs export"):
            pass
    (tmp_path / "mask-1.png").unlink()
    with pytest.raises(DataError, match="row 1, mask: there is no file 'mask-1.png'"):
        import_choices(tmp_path / "votes.jsonl", tmp_path / "out.parquet")


# ---------------------------------------------------------------- single images


SINGLE = {"thumbs": ("up", "down", "unsure"), "ratings": ("5", "2", "unsure")}


@pytest.mark.parametrize("kind", SINGLE)
def test_single_images_are_exported_with_each_ones_opinion(pair_file, tmp_path, kind):
    """Thumbs and ratings of two people come back through the readers of training."""
    store, counts = LabelStore(tmp_path / "x.sqlite", kind), Counter()
    asked = questions(DataConfig(pairs=str(pair_file)), 4, counts, alone=True)
    assert store.add(asked) == counts["pairs"] == 4
    good, bad, unsure = SINGLE[kind]
    names = [q.pair for q in store.pairs()]
    for name, said in {"a": (good, bad, good, unsure), "b": (good, bad, bad)}.items():
        for pair, choice in zip(names, said, strict=False):
            store.label(f"{name}{pair}", name, pair, choice)
    with pytest.raises(Conflict, match=f"{kind} have no choice first"):
        store.label("z", "a", names[0], "left")
    found = export(store, tmp_path / "out.parquet")
    split = {"thumbs": {"up": 1, "down": 1, "split": 1}, "ratings": {"rated": 3}}[kind]
    assert found == {**split, "unsure": 1}
    assert "3 images" in summary(found, kind) and "left out: 1 unsure" in summary(found, kind)
    rows = [(q.images[0], q.caption) for q in store.pairs()]
    if kind == "thumbs":
        source = opened(DataConfig(pairs=str(tmp_path / "out.parquet")), alone=True)
        assert [(p.winner, p.caption, p.preference) for p in source] == [
            (*rows[0], 1.0),
            (*rows[1], 0.0),
        ]
        assert source.counts["ties"] == 1
    else:
        best = pq.read_table(tmp_path / "out.parquet").to_pylist()
        assert [row["scores"] for row in best] == [[5.0, 5.0], [2.0, 2.0], [5.0, 2.0]]
    measured = agreement(store.votes(), kind)
    assert (measured.pairs, measured.same) == (3, pytest.approx(2 / 3)) and measured.alpha
    store.close()
    with pytest.raises(WebError, match=rf"holds {kind}: ask for them \(--kind {kind}\)"):
        LabelStore(tmp_path / "x.sqlite")


def test_what_stands_twice_counts_once_and_rows_beyond_the_limit_are_said(pair_file, tmp_path):
    table = pq.read_table(pair_file)
    pq.write_table(pa.concat_tables([table.slice(0, 1)] * 5 + [table]), tmp_path / "twice.parquet")
    config, counts = DataConfig(pairs=str(tmp_path / "twice.parquet")), Counter()
    assert len({q.pair for q in questions(config, 3, counts)}) == counts["pairs"] == 3
    assert rest_text(counts) == "; the data have more rows than --limit or data.limit takes"
    counts = Counter()
    assert len(list(questions(config, 99, counts))) == len(table) and rest_text(counts) == ""
    assert rest_text(Counter(identical=1)) == "; left out: 1 with identical images"


def test_the_mask_that_the_data_have_now_is_the_one_that_is_exported(pair_file, tmp_path):
    """One that was painted anew; two of one pair are refused, or the second is skipped."""
    table = pq.read_table(pair_file).slice(0, 1).drop_columns("scene_graph")
    store, path = LabelStore(tmp_path / "labels.sqlite"), tmp_path / "pairs.parquet"
    masks = []
    for level in (200, 255, None):
        buffer = io.BytesIO()
        size = Image.open(io.BytesIO(table["jpg_0"][0].as_py())).size
        Image.new("L", size, level).save(buffer, "PNG")
        masks.append(buffer.getvalue() if level else None)
        told = table.append_column("mask", [[masks[-1]]]) if level else table
        told = told.append_column("scene_graph", [[f'{{"level": "{level}"}}']])
        pq.write_table(told, path)
        assert store.add(asked(path)[0]) == 1
        (question,) = store.pairs()
        assert question.mask == masks[-1] and f'"{level}"' in question.scene_graph
    two = pa.concat_tables([table] * 2).append_column("mask", [masks[:2]])
    pq.write_table(two, path)
    with pytest.raises(DataError, match="row 1: the mask is another than in .*row 0"):
        asked(path)
    found, counts = asked(path, on_bad_row="skip")
    assert [q.mask for q in found] == masks[:1] and counts["skipped"] == 1


def test_pairs_of_other_data_in_the_file_of_labels_are_said(pair_file, tmp_path, store):
    pq.write_table(pq.read_table(pair_file).slice(0, 2), tmp_path / "other.parquet")
    config = load_config("taste", [f"data.pairs={tmp_path / 'other.parquet'}"])
    before = store.total()
    total, counts = fill(store, config, 1000)
    assert total == before and counts["pairs"] == 2
    assert rest_text(counts).startswith(
        f"; {before - 2} of them are of other data, or of an earlier"
    )


def test_images_without_any_label_are_asked_about_one_by_one(tmp_path):
    table = {"image": [b"x", b"y"], "prompt": ["a", "b"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    counts = Counter()
    config = DataConfig(pairs=str(tmp_path / "a.parquet"), on_bad_row="skip")
    assert list(questions(config, None, counts, alone=True)) == [] and counts["skipped"] == 2
    with pytest.raises(DataError, match="row 0: no rank, score or thumb; .*web DATA --kind thumbs"):
        list(open_pairs(tmp_path / "a.parquet"))
