"""What every report says of its run."""

from support import tiny

from pjrlhf.data.synthetic import PREFERENCES
from pjrlhf.protocols.reporting import stated


def test_objectives_are_described_by_their_sentences(tmp_path):
    run = tiny.start(tmp_path, tiny.settings())
    assert stated(run) == {name: PREFERENCES[name].sentence for name in run.audience.objectives}
    assert all(stated(run).values())
