"""The configs of papers: each is read, and runs from end to end on tiny stand-ins."""

import jax
import pytest
from support import tiny, tiny_papers
from support.chat_server import ChatServer

from pjrlhf import papers
from pjrlhf.aot import dry_run
from pjrlhf.aot import plan as aot
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


@pytest.mark.slow
@pytest.mark.parametrize(("paper", "variant"), ALL)
def test_every_config_can_be_planned_at_its_own_size(paper, variant, tmp_path, monkeypatch):
    """On four devices that are here, in place of a TPU's: the same code up to the compiler, which takes minutes."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(dry_run, "devices_of", lambda topology: ("v5e", jax.devices()[:4]))
    monkeypatch.setattr(dry_run, "_compile", lambda lowered, limit: dry_run._Measured(0, {}))
    config = tiny_papers.planned_config(paper, variant, tmp_path)
    steps = aot.plan(config, "v5e:2x2")
    assert steps and all(step.cost.flops > 0 for step in steps)
