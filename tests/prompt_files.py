"""Small files in the form and the place of the papers' prompt sets."""

import pyarrow as pa
import pyarrow.parquet as pq

from inversion_dpo.evaluation.named_sets import named_sets


def write_set(name, root, prompts):
    """Write every file of a set of the hub below ``root``, each with these prompts."""
    s = named_sets()[name]
    for path in s.files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            pq.write_table(pa.table({s.column: prompts}), root / path)
        elif path.endswith(".tsv"):
            rows = ["Prompt\tCategory", *(f"{p}\tAbstract" for p in prompts)]
            (root / path).write_text("\n".join(rows) + "\n")
        else:
            (root / path).write_text("[" + ", ".join(f'"{p}"' for p in prompts) + "]")


def place_set(hub_cache, folder, name, prompts):
    """Put a set into a hub's cache, see ``conftest.hub_cache``."""
    s = named_sets()[name]
    write_set(name, folder / name, prompts)
    commit = s.revision if len(s.revision) == 40 else "a" * 40
    hub_cache("datasets", s.repository, folder / name, s.revision, commit)
