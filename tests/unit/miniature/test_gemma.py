"""The miniature's Gemma: its tokens, its files, and what its random features tell."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ltx_ray.miniature import export, gemma, world
from ltx_ray.presets import DEFAULT_NEGATIVE_PROMPT
from scripts.miniature_training.prompts import FrozenGemma, TrainingPrompts, other_phrasing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gemma")
    gemma.write_gemma(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_a_word_is_one_token_with_one_vector_wherever_it_stands(folder, tokenizer):
    vectors = load_file(folder / "model.safetensors")["language_model.model.embed_tokens.weight"].float()
    of_words = []
    for word in world.words():
        forms = [tokenizer(form).input_ids[1:] for form in (word, word.capitalize(), f"{word}.")]
        forms += [tokenizer(f", {form}").input_ids[2:] for form in (word, word.capitalize())]
        ids = [form[0] for form in forms]
        assert [len(form) for form in forms] == [1, 1, 2, 1, 1], word
        assert (vectors[ids] == vectors[ids[0]]).all(), word
        of_words.append(vectors[ids[0]])
    distances = torch.cdist(torch.stack(of_words), torch.stack(of_words))
    assert (distances + 9 * torch.eye(len(of_words))).min() > 0.5  # of vectors of length 1


def test_any_text_has_tokens(tokenizer):
    for text in ("A red circle, a blue ground!", "éß 漢字 🙂\n<x>", "zebra"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer(DEFAULT_NEGATIVE_PROMPT).input_ids) < len(DEFAULT_NEGATIVE_PROMPT) / 2
    assert max(len(tokenizer(prompt).input_ids) for prompt in world.prompts(world.scenes("train")[0])) < 30


def test_the_files_depend_on_the_seed_alone(folder, tmp_path):
    gemma.write_gemma(tmp_path / "again")
    gemma.write_gemma(tmp_path / "other", seed=1)
    files = sorted(path.name for path in folder.iterdir())
    assert "config.json" in files and "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 0.3e6


def test_the_shipped_files_are_those_that_are_written(folder):
    """A DiT is of no use with another tokenizer."""
    shipped = export.WEIGHTS / "gemma"
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_features_tell_the_objects_colour_from_the_grounds(folder):
    """By a linear map of the features of a colour and of the word after it, fitted to other scenes."""
    frozen, rng = FrozenGemma(folder, torch.float32, "cpu"), random.Random(0)
    features, is_object = [], []
    for _ in range(600):
        scene = rng.choice(world.scenes("train"))
        prompt = rng.choice(world.prompts(scene, "train"))
        words = frozen.tokenizer.convert_ids_to_tokens(frozen.tokenizer(prompt).input_ids)
        features.append((prompt, [word.removeprefix("▁") for word in words], scene))
    states = frozen.hidden_states([prompt for prompt, _, _ in features])
    rows = []
    for number, (_, words, scene) in enumerate(features):
        padded = torch.nn.functional.pad(states.values[number], (0, 0, 0, 1))
        for colour in (scene.colour, scene.ground):
            at = words.index(colour)
            rows.append(torch.cat((padded[at], padded[at + 1], torch.ones(1))))
            is_object.append(1.0 if colour == scene.colour else -1.0)
    x, y = torch.stack(rows).double(), torch.tensor(is_object).double()
    fitted, other = slice(0, 900), slice(900, None)
    weights = torch.linalg.solve(x[fitted].T @ x[fitted] + 0.1 * torch.eye(x.shape[1]), x[fitted].T @ y[fitted])
    assert ((x[other] @ weights).sign() == y[other]).double().mean() > 0.97


def test_tokens_of_words_are_those_of_the_prompt(folder, tokenizer):
    frozen, rng = FrozenGemma(folder, torch.float32, "cpu"), random.Random(0)
    scenes = rng.sample(world.scenes("train"), 20)
    prompts = [rng.choice(world.prompts(scene, split)) for scene in scenes for split in world.SPLITS]
    for prompt in (*prompts, *(other_phrasing(rng, scene) for scene in scenes), DEFAULT_NEGATIVE_PROMPT, "", " a  b "):
        assert frozen.ids(prompt) == tokenizer(prompt.strip()).input_ids


def test_hidden_states_do_not_depend_on_the_prompts_beside(folder):
    frozen = FrozenGemma(folder, torch.float32, "cpu")
    together = frozen.hidden_states(["a red circle", DEFAULT_NEGATIVE_PROMPT, ""])
    alone = frozen.hidden_states(["a red circle"])
    assert together.lengths[0] == alone.lengths[0] == alone.values.shape[1] == 4
    assert torch.allclose(together.values[0, :4], alone.values[0], atol=1e-4)
    assert (together.values[0, 4:] == 0).all() and together.lengths[2] == 1


def test_prompts_of_a_scene_and_negative_ones_are_told_apart(folder):
    frozen, scenes = FrozenGemma(folder, torch.float32, "cpu"), world.scenes("train")[:3]
    prompts = TrainingPrompts(frozen, scenes, 2, 0)
    drawn = prompts.draw(torch.tensor([2, 2, 0]), torch.Generator().manual_seed(0))
    assert (drawn // prompts.each).tolist() == [2, 2, 0]
    canonical, negative = torch.tensor(2 * prompts.each), torch.tensor(prompts.negative(1))
    hidden, mask = prompts.states(torch.stack((canonical, negative)))
    for number, text in enumerate((world.canonical_prompt(scenes[2]), DEFAULT_NEGATIVE_PROMPT)):
        wanted = frozen.hidden_states([text])
        length = int(wanted.lengths[0])
        assert mask[number].sum() == length and mask[number, :length].all()
        assert torch.allclose(hidden[number, :length], wanted.values[0], atol=1e-4)


def test_other_phrasings_are_not_those_of_the_world():
    rng = random.Random(0)
    for scene in (world.scenes("train")[7], world.scenes("train")[-9]):
        known = {*world.prompts(scene, "train"), *world.prompts(scene, "held_out")}
        written = {other_phrasing(rng, scene) for _ in range(200)}
        assert len(written) > 150 and len(written & known) < 10
        assert not written & set(world.prompts(scene, "held_out"))
        for prompt in written:
            assert {scene.colour, scene.shape, scene.ground} <= set(prompt.replace(",", "").replace(".", "").split())
