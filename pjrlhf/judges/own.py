"""Judges of other people's code, whose mistakes are errors that name them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from pjrlhf.data.messages import Prompt
from pjrlhf.data.records import as_json
from pjrlhf.errors import UserError, described
from pjrlhf.rewards.calls import awaited


class OwnJudge:
    """A judge from outside this package, also an asynchronous one; it has the optional attributes and methods of the
    judge that it asks.

    Args:
      name: "package.module:name" of its maker.
      judge: what the maker made.

    Raises:
      UserError: it cannot be called as a `Judge`.
    """

    def __init__(self, name: str, judge: Callable[..., Any]):
        self.name, self.judge = name, judge
        self.order_invariant = bool(getattr(judge, "order_invariant", False))
        self.consistent_only = bool(getattr(judge, "consistent_only", False))
        self.on_all_processes = bool(getattr(judge, "on_all_processes", False))
        try:
            inspect.signature(judge).bind([], [], [], "")
        except TypeError as error:
            raise UserError(
                f"judge {name!r}: made a judge that cannot be called with prompts, first, second and criterion "
                f"({error}); give it these four parameters"
            ) from error
        except ValueError:  # Python does not know its parameters
            pass

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], criterion: str) -> Any:
        """What the judge returns.

        Raises:
          UserError: it raises.
        """
        given = list(prompts), list(first), list(second)  # its own, which it may change
        return self._try(lambda: awaited(self.judge(*given, criterion)), f"for the criterion {criterion!r}")

    def again(self) -> "OwnJudge | None":
        """The judge that is asked anew; None where there is none."""
        again = getattr(self.judge, "again", None)
        found = self._try(again, "in again") if again else None
        return None if found is None else OwnJudge(self.name, found)

    def report(self) -> dict[str, Any]:
        """What the judge says of itself, as JSON values."""
        report = getattr(self.judge, "report", None)
        return as_json(self._try(lambda: dict(report()), "in report")) if report else {}

    def _try(self, ask: Callable[[], Any], where: str) -> Any:
        try:
            return ask()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            reason = described(error)
            raise UserError(f"judge {self.name!r}: raised {reason} {where}; correct the judge") from error
