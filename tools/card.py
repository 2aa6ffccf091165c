"""Write those files of the model card that are made of others.

    python tools/card.py guidance           guidance.md, of cfg.jsonl and slg.jsonl
    python tools/card.py training RUN       training.jsonl, of the log of the transformer's run (runs/tiny/mmdit)
"""

import json
import sys
from bisect import bisect_left
from pathlib import Path

from minisd3 import scores
from minisd3.config import require
from minisd3.family import SHIPPED, STEPS

GUIDANCE = """\
# What guidance does for tiny

Each line is a way to guide, and what came of the same captions of held-out scenes, drawn with the same seeds. *Gained* and *lost* are captions that are
all right with it and were not with the first line's, or the other way round. Of so few captions a share is known to a few points only: {share:.1%} of {of} is,
with 95% confidence, between {low:.0%} and {high:.0%}. Notebook 05 draws these tables and says what they mean.

## CFG scales, and CFG at some times only

`python -m minisd3 evaluate --captions 128 --cfg-table cfg.jsonl`

{cfg}

## Skipped layers, beside CFG 4

`python -m minisd3 evaluate --captions 40 --slg-table slg.jsonl`

{beside}

## Skipped layers, without CFG

`python -m minisd3 evaluate --captions 40 --cfg 1 --slg-table slg.jsonl`

{without}
"""


def guidance() -> str:
    """The page of the tables."""
    _, cfg = scores.read_table(SHIPPED / "cfg.jsonl")
    _, slg = scores.read_table(SHIPPED / "slg.jsonl")
    beside, without = ({one: row for one, row in slg.items() if one.cfg == scale} for scale in (4.0, 1.0))
    right = scores.tally(next(iter(cfg.values())).judged).right
    low, high = right.interval
    tables = {name: scores.table_markdown(rows) for name, rows in (("cfg", cfg), ("beside", beside), ("without", without))}
    return GUIDANCE.format(share=right.share, of=right.of, low=low, high=high, **tables)


def training(log: Path) -> str:
    """The log thinned: mean and highest loss of ten steps a line, and which round of STEPS they belong to. Raises ValueError if it is not whole."""
    lines, ends = [json.loads(line) for line in log.read_text().splitlines()], STEPS["mmdit"]
    require(len(lines) == ends[-1], f"{log} has {len(lines)} steps and the recipe {ends[-1]}; `python -m minisd3 train mmdit` goes on")
    thinned = []
    for i in range(0, len(lines), 10):
        last, losses = lines[i + 9], [line["loss"] for line in lines[i : i + 10]]
        thinned.append({
            "round": bisect_left(ends, last["step"]) + 1, "step": last["step"], "loss": round(sum(losses) / 10, 4),
            "highest": round(max(losses), 3), "seconds": round(last["seconds"]),
        })  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in thinned)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["guidance"]:
            (SHIPPED / "guidance.md").write_text(guidance())
        case ["training", run]:
            (SHIPPED / "training.jsonl").write_text(training(Path(run) / "log.jsonl"))
        case _:
            sys.exit(__doc__)
