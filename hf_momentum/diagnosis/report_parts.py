"""What the reports of diagnosis and repair share: their records, their last sections, and figures in words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_momentum.errors import InputError
from hf_momentum.evaluation.document import Block, Bullets, Code, Heading, literal
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.evaluation.writing import significant


@dataclass(frozen=True)
class Kind:
    """A kind of report: what its record is called, and the command that writes it.

    Example:
        >>> Kind("hf-momentum diagnosis", "hf-momentum diagnose").command
        'hf-momentum diagnose'
    """

    name: str
    command: str


def to_record(kind: Kind, report: Any, found: Mapping[str, Any]) -> str:
    """A report as JSON: its fields, and under "found" what follows from them.

    Example:
        >>> print(to_record(Kind("k", "c"), Kind("a", "b"), {"verdict": "good"}).replace("\\n", ""))
        {  "kind": "k",  "found": {    "verdict": "good"  },  "name": "a",  "command": "b"}
    """
    return json.dumps({"kind": kind.name, "found": found, **asdict(report)}, indent=2, ensure_ascii=False) + "\n"


def from_record(kind: Kind, text: str, name: str) -> dict[str, Any]:
    """The fields of a report that `to_record` wrote, as JSON has them.

    Raises:
        InputError: the text is not JSON, or another kind of report.

    Example:
        >>> from_record(Kind("k", "hf-momentum repair"), "{}", "x.json")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: x.json is no report of `hf-momentum repair`; name a report.json that it wrote
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("kind", None) != kind.name:
        raise InputError(f"{name} is no report of `{kind.command}`; name a report.json that it wrote")
    content.pop("found", None)
    return content


def another_version(kind: Kind, name: str, error: Exception) -> InputError:
    """The error of a record whose fields are not those of this version.

    Example:
        >>> print(another_version(Kind("k", "hf-momentum repair"), "x.json", KeyError("share")))
        x.json is a report of another version ('share'); run `hf-momentum repair` again
    """
    return InputError(f"{name} is a report of another version ({error}); run `{kind.command}` again")


def closing(facts: Mapping[str, str], notes: Sequence[str], command: str) -> list[Block]:
    """The last sections of a report.

    Example:
        >>> [type(block).__name__ for block in closing({"seed": "0"}, [], "hf-momentum diagnose")]
        ['Heading', 'Bullets', 'Heading', 'Code']
    """
    said = [f"**{literal(name)}**: {literal(text)}" for name, text in facts.items()]
    blocks: list[Block] = []
    if said or notes:
        blocks += [Heading("What ran"), Bullets([*said, *map(literal, notes)])]
    return [*blocks, Heading("Run it again"), Code(command, "bash")] if command else blocks


def shown(one: Estimate) -> str:
    """A figure of any size with its interval.

    Example:
        >>> shown(Estimate(0.00123, 0.0011, 0.00134))
        '0.00123 [0.00110, 0.00134]'
    """
    return f"{significant(one.value)} [{significant(one.low)}, {significant(one.high)}]"


def percent(share: float) -> str:
    """A share in words.

    Example:
        >>> percent(0.1834), percent(0.0004), percent(1.2), percent(0.0)
        ('18.3 %', '0.04 %', '120 %', '0 %')
    """
    hundredths = 100 * share
    if 1 <= abs(hundredths) < 99.95:
        return f"{hundredths:.1f} %"
    return f"{hundredths:.2g} %" if abs(hundredths) < 1 else f"{hundredths:.0f} %"


def count(number: int, unit: str) -> str:
    """So many of a thing.

    Example:
        >>> count(1, "example"), count(1200, "token")
        ('1 example', '1,200 tokens')
    """
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def estimate_of(content: Mapping[str, float]) -> Estimate:
    """A figure as JSON has it.

    Example:
        >>> estimate_of({"value": 1.0, "low": 0.5, "high": 2.0}).high
        2.0
    """
    return Estimate(**content)
