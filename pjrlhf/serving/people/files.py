"""Comparisons in files of JSON lines, as the commands of people and the questions of a server have them."""

import dataclasses
import re
from collections.abc import Iterator

from pjrlhf.data.records import RecordError
from pjrlhf.data.schema import Example, parse
from pjrlhf.data.sources import JsonLines
from pjrlhf.errors import UserError


def read_comparisons(path: str) -> Iterator[Example]:
    """The comparisons of a file, with their places; columns that a comparison does not have are left out.

    Raises:
      UserError: no such file, or a line that is no comparison.
    """
    try:
        source = JsonLines(path)
    except UserError as error:  # there is no config here
        raise UserError(re.sub(r"; [^;]*--config\..*", "; name a file of JSON lines", str(error))) from error
    for i in range(len(source)):
        where = f"{path} line {source.where(i).rpartition(' ')[2]}"
        try:
            record = source[i]
            if "messages" in record and "prompt" not in record:
                record["prompt"] = record.pop("messages")
            example = parse(record, "preference", where=where)
        except RecordError as error:
            reason = re.sub(r"; [^;]*--config\.[^)]*", "", str(error))
            raise UserError(f"{where}: {reason}; correct it") from error
        yield dataclasses.replace(example, where=where)
