"""Read the prompt sets that papers use, by name; ``assets/prompt-sets.yaml`` lists them."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from inversion_dpo.run.config import ConfigError, resolve
from inversion_dpo.run.disk import atomic_bytes, sha256_of

logger = logging.getLogger(__name__)
GITHUB = "github:"
SECONDS = 30.0  # without a byte from GitHub


@dataclass(frozen=True)
class NamedSet:
    """One row of the list.

    prompts: how many there are. repository: a dataset of the hub, or github:OWNER/NAME.
    files: path -> category of its prompts. sha256: of GitHub's files, by path. column, category:
    names in the rows. once: whether a prompt that occurs again is left out. phrases: a JSON file of
    the noun phrases' places in each prompt, by category.
    """

    name: str
    prompts: int
    licence: str
    source: str
    repository: str
    revision: str
    files: dict[str, str]
    sha256: dict[str, str] = field(default_factory=dict)
    column: str = "prompt"
    category: str = "category"
    once: bool = False
    phrases: str | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield prompt and category of each row, and the row's own columns beside them.

        A number of prompts other than the stated one is warned of. ConfigError if a file cannot be
        had or read.
        """
        count, seen = 0, set[str]()
        places = json.loads(Path(resolve(self.phrases)).read_text()) if self.phrases else {}
        for path, category in self.files.items():
            file = self.file(path)
            try:
                rows = list(table(file, self.column))
            except (OSError, ValueError, csv.Error) as error:
                raise ConfigError(self.complaint(f"{file} cannot be read ({error})")) from error
            spans = iter(places.get(category, ()))
            for row in rows:
                prompt = str(row.get(self.column) or "").strip()
                if not prompt or (self.once and prompt in seen):
                    continue
                seen.add(prompt)
                count += 1
                given = category or str(row.get(self.category) or "")
                more = {"phrases": cut(prompt, next(spans, ""))} if places else {}
                yield row | {"prompt": prompt, "category": given} | more
        if count != self.prompts:
            logger.warning(
                "evaluation.prompts=%s: %s@%s has %d prompts, not %d as published: results do not "
                "compare with the papers'",
                *(self.name, self.repository, self.revision, count, self.prompts),
            )

    def file(self, path: str) -> Path:
        """Return a file of the set, downloaded once into HF_HOME; ConfigError if it fails."""
        from huggingface_hub import constants, hf_hub_download

        if not self.repository.startswith(GITHUB):
            try:
                return Path(
                    hf_hub_download(
                        self.repository, path, repo_type="dataset", revision=self.revision
                    )
                )
            except Exception as error:  # the hub's own errors and those of the network below
                raise ConfigError(self.complaint(self._refused(path, error))) from error
        owned = self.repository.removeprefix(GITHUB)
        file = Path(constants.HF_HOME) / "inversion-dpo" / owned / self.revision / path
        if not file.is_file():
            try:
                content = download(f"{owned}/{self.revision}/{path}")
            except (OSError, ValueError) as error:
                raise ConfigError(self.complaint(self._refused(path, error))) from error
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_bytes(content, file, shared=True)
        if (wanted := self.sha256.get(path)) and sha256_of(file) != wanted:
            raise ConfigError(self.complaint(f"{file} is not the published file: delete it"))
        return file

    def _refused(self, path: str, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200]
        return f"{path} of {self.repository}@{self.revision} cannot be had ({reason})"

    def complaint(self, reason: str) -> str:
        """Write one line with the set's name, the fault and the remedy."""
        return (
            f"{self.name}: {reason}. Check the network, or run `inversion-dpo "
            f"prompts {self.name}` where there is one and copy HF_HOME; a gated set needs its "
            "terms accepted on its page and HF_TOKEN; a file of your own does as well"
        )


def cut(text: str, places: str) -> list[str]:
    """Cut the parts FIRST-END out of a text, as in "0-9 14-25"."""
    return [text[slice(*map(int, place.split("-")))] for place in places.split()]


@cache
def named_sets() -> dict[str, NamedSet]:
    """Return the list by name."""
    rows = yaml.safe_load(Path(resolve("asset:prompt-sets.yaml")).read_text(encoding="utf-8"))
    return {name: NamedSet(name, **row) for name, row in rows.items()}


def table(file: Path, column: str) -> Iterator[dict[str, Any]]:
    """Read rows: .parquet, .csv, .tsv, .jsonl, .json (objects or texts), or text, a prompt a line.

    column: names a text that has no name of its own.
    """
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        columns = [n for n in pq.read_schema(file).names if n in (column, "category", "tag")]
        yield from pq.read_table(file, columns=columns).to_pylist()
        return
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix in (".csv", ".tsv"):
        lines, mark = text.splitlines(keepends=True), "\t" if file.suffix == ".tsv" else ","
        yield from csv.DictReader(lines, delimiter=mark)
        return
    if file.suffix == ".json":
        rows: list[Any] = json.loads(text)
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else lines
    yield from (row if isinstance(row, dict) else {column: row} for row in rows)


def download(path: str) -> bytes:
    """Read OWNER/NAME/COMMIT/FILE from GitHub; OSError if that fails, or if the hub is offline."""
    from urllib.request import urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE=1")
    with urlopen(f"https://raw.githubusercontent.com/{path}", timeout=SECONDS) as answer:
        return bytes(answer.read())


def lines(name: str | None = None) -> list[str]:
    """State every set's number, licence, source and place; of a named one also what was read.

    ConfigError for an unknown name, or for a set that cannot be read.
    """
    sets = named_sets()
    if name is not None and name not in sets:
        raise ConfigError(f"no prompt set {name!r}: one of {', '.join(sets)}")
    out = []
    for s in sets.values() if name is None else [sets[name]]:
        out += [f"{s.name}: {s.prompts} prompts, licence: {s.licence}"]
        out += [f"  {s.source}", f"  {s.repository}@{s.revision}"]
    if name is not None:
        read = [row["category"] for row in sets[name].rows()]
        groups = ", ".join(f"{c} {read.count(c)}" for c in dict.fromkeys(read) if c)
        out.append(f"  read: {len(read)} prompts" + (f" ({groups})" if groups else ""))
    return out
