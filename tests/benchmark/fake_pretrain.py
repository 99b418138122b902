"""Stands in for ``launch/pretrain.py``: the same flags, files, signals and exit codes, no model.

Its P@1 grows with the steps, most at learning rate 0.002. The learning rate makes it fail: above
0.1 it diverges, above 10 it refuses its input, above 100 it crashes. `FAKE_WAITS_FOR=RUN:OTHER`
makes RUN slow.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

argv = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
config = json.loads(Path(argv["--config"]).read_text())
output = Path(argv["--output_dir"])
assert argv["--resume_from_checkpoint"] == "latest"
rate, steps = config["train"]["learning_rate"], config["train"]["max_steps"]
with open(os.environ["FAKE_STARTS"], "a") as starts:
    starts.write(f"{output}\n")

if rate > 100:
    sys.exit("boom")
if rate > 10:
    print("error: data of another kind", file=sys.stderr)
    sys.exit(2)

time.sleep(float(os.environ.get("FAKE_IMPORTS_S", 0)))
run, _, other = os.environ.get("FAKE_WAITS_FOR", "").partition(":")
if run and str(output).endswith(run):  # it ends only after the other has begun
    deadline = time.monotonic() + 60
    while not (output.parents[2] / other / "metrics.jsonl").exists():
        if time.monotonic() > deadline:
            sys.exit("the other never began")
        time.sleep(0.02)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
checkpoint = output / "checkpoints" / "state"
first = int(checkpoint.read_text()) if checkpoint.exists() else 0


def save(step):
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(str(step))


metrics = (output / "metrics.jsonl").open("a")
for step in range(first, steps + 1):
    if rate > 0.1 and step == 2:
        print("trelm_ds.trainer.TrainingError: step 2: the loss was not finite", file=sys.stderr)
        sys.exit(1)
    p1 = step / steps * (1 - abs(rate - 0.002) * 100)
    row = {
        "step": step,
        "time_s": step * 0.5,
        "eval/mlm_loss": 9.0 - p1,
        "eval/select_p1": p1,
        "eval/report_p1": p1,
    }
    metrics.write(json.dumps(row) + "\n")
    metrics.flush()
    save(step)
    if stopped:
        sys.exit(75)
    time.sleep(float(os.environ["FAKE_STEP_S"]))
