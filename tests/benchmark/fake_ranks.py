"""Stands in for ``launch/pretrain.py`` on several ranks: its files and exit codes, no model.

A step of R ranks trains 100 R tokens in 0.1 (1 + R) seconds, the first interval's take ten times as
long. The learning rate makes it fail: above 10 rank 0 refuses its input, above 1 the last rank
crashes and the others wait, above 0.1 all ranks wait for a stop request.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
argv = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
train = json.loads(Path(argv["--config"]).read_text())["train"]
output = Path(argv["--output_dir"])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
assert os.environ["LOCAL_RANK"] == str(rank) and int(os.environ["MASTER_PORT"]) > 0
stage = json.loads(Path(argv["--deepspeed"]).read_text())["zero_optimization"]["stage"]
(output / f"rank_{rank}").touch()
while not all((output / f"rank_{r}").exists() for r in range(size)):
    time.sleep(0.01)  # a job begins when all of its ranks are there
if rank == 0:
    with open(os.environ["FAKE_STARTS"], "a") as starts:
        starts.write(f"{stage} {size}\n")

rate = train["learning_rate"]
if rate > 10:
    if rank == 0:
        time.sleep(0.3)  # the others exit first, and say nothing
        print("error: data of another kind", file=sys.stderr)
    sys.exit(2)
if rate > 1 and rank == size - 1:
    sys.exit("boom")
while rate > 0.1:
    time.sleep(0.01)
    if stopped and rate <= 1:
        sys.exit(75)

time_s = 0.0
if rank == 0:
    lines = [{"step": 0, "time_s": 0.0, "eval/mlm_loss": 9.0}]
    for step in range(1, train["max_steps"] + 1):
        time_s += 0.1 * (1 + size) * (10 if step <= train["logging_steps"] else 1)
        if step % train["logging_steps"] == 0:
            row = {"step": step, "time_s": time_s, "throughput/step_s": 1.0}
            lines.append(row | {"train/tokens_seen": 100 * size * step})
    lines.append({"step": step, "time_s": time_s, "eval/mlm_loss": 8.0})
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
