"""T2I-CompBench's BLIP-VQA against the authors' formula, one question at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizerFast, BlipForQuestionAnswering

from inversion_dpo.evaluation.named_sets import cut, named_sets
from inversion_dpo.evaluation.prompt_sets import PromptSet
from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.evaluation.scorers.compbench import question
from inversion_dpo.evaluation.scorers.registry import load_scorers
from inversion_dpo.run.config import resolve
from tools.tiny.scorers import write_tiny_scorer

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_scorer("compbench", tmp_path_factory.mktemp("compbench") / "blip")


def test_the_score_is_the_product_of_the_answers(folder):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40 + k, 60, 3), dtype=np.uint8) for k in range(3)]
    phrases = [["a small red star", "the circle."], [], ["a blue cross"] * 9]
    prompts = [f"prompt {k}" for k in range(3)]
    asked = [{"phrases": texts} for texts in phrases]
    whole = PromptSet(prompts, [""] * 3, [None] * 3, rows=asked)
    group = load_scorers("compbench", {"compbench": str(folder)}, prompt_set=lambda: whole)
    assert group.names(prompts) == ["compbench"]
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    words, size = (
        BertTokenizerFast.from_pretrained(folder),
        len(model.get_input_embeddings().weight),
    )

    def yes(image, phrase):
        square = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = (
            torch.tensor((np.asarray(square) / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
        )
        text = words(phrase.lower().replace(".", "") + "?", return_tensors="pt").input_ids
        text[0, 0] = size - 1
        with torch.no_grad():
            seen = model.vision_model(pixel_values=pixels).last_hidden_state
            read = model.text_encoder(input_ids=text, encoder_hidden_states=seen)[0]
            start = torch.tensor([[size - 2]])
            logits = model.text_decoder(input_ids=start, encoder_hidden_states=read).logits
        p = logits[0, 0].softmax(-1)
        y, n = (p[k].item() for k in words.convert_tokens_to_ids(["yes", "no"]))
        return y / (y + n)

    expected = [np.prod([yes(i, t) for t in ts[:8]]) for i, ts in zip(images, phrases, strict=True)]
    np.testing.assert_allclose(group(images, prompts)["compbench"], expected, rtol=1e-4)
    assert expected[1] == 1 and len(set(expected)) == 3


def test_a_question_is_worded_as_the_authors_do():
    assert question('The "Big" dog (2).') == "the big dog 2?"
    assert question("word " * 60) == " ".join(["word"] * 50)


def test_the_sets_own_phrases_lie_beside_it():
    s = named_sets()["t2i-compbench"]
    places = json.loads(Path(resolve(s.phrases)).read_text())
    assert list(places) == list(s.files.values())
    assert sum(map(len, places.values())) == s.prompts
    assert all(1 <= len(one.split()) <= 8 for part in places.values() for one in part)
    first = "a green bench and a blue bowl"  # of color_val.txt
    assert cut(first, places["color"][0]) == ["a green bench", "a blue bowl"]


def test_a_prompt_without_phrases_is_named(folder):
    whole = PromptSet(["a dog"], [""], [None], rows=[{"prompt": "a dog"}])
    group = load_scorers("compbench", {"compbench": str(folder)}, prompt_set=lambda: whole)
    with pytest.raises(ScorerError, match="'a dog' has no noun phrases.*prompts=t2i-compbench"):
        group.names(["a dog"])
