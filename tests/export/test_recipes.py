"""Recipes for mergekit, run by mergekit where it is installed."""

import shutil
import subprocess

import numpy as np
import pytest
import yaml
from support.exporting import ANSWER, MIX, NAMES, QUESTION, export, mix_flag, ours, write_models

from pjrlhf.language_model import load_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("recipes"))


@pytest.mark.slow
def test_recipes_name_the_full_models_of_the_ingredients(models, tmp_path):
    folder = export(models, tmp_path / "a@b+c", "mergekit", mix_flag(MIX))
    for name in NAMES:
        score = load_model(folder / name).score([QUESTION], [ANSWER])
        np.testing.assert_allclose(score, ours(models, {name: 1.0}), atol=1e-4)
    for method in ("task_arithmetic", "linear"):
        recipe = yaml.safe_load((folder / f"{method}.yaml").read_text())
        weights = {one["model"]["model"]["path"]: one["parameters"]["weight"] for one in recipe["models"]}
        want = {str(folder / name): weight for name, weight in MIX.items()}
        rest = {str(models[0]): 1 - sum(MIX.values())} if method == "linear" else {}
        assert weights == pytest.approx(want | rest)
        assert recipe["merge_method"] == method and recipe["parameters"] == {"normalize": False}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_mergekit_makes_the_soup(models, tmp_path, method):
    command = shutil.which("mergekit-yaml")
    if not command:
        pytest.skip("mergekit is not installed (pip install mergekit)")
    folder = export(models, tmp_path / "out", "mergekit", mix_flag(MIX))
    quiet = ("--quiet", "--no-write-model-card")
    subprocess.run([command, str(folder / f"{method}.yaml"), str(tmp_path / "theirs"), *quiet], check=True)
    np.testing.assert_allclose(
        load_model(tmp_path / "theirs").score([QUESTION], [ANSWER]), ours(models, MIX), atol=1e-4
    )
