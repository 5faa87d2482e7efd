import pytest
from support.tiny_llamas import SMALL, random_params

from pjrlhf.models.huggingface import save_params


@pytest.fixture
def small(tmp_path):
    """A folder with a small untied model, which tests may damage."""
    config = SMALL.replace(tie_embeddings=False)
    save_params(tmp_path / "small", config, random_params(config))
    return tmp_path / "small"
