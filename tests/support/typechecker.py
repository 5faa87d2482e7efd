"""The run-time type checker of the tests: beartype, with integers where floats are expected (PEP 484)."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
