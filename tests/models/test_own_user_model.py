"""The user model that docs/user_models.md adds in one file."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.models.user_models.base import Comparisons
from pjrlhf.models.user_models.kinds import user_model

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "user_models.md"


def test_the_toy_of_the_page_is_a_user_model(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = (block for block in blocks if "class Nearest" in block)
    (tmp_path / "my_models.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = user_model({"kind": "my_models:Nearest", "start": 2.0}, "models.x")
    monkeypatch.delitem(sys.modules, "my_models")
    params = model.init(jax.random.key(0), 3, 0)
    context = Comparisons(jnp.eye(3)[:2], jnp.zeros((2, 3)), jnp.array([1.0, 0.0]))
    found = model.rewards(params, model.meet(params, context), jnp.eye(3))
    np.testing.assert_allclose(found, [2.0, 0.0, 0.0])
