"""Other layouts of scene graphs, turned into LAION-SG's.

Visual Genome (Krishna et al., 2017, https://arxiv.org/abs/1602.07332): scene_graphs.json and
relationships.json. PSG (Yang et al., 2022, https://arxiv.org/abs/2207.11247): psg.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def is_visual_genome(row: Any) -> bool:
    """Tell whether an object has Visual Genome's fields."""
    return isinstance(row, Mapping) and "relationships" in row and "items" not in row


def from_visual_genome(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn one image of scene_graphs.json or relationships.json into LAION-SG's layout.

    Raises:
        ValueError: a field is missing or of another type.
    """
    try:
        objects = {o["object_id"]: o for o in row.get("objects", [])}
        relations = []
        for r in row["relationships"]:
            ends = []
            for side in ("subject", "object"):
                end = r.get(side) or {"object_id": r[f"{side}_id"]}
                ends.append(end["object_id"])
                objects.setdefault(end["object_id"], end)
            relations.append({"item1": ends[0], "relation": r["predicate"], "item2": ends[1]})
        items = [
            {
                "item_id": number,
                "label": (o.get("names") or [o.get("name", "")])[0],
                "attributes": o.get("attributes") or [],
            }
            for number, o in objects.items()
        ]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"Visual Genome's layout is broken ({error!r})"[:200]) from error
    return {"img_id": row.get("image_id", ""), "items": items, "relations": relations}


def is_psg(data: Any) -> bool:
    """Tell whether a file's content is PSG's: its images, and the names of all classes."""
    return isinstance(data, Mapping) and "predicate_classes" in data and "data" in data


def from_psg(data: Mapping[str, Any]) -> Iterator[dict[str, Any] | ValueError]:
    """Turn each image of psg.json into LAION-SG's layout, or give what is wrong with it."""
    names = [*data.get("thing_classes", []), *data.get("stuff_classes", [])]
    for row in data["data"]:
        try:
            segments = row.get("segments_info") or row["annotations"]
            yield {
                "name": row.get("file_name", ""),
                "img_id": row.get("image_id", ""),
                "items": [
                    {"item_id": k, "label": names[segment["category_id"]]}
                    for k, segment in enumerate(segments)
                ],
                "relations": [
                    {"item1": a, "relation": data["predicate_classes"][p], "item2": b}
                    for a, b, p in row["relations"]
                ],
            }
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            yield ValueError(f"PSG's layout is broken ({error!r})"[:200])
