"""The configs of papers: each is read, and runs from end to end on tiny stand-ins."""

import pytest
from support import tiny, tiny_papers
from support.chat_server import ChatServer

from pjrlhf import papers
from pjrlhf.pipeline import stages

ALL = [pytest.param(*one, id=":".join(filter(None, one))) for one in tiny_papers.variants()]


@pytest.mark.parametrize(("paper", "variant"), ALL)
def test_every_config_is_read_without_a_network(paper, variant, tmp_path):
    """As it stands, but for data that no hub serves, whose folder is to be given."""
    config = tiny_papers.config_of_paper(paper, variant)
    for spec in (
        config.data.prompts,
        *(config[name].data for name in ("sft", "reward", "preference") if name in config),
    ):
        if not isinstance(spec, str) and not spec.path:
            spec.path = str(tmp_path)
    plan = stages.read(config)
    assert plan.settings.model.path in papers.BASES and plan.settings.title
    # Words about preferences or rewards may make a prompt too long, which must not stop a run.
    assert plan.settings.data.long_prompt == "truncate_left"


@pytest.mark.slow
@pytest.mark.parametrize(("paper", "variant"), ALL)
def test_every_config_runs_from_end_to_end(paper, variant, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    server = ChatServer(tiny_papers.longer)
    with server.running() as url:
        config = tiny_papers.tiny_config(paper, variant, tmp_path, url)
        folder = tiny.run(tmp_path / "run", config)
    found = tiny_papers.summary(folder)
    assert found
