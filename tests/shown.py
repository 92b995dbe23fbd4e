"""The commands that README and docs show."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from shardq.verbs import COMMANDS

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in FILES}
STARTERS = r"(?:torchrun|shardq-ranks|python launch/ranks\.py)(?: --?[\w-]+(?: (?!launch/|shardq)[\w./:$-]+)?)*"
OURS = re.compile(rf"(?:{STARTERS} |python )?(?:launch/(\w+)\.py|shardq (\w+))(?: (.*))?")


def shown_lines(text: str) -> Iterator[str]:
    """The commands in the shell blocks of a page, without their comments; a backslash joins lines."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words[-1] if words[:3] == ["srun", "bash", "-c"] else shlex.join(words)


def ours(line: str) -> tuple[str, int, list[str]] | None:
    """A command of shardq in a line: its verb, number of ranks and arguments; None where it is another program's."""
    found = OURS.fullmatch(line)
    verb = found and (found.group(1) or found.group(2))
    if not verb or verb not in COMMANDS:
        return None
    ranks = re.search(r"--nproc-per-node (\d+)", line)
    return verb, int(ranks.group(1)) if ranks else 1, shlex.split(found.group(3) or "")


LINES = [(page, line) for page, text in PAGES.items() for line in shown_lines(text)]
